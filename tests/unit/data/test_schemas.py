"""Which rows are valid, and how they are rendered."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from job.data.chat_template import Template, TemplateRefusalError
from job.data.conversations import LEARNED, Turns
from job.data.fields import Rendered
from job.data.formats import Row, RowError
from job.data.schemas import Schema, check_row, detect_schema, render
from tests.toy_tokenizer import CHATML, toy_tokenizer

ALPACA = Path(__file__).parents[4] / "shared" / "data" / "alpaca.jsonl.gz"
ASK = {"role": "user", "content": "cat?"}
ANSWER = {"role": "assistant", "content": "mat."}


class InProcess:
    """The template as transformers renders it, in this process: what goes wrong in one is tested elsewhere."""

    marks = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, messages: Any, *, tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:
            raise TemplateRefusalError(str(error)) from error
        return str(text)

    def marked(self, messages: Any, *, tools: Any = None) -> Any:
        """Not asked for: it has no marks."""
        raise NotImplementedError


def in_process(chat_template: str | None) -> Template:
    """The template in this process."""
    return InProcess(toy_tokenizer(chat_template))


def learned(fields: dict[str, Any], schema: Schema, template: str | None = CHATML) -> tuple[str, list[str]]:
    """The text of a good row, and the parts of it that are completion."""
    row = Row("x:1", fields)
    assert check_row(row, schema) == []
    item = render(row, schema, in_process(template), turns="completion")
    assert isinstance(item, Rendered)
    return item.text, [item.text[start:stop] for start, stop in item.completions]


@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({"instruction": "", "input": "", "output": "", "text": ""}, "alpaca"),
        ({"instruction": "", "output": ""}, "alpaca"),
        ({"prompt": "", "completion": ""}, "prompt_completion"),
        ({"messages": [], "text": ""}, "messages"),
        ({"text": "", "meta": 1}, "text"),
        ({"instruction": ""}, "alpaca"),
        ({"text": "", "prompt": ""}, "text"),
        ({"question": ""}, None),
        ({}, None),
    ],
)
def test_a_row_shows_its_schema(fields: dict[str, Any], schema: Schema | None) -> None:
    """The schema is the first that a row fits whole, or else the first it has a field of."""
    assert detect_schema(fields) == schema


@pytest.mark.parametrize(
    ("schema", "fields", "found"),
    [
        ("alpaca", {"output": " \n"}, [("missing_field", "instruction"), ("empty_target", "output")]),
        ("alpaca", {"instruction": 3, "input": [], "output": None}, "wrong wrong missing"),
        ("alpaca", {"instruction": "a", "input": None, "output": "b"}, []),
        ("alpaca", {"instruction": "\udcff", "output": "b", "other": "\ud800"}, "broken broken"),
        ("prompt_completion", {"prompt": "", "completion": "b"}, []),
        ("prompt_completion", {"prompt": [ASK], "completion": [ANSWER]}, "wrong wrong"),
        ("text", {"text": ""}, [("empty_target", "text")]),
        ("text", {}, [("missing_field", "text")]),
        ("messages", {"messages": "hi"}, [("wrong_type", "messages")]),
        ("messages", {"messages": None}, [("missing_field", "messages")]),
        ("messages", {"messages": [ASK]}, [("empty_target", "messages")]),
        ("messages", {"messages": []}, [("empty_target", "messages")]),
        ("messages", {"messages": [ASK, ANSWER | {"content": " "}]}, [("empty_target", "messages[1] content")]),
        ("messages", {"messages": [3, {"role": "user"}]}, "wrong missing"),
        ("messages", {"messages": [ASK | {"content": "\udcff"}, ANSWER]}, [("broken_utf8", "messages[0] content")]),
        ("messages", {"messages": [ASK, ANSWER, ASK]}, []),
    ],
)
def test_all_faults_of_a_row_are_found(
    schema: Schema, fields: dict[str, Any], found: list[tuple[str, str]] | str
) -> None:
    """Every field that is missing, of a wrong type, empty or broken is a fault of its own, named by its place."""
    faults = check_row(Row("x:1", fields), schema)
    if isinstance(found, str):
        assert [fault.kind.split("_")[0] for fault in faults] == found.split()
    else:
        assert [(fault.kind, fault.where) for fault in faults] == [(kind, f"x:1 {place}") for kind, place in found]


@pytest.mark.skipif(not ALPACA.exists(), reason="needs the shared data")
@pytest.mark.parametrize(
    ("every", "expected"), [(10, (5201, 1)), pytest.param(1, (52_002, 28), marks=pytest.mark.long)]
)
def test_alpaca_is_rendered_as_its_authors_did(every: int, expected: tuple[int, int]) -> None:
    """Rows of Alpaca, 52,002 in all, render to their own `text`, but for the 28 that have no output."""
    count, empty = 0, 0
    with gzip.open(ALPACA) as lines:
        for line in islice(lines, 0, None, every):
            fields = json.loads(line)
            count += 1
            assert detect_schema(fields) == "alpaca"
            if faults := check_row(Row("x", fields), "alpaca"):
                assert [fault.kind for fault in faults] == ["empty_target"]
                empty += 1
                continue
            item = render(Row("x", fields), "alpaca", None, turns="completion")
            assert isinstance(item, Rendered)
            assert item.text == fields["text"]
            ((start, stop),) = item.completions
            assert item.text[:start].endswith("### Response:\n")
            assert item.text[start:stop] == fields["output"]
    assert (count, empty) == expected


def test_braces_in_a_row_are_text() -> None:
    """What looks like a placeholder in a row is kept as it is."""
    text, _ = learned({"instruction": "{input} {0}", "input": "{instruction}", "output": "{}"}, "alpaca")
    assert "\n{input} {0}\n" in text
    assert "\n{instruction}\n" in text
    assert text.endswith("\n{}")


def test_prompt_and_text_rows_are_taken_as_they_are() -> None:
    """A prompt and its completion are joined with nothing between; a text is all completion."""
    assert learned({"prompt": "a ", "completion": " b"}, "prompt_completion") == ("a  b", [" b"])
    assert learned({"text": " a "}, "text") == (" a ", [" a "])


def test_the_assistants_turns_are_the_completion() -> None:
    """Of a conversation, every turn of the assistant is completion, its end mark included and its header not."""
    text, turns = learned({"messages": [ASK, ANSWER, ASK, ANSWER, ASK]}, "messages")
    assert text == "<|user|>cat?</s><|assistant|>mat.</s>" * 2 + "<|user|>cat?</s>"
    assert turns == ["mat.</s>", "mat.</s>"]


def test_a_header_that_promises_more_than_the_turn_has_is_still_found() -> None:
    """Where the prompt for an answer opens a block of thoughts that the answer lacks, the turn begins before it."""
    thinking = CHATML.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    assert learned({"messages": [ASK, ANSWER]}, "messages", thinking)[1] == ["mat.</s>"]


def test_fields_that_are_null_in_a_message_do_not_count() -> None:
    """A message's null fields, which Parquet invents, do not reach the chat template."""
    template = "{% for m in messages %}{{ m['content'] }}{{ 'tool_calls' in m }}{% endfor %}"
    assert learned({"messages": [ANSWER | {"tool_calls": None}]}, "messages", template)[0] == "mat.False"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}", "changes earlier turns"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_a_fault(template: str, reason: str) -> None:
    """A chat template that refuses a conversation, or whose turns cannot be told apart, makes a fault that says why."""
    row = Row("x:1", {"messages": [ASK, ANSWER, ASK, ANSWER]})
    fault = render(row, "messages", in_process(template), turns="completion")
    assert isinstance(fault, RowError)
    assert (fault.kind, fault.where) == ("bad_conversation", "x:1 messages")
    assert reason in fault.what


