"""Whether a process that was identified earlier has ended: reported only if certain."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from job.common import process_identity
from job.common.process_identity import ProcessIdentity, has_ended, this_process

NAMES_ITSELF = (
    "import sys; from dataclasses import astuple; from job.common.process_identity import this_process;"
    "print(*astuple(this_process()), sep='\\n', flush=True); sys.stdin.read()"
)


def test_a_process_has_ended_before_and_after_its_parent_knows() -> None:
    """Not while it lives; a zombie, which keeps its process id, and one that is gone have."""
    with subprocess.Popen(
        [sys.executable, "-c", NAMES_ITSELF], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        boot, namespaces, pid, started = (child.stdout.readline().strip() for _ in range(4))
        named = ProcessIdentity(boot, namespaces, int(pid), int(started))
        assert named.pid == child.pid
        assert not has_ended(named)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(named)
    assert has_ended(named)


def test_nothing_is_said_of_what_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine, in another container, or where /proc hides others' processes, nothing is known."""
    own = this_process()
    assert own is not None
    assert not has_ended(own)
    later = replace(own, started=own.started + 1)  # another process that has its id now
    assert has_ended(later)
    assert not has_ended(replace(later, boot="another"))
    assert not has_ended(replace(later, namespaces="pid:[1]"))
    facts = process_identity._facts
    monkeypatch.setattr(process_identity, "_facts", lambda process: facts(process if process == "self" else "hidden"))
    assert not has_ended(later)
    monkeypatch.setattr(process_identity, "_facts", lambda _process: (own.pid + 1, "S", own.started))
    assert this_process() is None
    assert not has_ended(later)
