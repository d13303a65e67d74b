"""Loading: what a later attempt of a run must find as the first one did."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from job.errors import SettingsError
from job.model.quantized_cache.layout import CachedBase
from job.stages.load import check_experts


def test_a_mixture_of_an_earlier_version_is_not_quantized_anew() -> None:
    """Its record has no number of quantized experts: with the base that it kept it goes on, and with another not."""
    began = TypeAdapter(CachedBase).validate_json('{"key": "00", "index_sha256": "11"}')
    check_experts(None, CachedBase(quantized_experts=96))
    check_experts(began, CachedBase("00", "11"))
    check_experts(CachedBase(quantized_experts=96), CachedBase("00", "11", 96))
    with pytest.raises(SettingsError, match=r"JOB_MODEL__ID.*holds in 4 bits, and .* held in 16 bits; .*JOB_RUN__ID"):
        check_experts(began, CachedBase("00", "11", 96))
