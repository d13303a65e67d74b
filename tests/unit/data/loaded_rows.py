"""Training data for tests: rows written to a file and loaded as the job loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from job.common.source_list import Source
from job.data.dataset import load_examples
from job.records import DatasetRecord, Example
from tests.helpers import READING
from tests.toy_tokenizer import toy_tokenizer

ALPACA = Path(__file__).parents[4] / "shared" / "data" / "alpaca.jsonl.gz"


def load(
    source: Path | str | tuple[Source, ...], tokenizer: Any = None, **changes: Any
) -> tuple[list[Example], DatasetRecord]:
    """`load_examples` with the arguments that a test leaves alone."""
    options = READING | {"max_length": 2000, "tokenizer": tokenizer or toy_tokenizer()}
    return load_examples(source if isinstance(source, tuple) else str(source), **options | changes)


def lines(path: Path, *rows: Any) -> Path:
    """A JSONL file; a row that is bytes is written as it is."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def text_of(example: Example) -> str:
    """The text an example was made from, without the special tokens around it."""
    return str(toy_tokenizer().decode(example.input_ids[1:-1]))
