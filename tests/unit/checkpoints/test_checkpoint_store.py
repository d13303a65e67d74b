"""Durable checkpoints: published completely or not at all, restored completely or not at all."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from job.checkpoints import checkpoint_store
from job.checkpoints.checkpoint_store import Restored, prune, restore, steps
from job.checkpoints.commit_marker import MAX_MARKER_BYTES, parse_marker
from job.common.hashing import hash_facts, seal
from job.errors import AccessDenied, JobError, Unreachable
from job.runs.layout import COMMITTED
from job.runs.lease import fenced, take
from job.storage.local import LocalStore
from job.storage.open import ObjectStore, StorageOptions, open_store
from tests.gcs_server import gcs_server
from tests.s3_server import BUCKET
from tests.wrapped_store import CHANGES, FailNth, WrappedStore

FILES = {"adapter.safetensors": b"adapter of step %d" * 50, "progress.json": b'{"step": %d}', "metrics.jsonl": b"%d\n"}
SOFTWARE = {"torch": "2.13.0"}
NEWEST = "checkpoints/step-00000020/"
MARKER = NEWEST + COMMITTED


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty store."""
    return LocalStore(tmp_path / "store")


@pytest.fixture
def two(store: LocalStore, tmp_path: Path) -> LocalStore:
    """A store with the checkpoints of steps 10 and 20."""
    commit(store, tmp_path, 10)
    commit(store, tmp_path, 20)
    return store


def written(tmp_path: Path, step: int) -> Path:
    """A finished checkpoint of a step, on the local disk."""
    folder = tmp_path / f"written-{step}"
    folder.mkdir(exist_ok=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data.replace(b"%d", str(step).encode()))
    return folder


def commit(store: ObjectStore, tmp_path: Path, step: int, epoch: int = 1) -> None:
    """Publishes a step."""
    checkpoint_store.commit(store, written(tmp_path, step), step, checkpoint_store.MarkerFields(epoch, 1, SOFTWARE))


