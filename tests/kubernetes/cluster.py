"""Simulates Kubernetes with local processes: the Job controller, and a kubelet that starts, stops and loses pods.

The simulation follows the controller's source and documentation: rules of podFailurePolicy in order, failures
against backoffLimit, growing delays after any failure, a new pod only when the previous one has ended
(podReplacementPolicy: Failed), activeDeadlineSeconds, SIGTERM and after the grace period SIGKILL, the termination
message. Only the delays between two pods are shorter.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kubernetes.manifests import Document, container, environment, job_spec, labels, one, pod_spec, relocate
from tests.kubernetes.policy import judge
from tests.kubernetes.processes import Process, Start, warm

SHORTER = 500
FIRST_DELAY, LONGEST_DELAY = 10 / SHORTER, 600 / SHORTER
TICK = 0.02
LOG_LINES, LOG_BYTES, MESSAGE_BYTES = 80, 2048, 4096


@dataclass
class Pod:
    """A pod as the API shows it, and methods for what can happen to it."""

    name: str
    process: Process
    folder: Path
    grace: float
    conditions: set[str] = field(default_factory=set)
    phase: str = "Running"
    exit_code: int | None = None
    """The container's exit code; None while it runs, and forever if the kubelet was lost before it could report it."""
    message: str = ""
    reachable: bool = True
    """Whether its machine's kubelet answers."""
    _kill_at: float | None = None

    @property
    def log(self) -> str:
        """What `kubectl logs` shows."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The job's own lines of the log."""
        lines = self.log.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def said(self, **fields: Any) -> bool:
        """Whether a line of the log has these fields."""
        return any(fields.items() <= line.items() for line in self.events)

    def delete(self) -> None:
        """`kubectl delete pod`, which the Job controller also does with pods that it no longer needs."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self.grace
            self._signal(signal.SIGTERM)

    def evict(self) -> None:
        """A drained node, a preemption by the scheduler, a node's shutdown: sets a condition, then deletes the pod."""
        self.conditions.add("DisruptionTarget")
        self.delete()

    def lose(self) -> None:
        """The machine is lost without notice. The pod's phase stays Running, since no kubelet reports its end.

        The node controller marks the pod for deletion after five minutes, which no kubelet confirms, either.
        """
        self._signal(signal.SIGKILL)
        self.reachable = False

    def freeze(self, locks: Iterable[Path]) -> bool:
        """The node stops answering: the process is suspended, but not while it holds one of the store's locks.

        A file system that real machines share releases the locks of a lost machine; here they would be kept.
        """
        self._signal(signal.SIGSTOP)
        time.sleep(TICK)
        if any(_held(lock) for lock in locks):
            self.wake()
            return False
        return True

    def wake(self) -> None:
        """Resumes the suspended process."""
        self._signal(signal.SIGCONT)

    def delete_node(self) -> None:
        """The Node object is deleted, or tainted as out of service: the pod garbage collector deletes the pod."""
        self.reachable = False
        self.conditions.add("DisruptionTarget")
        self.phase = "Failed"

    def run_out_of_memory(self) -> None:
        """The kernel kills the process; the kubelet reports 137."""
        self._signal(signal.SIGKILL)

    def wait(self, seconds: float = 60) -> int:
        """Waits for the end of a process that the cluster no longer manages."""
        until = time.monotonic() + seconds
        while (code := self.process.poll()) is None:
            assert time.monotonic() < until, self.log[-3000:]
            time.sleep(TICK)
        return code

    def tick(self) -> None:
        """One check by the kubelet: kills processes after their grace period, and reports ended ones."""
        if self.phase != "Running" or not self.reachable:
            return
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._signal(signal.SIGKILL)
        if (code := self.process.poll()) is not None:
            self.exit_code = code if code >= 0 else 128 - code
            self.phase = "Failed" if self.exit_code else "Succeeded"
            self.message = self._last_words()

    def _last_words(self) -> str:
        """The termination message by the policy FallbackToLogsOnError."""
        left = (self.folder / "termination-log").read_bytes()
        if left or not self.exit_code:
            return left[:MESSAGE_BYTES].decode(errors="replace")
        return "\n".join(self.log.splitlines()[-LOG_LINES:])[-LOG_BYTES:]

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


