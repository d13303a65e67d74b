"""Translates errors of obstore, the client for Google Cloud Storage and Azure, into the job's.

obstore says by the class of an error only whether an object is absent, a condition failed, or access is denied. All
else is one class with the answer in its text, so the HTTP status and the store's error code are read from there.
"""

from __future__ import annotations

import re
from http import HTTPStatus

from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError, UnauthenticatedError

from job.errors import AccessDenied, JobError, Problem, SettingsError, Unreachable
from job.storage.base import NotSupported

ABSENT = {"NoSuchKey", "BlobNotFound", "ResourceNotFound"}
"""Error codes with which the stores themselves say that there is no such object."""
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
# Client errors by their status, but transient.
_TRANSIENT_CODES = {
    "BadDigest",
    "ContainerBeingDeleted",
    "IncompleteBody",
    "InvalidBlockList",
    "InvalidPart",
    "Md5Mismatch",
    "NoSuchUpload",
    "OperationTimedOut",
    "RequestTimeout",
    "SlowDown",
}
_TRANSIENT = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.CONFLICT,
    HTTPStatus.PRECONDITION_FAILED,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.NOT_FOUND,
}
# What obstore says when it cannot get credentials, or cannot use those that it has.
_NO_CREDENTIALS = re.compile(
    r"token request|token file|credential|Access Key|SAS|private key|service account|authority|PEM", re.IGNORECASE
)
_METADATA = re.compile(r"//(169\.254\.169\.254|metadata\.google\.internal)[:/]")
_REQUEST = re.compile(r"Error performing [A-Z]+ ")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_PASSWORD, _QUERY = re.compile(r"(?<=://)[^\s/@]*@"), re.compile(r"(?<=[^\s])\?\S*")
_MAX_WORDS = 300


class Missing(BaseError):
    """The answer was a 404, from whoever gave it: obstore raises FileNotFoundError, which here is for local files."""


def code(error: BaseException) -> str:
    """The store's own error code, such as `NoSuchKey`; empty if the answer had none."""
    found = _CODE.search(str(error))
    return found[1] if found else ""


def is_transient(error: BaseException) -> bool:
    """Whether asking again may help: no answer, a cut one, a server's failure, or too many requests."""
    return type(translate(error, "")) is Unreachable


def translate(error: BaseException, what: str) -> JobError:
    """Return the job's error for one of obstore's, `what` being what was tried."""
    found = _STATUS.search(str(error))
    status, words = int(found[1]) if found else 0, f"{what}: {_words(error)}"
    if "Account must be specified" in _first(error):
        return SettingsError([Problem("AZURE_STORAGE_ACCOUNT_NAME", "is not set; az:// needs the storage account's name")])
    if "builder error" in _first(error):
        problem = Problem("GOOGLE_BASE_URL or AZURE_STORAGE_ENDPOINT", "is not an http:// or https:// address")
        return SettingsError([problem])
    if isinstance(error, InvalidPathError):
        named = f"an object there has a name that no file can have; rename it: {_words(error)}"
        return SettingsError([Problem(what, named)])
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED:
        return Unreachable(words)
    if status == HTTPStatus.TOO_MANY_REQUESTS or code(error) in _TRANSIENT_CODES:
        return Unreachable(words)
    if _is_about_credentials(error, status):
        return AccessDenied(f"{words}; set the cloud's own variables, or give the machine or pod an identity")
    if code(error) in _NO_BUCKET:
        return SettingsError([Problem(what, "there is no such bucket or container; create it, or correct the URI")])
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return AccessDenied(words)
    if status in {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED}:
        return NotSupported([Problem(what, f"the store does not know this request: {_words(error)}")])
    if not status or status in _TRANSIENT:
        return Unreachable(words)
    return SettingsError([Problem(what, f"the store refuses the request: {_words(error)}")])


def _is_about_credentials(error: BaseException, status: int) -> bool:
    """Whether obstore failed before it asked the store: the store's address and answer are not looked at."""
    said = _first(error)
    request = _REQUEST.search(said)
    if not _NO_CREDENTIALS.search(said[: request.start()] if request else said):
        return False
    # A token service that does not answer may do so later, but a machine without an identity has no metadata service.
    return request is None or status > 0 or _METADATA.search(said) is not None


def _first(error: BaseException) -> str:
    """What obstore says, without the internals that it prints below."""
    return str(error).partition("\n\nDebug source")[0]


def _words(error: BaseException) -> str:
    """The error on one line, cut off, without what in addresses may be a password or a signature."""
    return _QUERY.sub("", _PASSWORD.sub("", " ".join(_first(error).split())))[:_MAX_WORDS]