def is_whole(folder: Path | None, step: int) -> bool:
    """Whether a restored folder holds what `written` wrote, and nothing else."""
    expected = {name: data.replace(b"%d", str(step).encode()) for name, data in FILES.items()}
    return folder is not None and {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def restored_step(store: ObjectStore, tmp_path: Path) -> int:
    """Restores, checks every byte, and returns the step; 0 for none."""
    found = restore(store, tmp_path / "restored", SOFTWARE)
    assert found.step == 0 or is_whole(found.folder, found.step)
    return found.step


def reseal(store: ObjectStore, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the newest marker as an attacker would, with a recomputed seal."""
    stored = store.read(MARKER)
    assert stored is not None
    facts = json.loads(stored.data)
    change(facts)
    store.write(MARKER, json.dumps(facts | {"seal": seal(facts)}).encode())


def vouched_files_are_there(store: ObjectStore) -> bool:
    """Whether all files of each marker exist, with the right bytes."""
    for info in store.list("checkpoints/"):
        if info.key.endswith(COMMITTED):
            stored = store.read(info.key)
            assert stored is not None
            marker = parse_marker(stored.data)
            for name, file in marker.files.items():
                found = store.read(marker.folder + name)
                if found is None or hashlib.sha256(found.data).hexdigest() != file.sha256:
                    return False
    return True


def test_what_is_published_holds_whole_checkpoints(two: LocalStore, tmp_path: Path) -> None:
    """Before a run is published every checkpoint that an earlier attempt left is read: damaged and foreign ones go."""
    commit(two, tmp_path, 30)
    commit(two, tmp_path, 40, epoch=2)
    two.write("checkpoints/step-00000010/0001/progress.json", b'{"step": 11}')  # older than what is restored
    marker = two.read("checkpoints/step-00000020/COMMITTED.json")
    assert marker is not None
    two.write("checkpoints/step-00000050/COMMITTED.json", marker.data)
    reading: list[str] = []
    watched = WrappedStore(two, before=lambda verb, key: reading.append(key) if verb == "download" else None)
    gone = checkpoint_store.delete_all_but_intact(watched, tmp_path / "copies", epoch=2, run="a", keep=9)
    assert [(skipped.step, skipped.why) for skipped in gone] == [
        (50, "the marker is of step 20"),
        (10, "progress.json has another SHA-256 than the marker"),
    ]
    assert sorted({info.key.split("/")[1] for info in two.list("checkpoints/")}) == [
        f"step-{step:08d}" for step in (20, 30, 40)
    ]
    assert vouched_files_are_there(two)
    assert not any("step-00000040" in key for key in reading)  # this attempt's own
    assert not list((tmp_path / "copies").iterdir())


def test_a_checkpoint_of_another_run_is_not_published(store: LocalStore, tmp_path: Path) -> None:
    """One whose marker names another run is deleted too, and one that names none, as earlier versions wrote, stays."""
    for step, run in ((10, "a"), (20, "b"), (30, None)):
        checkpoint_store.commit(
            store, written(tmp_path, step), step, checkpoint_store.MarkerFields(1, 1, SOFTWARE, run)
        )
    gone = checkpoint_store.delete_all_but_intact(store, tmp_path / "copies", epoch=2, run="a", keep=9)
    assert [one.step for one in gone] == [20]
    assert steps(store) == [30, 10]


def test_what_is_published_holds_no_more_checkpoints_than_are_kept(two: LocalStore, tmp_path: Path) -> None:
    """Older ones are deleted before, as an attempt that stood still while it deleted them would do it later."""
    commit(two, tmp_path, 30)
    two.write("checkpoints/step-00000030/0001/progress.json", b"{}")
    gone = checkpoint_store.delete_all_but_intact(two, tmp_path / "copies", epoch=2, run="a", keep=1)
    assert [one.step for one in gone] == [30]
    assert steps(two) == [20]


# Publishing.


def test_there_and_back(two: LocalStore, tmp_path: Path) -> None:
    """The newest checkpoint comes back byte by byte, in a folder of its own with nothing beside it."""
    found = restore(two, tmp_path / "restored", SOFTWARE)
    assert found == Restored(tmp_path / "restored" / "step-00000020", 20, ())
    assert is_whole(found.folder, 20)
    assert [path.name for path in (tmp_path / "restored").iterdir()] == ["step-00000020"]


def test_layout(two: LocalStore) -> None:
    """A checkpoint's marker lies in the step's folder, its files in that of the attempt."""
    expected = {f"checkpoints/step-000000{n}/0001/{name}" for n in (10, 20) for name in FILES}
    expected |= {f"checkpoints/step-000000{n}/COMMITTED.json" for n in (10, 20)}
    assert {info.key for info in two.list()} == expected


def test_marker_says_what_it_vouches_for(two: LocalStore, tmp_path: Path) -> None:
    """Step, epoch, world size, software, and size and hash of each file are in the marker."""
    stored = two.read(MARKER)
    assert stored is not None
    marker = json.loads(stored.data)
    assert {key: marker[key] for key in ("step", "epoch", "world_size", "software")} == {
        "step": 20,
        "epoch": 1,
        "world_size": 1,
        "software": SOFTWARE,
    }
    for name, file in marker["files"].items():
        data = (tmp_path / "written-20" / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert marker["files"].keys() == FILES.keys()


def test_nothing_to_restore(store: LocalStore, tmp_path: Path) -> None:
    """In an empty store there is no checkpoint, which is no error."""
    assert restore(store, tmp_path / "restored", SOFTWARE) == Restored(None, 0, ())


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("n", range(4))
def test_publishing_that_fails(two: LocalStore, tmp_path: Path, moment: str, n: int) -> None:
    """Whichever request fails, and whether it took effect or not: no marker without its files, nothing old is lost."""
    flaky = WrappedStore(two, **{moment: FailNth(n, Unreachable("503"))})
    with pytest.raises(Unreachable):
        commit(flaky, tmp_path, 30, epoch=2)
    assert vouched_files_are_there(two)
    assert restored_step(two, tmp_path) == (30 if (moment, n) == ("after", 3) else 20)


def test_all_requests_of_publishing_were_failed(store: LocalStore, tmp_path: Path) -> None:
    """The test above covers publishing to its last request."""
    count = FailNth(-1, Unreachable(""))
    commit(WrappedStore(store, before=count), tmp_path, 30)
    assert count.seen == 4


@pytest.mark.parametrize("n", range(4))
def test_a_step_is_committed_anew(two: LocalStore, tmp_path: Path, n: int) -> None:
    """Another attempt at a step never changes the files that the existing marker lists."""
    with pytest.raises(Unreachable):
        commit(WrappedStore(two, before=FailNth(n, Unreachable("503"))), tmp_path, 20, epoch=2)
    assert vouched_files_are_there(two)
    assert restored_step(two, tmp_path) == 20
    commit(two, tmp_path, 20, epoch=2)
    assert restored_step(two, tmp_path) == 20


def test_late_requests_of_a_replaced_attempt_do_no_harm(store: LocalStore, tmp_path: Path) -> None:
    """Files and even the marker of an older attempt, arriving after those of a newer one, leave a whole checkpoint."""
    commit(store, tmp_path, 20, epoch=2)
    commit(store, tmp_path, 20, epoch=1)
    assert vouched_files_are_there(store)
    assert restored_step(store, tmp_path) == 20


def test_a_replaced_attempt_commits_nothing(two: LocalStore, tmp_path: Path) -> None:
    """Replaced at any point of publishing or pruning, an attempt neither commits nor removes a checkpoint after it."""
    for n in range(8):
        lease = take(two, "old")
        count = 0

        def replace(verb: str, key: str, n: int = n) -> None:
            nonlocal count
            count += verb in CHANGES
            if verb in CHANGES and count == n + 1:
                take(two, "new")

        safe = fenced(WrappedStore(two, after=replace), lease)
        with pytest.raises(JobError, match="publishes nothing more"):
            commit_and_prune(safe, tmp_path, 100 + n, lease.epoch)
        assert vouched_files_are_there(two)
        # The marker is the fourth change: only who was replaced by its very arrival, or later, has committed.
        assert (100 + n in steps(two)) == (n >= 3)


def commit_and_prune(store: ObjectStore, tmp_path: Path, step: int, epoch: int) -> None:
    """What training does at every save."""
    commit(store, tmp_path, step, epoch)
    prune(store, 1, own_steps=[step], verified=20)


# Restoring what is damaged.


class Damage(NamedTuple):
    """A way to damage an object."""

    name: str
    apply: Callable[[bytes], bytes | None]


DAMAGES = [
    Damage("removed", lambda _: None),
    Damage("emptied", lambda _: b""),
    Damage("truncated", lambda data: data[:-1]),
    Damage("grown", lambda data: data + b"x"),
    Damage("first bit", lambda data: bytes([data[0] ^ 1]) + data[1:]),
    Damage(
        "middle bit",
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[1 + len(data) // 2 :],
    ),
    Damage("swapped", lambda data: data[::-1]),
    Damage("zeroed", lambda data: bytes(len(data))),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
@pytest.mark.parametrize("key", [MARKER, *(f"{NEWEST}0001/{name}" for name in FILES)])
def test_every_damage_to_every_object(two: LocalStore, tmp_path: Path, key: str, damage: Damage) -> None:
    """One object of the newest checkpoint damaged in any way: the one before is restored, and the log says why."""
    stored = two.read(key)
    assert stored is not None
    data = damage.apply(stored.data)
    if data is None:
        two.delete(key)
    else:
        two.write(key, data)
    with capture_logs() as logs:
        found = restore(two, tmp_path / "restored", SOFTWARE)
    assert found.step == 10
    assert is_whole(found.folder, 10)
    if key == MARKER and data is None:
        assert found.skipped == ()
    else:
        assert [skip.step for skip in found.skipped] == [20]
        assert [(line["log_level"], line["step"]) for line in logs] == [("warning", 20)]
    assert [path.name for path in (tmp_path / "restored").iterdir()] == ["step-00000010"]


def test_damage_in_a_cloud(tmp_path: Path) -> None:
    """A store that knows the checksums of its objects lets a damaged one be passed over like any other."""
    with gcs_server() as bucket:
        store = open_store(f"gs://{BUCKET}/run", StorageOptions(retries=1))
        commit(store, tmp_path, 10)
        commit(store, tmp_path, 20)
        damaged = next(held for key, held in bucket.objects.items() if key.startswith(f"run/{NEWEST}0001/"))
        damaged.data = bytes(len(damaged.data))
        assert restored_step(store, tmp_path) == 10


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2000), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_marker(two: LocalStore, place: int, bit: int) -> None:
    """A marker with any one bit flipped is refused, or says exactly what it said before (a space became a tab)."""
    stored = two.read(MARKER)
    assert stored is not None
    data = bytearray(stored.data)
    data[place % len(data)] ^= 1 << bit
    try:
        said = parse_marker(bytes(data))
    except ValueError:
        return
    assert said == parse_marker(stored.data)
    assert chr(stored.data[place % len(data)]).isspace()


def test_all_are_damaged(two: LocalStore, tmp_path: Path) -> None:
    """With no valid checkpoint training starts again; that is logged as an error, with the skipped ones and why."""
    for info in list(two.list()):
        if info.key.endswith("progress.json"):
            two.write(info.key, b"?")
    with capture_logs() as logs:
        found = restore(two, tmp_path / "restored", SOFTWARE)
    assert (found.folder, found.step, [skip.step for skip in found.skipped]) == (None, 0, [20, 10])
    assert [line["skipped"] for line in logs if line["log_level"] == "error"] == [[20, 10]]
    assert all("progress.json has 1 bytes" in skip.why for skip in found.skipped)


def test_what_was_on_the_disk_before_goes(two: LocalStore, tmp_path: Path) -> None:
    """Left-overs of a restore that was killed do not mix with the next one."""
    for name in ("step-00000020", "step-00000020.partial"):
        shutil.copytree(written(tmp_path, 10), tmp_path / "restored" / name)
        (tmp_path / "restored" / name / "stale").touch()
    assert restored_step(two, tmp_path) == 20


def test_another_number_of_processes_is_said(two: LocalStore, tmp_path: Path) -> None:
    """The checkpoint is used all the same: the plan of the steps does not depend on it."""
    with capture_logs() as lines:
        assert restore(two, tmp_path / "restored", SOFTWARE, world_size=4).step == 20
    (line,) = [line for line in lines if line["log_level"] == "warning"]
    assert (line["before"], line["processes"]) == (1, 4)


def test_other_software_is_said(two: LocalStore, tmp_path: Path) -> None:
    """A checkpoint of other versions is used, with a warning that names them."""
    with capture_logs() as logs:
        found = restore(two, tmp_path / "restored", {"torch": "3.0", "trl": "1"})
    assert found.step == 20
    assert [line["changed"] for line in logs] == [["torch 2.13.0 before, 3.0 now", "trl unknown before, 1 now"]]


@pytest.mark.parametrize("error", [AccessDenied("403"), Unreachable("timeout")])
@pytest.mark.parametrize("n", range(6))
def test_errors_of_the_store_pass_through(two: LocalStore, tmp_path: Path, n: int, error: JobError) -> None:
    """A store that cannot be asked, at any request of a restore, is an error: never an older checkpoint, never none."""
    flaky = WrappedStore(two, before=FailNth(n, error, ("list", "read", "download")))
    with pytest.raises(type(error)) as caught:
        restore(flaky, tmp_path / "restored", SOFTWARE)
    assert caught.value is error
    assert list((tmp_path / "restored").glob("*")) == []


def test_all_requests_of_restoring_were_failed(two: LocalStore, tmp_path: Path) -> None:
    """The test above covers restoring to its last request."""
    count = FailNth(-1, Unreachable(""), ("list", "read", "download"))
    restored_step(WrappedStore(two, before=count), tmp_path)
    assert count.seen == 6


def test_a_listing_that_lacks_a_file_is_no_absence(two: LocalStore, tmp_path: Path) -> None:
    """Only the answer to the request for the file itself says that it is gone."""

    class Forgetful(WrappedStore):
        def list(self, prefix: str = "") -> Any:
            return (info for info in super().list(prefix) if "progress" not in info.key)

    forgetful = Forgetful(two)
    assert restored_step(forgetful, tmp_path) == 20
    for damaged in (b"?", b"much longer than the marker says"):
        two.write(f"{NEWEST}0001/progress.json", damaged)
        assert restored_step(forgetful, tmp_path) == 10


def test_contradicting_sizes_spare_the_download(two: LocalStore, tmp_path: Path) -> None:
    """A checkpoint with a file of a wrong size is skipped before anything of it is fetched."""
    two.write(f"{NEWEST}0001/progress.json", b"?")
    fetched: list[str] = []
    watched = WrappedStore(two, before=lambda verb, key: fetched.append(key) if verb == "download" else None)
    assert restored_step(watched, tmp_path) == 10
    assert len(fetched) == len(FILES)
    assert not any(key.startswith(NEWEST) for key in fetched)


def test_a_marker_of_another_step(two: LocalStore, tmp_path: Path) -> None:
    """A marker in the folder of another step is invalid there, even if it is valid for its own step."""
    stored = two.read("checkpoints/step-00000010/COMMITTED.json")
    assert stored is not None
    two.write("checkpoints/step-00000030/COMMITTED.json", stored.data)
    found = restore(two, tmp_path / "restored", SOFTWARE)
    assert (found.step, found.skipped[0].why) == (20, "the marker is of step 10")


# Content that is wrong although its bytes are right.


def test_content_is_checked(two: LocalStore, tmp_path: Path) -> None:
    """Bytes that are right but cannot be loaded count as damage, and are never given a place to be loaded from."""
    seen: list[tuple[str, int]] = []

    def check(folder: Path, step: int) -> None:
        assert is_whole(folder, step)
        seen.append((folder.name, step))
        if step == 20:
            raise ValueError("no JSON")

    found = restore(two, tmp_path / "restored", SOFTWARE, check)
    assert found.step == 10
    assert found.skipped[0].why.endswith("no JSON")
    assert seen == [("step-00000020.partial", 20), ("step-00000010.partial", 10)]
    assert not (tmp_path / "restored" / "step-00000020").exists()


def test_errors_of_the_check_pass_through(two: LocalStore, tmp_path: Path) -> None:
    """A bug in the check is not mistaken for a damaged checkpoint."""

    def check(_folder: Path, _step: int) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        restore(two, tmp_path / "restored", SOFTWARE, check)


# Markers by an enemy.


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/../../evil", "..", ".", "", "a/b", ".hidden", "a\\b", "a\0b", "a\nb", "x" * 300, "a/"],
)
def test_names_that_lead_elsewhere(two: LocalStore, tmp_path: Path, name: str) -> None:
    """A marker that names anything but a plain file of its folder is refused, and nothing is written elsewhere."""
    entry = {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    (tmp_path / "store" / NEWEST / "evil").write_bytes(b"evil")
    with suppress(ValueError):
        two.write(f"{NEWEST}0001/{name}", b"evil")
    reseal(two, lambda facts: facts["files"].update({name: entry}))
    assert restored_step(two, tmp_path) == 10
    assert list((tmp_path / "restored").rglob("evil")) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"]["progress.json"].update(bytes=1 << 62),
        lambda m: m["files"]["progress.json"].update(bytes=-1),
        lambda m: m["files"]["progress.json"].update(bytes="12"),
        lambda m: m["files"]["progress.json"].update(bytes=int("9" * 4000)),
        lambda m: m["files"]["progress.json"].update(sha256="0" * 63),
        lambda m: m["files"]["progress.json"].update(sha256="0" * 64),
        lambda m: m["files"]["progress.json"].update(extra=1),
        lambda m: m.update(files={}),
        lambda m: m.update(files={f"f{n}": m["files"]["progress.json"] for n in range(101)}),
        lambda m: m.update(files=[]),
        lambda m: m.update(step=10),
        lambda m: m.update(step=True),
        lambda m: m.update(epoch=2),
        lambda m: m.update(epoch=-1),
        lambda m: m.update(epoch=10**1000),
        lambda m: m.update(world_size=0),
        lambda m: m.update(software={"torch": 2}),
        lambda m: m.update(more="x"),
        lambda m: m.pop("step"),
    ],
)
def test_marker_with_wrong_facts(two: LocalStore, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A well-sealed marker with impossible or untrue facts is refused before anything large is fetched."""
    reseal(two, change)
    assert restored_step(two, tmp_path) == 10


FILE = {"bytes": 1, "sha256": "a" * 64}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"files": {f"f{n}": FILE for n in range(100)}, "step": 0, "epoch": 10**9 - 1, "run": "x" * 200}, None),
        ({"files": {f"f{n}": FILE for n in range(101)}}, "malformed"),
        ({"files": {}}, "malformed"),
        ({"files": {"a/b": FILE}}, "'a/b' is not the name of a file"),
        ({"files": {".hidden": FILE}}, "'.hidden' is not the name of a file"),
        ({"files": {"a\nb": FILE}}, "malformed"),
        ({"files": {"f": FILE | {"bytes": -1}}}, "malformed"),
        ({"files": {"f": FILE | {"bytes": 1.0}}}, "malformed"),
        ({"files": {"f": FILE | {"sha256": "a" * 63}}}, "malformed"),
        ({"files": {"f": FILE | {"sha256": "A" * 64}}}, "malformed"),
        ({"files": {"f": FILE | {"more": 1}}}, "malformed"),
        ({"step": -1}, "malformed"),
        ({"epoch": -1}, "malformed"),
        ({"epoch": 10**9}, "malformed"),
        ({"world_size": 0}, "malformed"),
        ({"run": "x" * 201}, "malformed"),
        ({"more": "x"}, "malformed"),
        ({"seal": "0" * 64}, "altered"),
        ({"seal": None}, "altered"),
    ],
)
def test_each_fact_of_a_marker_has_its_bounds(two: LocalStore, changes: dict[str, Any], fault: str | None) -> None:
    """A marker is refused for what it says, before anybody looks for the files that it names."""
    stored = two.read(MARKER)
    assert stored is not None
    facts = json.loads(stored.data) | changes
    data = json.dumps(facts | {"seal": changes.get("seal", seal(facts))}).encode()
    if fault is None:
        assert {**parse_marker(data).model_dump(), "seal": facts["seal"]} == facts
        return
    with pytest.raises(ValueError, match=fault) as refused:
        parse_marker(data)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"7",
        b"[[1, 2]]",
        b"\xff\xfe\x00",
        b'{"step": "\xc3\x28"}',
        b"[" * 100_000,
        b'{"a":' * 5_000,
        b"9" * 100_000,
        b'{"step": 1e999}',
        b" " * (MAX_MARKER_BYTES + 1),
        pickle.dumps({"step": 20}),
    ],
    ids=range(14),
)
def test_marker_that_is_none(two: LocalStore, tmp_path: Path, data: bytes) -> None:
    """Whatever lies in the place of a marker, the one before is restored; the reason given stays short."""
    two.write(MARKER, data)
    found = restore(two, tmp_path / "restored", SOFTWARE)
    assert found.step == 10
    assert len(found.skipped[0].why) < 300


