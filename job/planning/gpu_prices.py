"""Common cloud GPUs: memory, speed and price. To add one: a line in `GPUS`, from its data sheet and `PRICES`."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As cloud providers call it.
        memory_bytes: As nvidia-smi shows it, ECC on.
        flops: Dense operations a second on its matrix units in bf16 (fp16 where it has no bf16), by its data sheet;
            data sheets often print the figure for sparse matrices, which is twice that.
        bandwidth: Bytes a second of its memory, by its data sheet.
        capability: CUDA compute capability.
        usd_per_hour: See `PRICES`.
        machine: The instance type the price is for; `/ 8` where it has eight GPUs and the price is an eighth.
    """

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float
    capability: tuple[int, int]
    usd_per_hour: float
    machine: str


PRICES = "AWS EC2 on demand, Linux, us-east-1, as listed in 2026 by third parties; prices move, and spot is cheaper"
"""Source of the prices. They are assumptions: JOB_COST__USD_PER_HOUR replaces them."""

GPUS = (
    Gpu("T4", 15_360 * MIB, 65e12, 320e9, (7, 5), 0.526, "g4dn.xlarge"),
    Gpu("L4", 23_034 * MIB, 121e12, 300e9, (8, 9), 0.805, "g6.xlarge"),
    Gpu("A10G", 23_028 * MIB, 70e12, 600e9, (8, 6), 1.006, "g5.xlarge"),
    Gpu("L40S", 46_068 * MIB, 362e12, 864e9, (8, 9), 1.861, "g6e.xlarge"),
    Gpu("A100 40GB", 40_960 * MIB, 312e12, 1555e9, (8, 0), 2.745, "p4d.24xlarge / 8"),
    Gpu("A100 80GB", 81_920 * MIB, 312e12, 2039e9, (8, 0), 3.431, "p4de.24xlarge / 8"),
    Gpu("H100", 81_559 * MIB, 989e12, 3350e9, (9, 0), 6.880, "p5.48xlarge / 8"),
    Gpu("H200", 143_771 * MIB, 989e12, 4800e9, (9, 0), 7.912, "p5en.48xlarge / 8"),
)
