"""A client for S3 that neither hangs nor gives up early: bounded times, repeated requests, refreshed credentials.

The SDK renews what a role, a web identity's token or a credential process gives, before it expires. Keys that another
program writes into AWS's files it reads once; here they are read again when the server refuses them.
"""

from __future__ import annotations

import ssl
import time
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import CredentialProvider, Credentials
from botocore.exceptions import BotoCoreError, ReadTimeoutError
from botocore.loaders import create_loader
from botocore.response import StreamingBody

from job import log
from job.errors import Problem, SettingsError
from job.storage.base import MAX_CONNECT_SECONDS, pause_seconds
from job.storage.location import StorageOptions
from job.storage.s3_errors import FAILURES, is_transient, no_credentials, translate

_MAX_CONNECTIONS = 32
_FILE_PROVIDERS = ("shared-credentials-file", "config-file")
"""The SDK's names of the providers that read keys from AWS's files."""
_REFUSED_KEYS = {
    *("ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired"),
    *("400", "403"),  # the answer to a HEAD request has no other code
}
"""Codes of answers to keys that are expired or deleted."""
_READ_AGAIN = "qlora_job_read_keys_again"
"""Marks in the SDK's context of a request that the keys have been read again for it."""


def connect(options: StorageOptions) -> Any:
    """A boto3 client; sends nothing yet.

    Raises:
        SettingsError: The endpoint is no address, or AWS's own configuration is wrong.
        AccessDenied, Unreachable: Credentials cannot be had.
    """
    endpoint_url, timeout_seconds = options.endpoint_url, options.timeout_seconds
    if endpoint_url is not None:
        _check_endpoint(endpoint_url)
    # Many servers that speak S3 refuse the checksum headers that newer SDKs add unasked.
    checksums = "when_required" if endpoint_url else None
    config = Config(
        # The SDK's own pauses add up to 1 to 5 s with eight tries, and it counts all retries of a client, of which it
        # allows a number that an outage uses up. `_register` has pauses that outlast one.
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=min(timeout_seconds, MAX_CONNECT_SECONDS),
        read_timeout=timeout_seconds,
        max_pool_connections=_MAX_CONNECTIONS,
        tcp_keepalive=True,
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
    )
    try:
        session = botocore.session.Session()
        session.register_component("data_loader", _api_descriptions())
        # One try, as is the default, makes a busy metadata service look like missing credentials.
        if session.get_config_variable("metadata_service_num_attempts") == 1:
            session.set_config_variable("metadata_service_num_attempts", 3)
        resolver = session.get_component("credential_provider")
        for name in _FILE_PROVIDERS:
            resolver.insert_before(name, _KeyFileProvider(resolver.get_provider(name)))
        boto = boto3.session.Session(botocore_session=session, region_name=options.region)
        keys = session.get_credentials()
        client = boto.client("s3", endpoint_url=endpoint_url, config=config)
    except FAILURES as error:
        raise translate(error, "cannot set up a client for S3") from error
    except (OSError, ValueError) as error:
        if (denied := no_credentials(error, "cannot set up a client for S3")) is not None:
            raise denied from error
        if isinstance(error, OSError):
            raise
        raise SettingsError([_configuration_problem(error, endpoint_url)]) from None

    if client.meta.endpoint_url.startswith("https:"):
        _check_certificates(session.get_config_variable("ca_bundle"))

    _register(client, options, keys if isinstance(keys, _KeysOfFile) else None)
    return client


class _KeysOfFile(Credentials):  # type: ignore[misc]  # botocore has no types
    """Keys of a file, which another program may replace while the job runs."""

    def __init__(self, credentials: Any, provider: Any) -> None:
        super().__init__(
            credentials.access_key,
            credentials.secret_key,
            credentials.token,
            credentials.method,
            credentials.account_id,
        )
        self._provider = provider
        # Replaced as a whole: several threads sign, and none may see the key of one version and the token of another.
        self._keys = credentials.get_frozen_credentials()

    def get_frozen_credentials(self) -> Any:
        """The keys to sign a request with."""
        return self._keys

    def read_again(self) -> None:
        """Takes the keys that the file has now; keeps the old ones if it has none, such as while it is written."""
        with suppress(BotoCoreError, OSError, ValueError):
            credentials = self._provider.load()
            if credentials is not None and credentials.get_frozen_credentials() != self._keys:
                self._keys = credentials.get_frozen_credentials()
                log.get_logger().info("the server refused the keys: new ones were read from AWS's credentials file")


