"""The clouds' metadata services, each with an imitation that is as strict as the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from job.preemption import metadata_services
from job.preemption.metadata_services import CLOUDS, FAILURES, Azure, Cloud, Ec2, Gcp, ask
from tests import metadata_server
from tests.metadata_server import MACHINE, NOT_FOUND, Imitation, Reply, instance_action, scheduled_event, serve

ACTION, REBALANCE = "spot/instance-action", "events/recommendations/rebalance"


@pytest.fixture(autouse=True)
def _answers_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this machine is."""
    monkeypatch.setattr(metadata_services, "TIMEOUT_SECONDS", 60.0)


@pytest.fixture
def ec2() -> Iterator[Imitation]:
    """Amazon's service."""
    with serve(metadata_server.ec2) as service:
        yield service


@pytest.fixture
def gcp() -> Iterator[Imitation]:
    """Google's service."""
    with serve(metadata_server.gcp) as service:
        yield service


@pytest.fixture
def azure() -> Iterator[Imitation]:
    """Microsoft's service."""
    with serve(metadata_server.azure) as service:
        yield service


class TestEc2:
    """IMDSv2."""

    def test_the_imitation_insists_on_tokens(self, ec2: Imitation) -> None:
        """The real service refuses a token without its lifetime, and everything else without a token."""
        assert ask(ec2.url, "/latest/api/token", {}, "PUT").status == 400
        assert ask(ec2.url, f"/latest/meta-data/{ACTION}", {}).status == 401

    def test_absence_is_no_notice(self, ec2: Imitation) -> None:
        """Without an interruption the service answers 404, which means that all is well."""
        assert Ec2(ec2.url).look() is None

    @pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
    def test_a_notice_comes_with_its_time(self, ec2: Imitation, action: str) -> None:
        """Whatever is going to happen, the job has until then."""
        ec2.state[ACTION] = instance_action(action, seconds=100)
        notice = Ec2(ec2.url).look()
        assert notice is not None
        assert action in notice.reason
        assert 60 <= notice.seconds <= 101

    def test_an_expired_token_is_renewed(self, ec2: Imitation) -> None:
        """A job outlives the six hours of a token; one token serves until the service refuses it."""
        cloud = Ec2(ec2.url)
        assert (cloud.look(), cloud.look()) == (None, None)
        assert ec2.requests.count("PUT /latest/api/token") == 1
        ec2.state |= {"token": "another", ACTION: instance_action()}
        assert cloud.look() is not None
        assert ec2.requests.count("PUT /latest/api/token") == 2

    def test_rebalancing_is_a_warning_only(self, ec2: Imitation) -> None:
        """A recommendation says that the risk is raised; it is told once and the job goes on."""
        ec2.state[REBALANCE] = '{"noticeTime": "2026-11-23T08:22:00Z"}'
        cloud = Ec2(ec2.url)
        with capture_logs() as lines:
            assert (cloud.look(), cloud.look()) == (None, None)
        assert [line["log_level"] for line in lines] == ["warning"]
        assert "rebalance" in lines[0]["event"]

    def test_the_services_own_clock_counts(self) -> None:
        """A machine whose clock is an hour slow still knows how long it has."""

        def slow(service: Imitation, method: str, path: str, headers: dict[str, str]) -> Reply:
            status, text, more = metadata_server.ec2(service, method, path, headers)
            return (
                status,
                text,
                more | {"Date": format_datetime(datetime(2020, 1, 1, 12, 0, 0, tzinfo=UTC), usegmt=True)},
            )

        with serve(slow) as service:
            service.state[ACTION] = '{"action": "stop", "time": "2020-01-01T12:01:30Z"}'
            notice = Ec2(service.url).look()
        assert notice is not None
        assert notice.seconds == 90

    @pytest.mark.parametrize(
        ("time", "seconds"), [("soon", 120), (None, 120), ("1999-01-01T00:00:00Z", 0), ("2999-01-01T00:00:00Z", 120)]
    )
    def test_an_odd_time_does_not_hide_the_notice(self, ec2: Imitation, time: str | None, seconds: float) -> None:
        """The machine goes, whatever the time says; it is never believed to be later than EC2 promises."""
        ec2.state[ACTION] = json.dumps({"action": "terminate", "time": time})
        notice = Ec2(ec2.url).look()
        assert notice is not None
        assert notice.seconds == seconds

    @pytest.mark.parametrize("token", ["a\r\nX-Evil: 1", "", "é", "x" * 2000])
    def test_a_hostile_token_is_refused(self, token: str) -> None:
        """What cannot be a token never gets into a header."""

        def hostile(service: Imitation, _method: str, _path: str, _headers: dict[str, str]) -> Reply:
            return (200, token, {})

        with serve(hostile) as service:
            with pytest.raises(ValueError, match="token"):
                Ec2(service.url).look()
            assert service.requests == ["PUT /latest/api/token"]


