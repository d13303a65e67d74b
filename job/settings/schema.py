"""All settings: name, type, default and documentation of each. Every default is defined here.

How to add a setting:

1. Add a field with its default to a group, and below it the docstring that documents it. Its type is one of
   `field_types`, wrapped in a marker that says whether the setting changes the result of a run:

       warmup_steps: AffectsResult[Whole] = 5

   `AffectsResult[...]`: the setting affects the result, so an attempt that resumes a run must have the same value.
   `ExecutionOnly[...]`: it affects only how the run is carried out. Other markers are in `markers`.
2. If another setting excludes it, add the check to `combinations`.
3. Use it: a stage receives the group, `settings.train.warmup_steps`.
4. Test its effect in the tests of the package that uses it, and add invalid values to `BAD_VALUES` in
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
    GateFormat,
    HeldOut,
    HostPort,
    HubRepository,
    ImageReference,
    JsonObject,
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
    RunToExport,
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
    """Name of the run and of its folder; if the job is started again with the same id, it resumes the run. Default: the
    platform's name for the job, else the time and random digits."""
    output: ExecutionOnly[Location] = "runs"
    """Where runs are stored: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` or a path. The files
    of this run are in `<output>/<run id>/`.

    Default on SageMaker: `/opt/ml/checkpoints`, the folder that SageMaker copies to S3.
    """
    seed: AffectsResult[Whole] = 0
    """Seed of every random choice."""
    grace_seconds: ExecutionOnly[Seconds] = 30
    """Seconds between SIGTERM and SIGKILL on this platform, in which the job saves a last checkpoint. If a process
    still waits, for example for a store, half a second before the end, it ends with exit code 75."""
    max_idle_attempts: ExecutionOnly[Count] = 5
    """Maximum number of consecutive attempts that are stopped, stall or are killed before they make progress. Progress
    is to get further than all attempts before: into a later stage than pull, to a later optimizer step, or to more
    scored questions (an export: or copied files). The last of them, if it is stopped, ends with exit code 71 instead of
    75, because a platform retries 75 without limit. The next start goes on where the run is. 1000000 is as good as no
    limit."""
    spot_notices: ExecutionOnly[Literal["auto", "off", "ec2", "gcp", "azure"]] = "auto"
    """Cloud whose metadata service is polled for preemption notices; `auto`: the cloud whose service answers."""
    processes: ExecutionOnly[CountOrAuto] = "auto"
    """Number of processes on this machine; `auto`: one for each visible GPU, or one on a CPU."""
    nodes: ExecutionOnly[Count] = 1
    """Number of machines of the run, each started with the same settings. Default: the platform's number, else 1."""
    node_rank: ExecutionOnly[Whole] = 0
    """Rank of this machine, counted from 0. Default: the pod's index in its Indexed Job, or SageMaker's host index."""
    rendezvous: ExecutionOnly[Maybe[HostPort]] = None
    """Address at which machine 0 listens for the others, `host:port`. Default on SageMaker: the first host."""
    device: ExecutionOnly[Annotated[Literal["auto", "gpu", "cpu"], BelongsTo("model.id")]] = "auto"
    """Device to train on; `auto`: the GPU, or the CPU if there is no GPU; `gpu`: a missing GPU is an error."""
    image_digest: ExecutionOnly[Maybe[Digest]] = None
    """Digest of the container image, `sha256:...`, recorded in the manifest; a process cannot determine it itself."""


class Model(Group):
    """The base model."""

    id: AffectsResult[Annotated[Location, SageMakerChannel("model")]] = "mistralai/Mistral-7B-v0.1"
    """Hub id, URI (`s3://`, `gs://`, `az://`) or path."""
    revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("model.id")]] = None
    """Commit hash, tag or branch, for a hub id; empty: the newest commit. The manifest records the commit, and a
    restart uses the same one."""
    name: AffectsResult[Maybe[PublicName]] = None
    """Public name of the base model, such as its hub id, written into the adapter's files if JOB_MODEL__ID is a path or
    URI. Default: the hub id, else the last part of JOB_MODEL__ID. Nothing is downloaded by this name.
    """
    pretraining_tokens: ExecutionOnly[Maybe[Annotated[Real, Field(gt=0, le=1e16)]]] = None
    """Number of tokens that the base was pre-trained on, such as 2e12. The report then gives the compute of training as
    a share of the compute of pre-training. Empty: the published number, if the base is in the job's table of public
    bases."""
    quantization: AffectsResult[Literal["nf4", "none"]] = "nf4"
    """How the frozen weights are stored: as 4-bit NormalFloat, or unquantized."""
    double_quantization: AffectsResult[Flag] = True
    """Quantize the quantization constants as well."""
    dtype: AffectsResult[Literal["auto", "bf16", "fp16", "fp32"]] = "auto"
    """Data type of the computation; `auto`: bf16, or fp16 on a GPU without bf16."""
    add_tokens: AffectsResult[Maybe[Names]] = None
    """Tokens to add to the tokenizer, separated by commas or as a JSON list. Their rows of the embedding and of the
    output layer are trained and published with the adapter. Training then uses PEFT's layers, which are slower."""
    keep_quantized: ExecutionOnly[Literal["off", "cache", "store"]] = "cache"
    """Where the quantized model is kept for the next start. `cache`: in the folder JOB_STORAGE__CACHE, if it is set;
    `store`: also in JOB_RUN__OUTPUT, so that a restart on another machine downloads 4 GB instead of 14 (for a 7B
    model). """
    keep_dequantized: ExecutionOnly[FlagOrAuto] = "auto"
    """Dequantize the frozen weights once and keep them in memory, which is faster and gives the same results; `auto`:
    if they fit. With JOB_TRAIN__COMPUTE=fp8 the weights are kept in FP8."""
    placement: ExecutionOnly[Annotated[Literal["auto", "gpu", "sharded", "host"], SameInAllProcesses()]] = "auto"
    """Where the base's 4-bit weights are kept. `gpu`: all of them on the GPU of each process; `sharded`: an equal part
    on the GPU of each process; `host`: in main memory. With `sharded` and `host`, each decoder layer is fetched to the
    GPU while the previous layer computes. `auto`: the first of the three that fits. The results are the same, bit for
    bit."""


