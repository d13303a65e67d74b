"""Opening stores by URI, and downloading what is at a URI."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4
from xml.sax.saxutils import escape

import pytest

from job.errors import DataError, SettingsError, Unreachable
from job.planning.preflight_models import fetch_start, preview_model
from job.settings.load import load_settings
from job.settings.schema import Storage
from job.stages import pull_model
from job.storage.open import Location, StorageOptions, bytes_to_fetch, fetch, open_store, storage_options
from tests.s3_server import BUCKET, Request, credentials, moto_server, server


@pytest.fixture(scope="module", autouse=True)
def _credentials() -> Iterator[None]:
    with credentials():
        yield


@pytest.fixture(scope="module")
def options() -> Iterator[StorageOptions]:
    """Options that lead to an S3 server with an empty bucket."""
    with moto_server() as url:
        yield StorageOptions(endpoint_url=url, retries=2)


@pytest.fixture
def prefix(options: StorageOptions) -> str:
    """URI that nothing lies at yet."""
    return f"s3://{BUCKET}/{uuid4().hex}"


@pytest.mark.parametrize("uri", ["", "://bucket/a", "http://host/a", "S3://bucket/a", "oss://bucket/a", "file:///tmp"])
def test_unknown_schemes_are_refused(uri: str) -> None:
    """What is neither a store of the table nor a path is a settings error, not a strange folder."""
    with pytest.raises(
        SettingsError, match="neither s3://bucket/prefix nor gs://bucket/prefix nor az://bucket/prefix nor a path"
    ):
        open_store(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///a", "s3://a", "s3://user:word@bucket/a", "s3://bucket?x/a"])
def test_bad_buckets_are_refused(uri: str) -> None:
    """A bucket's name is checked before anything is sent."""
    with pytest.raises(SettingsError, match=r"no valid bucket name|has a login in it"):
        open_store(uri)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3://runs--usw2-az1--x-s3/a", "is in a directory bucket .*lists objects in no order"),
        ("s3://point--usw2-az1--xa-s3", "is in a directory bucket"),
        ("s3://arn:aws:s3:us-west-2:123456789012:accesspoint/point/a", "is an ARN.* the alias of the access point"),
    ],
)
def test_buckets_of_s3_that_cannot_hold_runs_are_refused(uri: str, why: str) -> None:
    """By their names, before anything is sent: as a setting, with its name, and as an argument of a command."""
    with pytest.raises(SettingsError, match=why):
        open_store(uri)
    with pytest.raises(SettingsError, match=f"JOB_RUN__OUTPUT.*{why}"):
        load_settings([f"--run.output={uri}"])


@pytest.mark.parametrize("uri", ["s3://point-3f5ke9tz-s3alias/a", "gs://runs--usw2-az1--x-s3/a"])
def test_aliases_and_other_stores_may_have_such_names(uri: str) -> None:
    """To the SDK the alias of an access point is the name of a bucket."""
    assert str(Location.parse(uri)) == uri
    assert load_settings([f"--run.output={uri}"]).run.output == uri


@pytest.mark.parametrize("uri", ["s3://bucket/../a", "s3://bucket//a", "s3://bucket/a//"])
def test_bad_prefixes_are_refused(uri: str) -> None:
    """A prefix follows the rules of keys."""
    with pytest.raises(SettingsError, match="not a key"):
        open_store(uri)


@pytest.mark.parametrize(("uri", "expected"), [("s3://bucket", "s3://bucket"), ("s3://bucket/a/b/", "s3://bucket/a/b")])
def test_uri_is_without_trailing_slash(uri: str, expected: str) -> None:
    """Whether the user wrote a trailing slash makes no difference."""
    assert open_store(uri).uri == expected


@pytest.mark.parametrize("url", ["host", "ftp://host", "http://", "http://host:port", "http://[", "http://host name"])
def test_bad_endpoints_are_refused(url: str) -> None:
    """An endpoint that is no address is named by its setting."""
    with pytest.raises(SettingsError, match="JOB_STORAGE__ENDPOINT_URL"):
        open_store("s3://bucket/a", StorageOptions(endpoint_url=url))


def test_endpoint_with_password_is_refused_without_repeating_it() -> None:
    """A password in an address does not get into a message."""
    with pytest.raises(SettingsError, match="user name or password") as caught:
        open_store("s3://bucket/a", StorageOptions(endpoint_url="http://user:hunter2@host"))
    assert "hunter2" not in str(caught.value)


def test_fetch_an_object(options: StorageOptions, prefix: str, tmp_path: Path) -> None:
    """An object arrives under its own name."""
    open_store(prefix, options).write("data/train.jsonl", b"{}")
    path = Path(fetch(f"{prefix}/data/train.jsonl", tmp_path / "new", options))
    assert path == tmp_path / "new" / "train.jsonl"
    assert path.read_bytes() == b"{}"