def test_turns_are_not_asked_for_where_all_is_learned() -> None:
    """A template whose turns cannot be told apart still renders where the loss is on everything."""
    template = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    item = render(Row("x:1", {"messages": [ASK, ANSWER]}), "messages", in_process(template), turns=None)
    assert item == Rendered("x:1 messages", "2cat?1mat.", ((0, 10),))


def test_alpacas_system_and_history_are_part_of_the_prompt() -> None:
    """A system prompt takes the place of Alpaca's first sentence, and earlier turns stand before the instruction."""
    fields = {"instruction": "cat?", "input": "", "output": "mat", "system": "Be a cat.", "history": [["a?", "b"]]}
    text, turns = learned(fields, "alpaca")
    assert text == (
        "Be a cat.\n\n### Instruction:\na?\n\n### Response:\nb\n\n### Instruction:\ncat?\n\n### Response:\nmat"
    )
    assert turns == ["mat"]
    plain = {"instruction": "cat?", "output": "mat"}
    assert learned(plain | {"system": "", "history": []}, "alpaca") == learned(plain, "alpaca")
    with_input = learned(fields | {"input": "on it"}, "alpaca")[0]
    assert "\n\n### Input:\non it\n\n### Response:\nmat" in with_input
    assert "Below is" not in with_input


