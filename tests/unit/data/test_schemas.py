"""Which rows are good, and what they are rendered to."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from job.data.formats import Row, RowError
from job.data.schemas import Rendered, Schema, check_row, detect_schema, render
from tests.toy_tokenizer import CHATML, toy_tokenizer

ALPACA = Path(__file__).parents[4] / "shared" / "data" / "alpaca.jsonl.gz"
ASK = {"role": "user", "content": "cat?"}
ANSWER = {"role": "assistant", "content": "mat."}


def learned(fields: dict[str, Any], schema: Schema, template: str | None = CHATML) -> tuple[str, list[str]]:
    """The text of a good row, and the parts of it that are completion."""
    row = Row("x:1", fields)
    assert check_row(row, schema) == []
    item = render(row, schema, toy_tokenizer(template), find_turns=True)
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
def test_alpaca_is_rendered_as_its_authors_did() -> None:
    """Each of the 52,002 rows of Alpaca renders to its own `text`, but for the 28 that have no output."""
    count, empty = 0, 0
    with gzip.open(ALPACA) as lines:
        for line in lines:
            fields = json.loads(line)
            count += 1
            assert detect_schema(fields) == "alpaca"
            if faults := check_row(Row("x", fields), "alpaca"):
                assert [fault.kind for fault in faults] == ["empty_target"]
                empty += 1
                continue
            item = render(Row("x", fields), "alpaca", None, find_turns=True)
            assert isinstance(item, Rendered)
            assert item.text == fields["text"]
            ((start, stop),) = item.completions
            assert item.text[:start].endswith("### Response:\n")
            assert item.text[start:stop] == fields["output"]
    assert (count, empty) == (52_002, 28)


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
    fault = render(row, "messages", toy_tokenizer(template), find_turns=True)
    assert isinstance(fault, RowError)
    assert (fault.kind, fault.where) == ("bad_conversation", "x:1 messages")
    assert reason in fault.what


def test_turns_are_not_asked_for_where_all_is_learned() -> None:
    """A template whose turns cannot be told apart still renders where the loss is on everything."""
    template = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    item = render(Row("x:1", {"messages": [ASK, ANSWER]}), "messages", toy_tokenizer(template), find_turns=False)
    assert item == Rendered("x:1 messages", "2cat?1mat.", ((0, 10),))
