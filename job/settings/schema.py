"""What can be set: every setting's name, type, default and documentation. Every default lives here.

The groups are what `settings.load_settings` hands out, and what `config --schema` publishes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from job.common.optimizers import OPTIMIZERS
from job.settings.field_types import (
    Count,
    CountOrAuto,
    Digest,
    Endpoint,
    Flag,
    FlagOrAuto,
    HostPort,
    LocalPath,
    Location,
    Locations,
    Maybe,
    Names,
    NotNegative,
    Positive,
    Real,
    RunId,
    Seconds,
    StorageClass,
    Text,
    Whole,
)

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


def new_run_id() -> str:
    """A run id of the time and chance, `20261123-135600-9f3c` (UTC)."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


class Group(BaseModel):
    """Settings that belong together. Frozen; unknown names, NaN and infinity are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        str_strip_whitespace=True,
        use_attribute_docstrings=True,
        defer_build=True,  # the validator of the whole holds those of the groups: one is built, not thirteen
    )


class Run(Group):
    """The run as a whole."""

    id: RunId = Field(default_factory=new_run_id)
    """Names the run and its folder; the same id resumes it. Default: the platform's job name, else time and chance."""
    output: Location = "runs"
    """Where results go, `s3://bucket/prefix` or a path; the run's files lie in `<output>/<run id>/`.

    On SageMaker by default the folder that it copies to S3, `/opt/ml/checkpoints`.
    """
    seed: Whole = 0
    """Seed of every random choice."""
    grace_seconds: Seconds = 30
    """Time between the signal to stop and the kill."""
    spot_notices: Literal["auto", "off", "ec2", "gcp", "azure"] = "auto"
    """Whose notice of preemption to poll; `auto` finds out."""
    processes: CountOrAuto = "auto"
    """Processes on this machine; `auto` is one for each GPU that is visible, or one on a CPU."""
    nodes: Count = 1
    """Machines that work on the run together, each started with the same settings. Default: the platform's number."""
    node_rank: Whole = 0
    """Which of them this one is, from 0. Default: the index of the pod in its Indexed Job, or of SageMaker's host."""
    rendezvous: Maybe[HostPort] = None
    """Where machine 0 listens for the others, `host:port`. Default on SageMaker: the first host."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """What to run on; `auto` is the GPU where there is one. With `gpu` the job does not start without."""
    image_digest: Maybe[Digest] = None
    """Digest of the image that the job runs in, for the manifest: no process can find it out by itself."""


class Model(Group):
    """The base model."""

    id: Location = "mistralai/Mistral-7B-v0.1"
    """Hub id, `s3://` URI or path."""
    revision: Maybe[Text] = None
    """Commit hash, for a hub id; without one the newest is taken. The manifest records the commit that was used."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How the frozen weights are held: 4-bit NormalFloat, or as they are."""
    double_quantization: Flag = True
    """Quantize the quantization constants as well."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What is computed in; `auto` is bf16 where the GPU has it, else fp16."""
    keep_quantized: Literal["off", "cache", "store"] = "cache"
    """Keep the quantized model for the next start: in the folder `storage.cache`, where that is set; `store`: also
    beside the runs in `run.output`, so that a restart on another machine fetches 4 GB and not 14.
    """
    keep_dequantized: FlagOrAuto = "auto"
    """Dequantize the frozen weights once and keep them, for the same results sooner; `auto` where a GPU has room."""


