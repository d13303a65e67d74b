"""Durable checkpoints: a checkpoint exists when its commit marker does, and is used only when every byte is right.

    checkpoints/step-00000040/<files>          first
    checkpoints/step-00000040/COMMITTED.json   last: sizes and SHA-256 of the files, step, epoch, software

Restoring walks back from the newest marker to the first checkpoint that is whole. Only a confirmed absence is absence:
an error of the store passes through, because it must never mean "start from zero".
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.log import get_logger
from job.objects import ObjectStore, TooLarge, check_key

MARKER = "COMMITTED.json"
FOLDER = re.compile(r"checkpoints/step-(\d{8})/")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Marker(BaseModel):
    """The content of a commit marker. `epoch` is the lease's: which attempt wrote it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    world_size: int = Field(ge=1)
    software: dict[str, str]
    files: dict[str, _File]


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint on the local disk. `skipped` names newer ones that were not whole, and why."""

    folder: Path
    step: int
    skipped: tuple[str, ...]


def publish(
    store: ObjectStore, folder: Path, *, step: int, epoch: int, world_size: int, software: Mapping[str, str]
) -> None:
    """Uploads the files of `folder`, then the marker."""
    prefix = f"checkpoints/step-{step:08d}"
    # An older marker would vouch for files that are about to be replaced.
    store.delete(f"{prefix}/{MARKER}")
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = _File(bytes=path.stat().st_size, sha256=hash_file(path))
        store.upload(path, f"{prefix}/{path.name}")
    marker = Marker(step=step, epoch=epoch, world_size=world_size, software=dict(software), files=files)
    store.write(f"{prefix}/{MARKER}", marker.model_dump_json(indent=2).encode())


def steps(store: ObjectStore) -> list[int]:
    """Steps of the checkpoints that have a marker, newest first."""
    keys = [info.key for info in store.list("checkpoints/") if info.key.endswith(f"/{MARKER}")]
    return sorted((int(match[1]) for key in keys if (match := FOLDER.match(key))), reverse=True)


def restore(store: ObjectStore, folder: Path, software: Mapping[str, str]) -> Restored | None:
    """Downloads the newest checkpoint that is whole; None if there is none at all.

    Args:
        store: The run's.
        folder: Where to put it; it gets a folder of its own in there.
        software: Versions of this process. A checkpoint of others is used, and the difference is logged: the run goes
            on, but is no longer bit-identical to one that was never interrupted.
    """
    skipped: list[str] = []
    for step in steps(store):
        target = folder / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        try:
            marker = _fetch_whole(store, step, target)
        except _NotWhole as error:
            skipped.append(f"step {step}: {error}")
            get_logger().warning("checkpoint is not whole, going back to an older one", step=step, why=str(error))
            continue
        if changed := sorted(k for k in software if marker.software.get(k) != software[k]):
            get_logger().warning("checkpoint is of other software versions", changed=changed)
        return Restored(target, step, tuple(skipped))
    return None


def prune(store: ObjectStore, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, each marker before its files."""
    for step in steps(store)[keep:]:
        prefix = f"checkpoints/step-{step:08d}/"
        store.delete(prefix + MARKER)
        for info in list(store.list(prefix)):
            store.delete(info.key)


class _NotWhole(Exception):
    """Why a checkpoint cannot be used."""


def _fetch_whole(store: ObjectStore, step: int, target: Path) -> Marker:
    """Downloads into a folder beside `target`, verifies every byte, and only then gives it its name."""
    prefix = f"checkpoints/step-{step:08d}"
    marker = _read_marker(store, f"{prefix}/{MARKER}", step)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, file in marker.files.items():
        try:
            store.download(f"{prefix}/{name}", partial / name, max_bytes=file.bytes)
        except FileNotFoundError:
            raise _NotWhole(f"{name} is missing") from None
        except TooLarge:
            raise _NotWhole(f"{name} is larger than the marker says") from None
        if (size := (partial / name).stat().st_size) != file.bytes:
            raise _NotWhole(f"{name} has {size} bytes, the marker says {file.bytes}")
        if hash_file(partial / name) != file.sha256:
            raise _NotWhole(f"{name} has another SHA-256 than the marker says")
    partial.replace(target)
    return marker


def _read_marker(store: ObjectStore, key: str, step: int) -> Marker:
    """Parses a marker as hostile input: its names must stay in the folder, its sizes are checked on download."""
    stored = store.read(key)
    if stored is None:
        raise _NotWhole("the marker is missing")
    try:
        marker = Marker.model_validate_json(stored.data)
    except ValidationError as error:
        raise _NotWhole(f"the marker is malformed: {error.errors()[0]['msg']}") from None
    if marker.step != step:
        raise _NotWhole(f"the marker is of step {marker.step}")
    if any("/" in name or name.startswith(".") or check_or_none(name) is None for name in marker.files):
        raise _NotWhole("the marker names a file outside its folder")
    return marker


def check_or_none(name: str) -> str | None:
    """The name if a store can have it as a key, else None."""
    try:
        return check_key(name)
    except ValueError:
        return None


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_facts(path: Path) -> str:
    """SHA-256 of a file of JSON lines without their `measured` part, which no two runs share."""
    total = hashlib.sha256()
    for line in path.read_text(encoding="utf-8").splitlines():
        facts: dict[str, Any] = json.loads(line)
        facts.pop("measured", None)
        total.update(json.dumps(facts, sort_keys=True).encode() + b"\n")
    return total.hexdigest()
