"""Where a run's base is loaded: as set, or where it fits, the same in all processes; otherwise a clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.common.formatting import size
from job.common.resources import available_bytes
from job.distributed.processes import Alone
from job.distributed.ranks import Place
from job.errors import SettingsError
from job.model.adapter_options import MANY_STEPS, PLAIN, AdapterOptions, make_options
from job.planning.input_checks import Preflight, _preview_adapter
from job.planning.preflight_models import preview_model
from job.planning.run_shape import shape_of_run
from job.stages import load, placement
from job.stages.placement import _fastest_that_fits
from job.storage.open import StorageOptions
from job.training.memory_model import MAIN_MEMORY_SHARE, packed_bytes, training_memory
from tests.unit.stages.test_first_values import settings_of, sources_of
from tests.unit.training.test_execution_plan import SETUP

GPU: Any = SimpleNamespace(type="cuda")


class Two(Alone):
    """One of two processes on a machine; the other one found the place `other`."""

    place = Place(0, 2, 0, 2)

    def __init__(self, other: str) -> None:
        self.other = other

    def gather(self, what: str, value: Any) -> list[Any]:
        """Both."""
        return [value, [self.other, "the other's reason"]]


def place(
    folder: Path, device: Any = GPU, processes: Any = None, options: AdapterOptions = PLAIN, **changes: str
) -> tuple[str, str]:
    """Where the base goes, and why."""
    settings = settings_of(folder, **changes)
    how: dict[str, Any] = {"device": device, "budget": 4096, "options": options}
    groups = settings.model, settings.train, settings.lora
    how["scoring_tokens"] = settings.eval.batch_tokens
    return placement.decide_placement(*groups, sources_of(settings, folder), processes or Alone(), **how)


def with_gpu_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """So many bytes of the GPU are free."""
    monkeypatch.setattr(placement, "free_gpu_bytes", lambda _: free)


def test_what_is_set_is_done(base_folder: Path) -> None:
    """Whatever the memory; on a CPU the base is where it computes unless something else is set."""
    assert place(base_folder, JOB_MODEL__PLACEMENT="gpu") == ("gpu", "")
    assert place(base_folder, JOB_MODEL__PLACEMENT="host") == ("host", "JOB_MODEL__PLACEMENT is host")
    assert place(base_folder, processes=Two("sharded"), JOB_MODEL__PLACEMENT="sharded")[0] == "sharded"
    assert place(base_folder, SimpleNamespace(type="cpu")) == ("gpu", "")


def test_it_goes_where_it_fits(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason has the figures; of different places the slower one is taken by all processes."""
    with_gpu_memory(monkeypatch, 1 << 30)
    assert place(base_folder) == ("gpu", "")
    assert place(base_folder, processes=Two("host")) == ("host", "the other's reason")
    with_gpu_memory(monkeypatch, 0)
    found, why = place(base_folder)
    assert found == "host"
    assert size(0, " ") in why
    assert place(base_folder, JOB_MODEL__KEEP_DEQUANTIZED="true") == ("gpu", "")
    monkeypatch.setattr(placement, "available_bytes", lambda: 1000)
    assert place(base_folder)[0] == "gpu"
    assert place(base_folder, processes=Two("gpu"))[0] == "sharded"


OPTIONS: tuple[dict[str, str], ...] = (
    {"JOB_LORA__LAYERS": ""},
    {"JOB_LORA__LAYERS": "0-1"},
    {"JOB_LORA__MODULES_TO_SAVE": "embed_tokens,lm_head"},
    {"JOB_MODEL__ADD_TOKENS": "<new>,<other>"},
    {"JOB_LORA__USE_DORA": "true"},
    {"JOB_LORA__INIT": "pissa"},
    {"JOB_LORA__INIT": "olora", "JOB_LORA__TARGET_MODULES": "q_proj"},
    {"JOB_LORA__KIND": "adalora", "JOB_LORA__INIT_RANK": "9"},
    {"JOB_LORA__RANK_PATTERN": "q_proj=32"},
    {"JOB_TRAIN__GRADIENT_CHECKPOINTING": "false"},
    {"JOB_TRAIN__GRADIENT_CHECKPOINTING": "true", "JOB_TRAIN__OPTIMIZER": "adamw_torch"},
    {"JOB_MODEL__DTYPE": "fp32", "JOB_MODEL__DOUBLE_QUANTIZATION": "false"},
)


