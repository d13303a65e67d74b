"""Rehearsing failure: `JOB_FAULT` names what goes wrong and when, each once in the life of a run.

    sigterm@step=37                 the signal, after optimizer step 37; also upload=N, stage=NAME
    kill@upload=3                   as if the power went, before the third upload of an attempt; also step=N, stage=NAME
    s3_503@2                        the second request of an attempt to the store fails as if after all retries
    corrupt@checkpoint=latest       a flipped bit in the newest checkpoint, before the next attempt restores it

A fault is noted in the store before it fires: a killed attempt must not find it again at the same step, for ever.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from job import log
from job.checkpoints import commit_marker, manager
from job.errors import Problem, SettingsError, Unreachable
from job.storage.base import MAX_READ_BYTES, ObjectInfo, ObjectStore, Stored

STAGES = ("pull", "evaluate-base", "train", "evaluate-adapter", "publish")
KNOWN = (
    "sigterm@step=N, sigterm@upload=N, sigterm@stage=NAME, kill@step=N, kill@upload=N, kill@stage=NAME, s3_503@N, "
    f"corrupt@checkpoint=latest; N counts from 1, NAME is one of {', '.join(STAGES)}"
)
_FAULT = re.compile(
    r"(?P<signal>sigterm|kill)@(?P<event>step|upload|stage)=(?P<when>[a-z0-9-]+)"
    r"|s3_503@(?P<request>[1-9][0-9]{0,8})|corrupt@checkpoint=latest"
)
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Fault:
    """What goes wrong (`sigterm`, `kill`, `s3_503`, `corrupt`) at which event: its kind, and its number or name."""

    text: str
    action: str
    event: str
    when: int | str


def parse(text: str) -> tuple[Fault, ...]:
    """Reads `JOB_FAULT`: faults separated by commas; empty for none.

    Raises:
        SettingsError: With every fault that is unknown or named twice, and the known ones.
    """
    words = [word for part in text.split(",") if (word := part.strip())]
    faults = {word: _parse_one(word) for word in words}
    problems = [Problem("JOB_FAULT", f"{word!r} is unknown; known are {KNOWN}") for word in faults if not faults[word]]
    problems += [
        Problem("JOB_FAULT", f"{word!r} is named twice; each fires once") for word in faults if words.count(word) > 1
    ]
    if problems:
        raise SettingsError(problems)
    return tuple(fault for fault in faults.values() if fault)


def _parse_one(word: str) -> Fault | None:
    match = _FAULT.fullmatch(word)
    if match is None:
        return None
    if match["request"]:
        return Fault(word, "s3_503", "request", int(match["request"]))
    if not match["signal"]:
        return Fault(word, "corrupt", "checkpoint", "latest")
    if match["event"] == "stage":
        return Fault(word, match["signal"], "stage", match["when"]) if match["when"] in STAGES else None
    return (
        Fault(word, match["signal"], match["event"], int(match["when"])) if _NUMBER.fullmatch(match["when"]) else None
    )


class Faults:
    """The faults that have not fired yet. Stages and the store tell it what happens; it makes it go wrong."""

    def __init__(self, faults: tuple[Fault, ...], store: ObjectStore) -> None:
        self._armed = list(faults)
        self._store = store
        self._lock = Lock()

    def __bool__(self) -> bool:
        return bool(self._armed)

    def at(self, event: str, when: int | str) -> None:
        """Fires what is due.

        Args:
            event: `step`, after an optimizer step; `stage`, when one begins; `upload`, `request` and `checkpoint` are
                told by the store that `faulty` returns.
            when: Its number, from 1, or its name.

        Raises:
            Unreachable: The fault is a request that fails.
        """
        for fault in self._due(event, when):
            self._store.write(_key(fault), b"fired\n")
            log.get_logger().warning("JOB_FAULT fires", fault=fault.text)
            _fire(fault, self._store)

    def _due(self, event: str, when: int | str) -> list[Fault]:
        with self._lock:  # uploads have a thread of their own
            due = [fault for fault in self._armed if (fault.event, fault.when) == (event, when)]
            self._armed = [fault for fault in self._armed if fault not in due]
            return due


def arm(faults: tuple[Fault, ...], store: ObjectStore) -> Faults:
    """Arms, loudly, what no earlier attempt of the run has fired; `store` is the run's. Without faults asks nothing."""
    fired = {info.key for info in store.list("faults/")} if faults else set()
    left = tuple(fault for fault in faults if _key(fault) not in fired)
    for fault in faults:
        what = "JOB_FAULT is armed: this run is going to fail" if fault in left else "JOB_FAULT has fired already"
        log.get_logger().warning(what, fault=fault.text)
    return Faults(left, store)


