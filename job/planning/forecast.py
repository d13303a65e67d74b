"""Forecast of a run: steps, memory, disk, and for each GPU whether it fits, hours and dollars.

The formulas of memory and speed are in `training.memory_model`, with their sources. Every estimate says whether it is
computed, measured or assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, Literal

from job.common.export_formats import GGUF, MERGED, find_format, weights_bytes
from job.common.formatting import size
from job.common.resources import checkpoint_bytes, required_bytes
from job.planning.auxiliary_models import AuxiliaryModel
from job.planning.auxiliary_models import seconds as auxiliary_seconds
from job.planning.gpu_prices import Gpu
from job.planning.known_models_and_data import TaskTokens
from job.planning.scaling import Division, divide
from job.planning.workload import Workload
from job.records import ExecutionPlan
from job.training import memory_model
from job.training.execution_plan import (
    AMPERE,
    FP8_CAPABILITY,
    choose_budget,
    choose_long_rows,
    choose_placement,
    choose_plan,
    why_not_recorded,
)
from job.training.memory_model import LONG_ROW, TILE_TOKENS, Setup
from job.training.sequence_parallel import (
    MOST_GPUS,
    enough_gpus,
    least_memory,
    row_host_bytes,
    row_memory,
    why_not_divided,
)

Basis = Literal["computed", "measured", "assumed"]

DOWNLOAD_RATE = 250e6
START_SECONDS = 40.0
"""Assumed: DOWNLOAD_RATE in bytes a second for what is fetched. START_SECONDS for starting, hashing, quantizing and
loading: measured 29 s with an H100 and 39 s with an H200 and four cores, for Mistral-7B from a local disk
(`2026-11-28-h100-job.jsonl`, `2026-11-28-h200-job.jsonl`), before imports were made shorter."""
MERGED_PER_SECOND = 30e6
GGUF_PER_SECOND = 6e6
LLAMA_CPP_FLOPS = 23e9
"""Of one processor core, measured on a model of 86 million weights in bf16 with AVX-512: weights cast to fp8 (merging
is assumed to be as fast), weights made Q8_0 with the start of the process, operations as llama.cpp scores Q8_0."""
CORES = 8
"""Assumed, of the machine with the GPU: llama.cpp scores on all of them, all else is done on one."""
FLASH_CAPABILITY = (8, 0)
"""Compute capability from which there is a kernel for packed sequences; below, attention runs example by example."""
MAX_TOKENS = 65_536
"""Upper bound of the micro-batch, in tokens, if nothing is known about the data."""
_UNKNOWN_HOST = 1 << 50
"""Bytes of main memory where the machine's are not known."""
EVALUATIONS = 2
HALF_PRECISION = 2


@dataclass(frozen=True)
class ForwardWork:
    """Rows that are computed without training on them, for validation or a reference: how often, and what each takes.

    A run that stops early has fewer validations.
    """

    count: int
    rows: int
    tokens: int
    target_tokens: int
    longest: int


