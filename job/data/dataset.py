"""The training data: read, checked, rendered, tokenised and fingerprinted, before any model is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from job.data.formats import UNREADABLE, RowError, Rows, find_file, has_known_suffix, read_rows
from job.data.hub_dataset import open_dataset
from job.data.schemas import REQUIRED, Rendered, Schema, check_row, detect_schema, render
from job.data.tokenization import Encoded, LossOn, encode
from job.errors import MAX_SHOWN, DataError, Problem, SettingsError
from job.records import DatasetRecord, Example

OnBadRow = Literal["error", "skip"]

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def load_examples(
    source: str,
    *,
    revision: str | None,
    split: str,
    limit: int | None,
    schema: Schema | None,
    on_bad_row: OnBadRow,
    loss_on: LossOn,
    max_length: int,
    tokenizer: Any,
    name: str | None = None,
) -> tuple[list[Example], DatasetRecord]:
    """Reads training examples, in the order of the source.

    The tokens are those of the rendered text tokenised as one string, with the special tokens that the tokenizer adds
    to it, and the end-of-sequence token behind; a chat template writes its own. With `limit`, reading stops at the
    row that completes the selection: rows after it are not checked.

    Args:
        source: A path that exists (a file, or a directory that holds one), or else a hub id, `[namespace/]name`.
        revision: The hub's revision; required for a hub id, not used for a path.
        split: The hub's split; not used for a path.
        limit: Select the first so many good rows; None for all.
        schema: The schema of the rows; None to detect it from the first row.
        on_bad_row: Whether a bad row is an error, or left out and counted.
        loss_on: Whether all tokens are learned, or only those of the completion and the end of the sequence.
        max_length: The most tokens an example may have, special tokens included. A longer row is a bad row.
        tokenizer: A `transformers.PreTrainedTokenizerFast`.
        name: What to call the source in messages and in the record, where it was fetched from elsewhere.

    Returns:
        The examples, at least one, and the record for the manifest.

    Raises:
        DataError: Bad rows, all of those read counted and the first 20 named; a source that is not there or not
            readable; no row left.
        SettingsError: A hub id without a revision.
        Unreachable: The hub did not answer.
        AccessDenied: The hub refused.
    """
    name = name or source
    commit, rows = _open(source, revision, split, name)
    findings = _Findings(on_bad_row)
    schema, rows = _settle_schema(rows, schema, findings, name)
    _check_tokenizer(tokenizer, schema, name)
    texts = _render_all(rows, schema, tokenizer, find_turns=loss_on == "completion")
    templated = schema == "messages"
    examples: list[Example] = []
    digest = sha256(b"examples 1\0")
    encoded = encode(texts, tokenizer, templated=templated, loss_on=loss_on, max_length=max_length, limit=limit)
    for item in encoded:
        if isinstance(item, Encoded):
            examples.append(item.example)
            digest.update(item.canonical())
        else:
            findings.add(item)
    findings.raise_problems()
    if not examples:
        raise findings.nothing_left(name)
    lengths = [len(example.input_ids) for example in examples]
    return examples, DatasetRecord(
        source=name,
        revision=commit,
        split=split if commit else None,
        format=schema,
        rows=len(examples),
        skipped=dict(sorted(findings.skipped.items())),
        sha256=digest.hexdigest(),
        tokens=sum(lengths),
        target_tokens=sum(sum(example.targets) for example in examples),
        longest=max(lengths),
    )


def is_hub_id(source: str) -> bool:
    """Whether a source that is no URI means a data set of the hub: it looks like an id, and is no file here."""
    return bool(_HUB_ID.fullmatch(source)) and not has_known_suffix(source) and not Path(source).exists()


def require_revision(revision: str | None) -> str:
    """The revision of a hub data set, which has to be given."""
    if revision is None:
        what = "a data set of the hub needs a revision, best a commit, so that the run can be repeated"
        raise SettingsError([Problem("JOB_DATA__REVISION", what)])
    return revision


class _Findings:
    """What was found wrong: either problems to report all at once, or bad rows to count by kind."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        self.skipped: Counter[str] = Counter()
        self._skip = on_bad_row == "skip"
        self._problems: list[Problem] = []
        self._total = 0

    def add(self, faults: list[RowError]) -> None:
        """Adds the faults of one row, at least one."""
        if self._skip and faults[0].kind != UNREADABLE:
            self.skipped[faults[0].kind] += 1
            return
        self._total += len(faults)
        room = MAX_SHOWN - len(self._problems)
        self._problems += [Problem(fault.where, fault.what) for fault in faults[:room]]

    def raise_problems(self) -> None:
        """Raises the problems, if there are any, all in one error."""
        if self._problems:
            raise DataError(self._problems, self._total)

    def nothing_left(self, name: str) -> DataError:
        """The error that no row was selected, and why."""
        skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items()))
        return DataError([Problem(name, f"has no good row (skipped: {skipped})" if skipped else "has no rows")])


def _open(source: str, revision: str | None, split: str, name: str) -> tuple[str | None, Rows]:
    """The commit (None for a file) and the rows of a source."""
    if not is_hub_id(source):
        file = find_file(source)
        # A file found in a directory is named by its place in it.
        return None, read_rows(file, name if file == Path(source) else f"{name.rstrip('/')}/{file.name}")
    return open_dataset(source, require_revision(revision), split, name)


def _settle_schema(rows: Rows, schema: Schema | None, findings: _Findings, name: str) -> tuple[Schema, Rows]:
    """The schema, by name or by the first row that is an object; and the rows, that one included."""
    if schema is not None:
        return schema, rows
    for row in rows:
        if isinstance(row, RowError):
            findings.add([row])
        elif found := detect_schema(row.fields):
            return found, chain([row], rows)
        else:
            known = "; ".join(f"{schema}: {', '.join(fields)}" for schema, fields in REQUIRED.items())
            fields = ", ".join(map(ascii, row.fields)) or "none"
            raise DataError([Problem(row.where, f"fits no schema. It has the fields {fields}; known are {known}")])
    findings.raise_problems()
    raise findings.nothing_left(name)


def _check_tokenizer(tokenizer: Any, schema: Schema, name: str) -> None:
    if schema == "messages":
        if not tokenizer.chat_template:
            what = "holds messages, and the model's tokenizer has no chat template to render them; use another schema"
            raise DataError([Problem(name, what)])
    elif tokenizer.eos_token_id is None:
        raise DataError([Problem(name, "cannot be ended: the model's tokenizer has no end-of-sequence token")])


def _render_all(rows: Rows, schema: Schema, tokenizer: Any, *, find_turns: bool) -> Iterator[Rendered | list[RowError]]:
    for row in rows:
        if isinstance(row, RowError):
            yield [row]
            continue
        if faults := check_row(row, schema):
            yield faults
            continue
        text = render(row, schema, tokenizer, find_turns=find_turns)
        yield [text] if isinstance(text, RowError) else text
