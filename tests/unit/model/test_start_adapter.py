"""The adapter that training starts from: what fits is loaded bit by bit, what does not is refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.errors import DataError, JobError, SettingsError
from job.model.adapter_files import save_adapter
from job.model.lora import trainable
from job.model.published_names import PublishedNames
from job.model.start_adapter import CONFIG, WEIGHTS, check_start, find_start, hash_start, load_start
from job.storage.open import StorageOptions
from tests.helpers import fill_adapter, make_model

NAMES = PublishedNames("")


@pytest.fixture(scope="module")
def saved(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filled adapter of the tiny base, as the job publishes it."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(fill_adapter(make_model(base_folder)), folder, base="base", revision=None, names=NAMES)
    return folder


def test_an_adapter_is_loaded_bit_by_bit(saved: Path, base_folder: Path) -> None:
    """What the job published is found by its path, fits, and is in the model afterwards."""
    folder = find_start(str(saved), Path("unused"), StorageOptions())
    check_start(folder, rank=16, alpha=16)
    model = make_model(base_folder)
    load_start(model, folder, NAMES)
    expected = trainable(fill_adapter(make_model(base_folder)))
    assert all(torch.equal(parameter, expected[name]) for name, parameter in trainable(model).items())


def config(**changes: Any) -> Callable[[Path], None]:
    """Changes fields of the adapter's configuration."""

    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the adapter's tensors."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return write


def pickled(folder: Path) -> None:
    """Leaves a pickle where safetensors were."""
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    """Puts a NaN into one of the tensors."""
    next(iter(tensors.values()))[0, 0] = torch.nan


WRONG: dict[str, tuple[Callable[[Path], None], type[JobError], str]] = {
    "rank": (config(r=8), SettingsError, "JOB_LORA__RANK"),
    "scale": (config(lora_alpha=32), SettingsError, "JOB_LORA__ALPHA"),
    "another method": (config(peft_type="IA3"), SettingsError, "only LoRA"),
    "DoRA": (config(use_dora=True), SettingsError, "JOB_LORA__USE_DORA"),
    "rank by layer": (config(rank_pattern={"q_proj": 4}), SettingsError, "JOB_LORA__RANK_PATTERN"),
    "whole modules": (config(modules_to_save=["lm_head"]), SettingsError, "JOB_LORA__MODULES_TO_SAVE"),
    "changed base": (config(init_lora_weights="pissa"), SettingsError, "changes the base"),
    "pickle": (pickled, DataError, "pickle"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), DataError, CONFIG),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{") and None, DataError, "cannot|can be read"),
    "cut": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99) and None, DataError, "no safetensors file"),
    "NaN": (weights(spoil), DataError, "not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_without_the_base(case: str, saved: Path, tmp_path: Path) -> None:
    """Each refusal says why, in terms of the settings."""
    change, kind, why = WRONG[case]
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    change(folder)
    with pytest.raises(kind, match=why):
        check_start(find_start(str(folder), Path("unused"), StorageOptions()), rank=16, alpha=16)


@pytest.mark.parametrize("change", [lambda t: t.popitem(), lambda t: t.update({"x": torch.zeros(1)})])
def test_other_layers_are_refused(change: Any, saved: Path, base_folder: Path, tmp_path: Path) -> None:
    """A tensor too few or too many means another base or other target modules."""
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    weights(change)(folder)
    with pytest.raises(SettingsError, match="JOB_LORA__TARGET_MODULES"):
        load_start(make_model(base_folder), folder, NAMES)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    """It is not taken for a name on the hub."""
    with pytest.raises(DataError, match=r"JOB_LORA__START: .* does not exist"):
        find_start(str(tmp_path / "none"), tmp_path, StorageOptions())


def test_the_hash_is_over_both_files(saved: Path, tmp_path: Path) -> None:
    """A changed scale is another start as well as a changed number."""
    found = {hash_start(saved)}
    for name, change in (("scale", config(lora_alpha=32)), ("number", weights(spoil))):
        folder = Path(shutil.copytree(saved, tmp_path / name))
        change(folder)
        found.add(hash_start(folder))
    assert len(found) == 3