@dataclass(frozen=True)
class RunShape:
    """What is known about a run; None means unknown.

    Attributes:
        setup: Model, adapter, precision and optimizer.
        setup_basis: `computed` from the model's own configuration, or `assumed` from a table.
        workload: Optimizer steps and tokens.
        workload_basis: `computed` from the examples, or `assumed`: scaled from a sample or from characters.
        questions: Questions of all tasks; each is scored `evaluations` times.
        questions_basis: As above.
        answered: Tokens of the longest prompt to which an answer is generated, and with the answer; 0 where none is.
        budget: Tokens of a micro-batch as set, else what the job takes on a small GPU.
        scoring_budget: Tokens scored in one forward pass.
        download_bytes: Model and data that have to be fetched first.
        usd_per_hour: JOB_COST__USD_PER_HOUR.
        fused: Whether GPUs from `fused_from` on use the fused layers.
        fused_from: The lowest compute capability that does: in bf16 Ampere's; in fp16, which the job takes where a GPU
            has no bf16, Volta's.
        fp16: Whether the compute dtype is set to fp16.
        fp8: Whether training computes the products with the frozen weights in FP8.
        budget_by_gpu: Whether `budget` is not set, so that the job chooses it by the GPU's memory.
        keep_base: Whether the dequantized base is kept in memory; None where the job chooses.
        keep_activations: Whether activations are kept instead of recomputed; None where the job chooses.
        validation: The validations; None where there are none, or their rows are unknown.
        merges: How many candidates of the merged model are made and scored.
        derived: The exported formats that are made from the merged model.
        adapter_copies: How many copies of the adapter are exported, which are scored and take little else.
        quantizing_tokens: Tokens that a calibrated format computes, forward and backward, in all its steps.
        reference: The log-probabilities of the reference, as dpo and kto need them; None likewise.
        first_stage: What is trained before, as in JOB_TRAIN__METHOD=sft,dpo; its download is in this one's.
        full_precision: Whether the base with its original weights is scored too, where it fits.
        placements: Where the base's 4-bit weights may lie, the fastest first; see `memory_model.PLACEMENTS`.
        processes: That share the work, each with a GPU.
        processes_here: Those of one machine.
        tiles: Whether rows of more than `LONG_ROW` tokens are computed layer by layer, where fused layers compute.
        attention_copies: As `copies` of `memory_model.long_row_bytes`: of flash attention until a GPU is chosen.
        recorded: Whether the method's GPU kernels can be recorded as CUDA graphs, where fused layers compute.
        offload: JOB_TRAIN__OFFLOAD_ACTIVATIONS; None where the job chooses.
        divide: Whether a long row that does not fit on one GPU is divided over those of the run.
        auxiliary: The classifier of the safety screen and the judge, if the run has them.
        step_rows: JOB_TRAIN__GLOBAL_BATCH_SIZE.
    """

    setup: Setup | None
    setup_basis: Basis
    workload: Workload | None
    workload_basis: Basis
    questions: TaskTokens | None
    questions_basis: Basis
    budget: int
    scoring_budget: int
    download_bytes: int
    usd_per_hour: float | None
    fused: bool = False
    fused_from: tuple[int, int] = AMPERE
    fp16: bool = False
    fp8: bool = False
    budget_by_gpu: bool = False
    keep_base: bool | None = None
    keep_activations: bool | None = None
    validation: ForwardWork | None = None
    reference: ForwardWork | None = None
    first_stage: RunShape | None = None
    merges: int = 0
    derived: tuple[str, ...] = ()
    adapter_copies: int = 0
    quantizing_tokens: int = 0
    full_precision: bool = False
    placements: tuple[str, ...] = ("gpu",)
    processes: int = 1
    processes_here: int = 1
    tiles: bool = False
    attention_copies: int = memory_model.ATTENTION_COPIES
    recorded: bool = True
    offload: bool | None = None
    divide: bool = False
    auxiliary: tuple[AuxiliaryModel, ...] = ()
    answered: tuple[int, int] = (0, 0)
    step_rows: int = 32

    @property
    def evaluations(self) -> int:
        """How often all questions are scored: by base, adapter, the unquantized base, and each exported candidate."""
        return EVALUATIONS + self.exported + self.full_precision

    @property
    def exported(self) -> int:
        """How many candidates of exported formats are scored."""
        return self.merges + len(self.derived) + self.adapter_copies

    def format_bytes(self, name: str) -> int:
        """The files of an exported format, as weights; 0 for an unknown model."""
        if self.setup is None:
            return 0
        a = self.setup.architecture
        return weights_bytes(name, a.linear_parameters, a.parameters - a.linear_parameters)

    @property
    def export_bytes(self) -> int:
        """Disk for all candidates of the merged model and all formats that are made from it."""
        return self.merges * self.format_bytes(MERGED) + sum(map(self.format_bytes, self.derived))

    @property
    def micro_batch(self) -> int:
        """Tokens of the largest micro-batch: at least the longest example, at most the largest step."""
        if self.workload is None:
            return self.budget
        return min(max(self.budget, self.workload.longest), self.workload.largest_step)

    @property
    def reads(self) -> int:
        """Positions of a scored sequence at which logits are computed; half of them if the questions are unknown."""
        share = self.questions.reads / self.questions.tokens if self.questions else 0.5
        return ceil(share * self.scoring_budget)


@dataclass(frozen=True)
class Estimate:
    """A number and its basis: computed from known facts, measured by this command, or assumed."""

    name: str
    value: float
    unit: str
    basis: Basis
    note: str = ""


@dataclass(frozen=True)
class GpuForecast:
    """A run on GPUs of one kind: on one, or on all of the run's processes.

    `budget_recomputing` and `budget_keeping` are the largest micro-batches that fit, in tokens, with activations
    recomputed and kept; 0 where not even the longest example fits. `keeps` names what the job would keep in memory
    instead of recomputing it (base, activations); `hours` are computed for that, and `usd` for all `gpus` together.
    `usd_per_hour` is the price of one GPU, or the run's as it was set. `base_held` is the base's placement.
    """

    name: str
    memory_bytes: int
    fits: bool
    note: str
    keeps: str
    budget_recomputing: int
    budget_keeping: int
    hours: float | None
    usd_per_hour: float
    usd: float | None
    machine: str
    base_held: str = "gpu"
    divided_over: int = 1
    """Over how many GPUs the longest row is divided."""
    gpus: int = 1
    """How many share the work."""


