"""The contract of every object store: one class of tests for all stores of the table, and for one added here.

A store of the table is tested in an empty place: one that `PLACES` makes, or the one that `CONTRACT_<SCHEME>` names.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.storage.base import Stored
from job.storage.location import BACKENDS, LOCAL
from job.storage.open import (
    Conflict,
    ObjectStore,
    StorageOptions,
    TooLarge,
    bytes_to_fetch,
    check_key,
    fetch,
    open_store,
)
from tests.azurite import azurite
from tests.fake_gcs import fake_gcs
from tests.gcs_server import gcs_server
from tests.s3_server import BUCKET, credentials, moto_server

MIB = 1 << 20
BAD_KEYS = ["", "/a", "a/", "a//b", "..", "../a", "a/../b", "a/./b", ".", "a\\b", "a\0b", "a\nb", "a/.store/b"]
BAD_KEYS += ["\ud800", "é" * 128, "a/" * 600 + "a"]


def is_key(text: str) -> bool:
    """Whether `check_key` lets a text through."""
    try:
        check_key(text)
    except ValueError:
        return False
    return True


PARTS = st.text(st.characters(codec="utf-8", min_codepoint=32), min_size=1, max_size=20)
KEYS = st.lists(PARTS, min_size=1, max_size=4).map("/".join).filter(is_key)


@pytest.fixture(scope="module", autouse=True)
def _credentials() -> Iterator[None]:
    with credentials():
        yield


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Address of an S3 server."""
    with moto_server() as url:
        yield url


@pytest.fixture(scope="module")
def google() -> Iterator[None]:
    """An imitation of Google Cloud Storage, where obstore looks for the real one."""
    with gcs_server():
        yield


@pytest.fixture
def other_google(monkeypatch: pytest.MonkeyPatch, fake_google: dict[str, str]) -> None:
    """An emulator that others wrote, where obstore looks for Google's."""
    for name, value in fake_google.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def fake_google() -> Iterator[dict[str, str]]:
    """The variables that lead to the emulator."""
    with fake_gcs() as environ:
        yield environ


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Azurite, where obstore looks for Azure."""
    with azurite(tmp_path_factory.mktemp("azurite")):
        yield


def cloud_place(scheme: str, fixture: Callable[[str], Any], server: str) -> Root:
    """An empty place in a cloud's store whose imitation this fixture starts."""
    fixture(server)
    return f"{scheme}://{BUCKET}/{uuid4().hex}", StorageOptions(retries=2)


Root = tuple[str, StorageOptions]
"""An empty place, and how to reach its store."""
ADDED, OTHER = "memory", "gs by another imitation"
PLACES: dict[str, Callable[[Callable[[str], Any]], Root]] = {
    LOCAL: lambda fixture: (str(fixture("tmp_path") / "store"), StorageOptions()),
    "s3": lambda fixture: (
        f"s3://{BUCKET}/{uuid4().hex}",
        StorageOptions(endpoint_url=fixture("endpoint"), retries=2),
    ),
    "gs": lambda fixture: cloud_place("gs", fixture, "google"),
    "az": lambda fixture: cloud_place("az", fixture, "azure"),
    OTHER: lambda fixture: cloud_place("gs", fixture, "other_google"),
    ADDED: lambda _fixture: (f"{ADDED}://{uuid4().hex}/run", StorageOptions()),
}
"""Scheme -> what makes an empty place, given the function that returns a fixture's value."""


def empty_place(scheme: str, fixture: Callable[[str], Any]) -> Root:
    """An empty place in the store of a scheme."""
    if scheme in PLACES:
        return PLACES[scheme](fixture)
    name = f"CONTRACT_{scheme.upper()}"
    if not (place := os.environ.get(name)):
        pytest.fail(f"nowhere to test this store: set {name}={scheme}://bucket/prefix, or add a line to PLACES")
    return f"{place.rstrip('/')}/{uuid4().hex}", StorageOptions()


@pytest.fixture(params=[*BACKENDS, ADDED, OTHER])
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Root:
    """An empty place in each store of the table, and in the one that is added."""
    if request.param == ADDED:
        monkeypatch.setitem(BACKENDS, ADDED, "tests.contract.memory_store:MemoryStore")
    return empty_place(request.param, request.getfixturevalue)


