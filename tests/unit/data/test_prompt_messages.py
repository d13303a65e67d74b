"""Prompts and completions as lists of messages: tokens and targets of TRL's SFTTrainer, or a named error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.data.dataset import load_examples
from job.errors import DataError
from job.records import Example
from tests.helpers import READING
from tests.toy_tokenizer import CHATML
from tests.unit.data.loaded_rows import lines
from tests.unit.data.test_turns import (
    ASK,
    CALL,
    HAT,
    MARKED,
    MAT,
    SYSTEM,
    TOOL,
    UNMARKED,
    learned,
    load,
    tokenizer_with,
    trl_template,
)

ROWS: list[dict[str, Any]] = [
    {"prompt": [ASK], "completion": [MAT]},
    {"prompt": [SYSTEM, ASK, MAT, {"role": "user", "content": "and the other one?"}], "completion": [HAT]},
    {"prompt": [ASK], "completion": [MAT, ASK, HAT]},
]
CALLS: list[dict[str, Any]] = [
    {
        "tools": [TOOL],
        "prompt": [SYSTEM, ASK],
        "completion": [
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "look", "content": "it sat"},
            MAT,
        ],
    }
]


def as_trl_has_it(rows: list[dict[str, Any]], template: str, loss_on: str) -> list[tuple[tuple[int, ...], Any]]:
    """Tokens and targets that TRL's SFTTrainer prepares, by its own method; the first token is never predicted."""
    from datasets import Dataset
    from trl import SFTTrainer
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    tokenizer, assistant = tokenizer_with(template), loss_on == "assistant"
    swapped = assistant and not has_generation_markers(template)
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=get_training_chat_template(tokenizer) if swapped else None,
        completion_only_loss=loss_on != "all",
    )
    options: Any = SimpleNamespace(
        assistant_only_loss=assistant,
        dataset_num_proc=None,
        dataset_text_field="text",
        max_length=None,
        shuffle_dataset=False,
    )
    names: dict[str, Any] = {"formatting_func": None, "dataset_name": "train"}
    found = []
    for row in rows:  # one by one: a table would give each message the fields of all others
        dataset = Dataset.from_list([row])
        (made,) = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, options, packing=False, **names)
        targets = tuple(label != -100 for label in made["labels"])
        found.append((tuple(made["input_ids"]), (False, *targets[1:])))
    return found


@pytest.mark.parametrize("loss_on", ["all", "completion", "assistant"])
@pytest.mark.parametrize(
    ("template", "rows"),
    [
        (MARKED, ROWS),
        (trl_template("qwen3_training"), ROWS + CALLS),
        (trl_template("qwen3"), ROWS + CALLS),
        (trl_template("qwen2_5"), ROWS + CALLS),
        (trl_template("llama3"), ROWS),
    ],
    ids=["own marks", "own marks and tools", "qwen3", "qwen2.5", "llama3"],
)
def test_tokens_and_targets_are_those_of_trl(
    tmp_path: Path, template: str, rows: list[dict[str, Any]], loss_on: str
) -> None:
    """Row by row: `completion_only_loss`, with and without `assistant_only_loss`, and neither of them."""
    examples, record = load(lines(tmp_path / "x.jsonl", *rows), template, loss_on)
    assert [(one.input_ids, one.targets) for one in examples] == as_trl_has_it(rows, template, loss_on)
    assert (record.format, record.rows) == ("messages", len(rows))


def test_without_marks_the_turns_of_the_completion_are_learned(tmp_path: Path) -> None:
    """With `completion` all behind the prompt, as TRL has it; with `assistant` the answers in it, by comparison."""
    path = lines(tmp_path / "x.jsonl", *ROWS)
    examples, _ = load(path, UNMARKED, "completion")
    assert [(one.input_ids, one.targets) for one in examples] == as_trl_has_it(ROWS, UNMARKED, "completion")
    answers = [learned(example, UNMARKED) for example in load(path, UNMARKED, "assistant")[0]]
    assert answers == ["mat.<|im_end|>\n", "an apple<|im_end|>\n", "mat.<|im_end|>\nan apple<|im_end|>\n"]


@pytest.mark.parametrize("template", [MARKED, UNMARKED, trl_template("qwen2_5")])
def test_the_last_turn_alone(tmp_path: Path, template: str) -> None:
    """With `last` the last answer of the completion is learned; a `weight` of 0 masks a message as in `messages`."""
    weighed = {"prompt": [ASK], "completion": [MAT | {"weight": 0}, ASK, HAT]}
    examples, _ = load(lines(tmp_path / "x.jsonl", *ROWS), template, "last")
    assert [learned(one, template).rstrip("\n") for one in examples] == [
        "mat.<|im_end|>",
        "an apple<|im_end|>",
        "an apple<|im_end|>",
    ]
    for loss_on in ("all", "completion", "assistant"):
        (example,), _ = load(lines(tmp_path / "y.jsonl", weighed), template, loss_on)
        assert "mat." not in learned(example, template)
        assert "an apple<|im_end|>" in learned(example, template)


def test_other_names_and_a_named_schema(tmp_path: Path) -> None:
    """JOB_DATA__FIELDS names the lists, and JOB_DATA__FORMAT=prompt_completion or messages takes them."""
    plain, _ = load(lines(tmp_path / "x.jsonl", *ROWS), MARKED, "completion")
    other = lines(tmp_path / "y.jsonl", *({"q": row["prompt"], "a": row["completion"]} for row in ROWS))
    names = {"prompt": "q", "completion": "a"}
    assert load(other, MARKED, "completion", field_names=names)[0] == plain
    for schema in ("prompt_completion", "messages"):
        assert load(tmp_path / "x.jsonl", MARKED, "completion", schema=schema)[0] == plain


