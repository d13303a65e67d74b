"""Checks for settings that contradict each other, or that this machine cannot satisfy.

To add a check: a function that yields a `Fault` for each setting to change, with a text that names the fix, and its
call in `impossible_values`. Values that are invalid on their own are refused by the types in `schema`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from job.common.export_formats import EXPORT_FORMATS, find_format, needs_merge
from job.common.findings import UNSAFE
from job.common.methods import FIRST_STAGE_SETTINGS, METHODS, MethodName, methods_for
from job.common.schedulers import SCHEDULERS
from job.common.source_list import is_single, parse_sources
from job.distributed.ranks import find_faults, find_place
from job.errors import Problem, environment_name
from job.platforms.detect import Platform
from job.platforms.sagemaker_copied_folder import copied_folder
from job.settings.field_types import is_server
from job.settings.markers import RevisionOf, find_markers
from job.settings.schema import Lora, Settings
from job.settings.sources import Request, same
from job.storage.location import is_remote
from job.storage.permissions import how_to_get_access, is_read_only

Fault = tuple[str, str]
"""(dotted name of a setting, why its value is impossible and the fix)."""
_REVISIONS = find_markers(Settings, RevisionOf)
_OWN_ADDRESS = {"gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
_FOR_ROOT = "SageMaker mounts its folders for root; use the image that infra/sagemaker/Dockerfile builds from this one"
_NOT_WITH: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("pissa", "pissa_niter_16", "olora"), ("use_rslora", "use_dora", "dropout")),
    "eva": ("rank_pattern",),  # all layers have one rank with it
    "loftq": ("use_dora",),
}
"""Value of JOB_LORA__INIT -> options of `lora` that it excludes."""
_ONLY_FOR: dict[str, tuple[MethodName, ...]] = {
    "train.beta": ("dpo", "kto", "orpo"),
    "train.preference_loss": ("dpo",),
    "train.label_smoothing": ("sft", "dpo"),
    "train.desirable_weight": ("kto",),
    "train.undesirable_weight": ("kto",),
    "train.neftune_noise_alpha": ("sft",),
    "data.row_weights": ("sft",),
    "train.loss_on": ("sft",),
}
"""Setting -> the methods with which it has an effect."""
_OF = {
    "export.hub_private": "export.hub",
    "export.oci_plain_http": "export.oci",
    "sign.password": "sign.key",
    "cost.on_demand_usd_per_hour": "cost.usd_per_hour",
}
"""Setting -> the one without which it has no effect."""
_FOR_ANY_STAGE = ("train.loss_on",)
"""Settings of `_ONLY_FOR` that have an effect in any training stage; the others have it in the last stage only."""


def impossible_values(settings: Settings, request: Request) -> Iterator[Fault]:
    """Yields every value that contradicts another setting, or that this machine cannot satisfy.

    Args:
        settings: All settings, each valid on its own.
        request: The values by source, and the environment.
    """
    yield from _processes(settings, request.environ)
    yield from _places(settings, request.platform)
    yield from _clouds(settings)
    yield from _revisions(settings, request)
    yield from _placement(settings, request.environ)
    yield from _tasks(settings)
    yield from _prompts(settings)
    yield from _safety(settings)
    yield from _judge(settings)
    yield from _validation(settings)
    yield from _gate(settings)
    yield from _export(settings)
    yield from _sources(settings)
    yield from _schedule(settings)
    yield from _adapter(settings)
    yield from _experts(settings)
    yield from _method(settings)
    yield from _compute(settings)
    yield from _without_subject(settings)


def _processes(settings: Settings, environ: Mapping[str, str]) -> Iterator[Fault]:
    run = settings.run
    if list(find_faults(environ)):  # the rank is unknown; `load_settings` reports the fault
        return
    place = find_place(environ)
    if place is None and run.nodes > 1:
        if run.rendezvous is None:
            yield (
                "run.rendezvous",
                "must be set if JOB_RUN__NODES is more than 1: host:port of machine 0, the same on all",
            )
        if run.node_rank >= run.nodes:
            yield "run.node_rank", f"must be less than JOB_RUN__NODES ({run.nodes}), since it counts from 0; change one"
    given_address = run.rendezvous is not None and settings.sources["run.rendezvous"] != "platform"
    if place is None and given_address and settings.sources["run.nodes"] == "default":
        what = "has no effect without JOB_RUN__NODES: each machine would run alone, and take over from the others"
        yield "run.rendezvous", f"{what}; set both, or remove it"
    several = run.nodes > 1 if place is None else place.world_size > 1
    if several and settings.sources["run.id"] == "generated":
        yield "run.id", "must be set: otherwise each machine or process would generate a different one"


def _places(settings: Settings, platform: Platform) -> Iterator[Fault]:
    output, cache = settings.run.output, settings.storage.cache
    platform_folder = copied_folder(platform.inputs) or platform.output
    if platform_folder and settings.run.nodes > 1 and Path(output).is_relative_to(platform_folder):
        yield "run.output", "is a folder of this machine only; for several machines set s3://bucket/prefix"
    fix = {"fix": _FOR_ROOT} if platform_folder and Path(output).is_relative_to(platform_folder) else {}
    if not is_remote(output) and (why := _why_not_writable(Path(output) / settings.run.id, **fix)):
        yield "run.output", why
    if cache and (why := _why_not_writable(Path(cache))):
        yield "storage.cache", why


def _clouds(settings: Settings) -> Iterator[Fault]:
    """Options of stores that the run does not write to, or does not use, where they would silently have no effect."""
    storage, output = settings.storage, settings.run.output
    if storage.kms_key_id and not output.startswith("s3://"):
        what = (
            f"encrypts objects of s3://, and JOB_RUN__OUTPUT is {'another store' if is_remote(output) else 'a folder'}"
        )
        yield "storage.kms_key_id", f"{what}, which would not be encrypted with it; remove it, or set an s3:// output"
    if storage.storage_class and not is_remote(output):
        yield "storage.storage_class", "is for objects of a bucket, and JOB_RUN__OUTPUT is a folder; remove it"
    schemes = set(re.findall(r"\b(s3|gs|az)(?=://)", settings.model_dump_json()))
    addresses = " and ".join(f"{_OWN_ADDRESS[scheme]} for {scheme}://" for scheme in sorted(schemes - {"s3"}))
    for name in ("endpoint_url", "request_payer"):
        if addresses and "s3" not in schemes and getattr(settings.storage, name):
            fix = f"; set {addresses} instead" if name == "endpoint_url" else "; remove it"
            yield f"storage.{name}", f"is only for s3://, which this run does not use{fix}"


def undeliverable(platform: Platform) -> Iterator[Problem]:
    """SageMaker's result folders that cannot be written, so that it is reported before training."""
    for folder in () if platform.delivery is None else (platform.delivery.model, platform.delivery.data):
        if why := _why_not_writable(folder, _FOR_ROOT):
            yield Problem(str(folder), why)