def test_a_marker_of_megabytes_is_not_read(two: LocalStore, tmp_path: Path) -> None:
    """The size of a marker is limited by the store, before it is in memory."""
    limits: list[int] = []

    class Watched(WrappedStore):
        def read(self, key: str, *, max_bytes: int = 0) -> Any:
            limits.append(max_bytes)
            return super().read(key, max_bytes=max_bytes)

    restored_step(Watched(two), tmp_path)
    assert limits == [MAX_MARKER_BYTES]


def test_pickles_are_bytes_like_others(store: LocalStore, tmp_path: Path) -> None:
    """A checkpoint that is full of pickles is fetched and verified without a single one being opened."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("adapter.safetensors", "optimizer.pt", "progress.json"):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    checkpoint_store.commit(store, folder, 20, checkpoint_store.MarkerFields(1, 1, SOFTWARE))
    assert restore(store, tmp_path / "restored", SOFTWARE).step == 20
    assert not (tmp_path / "owned").exists()


def test_hidden_files_are_no_checkpoint(store: LocalStore, tmp_path: Path) -> None:
    """What could not be restored is not published either."""
    folder = written(tmp_path, 20)
    (folder / ".part").touch()
    with pytest.raises(ValueError, match=r"\.part"):
        checkpoint_store.commit(store, folder, 20, checkpoint_store.MarkerFields(1, 1, SOFTWARE))
    assert list(store.list()) == []


@pytest.mark.parametrize(
    "key",
    [
        "checkpoints/COMMITTED.json",
        "checkpoints/step-20/COMMITTED.json",
        "checkpoints/step-0000000x/COMMITTED.json",
        "checkpoints/step-000000099/COMMITTED.json",
        "checkpoints/step-٠٠٠٠٠٠٩٩/COMMITTED.json",
        "checkpoints/step-00000099/a/COMMITTED.json",
        "checkpoints/step-00000099/COMMITTED.json.bak",
    ],
)
def test_names_that_are_no_checkpoint(two: LocalStore, tmp_path: Path, key: str) -> None:
    """Objects with names that only look like a marker's are none."""
    two.write(key, b"{}")
    assert steps(two) == [20, 10]
    assert restored_step(two, tmp_path) == 20


