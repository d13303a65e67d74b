"""Logging: JSON lines for machines, readable lines and a progress bar for a person at a terminal.

Everything goes through the standard library's root logger, so that lines of libraries carry run, attempt and stage,
too. Logs go to stderr; stdout is for results.

structlog is imported when the first line is written. Importing it, with rich and asyncio, takes longer than the quick
commands need to answer, and most of them write no line.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger, ProcessorFormatter
    from structlog.typing import EventDict, Processor

QUIET = (
    *("lm_eval", "bitsandbytes", "trl", "datasets", "httpx", "urllib3", "botocore", "filelock", "absl", "accelerate"),
    "torch.distributed.elastic",
)


_STDERR = 2  # the descriptor: `sys.stderr` may be replaced by something without one
_context: ContextVar[Mapping[str, Any]] = ContextVar("fields on every line", default=MappingProxyType({}))
_loggers_are_set_up = True
"""Whether structlog makes its loggers as `configure` set; true also if `configure` was not called."""


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`: a progress bar replaces it, so that lines appear above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Lines(logging.Formatter):
    """Formats the lines of the job and of libraries with structlog, as JSON or for a terminal, and without secrets."""

    def __init__(self, secrets: Sequence[str], *, as_json: bool, colors: bool) -> None:
        super().__init__()
        self.secrets, self.as_json, self._colors = secrets, as_json, colors

    def format(self, record: logging.LogRecord) -> str:
        return scrub(self._structlogs.format(record), self.secrets)

    @cached_property
    def _structlogs(self) -> ProcessorFormatter:
        from structlog.stdlib import ProcessorFormatter

        renderers = _json_renderers() if self.as_json else _console_renderers(colors=self._colors)
        return ProcessorFormatter(
            foreign_pre_chain=_processors(),
            processors=[ProcessorFormatter.remove_processors_meta, *renderers],
        )


def configure(log_format: str, level: str, secrets: Sequence[str] = (), **context: Any) -> None:
    """Sets up logging for this process; `context` (run, attempt) is on every line.

    Args:
        log_format: `json`, `console`, or `auto`: console if stderr is a terminal.
        level: Lowest level of the job's own lines; for libraries it is `warning`.
        secrets: Credentials; each is replaced by asterisks in every line, also in those of libraries.
        context: Fields on every line.
    """
    global _loggers_are_set_up  # noqa: PLW0603 - structlog's configuration is the process's, too
    handler = _CurrentStderr()
    terminal = sys.stderr.isatty()  # asked now: a progress bar that is shown when the first line comes says no
    as_json = log_format == "json" or (log_format == "auto" and not terminal)
    handler.setFormatter(_Lines(secrets, as_json=as_json, colors=terminal))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("job").setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for the developers of libraries
    os.environ["TQDM_DISABLE"] = "1"  # the job shows its own progress
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DATASETS_VERBOSITY"] = "error"
    _loggers_are_set_up = False
    _context.set(context)
    if "structlog" in sys.modules:
        get_logger()


def _processors() -> list[Processor]:
    """What completes every line, before it is rendered."""
    from structlog.processors import TimeStamper, add_log_level

    return [lambda _logger, _method, event: {**_context.get(), **event}, add_log_level, TimeStamper("iso", utc=True)]


def _json_renderers() -> list[Processor]:
    from structlog.processors import ExceptionRenderer, JSONRenderer
    from structlog.tracebacks import ExceptionDictTransformer

    return [ExceptionRenderer(ExceptionDictTransformer(show_locals=False)), JSONRenderer()]


def _console_renderers(*, colors: bool) -> list[Processor]:
    from structlog.dev import ConsoleRenderer, RichTracebackFormatter

    # locals may hold rows of the data, and fill pages
    formatter = RichTracebackFormatter(show_locals=False)
    renderer = ConsoleRenderer(colors=colors, pad_event_to=32, exception_formatter=formatter)
    return [_for_a_person, _problems_by_line(renderer)]


def _for_a_person(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """A line without what a person at a terminal knows: run and attempt, fields without a value, the year.

    The line that says which attempt of which run this process is comes before the attempt is in the context.
    """
    known = _context.get()
    if "attempt" in known:
        event = {name: value for name, value in event.items() if name not in {"run", "attempt"} or value != known[name]}
    event["timestamp"] = event["timestamp"][5:19].replace("T", " ")
    return {name: value for name, value in event.items() if value is not None and value != {}}


def _problems_by_line(render: Processor) -> Processor:
    """The renderer, with the problems of an error below its line, one on each, and the advice for all at the end."""

    def rendered(logger: Any, method: str, event: EventDict) -> str:
        below = [*event.pop("problems", ()), *event.pop("advice", "").splitlines()]
        return "\n".join([str(render(logger, method, event)), *(f"  {line}" for line in below if line)])

    return rendered


def scrub(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret in it replaced by asterisks, also where one overlaps or begins another."""
    spans = []
    for form in {form for secret in secrets for form in (secret, json.dumps(secret)[1:-1])}:
        at = text.find(form)
        while at >= 0:
            spans.append((at, at + len(form)))
            at = text.find(form, at + 1)
    hidden, end = [], 0
    for start, stop in sorted(spans):
        if start >= end:
            hidden += [text[end:start], "***"]
        end = max(end, stop)
    return "".join([*hidden, text[end:]])


