"""Frozen dataclasses that packages hand to each other; several are also stored as JSON. No behaviour, no torch.

A field that is added needs a default, so that records of earlier versions can still be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

NAMES_THE_RUN = "names the run"
"""Metadata of a field that was added later, and by which runs differ where it is not its default."""


@dataclass(frozen=True)
class Example:
    """One tokenized training example.

    `targets[i]` says whether token `i` is a target token, predicted from the tokens before it; the first never is.

    An example of preferences may have two sequences, concatenated in `input_ids` and `targets`, which do not
    attend to each other: the chosen and the rejected answer of a pair, or for KTO the answer and a mismatched one.
    """

    input_ids: tuple[int, ...]
    targets: tuple[bool, ...]
    second_at: int | None = None
    """Where the second sequence begins; None if there is only one."""
    desirable: bool | None = None
    """The label of an answer that has one: whether it is good."""
    reference: tuple[float, ...] = ()
    """For each sequence the summed log-probability of its targets by the reference model, in nats, if it is known."""
    weight: float = 1.0
    """What the loss of its target tokens is multiplied by (`JOB_DATA__ROW_WEIGHTS`)."""

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The sequences, each as a separate example."""
        at = self.second_at
        if at is None:
            return (self,)
        return Example(self.input_ids[:at], self.targets[:at]), Example(self.input_ids[at:], self.targets[at:])


@dataclass(frozen=True)
class DataSourceRecord:
    """One of several sources. `rows` are the examples that it gives, `sha256` is over them as over those of a run."""

    source: str
    revision: str | None
    rows: int
    sha256: str


@dataclass(frozen=True)
class RowsRecord:
    """Rows of a data set. `sha256` is over the selected, rendered and tokenized examples in order.

    With rows held out for validation it is over the SHA-256 of each example.
    """

    source: str
    revision: str | None
    split: str | None
    format: str
    rows: int
    skipped: dict[str, int]
    sha256: str
    tokens: int
    target_tokens: int
    longest: int


@dataclass(frozen=True)
class ValidationRows(RowsRecord):
    """The rows that are validated on and never trained on."""

    held_out: bool
    """Whether they are rows of the training source, held out of training; else they have a separate source."""
    duplicates: int
    near_duplicates: int
    """Rows that are a training row word for word, and others that nearly are; none among rows that are held out."""


@dataclass(frozen=True)
class CheckRecord:
    """What the audit found of one kind: in how many rows, the first places, and what becomes of such rows.

    `rows` is None where the kind was not checked, and `not_checked` says why.
    """

    action: str
    checked_by: str
    not_checked: str
    rows: int | None
    places: list[str]


@dataclass(frozen=True)
class SafetyRecord:
    """The classifier of JOB_DATA__SAFETY_MODEL, and what counts as unsafe: `threshold` or more for `unsafe_labels`.

    `sha256` is over the files that make the model, as that of the base.
    """

    model: str
    revision: str | None
    sha256: str
    unsafe_labels: list[str]
    threshold: float


@dataclass(frozen=True)
class AuditRecord:
    """What the training data held, by kind of finding (`common.findings.KINDS`); no text of a row.

    `bytes` and `sha256` are those of the published file with all findings.
    """

    rows: int
    """Rows that were audited: those trained on, those held out for validation, and those left out."""
    left_out: int
    """Rows that are left out because of a finding."""
    checks: dict[str, CheckRecord]
    overlap: dict[str, list[int]]
    """By task, the places (from 0) of the scored questions that training rows have in them."""
    findings: int
    bytes: int
    sha256: str
    compared: int
    """Rows that were compared for near-duplicates: the first ones."""
    too_short: int = 0
    """Scored questions of too few words to be looked for in rows."""
    languages: dict[str, int] = field(default_factory=dict)
    """Language of the rows -> how many, the commonest first; empty where they were not looked for."""
    languages_by: str = ""
    """What looked for them, with its version."""
    languages_not_checked: str = ""
    """Why nothing did."""
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    """`tokens` and `target_tokens` of the examples of these rows -> quantiles (`audit.statistics.QUANTILES`)."""
    safety: SafetyRecord | None = None
    """What found rows of the kind `unsafe`; None without JOB_DATA__SAFETY_MODEL."""