@pytest.mark.parametrize("slash", ["", "/"])
def test_fetch_a_folder(options: StorageOptions, prefix: str, tmp_path: Path, slash: str) -> None:
    """All objects below a prefix arrive as a folder, without those of another prefix that begins alike."""
    store = open_store(prefix, options)
    files = {"model/config.json": b"{}", "model/a/weights": b"123", "model2/config.json": b"other"}
    for key, data in files.items():
        store.write(key, data)
    path = Path(fetch(f"{prefix}/model{slash}", tmp_path, options))
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert path == tmp_path / "model"
    assert found == {"config.json": b"{}", "a/weights": b"123"}


def test_fetch_a_bucket(tmp_path: Path) -> None:
    """A URI without a key means the whole bucket."""
    with moto_server() as url:
        open_store(f"s3://{BUCKET}", StorageOptions(endpoint_url=url)).write("a/b", b"1")
        path = Path(fetch(f"s3://{BUCKET}", tmp_path, StorageOptions(endpoint_url=url)))
    assert (path / "a" / "b").read_bytes() == b"1"
    assert path.name == BUCKET


@pytest.mark.parametrize("slash", ["", "/"])
def test_fetch_of_nothing(options: StorageOptions, prefix: str, tmp_path: Path, slash: str) -> None:
    """A URI that leads nowhere is a settings error that names it."""
    with pytest.raises(SettingsError, match=f"{prefix}/absent{slash}: there is no such object"):
        fetch(f"{prefix}/absent{slash}", tmp_path, options)


@pytest.mark.parametrize(
    ("name", "expected"), [("model", 5), ("model/", 5), ("model2", 5), ("a", 3), ("a/", 0), ("x", 0)]
)
def test_size_is_what_fetch_downloads(options: StorageOptions, prefix: str, name: str, expected: int) -> None:
    """An object's own bytes, or those of all objects below a folder, without similar prefixes; 0 if there are none."""
    store = open_store(prefix, options)
    for key, data in {"model/b": b"12", "model/c/d": b"345", "model2/e": b"other", "a": b"one"}.items():
        store.write(key, data)
    assert bytes_to_fetch(f"{prefix}/{name}", options) == expected


@pytest.mark.parametrize("place", ["/data/train.jsonl", "./model", "some/model"])
def test_paths_and_hub_ids_stay_as_they_are(tmp_path: Path, place: str) -> None:
    """What is no URI of a store is not fetched, and nothing of it is counted as a download."""
    assert fetch(place, tmp_path / "in") == place
    assert bytes_to_fetch(place) == 0
    assert list(tmp_path.iterdir()) == []


def test_options_are_those_of_the_settings() -> None:
    """Every setting of storage but the folder for copies reaches the stores, with the same default."""
    settings = Storage()
    assert {field.name for field in fields(StorageOptions)} == Storage.model_fields.keys() - {"cache"}
    assert storage_options(settings) == StorageOptions()


@pytest.mark.parametrize("place", ["s3://bucket/a/b", "s3://bucket", "/runs/a", "runs"])
def test_a_location_reads_as_it_was_written(place: str) -> None:
    """Parsing loses nothing but a slash at the end, which says that a folder is meant."""
    assert str(Location.parse(place)) == place
    assert Location.parse(f"{place}/").folder == ("://" in place)


def bucket_of(objects: dict[str, bytes], sizes: dict[str, int] | None = None) -> Any:
    """Return an answer function: a bucket with any keys, which may list wrong sizes, and keys that are gone."""

    def answer(request: Request) -> None:
        if "list-type=2" in request.path:
            listed = {key: len(data) for key, data in objects.items()} | (sizes or {})
            prefix = parse_qs(urlsplit(request.path).query).get("prefix", [""])[0]
            entries = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size></Contents>"
                for key, size in listed.items()
                if key.startswith(prefix)
            )
            request.answer(
                200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
            )
        elif (data := objects.get(request.path.removeprefix(f"/{BUCKET}/"))) is not None:
            request.answer(200, data, ETag='"1"')
        else:
            request.refuse(404, "NoSuchKey")

    return answer


@pytest.mark.parametrize(
    "hostile", ["../../evil", "/etc/evil", "a/../../evil", "..", "a\\..\\evil", "a//evil", "./evil", "a\nb"]
)
def test_fetch_refuses_hostile_names(tmp_path: Path, hostile: str) -> None:
    """A name that would leave the folder is an error before the first byte is written."""
    with server(bucket_of({"data/good": b"1", f"data/{hostile}": b"2"})) as url, pytest.raises(DataError, match="name"):
        fetch(f"s3://{BUCKET}/data/", tmp_path / "in", StorageOptions(endpoint_url=url, retries=1))
    assert list(tmp_path.iterdir()) == []


