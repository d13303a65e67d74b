"""The settings of a run: kept by its first attempt, and the same in all."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import SettingsError
from job.runs.run_settings import compare_settings, keep_settings
from job.storage.local import LocalStore

SETTINGS = {"train.epochs": 2}


def test_a_run_is_one_experiment(tmp_path: Path) -> None:
    """Settings that decide the result may not change between attempts; the error names both values."""
    store = LocalStore(tmp_path)
    compare_settings(store, {"train.epochs": 9})  # nobody has begun yet
    keep_settings(store, SETTINGS)
    compare_settings(store, dict(SETTINGS))
    with pytest.raises(SettingsError, match=r"train\.epochs: this run began with 2, not 3"):
        compare_settings(store, {"train.epochs": 3})
    with pytest.raises(SettingsError, match=r"train\.epochs"):
        keep_settings(store, {"train.epochs": 3})