@dataclass(frozen=True)
class DatasetRecord(RowsRecord):
    """The training data."""

    validation: ValidationRows | None = None
    """What all other fields are without: the rows for validation. None where there is no validation."""
    sources: list[DataSourceRecord] = field(default_factory=list)
    """Where JOB_DATA__SOURCE names several, each of them, in order, with the rows that are held out for validation."""
    long_rows: dict[str, int] = field(default_factory=dict)
    """By JOB_DATA__ON_LONG_ROW: rows truncated and tokens_cut, or rows split and the pieces of them."""
    audit: AuditRecord | None = None
    """What the rows held; None in records of older versions."""
    licences: dict[str, str] = field(default_factory=dict)
    """Source -> its licence, where its card or this project knows one."""
    longest_at: str = ""
    """Location of the longest row, as in messages about rows; empty if unknown."""


@dataclass(frozen=True)
class ModelRecord:
    """The base model and the size of the adapter. `sha256` is over the model's files."""

    id: str
    revision: str | None
    sha256: str
    architecture: str
    quantization: str
    double_quantization: bool
    dtype: str
    parameters: int
    trainable_parameters: int
    quantized_parameters: int = 0
    """How many of `parameters` are really held as `quantization` says; a mixture's experts were none of them once."""
    idle_parameters: int = 0
    """Of a mixture, how many of `parameters` a token is not multiplied by: those of the experts it does not go to; 0
    in records of older versions, and where config.json does not say to how many it goes."""
    idle_trainable_parameters: int = 0
    """The same of `trainable_parameters`."""
    adapted: list[str] = field(default_factory=list)
    """Names of the layers that got an adapter, as they were given or found."""
    added_tokens: list[str] = field(default_factory=list)
    """New tokens of the tokenizer, for which the base got rows."""
    licence: str | None = None
    """As its card says; None if it does not, and in records of older versions."""


PEFT = "peft"
"""`ExecutionPlan.forward` where PEFT's own layers compute."""
FUSED = "fused"
FUSED_THROUGHOUT = "fused all"
"""How `ExecutionPlan.forward` begins where the job's fused layers compute: some of them, or the whole decoder."""
FP8 = "fp8"
"""How `ExecutionPlan.forward` ends where training computes the products with the frozen weights in FP8."""


