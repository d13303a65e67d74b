"""Events of a run to a webhook (`JOB_NOTIFY__WEBHOOK`): an attempt starts, is preempted, fails or completes the run.

`completed` is sent when the results are published: it says whether the quality gate is met, and pushes to other places
come after it. Each is a CloudEvent 1.0 in structured mode, `application/cloudevents+json`, by POST. An attempt that is
killed or stalls cannot send anything at its end: the next one does, when it has taken the run over (`killed`, also for
one that it replaces, and `stalled`). One that ends before it owns the run, such as on wrong settings, sends nothing. A
webhook that fails or hangs costs the run a warning, and at its end at most `END_SECONDS`. The address may hold a
token: it is in no message, and redirects are not followed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from datetime import UTC, datetime
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, build_opener
from uuid import uuid4

from job import __version__, log
from job.errors import JobError, Preempted, Replaced, Stalled
from job.records import AttemptRecord
from job.tracking.no_redirects import NoRedirects

END_SECONDS = 3.0
"""How long the end of a run waits for its last event to be taken."""
SILENT = {"killed": None, "stalled": Stalled.exit_code}
"""Outcome of an attempt that could not send its end -> its exit code, where it is known."""
_REQUEST_SECONDS = 10.0
_TYPE = "qlora-job.attempt"
_MAX_WHY_CHARACTERS = 500


def event(kind: str, run: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """A CloudEvent.

    Args:
        kind: `started`, `preempted`, `failed`, `completed`, `killed` or `stalled`.
        run: The run's id.
        data: What happened.
    """
    return {
        "specversion": "1.0",
        "id": str(uuid4()),
        "source": f"/qlora-job/runs/{quote(run, safe='')}",
        "type": f"{_TYPE}.{kind}",
        "subject": run,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": {"run": run, **data},
    }


class Notifier:
    """Sends the events of an attempt; nothing before it has started, or without an address."""

    def __init__(self, url: str | None, run: str) -> None:
        self._url, self._run = url, run
        self._data: Mapping[str, Any] = {}
        self._first_sending: Thread | None = None
        self.gate_passed: bool | None = None
        """Whether the results meet the quality gate, which `completed` says; None without a gate."""

    def started(self, data: Mapping[str, Any], silent: AttemptRecord | None = None) -> None:
        """The attempt owns the run.

        Args:
            data: What every event says: the attempt's number, and the URI of the run.
            silent: The attempt before, if it could not send its end (its outcome is one of `SILENT`).
        """
        self._data = data
        events = [event("started", self._run, data)]
        if silent is not None:
            ended = {**data, "attempt": silent.number, "exit_code": SILENT[silent.outcome], "told_by": data["attempt"]}
            events.insert(0, event(silent.outcome, self._run, ended))
        self._first_sending = None if self._url is None else _send(self._url, *events)

    def ended(self, kind: str, data: Mapping[str, Any]) -> None:
        """The attempt has ended: sends how, once the first event was taken; waits at most `END_SECONDS` for both."""
        if self._url is None or self._first_sending is None:
            return
        self._first_sending.join(END_SECONDS / 2)
        last = _send(self._url, event(kind, self._run, {**self._data, **data}))
        last.join(END_SECONDS / 2)
        if last.is_alive():
            log.get_logger().warning("the webhook did not answer in time; the run does not wait for it")


@contextmanager
def notifying(url: str | None, run: str) -> Iterator[Notifier]:
    """Context manager: yields the notifier; at the end of the block it sends how the attempt ended.

    Args:
        url: Where to; None for nowhere.
        run: The run's id.
    """
    notifier = Notifier(url, run)
    try:
        yield notifier
    except Replaced:
        raise
    except BaseException as error:
        code = error.exit_code if isinstance(error, JobError) else JobError.exit_code
        why = log.without_secrets(f"{type(error).__name__}: {error}")[:_MAX_WHY_CHARACTERS]
        notifier.ended("preempted" if isinstance(error, Preempted) else "failed", {"exit_code": code, "why": why})
        raise
    notifier.ended("completed", {"gate_passed": notifier.gate_passed})


def _send(url: str, *events: Mapping[str, Any]) -> Thread:
    """Posts events, one after the other."""

    def post() -> None:
        for content in events:
            _post(url, content)

    # In a thread, since it may take long; with this thread's log fields.
    thread = Thread(target=copy_context().run, args=(post,), name="webhook", daemon=True)
    thread.start()
    return thread


def _post(url: str, content: Mapping[str, Any]) -> None:
    headers = {"Content-Type": "application/cloudevents+json; charset=utf-8", "User-Agent": f"qlora-job/{__version__}"}
    request = Request(url, json.dumps(content).encode(), headers, method="POST")  # noqa: S310 - settings allow https alone
    try:
        build_opener(NoRedirects).open(request, timeout=_REQUEST_SECONDS).close()
    except HTTPError as error:
        why = f"it answered {error.code}"
    except URLError as error:
        why = f"it cannot be reached: {type(error.reason).__name__}"
    except Exception as error:  # noqa: BLE001 - no exception may disturb the run
        why = type(error).__name__  # the text may quote the address
    else:
        return
    log.get_logger().warning(
        "the webhook did not accept an event; the run continues", event_type=content["type"], why=why
    )
