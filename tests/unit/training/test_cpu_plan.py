"""What a CPU's memory allows: within the kernel's figure and the container's limits, cgroup v1 and v2."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from job.common.resources import available_bytes
from job.training import cpu_plan
from job.training.cpu_plan import keeps_activations
from tests.unit.training.test_memory_model import REFERENCE

GB = 10**9


@pytest.mark.parametrize("files", [("max", "current"), ("limit_in_bytes", "usage_in_bytes")])
@pytest.mark.parametrize(("taken", "left"), [("2000", 3400), ("6000", 0)])
def test_a_containers_limit_counts(tmp_path: Path, files: tuple[str, str], taken: str, left: int) -> None:
    """What the container has left, however much the machine has; files that it has read do not count against it."""
    place = tmp_path if files[0] == "max" else tmp_path / "memory"
    place.mkdir(exist_ok=True)
    for name, content in zip(files, ("5000", taken), strict=True):
        (place / f"memory.{name}").write_text(f"{content}\n")
    (place / "memory.stat").write_text("anon 12\ninactive_file 300\ntotal_inactive_file 400\nfile 9\n")
    assert available_bytes(tmp_path, tmp_path / "own") == left


@pytest.mark.parametrize(("own", "top"), [("0::/a/b\n", ""), ("5:cpu:/x\n4:memory:/a/b\n", "memory")])
def test_the_tightest_of_nested_groups_counts(tmp_path: Path, own: str, top: str) -> None:
    """A scheduler's group may lie below others; a line that makes no sense is passed over."""
    for place, most in (("a", "3000"), ("a/b", "9000")):
        (group := tmp_path / top / place).mkdir(parents=True)
        for name, content in (("max", most), ("current", "1000"), ("limit_in_bytes", most), ("usage_in_bytes", "1000")):
            (group / f"memory.{name}").write_text(content)
    (tmp_path / "own").write_text(own)
    assert available_bytes(tmp_path, tmp_path / "own") == 2000
    (tmp_path / "own").write_text("nonsense")
    assert available_bytes(tmp_path, tmp_path / "own") > 9000


@pytest.mark.parametrize("most", [None, "max", "9223372036854771712"])
def test_without_a_limit_the_kernel_is_believed(tmp_path: Path, most: str | None) -> None:
    """No such file, the word for none, or the number for none."""
    if most:
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text("1000\n")
    assert available_bytes(tmp_path, tmp_path / "own") == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_activations_are_kept_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a third of it: Mistral-7B's take 6.9 GB of 1,024 tokens in bf16, in each process."""
    found = {}
    for memory in (1, 16, 30, 60):
        monkeypatch.setattr(cpu_plan, "available_bytes", lambda memory=memory: memory * GB)
        found[memory] = [keeps_activations(REFERENCE, *how) for how in ((1024, 2), (1024, 1), (128, 1))]
    no, yes = False, True
    assert found == {1: [no, no, no], 16: [no, no, yes], 30: [no, yes, yes], 60: [yes, yes, yes]}