class Lora(Group):
    """The LoRA adapter."""

    rank: AffectsResult[Count] = 16
    """Rank r of the low-rank update."""
    alpha: AffectsResult[Count] = 16
    """Scale: the update is multiplied by alpha / rank."""
    dropout: AffectsResult[Annotated[NotNegative, Field(lt=1)]] = 0.0
    """Dropout on the adapter's input."""
    start: AffectsResult[Maybe[Location]] = None
    """Adapter to continue training, instead of a new one: hub id (`org/name` or `org/name@revision`), URI or path of a
    LoRA adapter in safetensors, with the same rank, alpha and layers. For dpo and kto it is also the reference."""
    target_modules: AffectsResult[Literal["auto", "all-linear", "attention", "mlp"] | Names] = "auto"
    """Names of the linear layers that get an adapter, such as `q_proj,v_proj`. `auto` or `all-linear`: all linear
    layers except the output head; in models like Llama and Mistral the seven projections of each decoder layer.
    `attention`, `mlp`: the linear layers within modules of this kind."""
    experts: AffectsResult[Flag] = False
    """For a mixture of experts: whether each expert gets an adapter as well, of rank JOB_LORA__RANK (PEFT's
    `target_parameters`). This makes the adapter several times as large. The router is never trained."""
    layers: AffectsResult[Maybe[Layers]] = None
    """Numbers of the decoder layers that get an adapter, counted from 0, such as `0-15,20`; empty: all."""
    rank_pattern: AffectsResult[Pattern] = Field(default_factory=dict)
    """Ranks of single modules, `name=8,name2=16` or JSON, instead of JOB_LORA__RANK. As in PEFT, a name is a regular
    expression that matches the end of the module's name."""
    alpha_pattern: AffectsResult[Pattern] = Field(default_factory=dict)
    """Alphas of single modules, written as in JOB_LORA__RANK_PATTERN."""
    modules_to_save: AffectsResult[Maybe[Names]] = None
    """Names of modules whose full weights are trained and published with the adapter, such as `embed_tokens,lm_head`;
    empty: none. Training then uses PEFT's layers, which are slower. For new tokens JOB_MODEL__ADD_TOKENS is enough."""
    use_rslora: AffectsResult[Flag] = False
    """Rank-stabilized LoRA: the update is multiplied by alpha / sqrt(rank)."""
    use_dora: AffectsResult[Flag] = False
    """DoRA: the magnitude of each output's weights is trained, too. Training uses PEFT's layers, which are slower."""
    init: AffectsResult[
        Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "eva", "loftq"]
    ] = "default"
    """Initialization of the adapter, by PEFT's names. `pissa` (with `niter`: by a fast approximation) and `olora` start
    from a part of the base's weights; the base is not changed, and the published adapter has twice the rank. `eva`
    starts from the principal components of the layers' inputs on the first rows, with the same rank in all layers;
    `loftq` from the error of the quantization to nf4, for which the unquantized base must fit into main memory."""
    seed: AffectsResult[Maybe[Whole]] = None
    """Seed of the adapter's initialization; empty: JOB_RUN__SEED."""
    kind: AffectsResult[Literal["lora", "adalora"]] = "lora"
    """`adalora` distributes ranks among the modules by importance, and reduces them to JOB_LORA__RANK on average. It
    trains with PEFT's layers, which are slower."""
    init_rank: AffectsResult[Maybe[Count]] = None
    """AdaLoRA's initial rank; empty: 1.5 times JOB_LORA__RANK."""
    tinit: AffectsResult[Whole] = 0
    """AdaLoRA: number of optimizer steps at the beginning in which ranks are not reduced."""
    tfinal: AffectsResult[Whole] = 0
    """AdaLoRA: number of optimizer steps at the end in which ranks are no longer reduced."""
    delta_t: AffectsResult[Count] = 1
    """AdaLoRA: optimizer steps between two reductions of ranks."""
    orth_reg_weight: AffectsResult[NotNegative] = 0.5
    """AdaLoRA: weight of the orthogonality penalty. The loss in the metrics does not include the penalty."""


