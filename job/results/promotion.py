"""The pointer that `promote` writes: a small sealed JSON file that names the run to use, such as `s3://bucket/current`.

It is replaced by a conditional write: of two promotions at once, one succeeds and the other gets an error. Runs that it
pointed to before are kept in it, for `--rollback`:

    run, run_id, manifest_seal, adapter_sha256, promoted    the run that it points to, and when it was promoted
    previous                                                the runs that it pointed to before, the newest last
    rolled_back                                             the runs that were rolled back, the newest last
    write                                                   unique id of this write, as `ObjectStore` requires
    seal                                                    SHA-256 of all other fields

It does not say who wrote it: a name in a file can be false; the store's access log has the writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import ConfigDict, ValidationError, with_config

from job.common.formatting import timestamp
from job.common.hashing import sealed, unsealed
from job.common.secrets_in_text import secret_in
from job.common.validation import adapter_of
from job.errors import AccessDenied, GateError, Problem, Replaced, SettingsError, VerificationError
from job.results.completed import read_complete
from job.results.reader import PublishedRun, open_run, read_published
from job.runs.layout import RESULTS, WEIGHTS
from job.storage.open import Conflict, Location, ObjectStore, StorageOptions, TooLarge, check_key, is_remote, open_store

KIND = "qlora-job pointer 1"
MOST = 100
"""Maximum number of entries in `previous` and in `rolled_back`; the oldest are dropped."""
_T = TypeVar("_T")


class PointerMoved(Replaced):
    """Another process replaced the pointer between our read and our write; nothing was written."""

    meaning = "another promotion moved the pointer at the same time"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Promoted:
    """A run that the pointer points to, or pointed to. `run` is its folder, `promoted` a time in UTC."""

    run: str
    run_id: str
    manifest_seal: str
    adapter_sha256: str
    promoted: str

    @property
    def text(self) -> str:
        """The run in a line of text."""
        return f"{self.run} (adapter {self.adapter_sha256[:12]}, promoted {self.promoted})"


@dataclass(frozen=True)
class Pointer:
    """The content of a pointer."""

    current: Promoted
    previous: tuple[Promoted, ...] = ()
    rolled_back: tuple[Promoted, ...] = ()


@dataclass(frozen=True)
class PointerLocation:
    """Where a pointer is: the store of its folder, and its file name."""

    store: ObjectStore
    name: str

    @property
    def uri(self) -> str:
        """For messages."""
        return f"{self.store.uri}/{self.name}"


def pointer_location(where: str, storage: StorageOptions) -> PointerLocation:
    """The location of a pointer, from a path or URI, without a request to the store.

    Raises:
        SettingsError: The path is the root of a bucket, or a folder.
    """
    location = Location.parse(where)
    if where.endswith("/") or not location.key:
        raise SettingsError([Problem(where, "is a folder; name a file in it, such as s3://bucket/models/current")])
    try:
        name = check_key(location.name)
    except ValueError as error:
        raise SettingsError([Problem(where, str(error))]) from None
    if is_remote(where):
        return PointerLocation(open_store(location.parent, storage), name)
    if Path(where).is_dir():
        raise SettingsError([Problem(where, "is a folder; name a file, such as one next to it")])
    return PointerLocation(open_store(str(Path(where).absolute().parent), storage), name)


def read_pointer(location: PointerLocation) -> tuple[Pointer | None, str | None]:
    """The pointer and its tag; (None, None) if there is no file.

    Raises:
        SettingsError: The file is no pointer.
        VerificationError: It was altered.
    """
    try:
        stored = location.store.read(location.name)
    except TooLarge:
        raise SettingsError([Problem(location.uri, "is too large for a pointer; give another place")]) from None
    if stored is None:
        return None, None
    if KIND.encode() not in stored.data:
        raise SettingsError([Problem(location.uri, "is a file that `promote` did not write; give another place")])
    try:
        return _parsed(unsealed(stored.data)), stored.tag
    except (ValueError, KeyError, TypeError) as error:  # pydantic's are ValueErrors
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise VerificationError([Problem(location.uri, f"is not a pointer that `promote` wrote: {why}")]) from None


def _parsed(facts: dict[str, Any]) -> Pointer:
    if facts.pop("kind") != KIND or not isinstance(facts.pop("write"), str):
        raise ValueError("its kind is another")
    previous, rolled_back = (
        _valid(tuple[Promoted, ...], tuple(facts.pop(name))) for name in ("previous", "rolled_back")
    )
    pointer = Pointer(_valid(Promoted, facts), previous, rolled_back)
    for promoted in (pointer.current, *previous, *rolled_back):
        if (secret := secret_in(promoted.run)) is not None:
            raise ValueError(f"the address of a run in it {secret}")
    return pointer


def _valid(kind: type[_T], value: Any) -> _T:
    return adapter_of(kind).validate_python(value)


def check_pointer_location(location: PointerLocation) -> None:
    """Checks that a pointer may be written to a location; called before the run is verified, which takes minutes.

    Raises:
        SettingsError: It is in a run's folder, or its store has no conditional writes.
        AccessDenied, Unreachable: The store refused the request, or did not answer.
    """
    if location.store.tag(RESULTS) is not None:
        message = (
            "is in the folder of a run, which would no longer verify with another file in it; give a "
            "place outside of it"
        )
        raise SettingsError([Problem(location.uri, message)])
    if not location.store.conditional_writes():
        message = (
            "is in a store without conditional writes, where two promotions at the same time would "
            "both seem to succeed; "
            "use a store that has them: S3, Google's, Azure's or a local folder"
        )
        raise SettingsError([Problem(location.uri, message)])


def require_gate_held(results: Mapping[str, Any], *, without_gate: bool = False) -> None:
    """Raises unless the run's gate is met; with `without_gate` a run without a gate is accepted, too.

    Raises:
        GateError: The gate is not met, or the run has no gate.
    """
    passed = results["gate"]["passed"]
    if passed is False:
        raise GateError("; ".join(results["gate"]["reasons"]))
    if passed is None and not without_gate:
        raise GateError(
            "the run has no quality gate, so nothing shows that it is good enough: set JOB_GATE__MIN_DELTA, "
            "JOB_GATE__MAX_REGRESSION or JOB_GATE__POLICY for it, or give --without-gate"
        )


def promote(location: PointerLocation, run: PublishedRun) -> tuple[Promoted, Promoted | None]:
    """Points to a run, which the caller has verified; returns the new and the previous target.

    Writes nothing if the pointer already points to this run and manifest.

    Raises:
        PointerMoved: Another process replaced it meanwhile.
        VerificationError: The run's manifest lists no adapter, or the pointer was altered.
        SettingsError: The file there is not a pointer.
    """
    pointer, tag = read_pointer(location)
    adapter = next((artifact["sha256"] for artifact in run.results["artifacts"] if artifact["path"] == WEIGHTS), None)
    if adapter is None:
        raise VerificationError([Problem(f"{run.store.uri}/{RESULTS}", f"lists no {WEIGHTS}")])
    promoted = Promoted(run.store.uri, run.id, run.results["seal"], adapter, timestamp())
    if pointer is None:
        _write(location, Pointer(promoted), tag)
        return promoted, None
    before = pointer.current
    if (before.run, before.manifest_seal) == (promoted.run, promoted.manifest_seal):
        return before, before
    _write(location, Pointer(promoted, (*pointer.previous, before), pointer.rolled_back), tag)
    return promoted, before


def roll_back(location: PointerLocation, storage: StorageOptions) -> tuple[Promoted, Promoted]:
    """Points to the previous run again; returns the new and the previous target.

    That run is read again: its manifest has to be the one that was promoted, and its files have to match the manifest.
    Of exported files only the sizes are compared.

    Raises:
        PointerMoved: Another process replaced it meanwhile.
        SettingsError: There is no pointer, or no previous run in it.
        VerificationError: The previous run is missing, or is not the one that was promoted.
    """
    pointer, tag = read_pointer(location)
    if pointer is None or not pointer.previous:
        message = "there is no pointer" if pointer is None else "pointed to no run before, so it cannot be moved back"
        raise SettingsError([Problem(location.uri, message)])
    *earlier, target = pointer.previous
    store = open_run(target.run, storage)
    results = read_complete(store)
    if results is None or results["seal"] != target.manifest_seal:
        message = "is not the run that was promoted: it was removed, is incomplete, or was replaced by another run"
        raise VerificationError([Problem(target.run, message)])
    _write(location, Pointer(target, tuple(earlier), (*pointer.rolled_back, pointer.current)), tag)
    return target, pointer.current


def _write(location: PointerLocation, pointer: Pointer, tag: str | None) -> None:
    content = {
        "kind": KIND,
        **asdict(pointer.current),
        "previous": [asdict(promoted) for promoted in pointer.previous[-MOST:]],
        "rolled_back": [asdict(promoted) for promoted in pointer.rolled_back[-MOST:]],
        "write": uuid4().hex,
    }
    try:
        location.store.write(location.name, sealed(content), if_absent=tag is None, if_tag=tag)
    except Conflict:
        now_there, _ = read_pointer(location)
        where = "" if now_there is None else f", to {now_there.current.text}"
        raise PointerMoved(
            f"{location.uri} was moved by another process at the same time{where}; nothing was changed: check "
            "whether that is the run you want, and repeat the command if not"
        ) from None


def open_run_or_pointer(where: str, storage: StorageOptions) -> ObjectStore:
    """The store of a run, from a path or URI as in `open_run`, or from a pointer to the run.

    Raises:
        SettingsError: The path or URI, or the options, are invalid.
        VerificationError: The pointer was altered, or the run that it points to is not the one that was promoted.
    """
    pointer = _pointer_at(where, storage)
    if pointer is None:
        return open_run(where, storage)
    store = open_run(pointer.current.run, storage)
    if read_published(store).results["seal"] != pointer.current.manifest_seal:
        what = f"{store.uri} is not the run that was promoted: its manifest differs"
        raise VerificationError([Problem(where, what)])
    return store


def _pointer_at(where: str, storage: StorageOptions) -> Pointer | None:
    """The pointer at a location; None if a run is there, or nothing: then reading the run reports what is missing."""
    if where.endswith((f"/{RESULTS}", "/")) or where == RESULTS or (not is_remote(where) and not Path(where).is_file()):
        return None
    if is_remote(where) and (not Location.parse(where).key or open_run(where, storage).tag(RESULTS) is not None):
        return None
    try:
        return read_pointer(pointer_location(where, storage))[0]
    except SettingsError:
        what = f"is a file, but neither {RESULTS} nor a pointer that `promote` wrote; give the folder of a run"
        raise SettingsError([Problem(where, what)]) from None
    except AccessDenied:  # access may be limited to the run's own folder: reading that reports what is missing
        return None
