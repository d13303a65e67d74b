"""Energy of the GPUs this process uses, from NVIDIA's management library (NVML). Sole user of pynvml."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Lock, Thread
from typing import Any

from job import log

SAMPLE_SECONDS = 1.0

Joules = Callable[[], float | None]
"""The energy that the GPUs have used since the meter was opened; None if it cannot be measured."""


def visible_gpus() -> list[str]:
    """The GPUs that torch sees in this process, by the names they have in all processes and in NVML."""
    import torch

    if not torch.cuda.is_available():
        return []
    names = (str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count()))
    return [f"GPU-{name.removeprefix('GPU-')}" for name in names]


def open_meter(names: Sequence[str]) -> Joules:
    """A meter of this machine's GPUs, from now on; if one cannot be metered, the meter returns None.

    GPUs since Volta count the energy they take; from older ones the power is sampled every second. One that is shared
    (MIG) tells neither, and those of another machine cannot be asked.

    Args:
        names: From `visible_gpus`; none on a CPU.
    """
    if not names:
        return _unknown
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
        return _counting(pynvml, gpus) or _sampling(pynvml, gpus)
    except pynvml.NVMLError as error:
        log.get_logger().info("the GPUs' energy cannot be measured", why=str(error))
        return _unknown


def _unknown() -> None:
    return None


def _counting(nvml: Any, gpus: Sequence[Any]) -> Joules | None:
    """By the GPUs' own counters of millijoules; None where one of them has none."""

    def total() -> int:
        return sum(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in gpus)

    try:
        start = total()
    except nvml.NVMLError_NotSupported:
        return None

    def joules() -> float | None:
        try:
            return max(0, total() - start) / 1000  # a driver that was loaded again counts from 0
        except nvml.NVMLError:
            return None

    return joules


def _sampling(nvml: Any, gpus: Sequence[Any]) -> Joules:
    """By the power, sampled in a separate thread, between two samples their mean."""

    def watts() -> float:
        return float(sum(nvml.nvmlDeviceGetPowerUsage(gpu) for gpu in gpus)) / 1000

    meter = _SampledPower(watts, nvml.NVMLError)
    Thread(target=meter.run, name="energy", daemon=True).start()
    return meter.joules


class _SampledPower:
    """Adds up power over time, until the power cannot be read any more."""

    def __init__(self, watts: Callable[[], float], failure: type[Exception]) -> None:
        self._watts, self._failure, self._lock = watts, failure, Lock()
        self._total, self._at, self._power = 0.0, time.monotonic(), watts()

    def run(self) -> None:
        while True:
            time.sleep(SAMPLE_SECONDS)
            if self.joules() is None:
                return

    def joules(self) -> float | None:
        with self._lock:
            try:
                power, now = self._watts(), time.monotonic()
            except self._failure:
                return None
            self._total += (power + self._power) / 2 * (now - self._at)
            self._at, self._power = now, power
            return self._total