def _why_not_writable(path: Path, fix: str | None = None) -> str | None:
    """Why this folder cannot be created or written to; None if it can. Creates nothing."""
    for place in (path, *path.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                return f"cannot be a folder: {place} is a broken link; give another path"
            continue  # the nearest folder that exists decides
        except OSError as error:
            return f"cannot be written: {error.strerror}; give another path"
        if not place.is_dir():
            return f"cannot be a folder: {place} is a file; give another path"
        if not os.access(place, os.W_OK | os.X_OK):
            what = "cannot be written: {} is not writable for this user; {}"
            advice = how_to_get_access(place)
            return what.format(place, fix or (advice if is_read_only(place) else f"give another path, or {advice}"))
        return None
    return "cannot be written: no folder above it exists; give another path"


def _revisions(settings: Settings, request: Request) -> Iterator[Fault]:
    """Revisions that are set for a path or URI, or for another repository than the one that is used."""
    values = settings.model_dump(mode="json")
    for name, marker in _REVISIONS.items():
        (group, key), (subject_group, subject) = name.split("."), marker.subject.split(".")
        place = str(values[subject_group][subject])
        if not values[group][key]:
            continue
        if is_remote(place) or place.startswith(("/", ".")):
            what = f"is a commit of a hub repository, but {environment_name(marker.subject)} is a path or URI"
            yield name, f"{what}; remove it"
        elif why := _other_repository(name, marker.subject, request):
            yield name, why


def _other_repository(name: str, subject: str, request: Request) -> str | None:
    """Why a revision that the user set does not belong to the repository that is used; None if it may belong to it.

    It does not belong to it if the source that sets the revision, or else the next weaker source that the user wrote,
    names another repository than the strongest source. Dropping the revision would silently unpin the run; keeping it
    would look for it in the wrong repository.
    """
    layers = [layer.given for layer in request.layers if layer.by_user]
    first_set = next((index for index, values in enumerate(layers) if name in values), len(layers))
    written_for = next((values[subject] for values in layers[first_set:] if subject in values), None)
    used = request.strongest(subject)
    if written_for is None or used is None or same(used.value, written_for.value):
        return None
    return (
        f"is for the {environment_name(subject)} of {written_for.source}, but {used.source} names another; "
        f"set {environment_name(name)} there too, or set it to empty there for the newest revision"
    )


def _placement(settings: Settings, environ: Mapping[str, str]) -> Iterator[Fault]:
    model, where = settings.model, "model.placement"
    if model.placement in {"auto", "gpu"}:
        return
    if model.quantization == "none":
        yield where, f"is {model.placement}, which needs 4-bit weights, but JOB_MODEL__QUANTIZATION is none; use gpu"
    if model.keep_dequantized is True:
        yield where, f"is {model.placement}, but JOB_MODEL__KEEP_DEQUANTIZED keeps the base on the GPU; remove one"
    if list(find_faults(environ)):
        return
    place, run = find_place(environ), settings.run
    # With `auto` the number is not known before the GPUs have been counted (0 here); the launcher checks it then.
    processes = (1 if run.processes == 1 and run.nodes == 1 else 0) if place is None else place.world_size
    if processes == 1 and (problem := sharded_alone(settings, processes)) is not None:
        yield where, problem.what


def sharded_alone(settings: Settings, processes: int) -> Problem | None:
    """The problem of a base sharded over a single process; None if it is not.

    Args:
        settings: The run's settings.
        processes: Number of processes on all machines of the run.
    """
    if settings.model.placement != "sharded" or processes > 1:
        return None
    what = "is sharded, but the run has one process; start several, each with its GPU (JOB_RUN__PROCESSES=auto starts"
    return Problem("JOB_MODEL__PLACEMENT", f"{what} one for each visible GPU), or use gpu or host")


def _tasks(settings: Settings) -> Iterator[Fault]:
    source, tasks = settings.sources["eval.data"], settings.eval.tasks
    unknown = {name for name in settings.eval.data if not name.startswith(tuple(tasks))}
    # Only of the default task it is known here that it is no group. `check_tasks` knows the tasks of groups and files.
    if unknown and tasks == type(settings.eval)().tasks:
        hint = " (a channel's files are named after their tasks)" * source.startswith("sagemaker channel")
        what = f"has a file for a task that is not in JOB_EVAL__TASKS{hint}; add the task there, or remove the file"
        yield "eval.data", what


def _prompts(settings: Settings) -> Iterator[Fault]:
    prompts, most = settings.eval.prompts, settings.eval.prompts_max_new_tokens
    if prompts is None:
        if not settings.sources["eval.prompts_max_new_tokens"].startswith(("default", "preset")):
            yield "eval.prompts_max_new_tokens", "has no effect without JOB_EVAL__PROMPTS; set both, or remove it"
        return
    if isinstance(prompts, int) and settings.data.validation is None:
        yield "eval.prompts", "is a number of validation rows; set JOB_DATA__VALIDATION, too, or name a file of prompts"
    if most >= settings.train.max_length:
        length = settings.train.max_length
        what = f"must be less than JOB_TRAIN__MAX_LENGTH ({length}), the limit of prompt and answer together"
        yield "eval.prompts_max_new_tokens", what


def _safety(settings: Settings) -> Iterator[Fault]:
    data = settings.data
    if data.safety_model is not None:
        return
    for name in ("data.safety_revision", "data.unsafe_labels", "data.unsafe_threshold"):
        if settings.sources[name] != "default":
            yield name, "has no effect without JOB_DATA__SAFETY_MODEL; set both, or remove it"
    if UNSAFE in data.on_finding:
        yield (
            "data.on_finding",
            "names the kind unsafe, which needs JOB_DATA__SAFETY_MODEL; set that, too, or remove the kind",
        )


def _judge(settings: Settings) -> Iterator[Fault]:
    evaluation, names = settings.eval, ("judge", "judge_revision", "judge_model", "judge_key")
    set_by_user = [name for name in names if settings.sources[f"eval.{name}"] != "default"]
    if evaluation.principles is None:
        for name in set_by_user:
            yield f"eval.{name}", "has no effect without JOB_EVAL__PRINCIPLES; set both, or remove it"
        return
    if evaluation.judge is None:
        yield "eval.principles", "needs a judge: set JOB_EVAL__JUDGE to a model or the address of a server"
    if evaluation.prompts is None:
        yield "eval.principles", "needs answers to judge; set JOB_EVAL__PROMPTS, too"
    if is_server(evaluation.judge or ""):
        if evaluation.judge_model is None:
            yield "eval.judge_model", "must be set if JOB_EVAL__JUDGE is a server: the name of the model on it"
        if evaluation.judge_revision is not None:
            yield "eval.judge_revision", "is a commit of a hub repository, but JOB_EVAL__JUDGE is a server; remove it"
    else:
        for name in set(set_by_user) & {"judge_model", "judge_key"}:
            yield f"eval.{name}", "is for a server, but JOB_EVAL__JUDGE is not an http:// address; remove it"


def _sources(settings: Settings) -> Iterator[Fault]:
    data = settings.data
    for source, limit, first in ((data.source, data.limit, ""), (data.sft_source, data.sft_limit, "sft_")):
        if limit is not None and source is not None and not is_single(parse_sources(source)):
            example = f"{environment_name(f'data.{first}source')}=name=1000rows,..."
            yield f"data.{first}limit", f"is for one source; give each source its number of rows: {example}"


def _validation(settings: Settings) -> Iterator[Fault]:
    data, train = settings.data, settings.train
    if settings.lora.kind == "adalora":  # its ranks are final only at the end of the schedule
        needs_final_ranks = {"train.stop_after": train.stop_after is not None, "train.keep": train.keep == "best"}
        for name in (name for name, is_set in needs_final_ranks.items() if is_set):
            yield name, "does not work with JOB_LORA__KIND=adalora, whose ranks are only known at the end; remove it"
    for name, revision, validation in (
        ("data.validation", data.validation_revision, data.validation),
        ("data.sft_validation", data.sft_validation_revision, data.sft_validation),
    ):
        if revision is not None and not isinstance(validation, str):
            yield f"{name}_revision", f"is for a hub id, but {environment_name(name)} is not one; remove it"
    if data.validation is None:
        intervals = {"train.validate_every_steps": train.validate_every_steps, "train.stop_after": train.stop_after}
        needless = [name for name, value in intervals.items() if value is not None]
        for name in [*needless, *(["train.keep"] if train.keep == "best" else [])]:
            yield name, "needs a validation loss; set JOB_DATA__VALIDATION, such as 0.05, or remove it"


def _gate(settings: Settings) -> Iterator[Fault]:
    gain, loss = settings.gate.min_delta, settings.gate.max_regression
    if settings.gate.policy is not None:
        thresholds = {"gate.min_delta": gain, "gate.max_regression": loss}
        for name in [name for name, value in thresholds.items() if value is not None]:
            yield name, "is a rule for all tasks, but JOB_GATE__POLICY has rules by task; remove one of the two"
        if settings.sources["gate.metric"] != "default":
            yield "gate.metric", "has no effect with JOB_GATE__POLICY, which names the metric of each task; remove it"
        return
    if settings.sources["gate.metric"] != "default" and gain is None and loss is None:
        yield "gate.metric", "has no threshold; set JOB_GATE__MIN_DELTA or JOB_GATE__MAX_REGRESSION as well"
    if settings.gate.baseline is not None and gain is None and loss is None:
        yield "gate.baseline", "has no threshold; set JOB_GATE__MIN_DELTA or JOB_GATE__MAX_REGRESSION as well"
    if gain is not None and loss is not None and gain < -loss:
        yield "gate.min_delta", "allows a larger loss than JOB_GATE__MAX_REGRESSION; raise it, or remove one of the two"


def _export(settings: Settings) -> Iterator[Fault]:
    export, gate = settings.export, settings.gate
    if gate.on != "adapter" and gate.on not in export.formats:
        yield "gate.on", f"is {gate.on}, which is not exported; add it to JOB_EXPORT__FORMATS, or use adapter"
    if gate.on != "adapter" and gate.min_delta is None and gate.max_regression is None and gate.policy is None:
        yield (
            "gate.on",
            "has no threshold; set JOB_GATE__MIN_DELTA, JOB_GATE__MAX_REGRESSION or JOB_GATE__POLICY as well",
        )
    if export.run is not None and not export.formats:
        yield "export.formats", "is empty; name the formats in which the run in JOB_EXPORT__RUN is exported"
    if export.hub_revision is not None and export.hub is None:
        yield (
            "export.hub_revision",
            "is a branch of JOB_EXPORT__HUB, which is not set; set JOB_EXPORT__HUB, or remove the branch",
        )
    if not needs_merge(export.formats) and settings.sources["export.merge_onto"] != "default":
        yield "export.merge_onto", "has no effect without a merged model in JOB_EXPORT__FORMATS; add one, or remove it"
    calibrated = [name for name, form in EXPORT_FORMATS.items() if form.calibrated]
    if not any(find_format(name).calibrated for name in export.formats):
        for name in ("export.calibration_rows", "export.quantization_steps"):
            if settings.sources[name] != "default":
                yield name, f"has an effect only with JOB_EXPORT__FORMATS={' or '.join(calibrated)}; remove it"


def _schedule(settings: Settings) -> Iterator[Fault]:
    train = settings.train
    if train.min_lr_ratio and not SCHEDULERS[train.scheduler].has_minimum:
        having = " or ".join(name for name, spec in SCHEDULERS.items() if spec.has_minimum)
        yield "train.min_lr_ratio", f"has no effect with JOB_TRAIN__SCHEDULER={train.scheduler}; use {having}"
    if train.scheduler != "warmup_stable_decay" and settings.sources["train.decay_ratio"] != "default":
        yield "train.decay_ratio", "has an effect only with JOB_TRAIN__SCHEDULER=warmup_stable_decay; remove it"
    if train.scheduler == "warmup_stable_decay" and (train.warmup_ratio or 0) + train.decay_ratio > 1:
        yield "train.decay_ratio", "and JOB_TRAIN__WARMUP_RATIO together exceed 1, the share of all steps; lower one"
    if train.warmup_ratio is not None and settings.sources["train.warmup_steps"] != "default":
        yield "train.warmup_ratio", "and JOB_TRAIN__WARMUP_STEPS are both set; keep one of the two"


def _adapter(settings: Settings) -> Iterator[Fault]:
    lora = settings.lora
    if settings.train.optimizer == "muon" and (lora.use_dora or lora.kind == "adalora"):
        option = "USE_DORA" if lora.use_dora else "KIND=adalora"
        yield (
            "train.optimizer",
            f"is muon, which updates matrices only, but JOB_LORA__{option} trains vectors, too; use another",
        )
    if lora.kind == "adalora":
        others = ("init", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
        plain = Lora()
        for name in (name for name in others if getattr(lora, name) != getattr(plain, name)):
            yield f"lora.{name}", "does not work with JOB_LORA__KIND=adalora; remove one of the two"
        if settings.model.add_tokens:
            yield "model.add_tokens", "does not work with JOB_LORA__KIND=adalora; remove one of the two"
        if lora.init_rank is not None and lora.init_rank <= lora.rank:
            yield "lora.init_rank", f"must be more than JOB_LORA__RANK, {lora.rank}, the rank at the end"
        return
    for name in ("init_rank", "tinit", "tfinal", "delta_t", "orth_reg_weight"):
        if settings.sources[f"lora.{name}"] != "default":
            yield f"lora.{name}", "has an effect only with JOB_LORA__KIND=adalora; remove it"
    yield from _init(settings)


def _experts(settings: Settings) -> Iterator[Fault]:
    """What JOB_LORA__EXPERTS excludes: options that PEFT lacks for experts, and merging, which leaves experts out."""
    if not settings.lora.experts:
        return
    plain = Lora()
    for name in ("kind", "init", "use_dora", "dropout", "modules_to_save"):
        if getattr(settings.lora, name) != getattr(plain, name):
            yield f"lora.{name}", "does not work with JOB_LORA__EXPERTS; remove one of the two"
    if settings.train.optimizer == "muon":
        yield "train.optimizer", "is muon, which would treat the adapters of all experts as one matrix; use another"
    if settings.train.compute == "fp8":
        yield "train.compute", "is fp8, which does not support a mixture's experts; remove it or JOB_LORA__EXPERTS"
    if settings.export.formats:
        yield (
            "export.formats",
            "cannot be made with JOB_LORA__EXPERTS: adapters of experts cannot be merged; remove one",
        )


def _init(settings: Settings) -> Iterator[Fault]:
    lora, quantized = settings.lora, settings.model.quantization != "none"
    if lora.init == "orthogonal" and quantized:
        yield "lora.init", "orthogonal needs a base in floating point; set JOB_MODEL__QUANTIZATION=none, or use another"
    if lora.init == "loftq" and not quantized:
        yield (
            "lora.init",
            "loftq compensates the error of quantization; set JOB_MODEL__QUANTIZATION=nf4, or use another",
        )
    for name in _NOT_WITH.get(lora.init, ()):
        if getattr(lora, name):
            yield f"lora.{name}", f"does not work with JOB_LORA__INIT={lora.init}; remove one of the two"


def _method(settings: Settings) -> Iterator[Fault]:
    """What contradicts the training method: rows of another schema, and settings without effect."""
    train, method = settings.train, METHODS[settings.train.last_method]
    if settings.data.format != "auto" and settings.data.format not in method.schemas:
        fitting = " or ".join(methods_for(settings.data.format))
        message = f"is {settings.data.format}, which JOB_TRAIN__METHOD={train.method} cannot train on; {fitting} can"
        yield "data.format", message
    for name, methods in _ONLY_FOR.items():
        set_by_user = not settings.sources[name].startswith(("default", "preset"))
        used_methods = train.method.split(",") if name in _FOR_ANY_STAGE else [train.last_method]
        if set_by_user and not set(used_methods) & set(methods):
            message = (
                f"has no effect with JOB_TRAIN__METHOD={train.method}, only with {' and '.join(methods)}; remove it"
            )
            yield name, message
    if settings.lora.start is not None or not train.is_one_stage:
        yield from _start(settings)
    if train.is_one_stage:
        for name in FIRST_STAGE_SETTINGS.values():
            if not settings.sources[name].startswith(("default", "preset")):
                message = (
                    f"has no effect with JOB_TRAIN__METHOD={train.method}, only with two, such as sft,dpo; remove it"
                )
                yield name, message
    elif settings.data.sft_source is None:
        yield "data.sft_source", f"must be set with JOB_TRAIN__METHOD={train.method}: the data of the first stage"
    if train.label_smoothing and train.preference_loss != "sigmoid":
        yield (
            "train.label_smoothing",
            f"has no effect with JOB_TRAIN__PREFERENCE_LOSS={train.preference_loss}; remove it",
        )


def _compute(settings: Settings) -> Iterator[Fault]:
    """What excludes FP8 on any machine; `training.fp8_check` finds what excludes it on this one."""
    if settings.train.compute != "fp8":
        return
    name, lora = "train.compute", settings.lora
    if settings.run.device == "cpu":
        yield name, "is fp8, which a CPU does not compute; remove it, or JOB_RUN__DEVICE=cpu"
    if settings.model.dtype not in {"auto", "bf16"}:
        yield name, f"is fp8, which needs JOB_MODEL__DTYPE=bf16 or auto, not {settings.model.dtype}; change one"
    needs_peft = {
        "LORA__KIND": lora.kind != "lora",
        "LORA__USE_DORA": lora.use_dora,
        "LORA__MODULES_TO_SAVE": lora.modules_to_save,
        "MODEL__ADD_TOKENS": settings.model.add_tokens,
    }
    if excluded := [f"JOB_{setting}" for setting, is_set in needs_peft.items() if is_set]:
        others = " and ".join(excluded)
        yield name, f"is fp8, which needs the job's fused layers; these do not support {others}; remove one"
    if any(METHODS[method].reference for method in settings.train.method.split(",")):
        why = "its rounding would count as a difference from the reference"
        yield name, f"is fp8, which excludes JOB_TRAIN__METHOD={settings.train.method}: {why}; remove one of the two"


def _without_subject(settings: Settings) -> Iterator[Fault]:
    """What somebody set of a thing that is not there: a run that is not signed in spite of a password, for example."""
    values = settings.model_dump()
    for name, subject in _OF.items():
        (group, key), (its_group, its_key), source = subject.split("."), name.split("."), settings.sources[name]
        # A template that writes out all values gives the default, too.
        is_default = values[its_group][its_key] == type(getattr(settings, its_group)).model_fields[its_key].default
        if values[group][key] is None and not is_default and not source.startswith(("default", "preset")):
            yield name, f"has no effect without {environment_name(subject)}; set both, or remove it"


def _start(settings: Settings) -> Iterator[Fault]:
    """Options of a new adapter that exclude continuing from an existing one: they would change what it computes."""
    lora = settings.lora
    reason = (
        ""
        if settings.train.is_one_stage
        else f", as JOB_TRAIN__METHOD={settings.train.method} does after its first stage"
    )
    if lora.kind != "lora":
        yield "lora.kind", f"is {lora.kind}, which cannot start from an adapter{reason}; use lora"
    if lora.init not in {"default", "gaussian", "orthogonal"}:
        yield (
            "lora.init",
            f"is {lora.init}, which initializes a new adapter, and training continues from one{reason}; remove it",
        )
