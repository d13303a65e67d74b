"""Chooses the execution plan for this machine, prepares the model for it, and logs the plan with the reason.

On a GPU, the job's fused layers train more than twice as fast as PEFT's layers. Where they cannot be used (fp32, an
old GPU, a model with unknown layers), PEFT's layers are used instead, and a warning and `training.execution` of the
manifest give the reason. On a CPU, PEFT's layers are always used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from job import log
from job.common.formatting import size
from job.common.resources import available_bytes, main_memory
from job.distributed.processes import ALONE, Processes
from job.errors import Problem, SettingsError
from job.model.architecture import read_config
from job.model.experts import quantized_experts
from job.model.fused.experts import adapter_of_experts
from job.model.fused.frozen_weights import fuse_layers
from job.model.lora import trainable
from job.model.placed_weights import placement_of
from job.records import FP8, FUSED, PEFT, ExecutionPlan
from job.training.config import CPU_MICRO_BATCH_TOKENS
from job.training.execution_plan import (
    HOST_SHARE,
    choose_budget,
    choose_long_rows,
    choose_plan,
    held_bytes,
    long_row_need,
    longest_sequence,
    why_not_recorded,
)
from job.training.gpu_capability import compute_capability, dtype_name, fast_kernels, why_not_fused
from job.training.gpu_memory import gpu_memory
from job.training.memory_model import (
    LONG_ROW,
    TILE_TOKENS,
    Setup,
    activation_bytes,
)
from job.training.refusal import Sharing, refuse_rows
from job.training.sequence_parallel import tokens_alone, why_not_divided

_COMPUTE = "JOB_TRAIN__COMPUTE"


def token_budget(device: Any, micro_batch_tokens: int | None, gigabytes: float | None) -> int:
    """The token budget of a micro-batch: the setting, or a value chosen by this machine's memory.

    Args:
        device: The model's.
        micro_batch_tokens: The setting; None to choose one.
        gigabytes: How much of the GPU may be used, in units of 1e9 bytes; None for all.
    """
    if device.type != "cuda":
        return micro_batch_tokens or CPU_MICRO_BATCH_TOKENS
    return micro_batch_tokens or choose_budget(gpu_memory(gigabytes)[0])


def prepare(
    model: Any,
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    quantization: str,
    optimizer: str,
    budget: int,
    keep_base: bool | Literal["auto"],
    recompute: bool | Literal["auto"],
    gigabytes: float | None,
    processes: int = 1,
    random: bool = False,
    slow: str | None = None,
    offload: bool | Literal["auto"] = "auto",
    method: str = "sft",
    longest_at: str = "",
    validation: Sequence[int] = (),
    compute: Literal["dtype", "fp8"] = "dtype",
    sequence_parallel: Literal["auto", "off"] = "off",
    group: Processes = ALONE,
) -> ExecutionPlan:
    """Chooses how this machine trains the model, and makes the model ready for it.

    Args:
        model: The base with its adapter.
        lengths: Tokens of each example.
        global_batch_size: Examples of a step.
        quantization: `nf4` or `none`.
        optimizer: A key of `OPTIMIZERS`.
        budget: The token budget of a micro-batch.
        keep_base: `JOB_MODEL__KEEP_DEQUANTIZED`.
        recompute: `JOB_TRAIN__GRADIENT_CHECKPOINTING`.
        gigabytes: How much of the GPU may be used, in units of 1e9 bytes; None for all.
        processes: How many train on this machine.
        random: Whether the embeddings get noise (NEFTune), which a CUDA graph would repeat unchanged.
        slow: Why PEFT's own layers have to compute this adapter; None if they need not.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`.
        method: A key of `METHODS`; only `sft` computes long rows layer by layer.
        longest_at: File and line of the longest row, for messages; empty if they are not known.
        validation: Tokens of each row that is validated on.
        compute: `JOB_TRAIN__COMPUTE`.
        sequence_parallel: `JOB_TRAIN__SEQUENCE_PARALLEL`.
        group: All processes of the run; they agree on which rows they compute together, and by which kernel.

    Returns:
        The plan, which the model now follows: its layers are fused as `forward` says.

    Raises:
        SettingsError: The longest row cannot fit into memory. Or `compute` is fp8, and PEFT's own layers are needed,
            or a layer's size is not a multiple that FP8 products require.
    """
    setup, placement = setup_of(model, quantization, optimizer), placement_of(model)
    setup = setup and replace(setup, placement=placement, processes=group.place.world_size)
    allowed = None if offload == "auto" else offload
    slow = why_not_fused(model) or slow
    dtype = dtype_name(model)
    if compute == FP8:
        _require_fp8_possible(setup, dtype if slow is None else None)
    if slow is None and setup is None:
        slow = f"the sizes of a {model.get_base_model().config.model_type} model are not known"
    longest_trained = max(lengths)
    lengths = [*lengths, *sorted(validation, reverse=True)[:1]]
    rows = None if slow is not None else _rows(model, lengths, budget, global_batch_size, method)
    never = "JOB_TRAIN__NEFTUNE_NOISE_ALPHA draws noise that depends on the length of the whole row" if random else ""
    several = method == "sft" and group.place.world_size > 1
    divides = several and sequence_parallel == "auto"
    kernel = _agreed_kernel(model, setup, rows, max(lengths), group, divides=divides)
    above = None
    if several and max(lengths) > LONG_ROW:  # all ask, since another machine's setting may be another
        how: dict[str, Any] = {"gigabytes": gigabytes, "offload": allowed, "never": never, "kernel": kernel}
        above = _agreed(group, _tokens_alone(model, setup, max(lengths), group, **how) if divides else 0)
    if rows is not None and above is not None:
        rows = _divided(rows, lengths, budget, above, group.place.world_size)
    may_fit = partial(
        _refuse,
        model,
        setup,
        longest_trained,  # not of validation: it has no backward pass, whose memory the formula counts
        gigabytes=gigabytes,
        offload=allowed,
        processes=processes,
        where=longest_at,
        kernel=kernel,
        sharing=_sharing(setup, longest_trained, above, group.place.world_size, never),
    )
    if rows is not None and setup is not None:
        plan = _fuse(
            model,
            setup,
            rows=rows,
            keep_base=None if keep_base == "auto" else keep_base,
            keep_activations=None if recompute == "auto" else not recompute,
            gigabytes=gigabytes,
            offload=allowed,
            host_bytes=available_bytes() // processes,
            fp8=compute == FP8,
            may_fit=may_fit,
            kernel=kernel,
        )
        if plan is not None:
            if random and plan.recorded:
                why = "no CUDA graphs: JOB_TRAIN__NEFTUNE_NOISE_ALPHA draws new noise in every step"
                plan = replace(plan, recorded=False, reason=f"{plan.reason}; {why}")
            log.get_logger().info("execution plan", micro_batch_tokens=budget, **asdict(plan))
            _note_unused(plan, lengths, offload=offload)
            return plan
        slow = "this adapter's PEFT layers are of a kind for which there are no fused layers"
    if compute == FP8:
        raise SettingsError([Problem(_COMPUTE, f"is fp8, which only the job's fused layers compute: {slow}")])
    may_fit()
    _note_unused(None, lengths, offload=offload)
    kept, memory = _keeps_activations(model, setup, max(budget, *lengths), processes, recompute=recompute)
    plan = ExecutionPlan(
        kept_base=False,
        kept_activations=kept,
        recorded=False,
        reason="; ".join(filter(None, (slow, memory))),
        forward=PEFT,
        base_held=placement,
    )
    if model.device.type == "cuda":
        log.get_logger().warning(
            "training runs at less than half speed: PEFT's own layers compute instead of this job's fused ones",
            micro_batch_tokens=budget,
            **asdict(plan),
        )
    else:
        log.get_logger().info("execution plan", micro_batch_tokens=budget, **asdict(plan))
    return plan


SHARE = 0.3
"""Share of the available memory that activations on a CPU may take by the formula, which leaves out dropout's masks
(half as much again), gradients, optimizer states and other processes."""


def keeps_activations(setup: Setup, tokens: int, processes: int) -> bool:
    """Whether all activations fit in a CPU's memory, so that none has to be recomputed.

    Args:
        setup: What is trained.
        tokens: Of the largest micro-batch.
        processes: How many train on this machine.
    """
    return processes * activation_bytes(replace(setup, recompute=False), tokens) <= SHARE * available_bytes()


def setup_of(model: Any, quantization: str, optimizer: str) -> Setup | None:
    """The input of the memory formulas; None if they do not cover the model's architecture.

    Args:
        model: The base with its adapter.
        quantization: `nf4` or `none`.
        optimizer: A key of `OPTIMIZERS`.
    """
    base, adapter = model.get_base_model(), model.peft_config["default"]
    try:
        architecture = read_config(base.config.to_dict())
    except ValueError:
        return None
    return Setup(
        architecture=architecture,
        rank=getattr(adapter, "init_r", adapter.r),
        targets=tuple(sorted(adapter.target_modules)),
        quantization=quantization,
        double_quantization=True,
        value_bytes=base.dtype.itemsize,
        optimizer=optimizer,
        recompute=True,
        counted=sum(p.numel() for p in trainable(model).values()) if _is_uneven(adapter) else None,
        plain_experts=quantization != "none" and architecture.experts > 0 and quantized_experts(base) == 0,
        expert_adapter=adapter_of_experts(model) if getattr(adapter, "target_parameters", None) else 0,
        dora=getattr(adapter, "use_dora", False),
        merged_rows=2 * architecture.vocabulary if adapter.trainable_token_indices else 0,
    )


def _is_uneven(adapter: Any) -> bool:
    """Whether an adapter's parameters do not follow from rank and targets alone."""
    options = (
        *("use_dora", "layers_to_transform", "rank_pattern", "init_r"),
        *("modules_to_save", "trainable_token_indices", "target_parameters"),
    )
    return any(getattr(adapter, name, None) for name in options)


