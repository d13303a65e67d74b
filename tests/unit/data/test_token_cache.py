"""Cached tokens: read instead of tokenizing the rows again; verified; made again if damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from job.audit.rows import set_up
from job.data import token_cache
from job.data.token_cache import INDEX, Tokens, load_tokens, open_tokens
from job.data.training_and_validation import ValidationSource, load_rows
from job.errors import DataError
from job.records import SafetyRecord
from tests.helpers import READING, alpaca_rows
from tests.toy_tokenizer import CHATML, toy_tokenizer
from tests.unit.data.loaded_rows import lines

ROOT = Path(__file__).parents[3]


def options(**changes: Any) -> dict[str, Any]:
    """The arguments of `load_rows` that a test leaves alone."""
    return READING | {"max_length": 2000, "tokenizer": toy_tokenizer()} | changes


def tokens(path: Path, validation: float | ValidationSource | None = None, **changes: Any) -> Tokens:
    """The tokens of a file, kept beside it."""
    return load_tokens(str(path), validation, root=path.parent, keep=True, **options(**changes))


def folders(path: Path) -> set[str]:
    """The names of the folders with tokens."""
    return {folder.name for folder in (path.parent / "tokens").iterdir()}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one each time that rows are read."""
    reads: list[Any] = []

    def counted(*given: Any, **how: Any) -> Any:
        reads.append(given)
        return load_rows(*given, **how)

    monkeypatch.setattr(token_cache, "load_rows", counted)
    return reads


def test_a_restart_reads_the_tokens(tmp_path: Path, read: list[Any]) -> None:
    """The second time no row is read, the tokens and their record are the same, and what was warned of is again."""
    rows = alpaca_rows(20)
    rows[3]["output"] += "</s> and on"
    path = lines(tmp_path / "x.jsonl", *rows)
    first = tokens(path, 5.0)
    with structlog.testing.capture_logs() as logs:
        again = tokens(path, 5.0)
    assert len(read) == 1
    assert (again.examples, again.validation, again.record) == (first.examples, first.validation, first.record)
    plain = load_rows(str(path), 5.0, **options())
    assert (list(first.examples), list(first.validation or ()), first.record) == (
        list(plain[0]),
        list(plain[1] or ()),
        plain[2],
    )
    assert {"texts of rows contain control tokens, which the tokenizer encodes as such"} < {
        log["event"] for log in logs
    }
    assert open_tokens(first.folder).examples == first.examples


def test_a_validation_source_is_kept_too(tmp_path: Path, read: list[Any]) -> None:
    """Rows for validation in a source of their own come back, and a change of that source alone is seen."""
    path, other = (lines(tmp_path / name, *alpaca_rows(count)) for name, count in (("x.jsonl", 8), ("y.jsonl", 3)))
    where = ValidationSource(str(other), "y", None, "train")
    first, again = tokens(path, where), tokens(path, where)
    assert len(read) == 1
    assert again.validation is not None
    assert again.validation == first.validation
    assert again.record == first.record
    lines(other, *alpaca_rows(4))
    changed = tokens(path, where).validation
    assert changed is not None
    assert (len(changed), len(read)) == (4, 2)


