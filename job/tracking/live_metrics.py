"""Figures of a run for monitoring, while it runs: pushed by OTLP, scraped by Prometheus, or reported to the cluster.

`trackers` records every step of an experiment. This shows where a run is now: each exporter reads the newest figures
when it sends them, so a step costs nothing. An exporter that fails, hangs or cannot start costs the run a warning,
never an error, and at its end at most `FLUSH_SECONDS`.

To add a figure: an entry in `GAUGES`. OTLP and Prometheus take it up; `infra/kubernetes/grafana-dashboard.json` may
show it. Reports to the cluster are in `kubernetes_progress`.
To add an exporter: a class with `close` and an entry in `EXPORTERS` here, and its condition in
`settings.load.exporters`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

from job import __version__, log
from job.records import RunFigures, TrainingProgress
from job.tracking.kubernetes_progress import POD_ANNOTATION, TRAIN_JOB, Destination, Report, Sender

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.sdk.metrics.export import MetricExportResult
    from prometheus_client import Metric

FLUSH_SECONDS = 2.0
"""How long all exporters together may take to send the last figures."""
SERVICE = "qlora-job"
"""OpenTelemetry's `service.name`, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES has another."""

Labels = Mapping[str, str]
Samples = Iterable[tuple[Labels, float]]


def _of_training(read: Callable[[TrainingProgress], float | None]) -> Callable[[RunFigures], Samples]:
    """A figure of the last step; before the first one of the attempt there is none."""

    def samples(figures: RunFigures) -> Samples:
        value = None if figures.training is None else read(figures.training)
        return [] if value is None else [({}, value)]

    return samples


@dataclass(frozen=True)
class Gauge:
    """A figure that is exported; every sample also has the label `run`, the run's id.

    Attributes:
        name: In OpenTelemetry.
        unit: By UCUM, as OpenTelemetry has it.
        prometheus: The name in Prometheus: what its own receiver of OTLP makes of `name` and `unit`, so that a
            dashboard works with both ways.
        description: What it is.
        samples: (labels, value) of each sample; none while it is not known.
    """

    name: str
    unit: str
    prometheus: str
    description: str
    samples: Callable[[RunFigures], Samples]


GAUGES = (
    Gauge(
        "qlora_job.attempt",
        "",
        "qlora_job_attempt",
        "Number of the attempt, from 1; each restart of the run is one",
        lambda figures: [({}, figures.attempt)],
    ),
    Gauge(
        "qlora_job.stage",
        "",
        "qlora_job_stage",
        "1 for the current stage, 0 for the others; between two stages, such as while the model is loaded, all 0",
        lambda figures: [({"stage": name}, float(name == figures.stage)) for name in figures.stages],
    ),
    Gauge(
        "qlora_job.attempt.goodput",
        "1",
        "qlora_job_attempt_goodput_ratio",
        "Share of this attempt's time in optimizer steps that no earlier attempt had done",
        lambda figures: [({}, figures.goodput)],
    ),
    Gauge(
        "qlora_job.train.step",
        "",
        "qlora_job_train_step",
        "Last optimizer step",
        _of_training(lambda training: training.step),
    ),
    Gauge(
        "qlora_job.train.planned_steps",
        "",
        "qlora_job_train_planned_steps",
        "Number of optimizer steps; early stopping may end training before the last one",
        _of_training(lambda training: training.total_steps),
    ),
    Gauge(
        "qlora_job.train.loss",
        "",
        "qlora_job_train_loss",
        "Loss of the last step, in nats per target token",
        _of_training(lambda training: training.loss),
    ),
    Gauge(
        "qlora_job.train.target_tokens",
        "{token}/s",
        "qlora_job_train_target_tokens_per_second",
        "Target tokens per second of the last step",
        _of_training(lambda training: training.tokens_per_second),
    ),
    Gauge(
        "qlora_job.train.remaining",
        "s",
        "qlora_job_train_remaining_seconds",
        "Estimated time until the last optimizer step; the stages after training are not counted",
        _of_training(lambda training: training.remaining_seconds),
    ),
)


class LiveMetrics:
    """The exporters of a run, which have nothing to send until `figures` is set."""

    def __init__(self, run: str) -> None:
        self.figures: Callable[[], RunFigures | None] = lambda: None
        self.complete = False
        """Whether the results of the run's last stage are published."""
        self._run = run

    def observe(self, gauge: Gauge) -> list[tuple[Labels, float]]:
        """The samples of a gauge as of now, with all labels."""
        figures = self.figures()
        if figures is None:
            return []
        return [({"run": self._run, **labels}, float(value)) for labels, value in gauge.samples(figures)]


class _Exporter(Protocol):
    """Sends figures, or answers requests for them."""

    def close(self) -> None:
        """Sends the last figures, and ends; called in a thread that is waited for at most `FLUSH_SECONDS`."""


