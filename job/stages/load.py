"""Loading: the quantized base with a new adapter, prepared for the fastest execution plan that fits in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from job import log
from job.common.malloc import keep_freed_memory
from job.data.batch_plan import Steps
from job.data.examples import lengths_of
from job.distributed.processes import ALONE, Processes
from job.errors import Problem, SettingsError
from job.model.adapter_options import AdapterOptions, make_options
from job.model.device import choose_device, choose_dtype, make_deterministic
from job.model.experts import quantized_experts
from job.model.load_base import PLAIN, load_base
from job.model.lora import add_adapter
from job.model.model_record import describe_model
from job.model.packed_attention import NAME, use
from job.model.packing_check import choose_packing
from job.model.placed_weights import taking_part
from job.model.published_names import PublishedNames, find_published_names
from job.model.quantized_cache.cache import save
from job.model.quantized_cache.layout import CachedBase, cached_base
from job.model.start_adapter import load_start
from job.model.whole_modules import grow_embeddings
from job.records import ExecutionPlan, ModelRecord, Packing
from job.settings.load import Settings
from job.stages.handoff import Loaded, Sources
from job.stages.placement import decide_placement
from job.stages.scoring_precision import agree_on_attention
from job.training.config import total_steps
from job.training.gpu_capability import agree_on_kernels
from job.training.gpu_memory import limit_memory
from job.training.lm_head_loss import losses_of
from job.training.memory_model import LONG_ROW
from job.training.prepare import prepare, token_budget
from job.training.speed_advice import slower_ways


@dataclass(frozen=True)
class _ModelSetup:
    """How this process computes, chosen before the base is loaded.

    Attributes:
        device: The torch device where the model computes.
        dtype: The torch dtype it computes in.
        steps: Number of optimizer steps of the run.
        options: The adapter's options.
        budget: Token budget of a micro-batch, the same in all processes.
        placement: Where the base's 4-bit weights are kept, the same in all processes.
        why_placed: Why they are kept there, in words; empty if they are on the GPU.
    """

    device: Any
    dtype: Any
    steps: int
    options: AdapterOptions
    budget: int
    placement: str
    why_placed: str


def load(
    settings: Settings,
    sources: Sources,
    processes: Processes = ALONE,
    decided: Packing | None = None,
    begin: Callable[[Any, Steps], None] | None = None,
    *,
    trains: bool = True,
) -> Loaded:
    """Loads the quantized base and adds a new adapter; every process loads its own copy.

    `decided` is what an earlier attempt of the run decided about packing, which is taken over because it affects the
    result's bits. `begin`, called with the model and the batch plan, may give the new adapter other first values,
    before its layers are fused. `trains`: whether training is still to be done.

    Raises:
        SettingsError: The settings do not fit the model or this machine.
        DataError: The model's folder cannot be loaded.
    """
    setup = _choose_setup(settings, sources, processes)
    base, kept_base = _load_base(settings, sources, processes, setup)
    model = _add_adapter(base, settings, sources, setup.options)
    names = find_published_names(model, sources.folder, quantized=sources.quantized)
    if sources.start is not None:
        load_start(model, sources.start, names)
    record = _describe(model, settings, sources, names)
    log.get_logger().info(
        "model is loaded",
        device=str(setup.device),
        dtype=record.dtype,
        trainable_parameters=record.trainable_parameters,
    )
    packing = _choose_packing(model, settings, sources, processes, decided)
    if begin is not None:
        seed = settings.run.seed if settings.data.seed is None else settings.data.seed
        begin(model, Steps(sources.examples, seed, settings.train.global_batch_size, setup.steps))
    plan = _prepare(model, settings, sources, processes, setup=setup, packing=packing, trains=trains)
    _log_slower_ways(plan, settings, sources, on_gpu=setup.device.type == "cuda")
    loaded = Loaded(
        model=model,
        record=record,
        micro_batch_tokens=setup.budget,
        plan=plan,
        kept_base=kept_base,
        packing=packing,
        names=names,
    )
    agree_on_attention(processes, settings.eval, loaded)
    return loaded


def _choose_setup(settings: Settings, sources: Sources, processes: Processes) -> _ModelSetup:
    """Chooses device, dtype, kernels, micro-batches and placement, on which all processes agree."""
    device, train = choose_device(settings.run.device), settings.train
    if device.type == "cuda":
        make_deterministic()
        limit_memory(train.gpu_memory_gb)
    dtype = choose_dtype(settings.model.dtype, device)
    computed_in = {str(dtype).removeprefix("torch."), "float16"}  # training and scoring
    agree_on_kernels(processes, device, sorted(computed_in - {"float32"}))
    steps = total_steps(len(sources.examples), train.global_batch_size, train.epochs, train.max_steps)
    options = make_options(dict(settings.lora), steps, settings.model.add_tokens or ())
    own_budget = token_budget(device, train.micro_batch_tokens, train.gpu_memory_gb)
    # The budget affects the result's bits, so all processes use the same.
    budget = min(processes.gather("token budget", own_budget))
    placement, why = decide_placement(
        settings.model,
        train,
        settings.lora,
        sources,
        processes,
        device=device,
        budget=budget,
        scoring_tokens=settings.eval.batch_tokens,
        options=options,
    )
    return _ModelSetup(
        device=device,
        dtype=dtype,
        steps=steps,
        options=options,
        budget=budget,
        placement=placement,
        why_placed=why,
    )


def _load_base(
    settings: Settings, sources: Sources, processes: Processes, setup: _ModelSetup
) -> tuple[Any, CachedBase]:
    """(the quantized base, where a restart finds it: it is written to the cache if there is one)."""
    base = load_base(
        sources.folder,
        quantization=settings.model.quantization,
        double_quantization=settings.model.double_quantization,
        dtype=setup.dtype,
        device=setup.device,
        max_length=settings.train.max_length,
        quantized=sources.quantized,
        targets=settings.lora.target_modules,
        rank=settings.lora.rank,
        options=setup.options,
        placement=setup.placement,
        group=processes,
    )
    if setup.device.type == "cpu":
        keep_freed_memory()  # only after loading, so that temporary memory is returned to the system
    with taking_part(base):
        if sources.cache_entry is None or sources.quantized:
            kept_base = cached_base(sources.cache_entry)
        else:
            kept_base = save(base, sources.folder, sources.cache_entry)
    return base, replace(kept_base, quantized_experts=quantized_experts(base))


def _add_adapter(base: Any, settings: Settings, sources: Sources, options: AdapterOptions) -> Any:
    """The base with a new adapter, and with rows of the embedding for JOB_MODEL__ADD_TOKENS."""
    lora, added = settings.lora, settings.model.add_tokens or ()
    if added:
        grow_embeddings(base, len(sources.tokenizer))
    with taking_part(base):  # the adapter may begin with a part of its weights
        return add_adapter(
            base,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            seed=settings.run.seed if lora.seed is None else lora.seed,
            options=options,
            token_ids=sources.tokenizer.convert_tokens_to_ids(list(added)),
        )


def _describe(model: Any, settings: Settings, sources: Sources, names: PublishedNames) -> ModelRecord:
    """The record of the model for the manifest."""
    record = describe_model(
        model,
        name=settings.model.id,
        revision=sources.record.model_revision,
        sha256=sources.record.model_sha256,
        added_tokens=settings.model.add_tokens or (),
    )
    return replace(record, architecture=names.architecture)


def _prepare(
    model: Any,
    settings: Settings,
    sources: Sources,
    processes: Processes,
    *,
    setup: _ModelSetup,
    packing: Packing,
    trains: bool,
) -> ExecutionPlan:
    """The execution plan, with all reasons; the model's layers are fused as it says."""
    train = settings.train
    plan = prepare(
        model,
        lengths_of(sources.examples),
        global_batch_size=train.global_batch_size,
        quantization=settings.model.quantization,
        optimizer=train.optimizer,
        budget=setup.budget,
        keep_base=settings.model.keep_dequantized,
        recompute=train.gradient_checkpointing,
        gigabytes=train.gpu_memory_gb,
        processes=processes.place.local_world_size,
        random=train.neftune_noise_alpha > 0,
        slow=setup.options.not_fused,
        offload=train.offload_activations,
        method=train.last_method,
        longest_at=sources.record.dataset.longest_at,
        validation=lengths_of(sources.validation),
        compute=train.compute,
        sequence_parallel=train.sequence_parallel,
        trains=trains,
        group=processes,
    )
    if train.last_method != "sft" and plan.recorded:
        plan = replace(plan, recorded=False, reason=f"{plan.reason}; no CUDA graphs for {train.last_method}")
    plan = replace(plan, reason="; ".join(filter(None, (plan.reason, setup.why_placed))))
    if not packing.packed:
        plan = replace(plan, packed=False, reason=f"{plan.reason}: {packing.reason}")
    return plan


