"""What the pipeline tells others of an attempt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job import pipeline
from job.common.hashing import sealed
from job.distributed.processes import ALONE
from job.errors import Preempted, SettingsError, TrainingFailed
from job.preemption.stop_flag import Stop
from job.records import AttemptRecord, Exported, ScoringPrecision
from job.runs.attempt import Attempt
from job.runs.layout import EXPORTED_RUN, attempt_key, stage_key
from job.runs.lease import take
from job.runs.run_settings import keep_settings
from job.settings.affects_result import decisive_settings
from job.settings.load import Settings, load_settings, plain_values
from job.settings.training_stages import folder_of, split_stages
from job.storage.local import LocalStore
from job.tracking import webhook
from job.tracking.live_metrics import LiveMetrics
from job.tracking.webhook import Notifier
from tests.attempts import Second


def test_the_webhook_is_told_whether_the_gate_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results that the trackers get say it to the webhook, too, before its last event is sent."""
    seen: list[Notifier] = []

    @contextmanager
    def notifying(url: str | None, run: str) -> Iterator[Notifier]:
        seen.append(Notifier(url, run))
        yield seen[0]

    monkeypatch.setattr(pipeline, "notifying", notifying)
    environ = {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(tmp_path / "runs"), "JOB_RUN__DEVICE": "cpu"}
    cost = dict.fromkeys(("seconds", "usd", "wasted_seconds", "goodput", "energy_kwh"))
    results = {"cost": cost, "evaluation": {"tasks": {}}, "gate": {"passed": False}}
    with pipeline._attempt(load_settings([], environ), Stop(), lambda: None, (), ALONE, idle=None, last=True) as (
        _,
        report_results,
    ):
        report_results(results)
    assert seen[0].gate_passed is False


def test_the_others_wait_until_the_run_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To push a large model takes minutes: if they ended before, the launcher would kill process 0 meanwhile."""
    asked: list[str] = []

    class Waiting(Second):
        def share(self, what: str, value: Callable[[], Any]) -> Any:
            asked.append(what)
            return {}

    stage: Any = SimpleNamespace(precision=None, cache_entry=None, record=None)
    attempt = SimpleNamespace(timed=lambda _: nullcontext(), store=None)
    for name in ("pull", "_load", "_evaluate_base", "_train", "_evaluate_adapter", "_export"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: stage)
    monkeypatch.setattr(pipeline, "_finished", lambda *_: None)
    monkeypatch.setattr(pipeline, "_attempt", lambda *_, **__: nullcontext((attempt, asked.append)))
    monkeypatch.setattr(pipeline, "_publish", lambda *_, **__: {"gate": {"passed": None}})
    monkeypatch.setattr(pipeline, "_hand_over", lambda *_, **__: pytest.fail("not the first process"))
    settings = load_settings([], {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(tmp_path)})
    how: dict[str, Any] = {"delivery": None, "processes": Waiting({}), "idle": None}
    pipeline._run_stage(settings, Stop(), lambda: None, (), **how)
    assert asked[-1] == "handed over"


def test_a_machine_without_fp8_is_refused_before_the_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the attempt begins, with the setting and what it needs."""
    monkeypatch.setattr(pipeline, "choose_device", lambda _: SimpleNamespace(type="cpu"))
    environ = {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(tmp_path), "JOB_TRAIN__COMPUTE": "fp8"}
    settings = load_settings([], environ | {"JOB_RUN__DEVICE": "auto", "JOB_MODEL__DTYPE": "auto"})
    with (
        pytest.raises(
            SettingsError, match="JOB_TRAIN__COMPUTE: is fp8, which cannot be computed here: there is no GPU"
        ),
        pipeline._attempt(settings, Stop(), lambda: None, (), ALONE, idle=None, last=True),
    ):
        pytest.fail("the attempt went on")


