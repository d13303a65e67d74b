"""What is specific to S3: its errors, lost answers, stalls, limits, headers, threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, EndpointConnectionError, NoCredentialsError

import job.storage.base
import job.storage.s3
from job.errors import AccessDenied, JobError, SettingsError, Unreachable
from job.planning.preflight_store import round_trip
from job.storage.base import MAX_READ_BYTES, Stored
from job.storage.open import Conflict, NotSupported, ObjectStore, StorageOptions, TooLarge, open_store
from job.storage.s3_client import connect
from job.storage.s3_errors import translate
from tests.s3_server import BUCKET, CREDENTIALS, SECRET, Request, credentials, moto_server, server
from tests.waiting import wait_for

MIB = 1 << 20
URI = f"s3://{BUCKET}/run"


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(job.storage.base, "REQUEST_PAUSES", (0.01,) * 7)
    with credentials():
        yield


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Address of a well-behaved S3 server."""
    with credentials(), moto_server() as url:
        yield url


@pytest.fixture
def real(endpoint: str) -> ObjectStore:
    """An empty store on it."""
    return open_store(f"s3://{BUCKET}/{uuid4().hex}", StorageOptions(endpoint_url=endpoint, retries=2))


def opened(url: str, *, retries: int = 1, timeout_seconds: float = 60.0, **options: Any) -> ObjectStore:
    """A store on a server of the test, quick to give up."""
    return open_store(
        URI, StorageOptions(endpoint_url=url, retries=retries, timeout_seconds=timeout_seconds, **options)
    )


@pytest.fixture(scope="module")
def refusing() -> Iterator[tuple[ObjectStore, list[tuple[int, str]]]]:
    """A store that refuses everything, and the list whose last item, status and code, says how."""
    answers: list[tuple[int, str]] = []
    with credentials(), server(lambda request: request.refuse(*answers[-1])) as url:
        yield opened(url), answers


