"""All settings: name, type, default and documentation of each. Every default is defined here.

How to add a setting:

1. Add a field to the group it belongs to, with its default, and below it the docstring that documents it. Its type is a
   kind of value from `field_types`, wrapped in what says whether the setting changes what a run computes:

       warmup_steps: AffectsResult[Whole] = 5

   `AffectsResult[...]`: the setting affects the result, so an attempt that resumes a run must have the same value.
   `ExecutionOnly[...]`: it decides how the run is carried out only. `markers` has what else a field may say.
2. If it makes no sense beside another setting, say so in `combinations`.
3. Use it: a stage receives the group, `settings.train.warmup_steps`.
4. Test what it does, in the tests of the package that uses it; and add values it refuses to `BAD_VALUES` in
   tests/unit/settings/test_load.py.

Nothing else has a list of settings. The variable JOB_TRAIN__WARMUP_STEPS, the option --train.warmup_steps, the
hyperparameter, the key in a file, `--help`, `config`, the JSON Schema and the manifest all follow from the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from job.common.findings import ALL, Action
from job.common.methods import SFT, MethodName, Methods, last_of
from job.common.optimizers import OptimizerName
from job.common.schedulers import SchedulerName
from job.settings.field_types import (
    BranchName,
    Count,
    CountOrAuto,
    DataSources,
    Day,
    Digest,
    Endpoint,
    ExportFormats,
    FieldNames,
    Flag,
    FlagOrAuto,
    HeldOut,
    HostPort,
    HubRepository,
    ImageReference,
    JsonObject,
    Judged,
    Layers,
    LocalPath,
    Location,
    LocationOrServer,
    Locations,
    Maybe,
    Names,
    NotNegative,
    OnFinding,
    Passes,
    Pattern,
    Positive,
    Prompts,
    PublicName,
    Real,
    RunId,
    Seconds,
    Secret,
    SecretAddress,
    Share,
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
    SameInAllProcesses,
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
        defer_build=True,  # the validator of `Settings` contains those of the groups: one is built instead of thirteen
    )


class Run(Group):
    """The run as a whole."""

    id: ExecutionOnly[RunId] = Field(default_factory=new_run_id)
    """Name of the run and of its folder; the job started again with the same id resumes the run. Default: the
    platform's name of the job, else a new one from the time and random digits."""
    output: ExecutionOnly[Location] = "runs"
    """Where runs are kept, `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` or a path; the files of
    this run lie in `<output>/<run id>/`.

    Default on SageMaker: `/opt/ml/checkpoints`, the folder that SageMaker copies to S3.
    """
    seed: AffectsResult[Whole] = 0
    """Seed of every random choice."""
    grace_seconds: ExecutionOnly[Seconds] = 30
    """Seconds between SIGTERM and SIGKILL on this platform: the time that there is for a last checkpoint. A process
    that then still waits, for a store say, ends half a second before, with exit code 75."""
    max_idle_attempts: ExecutionOnly[Count] = 5
    """Limit of attempts in a row that are stopped before the run gets any further: the last one ends with exit code 71
    instead of 75, since a platform would retry 75 without limit."""
    spot_notices: ExecutionOnly[Literal["auto", "off", "ec2", "gcp", "azure"]] = "auto"
    """Cloud whose metadata service is asked for notices of preemption; `auto`: the one that answers."""
    processes: ExecutionOnly[CountOrAuto] = "auto"
    """Number of processes on this machine; `auto`: one for each visible GPU, or one on a CPU."""
    nodes: ExecutionOnly[Count] = 1
    """Number of machines of the run, each started with the same settings. Default: as the platform says, else 1."""
    node_rank: ExecutionOnly[Whole] = 0
    """Rank of this machine, from 0. Default: the pod's index in its Indexed Job, or the index of SageMaker's host."""
    rendezvous: ExecutionOnly[Maybe[HostPort]] = None
    """Address at which machine 0 listens for the others, `host:port`. Default on SageMaker: the first host."""
    device: ExecutionOnly[Annotated[Literal["auto", "gpu", "cpu"], BelongsTo("model.id")]] = "auto"
    """Device to train on; `auto`: the GPU, or the CPU where there is none; `gpu`: it is an error if there is no GPU."""
    image_digest: ExecutionOnly[Maybe[Digest]] = None
    """Digest of the container image, `sha256:...`, recorded in the manifest; a process cannot find it out by itself."""


