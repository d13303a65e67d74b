"""The precision in which questions are scored: the same for base, adapter, original base and exports.

Otherwise the differences between them would include those of the precisions. It is chosen before the base is scored,
and kept in the record of its evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from job import log
from job.distributed.processes import Processes
from job.evaluation.scorer import Scores, ScoreSequences, finite, score_sequences
from job.evaluation.scoring import Forward, plan_sequences, score_sequence
from job.model.lora import adapter_off
from job.model.placed_weights import taking_part
from job.records import Evaluated, Question, ScoringPrecision
from job.runs.attempt import Attempt
from job.settings.schema import Eval
from job.stages.handoff import Loaded, Sources
from job.training.gpu_capability import fast_kernels
from job.training.gpu_memory import free_gpu_bytes

_PROBED_EXAMPLES = 64
_KEPT_SHARE = 0.5
"""Converted weights are kept if they take no more than this share of the GPU's free memory."""


def choose_precision(
    attempt: Attempt, evaluation: Eval, sources: Sources, loaded: Loaded, gigabytes: float | None
) -> ScoringPrecision:
    """Chooses the precision, the same in all processes. Training rows show whether activations overflow fp16.

    `gigabytes` is JOB_TRAIN__GPU_MEMORY_GB.
    """
    with taking_part(loaded.model):  # the base's weights may be sharded over all processes
        why = why_as_trained(evaluation, loaded) or _too_large(sources, loaded, evaluation.batch_tokens, gigabytes)
    if why := next(filter(None, attempt.processes.gather("scoring precision", why)), ""):
        log.get_logger().info("questions are scored in the dtype of training", dtype=loaded.record.dtype, why=why)
        return ScoringPrecision(loaded.record.dtype, loaded.record.dtype, why)
    log.get_logger().info("questions are scored with products in fp16 and sums in fp32")
    return ScoringPrecision("fp16", "fp32", "nearer to fp32 than bf16")


def agree_on_attention(processes: Processes, evaluation: Eval, loaded: Loaded) -> None:
    """Makes all processes score by torch's attention where Triton's fails its test in one of them.

    A score must not depend on which process computes it. Called in all processes, after `agree_on_kernels` and before
    anything is scored.
    """
    from job.model.fused.precise_forward import tested_attention
    from job.model.fused.scoring_decoder import use_torch_attention

    if processes.place.world_size == 1:
        return
    tested = None
    if not why_as_trained(evaluation, loaded):
        kernels, _ = fast_kernels(loaded.model.device, "float16")
        tested = tested_attention(loaded.model, kernels)
    failed = processes.gather("attention of scoring", tested is not None and tested[1])
    if tested is not None and any(failed):
        use_torch_attention(tested[0])
        if not tested[1]:
            what = "scoring uses torch's attention, which is slower, since another process cannot use Triton's"
            log.get_logger().warning(what, change="that process's log says why it cannot")


def why_as_trained(evaluation: Eval, loaded: Loaded) -> str:
    """Why questions have to be scored in the dtype of training here, in words; empty if they can be in fp16."""
    from job.model.fused.precise_forward import why_not_precise

    if evaluation.precision == "model":
        return "JOB_EVAL__PRECISION is model"
    if not _on_gpu(loaded.model):
        return "fp16 is slow on a CPU"
    if loaded.record.dtype != "bf16":
        return f"the model computes in {loaded.record.dtype}"
    if not loaded.packing.packed:
        return "sequences are not packed"
    return why_not_precise(loaded.model)


def _on_gpu(model: Any) -> bool:
    return bool(model.device.type == "cuda")


def other_precision(base: Evaluated, evaluation: Eval, loaded: Loaded) -> str:
    """Why a base that was scored cannot be compared with what will be scored here, in words; empty if it can."""
    base_precision, trained_in = base.precision, loaded.record.dtype
    if base_precision is None:  # older versions did not record it
        return ""
    if not is_precise(base_precision):  # an earlier attempt may have been on a machine of another kind
        why = f"the base was scored in {base_precision.dtype}, and the adapter would be in {trained_in} here"
        return "" if base_precision.dtype == trained_in else why
    why = why_as_trained(evaluation, loaded)
    return f"the base was scored in fp16, which cannot be done here for the adapter: {why}" if why else ""


def _too_large(sources: Sources, loaded: Loaded, batch_tokens: int, gigabytes: float | None) -> str:
    """A text if weights or activations of the base are too large for fp16; empty if not."""
    from job.model.fused.precise_forward import fits_fp16

    if not fits_fp16(loaded.model):
        return "weights of the base are too large for fp16"
    rows = [sources.examples[number].input_ids for number in range(min(_PROBED_EXAMPLES, len(sources.examples)))]
    questions = [Question(tuple(ids[:-1]), ((ids[-1],),)) for ids in rows if len(ids) > 1]
    half, _ = _passes(loaded.model, gigabytes)
    with adapter_off(loaded.model):
        for part in plan_sequences(questions, batch_tokens):
            if not finite(score_sequence(loaded.model, questions[part.start : part.stop], half)):
                return "activations of the base are too large for fp16"
    return ""


def scoring_in(
    precision: ScoringPrecision | None, model: Callable[[], Any], gigabytes: float | None
) -> ScoreSequences | None:
    """How sequences are scored in this precision; None for the model's own forward pass.

    Args:
        precision: As chosen; None for the dtype of training.
        model: Returns the model; called when the first sequence is scored: its adapter is then the one that
            is scored.
        gigabytes: JOB_TRAIN__GPU_MEMORY_GB.
    """
    if not is_precise(precision):
        return None

    @cache
    def passes() -> tuple[Forward, Forward]:
        return _passes(model(), gigabytes)

    def scoring(_model: Any, questions: list[Question], sequences: Mapping[int, range]) -> Iterator[tuple[int, Scores]]:
        yield from score_sequences(model(), questions, sequences, *passes())

    return scoring


def is_precise(precision: ScoringPrecision | None) -> bool:
    """Whether questions are scored in another precision than that of training."""
    return precision is not None and precision.dtype != precision.sums


def precision_facts(precision: ScoringPrecision | None, device: Any) -> dict[str, Any]:
    """What `score_cache.score_conditions` has for this precision; empty if it is that of training."""
    if precision is None or not is_precise(precision):
        return {}
    return {"scored_in": [precision.dtype, precision.sums, fast_kernels(device, "float16")[1]]}


def _passes(model: Any, gigabytes: float | None) -> tuple[Forward, Forward]:
    """The forward passes in fp16 and, for what is too large for that, in fp32."""
    from job.model.fused.precise_forward import copies_bytes, forwards

    kernels, _ = fast_kernels(model.device, "float16")
    keep = model.device.type == "cuda" and copies_bytes(model) <= _KEPT_SHARE * free_gpu_bytes(gigabytes)
    return forwards(model, kernels, keep=keep)
