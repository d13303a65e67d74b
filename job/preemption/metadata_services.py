"""The metadata services of EC2, Google Cloud and Azure: whether this machine is about to be preempted.

To add a cloud: a class with the methods of `Cloud`, and an entry in `CLOUDS` at the end of this file.

Answers are validated: services may be emulated, behind a proxy, or only half started. For every answer, a
method here raises at most what `FAILURES` lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import ClassVar, Protocol
from urllib.parse import urlsplit

from job import log

# All three clouds use this address. A host name would need DNS, whose duration cannot be bounded.
BASE_URL = "http://169.254.169.254"
TIMEOUT_SECONDS = 1.0
MAX_BYTES = 64 * 1024
# What an absent, broken or hostile service can cause. RecursionError: JSON that is nested too deeply.
FAILURES = (OSError, HTTPException, ValueError, RecursionError)


@dataclass(frozen=True)
class Notice:
    """The machine will be taken away: for which reason, and in how many seconds."""

    reason: str
    seconds: float


@dataclass(frozen=True)
class Answer:
    """An answer of a metadata service; `date` is by the service's own clock, header names are in lower case."""

    status: int
    text: str
    date: datetime
    headers: Mapping[str, str]


class Cloud(Protocol):
    """One cloud's metadata service. Its methods may raise what `FAILURES` lists."""

    name: ClassVar[str]
    poll_seconds: ClassVar[float]

    def present(self) -> bool:
        """Whether this machine belongs to that cloud."""

    def look(self) -> Notice | None:
        """The notice; None while there is none."""


