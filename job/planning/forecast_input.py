"""The input of the forecast: a run by its model, work and budgets, which `run_shape` works out."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from job.common.export_formats import MERGED, weights_bytes
from job.planning.auxiliary_models import AuxiliaryModel
from job.planning.known_models_and_data import TaskTokens
from job.planning.workload import Workload
from job.training import memory_model
from job.training.execution_plan import AMPERE
from job.training.memory_model import Setup

Basis = Literal["computed", "measured", "assumed"]
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
        questions_basis: `computed` or `assumed`, as `workload_basis`.
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
        reference: The log-probabilities of the reference, as dpo and kto need them; None where there are
            none, or the rows are unknown.
        first_stage: The first stage of JOB_TRAIN__METHOD=sft,dpo; None without one. Its download is counted here.
        full_precision: Whether the base with its original weights is scored too, where it fits.
        placements: Where the base's 4-bit weights may be kept, the fastest first; see `memory_model.PLACEMENTS`.
        processes: Number of processes that share the work, each with a GPU.
        processes_here: Number of them on one machine.
        tiles: Whether rows of more than `LONG_ROW` tokens are computed layer by layer, where fused layers compute.
        attention_copies: As `copies` of `memory_model.long_row_bytes`: of flash attention until a GPU is chosen.
        recorded: Whether the method's GPU kernels can be recorded as CUDA graphs, where fused layers compute.
        offload: JOB_TRAIN__OFFLOAD_ACTIVATIONS; None where the job chooses.
        divide: Whether a long row that does not fit on one GPU is divided over those of the run.
        auxiliary: The classifier of the safety screen and the judge, if the run has them.
        step_rows: JOB_TRAIN__GLOBAL_BATCH_SIZE.
        warmup_steps: Optimizer steps in which the learning rate rises.
        trains: False for a run that exports a finished one (JOB_EXPORT__RUN): it trains nothing, and of evaluations it
            has only those of the exported formats.
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
    warmup_steps: int = 0
    trains: bool = True

    @property
    def evaluations(self) -> int:
        """How often all questions are scored: by base, adapter, the unquantized base, and each exported candidate."""
        return self.trains * EVALUATIONS + self.exported + self.full_precision

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
