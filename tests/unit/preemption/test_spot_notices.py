"""The thread that polls for spot notices: finds the cloud, sets the stop flag, and disturbs nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
from structlog.testing import capture_logs

from job.preemption import metadata_services, spot_notices
from job.preemption.metadata_services import CLOUDS
from job.preemption.spot_notices import watch_notices
from job.preemption.stop_flag import StopFlag
from tests import metadata_server
from tests.metadata_server import Imitation, Reply, instance_action, scheduled_event, serve
from tests.waiting import threads, wait_for

POLL = 0.01
TIMEOUT_SECONDS = metadata_services.TIMEOUT_SECONDS


@pytest.fixture(autouse=True)
def _answers_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this machine is."""
    monkeypatch.setattr(metadata_services, "TIMEOUT_SECONDS", 60.0)


def nothing(_service: Imitation, _method: str, _path: str, _headers: dict[str, str]) -> Reply:
    """A server that knows nothing."""
    return (404, "", {})


class Silent:
    """A server that takes connections, and never answers."""

    def __init__(self, server: socket.socket) -> None:
        self._server, self._taken = server, list[socket.socket]()
        self.url = f"http://127.0.0.1:{server.getsockname()[1]}"

    def connections(self) -> int:
        """How many there were."""
        with suppress(BlockingIOError):
            while True:
                self._taken.append(self._server.accept()[0])
        return len(self._taken)

    def close(self) -> None:
        """Ends those that are left."""
        for connection in self._taken:
            connection.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    """A server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server, closing(Silent(server)) as made:
        server.settimeout(0)
        yield made


NOTICES = {
    "ec2": (metadata_server.ec2, lambda: {"spot/instance-action": instance_action(seconds=90)}, "EC2", 91),
    "gcp": (metadata_server.gcp, lambda: {"preempted": "TRUE"}, "Google", 30),
    "azure": (metadata_server.azure, lambda: {"events": scheduled_event()}, "Azure", 31),
}


@pytest.mark.parametrize("name", NOTICES)
@pytest.mark.parametrize("automatic", [True, False])
def test_a_notice_raises_the_flag(name: str, automatic: bool) -> None:  # noqa: FBT001
    """A notice that appears while the job runs stops it, with the deadline; `auto` finds the cloud among all three."""
    answer, state, reason, seconds = NOTICES[name]
    stop = StopFlag()
    with serve(answer) as service, serve(nothing) as other:
        bases = {"ec2": other.url, "gcp": other.url, "azure": other.url, name: service.url}
        with watch_notices(stop, "auto" if automatic else name, bases=bases, poll_seconds=POLL):  # type: ignore[arg-type]
            wait_for(lambda: len(service.requests) > 8)
            assert not stop()
            service.state |= state()
            wait_for(stop)
    assert reason in str(stop.reason)
    assert seconds - 15 < stop.remaining() <= seconds
    assert automatic or not other.requests


@pytest.mark.parametrize("name", NOTICES)
def test_failures_of_the_service_are_survived(name: str) -> None:
    """A service that breaks in all ways and comes back is still listened to."""
    answer, state, reason, _ = NOTICES[name]
    stop = StopFlag()
    with serve(answer) as service, watch_notices(stop, "auto", bases={name: service.url}, poll_seconds=POLL):
        wait_for(lambda: len(service.requests) > 4)
        for broken in (
            (500, "oops", {}),
            (200, "{", {"Metadata-Flavor": "Google"}),
            (200, "", {"Content-Length": "9"}),
        ):
            before = len(service.requests)
            service.answer = lambda *_, broken=broken: broken
            wait_for(lambda before=before: len(service.requests) > before + 2)
        assert not stop()
        service.answer = answer
        service.state |= state()
        wait_for(stop)
    assert reason in str(stop.reason)


def test_where_there_is_no_cloud_the_thread_ends() -> None:
    """Other servers at that address are each asked once, and then left alone."""
    stop = StopFlag()
    with serve(nothing) as service, watch_notices(stop, "auto", bases=dict.fromkeys(NOTICES, service.url)):
        wait_for(lambda: not threads("notices"))
        assert len(service.requests) == 3
    assert not stop()


def test_silence_is_given_up_within_three_seconds(silent: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection does not hold the job up and ends soon, where packets just disappear."""
    assert len(CLOUDS) * TIMEOUT_SECONDS <= 3
    with watch_notices(StopFlag(), "auto", bases=dict.fromkeys(NOTICES, silent.url)):
        wait_for(silent.connections)
        monkeypatch.setattr(metadata_services, "TIMEOUT_SECONDS", 0.1)  # of the other two
        silent.close()
        wait_for(lambda: not threads("notices"))
    assert silent.connections() == 3


def test_leaving_is_prompt(silent: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the job waits for no poll, and for one request that hangs at most."""
    with serve(metadata_server.gcp) as service:
        with watch_notices(StopFlag(), "gcp", bases={"gcp": service.url}, poll_seconds=3600):
            wait_for(lambda: service.requests)
        wait_for(lambda: not threads("notices"))
    monkeypatch.setattr(spot_notices, "_JOIN_SECONDS", 0.1)
    with watch_notices(StopFlag(), "auto", bases=dict.fromkeys(NOTICES, silent.url)):
        wait_for(silent.connections)
    silent.close()
    wait_for(lambda: not threads("notices"))
    assert silent.connections() == 1


def test_off_is_off() -> None:
    """With `off` no polling thread is started."""
    with watch_notices(StopFlag(), "off"):
        assert not threads("notices")


def test_a_named_service_that_does_not_answer_is_told_once() -> None:
    """Who asks for EC2's notices and cannot get them should know, but not every five seconds."""
    with capture_logs() as lines, serve(nothing) as service:
        with watch_notices(StopFlag(), "ec2", bases={"ec2": service.url}, poll_seconds=POLL):
            wait_for(lambda: len(service.requests) > 4)
        assert len(service.requests) > 4
    told = [line for line in lines if line["log_level"] == "warning"]
    assert len(told) == 1
    assert "hop limit" in told[0]["fix"]