class Others:
    """What the pipeline starts for other systems, in place of what would send to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.webhooks: list[str | None] = []
        self.exporters: list[Mapping[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        monkeypatch.setattr(pipeline, "notifying", self._notifying)
        monkeypatch.setattr(pipeline, "live_metrics", self._live_metrics)
        monkeypatch.setattr(webhook, "_post", lambda _url, content: self.events.append(content))

    @contextmanager
    def _notifying(self, url: str | None, run: str) -> Iterator[Notifier]:
        self.webhooks.append(url)
        yield Notifier(url, run)

    @contextmanager
    def _live_metrics(self, asked: Mapping[str, Any], run: str) -> Iterator[LiveMetrics]:
        self.exporters.append(asked)
        yield LiveMetrics(run)


def demo(folder: Path, **more: str) -> Settings:
    """Settings of a run with a webhook, metrics, and a report to its pod."""
    environ = {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(folder), "JOB_RUN__DEVICE": "cpu", "JOB_RUN__ID": "a-run"}
    environ |= {"JOB_METRICS__PORT": "9464", "JOB_METRICS__POD_ANNOTATION": "true"}
    return load_settings([], environ | {"JOB_NOTIFY__WEBHOOK": "https://hooks.example/x"} | more)


@pytest.mark.parametrize("was", [None, ScoringPrecision("bf16", "bf16", "")])
def test_exports_are_scored_again_where_base_and_adapter_were(
    monkeypatch: pytest.MonkeyPatch, was: ScoringPrecision | None
) -> None:
    """In another precision than an earlier attempt did: differences from them would include that of the two."""
    objections = []

    class Recorded:
        """An attempt whose run has a record of its exports."""

        @staticmethod
        def stage(_stage: Any, _kind: Any, _work: Any, objection: Callable[[Exported], str]) -> Exported:
            found = Exported([], [], was)
            objections.append(objection(found))
            return found

    monkeypatch.setitem(sys.modules, "job.stages.export", SimpleNamespace(export=None))
    settings = load_settings(["--export.formats=merged"], {"JOB_PRESET": "demo"})
    given: Any = (Recorded(), settings, None, None, None)
    for now in (was, ScoringPrecision("fp16", "fp32", "")):
        pipeline._export(*given, precision=now)
    assert objections == ["", "it was scored in another precision than the base"]


def test_one_process_tells_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes the first alone has a webhook and exporters: two would tell everything twice."""
    others, settings = Others(monkeypatch), demo(tmp_path)
    with pipeline._attempt(settings, Stop(), lambda: None, (), ALONE, idle=None, last=True):
        pass
    shared = {"settings of the run": {}, "attempt": 1, "holder of the lease": "", "whether a run is taken over": False}
    processes = Second(shared, same_machine=True)
    with pipeline._attempt(settings, Stop(), lambda: None, (), processes, idle=None, last=True):
        pass
    assert others.webhooks == ["https://hooks.example/x", None]
    assert [set(asked) for asked in others.exporters] == [{"prometheus", "pod-annotation"}, set()]


@pytest.mark.parametrize(
    "stages", [{}, {"JOB_TRAIN__METHOD": "sft,dpo", "JOB_DATA__SFT_SOURCE": "rows", "JOB_DATA__SOURCE": "pairs"}]
)
def test_no_stage_is_trained_where_a_finished_run_was_being_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: dict[str, str]
) -> None:
    """Neither is the first of two, whose own folder does not say that the run exports a finished one."""
    settings = demo(tmp_path, **stages)
    LocalStore(Path(folder_of(settings))).write(stage_key(EXPORTED_RUN), b"{}")
    monkeypatch.setattr(pipeline, "check_inputs", lambda *_, **__: pytest.fail("a stage has begun"))
    with pytest.raises(SettingsError, match=r"JOB_EXPORT__RUN: is not set, but .*/a-run has begun to export"):
        pipeline.run(settings, Stop(), lambda: None, ())