def _record_all() -> Mapping[str, Action]:
    return {ALL: "record"}


class Data(Group):
    """The training data."""

    source: AffectsResult[Annotated[DataSources, SageMakerChannel("training")]] = "tatsu-lab/alpaca"
    """Hub id, URI (`s3://`, `gs://`, `az://`) or path of a file, a folder or a glob of shards (`rows/*.jsonl`). Several
    sources are separated by commas, each followed by how much of it is used:
    `a.jsonl=2x,b.jsonl=0.5x,org/name@commit=1000rows` uses each row of the first source twice, every second row of the
    second, and the first 1,000 valid rows of the third.
    """
    fields: AffectsResult[FieldNames] = Field(default_factory=dict)
    """Names of the schema's fields in these rows: `prompt=question,completion=answers.0.text`, or JSON. Dots separate
    nested keys."""
    revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.source")]] = None
    """Commit hash, tag or branch; required for a hub id. The manifest records the commit, and a restart uses the same
    one."""
    sft_source: AffectsResult[Maybe[DataSources]] = None
    """Training data of the first stage of JOB_TRAIN__METHOD=sft,dpo, written as JOB_DATA__SOURCE, which is the data of
    the second stage. Settings JOB_DATA__SFT_... apply to the first stage; the same settings without SFT apply to the
    second. Settings that have no SFT form, such as JOB_DATA__ON_BAD_ROW, apply to both."""
    sft_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.sft_source")]] = None
    """Commit hash of JOB_DATA__SFT_SOURCE, for a hub id."""
    sft_split: AffectsResult[Maybe[Text]] = None
    """Split of JOB_DATA__SFT_SOURCE; empty: JOB_DATA__SPLIT."""
    sft_limit: AffectsResult[Maybe[Count]] = None
    """Number of examples of JOB_DATA__SFT_SOURCE, the first valid rows; empty: all."""
    sft_format: AffectsResult[Literal["auto", "alpaca", "prompt_completion", "messages", "text"]] = "auto"
    """Schema of the rows of JOB_DATA__SFT_SOURCE."""
    sft_fields: AffectsResult[FieldNames] = Field(default_factory=dict)
    """Names of the schema's fields in the rows of JOB_DATA__SFT_SOURCE, as in JOB_DATA__FIELDS."""
    sft_on_long_row: AffectsResult[Maybe[Literal["error", "skip", "truncate", "split"]]] = None
    """What to do with rows of JOB_DATA__SFT_SOURCE that are too long; empty: JOB_DATA__ON_LONG_ROW."""
    sft_validation: AffectsResult[Maybe[HeldOut]] = None
    """Rows for the validation loss of the first stage, as in JOB_DATA__VALIDATION. Empty: the share or number that
    JOB_DATA__VALIDATION has; none if that is a source, because its rows are preferences."""
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
    """Schema of the rows; `auto`: the schema that the first row matches."""
    on_bad_row: AffectsResult[Literal["error", "skip"]] = "error"
    """What to do with invalid rows. `error`: list them and end the job before training; `skip`: leave them out and
    count them."""
    on_long_row: AffectsResult[Literal["error", "skip", "truncate", "split"]] = "error"
    """What to do with rows of more than JOB_TRAIN__MAX_LENGTH tokens. `error`: treat them as invalid (see
    JOB_DATA__ON_BAD_ROW); `skip`: leave them out; `truncate`: cut off their end; `split`: split them into several
    examples (plain text only). Their number is recorded in each case."""
    on_finding: AffectsResult[OnFinding] = Field(default_factory=_record_all)
    """What to do with rows in which the audit finds something. `record`: list the places in manifest and report;
    `skip`: also leave out the rows (of duplicates, all but the first); `error`: end the job before training. One value
    for all kinds, or one by kind: `secret=error,duplicate=skip`. Kinds: overlap (with a scored question), duplicate,
    near_duplicate, secret, email, phone, iban, card, and unsafe (with JOB_DATA__SAFETY_MODEL). JOB_DATA__LIMIT counts
    rows before any are left out."""
    safety_model: AffectsResult[Maybe[Location]] = None
    """Classifier (hub id, URI or path of a sequence-classification model in safetensors) that estimates the probability
    that a training row, or an answer to JOB_EVAL__PROMPTS, is unsafe. Unsafe rows are findings of the kind `unsafe`;
    unsafe answers are counted. Empty: none."""
    safety_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.safety_model")]] = None
    """Commit hash of JOB_DATA__SAFETY_MODEL, for a hub id; empty: the newest commit. The manifest records the SHA-256
    of the model's files."""
    unsafe_labels: AffectsResult[Maybe[Names]] = None
    """Labels of JOB_DATA__SAFETY_MODEL that mean unsafe, separated by commas; empty: all of its labels except names
    such as `safe`, `neutral` or `non-toxic`. Required for a model whose labels have no meaningful names, such as
    LABEL_0.
    """
    unsafe_threshold: AffectsResult[Annotated[Share, Field(gt=0)]] = 0.5
    """Probability of the unsafe labels from which a text counts as unsafe."""
    validation: AffectsResult[Annotated[Maybe[HeldOut], SageMakerChannel("validation")]] = None
    """Rows for the validation loss: a share (0.05) or a number (200) of the rows, held out of training, or a separate
    source (hub id, URI or path) with rows of the same schema; empty: none. A row and its near-duplicates are either all
    held out or all trained on. JOB_DATA__LIMIT counts rows before any are held out.
    """
    validation_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("data.validation")]] = None
    """Commit hash of JOB_DATA__VALIDATION, for a hub id."""
    validation_split: AffectsResult[Text] = "validation"
    """Split of JOB_DATA__VALIDATION, if that is a hub id or a folder of splits."""
    row_weights: AffectsResult[Flag] = False
    """Multiply the loss of a row's target tokens by its field `weight`, a number of at least 0 (1 if it is missing);
    for sft. The loss of a step is the weighted sum divided by the sum of the weights, both over target tokens: a row of
    weight 2 counts like the same row twice in the step, and a row of weight 0 is not learned. """
    seed: AffectsResult[Maybe[Whole]] = None
    """Seed of the order of the examples; empty: JOB_RUN__SEED."""
    date: AffectsResult[Maybe[Day]] = None
    """Date that chat templates write into the prompt as today's, YYYY-MM-DD; empty: the day (UTC) on which the run
    began."""
    chat_template_arguments: AffectsResult[JsonObject] = Field(default_factory=dict)
    """Further variables for the chat template as a JSON object, such as `{"enable_thinking": false}`. A name that the
    template does not use is an error."""