class Ec2:
    """Amazon EC2, by IMDSv2: requests need a token, and its answer reaches a container only with a hop limit of 2."""

    name: ClassVar[str] = "ec2"
    poll_seconds: ClassVar[float] = 5.0
    notice_seconds: ClassVar[float] = 120.0

    def __init__(self, base: str) -> None:
        self._base = base
        self._token: str | None = None
        self._warned = False

    def present(self) -> bool:
        """See `Cloud.present`."""
        self._renew()
        return True

    def look(self) -> Notice | None:
        """See `Cloud.look`. A rebalance recommendation announces a risk only: it is logged once and stops nothing."""
        answer = self._get("/latest/meta-data/spot/instance-action")
        if answer.status == HTTPStatus.OK:
            action = json.loads(answer.text)
            if isinstance(action, dict) and action.get("action") in ("terminate", "stop", "hibernate"):
                seconds = _until(answer, action.get("time"), self.notice_seconds, datetime.fromisoformat)
                return Notice(f"EC2's spot notice ({action['action']})", seconds)
            _log_unknown_answer(self.name, answer.text)
        if not self._warned and self._get("/latest/meta-data/events/recommendations/rebalance").status == HTTPStatus.OK:
            self._warned = True
            log.get_logger().warning("EC2 sent a rebalance recommendation: this instance may be interrupted soon")
        return None

    def _get(self, path: str) -> Answer:
        answer = self._ask(path)
        if answer.status == HTTPStatus.UNAUTHORIZED:  # the token has expired
            self._renew()
            answer = self._ask(path)
        return answer

    def _ask(self, path: str) -> Answer:
        return ask(self._base, path, {"X-aws-ec2-metadata-token": self._token or self._renew()})

    def _renew(self) -> str:
        answer = ask(self._base, "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}, "PUT")
        token = answer.text.strip()
        if answer.status != HTTPStatus.OK or not re.fullmatch(r"[!-~]{1,1024}", token):
            raise ValueError(f"the answer to the request for a token has status {answer.status}")
        self._token = token
        return token


class Gcp:
    """Google Compute Engine."""

    name: ClassVar[str] = "gcp"
    poll_seconds: ClassVar[float] = 1.0
    notice_seconds: ClassVar[float] = 30.0
    maintenance_seconds: ClassVar[float] = 60.0

    def __init__(self, base: str) -> None:
        self._base = base
        self._maintenance: str | None = None

    def present(self) -> bool:
        """See `Cloud.present`."""
        return self._read("id") is not None

    def look(self) -> Notice | None:
        """See `Cloud.look`.

        Maintenance terminates a machine with a GPU, but may be announced an hour ahead. Only a change to the announced
        state counts: an attempt that starts in that hour, on the same machine, would otherwise stop at once each time.
        """
        preempted = self._read("preempted")
        if preempted is None:  # GKE's own server, which workload identity puts before Google's, has `id` but not this
            raise ValueError("it does not tell this container of a preemption, as on GKE: only SIGTERM does")
        if preempted == "TRUE":
            return Notice("Google's notice of preemption", self.notice_seconds)
        before, event = self._maintenance, self._read("maintenance-event")
        if event in {None, before}:
            return None
        self._maintenance = event
        if event == "TERMINATE_ON_HOST_MAINTENANCE" and before is not None:
            return Notice("Google's notice of host maintenance", self.maintenance_seconds)
        if event in {"TERMINATE_ON_HOST_MAINTENANCE", "MIGRATE_ON_HOST_MAINTENANCE"}:
            log.get_logger().warning("Google announces host maintenance", maintenance_event=event)
        elif event != "NONE":
            _log_unknown_answer(self.name, str(event))
        return None

    def _read(self, key: str) -> str | None:
        answer = ask(self._base, f"/computeMetadata/v1/instance/{key}", {"Metadata-Flavor": "Google"})
        if answer.status != HTTPStatus.OK or answer.headers.get("metadata-flavor") != "Google":
            return None
        return answer.text.strip()


class Azure:
    """Azure, by Scheduled Events: they concern a whole group of machines, so only those that name this one count."""

    name: ClassVar[str] = "azure"
    poll_seconds: ClassVar[float] = 5.0
    notice_seconds: ClassVar[float] = 30.0

    def __init__(self, base: str) -> None:
        self._base = base
        self._machine = ""

    def present(self) -> bool:
        """See `Cloud.present`. Not by the events: the first request for them takes up to two minutes."""
        answer = self._ask("/metadata/instance/compute/name?api-version=2020-06-01&format=text")
        self._machine = answer.text.strip() if answer.status == HTTPStatus.OK else ""
        return bool(self._machine)

    def look(self) -> Notice | None:
        """See `Cloud.look`."""
        if not self._machine and not self.present():
            raise ValueError("the service does not give the name of this machine")
        answer = self._ask("/metadata/scheduledevents?api-version=2020-07-01")
        if answer.status != HTTPStatus.OK:
            return None
        content = json.loads(answer.text)
        events = content.get("Events") if isinstance(content, dict) else None
        if not isinstance(events, list):
            _log_unknown_answer(self.name, answer.text)
            return None
        for event in events:
            if (
                isinstance(event, dict)
                and event.get("EventType") == "Preempt"
                and self._names_this_machine(event.get("Resources"))
            ):
                seconds = _until(answer, event.get("NotBefore"), self.notice_seconds, parsedate_to_datetime)
                return Notice("Azure's notice of preemption", seconds)
        return None

    def _names_this_machine(self, resources: object) -> bool:
        names = resources if isinstance(resources, list) else []
        return self._machine.casefold() in {name.casefold() for name in names if isinstance(name, str)}

    def _ask(self, path: str) -> Answer:
        return ask(self._base, path, {"Metadata": "true"})


def ask(base: str, path: str, headers: Mapping[str, str], method: str = "GET") -> Answer:
    """One request, without proxies and without following redirects, because the address is that of this machine only.

    Raises:
        OSError, HTTPException, ValueError: There is no answer, or it cannot be parsed.
    """
    parts = urlsplit(base)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request(method, path, headers=dict(headers))
        response = connection.getresponse()
        received = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, response.read(MAX_BYTES).decode("utf-8", "replace"), _date(received), received)
    finally:
        connection.close()


def _date(headers: Mapping[str, str]) -> datetime:
    try:
        return _with_zone(parsedate_to_datetime(headers["date"]))
    except (KeyError, ValueError, ArithmeticError):
        return datetime.now(UTC)


def _until(answer: Answer, when: object, longest: float, read: Callable[[str], datetime]) -> float:
    """Seconds from the answer to `when`, by the service's own clock; `longest` where `when` is no time."""
    try:
        seconds = (_with_zone(read(when)) - answer.date).total_seconds() if isinstance(when, str) else longest
    except (ValueError, ArithmeticError):
        seconds = longest
    return min(max(seconds, 0.0), longest)


def _with_zone(when: datetime) -> datetime:
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _log_unknown_answer(provider: str, text: str) -> None:
    log.get_logger().debug("the answer of the metadata service is not understood", provider=provider, answer=text[:100])


CLOUDS: Mapping[str, Callable[[str], Cloud]] = {"ec2": Ec2, "gcp": Gcp, "azure": Azure}
"""Provider -> class, which takes the base URL of the service. The keys are values of JOB_RUN__SPOT_NOTICES."""
