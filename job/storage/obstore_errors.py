"""Translates errors of obstore, the client for Google Cloud Storage and Azure, into the job's.

obstore says by the class of an error only whether an object is absent, a condition failed, or access is denied. All
else is one class with the answer in its text, so the HTTP status and the store's error code are read from there.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from xml.sax.saxutils import unescape

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from job.errors import AccessDenied, JobError, Problem, SettingsError, Unreachable
from job.storage.base import NotSupported
from job.storage.credential_variables import GOOGLE_KEYS, given, is_given

ABSENT = {"NoSuchKey", "BlobNotFound", "ResourceNotFound"}
"""Error codes by which the stores report that an object does not exist."""
FAILED_CONDITION_CODES = {
    "",
    "BlobAlreadyExists",
    "ConditionNotMet",
    "PathAlreadyExists",
    "PreconditionFailed",
    "TargetConditionNotMet",
}
"""Error codes with which the stores say that a condition does not hold, or none. Other conflicts have other codes."""
_RETENTION = (
    "a retention policy or a legal hold protects the object, but the job has to replace some of its objects: use "
    "another bucket or container, or exempt this prefix"
)
_ROLE = 'give the identity the role "Storage Blob Data Contributor", or the signature the permissions rwdl'
_LEASED = "another program holds a lease on the blob; break it (az storage blob lease break)"
_CREDENTIALS = (
    "set GOOGLE_APPLICATION_CREDENTIALS (gs://) or AZURE_STORAGE_ACCOUNT_KEY (az://), or give the machine or pod an "
    "identity of the cloud"
)
# Error code -> what to do. Access is denied, though some of Azure's answers have the status of a conflict.
_DENIED_CODES = {
    "AccessDenied": "give the identity roles/storage.objectUser on the bucket",
    "AuthorizationFailure": "correct the key or signature, or let the account's network rules allow this machine",
    "AuthorizationPermissionMismatch": _ROLE,
    "BlobArchived": "rehydrate the blob (az storage blob set-tier), and let no lifecycle rule or "
    "JOB_STORAGE__STORAGE_CLASS archive a run's files",
    "BlobImmutableDueToLegalHold": _RETENTION,
    "BlobImmutableDueToPolicy": _RETENTION,
    "KeyBasedAuthenticationNotPermitted": "use an identity in place of AZURE_STORAGE_ACCOUNT_KEY",
    "LeaseIdMissing": _LEASED,
    "ObjectUnderActiveHold": _RETENTION,
    "PublicAccessNotPermitted": _CREDENTIALS,
    "RequestTimeTooSkewed": "set this machine's clock",
    "RetentionPolicyNotMet": _RETENTION,
}
# The same by words, for the answers in a batch, which have no code, and for codes that mean several things.
_DENIED_WORDS = {
    "is immutable due to": _RETENTION,
    "currently a lease on the blob": _LEASED,
    "not authorized to perform this operation using this permission": _ROLE,
    "while the blob has snapshots": "delete its snapshots",
    "date header": "set this machine's clock",
    "in the specified time frame": "give a new AZURE_STORAGE_SAS_TOKEN",
    "MAC signature": "correct AZURE_STORAGE_ACCOUNT_KEY",
    "Invalid JWT": "correct this machine's clock, or replace the key of the service account",
}
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
_BUSY = {"408", "429"}
# What obstore says when it cannot get credentials, or cannot use those that it has.
_NO_CREDENTIALS = re.compile(
    r"credential|\b(token request|token file|Access Key|SAS|private key|service account|authority|PEM)\b", re.IGNORECASE
)
# An object's name, which may contain any words.
_OBJECT = re.compile(r"\b(at location|for path) .*?(?=: Error performing |$)", re.DOTALL)
_CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"
_NO_ADDRESS = "is not an http:// or https:// address; correct or remove it"
_NO_KEY = (
    "the private key of the service account cannot be read; create a new key, and use its file as it is downloaded"
)
# What makes no sense to obstore itself, which may repeat it -> (variables of which one that is set is wrong, why).
_INVALID_VARIABLES = {
    "Account must be specified": (
        ("AZURE_STORAGE_ACCOUNT_NAME",),
        f"is not set; az:// needs the storage account's name, or {_CONNECTION_STRING}",
    ),
    "Unable parse source url": (("AZURE_STORAGE_ENDPOINT", _CONNECTION_STRING), _NO_ADDRESS),
    "builder error": (("GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT"), _NO_ADDRESS),
    "Error reading pem file": (GOOGLE_KEYS, _NO_KEY),
    "InvalidEncoding": (GOOGLE_KEYS, _NO_KEY),
}
_NO_ACCOUNT = (
    "names no storage account, so it is no valid connection string; copy the whole text from the account's page "
    '"Access keys", with AccountName and AccountKey or with BlobEndpoint (UseDevelopmentStorage=true is not taken)'
)
_NO_CONNECTION = {
    re.compile(r'ConnectError\(\s*"dns error"'): "the server's name cannot be resolved; correct the address, or the "
    "name of the storage account",
    re.compile(r"InvalidCertificate\(\s*(\w+)"): "the server's certificate is not trusted ({}); name the file with its "
    "authority's in SSL_CERT_FILE",
    re.compile(r"kind: ConnectionRefused"): "the server refuses the connection; correct the address",
}
_METADATA = re.compile(r"//(169\.254\.169\.254|metadata\.google\.internal)[:/]")
_REQUEST = re.compile(r"Error performing [A-Z]+ ")
# No name server knows the name: in the words of glibc, musl and macOS. "Temporary failure" is not among them.
_PERMANENT = re.compile(
    r"Name or service not known|Name does not resolve|nodename nor servname|No address associated|InvalidCertificate"
)
# obstore has classes for these, but not for all requests.
_DENIED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_UNKNOWN_REQUEST = {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED}
_STATUS = re.compile(r"status code: (\d{3})")
# Azure's objects are deleted by a batch, whose errors are worded differently.
_BATCH_STATUS = re.compile(r"Bulk delete request failed for key .*\(code: (\d{3})\)\s*$", re.DOTALL)
_CODE = re.compile(r"<Code>(\w+)</Code>")
# What the stores say in detail, such as whose permission is missing, and in general.
_MESSAGES = "AuthenticationErrorDetail|Details", "Message"
_DETAILS = [re.compile(rf"<({names})>(.*?)</\1>", re.DOTALL) for names in _MESSAGES]
# Of a request, in Azure's words about a wrong account key.
_MAC = re.compile(r"'[A-Za-z0-9+/]{40,}=*'")
_PASSWORD, _QUERY = re.compile(r"(?<=://)[^\s/@]*@"), re.compile(r"(?<=[^\s])\?\S*")
# Text in quotes, which may be a credential's unless it is the name of a field or kind.
_QUOTED, _NAME = re.compile(r"([`\"])((?:(?!\1).)*)\1", re.DOTALL), re.compile(r"[a-z_]{1,30}")
# The path of a file; one that is longer may be the key itself.
_CREDENTIALS_FILE = re.compile(r"(?<=service account file) from (?![^\n{]{1,200}: [^:]*$).*(?=: [^:]*$)", re.DOTALL)
_MAX_CHARACTERS = 300


class Missing(Exception):
    """A 404, by the store or by a proxy; obstore's FileNotFoundError would be taken for one of the local disk."""


