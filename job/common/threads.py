"""Work in another thread, whose log lines carry the same run, attempt and stage."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_thread(function: Callable[[], T], name: str, *, daemon: bool = True) -> Future[T]:
    """Starts the work in a new thread.

    Args:
        function: Is called once; what it raises is raised again by `result()`.
        name: The thread's.
        daemon: Whether the process may end without waiting for it.
    """
    future: Future[T] = Future()
    context = copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(function))
        except BaseException as error:  # noqa: BLE001 - raised by future.result()
            future.set_exception(error)

    Thread(target=run, name=name, daemon=daemon).start()
    return future
