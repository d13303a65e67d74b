"""The prompts that base and adapter answer: read from the same kinds of files as training rows, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from job.data import evaluation_prompts
from job.data.dataset import load_examples
from job.data.evaluation_prompts import MAX_PROMPTS, find_prompts, read_prompts, validation_prompts
from job.errors import DataError
from job.records import Example, PromptRow
from tests.helpers import READING, write_jsonl
from tests.toy_tokenizer import CHATML, toy_tokenizer
from tests.unit.data.test_turns import ASK, MAT, SYSTEM, TOOL

ALPACA = {"instruction": "Name a cat.", "input": "a mat", "output": "the cat"}


def read(
    path: Path, *, template: str | None = CHATML, schema: str = "messages", most: int = 400, **options: Any
) -> list[PromptRow]:
    """The prompts of a file, by the toy tokenizer."""
    options = {"tokenizer": toy_tokenizer(template)} | options
    return read_prompts(find_prompts(str(path)), path.name, schema=schema, most_tokens=most, **options)


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


def test_tokens_at_the_edges_are_those_of_training(tmp_path: Path) -> None:
    """Where the tokenizer ends each text, a prompt has no end; where a text begins like a sequence, it begins once."""
    tokenizer = copy.deepcopy(toy_tokenizer(CHATML))
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    for row in ({"prompt": "the cat", "completion": " sat"}, {"prompt": "<s>the cat", "completion": " sat"}):
        path = write_jsonl(tmp_path / "p.jsonl", [row])
        how: dict[str, Any] = {**READING, "loss_on": "completion", "tokenizer": tokenizer}
        (example,), _ = load_examples(str(path), **how)
        (prompt,) = read(path, tokenizer=tokenizer)
        assert prompt.ids == example.input_ids[: example.targets.index(True)]
        assert prompt.ids[0] not in prompt.ids[1:]
        assert tokenizer.eos_token_id not in prompt.ids


def test_the_template_gets_date_tools_and_variables(tmp_path: Path) -> None:
    """As it gets them in training; tools may be JSON text, as tables have them, or absent."""
    template = "{{ strftime_now('%Y-%m-%d') }} {{ style }} {{ tools[0].function.name if tools else 'none' }}" + CHATML
    rows = [{"messages": [ASK], "tools": tools} for tools in ([TOOL], json.dumps([TOOL]), [], None, "")]
    options: dict[str, Any] = {"date": "2026-01-31", "template_arguments": {"style": "brief"}}
    found = read(write_jsonl(tmp_path / "p.jsonl", rows), template=template, **options)
    asked = "<|user|>cat?</s><|assistant|>"
    assert [one.text for one in found] == [
        *[f"2026-01-31 brief look{asked}"] * 2,
        *[f"2026-01-31 brief none{asked}"] * 3,
    ]


def test_fields_that_a_table_leaves_empty(tmp_path: Path) -> None:
    """Null stands for a field that is not there; an answer in parts of text is one text."""
    parts = MAT | {"content": [{"type": "text", "text": "ma"}, {"type": "text", "text": "t."}]}
    rows = [
        {"messages": None, "prompt": "the cat", "completion": None, "output": "sat"},
        {"prompt": None, "instruction": "Name a cat.", "input": None, "output": None},
        {"messages": [ASK, parts]},
    ]
    first, second, third = read(write_jsonl(tmp_path / "p.jsonl", rows))
    assert (first.text, first.reference) == ("the cat", "sat")
    assert "### Input" not in second.text
    assert second.reference is None
    assert third.reference == "mat."


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
    "no object": ({"messages": [ASK, "cat?"]}, r"p.jsonl:2 messages\[1\]: must be an object"),
    "no turn": ({"conversations": [{"from": "human"}]}, r"p.jsonl:2 conversations\[0\] value: is missing"),
    "input": ({"instruction": "a", "input": 3}, "has no prompt"),
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


def test_the_first_of_many_rows_are_named(tmp_path: Path) -> None:
    """Twenty, and that there are more."""
    for count, more in ((20, []), (21, ["... and 1 more"])):
        path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, *[{"prompt": ""}] * count])
        with pytest.raises(DataError) as error:
            read(path)
        assert [problem.where for problem in error.value.problems] == [f"p.jsonl:{n}" for n in range(2, 22)]
        assert str(error.value).splitlines()[20:] == more


def test_the_longest_prompt_and_the_largest_token(tmp_path: Path) -> None:
    """Each limit itself is allowed; one token more is refused, with the numbers."""
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the cat"}])
    (prompt,) = read(path)
    ids = prompt.ids
    assert read(path, most=len(ids), vocabulary=max(ids) + 1)
    with pytest.raises(DataError, match=f"is {len(ids)} tokens long, and {len(ids) - 1} are allowed"):
        read(path, most=len(ids) - 1)
    with pytest.raises(DataError, match="and 0 are allowed"):
        read(path, most=-5)
    with pytest.raises(DataError, match=f"number {max(ids)}, and the model has embeddings of {max(ids)} tokens"):
        read(path, vocabulary=max(ids))


def test_a_text_file_that_is_large_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before it fills the memory, or with the system's words; its ending may be in capitals."""
    path = tmp_path / "P.TXT"
    path.write_text("a\n")
    monkeypatch.setattr(evaluation_prompts, "_MAX_TEXT_BYTES", 2)
    assert [one.where for one in read(path)] == ["P.TXT:1"]
    monkeypatch.setattr(evaluation_prompts, "_MAX_TEXT_BYTES", 1)
    with pytest.raises(DataError, match=r"P\.TXT: has more than 1 bytes"):
        read(path)

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"P\.TXT: cannot be read: Permission denied"):
        read(path)


def test_files_that_hold_no_prompts_or_too_many(tmp_path: Path) -> None:
    """None, more than can be answered, no text, no template for messages, and no file are refused with the reason."""
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "most.txt").write_text("a\n" * MAX_PROMPTS)
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
            read(tmp_path / name, schema="text")
    assert len(read(tmp_path / "most.txt", schema="text")) == MAX_PROMPTS
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


def test_the_prompt_of_a_validation_row_ends_before_its_last_answer() -> None:
    """By its targets: of several turns the last, of a pair the first answer; the limit itself is allowed."""
    tokenizer = toy_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ask, again, yes, no = (
        tuple(tokenizer(text)["input_ids"][1:]) for text in ("the cat", " sat", " the mat", " apple")
    )

    def example(*parts: tuple[tuple[int, ...], bool], second: tuple[int, ...] = ()) -> Example:
        ids = tuple(token for part, _ in parts for token in part)
        targets = tuple(learned for part, learned in parts for _ in part)
        return Example(ids + second, targets + (False,) * len(second), len(ids) if second else None)

    turns = example(((bos, *ask), False), ((*yes, eos), True), (again, False), ((*no, eos), True), (ask, False))
    pair = example(((bos, *ask, eos), False), (yes, True), second=(bos, *ask, *no))
    silent = example(((bos,), False), (yes, True))  # nothing is asked
    learned = example((ask, True))
    rows = [silent, learned, turns, pair]
    before = (bos, *ask, *yes, eos, *again)
    found = list(validation_prompts(rows, 9, tokenizer, len(before)))
    assert found == [
        PromptRow("validation row 3", "the cat the mat</s> sat", " apple", before),
        PromptRow("validation row 4", "the cat</s>", " the mat", (bos, *ask, eos)),
    ]
    assert [one.where for one in validation_prompts(rows, 9, tokenizer, len(before) - 1)] == ["validation row 4"]
    assert [one.where for one in validation_prompts(rows, 1, tokenizer, len(before))] == ["validation row 3"]
