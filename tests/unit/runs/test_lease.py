"""The run's lease, and the store that only its holder can change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Barrier, Event, Lock
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from job.common.hashing import sealed
from job.errors import AccessDenied, DataError, JobError, Problem, Replaced, SettingsError, Unreachable
from job.runs import lease as lease_module
from job.runs.layout import LEASE as KEY
from job.runs.layout import attempt_key
from job.runs.lease import Lease, check_same_store, fenced, take
from job.storage.base import NotSupported, Stored, write_in_turn
from job.storage.local import LocalStore
from job.storage.open import Conflict, ObjectStore, open_store
from tests import clouds
from tests.wrapped_store import CHANGES, FailNth, WrappedStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty store."""
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ObjectStore]]:
    """Opens an empty store of a kind, in an imitation that runs from the first time on."""
    with ExitStack() as stack:

        @cache
        def reach(kind: str) -> dict[str, str]:
            return stack.enter_context(clouds.imitation(kind, tmp_path_factory.mktemp(kind)))

        def opened(kind: str) -> ObjectStore:
            options = replace(clouds.options(kind, reach(kind)), retries=2)
            return open_store(f"{clouds.place(kind)}/{uuid4().hex}", options)

        yield opened


class NoConditions(WrappedStore):
    """A store that ignores conditions and says so."""

    def conditional_writes(self) -> bool:
        """No."""
        return False

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """Writes whatever the condition."""
        return super().write(key, data)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that cannot be read is read again without a pause."""
    monkeypatch.setattr(lease_module, "_PAUSES", (0.0, 0.0))


def content(store: ObjectStore) -> dict[str, object]:
    """What the lease says."""
    stored = store.read(KEY)
    assert stored is not None
    lease: dict[str, object] = json.loads(stored.data)
    return lease


def everything(store: ObjectStore) -> dict[str, bytes]:
    """Content by key of all but the lease."""
    keys = [info.key for info in store.list() if info.key != KEY]
    return {key: stored.data for key in keys if (stored := store.read(key))}


def test_epochs_count_attempts(store: LocalStore) -> None:
    """The first attempt has epoch 1 and each later one the next; the lease names its holder."""
    assert [take(store, "pod").epoch for _ in range(3)] == [1, 2, 3]
    lease = take(store, "pod-a")
    assert lease.holder.startswith("pod-a/")
    said = content(store)
    assert (said["epoch"], said["holder"], said["heartbeat"]) == (4, lease.holder, 0)


def test_holders_are_unique(store: LocalStore) -> None:
    """Two attempts with the same name are still told apart."""
    assert take(store, "pod").holder != take(store, "pod").holder


def test_machines_that_do_not_share_the_run_s_folder_are_refused(store: LocalStore, tmp_path: Path) -> None:
    """A machine that sees another lease or none ends; one that sees it, late or renewed, goes on."""
    lease = take(store, "machine-0")
    other = LocalStore(tmp_path / "other")
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"JOB_RUN__OUTPUT: is .*/other, where this machine does not see"):
            check_same_store(other, lease.holder, lambda: None, seconds=0)
        take(other, "machine-0")  # of an attempt that this machine began alone
    asked = []
    check_same_store(other, lease.holder, lambda: asked.append(other.write(KEY, store.read(KEY).data)))  # type: ignore[union-attr]
    assert len(asked) == 1
    lease.confirm()
    check_same_store(store, lease.holder, lambda: None, seconds=0)


def test_confirm_counts_heartbeats(store: LocalStore) -> None:
    """The holder can confirm its lease any number of times, and each confirmation is written."""
    lease = take(store, "a")
    for _ in range(3):
        lease.confirm()
        lease.check()
    assert content(store)["heartbeat"] == 3


@pytest.mark.parametrize("ask", [Lease.confirm, Lease.check])
def test_old_attempt_that_wakes_up(store: LocalStore, ask: Callable[[Lease], None]) -> None:
    """A replaced attempt learns it at its next request, whichever that is, and leaves the new lease unchanged."""
    old = take(store, "old")
    new = take(store, "new")
    before = content(store)
    with pytest.raises(Replaced, match=r"attempt 2 \(new/"):
        ask(old)
    assert content(store) == before
    new.confirm()


def test_lost_stays_lost(store: LocalStore) -> None:
    """An attempt that was told that it lost gets no other answer later, whatever happens to the lease."""
    old = take(store, "old")
    mine = store.read(KEY)
    assert mine is not None
    take(store, "new")
    with pytest.raises(Replaced):
        old.check()
    store.write(KEY, mine.data)
    with pytest.raises(Replaced):
        old.confirm()


@pytest.mark.parametrize("ask", [Lease.confirm, Lease.check])
@pytest.mark.parametrize("garbage", [None, b"", b"\xff", b"{}", b"x" * 100_000])
def test_lease_that_went_away(
    store: LocalStore, garbage: bytes | None, ask: Callable[[Lease], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that is gone or damaged names no successor: the attempt ends as one that another may follow."""
    monkeypatch.setattr(lease_module, "_PAUSES", (0.0, 0.0))
    lease = take(store, "a")
    if garbage is None:
        store.delete(KEY)
    else:
        store.write(KEY, garbage)
    with pytest.raises(Unreachable, match=r"lease\.json.*the next attempt resumes"):
        ask(lease)