class Model(Group):
    """The base model."""

    id: AffectsResult[Annotated[Location, SageMakerChannel("model")]] = "mistralai/Mistral-7B-v0.1"
    """Hub id, URI (`s3://`, `gs://`, `az://`) or path."""
    revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("model.id")]] = None
    """Commit hash, tag or branch, for a hub id; empty: the newest commit. The manifest records the commit, and a
    restart keeps to it."""
    name: AffectsResult[Maybe[PublicName]] = None
    """Public name of the base model, such as its hub id, to be written into the adapter's files if JOB_MODEL__ID is a
    path or URI. Default: the hub id, else the last part of JOB_MODEL__ID. Nothing is downloaded by this name.
    """
    pretraining_tokens: ExecutionOnly[Maybe[Annotated[Real, Field(gt=0, le=1e16)]]] = None
    """Tokens that the base was pre-trained on, such as 2e12: the report gives the compute of training as a share of
    that of pre-training. Empty: what is known of the public base of this name."""
    quantization: AffectsResult[Literal["nf4", "none"]] = "nf4"
    """How the frozen weights are stored: as 4-bit NormalFloat, or unquantized."""
    double_quantization: AffectsResult[Flag] = True
    """Quantize the quantization constants as well."""
    dtype: AffectsResult[Literal["auto", "bf16", "fp16", "fp32"]] = "auto"
    """Data type of the computation; `auto`: bf16, or fp16 on a GPU without bf16."""
    add_tokens: AffectsResult[Maybe[Names]] = None
    """New tokens, separated by commas or as a JSON list, that the tokenizer gets. Their rows of the embedding and of
    the output layer are trained, and published with the adapter; PEFT's own layers do that, which is slower."""
    keep_quantized: ExecutionOnly[Literal["off", "cache", "store"]] = "cache"
    """Where the quantized model is kept for the next start. `cache`: in the folder JOB_STORAGE__CACHE, if that is set;
    `store`: also beside the runs in JOB_RUN__OUTPUT, so that a restart on another machine downloads 4 GB, not 14.
    """
    keep_dequantized: ExecutionOnly[FlagOrAuto] = "auto"
    """Dequantize the frozen weights once and keep them: faster, same results; `auto`: if they fit into memory. With
    JOB_TRAIN__COMPUTE=fp8 the weights in FP8 are kept."""
    placement: ExecutionOnly[Annotated[Literal["auto", "gpu", "sharded", "host"], SameInAllProcesses()]] = "auto"
    """Where the base's 4-bit weights are kept: `gpu`, all on each process's GPU; `sharded`, a share on the GPU of each
    process; `host`, in main memory. With the last two, each decoder layer is fetched to the GPU while the layer before
    it computes. `auto`: the first of these that fits. The results are the same, bit for bit."""


class Lora(Group):
    """The LoRA adapter."""

    rank: AffectsResult[Count] = 16
    """Rank r of the low-rank update."""
    alpha: AffectsResult[Count] = 16
    """Scale: the update is multiplied by alpha / rank."""
    dropout: AffectsResult[Annotated[NotNegative, Field(lt=1)]] = 0.0
    """Dropout on the adapter's input."""
    start: AffectsResult[Maybe[Location]] = None
    """Adapter to go on training, instead of a new one: hub id (`org/name` or `org/name@revision`), URI or path
    of a LoRA adapter in safetensors, of the same rank, alpha and layers. Learning preferences, it is also the
    reference."""
    target_modules: AffectsResult[Literal["auto", "all-linear", "attention", "mlp"] | Names] = "auto"
    """Names of the linear layers that get an adapter, such as `q_proj,v_proj`. `auto` or `all-linear`: all linear
    layers but the output head; in models like Llama and Mistral the seven projections of each decoder layer.
    `attention`, `mlp`: those within modules of this kind."""
    experts: AffectsResult[Flag] = False
    """Of a mixture: whether its experts get an adapter as well, each of rank RANK (PEFT's `target_parameters`). Their
    weights are most of a mixture, and so are their adapters of the adapter. The router is never trained."""
    layers: AffectsResult[Maybe[Layers]] = None
    """Numbers of the decoder's layers that get an adapter, from 0, such as `0-15,20`; empty for all."""
    rank_pattern: AffectsResult[Pattern] = Field(default_factory=dict)
    """Other ranks for some modules, `name=8,name2=16` or JSON: PEFT's regular expressions, for the end of the name."""
    alpha_pattern: AffectsResult[Pattern] = Field(default_factory=dict)
    """The same for alpha."""
    modules_to_save: AffectsResult[Maybe[Names]] = None
    """Names of modules that are trained and published whole beside the adapter, such as `embed_tokens,lm_head`; empty
    for none. PEFT's own layers train them, which is slower. New tokens do not need it, see JOB_MODEL__ADD_TOKENS."""
    use_rslora: AffectsResult[Flag] = False
    """Rank-stabilized LoRA: the update is multiplied by alpha / sqrt(rank)."""
    use_dora: AffectsResult[Flag] = False
    """DoRA: the magnitude of each output's weights is trained, too. PEFT's own layers train it, which is slower."""
    init: AffectsResult[
        Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "eva", "loftq"]
    ] = "default"
    """First values of the adapter, by PEFT's names. `pissa` (with `niter`: by a fast approximation) and `olora` begin
    with a part of the base's weights; the base stays as it is, and the adapter is published with twice the rank. `eva`
    begins with the directions in which the layers' inputs vary most, on the first rows, all layers with the same rank;
    `loftq` with what the quantization to nf4 took away, for which the unquantized base must fit into main memory."""
    seed: AffectsResult[Maybe[Whole]] = None
    """Seed of the first values; empty: JOB_RUN__SEED."""
    kind: AffectsResult[Literal["lora", "adalora"]] = "lora"
    """`adalora` moves ranks to where they matter, down to JOB_LORA__RANK on average; PEFT's own layers train it."""
    init_rank: AffectsResult[Maybe[Count]] = None
    """AdaLoRA's rank at the beginning; empty: one and a half times JOB_LORA__RANK."""
    tinit: AffectsResult[Whole] = 0
    """AdaLoRA's first optimizer steps, in which no rank is taken away."""
    tfinal: AffectsResult[Whole] = 0
    """AdaLoRA's last optimizer steps, in which no rank is taken away any more."""
    delta_t: AffectsResult[Count] = 1
    """AdaLoRA removes ranks once in this number of optimizer steps."""
    orth_reg_weight: AffectsResult[NotNegative] = 0.5
    """Weight of AdaLoRA's penalty on matrices that are not orthogonal; the loss in the metrics is without it."""