FAILURES = (BaseError, Missing)
"""Everything that asking one of the stores can raise, apart from what the local disk says."""


def code(error: BaseException) -> str:
    """The store's own error code, such as `NoSuchKey`; empty if the answer had none."""
    match = _CODE.search(str(error))
    return match[1] if match else ""


def is_failed_condition(error: BaseException) -> bool:
    """Whether a condition does not hold."""
    return isinstance(error, (AlreadyExistsError, PreconditionError)) and code(error) in FAILED_CONDITION_CODES


def is_client_error(error: BaseException) -> bool:
    """Whether the store answered that the request is wrong, absent or denied, for which it has a reason."""
    match = _STATUS.search(_without_debug(error))
    return isinstance(error, Missing) or (match is not None and match[1].startswith("4") and match[1] not in _BUSY)


def is_transient(error: BaseException) -> bool:
    """Whether asking again may help: no answer, a cut one, a server's failure, or too many requests."""
    return type(translate(error, "")) is Unreachable


def is_permanent(error: BaseException) -> bool:
    """Whether there was no connection for a permanent reason: an unknown host name, or a wrong certificate."""
    return _PERMANENT.search(str(error)) is not None and "ConnectError" in str(error)


def has_no_metadata(error: BaseException) -> bool:
    """Whether credentials were to come from the cloud's metadata service, which did not answer."""
    text = _without_debug(error)
    return _METADATA.search(text) is not None and _STATUS.search(text) is None


def translate(error: BaseException, operation: str) -> JobError:
    """Return the job's error for one of `FAILURES`, `operation` being what was tried."""
    if (problem := _invalid_variable(error)) is not None:
        return SettingsError([problem])
    match = _STATUS.search(str(error)) or _BATCH_STATUS.search(_without_debug(error))
    return _translate(error, operation, int(match[1]) if match else 0)


