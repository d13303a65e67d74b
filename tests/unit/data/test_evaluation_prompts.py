"""The prompts that base and adapter answer: read from the same kinds of files as training rows, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.data.dataset import load_examples
from job.data.evaluation_prompts import MAX_PROMPTS, find_prompts, read_prompts, validation_prompts
from job.errors import DataError
from job.records import PromptRow
from tests.helpers import READING, write_jsonl
from tests.toy_tokenizer import CHATML, toy_tokenizer
from tests.unit.data.test_turns import ASK, MAT, SYSTEM

ALPACA = {"instruction": "Name a cat.", "input": "a mat", "output": "the cat"}


def read(path: Path, *, template: str | None = CHATML, schema: str = "messages", most: int = 400) -> list[PromptRow]:
    """The prompts of a file, by the toy tokenizer."""
    return read_prompts(
        find_prompts(str(path)), path.name, tokenizer=toy_tokenizer(template), schema=schema, most_tokens=most
    )


def test_rows_are_asked_as_training_writes_them(tmp_path: Path) -> None:
    """What a row answers itself is no part of the prompt; the tokens are those that training puts before the answer."""
    rows = [
        {"prompt": "the cat", "completion": " sat"},
        ALPACA,
        {"messages": [SYSTEM, ASK, MAT, ASK, MAT]},
        {"prompt": [ASK], "chosen": [MAT], "rejected": [SYSTEM]},
        {"conversations": [{"from": "human", "value": "cat?"}, {"from": "gpt", "value": "mat."}]},
        {"messages": [ASK]},
        {"prompt": [ASK], "completion": [MAT]},
    ]
    found = read(write_jsonl(tmp_path / "p.jsonl", rows))
    # The last has no reference, as before its completion was read: references are hashed, and a run must resume.
    assert [prompt.reference for prompt in found] == [" sat", "the cat", "mat.", None, "mat.", None, None]
    assert found[0].text == "the cat"
    assert found[2].text == "<|system|>be a cat</s><|user|>cat?</s><|assistant|>mat.</s><|user|>cat?</s><|assistant|>"
    assert found[3].text == found[4].text == found[5].text == found[6].text == "<|user|>cat?</s><|assistant|>"
    assert found[4].where == "p.jsonl:5"
    for row, prompt in ((rows[0], found[0]), (ALPACA, found[1]), (rows[4], found[4]), (rows[6], found[6])):
        path = write_jsonl(tmp_path / "one.jsonl", [row])
        how: dict[str, Any] = {**READING, "loss_on": "completion", "tokenizer": toy_tokenizer(CHATML)}
        (example,), _ = load_examples(str(path), **how)
        assert prompt.ids == example.input_ids[: example.targets.index(True)]


@pytest.mark.parametrize(
    ("schema", "text"),
    [("messages", "<|user|>cat?</s><|assistant|>"), ("prompt_completion", "cat?"), ("alpaca", "Instruction:\ncat?\n")],
)
def test_lines_of_text_are_asked_like_the_training_rows(tmp_path: Path, schema: str, text: str) -> None:
    """A user's message, the text as it is, or an instruction; empty lines are none, and places count all lines."""
    (tmp_path / "p.txt").write_bytes("\ufeffcat?\r\n\r\nthe mat\n".encode())
    first, second = read(tmp_path / "p.txt", schema=schema)
    assert text in first.text
    assert (first.where, second.where) == ("p.txt:1", "p.txt:3")


WRONG: dict[str, tuple[Any, str]] = {
    "no prompt": ({"text": "the cat"}, r"p.jsonl:2: has no prompt"),
    "empty": ({"prompt": ""}, "has no prompt"),
    "no message": ({"messages": [MAT]}, "no message to answer"),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\]: must be an object"),
    "tools": ({"messages": [ASK], "tools": "{"}, "messages: is refused"),
    "too long": ({"prompt": "x" * 900}, "JOB_EVAL__PROMPTS_MAX_NEW_TOKENS"),
    "surrogate": ({"prompt": "\udc80"}, "UTF-8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_prompt_is_named(tmp_path: Path, case: str) -> None:
    """The row, its line and what is wrong with it."""
    row, what = WRONG[case]
    with pytest.raises(DataError, match=what):
        read(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, row]))


def test_files_that_hold_no_prompts_or_too_many(tmp_path: Path) -> None:
    """None, more than can be answered, no text, no template for messages, and no file are refused with the reason."""
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "many.txt").write_text("a\n" * (MAX_PROMPTS + 1))
    (tmp_path / "wide.txt").write_text("a", encoding="utf-16")
    (tmp_path / "latin.txt").write_text("a\nfür\n", encoding="latin-1")
    files = (
        ("none.txt", "holds no prompts"),
        ("many.txt", "more than 1,000"),
        ("wide.txt", "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8 wide.txt > NEW"),
        ("latin.txt", "latin.txt:2: is not valid UTF-8 text; convert a text file to UTF-8: iconv -f WINDOWS-1252"),
    )
    for name, what in files:
        with pytest.raises(DataError, match=what):
            read(tmp_path / name)
    with pytest.raises(DataError, match="no chat template"):
        read(write_jsonl(tmp_path / "p.jsonl", [{"messages": [ASK]}]), template=None)
    with pytest.raises(DataError, match=r"gone\.txt"):
        find_prompts(str(tmp_path / "gone.txt"))


def test_validation_rows_are_asked_up_to_their_last_answer(tmp_path: Path) -> None:
    """The first rows whose prompt fits, with their own answer; rows of plain text have no prompt."""
    rows = [{"prompt": f"the cat {'x' * 200 * (n == 1)}{n}:", "completion": f" sat {n}"} for n in range(4)]
    how: dict[str, Any] = {**READING, "loss_on": "completion", "tokenizer": toy_tokenizer()}
    examples, _ = load_examples(str(write_jsonl(tmp_path / "p.jsonl", rows)), **how)
    found = list(validation_prompts(examples, 2, toy_tokenizer(), 60))
    assert [(one.where, one.text, one.reference) for one in found] == [
        ("validation row 1", "the cat 0:", " sat 0"),
        ("validation row 3", "the cat 2:", " sat 2"),
    ]
    texts, _ = load_examples(str(write_jsonl(tmp_path / "t.jsonl", [{"text": "the cat"}] * 2)), **how)
    assert list(validation_prompts(texts, 2, toy_tokenizer(), 60)) == []
