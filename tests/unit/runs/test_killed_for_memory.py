"""If the kernel killed an attempt for lack of main memory, the next one and `status` say so, with what to change."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from job.common.resources import MainMemory, main_memory
from job.errors import JobError
from job.results.status import STALLED_SECONDS
from job.results.status_text import as_lines
from job.runs import attempt, open_attempt
from job.runs.killed_for_memory import why_killed
from job.runs.run_log import LoggedAttempt, Noted, parse_logged
from job.storage.local import LocalStore
from tests.unit.results.test_status import attempt_at, seen

MUCH = MainMemory(total_bytes=64 << 30, available_bytes=60 << 30, oom_kills=2, group="boot/17")
LITTLE = replace(MUCH, available_bytes=1 << 30)


def logged(memory: MainMemory | None, **noted: Any) -> LoggedAttempt:
    """An attempt that recorded this last."""
    return LoggedAttempt(record=None, noted=Noted("2026-01-01T00:00:00Z", memory=memory, **noted))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        (logged(MUCH), MUCH, None),
        (
            logged(MUCH),
            replace(MUCH, oom_kills=3),
            "the kernel has killed a process of this container .* main memory was full .1 time by",
        ),
        (logged(MUCH), replace(MUCH, oom_kills=9, group="boot/18"), None),
        (logged(replace(MUCH, oom_kills=None)), replace(MUCH, oom_kills=None), None),
        (logged(LITTLE), None, "it had 1.0 GiB of 64.0 GiB of main memory left"),
        (logged(MUCH, loading=True), None, "killed while the model was loaded.* exit code was 137.* OOMKilled"),
        (logged(MUCH, stage="train"), None, None),
        (logged(None, loading=True), MUCH, None),
        (LoggedAttempt(record=None), MUCH, None),  # type: ignore[arg-type]
    ],
)
def test_what_points_to_memory(before: LoggedAttempt, now: MainMemory | None, why: str | None) -> None:
    """The kernel's count in the same control group, little memory left, or a kill in loading; else nothing is said."""
    found = why_killed(before, now)
    assert (found is None) == (why is None)
    assert why is None or re.search(why, str(found))


def test_the_next_attempt_and_status_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings to change, in the log and for people; an attempt that ended by itself is not spoken of."""
    run, memory = tmp_path / "run", [MUCH]
    for module in (attempt, open_attempt):
        monkeypatch.setattr(module, "main_memory", lambda: memory[0])
    with attempt_at(run, killed=True) as first:
        first.loading = True
        first.note("running")
    stalled = seen(run, 2 * STALLED_SECONDS)
    text = "\n".join(as_lines(stalled))
    assert "likely cause" in text
    assert "JOB_MODEL__PLACEMENT" in text
    memory[0] = replace(MUCH, oom_kills=3)
    with capture_logs() as logs, attempt_at(run):
        (line,) = [line for line in logs if line["log_level"] == "warning"]
        assert "1 time" in line["why"]
        assert "JOB_RUN__PROCESSES" in line["fix"]
        end = seen(run).last_end
    assert end is not None
    assert (end.attempt, end.outcome) == (1, "killed")
    assert "oom_kill in memory.events" in str(end.why)  # what the second one compared, which the record alone has not
    with capture_logs() as logs, pytest.raises(JobError), attempt_at(run):
        raise JobError("an error of its own")
    assert not [line for line in logs if line["log_level"] == "warning"]


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have none of this; what is written now comes back."""
    run = tmp_path / "run"
    with attempt_at(run):
        pass
    stored = LocalStore(run).read("attempts/0001.json")
    assert stored is not None
    noted = parse_logged(stored.data).noted
    assert noted is not None
    assert noted.memory is not None
    assert noted.memory.total_bytes >= noted.memory.available_bytes > 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_kernels_count_is_that_of_the_own_group(tmp_path: Path, version: int) -> None:
    """Those of groups above include the kills of others; the least limit of all of them counts."""
    top, name = (tmp_path, "memory.events") if version == 2 else (tmp_path / "memory", "memory.oom_control")
    limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
    (own := top / "pod/job").mkdir(parents=True)
    for folder, kills, most in ((top / "pod", 7, "3000"), (own, 2, "9000")):
        (folder / name).write_text(f"low 0\noom 9\noom_kill {kills}\n")
        (folder / limit).write_text(f"{most}\n")
    (tmp_path / "own").write_text("0::/pod/job\n" if version == 2 else "4:memory:/pod/job\n")
    found = main_memory(tmp_path, tmp_path / "own")
    assert (found.oom_kills, found.total_bytes) == (2, 3000)
    assert found.group.endswith(f"/{own.stat().st_ino}")
    (tmp_path / "own").write_text("0::/elsewhere\n")
    assert main_memory(tmp_path / "nowhere", tmp_path / "own").oom_kills is None
