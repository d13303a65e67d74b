"""Rows in several processes: the same tokens, records and errors as in one, and no process remains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from datetime import date
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from job.common import helper_process
from job.common.resources import MainMemory
from job.common.source_list import Source
from job.data import chat_template, examples, workers
from job.data.notes import Notes
from job.data.preferences import EncodedAnswers
from job.data.text_tokenizer import text_tokenizer
from job.data.tokenization import Encoded
from job.errors import DataError, JobError, Killed, Preempted, TrainingFailed
from tests.helpers import alpaca_rows
from tests.toy_tokenizer import CHATML, toy_tokenizer
from tests.unit.data.loaded_rows import lines, load
from tests.waiting import wait_for

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers start with the first rows, chunks are small, and none is left at the end."""
    monkeypatch.setattr(workers, "ROWS_ALONE", 0)
    monkeypatch.setattr(workers, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(examples, "_BATCH_TOKENS", 100)  # batches end within chunks, and go on over their borders
    monkeypatch.setattr(workers, "available_bytes", lambda: 64 << 30)
    yield
    assert not workers_running()


def workers_running() -> list[psutil.Process]:
    """The worker processes of this one."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # also a zombie: it ended between the two questions
            if "job.data.workers" in " ".join(child.cmdline()):
                found.append(child)
    return found


def both(*given: Any, **how: Any) -> list[Any]:
    """What `load` gives in one process and in two: examples and record, or the error.

    Without `on_example`, two processes give the same file with the same notes: then rows come in bundles.
    """

    def outcome(processes: int) -> Any:
        seen: list[Encoded | EncodedAnswers] = []
        try:
            found, record = load(*given, processes=processes, on_example=seen.append, **how)
        except JobError as error:
            return type(error), str(error)
        return list(found), record, seen

    def written(processes: int) -> Any:
        notes = Notes()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "examples.arrow")
            try:
                found, record = load(*given, processes=processes, file=path, notes=notes, **how)
            except JobError as error:
                return type(error), str(error)
            return path.read_bytes(), record, notes.kept, found.target_counts

    assert written(1) == written(2)
    return [outcome(processes) for processes in (1, 2)]


def mixed(count: int) -> list[Any]:
    """Good and bad rows, and text of all kinds: control tokens, half a surrogate pair, a broken byte."""
    rows: list[Any] = [{**row, "extra": [1, {"a": None}], "text": "x"} for row in alpaca_rows(count)]
    rows[3]["output"] = "ends</s> early \N{GRINNING FACE}"
    rows[4]["input"] = "nan"
    rows[10] = b'{"instruction": "half \\ud83d\xde", "output": "x"}'
    rows[11] = b"{"
    rows[12]["output"] = " "
    rows[13]["output"] = "long " * 3000
    rows[14]["instruction"] = 7
    rows[15] = [1]
    return rows


def test_good_and_bad_rows_give_the_same(tmp_path: Path) -> None:
    """Tokens, record and what is counted are the same in several processes, and so is every word of the errors."""
    path = lines(tmp_path / "x.jsonl", *mixed(60))
    one, several = both(path, on_bad_row="skip", loss_on="completion", compare=True)
    assert one == several
    assert one[1].skipped == {
        **dict.fromkeys(("broken_utf8", "empty_target", "invalid_json", "not_an_object", "too_long", "wrong_type"), 1)
    }
    one, several = both(path)
    assert one == several
    assert one[0] is DataError
    long = lines(tmp_path / "long.jsonl", *({"text": f"row {n} " * (1 + 90 * (n % 5 == 0))} for n in range(40)))
    one, several = both(long, on_long_row="split", max_length=100)
    assert one == several
    assert one[1].long_rows["split"] == 8


def test_the_selection_is_the_same(tmp_path: Path) -> None:
    """Limits end at the same row, so that a bad row after it is not read; shares and repeats take the same rows."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(30), b"{")
    other = lines(tmp_path / "y.jsonl", *alpaca_rows(40))
    one, several = both(path, limit=30)
    assert one == several
    assert one[1].rows == 30
    sources = (Source(str(path), "x", rows=9), Source(str(other), "y", times=5 / 2))  # type: ignore[arg-type]
    one, several = both(sources)
    assert one == several
    assert one[1].rows == 9 + 100


@pytest.mark.long
def test_conversations_give_the_same(tmp_path: Path) -> None:
    """Each worker renders with a template process of its own."""
    turns = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(20)]
    path = lines(tmp_path / "chat.jsonl", *({"messages": messages} for messages in turns))
    one, several = both(path, toy_tokenizer(CHATML), loss_on="assistant")
    assert one == several
    assert one[1].rows == 20


def test_pairs_and_weights_give_the_same(tmp_path: Path) -> None:
    """Pairs, labelled answers and the weights of rows arrive whole."""
    weighted = lines(tmp_path / "w.jsonl", *({"text": f"row {n}", "weight": n / 7} for n in range(20)))
    one, several = both(weighted, row_weights=True)
    assert one == several
    assert [example.weight for example in one[0]] == [n / 7 for n in range(20)]
    pairs = lines(
        tmp_path / "p.jsonl", *({"prompt": f"q{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(20))
    )
    one, several = both(pairs, method="dpo")
    assert one == several
    labels = ({"prompt": f"q{n}", "completion": f"a{n}", "label": n % 3 > 0} for n in range(20))
    one, several = both(lines(tmp_path / "k.jsonl", *labels), method="kto")
    assert one == several
    assert [example.desirable for example in one[0]] == [n % 3 > 0 for n in range(20)]


def test_rows_without_a_json_form_give_the_same(tmp_path: Path) -> None:
    """Dates and bytes, which Parquet has, are encoded in this process, and the rows stay in order."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"text": f"row {n}", "day": date(2026, 1, 1) if n % 9 == 0 else None} for n in range(40)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    one, several = both(tmp_path / "x.parquet")
    assert one == several
    assert one[1].rows == 40


def test_a_killed_worker_is_reported_in_words(tmp_path: Path) -> None:
    """A killed worker, as when memory runs out, is reported as such, and the job ends with code 1."""

    def kill(_: object) -> None:
        for process in workers_running():
            process.send_signal(signal.SIGKILL)

    with pytest.raises(Killed, match="killed by SIGKILL, as the kernel does when memory runs out") as error:
        load(lines(tmp_path / "x.jsonl", *alpaca_rows(500)), processes=2, on_example=kill)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(("code", "kills", "kind"), [(-9, 2, TrainingFailed), (-9, 1, Killed), (1, 1, TrainingFailed)])
def test_main_memory_that_is_full_is_no_bug(
    code: int, kills: int, kind: type[JobError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where a worker says so, nor where the kernel counts that it killed one for want of memory."""
    monkeypatch.setattr(helper_process, "main_memory", lambda: MainMemory(1, 1, kills))
    process: Any = SimpleNamespace(wait=lambda: code)
    last = b"Traceback:\nMemoryError\n" if code > 0 else b""
    helper = helper_process.HelperProcess(process, BytesIO(), BytesIO(), BytesIO(last), kills=1)
    with pytest.raises(kind) as raised:
        workers._Worker(helper, b"").ask(b"", b"")
    assert raised.value.exit_code == (1 if kind is Killed else 70)
    with pytest.raises(kind if code < 0 and kills > 1 else DataError):
        chat_template._Rendering(replace(helper, stdin=Broken()), lambda: None, None).ask({})


class Broken(BytesIO):
    """A pipe to a process that has ended."""

    def write(self, _data: object) -> int:
        """As the system does."""
        raise BrokenPipeError


def test_a_stop_ends_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this process waits for workers it reports no progress; what ends the job ends the wait and the workers."""
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.01)

    def check_stop(*, progress: bool = True) -> None:
        if not progress:
            raise Preempted("stopped by SIGTERM")

    with pytest.raises(Preempted):
        load(lines(tmp_path / "x.jsonl", *alpaca_rows(2000)), processes=2, check_stop=check_stop)


@pytest.mark.long
def test_workers_end_when_the_job_is_killed(tmp_path: Path) -> None:
    """A job that is killed with SIGKILL leaves no worker behind."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(200))
    code = f"""
import psutil, sys, time
from job.data import workers
from tests.unit.data.test_dataset import load
workers.ROWS_ALONE, workers._CHUNK_ROWS = 0, 7
def say(_):
    print(*(child.pid for child in psutil.Process().children()), file=sys.stderr, flush=True)
    time.sleep(600)
load({str(path)!r}, processes=2, on_example=say)
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT) as job:
        assert job.stderr is not None
        pids = [int(pid) for pid in job.stderr.readline().split()]
        assert len(pids) == 2
        os.kill(job.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(psutil.pid_exists, pids)))


def test_a_tokenizer_that_cannot_be_copied_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer whose copy gives other tokens, or whose class does more than the one behind it, is not copied."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(20))
    plain = text_tokenizer(toy_tokenizer())

    def other(texts: list[str], **how: Any) -> Any:
        return plain.encode([f"{text}!" for text in texts], **how)

    monkeypatch.setattr(workers, "from_portable", lambda _: replace(plain, encode=other))
    assert load(path, processes=2) == load(path)

    class Own(type(toy_tokenizer())):  # type: ignore[misc]
        def _encode_plus(self, *given: Any, **how: Any) -> Any:
            return super()._encode_plus(*given, **how)

    tokenizer = deepcopy(toy_tokenizer())
    tokenizer.__class__ = Own
    assert text_tokenizer(tokenizer).portable is None
    assert load(path, tokenizer, processes=2) == load(path)