def verbs(store: ObjectStore, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """One call of each verb."""
    (tmp_path / "source").write_bytes(b"x")
    return {
        "read": lambda: store.read("a"),
        "write": lambda: store.write("a", b"x", if_absent=True),
        "upload": lambda: store.upload(tmp_path / "source", "a"),
        "download": lambda: store.download("a", tmp_path / "copy"),
        "list": lambda: list(store.list()),
        "delete": lambda: store.delete("a"),
        "probe": store.conditional_writes,
    }


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "ExpiredToken", AccessDenied),
        (400, "InvalidToken", AccessDenied),
        (400, "InvalidStorageClass", SettingsError),
        (400, "RequestTimeout", Unreachable),
        (400, "BadDigest", Unreachable),
        (401, "Unauthorized", AccessDenied),
        (403, "AccessDenied", AccessDenied),
        (403, "InvalidAccessKeyId", AccessDenied),
        (403, "SignatureDoesNotMatch", AccessDenied),
        (403, "RequestTimeTooSkewed", Unreachable),
        (404, "NoSuchBucket", SettingsError),
        (404, "", Unreachable),
        (405, "MethodNotAllowed", NotSupported),
        (429, "TooManyRequests", Unreachable),
        (500, "InternalError", Unreachable),
        (501, "NotImplemented", NotSupported),
        (502, "", Unreachable),
        (503, "SlowDown", Unreachable),
    ],
)
def test_errors_are_translated(
    refusing: tuple[ObjectStore, list[tuple[int, str]]],
    tmp_path: Path,
    status: int,
    code: str,
    expected: type[JobError],
) -> None:
    """Every verb turns an answer of S3 into the same error of the job, without a secret, and says what it tried."""
    store, answers = refusing
    answers.append((status, code))
    for name, attempt in verbs(store, tmp_path).items():
        with pytest.raises(JobError) as caught:
            attempt()
        assert type(caught.value) is expected, name
        assert f"{URI}/" in str(caught.value)
        assert code in str(caught.value) or expected is SettingsError
        assert SECRET not in str(caught.value)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("status", "code", "expected", "words"),
    [
        (301, "PermanentRedirect", SettingsError, r"another address; set JOB_STORAGE__ENDPOINT_URL .* https://"),
        (400, "AuthorizationHeaderMalformed", SettingsError, "JOB_STORAGE__REGION"),
        (400, "ExpiredToken", AccessDenied, "give new temporary keys"),
        (403, "AccessDenied", AccessDenied, "the permissions that infra/storage/README.md lists"),
        (403, "InvalidAccessKeyId", AccessDenied, "correct AWS_ACCESS_KEY_ID"),
        (403, "InvalidObjectState", AccessDenied, "restore the object"),
        (403, "RequestTimeTooSkewed", Unreachable, "this machine's clock"),
        (403, "SignatureDoesNotMatch", AccessDenied, "correct AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_errors_say_what_to_do(status: int, code: str, expected: type[JobError], words: str) -> None:
    """A redirect that leads nowhere, another region, an archive and a wrong clock are told with their remedy."""
    with server(lambda request: request.refuse(status, code)) as url, pytest.raises(expected, match=words):
        opened(url).read("a")


def test_addresses_are_told_without_user_and_password() -> None:
    """The SDK's own variables may name a server or a proxy with both, which its errors repeat."""
    for kind in (EndpointConnectionError, ConnectTimeoutError):
        said = str(translate(kind(endpoint_url=f"http://me:{SECRET}@host:9/bucket"), "s3://bucket"))
        assert SECRET not in said
        assert "http://host:9/bucket" in said


def test_missing_credentials_say_how_to_give_them() -> None:
    """The SDK's own words name no remedy."""
    found = translate(NoCredentialsError(), "s3://bucket")
    assert type(found) is AccessDenied
    assert "AWS_ACCESS_KEY_ID" in str(found)
    assert "role" in str(found)


@pytest.mark.parametrize("status", [0, 200])
def test_an_error_within_an_answer_of_success_may_pass(status: int) -> None:
    """S3 begins to answer a long request before it is done: what then fails is no fault of the settings."""
    answer = {"Error": {"Code": "InternalError"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert type(translate(ClientError(answer, "CompleteMultipartUpload"), "s3://bucket")) is Unreachable


def test_a_404_without_words_is_asked_again(tmp_path: Path) -> None:
    """Where the body of a 404 got lost on the way, the next answer says whether the object is absent."""
    answers: list[str] = []

    def answer(request: Request) -> None:
        answers.append("cut" if len(answers) % 2 == 0 else "whole")
        request.answer(404, b"") if answers[-1] == "cut" else request.refuse(404, "NoSuchKey")

    with server(answer) as url:
        assert opened(url).read("a") is None
        with pytest.raises(FileNotFoundError):
            opened(url).download("a", tmp_path / "copy")
    assert answers == ["cut", "whole"] * 2


def test_only_the_store_can_say_that_something_is_absent(tmp_path: Path) -> None:
    """A 404 of a proxy, in HTML, is no confirmation that an object is absent."""
    with server(lambda request: request.answer(404, b"<html>not here</html>")) as url:
        store = opened(url)
        with pytest.raises(Unreachable):
            store.read("a")
        with pytest.raises(Unreachable):
            store.download("a", tmp_path / "copy")
        with pytest.raises(Unreachable):
            store.write("a", b"x", if_tag="tag")


@pytest.mark.parametrize("answer", ["silence", "half a header", "nobody listens"])
def test_stalled_connections_end(tmp_path: Path, answer: str) -> None:
    """A server that accepts and never answers, or is not there, costs every verb its time limit and no more."""
    released = threading.Event()

    def stall(request: Request) -> None:
        if answer == "half a header":
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
        released.wait(60)
        request.hang_up()

    with server(stall) as url:
        store = opened("http://127.0.0.1:9" if answer == "nobody listens" else url, timeout_seconds=0.3)
        for name, attempt in verbs(store, tmp_path).items():
            start = time.monotonic()
            with pytest.raises(Unreachable):
                attempt()
            assert time.monotonic() - start < 30, name
        released.set()


@pytest.mark.parametrize("verb", ["read", "download"])
def test_a_trickle_is_a_stall(tmp_path: Path, verb: str) -> None:
    """A server that sends a byte now and then, each within the time limit, does not keep the job forever."""
    released = threading.Event()

    def trickle(request: Request) -> None:
        if request.headers.get("Range") == "bytes=0-0":
            request.answer(206, b"x", Content_Range="bytes 0-0/1000", ETag='"1"')
            return
        request.answer(200, Content_Length="1000", ETag='"1"')
        while not released.wait(0.1):
            request.wfile.write(b"x")

    with server(trickle) as url:
        start = time.monotonic()
        with pytest.raises(Unreachable):
            verbs(opened(url, timeout_seconds=0.5), tmp_path)[verb]()
        assert time.monotonic() - start < 50  # all of it would take 100 s
        released.set()


@pytest.mark.parametrize("broken", [1, 100])
@pytest.mark.parametrize("verb", ["read", "download"])
def test_truncated_bodies(tmp_path: Path, verb: str, broken: int) -> None:
    """A truncated body is requested again, and never taken for the whole; in the end it is an error."""
    left = [broken]

    def answer(request: Request) -> None:
        if request.headers.get("Range") == "bytes=0-0":
            request.answer(206, b"w", Content_Range="bytes 0-0/5", ETag='"1"')
        elif left[0] > 0:
            left[0] -= 1
            request.answer(200, b"wh", Content_Length="5", ETag='"1"')
            request.hang_up()
        else:
            request.answer(200, b"whole", ETag='"1"')

    with server(answer) as url:
        attempt = verbs(opened(url, retries=2), tmp_path)[verb]
        if broken > 2:
            with pytest.raises(Unreachable):
                attempt()
            assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
        else:
            stored = attempt()
            assert getattr(stored, "data", None) == b"whole" or (tmp_path / "copy").read_bytes() == b"whole"


def test_passing_errors_are_retried(tmp_path: Path) -> None:
    """Errors of the server and broken connections are tried again, as often as the settings say."""
    requests: list[str] = []

    def answer(request: Request) -> None:
        requests.append(request.command)
        if len(requests) == 1:
            request.refuse(503, "SlowDown")
        elif len(requests) == 2:
            request.hang_up()
        else:
            request.answer(200, b"x", ETag='"1"')

    with server(answer) as url:
        stored = opened(url, retries=3).read("a")
    assert stored is not None
    assert stored.data == b"x"
    assert len(requests) == 3


class TestLostAnswers:
    """A conditional write whose first answer got lost, so that its repetition is refused."""

    @staticmethod
    def bucket(winner: bytes | None, found: dict[str, bytes]) -> Callable[[Request], None]:
        """A bucket that drops the answer to the first write, which `winner`, if any, was quicker than."""

        def answer(request: Request) -> None:
            if request.command == "GET":
                request.answer(200, found["data"], ETag='"stored"')
            elif "data" in found:
                request.refuse(412, "PreconditionFailed")
            else:
                found["data"] = request.content if winner is None else winner
                request.hang_up()

        return answer

    @pytest.mark.parametrize("condition", [{"if_absent": True}, {"if_tag": '"before"'}])
    def test_own_success_is_recognized(self, condition: dict[str, Any]) -> None:
        """What is stored is what was written, so the write succeeded, and its tag is the one stored."""
        with server(self.bucket(None, {})) as url:
            assert opened(url, retries=2).write("lease", b"mine", **condition) == '"stored"'

    @pytest.mark.parametrize("winner", [b"his", b"his, and much longer"])
    def test_loss_is_recognized(self, winner: bytes) -> None:
        """What is stored is another's, so the write failed."""
        with server(self.bucket(winner, {})) as url, pytest.raises(Conflict):
            opened(url, retries=2).write("lease", b"mine", if_absent=True)

    def test_refusal_at_once_is_a_loss(self) -> None:
        """Without a repetition a refusal is a refusal, even if another wrote the very same bytes."""
        with server(self.bucket(None, {"data": b"same"})) as url, pytest.raises(Conflict):
            opened(url, retries=2).write("lease", b"same", if_absent=True)


def test_lost_completion_of_an_upload(tmp_path: Path) -> None:
    """When completing an upload of many parts succeeds unheard and then finds nothing, the upload is made again."""
    completions = 0

    def answer(request: Request) -> None:
        nonlocal completions
        if request.command == "PUT":
            request.answer(200, ETag='"part"')
        elif request.path.endswith("?uploads"):
            request.answer(200, b"<R><UploadId>1</UploadId></R>")
        elif request.command == "POST":
            completions += 1
            if completions == 1:
                request.hang_up()
            elif completions == 2:
                request.refuse(404, "NoSuchUpload")
            else:
                request.answer(200, b"<R><ETag>1</ETag></R>")
        else:
            request.answer(204)

    (tmp_path / "source").write_bytes(b"x" * 9 * MIB)
    with server(answer) as url:
        opened(url, retries=2).upload(tmp_path / "source", "a")
    assert completions == 3


@pytest.mark.parametrize(("conflicts", "wins"), [(2, True), (100, False)])
def test_simultaneous_writes_are_tried_again(monkeypatch: pytest.MonkeyPatch, conflicts: int, *, wins: bool) -> None:
    """S3's 409, another conditional write in flight, is tried again a few times before it counts as lost."""
    monkeypatch.setattr(job.storage.base, "PAUSES", (0.0, 0.0, 0.0))
    left = [conflicts]

    def answer(request: Request) -> None:
        left[0] -= 1
        if left[0] >= 0:
            request.refuse(409, "ConditionalRequestConflict")
        else:
            request.answer(200, ETag='"new"')

    with server(answer) as url:
        store = opened(url)
        if wins:
            assert store.write("a", b"x", if_absent=True) == '"new"'
        else:
            with pytest.raises(Conflict):
                store.write("a", b"x", if_absent=True)


@pytest.mark.parametrize("status", [200, 501])
def test_stores_without_conditions_are_found_out(status: int) -> None:
    """Servers that ignore conditions, or refuse the headers, are said to have none; the probe is deleted."""
    requests: list[str] = []

    def answer(request: Request) -> None:
        requests.append(request.command)
        if status == 501 and "If-None-Match" in request.headers:
            request.refuse(501, "NotImplemented")
        else:
            request.answer(200, ETag='"1"')

    with server(answer) as url:
        assert not opened(url).conditional_writes()
    assert requests[-1] == "DELETE"


def test_an_answer_cut_within_its_headers_is_asked_for_again(tmp_path: Path) -> None:
    """Without a length nobody knows whether it is whole: it is never taken for an empty object."""
    cuts = iter([True, False, False, True, False])

    def answer(request: Request) -> None:
        if request.headers.get("Range"):
            request.answer(206, b"w", Content_Range="bytes 0-0/5", ETag='"1"')
        elif next(cuts):
            request.wfile.write(b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Le')
            request.hang_up()
        else:
            request.answer(200, b"whole", ETag='"1"')

    with server(answer) as url:
        store = opened(url, retries=3)
        assert store.read("a") == Stored(b"whole", '"1"')
        store.download("a", tmp_path / "first")
        store.download("a", tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes() == b"whole"
    assert next(cuts, None) is None


def test_small_objects_are_fetched_without_a_range_beyond_their_end(tmp_path: Path) -> None:
    """Some servers answer 400 to one."""
    ranges: list[str | None] = []

    def answer(request: Request) -> None:
        ranges.append(request.headers.get("Range"))
        if ranges[-1] is None:
            request.answer(200, b"whole", ETag='"1"')
        else:
            request.answer(206, b"w", Content_Range="bytes 0-0/5", ETag='"1"')

    with server(answer) as url:
        opened(url).download("a", tmp_path / "copy")
    assert ranges == ["bytes=0-0", None]


@pytest.mark.parametrize("status", [204, 412, 501])
def test_removal_of_a_version(status: int) -> None:
    """The condition goes with the request: refused it is a conflict, and a server that has none is asked without it."""
    asked: list[str | None] = []

    def answer(request: Request) -> None:
        asked.append(request.headers.get("If-Match"))
        if asked[-1] is None or status == 204:
            request.answer(204)
        else:
            request.refuse(status, "PreconditionFailed" if status == 412 else "NotImplemented")

    with server(answer) as url, pytest.raises(Conflict) if status == 412 else nullcontext():
        opened(url).delete("a", if_tag='"1"')
    assert asked == ['"1"', None] if status == 501 else ['"1"']


def test_declared_size_is_checked_before_reading(tmp_path: Path) -> None:
    """An object that claims to be huge is refused before a byte of it is written."""

    def answer(request: Request) -> None:
        request.answer(206, b"x", Content_Range="bytes 0-0/1000000000000000", ETag='"1"')

    with server(answer) as url, pytest.raises(TooLarge):
        opened(url).download("a", tmp_path / "copy", max_bytes=MIB)
    assert list(tmp_path.iterdir()) == []


def test_real_size_is_checked_while_reading(tmp_path: Path) -> None:
    """An object that claims to be small and is not is refused once it has sent too much."""

    def answer(request: Request) -> None:
        if request.headers.get("Range") == "bytes=0-0":
            request.answer(206, b"x", Content_Range="bytes 0-0/10", ETag='"1"')
        else:
            request.answer(200, b"x" * 2 * MIB, ETag='"1"')

    with server(answer) as url:
        store = opened(url)
        with pytest.raises(TooLarge):
            store.download("a", tmp_path / "copy", max_bytes=MIB)
        with pytest.raises(Unreachable, match="changed while it was read"):
            store.download("a", tmp_path / "copy")
        with pytest.raises(TooLarge):
            store.read("a", max_bytes=MIB)
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_server(tmp_path: Path) -> None:
    """Encryption goes with every write, the storage class with files only, the payer with every request."""
    seen: dict[str, dict[str, str | None]] = {}
    names = ("x-amz-server-side-encryption-aws-kms-key-id", "x-amz-storage-class", "x-amz-request-payer")

    def answer(request: Request) -> None:
        seen[f"{request.command} {request.content!r}"] = {name: request.headers.get(name) for name in names}
        if "list-type" in request.path:
            request.answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        else:
            request.answer(200, b"x" if request.command == "GET" else b"", ETag='"1"')

    with server(answer) as url:
        store = opened(url, kms_key_id="key", storage_class="STANDARD_IA", request_payer=True)
        (tmp_path / "file").write_bytes(b"file")
        store.upload(tmp_path / "file", "a")
        store.write("b", b"small")
        store.read("b")
        store.download("b", tmp_path / "copy")
        list(store.list())
        store.delete("b")
    assert [*seen["PUT b'file'"].values()] == ["key", "STANDARD_IA", "requester"]
    assert [*seen["PUT b'small'"].values()] == ["key", None, "requester"]
    assert all(values["x-amz-request-payer"] == "requester" for values in seen.values())
    assert {name.split()[0] for name in seen} == {"PUT", "GET", "DELETE"}


def test_compatible_servers_get_no_new_headers(tmp_path: Path) -> None:
    """With an endpoint of its own no checksum is sent that S3's protocol did not have from the start."""
    headers: list[str] = []

    def answer(request: Request) -> None:
        headers.extend(f"{name}: {value}".lower() for name, value in request.headers.items())
        request.answer(200, b"x" if request.command == "GET" else b"", ETag='"1"')

    (tmp_path / "file").write_bytes(b"file")
    with server(answer) as url:
        store = opened(url)
        store.upload(tmp_path / "file", "a")
        store.write("a", b"x")
        store.read("a")
    assert headers
    assert not [header for header in headers if "checksum" in header or "aws-chunked" in header]


def test_missing_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without credentials every verb says so, and does not say that there is nothing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for attempt in verbs(opened("http://127.0.0.1:9"), tmp_path).values():
        with pytest.raises(AccessDenied, match="credentials"):
            attempt()


def test_unknown_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that does not exist is a mistake in the settings."""
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(SettingsError, match="profile"):
        open_store(URI)


def test_listing_goes_on_over_pages(real: ObjectStore, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of more objects than one answer holds is complete and sorted; folders of the console are left out."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    names = [f"{number:02}" for number in range(13)]
    for name in reversed(names):
        real.write(name, b"")
    client = connect(StorageOptions(endpoint_url=endpoint, timeout_seconds=60, retries=1))
    client.put_object(Bucket=BUCKET, Key=f"{real.uri.rpartition('/')[2]}/folder/", Body=b"")
    pages = client.list_objects_v2(Bucket=BUCKET, Prefix=real.uri.rpartition("/")[2])
    assert pages["IsTruncated"]
    assert [info.key for info in real.list()] == names


def test_large_files_go_in_parallel(real: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several connections a file arrives as it was, and their threads are gone afterwards."""
    monkeypatch.setattr(job.storage.s3, "ONE_CONNECTION_BYTES", MIB)
    data = bytes(range(256)) * (20 * MIB // 256) + b"end"
    (tmp_path / "source").write_bytes(data)
    before = threading.active_count()
    real.upload(tmp_path / "source", "a")
    real.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    wait_for(
        lambda: threading.active_count() <= before
    )  # the server's, which is in this process, end after its answers


def test_limit_holds_in_parallel(real: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit ends a transfer with several connections too, with nothing left on the disk."""
    monkeypatch.setattr(job.storage.s3, "ONE_CONNECTION_BYTES", MIB)
    monkeypatch.setattr(job.storage.s3.S3Store, "_describe", lambda *_: (10, ""))
    (tmp_path / "source").write_bytes(b"x" * 20 * MIB)
    real.upload(tmp_path / "source", "a")
    with pytest.raises(TooLarge):
        real.download("a", tmp_path / "to" / "copy", max_bytes=9 * MIB)
    assert list((tmp_path / "to").iterdir()) == []


def test_upload_at_interpreter_shutdown(real: ObjectStore, endpoint: str, tmp_path: Path) -> None:
    """A thread that outlives the main one can still finish its upload, although no new threads can be started."""
    (tmp_path / "source").write_bytes(b"x" * 20 * MIB)
    script = f"""
import threading
from pathlib import Path
import job.storage.s3
from job.storage.open import StorageOptions, open_store
job.storage.s3.ONE_CONNECTION_BYTES = 0
store = open_store({real.uri!r}, StorageOptions(endpoint_url={endpoint!r}))
def late():
    threading.main_thread().join()
    store.upload(Path({str(tmp_path / "source")!r}), "late")
threading.Thread(target=late).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=CREDENTIALS, check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [(info.key, info.bytes) for info in real.list()] == [("late", 20 * MIB)]


CREDENTIALS_ONLY = {name: CREDENTIALS[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
ROLES = {
    "IRSA": {"AWS_ROLE_ARN": "arn:aws:iam::1:role/r", "AWS_WEB_IDENTITY_TOKEN_FILE": "{token}"},
    "Pod Identity": {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "{token}",
    },
}


@pytest.mark.parametrize("role", ROLES)
def test_a_token_file_that_cannot_be_read_is_a_denial(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod's token that is not mounted, or not readable for this user, is code 77, with the file and what mends it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for name, value in ROLES[role].items():
        monkeypatch.setenv(name, value.format(token=tmp_path / "token"))
    (tmp_path / "token").mkdir()  # what cannot be opened, whoever asks
    with pytest.raises(AccessDenied, match=r"token, which cannot be read.*fsGroup"):
        open_store(URI).read("a")


def write_keys(path: Path, number: int) -> None:
    """Keys as a program that renews them writes them into AWS's file."""
    keys = {"aws_access_key_id": f"key{number}", "aws_secret_access_key": SECRET, "aws_session_token": f"token{number}"}
    written = path.with_name(uuid4().hex)
    written.write_text("[default]\n" + "".join(f"{name} = {value}\n" for name, value in keys.items()), encoding="utf-8")
    written.replace(path)


@pytest.fixture
def keys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """AWS's file with the first keys, the only credentials that there are."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write_keys(tmp_path / "credentials", 1)
    return tmp_path / "credentials"


@pytest.mark.parametrize("threads", [1, 8])
def test_keys_that_were_replaced_in_the_file_are_read_again(keys_file: Path, threads: int) -> None:
    """Each request that is refused for the old keys is sent again with the new ones, and later ones begin with them."""
    signed, first = list[str](), threading.Barrier(threads)

    def answer(request: Request) -> None:
        key = request.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
        assert request.headers["X-Amz-Security-Token"] == key.replace("key", "token")
        signed.append(key)
        if key == "key1":
            first.wait(60)
            write_keys(keys_file, 2)
            request.refuse(400, "ExpiredToken")
        else:
            request.answer(200, b"content", ETag='"1"')

    with server(answer) as url:
        store = opened(url, retries=2)
        with ThreadPoolExecutor(threads) as pool:
            read = list(pool.map(lambda _: store.read("a"), range(threads)))
        assert read == [Stored(b"content", '"1"')] * threads
        store.read("a")
    assert sorted(signed) == ["key1"] * threads + ["key2"] * (threads + 1)


@pytest.mark.parametrize(
    "change", [lambda path: None, lambda path: path.unlink(missing_ok=True), lambda path: path.write_text("[")]
)
def test_expired_keys_without_new_ones_are_a_denial(keys_file: Path, change: Callable[[Path], object]) -> None:
    """Soon: the request is sent once more, whatever the file holds."""
    asked = list[str]()

    def answer(request: Request) -> None:
        asked.append(request.path)
        change(keys_file)
        request.refuse(400, "ExpiredToken")

    with server(answer) as url:
        store = opened(url, retries=8)
        with pytest.raises(AccessDenied, match="ExpiredToken"):
            list(store.list())
    assert len(asked) == 2


def test_a_web_identity_is_renewed_with_the_token_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK asks for new keys before the old ones expire, and reads the file of the token, which a pod replaces."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in ROLES["IRSA"].items():
        monkeypatch.setenv(name, value.format(token=tmp_path / "token"))
    signed = list[str]()

    def answer(request: Request) -> None:
        if request.path == "/":
            (token,) = parse_qs(request.content.decode())["WebIdentityToken"]
            until = datetime.now(UTC) + timedelta(seconds=60)  # less than the SDK wants to have left
            keys = f"<AccessKeyId>of-{token}</AccessKeyId><SecretAccessKey>s</SecretAccessKey>"
            keys += f"<SessionToken>t</SessionToken><Expiration>{until:%Y-%m-%dT%H:%M:%SZ}</Expiration>"
            name = "AssumeRoleWithWebIdentity"
            result = f"<{name}Result><Credentials>{keys}</Credentials></{name}Result>"
            request.answer(200, f"<{name}Response>{result}</{name}Response>".encode())
        else:
            signed.append(request.headers["Authorization"].partition("Credential=")[2].partition("/")[0])
            request.answer(200, b"content", ETag='"1"')

    with server(answer) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        store = opened(url)
        for token in ("first", "second"):
            (tmp_path / "token").write_text(token, encoding="utf-8")
            store.read("a")
    assert signed == ["of-first", "of-second"]


NONSENSE: dict[str, tuple[dict[str, str], type[JobError], str]] = {
    "a token that is no text": (ROLES["IRSA"], AccessDenied, "cannot be read"),
    "a pod's token that is no text": (ROLES["Pod Identity"], AccessDenied, "cannot be read"),
    "a host that gives no credentials": (
        {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://evil.example/"},
        AccessDenied,
        "Unsupported host",
    ),
    "a process that prints no JSON": ({"AWS_CONFIG_FILE": "{process}"}, AccessDenied, "cannot be read"),
    "a region that is none": ({"AWS_REGION": "", "AWS_DEFAULT_REGION": ""}, SettingsError, "JOB_STORAGE__REGION"),
    "a style that is none": ({"AWS_CONFIG_FILE": "{style}", **CREDENTIALS_ONLY}, SettingsError, "addressing style"),
    "a number that is none": ({"AWS_METADATA_SERVICE_NUM_ATTEMPTS": "x"}, SettingsError, "AWS's own settings"),
    "a key with a line break": (
        {"AWS_ACCESS_KEY_ID": "key\n", "AWS_SECRET_ACCESS_KEY": "s"},
        AccessDenied,
        "line break",
    ),
    "a proxy that is no address": ({**CREDENTIALS_ONLY, "HTTP_PROXY": "::::"}, SettingsError, "PROXY"),
    "a session with a line break": ({**CREDENTIALS_ONLY, "AWS_SESSION_TOKEN": "a\nb"}, AccessDenied, "line break"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_of_the_environment_is_told_as_what_it_is(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials are code 77, settings of AWS's own code 2, never a bug or another setting; no secret is printed."""
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    (tmp_path / "process").write_text("[default]\ncredential_process = echo hello\n", encoding="utf-8")
    (tmp_path / "style").write_text("[default]\ns3 =\n  addressing_style = evil\n", encoding="utf-8")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    environ, error, words = NONSENSE[case]
    url = "http://127.0.0.1:9" if "line break" in case else "http://s3.example" if "proxy" in case else None
    for name, value in {"AWS_REGION": "us-east-1", **environ}.items():
        monkeypatch.setenv(name, value.format(**{one.name: one for one in tmp_path.iterdir()}))
    with pytest.raises(error, match=words) as caught:
        open_store(URI, StorageOptions(endpoint_url=url, retries=1, timeout_seconds=20)).read("a")
    assert "b'" not in str(caught.value)


def test_an_unreadable_file_of_ours_is_no_denial(real: ObjectStore, tmp_path: Path) -> None:
    """What the local disk refuses is not taken for a credential."""
    with pytest.raises(JobError) as caught:
        real.upload(tmp_path, "a")
    assert not isinstance(caught.value, AccessDenied)


class OtherServer:
    """A small S3 server in memory that differs from S3 where a test says so."""

    def __init__(
        self, absent: tuple[int, str] = (404, "NoSuchKey"), beyond: tuple[int, str] = (416, "InvalidRange")
    ) -> None:
        self.objects: dict[str, bytes] = {}
        self.parts: dict[int, bytes] = {}
        self.absent, self.beyond = absent, beyond
        self.foreign = 0
        """So many answers to GET and PUT of an object that lack all headers of S3."""

    def __call__(self, request: Request) -> None:
        """Answers a request."""
        address = urlsplit(request.path)
        key = unquote(address.path).removeprefix(f"/{BUCKET}").removeprefix("/")
        query = parse_qs(address.query, keep_blank_values=True)
        if not key:
            self.list(request, query.get("prefix", [""])[0])
        elif request.command == "POST" and "uploads" in query:
            request.answer(200, b"<R><UploadId>1</UploadId></R>")
        elif request.command == "POST":
            parts = [self.parts.pop(number) for number in sorted(self.parts)]
            self.objects[key] = b"".join(parts)
            request.answer(200, b"<R><ETag>1</ETag></R>")
        elif "partNumber" in query:
            self.parts[int(query["partNumber"][0])] = request.content
            request.answer(200, ETag='"part"')
        elif request.command == "PUT":
            self.objects[key] = request.content
            self.give(request, 200, b"")
        elif request.command == "DELETE":
            request.answer(204) if self.objects.pop(key, None) is not None else request.refuse(*self.absent)
        elif key not in self.objects:
            request.refuse(*self.absent)
        elif "Range" in request.headers and not self.objects[key]:
            request.refuse(*self.beyond)
        elif "Range" in request.headers:
            first, last = request.headers["Range"].removeprefix("bytes=").split("-")
            data, total = self.objects[key], len(self.objects[key])
            end = min(int(last or total), total - 1)
            piece = data[int(first) : end + 1]
            request.answer(206, piece, ETag=f'"{total}"', Content_Range=f"bytes {first}-{end}/{total}")
        else:
            self.give(request, 200, self.objects[key])

    def give(self, request: Request, status: int, data: bytes) -> None:
        """Sends an object, or the answer of something that is no S3 server."""
        self.foreign -= 1
        if self.foreign >= 0:
            request.send_response(status)
            request.send_header("Connection", "close")
            request.end_headers()
            request.hang_up()
        else:
            request.answer(status, data, ETag=f'"{len(data)}"')

    def list(self, request: Request, prefix: str) -> None:
        """Sends a listing."""
        found = sorted((key, len(data)) for key, data in self.objects.items() if key.startswith(prefix))
        entries = "".join(f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key, size in found)
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        request.answer(200, body.encode())


@pytest.mark.parametrize("code", ["NoSuchKey", "NotFound", "NoSuchObject", "KeyNotFound", ""])
def test_absence_in_other_words(tmp_path: Path, code: str) -> None:
    """Where a server has other words for a missing object its listing says whether it is missing."""
    (tmp_path / "empty").write_bytes(b"")
    # what is said of a range beyond an empty object does not depend on the words for a missing one
    beyonds = ((416, "InvalidRange"), (400, "InvalidArgument"), (416, "RequestedRangeNotSatisfiable"))
    for beyond in beyonds if code == "NotFound" else beyonds[:1]:
        with server(OtherServer((404, code), beyond)) as url:
            store = opened(url)
            assert store.read("a") is None
            with pytest.raises(FileNotFoundError):
                store.download("a", tmp_path / "copy")
            store.write("ab", b"1")
            assert store.read("a") is None
            store.delete("a")
            store.upload(tmp_path / "empty", "empty")
            store.download("empty", tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == b""
            assert round_trip(store, "it")[0] == "note"


@pytest.mark.parametrize("foreign", [1, 2])
def test_an_answer_that_is_not_of_s3_is_asked_again(tmp_path: Path, foreign: int) -> None:
    """An answer without the headers of S3 says nothing: the request is repeated."""
    other = OtherServer()
    with server(other) as url:
        store = opened(url, retries=5)
        other.foreign = 1
        tag = store.write("a", b"x")
        other.foreign = foreign
        stored = store.read("a")
        assert stored is not None
        assert (stored.data, stored.tag) == (b"x", tag)


def test_an_answer_that_is_never_of_s3_is_unreachable() -> None:
    """Whatever gives such answers, it is no store: the job ends with a code that is retried, not with a traceback."""
    other = OtherServer()
    with server(other) as url:
        store = opened(url)
        store.write("a", b"x")
        other.foreign = 100
        with pytest.raises(Unreachable, match="no ETag"):
            store.read("a")
        with pytest.raises(Unreachable):
            store.write("a", b"y")


@pytest.mark.parametrize(
    "body", [b"", b"<html/>", b"<ListBucketResult><Contents><Key>a</Key></Contents></ListBucketResult>"]
)
def test_an_answer_that_is_no_listing_is_not_an_empty_one(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of something else in between must never mean that there is no checkpoint."""
    monkeypatch.setattr(job.storage.base, "PAUSES", (0.0, 0.0, 0.0))
    with server(lambda request: request.answer(200, body)) as url, pytest.raises(Unreachable, match="cannot list"):
        list(opened(url).list("checkpoints/"))


LISTING = (
    b"<ListBucketResult><IsTruncated>false</IsTruncated>"
    b"<Contents><Key>run/a</Key><Size>1</Size></Contents></ListBucketResult>"
)


@pytest.mark.parametrize(
    "cut",
    [
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n" + LISTING[:60],
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + LISTING[:9],
        b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + LISTING[:60],
    ],
    ids=["headers", "body without a length", "length", "body"],
)
def test_a_listing_that_is_cut_is_asked_for_again(cut: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a listing breaks off, the same page is requested again, and the listing is whole."""
    monkeypatch.setattr(job.storage.base, "PAUSES", (0.0, 0.0, 0.0))
    cuts = iter([True, True])

    def answer(request: Request) -> None:
        if next(cuts, False):
            request.wfile.write(cut)
            request.hang_up()
        else:
            request.answer(200, LISTING)

    with server(answer) as url:
        assert [info.key for info in opened(url, retries=3).list()] == ["a"]


def test_a_listing_that_says_no_more_how_it_goes_on_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is not the last one, without a token of the next or with its own, must not end the listing."""
    monkeypatch.setattr(job.storage.base, "PAUSES", (0.0, 0.0, 0.0))
    for token in (b"", b"<NextContinuationToken>same</NextContinuationToken>"):
        page = LISTING.replace(b"false</IsTruncated>", b"true</IsTruncated>" + token)
        with server(lambda request, page=page: request.answer(200, page)) as url, pytest.raises(Unreachable):
            list(opened(url).list())


class TestConditionsOfLargeFiles:
    """Files that go in many parts take the conditions of `write`, on the request that makes the object of them."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        """A file that is too large for one request."""
        path = tmp_path / "large"
        with path.open("wb") as made:
            made.truncate(MAX_READ_BYTES + 1)
        return path

    @staticmethod
    def bucket(seen: list[tuple[str | None, str | None]], *statuses: int) -> Callable[[Request], None]:
        """A bucket that notes the conditions of each completion, and answers with these statuses, the last for ever."""
        codes = {404: "NoSuchKey", 409: "ConditionalRequestConflict", 412: "PreconditionFailed", 501: "NotImplemented"}

        def answer(request: Request) -> None:
            if request.command == "PUT":
                request.answer(200, ETag='"part"')
            elif request.path.endswith("?uploads"):
                request.answer(200, b"<R><UploadId>1</UploadId></R>")
            elif request.command == "POST":
                status = statuses[min(len(seen), len(statuses) - 1)]
                seen.append((request.headers.get("If-None-Match"), request.headers.get("If-Match")))
                if status == 200:
                    request.answer(200, b"<R><ETag>1</ETag></R>")
                else:
                    request.refuse(status, codes[status])
            else:
                request.answer(204)

        return answer

    @pytest.mark.parametrize("status", [404, 409, 412])
    def test_a_refusal_is_a_conflict(self, file: Path, status: int) -> None:
        """Another writer's object is not overwritten, and other uploads have no condition."""
        seen: list[tuple[str | None, str | None]] = []
        with server(self.bucket(seen, status, 200, 200)) as url:
            store = opened(url)
            with pytest.raises(Conflict):
                store.upload(file, "a", if_tag='"old"')
            store.upload(file, "a", if_absent=True)
            store.upload(file, "a")
        assert seen == [(None, '"old"'), ("*", None), (None, None)]

    def test_a_store_that_does_not_know_them_is_written_to_plainly(self, file: Path) -> None:
        """A server without conditions for such requests (501) gets the file without one."""
        seen: list[tuple[str | None, str | None]] = []
        with server(self.bucket(seen, 501, 200)) as url:
            opened(url).upload(file, "a", if_absent=True)
        assert seen == [("*", None), (None, None)]

    def test_they_hold_on_a_real_server(self, real: ObjectStore, file: Path) -> None:
        """An object that is there already stays as it is."""
        real.write("a", b"mine")
        with pytest.raises(Conflict):
            real.upload(file, "a", if_absent=True)
        real.upload(file, "b", if_absent=True)
        assert [(info.key, info.bytes) for info in real.list()] == [("a", 4), ("b", MAX_READ_BYTES + 1)]
        assert real.tag("b") is not None


@pytest.mark.parametrize("empty", ["uploads", "part"])
def test_an_upload_whose_answers_are_cut_is_made_again(
    tmp_path: Path, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer without the id of an upload, or the tag of a part, is no reason to end as a bug."""
    monkeypatch.setattr(job.storage.base, "PAUSES", (0.0, 0.0, 0.0))
    cuts = iter([True])
    completed: list[str] = []

    def answer(request: Request) -> None:
        kind = "uploads" if request.path.endswith("?uploads") else "part" if request.command == "PUT" else "other"
        if kind == empty and next(cuts, False):
            request.answer(200)
        elif kind == "part":
            request.answer(200, ETag='"part"')
        elif kind == "uploads":
            request.answer(200, b"<R><UploadId>1</UploadId></R>")
        else:
            completed.append(request.command)
            request.answer(200 if request.command == "POST" else 204, b"<R><ETag>1</ETag></R>")

    (tmp_path / "source").write_bytes(b"x" * 9 * MIB)
    with server(answer) as url:
        opened(url).upload(tmp_path / "source", "a")
    assert completed[-1] == "POST"


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_file_of_certificates_that_is_none_is_a_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    """A variable that names no certificates is an error about that variable, and no server that is away."""
    bundle = tmp_path / "bundle.pem"
    if content is not None:
        bundle.write_bytes(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    with credentials():
        connect(StorageOptions(endpoint_url="http://127.0.0.1:9"))
        with pytest.raises(SettingsError, match=r"AWS_CA_BUNDLE: .* names no certificates"):
            connect(StorageOptions(endpoint_url="https://127.0.0.1:9"))
