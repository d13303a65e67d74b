"""Turns of conversations: tokens and targets of TRL's `assistant_only_loss`, or an error that names the row."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from job.data.conversations import odd_order
from job.data.dataset import load_examples
from job.errors import DataError, SettingsError
from job.records import DatasetRecord, Example
from tests.helpers import READING
from tests.toy_tokenizer import CHATML, toy_tokenizer
from tests.unit.data.loaded_rows import lines

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "the cat"}}}
ASK = {"role": "user", "content": "cat?"}
MAT = {"role": "assistant", "content": "mat."}
HAT = {"role": "assistant", "content": "an apple"}
SYSTEM = {"role": "system", "content": "be a cat"}
PLAIN = [
    {"messages": [ASK, MAT]},
    {"messages": [SYSTEM, ASK, MAT, {"role": "user", "content": "and the other one?"}, HAT]},
    {"messages": [ASK, MAT, ASK]},
]
WITH_TOOLS = [
    {
        "tools": [TOOL],
        "messages": [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "look", "content": "it sat"},
            MAT,
            ASK,
            HAT,
        ],
    }
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def trl_template(name: str) -> str:
    """A template that TRL ships."""
    (folder,) = find_spec("trl").submodule_search_locations or ()  # type: ignore[union-attr]
    return Path(folder, "chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer_with(template: str) -> Any:
    """A toy tokenizer that knows the special tokens of the usual templates."""
    tokenizer = toy_tokenizer.__wrapped__(template)  # not the one that other tests share
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"]}
    )
    return tokenizer


def load(path: Path, template: str, loss_on: str, **changes: Any) -> tuple[list[Example], DatasetRecord]:
    """The examples of a file of conversations."""
    options = READING | {"max_length": 4000, "loss_on": loss_on, "tokenizer": tokenizer_with(template)}
    return load_examples(str(path), **options | changes)


def as_trl_has_it(rows: list[dict[str, Any]], template: str) -> list[Example]:
    """Tokens and mask as TRL's SFTTrainer makes them, the template swapped for the training one where it does so."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    tokenizer = tokenizer_with(template)
    used = None if has_generation_markers(template) else get_training_chat_template(tokenizer)
    found = []
    for row in rows:
        made = tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=True,
            chat_template=used,
        )
        found.append(Example(tuple(made["input_ids"]), tuple(map(bool, made["assistant_masks"]))))
    return found


@pytest.mark.parametrize(
    ("template", "rows"),
    [
        (MARKED, PLAIN),
        (trl_template("qwen3_training"), PLAIN + WITH_TOOLS),
        (trl_template("qwen3"), PLAIN + WITH_TOOLS),
        (trl_template("qwen2_5"), PLAIN + WITH_TOOLS),
        (trl_template("llama3"), PLAIN),
    ],
    ids=["own marks", "own marks and tools", "qwen3", "qwen2.5", "llama3"],
)
def test_the_assistants_tokens_are_those_of_trl(tmp_path: Path, template: str, rows: list[dict[str, Any]]) -> None:
    """Row by row, tokens and targets are those of TRL's `assistant_only_loss`."""
    examples, _ = load(lines(tmp_path / "x.jsonl", *rows), template, "assistant")
    expected = as_trl_has_it(rows, template)
    assert examples == expected
    assert all(any(example.targets) for example in examples)


def test_a_template_that_trl_does_not_know_is_compared(tmp_path: Path) -> None:
    """Without marks the turns are found by comparison: those that TRL finds once the same template has marks.

    The line break that this template writes behind a turn belongs to the turn then, as nothing says that it does not.
    """
    path = lines(tmp_path / "x.jsonl", *PLAIN)
    examples, _ = load(path, UNMARKED, "assistant")
    expected = as_trl_has_it(PLAIN, MARKED)
    line_break = tokenizer_with(UNMARKED)("\n", add_special_tokens=False)["input_ids"]
    end = tokenizer_with(UNMARKED).convert_tokens_to_ids("<|im_end|>")
    for example, other in zip(examples, expected, strict=True):
        assert example.input_ids == other.input_ids
        wider = list(other.targets)
        for index in range(len(wider) - 1):
            ended = wider[index] and example.input_ids[index] == end
            wider[index + 1] |= ended and list(example.input_ids[index + 1 : index + 2]) == line_break
        assert example.targets == tuple(wider)
    assert load(path, UNMARKED, "completion")[0] == examples


def learned(example: Example, template: str) -> str:
    """The text of the tokens that are learned."""
    tokens = [token for token, target in zip(example.input_ids, example.targets, strict=True) if target]
    return str(tokenizer_with(template).decode(tokens))


@pytest.mark.parametrize("template", [MARKED, UNMARKED, trl_template("qwen2_5")])
def test_the_last_turn_alone(tmp_path: Path, template: str) -> None:
    """With `last` the end of the last answer is learned, and nothing of those before it."""
    examples, _ = load(lines(tmp_path / "x.jsonl", *PLAIN), template, "last")
    assert [learned(example, template).rstrip("\n") for example in examples] == [
        "mat.<|im_end|>",
        "an apple<|im_end|>",
        "mat.<|im_end|>",
    ]


def test_the_last_turn_is_learned_as_the_model_reads_it(tmp_path: Path) -> None:
    """A template that drops earlier thoughts is fine with `last`; it is an error that says so with `completion`."""
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nmat."}
    path = lines(tmp_path / "x.jsonl", {"messages": [ASK, thought, ASK, thought]})
    template = trl_template("qwen3")
    (example,), _ = load(path, template, "last")
    assert tokenizer_with(template).decode(example.input_ids).count("hm") == 1
    assert learned(example, template).startswith("<think>")
    with pytest.raises(DataError, match=r"x\.jsonl:1 messages.*JOB_TRAIN__LOSS_ON=all, or last"):
        load(path, template, "completion")


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
@pytest.mark.parametrize("loss_on", ["all", "completion", "assistant"])
def test_a_weight_of_zero_masks_its_message(tmp_path: Path, template: str, loss_on: str) -> None:
    """OpenAI's `weight` 0 takes an answer out of what is learned, however turns are found; 1 changes nothing."""
    rows = {"messages": [ASK, MAT | {"weight": 0}, ASK, HAT | {"weight": 1}]}
    (example,), _ = load(lines(tmp_path / "x.jsonl", rows), template, loss_on)
    assert "mat." not in learned(example, template)
    assert "an apple<|im_end|>" in learned(example, template)


def test_a_row_without_an_end_is_a_bad_row(tmp_path: Path) -> None:
    """A turn whose end is not learned, or a row of which nothing is, is refused with its file and line."""
    unended = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    path = lines(tmp_path / "x.jsonl", *PLAIN)
    with pytest.raises(DataError) as error:
        load(path, unended, "assistant")
    assert error.value.total == len(PLAIN)
    assert [problem.where for problem in error.value.problems] == [f"{path}:{line} messages" for line in (1, 2, 3)]
    assert "'mat.'" in error.value.problems[0].what
    nothing = lines(tmp_path / "y.jsonl", PLAIN[0], {"messages": [ASK, MAT, ASK, HAT | {"weight": 0}]})
    with pytest.raises(DataError, match=r"y\.jsonl:2 messages.*no token to learn"):
        load(nothing, MARKED, "last")
    _, record = load(nothing, MARKED, "last", on_bad_row="skip")
    assert record.skipped == {"empty_target": 1}