def faulty(store: ObjectStore, faults: Faults) -> ObjectStore:
    """The store with the armed faults in its way; the store itself where none is armed.

    A checkpoint that is to be corrupted is corrupted here, before anybody can restore it; where there is none yet, the
    fault waits for the next attempt.
    """
    if not faults:
        return store
    if _newest_marker(store):
        faults.at("checkpoint", "latest")
    return _FaultyStore(store, faults)


class _FaultyStore:
    """An `ObjectStore` that tells `Faults` of every upload and every request before it passes them on."""

    def __init__(self, store: ObjectStore, faults: Faults) -> None:
        self._store, self._faults = store, faults
        self._counts = {"request": 0, "upload": 0}
        self._lock = Lock()
        self.uri = store.uri

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> Stored | None:
        """See `ObjectStore.read`."""
        self._count("request")
        return self._store.read(key, max_bytes=max_bytes)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`."""
        self._count("request")
        return self._store.write(key, data, if_absent=if_absent, if_tag=if_tag)

    def upload(self, path: Path, key: str) -> None:
        """See `ObjectStore.upload`."""
        self._count("request")
        self._count("upload")
        self._store.upload(path, key)

    def download(self, key: str, path: Path, *, max_bytes: int | None = None) -> None:
        """See `ObjectStore.download`."""
        self._count("request")
        self._store.download(key, path, max_bytes=max_bytes)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        self._count("request")
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self._count("request")
        self._store.delete(key)

    def conditional_writes(self) -> bool:
        """See `ObjectStore.conditional_writes`."""
        self._count("request")
        return self._store.conditional_writes()

    def _count(self, event: str) -> None:
        with self._lock:
            self._counts[event] += 1
            number = self._counts[event]
        self._faults.at(event, number)


def _fire(fault: Fault, store: ObjectStore) -> None:
    if fault.action == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        os._exit(128 + signal.SIGKILL)  # a container's first process survives its own SIGKILL
    elif fault.action == "s3_503":
        raise Unreachable(f"{store.uri}: 503 Slow Down, after all retries (injected by JOB_FAULT: {fault.text})")
    else:
        _flip_a_bit(store)


def _flip_a_bit(store: ObjectStore) -> None:
    """Damages the smallest file of the newest checkpoint: to the hash in the marker they are all alike."""
    marker = _newest_marker(store)
    if marker is None:
        return
    sizes = {name: file.bytes for name, file in marker.files.items() if file.bytes}
    name = min(sizes, key=sizes.__getitem__)
    key = commit_marker.files_prefix(marker) + name
    if stored := store.read(key, max_bytes=sizes[name]):
        data = bytearray(stored.data)
        data[len(data) // 2] ^= 1
        store.write(key, bytes(data))
        log.get_logger().warning("JOB_FAULT flipped a bit", object=f"{store.uri}/{key}")


def _newest_marker(store: ObjectStore) -> commit_marker.Marker | None:
    """The newest checkpoint that could be restored; None if there is none."""
    for step in manager.steps(store):
        stored = store.read(commit_marker.step_prefix(step) + commit_marker.NAME)
        with contextlib.suppress(ValueError):  # it is damaged already
            return commit_marker.parse(stored.data) if stored else None
    return None


def _key(fault: Fault) -> str:
    return f"faults/{fault.text}"
