"""Chat templates in a separate process: the same text as from transformers, with limits on time and memory."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest

from job.common import helper_process
from job.data.chat_template import TemplateRefusalError, open_template, uses_date
from job.errors import DataError, Preempted
from tests.toy_tokenizer import CHATML, toy_tokenizer

ASK = {"role": "user", "content": "cat? ünï🙂\u2028"}
ANSWER = {"role": "assistant", "content": "mat.", "name": None}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
WITH_TOOLS = "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is started as the job starts it, and not forked as elsewhere in the tests."""
    monkeypatch.setattr(helper_process, "subprocess", subprocess)


@pytest.mark.parametrize("template", [CHATML, WITH_TOOLS, "{% for m in messages %}{{ m }}{% endfor %}"])
def test_the_text_is_that_of_transformers(template: str) -> None:
    """What comes from the process is what `apply_chat_template` writes here, tools, header and nulls included."""
    tokenizer = toy_tokenizer(template)
    with open_template(tokenizer, "2026-01-02") as render:
        for messages, options in (
            ([ASK, ANSWER], {}),
            ([ASK], {"add_generation_prompt": True}),
            ([ASK, ANSWER], {"tools": TOOLS}),
        ):
            options_here: dict[str, Any] = options
            expected = tokenizer.apply_chat_template(messages, tokenize=False, **options_here)
            assert render(messages, **options_here) == expected


def test_a_conversation_of_any_length_is_rendered() -> None:
    """Longer than a pipe holds, so that question and answer come in several parts; the next one begins anew."""
    with open_template(toy_tokenizer("{% for message in messages %}{{ message['content'] }}|{% endfor %}")) as render:
        for text in ("x" * 300_000, "é" * 70_000, "short"):
            assert render([ASK | {"content": text}]) == f"{text}|"


@pytest.mark.usefixtures("cold")
def test_the_date_is_the_one_that_is_given() -> None:
    """A template gets the given day at its start for today, and the same lot each time where it draws one."""
    tokenizer = toy_tokenizer("{{ strftime_now('%d %b %Y %H:%M') }}{{ range(99999) | random if messages[1:] }}")
    assert uses_date(tokenizer)
    assert not uses_date(toy_tokenizer(CHATML))
    with open_template(tokenizer, "2020-02-29") as render:
        assert render([ASK]) == "29 Feb 2020 00:00"
        assert render([ASK, ANSWER]) == render([ASK, ANSWER])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
        "{{ '\\ud800' }}",
    ],
)
def test_a_template_that_fails_refuses_the_conversation(template: str) -> None:
    """Division by zero, recursion, broken syntax, forbidden access and what is no text refuse it in words."""
    with open_template(toy_tokenizer(template)) as render, pytest.raises(TemplateRefusalError, match="Error"):
        render([ASK])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not terminate"),
        ("{{ 'x' * 10 ** 10 }}", "memory"),
        ("{{ 'x' * (20 * 1024 * 1024) }}", "characters"),
        ("{{ 'x'.center(10 ** 11) | length }}", "memory"),
    ],
)
def test_a_template_out_of_bounds_is_an_error_of_the_data(template: str, reason: str) -> None:
    """Loops without end and gigabytes of text end as a DataError that names the model, within seconds."""
    began = time.monotonic()
    with open_template(toy_tokenizer(template)) as render, pytest.raises(DataError, match=f"JOB_MODEL__ID.*({reason})"):
        render([ASK])
    assert time.monotonic() - began < 120


@pytest.mark.usefixtures("cold")
def test_the_process_that_the_job_starts_has_bounds() -> None:
    """What is bound in a fork is bound in a process of its own."""
    with open_template(toy_tokenizer("{{ 'x' * 10 ** 10 }}")) as render, pytest.raises(DataError, match="memory"):
        render([ASK])


def test_a_stop_is_looked_at_while_a_template_takes_long() -> None:
    """The job may be asked to end while a template loops: it does not wait for the bound."""

    def stop() -> None:
        raise Preempted("asked to end")

    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(Preempted), open_template(toy_tokenizer(loop), check_stop=stop) as render:
        render([ASK])
