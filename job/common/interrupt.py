"""Whether Ctrl-C has interrupted this process: KeyboardInterrupt, which libraries may turn into another exception."""

from __future__ import annotations

import signal
from types import FrameType

_received: list[int] = []


def record_interrupt() -> None:
    """Records SIGINT from here on, where Python would only raise KeyboardInterrupt, which is still raised.

    A run has handlers of its own, and a parent process may have set the signal to be ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _record)


def was_interrupted() -> bool:
    """Whether SIGINT has come since `record_interrupt`."""
    return bool(_received)


def _record(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    signal.default_int_handler(number, frame)
