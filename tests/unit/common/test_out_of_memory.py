"""Running out of memory ends with a message and an exit code that is not retried."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from job.common.out_of_memory import check_address_space, memory_errors, ran_out, too_small
from job.errors import DataError, Problem, TrainingFailed

ROOT = Path(__file__).parents[3]
CPU_FULL = RuntimeError(
    "[enforce fail at alloc.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 MiB"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
        ValueError("a library says: Cannot allocate memory (os error 12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_said_in_words(error: Exception) -> None:
    """Whatever allocates: the message says what ran out and what to lower, and the code is 70."""
    with pytest.raises(TrainingFailed, match=r"while training; use .* with more memory, or lower A") as raised:
        fail(error)
    assert raised.value.exit_code == 70


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), DataError([Problem("row 1", "out of memory")]), KeyError("a")]
)
def test_other_errors_pass(error: Exception) -> None:
    """What is no lack of memory stays what it is."""
    with pytest.raises(type(error)) as raised:
        fail(error)
    assert raised.value is error


@memory_errors("training", "lower A")
def fail(error: Exception) -> None:
    """Fails as it is told."""
    raise error


def test_an_import_for_which_there_is_no_memory() -> None:
    """The loader's words, also where another library wraps them, or Python's own: no setting of the job would help."""
    for error in (cannot_map(), wrapped(), while_importing()):
        with pytest.raises(TrainingFailed, match="machine's memory ran out while libraries were imported") as raised:
            fail(error)
        assert "lower A" not in str(raised.value)


def cannot_map() -> ImportError:
    """As the loader says that a library does not fit into memory."""
    return ImportError("libtorch_cpu.so: failed to map segment from shared object")


def wrapped() -> Exception:
    """As numpy raises it anew, which hides the text."""
    error = ImportError("IMPORTANT: PLEASE READ THIS")
    error.__cause__ = cannot_map()
    return error


def while_importing() -> Exception:
    """As Python says that there is no memory for a module's code."""

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "no_memory_for_this":
                raise MemoryError

    sys.meta_path.insert(0, finder := Finder())  # type: ignore[arg-type]
    try:
        __import__("no_memory_for_this")
    except MemoryError as error:
        return error
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
    raise AssertionError


def test_whose_memory_it_is() -> None:
    """On a CPU the machine's, with the row's place and figures; no GPU is advised. On a GPU the GPU's."""
    said = str(too_small("training", 200_126, CPU_FULL, "rows.jsonl:2", free_bytes=1 << 29))
    row = "the machine's memory ran out in training with one row at a time: the longest row, rows.jsonl:2, has 200,126"
    assert said.startswith(row)
    assert "(3.0 GiB more could not be allocated; 512.0 MiB are free now" in said
    assert "use a machine with more memory" in said
    assert "GPU" not in said + str(ran_out("training", "lower A", CPU_FULL))
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 MiB")
    said = str(too_small("training", 9, on_gpu, free_bytes=1))
    assert said.startswith("the GPU's memory ran out in training with one row at a time: ")
    assert "use a GPU with more memory" in said
    assert "free now" not in said


def test_a_limit_that_is_too_low_for_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before they are imported, since some wait for ever or abort; a higher one, or none, is not."""
    monkeypatch.delitem(sys.modules, "torch")
    for limit in (3_000_000_000, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        check_address_space()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, 1 << 30))
    with pytest.raises(TrainingFailed, match=r"limited to 1\.0 GiB of address space .ulimit -v.*raise that limit"):
        check_address_space()


def test_an_import_that_misses_what_an_earlier_one_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts if this process has met a limit of its address space; where it has not, it is a bug."""
    missing = ImportError("cannot import name 'x' from 'y'")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmPeak:")[1].split()[0]) * 1024
    for limit in (peak + (1 << 30), resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        with pytest.raises(ImportError, match="cannot import name"):
            fail(missing)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (peak + (1 << 20), peak + (1 << 20)))
    with pytest.raises(TrainingFailed, match=r"while libraries were imported.*cannot import name 'x'"):
        fail(missing)
    with pytest.raises(KeyError):
        fail(KeyError("a"))


@pytest.mark.long
@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("checked", [True, False])
def test_a_process_without_memory_for_its_imports(command: str, checked: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """A real limit, refused at once, or met by an import: code 70, and one line with an explanation."""
    source = (
        "import resource, sys; from job import __main__; from job.common import out_of_memory as o\n"
        f"o._LIBRARIES_BYTES *= {checked:d}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (300_000_000, 300_000_000)); __main__.run()"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    environ |= {"PYTHONPATH": str(ROOT), "JOB_PRESET": "demo", "JOB_LOG__FORMAT": "json", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", source, command, "--run.output", str(tmp_path), "--run.id", "a"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == TrainingFailed.exit_code, done.stderr
    (line,) = done.stderr.splitlines()
    found = json.loads(line)
    assert found["exit_code"] == TrainingFailed.exit_code
    assert "limited to 286.1 MiB" in found["why"]
    assert "Traceback" not in done.stderr
