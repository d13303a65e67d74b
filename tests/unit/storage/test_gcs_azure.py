"""Google's and Azure's stores if servers or network misbehave. Their contract: tests/contract."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import obstore
import pytest
from obstore.exceptions import GenericError
from obstore.store import AzureStore as AzureClient

import job.storage.base
import job.storage.obstore_listing
import job.storage.obstore_requests
import job.storage.obstore_store
from job.common.hashing import hash_file
from job.errors import AccessDenied, JobError, SettingsError, Unreachable
from job.records import Artifact
from job.storage.base import REQUEST_PAUSES, Conflict, NotSupported
from job.storage.obstore_errors import translate
from job.storage.open import ObjectStore, StorageOptions, fetch, open_store
from job.storage.verified_download import altered
from tests.azurite import KEY, azurite, settings
from tests.gcs_server import TOKEN, Bucket, gcs_server
from tests.s3_server import BUCKET, Request, server

MIB = 1 << 20
SCHEMES = ["gs", "az"]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.storage.base, "PAUSES", (0.01,) * 4)
    monkeypatch.setattr(job.storage.base, "REQUEST_PAUSES", (0.01,) * 7)


def opened(scheme: str, **options: Any) -> ObjectStore:
    """A store below a prefix."""
    return open_store(f"{scheme}://{BUCKET}/run", StorageOptions(**{"retries": 1, "timeout_seconds": 60.0} | options))


@contextmanager
def answering(scheme: str, answer: Callable[[Request], None]) -> Iterator[str]:
    """A server that answers as the test says, where obstore looks for this cloud."""
    with server(answer) as url, pytest.MonkeyPatch.context() as patch:
        google = {"GOOGLE_BASE_URL": url, "GOOGLE_BEARER_TOKEN": TOKEN}
        for name, value in (google if scheme == "gs" else settings(url)).items():
            patch.setenv(name, value)
        yield url


def verbs(store: ObjectStore, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """One call of each verb."""
    (tmp_path / "source").write_bytes(b"x")
    return {
        "read": lambda: store.read("a"),
        "tag": lambda: store.tag("a"),
        "write": lambda: store.write("a", b"x", if_absent=True),
        "upload": lambda: store.upload(tmp_path / "source", "a"),
        "download": lambda: store.download("a", tmp_path / "copy"),
        "list": lambda: list(store.list()),
        "delete": lambda: store.delete("a"),
        "probe": store.conditional_writes,
    }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "InvalidArgument", SettingsError),
        (401, "AuthenticationRequired", AccessDenied),
        (403, "AccessDenied", AccessDenied),
        (404, "", Unreachable),
        (405, "MethodNotAllowed", NotSupported),
        (429, "SlowDown", Unreachable),
        (500, "InternalError", Unreachable),
        (501, "NotImplemented", NotSupported),
        (503, "ServerBusy", Unreachable),
    ],
)
def test_errors_are_translated(tmp_path: Path, scheme: str, status: int, code: str, expected: type[JobError]) -> None:
    """Every verb turns an answer of the store into the same error of the job, and says what it tried; no secret."""
    with answering(scheme, lambda request: request.refuse(status, code)):
        store = opened(scheme)
        for name, attempt in verbs(store, tmp_path).items():
            with pytest.raises(JobError) as caught:
                attempt()
            assert type(caught.value) is expected, name
            assert f"{scheme}://{BUCKET}/run" in str(caught.value)
            assert name != "write" or not code or f"{code} (HTTP {status}): as the test says" in str(caught.value)
            assert TOKEN not in str(caught.value)
            assert KEY not in str(caught.value)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("key", ["disaster-tweets/a", "SAS credential/service account"])
@pytest.mark.parametrize(("status", "expected"), [(404, Unreachable), (412, Unreachable), (403, AccessDenied)])
def test_names_of_objects_are_no_credentials(scheme: str, key: str, status: int, expected: type[JobError]) -> None:
    """An object whose name has words about credentials fails like any other, and nobody is told to set a key."""
    with answering(scheme, lambda request: request.refuse(status, "X")):
        store = opened(scheme)
        for attempt in (lambda: store.write(key, b"x"), lambda: store.read(key)):
            with pytest.raises(expected) as caught:
                attempt()
            assert "; set GOOGLE" not in str(caught.value)


@pytest.mark.parametrize(("scheme", "code"), [("gs", "NoSuchBucket"), ("az", "ContainerNotFound")])
def test_a_missing_bucket_is_named(tmp_path: Path, scheme: str, code: str) -> None:
    """A bucket or container that does not exist is no absence of an object, and the message says what to do."""
    with answering(scheme, lambda request: request.refuse(404, code)):
        for name, attempt in verbs(opened(scheme), tmp_path).items():
            if name == "delete" and scheme == "az":
                continue  # a batch of requests: the answer is not about one of them
            with pytest.raises(SettingsError, match="no such bucket or container; create it"):
                attempt()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_store_can_say_that_something_is_absent(tmp_path: Path, scheme: str) -> None:
    """A 404 of a proxy, in HTML, is no confirmation that an object is absent, and a page of its own is no listing."""
    with answering(scheme, lambda request: request.answer(404, b"<html>not here</html>")):
        store = opened(scheme)
        for attempt in (
            lambda: store.read("a"),
            lambda: store.tag("a"),
            lambda: store.download("a", tmp_path / "copy"),
            lambda: store.write("a", b"x", if_tag="1"),
            lambda: store.delete("a"),
        ):
            with pytest.raises(Unreachable):
                attempt()
    with answering(scheme, lambda request: request.answer(200, b"<html>log in first</html>")):
        with pytest.raises(Unreachable):
            list(opened(scheme).list())
        with pytest.raises(Unreachable):
            opened(scheme).read("a")


def test_a_404_for_a_new_object_is_no_conflict() -> None:
    """A create that a proxy answers with 404 wrote nothing and lost to nobody: it is an error that may pass."""

    def before(request: Request) -> bool:
        if request.command != "PUT":
            return False
        request.answer(404, b"<html>not here</html>")
        return True

    with gcs_server(before):
        store = opened("gs")
        with pytest.raises(Unreachable):
            store.write("a", b"x", if_absent=True)
        with pytest.raises(Conflict):
            store.write("a", b"x", if_tag="1")


def test_repeated_requests_are_not_repeated_again() -> None:
    """What was asked as often as settings say is an error then, and not the first of five times as many."""
    requests: list[str] = []

    def before(request: Request) -> bool:
        requests.append(request.command)
        request.refuse(503, "SlowDown")
        return True

    with gcs_server(before):
        for attempt in (lambda: opened("gs", retries=3).read("a"), lambda: list(opened("gs", retries=3).list())):
            requests.clear()
            with pytest.raises(Unreachable):
                attempt()
            assert len(requests) == 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("listens", [True, False])
def test_stalled_connections_end(tmp_path: Path, scheme: str, *, listens: bool) -> None:
    """A server that accepts and never answers, or is not there, costs every verb a few time limits and no more."""
    released = threading.Event()

    def stall(request: Request) -> None:
        released.wait(60)
        request.hang_up()

    with answering(scheme, stall), pytest.MonkeyPatch.context() as patch:
        if not listens:
            patch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:9")
            patch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9")
        store = opened(scheme, timeout_seconds=0.2)
        for name, attempt in verbs(store, tmp_path).items():
            start = time.monotonic()
            with pytest.raises(Unreachable):
                attempt()
            assert time.monotonic() - start < 30, name
        released.set()


@pytest.mark.parametrize("size", [5, 5 * MIB])
def test_stalled_bodies_end(tmp_path: Path, size: int) -> None:
    """A body that begins and stalls costs about two requests with all their retries, not many more."""
    released, begun = threading.Event(), []

    def stall(request: Request) -> bool:
        if request.command != "GET":
            return False
        begun.append(request.path)
        request.answer(200, b"x", Content_Length=str(size), ETag='"1"', x_goog_generation="1", Last_Modified=DATE)
        released.wait(60)
        request.hang_up()
        return True

    with gcs_server(stall) as bucket:
        bucket._store("run/a", bytes(size), {})
        with pytest.raises(Unreachable):
            opened("gs", retries=2, timeout_seconds=0.2).download("a", tmp_path / "copy")
        released.set()
        assert len(begun) <= 4


def test_signals_are_heard_while_a_store_does_not_answer() -> None:
    """A signal's handler runs at once in the main thread, though obstore waits there."""
    heard = threading.Event()
    seen: list[bool] = []

    def stall(request: Request) -> None:
        os.kill(os.getpid(), signal.SIGALRM)
        seen.append(heard.wait(30))
        request.hang_up()

    before = signal.signal(signal.SIGALRM, lambda *_: heard.set())
    try:
        with answering("gs", stall), pytest.raises(Unreachable):
            opened("gs").read("a")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen
    assert all(seen)


