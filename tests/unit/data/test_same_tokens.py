"""Every token and target equals that of the simplest implementation, row by row."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from job.data.batch_plan import targets_of
from job.data.schemas import Schema
from job.model.tokenizer import load_tokenizer
from tests.helpers import tokens_of
from tests.reading_reference import read_plainly
from tests.toy_tokenizer import CHATML, toy_tokenizer
from tests.unit.data.loaded_rows import ALPACA, lines, load

DEMO = Path(__file__).parents[3] / "job" / "demo" / "base"
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def rows_of_alpaca(count: int) -> list[dict[str, Any]]:
    """Real rows where there are any, and made-up ones."""
    made = [
        {"instruction": "Name it: e\u0301 \N{GRINNING FACE}", "input": "", "output": "</s>"},
        {"instruction": "<s>Name it", "input": "a\r\nb\u00a0c", "output": "tab\t<s> and \u4e2d\u6587 </s> end</s>"},
        {"instruction": "x", "input": " ", "output": "the cat " * 200, "system": "Be brief.", "history": [["a", "b"]]},
    ]
    if not ALPACA.exists():
        return made
    with gzip.open(ALPACA, "rt", encoding="utf-8") as file:
        return [*made, *(row for line in islice(file, count) if (row := json.loads(line))["output"].strip())]


def same(path: Path, tokenizer: Any, schema: Schema, loss_on: str) -> None:
    """Both ways give the same, which is not nothing."""
    examples, sha256 = read_plainly(path, tokenizer, schema, loss_on=loss_on)
    found, record = load(path, tokenizer, schema=schema, loss_on=loss_on, max_length=1 << 20)
    assert found == examples
    assert record.sha256 == sha256
    assert (record.tokens, record.target_tokens) == (tokens_of(examples), targets_of(examples))
    assert 0 < record.target_tokens < record.tokens


@pytest.mark.parametrize("loss_on", ["all", "completion"])
@pytest.mark.parametrize("schema", ["alpaca", "prompt_completion", "text"])
def test_rows_of_texts(tmp_path: Path, schema: Schema, loss_on: str) -> None:
    """Rows of texts of each schema, by tokenizers that put a token in front and that put none."""
    rows = rows_of_alpaca(150)
    if schema == "prompt_completion":
        rows = [{"prompt": row["instruction"], "completion": row["output"]} for row in rows]
    elif schema == "text":
        rows = [{"text": row["instruction"] + row["output"]} for row in rows]
    path = lines(tmp_path / "x.jsonl", *rows)
    for tokenizer in (toy_tokenizer(), load_tokenizer(DEMO)):
        same(path, tokenizer, schema, loss_on)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_conversations(tmp_path: Path, template: str) -> None:
    """Turns of several conversations, found by comparison and by marks, with messages that are context only."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"], "weight": index % 3 and 1},
                {"role": "user", "content": row.get("input") or "And?"},
                {"role": "assistant", "content": row["output"][::-1]},
            ]
        }
        for index, row in enumerate(rows_of_alpaca(25))
    ]
    path = lines(tmp_path / "x.jsonl", *rows)
    for loss_on in ("all", "completion", "assistant", "last"):
        same(path, toy_tokenizer(template), "messages", loss_on)
