"""A webhook gets a CloudEvent for each start and end of an attempt; it cannot disturb a run, and is never logged."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from job import log
from job.errors import DataError, NoProgress, Preempted, Problem, Replaced, SettingsError
from job.records import AttemptRecord
from job.settings.affects_result import plain_values
from job.settings.load import load_settings, secrets
from job.tracking import webhook
from job.tracking.webhook import notifying
from tests.s3_server import Request, server
from tests.waiting import threads, wait_for

TOKEN = "a-token-in-the-address"
DATA = {"attempt": 2, "store": "s3://bucket/a run"}


class Receiver:
    """Takes events, and answers as the test says."""

    def __init__(self, status: int = 202, **headers: str) -> None:
        self.status, self.headers = status, headers
        self.events: list[dict[str, Any]] = []
        self.answers = threading.Event()
        self.answers.set()

    def answer(self, asked: Request) -> None:
        """Takes a request."""
        assert (asked.command, asked.path) == ("POST", f"/{TOKEN}")
        assert asked.headers["Content-Type"] == "application/cloudevents+json; charset=utf-8"
        self.events.append(json.loads(asked.content))
        self.answers.wait(60)
        asked.answer(self.status, **self.headers)


@pytest.fixture(autouse=True)
def _answers_come_in_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However busy this machine is. What a test does not wait for ends before the next one, in which it would warn."""
    monkeypatch.setattr(webhook, "END_SECONDS", 120.0)
    monkeypatch.setattr(webhook, "_REQUEST_SECONDS", 60.0)
    yield
    wait_for(lambda: not threads("webhook"))


def notified(url: str, error: BaseException | None = None, *, started: bool = True) -> list[Any]:
    """An attempt that ends like this; returns the warnings."""
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with capture_logs() as lines, expected, notifying(f"{url}/{TOKEN}", "a run") as notifier:
        if started:
            notifier.started(DATA)
        if error is not None:
            raise error
    assert TOKEN not in repr(lines)
    return [line for line in lines if line["log_level"] == "warning"]


@pytest.mark.parametrize(
    ("error", "kind", "more"),
    [
        (None, "completed", {"gate_passed": None}),
        (Preempted("by SIGTERM"), "preempted", {"exit_code": 75, "why": "Preempted: by SIGTERM"}),
        (NoProgress("at all"), "failed", {"exit_code": 71, "why": "NoProgress: at all"}),
        (DataError([Problem("row 1", "is hunter22")]), "failed", {"exit_code": 65, "why": "DataError: row 1: is ***"}),
        (KeyError("a"), "failed", {"exit_code": 1, "why": "KeyError: 'a'"}),
    ],
)
def test_an_attempt_tells_how_it_starts_and_ends(error: Exception | None, kind: str, more: dict[str, Any]) -> None:
    """Both are CloudEvents with every required attribute, and the end has the exit code and the reason."""
    log.configure("json", "info", ["hunter22"])
    receiver = Receiver()
    with server(receiver.answer) as url:
        assert notified(url, error) == []
    first, last = receiver.events
    assert (first["type"], last["type"]) == ("qlora-job.attempt.started", f"qlora-job.attempt.{kind}")
    assert first["data"] == {"run": "a run", **DATA}
    assert last["data"] == {"run": "a run", **DATA, **more}
    assert first["id"] != last["id"]
    for one in (first, last):
        assert one["specversion"] == "1.0"
        assert (one["source"], one["subject"]) == ("/qlora-job/runs/a%20run", "a run")
        assert one["datacontenttype"] == "application/json"
        assert datetime.fromisoformat(one["time"]).tzinfo is not None


@pytest.mark.parametrize("passed", [True, False])
def test_the_last_event_says_whether_the_gate_is_met(*, passed: bool) -> None:
    """A receiver of `completed` can distinguish runs that met the gate from published runs that missed it."""
    receiver = Receiver()
    with server(receiver.answer) as url, notifying(f"{url}/{TOKEN}", "a run") as notifier:
        notifier.started(DATA)
        notifier.gate_passed = passed
    assert receiver.events[-1]["data"]["gate_passed"] is passed


@pytest.mark.parametrize(("outcome", "code"), [("killed", None), ("stalled", 74)])
def test_an_attempt_that_could_not_tell_its_end_is_told_by_the_next(outcome: str, code: int | None) -> None:
    """Before its own start: which attempt it was, how it ended, and who says so."""
    before = AttemptRecord(1, "2026-01-01T00:00:00.000Z", None, outcome, 5.0, {}, 0, 0, 0)
    receiver = Receiver()
    with server(receiver.answer) as url, notifying(f"{url}/{TOKEN}", "a run") as notifier:
        notifier.started(DATA, before)
    kinds = [one["type"].rpartition(".")[2] for one in receiver.events]
    assert kinds == [outcome, "started", "completed"]
    told = {"attempt": 1, "exit_code": code, "told_by": 2}
    assert receiver.events[0]["data"] == {"run": "a run", **DATA, **told}
    assert receiver.events[1]["data"] == {"run": "a run", **DATA}


def test_who_does_not_own_the_run_tells_nothing() -> None:
    """An attempt that was replaced is silent about its end, and one that never began about all."""
    receiver = Receiver()
    with server(receiver.answer) as url:
        assert notified(url, Replaced("by another")) == []
        assert notified(url, SettingsError([]), started=False) == []
    assert [one["type"] for one in receiver.events][1:] == []


@pytest.mark.parametrize(
    ("receiver", "why"),
    [
        (Receiver(500), "it answered 500"),
        (Receiver(302, Location="http://127.0.0.1:1/elsewhere"), "it answered 302"),
        (None, "it cannot be reached: ConnectionRefusedError"),
    ],
)
def test_a_webhook_that_fails_costs_warnings(receiver: Receiver | None, why: str) -> None:
    """Each event that is not taken is a line without the address; a redirect is not followed."""
    if receiver is None:
        warnings = notified("http://127.0.0.1:1")
    else:
        with server(receiver.answer) as url:
            warnings = notified(url)
    assert [line["why"] for line in warnings] == [why, why]


def test_a_webhook_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the run waits for a bounded time, and says so."""
    monkeypatch.setattr(webhook, "END_SECONDS", 0.3)
    receiver = Receiver()
    receiver.answers.clear()
    with server(receiver.answer) as url:
        (warning,) = notified(url)
        assert threads("webhook")
        receiver.answers.set()
    assert "did not answer in time" in warning["event"]


@pytest.mark.parametrize(
    "address", ["http://x/token", "https://", "https://x:99999", "x", "https://x/a b", "ftp://x/y"]
)
def test_an_address_without_tls_is_refused(address: str) -> None:
    """Exit code 2, and the message does not quote the address."""
    with pytest.raises(SettingsError) as caught:
        load_settings([], {"JOB_NOTIFY__WEBHOOK": address})
    (problem,) = caught.value.problems
    assert "must be an https:// address" in problem.what
    assert str(problem) == "JOB_NOTIFY__WEBHOOK (environment): must be an https:// address"


def test_the_address_is_a_secret() -> None:
    """Neither the settings in the manifest nor a line of the log show it."""
    environ = {"JOB_NOTIFY__WEBHOOK": f"https://hooks.example/{TOKEN}"}
    settings = load_settings([], environ)
    assert TOKEN not in repr(plain_values(settings))
    assert TOKEN not in repr(settings)
    assert environ["JOB_NOTIFY__WEBHOOK"] in secrets(environ)