def _held(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@dataclass(frozen=True)
class Ended:
    """How a Job ended, as `kubectl describe job` reports it, with all its pods in order."""

    condition: str
    reason: str
    message: str
    failed: int
    """Pods that counted against backoffLimit, and the one that failed the Job."""
    pods: tuple[Pod, ...]
    output: Path
    """The folder of the run on the claim for results."""

    @property
    def results(self) -> dict[str, Any]:
        """The run's manifest."""
        found: dict[str, Any] = json.loads((self.output / "results.json").read_text(encoding="utf-8"))
        return found


class Job:
    """A Job's controller and the kubelet of its pods.

    Args:
        documents: What Kustomize built; the pods' settings and volumes come from them.
        folder: The folder for the pods' own files.
        claims: The folder for the claims' files, which outlive pods and Jobs.
        settings: `JOB_` variables that the user adds to the ConfigMap.
        secret: Files of the Secret that the template mounts.
        start: Starts the job's process.
        clock: Seconds, by which activeDeadlineSeconds is measured.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        folder: Path,
        claims: Path,
        settings: Mapping[str, str],
        *,
        secret: Mapping[str, str] | None = None,
        start: Start = warm,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = job_spec(documents)
        self.pods: list[Pod] = []
        self._documents, self._folder, self._claims = documents, folder, claims
        self._settings, self._secret, self._start, self._clock = settings, secret or {}, start, clock
        self._name = one(documents, "Job")["metadata"]["name"]
        assert self.spec["completions"] == self.spec["parallelism"] == 1
        assert self.spec["podReplacementPolicy"] == "Failed"

    def run(self, happens: Callable[[Pod], None] = lambda _: None, *, seconds: float = 600) -> Ended:
        """Runs the Job to its end: one pod after the other, as podReplacementPolicy and parallelism require.

        Args:
            happens: Called repeatedly with the running pod, to inject events.
            seconds: Longest time that a test waits.
        """
        began, failed, delay = time.monotonic(), 0, FIRST_DELAY
        deadline = self._clock() + self.spec["activeDeadlineSeconds"]
        try:
            while True:
                pod = self._pod()
                while pod.phase == "Running":
                    assert time.monotonic() - began < seconds, pod.log[-3000:]
                    if self._clock() > deadline:
                        pod.delete()
                    else:
                        happens(pod)
                    time.sleep(TICK)
                    pod.tick()
                if pod.phase == "Succeeded":
                    return self._ended("Complete", "", "", failed)
                verdict = judge(self.spec["podFailurePolicy"]["rules"], pod.exit_code, pod.conditions, pod.name)
                failed += verdict.action != "Ignore"
                if verdict.action == "FailJob":
                    return self._ended("Failed", "PodFailurePolicy", verdict.message, failed)
                if failed > self.spec["backoffLimit"]:
                    message = "Job has reached the specified backoff limit"
                    return self._ended("Failed", "BackoffLimitExceeded", message, failed)
                if self._clock() > deadline:
                    message = "Job was active longer than specified deadline"
                    return self._ended("Failed", "DeadlineExceeded", message, failed)
                time.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY)
        except BaseException:
            for left in self.pods:
                left.lose()
            raise

    def _ended(self, condition: str, reason: str, message: str, failed: int) -> Ended:
        output = self._claims / "qlora-job-output" / self._name
        return Ended(condition, reason, message, failed, tuple(self.pods), output)

    def _pod(self) -> Pod:
        """Starts the next pod: volumes, environment, process."""
        name = f"{self._name}-{len(self.pods)}"
        folder = self._folder / name
        folder.mkdir(parents=True)
        for name_of_file in ("log", "termination-log"):
            (folder / name_of_file).touch()
        places = self._mount(folder)
        given = environment(self._documents, labels(self._documents, self._name, "none"))
        environ = {key: relocate(value, places) for key, value in (given | self._settings).items()}
        # The real path of the termination message cannot be mounted here.
        environ |= {"HOSTNAME": name, "KUBERNETES_TERMINATION_LOG": str(folder / "termination-log")}
        process = self._start({"TMPDIR": str(places["/tmp"]), **environ}, folder / "log")
        pod = Pod(name, process, folder, pod_spec(self._documents)["terminationGracePeriodSeconds"])
        self.pods.append(pod)
        return pod

    def _mount(self, folder: Path) -> dict[str, Path]:
        """Mount point -> folder: new and empty for each pod, or a claim's, which outlives it."""
        volumes = {volume["name"]: volume for volume in pod_spec(self._documents)["volumes"]}
        places = {}
        for mount in container(self._documents)["volumeMounts"]:
            volume = volumes[mount["name"]]
            if claim := volume.get("persistentVolumeClaim"):
                place = self._claims / claim["claimName"]
            else:
                place = folder / "volumes" / volume["name"]
            place.mkdir(parents=True, exist_ok=True)
            if "secret" in volume:
                for key, text in self._secret.items():
                    (place / key).write_text(text, encoding="utf-8")
            places[mount["mountPath"]] = place
        return places
