"""Chat templates: a conversation rendered by the tokenizer's template, in a process with limited time and memory."""

from __future__ import annotations

import json
import os
import re
import select
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from job.common.helper_process import HelperProcess, start_helper
from job.common.out_of_memory import ran_out
from job.data.template_process import OUT_OF_BOUNDS, SECONDS
from job.errors import DataError, JobError, Problem, SettingsError

_LOOK_SECONDS = 0.5
_READ_BYTES = 1 << 20
_WHERE = "JOB_MODEL__ID"
_ARGUMENTS = "JOB_DATA__CHAT_TEMPLATE_ARGUMENTS"
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now"})
"""Of a template: what a conversation, not a setting, says."""
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


Program = dict[str, Any]
"""A chat template and what it reads besides a conversation, JSON-able: the first line for `template_process`."""


class TemplateRefusalError(ValueError):
    """A template refuses a conversation; the message says why."""


class Template(Protocol):
    """Renders a conversation to text.

    Attributes:
        marks: Whether it can mark what the assistant says: None if not, `own` if the tokenizer's template has
            `{% generation %}` marks, `trl` if TRL has a training template for it. Those differ from the tokenizer's
            template: they write each answer as it was generated, thoughts included, regardless of what follows it.
    """

    @property
    def marks(self) -> Literal["own", "trl"] | None:
        """See above."""

    def marked(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text by the template that has marks, and the spans of its characters that the assistant generates.

        Raises:
            TemplateRefusalError, DataError: As `__call__`.
        """

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


def check_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Refuses arguments for the chat template that it would ignore, or that a conversation gives.

    Raises:
        SettingsError: It names all of them.
    """
    text = str(getattr(tokenizer, "chat_template", "") or "")
    problems = []
    for name in arguments:
        if name in _OWN_VARIABLES:
            problems.append(Problem(_ARGUMENTS, f"{name!r} is set by the rows or the job; remove it"))
        elif not re.search(rf"\b{re.escape(name)}\b", text):
            problems.append(Problem(_ARGUMENTS, f"{name!r} is not a variable of the model's chat template; remove it"))
    if problems:
        raise SettingsError(problems)


@contextmanager
def open_template(
    tokenizer: Any,
    date: str | None = None,
    check_stop: Callable[[], None] = lambda: None,
    arguments: Mapping[str, Any] | None = None,
) -> Iterator[Template]:
    """The tokenizer's chat template, for as long as it is needed.

    Args:
        tokenizer: A `transformers.PreTrainedTokenizerFast` with a chat template, or a substitute that renders without a
            template process.
        date: The current date as the template sees it, `YYYY-MM-DD`; None for the day in UTC.
        check_stop: Called repeatedly while a template takes long; an exception from it ends the wait.
        arguments: Further variables of the template, such as `enable_thinking`.

    Raises:
        DataError: The tokenizer has several templates, none of them the default, or the process does not start.
        SettingsError: The template does not use one of the arguments.
    """
    with run_program(make_program(tokenizer, date, arguments), tokenizer, check_stop) as template:
        yield template


def run_program(
    program: Program | None, tokenizer: Any, check_stop: Callable[[], None] = lambda: None
) -> AbstractContextManager[Template]:
    """The template of a program that `make_program` made of the tokenizer."""
    return nullcontext(_StandIn(tokenizer)) if program is None else run_template(program, check_stop)


def make_program(tokenizer: Any, date: str | None, arguments: Mapping[str, Any] | None) -> Program | None:
    """The tokenizer's chat template with all that it reads besides a conversation; None for a stand-in.

    Raises:
        DataError, SettingsError: As `open_template`.
    """
    if not hasattr(tokenizer, "special_tokens_map"):
        return None
    try:
        templates = {"plain": tokenizer.get_chat_template(), "tools": tokenizer.get_chat_template(tools=[])}
    except ValueError as error:
        raise DataError([Problem(_WHERE, f"its tokenizer has no chat template to use: {error}")]) from error
    check_arguments(tokenizer, arguments or {})
    marks, marked = _find_marked(templates)
    return {
        "templates": {"own": templates, "marked": marked},
        "special": tokenizer.special_tokens_map,
        "arguments": {**(arguments or {})},
        "date": date or f"{datetime.now(UTC):%Y-%m-%d}",
        "marks": marks,
    }


@contextmanager
def run_template(program: Program, check_stop: Callable[[], None] = lambda: None) -> Iterator[Template]:
    """The template, in a separate process; `check_stop` as in `open_template`.

    Raises:
        JobError: The process does not start.
    """
    with start_helper("job.data.template_process") as helper:
        rendering = _Rendering(helper, check_stop, program["marks"])
        rendering.ask(program)
        yield rendering


def _find_marked(templates: Mapping[str, str]) -> tuple[Literal["own", "trl"] | None, Mapping[str, str]]:
    """The templates that have marks, and whose they are."""
    if all(map(_MARK.search, templates.values())):
        return "own", templates
    training = {use: _training_template(text) for use, text in templates.items()}
    marked = {use: text for use, text in training.items() if text is not None}
    return ("trl", marked) if len(marked) == len(templates) else (None, {})


def _training_template(template: str) -> str | None:
    """TRL's template with marks for this one; None if it has none.

    It is what `trl.chat_template_utils.get_training_chat_template` returns. That function renders the template, which
    only the process with limits may do, and importing it takes seconds.
    """
    package = find_spec("trl")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for training in sorted(Path(folder, "chat_templates").glob("*_training.jinja")):
            plain = training.with_name(training.name.replace("_training.jinja", ".jinja"))
            if plain.is_file() and plain.read_text(encoding="utf-8") == template:
                return training.read_text(encoding="utf-8")
    return None


class _StandIn:
    """The template of a substitute tokenizer: it renders in this process, and marks nothing."""

    marks = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, **options))

    def marked(self, *_: Any, **__: Any) -> Any:
        raise TemplateRefusalError("has no marks")


