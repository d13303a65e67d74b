"""Tables as plain text and as Markdown. Content is untrusted, and escaped so that it cannot break a line or a cell."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

Row = Sequence[str]


def visible(text: str) -> str:
    """Text as it can be printed: control characters, which could move a terminal's cursor, are escaped."""
    return text if text.isprintable() else json.dumps(text)


def aligned(rows: Sequence[Row], right_aligned: Collection[int] = ()) -> list[str]:
    """Columns as wide as their widest value, two spaces apart. `right_aligned`: the indexes of those with numbers."""
    cells = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right_aligned else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def plain(head: Row, rows: Sequence[Row]) -> list[str]:
    """A table as plain text, a line of dashes below its head."""
    widths = [max(len(visible(row[column])) for row in (head, *rows)) for column in range(len(head))]
    return aligned([head, ["-" * width for width in widths], *rows])


def markdown(head: Row, rows: Sequence[Row]) -> list[str]:
    """Lines of a table as GitHub and GitLab render it."""
    return [f"| {' | '.join(map(_escaped, row))} |" for row in (head, ["---"] * len(head), *rows)]


def _escaped(text: str) -> str:
    escaped = visible(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "|`*_[]":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped
