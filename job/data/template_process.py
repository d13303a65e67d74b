"""The process that renders chat templates, started by `job.data.chat_template`.

A chat template is a program that comes with a model. Jinja's sandbox restricts it to computing text, but
limits neither time nor memory: an endless loop in a template, or one huge string, would end the job. Here the kernel
limits both.

It reads JSON lines from stdin and answers each with a JSON line on stdout. The first line is the templates, their
arguments, the special tokens and the date; each other one is a conversation.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

SECONDS = 5
"""Of processor time for one conversation; a usual one takes a thousandth of a second."""
MEMORY_BYTES = 1 << 30
"""More than the process has when it begins."""
MAX_CHARACTERS = 16 << 20
"""Of one rendered conversation."""
OUT_OF_BOUNDS = "limit"


def main() -> None:
    """Answers until stdin ends, which it does with the process that started this one."""
    program = json.loads(sys.stdin.readline())
    answer = _open(program)
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (_cpu_seconds() + SECONDS, resource.RLIM_INFINITY))
        _say(answer(json.loads(line)))


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _open(program: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Prepares to render, reports that it is ready, and returns the function that renders a conversation."""
    from transformers.utils import chat_template_utils

    day = datetime.combine(date.fromisoformat(program["date"]), time())

    class Fixed:
        """The clock of the templates' `strftime_now`: always the start of the day on which the run began."""

        now = staticmethod(lambda: day)

    # Templates see no other clock. A keyword argument `strftime_now` would not arrive: callables are made text first.
    chat_template_utils.datetime = Fixed
    templates, fixed = program["templates"], {**program["special"], **program["arguments"]}
    _limit_memory()

    def answer(request: Mapping[str, Any]) -> dict[str, Any]:
        tools, marked = request["tools"], request["marked"]
        random.seed(0)  # for Jinja's filter `random`: a conversation has one text, in every attempt
        # As transformers' `apply_chat_template` does: many templates write a null out as "None".
        messages = [
            {key: value for key, value in message.items() if value is not None} for message in request["messages"]
        ]
        try:
            (text,), spans = chat_template_utils.render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=templates["marked" if marked else "own"]["plain" if tools is None else "tools"],
                return_assistant_tokens_mask=marked,
                add_generation_prompt=request["add_generation_prompt"],
                **fixed,
            )
            text.encode()  # a template may write half of a surrogate pair, which is no text
        except MemoryError:
            return {OUT_OF_BOUNDS: f"takes more than {MEMORY_BYTES >> 20} MiB of memory for one conversation"}
        except Exception as error:  # noqa: BLE001 - a template can raise any exception
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        if len(text) > MAX_CHARACTERS:
            return {OUT_OF_BOUNDS: f"writes more than {MAX_CHARACTERS:,} characters for one conversation"}
        return {"text": text, "spans": [span for span in spans[0] if span[0] < span[1]] if marked else []}

    _say({"text": ""})
    return answer


def _limit_memory() -> None:
    """Bounds the memory that the process may have from now on, and lets it leave no core file when it is ended."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # elsewhere than on Linux, or a lower limit is set already
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + MEMORY_BYTES,) * 2)


def _cpu_seconds() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return math.ceil(used.ru_utime + used.ru_stime)