class Train(Group):
    """Training."""

    method: AffectsResult[Methods] = "sft"
    """Training method. `sft`: supervised fine-tuning; `dpo` and `orpo`: from pairs of a preferred and a rejected
    answer; `kto`: from single answers labelled good or bad; `sft,dpo`: sft, then dpo."""
    beta: AffectsResult[Positive] = 0.1
    """For dpo and kto: strength of the penalty for deviating from the reference; for orpo: weight of the odds ratio in
    the loss."""
    preference_loss: AffectsResult[Literal["sigmoid", "ipo"]] = "sigmoid"
    """Loss of dpo on a pair."""
    label_smoothing: AffectsResult[Annotated[NotNegative, Field(lt=0.5)]] = 0.0
    """For sft: the share of each target token's probability that is spread over the whole vocabulary, as in
    transformers; it applies to the validation loss, too. For dpo with the sigmoid loss: the assumed share of pairs
    whose labels are swapped (conservative DPO)."""
    desirable_weight: AffectsResult[Positive] = 1.0
    """Weight of good answers in the loss of kto."""
    undesirable_weight: AffectsResult[Positive] = 1.0
    """Weight of bad answers in the loss of kto."""
    sft_epochs: AffectsResult[Passes] = 2
    """Epochs of the first stage of `sft,dpo`, over JOB_DATA__SFT_SOURCE; JOB_TRAIN__EPOCHS is for the second stage."""
    sft_learning_rate: AffectsResult[NotNegative] = 2e-4
    """Peak learning rate in the first stage of `sft,dpo`."""
    epochs: AffectsResult[Passes] = 2
    """Number of passes over the training data; 0.5 is half of its optimizer steps."""
    max_steps: AffectsResult[Maybe[Count]] = None
    """Maximum number of optimizer steps; empty: the steps of all epochs."""
    learning_rate: AffectsResult[NotNegative] = 2e-4
    """Peak learning rate. With 0 the adapter does not change, which shows what the evaluation measures without
    training."""
    scheduler: AffectsResult[SchedulerName] = "linear"
    """Schedule of the learning rate after the warmup."""
    warmup_steps: AffectsResult[Whole] = 5
    """Number of optimizer steps in which the learning rate rises to its peak."""
    warmup_ratio: AffectsResult[Maybe[Share]] = None
    """Warmup as a share of all steps, rounded up; if set, it replaces JOB_TRAIN__WARMUP_STEPS."""
    min_lr_ratio: AffectsResult[Share] = 0.0
    """Final learning rate as a share of the peak; for the schedulers `cosine` and `warmup_stable_decay`."""
    decay_ratio: AffectsResult[Share] = 0.1
    """For `warmup_stable_decay`: share of all steps, at the end, in which the learning rate decays along a cosine."""
    weight_decay: AffectsResult[NotNegative] = 0.0
    """Weight decay (decoupled)."""
    max_grad_norm: AffectsResult[NotNegative] = 1.0
    """Norm to which the gradient of a step is clipped; 0: no clipping."""
    neftune_noise_alpha: AffectsResult[NotNegative] = 0.0
    """NEFTune: uniform noise of at most alpha / sqrt(tokens * hidden) is added to the embeddings in training; the paper
    uses 5 to 15. 0: none."""
    global_batch_size: AffectsResult[Count] = 32
    """Examples in one optimizer step, over all GPUs."""
    micro_batch_tokens: ExecutionOnly[Maybe[Count]] = None
    """Maximum number of tokens in one forward pass; empty: the largest number that fits into the GPU's memory, or 1,024
    on a CPU. It does not affect which examples an optimizer step has."""
    max_length: AffectsResult[Count] = 2048
    """Maximum length of an example, in tokens; see JOB_DATA__ON_LONG_ROW for longer ones."""
    optimizer: AffectsResult[OptimizerName] = "adamw_8bit"
    """Optimizer of the adapter's weights. `muon` updates matrices only, so it excludes JOB_LORA__USE_DORA and AdaLoRA;
    its updates are scaled to the size of AdamW's, so the same learning rates apply."""
    validate_every_steps: AffectsResult[Maybe[Count]] = None
    """Optimizer steps between two validations; empty: the steps of an epoch. There is also a validation before the
    first step and after the last. The interval of checkpoints is JOB_CHECKPOINT__EVERY_STEPS."""
    stop_after: AffectsResult[Maybe[Count]] = None
    """Number of consecutive validations without a lower loss after which training ends; empty: it does not end early.
    The learning-rate schedule is still that of all planned steps."""
    keep: AffectsResult[Literal["last", "best"]] = "last"
    """Which adapter is evaluated and published. `last`: that of the last step; `best`: that of the step with the lowest
    validation loss.
    """
    loss_on: AffectsResult[Literal["all", "completion", "assistant", "last"]] = "all"
    """Tokens that the loss counts, for sft and for the first stage of `sft,dpo`. `all`: all tokens; `completion`: those
    of the completion (the answer), in messages all turns of the assistant, in a `completion` of messages all of them;
    `assistant`: the assistant's turns, as marked by `{% generation %}` in the chat template, or by TRL's training
    template for it if there is one; `last`: the assistant's last turn. Of a `prompt` of messages no turn is counted but
    with `all`. With `assistant` and `last`, a row with a turn that does not end with a special token is invalid."""
    compute: AffectsResult[Literal["dtype", "fp8"]] = "dtype"
    """Format of the products with the frozen weights in training. `dtype`: JOB_MODEL__DTYPE; `fp8`: e4m3 with one scale
    for each row, on GPUs with compute capability 8.9 or higher (Ada, Hopper). The adapter's own products, validation
    and both evaluations are computed in JOB_MODEL__DTYPE."""
    gradient_checkpointing: ExecutionOnly[FlagOrAuto] = "auto"
    """Recompute activations in the backward pass instead of keeping them; `auto`: if they do not fit into memory. In
    rows of more than 16,384 tokens the fused layers always recompute them."""
    offload_activations: ExecutionOnly[FlagOrAuto] = "auto"
    """For rows of more than 16,384 tokens, keep activations in pinned main memory until the backward pass, instead of
    on the GPU; `auto`: if they do not fit on the GPU. The results are the same, bit for bit."""
    sequence_parallel: ExecutionOnly[Annotated[Literal["auto", "off"], SameInAllProcesses()]] = "auto"
    """Sequence parallelism (Ulysses) for rows of more than 16,384 tokens, in a run of several GPUs. `auto`: a row that
    does not fit on one GPU is divided among all of them, if the fused layers compute the model; `off`: each row is
    computed by one GPU. Which rows are divided depends on the memory of GPU and machine, and changes the result by
    rounding only."""
    gpu_memory_gb: ExecutionOnly[Maybe[Positive]] = None
    """GPU memory that the job may use, in GB; empty: all. Less memory means fewer tokens in one forward pass."""
    log_every_steps: ExecutionOnly[Count] = 1
    """Optimizer steps between two lines of metrics in the log."""
    stall_seconds: ExecutionOnly[Seconds] = 1800
    """Seconds without progress after which the job ends with exit code 74. Also how long processes wait for each other
    to connect (exit code 69), and for a process 0 that is stopped (74)."""

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
        """`loss_on` for the rows of the last stage; "all" if they are preferences, whose losses ignore it."""
        return self.loss_on if self.last_method == SFT else "all"


