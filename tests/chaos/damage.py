"""`make damage`: files of run folders are damaged at random, then the job resumes or reads the run.

Every case must end with the result of the undisturbed run, bit by bit, or with an exit code of the table.
Never a traceback, never another adapter with exit code 0, never `verify` with 0 on a damaged finished run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from job.common.hashing import hash_facts, hash_file
from job.errors import JobError, exit_codes
from job.runs.layout import ARTIFACTS, MADE_OF_TIMES, METRICS, RESULTS, facts_of
from job.storage.open import open_store
from tests import clouds, warm
from tests.chaos import hot_forks, small
from tests.spread import spread

RUN, OTHER = "run", "other"
FINISHED = "finished"
TO_PUBLISH = "before publishing"
STATES = {FINISHED: None, "in training": "kill@step=7", TO_PUBLISH: "kill@stage=publish"}
"""State of a run folder -> the fault that leaves it."""
SECONDS = 120
"""A command that takes longer hangs."""


@dataclass(frozen=True)
class World:
    """The starting point of all cases: settings, copies of run folders by state, and results of the undisturbed run."""

    folder: Path
    environment: Mapping[str, str]
    states: Mapping[str, Path]
    other: Path
    facts: Mapping[str, str]
    read: Mapping[str, str]
    """Command -> its output on the undisturbed finished run."""


@dataclass(frozen=True)
class _Case:
    """A damaged copy of a run below `output`, and what is done with it.

    `changed`: whether a file was changed or removed. `added`: new files.
    """

    world: World
    state: str
    output: Path
    commands: Sequence[str]
    server: _Server | None
    changed: bool
    added: Sequence[str]


@dataclass(frozen=True)
class Outcome:
    """One case: what was damaged and how, the outcome, and the requirement that was violated, if any."""

    number: int
    state: str
    path: str
    damage: str
    results: tuple[str, ...]
    broken: str | None
    log: str

    @property
    def kind(self) -> str:
        """The path with a star for every number or hash."""
        return re.sub(r"[0-9a-f]{12,}|\d+", "*", self.path)


def build(folder: Path) -> World:
    """The runs: one finished at its second attempt, the same twice interrupted, and another one.

    Runs that `folder` already contains are used as they are.
    """
    kept = folder / "world.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        states = {state: Path(path) for state, path in found["states"].items()}
        world = World(folder, found["environment"], states, Path(found["other"]), found["facts"], found["read"])
        heat(world)
        return world
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("JOB_")},
        **small.settings(folder, rows=24, questions=16),
        "JOB_TRAIN__MAX_STEPS": "8",
        "JOB_RUN__ID": RUN,
    }
    states = {}
    for state, fault in STATES.items():
        output = folder / "states" / state.replace(" ", "-")
        begun = {**environment, "JOB_RUN__OUTPUT": str(output)}
        states[state] = output
        if (output / "made").exists():
            continue
        shutil.rmtree(output, ignore_errors=True)
        _expect(-signal.SIGKILL, {**begun, "JOB_FAULT": fault or "kill@step=5"})
        if fault is None:
            _expect(0, begun)
        (output / "made").touch()
    other = folder / "states" / "other"
    changed = {"JOB_RUN__OUTPUT": str(other), "JOB_RUN__SEED": "7", "JOB_TRAIN__LEARNING_RATE": "1e-3"}
    if not (other / "made").exists():
        shutil.rmtree(other, ignore_errors=True)
        _expect(0, {**environment, **changed, "JOB_RUN__ID": OTHER})
        (other / "made").touch()
    published = json.loads((states[FINISHED] / RUN / RESULTS).read_text(encoding="utf-8"))
    world = World(folder, environment, states, other, facts_of(published), {})
    heat(world)
    read = {name: _read(world, name, str(states[FINISHED] / RUN), {})[1] for name in ("report", "compare")}
    world = World(folder, environment, states, other, facts_of(published), read)
    kept.write_text(json.dumps(asdict(world), default=str), encoding="utf-8")
    return world


def heat(world: World) -> None:
    """Runs everything once in this process, from which the cases are forked; see `hot_forks`."""
    output, finished = world.folder / "heated", str(world.states[FINISHED] / RUN)
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(world.states[TO_PUBLISH], output)
    reading = [_reading(world, name, finished, world.folder / "page.html") for name in ("verify", "report", "compare")]
    hot_forks.heat([([], {**world.environment, "JOB_RUN__OUTPUT": str(output)}), *reading])
    shutil.rmtree(output)


def _expect(code: int, environment: Mapping[str, str]) -> None:
    done = warm.run([], environment)
    if done.returncode != code:
        raise AssertionError(f"{done.returncode} and not {code}:\n{done.stderr[-3000:]}")


def _in_worker(number: int, *, world: World, seed: int, kind: str | None) -> Outcome:
    """A case in one of several processes, each with its own folder and its own server of this kind."""
    own = replace(world, folder=world.folder / f"worker-{os.getpid()}")
    own.folder.mkdir(exist_ok=True)
    return _case(own, number, random.Random(f"{seed} {number}"), _own_server(kind) if kind else None)


@dataclass(frozen=True)
class _Server:
    """An imitation of a cloud's store: its kind, and the variables with its address."""

    kind: str
    environ: Mapping[str, str]


