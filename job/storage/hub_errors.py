"""The Hugging Face hub's answers, checked before its client uses them, and its errors, translated into the job's.

Nothing here imports a library while an error is handled. A download runs in a thread beside the main thread, which
imports `datasets` meanwhile: an import of one of its submodules in the thread would make Python give one of the two a
half-initialised module, and an error of the hub would appear as an ImportError. Errors of libraries are therefore
recognized by name.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http import HTTPStatus
from importlib import import_module
from pathlib import PurePosixPath
from traceback import walk_tb
from typing import Any

from job.common.formatting import first_line
from job.errors import AccessDenied, DataError, JobError, Problem, SettingsError, Unreachable

# By name: which of the HTTP libraries it is depends on the version of the hub's client.
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp"}
_DENIED_STATUS = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.UNAVAILABLE_FOR_LEGAL_REASONS}
TRANSIENT_STATUS = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
_NAME = re.compile(r"(?!\.{1,2}$)[0-9A-Za-z._-]+")
"""What the hub's answers give as commit and ETag."""
_HUB_ERRORS, _DATASETS_ERRORS = "huggingface_hub.errors", "datasets.exceptions"
_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
}
_PARSING_ERRORS = (AssertionError, AttributeError, LookupError, RecursionError, TypeError, UnicodeDecodeError)
"""What the hub's client raises while it reads an answer that is none of the hub's, beside a JSONDecodeError."""
_INVALID_ADDRESS = {"InvalidProxyURL", "InvalidSchema", "InvalidURL", "MissingSchema", "UnsupportedProtocol"}
_CERTIFICATES = {"ssl", "httpx._config", "httpx2._config"}
"""Modules that read files of certificates."""


class _HostileAnswer(Exception):
    """An answer whose commit, ETag or file name would lead out of the cache."""


@cache
def _check_answers() -> None:
    """Has every answer to the hub's client looked at before the client uses it; for the rest of this process.

    The client joins paths of its cache from what the hub answers, and a mirror or a proxy may answer anything.
    `datasets` uses the same client.
    """
    from huggingface_hub import set_client_factory

    set_client_factory(_checking_client)


def _checking_client() -> Any:
    """The hub's own client, with one more hook."""
    # The library has no public name for its default; its settings and request hook are to stay.
    client = import_module("huggingface_hub.utils._http").default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks["response"], _check_answer]}
    return client