def _record_all() -> Mapping[str, Action]:
    return {ALL: "record"}


class Data(Group):
    """The training data."""

    source: AffectsResult[Annotated[DataSources, SageMakerChannel("training")]] = "tatsu-lab/alpaca"
    """Hub id, URI (`s3://`, `gs://`, `az://`) or path of a file, a folder or a glob of shards (`rows/*.jsonl`). Several
    have commas between them, and behind each how much of it is used: `a.jsonl=2x,b.jsonl=0.5x,org/name@commit=1000rows`
    uses each row of the first twice, every second one of the second, and the first 1,000 valid ones of the third.
    """
    fields: AffectsResult[FieldNames] = Field(default_factory=dict)
    """The rows' own names of fields: `prompt=question,completion=answers.0.text` or JSON. Dots separate nested keys."""
    revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.source")]] = None
    """Commit hash, tag or branch; a hub id needs one. The manifest records the commit, and a restart keeps to it."""
    sft_source: AffectsResult[Maybe[DataSources]] = None
    """Training data of the first stage of JOB_TRAIN__METHOD=sft,dpo, written as JOB_DATA__SOURCE, which has that of the
    second. The settings JOB_DATA__SFT_... are about this data, and those without SFT about the second stage's; what
    has no SFT setting, such as JOB_DATA__ON_BAD_ROW, holds for both."""
    sft_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.sft_source")]] = None
    """Commit hash, where JOB_DATA__SFT_SOURCE is a hub id."""
    sft_split: AffectsResult[Maybe[Text]] = None
    """Split of JOB_DATA__SFT_SOURCE; empty: JOB_DATA__SPLIT."""
    sft_limit: AffectsResult[Maybe[Count]] = None
    """Number of examples of JOB_DATA__SFT_SOURCE, the first valid rows; empty: all."""
    sft_format: AffectsResult[Literal["auto", "alpaca", "prompt_completion", "messages", "text"]] = "auto"
    """Schema of the rows of JOB_DATA__SFT_SOURCE."""
    sft_fields: AffectsResult[FieldNames] = Field(default_factory=dict)
    """The own names of the fields of JOB_DATA__SFT_SOURCE's rows, as in JOB_DATA__FIELDS."""
    sft_on_long_row: AffectsResult[Maybe[Literal["error", "skip", "truncate", "split"]]] = None
    """What to do with rows of JOB_DATA__SFT_SOURCE that are too long; empty: JOB_DATA__ON_LONG_ROW."""
    sft_validation: AffectsResult[Maybe[HeldOut]] = None
    """Rows for the validation loss of the first stage, as in JOB_DATA__VALIDATION; empty: that share or number, or none
    where that is a source, which holds rows of preferences."""
    sft_validation_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.sft_validation")]] = None
    """Commit hash of JOB_DATA__SFT_VALIDATION, for a hub id."""
    sft_validation_split: AffectsResult[Maybe[Text]] = None
    """Split of JOB_DATA__SFT_VALIDATION; empty: JOB_DATA__VALIDATION_SPLIT."""
    split: AffectsResult[Text] = "train"
    """Split of a hub data set."""
    limit: AffectsResult[Maybe[Count]] = None
    """Number of examples to train on: the first valid rows of the file; empty: all."""
    format: AffectsResult[
        Literal["auto", "alpaca", "prompt_completion", "messages", "text", "preference", "unpaired_preference"]
    ] = "auto"
    """Schema of the rows; `auto`: the one that the first row fits."""
    on_bad_row: AffectsResult[Literal["error", "skip"]] = "error"
    """What to do with invalid rows: list them and end the job before training, or leave them out and count them."""
    on_long_row: AffectsResult[Literal["error", "skip", "truncate", "split"]] = "error"
    """What to do with rows of more than JOB_TRAIN__MAX_LENGTH tokens: treat them as invalid (JOB_DATA__ON_BAD_ROW),
    leave them out, cut off their end, or split them into several examples (plain text only). All are counted."""
    on_finding: AffectsResult[OnFinding] = Field(default_factory=_record_all)
    """What to do with rows in which the audit finds something: `record` the places in manifest and report, `skip` the
    rows as well (of duplicates all but the first), or `error`, which ends the job before training. For all kinds, or by
    kind: `secret=error,duplicate=skip`. Kinds: overlap (with a scored question), duplicate, near_duplicate, secret,
    email, phone, iban, card, and unsafe (with JOB_DATA__SAFETY_MODEL). JOB_DATA__LIMIT counts the rows before any is
    left out."""
    safety_model: AffectsResult[Maybe[Location]] = None
    """Classifier (hub id, URI or path of a sequence-classification model in safetensors) that scores how likely
    each training row, and each answer to JOB_EVAL__PROMPTS, is unsafe. Unsafe rows are findings of the kind `unsafe`;
    of answers they are counted. Empty for none."""
    safety_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.safety_model")]] = None
    """Commit hash of JOB_DATA__SAFETY_MODEL, for a hub id; empty: the newest commit. The SHA-256 of its files is
    recorded."""
    unsafe_labels: AffectsResult[Maybe[Names]] = None
    """Labels of JOB_DATA__SAFETY_MODEL that mean unsafe, separated by commas; empty: all of its labels but those
    such as `safe`, `neutral` or `non-toxic`. A model whose labels have no names, such as LABEL_0, needs this setting.
    """
    unsafe_threshold: AffectsResult[Annotated[Share, Field(gt=0)]] = 0.5
    """Least probability of the unsafe labels at which a text counts as unsafe."""
    validation: AffectsResult[Annotated[Maybe[HeldOut], SageMakerChannel("validation")]] = None
    """Rows for the validation loss: a share of the rows (0.05) or a number of them (200), held out of training, or a
    source of its own (hub id, URI or path) with rows of the same schema; empty for none. Near-duplicates of a
    row fall on the same side as the row; JOB_DATA__LIMIT counts the rows before any is held out.
    """
    validation_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.validation")]] = None
    """Commit hash of JOB_DATA__VALIDATION, for a hub id."""
    validation_split: AffectsResult[Text] = "validation"
    """Split of JOB_DATA__VALIDATION, where that is a hub id or a folder of splits."""
    row_weights: AffectsResult[Flag] = False
    """Rows have a field `weight`, a number from 0 on (1 where it is missing), by which the loss of their target tokens
    is multiplied; for sft. The loss of a step is divided by its target tokens, each counted as often as its row weighs:
    a row of weight 2 is the same row twice in the step, one of weight 0 is not learned.
    """
    seed: AffectsResult[Maybe[Whole]] = None
    """Seed of the order of the examples; empty: JOB_RUN__SEED."""
    date: AffectsResult[Maybe[Day]] = None
    """Today's date for chat templates that write it into the prompt, YYYY-MM-DD; empty: the day (UTC) on which the run
    began."""
    chat_template_arguments: AffectsResult[JsonObject] = Field(default_factory=dict)
    """Further variables of the chat template as a JSON object, such as `{"enable_thinking": false}`. A name that the
    template does not have is an error."""


