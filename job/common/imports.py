"""Imports a library faster, by hiding optional packages that it would import too.

Libraries import an optional package at the top of a module if it is installed: TRL imports wandb, transformers' losses
for images import scipy. Each takes as long as TRL itself, and the job needs them later or never.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
            del sys.modules[name]
