"""All settings: name, type, default and documentation of each. Every default is defined here.

How to add a setting:

1. Add a field to the group it belongs to, with its default, and below it the docstring that documents it. Its type is a
   kind of value from `field_types`, wrapped in what says whether the setting changes what a run computes:

       warmup_steps: AffectsResult[Whole] = 5

   `AffectsResult[...]`: the setting affects the result, so an attempt that resumes a run must have the same value.
   `ExecutionOnly[...]`: it decides how the run is carried out only. `markers` has what else a field may say.
2. Use it: a stage receives the group, `settings.train.warmup_steps`.
3. Test what it does, in the tests of the package that uses it; and add values it refuses to `BAD_VALUES` in
   tests/unit/settings/test_load.py.

Nothing else has a list of settings. The variable JOB_TRAIN__WARMUP_STEPS, the option --train.warmup_steps, the
hyperparameter, the key in a file, `--help`, `config`, the JSON Schema and the manifest all follow from the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from job.common.optimizers import OptimizerName
from job.settings.field_types import (
    Count,
    CountOrAuto,
    Day,
    Digest,
    Endpoint,
    Flag,
    FlagOrAuto,
    HeldOut,
    HostPort,
    LocalPath,
    Location,
    Locations,
    Maybe,
    Names,
    NotNegative,
    Positive,
    PublicName,
    Real,
    RunId,
    Seconds,
    StorageClass,
    Text,
    Whole,
    new_run_id,
)
from job.settings.markers import (
    AffectsResult,
    BelongsTo,
    ExecutionOnly,
    RevisionOf,
    SageMakerChannel,
    UsedByReaders,
    find_markers,
    setting_names,
)
from job.settings.sources import (
    CommandLine,
    ConfigFile,
    Environment,
    Hyperparameters,
    PlatformDefaults,
    Preset,
    Request,
    SageMakerChannels,
    SecretsFolder,
)


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

    id: ExecutionOnly[RunId] = Field(default_factory=new_run_id)
    """Names the run and its folder; the same id resumes it. Default: the platform's job name, else time and chance."""
    output: ExecutionOnly[Location] = "runs"
    """Where results go, `s3://bucket/prefix` or a path; the run's files lie in `<output>/<run id>/`.

    On SageMaker by default the folder that it copies to S3, `/opt/ml/checkpoints`.
    """
    seed: AffectsResult[Whole] = 0
    """Seed of every random choice."""
    grace_seconds: ExecutionOnly[Seconds] = 30
    """Seconds between the signal to stop and the kill."""
    max_idle_attempts: ExecutionOnly[Count] = 5
    """After so many attempts in a row that were stopped before the run got any further, the last ends with exit code 71
    instead of 75, which a platform retries at no cost for ever."""
    spot_notices: ExecutionOnly[Literal["auto", "off", "ec2", "gcp", "azure"]] = "auto"
    """Cloud whose metadata service is asked for notices of preemption; `auto` finds out which answers."""
    processes: ExecutionOnly[CountOrAuto] = "auto"
    """Processes on this machine; `auto`: one for each visible GPU, or one on a CPU."""
    nodes: ExecutionOnly[Count] = 1
    """Machines of the run, each started with the same settings. Default: the number that the platform gives."""
    node_rank: ExecutionOnly[Whole] = 0
    """Rank of this machine, from 0. Default: the pod's index in its Indexed Job, or the index of SageMaker's host."""
    rendezvous: ExecutionOnly[Maybe[HostPort]] = None
    """Where machine 0 listens for the others, `host:port`. Default on SageMaker: the first host."""
    device: ExecutionOnly[Annotated[Literal["auto", "gpu", "cpu"], BelongsTo("model.id")]] = "auto"
    """Device; `auto`: the GPU where there is one. With `gpu` the job does not start without a GPU."""
    image_digest: ExecutionOnly[Maybe[Digest]] = None
    """Digest of the image that the job runs in, for the manifest; a process cannot find it out by itself."""


