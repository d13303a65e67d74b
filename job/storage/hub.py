"""The Hugging Face hub: a model's files at a pinned commit, and the translation of the hub's errors into the job's.

Credentials are the hub's own (HF_TOKEN, a login); its client reads them, and retries automatically.

Nothing here imports a library while an error is handled. A download runs in a thread beside the main thread, which
imports `datasets` meanwhile: an import of one of its submodules in the thread would make Python give one of the two a
half-initialised module, and an error of the hub would appear as an ImportError. Errors of libraries are therefore
recognized by name.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from http import HTTPStatus
from importlib import import_module
from pathlib import Path, PurePosixPath
from traceback import walk_tb
from typing import Any, Literal

from job import log
from job.common.hashing import hash_files
from job.common.resources import check_disk, required_bytes
from job.errors import AccessDenied, DataError, JobError, Problem, SettingsError, Unreachable

# By name: which of the HTTP libraries it is depends on the version of the hub's client.
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp"}
_REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.UNAVAILABLE_FOR_LEGAL_REASONS}
_TRANSIENT = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"(?!\.{1,2}$)[0-9A-Za-z._-]+")
"""What the hub's answers give as commit and ETag."""
_HUB_ERRORS, _DATASETS_ERRORS = "huggingface_hub.errors", "datasets.exceptions"
_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
}
_SENSELESS = (AssertionError, AttributeError, LookupError, RecursionError, TypeError, UnicodeDecodeError)
"""What the hub's client raises while it reads an answer that is none of the hub's, beside a JSONDecodeError."""
_NO_ADDRESS = {"InvalidProxyURL", "InvalidSchema", "InvalidURL", "MissingSchema", "UnsupportedProtocol"}
_CERTIFICATES = {"ssl", "httpx._config", "httpx2._config"}
"""Modules that read files of certificates."""

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja")
"""What is fetched of a model: no pickled weights, no code."""
SMALL_FILES = tuple(kind for kind in MODEL_FILES if kind != "*.safetensors")
"""All of that but the weights."""
MAX_SMALL_BYTES = 256 << 20
CARD = "README.md"
_MAX_CARD_BYTES = 16 << 20
MAX_FILE = 50_000_000_000
"""Bytes of the largest file that the hub takes, by its client's documentation (`HfApi.upload_file`, 2.4)."""
PREVIEW_SECONDS = 10.0
"""A plan is not to wait for long."""


def import_client() -> None:
    """Imports what `download_model` uses.

    Raises:
        SettingsError: A variable of the hub's library, which it reads when it is imported, makes no sense.
    """
    try:
        for name in ("HfApi", "constants", "errors", "set_client_factory", "snapshot_download"):
            getattr(import_module("huggingface_hub"), name)
    except ValueError as error:
        raise SettingsError([Problem("HF_ENDPOINT or another HF_ variable", f"is invalid: {error}")]) from error


def download_model(
    source: str,
    revision: str | None,
    before_weights: Callable[[Path, bool], None] = lambda _folder, _missing: None,
) -> tuple[Path, str | None]:
    """The folder of a model: the path itself, or the hub's files in the local cache.

    The weights' bytes are compared with the SHA-256 that the hub lists, also if they were in the cache; files that
    differ are downloaded again.

    Args:
        source: A path to a folder in the hub's layout, or a hub id.
        revision: Commit, tag or branch of a hub id; None for its newest commit.
        before_weights: Called with the folder when configuration and tokenizer are in it, and with whether weights are
            going to be fetched when it returns.

    Returns:
        The folder, and the commit that the revision resolved to (None for a path).

    Raises:
        Unreachable: The hub did not answer, gave other bytes than it names, or the disk is full.
        AccessDenied: The model is gated, private, or does not exist for these credentials.
        DataError: No such path, model or revision.
        SettingsError: The folder of the cache cannot be written.
    """
    if (path := local_model(source)) is not None:
        before_weights(path, False)  # noqa: FBT003 - the callback's second argument is said above
        return path, None
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    with hub_errors(f"model {source}"):
        commit = str(HfApi().resolve_revision(source, repo_type="model", revision=revision).resolved)
        request: dict[str, Any] = {"revision": commit, "allow_patterns": list(MODEL_FILES)}
        small = {**request, "allow_patterns": list(SMALL_FILES)}
        missing_sizes: list[int] = []
        with suppress(DryRunError):  # the hub does not answer: nothing will be downloaded, so only the cache counts
            files = snapshot_download(source, dry_run=True, **request)
            if not files:
                what = "has none of the files that are loaded, such as config.json and model.safetensors"
                raise DataError([Problem(f"model {source}", f"{what}; GGUF and pickled weights are not supported")])
            missing_sizes = [file.file_size or 0 for file in files if file.will_download]
            check_disk(Path(constants.HF_HUB_CACHE), required_bytes(missing_sizes))
        before_weights(Path(snapshot_download(source, **small)), bool(missing_sizes))
        folder = Path(snapshot_download(source, **request))
        if other_bytes := _other_bytes(folder):
            names = ", ".join(path.name for path in other_bytes)
            log.get_logger().warning("cached files differ from the hub's hashes: downloaded again", files=names)
            _remove(other_bytes)
            folder = Path(snapshot_download(source, **request))
            if _other_bytes(folder):
                _remove(other_bytes)
                raise Unreachable(f"model {source}: the SHA-256 of {names} is not the one that the hub gives")
    return folder, commit