def test_whatever_decides_the_tokens_is_in_the_key(tmp_path: Path, read: list[Any]) -> None:
    """Another byte of the data, setting, tokenizer, template or date finds nothing; what decides nothing finds it."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(8))
    found = [tokens(path).folder, tokens(path, 3.0).folder]
    other: tuple[dict[str, Any], ...] = (
        {"max_length": 1999},
        {"limit": 4},
        {"loss_on": "completion"},
        {"vocabulary": 400},
        {"seed": 1},
        {"on_long_row": "truncate"},
        {"field_names": {"prompt": "instruction", "completion": "output"}},
        {"name": "s3://bucket/x.jsonl"},
        {"tokenizer": toy_tokenizer(CHATML)},
        {"tokenizer": toy_tokenizer(CHATML + "{{ strftime_now('%Y') }}"), "date": "2026-01-01"},
        {"tokenizer": toy_tokenizer(CHATML + "{{ strftime_now('%Y') }}"), "date": "2026-01-02"},
    )
    found += [tokens(path, **changes).folder for changes in other]
    assert len(set(found)) == len(found) == len(read)
    assert tokens(path, processes=2, check_stop=lambda **_: None, date="2026-01-01").folder == found[0]
    lines(path, *alpaca_rows(8)[::-1])
    assert tokens(path).folder not in found


def test_other_gpus_find_no_screened_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a classifier decides which rows are left out, so do the GPUs that it computes on; else they do not."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(8))
    safety = SafetyRecord("models/x", None, "0" * 64, ["bad"], 0.5)

    def keys(gpus: list[str]) -> list[str | None]:
        monkeypatch.setattr(token_cache.host, "hardware", lambda: {"gpus": gpus})
        given: dict[str, Any] = options(name="x", processes=1, check_stop=lambda **_: None)
        audits = (set_up(None, {}), set_up(None, {}, safety))
        return [token_cache._key(str(path), None, **given | {"audit": audit}) for audit in audits]

    one, other = keys(["H100"]), keys(["A100"])
    assert one[0] == other[0]
    assert one[1] != other[1]


@pytest.mark.parametrize("damage", ["bit", "short", "index", "missing", "more"])
def test_damaged_tokens_are_made_again(tmp_path: Path, read: list[Any], damage: str) -> None:
    """A flipped bit, a lost end, an altered index, a missing or an added file: the rows are read again."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(8))
    first = tokens(path)
    expected, folder = list(first.examples), first.folder
    file = folder / "examples.arrow"
    data = file.read_bytes()
    if damage == "bit":
        file.write_bytes(bytes([*data[:200], data[200] ^ 1, *data[201:]]))
    elif damage == "short":
        file.write_bytes(data[:-9])
    elif damage == "index":
        facts = json.loads((folder / INDEX).read_text())
        facts["record"]["rows"] += 1
        (folder / INDEX).write_text(json.dumps(facts))
    elif damage == "missing":
        file.unlink()
    else:
        (folder / "more").touch()
    again = tokens(path)
    assert (list(again.examples), again.folder, len(read)) == (expected, folder, 2)
    tokens(path)
    assert len(read) == 2


def test_bad_rows_keep_nothing(tmp_path: Path) -> None:
    """After an error nothing is kept, and nothing is left of what was written."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(8), b"{")
    with pytest.raises(DataError):
        tokens(path)
    assert folders(path) == set()


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are never kept under the hash of other bytes."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(8))

    def changing(*given: Any, **how: Any) -> Any:
        found = load_rows(*given, **how)
        lines(path, *alpaca_rows(9))
        return found

    monkeypatch.setattr(token_cache, "load_rows", changing)
    with pytest.raises(DataError, match="changed while it was read"):
        tokens(path)
    assert folders(path) == set()


def test_nothing_is_kept_where_there_is_no_cache(tmp_path: Path, read: list[Any]) -> None:
    """Without a folder for it, or with a tokenizer that cannot be hashed, rows are read each time."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(4))
    for _ in range(2):
        load_tokens(str(path), None, root=tmp_path, keep=False, **options())
    assert len(read) == 2
    assert len(folders(path)) == 2


@pytest.mark.long
def test_a_kill_at_any_time_leaves_nothing_half(tmp_path: Path) -> None:
    """A process that is killed while it writes leaves no folder that is taken for whole; the next one starts over."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(400))
    expected = list(load_rows(str(path), None, **options())[0])
    code = f"""
from pathlib import Path
from tests.unit.data.test_token_cache import tokens
from job.data import examples, token_cache
examples._BATCH_TOKENS = 2000
plain, count = examples.ExampleWriter._flush, iter(range(99))
def flush(self):
    plain(self)
    if next(count) == WHEN:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
examples.ExampleWriter._flush = flush
tokens(Path({str(path)!r}))
"""
    for when in (0, 3):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("WHEN", str(when))], cwd=ROOT, env={**os.environ}, check=False
        )
        assert done.returncode == -signal.SIGKILL
        assert not [name for name in folders(path) if not name.startswith(".new-")]
    assert list(tokens(path).examples) == expected
    shutil.rmtree(tmp_path / "tokens")


def test_what_is_tokenized_anew_is_said(tmp_path: Path) -> None:
    """Where nothing is kept, with the setting; where other rows are kept; and nothing where these are."""
    path = lines(tmp_path / "x.jsonl", *alpaca_rows(4))
    with structlog.testing.capture_logs() as logs:
        load_tokens(str(path), None, root=tmp_path, keep=False, **options())
        tokens(path)
        tokens(path)
    said = [(log["event"], "JOB_STORAGE__CACHE" in log.get("change", "")) for log in logs if "tokeniz" in log["event"]]
    assert said == [
        ("rows are tokenized at every start", True),
        ("no cached tokens for exactly these rows, settings and versions: rows are tokenized", False),
    ]
