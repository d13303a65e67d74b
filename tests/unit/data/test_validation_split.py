"""Held-out rows: near-duplicates are on one side, and a row is always on the same side."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from job.common.near_duplicates import MOST_COMPARED, RowHashes, group_rows, row_hash
from job.data.training_and_validation import ValidationSource, load_rows, validation_source_of
from job.data.validation_split import count_overlap, hold_out
from job.errors import DataError
from job.records import DatasetRecord, Example
from tests.helpers import READING, alpaca_rows, write_jsonl

ROOT = Path(__file__).parents[3]
WORDS = [f"{head}{tail}" for head in ("ba", "ke", "li", "mo", "nu", "pra", "sti", "vo") for tail in "bdfgklmnprst"]


def text(number: int, words: int = 40) -> str:
    """A made-up text, another one for each number."""
    chance = random.Random(number)
    return " ".join(chance.choice(WORDS) for _ in range(words))


def hashes(texts: Sequence[str]) -> RowHashes:
    """What rows of one field are compared by."""
    rows = RowHashes()
    for one in texts:
        rows.add(row_hash([one]))
    return rows


def near(original: str, word: str = "changed") -> str:
    """The text with one word near its end replaced: 35 of 41 distinct shingles in common."""
    words = original.split()
    words[-2] = word
    return " ".join(words)


TEXTS = [text(number) for number in range(400)]


def test_a_share_is_held_out() -> None:
    """About that share, some and not all, by the text alone."""
    held = hold_out(hashes(TEXTS), 0.1, "rows")
    assert 20 <= sum(held) <= 60


def test_a_number_is_held_out_exactly() -> None:
    """So many rows, none more or less, also where groups have to be skipped."""
    texts = [*TEXTS, *(near(one) for one in TEXTS[:100])]
    for number in (2, 37, 200):
        assert sum(hold_out(hashes(texts), number, "rows")) == number


def test_the_split_never_changes() -> None:
    """The same rows are held out on every machine and in every version: runs must be comparable."""
    held = hold_out(hashes(TEXTS), 0.1, "rows")
    chosen = "\n".join(one for one, side in zip(TEXTS, held, strict=True) if side)
    assert (
        hashlib.sha256(chosen.encode()).hexdigest()
        == "449ca5fe54547447a5c489ba4d8fe0ee264f2845df64397094973ae20edd8b5c"
    )


def test_order_does_not_matter() -> None:
    """Shuffled rows, with near-duplicates among them, fall as they did before."""
    texts = [*TEXTS, *(near(one) for one in TEXTS[:50]), *TEXTS[:10]]
    shuffled = random.Random(1).sample(texts, len(texts))
    for wanted in (0.2, 60):
        sides = [dict(zip(rows, hold_out(hashes(rows), wanted, "rows"), strict=True)) for rows in (texts, shuffled)]
        assert sides[0] == sides[1]


def test_a_row_falls_alike_whatever_else_there_is() -> None:
    """With a share, other rows beside it change no row's side."""
    sides = [dict(zip(rows, hold_out(hashes(rows), 0.2, "rows"), strict=True)) for rows in (TEXTS, TEXTS[:150])]
    assert all(sides[0][one] == side for one, side in sides[1].items())


@pytest.mark.parametrize(
    "copy",
    [
        str,
        near,
        str.upper,
        lambda one: one.replace(" ", "  "),
        lambda one: one.replace(" ", ", ") + "!",
        lambda one: near(near(one), "again"),
    ],
    ids=["exact", "one word", "case", "space", "punctuation", "twice"],
)
def test_near_duplicates_fall_on_one_side(copy: Callable[[str], str]) -> None:
    """Of 400 rows and a copy of each, no pair is parted; other rows are not grouped."""
    rows = hashes([*TEXTS, *map(copy, TEXTS)])
    groups = group_rows(rows)
    assert groups[:400] == groups[400:]
    assert len(set(groups)) == 400
    held = hold_out(rows, 0.3, "rows")
    assert held[:400] == held[400:]
    assert 0 < sum(held) < len(held)


