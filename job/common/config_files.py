"""Reads a mapping from a YAML, TOML or JSON file of bounded size."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

MAX_FILE_BYTES = 1024 * 1024  # SageMaker's limits allow 250 kB of hyperparameters


def read_mapping(path: Path, parse: Callable[[str], object]) -> Mapping[object, object] | str:
    """The mapping in a file, or a text that says what is wrong with it.

    The text never quotes the file, which may hold secrets.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or 'no such name is possible'}; give another path"
    if len(content) > MAX_FILE_BYTES:
        return f"is larger than {MAX_FILE_BYTES} bytes, too large for a file of settings; give another path"
    try:
        tree = parse(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        line = re.search(r"line \d+", str(error))  # the parser's own message may quote the file
        return f"is not valid {path.suffix[1:].upper()} in UTF-8{f' ({line[0]})' if line else ''}; correct it"
    return tree if isinstance(tree, Mapping) else "must hold a mapping from names to values at its top; correct it"
