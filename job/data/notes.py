"""Messages about rows: logged when the rows are read, and again when their cached tokens are read instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from job import log

Level = Literal["info", "warning"]


class Notes:
    """Logs notes and keeps them, as (level, what, facts)."""

    def __init__(self, earlier: Iterable[tuple[Level, str, dict[str, Any]]] = ()) -> None:
        self.kept: list[tuple[Level, str, dict[str, Any]]] = []
        for level, what, facts in earlier:
            self(level, what, **facts)

    def __call__(self, level: Level, message: str, **facts: Any) -> None:
        """Logs a note and keeps it."""
        self.kept.append((level, message, facts))
        getattr(log.get_logger(), level)(message, **facts)