def test_turns_are_of_messages(tmp_path: Path) -> None:
    """Asking for the assistant's turns of rows that have none is an error of the setting."""
    path = lines(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(SettingsError, match=r"JOB_TRAIN__LOSS_ON.*prompt_completion"):
        load(path, MARKED, "assistant")
    with pytest.raises(SettingsError, match=r"JOB_DATA__CHAT_TEMPLATE_ARGUMENTS.*prompt_completion"):
        load(path, MARKED, "all", template_arguments={"thinking": True})


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    """An argument changes the text as in transformers; one that the template does not have is an error."""
    template = "{% if thinking %}hm{% endif %}" + MARKED
    path = lines(tmp_path / "x.jsonl", PLAIN[0])
    (with_it,), _ = load(path, template, "all", template_arguments={"thinking": True})
    (without,), _ = load(path, template, "all", template_arguments={"thinking": False})
    tokenizer = tokenizer_with(template)
    assert list(with_it.input_ids) == tokenizer.apply_chat_template(
        PLAIN[0]["messages"], return_dict=False, thinking=True
    )
    assert without == load(path, template, "all")[0][0] != with_it
    with pytest.raises(SettingsError, match=r"'thinkin' is not a variable(.|\n)*'messages' is set by the rows"):
        load(path, template, "all", template_arguments={"thinkin": True, "messages": []})


def test_a_call_of_a_tool_is_learned_with_its_end(tmp_path: Path) -> None:
    """The turn that calls a tool is learned whole, the tool's answer is not."""
    template = trl_template("qwen2_5")
    (example,), _ = load(lines(tmp_path / "x.jsonl", *WITH_TOOLS), template, "assistant")
    text = learned(example, template)
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "the cat"}}\n</tool_call><|im_end|>' in text
    assert "it sat" not in text


SHAREGPT = [
    (
        {"conversations": [{"from": "human", "value": "cat?"}, {"from": "gpt", "value": "mat."}]},
        {"messages": [ASK, MAT]},
    ),
    (
        {
            "system": "be a cat",
            "conversations": [
                {"from": "user", "value": "cat?"},
                {"from": "assistant", "value": "mat.", "weight": 0},
                {"role": "user", "content": "cat?"},
                {"from": "gpt", "value": "an apple"},
            ],
        },
        {"messages": [SYSTEM, ASK, MAT | {"weight": 0}, ASK, HAT]},
    ),
    (
        {
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": "cat?"},
                {"from": "function_call", "value": json.dumps({"name": "look", "arguments": {"at": "the cat"}})},
                {"from": "observation", "value": "it sat"},
                {"from": "gpt", "value": "mat."},
            ],
        },
        {
            "tools": [TOOL],
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "it sat"},
                MAT,
            ],
        },
    ),
    (
        {"messages": [ASK | {"content": [{"type": "text", "text": "ca"}, {"type": "text", "text": "t?"}]}, MAT]},
        {"messages": [ASK, MAT]},
    ),
]


@pytest.mark.parametrize(("given", "messages"), SHAREGPT, ids=["plain", "system", "tools", "parts"])
def test_other_forms_are_one_conversation(tmp_path: Path, given: dict[str, Any], messages: dict[str, Any]) -> None:
    """A row of ShareGPT's form, or with contents in parts, gives the bytes of the same conversation in messages."""
    template = trl_template("qwen2_5")
    found = load(lines(tmp_path / "x.jsonl", given), template, "assistant")
    expected = load(lines(tmp_path / "y.jsonl", messages), template, "assistant")
    assert found[0] == expected[0]
    assert (found[1].format, found[1].sha256) == ("messages", expected[1].sha256)