def _check_answer(response: Any) -> None:
    """Raises `_HostileAnswer` for an answer of which the hub's client would make a path out of its cache."""
    headers, path = response.headers, response.request.url.path
    names = {"X-Repo-Commit": headers.get("X-Repo-Commit")}
    files: list[object] = []
    if response.request.method == "HEAD":  # other answers' ETags are not used, and the hub's may have slashes
        tag = headers.get("X-Linked-Etag") or headers.get("ETag")
        names["ETag"] = tag and tag.lstrip("W/").strip('"')  # as the client takes it apart
    elif "/resolve" not in path and "/resolve" in headers.get("Location", ""):
        raise _HostileAnswer("a listing is redirected to a file")  # its content would not be looked at
    elif "/resolve" not in path and "json" in headers.get("Content-Type", ""):
        response.read()
        try:
            content = json.loads(response.content)
        except ValueError:
            return  # the client says it
        if isinstance(content, dict):
            names["sha"] = content.get("sha")
        entries = [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
        files = [entry.get("path") for entry in entries]
        large = [entry["lfs"] for entry in entries if isinstance(entry.get("lfs"), dict)]
        names |= {f"oid {number}": value.get("oid") for number, value in enumerate(large)}
    for name, value in names.items():
        if value is not None and not _NAME.fullmatch(str(value)):
            raise _HostileAnswer(f"{name} {str(value)[:80]!r} is none of the hub's")
    for file in files:
        if isinstance(file, str) and (file.startswith("/") or ".." in PurePosixPath(file).parts):
            raise _HostileAnswer(f"the file name {file[:80]!r} leads out of its folder")


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns an error of the hub's libraries into the job's. What is not about the hub passes unchanged.

    Args:
        name: What to call the subject in messages, such as `model org/name`.

    Raises:
        AccessDenied: The hub refused.
        Unreachable: The hub did not answer, or cannot just now; or the disk of the cache is full.
        SettingsError: The folder of the cache cannot be written, or an address or a file of certificates is none.
        DataError: The hub answered, and has nothing usable under this name.
    """
    try:
        _check_answers()
        yield
    except JobError:
        raise
    except Exception as error:
        # The cause says more than its wrapper: a failed download is raised as a failed generation.
        innermost_first = list(reversed(list(causes(error))))
        known = (
            _answered_error(cause, name) or _connection_error(cause, name) or _foreign_answer_error(cause, name)
            for cause in innermost_first
        )
        own = next(filter(None, (_environment_error(cause, name) for cause in innermost_first)), None)
        translated = own or _disk_error(error, name) or next(filter(None, known), None) or _content_error(error, name)
        if translated is None:
            raise
        raise translated from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the errors that it was raised from, the last one first."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_a(error: BaseException, module: str, *names: str) -> bool:
    """Whether the error is an instance of one of a library's exceptions, without importing that library."""
    return any(kind.__module__ == module and kind.__name__ in names for kind in type(error).__mro__)


def _environment_error(error: BaseException, name: str) -> JobError | None:
    """What the environment names makes no sense, so that nothing was asked."""
    modules = {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}
    if type(error).__module__.split(".")[0] in _TRANSPORTS and type(error).__name__ in _INVALID_ADDRESS:
        return SettingsError(
            [Problem("HF_ENDPOINT", f"or a proxy variable is not an http:// or https:// address: {error}")]
        )
    if isinstance(error, ImportError) and "SOCKS" in str(error):
        return SettingsError([Problem("ALL_PROXY", "names a SOCKS proxy, which is not supported; give an HTTP proxy")])
    if isinstance(error, OSError) and not isinstance(error, ConnectionError) and modules & _CERTIFICATES:
        what = f"or REQUESTS_CA_BUNDLE names no file of certificates that can be read ({error})"
        return SettingsError([Problem("SSL_CERT_FILE", what)])
    encodes = isinstance(error, UnicodeEncodeError)  # only headers are encoded
    if encodes or (isinstance(error, UnicodeError) and "huggingface_hub.utils._auth" in modules):
        return AccessDenied(f"{name}: HF_TOKEN, or the file with it, has characters that a token cannot have")
    return None


def _answered_error(error: BaseException, name: str) -> JobError | None:
    """The hub answered, with an error."""
    denied = AccessDenied(f"{name}: does not exist, or HF_TOKEN has no access to it (private, or gated)")
    if _is_a(error, _DATASETS_ERRORS, "DatasetNotFoundError"):
        # Here `datasets` has dropped the HTTP error, and only its message is left.
        refused = "gated" in str(error) or "cannot be accessed" in str(error)
        return denied if refused else DataError([Problem(name, "not found on the hub at this revision")])
    if not _is_a(error, _HUB_ERRORS, "HfHubHTTPError") or _is_a(error, _HUB_ERRORS, "RemoteEntryNotFoundError"):
        return None  # a missing file does not mean that the data set is missing
    status = error.response.status_code  # type: ignore[attr-defined]
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        what = f"the proxy on the way to the hub refuses (HTTP {int(status)}); give its credentials in HTTPS_PROXY"
        return AccessDenied(f"{name}: {what}")
    if status in _DENIED_STATUS or _is_a(error, _HUB_ERRORS, "RepositoryNotFoundError", "DisabledRepoError"):
        return denied
    if status in TRANSIENT_STATUS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Unreachable(f"{name}: the hub answered with HTTP {status}")
    return DataError([Problem(name, f"not found on the hub at this revision (HTTP {status})")])


def _connection_error(error: BaseException, name: str) -> JobError | None:
    """The hub did not answer."""
    silent = isinstance(error, ConnectionError | TimeoutError) or _is_a(
        error, _HUB_ERRORS, "LocalEntryNotFoundError", "RevisionResolutionError"
    )
    transport = type(error).__module__.split(".")[0] in _TRANSPORTS and not hasattr(error, "response")
    # `datasets` reports a failed download as a plain FileNotFoundError, without its cause.
    if transport or silent or type(error) is FileNotFoundError:
        what = f"the hub cannot be reached ({type(error).__name__}); check the network, HF_ENDPOINT and proxies"
        return Unreachable(f"{name}: {what}")
    return None


def _foreign_answer_error(error: BaseException, name: str) -> JobError | None:
    """Something answered in place of the hub, such as a login page; or the hub with less than its client reads."""
    modules = {str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)}
    reads = any(module.startswith("huggingface_hub.") for module in modules)
    if isinstance(error, _HostileAnswer):
        return Unreachable(f"{name}: {error}; check whether a proxy or a mirror answers instead of the hub")
    if reads and (isinstance(error, _PARSING_ERRORS) or type(error).__name__ == "JSONDecodeError"):
        what = f"the hub's answer cannot be read ({type(error).__name__}: {first_line(error, 100)})"
        return Unreachable(f"{name}: {what}; check whether a proxy or a login page answers instead")
    return None


def _disk_error(error: Exception, name: str) -> JobError | None:
    """The cache's disk is full, or its folder cannot be written; `datasets` reports a full disk only in the message."""
    disk_error = next((cause for cause in causes(error) if isinstance(cause, OSError) and cause.errno in _DISK), error)
    if not isinstance(disk_error, OSError):
        return None
    if disk_error.errno in {errno.ENOSPC, errno.EDQUOT} or "disk space" in str(disk_error):
        return Unreachable(f"{name}: the disk of the cache is full; free space, or set HF_HOME to a larger disk")
    if disk_error.errno in _DISK:
        path = disk_error.filename or "the folder of the cache"
        what = f"{name}: {path} cannot be read or written ({disk_error.strerror})"
        return SettingsError([Problem("HF_HOME", f"{what}; set it to a folder that this user may write")])
    return None


def _content_error(error: Exception, name: str) -> JobError | None:
    """The hub's data cannot be used: no such split, several configurations, a loading script."""
    if _is_a(error, _HUB_ERRORS, "RemoteEntryNotFoundError"):
        where = getattr(getattr(error, "response", None), "url", "")
        return DataError([Problem(name, f"the hub lists a file that it does not have: {where}")])
    unusable = isinstance(error, FileNotFoundError | ValueError | RuntimeError)
    if unusable or _is_a(error, _DATASETS_ERRORS, "DatasetsError"):
        return DataError([Problem(name, f"cannot be read: {first_line(error)}")])
    return None