@pytest.mark.parametrize("changes", OPTIONS, ids=",".join)
def test_the_plan_and_the_run_count_the_same(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    """Otherwise the run would keep a base on the GPU that the plan has in main memory, and run out of memory."""
    settings = settings_of(base_folder, **changes)
    with_gpu_memory(monkeypatch, 1 << 30)
    used: list[Any] = []
    monkeypatch.setattr(placement, "_fastest_that_fits", lambda setup, *_, **__: (used.append(setup), ("gpu", ""))[1])
    options = make_options(dict(settings.lora), MANY_STEPS, settings.model.add_tokens)
    place(base_folder, options=options, **changes)
    _, _, model = preview_model(str(base_folder), None, online=lambda: False, folder=tmp_path, storage=StorageOptions())
    _, _, adapter = _preview_adapter(settings, model)
    preflight = Preflight([], None, model, adapter, None, None, None, None)
    planned = shape_of_run(settings, preflight, []).setup
    assert planned is not None
    (setup,) = used
    assert replace(setup, targets=()) == replace(planned, targets=())
    assert set(setup.targets) == set(planned.targets)


def test_modules_that_are_trained_whole_take_the_base_off_the_gpu(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients and optimizer of embedding and output layer may need more than all else."""
    whole = {"JOB_LORA__MODULES_TO_SAVE": "embed_tokens,lm_head"}
    for free in range(1 << 20, 1 << 28, 1 << 19):
        with_gpu_memory(monkeypatch, free)
        if place(base_folder)[0] == "gpu":
            break
    assert (
        place(base_folder, options=make_options(dict(settings_of(base_folder, **whole).lora), 9), **whole)[0] == "host"
    )


def test_what_cannot_be_is_refused(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the base is loaded, naming the setting."""
    monkeypatch.setattr(placement, "available_bytes", lambda: 1000)
    with pytest.raises(SettingsError, match=r"JOB_MODEL__PLACEMENT: is host, and .* of main memory"):
        place(base_folder, JOB_MODEL__PLACEMENT="host")


def test_every_process_needs_a_copy_in_the_containers_memory(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit by cgroup version 2 that one copy fits into and two do not: refused with the figures, and not killed."""
    settings = settings_of(base_folder)
    setup = placement.setup_before_loading(settings.model, settings.train, settings.lora, base_folder, PLAIN)
    assert setup is not None
    copy = packed_bytes(setup)
    (tmp_path / "memory.max").write_text(f"{int(1.9 * copy / MAIN_MEMORY_SHARE) + (1 << 20)}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 20}\n")
    monkeypatch.setattr(placement, "available_bytes", lambda: available_bytes(tmp_path, tmp_path / "own"))
    assert place(base_folder, JOB_MODEL__PLACEMENT="host")[0] == "host"
    refused = rf"{size(2 * copy, ' ')} of main memory, {size(copy, ' ')} for each of 2 processes; of .* container"
    with pytest.raises(SettingsError, match=refused):
        place(base_folder, processes=Two("host"), JOB_MODEL__PLACEMENT="host")


def test_the_plan_says_where_it_is(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the record of the run, with the reason. Loading also has processes agree on kernels."""
    agreed = list[str]()
    for name in ("agree_on_kernels", "agree_on_attention"):
        monkeypatch.setattr(load, name, lambda *_, name=name: agreed.append(name))
    settings = settings_of(base_folder, JOB_MODEL__PLACEMENT="host")
    plan = load.load(settings, sources_of(settings, base_folder)).plan
    assert plan.base_held == "host"
    assert plan.reason.endswith("JOB_MODEL__PLACEMENT is host")
    assert agreed == ["agree_on_kernels", "agree_on_attention"]


@pytest.mark.parametrize(("capability", "place"), [((8, 0), "gpu"), ((7, 0), "host")])
def test_a_gpu_without_a_kernel_for_long_rows_needs_the_memory_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], place: str
) -> None:
    """So the base goes elsewhere before it is loaded, as `plan` says."""
    memory = 2 * training_memory(SETUP, 40_000, tiles=True).total
    assert memory < training_memory(SETUP, 40_000).total
    monkeypatch.setattr(placement, "free_gpu_bytes", lambda _: memory)
    monkeypatch.setattr(placement, "compute_capability", lambda: capability)
    how = {"global_batch_size": 2, "budget": 1024, "scoring_tokens": 1024, "gigabytes": None}
    where: dict[str, Any] = {"placements": ("gpu", "host"), "tiles": True, **how}
    assert _fastest_that_fits(SETUP, [40_000], **where)[0] == place
    if place == "gpu":  # where a row is divided, the base may stay
        found = [_fastest_that_fits(SETUP, [120_000], divide_over=over, **where)[0] for over in (1, 4)]
        assert found == ["host", "gpu"]
