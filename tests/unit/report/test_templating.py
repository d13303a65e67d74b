"""Templates: values filled into HTML stay text, undefined names are errors, code stays on its line."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.report import templating


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of templates of the test's own."""
    (tmp_path / "templates").mkdir()
    monkeypatch.setattr(templating, "__file__", str(tmp_path / "rendering.py"))
    templating._environment.cache_clear()
    yield tmp_path / "templates"
    templating._environment.cache_clear()


def test_html_is_escaped_and_markdown_is_not(templates: Path) -> None:
    """The same text, for a page and for a file that no browser reads."""
    (templates / "a").write_text("{{ text }}")
    assert templating.render("a", escape=True, text="<b>&") == "&lt;b&gt;&amp;"
    assert templating.render("a", escape=False, text="<b>&") == "<b>&"


def test_a_missing_figure_is_an_error(templates: Path) -> None:
    """A page with a hole where a figure should be is not published."""
    (templates / "a").write_text("{{ task.acc | percent }}")
    with pytest.raises(jinja2.UndefinedError):
        templating.render("a", escape=True, task={})


@given(st.text())
def test_breakable_text_is_the_same_text(text: str) -> None:
    """It may break, it shows every character, and none of them is markup."""
    broken = templating.breakable(text)
    assert html.unescape(broken.replace("<wbr>", "")) == text
    assert "<" not in broken.replace("<wbr>", "")


@pytest.mark.parametrize(("value", "written"), [("a/b", "`a/b`"), ("a`b\n\n# c", "`a'b # c`"), (7, "`7`")])
def test_code_in_markdown_stays_within_its_line(value: Any, written: str) -> None:
    """Neither a backtick nor a line break in a name gets out of it."""
    assert templating.code(value) == written
