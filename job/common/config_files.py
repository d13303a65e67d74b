"""Reads a mapping from a YAML, TOML or JSON file of bounded size."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 1024 * 1024  # SageMaker's limits allow 250 kB of hyperparameters
GIVEN_TWICE = "a key is given twice"
ALIAS = "an alias of a list or mapping is not allowed"


_MISFITS = (KeyError, IndexError, AttributeError, TypeError)
"""What PyYAML raises for values such as `!!bool maybe`, `!!int ""` and `!!timestamp now`."""


class NotAllowedError(ValueError):
    """A file's content could be read and is not allowed; the message quotes nothing from the file."""


def read_mapping(path: Path, parse: Callable[[str], object]) -> Mapping[object, object] | str:
    """The mapping in a file, or a text that says what is wrong with it.

    The text never quotes the file, which may hold secrets.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or 'the name is not valid'}; give another path"
    if len(content) > MAX_FILE_BYTES:
        return f"is larger than {MAX_FILE_BYTES} bytes, too large for a settings file; give another path"
    try:
        tree = parse(content.decode("utf-8-sig"))
    except NotAllowedError as error:
        return f"cannot be used, {error}; correct it"
    except (ValueError, RecursionError) as error:
        place = _place_of(error, content)
        return f"is not valid {path.suffix[1:].upper()} in UTF-8{f' ({place})' if place else ''}; correct it"
    return tree if isinstance(tree, Mapping) else "must be a mapping from names to values; correct it"


def _place_of(error: Exception, content: bytes) -> str:
    """Line and column of an error, as far as they are known; the parser's own message may quote the file."""
    if isinstance(error, UnicodeDecodeError):
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        return f"line {line}, column {column}"
    found = re.search(r"line (\d+)(?:,? column (\d+))?", str(error))
    if found is None:
        return "at its end" if "end of document" in str(error) else ""
    return f"line {found[1]}" + (f", column {found[2]}" if found[2] else "")


def strict_yaml(content: bytes | str) -> Any:
    """The value of a YAML document. A key given twice is refused: parsers take the last value and drop the others.

    So is an alias of a list or mapping, since a few of them can unfold without end.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: The text is not YAML; the first may quote it.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            node = super().compose_node(parent, index)
            if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, ALIAS, event.start_mark)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - PyYAML's signature
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, GIVEN_TWICE, key.start_mark)
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    try:
        return Loader(content).get_single_data()
    except _MISFITS:
        raise ValueError("a value does not match its tag") from None
