"""The Hugging Face hub: a model's files at a pinned commit, and what a plan asks about models and data sets.

Credentials are the hub's own (HF_TOKEN, a login); its client reads them, and retries automatically. Errors of the hub
become the job's in `hub_errors`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from job import log
from job.common.hashing import hash_files
from job.common.resources import check_disk, required_bytes
from job.errors import DataError, Problem, SettingsError, Unreachable
from job.storage.hub_errors import hub_errors

_SHA256 = re.compile(r"[0-9a-f]{64}")
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja")
"""What is fetched of a model: no pickled weights, no code."""
SMALL_FILES = tuple(pattern for pattern in MODEL_FILES if pattern != "*.safetensors")
"""All of that but the weights."""
MAX_SMALL_BYTES = 256 << 20
CARD = "README.md"
_MAX_CARD_BYTES = 16 << 20
MAX_FILE_BYTES = 50_000_000_000
"""Bytes of the largest file that the hub takes, by its client's documentation (`HfApi.upload_file`, 2.4)."""
PREVIEW_SECONDS = 10.0
"""How long a plan waits for an answer of the hub."""


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
        files = sorted(entry for entry in path.iterdir() if any(map(entry.match, (*MODEL_FILES, "*.txt"))))
        if special := [entry for entry in files if not entry.is_file() and not entry.is_dir()]:
            message = "is not a regular file, but a pipe, a device or a broken link"
            raise DataError([Problem("JOB_MODEL__ID", f"{entry} {message}") for entry in special[:3]])
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
    license_field = getattr(info.card_data, "license", None)
    licence = ", ".join(map(str, license_field)) if isinstance(license_field, list) else license_field
    return sum(file.size or 0 for file in info.siblings or []), str(licence) if licence else None