@dataclass(frozen=True)
class ExecutionPlan:
    """How training is carried out on this machine, and why so. `training.execution` of the manifest.

    `forward` affects the last bits of results. The others trade time for memory, and change no bit:

    base_held: Where the frozen base's quantized weights are kept: `gpu` (on this process's device), `sharded` (over the
        devices of all processes), or `host` (in main memory).
    kept_base: The base's dequantized weights (in FP8: its weights in that format) are kept in memory, instead of made
        for each use.
    kept_activations: Activations are kept for the backward pass, instead of computed again in it.
    recorded: The GPU's kernels are recorded once for each shape of its inputs and launched together (CUDA graphs).
    offloaded: The saved activations of a long row are in pinned host memory until the backward pass, not on the GPU.
    kept_attention: Attention's output is kept of a long row, instead of computed again in the backward pass.

    So does `tile_tokens` affect the last bits: of long rows the feed-forward layers and the loss are computed in tiles
    of this many tokens (`training.long_rows`). None where no row is that long, or the model cannot be computed so. And
    so does `attention`, the kernel of long rows, a key of `long_attention.KERNELS`; None there and in older records,
    where it was `flash`. And `sequence_parallel` and `divided_above`: a long row of more than `divided_above` tokens
    was computed by this many processes together (`training.sequence_parallel`). 1 and None where no row would have
    been.
    """

    kept_base: bool
    kept_activations: bool
    recorded: bool
    reason: str
    forward: str = FUSED
    """`peft`; or `fused all, triton`: what is fused, whose kernels; `fused all, triton, fp8` where training computes in
    FP8. The default is for records of older versions."""
    packed: bool = True
    """Whether examples went through the model end to end in one sequence; else each alone, which `reason` explains."""
    base_held: str = "gpu"
    """The placement, one of `memory_model.PLACEMENTS`; the name is that of older records."""
    offloaded: bool = False
    kept_attention: bool = False
    tile_tokens: int | None = None
    attention: str | None = None
    may_offload: bool = True
    """Whether activations may be offloaded when memory runs out (`JOB_TRAIN__OFFLOAD_ACTIVATIONS` is not false)."""
    sequence_parallel: int = 1
    divided_above: int | None = None

    @property
    def fused(self) -> bool:
        """Whether the job's fused layers compute; they need no autocast, since they cast the adapter's weights."""
        return self.forward != PEFT

    @property
    def fp8(self) -> bool:
        """Whether training computes the products with the frozen weights in FP8."""
        return self.forward.endswith(f", {FP8}")

    @property
    def scoring_forward(self) -> str:
        """`forward` of a model that is not trained but scored, which never is in FP8."""
        return self.forward.removesuffix(f", {FP8}")

    @property
    def padded(self) -> bool:
        """Whether packed sequences are padded to few lengths, which CUDA graphs need; for a decoder fused throughout.

        Stays true when `recorded` is given up: other lengths would change the last bits.
        """
        return self.forward.startswith(FUSED_THROUGHOUT)

    @property
    def droppable(self) -> tuple[str, ...]:
        """What can be given up when the GPU's memory runs out, in this order. The bits stay the same.

        `on_gpu` is whether the saved activations of long rows are on the GPU.
        """
        keeps = {
            "on_gpu": self.tile_tokens is not None and self.may_offload and not self.offloaded,
            "kept_base": self.kept_base,
            "kept_activations": self.kept_activations,
            "recorded": self.recorded,
            "kept_attention": self.kept_attention,
        }
        return tuple(name for name, is_kept in keeps.items() if self.fused and is_kept)

    def give_up(self, name: str) -> ExecutionPlan:
        """The plan without one of those in `droppable`.

        Raises:
            ValueError: It is none of them.
        """
        if name not in self.droppable:
            raise ValueError(f"{name} is not among what can be given up: {', '.join(self.droppable) or 'nothing'}")
        given_up: dict[str, Any] = {"offloaded": True} if name == "on_gpu" else {name: False}
        return replace(self, **given_up)


@dataclass(frozen=True)
class ValidationRecord:
    """The result of a run's validation losses. A loss is the mean over the target tokens of all validation rows.

    `stale` counts the validations since the best one. `every_steps` are the optimizer steps between two validations,
    and `planned_steps` those of the whole schedule, which a run that stopped early did not all do.
    """

    every_steps: int
    count: int
    first_loss: float
    last_loss: float
    best_loss: float
    best_step: int
    stale: int
    stop_after: int | None
    planned_steps: int
    stopped_early: bool
    keep: str
    kept_step: int
    """The step whose adapter was evaluated and published; 0 is the adapter before training, which changes nothing."""
    seconds: float
    preference: dict[str, float] = field(default_factory=dict)
    """Metrics of preferences by that adapter, by TRL's names; empty for `sft`."""