def cut(request: Request) -> bool:
    """Answer with a body that breaks off."""
    request.answer(200, b"wh", Content_Length="5", ETag='"1"', x_goog_generation="1", Last_Modified=DATE)
    request.hang_up()
    return True


DATE = "Sun, 29 Nov 2026 12:54:09 GMT"


@pytest.mark.parametrize("verb", ["read", "download"])
@pytest.mark.parametrize("broken", [1, 100])
def test_truncated_bodies(tmp_path: Path, verb: str, broken: int) -> None:
    """A truncated body is requested again, and never taken for the whole; in the end it is an error."""
    left = [0]

    def before(request: Request) -> bool:
        if request.command != "GET" or left[0] <= 0:
            return False
        left[0] -= 1
        return cut(request)

    with gcs_server(before):
        store = opened("gs", retries=2)
        store.write("a", b"whole")
        left[0] = broken
        attempt = verbs(store, tmp_path)[verb]
        if broken > 1:
            with pytest.raises(Unreachable):
                attempt()
            assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
        else:
            stored = attempt()
            assert getattr(stored, "data", None) == b"whole" or (tmp_path / "copy").read_bytes() == b"whole"


@pytest.mark.parametrize("size", [5, 5 * MIB, 33 * MIB])
def test_a_damaged_object_is_returned(tmp_path: Path, size: int) -> None:
    """Bytes that do not fit their checksum time and again are what the store holds: the caller's hash finds that."""
    (tmp_path / "source").write_bytes(bytes(size))
    with gcs_server() as bucket:
        store = opened("gs")
        store.upload(tmp_path / "source", "a")
        damaged = bytes(size - 1) + b"1"
        bucket.objects["run/a"].data = damaged
        store.download("a", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == damaged
        artifact = Artifact("a", size, hash_file(tmp_path / "source"))
        assert altered(store, [artifact], tmp_path / "found") == ["a"]
        if size < MIB:
            stored = store.read("a")
            assert stored is not None
            assert stored.data == damaged


@pytest.mark.parametrize("size", [5, 5 * MIB])
def test_a_damaged_answer_is_not_believed(tmp_path: Path, size: int) -> None:
    """An answer that was damaged on its way, at the same length, is asked for again."""
    (tmp_path / "source").write_bytes(bytes(size))
    whole: list[Request] = []

    def before(request: Request) -> bool:
        if request.command == "GET":
            whole.append(request)
            bucket.objects["run/a"].data = bytes(size) if len(whole) > 1 else b"1" + bytes(size - 1)
        return False

    with gcs_server(before) as bucket:
        store = opened("gs")
        store.upload(tmp_path / "source", "a")
        store.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bytes(size)


def test_a_disk_that_becomes_full_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A piece of which the disk took only a part is a full disk, also where no checksum would tell."""
    monkeypatch.setattr(os, "pwrite", lambda _file, data, _start: len(data) - 1)
    with gcs_server() as bucket:
        store = opened("gs")
        bucket._store("run/a", bytes(5 * MIB), {})
        with pytest.raises(Unreachable, match="the disk is full"):
            store.download("a", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_objects_of_other_programs_are_read(tmp_path: Path) -> None:
    """An object without a checksum, of another program, is read and downloaded like one of ours."""
    with gcs_server() as bucket:
        store = opened("gs")
        for key, data in {"small": b"12", "large": bytes(5 * MIB)}.items():
            store.write(key, data)
            bucket.objects[f"run/{key}"].headers.pop("x-goog-meta-qlorajobsha256")
            store.download(key, tmp_path / key)
            assert (tmp_path / key).read_bytes() == data
        stored = store.read("small")
    assert stored is not None
    assert stored.data == b"12"


def test_passing_errors_are_retried() -> None:
    """Errors of the server, too many requests and broken connections are tried again, as often as settings say."""
    requests: list[str] = []

    def before(request: Request) -> bool:
        requests.append(request.command)
        if len(requests) in {1, 2}:
            request.refuse([503, 429][len(requests) - 1], "SlowDown")
            return True
        if len(requests) == 3:
            request.hang_up()
            return True
        return False

    with gcs_server(before):
        assert opened("gs", retries=4).read("a") is None
    assert len(requests) == 4


class TestLostAnswers:
    """A conditional write whose first answer got lost, so that its repetition is refused."""

    @staticmethod
    def lose_first(bucket: list[Bucket], winner: bytes | None) -> Callable[[Request], bool]:
        """Takes the first write and gives no answer; or `winner` was quicker."""

        def before(request: Request) -> bool:
            if request.command != "PUT" or any("PUT" in one for one in bucket[0].requests):
                return False
            bucket[0].requests.append("PUT")
            given = {**dict(request.headers)} if winner is None else {}
            bucket[0]._store("run/lease", request.content if winner is None else winner, given)
            request.hang_up()
            return True

        return before

    @pytest.mark.parametrize("winner", [None, b"his"])
    def test_own_success_is_told_from_a_loss(self, winner: bytes | None) -> None:
        """What is stored decides: its own content means success, and another's means that it was too late."""
        held: list[Bucket] = []
        with gcs_server(self.lose_first(held, winner)) as bucket:
            held.append(bucket)
            store = opened("gs", retries=2)
            if winner is None:
                assert store.write("lease", b"mine", if_absent=True) == store.tag("lease")
            else:
                with pytest.raises(Conflict):
                    store.write("lease", b"mine", if_absent=True)

    def test_refusal_at_once_is_a_loss(self) -> None:
        """Without a repetition a refusal is a refusal, even if another wrote the very same bytes."""
        with gcs_server():
            store = opened("gs", retries=2)
            store.write("lease", b"same")
            with pytest.raises(Conflict):
                store.write("lease", b"same", if_absent=True)


def test_a_lost_upload_in_parts_is_made_again(tmp_path: Path) -> None:
    """Parts that another upload of the same object discarded are uploaded again."""
    refused = []

    def before(request: Request) -> bool:
        if request.command == "POST" and "uploadId" in request.path and not refused:
            refused.append(request.path)
            request.refuse(404, "NoSuchUpload")
            return True
        return False

    (tmp_path / "source").write_bytes(b"x" * 17 * MIB)
    with gcs_server(before) as bucket:
        opened("gs", retries=2).upload(tmp_path / "source", "a")
        assert len(bucket.objects["run/a"].data) == 17 * MIB
    assert refused


@pytest.mark.parametrize("limit", [256, 1])
def test_large_uploads_take_conditions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int) -> None:
    """Files of many parts take the conditions too, in one request or, above a size, with a look before."""
    monkeypatch.setattr(job.storage.obstore_store, "_MAX_CONDITIONAL_BYTES", limit * MIB)
    (tmp_path / "source").write_bytes(b"x" * 17 * MIB)
    with gcs_server():
        store = opened("gs")
        store.upload(tmp_path / "source", "a", if_absent=True)
        tag = store.tag("a")
        for condition in ({"if_absent": True}, {"if_tag": "1"}):
            with pytest.raises(Conflict):
                store.upload(tmp_path / "source", "a", **condition)
        assert store.tag("a") == tag
        store.upload(tmp_path / "source", "a", if_tag=tag)
        assert store.tag("a") != tag


