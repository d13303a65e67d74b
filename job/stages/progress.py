"""Progress of work that an attempt counts in questions: logged, and recorded as progress of the attempt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from job import log
from job.runs.attempt import Attempt


@contextmanager
def counted(attempt: Attempt, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that is called with the number of items done, of `total`.

    It logs the number about ten times (at a terminal as a bar), and adds it to `attempt.questions`, by which an
    attempt that was stopped shows that it made progress.
    """
    before = attempt.questions
    with log.progress(title, total, every=max(1, total // 10)) as show_progress:

        def on_progress(done: int) -> None:
            attempt.questions = before + done
            show_progress(done)

        yield on_progress