@dataclass(frozen=True)
class AdapterRecord:
    """The published adapter. All but `init` follows from its files, and is checked against them by `verify`.

    `modules` have an adapter; `ranks` is the sum of their ranks, and `parameters` the numbers in the file: those of a
    decomposed `init` (PiSSA, OLoRA) count the frozen half.
    """

    kind: str
    init: str
    use_rslora: bool
    use_dora: bool
    modules: int
    ranks: int
    parameters: int
    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules that were trained whole."""
    trained_tokens: int = 0
    """Tokens whose rows in the embedding and in the output layer were trained."""


@dataclass(frozen=True)
class FirstStage:
    """The first stage of a run that trains in two: a complete run, in the folder `sft` of the run's folder.

    Its figures are those of its manifest, whose hash names everything in it. `metrics` are those of its steps, as a
    file of this run. `run_seconds` and `usd` are what that whole run took.
    """

    run: str
    results_sha256: str
    method: str
    steps: int
    examples: int
    target_tokens: int
    loss: float
    seconds: float
    run_seconds: float
    usd: float | None
    metrics: Artifact


@dataclass(frozen=True)
class TrainingRecord:
    """What training did, over all attempts. `loss` is the mean over the target tokens of the last epoch's steps.

    `world_size` is the number of processes in the attempt that finished it.
    """

    steps: int
    examples: int
    target_tokens: int
    loss: float
    tokens_per_second: float | None
    seconds: float
    peak_memory_bytes: int | None
    optimizer: str
    global_batch_size: int
    micro_batch_tokens: int
    substitutions: list[str]
    world_size: int = 1
    execution: ExecutionPlan | None = None
    """None in records of older versions, where PEFT's own layers did the work."""
    validation: ValidationRecord | None = None
    """None where nothing was validated."""
    method: str = "sft"
    """A key of `common.methods.METHODS`."""
    beta: float | None = None
    """Strength of the preference; None for `sft`."""
    reference: str | None = None
    """What preferences are compared with: `base`, or `start` for the adapter that training started from."""
    start_sha256: str | None = None
    """Of the adapter that training started from; None for a new one."""
    preference: dict[str, float] = field(default_factory=dict)
    """Metrics of preferences, by TRL's names: the mean over the last epoch's steps, by examples."""
    adapter: AdapterRecord | None = None
    """None in records of older versions: plain LoRA."""
    first_stage: FirstStage | None = None
    """What came before in the same run, as in `JOB_TRAIN__METHOD=sft,dpo`; None where there is one stage."""


@dataclass(frozen=True)
class Packing:
    """Whether many examples go through the model end to end in one sequence, or each alone; and why, in words.

    Tested on the model itself (`packing_check`), once per run, since it affects the last bits of all results.
    """

    packed: bool
    reason: str


@dataclass(frozen=True)
class Question:
    """One multiple-choice question for scoring: token ids of the context and of each choice after it."""

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChoiceScore:
    """Log-likelihood of a choice given its context, in nats, and whether greedy decoding would produce it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Answer:
    """What a model generated after a prompt.

    Attributes:
        text: Without the stop text and what follows it, and without special tokens.
        tokens: How many were generated, those of the stop text included, a token that ends the text not.
        ended_by: `eos`, `stop` or `length`.
    """

    text: str
    tokens: int
    ended_by: str


class Close(NamedTuple):
    """A question whose two likeliest choices are close to each other; a tuple, which is short in a stage's record.

    Attributes:
        question: Its place, from 0.
        margin: By which the likeliest choice leads, in nats, to four decimals.
        turns: The same over the next choice with which the answer would turn from right to wrong, or from wrong to
            right; None where no choice does that.
    """

    question: int
    margin: float
    turns: float | None


@dataclass(frozen=True)
class TaskScores:
    """One model on one task: accuracies as fractions, and for each question, in order, whether its answer is right."""

    task: str
    source: str
    task_hash: str
    version: str
    n: int
    acc: float
    stderr: float
    acc_norm: float | None
    acc_norm_stderr: float | None
    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...] | None
    reused_from: str | None = None
    num_fewshot: int = 0
    """Examples in every prompt."""
    close: tuple[Close, ...] | None = None
    """Questions with a small margin by `acc`; None in records of versions that did not look for them."""
    close_norm: tuple[Close, ...] | None = None
    """The same by `acc_norm`; None also where the task does not have that metric."""


@dataclass(frozen=True)
class Metric:
    """A metric of lm-eval: the name of its aggregation, and whether a higher figure is better."""

    aggregation: str
    higher_is_better: bool


@dataclass(frozen=True)
class MeasuredScores:
    """One model on one task without choices.

    Attributes:
        kind: lm-eval's output_type.
        metrics: By lm-eval's name of metric and filter, such as `exact_match,strict-match`.
        values: By the same names, the value and weight of each question, in order.
    """

    task: str
    kind: str
    source: str
    task_hash: str
    version: str
    n: int
    num_fewshot: int
    metrics: dict[str, Metric]
    values: dict[str, tuple[tuple[float, float], ...]]
    reused_from: str | None = None


@dataclass(frozen=True)
class Artifact:
    """A file of a run: key, size and SHA-256. `facts_sha256` is over a file of metrics without what was measured."""

    path: str
    bytes: int
    sha256: str
    facts_sha256: str | None = None


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: facts that identical runs share, and in `measured` times, speed, memory and energy."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    """None if fp16 gradients overflowed and the step was skipped."""
    examples: int
    target_tokens: int
    measured: dict[str, float | int | None] = field(default_factory=dict)
    preference: dict[str, float] = field(default_factory=dict)
    """Rewards and log-probabilities of a step of preferences, by TRL's names, such as `rewards/margins`."""