@pytest.fixture
def store(root: Root) -> ObjectStore:
    """An empty store."""
    return open_store(*root)


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    """Keys of a listing."""
    return [info.key for info in store.list(prefix)]


class TestObjectStore:
    """The contract."""

    def test_says_where_it_lies(self, store: ObjectStore, root: Root) -> None:
        """The URI of a store is the one it was opened with."""
        assert store.uri == root[0]

    def test_absent_object_reads_as_none(self, store: ObjectStore) -> None:
        """Reading what nobody wrote gives None, also where a part of the key is an object."""
        store.write("a", b"x")
        assert store.read("b") is None
        assert store.read("a/b") is None

    def test_folder_is_no_object(self, store: ObjectStore) -> None:
        """The folder of an object can neither be read nor downloaded nor deleted."""
        store.write("a/b", b"x")
        assert store.read("a") is None
        store.delete("a")
        assert keys(store) == ["a/b"]

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
    def test_reads_what_was_written(self, store: ObjectStore, data: bytes) -> None:
        """Content and tag of a read are those of the last write."""
        store.write("a/b.json", b"old")
        tag = store.write("a/b.json", data)
        stored = store.read("a/b.json")
        assert stored is not None
        assert (stored.data, stored.tag) == (data, tag)

    def test_read_refuses_what_is_too_large(self, store: ObjectStore) -> None:
        """A read returns up to `max_bytes` bytes, and not one more."""
        store.write("a", b"12345")
        stored = store.read("a", max_bytes=5)
        assert stored is not None
        with pytest.raises(TooLarge):
            store.read("a", max_bytes=4)

    def test_tag_changes_with_content(self, store: ObjectStore) -> None:
        """Another content has another tag."""
        assert store.write("a", b"1") != store.write("a", b"2")

    def test_create_refuses_an_existing_object(self, store: ObjectStore) -> None:
        """A write with `if_absent` succeeds once and never changes what is there."""
        tag = store.write("a", b"1", if_absent=True)
        with pytest.raises(Conflict):
            store.write("a", b"2", if_absent=True)
        stored = store.read("a")
        assert stored is not None
        assert (stored.data, stored.tag) == (b"1", tag)

    def test_create_succeeds_after_delete(self, store: ObjectStore) -> None:
        """A deleted object is absent for `if_absent` too."""
        store.write("a", b"1")
        store.delete("a")
        store.write("a", b"2", if_absent=True)
        assert keys(store) == ["a"]

    def test_tags_chain(self, store: ObjectStore) -> None:
        """Each conditional write needs the tag of the one before; an old tag is refused and changes nothing."""
        first = store.write("a", b"1", if_absent=True)
        second = store.write("a", b"2", if_tag=first)
        third = store.write("a", b"3", if_tag=second)
        with pytest.raises(Conflict):
            store.write("a", b"4", if_tag=second)
        stored = store.read("a")
        assert stored is not None
        assert (stored.data, stored.tag) == (b"3", third)

    def test_tag_of_an_absent_object_is_refused(self, store: ObjectStore) -> None:
        """A write with `if_tag` never creates an object."""
        tag = store.write("a", b"1")
        store.delete("a")
        with pytest.raises(Conflict):
            store.write("a", b"2", if_tag=tag)
        assert store.read("a") is None

    @pytest.mark.parametrize("existing", [False, True])
    def test_one_of_many_racing_writers_wins(self, store: ObjectStore, *, existing: bool) -> None:
        """Of sixteen simultaneous conditional writes exactly one succeeds, and its content is what remains."""
        tag = store.write("lease", b"start") if existing else None
        together = Barrier(16)

        def write(number: int) -> int | None:
            together.wait()
            try:
                store.write("lease", f"writer {number}".encode(), if_absent=not existing, if_tag=tag)
            except Conflict:
                return None
            return number

        with ThreadPoolExecutor(16) as pool:
            winners = [number for number in pool.map(write, range(16)) if number is not None]
        stored = store.read("lease")
        assert stored is not None
        assert [stored.data] == [f"writer {number}".encode() for number in winners]

    @pytest.mark.parametrize("size", [0, 1, 9 * MIB + 1])
    def test_files_go_there_and_back(self, store: ObjectStore, tmp_path: Path, size: int) -> None:
        """A file of any size (one request or many) arrives as it was, in a folder made for it, with nothing beside."""
        data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
        (tmp_path / "source").write_bytes(data)
        store.upload(tmp_path / "source", "a/b.bin")
        store.download("a/b.bin", tmp_path / "new" / "copy")
        assert (tmp_path / "new" / "copy").read_bytes() == data
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]
        assert [(info.key, info.bytes) for info in store.list()] == [("a/b.bin", size)]

    def test_upload_and_download_replace(self, store: ObjectStore, tmp_path: Path) -> None:
        """An upload replaces the object, a download replaces the file."""
        (tmp_path / "source").write_bytes(b"new")
        (tmp_path / "copy").write_bytes(b"something old")
        store.write("a", b"old and longer")
        store.upload(tmp_path / "source", "a")
        store.download("a", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"new"

    def test_download_of_an_absent_object(self, store: ObjectStore, tmp_path: Path) -> None:
        """Absence is a `FileNotFoundError` and leaves the local file alone."""
        (tmp_path / "copy").write_bytes(b"mine")
        with pytest.raises(FileNotFoundError):
            store.download("absent", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"mine"

    def test_download_refuses_what_is_too_large(self, store: ObjectStore, tmp_path: Path) -> None:
        """A download takes up to `max_bytes` bytes; more leaves the local file and its folder as they were."""
        folder = tmp_path / "folder"
        store.write("a", b"12345")
        store.download("a", folder / "copy", max_bytes=5)
        with pytest.raises(TooLarge):
            store.download("a", folder / "copy", max_bytes=4)
        assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("copy", b"12345")]

    def test_upload_of_an_absent_file(self, store: ObjectStore, tmp_path: Path) -> None:
        """A file that is not there is a `FileNotFoundError`, and no object appears."""
        with pytest.raises(FileNotFoundError):
            store.upload(tmp_path / "absent", "a")
        assert keys(store) == []

    def test_list_is_sorted_and_complete(self, store: ObjectStore) -> None:
        """A listing holds every object with its size, sorted by the whole key, however the folders lie."""
        sizes = {"b": 1, "a/z": 2, "a.txt": 3, "a/b/c": 4, "a-": 0, "é": 5, ".hidden": 6, "Z": 7}
        for key, count in sizes.items():
            store.write(key, b"x" * count)
        assert [(info.key, info.bytes) for info in store.list()] == sorted(sizes.items())

    def test_list_takes_a_string_as_prefix(self, store: ObjectStore) -> None:
        """A prefix is the beginning of a key, not a folder."""
        for key in ("step-1/a", "step-10/a", "step-10/b/c", "stop"):
            store.write(key, b"x")
        assert keys(store, "step-1") == ["step-1/a", "step-10/a", "step-10/b/c"]
        assert keys(store, "step-10/") == ["step-10/a", "step-10/b/c"]
        assert keys(store, "step-10/b/c") == ["step-10/b/c"]
        assert keys(store, "absent/") == []

    def test_list_of_an_empty_store(self, store: ObjectStore) -> None:
        """An empty store lists nothing."""
        assert keys(store) == []

    def test_delete(self, store: ObjectStore) -> None:
        """Deleting removes one object only, and doing it again is fine."""
        store.write("a/b", b"1")
        store.write("a/c", b"2")
        store.delete("a/b")
        store.delete("a/b")
        assert keys(store) == ["a/c"]

    def test_upload_with_conditions(self, store: ObjectStore, tmp_path: Path) -> None:
        """A file takes the conditions that `write` takes."""
        (tmp_path / "file").write_bytes(b"1")
        store.upload(tmp_path / "file", "a", if_absent=True)
        with pytest.raises(Conflict):
            store.upload(tmp_path / "file", "a", if_absent=True)
        old = store.read("a")
        new = store.write("a", b"2")
        assert old is not None
        with pytest.raises(Conflict):
            store.upload(tmp_path / "file", "a", if_tag=old.tag)
        store.upload(tmp_path / "file", "a", if_tag=new)
        stored = store.read("a")
        assert stored is not None
        assert stored.data == old.data

    def test_a_tag_is_told_without_the_content(self, store: ObjectStore) -> None:
        """`tag` says of an object of any size what a read would, and nothing of one that is not there."""
        assert store.tag("a") is None
        for content in (b"", b"12"):
            assert store.tag("a") != (tag := store.write("a", content))
            assert store.tag("a") == tag

    def test_delete_of_a_version(self, store: ObjectStore) -> None:
        """With a tag only that version goes; absence is no conflict."""
        old = store.write("a", b"1")
        new = store.write("a", b"2")
        with pytest.raises(Conflict):
            store.delete("a", if_tag=old)
        assert store.read("a") == Stored(b"2", new)
        store.delete("a", if_tag=new)
        assert store.read("a") is None
        store.delete("a", if_tag=new)

    def test_conditional_writes_are_probed(self, store: ObjectStore) -> None:
        """The probe finds that conditions are honoured, and leaves nothing behind."""
        assert store.conditional_writes()
        assert keys(store) == []

    def test_stores_side_by_side(self, root: Root) -> None:
        """A store sees nothing of another whose name begins like its own, and all of those inside it."""
        uri, options = root
        outer, one, two = (open_store(uri + name, options) for name in ("", "/run", "/run2"))
        one.write("a", b"1")
        two.write("a", b"2")
        assert (keys(one), keys(two), keys(outer)) == (["a"], ["a"], ["run/a", "run2/a"])

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys_are_refused(self, store: ObjectStore, tmp_path: Path, key: str) -> None:
        """No verb accepts a key that is absolute, not normal, leads upwards or means different things in two stores."""
        (tmp_path / "file").write_bytes(b"x")
        for attempt in (
            lambda: store.read(key),
            lambda: store.write(key, b"x"),
            lambda: store.upload(tmp_path / "file", key),
            lambda: store.download(key, tmp_path / "copy"),
            lambda: store.delete(key),
        ):
            with pytest.raises(ValueError, match=r"not a key|surrogates"):
                attempt()
        if key not in {"", "a/"}:
            with pytest.raises(ValueError, match=r"not a key|surrogates"):
                keys(store, key)
        assert keys(store) == []

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(key=KEYS, data=st.binary(max_size=50))
    def test_any_key_works(self, store: ObjectStore, key: str, data: bytes) -> None:
        """Whatever `check_key` lets through can be written, read, listed and deleted in every store."""
        store.write(key, data)
        stored = store.read(key)
        assert stored is not None
        assert stored.data == data
        assert [(info.key, info.bytes) for info in store.list(key)] == [(key, len(data))]
        store.delete(key)
        assert keys(store) == []

    def test_what_users_name_is_fetched(self, store: ObjectStore, root: Root, tmp_path: Path) -> None:
        """By its place alone, a folder of objects arrives in full, and a path stays where it is."""
        place, options = root
        store.write("data/a", b"12")
        store.write("data/b/c", b"345")
        found = fetch(f"{place}/data", tmp_path / "copy", options)
        assert {(Path(found) / name).read_bytes() for name in ("a", "b/c")} == {b"12", b"345"}
        assert bytes_to_fetch(f"{place}/data", options) == (5 if "://" in place else 0)


def test_a_client_that_stands_still_in_a_request_keeps_nobody_out(endpoint: str) -> None:
    """The test server answers others while a body is on its way, as S3 does: a stopped attempt has a successor."""
    address = urlsplit(endpoint)
    with socket.create_connection((address.hostname, address.port), timeout=10) as stopped:
        stopped.sendall(
            f"PUT /{BUCKET}/half HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 9\r\n\r\nhalf".encode()
        )
        time.sleep(0.1)  # its thread waits for the rest
        place = open_store(
            f"s3://{BUCKET}/{uuid4().hex}", StorageOptions(endpoint_url=endpoint, retries=1, timeout_seconds=60)
        )
        place.write("a", b"1")
        assert place.read("a") is not None


def test_a_store_in_the_table_without_a_place_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store cannot be added without being tested: where no place is known, the test says which variable to set."""
    monkeypatch.delenv("CONTRACT_OSS", raising=False)
    with pytest.raises(pytest.fail.Exception, match="CONTRACT_OSS=oss://bucket/prefix"):
        empty_place("oss", lambda _name: None)
    monkeypatch.setenv("CONTRACT_OSS", "oss://bucket/tests/")
    assert empty_place("oss", lambda _name: None)[0].startswith("oss://bucket/tests/")