class Model(Group):
    """The base model."""

    id: AffectsResult[Annotated[Location, SageMakerChannel("model")]] = "mistralai/Mistral-7B-v0.1"
    """Hub id, `s3://` URI or path."""
    revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("model.id")]] = None
    """Commit hash, for a hub id; without one the newest is taken. The manifest records the commit that was used."""
    name: AffectsResult[Maybe[PublicName]] = None
    """Public name of the model, such as its hub id, for the adapter's files, where JOB_MODEL__ID is a path or `s3://`
    URI. Default: the hub id, else the last part of JOB_MODEL__ID. Nothing is fetched by it.
    """
    quantization: AffectsResult[Literal["nf4", "none"]] = "nf4"
    """How the frozen weights are stored: as 4-bit NormalFloat, or unquantized."""
    double_quantization: AffectsResult[Flag] = True
    """Quantize the quantization constants as well."""
    dtype: AffectsResult[Literal["auto", "bf16", "fp16", "fp32"]] = "auto"
    """Data type of the computation; `auto`: bf16 where the GPU has it, else fp16."""
    keep_quantized: ExecutionOnly[Literal["off", "cache", "store"]] = "cache"
    """Keep the quantized model for the next start. `cache`: in the folder JOB_STORAGE__CACHE, if that is set; `store`:
    also beside the runs in JOB_RUN__OUTPUT, so that a restart on another machine downloads 4 GB and not 14.
    """
    keep_dequantized: ExecutionOnly[FlagOrAuto] = "auto"
    """Dequantize the frozen weights once and keep them: same results, faster; `auto`: if the GPU's memory suffices."""


class Lora(Group):
    """The LoRA adapter."""

    rank: AffectsResult[Count] = 16
    """Rank r of the update."""
    alpha: AffectsResult[Count] = 16
    """Scale: the update is multiplied by alpha / rank."""
    dropout: AffectsResult[Annotated[NotNegative, Field(lt=1)]] = 0.0
    """Dropout on the adapter's input."""
    target_modules: AffectsResult[Literal["auto"] | Names] = "auto"
    """Names of the linear layers that get an adapter. `auto`: all but the head, as found in the model; the seven
    projections of a decoder of Llama's kind."""


class Data(Group):
    """The training data."""

    source: AffectsResult[Annotated[Location, SageMakerChannel("training")]] = "tatsu-lab/alpaca"
    """Hub id, `s3://` URI or path."""
    revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.source")]] = None
    """Commit hash, for a hub id; without one the newest is taken. The manifest records the commit that was used."""
    split: AffectsResult[Text] = "train"
    """Split of a hub data set."""
    limit: AffectsResult[Maybe[Count]] = None
    """Number of examples, the first good rows in the order of the file; empty for all."""
    format: AffectsResult[Literal["auto", "alpaca", "prompt_completion", "messages", "text"]] = "auto"
    """Schema of a row; `auto` detects it."""
    on_bad_row: AffectsResult[Literal["error", "skip"]] = "error"
    """What a bad row does: end the job before it begins, or be counted and left out."""
    validation: AffectsResult[Annotated[Maybe[HeldOut], SageMakerChannel("validation")]] = None
    """Rows for the validation loss: a share of the rows (0.05) or a number of them (200), held out of training, or a
    source of its own (hub id, `s3://` URI or path) with rows of the same schema; empty for none. Near-duplicates of a
    row fall on the same side as the row; JOB_DATA__LIMIT counts the rows before any is held out.
    """
    validation_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.validation")]] = None
    """Commit hash of JOB_DATA__VALIDATION, for a hub id."""
    validation_split: AffectsResult[Text] = "validation"
    """Split of JOB_DATA__VALIDATION, where that is a hub id or a folder of splits."""
    date: AffectsResult[Maybe[Day]] = None
    """What a chat template that asks is told is today, YYYY-MM-DD; empty: the day (UTC) of the run's first attempt."""


