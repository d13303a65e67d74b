"""Imitations of the clouds' metadata services, as strict as the real ones about methods and headers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

Reply = tuple[int, str, dict[str, str]]
NOT_FOUND: Reply = (404, "not found", {})
MACHINE = "aks-gpu-vmss_0"


@dataclass
class Imitation:
    """The current state of a service, by key, its requests, and how it answers one."""

    answer: Callable[[Imitation, str, str, dict[str, str]], Reply]
    state: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


def ec2(service: Imitation, method: str, path: str, headers: dict[str, str]) -> Reply:
    """IMDSv2 with tokens required; `state["token"]` is the valid one."""
    if path == "/latest/api/token":
        if method != "PUT" or not headers.get("x-aws-ec2-metadata-token-ttl-seconds", "").isdecimal():
            return (400, "bad request", {})
        number = sum("/latest/api/token" in request for request in service.requests)
        service.state["token"] = f"token-{number}=="
        return (200, service.state["token"], {})
    if headers.get("x-aws-ec2-metadata-token") != service.state.get("token", "none yet"):
        return (401, "unauthorized", {})
    found = service.state.get(path.removeprefix("/latest/meta-data/"))
    return NOT_FOUND if found is None else (200, found, {})


def gcp(service: Imitation, _method: str, path: str, headers: dict[str, str]) -> Reply:
    """Google's metadata server, which requires its header."""
    if headers.get("metadata-flavor") != "Google":
        return (403, "missing Metadata-Flavor:Google", {})
    values = {"id": "4520031799277581759", "preempted": "FALSE", "maintenance-event": "NONE"} | service.state
    found = values.get(path.removeprefix("/computeMetadata/v1/instance/"))
    return NOT_FOUND if found is None else (200, found, {"Metadata-Flavor": "Google"})


def azure(service: Imitation, _method: str, path: str, headers: dict[str, str]) -> Reply:
    """Azure's, which requires its header and the version; `state["events"]` is the list of scheduled events."""
    if headers.get("metadata") != "true" or "api-version=20" not in path:
        return (400, '{"error": "Bad request. Required metadata header not specified"}', {})
    if path.startswith("/metadata/instance/compute/name?") and path.endswith("format=text"):
        return (200, service.state.get("name", MACHINE), {})
    if path.startswith("/metadata/scheduledevents?"):
        events = service.state.get("events", "[]")
        return (200, f'{{"DocumentIncarnation": 1, "Events": {events}}}', {})
    return NOT_FOUND


def instance_action(action: str = "terminate", seconds: float = 120) -> str:
    """EC2's notice of an action in so many seconds."""
    time = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": action, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ")})


def scheduled_event(kind: str = "Preempt", resource: str = MACHINE, seconds: float = 30) -> str:
    """Azure's list of one event, in so many seconds."""
    event = {
        "EventId": "A123BC45-1234-5678-AB90-ABCDEF123456",
        "EventStatus": "Scheduled",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": [resource],
        "NotBefore": format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True),
    }
    return json.dumps([event])


@contextmanager
def serve(answer: Callable[[Imitation, str, str, dict[str, str]], Reply]) -> Iterator[Imitation]:
    """A service on a free port of this machine."""
    service = Imitation(answer)

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            service.requests.append(f"{self.command} {self.path}")
            status, text, headers = service.answer(
                service, self.command, self.path, {name.lower(): value for name, value in self.headers.items()}
            )
            body = text.encode("utf-8", "surrogateescape")
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = handle_any  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Logs nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        service.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield service
        finally:
            server.shutdown()
            thread.join()
