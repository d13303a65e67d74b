"""Model types whose adapters would not be what was trained are refused before anything is fetched or trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.errors import SettingsError
from job.model.files import NOT_RELOADED, read_config


@pytest.mark.parametrize("kind", sorted(NOT_RELOADED))
def test_a_model_whose_adapter_cannot_be_loaded_again_is_refused(tmp_path: Path, kind: str) -> None:
    """Training it would publish an adapter that answers differently from the one that was scored."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    with pytest.raises(SettingsError, match=f"{kind} model, whose adapters PEFT does not load"):
        read_config(tmp_path)