def without_secrets(text: str) -> str:
    """The text as a line of the log would show it: with asterisks for the secrets that `configure` was given."""
    for handler in logging.root.handlers:
        if isinstance(handler.formatter, _Lines):
            text = scrub(text, handler.formatter.secrets)
    return text


def get_logger() -> BoundLogger:
    """The job's logger."""
    import structlog

    global _loggers_are_set_up  # noqa: PLW0603 - structlog's configuration is global, too
    if not _loggers_are_set_up:
        structlog.configure(
            processors=[*_processors(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=False,
        )
        _loggers_are_set_up = True
    logger: BoundLogger = structlog.get_logger("job")
    return logger


def write_line(event: str, **fields: Any) -> None:
    """Writes a warning to stderr in the format of the log, by a system call: for handlers of signals.

    A handler may have interrupted the log itself, which holds the buffer of `sys.stderr` then. What is written must
    hold no secrets.
    """
    ours = [handler.formatter for handler in logging.root.handlers if isinstance(handler, _CurrentStderr)]
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    if any(isinstance(lines, _Lines) and not lines.as_json for lines in ours):
        # A progress bar has hidden the cursor and stands on a line that is not ended.
        start = "\x1b[?25h\n" if os.isatty(_STDERR) else ""
        words = [f"{start}{now[5:19].replace('T', ' ')} [warning  ] {event}"]
        line = " ".join([*words, *(f"{name}={value}" for name, value in fields.items())])
    else:
        line = json.dumps({"event": event, **_context.get(), **fields, "level": "warning", "timestamp": now})
    with suppress(OSError):
        os.write(_STDERR, f"{line}\n".encode(errors="backslashreplace"))


def bind(**context: Any) -> None:
    """Adds fields to every line from now on."""
    _context.set({**_context.get(), **context})


def context() -> dict[str, Any]:
    """The fields that are on every line."""
    return dict(_context.get())


def clear_context() -> None:
    """Takes all fields off the lines to come."""
    _context.set({})


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log lines within it carry the stage's name."""
    before = _context.set({**_context.get(), "stage": name})
    try:
        yield
    finally:
        _context.reset(before)


@contextmanager
def silence_stdout() -> Iterator[None]:
    """Discards what is printed to stdout, which is for results: libraries print messages when they are imported."""
    with redirect_stdout(io.StringIO()):
        yield


def print_result(text: str) -> bool:
    """Prints to stdout, where results go; whether what was printed is somewhere.

    Where its reader has ended, as behind `| head`, or stdout was closed when the process began, nothing is lost.
    That a disk is full is logged. Characters that stdout has no bytes for are printed as escapes.
    """
    if sys.stdout is None:
        return True
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        # The rest stays in the buffer; writing it must not fail again when the process ends.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - for the rest of the process
        if not isinstance(error, BrokenPipeError):
            get_logger().error("the result cannot be printed to stdout", why=str(error))
            return False
    return True


class Progress(Protocol):
    """Shows how far a stage is."""

    def __call__(self, done: int, **figures: Any) -> None:
        """`done` of the total; `figures` are shown next to it."""


@contextmanager
def progress(title: str, total: int, every: int = 1) -> Iterator[Progress]:
    """A progress bar at a terminal; elsewhere a log line every `every` units, and one for the last.

    Args:
        title: Name of the units, in the line and at the bar.
        total: Number of units.
        every: Units between two log lines.
    """
    logger = get_logger()
    ours = [handler.formatter for handler in logging.root.handlers if isinstance(handler, _CurrentStderr)]
    # JSON that was set for a terminal stays JSON: one line each, steps included.
    console = any(isinstance(lines, _Lines) and not lines.as_json for lines in ours) and sys.stderr.isatty()
    if console and logging.getLogger("job").isEnabledFor(logging.INFO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, figures="")

            def show(done: int, **figures: Any) -> None:
                bar.update(task, completed=done, figures="  ".join(_short(*figure) for figure in figures.items()))

            yield show
        return

    reported = 0

    def report(done: int, **figures: Any) -> None:
        nonlocal reported
        if done - reported >= every or done == total:
            reported = done
            logger.info(title, done=done, total=total, **figures)

    yield report


def _short(name: str, value: Any) -> str:
    """A figure in a short form, to fit next to a bar."""
    if name == "memory_bytes":
        return f"{value / (1 << 30):.1f} GiB"
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    name = "lr" if name == "learning_rate" else name
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