WRITES_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
)
WRITES_TEXT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '!' + call.function.arguments }}{% endfor %}</s>{% endfor %}"
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"q": "x"}'}}]}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_are_given_to_the_template(tools: Any) -> None:
    """The tools of a row are in its text, given as a list or as JSON; arguments of a call are objects."""
    text, _ = learned({"messages": [ASK, CALL, ANSWER], "tools": tools}, "messages", WRITES_TOOLS)
    assert text == f'{json.dumps([TOOL])}<|user|>cat?</s><|assistant|>{{"q": "x"}}</s><|assistant|>mat.</s>'


def test_a_template_that_takes_arguments_as_text_gets_text() -> None:
    """Where a template refuses arguments as an object, they are given as they stand in the row."""
    assert '<|assistant|>!{"q": "x"}</s>' in learned({"messages": [ASK, CALL]}, "messages", WRITES_TEXT)[0]


@pytest.mark.parametrize(
    ("schema", "fields", "field"),
    [
        ("messages", {"messages": [ASK, ANSWER], "tools": [TOOL]}, "tools"),
        ("messages", {"messages": [ASK, CALL, ANSWER]}, "messages"),
        ("messages", {"messages": [ASK, ANSWER | {"reasoning_content": "x"}]}, "messages"),
        ("messages", {"messages": [ASK, ANSWER, ASK, ANSWER | {"thinking": "x"}]}, "messages"),
        ("messages", {"messages": [ASK | {"images": ["a.png"]}, ANSWER]}, "messages"),
    ],
)
def test_what_the_template_does_not_write_is_refused(schema: Schema, fields: dict[str, Any], field: str) -> None:
    """Tools, their calls, images, and the last answer's reasoning are a fault where they leave no trace in the text."""
    row = Row("x:1", fields)
    assert check_row(row, schema) == []
    fault = render(row, schema, in_process(CHATML), turns=None)
    assert isinstance(fault, RowError)
    assert (fault.kind, fault.where) == ("field_without_use", f"x:1 {field}")
    assert "does not write" in fault.what or "not written" in fault.what


