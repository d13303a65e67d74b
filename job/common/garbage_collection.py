"""Python's cyclic garbage collector, disabled while the libraries are imported.

Modules are never freed. Traversing them again and again while they are imported takes a quarter of the
start-up time (decision 16).
"""

from __future__ import annotations

import gc


def disable() -> None:
    """Disables the collector. Objects that are in no cycle are still freed at once, by their reference counts."""
    gc.disable()


def enable() -> None:
    """Enables the collector again, and excludes from it all objects that exist now."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