@cache
def _own_server(kind: str) -> _Server:
    """This process's server, which ends with it."""
    return _Server(kind, _SERVERS.enter_context(clouds.process(kind)))


_SERVERS = ExitStack()


def _case(world: World, number: int, draw: random.Random, server: _Server | None) -> Outcome:
    state = draw.choice(list(STATES))
    output = world.folder / f"case-{number}"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(world.states[state], output, ignore=shutil.ignore_patterns("made"))
    path, damage, changed, added = _damage(draw, output, world.other)
    # an interrupted run is resumed, and then has to verify; a finished one is read, or started again
    reading = ["verify", draw.choice(["run", "report", "compare"])]
    commands = reading if state == FINISHED else ["run", "verify"]
    try:
        results, broken, log = _carry_out(_Case(world, state, output, commands, server, changed, added))
    except TimeoutError as error:
        results, broken, log = ("hangs",), str(error), ""
    if broken is None:
        shutil.rmtree(output)
    return Outcome(number, state, path, damage, tuple(results), broken, log)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _damage(draw: random.Random, output: Path, other: Path) -> tuple[str, str, bool, list[str]]:
    """Damages a file below `output`, each kind of file equally often.

    Returns:
        The file's path, without the run's id; the damage in words; whether a file of the run was changed or removed
        (the local store's own files, and scores that runs share, are in no manifest); and the new files.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for path in _files(output):
        kinds[Outcome(0, "", path, "", (), None, "").kind].append(path)
    path = draw.choice(kinds[draw.choice(sorted(kinds))])
    before = {name: hash_file(output / name) for name in _files(output)}
    name = draw.choice(list(DAMAGES))
    DAMAGES[name](draw, output, path, other)
    after = {name: hash_file(output / name) for name in _files(output)}
    own = [name for name in before if name.startswith(f"{RUN}/") and "/.store/" not in name]
    changed = any(after.get(name) != before[name] for name in own)
    added = [path.removeprefix(f"{RUN}/") for path in after if path not in before]
    return path.removeprefix(f"{RUN}/"), name, changed, added


def _flip(draw: random.Random, output: Path, path: str, _other: Path) -> None:
    data = bytearray((output / path).read_bytes())
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (output / path).write_bytes(data)


def _truncate(draw: random.Random, output: Path, path: str, _other: Path) -> None:
    os.truncate(output / path, draw.randrange(max(1, (output / path).stat().st_size)))


def _delete(_draw: random.Random, output: Path, path: str, _other: Path) -> None:
    (output / path).unlink()


def _swap(draw: random.Random, output: Path, path: str, _other: Path) -> None:
    one, two = output / path, output / draw.choice(_files(output))
    data = one.read_bytes(), two.read_bytes()
    two.write_bytes(data[0])
    one.write_bytes(data[1])


def _duplicate(draw: random.Random, output: Path, path: str, _other: Path) -> None:
    """In place of another file of the run."""
    (output / draw.choice(_files(output))).write_bytes((output / path).read_bytes())


def _add(draw: random.Random, output: Path, path: str, _other: Path) -> None:
    """Next to the others, under an unused number or an unknown name."""
    numbers = list(re.finditer(r"\d+", path))
    new = f"{path}.copy"
    if numbers:
        place = draw.choice(numbers)
        raised = f"{int(place[0]) + draw.randrange(1, 4):0{len(place[0])}d}"
        new = path[: place.start()] + raised + path[place.end() :]
    (output / new).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output / path, output / new)


def _foreign(draw: random.Random, output: Path, path: str, other: Path) -> None:
    """The file of the same name of another run, or another file of that run if it has none of that name."""
    there = other / re.sub(f"^{RUN}/", f"{OTHER}/", path)
    if not there.is_file():
        there = other / draw.choice(_files(other))
    shutil.copyfile(there, output / path)


DAMAGES: Mapping[str, Callable[[random.Random, Path, str, Path], None]] = {
    "flip": _flip,
    "truncate": _truncate,
    "delete": _delete,
    "swap": _swap,
    "duplicate": _duplicate,
    "add": _add,
    "other run's": _foreign,
}


def _carry_out(case: _Case) -> tuple[list[str], str | None, str]:
    """Reads or resumes the run; returns the outcome of each command, the violated requirement, and its log."""
    results: list[str] = []
    log = ""
    with _placed(case.output, case.server) as (where, fetch):
        for command in case.commands:
            code, said, log = _command(case.world, command, where, case.server)
            results.append(f"{command} {code}")
            if code not in {0, *exit_codes()} - {JobError.exit_code} or "Traceback" in log or "a bug:" in log:
                return results, f"{command} ended with {code}, not with a code of the table and words", log
            if code == 0:
                broken = _kept(case, command, said, fetch)
            elif results == ["run 0", "verify 4"] and not _names_only(case.added, log):
                broken = "the run is as it should be, and `verify` refuses it"
            else:
                broken = None
            if broken is not None:
                return results, broken, log
            if command == "run" and code != 0:
                break  # refused: there is nothing to verify
    return results, None, log


def _names_only(added: Sequence[str], log: str) -> bool:
    """Whether `verify` complains only about added files: the run is right, and no record lists them."""
    differences = [line.strip() for line in log.splitlines() if line.startswith("  ") and ": claimed " in line]
    return bool(differences) and all(line.startswith(tuple(f"{path}: " for path in added)) for line in differences)


def _kept(case: _Case, command: str, said: str, fetch: Callable[[], None]) -> str | None:
    """The requirement that a command with exit code 0 violated; None if it met all."""
    if command == "run":
        fetch()
        wrong = _differing(case.output / RUN, case.world.facts)
        return f"another result with exit code 0: {', '.join(wrong)}" if wrong else None
    if command == "verify":
        damaged = case.state == FINISHED and case.changed
        return "`verify` says 0 of a damaged run" if damaged else None
    return None if said == case.world.read[command] else f"`{command}` says something else with exit code 0"


def _command(world: World, command: str, where: str, server: _Server | None) -> tuple[int, str, str]:
    """Exit code, the output about the run by commands that read it, and the log."""
    store = {} if server is None else server.environ
    if command != "run":
        return _read(world, command, f"{where}/{RUN}", store)
    done = hot_forks.run([], {**world.environment, **store, "JOB_RUN__OUTPUT": where}, timeout=SECONDS)
    return done.returncode, "", done.stderr + done.stdout


def _read(world: World, command: str, where: str, store: Mapping[str, str]) -> tuple[int, str, str]:
    """Runs a command that reads a run; returns its exit code, its output about the run, and its log."""
    page = world.folder / "page.html"
    words, environ = _reading(world, command, where, page)
    done = hot_forks.run(words, {**environ, **store}, timeout=SECONDS)
    if command == "report" and done.returncode == 0:
        return 0, page.read_text(encoding="utf-8"), done.stderr + done.stdout
    return done.returncode, done.stdout.replace(where, "WHERE"), done.stderr + done.stdout


def _reading(world: World, command: str, where: str, page: Path) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a command that reads a run."""
    words = {
        "verify": ["verify", where],
        "report": ["report", where, "--output", str(page)],
        "compare": ["compare", str(world.other / OTHER), where, "--format", "json"],
    }[command]
    environ = {name: value for name, value in world.environment.items() if not name.startswith("JOB_")}
    return words, {**environ, "JOB_LOG__FORMAT": "json"}


