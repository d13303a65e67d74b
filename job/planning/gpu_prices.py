"""Common cloud GPUs: memory and speed, and machines with them: number of GPUs, main memory, price.

To add one: a line in `GPUS`, from its data sheet, with machines from `PRICES`.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Machine:
    """An instance type of a cloud.

    Attributes:
        name: As its provider calls it.
        gpus: How many GPUs it has.
        memory_gib: Its main memory in GiB; None where it is not known.
        usd_per_hour: Price of the whole machine; see `PRICES`.
    """

    name: str
    gpus: int
    memory_gib: int | None
    usd_per_hour: float

    @property
    def usd_per_gpu(self) -> float:
        """The share of the price of one of its GPUs."""
        return self.usd_per_hour / self.gpus

    def memory_for(self, gpus: int) -> int | None:
        """Bytes of main memory that belong to `gpus` of its GPUs, an equal share for each; None if not known."""
        return None if self.memory_gib is None else self.memory_gib * GIB * gpus // self.gpus

    def name_for(self, gpus: int) -> str:
        """Its name, with the part that `gpus` of its GPUs are, of which the price is."""
        if gpus == self.gpus:
            return self.name
        return f"{self.name} / {self.gpus // gpus}" if self.gpus % gpus == 0 else f"{self.name} x {gpus}/{self.gpus}"


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
        machines: Machines that have it.
    """

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float
    capability: tuple[int, int]
    machines: tuple[Machine, ...]

    def machine(self, gpus: int, main_memory: int = 0) -> Machine | None:
        """The smallest machine with at least `gpus` of them, and so many bytes of main memory for these.

        Where none is known to have the memory, the smallest with the GPUs; None where none has these.
        """
        large = [machine for machine in self.machines if machine.gpus >= gpus]
        enough = [machine for machine in large if (machine.memory_for(gpus) or 0) >= main_memory]
        return min(enough or large, key=lambda machine: (machine.gpus, machine.usd_per_hour), default=None)


PRICES = "AWS EC2 on demand, Linux, us-east-1, as listed in 2026 by third parties; prices move, and spot is cheaper"
"""Source of the prices. They are assumptions: JOB_COST__USD_PER_HOUR replaces them.

GPUs and main memory of all machines, and prices of those with several GPUs: github.com/tsaol/aws-gpu, January 2026,
from instances.vantage.sh. The main memory agrees with AWS Batch's user guide, "Run GPU jobs" (g4dn, g5, g6), and with
torchx's named_resources_aws.py (all but g6), as far as these list them; read in November 2026."""


def _sizes(family: str, *sizes: tuple[str, int, int, float]) -> tuple[Machine, ...]:
    return tuple(Machine(f"{family}.{name}", gpus, memory_gib, price) for name, gpus, memory_gib, price in sizes)


_G4DN = _sizes(
    "g4dn",
    ("xlarge", 1, 16, 0.526),
    ("2xlarge", 1, 32, 0.752),
    ("4xlarge", 1, 64, 1.204),
    ("8xlarge", 1, 128, 2.176),
    ("16xlarge", 1, 256, 4.352),
    ("12xlarge", 4, 192, 3.912),
    ("metal", 8, 384, 7.824),
)
_G5 = _sizes(
    "g5",
    ("xlarge", 1, 16, 1.006),
    ("2xlarge", 1, 32, 1.212),
    ("4xlarge", 1, 64, 1.624),
    ("8xlarge", 1, 128, 2.448),
    ("16xlarge", 1, 256, 4.096),
    ("12xlarge", 4, 192, 5.672),
    ("24xlarge", 4, 384, 8.144),
    ("48xlarge", 8, 768, 16.288),
)
_G6 = _sizes(
    "g6",
    ("xlarge", 1, 16, 0.805),
    ("2xlarge", 1, 32, 0.978),
    ("4xlarge", 1, 64, 1.323),
    ("8xlarge", 1, 128, 2.014),
    ("16xlarge", 1, 256, 3.397),
    ("12xlarge", 4, 192, 4.602),
    ("24xlarge", 4, 384, 6.675),
    ("48xlarge", 8, 768, 13.350),
)
_G6E = _sizes(
    "g6e",
    ("xlarge", 1, 32, 1.861),
    ("2xlarge", 1, 64, 2.242),
    ("4xlarge", 1, 128, 3.004),
    ("8xlarge", 1, 256, 4.529),
    ("16xlarge", 1, 512, 7.577),
    ("12xlarge", 4, 384, 10.493),
    ("24xlarge", 4, 768, 15.066),
    ("48xlarge", 8, 1536, 30.131),
)

GPUS = (
    Gpu("T4", 15_360 * MIB, 65e12, 320e9, (7, 5), _G4DN),
    Gpu("L4", 23_034 * MIB, 121e12, 300e9, (8, 9), _G6),
    Gpu("A10G", 23_028 * MIB, 70e12, 600e9, (8, 6), _G5),
    Gpu("L40S", 46_068 * MIB, 362e12, 864e9, (8, 9), _G6E),
    Gpu("A100 40GB", 40_960 * MIB, 312e12, 1555e9, (8, 0), _sizes("p4d", ("24xlarge", 8, 1152, 21.958))),
    Gpu("A100 80GB", 81_920 * MIB, 312e12, 2039e9, (8, 0), _sizes("p4de", ("24xlarge", 8, 1152, 27.447))),
    Gpu("H100", 81_559 * MIB, 989e12, 3350e9, (9, 0), _sizes("p5", ("48xlarge", 8, 2048, 55.040))),
    Gpu("H200", 143_771 * MIB, 989e12, 4800e9, (9, 0), _sizes("p5en", ("48xlarge", 8, 2048, 63.296))),
)