def test_a_listing_has_many_pages() -> None:
    """A listing continues over the server's pages; a server that repeats one forever is detected."""
    with gcs_server() as bucket:
        for number in range(250):
            bucket._store(f"run/{number:03}", b"x", {})
        assert [info.key for info in opened("gs").list()] == [f"{number:03}" for number in range(250)]
    page = "".join(
        f"<Contents><Key>run/{number:03}</Key><Size>1</Size><LastModified>2026-11-29T12:54:09.000Z</LastModified></Contents>"
        for number in range(1000)
    )
    answer = f"<ListBucketResult>{page}<NextContinuationToken>x</NextContinuationToken></ListBucketResult>"
    with (
        answering("gs", lambda request: request.answer(200, answer.encode())),
        pytest.raises(Unreachable, match="the same page"),
    ):
        list(opened("gs").list())


def test_a_listing_reads_no_more_than_it_needs() -> None:
    """A listing for one object in a large bucket, or of which only the beginning is looked at, costs a few requests."""
    with gcs_server() as bucket:
        for number in range(1500):
            bucket._store(f"run/{number:04}", b"x", {})
        store = opened("gs")
        bucket.requests.clear()
        assert [info.key for info in store.list("0700")] == ["0700"]
        assert len(bucket.requests) <= 10
        bucket.requests.clear()
        assert [info.key for info in islice(store.list(), 3)] == ["0000", "0001", "0002"]
        assert len(bucket.requests) <= 10
        assert len(list(store.list())) == 1500


