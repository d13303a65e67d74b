"""Runs calls in several processes, for scripts that try hundreds of cases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    call: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    jobs: int,
    minutes: float,
    method: Literal["fork", "spawn"],
    prepare: Callable[[], object] | None = None,
) -> Iterator[Result]:
    """Yields the results of the calls as they end, in no order; raises what a call raises.

    Args:
        call: Called with each item; since it is sent to processes, it must be a function of a module.
        items: One call each.
        jobs: How many processes.
        minutes: No call is started after so many minutes.
        method: How processes are started: `fork` if they need what this process has loaded.
        prepare: Called first in each process.
    """
    end, left = time.monotonic() + 60 * minutes, iter(items)
    running: set[Future[Result]] = set()
    with ProcessPoolExecutor(jobs, get_context(method), prepare) as pool:
        while True:
            while len(running) < jobs and time.monotonic() < end:
                try:
                    running.add(pool.submit(call, next(left)))
                except StopIteration:
                    break
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
