"""`make standstill`: an attempt is suspended right before a write, its successor finishes the run, then it continues.

It is suspended after it has passed the fence, at every kind of write that an undisturbed run makes. The successor's run
must verify and equal the undisturbed run bit by bit, and the old attempt must end as replaced (76), or with 0 if the
run was already complete.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from job.errors import Replaced
from job.results.completed import read_complete
from job.results.reader import open_run, parse, read_bytes
from job.runs import lease
from job.runs.layout import facts_of
from job.storage.base import CHANGES
from job.storage.open import StorageOptions, open_store
from tests import clouds
from tests.chaos import hot_forks, small

SECONDS = 240
_RUN = "run"


def watch_changes(then: Callable[[str, str], object]) -> None:
    """Makes this process call `then(verb, key)` after a write has passed the fence, before it is made."""
    original: Any = lease._FencedStore.around

    @contextmanager
    def around(self: Any, verb: str, key: str) -> Iterator[None]:
        with original(self, verb, key):
            if verb in CHANGES:
                then(verb, key)
            yield

    lease._FencedStore.around = around  # type: ignore[method-assign]


def stop_at(change: str, number: int) -> Callable[[], None]:
    """Suspends this process at the write of this kind with this number, from 1."""
    seen = 0

    def then(verb: str, key: str) -> None:
        nonlocal seen
        seen += kind(verb, key) == change
        if kind(verb, key) == change and seen == number:
            os.kill(os.getpid(), signal.SIGSTOP)

    return lambda: watch_changes(then)


def kind(verb: str, key: str) -> str:
    """The kind of a write: a star replaces every number or hash in its key."""
    return f"{verb} {re.sub(r'[0-9a-f]{12,}|[0-9]+', '*', key)}"


def recorded(environ: Mapping[str, str], folder: Path) -> list[str]:
    """The writes of an undisturbed run, in order."""
    log = folder / "changes"

    def note(verb: str, key: str) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{kind(verb, key)}\n")

    child = hot_forks.start([], environ, folder / "output", folder / "errors", lambda: watch_changes(note))
    _expect(0, hot_forks.wait(child, SECONDS), folder)
    return log.read_text(encoding="utf-8").splitlines()


def _expect(code: int, found: int, folder: Path) -> None:
    if found != code:
        raise AssertionError(f"{found} and not {code}:\n{(folder / 'errors').read_text(encoding='utf-8')[-3000:]}")


def try_one(environ: Mapping[str, str], folder: Path, change: str, number: int, expected: Mapping[str, str]) -> str:
    """Suspends one attempt there, and lets the next one finish the run; returns the violation, empty for none."""
    folder.mkdir()
    begun = time.monotonic()
    old = hot_forks.start([], environ, folder / "old-output", folder / "old-errors", stop_at(change, number))
    status = os.waitpid(old, os.WUNTRACED)[1]
    if not os.WIFSTOPPED(status):  # the number of an attempt's progress records depends on the machine's speed
        code = os.waitstatus_to_exitcode(status)
        print(f"{change} {number}: ended with {code} before it came there", flush=True)
        return "" if code == 0 else f"ended with {code}"
    where = f"{environ['JOB_RUN__OUTPUT']}/{_RUN}"
    # The last record of an attempt follows its manifest: a successor then finds a complete run, and replaces nobody.
    complete = clouds.in_fork(lambda: _is_complete(where, environ))
    successor = hot_forks.run([], environ, timeout=SECONDS)
    os.kill(old, signal.SIGCONT)
    code = hot_forks.wait(old, SECONDS)
    verify = hot_forks.run(["verify", where], _reading(environ), timeout=SECONDS)
    wrong = [] if successor.returncode == 0 else [f"the successor ended with {successor.returncode}"]
    wrong += [] if code == (0 if complete else Replaced.exit_code) else [f"the old attempt ended with {code}"]
    wrong += [] if verify.returncode == 0 else [f"verify {verify.returncode}"]
    if not wrong and clouds.in_fork(lambda: _facts(where, environ)) != expected:
        wrong.append("another result")
    (folder / "log").write_text(successor.stderr + verify.stdout, encoding="utf-8")
    print(f"{change} {number}: {', '.join(wrong) or 'kept'} ({time.monotonic() - begun:.1f} s)", flush=True)
    for line in (line for line in verify.stdout.splitlines() if wrong and "claimed" in line):
        print(f"    {line[:200]}", flush=True)
    return ", ".join(wrong)


def _is_complete(where: str, environ: Mapping[str, str]) -> bool:
    store = open_store(where, StorageOptions(endpoint_url=environ.get("JOB_STORAGE__ENDPOINT_URL")))
    return read_complete(store) is not None


def _facts(where: str, environ: Mapping[str, str]) -> dict[str, str]:
    options = StorageOptions(endpoint_url=environ.get("JOB_STORAGE__ENDPOINT_URL"))
    return facts_of(parse(read_bytes(open_run(where, options))))


def _reading(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without variables that only `run` accepts."""
    storage = ("JOB_STORAGE__", "JOB_LOG__")
    return {name: value for name, value in environ.items() if not name.startswith("JOB_") or name.startswith(storage)}


def main() -> int:
    """Tries, and prints each outcome; exit code 1 if a requirement was violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=clouds.SCHEMES, help="the runs lie in an imitation of this store")
    parser.add_argument("--first", type=int, default=0, help="number of the first kind of change")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many, whatever is left")
    parser.add_argument("--only", default="", help="kinds of changes with this in them")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qlora-job-standstill-") as name, ExitStack() as stack:
        folder = Path(name)
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("JOB_")},
            **small.settings(folder, rows=24, questions=16),
            "JOB_TRAIN__MAX_STEPS": "8",
            "JOB_RUN__ID": _RUN,
        }
        hot_forks.heat([])
        if chosen.store:
            environ |= stack.enter_context(clouds.process(chosen.store))
        outputs = f"{clouds.place(chosen.store)}/" if chosen.store else f"{folder}/"
        first = {**environ, "JOB_RUN__OUTPUT": f"{outputs}undisturbed"}
        changes = [change for change in recorded(first, folder) if chosen.only in change]
        expected = clouds.in_fork(lambda: _facts(f"{outputs}undisturbed/{_RUN}", environ))
        tries = [(change, number) for change in dict.fromkeys(changes) for number in {1, changes.count(change)}]
        begun, broken, done = time.monotonic(), 0, 0
        for number, (change, nth) in enumerate(tries[chosen.first :], start=chosen.first):
            there = {**environ, "JOB_RUN__OUTPUT": f"{outputs}try-{number}"}
            broken += bool(try_one(there, folder / f"try-{number}", change, nth, expected))
            done += 1
            if time.monotonic() - begun > 60 * chosen.minutes:
                break
        print(f"{done} of {len(tries)} tries from {chosen.first} on: {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
