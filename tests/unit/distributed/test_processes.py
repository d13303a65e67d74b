"""What all processes of a run must have in common."""

from __future__ import annotations

from typing import Any

import pytest

from job.distributed.processes import Alone, require_one_kind
from job.errors import SettingsError


class Among(Alone):
    """One of several processes, whose devices are these."""

    def __init__(self, *devices: str) -> None:
        self.devices = devices

    def gather(self, what: str, value: Any) -> list[Any]:
        """Of all processes."""
        return list(self.devices)


def test_all_processes_have_a_gpu_or_none_has() -> None:
    """Else they could not communicate; those without are named."""
    require_one_kind(Among("cuda", "cuda"), "cuda")
    require_one_kind(Among("cpu", "cpu"), "cpu")
    with pytest.raises(SettingsError, match="JOB_RUN__PROCESSES: processes without a GPU: 1, 3"):
        require_one_kind(Among("cuda", "cpu", "cuda", "cpu"), "cuda")
