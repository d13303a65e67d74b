"""What an attempt reports when it begins and ends, and which machines it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job import start_and_end
from job.common.hashing import sealed
from job.distributed.processes import ALONE, Processes
from job.errors import Preempted, SettingsError
from job.preemption.stop_flag import StopFlag
from job.records import AttemptRecord
from job.runs.attempt import Attempt
from job.runs.layout import attempt_key
from job.runs.lease import take
from job.runs.run_log import IdleLimit
from job.runs.run_settings import write_settings
from job.settings.affects_result import decisive_settings
from job.settings.load import Settings, load_settings, plain_values
from job.settings.training_stages import folder_of, split_stages
from job.start_and_end import ProcessContext, next_attempt
from job.storage.local import LocalStore
from job.tracking import webhook
from job.tracking.live_metrics import LiveMetrics
from job.tracking.webhook import Notifier
from tests.attempts import First, Second


def context(processes: Processes = ALONE) -> ProcessContext:
    """A process that nobody stops."""
    return ProcessContext(StopFlag(), lambda: None, IdleLimit(5), processes=processes)


def test_the_webhook_is_told_whether_the_gate_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results that the trackers get say it to the webhook, too, before its last event is sent."""
    seen: list[Notifier] = []

    @contextmanager
    def notifying(url: str | None, run: str) -> Iterator[Notifier]:
        seen.append(Notifier(url, run))
        yield seen[0]

    monkeypatch.setattr(start_and_end, "notifying", notifying)
    environ = {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(tmp_path / "runs"), "JOB_RUN__DEVICE": "cpu"}
    cost = dict.fromkeys(("seconds", "usd", "wasted_seconds", "goodput", "energy_kwh"))
    results = {"cost": cost, "evaluation": {"tasks": {}}, "gate": {"passed": False}}
    with next_attempt(load_settings([], environ), context(), last=True) as attempt:
        attempt.on_results(results)
    assert seen[0].gate_passed is False


def test_a_machine_without_fp8_is_refused_before_the_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the attempt begins, with the setting and what it needs."""
    monkeypatch.setattr(start_and_end, "choose_device", lambda _: SimpleNamespace(type="cpu"))
    environ = {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(tmp_path), "JOB_TRAIN__COMPUTE": "fp8"}
    settings = load_settings([], environ | {"JOB_RUN__DEVICE": "auto", "JOB_MODEL__DTYPE": "auto"})
    with (
        pytest.raises(
            SettingsError, match="JOB_TRAIN__COMPUTE: is fp8, which cannot be computed here: there is no GPU"
        ),
        next_attempt(settings, context(), last=True),
    ):
        pytest.fail("the attempt went on")


class Others:
    """What an attempt starts for other systems, in place of what would send to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.webhooks: list[str | None] = []
        self.exporters: list[Mapping[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        monkeypatch.setattr(start_and_end, "notifying", self._notifying)
        monkeypatch.setattr(start_and_end, "live_metrics", self._live_metrics)
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


def test_a_changed_setting_of_the_first_stage_has_the_name_that_was_given(tmp_path: Path) -> None:
    """The first stage of `sft,dpo` has its epochs from a setting of its own, its validation from that of the run."""
    both = {"JOB_TRAIN__METHOD": "sft,dpo", "JOB_DATA__SFT_SOURCE": "rows", "JOB_DATA__SOURCE": "pairs"}
    began, _ = split_stages(demo(tmp_path, **both, JOB_TRAIN__SFT_EPOCHS="1"))
    write_settings(LocalStore(Path(folder_of(began))), decisive_settings(plain_values(began)))
    changed, _ = split_stages(demo(tmp_path, **both, JOB_TRAIN__SFT_EPOCHS="2", JOB_DATA__VALIDATION="3"))
    with pytest.raises(SettingsError) as refused, next_attempt(changed, context(), last=False):
        pass
    assert [str(problem) for problem in refused.value.problems] == [
        "JOB_DATA__VALIDATION: this run began with None, not 3",
        "JOB_TRAIN__SFT_EPOCHS: this run began with 1, not 2",
    ]


def test_one_process_tells_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes the first alone has a webhook and exporters: two would tell everything twice."""
    others, settings = Others(monkeypatch), demo(tmp_path)
    first = First()
    with next_attempt(settings, context(first), last=True):
        pass
    with next_attempt(settings, context(Second(first.told, same_machine=True)), last=True):
        pass
    assert others.webhooks == ["https://hooks.example/x", None]
    assert [set(asked) for asked in others.exporters] == [{"prometheus", "pod-annotation"}, set()]


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
    with next_attempt(settings, context(), last=True):
        pass
    told = [one for one in others.events if one["type"] == f"qlora-job.attempt.{kind}"]
    assert [one["data"]["attempt"] for one in told] == ([] if kind is None else [1])
    assert [one["data"]["attempt"] for one in others.events if one["type"].endswith(".started")] == [2]


def test_the_webhook_is_told_before_an_attempt_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it waits, after others without progress, the attempt has told its start, and tells its end."""
    others = Others(monkeypatch)
    monkeypatch.setattr(start_and_end, "notifying", webhook.notifying)

    def stopped(_attempt: Attempt) -> None:
        raise Preempted("stopped by SIGTERM")

    monkeypatch.setattr(Attempt, "pause_after_idle", stopped)
    settings = demo(tmp_path, JOB_RUN__NODES="2", JOB_RUN__NODE_RANK="0", JOB_RUN__RENDEZVOUS="localhost:29400")
    with (
        pytest.raises(Preempted),
        next_attempt(settings, context(), last=True),
    ):
        pytest.fail("did not wait")
    assert [one["type"].rpartition(".")[2] for one in others.events] == ["started", "preempted"]
