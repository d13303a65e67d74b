"""Chat templates: a conversation rendered by the tokenizer's template, in a process with limited time and memory."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

from job.data.template_process import OUT_OF_BOUNDS, SECONDS
from job.errors import DataError, JobError, Problem

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from job.data.template_process import main; main()"
)
"""With the modules of this process: where it found them, `python -m` need not find the same."""
_LOOK_SECONDS = 0.5
_READ_BYTES = 1 << 20
_WHERE = "JOB_MODEL__ID"


class TemplateRefusalError(ValueError):
    """A template refuses a conversation; the message says why."""


class Template(Protocol):
    """Renders a conversation to text."""

    def __call__(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text.

        Raises:
            TemplateRefusalError: The template does not take this conversation.
            DataError: The template is broken, or exceeds its time or memory limit.
        """


def uses_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's template can write the date, so that the text depends on when it is rendered."""
    return "strftime_now" in str(tokenizer.chat_template)


@contextmanager
def open_template(
    tokenizer: Any, date: str | None = None, alive: Callable[[], None] = lambda: None
) -> Iterator[Template]:
    """The tokenizer's chat template, for as long as it is needed.

    Args:
        tokenizer: A `transformers.PreTrainedTokenizerFast` with a chat template, or a stand-in that renders by itself.
        date: The current date as the template sees it, `YYYY-MM-DD`; None for the day in UTC.
        alive: Called repeatedly while a template takes long; an exception from it ends the wait.

    Raises:
        DataError: The tokenizer has several templates, none of them the default, or the process does not start.
    """
    if not hasattr(tokenizer, "special_tokens_map"):
        yield tokenizer.apply_chat_template
        return
    try:
        templates = {"plain": tokenizer.get_chat_template(), "tools": tokenizer.get_chat_template(tools=[])}
    except ValueError as error:
        raise DataError([Problem(_WHERE, f"its tokenizer has no chat template to use: {error}")]) from error
    given = {
        "templates": templates,
        "special": tokenizer.special_tokens_map,
        "date": date or f"{datetime.now(UTC):%Y-%m-%d}",
    }
    with TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - this interpreter, with a program of ours
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for the job, which ends this process when it ends
        )
        try:
            rendering = _Rendering(process, errors, alive)
            rendering.ask(given)
            yield rendering
        finally:
            process.kill()
            with suppress(OSError):  # its pipe is broken already
                process.communicate()


class _Rendering:
    """Renders conversations in the process, one after the other."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes], alive: Callable[[], None]) -> None:
        self._process, self._errors, self._alive = process, errors, alive

    def __call__(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        answer = self.ask({"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt})
        if "text" in answer:
            return answer["text"]
        if OUT_OF_BOUNDS in answer:
            raise DataError([Problem(_WHERE, f"its chat template {answer[OUT_OF_BOUNDS]}; use another model")])
        raise TemplateRefusalError(answer["error"])

    def ask(self, what: Any) -> dict[str, str]:
        """Sends a line of JSON and returns the answer to it."""
        # Dates and bytes, as Parquet has them, have no JSON form; transformers gives templates the same placeholder.
        line = json.dumps(what, default=lambda value: f"<{type(value).__name__}>").encode() + b"\n"
        to, source = self._process.stdin, self._process.stdout
        if to is None or source is None:
            raise RuntimeError("the process has no pipes")
        try:
            to.write(line)
            to.flush()
        except BrokenPipeError:
            raise self._ended() from None
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            if not select.select([source], [], [], _LOOK_SECONDS)[0]:
                self._alive()
                continue
            parts.append(os.read(source.fileno(), _READ_BYTES))
            if not parts[-1]:
                raise self._ended()
        answer: dict[str, str] = json.loads(b"".join(parts))
        return answer

    def _ended(self) -> JobError:
        """The error for a process that has ended, by its exit status."""
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
        if code == -signal.SIGXCPU:
            what = f"does not come to an end: one conversation took more than {SECONDS} s"
        elif code < 0 or "MemoryError" in last:
            what = f"ends the process that renders it ({code}): it takes too much memory, or nests without end"
        else:
            return JobError(f"the process that renders chat templates failed: {last[:500]}")
        return DataError([Problem(_WHERE, f"its chat template {what}; use another model")])