class _Rendering:
    """Renders conversations in the process, one after the other."""

    def __init__(
        self, helper: HelperProcess, check_stop: Callable[[], None], marks: Literal["own", "trl"] | None
    ) -> None:
        self._helper, self._check_stop = helper, check_stop
        self.marks = marks

    def __call__(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        return str(self._answer(messages, tools, add_generation_prompt=add_generation_prompt)["text"])

    def marked(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        answer = self._answer(messages, tools, marked=True)
        return answer["text"], tuple((start, stop) for start, stop in answer["spans"])

    def _answer(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool = False,
        marked: bool = False,
    ) -> dict[str, Any]:
        conversation = {"messages": messages, "tools": tools}
        answer = self.ask({**conversation, "add_generation_prompt": add_generation_prompt, "marked": marked})
        if OUT_OF_BOUNDS in answer:
            raise DataError([Problem(_WHERE, f"its chat template {answer[OUT_OF_BOUNDS]}; use another model")])
        if "text" not in answer:
            raise TemplateRefusalError(answer["error"])
        return answer

    def ask(self, request: Any) -> dict[str, Any]:
        """Sends a line of JSON and returns the answer to it."""
        # Dates and bytes, as Parquet has them, have no JSON form; transformers gives templates the same placeholder.
        line = json.dumps(request, default=lambda value: f"<{type(value).__name__}>").encode() + b"\n"
        source = self._helper.stdout
        try:
            self._helper.stdin.write(line)
            self._helper.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            if not select.select([source], [], [], _LOOK_SECONDS)[0]:
                self._check_stop()
                continue
            parts.append(os.read(source.fileno(), _READ_BYTES))
            if not parts[-1]:
                raise self._ended()
        answer: dict[str, Any] = json.loads(b"".join(parts))
        return answer

    def _ended(self) -> JobError:
        """The error for a process that has ended, by its exit status."""
        code = self._helper.process.wait()
        last = self._helper.last_error_line()
        if self._helper.killed_for_memory():
            return ran_out("a conversation was rendered", "shorten the longest rows", MemoryError())
        if code == -signal.SIGXCPU:
            message = f"does not terminate: one conversation took more than {SECONDS} s"
        elif code < 0 or "MemoryError" in last:
            message = f"crashes the process that renders it ({code}): it uses too much memory, or recurses infinitely"
        else:
            return JobError(f"the process that renders chat templates failed: {last}")
        return DataError([Problem(_WHERE, f"its chat template {message}; use another model")])
