"""Waiting for what another thread or process does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float = 60) -> T:
    """Asks again and again until the answer is true, and returns it.

    The default is far more than anything takes on a busy machine: a test that fails here would wait for ever.

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
    """The threads of this name that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == name]