def _other_bytes(folder: Path) -> list[Path]:
    """Files of a snapshot whose content is not what their name in the cache says.

    The cache names what it holds by the hub's ETag, which for large files (LFS, Xet) is their SHA-256.
    """
    files = [path for path in folder.iterdir() if path.is_symlink() and _SHA256.fullmatch(path.resolve().name)]
    return [path for path, digest in zip(files, hash_files(files), strict=True) if digest != path.resolve().name]


def _remove(paths: Sequence[Path]) -> None:
    """Removes files of a snapshot, and what they point to in the cache, so that they are fetched again."""
    for path in paths:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def local_model(source: str) -> Path | None:
    """The folder of a model that is named by its path; None for a hub id.

    Raises:
        DataError: A path, but not to a folder; or a name in it that is read is a pipe, a device or a link to nothing,
            which would be waited for, or read without end.
    """
    path = Path(source)
    if path.is_dir():
        there = sorted(entry for entry in path.iterdir() if any(map(entry.match, (*MODEL_FILES, "*.txt"))))
        if odd := [entry for entry in there if not entry.is_file() and not entry.is_dir()]:
            message = "is not a regular file, but a pipe, a device or a broken link"
            raise DataError([Problem("JOB_MODEL__ID", f"{entry} {message}") for entry in odd[:3]])
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        message = "is not a folder" if path.exists() else "does not exist"
        raise DataError([Problem("JOB_MODEL__ID", f"{source} {message}; give the folder of a model, or a hub id")])
    return None


def is_reachable() -> bool:
    """Whether the hub can be reached."""
    from huggingface_hub import constants, get_session

    try:
        # Not HEAD, whose ETag is judged as that of a file; the page itself is not read.
        with hub_errors("the hub"), get_session().stream("GET", constants.ENDPOINT, timeout=PREVIEW_SECONDS):
            pass
    except Unreachable:
        return False
    return not constants.HF_HUB_OFFLINE


def peek_model(source: str, revision: str | None) -> tuple[Path, dict[str, int]]:
    """The folder of a hub model's small files, and the bytes of each file that the job is going to fetch, by name.

    Raises:
        Unreachable, AccessDenied, DataError: As `download_model`.
    """
    import_client()
    from huggingface_hub import snapshot_download

    with hub_errors(f"model {source}"):
        files = snapshot_download(source, revision=revision, allow_patterns=list(MODEL_FILES), dry_run=True)
        sizes = {file.filename: file.file_size or 0 for file in files}
        if sum(size for name, size in sizes.items() if not name.endswith(".safetensors")) > MAX_SMALL_BYTES:
            raise Unreachable(
                f"model {source}: its configuration and tokenizer are too large to be checked before the download"
            )
        folder = snapshot_download(source, revision=revision, allow_patterns=list(SMALL_FILES))
    return Path(folder), sizes