@dataclass(frozen=True)
class _Rows:
    """The lengths that decide how much memory training needs, in tokens.

    Attributes:
        padded: The longest padded sequence; 0 if every row is computed layer by layer.
        long: The longest micro-batch with a long row that one process computes layer by layer; 0 if all long rows are
            divided; None if no row is computed so.
        divided: The longest row that is divided over the processes; 0 if none is.
        above: Rows of more tokens than this are divided; None if no row may be.
        processes: How many processes a row is divided over.
    """

    padded: int
    long: int | None
    divided: int = 0
    above: int | None = None
    processes: int = 1


def _note_unused(plan: ExecutionPlan | None, lengths: Sequence[int], *, offload: bool | Literal["auto"]) -> None:
    """Warns that activations are not offloaded although the setting says so."""
    if offload is not True or (plan is not None and plan.tile_tokens is not None):
        return
    why = "this machine, model or method does not compute long rows layer by layer"
    if (longest := max(lengths)) <= LONG_ROW:
        why = f"the longest row has {longest:,} tokens, and only rows of more than {LONG_ROW:,} are offloaded"
    log.get_logger().warning("JOB_TRAIN__OFFLOAD_ACTIVATIONS has no effect", why=why, change="remove it, or set auto")


def _require_fp8_possible(setup: Setup | None, dtype: str | None) -> None:
    """Refuses what cannot be computed in FP8.

    Args:
        setup: What is trained; None if the architecture is not known.
        dtype: The compute dtype by its name in torch; None where PEFT's own layers compute.

    Raises:
        SettingsError: The dtype is not bf16, or the model is a mixture of experts.
    """
    if dtype not in {None, "bfloat16"}:
        what = (
            f"is fp8, which needs bf16 for all other operations, but the compute dtype is {dtype}; set "
            "JOB_MODEL__DTYPE=bf16"
        )
        raise SettingsError([Problem(_COMPUTE, what)])
    if setup is not None and setup.architecture.experts:
        raise SettingsError([Problem(_COMPUTE, "is fp8, which does not support a mixture's experts; remove it")])