def estimates(run: RunShape) -> Iterator[Estimate]:
    """Everything that does not depend on the GPU."""
    yield from _of_the_data(run)
    if run.setup is None:
        return
    setup, basis = run.setup, run.setup_basis
    if len(run.placements) == 1 and run.placements[0] != "gpu":
        setup = replace(setup, placement=run.placements[0], processes=run.processes)
    both = _weaker(run.setup_basis, run.workload_basis)
    yield Estimate("base parameters", setup.architecture.parameters, "", basis)
    yield Estimate("adapter parameters", setup.adapter, "", basis)
    if run.workload is not None:
        flops = memory_model.training_flops(setup, run.workload.tokens, run.workload.squares)
        yield Estimate("training", flops, "FLOP", both, "with recomputation" if setup.recompute else "")
    if run.first_stage is not None and (before := run.first_stage.workload) is not None:
        flops = memory_model.training_flops(setup, before.tokens, before.squares)
        yield Estimate("training, first stage", flops, "FLOP", _weaker(basis, run.first_stage.workload_basis))
    if run.validation is not None:
        held_out = run.validation
        validating = held_out.count * memory_model.evaluation_flops(setup, held_out.tokens, held_out.target_tokens)
        yield Estimate("validation, all", validating, "FLOP", both, "forward passes; an early stop saves some")
    if run.reference is not None:
        passes = memory_model.evaluation_flops(setup, run.reference.tokens, run.reference.target_tokens)
        yield Estimate("reference, once", passes, "FLOP", both, "log-probabilities of all rows, before training")
    if run.questions is not None:
        scoring = run.evaluations * memory_model.evaluation_flops(setup, run.questions.tokens, run.questions.reads)
        times = {2: "twice"}.get(run.evaluations, f"{run.evaluations} times")
        note = "one of them by the unquantized base, where it fits" if run.full_precision else ""
        yield Estimate(f"evaluation, {times}", scoring, "FLOP", _weaker(basis, run.questions_basis), note)
    held = _training_memory(replace(run, divide=False), setup, run.micro_batch)
    bits = "NF4, " if setup.quantization == "nf4" else ""
    elsewhere = {"sharded": f"; layers sharded over {run.processes} GPUs", "host": "; layers in main memory"}
    where = elsewhere.get(setup.placement, "")
    yield Estimate("memory: base", held.weights, "bytes", basis, f"{bits}embedding and output layer as they are{where}")
    yield Estimate("memory: adapter", held.adapter, "bytes", basis, "fp32, and autocast's copy")
    yield Estimate("memory: gradients", held.gradients, "bytes", basis, "fp32")
    yield Estimate("memory: optimizer", held.optimizer, "bytes", basis, setup.optimizer)
    yield from _of_the_activations(run, setup, held.activations, both)
    yield Estimate(
        "peak in training",
        held.total,
        "bytes",
        both,
        f"+- {memory_model.MARGIN:.0%}, and the driver's context; with more memory, more is kept",
    )
    yield from _of_evaluation(run, setup, _weaker(basis, run.questions_basis))
    if run.full_precision:
        peak = _beside_original(setup) + _original_bytes(run, setup)
        yield Estimate("peak, unquantized base", peak, "bytes", basis, "left out where it does not fit")
    checkpoint = checkpoint_bytes(setup.adapter, setup.optimizer)
    yield Estimate("checkpoint", checkpoint, "bytes", basis)
    yield from _of_exports(run, setup, basis)
    disk = required_bytes([run.download_bytes, run.export_bytes], checkpoint)
    yield Estimate("disk", disk, "bytes", basis, f"{size(run.download_bytes, ' ')} of it to fetch first")


def _of_the_activations(run: RunShape, setup: Setup, activations: int, both: Basis) -> Iterator[Estimate]:
    how = "recomputed" if setup.recompute else "kept"
    tokens = f"{how}, micro-batches of {run.micro_batch:,} tokens"
    if _in_tiles(run, run.micro_batch):
        tokens = f"a row of {run.micro_batch:,} tokens, in tiles"
        if run.offload is not False:
            host = memory_model.long_row_host_bytes(setup, run.micro_batch, kept_attention=False)
            yield Estimate("main memory: activations", host, "bytes", both, "where they do not fit on the GPU")
    yield Estimate("memory: activations", activations, "bytes", both, tokens)
    if (over := _divides_over(run, setup)) > 1 and _in_tiles(run, run.micro_batch):
        shared = row_memory(setup, run.micro_batch, over, offload=run.offload, copies=run.attention_copies).activations
        note = f"of each of {over} GPUs, if the row does not fit on one"
        yield Estimate("memory: activations, divided", shared, "bytes", both, note)


