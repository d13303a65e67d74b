"""Attempts: the run log has each of them, stages are done once, and a run's settings stay the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from pydantic import TypeAdapter

from job import log
from job.checkpoints import checkpoint_store
from job.common.hashing import sealed
from job.errors import DataError, JobError, NoProgress, Preempted, Replaced, SettingsError, Unreachable
from job.preemption.stop_flag import StopFlag
from job.records import Artifact, Evaluated, Pulled, Uploaded
from job.results.completed import withdraw_incomplete
from job.runs import attempt as runs_attempt
from job.runs import stage_records
from job.runs.attempt import Attempt, missing
from job.runs.fault_injection import Faults, arm
from job.runs.layout import Stage, attempt_key, stage_key
from job.runs.lease import fenced, take
from job.runs.open_attempt import TakeOver, open_attempt
from job.runs.run_log import IdleLimit, close_run_log, idle_pause, parse_record, read_run_log
from job.runs.run_settings import write_settings
from job.storage.base import CHANGES, MAX_READ_BYTES, write_in_turn
from job.storage.local import LocalStore
from job.storage.open import ObjectStore
from tests.attempts import First, Second, make_attempt
from tests.example_run import ATTEMPTS, DATASET
from tests.wrapped_store import WrappedStore

SETTINGS = {"train.epochs": 2}
KEY = "artifacts/evaluation/arc_easy.base.jsonl"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """The run's own."""
    return LocalStore(tmp_path / "run")


@pytest.fixture
def opened(store: LocalStore, tmp_path: Path) -> Callable[..., AbstractContextManager[Attempt]]:
    """Begins an attempt at the run."""

    def begin(stop: StopFlag | None = None, through: ObjectStore = store) -> AbstractContextManager[Attempt]:
        return open_attempt(
            through,
            SETTINGS,
            cache=str(tmp_path / "cache"),
            stop=stop or StopFlag(),
            report_progress=lambda: None,
            faults=arm((), store),
        )

    return begin


@pytest.mark.parametrize(("error", "outcome"), [(DataError([]), "failed"), (Preempted("stopped"), "preempted")])
def test_an_attempt_that_ends_while_it_copies_a_run_is_recorded(
    store: LocalStore, error: JobError, outcome: str
) -> None:
    """With what copying took, which is paid for; else `status` would say that it runs."""

    def copy(*_: object, **__: object) -> None:
        time.sleep(0.02)
        raise error

    how: dict[str, Any] = {"cache": None, "stop": StopFlag(), "report_progress": lambda: None, "faults": arm((), store)}
    with (
        pytest.raises(type(error)),
        open_attempt(store, SETTINGS, take_over=TakeOver(SETTINGS, 3, copy), **how),
    ):
        pytest.fail("the attempt has begun")
    stored = store.read(attempt_key(4))
    assert stored is not None
    record = parse_record(stored.data)
    assert (record.outcome, record.seconds >= 0.02) == (outcome, True)


@pytest.mark.parametrize(("files", "ends"), [((2, 3), Preempted), ((2, 2), NoProgress)])
def test_copying_a_run_is_progress_if_more_files_are_there(
    store: LocalStore, files: tuple[int, int], ends: type[JobError]
) -> None:
    """The limit of attempts without progress holds while a run is copied, too."""

    def copied(number: int) -> Callable[..., None]:
        def copy(*_: object, check_stop: Callable[[], None], **__: object) -> None:
            for _file in range(number):
                check_stop()
            raise Preempted("stopped by SIGTERM")

        return copy

    how: dict[str, Any] = {"cache": None, "stop": StopFlag(), "report_progress": lambda: None, "faults": arm((), store)}
    for number, expected in zip(files, (Preempted, ends), strict=True):
        given = TakeOver(SETTINGS, 3, copied(number))
        with pytest.raises(expected), open_attempt(store, SETTINGS, take_over=given, idle=IdleLimit(1), **how):
            pytest.fail("the attempt has begun")


def test_a_run_that_began_meanwhile_is_not_copied_over(store: LocalStore) -> None:
    """By an attempt with other formats: what that one took over would not be its own any more."""
    write_settings(store, SETTINGS | {"export.formats": ["merged"]})
    given = TakeOver(SETTINGS | {"export.formats": ["fp8"]}, 3, lambda *_, **__: pytest.fail("it was copied"))
    how: dict[str, Any] = {"cache": None, "stop": StopFlag(), "report_progress": lambda: None, "faults": arm((), store)}
    with (
        pytest.raises(SettingsError, match="JOB_EXPORT__FORMATS: this run began with"),
        open_attempt(store, given.settings, take_over=given, **how),
    ):
        pytest.fail("the attempt has begun")


