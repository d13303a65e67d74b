"""Which schema rows have: by name or by the first row, with what a row that fits none may be meant for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import chain

from job.common.methods import METHODS, MethodName, methods_for
from job.data.bad_rows import FIELDS_SETTING, BadRows
from job.data.formats import Line, Lines, Row, RowError
from job.data.prompt_messages import has_prompt_messages
from job.data.schemas import REQUIRED, Schema, detect_schema, has_required, nearest_field, usual_name
from job.errors import DataError, Problem


def other_schema(row: Row | None, schema: Schema, among: Collection[str]) -> Schema | None:
    """The schema that the first row of a further source has where it is not that of the first source."""
    if row is None or has_required(row.fields, schema):
        return None
    detected = detect_schema(row.fields, among)
    if detected is None or detected == schema or not has_required(row.fields, detected):
        return None
    return detected


def settle_schema(
    rows: Lines,
    decode: Callable[[Row | RowError | Line], Row | RowError],
    schema: Schema | None,
    findings: BadRows,
    name: str,
    *,
    method: MethodName,
    among: Collection[str],
) -> tuple[Schema, Lines]:
    """The schema, by name or by the first row that is an object; and the rows, that one included.

    Rows of prompts and completions that are lists of messages are of the schema `messages`, by either name.
    `decode` returns the row of a line, with the schemas' names of fields.
    """
    if schema is not None:
        first, rows = peek(rows, decode)
        conversation = schema == "prompt_completion" and first is not None and has_prompt_messages(first.fields)
        return "messages" if conversation else schema, rows
    for line in rows:
        row = decode(line)
        if isinstance(row, RowError):
            findings.add([row])
        elif (detected := detect_schema(row.fields, among)) and (
            has_required(row.fields, detected) or not _others(row, method)
        ):
            return detected, chain([line], rows)
        else:
            raise DataError([Problem(row.where, _why_no_schema(row, among, method))])
    findings.raise_problems(name)
    raise findings.nothing_left(name)


def _others(row: Row, method: MethodName) -> str | None:
    """The methods that this row is complete for, in words; None if there are none."""
    other = detect_schema(row.fields, REQUIRED.keys() - set(METHODS[method].schemas))
    return " or ".join(methods_for(other)) if other and has_required(row.fields, other) else None


def _why_no_schema(row: Row, among: Collection[str], method: MethodName) -> str:
    """What a row has that fits no schema of the method, and what it may be meant for."""
    fields = ", ".join(map(ascii, row.fields)) or "none"
    if others := _others(row, method):
        own = [schema for schema in REQUIRED if schema in METHODS[method].schemas]
        rows = f", or give rows with the fields {', '.join(REQUIRED[own[0]])}" if len(own) == 1 else ""
        return (
            f"has the fields {fields}, from which JOB_TRAIN__METHOD={method} does not learn; "
            f"set JOB_TRAIN__METHOD={others}{rows}"
        )
    schemas = "; ".join(f"{schema}: {', '.join(REQUIRED[schema])}" for schema in REQUIRED if schema in among)
    wanted = dict.fromkeys(field for schema in REQUIRED if schema in among for field in REQUIRED[schema])
    near = [(field, found) for field in wanted if (found := nearest_field(field, row.fields)) is not None]
    meant = "".join(f"; {found!a} may be a misspelt {field}" for field, found in near)
    schema = next(schema for schema in ("prompt_completion", *REQUIRED) if schema in among)
    names = ",".join(f"{field}={usual_name(field, row.fields) or 'NAME'}" for field in REQUIRED[schema])
    return (
        f"fits no schema. It has the fields {fields}; known are {schemas}{meant}; "
        f"{FIELDS_SETTING}{names} takes them from fields of other names"
    )


def peek(rows: Lines, decode: Callable[[Row | RowError | Line], Row | RowError]) -> tuple[Row | None, Lines]:
    """The first row that is an object, if there is one; and all rows. `decode` as for `settle_schema`."""
    before: list[Row | RowError | Line] = []
    for line in rows:
        before.append(line)
        if isinstance(row := decode(line), Row):
            return row, chain(before, rows)
    return None, iter(before)