@dataclass(frozen=True)
class TrainingProgress:
    """How far training is: the optimizer step that was done last. For people who watch; no part of the manifest.

    Attributes:
        step: The step, from 1.
        total_steps: How many there are; early stopping may end training before the last one.
        loss: Loss of the step; None where it is not finite.
        tokens_per_second: Target tokens per second of the step.
        remaining_seconds: Estimate for the steps that are left, without the stages after training; None until there
            are two steps to measure.
    """

    step: int
    total_steps: int
    loss: float | None = None
    tokens_per_second: float | None = None
    remaining_seconds: float | None = None


@dataclass(frozen=True)
class RunFigures:
    """Where a run is now, for monitoring; no part of the manifest.

    Attributes:
        attempt: Number of the attempt, from 1.
        stages: The names of all stages.
        stage: The current one; None between two.
        goodput: Share of the attempt's time in optimizer steps that no earlier attempt had done.
        training: The last step of this attempt; None before its first one.
    """

    attempt: int
    stages: tuple[str, ...]
    stage: str | None
    goodput: float
    training: TrainingProgress | None


@dataclass(frozen=True)
class ValidationMetrics:
    """One validation: facts that identical runs share, and in `measured` what was measured. Step 0 is before training.

    `loss` is the sum over the target tokens of all validation rows, divided by their number, in nats; of preferences
    the loss of the method over all rows, as in one batch.
    """

    step: int
    epoch: float
    loss: float
    examples: int
    target_tokens: int
    measured: dict[str, float | int | None] = field(default_factory=dict)
    preference: dict[str, float] = field(default_factory=dict)
    """Rewards and log-probabilities, by TRL's names without their `eval_`, such as `rewards/accuracies`."""


@dataclass(frozen=True)
class AttemptRecord:
    """One start of the run. Times are RFC 3339 in UTC.

    `finished` is None if the attempt was killed without notice; all else is then as of its last record, some seconds
    earlier. `usd_per_hour` is the price of its machine, None if unknown.
    """

    number: int
    started: str
    finished: str | None
    outcome: str
    seconds: float
    stage_seconds: dict[str, float]
    steps: int
    repeated_steps: int
    last_step: int
    world_size: int = 1
    """Number of processes; the default is for records of versions with one process."""
    repeated_seconds: float = 0.0
    usd_per_hour: float | None = None
    energy_joules: float | None = None


@dataclass(frozen=True)
class PromptRow:
    """A prompt that base and adapter answer.

    Attributes:
        where: The row or line of the file, or the number of the validation row.
        text: As the model reads it, without the token that begins a sequence.
        reference: What the row itself answers; None if it has no answer.
        ids: The tokens.
    """

    where: str
    text: str
    reference: str | None
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptsRecord:
    """The prompts of `JOB_EVAL__PROMPTS`: where they are from, how many, and SHA-256 over their texts."""

    source: str
    count: int
    max_new_tokens: int
    sha256: str


@dataclass(frozen=True)
class PromptAnswer:
    """A line of `artifacts/prompts/<side>.jsonl`: a prompt and what the base or the adapter answers, greedily.

    Attributes:
        where: As in `PromptRow`.
        prompt: The text of the prompt.
        reference: As in `PromptRow`.
        answer: Without special tokens.
        tokens: How many were generated, the one that ends the text not included.
        ended_by: `eos`, or `length` where JOB_EVAL__PROMPTS_MAX_NEW_TOKENS ended it.
    """

    where: str
    prompt: str
    reference: str | None
    answer: str
    tokens: int
    ended_by: str
    unsafe: float | None = None
    """Probability that the answer is unsafe, by JOB_DATA__SAFETY_MODEL; None without one, and then not in the file."""