def test_another_machine_must_see_the_same_folder(store: LocalStore, tmp_path: Path) -> None:
    """It looks for the lease that process 0 has taken: in the run's folder, or in one of this machine alone."""
    stop, first = StopFlag(), First()
    how: dict[str, Any] = {"stop": stop, "report_progress": stop.check, "faults": arm((), store)}
    with open_attempt(store, SETTINGS, processes=first, cache=str(tmp_path / "0"), **how):
        how |= {"processes": Second(first.told), "cache": str(tmp_path / "1")}
        with open_attempt(store, SETTINGS, **how) as attempt:
            assert attempt.number == 1
        stop.request("tired of looking", 0)
        with pytest.raises(Preempted), open_attempt(LocalStore(tmp_path / "own"), SETTINGS, **how):
            pass


@pytest.mark.parametrize(("change", "done"), [("", True), ("damage", False), ("remove", False), ("record", False)])
def test_a_stage_is_done_if_all_is_there(tmp_path: Path, change: str, *, done: bool) -> None:
    """Looked at before the model is loaded: else it would be prepared for no training, and then trained."""
    attempt = make_attempt(tmp_path)
    (tmp_path / "file").write_bytes(b"weights")
    published = Uploaded([attempt.publish(tmp_path / "file", "artifacts/weights")])
    attempt.write_record(Stage.TRAIN, json.dumps(asdict(published)))
    if change == "damage":
        attempt.store.write("artifacts/weights", b"WEIGHTS")
    elif change:
        attempt.store.delete("artifacts/weights" if change == "remove" else stage_key(Stage.TRAIN))
    assert attempt.is_done(Stage.TRAIN, Uploaded) is done


def test_what_a_stage_published_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes after training asks before it loads the model, and again when it comes to the stage."""
    attempt, downloaded = make_attempt(tmp_path), list[str]()
    (tmp_path / "file").write_bytes(b"weights")
    published = Uploaded([attempt.publish(tmp_path / "file", "artifacts/weights")])
    attempt.write_record(Stage.TRAIN, json.dumps(asdict(published)))
    download = attempt.store.download

    def counted(key: str, path: Path, **options: Any) -> None:
        downloaded.append(key)
        download(key, path, **options)

    monkeypatch.setattr(attempt.store, "download", counted)
    assert attempt.is_done(Stage.TRAIN, Uploaded)
    assert attempt.stage(Stage.TRAIN, Uploaded, lambda: pytest.fail("it was done again")) == published
    assert downloaded == ["artifacts/weights"]


def noted_of(store: LocalStore, number: int) -> dict[str, Any]:
    """What the run log says of an attempt."""
    kept = store.read(f"attempts/{number:04d}.json")
    assert kept is not None
    entry: dict[str, Any] = json.loads(kept.data)
    return entry


class Clock:
    """A clock that a test winds on; each request to the store takes `cost` seconds of it."""

    def __init__(self, cost: float) -> None:
        self.now, self.cost = 1000.0, cost

    def monotonic(self) -> float:
        """The time."""
        return self.now

    def pay(self, _verb: str, _key: str) -> None:
        """A request took its time."""
        self.now += self.cost


@pytest.mark.parametrize(("cost", "between"), [(0.0001, (0.2, 0.3)), (0.003, (0.3, 1.5)), (1.0, (5, 8))])
def test_notes_take_little_of_the_time(
    opened: Callable[..., AbstractContextManager[Attempt]],
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    cost: float,
    between: tuple[float, float],
) -> None:
    """A quick store is told often, so that a kill loses little of the run log; a slow one is not kept busy with it."""
    clock = Clock(cost)
    noted: list[float] = []
    slow = WrappedStore(
        store,
        clock.pay,
        lambda verb, key: noted.append(clock.now) if (verb, key[:9]) == ("write", "attempts/") else None,
    )
    with opened(through=slow) as attempt:
        monkeypatch.setattr(runs_attempt, "time", clock)
        attempt.note("running")
        noted.clear()
        for step in range(1, 2001):
            clock.now += 0.01
            attempt.step_done(step, 0.01)
        monkeypatch.setattr(runs_attempt, "time", time)
    pauses = [after - before for before, after in pairwise(noted[:-1])]
    assert between[0] <= min(pauses)
    assert max(pauses) <= between[1]


def test_steps_done_again_are_counted(
    opened: Callable[..., AbstractContextManager[Attempt]], store: LocalStore
) -> None:
    """A killed attempt stands in the run log as far as its last note; what the next one does again is repeated."""
    with opened() as attempt:
        for step in range(1, 6):
            attempt.step_done(step, 1.0)
        attempt.note("running")
        last = store.read("attempts/0001.json")
    assert last is not None
    store.write("attempts/0001.json", last.data)  # as if it had been killed, not ended
    with opened() as attempt:
        assert [(a.outcome, a.steps, a.last_step) for a in attempt.earlier] == [("killed", 5, 5)]
        for step in range(4, 8):
            attempt.step_done(step, float(step))
        assert (attempt.steps, attempt.repeated_steps, attempt.last_step) == (4, 2, 7)
        assert attempt.repeated_seconds == 4.0 + 5.0


def test_training_is_noted_before_its_first_step(
    opened: Callable[..., AbstractContextManager[Attempt]], store: LocalStore
) -> None:
    """A record without it is then one of an attempt that did no step; a kill may come before the first is noted."""
    with opened() as attempt, attempt.timed(Stage.TRAIN):
        assert "train" in noted_of(store, 1)["stage_seconds"]


def test_a_killed_attempt_is_known_by_its_last_note(
    opened: Callable[..., AbstractContextManager[Attempt]], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note holds the stage that is going on, what the machine costs, and what a meter says by then."""
    clock = Clock(0.0)
    with opened() as attempt:
        monkeypatch.setattr(runs_attempt, "time", clock)
        attempt._began = clock.now
        attempt.usd_per_hour, attempt.joules = 2.5, lambda: 3 * clock.now
        with attempt.timed(Stage.PULL):
            clock.now += 4.0
        with attempt.timed(Stage.TRAIN):
            clock.now += 30.0
            attempt.note("running")
            noted = noted_of(store, 1)
            clock.now += 6.0
        assert attempt.stage_seconds == {"pull": 4.0, "train": 36.0}
        monkeypatch.setattr(runs_attempt, "time", time)
    assert noted["seconds"] == 34.0
    assert noted["stage_seconds"] == {"pull": 4.0, "train": 30.0}
    assert (noted["usd_per_hour"], noted["energy_joules"]) == (2.5, 3 * 1034.0)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(Preempted("x"), "preempted"), (Unreachable("x"), "failed"), (ZeroDivisionError("x"), "crashed")],
)
def test_the_run_log_says_why(
    opened: Callable[..., AbstractContextManager[Attempt]], store: LocalStore, error: Exception, outcome: str
) -> None:
    """How an attempt ended is in the store, and the error is raised again for the exit code."""
    with pytest.raises(type(error)), opened():
        raise error
    entry = noted_of(store, 1)
    assert entry["outcome"] == outcome
    assert entry["finished"] is not None