class Checkpoint(Group):
    """Checkpoints."""

    every_steps: ExecutionOnly[Count] = 20
    """Optimizer steps between two checkpoints."""
    keep: ExecutionOnly[Count] = 2
    """Number of checkpoints to keep; older ones are deleted."""
    settle_seconds: ExecutionOnly[NotNegative] = 0.0
    """Age in seconds that a checkpoint must reach before older ones are deleted, for platforms that copy the folder
    with a delay. Default on SageMaker: 300."""


class Eval(Group):
    """Evaluation, before and after training."""

    tasks: AffectsResult[Names] = ("arc_easy",)
    """Names of lm-eval's tasks and groups, separated by commas, such as `arc_easy,gsm8k`, or files such as
    `my_task.yaml` that describe a task or group in lm-eval's format, with their data in the same folder. Tasks may be
    multiple choice, generated answers or perplexity. `forgetting` measures the likelihood of ordinary texts, which
    training on other rows may lower."""
    limit: AffectsResult[Maybe[Annotated[Count, Field(ge=2)]]] = None
    """Number of questions of each task, at least 2; empty: all."""
    data: AffectsResult[Annotated[Locations, SageMakerChannel("evaluation")]] = Field(default_factory=dict)
    """Files with the questions of a task, instead of the hub: `task=path,task2=s3://...` or JSON. Rows have the fields
    of the task's own data set. `task:examples=path` gives the few-shot examples of the task."""
    num_fewshot: AffectsResult[Maybe[Annotated[Whole, Field(le=100)]]] = None
    """Number of few-shot examples in the prompt of each question; empty: the task's default. They are drawn from the
    task's own examples, or those of JOB_EVAL__DATA, with lm-eval's default seed."""
    long_questions: AffectsResult[Literal["error", "cut"]] = "error"
    """What to do with questions of more than JOB_TRAIN__MAX_LENGTH tokens. `error`: end the job; `cut`: cut off their
    beginning, as lm-eval does."""
    full_precision: AffectsResult[Literal["auto", "off"]] = "auto"
    """Whether a base that is quantized for training is also scored with its original weights, in 16 bits (fp32 on a
    CPU), so that the results show the cost of quantization. `auto`: if they fit into memory next to the quantized base.
    """
    precision: AffectsResult[Literal["auto", "model"]] = "auto"
    """Precision in which questions are scored if the model computes in bf16. `auto`: on a GPU, products in fp16 and
    sums in fp32, whose results are several times closer to fp32, if the fused layers compute the model and no value in
    it is too large for fp16; else as `model`. `model`: the dtype of training. Answers are always generated in the dtype
    of training."""
    batch_tokens: ExecutionOnly[Count] = 8192
    """Maximum number of tokens scored in one forward pass."""
    prompts: AffectsResult[Maybe[Prompts]] = None
    """Prompts that base and adapter answer, for the report: a file (path or URI) with rows in one of the schemas of
    JOB_DATA__FORMAT; a .txt file with a prompt on each line; or a number N, for the first N rows that
    JOB_DATA__VALIDATION holds out. Empty: none."""
    prompts_max_new_tokens: AffectsResult[Count] = 128
    """Maximum number of tokens of an answer to JOB_EVAL__PROMPTS."""
    principles: AffectsResult[Maybe[LocalPath]] = None
    """File of written rules, as a YAML list or one on each line. By these rules a judge compares the answers of base
    and adapter to each of JOB_EVAL__PROMPTS, in both orders. Empty: nothing is judged."""
    judge: AffectsResult[Maybe[LocationOrServer]] = None
    """The judge: hub id, URI or path of a causal language model, or the address of a server with OpenAI's API,
    `https://host:port`. A local model computes on the device of training, and its judgements are reproducible."""
    judge_revision: AffectsResult[Annotated[Maybe[Text], RevisionOf("eval.judge")]] = None
    """Commit hash of JOB_EVAL__JUDGE, for a hub id; empty: the newest commit."""
    judge_model: AffectsResult[Maybe[Text]] = None
    """Name of the model on the server of JOB_EVAL__JUDGE."""
    judge_key: ExecutionOnly[Maybe[Secret]] = None
    """Key for the server of JOB_EVAL__JUDGE; best given as a file of this name in the folder JOB_SECRETS_DIR."""


