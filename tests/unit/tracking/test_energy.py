"""Energy of the GPUs, with a fake NVML: what is reported, and that unknown values are reported as unknown."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.tracking import energy


class NVMLError(Exception):
    """As pynvml's."""


class NotSupported(NVMLError):
    """As pynvml's for what a GPU does not have."""


class Nvml(SimpleNamespace):
    """GPUs by identity, and pynvml's functions; `counts` and `draws` are None where that is not supported."""

    NVMLError, NVMLError_NotSupported = NVMLError, NotSupported

    def __init__(self, names: list[str]) -> None:
        super().__init__(
            missing=False,
            gpus=names,
            counts=dict.fromkeys(names, 1000),
            draws=dict.fromkeys(names, 50_000),
            nvmlInit=self.init,
            nvmlDeviceGetHandleByUUID=self.handle,
            nvmlDeviceGetTotalEnergyConsumption=self.energy,
            nvmlDeviceGetPowerUsage=self.power,
        )

    def init(self) -> None:
        """The library is there."""
        if self.missing:
            raise NVMLError("NVML Shared Library Not Found")

    def handle(self, name: str) -> str:
        """Knows the GPUs by their full names."""
        if name not in self.gpus:
            raise NVMLError("Not Found")
        return name

    def energy(self, gpu: str) -> int:
        """Millijoules since the driver was loaded."""
        if self.counts is None:
            raise NotSupported
        return int(self.counts[gpu])

    def power(self, gpu: str) -> int:
        """Milliwatts."""
        if (draws := self.draws) is None:  # read once: a test takes them away while a thread asks
            raise NotSupported("no power either")
        return int(draws[gpu])


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """NVML with three GPUs, of which torch sees two."""
    fake = Nvml(["GPU-a", "GPU-b", "GPU-c"])
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ba"[index]))
    return fake


def test_without_a_gpu_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the energy is not known, which is not 0; NVML is not even asked."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.open_meter(energy.visible_gpus())() is None


def test_counters_are_read_of_the_gpus_that_torch_sees(nvml: Nvml) -> None:
    """Joules since the meter was opened, over the visible GPUs only; another job's GPU does not count."""
    joules = energy.open_meter(energy.visible_gpus())
    nvml.counts.update({"GPU-a": 3000, "GPU-b": 4500, "GPU-c": 10**9})
    assert joules() == 5.5


def test_without_a_counter_power_is_sampled(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old GPUs tell their power: 100 W for a while is so many joules."""
    monkeypatch.setattr(energy, "SAMPLE_SECONDS", 0.01)
    nvml.counts = None
    began = time.monotonic()
    joules = energy.open_meter(energy.visible_gpus())
    opened = time.monotonic()
    time.sleep(0.2)
    asked = time.monotonic()
    found = joules()
    assert found is not None
    assert 100 * (asked - opened) <= found <= 100 * (time.monotonic() - began)
    nvml.draws = None  # the sampling thread ends
    assert joules() is None


@pytest.mark.parametrize("broken", [{"missing": True}, {"gpus": []}, {"counts": None, "draws": None}])
def test_what_nvml_does_not_tell_is_not_known(nvml: Nvml, broken: dict[str, Any]) -> None:
    """No library, a GPU it does not know (MIG), neither counter nor power: None, and the run goes on."""
    vars(nvml).update(broken)
    assert energy.open_meter(energy.visible_gpus())() is None


def test_a_driver_that_was_loaded_again_gives_no_negative_energy(nvml: Nvml) -> None:
    """The counter starts over with the driver."""
    joules = energy.open_meter(energy.visible_gpus())
    nvml.counts.update({"GPU-a": 0, "GPU-b": 0})
    assert joules() == 0