def test_a_chain_of_near_duplicates_is_one_group() -> None:
    """Rows that have a near-duplicate in common are together, though they are less like each other."""
    chain = [text(1, words=80)]
    for place in range(0, 78, 6):
        words = chain[-1].split()
        words[place] = "changed"
        chain.append(" ".join(words))
    assert len(set(group_rows(hashes([*chain, TEXTS[1]])))) == 2


def test_many_rows_of_one_pattern_take_no_long_time() -> None:
    """A thousand near-duplicates are one group, which stays in training if it is larger than what is held out."""
    pattern = [f"{TEXTS[0]} number {number}" for number in range(1000)]
    assert len(pattern) > MOST_COMPARED
    assert len(set(group_rows(hashes(pattern)))) == 1
    held = hold_out(hashes([*pattern, *TEXTS]), 0.1, "rows")
    assert not any(held[:1000])
    assert sum(held) > 0
    with pytest.raises(DataError, match=r"1,000 rows form 1 groups of near-duplicates"):
        hold_out(hashes(pattern), 0.1, "rows")


def test_short_and_strange_texts_are_rows_too() -> None:
    """Less than three words, none at all, and scripts without spaces are compared like others."""
    texts = ["yes", "no", "yes!", "\N{GRINNING FACE}", "\N{CRYING FACE}", "", "我很好", "你不好", "two words"]
    groups = group_rows(hashes(texts))
    assert groups[0] == groups[2]
    assert len(set(groups)) == len(texts) - 1


@pytest.mark.parametrize("wanted", [400, 401, 10**6])
def test_more_rows_than_there_are_are_refused(wanted: int) -> None:
    """At least one row is left to train on."""
    with pytest.raises(DataError, match=r"rows: has 400 rows, so .* cannot be held out"):
        hold_out(hashes(TEXTS), wanted, "rows")


@pytest.mark.parametrize(("rows", "share"), [(40, 0.999999), (3, 0.9), (2, 0.95)])
def test_a_share_that_leaves_no_row_to_train_on_is_refused(rows: int, share: float) -> None:
    """Each row is held out by itself or not: of a few rows, all may be."""
    for first in range(100):
        found = hashes([text(100 * first + n) for n in range(rows)])
        try:
            assert set(hold_out(found, share, "rows.jsonl")) == {True, False}
        except DataError as error:
            if "all of them out, so that none is left to train on; lower JOB_DATA__VALIDATION" in str(error):
                return
    raise AssertionError("it never happened")


def test_overlap_is_counted() -> None:
    """Validation rows that are trained on too are counted: those word for word, and those nearly so."""
    training, validation = hashes(TEXTS), hashes([TEXTS[0], TEXTS[1].upper(), near(TEXTS[2]), text(9999)])
    assert count_overlap(training, validation, lambda: None) == (2, 1)


def load(path: Path, validation: Any, tokenizer: Any, **how: Any) -> tuple[list[Example], list[Example], DatasetRecord]:
    """Reads the rows of a file as a run does."""
    return load_rows(str(path), validation, **READING | {"tokenizer": tokenizer} | how)


def source_at(path: Path) -> ValidationSource:
    """A validation source in a file."""
    return ValidationSource(str(path), str(path), None, "validation")


def test_training_and_validation_are_the_whole(tmp_path: Path, tokenizer: Any) -> None:
    """Every row is on exactly one side, in its order; the record is of both, each for itself."""
    path = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(60))
    whole, nothing, before = load(path, None, tokenizer)
    training, held, record = load(path, 12, tokenizer)
    assert not nothing
    assert before.validation is None
    assert len(held) == 12
    assert sorted([*training, *held], key=whole.index) == whole
    assert sorted(training, key=whole.index) == training
    assert record.validation is not None
    assert (record.rows, record.validation.rows, record.validation.held_out) == (48, 12, True)
    assert record.tokens + record.validation.tokens == before.tokens
    assert record.target_tokens + record.validation.target_tokens == before.target_tokens
    assert len({before.sha256, record.sha256, record.validation.sha256}) == 3
    assert load(path, 12, tokenizer)[2] == record