class CutAnswers(WrappedStore):
    """A store whose next answers to the read of a lease hold half of it."""

    left = 0

    def read(self, key: str, *, max_bytes: int = 1 << 20) -> Stored | None:
        """Half of the object, as long as there are cut answers left."""
        stored = super().read(key, max_bytes=max_bytes)
        if stored is None or not self.left or key != KEY:
            return stored
        self.left -= 1
        return Stored(stored.data[: len(stored.data) // 2], stored.tag)


def test_a_cut_answer_is_asked_for_again(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a lease says nothing about who owns the run: it is read again, by its holder and by who takes it over."""
    monkeypatch.setattr(lease_module, "_PAUSES", (0.0, 0.0))
    cut = CutAnswers(store)
    lease = take(cut, "a")
    cut.left = 2
    lease.check()
    cut.left = 2
    lease = take(cut, "b")
    assert lease.epoch == 2
    cut.left = 3
    with pytest.raises(Unreachable):
        lease.check()
    lease.check()  # it was not lost


def test_numbers_go_on_after_a_lease_was_removed(store: LocalStore) -> None:
    """The remedy for a damaged lease, to remove it, does not make attempts write over the records of earlier ones."""
    for number in (1, 2, 7):
        store.write(attempt_key(number), b"")
    assert take(store, "a").epoch == 8
    assert take(store, "b").epoch == 9


def test_numbers_go_on_after_those_of_a_run_that_is_taken_over(store: LocalStore) -> None:
    """Its attempts keep their numbers, in the first attempt of this run as in one after a kill."""
    assert take(store, "a", after=3).epoch == 4
    assert take(store, "b", after=3).epoch == 5


@pytest.mark.usefixtures("at_once")
def test_an_epoch_beyond_all_names_is_no_lease(store: LocalStore) -> None:
    """An epoch that no attempt's name can hold is refused like any other damage, not handed on."""
    record = {"epoch": 10**9, "holder": "a/b", "started": "2026-01-01T00:00:00Z", "heartbeat": 0}
    store.write(KEY, sealed(record))
    with pytest.raises(DataError, match=r"lease\.json: is not a valid lease"):
        take(store, "a")


def test_a_fence_writes_plainly_without_conditions(store: LocalStore) -> None:
    """Where a store answers that it knows no conditions, records are written without, as the lease is."""

    class Swift(NoConditions):
        def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
            if if_absent or if_tag is not None:
                raise NotSupported([Problem("storage", "501 Not Implemented")])
            return super().write(key, data)

    swift = Swift(store)
    safe = fenced(swift, take(swift, "a"))
    tag = write_in_turn(safe, "settings.json", b"1", None)
    write_in_turn(safe, "settings.json", b"2", tag)
    assert everything(store) == {"settings.json": b"2"}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"{}", b"x" * 100_000, b'{"epoch": "1"}'])
def test_garbage_is_not_taken_over(store: LocalStore, garbage: bytes) -> None:
    """What lies in the lease's place and is none is left alone, with an error that names it."""
    store.write(KEY, garbage)
    with pytest.raises(DataError, match=r"lease\.json: is not a valid lease"):
        take(store, "a")
    stored = store.read(KEY)
    assert stored is not None
    assert stored.data == garbage


@pytest.mark.usefixtures("at_once")
def test_a_changed_digit_is_no_lease(store: LocalStore) -> None:
    """A lease whose epoch was altered would make two attempts write in one place: it is refused."""
    take(store, "a")
    take(store, "b")
    stored = store.read(KEY)
    assert stored is not None
    store.write(KEY, stored.data.replace(b'"epoch": 2', b'"epoch": 1'))
    with pytest.raises(DataError, match=r"lease\.json: is not a valid lease"):
        take(store, "c")


def test_heartbeat_whose_answer_got_lost(store: LocalStore) -> None:
    """A heartbeat that arrived although it looked failed does not cost the holder its lease."""
    second_write = FailNth(1, Unreachable("the answer got lost"), ("write",))
    lease = take(WrappedStore(store, after=second_write), "a")
    with pytest.raises(Unreachable):
        lease.confirm()
    lease.confirm()
    lease.check()
    assert content(store)["heartbeat"] == 2


def test_take_whose_answer_got_lost(store: LocalStore) -> None:
    """A take that arrived, but whose repetition was refused because of that, is a take."""
    lease = take(WrappedStore(store, after=FailNth(0, Conflict("repeated"), ("write",))), "a")
    lease.confirm()
    assert (lease.epoch, content(store)["heartbeat"]) == (1, 1)


def test_a_live_holder_does_not_keep_its_successor_out(store: LocalStore) -> None:
    """A takeover that collides with heartbeats of the old holder is tried again, and succeeds."""
    old = take(store, "old")

    def beat(verb: str, key: str) -> None:
        if (verb, key) == ("write", KEY) and old_beats:
            old_beats.pop()
            old.confirm()

    old_beats = [1, 2, 3]
    new = take(WrappedStore(store, before=beat), "new")
    assert (new.epoch, old_beats) == (2, [])
    new.confirm()
    with pytest.raises(Replaced):
        old.confirm()


def test_a_take_that_comes_second_loses(store: LocalStore) -> None:
    """Of two attempts that found the same lease the slower one goes, and does not replace the faster one."""
    take(store, "before")
    rivals: list[Lease] = []

    def overtake(verb: str, key: str) -> None:
        if (verb, key) == ("write", KEY) and not rivals:
            rivals.append(take(store, "fast"))

    with pytest.raises(Replaced, match="fast"):
        take(WrappedStore(store, before=overtake), "slow")
    rivals[0].confirm()
    assert content(store)["epoch"] == 2


@pytest.mark.parametrize("error", [AccessDenied("403"), Unreachable("timeout")])
@pytest.mark.parametrize("verb", ["read", "write", "conditional_writes"])
def test_errors_of_the_store_pass_through(store: LocalStore, verb: str, error: Exception) -> None:
    """That the store cannot be asked says nothing about who owns the run: its own error is raised, and nothing lost."""
    lease = take(store, "a")
    flaky = WrappedStore(store, before=FailNth(0, error, (verb,)))
    with pytest.raises(type(error)):
        take(flaky, "b")
    lease.confirm()
    for ask, asks_by in ((Lease.confirm, "write"), (Lease.check, "read")):
        lease._store = WrappedStore(store, before=FailNth(0, error, (asks_by,)))
        with pytest.raises(type(error)):
            ask(lease)
        ask(lease)


def test_without_conditional_writes(store: LocalStore) -> None:
    """A store without conditions is named in a warning; a replaced attempt still notices, and leaves it alone."""
    blind = NoConditions(store)
    with capture_logs() as logs:
        old = take(blind, "old")
    assert [line["log_level"] for line in logs if "no conditional writes" in line["event"]] == ["warning"]
    old.confirm()
    new = take(blind, "new")
    before = content(store)
    with pytest.raises(Replaced):
        old.confirm()
    new.confirm()
    assert content(store) == before


def test_guard_passes_everything_on_to_the_holder(store: LocalStore, tmp_path: Path) -> None:
    """For the holder the guarded store is the store."""
    (tmp_path / "file").write_bytes(b"2")
    safe = fenced(store, take(store, "a"))
    tag = safe.write("a", b"1", if_absent=True)
    safe.write("a", b"one", if_tag=tag)
    safe.upload(tmp_path / "file", "b")
    safe.write("c", b"3")
    safe.delete("c")
    safe.download("a", tmp_path / "copy", max_bytes=3)
    stored = safe.read("b")
    assert stored is not None
    assert (stored.data, (tmp_path / "copy").read_bytes()) == (b"2", b"one")
    assert [info.key for info in safe.list()] == ["a", "b", KEY]
    assert (safe.uri, safe.conditional_writes()) == (store.uri, True)


def test_guard_stops_a_replaced_attempt(store: LocalStore, tmp_path: Path) -> None:
    """A replaced attempt can read, but no verb of its store changes anything any more."""
    (tmp_path / "file").write_bytes(b"2")
    old = fenced(store, take(store, "old"))
    old.write("a", b"1")
    take(store, "new")
    before = everything(store)
    for change in (
        lambda: old.write("a", b"x"),
        lambda: old.write("b", b"x", if_absent=True),
        lambda: old.upload(tmp_path / "file", "a"),
        lambda: old.delete("a"),
    ):
        with pytest.raises(Replaced):
            change()
    assert everything(store) == before
    assert old.read("a") is not None


@pytest.mark.parametrize("verb", CHANGES)
def test_nobody_without_a_lease_changes_anything(store: LocalStore, tmp_path: Path, verb: str) -> None:
    """Of several processes one holds the lease; the store of the others can be read, and a change is a bug."""
    (tmp_path / "file").write_bytes(b"2")
    store.write("a", b"1")
    safe = fenced(store, None)
    change: dict[str, Callable[[], object]] = {
        "write": lambda: safe.write("a", b"2"),
        "upload": lambda: safe.upload(tmp_path / "file", "b"),
        "delete": lambda: safe.delete("a"),
    }
    with pytest.raises(JobError, match="a bug"):
        change[verb]()
    assert everything(store) == {"a": b"1"}
    assert safe.read("a") is not None


@pytest.mark.parametrize("verb", CHANGES)
def test_guard_asks_before_every_change(store: LocalStore, tmp_path: Path, verb: str) -> None:
    """Each single change is preceded by a question: being replaced between two of them is noticed."""
    (tmp_path / "file").write_bytes(b"2")
    old = fenced(store, take(store, "old"))
    change = {
        "write": lambda key: old.write(key, b"1"),
        "upload": lambda key: old.upload(tmp_path / "file", key),
        "delete": old.delete,
    }[verb]
    change("a")
    take(store, "new")
    with pytest.raises(Replaced):
        change("b")
    assert "b" not in everything(store)


def race(store: ObjectStore, attempts: int = 2) -> None:
    """Lets attempts start together, each publish until it is replaced or the last one left, and checks the lineage.

    The journal lists, in the order in which they took effect, the changes by each attempt's name; a change of the lease
    is that of its new holder.
    """
    journal: list[tuple[str, str]] = []
    tried: list[str] = []
    one_at_a_time, together, all_tried = Lock(), Barrier(attempts), Event()

    class Journaled(WrappedStore):
        name = ""

        def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
            with one_at_a_time:
                tag = super().write(key, data, if_absent=if_absent, if_tag=if_tag)
                took = key == KEY and json.loads(data)["heartbeat"] == 0
                if took or key != KEY:
                    journal.append((self.name, "took" if took else "changed"))
                return tag

    def take_my_turn(journaled: Journaled) -> Lease:
        together.wait()
        try:
            return take(journaled, journaled.name)
        finally:
            tried.append(journaled.name)
            if len(tried) == attempts:
                all_tried.set()

    def attempt(number: int) -> tuple[str, bool]:
        journaled = Journaled(store)
        journaled.name = f"attempt-{number}"
        try:
            lease = take_my_turn(journaled)
            safe = fenced(journaled, lease)
            for change in range(6):
                safe.write(f"{journaled.name}/{change}", b"x")
            assert all_tried.wait(60)
            lease.confirm()
        except Replaced:
            return journaled.name, False
        return journaled.name, True

    with ThreadPoolExecutor(attempts) as pool:
        outcome = dict(pool.map(attempt, range(attempts)))
    survivors = [name for name, survived in outcome.items() if survived]
    takes = [place for place, (_, what) in enumerate(journal) if what == "took"]
    last = journal[takes[-1]][0]
    assert survivors == [last]
    for name in outcome.keys() - {last}:
        # One request may have been under way when the lease changed hands; the one after it finds out.
        assert sum(who == name for who, _ in journal[takes[-1] :]) <= 1


@pytest.mark.parametrize("number", range(20))
def test_race_on_a_local_store(store: LocalStore, number: int) -> None:
    """Of two attempts that start together exactly one goes on, and the other changes nothing after it lost."""
    race(store)


RACES = [
    pytest.param(kind, number, marks=() if number < few else pytest.mark.long)
    for kind, few in {"s3": 6, "gcs": 3, "azure": 0}.items()
    for number in range(50)
]
"""Kind of store and number of each race: a few for the suite, and the others for `make test-long`."""


@pytest.mark.parametrize(("kind", "number"), RACES)
def test_race_in_a_cloud(empty_store: Callable[[str], ObjectStore], kind: str, number: int) -> None:
    """The same over HTTP, in an imitation of each cloud's store."""
    race(empty_store(kind))


def test_race_of_many(store: LocalStore) -> None:
    """However many start together, one goes on."""
    race(store, attempts=6)


def test_threads_share_a_lease(store: LocalStore) -> None:
    """Uploader and trainer may ask at the same time, and neither takes the other for a rival."""
    lease = take(store, "a")
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(lease.confirm if n % 2 else lease.check) for n in range(40)]
    assert [future.exception() for future in asked] == [None] * 40
    assert content(store)["heartbeat"] == 20
