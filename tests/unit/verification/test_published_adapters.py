"""Adapters of every kind: the published file is the last checkpoint's, and the manifest describes it correctly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.model.adapter_files import save_adapter
from job.model.adapter_options import AdaLora, AdapterOptions
from job.model.lora import trainable
from job.results.adapter_facts import CONFIG, WEIGHTS, adapter_facts
from job.verification.check_checkpoints import _adapters_differ
from job.verification.check_training import _adapter
from tests.helpers import fill_adapter, make_model

ADALORA = AdaLora(init_r=12, target_r=8, tinit=0, tfinal=1, delta_t=1, orth_reg_weight=0.5, total_step=3)
OPTIONS = {
    "plain": AdapterOptions(),
    "dora": AdapterOptions(use_dora=True),
    "pissa": AdapterOptions(init="pissa"),
    "adalora": AdapterOptions(kind="adalora", adalora=ADALORA),
    "whole": AdapterOptions(modules_to_save=("lm_head",), added_tokens=("<ask>", "<tell>")),
}
STATE = "checkpoints/adapter.safetensors"
FOLDER = "artifacts/adapter/"


def publish(folder: Path, base_folder: Path, options: AdapterOptions) -> dict[str, Path]:
    """An adapter as a checkpoint holds it and as it is published; by the names of the files in a run."""
    model = fill_adapter(make_model(base_folder, rank=8, options=options))
    if options.adalora is not None:
        for step in (1, 2, 3):
            for parameter in trainable(model).values():
                parameter.grad = torch.ones_like(parameter)
            model.base_model.update_and_allocate(step)
    folder.mkdir()
    save_file({name: p.detach().contiguous() for name, p in trainable(model).items()}, folder / "state.safetensors")
    save_adapter(model, folder, base="the-base", revision=None)
    return {STATE: folder / "state.safetensors", FOLDER + CONFIG: folder / CONFIG, FOLDER + WEIGHTS: folder / WEIGHTS}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_published_adapter_is_the_last_checkpoints(base_folder: Path, tmp_path: Path, name: str) -> None:
    """Names and ranks that PEFT changes when it saves are no difference; one number in the file is."""
    copies = publish(tmp_path / "adapter", base_folder, OPTIONS[name])
    assert not list(_adapters_differ(STATE, FOLDER + WEIGHTS, copies))
    tensors = load_file(copies[FOLDER + WEIGHTS])
    last = max(tensors)
    tensors[last].view(-1)[0] += 1
    save_file(tensors, copies[FOLDER + WEIGHTS])
    (difference,) = _adapters_differ(STATE, FOLDER + WEIGHTS, copies)
    assert last in str(difference)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("plain", 8 * 14), ("dora", 8 * 14), ("pissa", 16 * 14), ("adalora", 8 * 14), ("whole", 8 * 14)],
)
def test_the_manifest_says_what_the_file_holds(base_folder: Path, tmp_path: Path, name: str, ranks: int) -> None:
    """Kind, options, modules, ranks and numbers follow from the files; another claim is a difference."""
    copies = publish(tmp_path / "adapter", base_folder, OPTIONS[name])
    found: dict[str, Any] = adapter_facts(copies[FOLDER + CONFIG], copies[FOLDER + WEIGHTS])
    assert (found["modules"], found["use_dora"], found["use_rslora"]) == (14, name == "dora", False)
    assert found["kind"] == ("adalora" if name == "adalora" else "lora")
    assert found["ranks"] == ranks if name != "adalora" else found["ranks"] <= 12 * 14
    assert found["parameters"] == sum(tensor.numel() for tensor in load_file(copies[FOLDER + WEIGHTS]).values())
    assert (found["modules_to_save"], found["trained_tokens"]) == ((["lm_head"], 2) if name == "whole" else ([], 0))
    claimed = {**found, "init": "default"}
    assert not list(_adapter(claimed, copies))
    earlier = {name: value for name, value in claimed.items() if name not in {"modules_to_save", "trained_tokens"}}
    assert not list(_adapter(earlier, copies))  # of a version that did not know them
    (difference,) = _adapter({**claimed, "ranks": found["ranks"] + 1}, copies)
    assert "ranks" in str(difference)
    copies[FOLDER + CONFIG].write_text("[]")
    assert "no adapter" in str(next(iter(_adapter(claimed, copies))))