class Train(Group):
    """Training."""

    epochs: AffectsResult[Count] = 2
    """Passes over the training data."""
    max_steps: AffectsResult[Maybe[Count]] = None
    """Stop after this many optimizer steps, if the epochs have more."""
    learning_rate: AffectsResult[NotNegative] = 2e-4
    """Peak learning rate; 0 trains nothing, which is a useful control."""
    scheduler: AffectsResult[Literal["linear", "cosine", "constant"]] = "linear"
    """Schedule of the learning rate after the warmup."""
    warmup_steps: AffectsResult[Whole] = 5
    """Steps in which the learning rate rises to its peak."""
    weight_decay: AffectsResult[NotNegative] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: AffectsResult[Positive] = 1.0
    """Gradients are clipped to this norm."""
    global_batch_size: AffectsResult[Count] = 32
    """Examples in one optimizer step, over all GPUs."""
    micro_batch_tokens: ExecutionOnly[Maybe[Count]] = None
    """Tokens in one forward pass; empty: by the GPU's memory, 1,024 on a CPU. Changes no optimizer step."""
    max_length: AffectsResult[Count] = 2048
    """Longest example, in tokens."""
    optimizer: AffectsResult[OptimizerName] = "adamw_8bit"
    """Optimizer of the adapter's weights."""
    validate_every_steps: AffectsResult[Maybe[Count]] = None
    """Optimizer steps between two validations, beside those before the first step and after the last; empty: the steps
    of an epoch. Checkpoints have an interval of their own, which may change between attempts."""
    stop_after: AffectsResult[Maybe[Count]] = None
    """End training after so many validations in a row without a lower loss; empty: never. The schedule of the learning
    rate stays that of all steps."""
    keep: AffectsResult[Literal["last", "best"]] = "last"
    """Which adapter is evaluated and published: that of the last step, or of the step with the lowest validation loss.
    """
    loss_on: AffectsResult[Literal["all", "completion"]] = "all"
    """Tokens in the loss: all, or those of the completion only."""
    gradient_checkpointing: ExecutionOnly[FlagOrAuto] = "auto"
    """Recompute activations in the backward pass instead of keeping them; `auto`: if they do not fit into memory."""
    gpu_memory_gb: ExecutionOnly[Maybe[Positive]] = None
    """GPU memory that the job may use, in GB; empty for all. The tokens in one forward pass follow from it."""
    log_every_steps: ExecutionOnly[Count] = 1
    """Optimizer steps between two lines of metrics in the log."""
    stall_seconds: ExecutionOnly[Seconds] = 1800
    """After this many seconds without progress the job ends as stalled, with exit code 75."""


class Checkpoint(Group):
    """Checkpoints."""

    every_steps: ExecutionOnly[Count] = 20
    """Optimizer steps between two checkpoints."""
    keep: ExecutionOnly[Count] = 2
    """Checkpoints to keep; older ones are deleted."""
    settle_seconds: ExecutionOnly[NotNegative] = 0.0
    """Age in seconds of a checkpoint before older ones are deleted, where a folder is copied late. SageMaker: 300."""


class Eval(Group):
    """Evaluation, before and after training."""

    tasks: AffectsResult[Names] = ("arc_easy",)
    """lm-eval's multiple-choice tasks."""
    limit: AffectsResult[Maybe[Annotated[Count, Field(ge=2)]]] = None
    """Questions of each task, at least 2; empty for all."""
    data: AffectsResult[Annotated[Locations, SageMakerChannel("evaluation")]] = Field(default_factory=dict)
    """Questions from files instead of the hub, `task=path,task2=s3://...` or JSON; each file in its task's schema."""
    long_questions: AffectsResult[Literal["error", "cut"]] = "error"
    """A question of more than `train.max_length` tokens: ends the job, or loses its beginning, as lm-eval has it."""
    batch_tokens: ExecutionOnly[Count] = 8192
    """Tokens scored in one forward pass."""


class Gate(Group):
    """Quality gate: results are published, then the job ends with exit code 3 if one of these is not met."""

    metric: ExecutionOnly[Literal["acc", "acc_norm"]] = "acc"
    """The accuracy that counts."""
    min_delta: ExecutionOnly[Maybe[Annotated[Real, Field(ge=-1, le=1)]]] = None
    """Smallest accepted gain over the base model, as a fraction: 0.01 is one percentage point."""
    max_regression: ExecutionOnly[Maybe[Annotated[Real, Field(ge=0, le=1)]]] = None
    """Largest accepted loss against the base model, as a fraction."""
    baseline: ExecutionOnly[Maybe[Location]] = None
    """Results of an earlier run, path or `s3://`: compare with its adapter instead of with the base model."""


