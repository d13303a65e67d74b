"""This machine and its software: versions of packages, processor, GPUs, driver, commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("accelerate", "bitsandbytes", "datasets", "lm-eval", "numpy", "peft"),
    *("safetensors", "scipy", "tokenizers", "torch", "transformers", "trl"),
)


def software() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    return {name: _version(name) for name in PACKAGES}


@cache
def _version(package: str) -> str:
    """The version of an installed package; every checkpoint records it, and the metadata takes long to parse."""
    return metadata.version(package)


def hardware() -> dict[str, Any]:
    """What can change a result or its speed: platform, processor, memory in bytes, GPUs, driver, CUDA."""
    import psutil
    import torch

    on_gpu = torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if on_gpu else []
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [
            {"name": d.name, "memory_bytes": d.total_memory, "capability": f"{d.major}.{d.minor}"} for d in devices
        ],
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def _cpu_name() -> str:
    """The processor's name from /proc/cpuinfo, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def git_commit() -> str | None:
    """The commit of the code: from job/COMMIT, which the image's build writes, or of the checkout; None if unknown."""
    root = Path(__file__).parents[2]
    stamp = root / "job/COMMIT"
    if stamp.exists():
        return stamp.read_text(encoding="utf-8").strip() or None
    return _output("git", "-C", str(root), "rev-parse", "HEAD") if (root / ".git").exists() else None


def _output(*command: str) -> str | None:
    """The output of a program, without white space around it; None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - git and such, with arguments of ours
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