def test_fetch_refuses_a_file_that_is_a_folder(tmp_path: Path) -> None:
    """Names that no disk can hold together are an error that names the one to rename."""
    objects = {"data/a": b"1", "data/a/b": b"2"}
    with server(bucket_of(objects)) as url, pytest.raises(DataError, match="'a' is both an object and a folder"):
        fetch(f"s3://{BUCKET}/data/", tmp_path, StorageOptions(endpoint_url=url, retries=1))


def test_fetch_notices_a_change(tmp_path: Path) -> None:
    """An object whose size differs from the listed one is not accepted."""
    with (
        server(bucket_of({"data/a": b"12"}, {"data/a": 3})) as url,
        pytest.raises(Unreachable, match="changed while it was fetched: 3 bytes, then 2"),
    ):
        fetch(f"s3://{BUCKET}/data/", tmp_path, StorageOptions(endpoint_url=url, retries=1))


def small_files_of_a_plan(uri: str, folder: Path, options: StorageOptions) -> Any:
    """What `plan` fetches of a model in a bucket."""
    folder.mkdir()
    return preview_model(uri, None, online=lambda: False, folder=folder, storage=options)


def an_adapter_for_a_plan(uri: str, folder: Path, options: StorageOptions) -> Any:
    """What `plan` fetches of an adapter to start from."""
    return fetch_start(uri, folder, options)


FETCHING: tuple[tuple[Callable[..., Any], str], ...] = (
    (fetch, "/"),
    (fetch, "/*.json"),
    (pull_model._fetch_small_files, ""),
    (small_files_of_a_plan, ""),
    (an_adapter_for_a_plan, ""),
)
"""All that fetch what a listing names, and what of a URI they take."""


@pytest.mark.parametrize(("fetch_all", "end"), FETCHING)
@pytest.mark.parametrize(("size", "why"), [(2, "removed"), (1, "changed"), (9, "changed")])
def test_what_is_removed_or_replaced_after_the_listing(
    tmp_path: Path, fetch_all: Callable[..., Any], end: str, size: int, why: str
) -> None:
    """By another program, at any moment: a store that cannot be read now (69), and never a traceback, or half of it."""
    objects = {"data/adapter_config.json": b"{}", "data/adapter_model.safetensors": b"12", "data/config.json": b"{}"}
    sizes = {"data/adapter_config.json": size}
    if why == "removed":
        del objects["data/adapter_config.json"]
    with server(bucket_of(objects, sizes)) as url:
        options = StorageOptions(endpoint_url=url, retries=1)
        with pytest.raises(Unreachable, match=rf"adapter_config.json.* {why} while it was fetched"):
            fetch_all(f"s3://{BUCKET}/data{end}", tmp_path / "in", options)


@pytest.mark.parametrize("hostile", ["we\\ird.json", "../evil.json", "a/../../evil", "a\nb.txt", "x" * 256])
@pytest.mark.parametrize("fetch_all", [FETCHING[0][0], FETCHING[2][0], FETCHING[3][0]])
def test_a_model_in_a_bucket_with_names_that_no_disk_has(
    tmp_path: Path, fetch_all: Callable[..., Any], hostile: str
) -> None:
    """`plan` and the run refuse the same names with the same code, before anything is fetched."""
    objects = {"data/config.json": b"{}", "data/model.safetensors": b"12", f"data/{hostile}": b"{}"}
    with server(bucket_of(objects)) as url, pytest.raises(DataError, match="not a valid file name below the folder"):
        fetch_all(f"s3://{BUCKET}/data", tmp_path / "in", StorageOptions(endpoint_url=url, retries=1))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_local_stores_need_no_sdk() -> None:
    """Opening a local store imports no client of a remote one, which would take a third of a second."""
    lines = [
        "import sys",
        "from job.storage.open import open_store",
        "open_store('runs')",
        "print({'boto3', 'botocore', 'obstore'} & {*sys.modules})",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_a_glob_fetches_what_it_fits(options: StorageOptions, prefix: str, tmp_path: Path) -> None:
    """Wildcards in the last part mean all objects of such names in that folder, not below it, and no others."""
    store = open_store(prefix, options)
    for name in ("a-0.jsonl", "a-1.jsonl", "b.jsonl", "a-2.csv", "a-3/x.jsonl"):
        store.write(name, name.encode())
    pattern = f"{prefix}/a-*.jsonl"
    assert bytes_to_fetch(pattern, options) == len("a-0.jsonl") * 2
    local = fetch(pattern, tmp_path, options)
    assert Path(local).name == "a-*.jsonl"
    found = sorted(file.name for file in tmp_path.rglob("*") if file.is_file())
    assert found == ["a-0.jsonl", "a-1.jsonl"]
    with pytest.raises(SettingsError, match="no object matches"):
        fetch(f"{prefix}/c*", tmp_path, options)
