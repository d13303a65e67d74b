"""The disk of JOB_RUN__OUTPUT: only what cannot fit is refused, before training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from job.checkpoints import checkpoint_store
from job.checkpoints.checkpoint_store import MarkerFields
from job.common.resources import OTHER_OUTPUT_BYTES, DiskSpace, output_bytes
from job.errors import Unreachable
from job.export.merge_plan import Candidates
from job.records import StepMetrics
from job.runs.layout import CHECKPOINTS
from job.settings.load import load_settings
from job.stages import output_disk, train
from job.stages.export_check import ExportSizes
from job.stages.output_disk import OutputNeed, check_output_disk
from job.storage.local import LocalStore

NUMBERS = 10_000_000
CHECKPOINT = NUMBERS * (4 + 2)
"""Of the adapter in fp32 and the two 8-bit states of `adamw_8bit`."""
NEED = OutputNeed(CHECKPOINT, keep=2, saves=5, adapter=4 * NUMBERS)
MERGED = OutputNeed(
    CHECKPOINT, 2, 5, 4 * NUMBERS, ExportSizes(Candidates(("a", "b"), 10 * CHECKPOINT), CHECKPOINT), ("merged", "fp8")
)


@pytest.mark.parametrize(("keep", "saves"), [(1, 1), (2, 2), (2, 3), (2, 5), (3, 5)])
def test_what_is_there_at_most_is_what_uploads_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, saves: int
) -> None:
    """Measured before each deletion: no fewer bytes than are counted on, so nothing that fits is refused."""
    store, most, plain = LocalStore(tmp_path / "run"), 0, checkpoint_store.prune

    def prune(*given: Any, **named: Any) -> None:
        nonlocal most
        most = max(most, sum(info.bytes for info in store.list(CHECKPOINTS) if info.key.endswith("file")))
        plain(*given, **named)

    monkeypatch.setattr(checkpoint_store, "prune", prune)
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "file").write_bytes(bytes(1000))
    publish = checkpoint_store.make_committer(
        store, MarkerFields(1, 1, {}), keep=keep, settle_seconds=0, verified=0, on_committed=lambda *_: None
    )
    for step in range(1, saves + 1):
        publish(tmp_path / "step", step)
    assert most == output_bytes(1000, keep=keep, saves=saves)


@pytest.mark.parametrize(
    ("need", "checkpoints", "exports", "apart", "together"),
    [
        (NEED, 0, 0, 3, 4),  # the one that is uploaded lies in the folder for temporary files as well
        (replace(NEED, saves=1), 0, 0, 1, 2),
        (NEED, 1, 0, 2, 3),
        (NEED, 2, 0, 1, 2),
        (NEED, 9, 0, 1, 2),  # of another size: none is deleted before the first one is complete
        (replace(NEED, saves=0), 2, 0, 0, 0),
        (MERGED, 0, 0, 2 + 10, 2 + 30),  # `fp8` may turn out impossible, and then takes nothing
        (MERGED, 0, 10, 3, 2 + 20),
        (replace(MERGED, saves=0), 2, 0, 10, 30),
        (replace(MERGED, formats=("fp8",)), 0, 0, 3, 4),
    ],
)
def test_the_least_that_must_be_free(
    need: OutputNeed, checkpoints: int, exports: int, apart: int, together: int
) -> None:
    """In checkpoints: by what is there already, and on one disk with the temporary files, whose need is added."""
    there = (checkpoints * CHECKPOINT, exports * CHECKPOINT)
    assert need.least(*there, shared=False) == apart * CHECKPOINT
    assert need.least(*there, shared=True) == together * CHECKPOINT
    for shared in (False, True):
        assert need.likely(*there, shared=shared) >= need.least(*there, shared=shared)


@pytest.mark.parametrize(
    ("need", "checkpoints", "exports", "apart", "together"),
    [
        # In millions of bytes: three checkpoints of 60; together also four copies of one among the temporary files.
        (NEED, 0, 0, 180, 240),
        (NEED, 60, 0, 120, 240),
        # 40 of the adapter are more than one checkpoint less: two that are kept, and what is written after training.
        (replace(NEED, adapter=100_000_000), 0, 0, 220, 240),
        (replace(NEED, saves=0, adapter=0), 0, 0, 0, 0),
        # Two kept, the adapter's 40, the merged model's 600, the derived format's 60; together: two candidates and 60.
        (MERGED, 0, 0, 820, 1200 + 60 + 240),
        (MERGED, 0, 660, 160, 1200 + 60 + 240),
        (replace(MERGED, formats=("fp8",)), 0, 0, 220, 1200 + 60 + 240),
    ],
)
def test_what_should_be_free(need: OutputNeed, checkpoints: int, exports: int, apart: int, together: int) -> None:
    """By what is there, and what the temporary files need on the same disk; the reserves are 32 MiB and 256 MiB."""
    there, million = (checkpoints * 10**6, exports * 10**6), 10**6
    assert need.likely(*there, shared=False) == apart * million + (32 << 20)
    assert need.likely(*there, shared=True) == (apart + together) * million + (32 + 256 << 20)


def test_no_less_should_be_free_than_must_be() -> None:
    """Checkpoints of another size count as space, although none of them is deleted before the first one is complete."""
    for shared, least in ((False, CHECKPOINT), (True, 2 * CHECKPOINT)):
        assert NEED.likely(20 * CHECKPOINT, 0, shared=shared) == least


def check(folder: Path, *words: str, rows: int = 200, trains: bool = True) -> list[Any]:
    """`check_output_disk` of a run; returns what it logs. With 200 rows there are five checkpoints."""
    attempt: Any = SimpleNamespace(store=LocalStore(folder / "out" / "run"), work=folder / "work")
    with capture_logs() as lines:
        check_in(attempt, *words, rows=rows, trains=trains)
    return lines


def check_in(attempt: Any, *words: str, rows: int = 200, trains: bool = True) -> None:
    """`check_output_disk` by the settings of a run."""
    model: Any = torch.nn.Linear(NUMBERS, 1, bias=False, device="meta")
    model.device = torch.device("cpu")
    loaded: Any = SimpleNamespace(model=model)
    settings = load_settings(["--preset=demo", "--train.global_batch_size=2", "--train.epochs=1", *words], {})
    options, saving, formats = settings.train, settings.checkpoint, settings.export.formats
    check_output_disk(attempt, loaded, options, saving, formats, rows=rows, trains=trains, exports=None)


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> dict[str, DiskSpace]:
    """The disks of the run's folder and of the temporary files."""
    found = {"run": DiskSpace(1, 1 << 40, 0, 0), "work": DiskSpace(2, 1 << 40, 0, 0)}
    monkeypatch.setattr(output_disk, "disk_space", lambda folder: found[folder.name])
    return found


