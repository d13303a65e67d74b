"""Encodes rows in several processes, in the order of the source, with the same result as in one process.

This process reads rows and distributes them in chunks. A worker process encodes a chunk and sends back bytes. Workers
are new Python processes that import neither torch nor transformers. They are not forked, so CUDA and threads cause no
problems, and they start in a fraction of a second. The format of the messages is in `worker_messages`.

Small data sets are encoded in this process only, as are rows that have no JSON form (such as dates in Parquet), and all
rows if the tokenizer cannot be sent to another process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from job import log
from job.audit.rows import AuditSetup
from job.common.helper_process import HelperProcess, start_helper
from job.common.out_of_memory import ran_out
from job.common.resources import available_bytes
from job.data.chat_template import Program, make_program, run_program, run_template
from job.data.formats import Line, LineDecoder, Lines, Row, RowError
from job.data.preferences import EncodedAnswers
from job.data.row_encoder import Bundle, Outcome, Reading, RowEncoder, bundle
from job.data.text_tokenizer import TextTokenizer, from_portable, text_tokenizer
from job.data.tokenization import Encoded
from job.data.worker_messages import (
    as_json,
    decode_rows,
    encode_rows,
    pack_bundle,
    pack_outcomes,
    receive,
    send,
    unpack_bundle,
    unpack_outcomes,
)
from job.errors import DataError, JobError, Killed, Problem

ROWS_ALONE = 2000
"""Number of rows that this process encodes before it starts workers."""
_CHUNK_ROWS = 500
_CHUNK_CHARACTERS = 2 << 20
_LOOK_SECONDS = 0.5
_CHECKED_ROWS = 200
"""Number of rows on which a worker's tokenizer is compared with the original."""
_WORKER_BYTES = 512 << 20
"""Memory that must be available for each worker; with a large tokenizer and a chat template it takes about half."""
_FEWEST = 2
_OOM_SCORE = "300"
"""Written to a worker's oom_score_adj: if memory runs out, the kernel kills a worker rather than the job, which then
reports it."""


@dataclass(frozen=True)
class Setup:
    """The data that a worker needs to encode rows."""

    reading: Reading
    tokenizer: TextTokenizer
    program: Program | None
    """The chat template; None for rows of texts."""
    audit: AuditSetup | None = None
    """What the audit searches for; None without an audit."""


@contextmanager
def open_encoding(
    reading: Reading,
    tokenizer: Any,
    *,
    date: str | None,
    template_arguments: Mapping[str, Any] | None,
    processes: int,
    check_stop: Callable[..., None],
    audit: AuditSetup | None = None,
) -> Iterator[Encoding]:
    """Context manager with an `Encoding`; the arguments are those of `dataset.load_examples`.

    Raises:
        DataError, SettingsError: The chat template or its arguments cannot be used.
    """
    texts = text_tokenizer(tokenizer)
    program = make_program(tokenizer, date, template_arguments) if reading.templated else None
    opened = run_program(program, tokenizer, check_stop) if reading.templated else nullcontext()
    with opened as template:
        encoder, setup = RowEncoder(reading, texts, template, audit), Setup(reading, texts, program, audit)
        with Encoding(setup, encoder, processes, check_stop) as encoding:
            yield encoding