class _Otlp:
    """Pushes to a collector by OTLP over HTTP. Endpoint, headers, timeouts and interval are the SDK's own variables."""

    def __init__(self, live: LiveMetrics, *, protocol: str) -> None:
        if protocol != "http/protobuf":
            raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}; only http/protobuf is supported")
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.metrics import Observation
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource

        # It logs every failure, with tracebacks; of several in a row the job warns once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)

        context = copy_context()  # the warning has the fields of the run's log lines; the reader's thread has none

        class Exporter(OTLPMetricExporter):
            unsent = warned = closing = False

            def export(self, *args: Any, **options: Any) -> MetricExportResult:
                self.unsent = True
                result = super().export(*args, **options)
                if result is MetricExportResult.SUCCESS:
                    self.unsent = self.warned = False
                elif not self.warned and not self.closing:
                    self.warned = True
                    what = "the collector does not accept the metrics; the run continues, and tries again"
                    context.run(_warn, "otlp", what)
                return result

        def callback(gauge: Gauge) -> Callable[[CallbackOptions], Iterable[Observation]]:
            return lambda _options: [Observation(value, dict(labels)) for labels, value in live.observe(gauge)]

        attributes = Resource.create().attributes  # reads OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME
        named = not str(attributes[SERVICE_NAME]).startswith("unknown_service")
        own_attributes = dict(attributes) if named else {**attributes, SERVICE_NAME: SERVICE}
        self._live, self._exporter = live, Exporter()
        reader = PeriodicExportingMetricReader(self._exporter)
        self._provider = MeterProvider([reader], Resource(own_attributes), shutdown_on_exit=False)
        meter = self._provider.get_meter("qlora-job", __version__)
        for gauge in GAUGES:
            meter.create_observable_gauge(gauge.name, [callback(gauge)], unit=gauge.unit, description=gauge.description)

    def close(self) -> None:
        self._exporter.closing = True
        with suppress(Exception):
            # The last figures count as unsent until they are sent: that may not have begun when the time is over.
            self._exporter.unsent = self._live.figures() is not None
        with suppress(Exception):  # raised where the time is over, or the reader fails: the figures are not sent then
            self._provider.shutdown(timeout_millis=1000 * 0.8 * FLUSH_SECONDS)
        if self._exporter.unsent and not self._exporter.warned:
            _warn("otlp", "the collector did not accept the last metrics; the run does not wait for it")


class _Prometheus:
    """Answers at `/metrics` of a port, on all addresses of the machine, in Prometheus' text format."""

    def __init__(self, live: LiveMetrics, *, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.core import GaugeMetricFamily

        class Figures:
            def collect(self) -> Iterator[Metric]:
                for gauge in GAUGES:
                    family = GaugeMetricFamily(gauge.prometheus, gauge.description)
                    for labels, value in live.observe(gauge):
                        family.add_sample(gauge.prometheus, dict(labels), value)
                    yield family

        registry = CollectorRegistry()
        registry.register(Figures())
        try:
            self.server, self._thread = start_http_server(port, "::", registry)
        except OSError:  # a machine without IPv6; where the port is taken, this fails as well
            self.server, self._thread = start_http_server(port, "0.0.0.0", registry)  # noqa: S104 - it is scraped
        log.get_logger().info("metrics are served for Prometheus", port=self.server.server_port)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Cluster:
    """Tells the cluster how far the run is, for `kubectl get`."""

    def __init__(self, live: LiveMetrics, *, report: Report, **destination: str) -> None:
        def read() -> Any:
            figures = live.figures()
            return None if figures is None else report.content(figures, live.complete)

        self._sender = Sender(Destination(**destination), report, read)

    def close(self) -> None:
        self._sender.close(0.8 * FLUSH_SECONDS)


EXPORTERS: Mapping[str, Callable[..., _Exporter]] = {
    "otlp": _Otlp,
    "prometheus": _Prometheus,
    "train-job": partial(_Cluster, report=TRAIN_JOB),
    "pod-annotation": partial(_Cluster, report=POD_ANNOTATION),
}


@contextmanager
def live_metrics(exporters: Mapping[str, Mapping[str, Any]], run: str) -> Iterator[LiveMetrics]:
    """Context manager: exports what `figures` of the yielded object returns, until the end of the block.

    Args:
        exporters: By exporter (see `EXPORTERS`), its arguments.
        run: The run's id.
    """
    live, started = LiveMetrics(run), list[_Exporter]()
    for name, options in exporters.items():
        try:
            started.append(EXPORTERS[name](live, **options))
        except Exception as error:  # noqa: BLE001 - no exception of an exporter may end the run
            _warn(name, "figures are not exported", why=f"{type(error).__name__}: {error}")
    try:
        yield live
    finally:
        _close(started)


def _close(exporters: Iterable[_Exporter]) -> None:
    """Closes the exporters at the same time; what does not end in time is left to the end of the process."""
    threads = [
        Thread(target=copy_context().run, args=(exporter.close,), name="metrics", daemon=True) for exporter in exporters
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FLUSH_SECONDS / len(threads))


def _warn(exporter: str, message: str, **details: str) -> None:
    log.get_logger().warning(message, exporter=exporter, **details)
