"""Prompts and answers in report and card: side by side, escaped, truncated if long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from job.records import PromptAnswer
from job.report import report
from job.report.model_card import MAX_PROMPTS, render_model_card
from job.report.prompts import MAX_TEXT, shown_prompts
from tests.example_run import results
from tests.unit.report.test_report import HOSTILE, Page, found  # noqa: F401

ASKED = {"source": "p.jsonl", "count": 7, "max_new_tokens": 16, "sha256": "0" * 64}


def line(number: int, answer: str, *, cut: bool = False, prompt: str = "") -> PromptAnswer:
    """An answer to a prompt."""
    ended = "length" if cut else "eos"
    return PromptAnswer(f"p.jsonl:{number}", prompt or f"Prompt {number}?", f"Own {number}.", answer, 3, ended)


def test_base_and_adapter_stand_side_by_side(found: report.ReportData) -> None:  # noqa: F811
    """The page has every prompt, both answers and the row's own; markup in them is text, and a cut answer says so."""
    base = [line(n, f"Base {n}.", cut=n == 1) for n in range(7)]
    adapter = [line(n, "Base 0." if n == 0 else HOSTILE) for n in range(7)]
    shown = shown_prompts(base, adapter)
    made = results(found)
    made["evaluation"] = {**made["evaluation"], "prompts": ASKED}
    page = Page(report.render_report(made, replace(found, prompts=tuple(shown))))
    assert all(f"Prompt {n}?" in page.text and f"Own {n}." in page.text for n in range(7))
    assert HOSTILE in page.text
    assert not page.all("script", "img")
    assert "adapter, the same" in page.text
    assert "Show 2 more" in page.text
    assert "Base 1.…" in page.text
    assert "cut off" in page.text
    assert "What the models write" not in Page(report.render_report(results(found), found)).text


def test_the_card_has_the_first_of_them(found: report.ReportData) -> None:  # noqa: F811
    """As blocks of code with a longer fence than any in the text; other cards have no such section."""
    shown = shown_prompts([line(n, "```\n# no title") for n in range(5)], [line(n, f"Right {n}") for n in range(5)])
    made = results(found)
    made["evaluation"] = {**made["evaluation"], "prompts": ASKED}
    card = render_model_card(made, shown).decode()
    assert "````text\n```\n# no title\n````" in card
    assert f"Right {MAX_PROMPTS - 1}" in card
    assert f"Right {MAX_PROMPTS}" not in card
    assert "What it writes" not in render_model_card(results(found)).decode()


def test_long_texts_are_cut() -> None:
    """The end of a long prompt and the beginning of a long answer are shown."""
    (shown,) = shown_prompts([line(1, "a" * 3000, prompt="b" * 3000 + "?")], [line(1, "c", prompt="b" * 3000 + "?")])
    assert (len(shown.base.text), shown.base.cut, shown.adapter.cut) == (MAX_TEXT, True, False)
    assert shown.prompt.endswith("b?")
    with pytest.raises(ValueError, match="same prompts"):
        shown_prompts([line(1, "a")], [line(2, "a")])