def _of_evaluation(run: RunShape, setup: Setup, basis: Basis) -> Iterator[Estimate]:
    scored = f"packed sequences of {run.scoring_budget:,} tokens"
    yield Estimate("peak in evaluation", _scoring(run, setup), "bytes", basis, scored)
    prompt, tokens = run.answered
    if tokens:
        cache = size(memory_model.cache_bytes(setup, tokens), " ")
        note = f"a prompt of {prompt:,} tokens and {tokens - prompt:,} new ones; {cache} of it is the cache"
        yield Estimate("peak, answers", _generating(run, setup), "bytes", basis, note)


def _of_exports(run: RunShape, setup: Setup, basis: Basis) -> Iterator[Estimate]:
    if run.merges:
        sizes = [f"merged {size(run.format_bytes(MERGED), ' ')}{', twice' if run.merges > 1 else ''}"]
        sizes += [f"{name} {size(run.format_bytes(name), ' ')}" for name in run.derived]
        note = f"{', '.join(sizes)}{'; one merge is published' if run.merges > 1 else ''}"
        yield Estimate("exported models", run.export_bytes, "bytes", basis, note)
        yield Estimate("merging", run.merges * _merging(setup), "s", "assumed", "on one processor core")
    for name in run.derived:
        if find_format(name).calibrated:
            yield Estimate(f"quantizing, {name}", _quantizing_flops(run, setup), "FLOP", "assumed", "by auto-round")
        else:
            yield Estimate(f"quantizing, {name}", _converting(name, setup), "s", "assumed", "on one processor core")
        if name.startswith(GGUF) and run.questions is not None:
            note = f"llama.cpp on {CORES} processor cores; the GPU waits"
            yield Estimate(f"scoring, {name}", _in_llama_cpp(run, setup), "s", "assumed", note)


def _of_the_data(run: RunShape) -> Iterator[Estimate]:
    if run.first_stage is not None and (before := run.first_stage.workload) is not None:
        basis = run.first_stage.workload_basis
        yield Estimate("examples, first stage", before.rows, "", basis)
        yield Estimate("optimizer steps, first stage", before.steps, "", basis)
        yield Estimate("tokens, first stage", before.tokens, "", basis, "all epochs")
    if run.workload is not None:
        work, basis = run.workload, run.workload_basis
        yield Estimate("examples", work.rows, "", basis)
        yield Estimate("optimizer steps", work.steps, "", basis)
        yield Estimate("tokens", work.tokens, "", basis, "all epochs")
        yield Estimate("target tokens", work.target_tokens, "", basis, "tokens that the loss counts")
        yield Estimate("longest example", work.longest, "tokens", basis)
        yield Estimate("largest step", work.largest_step, "tokens", basis, "no micro-batch is larger")
    if run.validation is not None:
        yield Estimate("validation rows", run.validation.rows, "", run.workload_basis)
        yield Estimate("validations", run.validation.count, "", run.workload_basis, "before, during and after training")
    if run.questions is not None:
        yield Estimate("questions", run.questions.count, "", run.questions_basis)
    for one in run.auxiliary:
        yield Estimate(f"{one.name}, texts", one.texts, "", run.workload_basis)
        yield Estimate(f"{one.name}, tokens", one.tokens, "", "assumed", one.note)
        if one.flops is not None:
            yield Estimate(one.name, one.flops, "FLOP", "assumed", "by the size of the model's files")


