"""Injected faults: `JOB_FAULT` names what goes wrong and when, each once in the life of a run.

    sigterm@step=37                 the signal, after optimizer step 37, when its metrics are read (on a GPU the
                                    next step is launched then); also upload=N, stage=NAME, validation=N
    kill@upload=3                   SIGKILL, before the third upload of an attempt; also step, stage and validation
    s3_503@2                        the second request of an attempt to the store fails as if after all retries
    corrupt@checkpoint=latest       a flipped bit in the newest checkpoint, before the next attempt restores it

A fault is recorded in the store before it fires; otherwise every later attempt would be killed at the same step.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock

from job import log
from job.common.hashing import unsealed
from job.errors import Problem, SettingsError, Unreachable
from job.runs import layout
from job.runs.layout import Stage
from job.storage.base import ForwardingStore, ObjectStore

KNOWN = (
    "sigterm@step=N, sigterm@upload=N, sigterm@stage=NAME, sigterm@validation=N (after the validation of step N), "
    "the same with kill, s3_503@N, "
    f"corrupt@checkpoint=latest; N counts from 1, NAME is one of {', '.join(Stage)}"
)
_FAULT = re.compile(
    r"(?P<signal>sigterm|kill)@(?P<event>step|upload|stage|validation)=(?P<when>[a-z0-9-]+)"
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
        return Fault(word, match["signal"], "stage", match["when"]) if match["when"] in set(Stage) else None
    return (
        Fault(word, match["signal"], match["event"], int(match["when"])) if _NUMBER.fullmatch(match["when"]) else None
    )


class Faults:
    """Faults that have not fired yet. Stages and the store call `at` with every event; the faults due there fire."""

    def __init__(self, faults: tuple[Fault, ...], store: ObjectStore) -> None:
        self._armed = list(faults)
        self._store = store
        self._lock, self._firing = Lock(), Lock()

    def __bool__(self) -> bool:
        return bool(self._armed)

    def at(self, event: str, when: int | str) -> None:
        """Fires what is due.

        Args:
            event: `step`, after an optimizer step; `validation`, after that of a step; `stage`, when one begins;
                `upload`, `request` and `checkpoint` come from the store that `faulty` returns.
            when: Its number, from 1, or its name.

        Raises:
            Unreachable: The fault is a request that fails.
        """
        for fault in self._due(event, when):
            with self._firing:  # else one kill could end the process when two are recorded
                self._store.write(layout.fault_key(fault.text), b"fired\n")
                log.get_logger().warning("JOB_FAULT fires", fault=fault.text)
                _fire(fault, self._store)

    def _due(self, event: str, when: int | str) -> list[Fault]:
        with self._lock:  # uploads run in a separate thread
            due = [fault for fault in self._armed if (fault.event, fault.when) == (event, when)]
            self._armed = [fault for fault in self._armed if fault not in due]
            return due


def arm(faults: tuple[Fault, ...], store: ObjectStore) -> Faults:
    """Arms the faults that no earlier attempt of the run has fired, and logs a warning; `store` is the run's."""
    fired = {info.key for info in store.list(layout.FAULTS)} if faults else set()
    left = tuple(fault for fault in faults if layout.fault_key(fault.text) not in fired)
    for fault in faults:
        what = "JOB_FAULT is armed: this run will fail" if fault in left else "JOB_FAULT has fired already"
        log.get_logger().warning(what, fault=fault.text)
    return Faults(left, store)


def faulty(store: ObjectStore, faults: Faults) -> ObjectStore:
    """A store whose requests fire the armed faults; the store itself where none is armed.

    The checkpoint to corrupt is corrupted here, before an attempt can restore it; where there is none yet, the
    fault waits for the next attempt.
    """
    if not faults:
        return store
    if _newest_checkpoint(store):
        faults.at("checkpoint", "latest")
    return _FaultyStore(store, faults)


class _FaultyStore(ForwardingStore):
    """Numbers every request and every upload, and fires the faults that are due at it, before handing it on."""

    def __init__(self, store: ObjectStore, faults: Faults) -> None:
        super().__init__(store)
        self._faults = faults
        self._counts = {"request": 0, "upload": 0}
        self._lock = Lock()

    @contextlib.contextmanager
    def around(self, verb: str, key: str) -> Iterator[None]:  # noqa: ARG002 - all keys alike
        """Counts the request, and the upload that it may be."""
        self._count("request")
        if verb == "upload":
            self._count("upload")
        yield

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
    """Flips one bit in the smallest file of the newest checkpoint; the marker's hashes cover all files alike."""
    sizes = {key: size for key, size in _newest_checkpoint(store).items() if size}
    if not sizes:
        return
    key = min(sizes, key=sizes.__getitem__)
    if stored := store.read(key, max_bytes=sizes[key]):
        data = bytearray(stored.data)
        data[len(data) // 2] ^= 1
        store.write(key, bytes(data))
        log.get_logger().warning("JOB_FAULT flipped a bit", object=f"{store.uri}/{key}")


def _newest_checkpoint(store: ObjectStore) -> dict[str, int]:
    """Bytes by key of the files of the newest checkpoint whose marker is whole; empty if there is none."""
    parts = [layout.checkpoint_part(info.key) for info in store.list(layout.CHECKPOINTS)]
    for step in sorted((part[0] for part in parts if part and part[1] == layout.COMMITTED), reverse=True):
        stored = store.read(layout.marker_key(step))
        with contextlib.suppress(ValueError, KeyError, TypeError):  # it is damaged already
            if stored is not None:
                marker = unsealed(stored.data)
                folder = layout.checkpoint_folder(step, marker["epoch"])
                return {folder + name: file["bytes"] for name, file in marker["files"].items()}
    return {}
