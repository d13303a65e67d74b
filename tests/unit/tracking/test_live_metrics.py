"""Live metrics: what collectors and Prometheus receive, read by their own parsers; neither disturbs a run."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any
from urllib import request

import pytest
from opentelemetry.exporter.otlp.common import http as exporter_module
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from job.preemption.stop_flag import StopFlag
from job.records import RunFigures, TrainingProgress
from job.runs.fault_injection import arm
from job.runs.layout import Stage
from job.runs.open_attempt import open_attempt
from job.settings.load import exporters, load_settings, secrets
from job.storage.local import LocalStore
from job.tracking import live_metrics as module
from job.tracking.live_metrics import GAUGES, LiveMetrics, live_metrics
from tests.forked import free_port
from tests.s3_server import Request, server
from tests.waiting import threads, wait_for

# A reader that a test gives up still retries in the background. With the global generator it would fail any Hypothesis
# test that runs meanwhile in this process: Hypothesis does not allow that generator to change while it draws.
exporter_module.random = random.Random(0)  # type: ignore[assignment]
STAGES = tuple(stage.value for stage in Stage)
FIGURES = RunFigures(2, STAGES, "train", 0.75, TrainingProgress(7, 96, 1.25, 1234.5, 61.0))
OTLP = {"otlp": {"protocol": "http/protobuf"}}


def values(named: dict[tuple[str, ...], float], prefix: str = "qlora_job_") -> dict[str, float]:
    """Value by name, and by the name of the stage, of what was exported."""
    return {" ".join(key).removeprefix(prefix): value for key, value in named.items()}


EXPECTED = {
    "attempt": 2.0,
    **{f"stage {name}": float(name == "train") for name in STAGES},
    "attempt_goodput_ratio": 0.75,
    "train_step": 7.0,
    "train_planned_steps": 96.0,
    "train_loss": 1.25,
    "train_target_tokens_per_second": 1234.5,
    "train_remaining_seconds": 61.0,
}


class Collector:
    """An imitation of an OpenTelemetry collector: parses what is posted, and answers as the test says."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.answers = Event()
        self.answers.set()
        self.received: list[ExportMetricsServiceRequest] = []
        self.headers: dict[str, str] = {}

    def answer(self, asked: Request) -> None:
        """Takes a request."""
        assert asked.path == "/v1/metrics"
        assert asked.headers["Content-Type"] == "application/x-protobuf"
        self.headers = dict(asked.headers)
        self.received.append(ExportMetricsServiceRequest.FromString(asked.content))
        self.answers.wait(60)
        asked.answer(self.status)

    def samples(self) -> dict[tuple[str, ...], float]:
        """(name, stage if there is one) -> value, of the newest request."""
        (resource,) = self.received[-1].resource_metrics
        (scope,) = resource.scope_metrics
        found = {}
        for metric in scope.metrics:
            for point in metric.gauge.data_points:
                labels = {pair.key: pair.value.string_value for pair in point.attributes}
                assert labels.pop("run") == "a-run"
                found[(metric.name, *labels.values())] = point.as_double
        return found

    def resource(self) -> dict[str, str]:
        """What the newest request says of the service."""
        (resource,) = self.received[-1].resource_metrics
        return {pair.key: pair.value.string_value for pair in resource.resource.attributes}


@pytest.fixture(autouse=True)
def _last_figures_are_taken_in_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However busy this machine is. What a test does not wait for ends before the next one, in which it would warn."""
    monkeypatch.setattr(module, "FLUSH_SECONDS", 60.0)
    yield
    wait_for(lambda: not threads("metrics"))


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets OpenTelemetry's variables for the SDK, and no others of its."""

    def put(**given: str) -> None:
        for name, value in given.items():
            monkeypatch.setenv(f"OTEL_{name}", value)

    return put


@pytest.fixture
def collector(variables: Callable[..., None]) -> Iterator[Collector]:
    """A collector that the SDK knows of."""
    found = Collector()
    with server(found.answer) as url:
        variables(EXPORTER_OTLP_ENDPOINT=url)
        yield found


