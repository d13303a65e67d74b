"""Waiting for what another thread or process does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float = 60) -> T:
    """Calls it repeatedly until the result is true, and returns the result.

    The default is far more than anything takes on a busy machine: a test that fails here would otherwise wait forever.

    Raises:
        TimeoutError: It did not become true in so many seconds.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"it did not become true within {seconds:g} s")
        time.sleep(0.01)
    return found


def threads(name: str) -> list[threading.Thread]:
    """The live threads of this name."""
    return [thread for thread in threading.enumerate() if thread.name == name]