class _KeyFileProvider(CredentialProvider):  # type: ignore[misc]  # botocore has no types
    """Gives what one of the SDK's providers reads from a file, as keys that can be read again."""

    def __init__(self, provider: Any) -> None:
        super().__init__()
        self.METHOD, self.CANONICAL_NAME = provider.METHOD, provider.CANONICAL_NAME
        self._provider = provider

    def load(self) -> _KeysOfFile | None:
        """The keys; None if the file has none."""
        credentials = self._provider.load()
        return None if credentials is None else _KeysOfFile(credentials, self._provider)


def _register(client: Any, options: StorageOptions, keys: _KeysOfFile | None) -> None:
    """Adds to a client the time limit of bodies, and when a request is repeated.

    Args:
        client: The client.
        options: Limits.
        keys: What it signs with, if these are keys of a file; None for all others.
    """

    def limit_time(response_dict: dict[str, Any], **_: Any) -> None:
        body = response_dict["body"]
        if isinstance(body, StreamingBody):
            raw = vars(body)["_raw_stream"]
            limited = vars(body)["_raw_stream"] = _TimeLimitedStream(raw, options.timeout_seconds)
            # The transfer manager drops a body that it gave up on without closing its connection.
            weakref.finalize(limited, raw.close).atexit = False

    def repeat(
        attempts: int, response: Any, caught_exception: BaseException | None, request_dict: dict[str, Any], **_: Any
    ) -> float | None:
        if attempts >= options.retries:
            return None
        if is_transient(response, caught_exception):
            return pause_seconds(attempts)
        code = "" if response is None else str(response[1].get("Error", {}).get("Code", ""))
        if keys is None or code not in _REFUSED_KEYS or request_dict["context"].get(_READ_AGAIN):
            return None
        # Once for each request, also if the file has not changed: another thread may just have read it.
        request_dict["context"][_READ_AGAIN] = True
        keys.read_again()
        return 0.0

    client.meta.events.register("before-parse.s3.GetObject", limit_time)
    client.meta.events.register("needs-retry.s3", repeat)


def _check_certificates(place: str | None) -> None:
    """Raises SettingsError if the SDK's file or folder of certificates is none: it would look like a bad connection."""
    if not place:
        return
    file, folder = (None, place) if Path(place).is_dir() else (place, None)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file, folder)
    except OSError as error:
        what = f"or ca_bundle in AWS's own settings, names no certificates that can be read: {place} ({error})"
        raise SettingsError([Problem("AWS_CA_BUNDLE", what)]) from None


def _configuration_problem(error: ValueError, endpoint_url: str | None) -> Problem:
    """What makes no sense to the SDK; an address without its words, since it may hold a password."""
    if not str(error).startswith("Invalid endpoint"):
        return Problem("AWS's own settings", f"cannot be read: {error}")
    if endpoint_url is not None:
        return Problem("JOB_STORAGE__ENDPOINT_URL", "is not the address of an S3 endpoint")
    what = "or AWS_REGION is not the name of a region, such as eu-central-1, or AWS_ENDPOINT_URL is no address"
    return Problem("JOB_STORAGE__REGION", what)


def _check_endpoint(url: str) -> None:
    """Refuses an invalid address, and one with a password, since messages repeat addresses."""
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


@cache
def _api_descriptions() -> Any:
    """Return botocore's reader of its API descriptions, shared: parsing them again is most of what a client costs."""
    return create_loader()


class _TimeLimitedStream:
    """A response's raw stream with a total time limit: the socket's timeout restarts with every byte."""

    def __init__(self, raw: Any, seconds: float) -> None:
        self._raw = raw
        self._seconds = seconds

    def read(self, amount: int) -> bytes:
        """Read `amount` bytes (fewer only at the end), in at most twice `seconds` seconds."""
        deadline = time.monotonic() + self._seconds
        data = bytearray()
        while len(data) < amount and (chunk := self._raw.read1(amount - len(data))):
            data += chunk
            if time.monotonic() > deadline and len(data) < amount:
                self._raw.close()
                raise ReadTimeoutError(endpoint_url="S3", error=f"{len(data)} bytes in {self._seconds:g} s")
        return bytes(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)
