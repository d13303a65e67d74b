"""Reports the progress of a run to Kubernetes, for `kubectl get`: in a TrainJob's status, or as a pod annotation.

The TrainJob's status goes to the server of Kubeflow Trainer (2.2 and newer, with the feature gate TrainJobStatus),
whose controller gives the pods its address, a certificate and a token (docs/proposals/2779-trainjob-progress in
github.com/kubeflow/trainer). The annotation goes to the API server, with a token that the component `progress` mounts.

A server that fails or hangs costs the run a warning. Tokens and certificates are read for each request: both are
renewed while a pod runs.
"""

from __future__ import annotations

import json
import math
import ssl
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPSHandler, Request, build_opener

from job import __version__, log
from job.records import RunFigures
from job.tracking.no_redirects import NoRedirects

ANNOTATION = "qlora-job/progress"
REPORT_SECONDS = 15.0
"""Time between two reports; a step takes about as long. A TrainJob's controller writes each into etcd."""
_REQUEST_SECONDS = 5.0


@dataclass(frozen=True)
class Destination:
    """Where reports go: an https:// address, and files with the token and with the certificates of its authority."""

    url: str
    token: str
    authority: str


@dataclass(frozen=True)
class Report:
    """One kind of report: how it is sent, and what it contains.

    Attributes:
        exporter: Its name in log lines.
        method: HTTP method of the request.
        content_type: Content type of the request.
        content: (figures, whether the run is complete) -> the request's body, to be written as JSON.
        repeats: Whether it is sent although nothing has changed, as a sign of life.
    """

    exporter: str
    method: str
    content_type: str
    content: Callable[[RunFigures, bool], dict[str, Any]]
    repeats: bool


def _trainer_status(figures: RunFigures, complete: bool) -> dict[str, Any]:  # noqa: FBT001 - a callback
    """`UpdateTrainJobStatusRequest` of trainer.kubeflow.org/v1alpha1; what is not known is left out.

    The percentage is that of the optimizer steps, and 100 only when the results are published: a preempted run is not
    complete. The remaining time is that of training while it runs.
    """
    training, status = figures.training, dict[str, Any]()
    values: dict[str, Any] = {"attempt": figures.attempt, "stage": figures.stage}
    if training is not None:
        status["progressPercentage"] = min(99, 100 * training.step // max(1, training.total_steps))
        if figures.stage == "train" and training.remaining_seconds is not None:
            status["estimatedRemainingSeconds"] = math.ceil(training.remaining_seconds)
        values |= {"step": training.step, "total_steps": training.total_steps, "loss": training.loss}
        values |= {"tokens_per_second": training.tokens_per_second}
    if complete:
        status |= {"progressPercentage": 100, "estimatedRemainingSeconds": 0}
    status["metrics"] = [{"name": name, "value": str(value)} for name, value in values.items() if value is not None]
    status["lastUpdatedTime"] = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {"trainerStatus": status}


def _annotation(figures: RunFigures, complete: bool) -> dict[str, Any]:  # noqa: FBT001 - a callback
    """A merge patch of the pod, with one line for people."""
    training, parts = figures.training, [figures.stage or "between two stages"]
    if training is not None:
        parts[0] += f" {training.step}/{training.total_steps}"
        if training.loss is not None:
            parts.append(f"loss {training.loss:.4f}")
        if figures.stage == "train" and training.remaining_seconds is not None:
            parts.append(f"{math.ceil(training.remaining_seconds / 60)} min left")
    text = "complete" if complete else ", ".join(parts)
    return {"metadata": {"annotations": {ANNOTATION: text}}}


TRAIN_JOB = Report("train-job", "POST", "application/json", _trainer_status, repeats=True)
POD_ANNOTATION = Report("pod-annotation", "PATCH", "application/merge-patch+json", _annotation, repeats=False)


class Sender:
    """Sends a report every `REPORT_SECONDS` seconds, and the last one at the end.

    Args:
        destination: Where to.
        report: What.
        read: Returns the content as of now; None while there is none.
    """

    def __init__(self, destination: Destination, report: Report, read: Callable[[], dict[str, Any] | None]) -> None:
        if not destination.url:
            raise ValueError(
                "the pod's name is not known: use the Kustomize component `progress`, which sets "
                "KUBERNETES_POD_NAME and _NAMESPACE"
            )
        if not destination.url.startswith("https://"):
            raise ValueError("its address is not https://, so the token would be sent unencrypted")
        self._destination, self._report, self._read = destination, report, read
        self._over, self._sent, self._warned = Event(), dict[str, Any](), False
        self._thread = Thread(target=copy_context().run, args=(self._loop,), name=report.exporter, daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Sends the last report, and waits at most so long for it."""
        self._over.set()
        self._thread.join(seconds)

    def _loop(self) -> None:
        while not self._over.wait(REPORT_SECONDS):
            self._send()
        self._send()

    def _send(self) -> None:
        try:
            content = self._read()
            if content is None or (content == self._sent and not self._report.repeats):
                return
            self._request(content)
        except HTTPError as error:
            why = f"the server answered {error.code}"
        except URLError as error:
            why = f"the server cannot be reached: {error.reason}"
        except Exception as error:  # noqa: BLE001 - no exception may disturb the run
            why = f"{type(error).__name__}: {error}"
        else:
            self._sent, self._warned = content, False
            return
        if not self._warned:  # of several failures in a row the first
            self._warned = True
            what = "progress cannot be reported to the cluster; the run continues and tries again"
            log.get_logger().warning(what, exporter=self._report.exporter, why=why)

    def _request(self, content: dict[str, Any]) -> None:
        token = Path(self._destination.token).read_text(encoding="ascii").strip()
        if not token.isprintable():  # http.client would quote the whole header in its error
            raise ValueError(f"{self._destination.token} has several lines or control characters")
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": self._report.content_type,
            "User-Agent": f"qlora-job/{__version__}",
        }
        trust = ssl.create_default_context(cafile=self._destination.authority)
        request = Request(  # noqa: S310 - the constructor refuses what is not https
            self._destination.url, json.dumps(content).encode(), headers, method=self._report.method
        )
        build_opener(NoRedirects, HTTPSHandler(context=trust)).open(request, timeout=_REQUEST_SECONDS).close()