class Train(Group):
    """Training."""

    method: AffectsResult[Methods] = "sft"
    """What is learned: `sft`, the examples as they are; `dpo` and `orpo`, to prefer one of two answers to the other;
    `kto`, to prefer answers labelled good to those labelled bad. `sft,dpo` does both, one after the other."""
    beta: AffectsResult[Positive] = 0.1
    """Strength of the preference: for dpo and kto, of the penalty for leaving the reference; for orpo, of the odds
    ratio in the loss."""
    preference_loss: AffectsResult[Literal["sigmoid", "ipo"]] = "sigmoid"
    """Loss of dpo on a pair."""
    label_smoothing: AffectsResult[Annotated[NotNegative, Field(lt=0.5)]] = 0.0
    """For sft: the share of each target token that is spread over the whole vocabulary, as transformers does it; the
    validation loss has it, too. For dpo with the sigmoid loss: the share of the pairs assumed to be labelled the wrong
    way round (conservative DPO)."""
    desirable_weight: AffectsResult[Positive] = 1.0
    """Weight of good answers in the loss of kto."""
    undesirable_weight: AffectsResult[Positive] = 1.0
    """Weight of bad answers in the loss of kto."""
    sft_epochs: AffectsResult[Passes] = 2
    """Passes over JOB_DATA__SFT_SOURCE in the first stage of `sft,dpo`; JOB_TRAIN__EPOCHS are those of the second."""
    sft_learning_rate: AffectsResult[NotNegative] = 2e-4
    """Peak learning rate in the first stage of `sft,dpo`."""
    epochs: AffectsResult[Passes] = 2
    """Number of passes over the training data; 0.5 is half of its optimizer steps."""
    max_steps: AffectsResult[Maybe[Count]] = None
    """Maximum number of optimizer steps; empty: as many as the epochs have."""
    learning_rate: AffectsResult[NotNegative] = 2e-4
    """Peak learning rate. With 0 nothing is trained, which shows what the evaluation measures without training."""
    scheduler: AffectsResult[SchedulerName] = "linear"
    """Schedule of the learning rate after the warmup."""
    warmup_steps: AffectsResult[Whole] = 5
    """Steps in which the learning rate rises to its peak."""
    warmup_ratio: AffectsResult[Maybe[Share]] = None
    """The same as a share of all steps, rounded up; if given, it takes the place of JOB_TRAIN__WARMUP_STEPS."""
    min_lr_ratio: AffectsResult[Share] = 0.0
    """Learning rate at the end, as a share of its peak; for the schedulers `cosine` and `warmup_stable_decay`."""
    decay_ratio: AffectsResult[Share] = 0.1
    """Share of all steps in which `warmup_stable_decay` lowers the learning rate, along a cosine, at the end."""
    weight_decay: AffectsResult[NotNegative] = 0.0
    """Weight decay (decoupled)."""
    max_grad_norm: AffectsResult[NotNegative] = 1.0
    """Norm to which the gradient of a step is clipped; 0: it is not clipped."""
    neftune_noise_alpha: AffectsResult[NotNegative] = 0.0
    """NEFTune: uniform noise on the embeddings in training, up to this over the square root of tokens times width;
    the paper has 5 to 15. 0: none."""
    global_batch_size: AffectsResult[Count] = 32
    """Examples in one optimizer step, over all GPUs."""
    micro_batch_tokens: ExecutionOnly[Maybe[Count]] = None
    """Maximum number of tokens in one forward pass; empty: as many as fit into the GPU's memory, 1,024 on a CPU. An
    optimizer step has the same examples with any value."""
    max_length: AffectsResult[Count] = 2048
    """Maximum length of an example, in tokens; JOB_DATA__ON_LONG_ROW says what becomes of a longer one."""
    optimizer: AffectsResult[OptimizerName] = "adamw_8bit"
    """Optimizer of the adapter's weights. `muon` is for matrices alone: not with JOB_LORA__USE_DORA, nor with AdaLoRA;
    its steps have the size of AdamW's, so that learning rates found with that serve."""
    validate_every_steps: AffectsResult[Maybe[Count]] = None
    """Optimizer steps between two validations, beside those before the first step and after the last; empty: the steps
    of an epoch. Checkpoints have an interval of their own, which may change between attempts."""
    stop_after: AffectsResult[Maybe[Count]] = None
    """End training after so many validations in a row without a lower loss; empty: never. The schedule of the learning
    rate stays that of all steps."""
    keep: AffectsResult[Literal["last", "best"]] = "last"
    """Which adapter is evaluated and published: that of the last step, or of the step with the lowest validation loss.
    """
    loss_on: AffectsResult[Literal["all", "completion", "assistant", "last"]] = "all"
    """For sft, and for the first stage of `sft,dpo`: tokens that the loss counts, all or those of the completion (the
    answer) only. Of messages, `completion` and
    `assistant` are all turns of the assistant, `last` is the last one. `assistant` takes them from the template's
    `{% generation %}` marks, or from TRL's training template for it, where there is one; with `assistant` and `last` a
    turn that does not end with a special token is an invalid row."""
    compute: AffectsResult[Literal["dtype", "fp8"]] = "dtype"
    """Format of the products with the frozen weights in training: `dtype`, that of JOB_MODEL__DTYPE; `fp8`, e4m3 with
    one scale for each row, on GPUs from compute capability 8.9 on (Ada, Hopper). The adapter's own products, validation
    and both evaluations stay in JOB_MODEL__DTYPE."""
    gradient_checkpointing: ExecutionOnly[FlagOrAuto] = "auto"
    """Recompute activations in the backward pass instead of keeping them; `auto`: if they do not fit into memory. For
    rows of more than 16,384 tokens the fused layers always recompute them."""
    offload_activations: ExecutionOnly[FlagOrAuto] = "auto"
    """For rows of more than 16,384 tokens, keep activations in pinned main memory until the backward pass, instead of
    on the GPU; `auto`: if they do not fit on the GPU. The results are the same, bit for bit."""
    sequence_parallel: ExecutionOnly[Annotated[Literal["auto", "off"], SameInAllProcesses()]] = "auto"
    """Rows of more than 16,384 tokens in a run of several GPUs. `auto`: one that does not fit on a GPU is computed by
    all of them together, each a part of its tokens (Ulysses' sequence parallelism), where the fused layers compute
    long rows; `off`: each row is computed by one GPU. Which rows are divided follows from the size of the GPU's memory
    and the machine's, and affects the result by rounding alone."""
    gpu_memory_gb: ExecutionOnly[Maybe[Positive]] = None
    """GPU memory that the job may use, in GB; empty: all. Less memory means fewer tokens in one forward pass."""
    log_every_steps: ExecutionOnly[Count] = 1
    """Optimizer steps between two lines of metrics in the log."""
    stall_seconds: ExecutionOnly[Seconds] = 1800
    """Seconds without progress after which the job ends as stalled, with exit code 74."""

    @property
    def last_method(self) -> MethodName:
        """The method of the last stage, whose adapter is published."""
        return last_of(self.method)

    @property
    def is_one_stage(self) -> bool:
        """Whether there is one method only."""
        return self.method == self.last_method

    @property
    def rows_loss_on(self) -> Literal["all", "completion", "assistant", "last"]:
        """`loss_on` for the rows of the last stage: preferences are about completions whatever it says."""
        return self.loss_on if self.last_method == SFT else "all"


