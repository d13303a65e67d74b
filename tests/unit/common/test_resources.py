"""Requirements on the machine: disk and shared memory, checked before anything is downloaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from job.common import resources
from job.common.resources import (
    MARGIN_BYTES,
    check_disk,
    check_shared_memory,
    checkpoint_bytes,
    disk_space,
    output_bytes,
    required_bytes,
)
from job.errors import Unreachable

SIZES = st.integers(0, 1 << 50)


@pytest.fixture
def usage(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Total and free bytes of every disk."""
    numbers = [0, 0]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(numbers[0], 0, numbers[1]))
    return numbers


def test_a_disk_with_enough_is_fine(usage: list[int], tmp_path: Path) -> None:
    """As much as is needed is enough."""
    usage[1] = 1000
    check_disk(tmp_path, 1000)


def test_a_disk_with_too_little_is_worth_another_machine(usage: list[int], tmp_path: Path) -> None:
    """The error says where, how much there is, how much is needed, and what to do; exit code 69."""
    usage[1] = 1 << 30
    with pytest.raises(Unreachable) as raised:
        check_disk(tmp_path, (1 << 30) + 1)
    text = str(raised.value)
    assert str(tmp_path) in text
    assert "1.0 GiB" in text
    assert "JOB_STORAGE__CACHE" in text


def test_a_folder_that_is_not_there_yet_is_measured_where_it_will_be(tmp_path: Path) -> None:
    """Nothing is created, and the real disk under the nearest parent counts."""
    check_disk(tmp_path / "a/b", 0)
    with pytest.raises(Unreachable, match="a/b"):
        check_disk(tmp_path / "a/b", 1 << 60)
    assert not (tmp_path / "a").exists()


def test_a_disk_that_cannot_be_measured_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not knowing is not the same as having enough."""

    def fails(place: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", fails)
    with pytest.raises(Unreachable, match="Input/output error"):
        check_disk(tmp_path, 0)


@pytest.mark.parametrize(("user", "writable"), [(0, 700), (1000, 500)])
def test_root_may_use_what_is_reserved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, user: int, writable: int
) -> None:
    """Of 1000 bytes 300 are used, and 200 are kept for root."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 300, 500))
    monkeypatch.setattr(resources.os, "geteuid", lambda: user)
    space = disk_space(tmp_path / "not" / "there")
    assert (space.total, space.free, space.writable) == (1000, 500, writable)
    assert space.shares(disk_space(tmp_path))
    assert not space.shares(replace(space, device=space.device + 1))


@pytest.mark.parametrize(
    ("keep", "saves", "others", "most"), [(2, 5, 0, 30), (2, 2, 5, 25), (2, 5, 9, 30), (1, 0, 7, 7)]
)
def test_results_need_room_for_checkpoints_or_what_follows(keep: int, saves: int, others: int, most: int) -> None:
    """One more checkpoint than are kept, for a moment; then the rest beside those that are kept."""
    assert output_bytes(10, keep=keep, saves=saves, others=others) == most


@given(st.lists(SIZES, max_size=4), SIZES)
def test_every_download_and_checkpoint_needs_room(downloads: list[int], checkpoint: int) -> None:
    """What is copied lies there once; states may lie there three times, and the adapter beside them."""
    assert required_bytes(downloads, checkpoint) == sum(downloads) + 4 * checkpoint + MARGIN_BYTES


def test_a_checkpoint_is_the_adapter_and_adams_moments() -> None:
    """Four bytes a parameter, and two or eight for both moments."""
    assert checkpoint_bytes(1000, "adamw_8bit") == checkpoint_bytes(1000, "paged_adamw_8bit") == 6000
    assert checkpoint_bytes(1000, "adamw_torch") == 12000


@pytest.mark.parametrize(
    ("processes", "total", "fine"), [(1, 64 << 20, True), (2, 64 << 20, False), (8, 1 << 30, True)]
)
def test_small_shared_memory_is_a_warning_for_several_processes(
    usage: list[int],
    processes: int,
    total: int,
    fine: bool,  # noqa: FBT001
) -> None:
    """Docker's 64 MiB break NCCL; a single process does not care; the line says what to do."""
    usage[0] = total
    with capture_logs() as lines:
        assert check_shared_memory(processes) is fine
    assert len(lines) == (not fine)
    assert all("--shm-size" in line["fix"] and line["log_level"] == "warning" for line in lines)


def test_no_shared_memory_at_all_is_small(tmp_path: Path) -> None:
    """A machine without the folder has none of it."""
    assert not check_shared_memory(2, tmp_path / "nowhere")
    assert check_shared_memory(1, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "own", "cpus"),
    [
        ({}, "0::/\n", 8),
        ({"cpu.max": "max 100000"}, "0::/\n", 8),
        ({"cpu.max": "250000 100000"}, "0::/\n", 2),
        ({"cpu.max": "50000 100000"}, "0::/\n", 1),
        ({"pod/cpu.max": "600000 100000", "pod/job/cpu.max": "max 100000"}, "0::/pod/job\n", 6),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/\n", 8),
        ({"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/a\n", 3),
        ({"cpu.max": "nonsense"}, "nonsense", 8),
    ],
)
def test_the_processors_are_those_that_may_be_used(
    files: dict[str, str], own: str, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Affinity counts, and so do the quotas of all cgroups above the process, of both versions."""
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    assert resources.usable_cpus(tmp_path / "groups", tmp_path / "own") == cpus
