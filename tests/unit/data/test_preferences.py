"""Preference rows: their forms, errors in them, and what is learned from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.data.dataset import load_examples
from job.data.formats import Row
from job.data.preferences import check_preference, with_partners
from job.errors import DataError
from job.records import DatasetRecord, Example
from tests.helpers import READING
from tests.toy_tokenizer import CHATML, toy_tokenizer

ASK = {"role": "user", "content": "cat?"}
GOOD = {"role": "assistant", "content": "mat."}
BAD = {"role": "assistant", "content": "dog."}
PAIR = {"prompt": "ab", "chosen": "cd", "rejected": "xyz"}


def load(
    path: Path, *rows: dict[str, Any], tokenizer: Any = None, **changes: Any
) -> tuple[list[Example], DatasetRecord]:
    """The examples of some rows, for dpo where nothing else is said."""
    path = path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = READING | {"max_length": 200, "method": "dpo", "tokenizer": tokenizer or toy_tokenizer()}
    return load_examples(str(path), **options | changes)


def sides(example: Example, tokenizer: Any = None) -> list[tuple[str, str]]:
    """Of each sequence, the text that is read and the text that is learned."""
    decode = (tokenizer or toy_tokenizer()).decode
    return [
        (
            decode([token for token, target in zip(one.input_ids, one.targets, strict=True) if not target]),
            decode([token for token, target in zip(one.input_ids, one.targets, strict=True) if target]),
        )
        for one in example.sequences
    ]


def test_a_pair_is_two_sequences(tmp_path: Path) -> None:
    """Both begin with the prompt, which is never learned, and end with the end of sequence, which is."""
    (example,), record = load(tmp_path, PAIR)
    assert sides(example) == [("<s>ab", "cd</s>"), ("<s>ab", "xyz</s>")]
    assert (record.format, record.rows, record.tokens) == ("preference", 1, len(example.input_ids))
    assert record.target_tokens == 7


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [("ab cd", "ab xy", "<s>ab"), ("abcd", "abxy", "<s>ab"), ("cd", "xy", "<s>")],
)
def test_a_prompt_may_be_the_common_beginning(tmp_path: Path, chosen: str, rejected: str, prompt: str) -> None:
    """Without a prompt it is how both answers begin, without the space before they part, as TRL has it."""
    (example,), _ = load(tmp_path, {"chosen": chosen, "rejected": rejected})
    read = prompt.removeprefix("<s>")
    assert sides(example) == [(prompt, f"{text[len(read) :]}</s>") for text in (chosen, rejected)]


CONVERSATIONS = {
    "prompt of messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "no prompt": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "prompt as text": {"prompt": "cat?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_conversations_are_rendered_by_the_template(tmp_path: Path, form: str) -> None:
    """In each form the answer is what follows the header that asks for it."""
    tokenizer = toy_tokenizer(chat_template=CHATML)
    (example,), _ = load(tmp_path, CONVERSATIONS[form], tokenizer=tokenizer)
    (read, good), (also_read, bad) = sides(example, tokenizer)
    assert read == also_read
    assert "cat?" in read
    assert "mat." not in read
    assert good.startswith("mat.")
    assert bad.startswith("dog.")


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "the same": ({**PAIR, "rejected": "cd"}, "rejected", "same as chosen"),
    "empty": ({**PAIR, "chosen": " "}, "chosen", "is empty"),
    "one missing": ({"prompt": "a", "chosen": "b"}, "rejected", "is missing"),
    "null": ({**PAIR, "rejected": None}, "rejected", "is null"),
    "a number": ({**PAIR, "rejected": 3}, "rejected", "must be text"),
    "mixed": ({"chosen": [ASK, GOOD], "rejected": "x"}, "rejected", "must be messages"),
    "one begins the other": ({"chosen": "ab", "rejected": "abc"}, "chosen", "is empty after"),
    "no common message": ({"chosen": [GOOD], "rejected": [BAD]}, "chosen", "no common prompt"),
    "last is asked": ({"prompt": [ASK], "chosen": [ASK], "rejected": [BAD]}, "chosen[0]", "role assistant"),
    "another prompt": ({"prompt": "x", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "prompt", "must be messages"),
    "no role": ({"prompt": [ASK], "chosen": [{"content": "x"}], "rejected": [BAD]}, "chosen[0] role", "is missing"),
    "tools": ({**PAIR, "tools": [{"name": "f"}]}, "tools", "is not used in the schema preference"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_row_names_its_place(tmp_path: Path, case: str) -> None:
    """Each error has the file, the line, the field, and what is wrong."""
    row, field, what = WRONG[case]
    with pytest.raises(DataError) as error:
        load(tmp_path, row, tokenizer=toy_tokenizer(chat_template=CHATML))
    (problem,) = error.value.problems
    assert problem.where.endswith(f"rows.jsonl:1 {field}")
    assert what in problem.what


def test_bad_rows_can_be_left_out(tmp_path: Path) -> None:
    """They are counted by kind; a limit counts pairs."""
    rows = [
        PAIR,
        {**PAIR, "rejected": "cd"},
        {**PAIR, "chosen": "z" * 300},
        {**PAIR, "chosen": "q"},
        {**PAIR, "chosen": "w"},
    ]
    examples, record = load(tmp_path, *rows, on_bad_row="skip", limit=2)
    assert (len(examples), record.skipped) == (2, {"same_answers": 1, "too_long": 1})
    assert sides(examples[1])[0] == ("<s>ab", "q</s>")


def test_rows_are_all_of_one_kind(tmp_path: Path) -> None:
    """Texts among conversations are bad rows: a text has no end of turn."""
    tokenizer = toy_tokenizer(chat_template=CHATML)
    with pytest.raises(DataError, match="must be messages, as in the first row, is text"):
        load(tmp_path, CONVERSATIONS["no prompt"], PAIR, tokenizer=tokenizer)


def test_what_is_hashed_is_the_order_of_preference(tmp_path: Path) -> None:
    """The data set with chosen and rejected the other way round is another one."""
    turned = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    assert load(tmp_path, PAIR)[1].sha256 != load(tmp_path, turned)[1].sha256


LABELLED = [{"prompt": f"{n}", "completion": "ab" * n, "label": n % 2 == 0} for n in range(1, 6)]


def test_labelled_answers_get_a_mismatched_one(tmp_path: Path) -> None:
    """Each example holds its label, and its prompt with the completion of another row as second sequence."""
    examples, record = load(tmp_path, *LABELLED, method="kto")
    assert record.format == "unpaired_preference"
    assert [example.desirable for example in examples] == [row["label"] for row in LABELLED]
    for example, row in zip(examples, LABELLED, strict=True):
        own, other = sides(example)
        assert own == (f"<s>{row['prompt']}", f"{row['completion']}</s>")
        assert other[0] == own[0]
        assert other[1] != own[1]


@pytest.mark.parametrize(("label", "good"), [("true", True), ("False", False), (1, True), ("0", False)])
def test_labels_of_tables_are_understood(tmp_path: Path, label: Any, good: bool) -> None:  # noqa: FBT001 - parametrized
    """CSV has no truth values, so the usual words for them count."""
    examples, _ = load(tmp_path, {**LABELLED[0], "label": label}, LABELLED[1], method="kto")
    assert examples[0].desirable is good


def test_other_labels_are_not(tmp_path: Path) -> None:
    """A rating is no label."""
    with pytest.raises(DataError, match="must be true"):
        load(tmp_path, {**LABELLED[0], "label": 4}, method="kto")


@pytest.mark.parametrize(
    ("row", "method", "fitting"),
    [
        (PAIR, "sft", "dpo or orpo"),
        (PAIR, "kto", "dpo or orpo"),
        ({"instruction": "a", "output": "b"}, "dpo", "sft"),
        ({"text": "a"}, "kto", "sft"),
    ],
)
def test_the_method_that_fits_is_named(tmp_path: Path, row: dict[str, Any], method: str, fitting: str) -> None:
    """Rows of another method's kind are refused with the one that learns from them."""
    with pytest.raises(DataError) as error:
        load(tmp_path, row, method=method)
    assert f"JOB_TRAIN__METHOD={fitting}" in str(error.value.problems)