def _rows(model: Any, lengths: Sequence[int], budget: int, global_batch_size: int, method: str) -> _Rows:
    from job.model.fused import lora_forward
    from job.training.long_rows import why_not_here

    longest = max(lengths)
    if longest > LONG_ROW and method == "sft" and lora_forward.knows(model.get_base_model()):
        if (why := why_not_here(model)) is None:
            short = [length for length in lengths if length <= LONG_ROW]
            padded = longest_sequence(short, global_batch_size, budget) if short else 0
            return _Rows(padded, max(longest, budget))
        log.get_logger().warning("long rows are not computed layer by layer, which takes more memory and time", why=why)
    return _Rows(longest_sequence(lengths, global_batch_size, budget), None)


def _tokens_alone(
    model: Any,
    setup: Setup | None,
    longest: int,
    group: Processes,
    *,
    gigabytes: float | None,
    offload: bool | None,
    never: str,
    kernel: str | None,
) -> int:
    """Tokens of the longest row that this process can compute alone; 0 if it cannot take part in a divided row."""
    if setup is None or kernel is None:
        return 0
    from job.model.fused.long_attention import copies_of

    found = tokens_alone(
        setup,
        longest,
        memory_bytes=gpu_memory(gigabytes)[0],
        host_bytes=int(HOST_SHARE * main_memory().total_bytes / group.place.local_world_size),
        offload=offload,
        copies=copies_of(setup.architecture, model.device, kernel),
    )
    why = never or why_not_divided(setup.architecture, group.place.world_size)
    if why and found < longest:
        log.get_logger().warning("long rows are not divided over the processes, which would take less memory", why=why)
    return 0 if why else found