def test_foreign_names_are_left_alone(two: LocalStore, tmp_path: Path) -> None:
    """Names that no verb of a store takes, which others can put into a bucket, stop neither restoring nor pruning."""

    class Littered(WrappedStore):
        def list(self, prefix: str = "") -> Any:
            yield from super().list(prefix)
            yield from (type(info)(f"{NEWEST}a//b", 1) for info in super().list(NEWEST))

    littered = Littered(two)
    assert restored_step(littered, tmp_path) == 20
    commit(littered, tmp_path, 30)
    prune(littered, 1, own_steps=[30], verified=0)
    assert steps(littered) == [30]


def test_steps_sort_as_numbers(store: LocalStore, tmp_path: Path) -> None:
    """The newest checkpoint is that of the highest step, also beyond the padding."""
    for step in (99_999_999, 100_000_000, 20):
        commit(store, tmp_path, step)
    assert steps(store) == [100_000_000, 99_999_999, 20]
    assert restored_step(store, tmp_path) == 100_000_000


# The disk.


def test_full_disk_is_an_error(two: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that does not fit on the disk is not skipped; nothing is fetched, the message says what to do."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 100))
    count = FailNth(-1, Unreachable(""), ("download",))
    with pytest.raises(Unreachable, match="JOB_STORAGE__CACHE"):
        restore(WrappedStore(two, before=count), tmp_path / "restored", SOFTWARE)
    assert count.seen == 0


# Pruning.


def kept(store: LocalStore) -> list[int]:
    """Steps that anything is left of, newest first."""
    return sorted({int(info.key.split("/")[1].removeprefix("step-")) for info in store.list()}, reverse=True)


def test_keep_counts_checkpoints(two: LocalStore, tmp_path: Path) -> None:
    """The newest `keep` checkpoints stay; what never became one neither counts nor stays."""
    commit(two, tmp_path, 30)
    commit(two, tmp_path, 40)
    two.delete("checkpoints/step-00000030/COMMITTED.json")
    prune(two, 2, own_steps=[40, 30, 20, 10], verified=0)
    assert (kept(two), steps(two)) == ([40, 20], [40, 20])
    assert vouched_files_are_there(two)


@pytest.mark.parametrize("keep", [-1, 0, 1])
def test_the_last_one_is_never_deleted(two: LocalStore, tmp_path: Path, keep: int) -> None:
    """Whatever `keep` says, one checkpoint stays."""
    prune(two, keep, own_steps=[20, 10], verified=0)
    assert kept(two) == [20]
    assert restored_step(two, tmp_path) == 20


def test_the_restored_one_stays_until_a_newer_is_committed(two: LocalStore, tmp_path: Path) -> None:
    """A damaged newer checkpoint does not push out the whole one that was restored; a new one pushes out both."""
    two.write(f"{NEWEST}0001/progress.json", b"?")
    verified = restored_step(two, tmp_path)
    prune(two, 1, own_steps=[], verified=verified)
    assert restored_step(two, tmp_path) == 10
    commit(two, tmp_path, 15, epoch=2)
    prune(two, 1, own_steps=[15], verified=verified)
    assert kept(two) == [15]
    assert restored_step(two, tmp_path) == 15


def test_a_step_committed_anew_counts(two: LocalStore, tmp_path: Path) -> None:
    """A damaged checkpoint that this attempt replaced by its own is one like any other."""
    two.write(f"{NEWEST}0001/progress.json", b"?")
    verified = restored_step(two, tmp_path)
    commit(two, tmp_path, 20, epoch=2)
    commit(two, tmp_path, 30, epoch=2)
    prune(two, 2, own_steps=[20, 30], verified=verified)
    assert kept(two) == [30, 20]
    two.delete("checkpoints/step-00000030/COMMITTED.json")
    assert restored_step(two, tmp_path) == 20


def test_the_fresh_do_not_count(two: LocalStore, tmp_path: Path) -> None:
    """A checkpoint that a copy of the folder may not have yet stays, and lets no older one go."""
    commit(two, tmp_path, 30)
    commit(two, tmp_path, 40)
    prune(two, 1, own_steps=[20, 30, 40], verified=10, fresh=[30, 40])
    assert kept(two) == [40, 30, 20]
    prune(two, 1, own_steps=[20, 30, 40], verified=10, fresh=[40])
    assert kept(two) == [40, 30]
    prune(two, 1, own_steps=[20, 30, 40], verified=10)
    assert kept(two) == [40]


def test_the_fresh_alone_let_nothing_go(two: LocalStore, tmp_path: Path) -> None:
    """Before any checkpoint has settled, the one that was restored stays."""
    commit(two, tmp_path, 30, epoch=2)
    prune(two, 1, own_steps=[30], verified=20, fresh=[30])
    assert kept(two) == [30, 20]


@pytest.mark.long
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keep=st.integers(1, 3),
    settle=st.integers(0, 8),
    lag=st.integers(0, 8),
    gaps=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_a_late_copy_always_has_a_whole_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, *, keep: int, settle: int, lag: int, gaps: list[int], seed: int
) -> None:
    """A folder copied late and in any order, its deletions at once, keeps a checkpoint as long as they settle longer.

    Time is counted in ticks: a file is copied at the latest `lag` ticks after it was written, or any time before.
    """
    folder = tmp_path_factory.mktemp("late")
    store, copy, draw = LocalStore(folder / "store"), LocalStore(folder / "copy"), random.Random(seed)
    written: dict[str, int] = {}
    committed: dict[int, int] = {}
    now, had_one = 0, False
    for gap in gaps:
        now += gap
        step = 10 * (len(committed) + 1)
        commit(store, folder, step)
        committed[step] = now
        written |= {info.key: now for info in store.list() if info.key not in written}
        prune(
            store,
            keep,
            own_steps=committed,
            verified=0,
            fresh=[s for s, when in committed.items() if now - when < settle],
        )
        here = {info.key for info in store.list()}
        for info in list(copy.list()):
            if info.key not in here:
                copy.delete(info.key)
        for key in here:
            if now - written[key] >= lag or draw.random() < 0.3:
                copy.upload(Path(store.uri) / key, key)
        if settle >= lag:
            found = restored_step(copy, folder)
            assert found or not had_one
            had_one |= bool(found)