def test_a_prompt_that_the_answers_begin_with_is_not_there_twice() -> None:
    """Messages given as the prompt and again at the beginning of both answers are a fault."""
    prompt = [{"role": "user", "content": "Hi"}]
    chosen, rejected = ([*prompt, {"role": "assistant", "content": answer}] for answer in ("Yes", "No"))
    fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert [fault.where for fault in check_preference(Row("x:1", fields), "preference")] == ["x:1 prompt"]


PROMPT = "Human: where is the cat?\nAssistant:"


def test_a_text_that_both_answers_begin_with_is_not_there_twice(tmp_path: Path) -> None:
    """A prompt at the beginning of both answers as well is a fault, with its place; by chance it is none."""
    twice = {"prompt": PROMPT, "chosen": f"{PROMPT} here", "rejected": f"{PROMPT} there"}
    with pytest.raises(DataError) as error:
        load(tmp_path, twice, max_length=200)
    (problem,) = error.value.problems
    assert problem.where.endswith("rows.jsonl:1 prompt")
    assert "beginning of both answers" in problem.what
    for row in (
        {**twice, "rejected": " there"},
        {"chosen": twice["chosen"], "rejected": twice["rejected"]},
        {"prompt": "Hello", "chosen": "Hello!", "rejected": "Hello."},
    ):
        assert len(load(tmp_path, row, max_length=200)[0]) == 1


def test_a_mismatched_answer_is_that_of_the_example_before() -> None:
    """In the order of the first epoch, as in TRL's batches, the last one's for the first; each side by itself."""
    examples = [
        Example((1, 10 + n, 20 + n, 30 + n), (False, False, True, True), desirable=n % 2 == 0) for n in range(5)
    ]
    found = list(with_partners(examples, [(2, 0, 3), (1, 4)], 512))
    assert [one.sequences[0].input_ids for one in found] == [one.input_ids for one in examples]
    assert [one.desirable for one in found] == [True, False, True, False, True]
    before = {2: 3, 0: 2, 3: 0, 1: 4, 4: 1}
    assert [one.sequences[1].input_ids for one in found] == [
        (1, 10 + n, 20 + before[n], 30 + before[n]) for n in range(5)
    ]
    assert all(one.sequences[1].targets == (False, False, True, True) for one in found)
    cut = list(with_partners(examples, [(0, 1, 2, 3, 4)], 3))
    assert [one.sequences[1].input_ids for one in cut] == [(1, 10 + n, 20 + (n - 1) % 5) for n in range(5)]