def check_experts(began: CachedBase | None, loaded: CachedBase) -> None:
    """Refuses a base whose experts are quantized, or not, unlike when the run began.

    Raises:
        SettingsError: The experts differ in this.
    """
    if began is None or began.quantized_experts == loaded.quantized_experts:
        return
    before, now = ("in 4 bits" if base.quantized_experts else "in 16 bits" for base in (began, loaded))
    what = f"is a mixture whose experts this version of the job keeps {now}, but the version that began this run kept"
    what = f"{what} {before}; use that version, or another JOB_RUN__ID for a new run"
    raise SettingsError([Problem("JOB_MODEL__ID", what)])


def _log_slower_ways(plan: ExecutionPlan, settings: Settings, sources: Sources, *, on_gpu: bool) -> None:
    """Logs a line for each thing that makes training slower than it could be, with what would change it."""
    train = settings.train
    for slowdown in slower_ways(
        plan,
        on_gpu=on_gpu,
        quantized=settings.model.quantization != "none",
        keep_base=settings.model.keep_dequantized,
        recompute=train.gradient_checkpointing,
        method=train.last_method,
        noise=train.neftune_noise_alpha > 0,
        only_long=min(lengths_of(sources.examples)) > LONG_ROW,
    ):
        log.get_logger().info(f"slower than it could be: {slowdown.what}", change=slowdown.change)


def _choose_packing(
    model: Any, settings: Settings, sources: Sources, processes: Processes, decided: Packing | None
) -> Packing:
    """Whether this model computes packed sequences correctly; all processes use one answer, since it affects bits."""
    if decided is not None:
        use(model.get_base_model(), NAME if decided.packed else PLAIN)
        return decided
    with taking_part(model):
        packing = choose_packing(
            model,
            sources.examples,
            max_length=settings.train.max_length,
            losses=losses_of(model),
        )
    if packing.packed and not all(processes.gather("packing", packing.packed)):
        packing = Packing(
            packed=False, reason="another process of the run finds that packed sequences give wrong results"
        )
        use(model.get_base_model(), PLAIN)
    return packing
