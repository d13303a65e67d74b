"""Where objects come from and go to: opens the store behind a URI, and fetches what a user names by `s3://`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from job.errors import DataError, Problem, SettingsError, Unreachable
from job.storage.base import (
    Conflict,
    NotSupported,
    ObjectInfo,
    ObjectStore,
    Stored,
    TooLarge,
    check_key,
    disk_errors,
    is_key,
)
from job.storage.local import LocalStore

__all__ = [
    "Conflict",
    "NotSupported",
    "ObjectInfo",
    "ObjectStore",
    "Stored",
    "TooLarge",
    "check_key",
    "fetch",
    "is_key",
    "open_store",
    "size",
]

_SCHEME = "s3://"
# Names of today's and of older buckets, and aliases of access points.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")


def open_store(
    uri: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    kms_key_id: str | None = None,
    storage_class: str | None = None,
    request_payer: bool = False,
    timeout_seconds: float = 60.0,
    retries: int = 8,
) -> ObjectStore:
    """Open the store at `uri`: `s3://bucket/prefix` or a path. Nothing is sent or created yet.

    Args:
        uri: where the store lies.
        endpoint_url: address of another server that speaks S3's protocol; None for AWS.
        region: AWS region; None for what the environment says.
        kms_key_id: key for SSE-KMS; None for the bucket's own encryption.
        storage_class: of uploaded files; small objects, which are rewritten and read again, stay in the standard one.
        request_payer: pay for requests to a requester-pays bucket.
        timeout_seconds: how long one request, or 256 KiB of a download, may take.
        retries: how often a request is tried at most, the first time included.

    Raises:
        SettingsError: the URI or the endpoint makes no sense.
    """
    if not uri.startswith(_SCHEME):
        if "://" in uri or not uri:
            raise SettingsError([Problem(uri or "''", "is neither s3://bucket/prefix nor a path")])
        return LocalStore(Path(uri), timeout_seconds=timeout_seconds)
    bucket, prefix = _split(uri)
    if endpoint_url is not None:
        _check_endpoint(endpoint_url)
    from job.storage.s3 import S3Store
    from job.storage.s3_client import connect

    return S3Store(
        connect(endpoint_url=endpoint_url, region=region, timeout_seconds=timeout_seconds, retries=retries),
        bucket,
        prefix,
        kms_key_id=kms_key_id,
        storage_class=storage_class,
        request_payer=request_payer,
        retries=retries,
    )


def fetch(uri: str, folder: Path, **storage_options: Any) -> Path:
    """Download the object at `uri`, or all objects below it as a folder, into `folder`.

    Args:
        uri: `s3://bucket/key`; a trailing slash says that it is a folder.
        folder: where to put it, under the last part of its name.
        storage_options: as for `open_store`.

    Returns:
        The local file or folder.

    Raises:
        SettingsError: there is nothing at `uri`.
        DataError: names below `uri` cannot be files in one folder, or would leave it.
    """
    if not uri.startswith(_SCHEME):
        raise ValueError(f"{uri} is not an s3:// URI")
    bucket, key = _split(uri)
    parent, _, name = key.rpartition("/")
    store = open_store(f"{_SCHEME}{bucket}/{parent}", **storage_options)
    target = folder / (name or bucket)
    if name and not uri.endswith("/"):
        try:
            store.download(name, target)
        except FileNotFoundError:
            pass
        else:
            return target
    start = f"{name}/" if name else ""
    found = {info.key.removeprefix(start): info for info in store.list(start)}
    if not found:
        raise SettingsError([Problem(uri, "there is no such object, and nothing below it; correct the URI")])
    problems = _impossible_names(uri, found)
    if problems:
        raise DataError(problems)
    for path, info in found.items():
        store.download(info.key, target / path, max_bytes=info.bytes)
        with disk_errors(f"{uri}: cannot read {target / path}"):
            size = (target / path).stat().st_size
        if size != info.bytes:
            raise Unreachable(f"{uri}: {path} changed while it was fetched: {info.bytes} bytes, then {size}")
    return target


def size(uri: str, **storage_options: Any) -> int:
    """Bytes that `fetch` is going to download from `uri`; 0 where there is nothing, which `fetch` will say."""
    bucket, key = _split(uri)
    parent, _, name = key.rpartition("/")
    store = open_store(f"{_SCHEME}{bucket}/{parent}", **storage_options)
    found = {info.key: info.bytes for info in store.list(name)}
    if name in found and not uri.endswith("/"):
        return found[name]
    start = f"{name}/" if name else ""
    return sum(size for path, size in found.items() if path.startswith(start))


def _split(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key/` into bucket and key, without a trailing slash."""
    bucket, _, key = uri.removeprefix(_SCHEME).partition("/")
    key = key.removesuffix("/")
    if not _BUCKET.fullmatch(bucket):
        raise SettingsError([Problem(uri, "has no valid bucket name; write s3://bucket/prefix")])
    try:
        return bucket, check_key(key) if key else ""
    except ValueError as error:
        raise SettingsError([Problem(uri, str(error))]) from None


def _check_endpoint(url: str) -> None:
    """Refuse an address that is none, or that holds a password: addresses are repeated in messages."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        secret = parts.username is not None or parts.password is not None
    except ValueError:
        valid, secret = False, False
    if secret:
        problem = "holds a user name or password; give credentials as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise SettingsError([Problem("JOB_STORAGE__ENDPOINT_URL", problem)])
    if not valid:
        raise SettingsError([Problem("JOB_STORAGE__ENDPOINT_URL", "is not an http:// or https:// address")])


def _impossible_names(uri: str, paths: dict[str, ObjectInfo]) -> list[Problem]:
    problems = []
    for path in paths:
        try:
            check_key(path)
        except ValueError:
            problems.append(
                Problem(uri, f"the name {path!r} would leave the folder or is no file's; rename the object")
            )
            continue
        parents = [parent.as_posix() for parent in Path(path).parents]
        problems += [
            Problem(uri, f"{parent!r} is both an object and a folder, which no disk can hold; rename one")
            for parent in parents
            if parent in paths
        ]
    return problems
