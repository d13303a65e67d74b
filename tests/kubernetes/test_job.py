"""The shipped Job, simulated to its end on this machine: whatever happens to its pods, it ends as intended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from job.runs.layout import facts_of
from tests.kubernetes.cluster import Ended, Job, Pod
from tests.kubernetes.manifests import NODE, Document, job_spec, overlay
from tests.kubernetes.processes import Start, cold, warm
from tests.s3_server import CREDENTIALS, SECRET, Request, server

DIGEST = f"sha256:{'0123456789abcdef' * 4}"
SMALL = {
    "JOB_TRAIN__GLOBAL_BATCH_SIZE": "8",
    "JOB_TRAIN__MAX_STEPS": "8",
    "JOB_CHECKPOINT__EVERY_STEPS": "2",
    "JOB_EVAL__LIMIT": "20",
    "JOB_LOG__FORMAT": "json",
    "JOB_RUN__IMAGE_DIGEST": DIGEST,
}


def play(
    folder: Path,
    happens: Callable[[Pod], None] = lambda _: None,
    *,
    spec: Mapping[str, Any] | None = None,
    secret: Mapping[str, str] | None = None,
    start: Start = warm,
    clock: Callable[[], float] = time.monotonic,
    **settings: str,
) -> Ended:
    """Runs the demo overlay's Job with small settings; `spec` changes some of its own."""
    documents = [_changed(document, spec or {}) for document in overlay("demo")]
    number = len(list(folder.glob("job-*")))
    place, claims = folder / f"job-{number}", folder / "claims"
    return Job(documents, place, claims, SMALL | settings, secret=secret, start=start, clock=clock).run(happens)


def _changed(document: Document, spec: Mapping[str, Any]) -> Document:
    return document if document["kind"] != "Job" else {**document, "spec": {**document["spec"], **spec}}


def at_step(step: int, what: Callable[[Pod], object]) -> Callable[[Pod], None]:
    """An event for the first pod, once its log says that the step is done."""
    hit: list[Pod] = []

    def happens(pod: Pod) -> None:
        if not hit and pod.said(event="steps", done=step):
            hit.append(pod)
            what(pod)

    return happens


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A Job that nothing befell, by the real command line."""
    return play(tmp_path_factory.mktemp("undisturbed"), start=cold)


def outcomes(ended: Ended) -> list[str]:
    """How the ledger says that the attempts ended."""
    return [attempt["outcome"] for attempt in ended.results["run"]["attempts"]]


@pytest.mark.long
def test_success(undisturbed: Ended) -> None:
    """One pod, the results where the settings say, under the Job's name, with the image that made them."""
    assert (undisturbed.condition, undisturbed.failed, len(undisturbed.pods)) == ("Complete", 0, 1)
    assert undisturbed.results["run"]["id"] == "qlora-job"
    assert undisturbed.results["software"]["image_digest"] == DIGEST
    assert undisturbed.results["settings"]["run.id"] == {"value": "qlora-job", "source": "platform"}


@pytest.mark.long
def test_the_same_job_again(undisturbed: Ended) -> None:
    """A Job that was cleaned up and applied again finds its results, and does nothing."""
    folder = undisturbed.output.parents[2]
    before = (undisturbed.output / "results.json").read_bytes()
    again = play(folder)
    assert (again.condition, len(again.pods)) == ("Complete", 1)
    assert again.pods[0].said(event="this run is complete already")
    assert (again.output / "results.json").read_bytes() == before


@pytest.mark.long
@pytest.mark.parametrize("way", [Pod.evict, Pod.delete])
def test_eviction(way: Callable[[Pod], None], undisturbed: Ended, tmp_path: Path) -> None:
    """SIGTERM, 75, the next pod goes on where this one stopped; nothing counts, though nothing may."""
    ended = play(tmp_path, at_step(3, way), spec={"backoffLimit": 0})
    assert (ended.condition, ended.failed) == ("Complete", 0)
    assert [pod.exit_code for pod in ended.pods] == [75, 0]
    assert "stopped by SIGTERM; step" in ended.pods[0].message
    (resuming,) = [line for line in ended.pods[1].events if line["event"] == "resuming"]
    assert resuming["step"] >= 3
    assert outcomes(ended) == ["preempted", "complete"]
    assert ended.results["cost"]["repeated_steps"] == 0
    assert facts_of(ended.results) == facts_of(undisturbed.results)


