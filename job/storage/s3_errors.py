"""Translates errors of S3 and its SDK into the job's: to be retried, denied, or wrong settings."""

from __future__ import annotations

import re
from http import HTTPStatus
from traceback import walk_tb
from typing import Any

from boto3.exceptions import Boto3Error
from botocore import exceptions as sdk
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import S3DownloadFailedError, S3ValidationError

from job.errors import AccessDenied, JobError, Problem, SettingsError, Unreachable
from job.storage.base import NotSupported

# Everything that asking S3 can raise, apart from what the local disk says.
FAILURES = (
    BotoCoreError,
    Boto3Error,
    ClientError,
    ResponseParserError,
    S3DownloadFailedError,
    S3ValidationError,
    ConnectionError,
    RecursionError,
    TimeoutError,
)
# The body of an answer broke off, stalled, or arrived damaged: worth repeating.
TRUNCATED = (
    ConnectionError,
    sdk.FlexibleChecksumError,
    sdk.IncompleteReadError,
    sdk.ReadTimeoutError,
    sdk.ResponseStreamingError,
    TimeoutError,
)
_DENIED = (
    sdk.CredentialRetrievalError,
    sdk.NoCredentialsError,
    sdk.PartialCredentialsError,
    sdk.SSOError,
    sdk.TokenRetrievalError,
)
_MISCONFIGURED = (
    sdk.BaseEndpointResolverError,
    sdk.ConfigNotFound,
    sdk.ConfigParseError,
    sdk.EndpointProviderError,
    sdk.InvalidChecksumConfigError,
    sdk.InvalidConfigError,
    sdk.InvalidDefaultsMode,
    sdk.InvalidIMDSEndpointError,
    sdk.InvalidIMDSEndpointModeError,
    sdk.InvalidMaxRetryAttemptsError,
    sdk.InvalidProxiesConfigError,
    sdk.InvalidRegionError,
    sdk.InvalidRetryConfigurationError,
    sdk.InvalidRetryModeError,
    sdk.InvalidS3AddressingStyleError,
    sdk.InvalidSTSRegionalEndpointsConfigError,
    sdk.ParamValidationError,
    sdk.ProfileNotFound,
)
# Denials that come with status 400.
_DENIED_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidIdentityToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
# Client errors by their status, but transient.
_TRANSIENT_CODES = {
    "BadDigest",
    "IDPCommunicationError",
    "IncompleteBody",
    "InvalidPart",
    "NoSuchUpload",
    "OperationAborted",
    "PreconditionFailed",
    "RequestTimeout",
    "RequestTimeTooSkewed",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
# Of these an answer to any request may be one, and the same request succeeds later.
_BUSY_CODES = {
    "BandwidthLimitExceeded",
    "IDPCommunicationError",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}
_BUSY = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}
# There is no connection for a reason that stays.
_PERMANENT = re.compile(
    r"Name or service not known|Name does not resolve|nodename nor servname|No address associated|"
    r"CERTIFICATE_VERIFY_FAILED"
)
_REGION = "set JOB_STORAGE__REGION to the region of the bucket"
# Error code -> what to do about it.
_REMEDIES = {
    "AccessDenied": "give this user or role the permissions that infra/storage/README.md lists",
    "AuthorizationHeaderMalformed": _REGION,
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException"), "give new temporary keys, and start again"),
    "IllegalLocationConstraintException": _REGION,
    "InvalidAccessKeyId": "correct AWS_ACCESS_KEY_ID, or the key in the profile of AWS_PROFILE",
    "InvalidObjectState": "restore the object, and let no lifecycle rule or JOB_STORAGE__STORAGE_CLASS archive a run's "
    "files",
    "PermanentRedirect": f"{_REGION}, and remove or correct JOB_STORAGE__ENDPOINT_URL",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": "correct AWS_SECRET_ACCESS_KEY, or the secret key in the profile of AWS_PROFILE",
}
_PASSWORD = re.compile(r"(?<=://)[^\s/@]*@")
_MAX_CHARACTERS = 300


def code_and_status(error: ClientError) -> tuple[str, int]:
    """Return S3's error code, such as `NoSuchKey`, and the HTTP status of an answer."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(error.response.get("Error", {}).get("Code", "")), int(status)


def is_answer(error: BaseException | None, code: str) -> bool:
    """Whether `error` is S3's own answer with this error code."""
    return isinstance(error, ClientError) and code_and_status(error)[0] == code


def is_missing(error: ClientError) -> bool:
    """Whether an answer is a 404 that may be about an object; which says nothing about who gave it."""
    code, status = code_and_status(error)
    return status == HTTPStatus.NOT_FOUND and code != "NoSuchBucket"


