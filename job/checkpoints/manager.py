"""Durable checkpoints: a checkpoint exists when its commit marker does, and is used only when every byte is right.

    checkpoints/step-00000040/0003/<files>     first, in a folder of the attempt's own: 0003 is its epoch
    checkpoints/step-00000040/COMMITTED.json   last: sizes and SHA-256 of the files, step, epoch, software

No attempt writes a file where another one does, so a late request of an attempt that was replaced can damage nothing.
Restoring walks back from the newest marker to the first checkpoint that is whole. Only a confirmed absence is absence:
an error of the store passes through, because it must never mean "start from zero".

Hashes and the marker's seal find accidents. They are no signature: who can write to the bucket can write a whole
checkpoint of his own, and then the most he gets is wrong numbers; no byte of it is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from job.checkpoints import commit_marker
from job.checkpoints.download import NotWhole, download
from job.common.hashing import hash_facts, hash_file
from job.log import get_logger
from job.storage.open import ObjectStore, is_key

__all__ = ["Restored", "Skipped", "hash_facts", "hash_file", "prune", "publish", "restore", "steps"]

_KEY = re.compile(r"checkpoints/step-(\d{8}|[1-9]\d{8,17})/(.+)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be used, and why."""

    step: int
    why: str


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint on the local disk, or none: then `folder` is None and `step` is 0.

    `skipped` are the newer ones that were not whole, newest first.
    """

    folder: Path | None
    step: int
    skipped: tuple[Skipped, ...]


def publish(
    store: ObjectStore, folder: Path, *, step: int, epoch: int, world_size: int, software: Mapping[str, str]
) -> None:
    """Uploads the files of `folder`, then the marker. An attempt (`epoch`) publishes a step once."""
    paths = sorted(folder.iterdir())
    files = {path.name: commit_marker.MarkedFile(bytes=path.stat().st_size, sha256=hash_file(path)) for path in paths}
    marker = commit_marker.Marker(step=step, epoch=epoch, world_size=world_size, software=dict(software), files=files)
    for path in paths:
        store.upload(path, commit_marker.files_prefix(marker) + path.name)
    store.write(commit_marker.step_prefix(step) + commit_marker.NAME, commit_marker.render(marker))


def steps(store: ObjectStore) -> list[int]:
    """Steps of the checkpoints that have a marker, newest first."""
    return [step for step, names in _names(store).items() if commit_marker.NAME in names]


def restore(
    store: ObjectStore,
    folder: Path,
    software: Mapping[str, str],
    check: Callable[[Path, int], None] = lambda _folder, _step: None,
    world_size: int = 1,
) -> Restored:
    """Downloads the newest checkpoint that is whole.

    Args:
        store: The run's.
        folder: Where to put it; it gets a folder of its own in there.
        software: Versions of this process. A checkpoint of others is used, and the difference is logged: the run goes
            on, but is no longer bit-identical to one that was never interrupted.
        check: Looks into a folder whose bytes are right, given its step; raises ValueError if it cannot be used.
        world_size: Number of processes now; that another number wrote a checkpoint is logged as well.

    Raises:
        JobError: Whatever the store says, apart from absence; or the disk is too small.
    """
    skipped: list[Skipped] = []
    for step in steps(store):
        try:
            target, marker = download(store, step, folder, check)
        except NotWhole as error:
            skipped.append(Skipped(step, str(error)))
            get_logger().warning("checkpoint is not whole, going back to an older one", step=step, why=str(error))
            continue
        if changed := sorted(k for k in software if marker.software.get(k) != software[k]):
            get_logger().warning("checkpoint is of other software versions", changed=changed)
        if marker.world_size != world_size:
            what = "checkpoint is of another number of processes: the same examples a step, not the same bits"
            get_logger().warning(what, processes=world_size, before=marker.world_size)
        return Restored(target, step, tuple(skipped))
    if skipped:
        get_logger().error("no checkpoint is whole, training begins again", skipped=[s.step for s in skipped])
    return Restored(None, 0, tuple(skipped))


def prune(store: ObjectStore, keep: int, *, own: Collection[int], verified: int, fresh: Collection[int] = ()) -> None:
    """Deletes all but the newest `keep` checkpoints that are fit for use, each marker before its files.

    Args:
        store: The run's.
        keep: How many to keep, at least 1.
        own: Steps that this attempt committed: they are fit.
        verified: Step that this attempt restored, 0 if none. Up to it checkpoints are fit; those after it that are not
            of this attempt were not whole when it began, or come late from one that was replaced.
        fresh: Steps too new for an older one to be deleted in their favour, as long as a copy of the folder may not
            have them yet. They are kept, and do not count.
    """
    found = _names(store)
    fit = [step for step, names in found.items() if commit_marker.NAME in names and (step <= verified or step in own)]
    kept = {*[step for step in fit if step not in fresh][: max(keep, 1)], *(step for step in fit if step in fresh)}
    for step, names in found.items():
        # Without a single one that is fit, the rest is evidence.
        if kept and step not in kept:
            for name in sorted(names, key=lambda name: name != commit_marker.NAME):
                store.delete(commit_marker.step_prefix(step) + name)


def _names(store: ObjectStore) -> dict[int, list[str]]:
    """Names of what lies in every step's folder, newest step first."""
    found: dict[int, list[str]] = {}
    for info in store.list("checkpoints/"):
        if (match := _KEY.fullmatch(info.key)) and is_key(info.key):
            found.setdefault(int(match[1]), []).append(match[2])
    return dict(sorted(found.items(), reverse=True))