def _agreed(group: Processes, own: int) -> int | None:
    """Rows of more tokens than this are divided, the same in all processes; None if one of them cannot take part.

    Args:
        group: All processes of the run.
        own: What `_tokens_alone` returned in this one.
    """
    found = group.gather("tokens of a row that one process computes", own)
    return min(found) if all(found) else None


def _divided(rows: _Rows, lengths: Sequence[int], budget: int, above: int, processes: int) -> _Rows:
    """`rows`, with those of more than `above` tokens divided over `processes`."""
    alone = [length for length in lengths if LONG_ROW < length <= above]
    longest = max(lengths)
    return replace(
        rows,
        long=max(*alone, budget) if alone else 0,
        divided=longest if longest > above else 0,
        above=above,
        processes=processes,
    )


def _sharing(setup: Setup | None, longest: int, above: int | None, world_size: int, never: str) -> Sharing:
    """How many processes compute the longest row together, and how many could."""
    if setup is None:
        return Sharing()
    return Sharing(
        processes=world_size if above is not None and longest > above else 1,
        may_divide=1 if why_not_divided(setup.architecture, world_size) else world_size,
        never=never,
    )


def _fuse(
    model: Any,
    setup: Setup,
    *,
    rows: _Rows,
    keep_base: bool | None,
    keep_activations: bool | None,
    gigabytes: float | None,
    offload: bool | None,
    host_bytes: int,
    fp8: bool,
    may_fit: Callable[[], None],
    kernel: str | None,
) -> ExecutionPlan | None:
    """Replaces the layers' forward by fused ones, as far as free memory allows; None if no layer can be replaced."""
    import torch

    from job.model.fused import lora_forward
    from job.model.fused.fp8 import MULTIPLE
    from job.model.fused.long_attention import FLASH, copies_of

    if fp8 and (odd := _not_multiples(setup, MULTIPLE)):
        what = f"is fp8, whose products need sizes that are multiples of {MULTIPLE}; this model has {odd}; remove it"
        raise SettingsError([Problem(_COMPUTE, what)])
    may_fit()
    _, free = gpu_memory(gigabytes)
    copies, reserved = copies_of(setup.architecture, model.device, kernel or FLASH), 0
    if rows.long is not None:
        reserved = max(
            long_row_need(setup, tokens, over, offloaded=offload is not False, kept_attention=False, copies=copies)
            for tokens, over in ((rows.long, 1), (rows.divided, rows.processes))
            if tokens
        )
    plan = choose_plan(
        setup,
        free_bytes=max(0, free - reserved),
        sequence_tokens=rows.padded,
        # With long rows only, dequantizing takes no noticeable share of the time; quantizing to FP8, twice, does.
        keep_base=False if keep_base is None and rows.padded == 0 and not fp8 else keep_base,
        keep_activations=keep_activations if rows.padded else False,  # long rows are always recomputed layer by layer
        recorded=lora_forward.knows(model.get_base_model()),
        not_recorded=why_not_recorded(setup, compute_capability(), half=dtype_name(model)),
        fp8=fp8,
    )
    if rows.long is not None:
        plan = choose_long_rows(
            replace(plan, recorded=plan.recorded and rows.padded > 0),
            setup,
            tokens=rows.long,
            free_bytes=free - held_bytes(setup, plan, rows.padded),
            host_bytes=host_bytes,
            offload=offload,
            copies=copies,
            tile=TILE_TOKENS,
            divided=(rows.divided, rows.processes) if rows.divided else None,
            attention=kernel,
        )
        plan = replace(plan, sequence_parallel=rows.processes, divided_above=rows.above)
    kernels, name = fast_kernels(model.device, dtype_name(model))
    try:
        made = fuse_layers(model, keep_dequantized=plan.kept_base, kernels=kernels, fp8=fp8)
    except torch.OutOfMemoryError:  # another process took the free memory, or the setting needs too much
        plan = replace(plan, kept_base=False, reason=f"{plan.reason}, and ran out while keeping the base")
        made = fuse_layers(model, keep_dequantized=False, kernels=kernels, fp8=fp8)
    if made == "nothing":
        return None
    forward = ", ".join((f"{FUSED} {made}", name, *([FP8] if fp8 else [])))
    return replace(plan, recorded=plan.recorded and made == "all", forward=forward)