@pytest.mark.parametrize(
    ("schema", "fields", "found"),
    [
        ("messages", {"messages": [ASK, ANSWER], "system": "Be brief."}, ["system"]),
        ("messages", {"messages": [ASK, ANSWER], "functions": [TOOL], "images": ["a.png"]}, ["functions", "images"]),
        ("messages", {"messages": [ASK, ANSWER], "system": "", "tools": [], "images": None}, []),
        ("messages", {"messages": [ASK, ANSWER | {"weight": 0.5}]}, ["messages[1] weight"]),
        ("messages", {"messages": [ASK, ANSWER | {"weight": 0}]}, ["messages"]),
        ("messages", {"messages": [ASK, ANSWER | {"weight": "0"}]}, ["messages[1] weight"]),
        ("messages", {"messages": [ASK, ANSWER | {"loss_weight": 2}]}, ["messages[1] loss_weight"]),
        ("messages", {"messages": [ASK, ANSWER | {"mask": 1}]}, ["messages[1] mask"]),
        ("messages", {"messages": [ASK, ANSWER | {"mask": 0}]}, ["messages[1] mask"]),
        ("messages", {"messages": [ASK, ANSWER | {"ignore": True}]}, ["messages[1] ignore"]),
        ("messages", {"messages": [ASK, ANSWER | {"loss_mask": False}]}, ["messages[1] loss_mask"]),
        ("messages", {"messages": [ASK | {"role": "User"}, ANSWER]}, ["messages[0] role"]),
        (
            "messages",
            {"messages": [ASK | {"role": "human"}, ANSWER | {"role": "bot"}]},
            [f"messages[{i}] role" for i in (0, 1)],
        ),
        ("messages", {"messages": [ASK | {"role": "observation"}, ANSWER]}, []),
        ("messages", {"messages": [ASK, ANSWER], "label": False}, ["label"]),
        ("messages", {"messages": [ASK, ANSWER], "label": True, "kto_tag": True}, []),
        ("alpaca", {"instruction": "a", "output": "b", "kto_tag": False}, ["kto_tag"]),
        ("messages", {"messages": [ASK, ANSWER | {"ignore": False, "train_detail": None}]}, []),
        ("messages", {"messages": [ASK, ANSWER | {"train_detail": [{"train": False}]}]}, ["messages[1] train_detail"]),
        ("messages", {"messages": [ASK, ANSWER], "system_prompt": "Be brief."}, ["system_prompt"]),
        ("messages", {"messages": [ASK, ANSWER], "Tools": [TOOL]}, ["Tools"]),
        ("messages", {"messages": [ASK, ANSWER], "tools": "{"}, ["tools"]),
        ("messages", {"messages": [ASK, ANSWER], "tools": [3]}, ["tools"]),
        ("prompt_completion", {"prompt": "a", "completion": "b", "history": [["c", "d"]]}, ["history"]),
        ("prompt_completion", {"prompt": "a", "completion": "b", "label": False}, ["label"]),
        ("prompt_completion", {"prompt": "a", "completion": "b", "label": True, "weight": 1}, []),
        ("prompt_completion", {"prompt": "a", "completion": "b", "weight": 0}, ["weight"]),
        ("prompt_completion", {"prompt": "a", "completion": "b", "weight": "0"}, ["weight"]),
        ("prompt_completion", {"prompt": "a", "completion": "b", "label": "False"}, ["label"]),
        ("prompt_completion", {"prompt": "a", "completion": "b", "label": 0}, []),
        ("prompt_completion", {"prompt": "a", "chosen": "b", "rejected": "c"}, ["chosen"]),
        ("alpaca", {"instruction": "a", "output": "b", "tools": [TOOL]}, ["tools"]),
        ("alpaca", {"instruction": "a", "output": "b", "Input": "c"}, ["Input"]),
        ("alpaca", {"instruction": "a", "output": "b", "input": "c", "Input": "d", " History": []}, []),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]], "system": 3}, ["system", "history"]),
        ("text", {"text": "a", "system": "b"}, []),
        ("text", {"text": "x" * (4 << 20) + "x"}, ["text"]),
    ],
)
def test_fields_that_mean_something_are_used_or_refused(
    schema: Schema, fields: dict[str, Any], found: list[str]
) -> None:
    """A field that says what a row means, and that its schema cannot express, is a fault with its place."""
    assert [fault.where for fault in check_row(Row("x:1", fields), schema)] == [f"x:1 {place}" for place in found]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, *({name: False} for name in LEARNED)])
def test_a_message_of_weight_zero_is_never_learned(mark: dict[str, Any]) -> None:
    """Its span is ignored where the loss is on all, and is no completion where it is on completions.

    So it is under the names that other tools have for a weight.
    """
    bad = ANSWER | {"content": "bad"} | mark
    row = Row("x:1", {"messages": [ASK, bad, ASK, ANSWER | {"weight": 1}]})
    assert check_row(row, "messages") == []
    both: tuple[tuple[Turns | None, list[str]], ...] = (("completion", ["mat.</s>"]), (None, []))
    for turns, completions in both:
        item = render(row, "messages", in_process(CHATML), turns=turns)
        assert isinstance(item, Rendered)
        assert [item.text[start:stop] for start, stop in item.ignored] == ["bad</s>"]
        if turns:
            assert [item.text[start:stop] for start, stop in item.completions] == completions
        else:
            assert item.completions == ((0, len(item.text)),)


def test_the_reasoning_of_earlier_answers_may_be_left_out() -> None:
    """Templates of reasoning models write that of the last answer only: nothing is missing then."""
    row = Row("x:1", {"messages": [ASK, ANSWER | {"reasoning_content": "x"}, ASK, ANSWER]})
    item = render(row, "messages", in_process(CHATML), turns=None)
    assert isinstance(item, Rendered)
    assert item.unused == ("messages[].reasoning_content",)


def test_fields_that_are_left_out_are_named() -> None:
    """A rendered row says which of its fields did nothing, those of its messages too; empty ones do not count."""
    fields = {"messages": [ASK | {"id": 3}, ANSWER], "source": "web", "note": "", "score": 0}
    item = render(Row("x:1", fields), "messages", in_process(CHATML), turns=None)
    assert isinstance(item, Rendered)
    assert item.unused == ("source", "score", "messages[].id")
    alpaca = render(Row("x:1", {"instruction": "a", "output": "b", "text": "c"}), "alpaca", None, turns=None)
    assert isinstance(alpaca, Rendered)
    assert alpaca.unused == ("text",)
