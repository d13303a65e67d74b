"""Whether an attempt that ended without a record was killed because main memory ran out, as far as records tell.

A process that the kernel's out-of-memory killer ends (exit code 137, in Kubernetes `OOMKilled`) can write nothing. So
every record of an attempt has the main memory that was left, and how many processes of its control group (cgroup) had
been killed in this way; the next attempt compares. A restarted container has a new control group, whose count is 0.
"""

from __future__ import annotations

from job.common.formatting import count, size
from job.common.resources import MainMemory
from job.runs.run_log import LoggedAttempt

LITTLE_SHARE = 0.05
"""An attempt that had less than this share of main memory left, and then was killed, was likely killed for it."""
FIX = (
    "give the machine or the container more main memory (in Kubernetes resources.limits.memory), or reduce what "
    "the job needs: fewer processes (JOB_RUN__PROCESSES), JOB_MODEL__PLACEMENT=gpu or sharded, "
    "JOB_TRAIN__OFFLOAD_ACTIVATIONS=false, JOB_EVAL__FULL_PRECISION=off, on a CPU a smaller "
    "JOB_TRAIN__MICRO_BATCH_TOKENS"
)
"""What to change, with the settings that decide how much main memory the job takes."""


def why_killed(before: LoggedAttempt, now: MainMemory | None = None) -> str | None:
    """Why an attempt that recorded no end was killed, as a sentence; None if nothing points to main memory.

    Args:
        before: The attempt's last record.
        now: Main memory as this process finds it, if it may run in the attempt's control group.
    """
    noted = before.noted
    if noted is None or noted.memory is None:
        return None  # an earlier version did not record it
    was = noted.memory
    kills = 0
    if now is not None and now.group == was.group:
        kills = (now.oom_kills or 0) - (was.oom_kills or 0)
    if kills > 0:
        reason = (
            "since its last record the kernel has killed a process of this container or service because main memory"
        )
        return f"{reason} was full ({count(kills, 'time')} by oom_kill in memory.events)"
    if was.available_bytes < LITTLE_SHARE * was.total_bytes:
        left = f"{size(was.available_bytes, ' ')} of {size(was.total_bytes, ' ')} of main memory"
        return f"at its last record it had {left} left, so it was likely killed because main memory was full"
    if noted.loading:
        reason = "it was killed while the model was loaded, which needs much main memory"
        return f"{reason}: if its exit code was 137, or its pod says OOMKilled, main memory was full"
    return None