def test_the_system_prompt_does_not_make_rows_alike(tmp_path: Path, tokenizer: Any) -> None:
    """Rows that share nothing but a long system prompt are not near-duplicates."""
    rows = [{"instruction": text(n, 8), "output": text(-n, 8), "system": text(7, 200)} for n in range(40)]
    _, held, _ = load(write_jsonl(tmp_path / "rows.jsonl", rows), 10, tokenizer, max_length=4096)
    assert len(held) == 10


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_no_prompt_is_on_both_sides(tmp_path: Path, tokenizer: Any, method: str) -> None:
    """All answers to a prompt are held out together; labelled ones get their mismatched answer from their own side."""
    prompts = [f"Question {n}: {text(n, 6)}?" for n in range(12)]
    path, rows = (
        tmp_path / "rows.jsonl",
        [(prompt, f" answer {n} of {m}") for n, prompt in enumerate(prompts) for m in range(2)],
    )
    if method == "dpo":
        write_jsonl(path, [{"prompt": p, "chosen": answer, "rejected": f"{answer}, or not"} for p, answer in rows])
    else:
        labelled = [{"prompt": p, "completion": a, "label": n % 2 == 0} for n, (p, a) in enumerate(rows)]
        write_jsonl(path, labelled)
    folder = tmp_path / "tokens"
    folder.mkdir()
    for where in ({}, {"folder": folder}):
        sides = load(path, 6, tokenizer, method=method, **where)
        asked = [
            {tuple(one.input_ids[: one.targets.index(True)]) for example in side for one in example.sequences}
            for side in sides[:2]
        ]
        assert [len(side) for side in sides[:2]] == [18, 6]
        assert [len(side) for side in asked] == [9, 3]
        assert not asked[0] & asked[1]
        if method == "kto":
            answers = [
                [
                    {one.input_ids[one.targets.index(True) :] for one in column}
                    for column in zip(*(example.sequences for example in side), strict=True)
                ]
                for side in sides[:2]
            ]
            assert all(own == mismatched for own, mismatched in answers)
        assert sides[2].validation is not None
        assert sides[2].validation.target_tokens == sum(sum(example.targets) for example in sides[1])


def test_a_source_of_its_own(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is held out of training; what is in both is counted and warned of."""
    path = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(30))
    other = write_jsonl(tmp_path / "other.jsonl", alpaca_rows(35)[25:])
    training, held, record = load(path, source_at(other), tokenizer, limit=28)
    assert (len(training), len(held)) == (28, 10)
    assert record.validation is not None
    assert (record.validation.source, record.validation.held_out) == (str(other), False)
    assert record.validation.duplicates == 3
    told = capsys.readouterr()
    assert "validation rows are also trained on" in told.out + told.err
    assert record.sha256 == load(path, None, tokenizer, limit=28)[2].sha256


def test_bad_rows_of_both_are_reported_together(tmp_path: Path, tokenizer: Any) -> None:
    """One error names the bad rows of the training and of the validation source."""
    bad = [{"instruction": "Add.", "output": ""}]
    one, other = (write_jsonl(tmp_path / name, alpaca_rows(3) + bad) for name in ("rows.jsonl", "other.jsonl"))
    with pytest.raises(DataError) as caught:
        load(one, source_at(other), tokenizer)
    assert caught.value.total == 2
    said = str(caught.value)
    assert "rows.jsonl" in said
    assert "other.jsonl" in said


def test_another_schema_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """The loss on rows of another schema would say nothing of what is trained."""
    path = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(5))
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "Some text."}])
    with pytest.raises(DataError, match="schema text, and the training data of alpaca"):
        load(path, source_at(other), tokenizer)


def test_another_split_of_the_same_data_set_has_its_revision() -> None:
    """A hub id that is the training source's too needs no second revision."""
    how: dict[str, Any] = {"source": "a/b", "source_revision": "c0ffee", "validation_split": "test"}
    for own, expected in ((None, "c0ffee"), ("f00d", "f00d")):
        found = validation_source_of("a/b", validation_revision=own, **how)
        assert found == ValidationSource("a/b", "a/b", expected, "test")
    other = validation_source_of("c/d", validation_revision=None, **how)
    assert isinstance(other, ValidationSource)
    assert other.revision is None
    assert validation_source_of(0.1, validation_revision=None, **how) == 0.1


@pytest.mark.long
def test_datasketch_is_imported_only_where_it_is_used() -> None:
    """A run without validation does not pay for it."""
    code = "import sys, job.data.training_and_validation, job.stages.pull; sys.exit('datasketch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
