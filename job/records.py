"""Frozen values that the rooms hand to each other. No torch, no behaviour beyond what a value knows of itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One tokenized training example.

    `targets[i]` says whether token `i` is learned, that is predicted from the tokens before it; the first never is.
    """

    input_ids: tuple[int, ...]
    targets: tuple[bool, ...]


@dataclass(frozen=True)
class DatasetRecord:
    """What was trained on. `sha256` covers the selected, rendered and tokenized examples in order."""

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
class ModelRecord:
    """The base model and the size of the adapter on it. `sha256` covers the model's files."""

    id: str
    revision: str | None
    sha256: str
    architecture: str
    quantization: str
    double_quantization: bool
    dtype: str
    parameters: int
    trainable_parameters: int


@dataclass(frozen=True)
class Execution:
    """How a GPU's work was carried out; none of it changes a bit.

    `recorded`: its kernels were recorded once for each shape of row and replayed (CUDA graphs).
    """

    kept_base: bool
    kept_activations: bool
    recorded: bool
    reason: str


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
    execution: Execution | None = None
    """None on a CPU, and where PEFT's own layers did the work."""


@dataclass(frozen=True)
class Question:
    """One multiple-choice question for scoring: token ids of the context and of each choice after it."""

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChoiceScore:
    """Natural log-likelihood of a choice given its context, and whether greedy decoding would have said it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class TaskScores:
    """One task, one model: the figures, and the file that holds the answer to each question."""

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


@dataclass(frozen=True)
class Artifact:
    """A published file: key below the run, size, hash. `facts_sha256` leaves out what a clock measured."""

    path: str
    bytes: int
    sha256: str
    facts_sha256: str | None = None


@dataclass(frozen=True)
class StepMetrics:
    """One logging step: facts that every identical run repeats, and under `measured` what a clock or a meter said."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    """None where fp16's loss scaling overflowed, and the step was skipped."""
    examples: int
    target_tokens: int
    measured: dict[str, float | int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class AttemptRecord:
    """One start of the run. Times are RFC 3339 in UTC.

    `finished` is None where it was killed without notice; everything else is then as of its last note, up to some
    seconds before. `usd_per_hour` is what the machine of this attempt cost, as far as it was told.
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
    """Processes that worked together; the default is for what was noted before there could be several."""
    repeated_seconds: float = 0.0
    usd_per_hour: float | None = None
    energy_joules: float | None = None


@dataclass(frozen=True)
class Pulled:
    """What the record of the pull stage keeps: a later attempt must find the same."""

    dataset: DatasetRecord
    model_sha256: str
    model_revision: str | None
    questions: dict[str, str]
    """SHA-256 of each task's questions."""


@dataclass(frozen=True)
class Evaluated:
    """What the record of an evaluation keeps."""

    scores: dict[str, TaskScores]
    artifacts: list[Artifact]


@dataclass(frozen=True)
class Trained:
    """What the record of training keeps."""

    training: TrainingRecord
    artifacts: list[Artifact]
