"""Which processes are watched, and when they count as dead."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from job.common import process_identity
from job.common.process_identity import ProcessIdentity, this_process
from job.distributed.peers import Peers
from tests.waiting import wait_for


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def identity(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    """As the process itself would publish it."""
    own = this_process()
    assert own is not None
    pid, _, started = process_identity._facts(str(process.pid))
    return replace(own, pid=pid, started=started)


def descriptors() -> int:
    """The number of open files of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_process_that_is_killed_is_dead(other: subprocess.Popen[bytes]) -> None:
    """At once, also while its parent has not waited for it; a stopped one is not dead."""
    before = descriptors()
    peers = Peers({3: identity(other)})
    assert peers.dead() == []
    other.send_signal(signal.SIGSTOP)
    assert peers.dead() == []
    other.kill()
    wait_for(lambda: peers.dead() == [3])
    peers.forget(3)
    assert peers.dead() == []
    peers.close()
    assert descriptors() == before


def test_one_that_is_gone_is_dead_though_another_has_its_id(other: subprocess.Popen[bytes]) -> None:
    """It died before it was watched, and the kernel has given its process id to this one."""
    before, own = descriptors(), identity(other)
    peers = Peers({1: replace(own, started=own.started - 1)})
    assert peers.dead() == [1]
    assert descriptors() == before
    other.kill()
    other.wait()
    assert Peers({1: own}).dead() == [1]


def test_what_cannot_be_seen_is_not_watched(other: subprocess.Popen[bytes]) -> None:
    """A process of another machine or container may have an id that here is another's; this process is not watched."""
    named, own = identity(other), this_process()
    assert own is not None
    elsewhere = {1: replace(named, boot="another"), 2: replace(named, namespaces="pid:[1]"), 3: own}
    peers = Peers(elsewhere)
    other.kill()
    other.wait()
    assert peers.dead() == Peers(elsewhere).dead() == []
