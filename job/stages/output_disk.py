"""Whether the disk of JOB_RUN__OUTPUT has space for what the run is going to write there, checked before it trains.

A run is refused only for what certainly does not fit: checkpoints, whose tensors have known sizes, and the merged
model, if it is published. A likely shortage is a warning: an adapter may be smaller than it was in training, and
formats may turn out to be impossible. Compression by the file system is not considered: weights and optimizer states
hardly shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from job import log
from job.checkpoints import checkpoint_store
from job.common.export_formats import MERGED
from job.common.formatting import size
from job.common.optimizers import substitute
from job.common.resources import OTHER_OUTPUT_BYTES, checkpoint_bytes, disk_space, output_bytes, required_bytes
from job.errors import Unreachable
from job.model.lora import trainable
from job.runs.attempt import Attempt
from job.runs.layout import CHECKPOINTS, EXPORT
from job.settings.schema import Checkpoint, Train
from job.stages.export_check import ExportSizes
from job.stages.handoff import Loaded
from job.storage.location import is_remote
from job.storage.open import ObjectStore
from job.training.config import total_steps


@dataclass(frozen=True)
class OutputNeed:
    """What an attempt is going to write.

    Attributes:
        checkpoint: Bytes of one checkpoint.
        keep: JOB_CHECKPOINT__KEEP.
        saves: Minimum number of checkpoints that it writes.
        adapter: Maximum bytes of the published adapter.
        exports: The sizes of its exports; None without exports, or if they are not known yet.
        formats: JOB_EXPORT__FORMATS.
    """

    checkpoint: int
    keep: int
    saves: int
    adapter: int
    exports: ExportSizes | None = None
    formats: tuple[str, ...] = ()

    @property
    def merged(self) -> int:
        """Bytes of the merged model that is published."""
        return self.exports.merges.bytes_each if self.exports and MERGED in self.formats else 0

    def least(self, checkpoints: int, exports: int, *, shared: bool) -> int:
        """The fewest bytes that must be free so that no write fails.

        A checkpoint is first written to the folder for temporary files, and deleted there when it is uploaded; merged
        models stay there until they are published.

        Args:
            checkpoints: Bytes in the run's folder for checkpoints, all of which may be deleted, but not before one of
                this attempt is complete.
            exports: Bytes of exported files in the run's folder.
            shared: Whether the folder for temporary files is on the same disk.
        """
        training = after = 0
        if self.saves:
            written = output_bytes(self.checkpoint, keep=self.keep, saves=self.saves)
            training = max(self.checkpoint, written - checkpoints) + shared * self.checkpoint
            after = min(self.keep, self.saves) * self.checkpoint - checkpoints
        if self.merged:
            candidates = len(self.exports.merges.names) * self.merged if self.exports and shared else 0
            after += self.merged - exports + candidates
        return max(0, training, after)

    def likely(self, checkpoints: int, exports: int, *, shared: bool) -> int:
        """The bytes that should be free; arguments as for `least`."""
        derived = self.exports.derived_bytes if self.exports else 0
        others = self.adapter + self.merged + derived
        need = output_bytes(self.checkpoint, keep=self.keep, saves=self.saves, others=others)
        need += OTHER_OUTPUT_BYTES - checkpoints - exports
        if shared:
            candidates = len(self.exports.merges.names) * self.exports.merges.bytes_each if self.exports else 0
            need += required_bytes([candidates, derived], self.checkpoint if self.saves else 0)
        return max(need, self.least(checkpoints, exports, shared=shared))


def check_output_disk(
    attempt: Attempt,
    loaded: Loaded,
    options: Train,
    saving: Checkpoint,
    formats: Sequence[str],
    *,
    rows: int,
    trains: bool,
    exports: ExportSizes | None,
) -> None:
    """Refuses a local folder whose disk is too small for the run; warns if it probably is. Does not check buckets.

    Args:
        attempt: Its store is the run's folder. Called in the process that writes there.
        loaded: The model, with the adapter.
        options: Settings of this training stage; one that follows is checked when it begins.
        saving: Settings of the checkpoints.
        formats: JOB_EXPORT__FORMATS.
        rows: Examples to train on.
        trains: Whether the adapter is trained by this attempt.
        exports: As `check_export` returns it; None without exports, or where they are not known yet.

    Raises:
        Unreachable: What the run is going to write cannot fit. A retry helps once there is space.
    """
    if is_remote(attempt.store.uri):
        return
    parameters = sum(parameter.numel() for parameter in trainable(loaded.model).values())
    optimizer, _ = substitute(options.optimizer, loaded.model.device.type)
    need = OutputNeed(
        checkpoint=checkpoint_bytes(parameters, optimizer),
        keep=saving.keep,
        saves=_saves(attempt.store, options, saving.every_steps, rows) if trains else 0,
        adapter=4 * parameters if trains else 0,
        exports=exports,
        formats=tuple(formats),
    )
    folder = Path(attempt.store.uri)
    disk = disk_space(folder)
    shared = disk.shares(disk_space(attempt.work))
    there = [sum(info.bytes for info in attempt.store.list(prefix)) for prefix in (CHECKPOINTS, EXPORT)]
    least, likely = need.least(*there, shared=shared), need.likely(*there, shared=shared)
    where = f"{folder} and {attempt.work}, on one disk" if shared else str(folder)
    fix = "free space there, or set JOB_RUN__OUTPUT to a folder on a larger disk or to a bucket"
    if need.keep > 1 and need.saves > 1:
        fix += "; JOB_CHECKPOINT__KEEP=1 keeps fewer checkpoints"
    if disk.writable < least:
        raise Unreachable(
            f"JOB_RUN__OUTPUT: the disk is too small for the run: {size(disk.writable, ' ')} are free, and it needs at "
            f"least {size(least, ' ')} in {where}; {fix}"
        )
    if disk.writable < likely:
        log.get_logger().warning(
            "the disk of JOB_RUN__OUTPUT may be too small for the run",
            folder=where,
            free=size(disk.writable, " "),
            needs_about=size(likely, " "),
            fix=fix,
        )


def _saves(store: ObjectStore, options: Train, every: int, rows: int) -> int:
    """The minimum number of checkpoints that this attempt writes if it is not stopped.

    There is one every JOB_CHECKPOINT__EVERY_STEPS, and one of the last step. Training that may stop early writes at
    least one; an attempt that resumes it may have nothing left to train.
    """
    total = total_steps(rows, options.global_batch_size, options.epochs, options.max_steps)
    newest = next(iter(checkpoint_store.steps(store)), 0)
    if options.stop_after is not None:
        return int(newest == 0)
    return 0 if newest >= total else ceil(total / every) - newest // every
