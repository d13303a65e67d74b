"""Jinja2 as the job uses it: templates of this package, figures as `wording` writes them, nothing left undefined."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from job.common import formatting

FILTERS = ("count", "dollars", "duration", "enumeration", "figure", "moment", "p_value", "percent", "points", "size")


def render(template: str, *, escape: bool, **context: Any) -> str:
    """The template of this name, filled in.

    Args:
        template: A file in `templates/`.
        escape: Whether what is filled in is text to stand in HTML, whatever it looks like.
        context: What the template speaks of.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=escape,  # noqa: S701 - off for Markdown only
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update({name: getattr(formatting, name) for name in FILTERS}, code=code, breakable=breakable)
    return environment.get_template(template).render(context)


def code(value: object) -> str:
    """Text as code within a line of Markdown, whatever it holds."""
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`"


def breakable(text: object) -> Any:
    """Text in HTML that may go on in another line where the eye expects it of paths and names."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[/._,])", str(text)))
