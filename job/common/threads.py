"""Work in a daemon thread, which does not delay the end of the process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Starts `work` in a daemon thread and returns its future, which also carries its exception.

    The thread gets a copy of the context, so its log lines carry the run and the attempt. Unlike with a
    ThreadPoolExecutor, the interpreter does not wait for the thread at its end.
    """
    future: Future[T] = Future()
    context = copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(work))
        except BaseException as error:  # noqa: BLE001 - raised by future.result()
            future.set_exception(error)

    Thread(target=run, name=name, daemon=True).start()
    return future
