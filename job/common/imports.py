"""Imports libraries without packages that they would use, and that the job needs later or never.

Where such a package is present, libraries import it at the top of a module: TRL imports wandb, transformers' losses for
images import scipy, and both take as long as TRL itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_DYNAMO = "TORCHDYNAMO_DISABLE"


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Within it, an import finds none of these packages, as if they were not installed; later ones do.

    By `None` in `sys.modules`, which Python documents for this. A package that is imported already stays visible. A
    package that needs a hidden one has to be named too. For all threads: none may need the packages meanwhile.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it, functions that are decorated with `torch.compile` stay as they are written.

    The decorator alone imports torch's compiler, 600 modules. bitsandbytes decorates four functions for devices without
    kernels of their own, which a GPU and its CPU library have.
    """
    before = os.environ.get(_DYNAMO)  # noqa: TID251 - no setting of the job, but a switch of torch
    os.environ[_DYNAMO] = "1"  # noqa: TID251 - as above; read when a function is decorated
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DYNAMO]  # noqa: TID251 - as above
        else:
            os.environ[_DYNAMO] = before  # noqa: TID251 - as above
