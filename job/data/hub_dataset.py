"""Rows of a data set on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

from job.common.threads import in_thread
from job.data.files import has_known_suffix
from job.data.formats import Row, Rows
from job.errors import Unreachable
from job.storage.hub_errors import hub_errors

_LOOK_SECONDS = 0.5
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_hub_dataset(source: str, revision: str | None) -> None:
    """Asks the hub whether a data set has the revision, if the source is one of the hub; nothing is fetched.

    Raises:
        Unreachable, AccessDenied, DataError: As `open_dataset`.
    """
    if is_hub_id(source):
        resolve_dataset(source, revision)


def resolve_dataset(source: str, revision: str | None) -> str:
    """The commit of a data set's revision.

    Raises:
        Unreachable, AccessDenied, DataError: As `open_dataset`.
    """
    from huggingface_hub import HfApi

    with hub_errors(f"data set {source}"):
        return str(HfApi().resolve_revision(source, repo_type="dataset", revision=revision).resolved)


def is_hub_id(source: str) -> bool:
    """Whether a source that is no URI means a data set of the hub: it looks like an id, and is no file here."""
    return bool(_HUB_ID.fullmatch(source)) and not has_known_suffix(source) and not Path(source).exists()


def open_dataset(
    source: str, revision: str, split: str, name: str, check_stop: Callable[[], None] = lambda: None
) -> tuple[str, Rows]:
    """A hub data set at a pinned revision. Code that a data set ships is never run.

    Args:
        source: Hub id, `[namespace/]name`.
        revision: Commit, tag or branch.
        split: Such as `train`, or a slice of it: `train[:1000]`.
        name: What to call the data set in messages.
        check_stop: Called about twice a second while the data set is fetched; an exception from it ends the wait.

    Returns:
        The commit that the revision resolved to, and the rows of the split in order.

    Raises:
        Unreachable: The hub did not answer.
        AccessDenied: The data set is gated, private, or does not exist for these credentials.
        DataError: No such data set, revision or split, or its files cannot be read.
    """
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi

    with hub_errors(f"data set {name}"):
        commit = HfApi().resolve_revision(source, repo_type="dataset", revision=revision).resolved
        builder = load_dataset_builder(source, revision=commit)
        # If the hub does not answer, `datasets` would use any revision in its cache.
        if builder.hash != commit:
            raise Unreachable(f"data set {name}: the hub did not answer, and the cache holds another revision")
        _wait(in_thread(builder.download_and_prepare, "data set"), check_stop)
        rows = builder.as_dataset(split=split)
    return commit, (Row(f"{name}:row {number}", fields) for number, fields in enumerate(rows, 1))


def _wait(future: Future[None], check_stop: Callable[[], None]) -> None:
    """Waits for a call that takes minutes with a large data set."""
    while not wait([future], _LOOK_SECONDS).done:
        check_stop()
    future.result()
