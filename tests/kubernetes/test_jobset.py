"""Two pods of the shipped JobSet: whatever happens to either, in whichever order they end, the set reacts the same.

The launchers, the processes' connection and their ends are the job's. The processes are forked instead of started, so
that they need not import torch, and train nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forked import free_port
from tests.kubernetes.cluster import Pod
from tests.kubernetes.manifests import one, overlay
from tests.kubernetes.policy import judge_set
from tests.waiting import wait_for
from tests.warm import Member, Processes

GRACE = 10
POD = f"""
import os, pathlib, signal, sys, time
from types import SimpleNamespace
from job.distributed import launcher, other_machines, process_group, rendezvous
from job.errors import JobError, Problem, SettingsError
from job.preemption.stop_flag import stop_on_signals

folder, rank, address = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
process_group.identity = lambda: []  # pods do not see each other's processes
process_group.REASON_SECONDS, other_machines.SETTLE_SECONDS = 0.5, float(sys.argv[4])

def train(place):
    with stop_on_signals({GRACE}) as stop, rendezvous.join(
        place, "r", stop=stop, report_progress=lambda: None, timeout_seconds=60, grace_seconds={GRACE}
    ) as processes:
        (folder / f"trains{{place.rank}}").touch()
        while True:
            processes.agree(repeat=False)
            if (folder / f"wrong{{place.rank}}").exists():
                raise SettingsError([Problem("JOB_X", "is wrong")])
            if (folder / f"stalled{{place.rank}}").exists():
                os._exit(74)
            if processes.stopping:  # last: a stop of the other pod does not hide what was to befall this one
                stop.check()
            time.sleep(0.01)

class Child:
    def __init__(self, pid):
        self.pid, self.code = pid, None
    def poll(self):
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code
    def kill(self, number, timeout):
        if self.poll() is None:
            os.kill(self.pid, number)

def start(command, place, run, environ):
    if (pid := os.fork()) == 0:
        try:
            train(place)
        except JobError as error:
            print(repr(error), flush=True)
            os._exit(error.exit_code)
        finally:
            os._exit(1)
    (folder / f"process{{rank}}").write_text(str(pid))
    child = Child(pid)
    handlers = {{0: SimpleNamespace(proc=child)}}
    return SimpleNamespace(subprocess_handlers=handlers, pids=lambda: {{0: pid}}, close=child.kill)

launcher._start = start
with launcher.recorded_signals() as received:
    try:
        place = launcher.Machine(1, nodes=2, node_rank=rank, rendezvous=address)
        code = launcher.launch([], place, received, run="r", environ={{}}, grace_seconds={GRACE})
    except JobError as error:
        print(repr(error), flush=True)
        code = error.exit_code
sys.exit(code)
"""


@dataclass(frozen=True)
class Pods:
    """The two pods of the set, and the folder through which their processes get events."""

    pods: tuple[Pod, Pod]
    folder: Path

    def kill_process(self, index: int) -> None:
        """The kernel kills a process that takes too much memory, and leaves the launcher alive."""
        os.kill(self._process(index), signal.SIGKILL)

    def kill_container(self, index: int) -> None:
        """The kernel kills all processes of the container, as Kubernetes asks for with cgroup v2."""
        self.pods[index].run_out_of_memory()
        self.kill_process(index)

    def stall(self, index: int) -> None:
        """The watchdog ends the process."""
        (self.folder / f"stalled{index}").touch()

    def refuse(self, index: int) -> None:
        """The process finds that its settings are wrong."""
        (self.folder / f"wrong{index}").touch()

    def evict(self, index: int) -> None:
        """The node is drained."""
        self.pods[index].evict()

    def stop(self, index: int) -> None:
        """A spot notice reaches the process, or somebody sends it a signal."""
        os.kill(self._process(index), signal.SIGTERM)

    def _process(self, index: int) -> int:
        return int((self.folder / f"process{index}").read_text(encoding="utf-8"))


@pytest.fixture
def training(tmp_path: Path, request: pytest.FixtureRequest) -> Pods:
    """Two pods whose processes have met. They wait for each other's exit code, but not for that of a dead container."""
    address = f"localhost:{free_port()}"
    settle = "0.5" if request.node.callspec.params["befalls"] is Pods.kill_container else "60"
    pods = []
    for index in range(2):
        folder = tmp_path / f"pod{index}"
        folder.mkdir()
        for name in ("log", "termination-log"):
            (folder / name).touch()
        log = folder / "log"
        words = [str(tmp_path), str(index), address, settle]
        process = Processes([Member(words, dict(os.environ), log, log, source=POD)])
        pods.append(Pod(str(index), process, folder, GRACE))
    wait_for(lambda: all((tmp_path / f"trains{index}").exists() for index in range(2)))
    return Pods((pods[0], pods[1]), tmp_path)


RESTART, FREE, FAIL = "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "FailJobSet"


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("befalls", "other", "action"),
    [
        (Pods.kill_process, None, RESTART),
        (Pods.kill_container, None, RESTART),
        pytest.param(Pods.stall, None, RESTART, marks=pytest.mark.long),
        (Pods.evict, None, FREE),
        pytest.param(Pods.stop, None, FREE, marks=pytest.mark.long),
        pytest.param(Pods.refuse, None, FAIL, marks=pytest.mark.long),
        (Pods.refuse, Pods.stop, FAIL),
        pytest.param(Pods.kill_process, Pods.stop, RESTART, marks=pytest.mark.long),
        pytest.param(Pods.stall, Pods.stop, RESTART, marks=pytest.mark.long),
    ],
)
def test_either_pod_decides_alike(
    training: Pods,
    befalls: Callable[[Pods, int], None],
    other: Callable[[Pods, int], None] | None,
    action: str,
    index: int,
) -> None:
    """A pod's failure has the same effect on the set, whichever pod fails and whichever of the two ends first."""
    befalls(training, index)
    if other is not None:
        other(training, 1 - index)

    def ended() -> bool:
        for pod in training.pods:
            pod.tick()
        return all(pod.phase == "Failed" for pod in training.pods)

    wait_for(ended)
    spec = one(overlay("multi-node"), "JobSet")["spec"]
    said = {pod.name: (pod.exit_code, judge_set(spec, pod.exit_code, pod.conditions)) for pod in training.pods}
    assert {what for _, what in said.values()} == {action}, (said, [pod.log for pod in training.pods])
