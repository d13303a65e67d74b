"""Renders the Jinja2 templates of this package; an undefined name in a template is an error."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from job.common import formatting

FILTERS = (
    "at_least",
    "count",
    "dollars",
    "duration",
    "enumeration",
    "figure",
    "moment",
    "p_value",
    "percent",
    "points",
    "size",
)


def render(template: str, *, escape: bool, **context: Any) -> str:
    """Renders a template.

    Args:
        template: A file in `templates/`.
        escape: Whether values are escaped for HTML.
        context: The template's variables.
    """
    rendered: str = _environment(escape=escape).get_template(template).render(context)
    return rendered


@cache
def _environment(*, escape: bool) -> Any:
    """What templates are compiled in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=escape,  # noqa: S701 - off for Markdown only
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        {name: getattr(formatting, name) for name in FILTERS}, code=code, breakable=breakable, fenced=fenced
    )
    return environment


def code(value: object) -> str:
    """Text as inline code in Markdown; backticks and line breaks in it are replaced."""
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`"


def fenced(text: object) -> str:
    """Text as a block of code in Markdown, whatever is in it: the fence is longer than any run of backticks."""
    longest = max(map(len, re.findall("`+", str(text))), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def breakable(text: object) -> Any:
    """HTML text with possible line breaks after `/`, `.`, `_` and `,`."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[/._,])", str(text)))