class TestGcp:
    """Google's metadata server."""

    def test_all_is_well(self, gcp: Imitation) -> None:
        """FALSE and NONE are no notice."""
        cloud = Gcp(gcp.url)
        assert (cloud.present(), cloud.look()) == (True, None)

    def test_preemption(self, gcp: Imitation) -> None:
        """TRUE leaves thirty seconds."""
        gcp.state["preempted"] = "TRUE"
        notice = Gcp(gcp.url).look()
        assert notice is not None
        assert notice.seconds == 30

    def test_answers_without_googles_header_are_not_googles(self) -> None:
        """A router that answers everything with TRUE does not stop the job."""

        def router(_service: Imitation, _method: str, _path: str, _headers: dict[str, str]) -> Reply:
            return (200, "TRUE", {})

        with serve(router) as service:
            cloud = Gcp(service.url)
            assert not cloud.present()
            with pytest.raises(ValueError, match="does not tell"):
                cloud.look()

    def test_a_server_that_hides_preemptions_says_so(self) -> None:
        """GKE's server for workload identity has the machine's id, and 404 for a preemption: no notice ever comes."""

        def gke(service: Imitation, method: str, path: str, headers: dict[str, str]) -> Reply:
            return metadata_server.gcp(service, method, path, headers) if path.endswith("/id") else NOT_FOUND

        with serve(gke) as service:
            cloud = Gcp(service.url)
            assert cloud.present()
            with pytest.raises(ValueError, match="only SIGTERM"):
                cloud.look()

    def test_maintenance_that_ends_the_machine(self, gcp: Imitation) -> None:
        """A machine with a GPU is not migrated but ended: the job stops when that is announced."""
        cloud = Gcp(gcp.url)
        assert cloud.look() is None
        gcp.state["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        notice = cloud.look()
        assert notice is not None
        assert notice.seconds == 60

    def test_maintenance_announced_before_the_start(self, gcp: Imitation) -> None:
        """An attempt restarted on the same machine does not stop for the same announcement again and again."""
        gcp.state["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        cloud = Gcp(gcp.url)
        with capture_logs() as lines:
            assert (cloud.look(), cloud.look()) == (None, None)
        assert [line["log_level"] for line in lines] == ["warning"]
        gcp.state["preempted"] = "TRUE"
        assert cloud.look() is not None

    def test_migration_is_a_warning_only(self, gcp: Imitation) -> None:
        """A machine that is moved lives on."""
        cloud = Gcp(gcp.url)
        assert cloud.look() is None
        gcp.state["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        with capture_logs() as lines:
            assert (cloud.look(), cloud.look()) == (None, None)
        assert [line["maintenance_event"] for line in lines] == ["MIGRATE_ON_HOST_MAINTENANCE"]


class TestAzure:
    """Scheduled events."""

    def test_all_is_well(self, azure: Imitation) -> None:
        """An empty list is no notice."""
        cloud = Azure(azure.url)
        assert (cloud.present(), cloud.look()) == (True, None)

    def test_preemption(self, azure: Imitation) -> None:
        """The job has until the event may begin; names are compared as Azure does, without case."""
        azure.state["events"] = scheduled_event(resource=MACHINE.upper(), seconds=20)
        notice = Azure(azure.url).look()
        assert notice is not None
        assert 1 <= notice.seconds <= 21

    @pytest.mark.parametrize(
        "event",
        [scheduled_event(resource="aks-gpu-vmss_1"), scheduled_event(kind="Freeze"), scheduled_event(kind="Reboot")],
        ids=["another machine", "Freeze", "Reboot"],  # the events' own texts hold the time
    )
    def test_other_events_are_none_of_our_business(self, azure: Imitation, event: str) -> None:
        """The list is the whole group's: another machine's preemption does not stop this one."""
        azure.state["events"] = event
        assert Azure(azure.url).look() is None

    def test_a_started_event_has_no_time(self, azure: Imitation) -> None:
        """Once it has begun `NotBefore` is empty; the notice holds all the same."""
        azure.state["events"] = json.dumps([{"EventType": "Preempt", "Resources": [MACHINE], "NotBefore": ""}])
        notice = Azure(azure.url).look()
        assert notice is not None
        assert notice.seconds == 30

    def test_events_count_only_for_a_machine_that_knows_its_name(self, azure: Imitation) -> None:
        """Without its own name the machine cannot tell whom an event means; it asks again at the next look."""
        azure.state |= {"name": "", "events": scheduled_event(resource="")}
        cloud = Azure(azure.url)
        with pytest.raises(ValueError, match="name"):
            cloud.look()
        azure.state |= {"name": MACHINE, "events": scheduled_event()}
        assert cloud.look() is not None


GARBAGE = [
    *(
        "",
        "null",
        "[]",
        "{}",
        "3",
        '"x"',
        "{" * 10,
        "[" * 60_000,
        "1" * 60_000,
        "<html>it works</html>",
        "\0\udcff\udcfe",
    ),
    *('{"action": []}', '{"action": {}}', '{"action": "dance"}', '{"Events": {}}', '{"Events": [1, null, []]}'),
    *('{"Events": [{"EventType": "Preempt"}]}', '{"Events": [{"EventType": "Preempt", "Resources": [1, {}, null]}]}'),
]


@pytest.fixture(scope="module")
def anything() -> Iterator[Imitation]:
    """A service that gives a token, a name and Google's header, and to everything else the answer in `state`."""

    def answer(service: Imitation, _method: str, path: str, _headers: dict[str, str]) -> Reply:
        known = {"/latest/api/token": "t", "/metadata/instance/compute/name": MACHINE}.get(path.partition("?")[0])
        return (200, service.state["text"] if known is None else known, {"Metadata-Flavor": "Google"})

    with serve(answer) as service:
        yield service


def look(cloud: Cloud) -> object:
    """What a poll makes of a service."""
    try:
        return cloud.look()
    except FAILURES:
        return None


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_no_notice(anything: Imitation, name: str, text: str) -> None:
    """No answer but the documented one stops the job, and none raises what the poll does not expect."""
    anything.state["text"] = text
    cloud = CLOUDS[name](anything.url)
    assert (look(cloud), look(cloud)) == (None, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["action", "time", "Events", "Resources"]), inner)
    ),
    max_leaves=8,
)
DATES = st.text(max_size=12) | st.from_regex(
    r"(Mon, )?[0-9]{1,5} Jan [0-9]{1,6} [0-9]{2}:[0-9]{2}:[0-9]{2} [+-][0-9]{4,14}"
)


@pytest.mark.parametrize("name", CLOUDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=JSON, time=DATES, date=DATES)
def test_hostile_answers_are_survived(anything: Imitation, name: str, found: object, time: str, date: str) -> None:
    """Documents of any shape and times of any kind end in a notice within the cloud's bounds, or in none."""
    for document in (
        found,
        {"action": "stop", "time": time},
        {"Events": [found, {"EventType": "Preempt", "Resources": [MACHINE], "NotBefore": time}]},
    ):
        anything.state["text"] = json.dumps(document)
        notice = look(CLOUDS[name](anything.url))
        assert notice is None or 0 <= vars(notice)["seconds"] <= 120


def test_proxies_and_redirects_are_not_followed(gcp: Imitation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address means this machine: a proxy's or another host's answer would be another machine's."""
    with serve(lambda *_: (302, "", {"Location": f"{gcp.url}/computeMetadata/v1/instance/preempted"})) as elsewhere:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, elsewhere.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert Gcp(gcp.url).present()
        assert elsewhere.requests == []
        assert not Gcp(elsewhere.url).present()
    assert len(gcp.requests) == 1