class Lora(Group):
    """The adapter."""

    rank: Count = 16
    """Rank r of the update."""
    alpha: Count = 16
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[NotNegative, Field(lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""


class Data(Group):
    """The training data."""

    source: Location = "tatsu-lab/alpaca"
    """Hub id, `s3://` URI or path."""
    revision: Maybe[Text] = None
    """Commit hash, for a hub id; without one the newest is taken. The manifest records the commit that was used."""
    split: Text = "train"
    """Split of a hub data set."""
    limit: Maybe[Count] = None
    """Number of examples, the first good rows in the order of the file; empty for all."""
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "text"] = "auto"
    """Schema of a row; `auto` detects it."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a bad row does: end the job before it begins, or be counted and left out."""


class Train(Group):
    """Training."""

    epochs: Count = 2
    """How often every example is seen."""
    max_steps: Maybe[Count] = None
    """Stop after so many optimizer steps, if that is earlier."""
    learning_rate: NotNegative = 2e-4
    """Peak learning rate; 0 trains nothing, which is a useful control."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after the warmup."""
    warmup_steps: Whole = 5
    """Steps in which the learning rate rises to its peak."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    global_batch_size: Count = 32
    """Examples an optimizer step sees, over all GPUs."""
    micro_batch_tokens: Maybe[Count] = None
    """Tokens in one forward pass; empty: by the GPU's size, 1,024 on a CPU. No matter to which examples a step sees."""
    max_length: Count = 2048
    """Longest example, in tokens."""
    optimizer: OptimizerName = "adamw_8bit"
    """Optimizer of the adapter's weights."""
    loss_on: Literal["all", "completion"] = "all"
    """Tokens to learn: all, or those of the completion."""
    gradient_checkpointing: FlagOrAuto = "auto"
    """Compute activations again in the backward pass instead of keeping them; `auto`: unless there is room."""
    gpu_memory_gb: Maybe[Positive] = None
    """How much of the GPU's memory the job may use, in GB; empty for all. The token budget follows from it."""
    log_every_steps: Count = 1
    """Steps between two lines of metrics."""
    stall_seconds: Seconds = 1800
    """Without progress for so long, the job ends as stalled."""


class Checkpoint(Group):
    """Checkpoints."""

    every_steps: Count = 20
    """Optimizer steps between two checkpoints."""
    keep: Count = 2
    """How many to keep."""
    settle_seconds: NotNegative = 0.0
    """Age at which one lets older ones go, where something copies the folder. On SageMaker's synced folder: 300."""


class Eval(Group):
    """Evaluation, before and after training."""

    tasks: Names = ("arc_easy",)
    """lm-eval's multiple-choice tasks."""
    limit: Maybe[Annotated[Count, Field(ge=2)]] = None
    """Questions of each task, at least 2; empty for all."""
    data: Locations = Field(default_factory=dict)
    """Task -> file in the task's schema, path or `s3://`, instead of the hub: JSON, or `task=path,task2=path2`."""
    batch_tokens: Count = 8192
    """Tokens scored in one forward pass."""


class Gate(Group):
    """Quality gate: results are published, then the job ends with exit code 3 if one of these is not met."""

    metric: Literal["acc", "acc_norm"] = "acc"
    """The accuracy that counts."""
    min_delta: Maybe[Annotated[Real, Field(ge=-1, le=1)]] = None
    """Least gain over the base model, as a fraction: 0.01 is one percentage point."""
    max_regression: Maybe[Annotated[Real, Field(ge=0, le=1)]] = None
    """Greatest loss against the base model, as a fraction."""
    baseline: Maybe[Location] = None
    """Results of an earlier run, path or `s3://`: its adapter takes the place of the base model in the two above."""


class Storage(Group):
    """Object storage. Credentials are not settings: they come by AWS's own names, or from the machine's role."""

    endpoint_url: Maybe[Endpoint] = None
    """Another S3 than Amazon's, `https://host:port`."""
    region: Maybe[Text] = None
    """Region of the bucket."""
    kms_key_id: Maybe[Text] = None
    """Key that objects are encrypted with (SSE-KMS)."""
    storage_class: Maybe[StorageClass] = None
    """Storage class of new objects."""
    request_payer: Flag = False
    """Pay for reading somebody else's bucket."""
    timeout_seconds: Seconds = 60
    """For one answer of the store."""
    retries: Annotated[Count, Field(le=100)] = 8
    """How often a request is tried, the first time included."""
    cache: Maybe[LocalPath] = None
    """Local folder for what is downloaded; empty: a temporary one."""


class Log(Group):
    """Logging."""

    format: Literal["auto", "json", "console"] = "auto"
    """JSON lines, or for eyes; `auto` asks whether a terminal is there."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is shown."""
    trackers: Literal["auto", "off"] = "auto"
    """Weights & Biases and MLflow; `auto` uses each whose own variables are set, such as MLFLOW_TRACKING_URI."""


class Cost(Group):
    """What the machine costs; without a price the manifest has seconds only."""

    usd_per_hour: Maybe[NotNegative] = None
    """Price of the machine, or of all machines together. Attempts may differ in it: each is charged at its own."""
    on_demand_usd_per_hour: Maybe[NotNegative] = None
    """Price of the same machine if it could not be taken away; the manifest says what was saved."""


class Settings(Group):
    """All settings of one run."""

    preset: Literal["mistral-7b-alpaca", "demo"] = "mistral-7b-alpaca"
    """Named set of settings to start from."""
    fault: Maybe[Text] = None
    """Rehearse a failure, such as `kill@step=12`; see `faults.py` for what can go wrong. Never in earnest."""
    run: Run = Field(default_factory=Run)
    model: Model = Field(default_factory=Model)
    lora: Lora = Field(default_factory=Lora)
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Eval = Field(default_factory=Eval)
    gate: Gate = Field(default_factory=Gate)
    storage: Storage = Field(default_factory=Storage)
    log: Log = Field(default_factory=Log)
    cost: Cost = Field(default_factory=Cost)

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Keep where the values came from; `load_settings` passes it."""
        self._sources = dict.fromkeys(NAMES, "default") | (context or {})

    @property
    def sources(self) -> Mapping[str, str]:
        """Dotted name of each setting -> where its value came from."""
        return self._sources


NAMES: tuple[str, ...] = tuple(
    f"{group}.{name}" if members else group
    for group, field in Settings.model_fields.items()
    for members in [getattr(field.annotation, "model_fields", None)]
    for name in members or [""]
)
"""The dotted names of all settings."""
