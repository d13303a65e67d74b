"""Python's search for garbage, put off while the libraries are imported.

What modules make is there to stay. Looking through it again and again, as it grows, takes a quarter of a start.
"""

from __future__ import annotations

import gc


def disable() -> None:
    """From now on nothing is looked through; what is not in a cycle goes at once as ever."""
    gc.disable()


def enable() -> None:
    """Looks for garbage again, if that was put off, among what is made from now on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