class Checkpoint(Group):
    """Checkpoints."""

    every_steps: ExecutionOnly[Count] = 20
    """Optimizer steps between two checkpoints."""
    keep: ExecutionOnly[Count] = 2
    """Number of checkpoints to keep; older ones are deleted."""
    settle_seconds: ExecutionOnly[NotNegative] = 0.0
    """Seconds that a checkpoint must be old before older ones are deleted, for platforms that copy the folder with a
    delay. Default on SageMaker: 300."""


class Eval(Group):
    """Evaluation, before and after training."""

    tasks: AffectsResult[Names] = ("arc_easy",)
    """Names of lm-eval's tasks and groups, separated by commas, such as `arc_easy,gsm8k`; or a file `my_task.yaml` that
    describes one, or a group, in lm-eval's format, with its data beside it. Multiple choice, generated answers and
    perplexity. `forgetting` measures the likelihood of ordinary texts, which training on other rows may lower."""
    limit: AffectsResult[Maybe[Annotated[Count, Field(ge=2)]]] = None
    """Number of questions of each task, at least 2; empty: all."""
    data: AffectsResult[Annotated[Locations, SageMakerChannel("evaluation")]] = Field(default_factory=dict)
    """Files with the questions of a task, instead of the hub: `task=path,task2=s3://...` or JSON. A row has the fields
    that the task's own data set has. `task:examples=path` beside it gives the examples for the task's prompts."""
    num_fewshot: AffectsResult[Maybe[Annotated[Whole, Field(le=100)]]] = None
    """Examples in the prompt of every question; empty: as many as each task says. They are drawn from the task's own
    examples, or those of JOB_EVAL__DATA, with lm-eval's default seed."""
    long_questions: AffectsResult[Literal["error", "cut"]] = "error"
    """What to do with a question of more than JOB_TRAIN__MAX_LENGTH tokens: end the job with an error, or cut off its
    beginning, as lm-eval does."""
    full_precision: AffectsResult[Literal["auto", "off"]] = "auto"
    """Whether a base that is quantized for training is first scored with its original weights, in 16 bits (fp32 on a
    CPU), so that the results show what quantization cost. `auto`: if memory allows it beside the quantized base."""
    precision: AffectsResult[Literal["auto", "model"]] = "auto"
    """Precision in which questions are scored if the model computes in bf16. `auto`: on a GPU, products in fp16 and
    sums in fp32, which is several times closer to fp32, if the fused layers compute the model and no number of it is
    too large for fp16; else as `model`. `model`: the dtype of training, in which answers are always generated."""
    batch_tokens: ExecutionOnly[Count] = 8192
    """Maximum number of tokens scored in one forward pass."""
    prompts: AffectsResult[Maybe[Prompts]] = None
    """Prompts that base and adapter answer, for the report: a file (path or URI) with rows of the schemas of
    JOB_DATA__FORMAT or, as .txt, a prompt on each line; or a number N, for the first N rows that
    JOB_DATA__VALIDATION holds out. Empty: none."""
    prompts_max_new_tokens: AffectsResult[Count] = 128
    """Tokens at which an answer to JOB_EVAL__PROMPTS is cut off."""
    principles: AffectsResult[Maybe[LocalPath]] = None
    """File with written rules, a YAML list or one on each line: a judge compares the answers of base and adapter to
    each of JOB_EVAL__PROMPTS by them, in both orders. Empty: nothing is judged."""
    judge: AffectsResult[Maybe[LocationOrServer]] = None
    """The judge: hub id, URI or path of a causal language model, or the address of a server with OpenAI's API,
    `https://host:port`. A local model gives the same judgements each time; it computes where training does."""
    judge_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("eval.judge")]] = None
    """Commit hash of JOB_EVAL__JUDGE, for a hub id; empty: the newest commit."""
    judge_model: AffectsResult[Maybe[Text]] = None
    """Name of the model on the server of JOB_EVAL__JUDGE."""
    judge_key: ExecutionOnly[Maybe[Secret]] = None
    """Key for the server of JOB_EVAL__JUDGE; as a file of this name in the folder JOB_SECRETS_DIR, best."""


