"""Hashes of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_facts(path: Path) -> str:
    """SHA-256 of a file of JSON lines without their `measured` part, which no two runs share."""
    total = hashlib.sha256()
    for line in path.read_text(encoding="utf-8").splitlines():
        facts: dict[str, Any] = json.loads(line)
        facts.pop("measured", None)
        total.update(json.dumps(facts, sort_keys=True).encode() + b"\n")
    return total.hexdigest()