def _agreed_kernel(
    model: Any, setup: Setup | None, rows: _Rows | None, longest: int, group: Processes, *, divides: bool
) -> str | None:
    """The attention kernel of long rows, the same in all processes, since it affects the last bits.

    None if no row is computed layer by layer.
    """
    if longest <= LONG_ROW:
        return None
    from job.model.fused.long_attention import choose_kernel, slowest

    if setup is None or rows is None or rows.long is None:
        own = None
    else:
        base = model.get_base_model()
        own = choose_kernel(
            setup.architecture,
            base.dtype,
            model.device,
            windowed=getattr(base.config.get_text_config(), "sliding_window", None) is not None,
            processes=group.place.world_size if divides else 1,
        )
    if group.place.world_size == 1:
        return own
    found = group.gather("kernel of long rows", own)
    if own is None or None in found:
        return own
    if (agreed := slowest(found)) != own:
        what = "attention of long rows is computed by a slower kernel, since another process cannot use the faster one"
        change = "that process's log says why it cannot"
        log.get_logger().warning(what, kernel=agreed, faster=own, change=change)
    return agreed


def _not_multiples(setup: Setup, factor: int) -> str:
    """The adapted layers whose inputs or outputs are not multiples of `factor`, in words; empty if all are."""
    sizes = {name: setup.architecture.linear[name] for name in setup.targets if name in setup.architecture.linear}
    return ", ".join(
        f"{name} of {inputs} x {outputs}"
        for name, (inputs, outputs) in sizes.items()
        if inputs % factor or outputs % factor
    )


def _refuse(
    model: Any,
    setup: Setup | None,
    longest: int,
    *,
    gigabytes: float | None,
    offload: bool | None,
    processes: int,
    where: str,
    kernel: str | None,
    sharing: Sharing,
) -> None:
    """Refuses rows that certainly do not fit into the GPU's memory, or on a CPU into the machine's.

    Raises:
        SettingsError: The longest row does not fit.
    """
    from job.model.fused.long_attention import copies_of

    if setup is None:
        return
    host = available_bytes() // processes
    on_gpu = model.device.type == "cuda"
    copies = None if kernel is None else copies_of(setup.architecture, model.device, kernel)
    refuse_rows(
        setup,
        longest,
        free_bytes=gpu_memory(gigabytes)[1] if on_gpu else host,
        host_bytes=host if on_gpu else None,
        offload=offload,
        copies=copies,
        where=where,
        sharing=sharing,
    )


def _keeps_activations(
    model: Any, setup: Setup | None, tokens: int, processes: int, *, recompute: bool | Literal["auto"]
) -> tuple[bool, str]:
    """Whether PEFT's layers keep activations, and the reason: as set, or with `auto` on a CPU with enough memory."""
    if recompute != "auto":
        return not recompute, ""
    if model.device.type != "cpu" or setup is None:
        return False, ""
    need = processes * activation_bytes(replace(setup, recompute=False), tokens)
    kept = keeps_activations(setup, tokens, processes)
    return kept, f"activations would take {size(need, ' ')}: {'kept' if kept else 'recomputed in the backward pass'}"