def is_transient(response: tuple[Any, dict[str, Any]] | None, error: BaseException | None) -> bool:
    """Whether a request is worth sending again: there was no answer, or the server failed or asks to wait.

    Args:
        response: The HTTP answer and what it says, as the SDK passes both to its event `needs-retry`; None if there was
            none.
        error: Why there was none.
    """
    if response is not None:
        answer, parsed = response
        return answer.status_code in _BUSY or str(parsed.get("Error", {}).get("Code", "")) in _BUSY_CODES
    if not isinstance(error, (sdk.ConnectionError, HTTPClientError)) or _unsent(error, "") is not None:
        return False
    return _PERMANENT.search(_cause(error)) is None


def _cause(error: Any) -> str:
    """Why there is no connection; the SDK's own words leave it out."""
    return f"{error} {error.kwargs.get('error', '')}"


def translate(error: BaseException, operation: str) -> JobError:
    """Return the job's error for one of `FAILURES`, `operation` being what was tried."""
    if isinstance(error, Boto3Error):
        # The transfer manager wraps the answer: as context, or as `last_exception` when its retries are used up.
        inner = getattr(error, "last_exception", None) or error.__cause__ or error.__context__
        if isinstance(inner, FAILURES):
            return translate(inner, operation)
    if isinstance(error, ClientError):
        return _translate_answer(error, operation)
    if (unsent := _unsent(error, operation)) is not None:
        return unsent
    message = f"{operation}: {_one_line(error)}"
    if isinstance(error, sdk.NoCredentialsError):
        message += "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give the machine or pod a role"
    if isinstance(error, sdk.EndpointConnectionError) and _PERMANENT.search(_cause(error)):
        message += "; the server's name cannot be resolved; correct JOB_STORAGE__ENDPOINT_URL or JOB_STORAGE__REGION"
    if isinstance(error, _DENIED):
        return AccessDenied(message)
    if isinstance(error, _MISCONFIGURED):
        return SettingsError([Problem(operation, _one_line(error))])
    return Unreachable(message)


def _unsent(error: BaseException, operation: str) -> JobError | None:
    """The job's error for a request that no client can send; None for all others."""
    # The SDK asks where the bucket is when it is sent elsewhere, and asks about that question again.
    if "maximum recursion depth" in str(error):
        fix = "set JOB_STORAGE__ENDPOINT_URL to that address, such as https:// in place of http://"
        return SettingsError([Problem(operation, f"the server sends every request to another address; {fix}")])
    if not isinstance(error, HTTPClientError):
        return None
    if "Invalid header value" in str(error):  # without its words, which hold it
        return AccessDenied(f"{operation}: a credential has a line break in it, or another invalid character")
    if "Failed to parse" in str(error):
        return SettingsError([Problem("HTTP_PROXY or HTTPS_PROXY", "is no address of a proxy")])
    return None


def no_credentials(error: OSError | ValueError, operation: str) -> AccessDenied | None:
    """The job's error for credentials that cannot be obtained; None for an unrelated error.

    The SDK reads the token of a pod's role (IRSA, Pod Identity), or asks a process, whenever it needs fresh
    credentials, and lets through what the disk says, and that the text makes no sense.
    """
    frames = {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}
    if not frames & {"botocore.credentials", "botocore.tokens"}:
        return None
    if isinstance(error, ValueError):
        return AccessDenied(f"{operation}: the credentials cannot be read: {_one_line(error)}")
    return AccessDenied(
        f"{operation}: the credentials come from {error.filename}, which cannot be read ({error.strerror}); mount it "
        "(a service account with a role), and let this user read it: securityContext.fsGroup of the pod"
    )


def _translate_answer(error: ClientError, operation: str) -> JobError:
    code, status = code_and_status(error)
    reason = f"{code} (HTTP {status}): {_one_line(error.response.get('Error', {}).get('Message', ''))}"
    reason += f"; {_REMEDIES[code]}" if code in _REMEDIES else ""
    transient = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
    if code in _TRANSIENT_CODES or status in transient:
        return Unreachable(f"{operation}: {reason}")
    if code in _DENIED_CODES or status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return AccessDenied(f"{operation}: {reason}")
    if code == "NoSuchBucket":
        return SettingsError([Problem(operation, "there is no such bucket; create it, or correct the URI")])
    if status in {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED}:
        return NotSupported([Problem(operation, f"the store does not support this request: {reason}")])
    # An error behind the status of success came after the beginning of a long answer; without a status there was none.
    may_pass = status < HTTPStatus.MULTIPLE_CHOICES or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if may_pass or status == HTTPStatus.NOT_FOUND:
        return Unreachable(f"{operation}: {reason}")
    return SettingsError([Problem(operation, f"the store refuses the request: {reason}")])


def _one_line(text: Any) -> str:
    """The error's message on one line, cut off: some servers answer with a whole page.

    Without the user and password of an address, which the SDK's own variables may have.
    """
    return _PASSWORD.sub("", " ".join(str(text).split()))[:_MAX_CHARACTERS].rstrip(".")