def test_a_broken_listing_goes_on_where_it_was() -> None:
    """Pages that were passed on before an answer failed come once, and those behind it are not missing."""
    failures: list[str] = []

    def before(request: Request) -> bool:
        if "continuation-token" in request.path and "1099" in request.path and not failures:
            failures.append(request.path)
            request.answer(200, b"<ListBucketResult><Con")
            return True
        return False

    with gcs_server(before) as bucket:
        for number in range(1200):
            bucket._store(f"run/{number:04}", b"x", {})
        assert [info.key for info in opened("gs", retries=2).list()] == [f"{number:04}" for number in range(1200)]
    assert failures


def test_a_long_listing_outlasts_failures_between_which_it_goes_on() -> None:
    """Tries are counted from the last page that came: each thousand of a long listing may fail once."""
    failed: set[str] = set()

    def before(request: Request) -> bool:
        found = re.search(r"continuation-token=.*?(\d)499\b", request.path)
        if found and found[1] not in failed:
            failed.add(found[1])
            request.answer(200, b"<ListBucketResult><Con")
            return True
        return False

    with gcs_server(before) as bucket:
        for number in range(3500):
            bucket._store(f"run/{number:04}", b"x", {})
        found = [info.key for info in opened("gs", retries=2).list()]
    assert found == [f"{number:04}" for number in range(3500)]
    assert len(failed) == 3