@pytest.mark.long
def test_eviction_without_the_time(undisturbed: Ended, tmp_path: Path) -> None:
    """A pod that is killed before it could stop costs nothing either, and its checkpoints are enough."""
    template = job_spec(overlay("demo"))["template"]
    hasty = {**template, "spec": {**template["spec"], "terminationGracePeriodSeconds": 0}}
    killed = at_step(5, lambda pod: (pod.evict(), pod.tick()))
    ended = play(tmp_path, killed, spec={"backoffLimit": 0, "template": hasty})
    assert (ended.condition, ended.failed) == ("Complete", 0)
    assert [pod.exit_code for pod in ended.pods] == [137, 0]
    assert facts_of(ended.results) == facts_of(undisturbed.results)


@pytest.mark.long
def test_node_loss(undisturbed: Ended, tmp_path: Path) -> None:
    """The machine is lost without notice: once its Node is deleted, the next pod starts from the last checkpoint."""
    looks, lost = 0, at_step(5, Pod.lose)

    def happens(pod: Pod) -> None:
        nonlocal looks
        lost(pod)
        if not pod.reachable:
            looks += 1
            if looks == 100:  # for two seconds no other pod was started
                pod.delete_node()

    ended = play(tmp_path, happens, spec={"backoffLimit": 0, "completionMode": "Indexed"})
    assert looks == 100
    assert (ended.condition, ended.failed) == ("Complete", 0)
    assert [(pod.exit_code, pod.message) for pod in ended.pods] == [(None, ""), (0, "")]
    assert outcomes(ended) == ["killed", "complete"]
    assert facts_of(ended.results) == facts_of(undisturbed.results)


@pytest.mark.long
def test_out_of_memory_counts(undisturbed: Ended, tmp_path: Path) -> None:
    """A process that the kernel killed is started again, but not for ever; the end of its log says where it was."""
    ended = play(tmp_path, at_step(5, Pod.run_out_of_memory))
    assert (ended.condition, ended.failed) == ("Complete", 1)
    assert [pod.exit_code for pod in ended.pods] == [137, 0]
    assert '"event": "steps"' in ended.pods[0].message
    assert facts_of(ended.results) == facts_of(undisturbed.results)


@pytest.mark.long
def test_an_old_pod_that_wakes_up(undisturbed: Ended, tmp_path: Path) -> None:
    """A suspended machine that resumes finds its run taken over: it changes nothing and ends; the Job completes."""
    old: list[Pod] = []

    def happens(pod: Pod) -> None:
        if not old and pod.said(event="steps", done=3) and pod.freeze(tmp_path.rglob(".store/lock")):
            old.append(pod)
            pod.delete_node()
        if old and pod is not old[0] and pod.said(event="steps"):
            old[0].wake()

    ended = play(tmp_path, happens, spec={"backoffLimit": 0})
    assert (ended.condition, ended.failed, len(ended.pods)) == ("Complete", 0, 2)
    assert old[0].wait() == 76
    assert "took over" in (old[0].folder / "termination-log").read_text(encoding="utf-8")
    assert outcomes(ended) == ["killed", "complete"]
    assert facts_of(ended.results) == facts_of(undisturbed.results)


@pytest.mark.long
def test_the_run_is_started_elsewhere(tmp_path: Path) -> None:
    """If another Job starts the run, this Job fails at once, instead of taking the run back forever."""
    others: list[Ended] = []

    def happens(pod: Pod) -> None:
        if not others and pod.said(event="steps", done=3) and pod.freeze(tmp_path.rglob(".store/lock")):
            others.append(play(tmp_path))
            pod.wake()

    ended = play(tmp_path, happens)
    assert [other.condition for other in others] == ["Complete"]
    assert (ended.condition, ended.reason, len(ended.pods)) == ("Failed", "PodFailurePolicy", 1)
    assert "exit code 76" in ended.message
    assert "took over" in ended.pods[0].message
    assert outcomes(others[0])[-1] == "complete"


def failed_at_once(ended: Ended, code: int) -> str:
    """The termination message of the only pod of a Job that failed by the rule for an exit code."""
    assert (ended.condition, ended.reason, len(ended.pods)) == ("Failed", "PodFailurePolicy", 1)
    assert f"exit code {code} matching FailJob rule" in ended.message
    assert f"(exit code {code}): " in ended.pods[0].message
    return ended.pods[0].message


def test_wrong_settings(tmp_path: Path) -> None:
    """All that is wrong is in the termination message, with the place to mend it; no second pod is tried."""
    ended = play(tmp_path, start=cold, JOB_TRAIN__LEARNING_RATE="fast", JOB_TRIAN__EPOCHS="3")
    message = failed_at_once(ended, 2)
    assert "JOB_TRAIN__LEARNING_RATE (environment)" in message
    assert "JOB_TRIAN__EPOCHS: is not a setting; the nearest is JOB_TRAIN__EPOCHS" in message


