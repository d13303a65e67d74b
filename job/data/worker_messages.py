"""Messages between the processes that encode rows: JSON followed by a block of bytes, no pickles."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import IO, Any, BinaryIO

from job.data.formats import Line, Row, RowError
from job.data.preferences import EncodedAnswers
from job.data.remarks import Remark
from job.data.row_encoder import Bundle, Outcome
from job.data.tokenization import Encoded

_HEAD = struct.Struct("<2Q")
_PLAIN = {str, int, float, bool, type(None)}
_BLOBS = ("canonical", "ids", "targets", "lengths", "audits")
"""Fields of a bundle that are bytes."""


def as_json(value: Any) -> bytes:
    """JSON in UTF-8, also of text with half a surrogate pair in it."""
    # Not escaped: of two halves of a surrogate pair, as broken text may have them, escapes would make one character.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def send(to: BinaryIO | IO[bytes], head: bytes, blob: bytes = b"") -> None:
    """Sends a message: JSON, and the bytes that it is about."""
    to.write(_HEAD.pack(len(head), len(blob)))
    to.write(head)
    to.write(blob)
    to.flush()


def receive(source: BinaryIO | IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """A message.

    Raises:
        EOFError: There is none any more.
    """
    head, blob = _HEAD.unpack(_exactly(source, _HEAD.size))
    text = _exactly(source, head).decode("utf-8", "surrogatepass")
    return json.loads(text), _exactly(source, blob)


def _exactly(source: BinaryIO | IO[bytes], count: int) -> bytes:
    data = source.read(count)
    if len(data) < count:
        raise EOFError
    return data


def encode_rows(chunk: Sequence[Row | RowError | Line], *, together: bool) -> tuple[bytes, bytes] | None:
    """The rows as a message, lines undecoded; None if a value has a type that JSON lacks, such as a date."""
    if not all(_is_plain(row.fields) for row in chunk if isinstance(row, Row)):
        return None
    lines: list[bytes] = []
    rows: list[list[Any]] = []
    for row in chunk:
        if isinstance(row, Line):
            rows.append([row.where, len(row.data)])
            lines.append(row.data)
        else:
            rows.append([row.where, row.fields] if isinstance(row, Row) else [row.where, row.kind, row.what])
    return as_json({"rows": rows, "together": together}), b"".join(lines)


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return all(type(key) is str for key in value) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if kind is list else kind in _PLAIN


def decode_rows(chunk: dict[str, Any], blob: bytes) -> list[Row | RowError | Line]:
    """The rows of a message that `encode_rows` made."""
    rows: list[Row | RowError | Line] = []
    at = 0
    for where, first, *fault in chunk["rows"]:
        if isinstance(first, int):
            rows.append(Line(where, blob[at : at + first]))
            at += first
        else:
            rows.append(Row(where, first) if isinstance(first, dict) else RowError(first, where, fault[0]))
    return rows


def pack_bundle(bundle: Bundle) -> tuple[dict[str, Any], bytes]:
    """The rows of a chunk together as a message."""
    blobs = [getattr(bundle, name) for name in _BLOBS]
    rest = {name: value for name, value in vars(bundle).items() if name not in _BLOBS}
    faults = [[[fault.kind, fault.where, fault.what] for fault in row] for row in bundle.faults]
    return {**rest, "faults": faults, "sizes": list(map(len, blobs))}, b"".join(blobs)


def unpack_bundle(answer: dict[str, Any], blob: bytes) -> Bundle:
    """What `pack_bundle` made a message of."""
    *sizes, _ = accumulate(answer.pop("sizes"), initial=0)
    blobs: dict[str, Any] = {
        name: blob[start:stop] for name, start, stop in zip(_BLOBS, sizes, [*sizes[1:], len(blob)], strict=True)
    }
    faults = tuple(tuple(RowError(*fault) for fault in row) for row in answer.pop("faults"))
    return Bundle(**answer, **blobs, faults=faults)


def pack_outcomes(outcomes: Sequence[Outcome]) -> tuple[dict[str, Any], bytes]:
    """The outcomes as JSON, followed by the texts and tokens."""
    blob: list[bytes] = []

    def pack(side: Encoded) -> list[Any]:
        text = side.text.encode()
        blob.extend((text, side.ids, side.targets, side.compared_by))
        sizes = len(text), len(side.targets), len(side.compared_by)
        return [*sizes, side.end, side.unused, side.long, side.where, side.weight]

    def pack_example(example: Encoded | EncodedAnswers) -> list[Any]:
        if isinstance(example, Encoded):
            return [pack(example)]
        return [[pack(side) for side in example.sides], example.desirable, example.unused]

    def pack_audited(outcome: Outcome) -> int:
        blob.append(outcome.audited)
        return len(outcome.audited)

    rows = [
        [
            outcome.where,
            [pack_example(example) for example in outcome.examples],
            [[fault.kind, fault.where, fault.what] for fault in outcome.faults],
            outcome.remarks,
            pack_audited(outcome),
        ]
        for outcome in outcomes
    ]
    return {"rows": rows}, b"".join(blob)


def unpack_outcomes(answer: dict[str, Any], blob: bytes) -> list[Outcome]:
    """What `pack_outcomes` made a message of."""
    at = 0

    def next_bytes(count: int) -> bytes:
        nonlocal at
        at += count
        return blob[at - count : at]

    def unpack(side: list[Any]) -> Encoded:
        text, tokens, compared, end, unused, long, where, weight = side
        counts = tuple((name, number) for name, number in long)
        return Encoded(
            next_bytes(text).decode(),
            next_bytes(4 * tokens),
            next_bytes(tokens),
            end,
            tuple(unused),
            counts,
            where,
            next_bytes(compared),
            weight,
        )

    def unpack_example(packed: list[Any]) -> Encoded | EncodedAnswers:
        sides, *rest = packed
        if not rest:
            return unpack(sides)
        return EncodedAnswers(tuple(map(unpack, sides)), rest[0], tuple(rest[1]))

    return [
        Outcome(
            where,
            tuple(map(unpack_example, examples)),
            tuple(RowError(*fault) for fault in faults),
            {kind: Remark(remark_where, tuple(words)) for kind, (remark_where, words) in remarks.items()},
            next_bytes(audited),
        )
        for where, examples, faults, remarks, audited in answer["rows"]
    ]
