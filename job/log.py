"""Logging: JSON lines for machines, readable lines and a progress bar for a person at a terminal.

Everything goes through the standard library's root logger, so that lines of libraries carry run, attempt and stage,
too. Logs go to stderr; stdout is for results.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Protocol, TextIO

import structlog

QUIET = (
    *("lm_eval", "bitsandbytes", "trl", "datasets", "httpx", "urllib3", "botocore", "filelock", "absl", "accelerate"),
    "torch.distributed.elastic",
)


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is now: a progress bar replaces it, so that lines appear above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure(log_format: str, level: str, secrets: Sequence[str] = (), **context: Any) -> None:
    """Sets up logging for this process; `context` (run, attempt) is on every line.

    Args:
        log_format: `json`, `console`, or `auto`: console if stderr is a terminal.
        level: Lowest level of the job's own lines; for libraries it is `warning`.
        secrets: Credentials; each is replaced by asterisks in every line, also in those of libraries.
        context: Fields on every line.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    renderer: list[structlog.typing.Processor] = (
        [
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ]
        if as_json
        else [
            _problems_by_line(
                structlog.dev.ConsoleRenderer(
                    colors=sys.stderr.isatty(),
                    pad_event_to=32,
                    # locals may hold rows of the data, and fill pages
                    exception_formatter=structlog.dev.RichTracebackFormatter(show_locals=False),
                )
            )
        ]
    )
    handler = _CurrentStderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *renderer,
                lambda _logger, _method, line: scrub(str(line), secrets),
            ],
        )
    )
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("job").setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for the developers of libraries
    os.environ["TQDM_DISABLE"] = "1"  # the job shows its own progress
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DATASETS_VERBOSITY"] = "error"
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**context)


def _problems_by_line(render: structlog.typing.Processor) -> structlog.typing.Processor:
    """The renderer, with the problems of an error below its line, one on each."""

    def rendered(logger: Any, method: str, event: structlog.typing.EventDict) -> str:
        problems = event.pop("problems", ())
        return "\n".join([str(render(logger, method, event)), *(f"  {problem}" for problem in problems)])

    return rendered


def scrub(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret in it replaced by asterisks."""
    for secret in secrets:
        text = text.replace(secret, "***").replace(json.dumps(secret)[1:-1], "***")
    return text


def get_logger() -> structlog.stdlib.BoundLogger:
    """The job's logger."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger("job")
    return logger


def bind(**context: Any) -> None:
    """Adds fields to every line from now on."""
    structlog.contextvars.bind_contextvars(**context)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log lines within it carry the stage's name."""
    with structlog.contextvars.bound_contextvars(stage=name):
        yield


@contextmanager
def silence_stdout() -> Iterator[None]:
    """Discards what is printed to stdout, which is for results: libraries print messages when they are imported."""
    with redirect_stdout(io.StringIO()):
        yield


def print_result(text: str) -> bool:
    """Prints to stdout, where results go; whether what was printed is somewhere.

    Where nobody reads it any more, as behind `| head`, or stdout was closed when the process began, nothing is lost.
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
        """`done` of the total; `figures` are shown beside it."""


@contextmanager
def progress(what: str, total: int, every: int = 1) -> Iterator[Progress]:
    """A progress bar at a terminal; elsewhere a log line every `every` units, and one for the last.

    Args:
        what: Name of the units, in the line and at the bar.
        total: Number of units.
        every: Units between two log lines.
    """
    logger = get_logger()
    console = any(isinstance(h, _CurrentStderr) for h in logging.root.handlers) and sys.stderr.isatty()
    if console and logging.getLogger("job").isEnabledFor(logging.INFO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, figures="")

            def show(done: int, **figures: Any) -> None:
                bar.update(task, completed=done, figures="  ".join(_short(*figure) for figure in figures.items()))

            yield show
        return

    reported = 0

    def report(done: int, **figures: Any) -> None:
        nonlocal reported
        if done - reported >= every or done == total:
            reported = done
            logger.info(what, done=done, total=total, **figures)

    yield report


def _short(name: str, value: Any) -> str:
    """A figure in a short form, to fit beside a bar."""
    if name == "memory_bytes":
        return f"{value / (1 << 30):.1f} GiB"
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    name = "lr" if name == "learning_rate" else name
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
