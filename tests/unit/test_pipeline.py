"""The order of a run: what ends it early, what is repeated, and how long the other processes wait."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job import pipeline
from job.errors import SettingsError, TrainingFailed
from job.preemption.stop_flag import StopFlag
from job.records import Evaluated, Exported, ScoringPrecision
from job.runs.layout import EXPORTED_RUN, stage_key
from job.runs.run_log import IdleLimit
from job.settings.load import load_settings
from job.settings.training_stages import folder_of, split_stages
from job.start_and_end import ProcessContext
from job.storage.local import LocalStore
from tests.attempts import Second


def test_the_others_wait_until_the_run_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To push a large model takes minutes: if they ended before, the launcher would kill process 0 meanwhile.

    Trackers and the webhook get the results before.
    """
    asked: list[Any] = []

    class Waiting(Second):
        def broadcast(self, what: str, value: Callable[[], Any]) -> Any:
            asked.append(what)
            return {}

    stage: Any = SimpleNamespace(precision=None, cache_entry=None, record=None)
    attempt = SimpleNamespace(timed=lambda _: nullcontext(), store=None, on_results=asked.append)
    for name in ("pull", "_load", "_evaluate_base", "_train", "_evaluate_adapter", "_export"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: stage)
    monkeypatch.setattr(pipeline, "deliver_if_complete", lambda *_: None)
    monkeypatch.setattr(pipeline, "next_attempt", lambda *_, **__: nullcontext(attempt))
    monkeypatch.setattr(pipeline, "_publish", lambda *_, **__: {"gate": {"passed": None}})
    monkeypatch.setattr(pipeline, "deliver_and_push", lambda *_, **__: pytest.fail("not the first process"))
    settings = load_settings([], {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(tmp_path)})
    pipeline.run(settings, ProcessContext(StopFlag(), lambda: None, IdleLimit(5), processes=Waiting({})))
    assert asked[-2:] == [{"gate": {"passed": None}}, "handed over"]


def test_training_of_the_first_stage_that_fails_names_its_own_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lower JOB_TRAIN__LEARNING_RATE` would change nothing where the rate is that of JOB_TRAIN__SFT_LEARNING_RATE."""

    def fails(*_: Any) -> None:
        raise TrainingFailed("the loss is nan. Lower JOB_TRAIN__LEARNING_RATE")

    attempt = SimpleNamespace(timed=lambda _: nullcontext())
    monkeypatch.setattr(pipeline, "next_attempt", lambda *_, **__: nullcontext(attempt))
    monkeypatch.setattr(pipeline, "check_before_lease", lambda *_: None)
    monkeypatch.setattr(pipeline, "pull", lambda *_: None)
    monkeypatch.setattr(pipeline, "_load", fails)
    both = {"JOB_TRAIN__METHOD": "sft,dpo", "JOB_DATA__SFT_SOURCE": "rows", "JOB_DATA__SOURCE": "pairs"}
    environ = {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(tmp_path), "JOB_RUN__ID": "a-run"}
    stages = split_stages(load_settings([], environ | both))
    for settings, name in zip(stages, ("SFT_LEARNING_RATE", "LEARNING_RATE"), strict=True):
        with pytest.raises(TrainingFailed, match=rf"Lower JOB_TRAIN__{name}$"):
            pipeline._run_training_stage(settings, ProcessContext(StopFlag(), lambda: None, IdleLimit(5)), None)


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
    given: Any = (Recorded(), settings, None, None)
    for now in (was, ScoringPrecision("fp16", "fp32", "")):
        base = Evaluated({}, [], precision=now)
        pipeline._export(*given, base=base, trained=None)  # type: ignore[arg-type]
    assert objections == ["", "it was scored in another precision than the base"]


@pytest.mark.parametrize(
    "stages", [{}, {"JOB_TRAIN__METHOD": "sft,dpo", "JOB_DATA__SFT_SOURCE": "rows", "JOB_DATA__SOURCE": "pairs"}]
)
def test_no_stage_is_trained_where_a_finished_run_was_being_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: dict[str, str]
) -> None:
    """Neither is the first of two, whose own folder does not say that the run exports a finished one."""
    environ = {"JOB_PRESET": "demo", "JOB_RUN__OUTPUT": str(tmp_path), "JOB_RUN__ID": "a-run"}
    settings = load_settings([], environ | stages)
    LocalStore(Path(folder_of(settings))).write(stage_key(EXPORTED_RUN), b"{}")
    monkeypatch.setattr(pipeline, "check_before_lease", lambda *_, **__: pytest.fail("a stage has begun"))
    with pytest.raises(SettingsError, match=r"JOB_EXPORT__RUN: is not set, but .*/a-run has begun to export"):
        pipeline.run(settings, ProcessContext(StopFlag(), lambda: None, IdleLimit(5)))