class Encoding:
    """Encodes rows in this process, and after `ROWS_ALONE` rows in workers. A context manager, which ends the workers.

    Args:
        setup: Sent to the workers.
        encoder: Encodes in this process.
        processes: Number of workers; with 1 only this process encodes.
        check_stop: Called with `progress=False` while this process waits for workers; an error from it is passed on.
    """

    def __init__(self, setup: Setup, encoder: RowEncoder, processes: int, check_stop: Callable[..., None]) -> None:
        self._setup, self._encoder, self._check_stop = setup, encoder, check_stop
        self._processes = processes if setup.tokenizer.portable is not None else 1
        self._alone = 0
        self._workers: _Workers | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, rows: Lines, limit: int | None, *, together: bool = False) -> Iterator[Outcome | Bundle]:
        """Yields the outcome of each row, in order, up to the row with the last of `limit` examples.

        Args:
            rows: The rows.
            limit: Maximum number of examples; None for all.
            together: Whether the outcomes of rows from workers may be bundled; not with a limit.

        Raises:
            DataError: The chat template is broken, or exceeds its time or memory limit.
            Killed: A worker was killed.
            JobError: A worker failed.
        """
        pending: deque[tuple[int, Future[list[Outcome] | Bundle]]] = deque()
        examples, at_end = 0, False
        while True:
            while not at_end and len(pending) < self._depth:
                most = _CHUNK_ROWS
                if limit is not None:  # rows after the last example are not read: problems in them are not reported
                    most = min(most, limit - examples - sum(count for count, _ in pending))
                if most < 1:
                    break
                chunk = _take(rows, most)
                at_end = not chunk
                if chunk:
                    pending.append((len(chunk), self._submit(chunk, together=together)))
            if not pending:
                return
            result = self._result(pending.popleft()[1])
            if isinstance(result, Bundle):
                yield result
                continue
            for outcome in result:
                left = None if limit is None else limit - examples
                kept = outcome.examples[:left]
                examples += len(kept)
                yield outcome if len(kept) == len(outcome.examples) else _with_examples(outcome, kept)
                if examples == limit:
                    return

    @property
    def _depth(self) -> int:
        """Chunks submitted at a time: two for each worker, so that a worker never waits for this process."""
        return 1 if self._workers is None else 2 * self._processes

    def _submit(self, chunk: list[Row | RowError | Line], *, together: bool) -> Future[list[Outcome] | Bundle]:
        if self._workers is None and self._processes > 1 and self._alone >= ROWS_ALONE:
            self._start(chunk)
        if self._workers is not None and (message := encode_rows(chunk, together=together)) is not None:
            return self._workers.submit(*message)
        self._alone += len(chunk)
        done: Future[list[Outcome] | Bundle] = Future()
        done.set_result(self._encoder(chunk))
        return done

    def _start(self, chunk: Sequence[Row | RowError | Line]) -> None:
        self._processes = min(self._processes, available_bytes() // _WORKER_BYTES)
        if self._processes < _FEWEST:
            self._processes = 1
            return
        tokenizer, texts = self._setup.tokenizer, _texts(chunk)
        portable = tokenizer.portable() if tokenizer.portable is not None else ""
        original, copied = (
            [(one.ids, one.offsets) for one in each.encode(texts, special=True, offsets=True)]
            for each in (tokenizer, from_portable(portable))
        )
        if original != copied:
            log.get_logger().warning(
                "the tokenizer gives different tokens in another process, so rows are tokenized in this process alone"
            )
            self._processes = 1
            return
        log.get_logger().info("rows are tokenized in several processes", processes=self._processes)
        self._workers = self._stack.enter_context(_start_workers(self._setup, portable, self._processes))

    def _result(self, future: Future[list[Outcome] | Bundle]) -> list[Outcome] | Bundle:
        while not wait([future], _LOOK_SECONDS).done:
            self._check_stop(progress=False)  # a worker that hangs makes no progress
        return future.result()


def _with_examples(outcome: Outcome, examples: tuple[Encoded | EncodedAnswers, ...]) -> Outcome:
    return Outcome(outcome.where, examples, outcome.faults, outcome.remarks, outcome.audited)


def _take(rows: Lines, most: int) -> list[Row | RowError | Line]:
    """The next rows: at most `most`, and fewer if they are long."""
    chunk: list[Row | RowError | Line] = []
    characters = 0
    for row in islice(rows, most):
        chunk.append(row)
        characters += len(row.data) if isinstance(row, Line) else _length(row.fields) if isinstance(row, Row) else 0
        if characters > _CHUNK_CHARACTERS:
            break
    return chunk


def _length(value: Any) -> int:
    """Approximate number of characters of text in a value."""
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_length, items))


def _texts(chunk: Sequence[Row | RowError | Line]) -> list[str]:
    """Texts of the first rows, on which tokenizers are compared."""
    texts: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            texts.append(value.encode(errors="replace").decode())
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(item)

    for row in map(LineDecoder(), chunk[:_CHECKED_ROWS]):
        collect(row.fields if isinstance(row, Row) else None)
    return texts or [""]