class Export(Group):
    """Export: the model in other formats than the adapter, each scored on the questions of the run."""

    run: ExecutionOnly[Maybe[Location]] = None
    """Path or URI of a finished run to export, or of a pointer to it: a new run beside it, with another JOB_RUN__ID,
    copies its evaluations and adapter, and makes JOB_EXPORT__FORMATS without training again. Settings that are not
    given are the finished run's, except those of exports and of the machine."""
    formats: AffectsResult[ExportFormats] = ()
    """Formats to publish besides the adapter, separated by commas; empty: none. `adapter:bf16`, `adapter:fp16`: the
    adapter again, in 16 bits. `merged`: the whole model with the adapter merged into its weights, in safetensors, in 16
    bits if the base or the computation is. The others quantize the linear layers of the merged model: `fp8` and `w4a16`
    in the format of compressed-tensors, which vLLM reads; `gptq` and `awq` to 4-bit integers in the layouts of these
    names; `gguf:TYPE`, such as `gguf:q4_k_m`, to one file for llama.cpp, which also scores it, on the CPU."""
    merge_onto: AffectsResult[Literal["best", "dequantized", "original"]] = "best"
    """Weights that the adapter is merged into: the base's `original` weights, or the `dequantized` ones on which it was
    trained; `best`: both models are built and scored, and the one with the higher accuracy is published."""
    calibration_rows: AffectsResult[Count] = 512
    """Number of training rows, from the beginning of the batch plan, on which the 4-bit formats are calibrated."""
    quantization_steps: AffectsResult[Whole] = 200
    """Steps in which the rounding of each decoder layer is optimized for the 4-bit formats; 0: round to nearest."""
    hub: ExecutionOnly[Maybe[HubRepository]] = None
    """Repository of the Hugging Face hub, `namespace/name`: adapter, model card and exported formats are pushed to it
    in one commit when the run is complete and its gate is met. A missing repository is created. Requires HF_TOKEN."""
    hub_revision: ExecutionOnly[Maybe[BranchName]] = None
    """Branch of JOB_EXPORT__HUB to push to; empty: main."""
    hub_private: ExecutionOnly[Flag] = True
    """Create a missing repository as private, and refuse to push to a public one; false: create it as public, and allow
    both."""
    oci: ExecutionOnly[Maybe[ImageReference]] = None
    """Image in a registry, `registry/repository:tag`: adapter, model card and exported formats are pushed to it when
    the run is complete and its gate is met. Kubernetes can mount it as a volume. Credentials: Docker's config.json."""
    oci_plain_http: ExecutionOnly[Flag] = False
    """Connect to the registry of JOB_EXPORT__OCI without TLS; to a registry on localhost this is always so."""


