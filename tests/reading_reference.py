"""A simple implementation that reads rows one at a time, with which tests compare tokens, and the benchmark speed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

from job.data.chat_template import open_template
from job.data.fields import Rendered
from job.data.formats import Row, read_rows
from job.data.schemas import Schema, check_row, render
from job.data.sharegpt import as_messages, is_sharegpt
from job.records import Example


def read_plainly(path: Path, tokenizer: Any, schema: Schema, *, loss_on: str = "all") -> tuple[list[Example], str]:
    """The examples of a file of valid rows, and the SHA-256 in its record."""
    examples, digest = [], sha256(b"examples 1\0")
    templated = schema == "messages"
    with open_template(tokenizer) if templated else nullcontext() as template:
        for row in _rows(path):
            assert not check_row(row, schema)
            turns: Any = None if loss_on == "all" else loss_on
            text = render(row, schema, template, turns=turns)
            assert isinstance(text, Rendered)
            example = _example(text, tokenizer, templated=templated, everything=loss_on == "all")
            examples.append(example)
            encoded = text.text.encode()
            digest.update(struct.pack("<2Q", len(encoded), len(example.input_ids)) + encoded)
            digest.update(struct.pack(f"<{len(example.input_ids)}i", *example.input_ids) + bytes(example.targets))
    return examples, digest.hexdigest()


def _rows(path: Path) -> Iterator[Row]:
    for row in read_rows(path, str(path)):
        assert isinstance(row, Row)
        found = as_messages(row) if is_sharegpt(row.fields) else row
        assert isinstance(found, Row)
        yield found


def _example(row: Rendered, tokenizer: Any, *, templated: bool, everything: bool) -> Example:
    made = tokenizer(row.text, add_special_tokens=not templated, return_offsets_mapping=True, verbose=False)
    ids, targets = list(made["input_ids"]), []
    for _, end in made["offset_mapping"]:
        target = everything or any(start < end <= stop for start, stop in row.completions)
        targets.append(target and not any(start < end <= stop for start, stop in row.ignored))
    if not templated:
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            ids, targets = ids[1:], targets[1:]
        if ids[-1] != tokenizer.eos_token_id:
            ids, targets = [*ids, tokenizer.eos_token_id], [*targets, True]
        targets[-1] = True
    return Example(tuple(ids), (False, *targets[1:]))