class Export(Group):
    """Export: the model in other formats than the adapter, each scored on the questions of the run."""

    formats: AffectsResult[ExportFormats] = ()
    """Formats to publish beside the adapter, separated by commas; empty for none. `adapter:bf16` or `adapter:fp16`: the
    adapter again, with its numbers in 16 bits. `merged`: the whole model with the adapter added to its weights, in
    safetensors, in 16 bits where the base or the computation is. All others are made from that one, with linear layers
    quantized: `fp8` and `w4a16` are what vLLM reads (compressed-tensors), `gptq` and `awq` are 4-bit integers in the
    layouts of these names. `gguf:TYPE`, such as `gguf:q4_k_m`, is one file for llama.cpp, which also scores it, on the
    processor."""
    merge_onto: AffectsResult[Literal["best", "dequantized", "original"]] = "best"
    """Weights that the adapter is added to: the base's `original` ones, or the `dequantized` ones, on which it was
    trained; `best`: both are made and scored, and the one with the higher accuracy is published."""
    calibration_rows: AffectsResult[Count] = 512
    """Rows of the training data, the first of the batch plan, with which the 4-bit formats are quantized."""
    quantization_steps: AffectsResult[Whole] = 200
    """Steps in which the rounding of each decoder layer is optimized for the 4-bit formats; 0 rounds to the nearest."""
    hub: ExecutionOnly[Maybe[HubRepository]] = None
    """Repository of the Hugging Face hub, `namespace/name`: adapter, card and exported formats are pushed to it in one
    commit when the run is complete and its gate is met. It is made if it is not there. Needs HF_TOKEN."""
    hub_revision: ExecutionOnly[Maybe[BranchName]] = None
    """Branch of JOB_EXPORT__HUB to push to; empty: main."""
    hub_private: ExecutionOnly[Flag] = True
    """A repository that is made is private, and one that is public is refused; false allows both."""
    oci: ExecutionOnly[Maybe[ImageReference]] = None
    """Image in a registry, `registry/repository:tag`: adapter, card and exported formats are pushed to it when the run
    is complete and its gate is met; Kubernetes mounts it as a volume. Credentials: Docker's config.json."""
    oci_plain_http: ExecutionOnly[Flag] = False
    """Speak to the registry of JOB_EXPORT__OCI without TLS; on this machine (localhost) that is so anyway."""