def test_a_collector_gets_every_figure(collector: Collector, variables: Callable[..., None]) -> None:
    """At the end of a run the last figures are sent, with names, values and units, the run's id, and the headers."""
    variables(EXPORTER_OTLP_HEADERS="api-key=of-the-user")
    with live_metrics(OTLP, "a-run") as live:
        live.figures = lambda: FIGURES
    by_name = {gauge.name: gauge.prometheus for gauge in GAUGES}
    assert values({(by_name[name], *rest): value for (name, *rest), value in collector.samples().items()}) == EXPECTED
    assert collector.headers["api-key"] == "of-the-user"
    assert collector.resource()["service.name"] == "qlora-job"
    sent = {
        m.name: (m.unit, m.description) for m in collector.received[-1].resource_metrics[0].scope_metrics[0].metrics
    }
    assert sent == {gauge.name: (gauge.unit, gauge.description) for gauge in GAUGES}


def test_figures_are_pushed_while_the_run_goes_on(collector: Collector, variables: Callable[..., None]) -> None:
    """At the interval of the SDK's own variable; before the attempt begins there is nothing to send."""
    variables(METRIC_EXPORT_INTERVAL="50", RESOURCE_ATTRIBUTES="service.name=mine,team=search")
    with live_metrics(OTLP, "a-run") as live:
        time.sleep(0.2)
        assert not [m for r in collector.received for m in r.resource_metrics]
        live.figures = lambda: FIGURES
        wait_for(lambda: any(r.resource_metrics for r in collector.received))
    assert collector.resource()["service.name"] == "mine"
    assert collector.resource()["team"] == "search"


def scraped(port: int) -> dict[tuple[str, ...], float]:
    """(name, stage if there is one) -> value, as Prometheus' own parser reads the endpoint."""
    with request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert [(f.name, f.type, f.documentation) for f in families] == [
        (gauge.prometheus, "gauge", gauge.description) for gauge in GAUGES
    ]
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = dict(sample.labels)
        assert labels.pop("run") == 'a "run"'
        found[(sample.name, *labels.values())] = sample.value
    return found


def test_prometheus_scrapes_every_figure() -> None:
    """By the parser of Prometheus' client, at any time: empty before the attempt, and closed after the run."""
    port = free_port()
    for _ in range(2):  # the two stages of sft,dpo are two runs of one process
        with live_metrics({"prometheus": {"port": port}}, 'a "run"') as live:
            assert scraped(port) == {}
            live.figures = lambda: FIGURES
            assert values(scraped(port)) == EXPECTED
        with pytest.raises(OSError, match="refused"):
            scraped(port)


def test_what_is_not_known_is_not_exported() -> None:
    """Before the first step there is no step, and without an estimate no time left: none of them is 0."""
    live = LiveMetrics("r")
    live.figures = lambda: RunFigures(1, STAGES, None, 0.0, None)
    assert [gauge.name for gauge in GAUGES if live.observe(gauge)] == [
        "qlora_job.attempt",
        "qlora_job.stage",
        "qlora_job.attempt.goodput",
    ]
    live.figures = lambda: RunFigures(1, STAGES, "train", 0.0, TrainingProgress(1, 96))
    known = {gauge.name for gauge in GAUGES if live.observe(gauge)}
    assert {"qlora_job.train.loss", "qlora_job.train.remaining"} & known == set()


@pytest.mark.parametrize(
    ("status", "hangs", "seconds"),
    [(200, True, 1.0), (500, False, 1.0), (503, False, 1.0), (400, False, 1.0), (200, True, 0.0)],
)
def test_a_collector_that_fails_or_hangs_costs_a_warning(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, status: int, seconds: float, *, hangs: bool
) -> None:
    """The run ends within a bounded time, and one line says that the last figures are missing: also if all is slow."""
    monkeypatch.setattr(module, "FLUSH_SECONDS", seconds)
    collector.status = status
    if hangs:
        collector.answers.clear()
    with capture_logs() as lines:
        with live_metrics(OTLP, "a-run") as live:
            live.figures = lambda: FIGURES
            began = time.monotonic()
        assert time.monotonic() - began < 30
        wait_for(lambda: not threads("metrics"))
    collector.answers.set()
    (warning,) = [line["event"] for line in lines if line["log_level"] == "warning"]
    assert "did not accept the last metrics" in warning


