"""The settings of a run: kept by its first attempt, and the same in all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.distributed.processes import Alone
from job.distributed.ranks import Place
from job.errors import SettingsError
from job.runs.run_settings import agree_on_settings, compare_settings, keep_settings
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


class Second(Alone):
    """Process 1 of 2, to which process 0 says what `first` holds."""

    place = Place(rank=1, world_size=2)
    leads = False

    def __init__(self, first: dict[str, object]) -> None:
        self.first = first

    def share(self, what: str, value: Callable[[], Any]) -> Any:
        """What process 0 found."""
        return self.first


def test_machines_have_the_same_settings() -> None:
    """A process whose settings differ from those of process 0 ends, with every one that does."""
    agree_on_settings(Second({"a": 1, "b": [2]}), {"a": 1, "b": (2,)})  # as JSON they are equal
    with pytest.raises(SettingsError, match="a: is 3 in process 1 and 1 in process 0") as caught:
        agree_on_settings(Second({"a": 1, "b": 2}), {"a": 3, "b": 4})
    assert len(caught.value.problems) == 2
