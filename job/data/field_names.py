"""Renames the fields of rows (JOB_DATA__FIELDS) to the names that the schemas have.

`prompt=question,completion=answers.0.text`: what the row has under `question` is its `prompt`. Dots separate the
keys of nested objects and the indices of lists, from 0; a field whose own name contains the dots takes precedence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from job.data.formats import Row, RowError

_MISSING = object()


def rename_fields(row: Row | RowError, names: Mapping[str, str]) -> Row | RowError:
    """The row with the fields under the schemas' names; what it lacks is missing under either name."""
    if not names or isinstance(row, RowError):
        return row
    renamed = {field: _look_up(row.fields, path) for field, path in names.items()}
    others = {field: value for field, value in row.fields.items() if field not in {*names, *names.values()}}
    return Row(row.where, {**others, **{field: value for field, value in renamed.items() if value is not _MISSING}})


def _look_up(value: Any, path: str) -> Any:
    if isinstance(value, dict) and path in value:
        return value[path]
    key, dot, rest = path.partition(".")
    if isinstance(value, dict) and key in value:
        inner = value[key]
    elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
        inner = value[int(key)]
    else:
        return _MISSING
    return _look_up(inner, rest) if dot else inner


def schemas_with(
    names: Mapping[str, str], schemas: Collection[str], fields: Mapping[str, Collection[str]]
) -> list[str]:
    """The schemas that have one of the named fields, which are meant then; all of them if no field is named."""
    return [schema for schema in schemas if not names or any(name in fields[schema] for name in names)]


def in_own_names(faults: list[RowError], row: Row, names: Mapping[str, str]) -> Iterator[RowError]:
    """The faults, with the rows' name of a field next to the schema's where they differ."""
    for fault in faults:
        field = fault.where.removeprefix(f"{row.where} ")
        name = names.get(field)
        yield fault if name is None else replace(fault, where=f"{fault.where} ({name}, by JOB_DATA__FIELDS)")