@pytest.mark.parametrize(
    ("fields", "places"),
    [
        ({"conversations": None}, ["conversations"]),
        ({"conversations": "x"}, ["conversations"]),
        (
            {"conversations": [{"from": "cat", "value": "x"}, 3, {"value": "x"}, {"from": "gpt"}]},
            ["conversations[0] from", "conversations[1]", "conversations[2] from", "conversations[3] value"],
        ),
        ({"conversations": [{"from": "function_call", "value": "look()"}]}, ["conversations[0] value"]),
        ({"conversations": [{"from": "human", "value": "x"}]}, ["conversations"]),
        ({"system": "s", "conversations": [{"from": "gpt", "value": " "}]}, ["conversations[0] content"]),
        ({"system": 3, "conversations": [{"from": "gpt", "value": "x"}]}, ["system"]),
        ({"system": "s", "conversations": [{"from": "system", "value": "x"}]}, ["system"]),
    ],
)
def test_faults_of_sharegpt_are_named_in_its_words(tmp_path: Path, fields: dict[str, Any], places: list[str]) -> None:
    """Whatever is wrong with a turn is named by its place in the row as it was given."""
    path = lines(tmp_path / "x.jsonl", fields)
    with pytest.raises(DataError) as error:
        load(path, CHATML, "all")
    assert [problem.where for problem in error.value.problems] == [f"{path}:1 {place}" for place in places]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_tables_add_no_arguments_to_calls(tmp_path: Path, suffix: str) -> None:
    """A table gives each tool and call the arguments of all others, as null; they are none of the conversation."""
    import pyarrow as pa
    from pyarrow import parquet

    def row(name: str, argument: str) -> dict[str, Any]:
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": {argument: {"type": "x"}}}}}
        call = {"type": "function", "function": {"name": name, "arguments": {argument: "y"}}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "Go."}, answer], "tools": [tool]}

    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    template += "<|im_end|>{% endfor %}"
    rows = [row("look", "place"), row("add", "number")]
    table = pa.Table.from_pylist(rows)
    given, changed = tmp_path / "given.jsonl", tmp_path / f"table{suffix}"
    given.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    parquet.write_table(table, tmp_path / "table.parquet")
    if suffix == ".jsonl":
        changed.write_text("".join(json.dumps(one) + "\n" for one in table.to_pylist()), encoding="utf-8")
        assert "null" in changed.read_text(encoding="utf-8")
    assert [e.input_ids for e in load(changed, template, "all")[0]] == [
        e.input_ids for e in load(given, template, "all")[0]
    ]


@pytest.mark.parametrize("role", ["system", "tool"])
@pytest.mark.parametrize("content", ["42", "Answer like a pirate, and never in prose."])
def test_a_message_that_the_template_ignores_is_refused(tmp_path: Path, role: str, content: str) -> None:
    """A template that writes only users and the assistant, leaves out no instruction in silence."""
    messages = [
        {"role": "user", "content": "42?"},
        {"role": role, "content": content},
        {"role": "assistant", "content": "Yes"},
    ]
    path = lines(tmp_path / "x.jsonl", {"messages": messages})
    template = "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match=rf"messages\[1\]: is not written .* ignores this '{role}'"):
        load(path, template, "all")
    assert len(load(path, UNMARKED, "all")[0]) == 1


STRICT = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in rest if m.role in ['user', 'assistant'] and not m.tool_calls %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% endfor %}"
) + UNMARKED
"""Refuses the orders that Mistral's and Gemma's templates refuse."""


@pytest.mark.parametrize(
    ("roles", "place", "words"),
    [
        ("assistant user assistant", "[0]", "'assistant' is the first"),
        ("system assistant", "[1]", "'assistant' follows 'system'"),
        ("system user user assistant", "[2]", "'user' follows 'user'"),
        ("user assistant assistant", "[2]", "'assistant' follows 'assistant'"),
        ("user system user assistant", "", None),  # refused for the second user, which follows no user
    ],
)
def test_an_order_of_roles_that_the_template_refuses_is_named(
    tmp_path: Path, roles: str, place: str, words: str | None
) -> None:
    """File, line and message, in the data check; a template that renders the order takes it."""
    messages = [{"role": role, "content": f"Words {index}."} for index, role in enumerate(roles.split())]
    path = lines(tmp_path / "x.jsonl", {"messages": messages})
    with pytest.raises(DataError) as refused:
        load(path, STRICT, "all")
    (problem,) = refused.value.problems
    order = f"; the order of the roles is unusual: {words}" if words else ""
    assert problem.where.endswith(f"x.jsonl:1 messages{place}")
    what = "is refused by the tokenizer's chat template: TemplateError: roles must alternate"
    assert problem.what == f"{what}{order}"
    assert len(load(path, UNMARKED, "all")[0]) == 1


def test_calls_of_tools_are_not_an_unusual_order(tmp_path: Path) -> None:
    """Several answers of tools, and several rounds of calls are valid where the template takes them."""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Where?"},
        *[
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "Here it is."},
            {"role": "tool", "content": "And there."},
        ]
        * 2,
        {"role": "assistant", "content": "Here."},
    ]
    assert odd_order(messages) is None
    tools = "{% for m in messages %}{{ m.tool_calls }}{% endfor %}"
    assert len(load(lines(tmp_path / "x.jsonl", {"messages": messages}), tools + STRICT, "all")[0]) == 1