@pytest.mark.parametrize(
    ("row", "place", "what"),
    [
        ({"prompt": "cat?", "completion": [MAT]}, "prompt", "is text; it must be a list of messages, as completion is"),
        ({"prompt": [ASK], "completion": "mat."}, "completion", "is text; it must be a list of messages, as prompt is"),
        ({"prompt": None, "completion": [MAT]}, "prompt", "is null; it must be a list of messages"),
        ({"prompt": [], "completion": [MAT]}, "prompt", "has no message"),
        ({"prompt": [ASK], "completion": []}, "completion", "has no message"),
        *(
            ({"prompt": [ASK], "completion": [ASK | {"role": role}]}, "completion", "has no message of role assistant")
            for role in ("system", "developer", "user", "tool")
        ),
        ({"prompt": [ASK], "completion": [MAT | {"content": " "}]}, "completion[0] content", "is empty"),
        ({"prompt": [ASK], "completion": [MAT | {"weight": 0}]}, "completion", "whose weight is not 0"),
        ({"prompt": [{"content": "cat?"}], "completion": [MAT]}, "prompt[0] role", "is missing"),
        ({"prompt": [SYSTEM, "cat?"], "completion": [MAT]}, "prompt[1]", "must be an object, is text"),
        ({"prompt": [ASK], "completion": [{"content": "mat."}]}, "completion[0] role", "is missing"),
        ({"prompt": [ASK], "completion": [{"role": "gpt", "content": "m"}]}, "completion[0] role", "rename it to 'ass"),
        ({"prompt": [ASK], "completion": [MAT], "label": False}, "label", "JOB_TRAIN__METHOD=kto"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(tmp_path: Path, row: dict[str, Any], place: str, what: str) -> None:
    """A fault has its place in the row as given, and counts as a bad row that may be skipped."""
    path = lines(tmp_path / "x (1)+.jsonl", ROWS[0], row)  # a name that is another regular expression
    with pytest.raises(DataError) as error:
        load(path, CHATML, "completion")
    (problem,) = error.value.problems
    assert problem.where == f"{path}:2 {place}"
    assert what in problem.what
    _, record = load(path, CHATML, "completion", on_bad_row="skip")
    assert sum(record.skipped.values()) == 1


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "cat?", "completion": [MAT]}, "wrong_type"),
        ({"prompt": [ASK], "completion": None}, "missing_field"),
        ({"prompt": [], "completion": [MAT]}, "missing_field"),
        ({"prompt": [ASK], "completion": []}, "empty_target"),
        ({"prompt": [ASK], "completion": [ASK]}, "empty_target"),
    ],
)
def test_a_row_that_is_skipped_counts_under_its_kind(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    """By which log, report and manifest say why rows are left out."""
    _, record = load(lines(tmp_path / "x.jsonl", ROWS[0], row), CHATML, "completion", on_bad_row="skip")
    assert record.skipped == {kind: 1}


def test_messages_beside_prompt_and_completion_are_the_conversation(tmp_path: Path) -> None:
    """As in rows of former versions, whatever prompt and completion are; a run of such rows resumes."""
    plain, both, text = {"messages": [ASK, HAT]}, {"prompt": [ASK], "completion": [MAT]}, {"completion": "mat."}
    paths = [lines(tmp_path / f"{n}.jsonl", plain | more) for n, more in enumerate(({}, both, both | text))]
    first, *others = (load(path, MARKED, "completion", schema="messages")[0] for path in paths)
    assert others == [first, first]


def test_a_row_that_is_too_long_names_its_longer_list(tmp_path: Path) -> None:
    """The length in tokens is that of the row; the longer of the two lists is named."""
    path = lines(tmp_path / "x.jsonl", {"prompt": [ASK | {"content": "cat " * 300}], "completion": [MAT]})
    with pytest.raises(DataError, match=r"x\.jsonl:1 prompt: makes the row \d+ tokens long"):
        load(path, CHATML, "completion", max_length=100)


def test_a_template_that_changes_the_prompt_is_refused(tmp_path: Path) -> None:
    """Where the prompt alone is written otherwise, tokens of the prompt would be learned with `completion`."""
    counting = "{{ messages | length }}" + UNMARKED
    path = lines(tmp_path / "x.jsonl", ROWS[0])
    with pytest.raises(DataError, match=r"x\.jsonl:1 completion: cannot be split into turns"):
        load(path, counting, "completion")
    assert len(load(path, counting, "all")[0]) == 1


def test_other_methods_say_what_learns_from_them(tmp_path: Path) -> None:
    """Rows without a label are for sft; a model without a chat template cannot learn from them."""
    path = lines(tmp_path / "x.jsonl", ROWS[0])
    options: dict[str, Any] = READING | {"tokenizer": tokenizer_with(MARKED), "method": "dpo"}
    with pytest.raises(DataError, match=r"set JOB_TRAIN__METHOD=sft"):
        load_examples(str(path), **options)
    found: list[Example] = list(load(path, MARKED, "all")[0])
    assert found
    with pytest.raises(DataError, match="holds messages, and the model's tokenizer has no chat template"):
        load(path, "", "all")
