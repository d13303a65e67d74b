"""Makes a resumed run compute as its checkpoint was computed, or warns that it cannot."""

from __future__ import annotations

from job.checkpoints.trainer_state import ComputationOptions
from job.data.batch_plan import Steps
from job.log import get_logger
from job.records import ExecutionPlan
from job.training.padded_shapes import RunShapes, longest_shape, shapes_of_before


def resume_shapes(
    shapes: RunShapes, before: ComputationOptions | None, *, plan: ExecutionPlan, steps: Steps, budget: int
) -> None:
    """Sets the padded shapes to the checkpoint's, because other shapes change the last bits of a gradient.

    Warns if this attempt has to compute in another way than the checkpoint was computed.

    Args:
        shapes: The run's shapes; changed in place.
        before: How the checkpoint was computed; None for checkpoints of older versions, which did not record it.
        plan: The execution plan of this attempt.
        steps: The batch plan, with the checkpoint's limit for divided rows if this attempt can divide rows.
        budget: The checkpoint's token budget.
    """
    if before is None:
        if plan.padded:
            message = "checkpoint of an older version does not have the lengths of its padded sequences"
            effect = "the last bits of the result may differ from those of a run without an interruption"
            get_logger().warning(f"{message}: this version's shapes are used", effect=effect)
        return
    changed = {}
    for name, was, now in (
        ("forward", before.forward, plan.forward),
        ("tile_tokens", before.tile_tokens, plan.tile_tokens),
        ("divided_above", before.divided_above, steps.divided_above),
    ):
        if was != now:
            changed[name] = f"{was} before, {now} now"
    if plan.padded and before.padded is not None:
        if before.processes != steps.world_size:
            changed["padded_shapes"] = f"of {before.processes} processes before, {steps.world_size} now"
        elif max(before.padded, default=(0, 0))[0] > longest_shape(sequences := shapes.sequences(steps, budget)):
            # Shapes that no row of this run needs; padding to them might take all memory.
            changed["padded_shapes"] = f"{before.padded} before, which no row needs, this version's now"
        else:
            shapes.set(steps, budget, shapes_of_before(before.padded, sequences))
    if changed:
        message = "checkpoint was computed with another execution plan: the last bits of the result change"
        get_logger().warning(message, **changed, change="resume on the same kind and number of GPUs to keep them")