@dataclass(frozen=True)
class Judgement:
    """A line of `artifacts/prompts/judgements.jsonl`: which answer to a prompt the judge says is better.

    Attributes:
        where: As in `PromptRow`.
        same: Whether both answers are the same text; the judge is then not asked.
        base_first: What it says where the base's answer is A: `A` or `B`; None if neither, or not asked.
        adapter_first: The same where the adapter's answer is A.
    """

    where: str
    same: bool
    base_first: str | None
    adapter_first: str | None


@dataclass(frozen=True)
class JudgeRecord:
    """Who judged by which rules (JOB_EVAL__PRINCIPLES).

    `model` is a hub id, URI or path, or a server's address and then `served` its name of the model; `sha256` is over a
    local model's files, and None of a server, whose model is what it says.
    """

    model: str
    served: str | None
    revision: str | None
    sha256: str | None
    rules: list[str]
    rules_sha256: str


@dataclass(frozen=True)
class GroupSpec:
    """What to compute for a group of tasks.

    Attributes:
        version: The group's version in lm-eval.
        tasks: Names of all its tasks, also those of nested groups.
        metrics: lm-eval's name of metric and filter -> whether the mean is weighted by the number of questions.
        higher_is_better: The same names -> whether higher is better.
    """

    version: str
    tasks: tuple[str, ...]
    metrics: Mapping[str, bool]
    higher_is_better: Mapping[str, bool]


@dataclass(frozen=True)
class Pulled:
    """Record of the pull stage: every later attempt has to find the same, in all fields without a default."""

    dataset: DatasetRecord
    model_sha256: str
    model_revision: str | None
    questions: dict[str, str]
    """SHA-256 of each task's questions."""
    start_sha256: str | None = field(default=None, metadata={NAMES_THE_RUN: True})
    """Of the adapter that training starts from; None for a new one."""
    prompts: PromptsRecord | None = field(default=None, metadata={NAMES_THE_RUN: True})
    """None where JOB_EVAL__PROMPTS is empty."""
    model_licence: str | None = None
    """As the model's card says; None if it does not."""
    groups: dict[str, GroupSpec] | None = field(default=None, metadata={NAMES_THE_RUN: True})
    """The groups of tasks that have an aggregate; None if there are none, and in records of older versions."""
    safety_sha256: str | None = field(default=None, metadata={NAMES_THE_RUN: True})
    """Of the files of JOB_DATA__SAFETY_MODEL; None without one."""
    judge_sha256: str | None = field(default=None, metadata={NAMES_THE_RUN: True})
    """Of the rules of JOB_EVAL__PRINCIPLES and the files of JOB_EVAL__JUDGE; None without, and in older records."""
    judge_revision: str | None = None
    """The commit of a judge on the hub."""
    start_revision: str | None = None
    """The commit of an adapter on the hub that training starts from."""


@dataclass(frozen=True)
class FullPrecision:
    """The base with its original weights, before it is quantized: its scores by task, or why it was not scored.

    `dtype` is what it computes in, the same as the quantized base.
    """

    dtype: str
    scores: dict[str, TaskScores]
    not_scored: str = ""


@dataclass(frozen=True)
class ScoringPrecision:
    """In what questions are scored: one for the base, the adapter, the original base and the exported models.

    `dtype` is that of the factors of matrix products, `sums` that of what adds up over the layers, and of the logits.
    Both are those of training, or they are fp16 and fp32. `reason` says why, in words.
    """

    dtype: str
    sums: str
    reason: str