class Gate(Group):
    """Quality gate: if one of these is not met, the job ends with exit code 3 after the results are published."""

    on: ExecutionOnly[GateFormat] = "adapter"
    """What the gate judges: the adapter, or an exported format (see JOB_EXPORT__FORMATS)."""
    metric: ExecutionOnly[Text] = "acc"
    """Metric of the thresholds. `acc` and `acc_norm`: accuracy of choices, by log-likelihood, or by log-likelihood
    divided by the length of the choice. Or a metric of tasks without choices, such as `exact_match` or `bits_per_byte`.
    All tasks that have the metric are judged."""
    min_delta: ExecutionOnly[Maybe[Annotated[Real, Field(ge=-1, le=1)]]] = None
    """Smallest accepted gain over the base model. Accuracies are fractions: 0.01 is one percentage point. A positive
    gain is an improvement, also for metrics of which lower is better; perplexities are compared by their logarithms."""
    max_regression: ExecutionOnly[Maybe[Annotated[Real, Field(ge=0, le=1)]]] = None
    """Largest accepted loss against the base model, in the unit of JOB_GATE__MIN_DELTA."""
    policy: ExecutionOnly[Maybe[LocalPath]] = None
    """YAML file with rules for several tasks or groups and one verdict, instead of a threshold: critical, supporting
    and guarded tasks, each with its metric, smallest gain and largest loss."""
    baseline: ExecutionOnly[Maybe[Location]] = None
    """Path or URI of an earlier run; the gate compares with its adapter instead of the base model."""

    @property
    def only_choices(self) -> str:
        """Why the gate can judge multiple-choice tasks only; empty if it can judge all tasks."""
        if self.on != "adapter":
            return f"JOB_GATE__ON is {self.on}, and exported formats are scored on multiple-choice tasks only"
        return "JOB_GATE__BASELINE compares multiple-choice tasks only" if self.baseline is not None else ""


class Sign(Group):
    """Signature of what is published, which `verify --key` checks."""

    key: ExecutionOnly[Maybe[LocalPath]] = None
    """File with the private key (ECDSA on P-256, P-384 or P-521, in PEM) that signs manifest, adapter and exported
    formats, in the format of OpenSSF Model Signing; empty: nothing is signed."""
    password: ExecutionOnly[Maybe[Secret]] = None
    """Password of JOB_SIGN__KEY if it is encrypted; best given as a file of this name in the folder JOB_SECRETS_DIR."""