def test_a_server_that_does_not_sort_is_found_out() -> None:
    """Where keys come in another order than promised, that is an error, and no object is left out."""
    with gcs_server() as bucket, pytest.MonkeyPatch.context() as patch:
        for key in ("run/b", "run/a"):
            bucket._store(key, b"x", {})
        patch.setattr("tests.gcs_server.sorted", list, raising=False)
        with pytest.raises(Unreachable, match="does not sort by key"):
            list(opened("gs").list())


@pytest.mark.parametrize(
    ("key", "name", "expected"),
    [
        ("run/b", "a", True),
        ("run/a", "a", False),
        ("run/ab/x", "a", False),
        ("run/a/x", "a-b", False),  # first in accounts that list folder by folder
        ("run/a-c", "a-b", True),
        ("run/\U0001f600", "\uf000", False),  # first in UTF-16
        ("run/x", "", False),
    ],
)
def test_the_end_of_a_listing(key: str, name: str, *, expected: bool) -> None:
    """A listing is over only when no order of the server's can bring another key with the prefix."""
    assert job.storage.obstore_listing.is_beyond(key, "run", name) is expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prefixes_of_every_kind(tmp_path: Path, scheme: str) -> None:
    """Prefixes that end within a name, a folder or dots list exactly the keys that begin with them."""
    keys = [".a", "..b", "a", "a-b", "a-b/x", "a/x", "ab", "b/.x/y", "b/.y", "\uf000", "\U0001f600"]
    with gcs_server() if scheme == "gs" else azurite(tmp_path):
        store = opened(scheme)
        for key in keys:
            store.write(key, b"x")
        for prefix in ("", "..b", ".a", "a", "a-", "a-b", "a/", "b/.x", "\uf000", "z"):
            found = [info.key for info in store.list(prefix)]
            assert found == sorted(key for key in keys if key.startswith(prefix)), prefix


def test_folders_of_the_console_are_no_objects(tmp_path: Path) -> None:
    """The empty objects that consoles keep as folders are not listed, with something below them or without."""
    with gcs_server() as bucket:
        for key in ("run/", "run/empty/", "run/full/", "run/full/a", "run/nothing"):
            bucket._store(key, b"", {})
        assert [info.key for info in opened("gs").list()] == ["full/a", "nothing"]
        assert Path(fetch(f"gs://{BUCKET}/run", tmp_path)).is_dir()