def test_without_any_that_is_fit_nothing_is_deleted(two: LocalStore) -> None:
    """As long as this attempt knows of no whole checkpoint, what there is stays for people to look at."""
    prune(two, 1, own_steps=[], verified=0)
    assert steps(two) == [20, 10]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("n", range(8))
def test_pruning_that_fails(two: LocalStore, tmp_path: Path, moment: str, n: int) -> None:
    """Whichever request fails: committed checkpoints stay intact, also the newest, and the next pruning cleans up."""
    commit(two, tmp_path, 30)
    with pytest.raises(Unreachable):
        prune(WrappedStore(two, **{moment: FailNth(n, Unreachable("503"))}), 1, own_steps=[30], verified=0)
    assert vouched_files_are_there(two)
    assert restored_step(two, tmp_path) == 30
    prune(two, 1, own_steps=[30], verified=0)
    assert kept(two) == [30]


def test_hashes_of_facts_leave_out_what_was_measured(tmp_path: Path) -> None:
    """Two files of metrics that differ only in what a clock said have the same hash, and another loss another."""
    texts = [
        '{"loss": 1, "measured": {"s": 1}}\n',
        '{"measured": {"s": 2}, "loss": 1}\n',
        '{"loss": 2, "measured": {"s": 1}}\n',
    ]
    hashes = []
    for text in texts:
        (tmp_path / "metrics.jsonl").write_text(text)
        hashes.append(hash_facts(tmp_path / "metrics.jsonl"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_checkpoint_of_another_run_is_not_used(store: LocalStore, tmp_path: Path) -> None:
    """One that was trained with another seed, rate, data or base is passed over; one that fits, or is old, is used."""
    for step, run in ((10, None), (20, "mine"), (30, "other")):
        folder = written(tmp_path, step)
        checkpoint_store.commit(store, folder, step, checkpoint_store.MarkerFields(1, 1, SOFTWARE, run))
    found = restore(store, tmp_path / "restored", SOFTWARE, run="mine")
    assert (found.step, [skipped.step for skipped in found.skipped]) == (20, [30])
    assert "other settings, data or weights" in found.skipped[0].why
    old = restore(store, tmp_path / "restored", SOFTWARE, run="third")
    assert (old.step, [skipped.step for skipped in old.skipped]) == (10, [30, 20])


def test_a_marker_of_an_earlier_version_is_read(two: LocalStore) -> None:
    """A marker without the field for the run is sealed over what it has, and still holds."""
    stored = two.read(MARKER)
    assert stored is not None
    facts = {name: value for name, value in json.loads(stored.data).items() if name not in {"run", "seal"}}
    assert parse_marker(json.dumps({**facts, "seal": seal(facts)}).encode()).run is None
