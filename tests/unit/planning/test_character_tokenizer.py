"""A substitute for a tokenizer: it counts characters, with the interface of a real one."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.dataset import load_examples
from job.errors import DataError
from job.planning.character_tokenizer import CharacterTokenizer
from tests.helpers import READING, alpaca_rows, write_jsonl


@given(st.text(max_size=300), st.floats(0.5, 10))
def test_tokens_are_so_many_characters(text: str, width: float) -> None:
    """The count is the length over the width, rounded up; the pieces lie side by side and cover the text."""
    (encoding,) = CharacterTokenizer(width)([text]).encodings
    assert len(encoding.ids) == len(encoding.offsets) == ceil(len(text) / width)
    assert len(CharacterTokenizer(width).encode(text, add_special_tokens=False)) == len(encoding.ids)
    ends = [0, *(end for _, end in encoding.offsets)]
    assert [start for start, _ in encoding.offsets] == ends[:-1]
    assert ends[-1] == len(text)


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_rows_are_checked_without_a_tokenizer(tmp_path: Path, loss_on: str) -> None:
    """The data set is read by the job's own reader: bad rows are found, good ones give lengths and targets."""
    how = READING | {"loss_on": loss_on, "max_length": 10**6, "tokenizer": CharacterTokenizer(4.0)}
    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(30))
    rows, record = load_examples(str(tmp_path / "rows.jsonl"), **how)
    assert (len(rows), record.format) == (30, "alpaca")
    assert record.target_tokens < record.tokens
    write_jsonl(tmp_path / "bad.jsonl", [*alpaca_rows(3), {"instruction": "x", "output": 3}])
    with pytest.raises(DataError, match=r"bad.jsonl:4 output: must be text"):
        load_examples(str(tmp_path / "bad.jsonl"), **how)


def test_conversations_are_rendered(tmp_path: Path) -> None:
    """Without the model's template, the messages one after the other."""
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    (row,), _ = load_examples(
        str(tmp_path / "rows.jsonl"),
        revision=None,
        split="train",
        limit=None,
        schema=None,
        on_bad_row="error",
        loss_on="completion",
        max_length=100,
        tokenizer=CharacterTokenizer(1.0),
    )
    assert 0 < sum(row.targets) < len(row.input_ids)
