"""Imports of libraries, without what they import too and the job does not use.

Libraries import an optional package at the top of a module if it is installed: TRL imports wandb, transformers' losses
for images import scipy. Each takes as long as TRL itself, and the job needs them later or never.

Each function here saves time and nothing else: where a newer library no longer fits one of them, what it leaves out is
imported as usual. `tests/unit/stages/test_preload.py` holds what is left out, so that this is noticed.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

MAX_READ_AHEAD = 64 << 20
"""Bytes. Of larger files, which are CUDA's libraries, imports read a part only."""


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Hides packages from imports inside the `with` block, as if they were not installed.

    A package that is imported already stays visible. Name also the packages that need a hidden one. This holds for all
    threads, so no other thread may import the packages meanwhile. The means is `None` in `sys.modules`, as Python's
    reference describes it.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:  # otherwise other code has imported it anyway
                del sys.modules[name]


@contextmanager
def distributions_read_when_needed() -> Iterator[None]:
    """Delays the reads of `importlib.metadata.packages_distributions` in the `with` block until the result is used.

    It reads the metadata of every installed package. TRL calls it on import and uses the result only to find the
    version of vLLM or Liger, where they are installed.
    """
    original = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: _Distributions(original)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = original


class _Distributions(Mapping[str, list[str]]):
    """The answer of `read`, which is called at the first use."""

    def __init__(self, read: Callable[[], Mapping[str, list[str]]]) -> None:
        self._read = cache(read)

    def __getitem__(self, name: str) -> list[str]:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def imported_files() -> list[str]:
    """The files that imports of this process have read: compiled modules in this order, native libraries by name."""
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    of_modules = (place for spec in specs if spec is not None for place in (spec.cached, spec.origin))
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = sorted({line.split(maxsplit=5)[5] for line in lines if line.count("/")})
    places = dict.fromkeys(place for place in (*of_modules, *mapped) if place and not place.endswith(".py"))
    return [place for place in places if Path(place).is_file() and Path(place).stat().st_size <= MAX_READ_AHEAD]