class _Workers:
    """The worker processes, and for each a thread of this process that waits for its answers."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(len(workers), thread_name_prefix="encoding")

    def submit(self, head: bytes, blob: bytes) -> Future[list[Outcome] | Bundle]:
        """Lets the next idle worker encode a chunk."""
        return self._threads.submit(self._run, head, blob)

    def _run(self, head: bytes, blob: bytes) -> list[Outcome] | Bundle:
        worker = self._idle.get()
        try:
            answer, data = worker.ask(head, blob)
            return unpack_outcomes(answer, data) if "rows" in answer else unpack_bundle(answer, data)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Waits for the threads. Called after the processes have ended."""
        self._threads.shutdown(cancel_futures=True)


class _Worker:
    """One worker process. Its setup is sent with the first chunk, so that nothing waits for the process to start."""

    def __init__(self, helper: HelperProcess, setup: bytes) -> None:
        self._helper = helper
        self._setup: bytes | None = setup

    def ask(self, head: bytes, blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Sends a message and waits for the answer to it."""
        try:
            if self._setup is not None:
                send(self._helper.stdin, self._setup)
            send(self._helper.stdin, head, blob)
            self._setup = None
            answer, blob = receive(self._helper.stdout)
        except (OSError, ValueError, EOFError):
            raise self._ended() from None
        if (problems := answer.get("problems")) is not None:
            raise DataError([Problem(*problem) for problem in problems])
        if "error" in answer:
            raise JobError(answer["error"])
        return answer, blob

    def kill(self) -> None:
        """Ends the process."""
        self._helper.process.kill()

    def _ended(self) -> JobError:
        """The error for a process that has ended, by its exit status."""
        code, last = self._helper.process.wait(), self._helper.last_error_line()
        if self._helper.killed_for_memory() or (code > 0 and "MemoryError" in last):
            return ran_out("rows were tokenized", "lower JOB_DATA__LIMIT", MemoryError())
        if code < 0:
            name = signal.Signals(-code).name
            return Killed(
                f"a process that tokenizes rows was killed by {name}"
                + (", as the kernel does when memory runs out; give the job more memory" * (code == -signal.SIGKILL))
            )
        return JobError(f"a process that tokenizes rows failed: {last}")


@contextmanager
def _start_workers(setup: Setup, portable: str, count: int) -> Iterator[_Workers]:
    """Context manager with the workers. If this process is killed, they end as well, since their stdin ends."""
    audit = None if setup.audit is None else setup.audit.as_json()
    reading = asdict(setup.reading)
    message = as_json({"reading": reading, "tokenizer": portable, "program": setup.program, "audit": audit})
    with ExitStack() as stack:
        running = [_Worker(stack.enter_context(start_helper("job.data.workers")), message) for _ in range(count)]
        workers = _Workers(running)
        stack.callback(workers.close)
        for worker in running:
            stack.callback(worker.kill)  # called first: it ends the wait of a thread that waits for an answer
        yield workers


def main() -> None:
    """Encodes chunks until stdin ends, at the latest when the process that started this one ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print to stdout, which would corrupt the answers
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
    setup, _ = receive(sys.stdin.buffer)
    reading = Reading(**setup["reading"])
    program, audit = setup["program"], setup["audit"] and AuditSetup.from_json(setup["audit"])
    with run_template(program) if program is not None else nullcontext() as template:
        encoder = RowEncoder(reading, from_portable(setup["tokenizer"]), template, audit)
        while True:
            try:
                chunk, blob = receive(sys.stdin.buffer)
            except EOFError:
                return
            try:
                outcomes = encoder(decode_rows(chunk, blob))
                answer, blob = pack_bundle(bundle(outcomes)) if chunk["together"] else pack_outcomes(outcomes)
            except DataError as error:
                answer, blob = {"problems": [[one.where, one.what] for one in error.problems]}, b""
            except JobError as error:
                answer, blob = {"error": str(error)}, b""
            send(answers, as_json(answer), blob)