def test_what_cannot_fit_is_refused(disks: dict[str, DiskSpace], tmp_path: Path) -> None:
    """A byte less than three checkpoints: the folder and the fixes are named. With as much there is a warning alone."""
    disks["run"] = DiskSpace(1, 1 << 40, 0, 3 * CHECKPOINT - 1)
    with pytest.raises(Unreachable) as raised:
        check(tmp_path)
    said = str(raised.value)
    assert said.startswith("JOB_RUN__OUTPUT: the disk is too small for the run: 171.7 MiB are free")
    assert all(words in said for words in ("171.7 MiB in", f"{tmp_path}/out/run;", "bucket; JOB_CHECKPOINT__KEEP=1"))
    assert str(tmp_path / "work") not in said
    assert check(tmp_path, "--checkpoint.keep=1") == check(tmp_path, trains=False) == []
    disks["run"] = DiskSpace(1, 1 << 40, 0, 3 * CHECKPOINT)
    (line,) = check(tmp_path)
    assert (line["log_level"], line["folder"]) == ("warning", f"{tmp_path}/out/run")
    disks["run"] = DiskSpace(1, 1 << 40, 0, 3 * CHECKPOINT + OTHER_OUTPUT_BYTES)
    assert check(tmp_path) == []


def test_on_one_disk_the_temporary_files_count(disks: dict[str, DiskSpace], tmp_path: Path) -> None:
    """Both folders are named. A quota of one of them, which has another total, keeps them apart."""
    disks["run"] = disks["work"] = DiskSpace(1, 1 << 40, 0, 4 * CHECKPOINT - 1)
    with pytest.raises(Unreachable, match=f"in {tmp_path}/out/run and {tmp_path}/work, on one disk;"):
        check(tmp_path)
    disks["work"] = replace(disks["work"], total=1 << 30)
    assert check(tmp_path) == []


def test_what_is_left_of_a_run_is_counted(disks: dict[str, DiskSpace], tmp_path: Path) -> None:
    """A run with all checkpoints needs none; one that may have stopped early is not held up for one, either."""
    store = LocalStore(tmp_path / "out" / "run")
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "file").write_bytes(b"x")
    publish = partial(checkpoint_store.commit, store, tmp_path / "step", writer=MarkerFields(1, 1, {}))
    disks["run"] = DiskSpace(1, 1 << 40, 0, CHECKPOINT)
    early = ("--train.stop_after=1", "--data.validation=0.5")
    check(tmp_path, *early)  # it writes one at least
    publish(80)
    check(tmp_path)  # the last one
    disks["run"] = DiskSpace(1, 1 << 40, 0, CHECKPOINT - 1)
    with pytest.raises(Unreachable):
        check(tmp_path)
    check(tmp_path, *early)
    publish(100)
    check(tmp_path)


def test_a_bucket_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it listed."""
    monkeypatch.setattr(output_disk, "disk_space", None)
    check_in(SimpleNamespace(store=SimpleNamespace(uri="s3://bucket/runs/run")))


def test_a_failed_upload_ends_the_next_step() -> None:
    """Not the next checkpoint, up to which the steps would be lost. The step itself is counted and logged."""
    shown: list[int] = []
    attempt: Any = SimpleNamespace(step_done=lambda *_: None, on_metrics=lambda _: None)

    def check_upload() -> None:
        raise Unreachable("full")

    on_metrics = train._step_logger(attempt, lambda step, **_: shown.append(step), train.Stopwatch(), 44, check_upload)
    measured = {"seconds": 1.0, "tokens_per_second": 1.0, "memory_bytes": 1.0}
    with pytest.raises(Unreachable, match="full"):
        on_metrics(StepMetrics(21, 0.1, 1.0, 1e-3, 1.0, 1, 1, measured))
    assert shown == [21]
    assert attempt.training.step == 21