def translate_setup(error: BaseException, uri: str) -> JobError:
    """Return the job's error for one of `FAILURES` while a client was set up, which sends nothing."""
    problem = translate(error, f"{uri}: cannot set up a client")
    if type(problem) is Unreachable:
        return SettingsError([Problem(uri, f"cannot set up a client: {_one_line(error)}")])
    return problem


def _invalid_variable(error: BaseException) -> Problem | None:
    """The variable that obstore cannot use, and why; None for other errors."""
    text = _without_debug(error)
    words = next((words for words in _INVALID_VARIABLES if words in text), None)
    # The answer of a store, and the name of an object, may have such words in them, too.
    if words is None or _STATUS.search(text) or _OBJECT.search(text):
        return None
    if words == "Account must be specified" and is_given(_CONNECTION_STRING):
        return Problem(_CONNECTION_STRING, _NO_ACCOUNT)
    variables, what = _INVALID_VARIABLES[words]
    return Problem(given(*variables), what)


def _translate(error: BaseException, operation: str, status: int) -> JobError:
    message = f"{operation}: {_one_line(error)}"
    if (remedy := _remedy_if_denied(error, status)) is not None:
        return AccessDenied(f"{message}{remedy}")
    if status in _UNKNOWN_REQUEST:
        return NotSupported([Problem(operation, f"the store does not support this request: {_one_line(error)}")])
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or code(error) in _TRANSIENT_CODES:
        return Unreachable(message)
    if (settings_problem := _settings_problem(error, status)) is not None:
        return SettingsError([Problem(operation, settings_problem)])
    return Unreachable(f"{message}{_no_connection(error)}")


def _no_connection(error: BaseException) -> str:
    """Why there is no connection, which obstore says in its internals alone, and what to do; empty for other errors."""
    match = next(filter(None, (pattern.search(str(error)) for pattern in _NO_CONNECTION)), None)
    return f"; {_NO_CONNECTION[match.re].format(*match.groups())}" if match else ""


def _remedy_if_denied(error: BaseException, status: int) -> str | None:
    """What to do about it where access is denied; None where it is not."""
    message = _OBJECT.sub("", _without_debug(error))
    about_credentials = _is_about_credentials(error, status)
    denied = isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or status in _DENIED
    remedy = _DENIED_CODES.get(code(error))
    if remedy is None and (0 < status < HTTPStatus.INTERNAL_SERVER_ERROR or denied):
        remedy = next((fix for words, fix in _DENIED_WORDS.items() if words in message), None)
    if remedy is None and about_credentials:
        remedy = _CREDENTIALS
    return f"; {remedy}" if remedy else "" if denied else None


def _settings_problem(error: BaseException, status: int) -> str | None:
    """What the user has to change; None if asking again may help."""
    if code(error) in _NO_BUCKET:
        return "there is no such bucket or container; create it, or correct the URI"
    if isinstance(error, InvalidPathError):
        return f"an object there has a name that a file cannot have; rename it: {_one_line(error)}"
    return f"the store refuses the request: {_one_line(error)}" if status and status not in _TRANSIENT else None


def _is_about_credentials(error: BaseException, status: int) -> bool:
    """Whether obstore failed before it asked the store: the store's address and answer are not looked at."""
    if isinstance(error, InvalidPathError):
        return False
    message = _OBJECT.sub("", _without_debug(error))
    request = _REQUEST.search(message)
    if not _NO_CREDENTIALS.search(message[: request.start()] if request else message):
        return False
    # A token service that does not answer may do so later, but a machine without an identity has no metadata service.
    answered = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
    answered = answered and status != HTTPStatus.TOO_MANY_REQUESTS
    return request is None or answered or (not status and _METADATA.search(message) is not None)


def _without_debug(error: BaseException) -> str:
    """What obstore says, without the internals that it prints below."""
    return str(error).partition("\n\nDebug source")[0]


def _one_line(error: BaseException) -> str:
    """What the store says, or obstore where it says nothing, on one line, cut off.

    Without what in addresses may be a password or a signature, and without what obstore quotes from a credential.
    """
    text, status = _without_debug(error), _STATUS.search(_without_debug(error))
    if (name := code(error)) and status:
        message = next(filter(None, (detail.search(text) for detail in _DETAILS)), None)
        text = f"{name} (HTTP {status[1]}): {_MAC.sub('...', unescape(message[2])) if message else ''}"
    elif not isinstance(error, InvalidPathError):  # which quotes names of objects
        text = _QUOTED.sub(_without_quoted, _CREDENTIALS_FILE.sub("", text))
    return _QUERY.sub("", _PASSWORD.sub("", " ".join(text.split())))[:_MAX_CHARACTERS].rstrip(":. ")


def _without_quoted(match: re.Match[str]) -> str:
    return match[0] if _NAME.fullmatch(match[2]) else f"{match[1]}...{match[1]}"
