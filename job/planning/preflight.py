"""Checks before a GPU is paid for: how one is made without stopping the others, and the round trip to the storage."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from uuid import uuid4

from job.errors import JobError, Unreachable
from job.storage.local import LocalStore
from job.storage.open import ObjectStore

State = Literal["ok", "note", "not checked", "wrong"]
T = TypeVar("T")


class NotChecked(Exception):
    """Something could not be looked at, which says nothing about it."""


@dataclass(frozen=True)
class Check:
    """What was found out about one thing; `error` is what the job would end with."""

    name: str
    state: State
    what: str
    error: JobError | None = None


Found = tuple[State, str, T]
"""What a check comes to, what to say of it, and what was found."""


def check(name: str, work: Callable[[], Found[T]], *, unreachable: State = "not checked") -> tuple[Check, T | None]:
    """Does one check, and catches what it ends with, so that the others are made all the same.

    Args:
        name: What is looked at.
        work: Looks at it.
        unreachable: What it means that somebody did not answer: this machine's network may not be that of the job.
    """
    try:
        state, what, found = work()
    except NotChecked as reason:
        return Check(name, "not checked", str(reason)), None
    except Unreachable as error:
        return Check(name, unreachable, str(error), error if unreachable == "wrong" else None), None
    except JobError as error:
        return Check(name, "wrong", str(error), error), None
    return Check(name, state, what), found


def round_trip(store: ObjectStore, name: str) -> Found[float]:
    """Writes, reads, lists and deletes an object, and tries conditional writes; finds the seconds it took.

    Args:
        store: The store.
        name: What to call it.

    Raises:
        JobError: The store does not do what the job asks of it.
    """
    key, content = f".plan-{uuid4().hex}", uuid4().bytes
    began = time.monotonic()
    try:
        store.write(key, content)
        stored = store.read(key)
        listed = [info.key for info in store.list(key)]
    finally:
        store.delete(key)
    if stored is None or stored.data != content or listed != [key] or store.read(key) is not None:
        raise Unreachable(f"{name}: what was written was not read, listed and deleted as it was written")
    conditional = store.conditional_writes()
    seconds = time.monotonic() - began
    what = f"{name}: wrote, read, listed and deleted"
    if conditional:
        return "ok", f"{what}; conditional writes are honoured", seconds
    return "note", f"{what}; no conditional writes: attempts that begin together may both go on for a while", seconds


def local_round_trip(output: Path, name: str) -> Found[float]:
    """`round_trip` in a folder of its own below a local output, which is taken away again, and so is what it made."""
    root = output / f".plan-{uuid4().hex}"
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        return round_trip(LocalStore(root), name)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        with suppress(OSError):
            for folder in made[1:]:
                folder.rmdir()  # only an empty one: somebody else may use it by now
