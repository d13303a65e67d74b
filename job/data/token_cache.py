"""Tokens of a data set, kept by content hash next to the quantized base: a restart reads them instead of the rows.

The key is a SHA-256 of everything that decides the tokens: the bytes of the data files (or the hub's commit), the
tokenizer and its chat template, the settings, the versions of the libraries, and the source code of `job.data`. Equal
keys give equal tokens, so any run may use them.

A folder `tokens/<key>` holds Arrow files (`job.data.examples`) and `tokens.json`, sealed, which has their SHA-256,
the record of the rows, and what is to be logged about them. It appears complete or not at all. Its files are hashed
before they are used; a damaged folder is removed and made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

import job.audit
import job.data
from job import log
from job.audit.rows import AuditSetup
from job.common import host
from job.common.disk import disk_errors
from job.common.formatting import first_line
from job.common.hashing import code_hashes, hash_file, hash_files, sealed, unsealed
from job.common.new_folder import new_folder
from job.common.source_list import Source
from job.data.chat_template import uses_date
from job.data.examples import Examples
from job.data.files import find_files
from job.data.hub_dataset import is_hub_id, resolve_dataset
from job.data.notes import Level, Notes
from job.data.sources import named_as_given
from job.data.text_tokenizer import sha256_of, text_tokenizer
from job.data.training_and_validation import EXAMPLES, FINDINGS, VALIDATION, ValidationSource, load_rows
from job.errors import DataError, Problem
from job.records import DatasetRecord

INDEX = "tokens.json"
_NOT_DECIDING = ("check_stop", "processes", "tokenizer", "audited", "screen")
"""Arguments of `load_rows` that decide no token, or are in the key in another form."""

_OTHER_CODE = ("job.common.findings", "job.common.near_duplicates", "job.model.text_classifier")


@dataclass(frozen=True)
class Tokens:
    """The training examples, the validation examples (None without validation), their record, and their folder.

    `findings` is the file of the audit's findings; None without an audit.
    """

    examples: Examples
    validation: Examples | None
    record: DatasetRecord
    folder: Path
    findings: Path | None = None


class _Index(BaseModel):
    """What `tokens.json` says. `held_out` are the rows of EXAMPLES that are validated on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, str]
    record: DatasetRecord
    held_out: list[int] | None
    notes: list[tuple[Level, str, dict[str, Any]]]


def load_tokens(
    source: str | Sequence[Source],
    validation: float | ValidationSource | None,
    *,
    root: Path,
    keep: bool,
    revision: str | None,
    split: str,
    **reading: Any,
) -> Tokens:
    """The tokens of a data set: those that are kept, or of rows that are read now.

    Args:
        source: As for `load_rows`.
        validation: As for `load_rows`.
        root: Where they are written.
        keep: Whether they are looked for and kept there for later starts.
        revision: As for `load_rows`.
        split: As for `load_rows`.
        reading: Further arguments of `load_rows`.

    Raises:
        DataError, SettingsError, Unreachable, AccessDenied: As `load_rows`.
    """
    found_by = partial(_key, source, validation, revision=revision, split=split, **reading)
    key = found_by() if keep else None
    folder = root / "tokens" / (key or f"{uuid4()}")
    if key is not None and (cached := _find(folder)) is not None:
        log.get_logger().info("cached tokens of an earlier start are used", folder=str(folder), rows=cached.record.rows)
        return cached
    if not keep:
        change = "set JOB_STORAGE__CACHE to a folder that outlives the attempt: a later start uses the tokens again"
        log.get_logger().info("rows are tokenized at every start", change=change)
    elif key is None:
        log.get_logger().info("rows are tokenized at every start: no hash of their tokenizer can be computed")
    else:
        what = "no cached tokens for exactly these rows, settings and versions: rows are tokenized"
        log.get_logger().info(what, folder=str(folder.parent))
    notes = Notes()
    with disk_errors(f"cannot write {folder}"), new_folder(folder) as new_entry:
        _, held_rows, record = load_rows(
            source, validation, revision=revision, split=split, folder=new_entry, notes=notes, **reading
        )
        if key is not None and found_by() != key:
            raise DataError([Problem(record.source, "changed while it was read; start again when it is complete")])
        held_out = held_rows.rows if held_rows is not None and not isinstance(validation, ValidationSource) else None
        names = sorted(path.name for path in new_entry.iterdir())
        files = dict(zip(names, hash_files([new_entry / name for name in names]), strict=True))
        index = _Index(files=files, record=record, held_out=held_out, notes=notes.kept)
        (new_entry / INDEX).write_bytes(data := sealed(index.model_dump(mode="json")))
    if (folder / INDEX).read_bytes() == data:
        return open_tokens(folder)
    if (cached := _find(folder, replay=False)) is None:  # another process was first
        raise RuntimeError(f"{folder} was removed while it was written")
    return cached