def test_a_changed_setting_of_the_first_stage_has_the_name_that_was_given(tmp_path: Path) -> None:
    """The first stage of `sft,dpo` has its epochs from a setting of its own, its validation from that of the run."""
    both = {"JOB_TRAIN__METHOD": "sft,dpo", "JOB_DATA__SFT_SOURCE": "rows", "JOB_DATA__SOURCE": "pairs"}
    began, _ = split_stages(demo(tmp_path, **both, JOB_TRAIN__SFT_EPOCHS="1"))
    keep_settings(LocalStore(Path(folder_of(began))), decisive_settings(plain_values(began)))
    changed, _ = split_stages(demo(tmp_path, **both, JOB_TRAIN__SFT_EPOCHS="2", JOB_DATA__VALIDATION="3"))
    with (
        pytest.raises(SettingsError) as refused,
        pipeline._attempt(changed, Stop(), lambda: None, (), ALONE, idle=None, last=False),
    ):
        pass
    assert [str(problem) for problem in refused.value.problems] == [
        "JOB_DATA__VALIDATION: this run began with None, not 3",
        "JOB_TRAIN__SFT_EPOCHS: this run began with 1, not 2",
    ]


def test_training_of_the_first_stage_that_fails_names_its_own_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lower JOB_TRAIN__LEARNING_RATE` would change nothing where the rate is that of JOB_TRAIN__SFT_LEARNING_RATE."""

    def fails(*_: Any) -> None:
        raise TrainingFailed("the loss is nan. Lower JOB_TRAIN__LEARNING_RATE")

    attempt = SimpleNamespace(timed=lambda _: nullcontext())
    monkeypatch.setattr(pipeline, "_attempt", lambda *_, **__: nullcontext((attempt, None)))
    monkeypatch.setattr(pipeline, "_check_inputs", lambda *_: None)
    monkeypatch.setattr(pipeline, "pull", lambda *_: None)
    monkeypatch.setattr(pipeline, "_load", fails)
    both = {"JOB_TRAIN__METHOD": "sft,dpo", "JOB_DATA__SFT_SOURCE": "rows", "JOB_DATA__SOURCE": "pairs"}
    names = ("SFT_LEARNING_RATE", "LEARNING_RATE")
    for settings, name in zip(split_stages(demo(tmp_path, **both)), names, strict=True):
        with pytest.raises(TrainingFailed, match=rf"Lower JOB_TRAIN__{name}$"):
            pipeline._run_stage(settings, Stop(), lambda: None, (), delivery=None, processes=ALONE, idle=None)


@pytest.mark.parametrize(("outcome", "kind"), [("running", "killed"), ("stalled", "stalled"), ("preempted", None)])
def test_the_next_attempt_tells_that_the_last_one_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, kind: str | None
) -> None:
    """An attempt without an end in the run log, or with a stall, is told by the one that takes the run over."""
    others, settings = Others(monkeypatch), demo(tmp_path)
    store = LocalStore(tmp_path / "a-run")
    first = take(store, "a machine")
    record = AttemptRecord(first.epoch, "2026-01-01T00:00:00.000Z", None, outcome, 5.0, {}, 0, 0, 0)
    store.write(attempt_key(first.epoch), sealed(asdict(record)))
    with pipeline._attempt(settings, Stop(), lambda: None, (), ALONE, idle=None, last=True):
        pass
    told = [one for one in others.events if one["type"] == f"qlora-job.attempt.{kind}"]
    assert [one["data"]["attempt"] for one in told] == ([] if kind is None else [1])
    assert [one["data"]["attempt"] for one in others.events if one["type"].endswith(".started")] == [2]


def test_the_webhook_is_told_before_an_attempt_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it waits, after others without progress, the attempt has told its start, and tells its end."""
    others = Others(monkeypatch)
    monkeypatch.setattr(pipeline, "notifying", webhook.notifying)

    def stopped(_attempt: Attempt) -> None:
        raise Preempted("stopped by SIGTERM")

    monkeypatch.setattr(Attempt, "pause_after_idle", stopped)
    settings = demo(tmp_path, JOB_RUN__NODES="2", JOB_RUN__NODE_RANK="0", JOB_RUN__RENDEZVOUS="localhost:29400")
    with (
        pytest.raises(Preempted),
        pipeline._attempt(settings, Stop(), lambda: None, (), ALONE, idle=None, last=True),
    ):
        pytest.fail("did not wait")
    assert [one["type"].rpartition(".")[2] for one in others.events] == ["started", "preempted"]