class Gate(Group):
    """Quality gate: results are published, then the job ends with exit code 3 if one of these is not met."""

    on: ExecutionOnly[Judged] = "adapter"
    """What the gate judges: the adapter, or the exported format that ships instead (see JOB_EXPORT__FORMATS)."""
    metric: ExecutionOnly[Text] = "acc"
    """What the thresholds are about. `acc` and `acc_norm`: accuracy of choices, by log-likelihood, or by log-likelihood
    divided by the length of the choice. Else a metric of tasks without choices, such as `exact_match` or
    `bits_per_byte`; all tasks that have it are judged."""
    min_delta: ExecutionOnly[Maybe[Annotated[Real, Field(ge=-1, le=1)]]] = None
    """Smallest accepted gain over the base model; of accuracies a fraction: 0.01 is one percentage point. A gain is an
    improvement, also where a lower figure is better; of perplexities it is one of the logarithm."""
    max_regression: ExecutionOnly[Maybe[Annotated[Real, Field(ge=0, le=1)]]] = None
    """Largest accepted loss against the base model, in the same unit."""
    policy: ExecutionOnly[Maybe[LocalPath]] = None
    """A YAML file with rules for several tasks or groups and one verdict, instead of a threshold: critical, supporting
    and guarded tasks, each with its metric, least gain and largest loss."""
    baseline: ExecutionOnly[Maybe[Location]] = None
    """An earlier run, path or URI: the gate compares with its adapter instead of with the base model."""

    @property
    def only_choices(self) -> str:
        """Why the gate can judge nothing but multiple-choice tasks; empty if it can judge all."""
        if self.on != "adapter":
            return f"JOB_GATE__ON is {self.on}, and exported formats are scored on multiple-choice tasks only"
        return "JOB_GATE__BASELINE compares multiple-choice tasks only" if self.baseline is not None else ""


class Sign(Group):
    """Signature of what is published, which `verify --key` checks."""

    key: ExecutionOnly[Maybe[LocalPath]] = None
    """File with the private key (ECDSA on P-256, P-384 or P-521, in PEM) that signs manifest, adapter and exported
    formats, in the format of OpenSSF Model Signing; empty: nothing is signed."""
    password: ExecutionOnly[Maybe[Secret]] = None
    """Password of JOB_SIGN__KEY where it is encrypted; as a file of this name in the folder JOB_SECRETS_DIR, best."""


class Storage(Group):
    """Object storage. Credentials are no settings: the cloud's own variables or the machine's identity have them."""

    endpoint_url: ExecutionOnly[Maybe[Endpoint]] = None
    """Address of an S3-compatible store, `https://host:port`; empty for AWS. For `gs://` and `az://` set the clouds'
    own GOOGLE_BASE_URL and AZURE_STORAGE_ENDPOINT."""
    region: ExecutionOnly[Maybe[Text]] = None
    """Region of the bucket of `s3://`."""
    kms_key_id: ExecutionOnly[Maybe[Text]] = None
    """KMS key for the encryption of new objects of `s3://` (SSE-KMS); other stores refuse to write with one."""
    storage_class: ExecutionOnly[Maybe[StorageClass]] = None
    """Storage class of new objects, in the cloud's own words; for `az://` the access tier."""
    request_payer: ExecutionOnly[Flag] = False
    """Pay for requests to a requester-pays bucket of `s3://`."""
    timeout_seconds: ExecutionOnly[Seconds] = 60
    """Seconds that one request may take."""
    retries: ExecutionOnly[Annotated[Count, Field(le=100)]] = 8
    """Number of tries of one request, the first included. The pauses between them grow from 0.3 to 16 s; with 8 tries
    they outlast an outage of 60 s, and each more adds 16 s. A name that does not resolve and denied access fail at
    once. `status`, `compare` and `report` try 4 times at most, `plan` twice."""
    cache: ExecutionOnly[Maybe[LocalPath]] = None
    """Local folder that keeps downloads and the quantized model; empty: a temporary one."""


