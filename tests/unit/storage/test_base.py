"""What all stores have in common: the probe, limits, and wrappers."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import Problem
from job.storage.base import NotSupported, ObjectInfo, ObjectStore, Stored, byte_limit, try_conditional_writes
from job.storage.local import LocalStore
from tests.wrapped_store import WrappedStore


class Careless(LocalStore):
    """A store that ignores the conditions named in `ignored`."""

    ignored: tuple[str, ...] = ()

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """Write, with those conditions that are not ignored."""
        return super().write(
            key,
            data,
            if_absent=if_absent and "if_absent" not in self.ignored,
            if_tag=None if "if_tag" in self.ignored else if_tag,
        )


class Simple(LocalStore):
    """A store that refuses conditional requests as unknown."""

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_tag: str | None = None) -> str:
        """Write without conditions only."""
        if if_absent or if_tag is not None:
            raise NotSupported([Problem("store", "no conditions here")])
        return super().write(key, data)


@pytest.mark.parametrize("ignored", [("if_absent",), ("if_tag",), ("if_absent", "if_tag")])
def test_probe_finds_out_careless_stores(tmp_path: Path, ignored: tuple[str, ...]) -> None:
    """A store that accepts a condition and ignores it has no conditional writes; the probe is cleaned up."""
    store = Careless(tmp_path)
    store.ignored = ignored
    assert not try_conditional_writes(store)
    assert list(store.list()) == []


def test_probe_takes_no_for_an_answer(tmp_path: Path) -> None:
    """A store that does not know conditions is found to be writable all the same, and cleaned up."""
    store = Simple(tmp_path)
    assert not try_conditional_writes(store)
    assert list(store.list()) == []


def test_allowance_counts_corrections() -> None:
    """A transfer that starts again gives bytes back: negative numbers count too."""
    allowed = byte_limit("a", 10)
    allowed(8)
    allowed(-8)
    allowed(10)


def test_every_verb_is_forwarded(tmp_path: Path) -> None:
    """A store in front of another one hands on every verb of the contract, and sees each request go by."""
    seen: list[tuple[str, str]] = []
    store = WrappedStore(LocalStore(tmp_path / "store"), lambda *request: seen.append(request))
    (tmp_path / "file").write_bytes(b"12")
    tag = store.write("a", b"1")
    assert store.read("a") == Stored(b"1", tag)
    assert store.tag("a") == tag
    store.upload(tmp_path / "file", "b")
    store.download("b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"12"
    assert list(store.list()) == [ObjectInfo("a", 1), ObjectInfo("b", 2)]
    store.delete("a")
    assert store.read("a") is None
    assert store.conditional_writes()
    verbs = {name for name in vars(ObjectStore) if not name.startswith("_")} - {"uri"}
    assert {verb for verb, _ in seen} == verbs
    assert seen[0] == ("write", "a")