@pytest.mark.parametrize("hostile", ["../../evil", "a/../../evil", "a//evil"])
def test_names_that_no_file_can_have(tmp_path: Path, hostile: str) -> None:
    """A name that would leave the folder ends before the first byte is written, with its name."""
    with gcs_server() as bucket:
        for key in ("data/good", f"data/{hostile}"):
            bucket._store(key, b"1", {})
        with pytest.raises(SettingsError, match="evil"):
            fetch(f"gs://{BUCKET}/data/", tmp_path / "in", StorageOptions(retries=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_key_for_encryption_is_not_ignored(tmp_path: Path, scheme: str) -> None:
    """A KMS key is S3's: other stores say so instead of writing objects that it does not protect."""
    with answering(scheme, lambda request: request.refuse(500, "Asked")):
        store = opened(scheme, kms_key_id="key")
        for verb in ("write", "upload"):
            with pytest.raises(SettingsError, match="JOB_STORAGE__KMS_KEY_ID: is only for s3://"):
                verbs(store, tmp_path)[verb]()


def test_a_storage_class_that_is_refused_is_named(tmp_path: Path) -> None:
    """The store says only that a header is wrong; without a class of one's own, that is not about the setting."""
    (tmp_path / "file").write_bytes(b"x")
    with answering("az", lambda request: request.refuse(400, "InvalidHeaderValue")):
        with pytest.raises(SettingsError, match=r"JOB_STORAGE__STORAGE_CLASS: NOPE is refused.*/run/a.*InvalidHeader"):
            opened("az", storage_class="NOPE").upload(tmp_path / "file", "a")
        with pytest.raises(SettingsError) as raised:
            opened("az").upload(tmp_path / "file", "a")
    assert "STORAGE_CLASS" not in str(raised.value)


def test_a_version_is_deleted_without_a_signed_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An identity that cannot sign an address still deletes only the version that it means."""
    with azurite(tmp_path):
        store = open_store(f"az://{BUCKET}/{uuid4().hex}", StorageOptions(retries=1))
        monkeypatch.setattr(store, "_signed_address", lambda _key: None)
        old = store.write("a", b"1")
        new = store.write("a", b"2")
        with pytest.raises(Conflict):
            store.delete("a", if_tag=old)
        store.delete("a", if_tag=new)
        assert store.read("a") is None


DENIALS = {
    "hold": ("gs", 403, "RetentionPolicyNotMet", "", "a retention policy or a legal hold"),
    "policy": ("az", 409, "BlobImmutableDueToPolicy", "", "a retention policy or a legal hold"),
    "lease": ("az", 412, "LeaseIdMissing", "", "az storage blob lease break"),
    "archive": ("az", 409, "BlobArchived", "", "rehydrate the blob"),
    "anonymous": ("az", 409, "PublicAccessNotPermitted", "", "AZURE_STORAGE_ACCOUNT_KEY"),
    "firewall": ("az", 403, "AuthorizationFailure", "", "network rules"),
    "role": ("az", 403, "AuthorizationPermissionMismatch", "", "Storage Blob Data Contributor"),
    "clock": (
        "az",
        403,
        "AuthenticationFailed",
        "Request date header too old: 'Sun'",
        "date header .* machine's clock",
    ),
    "expired": (
        "az",
        403,
        "AuthenticationFailed",
        "Signature not valid in the specified time frame: Start [1]",
        "new AZURE_STORAGE_SAS_TOKEN",
    ),
    "key": (
        "az",
        403,
        "AuthenticationFailed",
        f"The MAC signature found in the HTTP request '{'A' * 43}=' is not the same",
        r"request \.\.\. is not the same; correct AZURE_STORAGE_ACCOUNT_KEY",
    ),
    "permission": (
        "gs",
        403,
        "AccessDenied",
        "a@b.c does not have storage.objects.delete access",
        "delete access; give",
    ),
}


@pytest.mark.parametrize("denial", DENIALS)
def test_what_is_denied_says_what_to_do(tmp_path: Path, denial: str) -> None:
    """Whatever the status, such answers are no race that was lost: each verb names reason and remedy, HEAD's too."""
    scheme, status, name, detail, expected = DENIALS[denial]
    element = "Details" if scheme == "gs" else "AuthenticationErrorDetail"
    details = f"<{element}>{detail}</{element}>" if detail else ""
    body = f"<Error><Code>{name}</Code><Message>denied.\nTime:1</Message>{details}</Error>".encode()
    with answering(scheme, lambda request: request.answer(status, body, x_ms_error_code=name)):
        store = opened(scheme, retries=3)
        conditional = {
            "create": lambda: store.write("a", b"x", if_absent=True),
            "replace": lambda: store.write("a", b"x", if_tag="1"),
            "remove": lambda: store.delete("a", if_tag="1"),
        }
        for verb, attempt in {**verbs(store, tmp_path), **conditional}.items():
            with pytest.raises(AccessDenied) as caught:
                attempt()
            assert re.search(expected, str(caught.value)), (verb, str(caught.value))


@pytest.mark.parametrize("name", ["AccountBeingCreated", "BlobBeingRehydrated"])
def test_other_conflicts_are_no_lost_races(tmp_path: Path, name: str) -> None:
    """What Azure answers with the status of a conflict, but will pass, is tried again, and is then an error."""
    with answering("az", lambda request: request.refuse(409, name)):
        for verb, attempt in verbs(opened("az"), tmp_path).items():
            with pytest.raises(Unreachable, match=name):
                attempt()
            assert verb


def test_a_failure_of_the_server_is_no_denial() -> None:
    """Whatever its text is about: asking again may help."""
    said = "Server returned non-2xx status code: 503 Busy: <Message>there is currently a lease on the blob</Message>"
    assert type(translate(GenericError(f"Error performing PUT http://host/a in 1s - {said}"), "az://b")) is Unreachable


def test_google_takes_one_change_of_an_object_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is faster, as the holder of a lease may be, goes on when the second is over: no error."""
    now, last, refused = [0.0], [-2.0], [0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(job.storage.base, "REQUEST_PAUSES", REQUEST_PAUSES)
    monkeypatch.setattr(job.storage.obstore_requests, "time", SimpleNamespace(sleep=sleep))

    def before(request: Request) -> bool:
        if request.command != "PUT":
            return False
        if now[0] - last[0] < 2:  # twice as strict
            refused[0] += 1
            request.refuse(429, "SlowDown")
            return True
        last[0] = now[0]
        return False

    with gcs_server(before):
        store = opened("gs", retries=8)
        tag = store.write("lease", b"0", if_absent=True)
        for number in range(1, 4):
            tag = store.write("lease", f"{number}".encode(), if_tag=tag)
    assert refused[0] == 9  # three times three: 0.3, 1 and 3 seconds


@pytest.mark.parametrize(
    ("internals", "words"),
    [
        ('ConnectError(\n  "dns error",', "name cannot be resolved"),
        ("InvalidCertificate(\n  UnknownIssuer,", r"not trusted \(UnknownIssuer\); .* SSL_CERT_FILE"),
        ("Os {\n  kind: ConnectionRefused,", "refuses the connection"),
    ],
)
def test_why_there_is_no_connection(internals: str, words: str) -> None:
    """The client says it in its internals alone, of which no more is repeated."""
    error = GenericError(
        f"Generic GCS error: HTTP error: error sending request\n\nDebug source:\nGeneric {{ {internals}"
    )
    found = translate(error, "gs://bucket")
    assert type(found) is Unreachable
    assert re.search(words, str(found))
    assert "Generic {" not in str(found)


def test_snapshots_go_with_their_blob(tmp_path: Path) -> None:
    """A blob of which somebody made a snapshot is deleted all the same, with a condition or without."""
    with azurite(tmp_path):
        client = AzureClient(BUCKET, client_options={"allow_http": True})
        store = opened("az")
        for condition in (True, False):
            tag = store.write("a", b"1")
            address = obstore.sign(client, "PUT", "run/a", timedelta(minutes=5))
            headers = {"x-ms-version": "2021-08-06", "Content-Length": "0"}
            snapshot = urllib.request.Request(f"{address}&comp=snapshot", method="PUT", headers=headers)
            urllib.request.urlopen(snapshot, timeout=10).close()
            store.delete("a", **({"if_tag": tag} if condition else {}))
            assert store.read("a") is None


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (403, "AuthorizationPermissionMismatch", AccessDenied),
        (409, "the blob is immutable due to a policy", AccessDenied),
        (503, "ServerBusy", Unreachable),
    ],
)
def test_a_refused_delete_of_azure(status: int, said: str, expected: type[JobError]) -> None:
    """Azure's objects are deleted by a batch, and the answer within the batch decides."""
    part = f"Content-Type: application/http\r\nContent-ID: 0\r\n\r\nHTTP/1.1 {status} {said}\r\n\r\n"
    body = f"--x\r\n{part}\r\n--x--\r\n".encode()
    with (
        answering("az", lambda request: request.answer(202, body, Content_Type="multipart/mixed; boundary=x")),
        pytest.raises(JobError) as caught,
    ):
        opened("az").delete("a (code: 500)")
    assert type(caught.value) is expected


def azure_page(names: Sequence[str], folder: str = "") -> bytes:
    """A listing of Azure's with these blobs, and one that stands for a folder of a hierarchical namespace."""
    entries = [(name, "", "1") for name in names]
    entries += [(folder, "<ResourceType>directory</ResourceType>", "0")] if folder else []
    blobs = "".join(
        f"<Blob><Name>run/{name}</Name><Properties><Last-Modified>{DATE}</Last-Modified><Content-Length>{size}"
        f"</Content-Length><Content-Type>text/plain</Content-Type><Etag>1</Etag>{kind}</Properties></Blob>"
        for name, kind, size in entries
    )
    return f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>".encode()


def test_accounts_that_list_folder_by_folder() -> None:
    """A hierarchical namespace lists `a/b` before `a-b`, and folders as well: sorted by key, files alone."""
    page = azure_page(["a/b", "a/c/d", "a-b", "\U0001f600", "\uf000"], folder="a")
    folder = {"ETag": "1", "Last_Modified": DATE, "x_ms_resource_type": "directory"}

    def answer(request: Request) -> None:
        request.answer(200, page) if "comp=list" in request.path else request.answer(200, **folder)

    with answering("az", answer):
        store = opened("az")
        assert [info.key for info in store.list()] == ["a-b", "a/b", "a/c/d", "\uf000", "\U0001f600"]
        assert (store.read("a"), store.tag("a")) == (None, None)


@pytest.mark.long
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_long_listing_takes_little_memory(scheme: str) -> None:
    """Of 200,000 keys Python holds a few MiB at a time, whatever the order in which the server lists them."""
    pages = iter(range(200))

    def answer(request: Request) -> None:
        number = next(pages)
        request.answer(200, azure(number) if scheme == "az" else google(number))

    def azure(number: int) -> bytes:
        rest = b"<NextMarker>more</NextMarker>" if number < 199 else b""
        return azure_page([f"{199 - number:03}/{entry:04}" for entry in range(1000)]).replace(b"<NextMarker/>", rest)

    def google(number: int) -> bytes:
        rest = "<NextContinuationToken>x</NextContinuationToken>" if number < 199 else ""
        entries = "".join(
            f"<Contents><Key>run/{number:03}/{entry:04}</Key><Size>1</Size>"
            "<LastModified>2026-11-29T12:54:09.000Z</LastModified></Contents>"
            for entry in range(1000)
        )
        return f"<ListBucketResult>{entries}{rest}</ListBucketResult>".encode()

    with answering(scheme, answer):
        store = opened(scheme)
        tracemalloc.start()
        try:
            found = sum(1 for _ in store.list())
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert found == 200_000
    assert most < 8 * MIB


def test_a_listing_of_azure_that_never_ends_or_fails() -> None:
    """Pages that come again and again are found out, and a listing that fails is begun anew, each key once."""
    page, requests = azure_page([f"{n:03}" for n in range(1000)]), [0]
    endless = page.replace(b"<NextMarker/>", b"<NextMarker>more</NextMarker>")
    with (
        answering("az", lambda request: request.answer(200, endless)),
        pytest.raises(Unreachable, match="the same page"),
    ):
        list(opened("az").list())

    def fails_once(request: Request) -> None:
        requests[0] += 1
        request.answer(200, endless if requests[0] == 1 else b"<Enum" if requests[0] == 2 else page)

    with answering("az", fails_once):
        assert [info.key for info in opened("az", retries=3).list()] == [f"{n:03}" for n in range(1000)]