class Storage(Group):
    """Object storage. Credentials are no settings: they come from AWS's own variables, or from the machine's role."""

    endpoint_url: ExecutionOnly[Maybe[Endpoint]] = None
    """Address of an S3-compatible store, `https://host:port`; empty for AWS."""
    region: ExecutionOnly[Maybe[Text]] = None
    """Region of the bucket."""
    kms_key_id: ExecutionOnly[Maybe[Text]] = None
    """KMS key for the encryption of new objects (SSE-KMS)."""
    storage_class: ExecutionOnly[Maybe[StorageClass]] = None
    """Storage class of new objects."""
    request_payer: ExecutionOnly[Flag] = False
    """Pay for requests to a requester-pays bucket."""
    timeout_seconds: ExecutionOnly[Seconds] = 60
    """Seconds that one request may take."""
    retries: ExecutionOnly[Annotated[Count, Field(le=100)]] = 8
    """Tries of one request, the first included."""
    cache: ExecutionOnly[Maybe[LocalPath]] = None
    """Local folder for downloads; empty: a temporary one."""


class Log(Group):
    """Logging."""

    format: ExecutionOnly[Literal["auto", "json", "console"]] = "auto"
    """JSON lines, or lines for people; `auto`: for people at a terminal, else JSON."""
    level: ExecutionOnly[Literal["debug", "info", "warning", "error"]] = "info"
    """Lowest level that is shown."""
    trackers: ExecutionOnly[Literal["auto", "off"]] = "auto"
    """Weights & Biases and MLflow; `auto` uses each whose own variables are set, such as MLFLOW_TRACKING_URI."""


class Cost(Group):
    """Price of the machines; without one the manifest has seconds only."""

    usd_per_hour: ExecutionOnly[Maybe[NotNegative]] = None
    """Price of all machines of the run together. Each attempt is charged at its own price."""
    on_demand_usd_per_hour: ExecutionOnly[Maybe[NotNegative]] = None
    """On-demand price of the same machines; the manifest states what was saved against it."""


class Options(Group, BaseSettings):
    """How pydantic-settings reads variables and prints `--help`."""

    model_config = SettingsConfigDict(
        env_prefix="JOB_",
        env_nested_delimiter="__",
        env_nested_max_split=1,
        enable_decoding=False,  # what text means is decided by the kind of value
        validate_default=False,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_show_env_vars=True,
        cli_use_class_docs_for_groups=True,
    )


class Settings(Options):
    """All settings of one run."""

    preset: ExecutionOnly[Literal["mistral-7b-alpaca", "demo"]] = "mistral-7b-alpaca"
    """Named set of settings to start from."""
    fault: ExecutionOnly[Maybe[Text]] = None
    """Rehearse a failure, such as `kill@step=12`; job/runs/fault_injection.py has all. For tests only."""
    run: Run = Field(default_factory=Run)
    model: Annotated[Model, BelongsTo("model.id")] = Field(default_factory=Model)
    lora: Lora = Field(default_factory=Lora)
    data: Annotated[Data, BelongsTo("data.source")] = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Eval = Field(default_factory=Eval)
    gate: Gate = Field(default_factory=Gate)
    storage: Annotated[Storage, UsedByReaders()] = Field(default_factory=Storage)
    log: Annotated[Log, UsedByReaders()] = Field(default_factory=Log)
    cost: Cost = Field(default_factory=Cost)

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings' signature
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Precedence: of two sources that give a setting, the one that is named first here wins.

        Without a `Request` among the arguments of the call, these arguments are all there is.
        """
        given = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        request = given.pop("_request", None)
        if not isinstance(request, Request):
            return (init_settings,)
        return (
            CommandLine(settings_cls, request),
            Environment(settings_cls, request),
            SecretsFolder(settings_cls, request),
            Hyperparameters(settings_cls, request),
            ConfigFile(settings_cls, request),
            SageMakerChannels(settings_cls, request),
            Preset(settings_cls, request),
            PlatformDefaults(settings_cls, request),
        )

    def keep_sources(self, given: Mapping[str, str]) -> None:
        """Notes where the values came from; a setting that is not among `given` has its default."""
        self._sources = dict.fromkeys(NAMES, "default") | dict(given)

    def model_post_init(self, _context: Any, /) -> None:
        """Until `keep_sources` says otherwise, every value is a default."""
        self.keep_sources({})

    @property
    def sources(self) -> Mapping[str, str]:
        """Dotted name of each setting -> where its value came from."""
        return self._sources


NAMES = setting_names(Settings)
"""The dotted names of all settings."""
READING = frozenset(find_markers(Settings, UsedByReaders))
"""Those that count where published runs are read."""