def test_a_collector_that_recovers_gets_the_figures(collector: Collector, variables: Callable[..., None]) -> None:
    """While it fails the job warns once and tries again; what comes after that arrives, and costs no other line."""
    variables(METRIC_EXPORT_INTERVAL="20")
    collector.status = 400
    with capture_logs() as lines, live_metrics(OTLP, "a-run") as live:
        live.figures = lambda: FIGURES
        wait_for(lambda: len(collector.received) >= 3)
        collector.status = 200
    (warning,) = [line["event"] for line in lines if line["log_level"] == "warning"]
    assert "does not accept the metrics" in warning
    assert len(collector.samples()) == len(EXPECTED)


@pytest.mark.parametrize(
    ("asked", "given", "why"),
    [
        ({"otlp": {"protocol": "grpc"}}, {}, "only http/protobuf"),
        (OTLP, {"EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, None),
        (OTLP, {"EXPORTER_OTLP_ENDPOINT": "x://[", "EXPORTER_OTLP_TIMEOUT": "soon"}, None),
        (OTLP, {"EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "METRIC_EXPORT_INTERVAL": "0"}, "interval"),
    ],
)
def test_variables_that_make_no_sense_cost_a_warning(
    variables: Callable[..., None],
    asked: dict[str, Any],
    given: dict[str, str],
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An unknown protocol, an address that nobody answers at, and wrong numbers end no run."""
    monkeypatch.setattr(module, "FLUSH_SECONDS", 1.0)
    variables(**given)
    with capture_logs() as lines:
        with live_metrics(asked, "a-run") as live:
            live.figures = lambda: FIGURES
        wait_for(lambda: not threads("metrics"))
    (warning,) = [line for line in lines if line["log_level"] == "warning"]
    assert why is None or why in warning.get("why", "")


def test_a_port_that_is_taken_costs_a_warning() -> None:
    """And the other exporters are started."""
    with ExitStack() as stack:
        taken = stack.enter_context(socket.socket(socket.AF_INET6))
        taken.bind(("::", 0))
        taken.listen()
        lines = stack.enter_context(capture_logs())
        stack.enter_context(live_metrics({"prometheus": {"port": taken.getsockname()[1]}}, "a-run"))
    (line,) = lines
    assert (line["exporter"], line["event"]) == ("prometheus", "figures are not exported")


def test_an_attempt_tells_its_figures(tmp_path: Path) -> None:
    """Number, stage, last step, and the share of its time in steps that were not done before."""
    store = LocalStore(tmp_path / "run")
    for number in (1, 2):
        opening = open_attempt(
            store,
            {"train.epochs": 2},
            cache=str(tmp_path),
            stop=StopFlag(),
            report_progress=lambda: None,
            faults=arm((), store),
        )
        with opening as attempt, live_metrics({}, "a-run") as live, attempt.timed(Stage.TRAIN):
            live.figures = attempt.figures
            attempt.training = TrainingProgress(1, 2)
            began = attempt._began = time.monotonic() - 10
            attempt.step_done(1, 5.0)
            before, figures, after = time.monotonic(), attempt.figures(), time.monotonic()
            useful = 5.0 if number == 1 else 0.0  # the second attempt repeats the step
            assert useful / (after - began) <= figures.goodput <= useful / (before - began)
            assert (figures.attempt, figures.stage, figures.training) == (number, "train", attempt.training)


@pytest.mark.parametrize(
    ("environ", "words", "found"),
    [
        ({}, [], {}),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, [], OTLP),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://x"}, [], OTLP),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "True"}, [], {}),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_METRICS_EXPORTER": "none"}, [], {}),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, [], {}),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
            },
            [],
            {"otlp": {"protocol": "grpc"}},
        ),
        ({}, ["--metrics.port=9464"], {"prometheus": {"port": 9464}}),
    ],
)
def test_exporters_are_asked_for(environ: dict[str, str], words: list[str], found: dict[str, Any]) -> None:
    """OTLP by OpenTelemetry's own variables, and not where these turn it off; Prometheus by its port; else none."""
    assert exporters(load_settings(words, environ), environ) == found


def test_headers_are_secret() -> None:
    """What authorizes the job to a collector is not shown in a log."""
    environ = {
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=0123456789abc,Authorization=Bearer%20swordfish1",
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "x-token=of-the-metrics",
    }
    assert {"0123456789abc", "Bearer%20swordfish1", "swordfish1", "of-the-metrics"} <= set(secrets(environ))
