"""Progress reported to Kubeflow Trainer's status server and to the API server: imitations of both, over TLS."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from job.records import RunFigures, TrainingProgress
from job.runs.layout import Stage
from job.settings.load import exporters, load_settings
from job.tracking import kubernetes_progress as module
from job.tracking.live_metrics import live_metrics
from tests.s3_server import Request
from tests.waiting import wait_for

STAGES = tuple(stage.value for stage in Stage)
FIGURES = RunFigures(2, STAGES, "train", 0.75, TrainingProgress(7, 96, 1.25, 1234.5, 61.4))
TRAINER = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/qlora/trainjobs/a-run/status"
POD = "/api/v1/namespaces/qlora/pods/a-pod"


@pytest.fixture(autouse=True)
def _reports_are_taken_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy this machine is."""
    monkeypatch.setattr("job.tracking.live_metrics.FLUSH_SECONDS", 60.0)
    monkeypatch.setattr(module, "_REQUEST_SECONDS", 60.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate of 127.0.0.1, which is its own authority, its key, and a token."""
    folder = tmp_path_factory.mktemp("files")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server")])
    now = dt.datetime.now(dt.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - dt.timedelta(1), now + dt.timedelta(1))
    builder = builder.add_extension(address, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key").write_bytes(key.private_bytes(*plain))
    (folder / "token").write_text("a-token\n", encoding="ascii")
    return folder


class Cluster:
    """Answers as Trainer's status server and the API server do, and keeps what they would keep."""

    def __init__(self) -> None:
        self.statuses: list[dict[str, Any]] = []
        self.annotations: dict[str, str] = {}
        self.patches = 0
        self.refuses = 0

    def answer(self, asked: Request) -> None:
        """Checks the request as the servers do."""
        if self.refuses or asked.headers["Authorization"] != "Bearer a-token":
            asked.answer(self.refuses or 403)
        elif (asked.command, asked.path) == ("POST", TRAINER):
            status = json.loads(asked.content)["trainerStatus"]
            self.statuses.append(status)  # before the answer, which ends the wait of the one who asks
            asked.answer(200 if self._valid(status) else 422, asked.content)
        elif (asked.command, asked.path) == ("PATCH", POD):
            assert asked.headers["Content-Type"] == "application/merge-patch+json"
            self.annotations |= json.loads(asked.content)["metadata"]["annotations"]
            self.patches += 1
            asked.answer(200)
        else:
            asked.answer(404)

    @staticmethod
    def _valid(status: dict[str, Any]) -> bool:
        """By the schema of trainer.kubeflow.org/v1alpha1: whole numbers, strings that are not empty, RFC 3339."""
        numbers = [status.get("progressPercentage", 0), status.get("estimatedRemainingSeconds", 0)]
        metrics = [text for metric in status["metrics"] for text in (metric["name"], metric["value"])]
        whole = all(type(number) is int and number >= 0 for number in numbers) and numbers[0] <= 100
        dt.datetime.strptime(status["lastUpdatedTime"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=dt.UTC)
        return whole and all(isinstance(text, str) and text for text in metrics)


@contextmanager
def serving(cluster: Cluster, files: Path) -> Iterator[str]:
    """The servers' address, over TLS."""

    class Handler(Request):
        def do_POST(self) -> None:  # noqa: N802 - http.server names it
            self.content = self.rfile.read(int(self.headers["Content-Length"]))
            cluster.answer(self)

        do_PATCH = do_POST  # noqa: N815

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files / "ca.crt", files / "key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def asked(url: str, files: Path) -> dict[str, dict[str, str]]:
    """Both exporters, with the servers of a test."""
    there = {"token": str(files / "token"), "authority": str(files / "ca.crt")}
    return {"train-job": {"url": url + TRAINER, **there}, "pod-annotation": {"url": url + POD, **there}}


def reported(figures: RunFigures | None, files: Path, *, complete: bool = False) -> tuple[Cluster, list[Any]]:
    """What the cluster knows after a run that ends with these figures, and the warnings."""
    cluster = Cluster()
    with serving(cluster, files) as url, capture_logs() as lines, live_metrics(asked(url, files), "a-run") as live:
        live.figures = lambda: figures
        live.complete = complete
    return cluster, [line for line in lines if line["log_level"] == "warning"]


def test_the_cluster_is_told_the_last_step(files: Path) -> None:
    """Percentage and time left of training, figures as strings; and one line for `kubectl get pods`."""
    cluster, warnings = reported(FIGURES, files)
    assert warnings == []
    (status,) = cluster.statuses
    assert (status["progressPercentage"], status["estimatedRemainingSeconds"]) == (7, 62)
    assert {metric["name"]: metric["value"] for metric in status["metrics"]} == {
        "attempt": "2",
        "stage": "train",
        "step": "7",
        "total_steps": "96",
        "loss": "1.25",
        "tokens_per_second": "1234.5",
    }
    assert cluster.annotations == {"qlora-job/progress": "train 7/96, loss 1.2500, 2 min left"}


LAST = TrainingProgress(96, 96, None, None, 0.0)


@pytest.mark.parametrize(
    ("figures", "complete", "percentage", "remaining", "words"),
    [
        (replace(FIGURES, training=None, stage="pull"), False, None, None, "pull"),
        (replace(FIGURES, training=None, stage=None), False, None, None, "between two stages"),
        (replace(FIGURES, training=LAST, stage="evaluate-adapter"), False, 99, None, "evaluate-adapter 96/96"),
        (replace(FIGURES, training=LAST, stage=None), True, 100, 0, "complete"),
        (replace(FIGURES, training=None, stage=None), True, 100, 0, "complete"),
    ],
)
def test_only_a_complete_run_has_100_percent(
    files: Path, figures: RunFigures, *, complete: bool, percentage: int | None, remaining: int | None, words: str
) -> None:
    """What is not known is left out, and a run that was stopped after its last step is not complete."""
    cluster, warnings = reported(figures, files, complete=complete)
    assert warnings == []
    (status,) = cluster.statuses
    assert (status.get("progressPercentage"), status.get("estimatedRemainingSeconds")) == (percentage, remaining)
    assert cluster.annotations == {module.ANNOTATION: words}


def test_it_is_told_while_the_run_goes_on(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TrainJob again and again, as a sign of life; a pod only when something has changed. A new token is read."""
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.05)
    cluster = Cluster()
    renewed = files.parent / "renewed"
    renewed.mkdir()
    for name in ("ca.crt", "key", "token"):
        (renewed / name).write_bytes((files / name).read_bytes())
    (renewed / "token").write_text("an-old-token", encoding="ascii")
    with serving(cluster, renewed) as url, capture_logs() as lines, live_metrics(asked(url, renewed), "a-run") as live:
        live.figures = lambda: FIGURES
        wait_for(lambda: len([line for line in lines if line["log_level"] == "warning"]) >= 2)
        (renewed / "token").write_text("a-token", encoding="ascii")
        wait_for(lambda: len(cluster.statuses) >= 3)
    assert {line["why"] for line in lines} == {"the server answered 403"}
    assert len(lines) == 2  # one for each, however often it failed
    assert cluster.patches == 1


@pytest.mark.parametrize(
    "what", ["refused", "gone", "another authority", "no token", "two lines", "plain http", "no pod"]
)
def test_a_server_that_fails_costs_a_warning(files: Path, tmp_path: Path, what: str) -> None:
    """And nothing is sent to a server whose certificate is not the cluster's, or without TLS."""
    cluster = Cluster()
    cluster.refuses = 404 if what == "refused" else 0
    with serving(cluster, files) as url, capture_logs() as lines:
        (tmp_path / "token").write_text("a-token", encoding="ascii")
        (tmp_path / "ca.crt").write_bytes((files / "ca.crt").read_bytes())
        if what == "another authority":
            (tmp_path / "ca.crt").write_text("", encoding="ascii")
        if what == "no token":
            (tmp_path / "token").unlink()
        if what == "two lines":
            (tmp_path / "token").write_text("a-token\na-token", encoding="ascii")
        address = {"gone": "https://127.0.0.1:1", "plain http": url.replace("https", "http"), "no pod": ""}.get(
            what, url
        )
        destination = {
            "url": address and address + TRAINER,
            "token": f"{tmp_path}/token",
            "authority": f"{tmp_path}/ca.crt",
        }
        with live_metrics({"train-job": destination}, "a-run") as live:
            live.figures = lambda: FIGURES
    (line,) = lines
    why = {
        "refused": "the server answered 404",
        "gone": "refused",
        "another authority": "SSLError",
        "no token": "FileNotFoundError",
        "two lines": "several lines",
        "plain http": "unencrypted",
        "no pod": "KUBERNETES_POD_NAME",
    }
    assert why[what] in line["why"]
    assert "a-token" not in repr(line)
    assert cluster.statuses == []


def test_figures_that_cannot_be_told_cost_a_warning(files: Path) -> None:
    """Such as an endless time: the next figures are told again."""
    endless = replace(FIGURES, training=TrainingProgress(7, 96, 1.25, 1234.5, float("inf")))
    cluster, lines = reported(endless, files)
    assert {line["exporter"]: line["why"].partition(":")[0] for line in lines} == {
        "train-job": "OverflowError",
        "pod-annotation": "OverflowError",
    }
    assert cluster.statuses == []


def test_who_is_told(tmp_path: Path) -> None:
    """A TrainJob by the variables of Trainer's controller; a pod where the setting asks for it."""
    trainer = {
        "KUBEFLOW_TRAINER_SERVER_URL": f"https://trainer{TRAINER}",
        "KUBEFLOW_TRAINER_SERVER_CA_CERT": "/ca",
        "KUBEFLOW_TRAINER_SERVER_TOKEN": "/token",
    }
    settings = load_settings([], {})
    expected = {"url": f"https://trainer{TRAINER}", "token": "/token", "authority": "/ca"}
    assert exporters(settings, trainer) == {"train-job": expected}
    pod = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    pod |= {"KUBERNETES_POD_NAME": "a-pod", "KUBERNETES_POD_NAMESPACE": "qlora"}
    assert exporters(settings, pod) == {}
    settings = load_settings([], {"JOB_METRICS__POD_ANNOTATION": "true"})
    account = "/var/run/secrets/kubernetes.io/serviceaccount"
    expected = {"url": f"https://[fd00::1]:6443{POD}", "token": f"{account}/token", "authority": f"{account}/ca.crt"}
    assert exporters(settings, pod) == {"pod-annotation": expected}
    assert exporters(settings, {})["pod-annotation"]["url"] == ""