class Storage(Group):
    """Object storage. Credentials are not settings: they come from the cloud's variables or the machine's identity."""

    endpoint_url: ExecutionOnly[Maybe[Endpoint]] = None
    """Address of an S3-compatible store, `https://host:port`; empty for AWS. For `gs://` and `az://` set the clouds'
    own GOOGLE_BASE_URL and AZURE_STORAGE_ENDPOINT."""
    region: ExecutionOnly[Maybe[Text]] = None
    """Region of the bucket of `s3://`."""
    kms_key_id: ExecutionOnly[Maybe[Text]] = None
    """KMS key that encrypts new objects of `s3://` (SSE-KMS); with it, writing to other stores is an error."""
    storage_class: ExecutionOnly[Maybe[StorageClass]] = None
    """Storage class of new objects, by the cloud's name; for `az://` the access tier."""
    request_payer: ExecutionOnly[Flag] = False
    """Pay for requests to a requester-pays bucket of `s3://`."""
    timeout_seconds: ExecutionOnly[Seconds] = 60
    """Timeout of one request, in seconds."""
    retries: ExecutionOnly[Annotated[Count, Field(le=100)]] = 8
    """Maximum number of attempts at one request, including the first. The pauses between them grow from 0.3 to 16 s;
    with 8 attempts they outlast an outage of 60 s, and each more adds 16 s. A name that does not resolve and denied
    access fail at once. `status`, `compare` and `report` try 4 times at most, `plan` twice."""
    cache: ExecutionOnly[Maybe[LocalPath]] = None
    """Local folder that keeps downloads, the quantized model and tokenized data for the next start; empty: a temporary
    folder."""


class Log(Group):
    """Logging."""

    format: ExecutionOnly[Literal["auto", "json", "console"]] = "auto"
    """`json`: JSON lines; `console`: readable lines; `auto`: `console` at a terminal, else `json`."""
    level: ExecutionOnly[Literal["debug", "info", "warning", "error"]] = "info"
    """Lowest level that is logged."""
    trackers: ExecutionOnly[Literal["auto", "off"]] = "auto"
    """Send metrics to Weights & Biases and MLflow; `auto`: if their variables are set, such as MLFLOW_TRACKING_URI."""


class Metrics(Group):
    """Metrics for monitoring a run. OTLP export is configured by OpenTelemetry's own variables (OTEL_...)."""

    port: ExecutionOnly[Maybe[Annotated[Count, Field(le=65535)]]] = None
    """Port of a Prometheus endpoint with step, loss, speed, time left and stage; empty: none."""
    pod_annotation: ExecutionOnly[Flag] = False
    """On Kubernetes, write the progress of the run to an annotation of the pod (`qlora-job/progress`). This requires
    the permission and the token in infra/kubernetes/components/progress."""


class Notify(Group):
    """Notification of other systems."""

    webhook: ExecutionOnly[Maybe[SecretAddress]] = None
    """https:// address that gets a CloudEvent when an attempt starts, is preempted, fails or completes the run. The
    event of completion has `gate_passed`; it is sent when the results are published, before they are pushed to a hub or
    registry. The address is a secret, best given as a file of this name in the folder JOB_SECRETS_DIR."""


class Cost(Group):
    """Price of the machines; without it the manifest has times only, no cost."""

    usd_per_hour: ExecutionOnly[Maybe[NotNegative]] = None
    """Price of all machines of the run together, in USD per hour. Each attempt is charged at its own setting."""
    on_demand_usd_per_hour: ExecutionOnly[Maybe[NotNegative]] = None
    """On-demand price of the same machines, in USD per hour; the manifest states the savings against it."""


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
    """Named set of values to start from; a value from any other source replaces them."""
    fault: ExecutionOnly[Maybe[Text]] = None
    """Failure to inject, such as `kill@step=12`, for tests only; job/runs/fault_injection.py lists them."""
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
        """The sources in order of precedence: of two that have a setting, the first wins.

        `Settings(...)` without the argument `_request` takes its values from its arguments only.
        """
        arguments = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        request = arguments.pop("_request", None)
        if not isinstance(request, Request):
            return (init_settings,)
        return (
            CommandLine(settings_cls, request),
            Environment(settings_cls, request),
            SecretsFolder(settings_cls, request),
            Hyperparameters(settings_cls, request),
            ConfigFile(settings_cls, request),
            SageMakerChannels(settings_cls, request),
            RunToExport(settings_cls, request),
            Preset(settings_cls, request),
            PlatformDefaults(settings_cls, request),
        )

    def set_sources(self, sources: Mapping[str, str]) -> None:
        """Records where the values came from, by dotted name; a setting that is not in `sources` has its default."""
        self._sources = dict.fromkeys(NAMES, "default") | dict(sources)

    def set_part_of(self, run: str) -> None:
        """Records that these are the settings of the first stage of the run with this id."""
        self._part_of = run

    def model_post_init(self, _context: Any, /) -> None:
        """Until `set_sources` says otherwise, every value is a default."""
        self.set_sources({})

    @property
    def part_of(self) -> str | None:
        """The id of the run whose first stage has these settings; None for a whole run."""
        return self._part_of

    @property
    def need_choices(self) -> list[str]:
        """The settings in use, by their environment variables, that require multiple-choice questions."""
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
"""The dotted names of settings that also apply to commands that read published runs."""
