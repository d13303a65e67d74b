"""What the command line checks about the machine before a run begins."""

from __future__ import annotations

import os
import tempfile

import pytest

from job.cli import library_variables
from job.cli.main import main


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A read-only container without /tmp is a setting to correct, exit code 2, and not a bug."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setenv("JOB_LOG__FORMAT", "json")
    assert main(["run", "--preset", "demo"]) == 2
    assert "TMPDIR (environment): no writable folder for temporary files; mount one at /tmp" in capsys.readouterr().err


def test_transformers_reports_nothing_to_kubeflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its callback calls a preempted run complete; who wants it all the same sets the variable."""
    from transformers.integrations import is_kubeflow_available

    environ = {name: value for name, value in os.environ.items() if name != "DISABLE_KUBEFLOW_INTEGRATION"}
    monkeypatch.setattr(os, "environ", {**environ, "KUBEFLOW_TRAINER_SERVER_URL": "https://trainer"})
    assert is_kubeflow_available()
    library_variables.configure_libraries(None)
    assert not is_kubeflow_available()


@pytest.mark.parametrize(
    ("cpus", "processes", "threads"), [(4, 1, None), (2, 1, "2"), (1, 1, "1"), (4, 2, "2"), (2, 8, "1")]
)
def test_threads_are_as_many_as_the_container_s_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, processes: int, threads: str | None
) -> None:
    """On four processors of which a quota leaves `cpus`; what the user has set stays."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(library_variables, "usable_cpus", lambda: cpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    library_variables.share_cpus(processes)
    assert os.environ.get("OMP_NUM_THREADS") == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    library_variables.share_cpus(processes)
    assert os.environ["OMP_NUM_THREADS"] == "7"