def forecast_gpu(gpu: Gpu, run: RunShape, setup: Setup) -> GpuForecast:
    """Whether the run fits on a GPU, how long it takes and what it costs there."""
    if run.budget_by_gpu:
        run = replace(run, budget=choose_budget(gpu.memory_bytes))
    if run.first_stage is not None and run.budget_by_gpu:
        run = replace(run, first_stage=replace(run.first_stage, budget=run.budget))
    run = replace(run, attention_copies=memory_model.attention_copies(setup.architecture, gpu.capability))
    possible = gpu.capability >= AMPERE and _is_fused(gpu, run, setup)
    long = run.tiles and run.workload is not None and run.workload.longest > LONG_ROW
    no_tiles = long and gpu.capability < AMPERE
    run = replace(run, tiles=run.tiles and possible)
    if run.first_stage is not None:
        first = replace(run.first_stage, tiles=run.first_stage.tiles and possible)
        run = replace(run, first_stage=replace(first, attention_copies=run.attention_copies))
    needs, usable = partial(_need, run), memory_model.usable_bytes(gpu.memory_bytes)
    setup = replace(setup, processes=run.processes)
    placement = choose_placement(setup, memory_bytes=gpu.memory_bytes, placements=run.placements, needs=needs)
    setup = replace(setup, placement=placement)
    execution = _execution(gpu, run, setup)
    need = needs(setup)
    fits, note = need <= usable, ""
    if run.fp8 and gpu.capability < FP8_CAPABILITY:
        fits, note = False, "has no FP8 products: JOB_TRAIN__COMPUTE=fp8 is refused there"
    elif not fits:
        note = (
            f"{size(need, ' ')} are needed, and {size(usable, ' ')} can safely be used{_instead(setup, usable, needs)}"
        )
        note += "; only GPUs from Ampere on compute rows of this length in tiles" if no_tiles else ""
        note += _of_answers(run, setup, usable)
    elif gpu.capability < FLASH_CAPABILITY and setup.value_bytes == HALF_PRECISION:
        note = "has no kernel for attention over many sequences at once; how much slower it is has not been measured"
    if fits and run.full_precision and not _scores_original(gpu, run, setup):
        takes, free = size(_original_bytes(run, setup), " "), size(max(0, _free_for_original(gpu, setup)), " ")
        left_out = f"the unquantized base is not scored: it takes {takes}, and {free} can safely be used"
        note = "; ".join(filter(None, (note, left_out)))
    over = _divided_over(run, setup, usable) if fits else 1
    note = "; ".join(filter(None, (note, _of_division(run, setup, usable, over, fits=fits))))
    if fits and execution is not None and execution.offloaded:
        least = row_host_bytes(setup, run.micro_batch, over, kept_attention=False)
        what = f"activations of the longest row are kept in main memory, at least {size(least, ' ')}"
        note = "; ".join(filter(None, (note, what)))
    if fits and placement != "gpu":
        note = "; ".join(filter(None, (note, _where(setup, usable, needs, run.processes_here))))
    price = gpu.usd_per_hour if run.usd_per_hour is None else run.usd_per_hour
    priced = run.processes if run.usd_per_hour is None else 1  # the user's is that of all machines
    hours = _hours(gpu, run, setup, execution) if fits else None
    note = "; ".join(filter(None, (note, _of_reading(gpu, run, setup, hours))))
    kept = {"base": execution.kept_base, "activations": execution.kept_activations} if execution else {}
    return GpuForecast(
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        fits=fits,
        note=note,
        keeps=", ".join(name for name, is_kept in kept.items() if is_kept) if fits else "",
        budget_recomputing=_budget(run, replace(setup, recompute=True), usable),
        budget_keeping=_budget(run, replace(setup, recompute=False), usable),
        hours=hours,
        usd_per_hour=price,
        usd=None if hours is None else hours * price * priced,
        machine=gpu.machine if run.usd_per_hour is None else "your price",
        base_held=placement,
        divided_over=over,
        gpus=run.processes,
    )


def _need(run: RunShape, setup: Setup) -> int:
    """Bytes on the GPU at the peak of the run."""
    stages = [run] if run.first_stage is None else [run.first_stage, run]
    need = max(
        _scoring(run, setup),
        _generating(run, setup),
        *(_training_memory(one, setup, one.micro_batch).total for one in stages),
    )
    if run.merges:  # it is scored unquantized, in place of the quantized base
        need = max(need, _scoring(run, replace(setup, quantization="none")))
    return need


def _in_tiles(run: RunShape, tokens: int) -> bool:
    """Whether a micro-batch of so many tokens has a row that is computed layer by layer."""
    long = run.workload is not None and run.workload.longest > LONG_ROW
    return run.tiles and long and tokens > LONG_ROW


def _divides_over(run: RunShape, setup: Setup) -> int:
    """How many GPUs may compute a long row together."""
    if not run.divide or why_not_divided(setup.architecture, run.processes) is not None:
        return 1
    return run.processes


def _divided_over(run: RunShape, setup: Setup, usable: int) -> int:
    """How many GPUs compute the longest row together, of `usable` bytes each: 1 where it fits on one."""
    over = _divides_over(run, setup)
    if over == 1 or not _in_tiles(run, run.micro_batch):
        return 1
    alone = row_memory(setup, run.micro_batch, offload=run.offload, copies=run.attention_copies)
    return 1 if alone.total <= usable else over


