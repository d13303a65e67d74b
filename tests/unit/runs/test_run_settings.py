"""The settings of a run: recorded by its first attempt, and the same in all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from job.distributed.processes import Alone
from job.distributed.ranks import Place
from job.errors import SettingsError, environment_name
from job.records import Pulled
from job.runs import stage_records
from job.runs.run_settings import agree_on_settings, compare_settings, parse_settings, write_settings
from job.settings.affects_result import common_settings
from job.settings.load import Settings, plain_values
from job.storage.base import MAX_READ_BYTES
from job.storage.local import LocalStore
from tests.example_run import DATASET

SETTINGS = {"train.epochs": 2}


def test_a_run_is_one_experiment(tmp_path: Path) -> None:
    """Settings that decide the result may not change between attempts; the error names both values."""
    store = LocalStore(tmp_path)
    compare_settings(store, {"train.epochs": 9})  # nobody has begun yet
    write_settings(store, SETTINGS)
    compare_settings(store, dict(SETTINGS))
    with pytest.raises(SettingsError, match=r"JOB_TRAIN__EPOCHS: this run began with 2, not 3"):
        compare_settings(store, {"train.epochs": 3})
    with pytest.raises(SettingsError, match=r"JOB_TRAIN__EPOCHS"):
        write_settings(store, {"train.epochs": 3})


class Second(Alone):
    """Process 1 of 2, to which process 0 says what `first` holds."""

    place = Place(rank=1, world_size=2)
    leads = False

    def __init__(self, first: dict[str, object]) -> None:
        self.first = first

    def broadcast(self, what: str, value: Callable[[], Any]) -> Any:
        """What process 0 found."""
        return self.first


def test_machines_have_the_same_settings() -> None:
    """A process whose settings differ from those of process 0 ends, with every one that does."""
    agree_on_settings(Second({"a": 1, "b": [2]}), {"a": 1, "b": (2,)})  # as JSON they are equal
    with pytest.raises(SettingsError, match="JOB_A: is 3 in process 1 and 1 in process 0") as caught:
        agree_on_settings(Second({"a": 1, "b": 2}), {"a": 3, "b": 4})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(("name", "value"), [("model.placement", "host"), ("train.sequence_parallel", "off")])
def test_machines_agree_on_what_they_compute_together(name: str, value: str) -> None:
    """Of the settings that do not affect the result, those by which machines wait for each other must be the same."""
    group, field = name.split(".")
    first, second = (
        common_settings(plain_values(Settings.model_validate(given))) for given in ({}, {group: {field: value}})
    )
    with pytest.raises(SettingsError, match=f"{environment_name(name)}: is '{value}' in process 1"):
        agree_on_settings(Second(first), second)


PULLED = Pulled(DATASET, "1" * 64, None, {"quiz": "2" * 64})


def settings_gone(store: LocalStore) -> None:
    """Somebody removes the file."""
    store.delete("settings.json")


def settings_cut(store: LocalStore) -> None:
    """Half of the file is left."""
    stored = store.read("settings.json")
    assert stored is not None
    store.write("settings.json", stored.data[: len(stored.data) // 2])


def settings_flipped(store: LocalStore) -> None:
    """A digit of the file changes."""
    stored = store.read("settings.json")
    assert stored is not None
    store.write("settings.json", stored.data.replace(b"2", b"3", 1))


def settings_blown_up(store: LocalStore) -> None:
    """Something large has the file's name."""
    store.write("settings.json", bytes(MAX_READ_BYTES + 1))


@pytest.mark.parametrize("damage", [settings_gone, settings_cut, settings_flipped, settings_blown_up])
def test_without_its_settings_the_stages_decide(tmp_path: Path, damage: Callable[[LocalStore], None]) -> None:
    """A run whose settings are gone or damaged goes on with those that its stages were done with, and no others."""
    store = LocalStore(tmp_path)
    write_settings(store, SETTINGS)
    record = TypeAdapter(Pulled).dump_json(PULLED).decode()
    store.write(
        "stages/pull.json",
        stage_records.render("stages/pull.json", record, stage_records.fingerprint(SETTINGS, PULLED)),
    )
    damage(store)
    for ask in (compare_settings, write_settings):
        if ask is compare_settings:
            with pytest.raises(SettingsError, match=r"settings\.json: is missing or damaged.*JOB_RUN__ID"):
                ask(store, {"train.epochs": 3})
        ask(store, SETTINGS)
    stored = store.read("settings.json")
    assert stored is not None
    assert parse_settings(stored.data) == SETTINGS


def test_settings_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """A run that was begun before settings carried a seal goes on, and stays one experiment."""
    store = LocalStore(tmp_path)
    store.write("settings.json", b'{"train.epochs": 2}')
    write_settings(store, SETTINGS)
    with pytest.raises(SettingsError, match="began with 2"):
        compare_settings(store, {"train.epochs": 3})


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """A setting that it did not know is left out, in the run's name too, while it has its default; else refused."""
    store = LocalStore(tmp_path)
    write_settings(store, SETTINGS)
    record = TypeAdapter(Pulled).dump_json(PULLED).decode()
    store.write(
        "stages/pull.json",
        stage_records.render("stages/pull.json", record, stage_records.fingerprint(SETTINGS, PULLED)),
    )
    defaults = {"train.epochs": 1, "eval.long_questions": "error", "data.mixture": ()}
    later = {**defaults, "train.epochs": 2}
    assert compare_settings(store, later, defaults) == SETTINGS
    with pytest.raises(SettingsError, match=r"JOB_TRAIN__EPOCHS: this run began with 2, not 3"):
        compare_settings(store, {**later, "train.epochs": 3}, defaults)
    with pytest.raises(SettingsError, match=r"JOB_EVAL__LONG_QUESTIONS: this run began with 'error', not 'cut'"):
        compare_settings(store, {**later, "eval.long_questions": "cut"}, defaults)


def test_a_setting_that_is_gone_is_held_against_the_run(tmp_path: Path) -> None:
    """A run whose settings name one that this version lacks is refused: nobody knows what it would have done."""
    store = LocalStore(tmp_path)
    write_settings(store, {**SETTINGS, "train.magic": 3})
    with pytest.raises(SettingsError, match=r"JOB_TRAIN__MAGIC: this run began with 3, not None"):
        compare_settings(store, SETTINGS)