def _differing(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """What differs from the undisturbed run, by manifest or by content."""
    published = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    claimed = facts_of(published)
    found = {}
    for path in _files(folder / ARTIFACTS):
        key = f"{ARTIFACTS}{path}"
        if key in expected:
            found[key] = hash_facts(folder / key) if key == METRICS else hash_file(folder / key)
    missing = [key for key in expected if found.get(key) != expected[key] or claimed.get(key) != expected[key]]
    return missing + [key for key in claimed if key not in expected and not key.startswith(MADE_OF_TIMES)]


@contextmanager
def _placed(output: Path, server: _Server | None) -> Iterator[tuple[str, Callable[[], None]]]:
    """The URI at which the job finds the runs below `output`, and a function that copies them back."""
    if server is None:
        yield str(output), lambda: None
        return
    where = f"{clouds.place(server.kind)}/{output.name}"
    options = clouds.options(server.kind, dict(server.environ))

    def put() -> None:
        store = open_store(where, options)
        for path in _files(output):
            if ".store" not in Path(path).parts:  # the local store's own files
                store.upload(output / path, path)

    def fetch() -> None:
        store = open_store(where, options)
        for info in store.list():
            store.download(info.key, output / info.key)

    def remove() -> None:
        store = open_store(where, options)
        for info in list(store.list()):
            store.delete(info.key)

    def fetch_anew() -> None:
        shutil.rmtree(output)
        clouds.in_fork(fetch)

    try:
        clouds.in_fork(put)
        yield where, fetch_anew
    finally:
        clouds.in_fork(remove)


def main() -> int:
    """Damages, and prints the table; exit code 1 if a requirement was violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="repeat this one, and print its log")
    parser.add_argument("--store", choices=clouds.SCHEMES, help="the runs lie in an imitation of this store")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no case after so many")
    parser.add_argument("--jobs", type=int, default=1, help="try in so many processes")
    parser.add_argument("--world", type=Path, help="folder for the runs that are damaged, to use them again")
    parser.add_argument("--journal", type=Path, help="file for each outcome at once; what it has is not tried again")
    chosen = parser.parse_args()
    numbers = [chosen.case] if chosen.case is not None else range(chosen.first, chosen.first + chosen.count)
    outcomes = _noted(chosen.journal)
    known = {outcome.number for outcome in outcomes}
    with tempfile.TemporaryDirectory(prefix="qlora-job-damage-") as name:
        began = time.monotonic()
        folder = chosen.world or Path(name)
        folder.mkdir(exist_ok=True)
        world = build(folder)
        print(f"runs are made after {time.monotonic() - began:.1f} s", flush=True)
        began = time.monotonic()
        for outcome in spread(
            partial(_in_worker, world=world, seed=chosen.seed, kind=chosen.store),
            [number for number in numbers if number not in known],
            jobs=chosen.jobs,
            minutes=chosen.minutes,
            method="fork",  # of what is heated
        ):
            outcomes.append(outcome)
            if chosen.journal is not None:
                with chosen.journal.open("a", encoding="utf-8") as file:
                    noted = outcome if outcome.broken else replace(outcome, log="")
                    file.write(json.dumps(asdict(noted)) + "\n")
            if outcome.broken or chosen.case is not None:
                print(_describe(outcome, chosen.seed), flush=True)
                print("\n".join(f"    {line[:2000]}" for line in outcome.log.splitlines()[-3:]), flush=True)
        return report(outcomes, time.monotonic() - began)


def _noted(journal: Path | None) -> list[Outcome]:
    """The outcomes in a journal."""
    if journal is None or not journal.exists():
        return []
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    return [Outcome(**{**line, "results": tuple(line["results"])}) for line in lines]


def _describe(outcome: Outcome, seed: int) -> str:
    what = f"--seed {seed} --case {outcome.number}: {outcome.damage} {outcome.path} of a run {outcome.state}"
    return f"{'BROKEN' if outcome.broken else 'kept'} {what}: {', '.join(outcome.results)}; {outcome.broken or ''}"


def report(outcomes: Sequence[Outcome], seconds: float) -> int:
    """Prints kind of file x damage -> outcome, and the counts."""
    table: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        word = "BROKEN" if outcome.broken else ", ".join(outcome.results)
        table[outcome.kind, outcome.damage][word] += 1
    for (kind, damage), counts in sorted(table.items()):
        print(f"{kind:<58} {damage:<12} {'; '.join(f'{n} x {word}' for word, n in sorted(counts.items()))}")
    broken = [outcome for outcome in outcomes if outcome.broken]
    ends = Counter("broken" if o.broken else "refused" if not _goes_on(o) else "same result" for o in outcomes)
    print(f"{len(outcomes)} damages in {seconds:.0f} s: {', '.join(f'{n} {word}' for word, n in sorted(ends.items()))}")
    return 1 if broken else 0


def _goes_on(outcome: Outcome) -> bool:
    return all(result.endswith(" 0") for result in outcome.results if not result.startswith("verify"))


if __name__ == "__main__":
    raise SystemExit(main())
