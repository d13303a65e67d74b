"""Outages of stores: all kinds outlast the same outage, and errors that no retry can fix fail at once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from obstore.exceptions import GenericError

import job.storage.obstore_requests
import job.storage.obstore_store
from job.errors import Unreachable
from job.storage.base import pause_seconds
from job.storage.open import ObjectStore, StorageOptions, open_store
from tests.azurite import settings
from tests.gcs_server import TOKEN
from tests.s3_server import BUCKET, Request, credentials, server
from tests.waiting import wait_for

SCHEMES = ["s3", "gs", "az"]
LEAST, MOST = 60.0, 90.0
"""Seconds of pauses with the default number of tries."""


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, which take no time."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ObjectStore]]:
    """Opens a store of a kind at an address."""
    with credentials():

        def at(scheme: str, url: str, **options: float) -> ObjectStore:
            google = {"GOOGLE_BASE_URL": url, "GOOGLE_BEARER_TOKEN": TOKEN}
            for name, value in ({} if scheme == "s3" else google if scheme == "gs" else settings(url)).items():
                monkeypatch.setenv(name, value)
            chosen = StorageOptions(endpoint_url=url if scheme == "s3" else None, **options)  # type: ignore[arg-type]
            return open_store(f"{scheme}://{BUCKET}/run", chosen)

        yield at


@contextmanager
def gone(how: str) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that is gone in one of three ways, and one entry for each request that it saw."""
    seen: list[str] = []
    if how == "503":

        def answer(request: Request) -> None:
            seen.append(request.command)
            request.refuse(503, "ServiceUnavailable")

        with server(answer) as url:
            yield url, seen
        return
    with ExitStack() as connections, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))  # bound, so that no other program listens there
        if how == "silent":
            listening.listen()

            def accept() -> None:
                while True:
                    try:
                        connections.enter_context(listening.accept()[0])
                    except OSError:
                        return
                    seen.append("")

            threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", seen
        listening.shutdown(socket.SHUT_RDWR) if how == "silent" else None


@pytest.mark.parametrize("how", ["refused", "503", "silent"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_store_outlasts_an_outage_of_a_minute(
    scheme: str, how: str, slept: list[float], opened: Callable[..., ObjectStore]
) -> None:
    """With the default of eight tries; a store that never answers takes the time limit of each of them in addition."""
    with gone(how) as (url, seen):
        store = opened(scheme, url, timeout_seconds=0.05 if how == "silent" else 60.0)
        read, write = (lambda: store.read("a")), (lambda: store.write("a", b"x", if_absent=True))
        for act in [read] if how == "silent" else [read, write]:  # boto3 waits a second before it sends a body
            slept.clear()
            seen.clear()
            with pytest.raises(Unreachable):
                act()
            assert LEAST <= sum(slept) <= MOST
            assert len(slept) == 7
            assert max(slept) <= 22.5
            assert how != "503" or len(seen) == 8
            assert how != "silent" or wait_for(lambda: seen)  # of eight: a try may be over before it has connected


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_large_upload_and_a_listing_outlast_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    scheme: str,
    slept: list[float],
    opened: Callable[..., ObjectStore],
) -> None:
    """The client itself sends their many requests, with short pauses of its own, which the test leaves out."""
    monkeypatch.setattr(job.storage.obstore_store, "_INNER_REPEATS", 0)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(17 << 20)
    with gone("503") as (url, _):
        store = opened(scheme, url)
        for act in (lambda: store.upload(tmp_path / "large", "a"), lambda: list(store.list())):
            slept.clear()
            with pytest.raises(Unreachable):
                act()
            assert LEAST <= sum(slept) <= MOST


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_name_that_nobody_knows_is_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, scheme: str, slept: list[float], opened: Callable[..., ObjectStore]
) -> None:
    """It is mostly a typing error; a name server that does not answer is an outage, which is waited for."""
    if scheme == "s3":  # the other client resolves names by itself

        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        store = opened("s3", "http://no-such-host.invalid")
    else:
        store = opened(scheme, "http://no-such-host.invalid")
        said = 'none\n\nDebug source:\nConnectError(\n "dns error", error: "failed: Name or service not known"'

        def unresolved(*_: object, **__: object) -> None:
            raise GenericError(said)

        monkeypatch.setattr(job.storage.obstore_requests, "ask_once", unresolved)
    with pytest.raises(Unreachable, match="name cannot be resolved"):
        store.read("a")
    assert slept == []


def test_the_pauses_differ_from_machine_to_machine_within_bounds() -> None:
    """Each is drawn at random, between the one of the table and 1.4 times as much."""
    drawn = [[pause_seconds(tries) for tries in range(1, 8)] for _ in range(100)]
    assert all(LEAST <= sum(pauses) <= MOST for pauses in drawn)
    assert len({sum(pauses) for pauses in drawn}) > 1
    assert 16 <= pause_seconds(99) <= 22.5
