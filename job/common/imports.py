"""Imports libraries without packages that they would use, and that the job needs later or never.

Where such a package is present, libraries import it at the top of a module: TRL imports wandb, transformers' losses for
images import scipy, and both take as long as TRL itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