def test_an_end_that_is_recorded_stays(store: LocalStore, tmp_path: Path) -> None:
    """A late note of another thread, or a stall while the complete run is pushed, does not overwrite the end."""
    idle = IdleLimit(3)
    opening = open_attempt(
        store,
        SETTINGS,
        cache=str(tmp_path / "cache"),
        stop=StopFlag(),
        report_progress=lambda: None,
        faults=arm((), store),
        idle=idle,
    )
    with opening as attempt:
        pass
    attempt.note("running")
    idle.record_stall("no progress for 1800 s")
    assert noted_of(store, 1)["outcome"] == "complete"


def test_a_stage_that_ends_while_it_is_noted_is_read_once(
    opened: Callable[..., AbstractContextManager[Attempt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note from another thread asks for the stage once: by a second time it may have ended."""
    asked = iter([("train", 0.0)])
    with opened() as attempt:
        with monkeypatch.context() as patched:
            patched.setattr(Attempt, "_stage", property(lambda _self: next(asked, None)))
            del attempt.__dict__["_stage"]
            assert attempt._now(None).stage == "train"
        attempt._stage = None


def test_a_replaced_attempt_does_not_keep_the_books(
    opened: Callable[..., AbstractContextManager[Attempt]], store: LocalStore
) -> None:
    """The attempt that took over writes the run log; the replaced one writes nothing more to it."""
    with pytest.raises(Replaced), opened(), opened():
        pass  # the outer one notes its end after the inner one took over
    assert noted_of(store, 1)["outcome"] == "running"
    assert noted_of(store, 2)["outcome"] == "complete"


def test_a_stage_is_done_once(opened: Callable[..., AbstractContextManager[Attempt]]) -> None:
    """A later attempt reads what a stage found out instead of doing it again."""
    done: list[int] = []

    def work() -> dict[str, int]:
        done.append(1)
        return {"a": 1}

    for _ in range(2):
        with opened() as attempt:
            assert attempt.stage(Stage.PULL, dict[str, int], work) == {"a": 1}
    assert done == [1]


def test_a_stage_is_done_again_if_there_is_an_objection(
    opened: Callable[..., AbstractContextManager[Attempt]],
) -> None:
    """What a stage found out does not count for a version that says why; the objection is asked of every attempt."""
    found = {"rule": 1}

    def why(record: dict[str, int]) -> str:
        return "" if record == found else "by another rule"

    for rule, expected in ((1, 1), (9, 1), (2, 2)):
        if rule == 2:
            found = {"rule": 2}
        with opened() as attempt:
            assert attempt.stage(Stage.PULL, dict[str, int], lambda rule=rule: {"rule": rule}, why) == {
                "rule": expected
            }


def test_a_stage_does_not_begin_after_a_stop(opened: Callable[..., AbstractContextManager[Attempt]]) -> None:
    """The flag is looked at before work is begun that would not be finished."""
    stop = StopFlag()
    stop.request("SIGTERM", 30)
    with pytest.raises(Preempted, match="SIGTERM"), opened(stop) as attempt:
        attempt.stage(Stage.TRAIN, dict[str, int], lambda: pytest.fail("was begun"))


@pytest.fixture
def artifact(store: LocalStore, tmp_path: Path) -> Iterator[Artifact]:
    """A published file."""
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    store.upload(path, "artifacts/weights")
    yield Artifact("artifacts/weights", 7, "9a93ff54a2fd36c27fd1aa77df6e4ae3f6f6f3d6b0f4d54cfaa2bd1f5c7e5a1a")
    path.unlink()


@pytest.mark.parametrize("change", [None, b"weightz"])
def test_what_was_published_is_verified(
    opened: Callable[..., AbstractContextManager[Attempt]], store: LocalStore, artifact: Artifact, change: bytes | None
) -> None:
    """A file that is gone, or is another than the one published, is an error of data, not loaded."""
    if change is None:
        store.delete(artifact.path)
    else:
        store.write(artifact.path, change)
    with opened() as attempt, pytest.raises(DataError, match="is missing" if change is None else "is damaged"):
        attempt.fetch(artifact)


def test_a_damaged_record_is_not_believed(
    opened: Callable[..., AbstractContextManager[Attempt]], store: LocalStore
) -> None:
    """A record of the run log that was altered, cut or blown up is ignored: the run goes on without its times."""
    with opened():
        pass
    stored = store.read(attempt_key(1))
    assert stored is not None
    assert parse_record(stored.data).outcome == "complete"
    digit = stored.data.replace(b'"steps": 0', b'"steps": 1')
    for damaged in (digit, stored.data[:40], b"", b"[" * 100_000, b" " * (MAX_READ_BYTES + 1), None):
        store.delete(attempt_key(1))
        if damaged is not None:
            store.write(attempt_key(1), damaged)
        with opened() as last:
            assert all(one.number != 1 for one in last.earlier)
            closed = close_run_log(last.store, last.number, last.started)
        assert (closed[0].number, closed[0].outcome, closed[0].seconds) == (1, "killed", 0)
        mended = store.read(attempt_key(1))
        assert mended is not None
        assert parse_record(mended.data) == closed[0]


def test_an_attempt_names_the_run_when_its_settings_are_kept(store: LocalStore, tmp_path: Path) -> None:
    """One that ended before, by a mistake in its settings, was an attempt at the run: its seconds are counted."""
    attempt = begun(store, tmp_path)
    attempt.identify(PULLED)
    attempt.note("running")
    assert noted_of(store, 1)[stage_records.RUN] is None
    attempt.settled = True
    attempt.note("running")
    assert noted_of(store, 1)[stage_records.RUN] == attempt.run


def test_a_record_of_another_run_tells_nothing(store: LocalStore, tmp_path: Path) -> None:
    """Seconds and dollars of another run or attempt are not published; that there was an attempt is."""
    record = asdict(replace(ATTEMPTS[0], number=1, seconds=9e9))
    store.write(attempt_key(1), sealed({**record, stage_records.RUN: "another"}))
    store.write(attempt_key(2), sealed({**record, stage_records.RUN: "this"}))
    store.write(attempt_key(4), sealed({**record, stage_records.RUN: "this"}))
    found = close_run_log(store, 3, "2026-01-05T09:00:00.000Z", "this")
    assert [(one.number, one.outcome, one.seconds) for one in found] == [(1, "killed", 0), (2, "killed", 0)]
    assert noted_of(store, 1)[stage_records.RUN] == "this"
    assert store.read(attempt_key(4)) is None  # nobody's: there has been no such attempt


def begun(store: LocalStore, tmp_path: Path) -> Attempt:
    """An attempt at the run."""
    return Attempt(store, tmp_path, 1, StopFlag(), lambda: None, Faults((), store), [])


class Work:
    """A stage's work, counted."""

    def __init__(self, attempt: Attempt, path: Path) -> None:
        self.attempt, self.path, self.done = attempt, path, 0

    def __call__(self) -> Evaluated:
        """Publishes one file."""
        self.done += 1
        self.path.write_bytes(b"record\n")
        return Evaluated({}, [self.attempt.publish(self.path, KEY)])


def test_a_finished_stage_is_not_repeated(store: LocalStore, tmp_path: Path) -> None:
    """The record of a stage stands for its work."""
    first = begun(store, tmp_path)
    work = Work(first, tmp_path / "file")
    found = first.stage(Stage.EVALUATE_BASE, Evaluated, work)
    assert begun(store, tmp_path).stage(Stage.EVALUATE_BASE, Evaluated, work) == found
    assert work.done == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda store: store.delete(KEY),
        lambda store: store.write(KEY, b"half"),
        lambda store: store.write(KEY, b"recorb\n"),  # of the same size
    ],
)
def test_a_record_without_its_files_does_not_count(store: LocalStore, tmp_path: Path, damage: object) -> None:
    """Where a copy of the run was restored that has the record but not the files yet, the stage is done again."""
    first = begun(store, tmp_path)
    work = Work(first, tmp_path / "file")
    found = first.stage(Stage.EVALUATE_BASE, Evaluated, work)
    damage(store)  # type: ignore[operator]
    assert begun(store, tmp_path).stage(Stage.EVALUATE_BASE, Evaluated, work) == found
    assert work.done == 2
    assert missing(store, found.artifacts) == []


def test_what_builds_on_it_is_done_again_too(store: LocalStore, tmp_path: Path) -> None:
    """An evaluation is of the adapter that training published: another training has another evaluation."""
    first = begun(store, tmp_path)
    training, evaluation = Work(first, tmp_path / "one"), Work(first, tmp_path / "two")
    first.stage(Stage.TRAIN, Evaluated, training)
    first.stage(Stage.EVALUATE_ADAPTER, Evaluated, evaluation)
    store.delete(KEY)
    second = begun(store, tmp_path)
    second.stage(Stage.TRAIN, Evaluated, training)
    second.stage(Stage.EVALUATE_ADAPTER, Evaluated, evaluation)
    assert (training.done, evaluation.done) == (2, 2)


def test_missing_asks_once(store: LocalStore) -> None:
    """However many files there are, one listing tells which are missing; none is needed for none."""
    asked: list[str] = []
    watched = WrappedStore(store, before=lambda verb, _key: asked.append(verb))
    artifacts = [Artifact(f"artifacts/{n}", n, "") for n in range(5)]
    store.write("artifacts/3", b"123")
    assert missing(watched, artifacts) == [f"artifacts/{n}" for n in (0, 1, 2, 4)]
    assert missing(watched, []) == []
    assert asked == ["list"]


PULLED = Pulled(DATASET, "1" * 64, None, {"quiz": "2" * 64})


def damages(data: bytes) -> Iterator[bytes]:
    """A record with one byte another, at many places, and cut at many places; and one larger than any."""
    yield bytes(MAX_READ_BYTES + 1)
    for place in range(0, len(data), max(1, len(data) // 40)):
        yield data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        yield data[:place]


def test_a_damaged_record_of_a_stage_is_made_again(store: LocalStore, tmp_path: Path) -> None:
    """Whatever happens to its bytes, the stage is done again, with the same result: never believed, never a crash."""
    first = begun(store, tmp_path)
    first.identify(PULLED)
    work = Work(first, tmp_path / "file")
    found = first.stage(Stage.EVALUATE_BASE, Evaluated, work)
    stored = store.read("stages/evaluate-base.json")
    assert stored is not None
    kind = TypeAdapter(Evaluated)
    for number, damaged in enumerate(damages(stored.data)):
        with pytest.raises(ValueError, match=r"."):
            stage_records.parse("stages/evaluate-base.json", damaged, kind)
        if number % 20 == 0:
            store.write("stages/evaluate-base.json", damaged)
            again = begun(store, tmp_path)
            again.identify(PULLED)
            before = work.done
            assert again.stage(Stage.EVALUATE_BASE, Evaluated, work) == found
            assert work.done == before + 1
    last = store.read("stages/evaluate-base.json")
    assert last is not None
    assert last.data == stored.data


@pytest.mark.parametrize("name", ["written_to", "attempt", "run"])
def test_a_result_does_not_hide_what_the_record_says(name: str) -> None:
    """A field of a result that is named like one of the record's own would be lost when it is read."""
    with pytest.raises(ValueError, match=name):
        stage_records.render("stages/base.json", json.dumps({name: "x"}), "run")


def test_a_record_of_another_stage_does_not_count(store: LocalStore, tmp_path: Path) -> None:
    """A copy of the adapter's evaluation in place of the base's would give the base the adapter's scores."""
    first = begun(store, tmp_path)
    first.identify(PULLED)
    work = Work(first, tmp_path / "file")
    found = first.stage(Stage.EVALUATE_BASE, Evaluated, work)
    first.write_record("evaluate-adapter", json.dumps(asdict(replace(found, scores={}))))
    other = store.read("stages/evaluate-adapter.json")
    assert other is not None
    store.write("stages/evaluate-base.json", other.data)
    again = begun(store, tmp_path)
    again.identify(PULLED)
    assert again.stage(Stage.EVALUATE_BASE, Evaluated, work) == found
    assert work.done == 2


@pytest.mark.parametrize("other", [{"settings": {"run.seed": 7}}, {"data": "3" * 64}])
def test_a_record_of_another_run_does_not_count(store: LocalStore, tmp_path: Path, other: dict[str, Any]) -> None:
    """A stage that was done with other settings or on other data is done again, also where nothing else tells."""
    first = begun(store, tmp_path)
    first.settings = other.get("settings", {})
    first.identify(replace(PULLED, model_sha256=other.get("data", PULLED.model_sha256)))
    work = Work(first, tmp_path / "file")
    first.stage(Stage.PULL, Pulled, lambda: PULLED)
    first.stage(Stage.EVALUATE_BASE, Evaluated, work)
    second = begun(store, tmp_path)
    second.identify(PULLED)
    assert second.recorded(Stage.PULL, Pulled) is None
    second.stage(Stage.EVALUATE_BASE, Evaluated, work)
    assert work.done == 2


def test_a_record_of_an_earlier_version_counts(store: LocalStore, tmp_path: Path) -> None:
    """Records without seal and run stand for their stages, as they did."""
    store.write("stages/pull.json", TypeAdapter(Pulled).dump_json(PULLED))
    attempt = begun(store, tmp_path)
    attempt.identify(PULLED)
    assert attempt.stage(Stage.PULL, Pulled, lambda: pytest.fail("was done again")) == PULLED


def test_a_run_of_an_earlier_version_keeps_its_stages(store: LocalStore, tmp_path: Path) -> None:
    """A setting and a field of the records that were added since, with their defaults, do no stage again."""

    def attempt_with(settings: dict[str, Any]) -> AbstractContextManager[Attempt]:
        return open_attempt(
            store,
            settings,
            defaults={"train.epochs": 1, "train.noise": 0},
            cache=str(tmp_path / "cache"),
            stop=StopFlag(),
            report_progress=lambda: None,
            faults=arm((), store),
        )

    with attempt_with(SETTINGS) as first:
        first.identify(PULLED)
        write_settings(first.store, first.settings)
        first.stage(Stage.PULL, Pulled, lambda: PULLED)
    with attempt_with({**SETTINGS, "train.noise": 0}) as second:
        second.identify(PULLED)
        assert second.stage(Stage.PULL, Pulled, lambda: pytest.fail("was done again")) == PULLED
        assert second.run == first.run
    with pytest.raises(SettingsError, match="JOB_TRAIN__NOISE"), attempt_with({**SETTINGS, "train.noise": 5}):
        pytest.fail("began")


def test_a_field_that_is_added_does_not_name_the_run() -> None:
    """What has a default in `Pulled` tells more, and makes no other run: records of earlier versions lack it."""

    @dataclass(frozen=True)
    class Later(Pulled):
        licence: str | None = None
        parts: tuple[str, ...] = field(default_factory=tuple)

    later = Later(**vars(PULLED), licence="cc-by", parts=("a",))
    assert stage_records.fingerprint(SETTINGS, later) == stage_records.fingerprint(SETTINGS, PULLED)
    other = replace(later, dataset=replace(DATASET, sha256="4" * 64))
    assert stage_records.fingerprint(SETTINGS, other) != stage_records.fingerprint(SETTINGS, PULLED)


def test_every_input_that_names_the_run_has_a_setting() -> None:
    """An error about one that differs names it; a field that is added to the record needs one, too."""
    whole: dict[str, Any] = {one.name: "x" for one in fields(Pulled)}
    assert stage_records.identity(Pulled(**whole)).keys() == stage_records._SETTING_OF.keys()


class StandsStill(WrappedStore):
    """A store before which a process is suspended: `meanwhile` runs after the fence's check, before a write."""

    meanwhile: Callable[[], object] | None = None

    @contextmanager
    def around(self, verb: str, key: str) -> Iterator[None]:
        """Lets the others work first, once, before a change of what two attempts may write."""
        harmless = key.startswith(("lease", "checkpoints/")) and not key.endswith("COMMITTED.json")
        if verb in CHANGES and not harmless and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        yield


@pytest.mark.parametrize(
    "record",
    ["the first note", "a later note", "a stage", "a marker", "the manifest", "a file", "removal of the manifest"],
)
def test_a_late_record_changes_nothing(store: LocalStore, tmp_path: Path, record: str) -> None:
    """What an attempt writes that stood still while its successor published does not arrive: it ends as replaced."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "progress.json").write_bytes(b"{}")
    (tmp_path / "old").write_bytes(b"the old one's times")
    slow = StandsStill(store)
    old = begun(store, tmp_path)
    old.store = fenced(slow, take(slow, "old"))
    if record != "the first note":
        old.note("running")
    if record == "removal of the manifest":
        store.write("results.json", b"incomplete")
    left: dict[str, bytes] = {}

    def publish_marker(attempt: Attempt) -> None:
        checkpoint_store.commit(
            attempt.store, tmp_path / "files", 4, checkpoint_store.MarkerFields(attempt.number, 1, {})
        )

    def succeed() -> None:
        new = begun(store, tmp_path)
        new.store = fenced(store, take(store, "new"))
        new.number = 2
        new.note("running")
        close_run_log(new.store, 2, new.started)
        new.write_record("train", '{"by": "new"}')
        publish_marker(new)
        (tmp_path / "new").write_bytes(b"the new one's times")
        new.publish(tmp_path / "new", "artifacts/metrics.jsonl")
        write_in_turn(new.store, "results.json", b"new", store.tag("results.json"))
        left.update({info.key: stored.data for info in store.list() if (stored := store.read(info.key))})

    slow.meanwhile = succeed
    late: dict[str, Callable[[], object]] = {
        "the first note": lambda: old.note("running"),
        "a later note": lambda: old.note("running"),
        "a stage": lambda: old.write_record("train", '{"by": "old"}'),
        "a marker": lambda: publish_marker(old),
        "the manifest": lambda: write_in_turn(old.store, "results.json", b"old", None),
        "a file": lambda: old.publish(tmp_path / "old", "artifacts/metrics.jsonl"),
        "removal of the manifest": lambda: withdraw_incomplete(old.store),
    }
    with pytest.raises(Replaced):
        late[record]()
    found = {info.key: stored.data for info in store.list() if (stored := store.read(info.key))}
    assert found == left
    assert parse_record(found["attempts/0001.json"]).outcome == "killed"


def test_a_huge_epoch_costs_one_listing(store: LocalStore) -> None:
    """The run log is listed: however large the number of an attempt is, only records that exist are asked for."""
    store.write(attempt_key(3), sealed(asdict(ATTEMPTS[0])))
    asked: list[str] = []
    watched = WrappedStore(store, before=lambda verb, _key: asked.append(verb))
    assert len(read_run_log(watched, 10**9 - 2)) == 1
    assert asked == ["list", "read"]


def stopped_attempts(store: LocalStore, cache: Path, limit: int, works: list[Callable[[Attempt], object]]) -> list[str]:
    """Attempts, one after the other, each of which does its work and is then stopped; what each ended with."""
    ends = []
    for work in works:
        idle = IdleLimit(limit)
        try:
            with open_attempt(
                store,
                SETTINGS,
                cache=str(cache),
                stop=StopFlag(),
                report_progress=lambda: None,
                faults=arm((), store),
                idle=idle,
            ) as attempt:
                work(attempt)
                raise Preempted("stopped by SIGTERM")
        except JobError as error:
            ends.append(type(error).__name__)
    return ends


def test_why_too_many_attempts_ended_says_what_counts() -> None:
    """A platform and a person read what progress is, that nothing is lost, and which setting allows more."""
    message = IdleLimit(5, before=4).message
    for words in ("without progress: 5", "a later stage than pull", "more scored questions", "the next start goes on"):
        assert words in message
    assert "JOB_RUN__MAX_IDLE_ATTEMPTS=5; 1000000 is as good as no limit" in message


def test_the_next_attempt_says_that_the_one_before_recorded_no_end(
    opened: Callable[..., AbstractContextManager[Attempt]], store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, also where nothing says that main memory was full; not of one that recorded its end."""
    log.configure("json", "info")
    with suppress(Preempted), opened():
        raise Preempted("stopped by SIGTERM")
    with opened():
        pass
    assert "recorded no end" not in capsys.readouterr().err
    left = replace(parse_record(store.read(attempt_key(2)).data), outcome="running")  # type: ignore[union-attr]
    store.write(attempt_key(2), sealed(asdict(left)))
    with opened():
        pass
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (line,) = [line for line in lines if "the attempt before this one recorded no end: it was killed" in line["event"]]
    assert (line["attempt_before"], line["level"]) == (2, "warning")


def train_to(step: int) -> Callable[[Attempt], object]:
    """Trains up to a step, which is not saved."""

    def work(attempt: Attempt) -> None:
        with attempt.timed(Stage.PULL):
            pass
        with attempt.timed(Stage.TRAIN):
            for done in range(1, step + 1):
                attempt.step_done(done, 0.1)

    return work


def score(questions: int) -> Callable[[Attempt], object]:
    """Evaluates, until so many questions are scored."""

    def work(attempt: Attempt) -> None:
        with attempt.timed(Stage.EVALUATE_BASE):
            attempt.questions = questions
            attempt.note("running")

    return work


def pull_only(attempt: Attempt) -> None:
    """Gets no further than the first stage."""
    with attempt.timed(Stage.PULL):
        pass


def test_attempts_of_several_machines_that_get_nowhere_wait(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JobSet starts the next attempt at once: it waits longer after each idle one, and ends at once when stopped."""
    waited: list[float] = []
    monkeypatch.setattr("job.runs.attempt.idle_pause", lambda idle: waited.append(idle_pause(idle)) or 0.0)
    opening = partial(
        open_attempt,
        store,
        SETTINGS,
        cache=str(tmp_path / "cache"),
        stop=StopFlag(),
        report_progress=lambda: None,
        faults=arm((), store),
    )
    for _ in range(5):
        with suppress(Preempted), opening() as attempt:
            attempt.pause_after_idle()
            pull_only(attempt)
            raise Preempted("stopped")
    assert waited == [0.0, 10.0, 20.0, 40.0, 60.0]
    assert idle_pause(5000) == 60.0
    stop = StopFlag()

    def stopped_while_it_waits(_idle: int) -> float:
        Timer(0.1, lambda: stop.request("SIGTERM", 30.0)).start()
        return 600.0

    monkeypatch.setattr("job.runs.attempt.idle_pause", stopped_while_it_waits)
    with pytest.raises(Preempted), opening(stop=stop) as attempt:
        attempt.pause_after_idle()
    assert parse_record(store.read(attempt_key(6)).data).outcome == "preempted"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("works", "last"),
    [
        pytest.param([pull_only] * 3, "NoProgress", id="pulls again and again"),
        pytest.param([train_to(9), *[train_to(8)] * 3], "NoProgress", id="repeats the steps that were lost"),
        pytest.param([train_to(9), *[pull_only] * 3], "NoProgress", id="does not come to train"),
        pytest.param([score(50), *[score(50)] * 3], "NoProgress", id="scores the same questions"),
        pytest.param([train_to(9), train_to(9), train_to(9), train_to(10)], "Preempted", id="a new step"),
        pytest.param([pull_only, pull_only, train_to(0)], "Preempted", id="a new stage"),
        pytest.param([score(50), score(50), score(50), score(51)], "Preempted", id="a new question"),
    ],
)
def test_a_run_that_gets_nowhere_ends_with_a_code_that_counts(
    store: LocalStore, tmp_path: Path, works: list[Callable[[Attempt], object]], last: str
) -> None:
    """Of attempts in a row that are stopped before the run got any further the third ends with 71, none before it."""
    ends = stopped_attempts(store, tmp_path / "cache", 3, works)
    assert ends[-1] == last
    assert set(ends[:-1]) == {"Preempted"}
    assert noted_of(store, len(works))["outcome"] == "preempted"


def test_it_goes_on_to_count_until_there_is_progress(store: LocalStore, tmp_path: Path) -> None:
    """Each further attempt that makes none ends with 71; the first that makes some starts the count anew."""
    works = [pull_only, pull_only, pull_only, train_to(1), train_to(1), train_to(2)]
    names = ["Preempted", "NoProgress", "NoProgress", "Preempted", "Preempted", "Preempted"]
    assert stopped_attempts(store, tmp_path / "cache", 2, works) == names
