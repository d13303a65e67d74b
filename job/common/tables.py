"""Tables as plain text and as Markdown. What they show may come from strangers: it can neither break out nor in."""

from __future__ import annotations

import json
from collections.abc import Sequence

Row = Sequence[str]


def plain(head: Row, rows: Sequence[Row]) -> list[str]:
    """Columns as wide as their widest value."""
    cells = [[_visible(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (cells[0], ["-" * width for width in widths], *cells[1:])
    ]


def markdown(head: Row, rows: Sequence[Row]) -> list[str]:
    """A table as GitHub and GitLab draw it."""
    return [f"| {' | '.join(map(_escaped, row))} |" for row in (head, ["---"] * len(head), *rows)]


def _visible(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)


def _escaped(text: str) -> str:
    escaped = _visible(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "|`*_[]":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped
