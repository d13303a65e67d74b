"""One writer: the run's lease, which each attempt takes over from the one before.

`lease.json` names the attempt that owns the run. Every attempt that starts takes it over, with the next epoch: it was
started because the attempt before has ended, or to replace it. So the newest attempt wins. A lease has no expiry time,
because the clock of a machine that was suspended is wrong.

If the store has conditional writes, exactly one of several attempts that start together continues, and a replaced
attempt notices that before its next change of the store. No object store can prevent that a request which was sent
before the lease changed hands arrives after it. That concerns one object for each thread. It gets the same bytes that
the new holder would write, or no other attempt uses it (see `checkpoints`: no attempt writes where another one does).

The fence (`fenced`) is a store that asks the lease before every change, so that no stage has to remember to ask.

If the store has no conditional writes, two attempts that start at the same moment may both continue until the one that
wrote first finds the other's name in the lease, before its next change of the store. The log reports it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from job.common.formatting import timestamp
from job.common.hashing import sealed, unsealed
from job.common.validation import first_error
from job.errors import DataError, JobError, Problem, Replaced, SettingsError, Unreachable
from job.log import get_logger
from job.runs.layout import ATTEMPTS, LEASE, attempt_number
from job.storage.base import CHANGES, ForwardingStore
from job.storage.open import Conflict, ObjectStore, TooLarge

MAX_BYTES = 16 * 1024
MAX_EPOCH = 10**9 - 1
"""Nine digits are what the names of attempts and of their folders have; the next attempt has one more."""
_PAUSES = (0.1, 0.4, 1.0)
"""Seconds before a lease that cannot be read is read again: an answer may have been cut on its way."""
SEEN_SECONDS = 60.0
"""Seconds after which a machine of a network file system sees what another one has written: NFS caches folders for
this time (`acdirmax`)."""
# A holder renews its lease a few times a minute, so that a conflict with it hardly ever happens twice in a row.
_TRIES = 20


class LeaseRecord(BaseModel):
    """The content of `lease.json`, without its seal.

    `heartbeat` counts the holder's renewals; it makes every content unique to its writer.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    epoch: int = Field(ge=1, lt=MAX_EPOCH)
    holder: str
    started: str
    heartbeat: int = Field(ge=0)

    def same_holder(self, other: LeaseRecord | None) -> bool:
        """Whether both are of one attempt."""
        return other is not None and (self.epoch, self.holder) == (other.epoch, other.holder)


class Lease:
    """The lease as its holder sees it. Safe to use from any thread; once lost, it stays lost."""

    def __init__(self, store: ObjectStore, record: LeaseRecord, tag: str, *, conditional: bool) -> None:
        self._store = store
        self._record = record
        self._tag = tag
        self._conditional = conditional
        self._lost: str | None = None
        self._lock = Lock()

    @property
    def epoch(self) -> int:
        """Number of this attempt in the life of the run, from 1."""
        return self._record.epoch

    @property
    def conditional(self) -> bool:
        """Whether the store has conditional writes."""
        return self._conditional

    @property
    def holder(self) -> str:
        """Unique name of this attempt."""
        return self._record.holder

    def confirm(self) -> None:
        """Proves, by a conditional write, that this attempt still owns the run.

        Raises:
            Replaced: It does not, and never will again.
            Unreachable: The store does not answer, or the lease is gone, damaged or cannot be renewed.
        """
        if not self._conditional:
            # A heartbeat written blindly could overwrite the name of the attempt that took over.
            self.check()
            return
        with self._lock:
            for _ in range(_TRIES):
                self._raise_if_lost()
                record = self._record.model_copy(update={"heartbeat": self._record.heartbeat + 1})
                try:
                    self._tag = self._store.write(LEASE, _render(record), if_tag=self._tag)
                except Conflict:
                    # Another attempt, or a heartbeat of our own that arrived although its answer did not.
                    self._look()
                else:
                    self._record = record
                    return
            raise Unreachable(
                f"{self._store.uri}/{LEASE} could not be renewed in {_TRIES} tries; the next attempt resumes the run"
            )

    def check(self) -> None:
        """Like `confirm`, but only reads: cheaper, but the lease may be lost right after the answer.

        Raises:
            Replaced: This attempt does not own the run any more.
            Unreachable: The store does not answer, or the lease is gone or damaged.
        """
        with self._lock:
            self._raise_if_lost()
            self._look()
            self._raise_if_lost()

    def _look(self) -> None:
        """Reads who holds the lease now. Only a valid lease that names another attempt means that this one is replaced.

        Raises:
            Unreachable: No valid lease could be read in several tries.
        """
        try:
            now, tag = _read_again(self._store)
        except ValueError as error:
            what = f"this attempt's lease cannot be read ({first_error(error)}); the next attempt resumes the run"
            raise Unreachable(f"{self._store.uri}/{LEASE}: {what}") from None
        if now is None:
            raise Unreachable(f"{self._store.uri}/{LEASE} was removed; the next attempt resumes the run")
        if self._record.same_holder(now):
            self._record, self._tag = now, tag
        else:
            self._lost = f"attempt {now.epoch} ({now.holder}, since {now.started}) took over"

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise Replaced(f"attempt {self.epoch} of {self._store.uri} ends and publishes nothing more: {self._lost}")


def take(store: ObjectStore, holder: str, after: int = 0) -> Lease:
    """Takes the run over from the attempt that held it before, if any.

    Args:
        store: The run's store.
        holder: Name of this attempt for people, such as the host's; it is made unique here.
        after: Smaller than the attempt's number: that many attempts are of another run.

    Raises:
        Replaced: Another attempt started at the same time, and was faster.
        DataError: `lease.json` is not a lease.
        Unreachable: The store does not answer, or the holder before renews too fast.
    """
    conditional = store.conditional_writes()
    if not conditional:
        get_logger().warning(
            "this store has no conditional writes: if two attempts of this run start at the same time, both may "
            "publish until one of them notices; let your scheduler run one attempt at a time",
            store=store.uri,
        )
    own_holder = f"{holder}/{uuid4().hex}"
    before, tag = _read_or_refuse(store)
    # If the lease was removed, numbers continue after the attempts in the run log.
    first = 1 + max([after, *attempt_numbers(store)] if before is None else [after])
    for _ in range(_TRIES):
        epoch = max(before.epoch + 1, first) if before else first
        record = LeaseRecord(epoch=epoch, holder=own_holder, started=timestamp(to="seconds"), heartbeat=0)
        try:
            if conditional:
                own_tag = store.write(LEASE, _render(record), if_absent=before is None, if_tag=tag or None)
            else:
                own_tag = store.write(LEASE, _render(record))
        except Conflict:
            stored, tag = _read_or_refuse(store)
            if record.same_holder(stored):
                own_tag = tag  # our own write, whose answer was lost
            elif before is not None and before.same_holder(stored):
                before = stored  # the one before is alive and renewed its lease in between
                continue
            else:
                winner = (
                    f"attempt {stored.epoch} ({stored.holder})"
                    if stored
                    else "another process, which removed the lease"
                )
                raise Replaced(f"{store.uri}: {winner} started at the same time and took the run's lease") from None
        get_logger().info("this attempt owns the run", attempt=record.epoch, replaces=before and before.holder)
        return Lease(store, record, own_tag, conditional=conditional)
    raise Unreachable(
        f"{store.uri}/{LEASE}: another attempt renews its lease faster than it can be taken over; end "
        "that attempt, or try again"
    )


def check_same_store(
    store: ObjectStore, holder: str, check_stop: Callable[[], None], seconds: float = SEEN_SECONDS
) -> None:
    """Checks, on a machine that does not hold the lease, that it sees the lease of the one that does.

    A machine whose JOB_RUN__OUTPUT is a local folder would find no checkpoint when the run resumes, and wait for
    the others without end.

    Args:
        store: The run's store, as this machine sees it.
        holder: `Lease.holder` on the machine that holds it.
        check_stop: Called between two looks.
        seconds: How long to look: a network file system may show a new file late.

    Raises:
        SettingsError: The lease here is another one.
        Unreachable: The store does not answer.
    """
    deadline = time.monotonic() + seconds
    while True:
        with suppress(ValueError):  # is being replaced
            record, _ = _read(store)
            if record is not None and record.holder == holder:
                return
        if time.monotonic() >= deadline:
            what = f"is {store.uri}, where this machine does not see the files that machine 0 has written there"
            fix = "give all machines the same bucket, or a folder that they share"
            raise SettingsError([Problem("JOB_RUN__OUTPUT", f"{what}; {fix}")])
        check_stop()
        time.sleep(0.5)


def attempt_numbers(store: ObjectStore) -> list[int]:
    """The attempts that have a record in the run log, in rising order."""
    numbers = (attempt_number(info.key) for info in store.list(ATTEMPTS))
    return sorted(number for number in numbers if number is not None)


def _read(store: ObjectStore) -> tuple[LeaseRecord | None, str]:
    """The lease and its tag; no record and an empty tag where there is none.

    Raises:
        ValueError: The file is not a valid lease.
    """
    try:
        stored = store.read(LEASE, max_bytes=MAX_BYTES)
    except TooLarge as error:
        raise ValueError(str(error)) from None
    return (parse(stored.data), stored.tag) if stored else (None, "")


def _read_again(store: ObjectStore) -> tuple[LeaseRecord | None, str]:
    """Like `_read`, but reads again, a few times, while the file is not a valid lease."""
    for pause in _PAUSES:
        try:
            return _read(store)
        except ValueError:
            time.sleep(pause)
    return _read(store)


def parse(data: bytes) -> LeaseRecord:
    """The content of a `lease.json`.

    Raises:
        ValueError: It is no lease, or it was altered.
    """
    return LeaseRecord.model_validate(unsealed(data))


def _read_or_refuse(store: ObjectStore) -> tuple[LeaseRecord | None, str]:
    try:
        return _read_again(store)
    except ValueError:
        problem = "is not a valid lease; if no attempt of this run is running, remove it"
        raise DataError([Problem(f"{store.uri}/{LEASE}", problem)]) from None


def _render(record: LeaseRecord) -> bytes:
    return sealed(record.model_dump())


def fenced(store: ObjectStore, lease: Lease | None) -> ObjectStore:
    """`store`, but nothing in it changes unless `lease` is still held: else `Replaced` is raised.

    Without a lease no write is allowed: one of several processes holds it, and a write by another one is a bug.

    A small object, which may be a marker, a record or the manifest, is preceded by a conditional write
    (`Lease.confirm`); a file or a removal by a read (`Lease.check`), because what makes files count is a small object
    that follows them.
    """
    return _FencedStore(store, lease)


class _FencedStore(ForwardingStore):
    """See `fenced`."""

    def __init__(self, store: ObjectStore, lease: Lease | None) -> None:
        super().__init__(store)
        self._lease = lease

    @contextmanager
    def around(self, verb: str, key: str) -> Iterator[None]:  # noqa: ARG002 - all keys alike
        """Asks the lease before a change."""
        if verb in CHANGES:
            if self._lease is None:
                raise JobError("a bug: only process 0 may change the run's store")
            (self._lease.confirm if verb == "write" else self._lease.check)()
        yield

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """See `ObjectStore.write`; where the store has no conditions it writes without, as the lease itself does."""
        if self._lease is not None and not self._lease.conditional:
            return super().write(key, data)
        return super().write(key, data, if_absent=if_absent, if_tag=if_tag)

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_tag: str | None = None) -> None:
        """See `ObjectStore.upload`; conditions as in `write`."""
        if self._lease is not None and not self._lease.conditional:
            return super().upload(path, key)
        return super().upload(path, key, if_absent=if_absent, if_tag=if_tag)

    def delete(self, key: str, *, if_tag: str | None = None) -> None:
        """See `ObjectStore.delete`; conditions as in `write`."""
        conditional = self._lease is None or self._lease.conditional
        super().delete(key, if_tag=if_tag if conditional else None)