def _of_division(run: RunShape, setup: Setup, usable: int, over: int, *, fits: bool) -> str:
    """What is said of a row that is divided over so many GPUs, or could be; empty if it need not be."""
    if over > 1:
        return f"the longest row is divided over the {over} GPUs"
    if fits or not run.divide or not _in_tiles(run, run.micro_batch):
        return ""

    def need(count: int) -> int:
        first = run.first_stage and replace(run.first_stage, processes=count)
        return _need(replace(run, processes=count, first_stage=first), replace(setup, processes=count))

    enough = enough_gpus(setup, lambda count: need(count) <= usable)
    if enough is None:
        return ""
    return f"{enough} of these GPUs compute the longest row together (JOB_RUN__PROCESSES={enough})"


def _training_memory(run: RunShape, setup: Setup, tokens: int) -> memory_model.Memory:
    if _in_tiles(run, tokens):
        how: dict[str, Any] = {"offload": run.offload, "copies": run.attention_copies}
        return least_memory(setup, tokens, _divides_over(run, setup), **how)
    return memory_model.training_memory(setup, tokens)


def _where(setup: Setup, usable: int, needs: Callable[[Setup], int], processes: int) -> str:
    """What is said of a base that is not on the GPU as a whole; and how many GPUs would hold it."""
    if setup.placement == "sharded":
        return f"the base's 4-bit weights are sharded over the {setup.processes} GPUs"
    more = ""
    if needs(replace(setup, placement="gpu")) <= usable:
        more = "; they fit on this GPU too, which is faster (JOB_MODEL__PLACEMENT=gpu)"
    elif (enough := _enough_sharded(setup, usable, needs)) is not None:
        more = f"; {enough} of these GPUs hold them sharded, which is faster"
    return f"{memory_model.copies_in_main_memory(setup, processes)}{more}"


def _enough_sharded(setup: Setup, usable: int, needs: Callable[[Setup], int]) -> int | None:
    """How many GPUs of `usable` bytes are enough for a sharded base; None where `MOST_GPUS` are too few."""
    sharded = (replace(setup, placement="sharded", processes=count) for count in range(2, MOST_GPUS + 1))
    return next((one.processes for one in sharded if needs(one) <= usable), None)


def _instead(setup: Setup, usable: int, needs: Callable[[Setup], int]) -> str:
    """What is said of a base that is sharded over too few GPUs: how many are enough, and whether main memory is."""
    if setup.placement != "sharded":
        return ""
    enough = _enough_sharded(setup, usable, needs)
    more = "" if enough is None else f"; {enough} of these GPUs are enough (JOB_RUN__PROCESSES={enough})"
    host = needs(replace(setup, placement="host")) <= usable
    return f"{more}{'; JOB_MODEL__PLACEMENT=host fits' if host else ''}"


def _budget(run: RunShape, setup: Setup, usable: int) -> int:
    """The largest micro-batch in tokens that fits into `usable` bytes; 0 if the longest example or scoring does not."""
    if max(_scoring(run, setup), _generating(run, setup)) > usable:
        return 0
    most = run.workload.largest_step if run.workload else MAX_TOKENS
    found = memory_model.largest_budget(lambda tokens: _training_memory(run, setup, tokens).total, usable, most)
    return found if found >= (run.workload.longest if run.workload else 1) else 0


def _scoring(run: RunShape, setup: Setup) -> int:
    return memory_model.evaluation_bytes(setup, run.scoring_budget, run.reads)


def _generating(run: RunShape, setup: Setup) -> int:
    """Bytes that one answer takes, the longest; 0 where none is generated."""
    return memory_model.generation_bytes(setup, *run.answered) if run.answered[1] else 0


def _of_answers(run: RunShape, setup: Setup, usable: int) -> str:
    """What is said where not even one generated answer fits; else empty."""
    if (need := _generating(run, setup)) <= usable:
        return ""
    prompt, tokens = run.answered
    cache = size(memory_model.cache_bytes(setup, tokens), " ")
    fix = "lower JOB_EVAL__PROMPTS_MAX_NEW_TOKENS, or the max_gen_toks of the task"
    what = f"an answer of {tokens - prompt:,} tokens to a prompt of {prompt:,} takes {size(need, ' ')}, {cache} of it"
    return f"; {what} for its cache: {fix}"