@dataclass(frozen=True)
class Evaluated:
    """Record of an evaluation stage."""

    scores: dict[str, TaskScores]
    artifacts: list[Artifact]
    measured: dict[str, MeasuredScores] = field(default_factory=dict)
    """Tasks that have no choices."""
    full_precision: FullPrecision | None = None
    """In the record of the base, if that is quantized and JOB_EVAL__FULL_PRECISION is `auto`; else None."""
    generation: dict[str, str] = field(default_factory=dict)
    """By what was answered, a task or JOB_EVAL__PROMPTS, a hash of how answers are generated and what ends them.

    Versions may do that otherwise. Empty in records of older versions.
    """
    judged: JudgeRecord | None = None
    """In the record of the adapter, where JOB_EVAL__PRINCIPLES is set: who judged its answers and the base's."""
    judged_answers: dict[str, str] = field(default_factory=dict)
    """By side, SHA-256 of the file of answers that was judged; empty where nothing was, and in older records."""
    precision: ScoringPrecision | None = None
    """None in records of older versions, which scored in the dtype of training."""
    unsafe_answers: int | None = None
    """How many answers to JOB_EVAL__PROMPTS JOB_DATA__SAFETY_MODEL classifies as unsafe; None where it did not."""


@dataclass(frozen=True)
class CalibrationRecord:
    """The rows of the training data that a quantization was made with: the first ones of the batch plan.

    `rows_sha256` is over their numbers, `examples_sha256` over their tokens, both in the order of the plan.
    """

    rows: int
    tokens: int
    rows_sha256: str
    examples_sha256: str


@dataclass(frozen=True)
class GgufRecord:
    """What a GGUF file holds.

    `architecture` and `pre_tokenizer` (how words are split) are llama.cpp's names. `types` counts by type the numbers
    held in it, and `bits_per_weight` has all scales in it. `tokenized_otherwise` are the texts of the test that
    llama.cpp tokenizes otherwise than the tokenizer.
    """

    architecture: str
    pre_tokenizer: str
    converter: str
    types: dict[str, int]
    bits_per_weight: float
    tokenized_otherwise: list[str]


@dataclass(frozen=True)
class QuantizationRecord:
    """How the weights of an exported format are quantized, and by what.

    `method` is the reader's name of it, such as `compressed-tensors`; `bits` are those of a weight without its scales,
    and `group_size` the weights that share a scale: None for a whole row. `layers` counts the quantized layers; `kept`
    names the linear layers that are not.
    """

    method: str
    scheme: str
    bits: float
    group_size: int | None
    activations: str
    library: str
    version: str
    layers: int
    kept: list[str]
    calibration: CalibrationRecord | None = None
    gguf: GgufRecord | None = None


@dataclass(frozen=True)
class ExportRecord:
    """One exported format: which of its candidates is published, why that one, and the scores of all.

    `dtype` is that of most of the published weights, `scored_in` that of the factors of most products when they were
    scored: that of `ScoringPrecision` where the job multiplies. Where the layers of another library do, it is `dtype`,
    but on a GPU that does not compute in it.
    """

    format: str
    candidate: str
    reason: str
    dtype: str
    scored_in: str
    scores: dict[str, dict[str, TaskScores]]
    """By candidate, the scores by task. Candidates of `merged`: the weights that the adapter was merged onto. Any other
    format has one, which has the name of the merged candidate that it was made from."""
    published: bool = True
    """Whether its files are published; not for a `merged` that only another format was made from."""
    bytes: int | None = None
    """Of all its files; None in records of older versions."""
    quantization: QuantizationRecord | None = None
    """None where nothing is quantized."""
    not_scored: str = ""
    """Why it was not scored, if it was not."""
    not_made: str = ""
    """Why making it failed, if it did: the failure does not end a run that has trained."""


@dataclass(frozen=True)
class Exported:
    """Record of the export stage: its artifacts are the files of all formats, and the answers of all candidates."""

    exports: list[ExportRecord]
    artifacts: list[Artifact]
    precision: ScoringPrecision | None = None
    """That of the base and the adapter, which the scores are compared with; None in records of older versions."""


@dataclass(frozen=True)
class DerivedExport:
    """Record of a format that was made from the merged model, for a later attempt that need not make it again.

    `merged` is the hash of the merged model's files that it was made from.
    """

    merged: str
    export: ExportRecord
    artifacts: list[Artifact]


