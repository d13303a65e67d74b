"""The safety check of rows: which labels mean unsafe, which rows are found, and what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from job.audit import safety
from job.audit.audit import parse_findings
from job.audit.overlap import index_questions
from job.audit.rows import set_up
from job.audit.safety import Screen, Texts, unsafe_labels
from job.data.token_cache import Tokens, load_tokens
from job.errors import DataError, SettingsError
from job.records import SafetyRecord
from tests.helpers import READING, write_jsonl
from tests.toy_tokenizer import toy_tokenizer

RECORD = SafetyRecord("models/kettles", None, "0" * 64, ["unsafe"], 0.5)
UNSAFE = (3, 17, 19)


@pytest.mark.parametrize(
    ("labels", "asked", "exclusive", "expected"),
    [
        (["safe", "unsafe"], None, True, ["unsafe"]),
        (["NON_TOXIC", "toxic"], None, True, ["toxic"]),
        (["neutral", "insult", "threat"], None, True, ["insult", "threat"]),
        (["toxic", "insult"], None, False, ["toxic", "insult"]),
        (["not-hate", "hate"], None, True, ["hate"]),
        (["LABEL_0", "LABEL_1"], ["LABEL_1"], True, ["LABEL_1"]),
        (["a", "b", "c"], ["c", "a"], True, ["a", "c"]),
    ],
)
def test_labels_that_mean_unsafe(
    labels: list[str], asked: list[str] | None, *, exclusive: bool, expected: list[str]
) -> None:
    """All but those with a name that means safe, or those that are named, in the model's order."""
    assert list(unsafe_labels(labels, asked, exclusive=exclusive)) == expected


@pytest.mark.parametrize(
    ("labels", "asked", "exclusive", "words"),
    [
        (["LABEL_0", "LABEL_1"], None, True, "have no names (LABEL_0, LABEL_1)"),
        (["positive", "negative"], None, True, "known to mean safe"),
        (["safe", "neutral"], None, True, "known to mean unsafe"),
        (["safe", "unsafe"], ["bad"], True, "names bad"),
        (["safe", "unsafe"], ["safe", "unsafe"], True, "leave out what means safe"),
    ],
)
def test_labels_that_do_not_say_it_are_refused(
    labels: list[str], asked: list[str] | None, *, exclusive: bool, words: str
) -> None:
    """Where it cannot be told what means unsafe, nothing is guessed: the message names the labels and the setting."""
    with pytest.raises(SettingsError) as caught:
        unsafe_labels(labels, asked, exclusive=exclusive)
    assert words in str(caught.value)
    assert "JOB_DATA__UNSAFE_LABELS" in str(caught.value)


def test_texts_come_back_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of any length come back in order, as often as they are asked for, and their hash knows where each ends."""
    monkeypatch.setattr(safety, "CHUNK", 2)
    texts, others = Texts(), Texts()
    for one in ("a", "", "bé\n", "c", "d"):
        texts.add(one.encode())
    for one in ("a", "b", "é\n", "c", "d"):
        others.add(one.encode())
    for _ in range(2):
        assert list(texts.chunks()) == [["a", ""], ["bé\n", "c"], ["d"]]
    assert texts.sizes == [2, 2, 1]
    assert texts.sha256 != others.sha256


def screen(asked: list[str]) -> Screen:
    """Scores 0.75 for texts with a kettle, and 0.25 for others; notes what it is asked."""

    def score(texts: Texts) -> list[float]:
        found = [text for chunk in texts.chunks() for text in chunk]
        asked.extend(found)
        return [0.75 if "kettle" in text else 0.25 for text in found]

    return score


def read(folder: Path, asked: list[str], on_finding: dict[str, Any], record: SafetyRecord | None = RECORD) -> Tokens:
    """40 rows, three of them about kettles, read by two processes."""
    rows: Sequence[dict[str, str]] = [
        {"instruction": f"What is number {n}?", "output": f"A {'kettle' if n in UNSAFE else 'cup'} of {n * 7}."}
        for n in range(40)
    ]
    path = write_jsonl(folder / "rows.jsonl", rows)
    options: dict[str, Any] = {**READING, "tokenizer": toy_tokenizer(), "name": "rows.jsonl", "processes": 2}
    setup = set_up(index_questions({}), on_finding, record)
    audited = {"audit": setup, "screen": screen(asked) if record else None}
    return load_tokens(str(path), None, root=folder, keep=True, **options, **audited)


def test_unsafe_rows_are_found_by_place(tmp_path: Path) -> None:
    """Each row is scored once, with all of its texts; places, scores and the classifier are recorded, no text is."""
    asked: list[str] = []
    tokens = read(tmp_path, asked, {})
    assert asked[3] == "What is number 3?\nA kettle of 21."
    assert len(asked) == 40
    assert tokens.findings is not None
    data = tokens.findings.read_bytes()
    found = [one for one in parse_findings(data) if one.kind == "unsafe"]
    assert [(one.row, one.where, one.score) for one in found] == [(n, f"rows.jsonl:{n + 1}", 0.75) for n in UNSAFE]
    assert b"kettle" not in data
    audit = tokens.record.audit
    assert audit is not None
    assert audit.safety == RECORD
    assert (audit.checks["unsafe"].rows, audit.checks["unsafe"].checked_by) == (3, "models/kettles")


@pytest.mark.parametrize("on_finding", [{"unsafe": "skip"}, {"all": "skip"}])
def test_unsafe_rows_are_left_out(tmp_path: Path, on_finding: dict[str, Any]) -> None:
    """With `skip` the rows are not trained on, and the kept tokens are those of this classifier and threshold only."""
    asked: list[str] = []
    assert len(read(tmp_path, asked, on_finding).examples) == 37
    assert len(read(tmp_path, asked, on_finding).examples) == 37
    assert len(asked) == 40, "the second time the tokens are known"
    stricter = SafetyRecord(RECORD.model, None, RECORD.sha256, RECORD.unsafe_labels, 0.9)
    assert len(read(tmp_path, asked, on_finding, stricter).examples) == 40


def test_unsafe_rows_are_an_error(tmp_path: Path) -> None:
    """With `error` the places are told, and not a word of the rows."""
    with pytest.raises(DataError) as caught:
        read(tmp_path, [], {"unsafe": "error"})
    assert [problem.where for problem in caught.value.problems] == [f"rows.jsonl:{n + 1}" for n in UNSAFE]
    assert "kettle" not in str(caught.value)


def test_without_a_classifier_the_kind_is_not_there(tmp_path: Path) -> None:
    """Neither looked for nor named as not looked for: runs without the setting are as before."""
    audit = read(tmp_path, [], {}, None).record.audit
    assert audit is not None
    assert audit.safety is None
    assert "unsafe" not in audit.checks
