"""Names a process so that another one on the same kernel can tell later whether it has ended."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessIdentity:
    """A process of some machine.

    Attributes:
        boot: Id of the start of the machine; containers have their machine's.
        namespaces: In which `pid` and `started` are valid: PID and time namespace.
        pid: Process id.
        started: When it started, in clock ticks since the machine did: a later process may have the same id.
    """

    boot: str
    namespaces: str
    pid: int
    started: int


def this_process() -> ProcessIdentity | None:
    """The identity of this process; None where the system does not provide it, or `/proc` has other process ids."""
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()
        namespaces = str((_PROC / "self/ns/pid").readlink())
        with suppress(FileNotFoundError):  # kernels before 5.6
            namespaces += f" {(_PROC / 'self/ns/time').readlink()}"
        pid, _, started = _facts("self")
    except (OSError, ValueError, IndexError):
        return None
    return ProcessIdentity(boot, namespaces, pid, started) if pid == os.getpid() else None


def is_visible(process: ProcessIdentity) -> bool:
    """Whether the process is or was on the same kernel and in the same namespaces, so that its process id means it."""
    own = this_process()
    return own is not None and (own.boot, own.namespaces) == (process.boot, process.namespaces)


def has_ended(process: ProcessIdentity) -> bool:
    """Whether the process has certainly ended; False also where this process cannot know, as on another machine."""
    if not is_visible(process):
        return False
    try:
        os.kill(process.pid, 0)  # sends nothing; /proc may hide the processes of other users
    except ProcessLookupError:
        return True
    except OSError:
        pass
    try:
        _, state, started = _facts(str(process.pid))
    except (OSError, ValueError, IndexError):
        return False
    return started != process.started or state in {"Z", "X"}


def _facts(process: str) -> tuple[int, str, int]:
    """(process id, state, start in clock ticks) from `/proc`; see proc_pid_stat(5)."""
    pid, _, rest = (_PROC / process / "stat").read_text(encoding="utf-8", errors="replace").partition(" (")
    fields = rest.rpartition(") ")[2].split()  # the name of the program, in parentheses, may contain any character
    return int(pid), fields[0], int(fields[19])