@dataclass(frozen=True)
class RecordedSettings:
    """The settings of a finished run, as its manifest has them.

    Attributes:
        run_id: The run's id.
        output: Path or URI of the folder that its folder lies in.
        values: Value by dotted name.
    """

    run_id: str
    output: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class ExportedRun:
    """Record of a run that exports a finished one: which one, and how many attempts are that run's.

    `earlier`: if that run exported another one itself, the numbers of the last attempts of all those before it.
    """

    id: str
    results_sha256: str
    attempts: int
    earlier: list[int] = field(default_factory=list)

    @property
    def last_attempts(self) -> list[int]:
        """Number of the last attempt of each run before this one, in their order."""
        return [*self.earlier, self.attempts]


@dataclass(frozen=True)
class Uploaded:
    """Record of the exported files that are in the store already, for a later attempt to upload only the others."""

    artifacts: list[Artifact]


@dataclass(frozen=True)
class Pushed:
    """Record of a push of a complete run, written after it.

    `target` is one of `job.push.push.TARGETS`, `place` where it went in that target's own spelling, and `id` what names
    this version there for good: a commit, a digest. `files_sha256` is over the hashes and paths of the pushed files.
    """

    target: str
    place: str
    id: str
    files_sha256: str


NEAR = 0.2
"""Nats between the two best choices of a record below which another rounding may change the prediction."""
GREEDY_SHARE = 0.9
"""Of the greedy answers that begin with a choice, this share has to begin with the predicted one: the likeliest choice
as a whole need not be the one that begins with the likeliest token."""


@dataclass(frozen=True)
class Asked:
    """One question that a server was asked.

    Attributes:
        task: Its task.
        id: In that task.
        recorded: The prediction of the record.
        served: That of the server; None if its answer is no choice.
        margin: Log-likelihood of the record's best choice less that of the second best, in nats.
        difference: The largest difference between a choice's two log-likelihoods, in nats; None without any.
    """

    task: str
    id: str
    recorded: int
    served: int | None
    margin: float
    difference: float | None

    @property
    def alike(self) -> bool:
        """Whether the server predicts what the record says."""
        return self.served == self.recorded


@dataclass(frozen=True)
class ServeCheck:
    """How a server answered the run's questions.

    Attributes:
        server: Key of the table in `job/serving/servers.py`.
        way: How it was asked, see there.
        format: `adapter`, or the exported format.
        asked: Questions in order.
        seconds: For all of them.
        first_token: Median of seconds to the first token of a streamed answer.
        tokens_per_second: Median after it, one request at a time; None if none had two tokens.
        when: UTC, as the manifest writes times.
    """

    server: str
    way: str
    format: str
    asked: tuple[Asked, ...]
    seconds: float
    first_token: float
    tokens_per_second: float | None
    when: str

    @property
    def compared(self) -> list[Asked]:
        """The questions that the server gave a prediction for."""
        return [one for one in self.asked if one.served is not None]

    @property
    def alike(self) -> int:
        """How many of them it answered as the record says."""
        return sum(one.alike for one in self.asked)

    @property
    def different(self) -> list[Asked]:
        """Those that it answered otherwise, and not for a near tie."""
        return [one for one in self.compared if not one.alike and one.margin >= NEAR]

    @property
    def holds(self) -> bool:
        """Whether the server serves the model of the run."""
        if not self.compared:
            return False
        if self.way == "greedy":
            return self.alike >= GREEDY_SHARE * len(self.compared)
        return not self.different


def margin(log_likelihoods: list[float]) -> float:
    """Nats between the two best choices; 0 for a single one."""
    best = sorted(log_likelihoods)
    return best[-1] - best[-2] if len(best) > 1 else 0.0


@dataclass(frozen=True)
class FirstValues:
    """Record of an adapter's first values, which are computed once in a run."""

    artifacts: list[Artifact]


@dataclass(frozen=True)
class Referenced:
    """Record of the log-probabilities by the reference model, which are computed once in a run."""

    artifacts: list[Artifact]


@dataclass(frozen=True)
class Trained:
    """Record of the training stage."""

    training: TrainingRecord
    artifacts: list[Artifact]
