"""Detects by process id that another process on the same kernel has died, if no launcher reports it.

A killed process announces no reason, and without a launcher no other process does. An all-reduce fails when its
connection breaks, but a process that waits for a value in the store would wait until the watchdog ends it.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


def identity() -> list[str]:
    """Kernel, PID namespace and process id of this process; empty if the system does not provide them."""
    try:
        return [_BOOT.read_text(encoding="ascii").strip(), str(_NAMESPACE.readlink()), str(os.getpid())]
    except OSError:
        return []


class Peers:
    """The other processes that this one can watch: those in its own PID namespace, whose process ids are valid here.

    Args:
        identities: Rank -> `identity()` of the process.
    """

    def __init__(self, identities: Mapping[int, list[str]]) -> None:
        self._descriptors: dict[int, int | None] = {}
        own = identity()
        for rank, other in identities.items():
            if other and other[:2] == own[:2] and other != own:
                try:
                    # not the id itself, which the kernel may give to another process later
                    self._descriptors[rank] = os.pidfd_open(int(other[2]))
                except ProcessLookupError:
                    self._descriptors[rank] = None
                except OSError:  # a sandbox without this system call
                    continue

    def dead(self) -> list[int]:
        """Ranks of the processes that have ended, for any reason."""
        return [rank for rank, descriptor in self._descriptors.items() if descriptor is None or _readable(descriptor)]

    def forget(self, rank: int) -> None:
        """Stops watching a process."""
        descriptor = self._descriptors.pop(rank)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Stops watching all processes."""
        for rank in list(self._descriptors):
            self.forget(rank)


def _readable(descriptor: int) -> bool:
    polled = select.poll()  # not select.select, which refuses descriptors from 1024 on
    polled.register(descriptor, select.POLLIN)
    return bool(polled.poll(0))
