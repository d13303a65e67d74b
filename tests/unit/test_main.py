"""The entry point: the process ends at once with the command's exit code, and no output is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def ended(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process that runs the entrypoint over what the script makes of the command line."""
    source = (
        f"import sys, threading, time\nfrom job.cli import main as cli\n{script}\nfrom job.__main__ import run; run()"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options |= {"stderr": subprocess.PIPE, "timeout": 300}
    return subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=buffered, text=True, check=False, **options)


def test_the_process_waits_for_nothing() -> None:
    """Not even for threads that are no daemons; what was said is written out first."""
    script = """
def main():
    threading.Thread(target=time.sleep, args=[600]).start()
    print("last words"); print("and worse", file=sys.stderr)
    return 75
cli.main = main"""
    done = ended(script, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (75, "last words\n", "and worse\n")


def test_a_reader_who_has_left_changes_no_exit_code() -> None:
    """What could not be written out any more is no reason to say that something went wrong."""
    reader, writer = os.pipe()
    os.close(reader)
    done = ended("cli.main = lambda: print('too late') or 3", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(("code", "then"), [(0, 1), (75, 75)])
def test_output_that_is_lost_is_no_success(code: int, then: int) -> None:
    """On a full disk the requested output is lost, which is a failure. A more serious code is kept."""
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = ended(f"cli.main = lambda: print('too much') or {code}", stdout=full.fileno())
    assert (done.returncode, done.stderr) == (then, "")


def test_a_closed_output_changes_no_exit_code() -> None:
    """A process may be started without any."""
    source = "import sys; sys.stdout = None\ncli.main = lambda: 4"
    assert ended(source).returncode == 4


RESULT = "import sys; from job import log; sys.argv = ['job', '--version']\n"


@pytest.mark.parametrize("problem", ["full", "nobody reads", "closed", "all closed"])
def test_a_result_that_cannot_be_printed_is_no_bug(problem: str) -> None:
    """On a full disk it is lost, which the log and the exit code say; where nobody reads it, nothing is."""
    reader, writer = os.pipe()
    os.close(reader)
    closed = {"closed": [1], "all closed": [0, 1, 2]}.get(problem, [])
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        out = full.fileno() if problem == "full" else writer
        close = f"import os; [os.close(n) for n in {closed}]; sys.stdout = sys.stdout if {closed} == [] else None\n"
        done = ended(RESULT + close, stdout=out)
    os.close(writer)
    assert done.returncode == (1 if problem == "full" else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert ("cannot be printed" in done.stderr) == (problem == "full")


def test_what_is_closed_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    """A file that the job opens never gets the number of a standard stream, where others would print into it."""
    script = f"""
import os
for number in (0, 1, 2): os.close(number)
def main():
    with open({str(tmp_path / "file")!r}, "w") as file:
        os.write(1, b"printed"); os.write(2, b"logged")
        return file.fileno()
cli.main = main"""
    assert ended(script, stdout=subprocess.PIPE).returncode > 2
    assert (tmp_path / "file").read_bytes() == b""


def test_what_a_parent_did_to_its_own_signals_is_undone() -> None:
    """A request to stop arrives, and a child's exit code is known, whatever the parent blocked or ignored."""
    script = """
import os, signal, subprocess
stopped = []
def main():
    os.kill(os.getpid(), signal.SIGTERM)
    return 10 * len(stopped) + subprocess.run([sys.executable, "-Sc", "raise SystemExit(3)"]).returncode
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
cli.main = main"""
    assert ended(script).returncode == 13


def test_a_request_to_stop_that_came_before_python_is_a_preemption() -> None:
    """Blocked since the entrypoint ended; process 1 of a container would have ignored it, any other ended with 143."""
    script = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getpid(), signal.SIGTERM)
cli.main = lambda: 0"""
    assert ended(script).returncode == 75


INTERRUPT = "import os, signal, weakref\ninterrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
IMPORTED = """
class Finder:
    def find_spec(self, name, *_):
        if name == "torch": interrupt()
sys.meta_path.insert(0, Finder())
def dispatch(words):
    try: import torch
    except BaseException: raise ValueError("a library's own words")
cli._dispatch = dispatch"""
FORGOTTEN = """
def main():
    thing = type("Thing", (), {})(); watch = weakref.ref(thing, interrupt); del thing
    return 1
cli.main = main"""


@pytest.mark.parametrize(
    "script",
    ["cli.main = interrupt", IMPORTED, FORGOTTEN],
    ids=["at once", "turned into another error while a library is imported", "in a callback that forgets it"],
)
def test_ctrl_c_ends_a_command_without_a_traceback(script: str) -> None:
    """By the signal, as other programs: a shell shows 130, and ends a loop around it."""
    done = ended(f"{INTERRUPT}{script}\nsys.argv[1:] = ['status', 'x']")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("words", [[], ["export", "x"]])
def test_ctrl_c_before_a_run_has_its_handlers_is_a_preemption(words: list[str]) -> None:
    """In one line, with the exit code that it has a moment later."""
    done = ended(f"{INTERRUPT}cli.main = interrupt\nsys.argv[1:] = {words}")
    line = {"event": "stopped by SIGINT", "level": "error", "exit_code": 75}
    assert (done.returncode, json.loads(done.stderr)) == (75, line)


def test_an_interrupt_that_the_parent_ignores_stays_ignored() -> None:
    """As of a job in the background of a script."""
    script = f"{INTERRUPT}signal.signal(signal.SIGINT, signal.SIG_IGN)\ncli.main = lambda: interrupt() or 3"
    assert ended(script).returncode == 3


def test_characters_without_bytes_are_printed_as_escapes() -> None:
    """Where stdout is not UTF-8, or a name has none, a result is printed all the same."""
    script = "sys.stdout.reconfigure(encoding='ascii')\nfrom job import log"
    script += "\ncli.main = lambda: int(not log.print_result('caf\\xe9 \\udcff'))"
    assert ended(script, stdout=subprocess.PIPE).stdout == "caf\\xe9 \\udcff"


def test_nothing_is_looked_through_while_it_is_imported() -> None:
    """Garbage collection is off until everything is imported; then it skips what was imported."""
    script = """
import gc
def main():
    from job.common import garbage_collection as garbage
    off = gc.isenabled(); garbage.enable(); garbage.enable()
    return 10 * off + gc.isenabled() + (gc.get_freeze_count() > 1000)
cli.main = main"""
    assert ended(script).returncode == 2