def open_tokens(folder: Path) -> Tokens:
    """The tokens in a folder that is known to be whole.

    Raises:
        OSError, ValueError: It is not.
    """
    return _open(folder, _read_index(folder))


def _read_index(folder: Path) -> _Index:
    try:
        return _Index.model_validate(unsealed((folder / INDEX).read_bytes()))
    except ValidationError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _open(folder: Path, index: _Index) -> Tokens:
    examples = Examples(folder / EXAMPLES)
    findings = None if index.record.audit is None else folder / FINDINGS
    if index.held_out is not None:
        held = frozenset(index.held_out)
        kept = [row for row in range(len(examples)) if row not in held]
        return Tokens(examples.take(kept), examples.take(index.held_out), index.record, folder, findings)
    own = Examples(folder / VALIDATION) if index.record.validation is not None else None
    return Tokens(examples, own, index.record, folder, findings)


def _find(folder: Path, *, replay: bool = True) -> Tokens | None:
    """The tokens in a folder, if they are there and undamaged; what was logged about the rows is logged again."""
    if not folder.is_dir():
        return None
    try:
        index = _read_index(folder)
        _verify(folder, index)
        cached = _open(folder, index)
    except (OSError, ValueError) as error:
        why = first_line(error, 300)
        log.get_logger().warning("cached tokens are damaged: rows are tokenized again", folder=str(folder), why=why)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if replay:
        Notes(index.notes)
    return cached


def _verify(folder: Path, index: _Index) -> None:
    """Raises ValueError unless exactly the files of the index are there, undamaged; OSError if one cannot be read."""
    names = {path.name for path in folder.iterdir()} - {INDEX}
    if names != index.files.keys():
        raise ValueError(f"missing or unexpected files: {', '.join(sorted(names ^ index.files.keys()))}")
    for name, sha256 in index.files.items():
        if hash_file(folder / name) != sha256:
            raise ValueError(f"the SHA-256 of {name} differs")


def _key(
    source: str | Sequence[Source],
    validation: float | ValidationSource | None,
    *,
    tokenizer: Any,
    revision: str | None,
    split: str,
    date: str | None = None,
    **reading: Any,
) -> str | None:
    """SHA-256 of everything that decides the tokens, hexadecimal; None if it is not known."""
    tokens = sha256_of(text_tokenizer(tokenizer))
    if tokens is None:
        return None
    parts = [Source(source, source)] if isinstance(source, str) else source
    given = reading.get("name") if isinstance(source, str) else None
    facts: dict[str, Any] = {
        "sources": [
            [
                part.name,
                _content(part.location, given or part.name, part.revision or revision, split),
                part.rows,
                str(part.times),
            ]
            for part in parts
        ],
        "several": not isinstance(source, str),
        "revision": revision,
        "split": split,
        "reading": {name: value for name, value in reading.items() if name not in _NOT_DECIDING},
        "tokenizer": tokens,
        "template": [getattr(tokenizer, "chat_template", None), getattr(tokenizer, "special_tokens_map", None)],
        "date": date if uses_date(tokenizer) else None,
        "software": host.software(),
        # Which rows the classifier leaves out: other GPUs may score one on the other side of the threshold.
        "gpus": host.hardware()["gpus"] if _screens(reading.get("audit")) else None,
        "code": code_hashes("job.records", *_OTHER_CODE, *_modules(job.data), *_modules(job.audit)),
    }
    if isinstance(validation, ValidationSource):
        own = _content(validation.location, validation.name, validation.revision, validation.split)
        facts["validation"] = [validation.name, own, validation.revision, validation.split]
    else:
        facts["validation"] = validation
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_as_json).encode()).hexdigest()


def _screens(audit: Any) -> bool:
    return isinstance(audit, AuditSetup) and audit.safety is not None


def _modules(package: ModuleType) -> list[str]:
    return [f"{package.__name__}.{module.name}" for module in iter_modules(package.__path__)]


def _as_json(value: Any) -> Any:
    if isinstance(value, AuditSetup):
        return value.as_json()
    return dict(value) if isinstance(value, Mapping) else repr(value)


def _content(location: str, name: str, revision: str | None, split: str) -> list[str]:
    """What identifies the content of a source: the SHA-256 of its files in order, or the hub's commit."""
    if is_hub_id(location):
        return [resolve_dataset(location, revision)]
    with named_as_given(location, name):
        files, _ = find_files(location, split)
    with disk_errors(f"cannot read {location}"):
        return [part for path, sha256 in zip(files, hash_files(files), strict=True) for part in (path.name, sha256)]
