"""A helper process runs a module, and ends with the context that started it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from job.common.helper_process import start_helper

HELPER = """
import os, sys, time

def main():
    print(sys.argv[1:], os.environ["OF_ITS_OWN"], sys.stdin.readline().strip(), flush=True)
    print("what it says last\\n\\n", file=sys.stderr, flush=True)
    os.close(1)
    time.sleep(100)
"""


def test_a_helper_runs_a_module_and_ends_with_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that only this process's path has is found; arguments and variables arrive; its end leaves nothing."""
    (tmp_path / "helper_of_this_test.py").write_text(HELPER, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with start_helper("helper_of_this_test", "a", "b c", environ={"OF_ITS_OWN": "ä"}) as helper:
        helper.stdin.write(b"asked\n")
        helper.stdin.flush()
        assert helper.stdout.read().decode() == "['a', 'b c'] ä asked\n"
        assert helper.last_error_line() == "what it says last"
        assert helper.process.poll() is None
    assert helper.process.returncode == -9
    assert not psutil.pid_exists(helper.process.pid)
