"""Which machine's price a forecast uses: that of the smallest with the GPUs and the main memory needed."""

from __future__ import annotations

from itertools import pairwise

import pytest

from job.planning.gpu_prices import GPUS, Gpu, Machine

GIB = 1024**3
MACHINES = (
    Machine("large", 8, 800, 16.0),
    Machine("roomy", 4, 400, 10.0),
    Machine("small", 1, 50, 1.0),
    Machine("cheap", 4, 200, 6.0),
    Machine("plain", 1, 100, 1.5),
    Machine("unknown", 2, None, 2.5),
)


@pytest.mark.parametrize(
    ("gpus", "gib", "name"),
    [
        (1, 0, "small"),
        (1, 50, "small"),  # exactly what it has
        (1, 51, "plain"),
        (1, 101, "small"),  # no machine has more than 100 GiB for one GPU: the smallest with the GPU
        (2, 0, "unknown"),
        (2, 1, "cheap"),  # 100 GiB of its 200 are for two of four GPUs; the other's memory is not known
        (2, 100, "cheap"),
        (2, 101, "roomy"),
        (4, 0, "cheap"),
        (5, 0, "large"),
        (3, 300, "roomy"),  # 300 of its 400, and 300 of the 800 of `large`
        (3, 301, "cheap"),
        (9, 0, None),
    ],
)
def test_the_smallest_machine_that_is_enough(gpus: int, gib: int, name: str | None) -> None:
    """Of as many GPUs the cheapest. Main memory belongs to the GPUs in equal shares."""
    found = Gpu("X", GIB, 1.0, 1.0, (8, 0), MACHINES).machine(gpus, gib * GIB)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("gpus", "name"), [(8, "large"), (4, "large / 2"), (2, "large / 4"), (1, "large / 8"), (3, "large x 3/8")]
)
def test_a_share_of_a_machine_has_its_own_name(gpus: int, name: str) -> None:
    """The price is of this share; main memory goes with it."""
    machine = MACHINES[0]
    assert machine.name_for(gpus) == name
    assert machine.memory_for(gpus) == gpus * 100 * GIB
    assert machine.usd_per_gpu == 2.0
    assert Machine("unknown", 2, None, 2.5).memory_for(1) is None


def test_the_known_machines_are_plausible() -> None:
    """Each is listed once, with its family; of as many GPUs, more main memory costs more."""
    for gpu in GPUS:
        names = [machine.name for machine in gpu.machines]
        assert len({*names}) == len(names)
        assert len({name.partition(".")[0] for name in names}) == 1
        by_size = sorted(gpu.machines, key=lambda one: (one.gpus, one.memory_gib or 0))
        for smaller, larger in pairwise(by_size):
            if smaller.gpus == larger.gpus:
                assert smaller.usd_per_hour < larger.usd_per_hour