@pytest.mark.long
def test_denied_access(tmp_path: Path) -> None:
    """A store that refuses the credentials counts, as a role may come late; the message names the node, no secret."""
    seen: list[str] = []

    def refuse(request: Request) -> None:
        seen.append(request.headers.get("Authorization", ""))
        request.refuse(403, "AccessDenied")

    keys = "\n".join(f"{name.lower()} = {CREDENTIALS[name]}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    with server(refuse) as url:
        ended = play(
            tmp_path,
            start=cold,
            spec={"backoffLimit": 1},
            secret={"aws-credentials": f"[default]\n{keys}\n"},
            JOB_RUN__OUTPUT="s3://bucket/runs",
            JOB_STORAGE__ENDPOINT_URL=url,
            JOB_STORAGE__REGION="us-east-1",
        )
    assert (ended.condition, ended.reason) == ("Failed", "BackoffLimitExceeded")
    assert [pod.exit_code for pod in ended.pods] == [77, 77]
    message = ended.pods[-1].message
    assert message.startswith(f"AccessDenied (exit code 77): node {NODE}: ")
    assert "s3://bucket/runs/qlora-job" in message
    assert SECRET not in ended.pods[0].log + message
    assert seen
    assert all("Credential=testing/" in header for header in seen)


def test_wrong_data(tmp_path: Path) -> None:
    """A row that is no example ends the Job before a model is loaded, and is named."""
    output = tmp_path / "claims" / "qlora-job-output"
    output.mkdir(parents=True)
    (output / "rows.jsonl").write_text('{"instruction": "Add.", "output": "3"}\n{"instruction": "Add."}\n')
    ended = play(tmp_path, JOB_DATA__SOURCE="/output/rows.jsonl")
    assert "rows.jsonl:2" in failed_at_once(ended, 65)
    assert not (ended.output / "results.json").exists()


@pytest.mark.long
def test_gate_not_met(tmp_path: Path) -> None:
    """The Job fails at once, for its quality; the results are there."""
    ended = play(tmp_path, JOB_GATE__MIN_DELTA="0.9")
    assert "the gate requires" in failed_at_once(ended, 3)
    assert ended.results["gate"]["passed"] is False


@pytest.mark.long
def test_an_unreachable_store(tmp_path: Path) -> None:
    """Tried again as often as the Job allows, each time by a new pod; then it fails, and the last pod says why."""
    with server(Request.hang_up) as url:
        ended = play(
            tmp_path,
            secret={"aws-credentials": "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"},
            JOB_RUN__OUTPUT="s3://bucket/runs",
            JOB_STORAGE__ENDPOINT_URL=url,
            JOB_STORAGE__REGION="us-east-1",
            JOB_STORAGE__RETRIES="1",
        )
    assert (ended.condition, ended.reason) == ("Failed", "BackoffLimitExceeded")
    assert [pod.exit_code for pod in ended.pods] == [69] * 7
    assert "Unreachable (exit code 69)" in ended.pods[-1].message


@pytest.mark.long
def test_a_node_without_a_gpu_counts(tmp_path: Path) -> None:
    """A pod whose node has no GPU that works is tried again, not for ever, and says which node it was."""
    ended = play(tmp_path, spec={"backoffLimit": 1}, JOB_RUN__DEVICE="gpu")
    assert (ended.condition, ended.reason) == ("Failed", "BackoffLimitExceeded")
    assert [pod.exit_code for pod in ended.pods] == [72, 72]
    assert f"UnfitMachine (exit code 72): node {NODE}: JOB_RUN__DEVICE" in ended.pods[0].message


def test_the_deadline_of_the_job(tmp_path: Path) -> None:
    """A Job that takes too long is stopped like an evicted one: its state is kept for the next start."""
    begun: list[Pod] = []
    clock, over = lambda: 3601.0 if begun else 0.0, at_step(1, begun.append)
    settings = {"JOB_TRAIN__MAX_STEPS": "1000", "JOB_TRAIN__EPOCHS": "100"}
    ended = play(tmp_path, over, spec={"activeDeadlineSeconds": 3600}, clock=clock, **settings)
    assert (ended.condition, ended.reason) == ("Failed", "DeadlineExceeded")
    assert [pod.exit_code for pod in ended.pods] == [75]