def cached_model(source: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the local cache, if there is one; makes no request."""
    import_client()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    small = list(SMALL_FILES)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=small, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def fetch_card(source: str, revision: str | None, kind: Literal["model", "dataset"]) -> Path | None:
    """The card of a hub repository, from the cache or the hub; None if it has none.

    Raises:
        Unreachable, AccessDenied, DataError: As `download_model`.
    """
    import_client()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    with hub_errors(f"{'data set' if kind == 'dataset' else kind} {source}"):
        # A listing first, so that a card of many gigabytes is not fetched.
        with suppress(DryRunError):  # the hub does not answer: only the cache counts
            files = snapshot_download(source, repo_type=kind, revision=revision, allow_patterns=[CARD], dry_run=True)
            if not files or any((file.file_size or 0) > _MAX_CARD_BYTES for file in files):
                return None
        folder = snapshot_download(source, repo_type=kind, revision=revision, allow_patterns=[CARD])
    card = Path(folder) / CARD
    return card if card.is_file() else None


def cached_card(source: str, revision: str | None, kind: Literal["model", "dataset"]) -> Path | None:
    """The card of a hub repository in the cache; None if it is not there. The hub is not asked.

    Raises:
        DataError: As `download_model`.
    """
    import_client()
    from huggingface_hub import try_to_load_from_cache

    with hub_errors(f"{'data set' if kind == 'dataset' else kind} {source}"):
        found = try_to_load_from_cache(source, CARD, revision=revision, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def peek_dataset(source: str, revision: str) -> tuple[int, str | None]:
    """Bytes of a hub data set's files, and the licence that its card names.

    Raises:
        Unreachable, AccessDenied, DataError: As `open_dataset`.
    """
    from huggingface_hub import HfApi

    with hub_errors(f"data set {source}"):
        info = HfApi().dataset_info(source, revision=revision, files_metadata=True, timeout=PREVIEW_SECONDS)
    named = getattr(info.card_data, "license", None)
    licence = ", ".join(map(str, named)) if isinstance(named, list) else named
    return sum(file.size or 0 for file in info.siblings or []), str(licence) if licence else None


class _HostileAnswer(Exception):
    """An answer whose commit, ETag or file name would lead out of the cache."""


@cache
def _check_answers() -> None:
    """Has every answer to the hub's client looked at before the client uses it; for the rest of this process.

    The client joins paths of its cache from what the hub answers, and a mirror or a proxy may answer anything.
    `datasets` uses the same client.
    """
    from huggingface_hub import set_client_factory

    set_client_factory(_judging_client)


def _judging_client() -> Any:
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
        causes = list(reversed(list(_causes(error))))
        known = (_answer(cause, name) or _silence(cause, name) or _no_answer_of_a_hub(cause, name) for cause in causes)
        own = next(filter(None, (_environment(cause, name) for cause in causes)), None)
        translated = own or _disk(error, name) or next(filter(None, known), None) or _content(error, name)
        if translated is None:
            raise
        raise translated from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_a(error: BaseException, module: str, *names: str) -> bool:
    """Whether the error is an instance of one of a library's exceptions, without importing that library."""
    return any(kind.__module__ == module and kind.__name__ in names for kind in type(error).__mro__)


def _environment(error: BaseException, name: str) -> JobError | None:
    """What the environment names makes no sense, so that nothing was asked."""
    modules = {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}
    if type(error).__module__.split(".")[0] in _TRANSPORTS and type(error).__name__ in _NO_ADDRESS:
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


def _answer(error: BaseException, name: str) -> JobError | None:
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
    if status in _REFUSED or _is_a(error, _HUB_ERRORS, "RepositoryNotFoundError", "DisabledRepoError"):
        return denied
    if status in _TRANSIENT or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Unreachable(f"{name}: the hub answered with HTTP {status}")
    return DataError([Problem(name, f"not found on the hub at this revision (HTTP {status})")])


def _silence(error: BaseException, name: str) -> JobError | None:
    """The hub did not answer."""
    silent = isinstance(error, ConnectionError | TimeoutError) or _is_a(
        error, _HUB_ERRORS, "LocalEntryNotFoundError", "RevisionResolutionError"
    )
    transport = type(error).__module__.split(".")[0] in _TRANSPORTS and not hasattr(error, "response")
    # `datasets` reports a failed download as a plain FileNotFoundError, without its cause.
    if transport or silent or type(error) is FileNotFoundError:
        return Unreachable(f"{name}: the hub cannot be reached ({type(error).__name__})")
    return None


def _no_answer_of_a_hub(error: BaseException, name: str) -> JobError | None:
    """Something answered in place of the hub, such as a login page; or the hub with less than its client reads."""
    modules = {str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)}
    reads = any(module.startswith("huggingface_hub.") for module in modules)
    if isinstance(error, _HostileAnswer):
        return Unreachable(f"{name}: {error}; check whether a proxy or a mirror answers instead of the hub")
    if reads and (isinstance(error, _SENSELESS) or type(error).__name__ == "JSONDecodeError"):
        said = (str(error).splitlines() or [""])[0][:100]
        what = f"the hub's answer cannot be read ({type(error).__name__}: {said})"
        return Unreachable(f"{name}: {what}; check whether a proxy or a login page answers instead")
    return None


def _disk(error: Exception, name: str) -> JobError | None:
    """The cache's disk is full, or its folder cannot be written; `datasets` reports a full disk only in the message."""
    disk_error = next((cause for cause in _causes(error) if isinstance(cause, OSError) and cause.errno in _DISK), error)
    if not isinstance(disk_error, OSError):
        return None
    if disk_error.errno in {errno.ENOSPC, errno.EDQUOT} or "disk space" in str(disk_error):
        return Unreachable(f"{name}: the disk of the cache is full; free space, or set HF_HOME to a larger disk")
    if disk_error.errno in _DISK:
        path = disk_error.filename or "the folder of the cache"
        what = f"{name}: {path} cannot be read or written ({disk_error.strerror})"
        return SettingsError([Problem("HF_HOME", f"{what}; set it to a folder that this user may write")])
    return None


def _content(error: Exception, name: str) -> JobError | None:
    """The hub's data cannot be used: no such split, several configurations, a loading script."""
    if _is_a(error, _HUB_ERRORS, "RemoteEntryNotFoundError"):
        where = getattr(getattr(error, "response", None), "url", "")
        return DataError([Problem(name, f"the hub lists a file that it does not have: {where}")])
    unusable = isinstance(error, FileNotFoundError | ValueError | RuntimeError)
    if unusable or _is_a(error, _DATASETS_ERRORS, "DatasetsError"):
        first_line = (str(error).splitlines() or [""])[0]
        return DataError([Problem(name, f"cannot be read: {first_line[:200]}")])
    return None
