"""Pushes a complete run to its targets: the one function that the job and `qlora-job push` share.

What is pushed are the adapter, its card and the exported formats, each file compared with the manifest on its way. A
run is pushed after its manifest is written, so that a target never holds what the store does not; the push is recorded
in the store, below `pushed/`. A restart pushes what is not recorded, and a target finds out what an earlier
attempt did before it was killed.

How to add a target:

1. Write `job/push/<name>.py` with a frozen dataclass that has the attributes and methods of `Target`. `push` must find
   what a killed push left, and must not make the content visible before all of it is there.
2. Give it settings in `Export` of `job/settings/schema.py`, make it in `targets`, and name it in `TARGETS`.

Settings check, plan, job and command follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from job import log
from job.common.hashing import sealed
from job.errors import JobError, combine
from job.push.files import PushContent, PushFile, files_to_push
from job.push.hub import HubTarget
from job.push.oci import OciTarget
from job.records import Pushed
from job.results.after_run import parse_push
from job.runs.layout import pushed_key
from job.runs.work_folder import folder_for
from job.settings.schema import Export
from job.storage.base import read_record
from job.storage.open import ObjectStore
from job.storage.verified_download import fetch_artifact

TARGETS = ("hub", "oci")
"""The names of all targets, as records and the settings have them."""


class Target(Protocol):
    """A place to push to.

    Attributes:
        kind: One of `TARGETS`.
        setting: The setting that names it.
        place: Where it is, in its own spelling.
    """

    @property
    def kind(self) -> str: ...  # noqa: D102 - see above

    @property
    def setting(self) -> str: ...  # noqa: D102 - see above

    @property
    def place(self) -> str: ...  # noqa: D102 - see above

    def check(self) -> str:
        """Asks whether a push would be allowed, and writes nothing; returns what was found, in words.

        Raises AccessDenied, SettingsError, Unreachable.
        """

    def require_answer(self) -> None:
        """Asks once, without retries, whether the place answers: a person waits. Raises SettingsError, Unreachable."""

    def changes(self, content: PushContent) -> Sequence[tuple[str, str, int]]:
        """What a push would change: (`new`, `changed`, `same` or `delete`, path in the target, bytes)."""

    def push(self, content: PushContent) -> str:
        """Pushes, unless it is there; returns what names this version for good: a commit, a digest."""


def targets(export: Export) -> tuple[Target, ...]:
    """The targets that the settings name."""
    configured: list[Target] = []
    if export.hub is not None:
        configured.append(HubTarget(export.hub, export.hub_revision, export.hub_private))
    if export.oci is not None:
        configured.append(OciTarget(export.oci, export.oci_plain_http))
    return tuple(configured)


def check_targets(push_targets: Sequence[Target]) -> dict[str, str]:
    """Asks every target whether a push would be allowed; returns what was found, by setting.

    Raises:
        AccessDenied, SettingsError, Unreachable: With what is wrong with all of them.
    """
    return _ask_all(push_targets, lambda target: target.check())


def require_answers(push_targets: Sequence[Target]) -> None:
    """Asks every target once whether it answers; takes seconds.

    Raises:
        SettingsError, Unreachable: With what is wrong with all of them.
    """
    _ask_all(push_targets, lambda target: target.require_answer())


def _ask_all(push_targets: Sequence[Target], ask: Callable[[Target], Any]) -> dict[str, Any]:
    """The answers by setting, or one error with the problems of all targets."""
    findings, errors = dict[str, Any](), list[tuple[str, JobError]]()
    for target in push_targets:
        try:
            findings[target.setting] = ask(target)
        except JobError as error:
            errors.append((target.setting, error))
    if errors:
        raise combine(errors)
    return findings


def push_run(
    store: ObjectStore,
    results: Mapping[str, Any],
    push_targets: Sequence[Target],
    *,
    cache: str | None = None,
    check_stop: Callable[[], None] = lambda: None,
    again: bool = False,
) -> list[Pushed]:
    """Pushes a complete run to each target, one after the other, and records it in the store.

    Args:
        store: The run's own.
        results: Its manifest.
        push_targets: Where to.
        cache: Where copies of the files are made; None for the system's folder for temporary files.
        check_stop: Called between files; may raise what ends the job.
        again: Also asks targets to which the store says that it has been pushed.

    Raises:
        JobError: As the target says, of all that failed; the others have been pushed to.
        DataError: A file in the store is not what the manifest says.
    """
    pushes, errors = [], list[tuple[str, JobError]]()
    for target in push_targets:
        with folder_for(f"push of {store.uri} to {target.place}", cache) as work:
            content = content_of(store, results, work, check_stop)
            earlier = recorded(store, target.kind, target.place)
            if earlier is not None and earlier.files_sha256 == content.sha256 and not again:
                log.get_logger().info(
                    "the run is already pushed", target=target.kind, place=target.place, id=earlier.id
                )
                pushes.append(earlier)
                continue
            log.get_logger().info(
                "pushing", target=target.kind, place=target.place, files=len(content.files), bytes=content.bytes
            )
            try:
                pushed = Pushed(target.kind, target.place, target.push(content), content.sha256)
            except JobError as error:
                errors.append((target.setting, error))
                continue
        if pushed != earlier:
            store.write(pushed_key(target.kind, target.place), sealed(asdict(pushed)))
        log.get_logger().info("pushed", target=target.kind, place=target.place, id=pushed.id)
        pushes.append(pushed)
    if errors:
        raise combine(errors)
    return pushes


def content_of(
    store: ObjectStore, results: Mapping[str, Any], work: Path, check_stop: Callable[[], None] = lambda: None
) -> PushContent:
    """What is pushed of a run; copies of its files are made below `work`."""

    def fetch(file: PushFile, folder: Path) -> Path:
        check_stop()
        return fetch_artifact(store, file.artifact, folder)

    return PushContent(results["run"]["id"], files_to_push(results), fetch, check_stop, work)


def recorded(store: ObjectStore, kind: str, place: str) -> Pushed | None:
    """The record of an earlier push to this place; None if there is none that can be read."""
    stored = read_record(store, pushed_key(kind, place))
    try:
        return None if stored is None else parse_push(stored.data)
    except (ValueError, TypeError):
        return None
