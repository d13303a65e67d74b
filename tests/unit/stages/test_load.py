"""Loading: what a later attempt of a run must find unchanged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from job import pipeline
from job.errors import SettingsError
from job.model.quantized_cache.layout import CachedBase
from job.records import Pulled
from job.runs.layout import BASE
from job.settings.load import load_settings
from job.stages import load
from tests.attempts import make_attempt
from tests.example_run import DATASET

EARLIER = TypeAdapter(CachedBase).validate_json('{"key": "00", "index_sha256": "11"}')
"""As a version recorded it that left experts in 16 bits."""


def test_a_mixture_goes_on_as_it_began() -> None:
    """A run's first attempt, one of an earlier version with the base that it kept, one with experts in 4 bits."""
    load.check_experts(None, CachedBase(quantized_experts=96))
    load.check_experts(EARLIER, CachedBase("00", "11"))
    load.check_experts(CachedBase(quantized_experts=96), CachedBase("00", "11", 96))


def test_a_mixture_of_an_earlier_version_is_not_quantized_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its base is gone, it is refused before anything is recorded."""
    monkeypatch.setattr(load, "load", lambda *_, **__: SimpleNamespace(kept_base=CachedBase(quantized_experts=96)))
    attempt = make_attempt(tmp_path, {BASE: EARLIER})
    sources: Any = SimpleNamespace(record=Pulled(DATASET, "0" * 64, None, {}))
    with pytest.raises(SettingsError, match=r"JOB_MODEL__ID.*keeps in 4 bits, but .* kept in 16 bits; .*JOB_RUN__ID"):
        pipeline._load(attempt, load_settings(["--preset=demo"], {}), sources)