def _original_bytes(run: RunShape, setup: Setup) -> int:
    """Bytes of the base with its original weights and of scoring with it, as `stages.full_precision` counts them."""
    original, tokens = replace(setup, quantization="none"), run.scoring_budget
    return memory_model.evaluation_bytes(original, tokens, tokens // 2)


def _reading_original(setup: Setup) -> float:
    """Seconds in which its files are read from the disk."""
    return HALF_PRECISION * setup.architecture.parameters / DOWNLOAD_RATE


def _of_reading(gpu: Gpu, run: RunShape, setup: Setup, hours: float | None) -> str:
    """What is said where reading the unquantized base takes more than half of all hours; else empty."""
    reading = _reading_original(setup) / 3600
    if hours is None or reading < hours / 2 or run.first_stage is not None or not _scores_original(gpu, run, setup):
        return ""
    return f"{reading:.2f} of the hours are for reading the unquantized base (JOB_EVAL__FULL_PRECISION=off: not scored)"


def _beside_original(setup: Setup) -> int:
    """Bytes that are held while it is scored: the quantized base and the adapter."""
    return memory_model.weight_bytes(setup) + memory_model.FP32 * setup.adapter


def _scores_original(gpu: Gpu, run: RunShape, setup: Setup) -> bool:
    """Whether the base with its original weights is asked for, and fits beside the quantized one."""
    return run.full_precision and _original_bytes(run, setup) <= _free_for_original(gpu, setup)


def _free_for_original(gpu: Gpu, setup: Setup) -> float:
    """Bytes that it may fill."""
    return memory_model.ORIGINAL_SHARE * (gpu.memory_bytes - memory_model.CONTEXT_BYTES - _beside_original(setup))


def _execution(gpu: Gpu, run: RunShape, setup: Setup) -> ExecutionPlan | None:
    """How the job would train on this GPU; None if PEFT's own layers would do the forward pass."""
    if not _is_fused(gpu, run, setup):
        return None
    free = gpu.memory_bytes - memory_model.CONTEXT_BYTES - _beside_original(setup)
    long = _in_tiles(run, run.micro_batch)
    plan = choose_plan(
        setup,
        free_bytes=free,
        sequence_tokens=0 if long else run.micro_batch,
        keep_base=False if long and run.keep_base is None else run.keep_base,
        keep_activations=False if long else run.keep_activations,
        recorded=setup.architecture.fused,
        not_recorded=why_not_recorded(setup, gpu.capability, half="float16" if run.fp16 else "bfloat16"),
        fp8=run.fp8,
    )
    if not long:
        return plan
    over = _divided_over(run, setup, memory_model.usable_bytes(gpu.memory_bytes))
    # How much main memory the machine has is not known here.
    return choose_long_rows(
        plan,
        setup,
        tokens=run.micro_batch if over == 1 else 0,
        divided=(run.micro_batch, over) if over > 1 else None,
        free_bytes=free,
        host_bytes=_UNKNOWN_HOST,
        offload=run.offload,
        copies=run.attention_copies,
        tile=TILE_TOKENS,
    )


def _is_fused(gpu: Gpu, run: RunShape, setup: Setup) -> bool:
    """Whether the job's fused layers would compute on this GPU."""
    return run.fused and gpu.capability >= run.fused_from and setup.value_bytes == HALF_PRECISION


def _hours(gpu: Gpu, run: RunShape, setup: Setup, execution: ExecutionPlan | None) -> float | None:
    """Hours from start to end without interruptions; None if data or speed (as in fp32) is unknown."""
    if run.workload is None or run.questions is None or setup.value_bytes != HALF_PRECISION:
        return None
    before = 0.0
    if run.first_stage is not None:
        earlier = _hours(gpu, run.first_stage, setup, execution)
        if earlier is None:
            return None
        before = 3600 * earlier
    work, asked = run.workload, run.questions
    speed: dict[str, Any] = {"rate": gpu.flops, "bandwidth": gpu.bandwidth}
    used, training = memory_model.UTILISATION, 0.0
    if execution is not None:
        setup = replace(setup, recompute=not execution.kept_activations)
        used, training = _fused_utilisation(gpu, run, setup, execution)
    shared = _division(gpu, run, setup)
    # Of the busiest GPU; each reads all weights for its own micro-batches.
    micro_batches = max(work.steps, ceil(work.tokens / shared.parts / run.micro_batch))
    flops = round(memory_model.training_flops(setup, work.tokens, work.squares) / shared.parts)
    passes = (3 if setup.recompute else 2) * micro_batches
    own = memory_model.seconds(flops, passes, setup, used=used, transfers=2 * micro_batches, **speed)
    training += own / shared.training
    for held in filter(None, (run.validation, run.reference)):  # passes of the training path, with its micro-batches
        forward = held.count * memory_model.evaluation_flops(setup, held.tokens, held.target_tokens) // shared.gpus
        at_once = shared.gpus * min(run.micro_batch, max(work.largest_step, held.longest))
        passes = held.count * ceil(held.tokens / at_once)
        training += memory_model.seconds(forward, passes, setup, used=used, **speed) / shared.scoring
    used = memory_model.UTILISATION if execution is None else memory_model.SCORING_UTILISATION
    scoring = memory_model.evaluation_flops(setup, asked.tokens, asked.reads) // shared.gpus
    passes = ceil(asked.tokens / shared.gpus / run.scoring_budget)
    evaluation = memory_model.seconds(scoring, passes, setup, used=used, **speed) / shared.scoring
    evaluation += memory_model.SCORING_SECONDS
    start = START_SECONDS + run.download_bytes / DOWNLOAD_RATE
    # The base's answers of a first stage serve the second, those of the unquantized base too.
    evaluations = EVALUATIONS if run.first_stage is None else EVALUATIONS - 1
    if run.first_stage is None and _scores_original(gpu, run, setup):
        evaluations += 1
        start += _reading_original(setup)
    # Written by the processor, read again to be scored, and uploaded if it is published.
    published = run.export_bytes - max(0, run.merges - 1) * run.format_bytes(MERGED)
    exporting = (2 * run.export_bytes + published) / DOWNLOAD_RATE + run.merges * _merging(setup)
    for name in run.derived:
        if find_format(name).calibrated:
            exporting += memory_model.seconds(_quantizing_flops(run, setup), 0, setup, **speed)
        else:
            exporting += _converting(name, setup)
    in_llama_cpp = sum(name.startswith(GGUF) for name in run.derived)
    exporting += in_llama_cpp * _in_llama_cpp(run, setup)
    scored = evaluations + run.exported - in_llama_cpp
    rates = {"disk": DOWNLOAD_RATE, "processor": CORES * LLAMA_CPP_FLOPS}
    auxiliary = sum(auxiliary_seconds(one, gpu, **rates) for one in run.auxiliary)
    return (before + start + training + exporting + scored * evaluation + auxiliary) / 3600


def _fused_utilisation(gpu: Gpu, run: RunShape, setup: Setup, execution: ExecutionPlan) -> tuple[float, float]:
    """(share of the data sheet's operations a second that fused layers reach in training, seconds of recording)."""
    a, recorded = setup.architecture, execution.recorded and run.recorded
    if _in_tiles(run, run.micro_batch):
        used = memory_model.LONG_ROW_UTILISATION["triton" if a.attends_by_triton(gpu.capability) else "flash"]
    elif recorded:
        used = memory_model.FUSED_UTILISATION
    else:  # before Ampere, attention goes segment by segment: not measured, and assumed to be no faster than PEFT's
        used = memory_model.UNRECORDED_UTILISATION if gpu.capability >= AMPERE else memory_model.UTILISATION
    if a.experts and a.expert_width < memory_model.FINE_EXPERTS:
        used = min(used, memory_model.FINE_EXPERTS_UTILISATION)
    seconds = memory_model.RECORDING_SECONDS if recorded and not _in_tiles(run, run.micro_batch) else 0.0
    return used * (memory_model.FP8_SPEEDUP if run.fp8 else 1.0), seconds


def _division(gpu: Gpu, run: RunShape, setup: Setup) -> Division:
    """How the work is divided over the GPUs of the run."""
    if run.workload is None:
        return Division()
    over = _divided_over(run, setup, memory_model.usable_bytes(gpu.memory_bytes))
    return divide(
        run.processes,
        step_rows=min(run.step_rows, run.workload.rows),
        step_tokens=run.workload.tokens / run.workload.steps,
        rows_divided=over > 1,
    )


def _merging(setup: Setup) -> float:
    """Seconds of one candidate of the merge."""
    return setup.architecture.parameters / MERGED_PER_SECOND


def _converting(name: str, setup: Setup) -> float:
    """Seconds for a format that is computed on one core: fp8, GGUF."""
    rate = GGUF_PER_SECOND if name.startswith(GGUF) else MERGED_PER_SECOND
    return setup.architecture.parameters / rate


def _quantizing_flops(run: RunShape, setup: Setup) -> int:
    """Operations of auto-round: each layer forward and backward on the tokens of each step, as in full training."""
    return 6 * setup.architecture.linear_parameters * run.quantizing_tokens


def _in_llama_cpp(run: RunShape, setup: Setup) -> float:
    """Seconds in which llama.cpp scores all questions."""
    if run.questions is None:
        return 0.0
    flops = memory_model.evaluation_flops(setup, run.questions.tokens, run.questions.reads)
    return flops / (CORES * LLAMA_CPP_FLOPS)


def _weaker(*bases: Basis) -> Basis:
    """The basis of an estimate that combines several."""
    return "assumed" if "assumed" in bases else "computed"