class Log(Group):
    """Logging."""

    format: ExecutionOnly[Literal["auto", "json", "console"]] = "auto"
    """JSON lines, or lines for people; `auto`: for people at a terminal, else JSON."""
    level: ExecutionOnly[Literal["debug", "info", "warning", "error"]] = "info"
    """Lowest level that is shown."""
    trackers: ExecutionOnly[Literal["auto", "off"]] = "auto"
    """Metrics to Weights & Biases and MLflow; `auto`: to each whose variables are set, such as MLFLOW_TRACKING_URI."""


class Metrics(Group):
    """Figures for monitoring, while the run goes on; OpenTelemetry's own variables (OTEL_...) ask for OTLP."""

    port: ExecutionOnly[Maybe[Annotated[Count, Field(le=65535)]]] = None
    """Port of a Prometheus endpoint with step, loss, speed, time left and stage; empty: none."""
    pod_annotation: ExecutionOnly[Flag] = False
    """On Kubernetes, keep the progress of the run in an annotation of the pod (`qlora-job/progress`). It needs the
    permission and the token that infra/kubernetes/components/progress gives."""


class Notify(Group):
    """Events of the run to other systems."""

    webhook: ExecutionOnly[Maybe[SecretAddress]] = None
    """https:// address that gets a CloudEvent when an attempt starts, is preempted, fails or completes the run. The
    last one is sent when the results are published, with `gate_passed`; pushes to other places come later. The address
    is a secret, best given as a file of this name in the folder JOB_SECRETS_DIR."""


class Cost(Group):
    """Price of the machines; without one the manifest has seconds only."""

    usd_per_hour: ExecutionOnly[Maybe[NotNegative]] = None
    """Price of all machines of the run together, in USD per hour. Each attempt is charged at the price set for it."""
    on_demand_usd_per_hour: ExecutionOnly[Maybe[NotNegative]] = None
    """On-demand price of the same machines, in USD per hour; the manifest states what was saved against it."""


class Options(Group, BaseSettings):
    """How pydantic-settings reads variables and prints `--help`."""

    model_config = SettingsConfigDict(
        env_prefix="JOB_",
        env_nested_delimiter="__",
        env_nested_max_split=1,
        enable_decoding=False,  # the fields' types parse text
        validate_default=False,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_show_env_vars=True,
        cli_use_class_docs_for_groups=True,
    )


class Settings(Options):
    """All settings of one run."""

    preset: ExecutionOnly[Literal["mistral-7b-alpaca", "demo", "demo-dpo"]] = "mistral-7b-alpaca"
    """Named set of values to start from; what is set anywhere else replaces them."""
    fault: ExecutionOnly[Maybe[Text]] = None
    """Failure to inject, such as `kill@step=12`, for tests only; job/runs/fault_injection.py lists all."""
    run: Run = Field(default_factory=Run)
    model: Annotated[Model, BelongsTo("model.id")] = Field(default_factory=Model)
    lora: Lora = Field(default_factory=Lora)
    data: Annotated[Data, BelongsTo("data.source")] = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Eval = Field(default_factory=Eval)
    export: Export = Field(default_factory=Export)
    gate: Gate = Field(default_factory=Gate)
    sign: Sign = Field(default_factory=Sign)
    storage: Annotated[Storage, UsedByReaders()] = Field(default_factory=Storage)
    log: Annotated[Log, UsedByReaders()] = Field(default_factory=Log)
    metrics: Metrics = Field(default_factory=Metrics)
    notify: Notify = Field(default_factory=Notify)
    cost: Cost = Field(default_factory=Cost)

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _part_of: str | None = PrivateAttr(default=None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings' signature
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings' signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings' signature
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Precedence: of two sources that give a setting, the one that is named first here wins.

        Called without a `Request` among its arguments, `Settings` takes only these arguments.
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
        """Records where the values came from; a setting that is not in `given` has its default."""
        self._sources = dict.fromkeys(NAMES, "default") | dict(given)

    def keep_whole(self, run: str) -> None:
        """Records that these are the settings of the first stage of a run of this id."""
        self._part_of = run

    def model_post_init(self, _context: Any, /) -> None:
        """Until `keep_sources` says otherwise, every value is a default."""
        self.keep_sources({})

    @property
    def part_of(self) -> str | None:
        """The id of the run that these are the first stage of; None for a whole run."""
        return self._part_of

    @property
    def need_choices(self) -> list[str]:
        """The settings, as the environment has them, that are about the accuracy of multiple-choice questions."""
        gate = self.gate.min_delta is not None or self.gate.max_regression is not None
        gate = gate and self.gate.metric in {"acc", "acc_norm"}
        return ["JOB_EXPORT__FORMATS"] * bool(self.export.formats) + ["JOB_GATE"] * gate

    @property
    def sources(self) -> Mapping[str, str]:
        """Dotted name of each setting -> where its value came from."""
        return self._sources


NAMES = setting_names(Settings)
"""The dotted names of all settings."""
READING = frozenset(find_markers(Settings, UsedByReaders))
"""Those that count where published runs are read."""
