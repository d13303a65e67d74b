"""Collects, checks and describes the settings of this run. Only this module reads the environment.

A setting is given as `JOB_GROUP__NAME` in the environment, `--group.name` on the command line, `group.name` in
SageMaker's hyperparameters, and as a nested mapping in a file. `schema` has the settings and the precedence, `sources`
reads each place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import ValidationError

from job.common.export_formats import EXPORT_FORMATS, find_format, needs_merge
from job.common.findings import UNSAFE
from job.common.methods import FIRST_STAGE_SETTINGS, METHODS, MethodName, methods_for
from job.common.schedulers import SCHEDULERS
from job.common.source_list import is_single, parse_sources
from job.distributed.ranks import Place, find_faults, find_machines, find_place
from job.errors import Problem, SettingsError, environment_name
from job.platforms.detect import Platform, detect, is_foreign
from job.platforms.sagemaker import copied_folder
from job.settings.field_types import explain, is_server, new_run_id
from job.settings.markers import RevisionOf, find_markers
from job.settings.presets import PRESETS
from job.settings.schema import NAMES, READING, Lora, Settings
from job.settings.sources import SECRETS_DIR, Request, nested, same, setting_at
from job.storage.location import is_remote
from job.storage.permissions import how_to_get_access, is_read_only

__all__ = [
    "Settings",
    "current_place",
    "current_platform",
    "describe",
    "exporters",
    "foreign_variables",
    "json_schema",
    "load_reading",
    "load_settings",
    "new_run_id",
    "preset_values",
    "redacted",
    "secrets",
    "trackers",
]

_SECRET = re.compile(
    r"(TOKEN|SECRET|PASSWORD|WEBHOOK|CONNECTION_STRING|(API|JUDGE|ACCESS|ACCOUNT|MASTER|SAS)_KEY)"
    r"(?!.*(FILE|DIR|PATH)$)",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"://([^/@\s]+:[^/@\s]+@)")  # in the address of a tracker or a proxy
_HEADERS = re.compile(r"OTEL_EXPORTER_OTLP_(\w+_)?HEADERS")  # name=value pairs with commas, values escaped as in URLs
_SHORTEST_SECRET, _LARGEST_SECRET = 8, 1 << 16

PROJECT = "qlora-job"
"""The project that trackers put runs into, unless the user names another."""

Fault = tuple[str, str]
"""Dotted name of a setting, and why its value is impossible beside those of others."""
_REVISIONS = find_markers(Settings, RevisionOf)


def load_settings(
    arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None, *, options: Sequence[str] = ()
) -> Settings:
    """The settings that all sources add up to, by the precedence in `Settings.settings_customise_sources`.

    Args:
        arguments: The command line behind the command, without its own options.
        environ: The environment; None for that of this process.
        options: The command's own options, without dashes, to name the one that a mistyped setting may mean.

    Raises:
        SettingsError: With all problems at once, each with the place its value came from.
    """
    environ = os.environ if environ is None else environ
    request = Request(arguments, environ, detect(environ), options)
    settings, wrong = _read(request, NAMES)
    problems = [*request.problems, *wrong.values()]
    if fault := find_machines(request.platform).fault:
        problems.append(Problem("resourceconfig.json", fault))
    problems += _deliveries(request.platform)
    faults = [
        *_processes(settings, environ),
        *_places(settings, request.platform),
        *_clouds(settings),
        *_revisions(settings, request),
        *_placement(settings),
        *_tasks(settings),
        *_prompts(settings),
        *_safety(settings),
        *_judge(settings),
        *_validation(settings),
        *_gate(settings),
        *_export(settings),
        *_sources(settings),
        *_schedule(settings),
        *_adapter(settings),
        *_method(settings),
        *_compute(settings),
    ]
    problems += [Problem(setting_at(name, settings.sources[name]), what) for name, what in faults if name not in wrong]
    problems += [Problem(f"{variable} (environment)", what) for variable, what in find_faults(environ)]
    if problems:
        raise SettingsError(problems)
    return settings


def load_reading(arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Settings:
    """The settings for a command that only reads published runs: how to reach them, and how to log.

    All other settings are returned with their defaults, even if the environment sets them for a run.

    Raises:
        SettingsError: With all problems at once.
    """
    environ = os.environ if environ is None else environ
    request = Request(arguments, environ, detect(environ))
    settings, wrong = _read(request, READING)
    groups = " and ".join(sorted({f"{environment_name(name.partition('.')[0])}__..." for name in READING}))
    useless = [
        Problem(setting_at(name, item.source), f"has no effect on this command; only {groups} have")
        for name, item in request.given.items()
        if item.source == "command line" and name not in READING
    ]
    if problems := [*request.problems, *useless, *wrong.values()]:
        raise SettingsError(problems)
    return settings


def _read(request: Request, names: Collection[str]) -> tuple[Settings, dict[str, Problem]]:
    """Settings made of the valid values of these names, and by name a problem for each invalid one."""
    wrong: dict[str, Problem] = {}
    try:
        settings = Settings(_request=request)  # type: ignore[call-arg]  # not a setting: the sources find it there
    except ValidationError as error:
        for record in error.errors(include_url=False, include_input=False):
            group, both = str(record["loc"][0]), ".".join(map(str, record["loc"][:2]))
            name = both if both in NAMES else group  # what lies deeper is an item of a value
            wrong.setdefault(name, Problem(setting_at(name, request.given[name].source), explain(record)))
    wrong = {name: problem for name, problem in wrong.items() if name in names}
    given = {name: item for name, item in request.given.items() if name in names and name not in wrong}
    if wrong or len(names) < len(NAMES):
        # No validator involves two settings, so the remaining values are valid, and combinations can be checked.
        settings = Settings(**nested({name: item.value for name, item in given.items()}))
    settings.keep_sources({name: item.source for name, item in given.items()})
    return settings, wrong


def current_platform(environ: Mapping[str, str] | None = None) -> Platform:
    """The platform this process runs on. Works with invalid settings, since it decides where errors are reported."""
    return detect(os.environ if environ is None else environ)


def current_place(environ: Mapping[str, str] | None = None) -> Place | None:
    """Rank and world size, as set by torchrun or this job's launcher; None if neither started this process.

    Call it when `load_settings` found no fault.
    """
    return find_place(os.environ if environ is None else environ)


def foreign_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Variables that begin with JOB_ but belong to a known other program, such as Jenkins' JOB_NAME; sorted."""
    environ = os.environ if environ is None else environ
    platform = detect(environ)
    return sorted(variable for variable in environ if is_foreign(variable) and not platform.reads(variable))


def environment() -> dict[str, str]:
    """A copy of the environment, for processes that the job starts."""
    return dict(os.environ)


def secrets(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The values of known credentials, variables or files of JOB_SECRETS_DIR, which the log must not show."""
    environ = os.environ if environ is None else environ
    files = _secret_files(environ.get(environment_name(SECRETS_DIR)))
    texts = [*environ.items(), *files.items()]
    named = [value for name, value in texts if _SECRET.search(name)]
    in_urls = [found for _, value in texts for found in _LOGIN.findall(value)]
    in_headers = [
        part
        for name, value in texts
        if _HEADERS.fullmatch(name)
        for pair in value.split(",")
        for part in (pair.partition("=")[2].strip(), *unquote(pair.partition("=")[2]).split())
    ]
    found = dict.fromkeys([*named, *in_urls, *in_headers])
    return tuple(secret for secret in found if len(secret) >= _SHORTEST_SECRET)


def _secret_files(folder: str | None) -> dict[str, str]:
    """The texts of the small files in JOB_SECRETS_DIR by name; of a folder that cannot be read none: it is refused."""
    try:
        paths = [path for path in Path(folder).iterdir() if path.is_file()] if folder else []
        return {
            path.name: path.read_text(errors="replace").strip()
            for path in paths
            if path.stat().st_size <= _LARGEST_SECRET
        }
    except OSError:
        return {}


def trackers(settings: Settings, environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """The experiment trackers whose own variables are set, and the project to put the run into.

    The project is None if the user set the tracker's own variable for it, which the tracker reads itself.
    """
    environ = os.environ if environ is None else environ
    given = {name for name, value in environ.items() if value}
    found: dict[str, str | None] = {}
    if settings.log.trackers == "off":
        return found
    if environ.get("WANDB_MODE") != "disabled" and given & {"WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"}:
        found["wandb"] = None if "WANDB_PROJECT" in given else PROJECT
    if "MLFLOW_TRACKING_URI" in given:
        found["mlflow"] = None if given & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} else PROJECT
    return found


def exporters(settings: Settings, environ: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """The exporters of figures that are asked for (see `tracking.live_metrics`), each with its arguments.

    OTLP is asked for by OpenTelemetry's own variables, which the SDK reads itself; the report to a TrainJob by those
    that Kubeflow Trainer gives its pods.
    """
    environ = os.environ if environ is None else environ
    found: dict[str, dict[str, Any]] = {}
    disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    chosen = {name.strip() for name in (environ.get("OTEL_METRICS_EXPORTER") or "otlp").split(",")}
    if "otlp" in chosen and not disabled and (_otlp("ENDPOINT", environ)):
        found["otlp"] = {"protocol": _otlp("PROTOCOL", environ) or "http/protobuf"}
    if settings.metrics.port is not None:
        found["prometheus"] = {"port": settings.metrics.port}
    if url := environ.get("KUBEFLOW_TRAINER_SERVER_URL"):
        files = {"token": "KUBEFLOW_TRAINER_SERVER_TOKEN", "authority": "KUBEFLOW_TRAINER_SERVER_CA_CERT"}
        found["train-job"] = {"url": url} | {name: environ.get(variable, "") for name, variable in files.items()}
    if settings.metrics.pod_annotation:
        found["pod-annotation"] = _pod(environ)
    return found


def _pod(environ: Mapping[str, str]) -> dict[str, str]:
    """The pod that this process runs in: its address at the API server, and the files of its service account."""
    account = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    name, namespace = environ.get("KUBERNETES_POD_NAME", ""), environ.get("KUBERNETES_POD_NAMESPACE", "")
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return {
        "url": f"{server}/api/v1/namespaces/{namespace}/pods/{name}" if host and name and namespace else "",
        "token": str(account / "token"),
        "authority": str(account / "ca.crt"),
    }


def _otlp(name: str, environ: Mapping[str, str]) -> str:
    """The value of a variable of OpenTelemetry's exporter: the one for metrics, else the one for all signals."""
    return environ.get(f"OTEL_EXPORTER_OTLP_METRICS_{name}") or environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""


def describe(settings: Settings) -> list[tuple[str, Any, str]]:
    """(dotted name, JSON-able value, source) of every setting, in their order here."""
    tree = settings.model_dump(mode="json")  # writes a SecretStr as asterisks
    rows = [(name, *name.partition(".")[::2]) for name in NAMES]
    return [(name, tree[group][key] if key else tree[group], settings.sources[name]) for name, group, key in rows]


def redacted(settings: Settings) -> dict[str, dict[str, Any]]:
    """Dotted name -> {"value", "source"}, for the manifest."""
    return {name: {"value": value, "source": source} for name, value, source in describe(settings)}


def preset_values(preset: str) -> dict[str, Any]:
    """Dotted name -> JSON-able value of every setting with the preset's values; empty for an unknown preset."""
    if preset not in PRESETS:
        return {}
    given = {"preset": preset, **PRESETS[preset]}
    return {name: value for name, value, _ in describe(Settings(**nested(given)))}


def json_schema() -> dict[str, Any]:
    """JSON Schema of a settings file: all settings, nested in their groups."""
    return Settings.model_json_schema()


def _processes(settings: Settings, environ: Mapping[str, str]) -> Iterator[Fault]:
    run = settings.run
    if list(find_faults(environ)):  # the rank is unknown; `load_settings` reports the fault
        return
    place = find_place(environ)
    if place is None and run.nodes > 1:
        if run.rendezvous is None:
            yield (
                "run.rendezvous",
                "must be given where JOB_RUN__NODES is more than 1: host:port of machine 0, the same on all",
            )
        if run.node_rank >= run.nodes:
            yield "run.node_rank", f"counts from 0, so it must be less than JOB_RUN__NODES, {run.nodes}; change one"
    several = run.nodes > 1 if place is None else place.world_size > 1
    if several and settings.sources["run.id"] == "generated":
        yield "run.id", "must be given: each machine or process would generate another one"


def _places(settings: Settings, platform: Platform) -> Iterator[Fault]:
    output, cache = settings.run.output, settings.storage.cache
    own = copied_folder(platform.inputs) or platform.output
    if own and settings.run.nodes > 1 and Path(output).is_relative_to(own):
        yield "run.output", "is a folder of this machine alone; with several machines give s3://bucket/prefix"
    fix = {"fix": _FOR_ROOT} if own and Path(output).is_relative_to(own) else {}
    if not is_remote(output) and (why := _why_not_writable(Path(output) / settings.run.id, **fix)):
        yield "run.output", why
    if cache and (why := _why_not_writable(Path(cache))):
        yield "storage.cache", why


def _clouds(settings: Settings) -> Iterator[Fault]:
    """Options of S3's stores in a run that has places in other clouds alone: they would do nothing, silently."""
    schemes = set(re.findall(r"\b(s3|gs|az)(?=://)", settings.model_dump_json()))
    own = " and ".join(f"{_OWN_ADDRESS[scheme]} for {scheme}://" for scheme in sorted(schemes - {"s3"}))
    for name in ("endpoint_url", "kms_key_id", "request_payer"):
        if own and "s3" not in schemes and getattr(settings.storage, name):
            fix = f"; set {own} instead" if name == "endpoint_url" else "; remove it"
            yield f"storage.{name}", f"is for s3:// alone, and this run has nothing there{fix}"


def _deliveries(platform: Platform) -> Iterator[Problem]:
    """Folders for SageMaker that cannot be written: found now, not when the run is complete."""
    for folder in () if platform.delivery is None else (platform.delivery.model, platform.delivery.data):
        if why := _why_not_writable(folder, _FOR_ROOT):
            yield Problem(str(folder), why)


_OWN_ADDRESS = {"gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
_FOR_ROOT = "SageMaker mounts its folders for root; take the image that infra/sagemaker/Dockerfile makes of this one"


def _why_not_writable(path: Path, fix: str | None = None) -> str | None:
    """Why this folder cannot be created or written to; None if it can. Creates nothing."""
    for place in (path, *path.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                return f"cannot be a folder: {place} is a link to nothing; give another path"
            continue  # what matters is the nearest folder that exists
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
    """Problems with revisions: of a path or URI, or meant for another repository than the one that is used."""
    values = {name: value for name, value, _ in describe(settings)}
    for name, marker in _REVISIONS.items():
        place = str(values[marker.subject])
        if not values[name]:
            continue
        if is_remote(place) or place.startswith(("/", ".")):
            what = f"is a commit of a hub repository, but {environment_name(marker.subject)} is a path or URI"
            yield name, f"{what}; remove it"
        elif why := _other_repository(name, marker.subject, request):
            yield name, why


def _other_repository(name: str, subject: str, request: Request) -> str | None:
    """Why a revision that the user set does not belong to the repository that is used; None if it may.

    The source that gives the revision, or one below it that the user wrote, names another repository than the
    source that wins. To drop the revision would unpin the run silently, to keep it would ask for it in a repository
    that it does not come from.
    """
    layers = [layer.given for layer in request.layers if layer.by_user]
    at = next((index for index, given in enumerate(layers) if name in given), len(layers))
    written_for = next((given[subject] for given in layers[at:] if subject in given), None)
    used = request.strongest(subject)
    if written_for is None or used is None or same(used.value, written_for.value):
        return None
    return (
        f"is for the {environment_name(subject)} of {written_for.source}, but {used.source} names another; "
        f"give {environment_name(name)} there too, or empty there for the newest revision"
    )


def _placement(settings: Settings) -> Iterator[Fault]:
    model, where = settings.model, "model.placement"
    if model.placement in {"auto", "gpu"}:
        return
    if model.quantization == "none":
        yield where, f"is {model.placement}, which is for 4-bit weights, and JOB_MODEL__QUANTIZATION is none; take gpu"
    if model.keep_dequantized is True:
        yield where, f"is {model.placement}, and JOB_MODEL__KEEP_DEQUANTIZED keeps the base on the GPU; drop one"
    if model.placement == "sharded" and (settings.run.processes, settings.run.nodes) == (1, 1):
        yield where, "is sharded, which takes several processes, and JOB_RUN__PROCESSES is 1; take gpu or host"


def _tasks(settings: Settings) -> Iterator[Fault]:
    # A preset's file for a task that is not asked is ignored; a user's own file must be used.
    source, tasks = settings.sources["eval.data"], settings.eval.tasks
    files = any(task.endswith((".yaml", ".yml")) for task in tasks)  # which may name tasks of a group
    # Tasks of lm-eval's groups are named after the group: mmlu_anatomy. Whether one is of it, `check_tasks` knows.
    other = {name for name in settings.eval.data if not name.startswith(tuple(tasks))}
    if other and not files and not source.startswith("preset"):
        named = " (a channel's files are named after their tasks)" * source.startswith("sagemaker channel")
        what = f"has a file for a task that is not in JOB_EVAL__TASKS{named}; add the task there, or drop the file"
        yield "eval.data", what


def _prompts(settings: Settings) -> Iterator[Fault]:
    asked, most = settings.eval.prompts, settings.eval.prompts_max_new_tokens
    if asked is None:
        if not settings.sources["eval.prompts_max_new_tokens"].startswith(("default", "preset")):
            yield "eval.prompts_max_new_tokens", "has no effect without JOB_EVAL__PROMPTS; give both, or remove it"
        return
    if isinstance(asked, int) and settings.data.validation is None:
        yield "eval.prompts", "is a number of validation rows; give JOB_DATA__VALIDATION too, or a file of prompts"
    if most >= settings.train.max_length:
        what = f"must be less than JOB_TRAIN__MAX_LENGTH, {settings.train.max_length}, which prompt and answer share"
        yield "eval.prompts_max_new_tokens", what


def _safety(settings: Settings) -> Iterator[Fault]:
    data = settings.data
    if data.safety_model is not None:
        return
    for name in ("data.safety_revision", "data.unsafe_labels", "data.unsafe_threshold"):
        if settings.sources[name] != "default":
            yield name, "has no effect without JOB_DATA__SAFETY_MODEL; give both, or remove it"
    if UNSAFE in data.on_finding:
        yield "data.on_finding", "names the kind unsafe, which JOB_DATA__SAFETY_MODEL finds; give that, too, or drop it"


def _judge(settings: Settings) -> Iterator[Fault]:
    asked, names = settings.eval, ("judge", "judge_revision", "judge_model", "judge_key")
    given = [name for name in names if settings.sources[f"eval.{name}"] != "default"]
    if asked.principles is None:
        for name in given:
            yield f"eval.{name}", "has no effect without JOB_EVAL__PRINCIPLES; give both, or remove it"
        return
    if asked.judge is None:
        yield "eval.principles", "needs a judge: give JOB_EVAL__JUDGE, a model or the address of a server"
    if asked.prompts is None:
        yield "eval.principles", "is about the answers to JOB_EVAL__PROMPTS; give that, too"
    if is_server(asked.judge or ""):
        if asked.judge_model is None:
            yield "eval.judge_model", "must be given where JOB_EVAL__JUDGE is a server: its name of the model"
        if asked.judge_revision is not None:
            yield "eval.judge_revision", "is a commit of a hub repository, but JOB_EVAL__JUDGE is a server; remove it"
    else:
        for name in set(given) & {"judge_model", "judge_key"}:
            yield f"eval.{name}", "is for a server, and JOB_EVAL__JUDGE is none (http://...); remove it"


def _sources(settings: Settings) -> Iterator[Fault]:
    data = settings.data
    for source, limit, first in ((data.source, data.limit, ""), (data.sft_source, data.sft_limit, "sft_")):
        if limit is not None and source is not None and not is_single(parse_sources(source)):
            example = f"{environment_name(f'data.{first}source')}=name=1000rows,..."
            yield f"data.{first}limit", f"is for one source; give each source its number of rows: {example}"


def _validation(settings: Settings) -> Iterator[Fault]:
    data, train = settings.data, settings.train
    if settings.lora.kind == "adalora":  # its ranks are settled by the schedule, not at an earlier step
        asked = {"train.stop_after": train.stop_after is not None, "train.keep": train.keep == "best"}
        for name in (name for name, given in asked.items() if given):
            yield name, "is not for JOB_LORA__KIND=adalora, whose ranks are settled at the end; remove it"
    for name, revision, validation in (
        ("data.validation", data.validation_revision, data.validation),
        ("data.sft_validation", data.sft_validation_revision, data.sft_validation),
    ):
        if revision is not None and not isinstance(validation, str):
            yield f"{name}_revision", f"is of a hub id, and {environment_name(name)} names none; remove it"
    if data.validation is None:
        given = {"train.validate_every_steps": train.validate_every_steps, "train.stop_after": train.stop_after}
        named = [name for name, value in given.items() if value is not None]
        for name in [*named, *(["train.keep"] if train.keep == "best" else [])]:
            yield name, "goes by the validation loss; give JOB_DATA__VALIDATION, such as 0.05, or remove it"


def _gate(settings: Settings) -> Iterator[Fault]:
    gain, loss = settings.gate.min_delta, settings.gate.max_regression
    if settings.gate.policy is not None:
        given = {"gate.min_delta": gain, "gate.max_regression": loss}
        for name in [name for name, value in given.items() if value is not None]:
            yield name, "is a rule for all tasks, and JOB_GATE__POLICY has rules by task; remove one of the two"
        if settings.sources["gate.metric"] != "default":
            yield "gate.metric", "is named by task in JOB_GATE__POLICY; remove it here"
        return
    if settings.sources["gate.metric"] != "default" and gain is None and loss is None:
        yield "gate.metric", "has no threshold; give JOB_GATE__MIN_DELTA or JOB_GATE__MAX_REGRESSION as well"
    if settings.gate.baseline is not None and gain is None and loss is None:
        yield "gate.baseline", "has no threshold; give JOB_GATE__MIN_DELTA or JOB_GATE__MAX_REGRESSION as well"
    if gain is not None and loss is not None and gain < -loss:
        yield "gate.min_delta", "allows a larger loss than JOB_GATE__MAX_REGRESSION; raise it, or remove one of the two"


def _export(settings: Settings) -> Iterator[Fault]:
    export, gate = settings.export, settings.gate
    if gate.on != "adapter" and gate.on not in export.formats:
        yield "gate.on", f"is {gate.on}, which is not exported; add it to JOB_EXPORT__FORMATS, or take adapter"
    if gate.on != "adapter" and gate.min_delta is None and gate.max_regression is None and gate.policy is None:
        yield (
            "gate.on",
            "has no threshold; give JOB_GATE__MIN_DELTA, JOB_GATE__MAX_REGRESSION or JOB_GATE__POLICY as well",
        )
    if export.hub_revision is not None and export.hub is None:
        yield (
            "export.hub_revision",
            "is a branch of JOB_EXPORT__HUB, which names no repository; give it, or remove this",
        )
    if not needs_merge(export.formats) and settings.sources["export.merge_onto"] != "default":
        yield "export.merge_onto", "has no effect without a merged model in JOB_EXPORT__FORMATS; add one, or remove it"
    calibrated = [name for name, found in EXPORT_FORMATS.items() if found.calibrated]
    if not any(find_format(name).calibrated for name in export.formats):
        for name in ("export.calibration_rows", "export.quantization_steps"):
            if settings.sources[name] != "default":
                yield name, f"has an effect with JOB_EXPORT__FORMATS={' or '.join(calibrated)} only; remove it"


def _schedule(settings: Settings) -> Iterator[Fault]:
    train = settings.train
    if train.min_lr_ratio and not SCHEDULERS[train.scheduler].has_minimum:
        having = " or ".join(name for name, spec in SCHEDULERS.items() if spec.has_minimum)
        yield "train.min_lr_ratio", f"has no effect with JOB_TRAIN__SCHEDULER={train.scheduler}; take {having}"
    if train.scheduler != "warmup_stable_decay" and settings.sources["train.decay_ratio"] != "default":
        yield "train.decay_ratio", "has an effect with JOB_TRAIN__SCHEDULER=warmup_stable_decay only"
    if train.scheduler == "warmup_stable_decay" and (train.warmup_ratio or 0) + train.decay_ratio > 1:
        yield "train.decay_ratio", "and JOB_TRAIN__WARMUP_RATIO are more than all steps together; lower one"
    if train.warmup_ratio is not None and settings.sources["train.warmup_steps"] != "default":
        yield "train.warmup_ratio", "is given beside JOB_TRAIN__WARMUP_STEPS; keep one of the two"


def _adapter(settings: Settings) -> Iterator[Fault]:
    lora = settings.lora
    if settings.train.optimizer == "muon" and (lora.use_dora or lora.kind == "adalora"):
        other = "USE_DORA" if lora.use_dora else "KIND=adalora"
        yield (
            "train.optimizer",
            f"is muon, which is for matrices, and JOB_LORA__{other} trains vectors, too; take another",
        )
    if lora.kind == "adalora":
        others = ("init", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
        plain = Lora()
        for name in (name for name in others if getattr(lora, name) != getattr(plain, name)):
            yield f"lora.{name}", "is not for JOB_LORA__KIND=adalora; drop one of the two"
        if settings.model.add_tokens:
            yield "model.add_tokens", "is not for JOB_LORA__KIND=adalora; drop one of the two"
        if lora.init_rank is not None and lora.init_rank <= lora.rank:
            yield "lora.init_rank", f"must be more than JOB_LORA__RANK, {lora.rank}, the rank at the end"
        return
    for name in ("init_rank", "tinit", "tfinal", "delta_t", "orth_reg_weight"):
        if settings.sources[f"lora.{name}"] != "default":
            yield f"lora.{name}", "has an effect with JOB_LORA__KIND=adalora only"
    yield from _init(settings)


_NOT_WITH: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("pissa", "pissa_niter_16", "olora"), ("use_rslora", "use_dora", "dropout")),
    "eva": ("rank_pattern",),  # all layers have one rank with it
    "loftq": ("use_dora",),
}
"""Values of JOB_LORA__INIT -> what cannot be had with them."""


def _init(settings: Settings) -> Iterator[Fault]:
    lora, quantized = settings.lora, settings.model.quantization != "none"
    if lora.init == "orthogonal" and quantized:
        yield "lora.init", "orthogonal needs a base in floating point; set JOB_MODEL__QUANTIZATION=none or take another"
    if lora.init == "loftq" and not quantized:
        yield "lora.init", "loftq goes by what quantization takes away; set JOB_MODEL__QUANTIZATION=nf4 or take another"
    for name in _NOT_WITH.get(lora.init, ()):
        if getattr(lora, name):
            yield f"lora.{name}", f"is not for JOB_LORA__INIT={lora.init}; drop one of the two"


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
"""Settings of some methods only."""
_FOR_ANY_STAGE = ("train.loss_on",)
"""Those that have an effect where the method of any stage is among theirs; the others count for the last stage."""


def _method(settings: Settings) -> Iterator[Fault]:
    """What does not fit the method: rows of another kind, and settings that it would ignore."""
    train, method = settings.train, METHODS[settings.train.last_method]
    if settings.data.format != "auto" and settings.data.format not in method.schemas:
        fitting = " or ".join(methods_for(settings.data.format))
        what = f"is {settings.data.format}, which JOB_TRAIN__METHOD={train.method} cannot learn from; {fitting} can"
        yield "data.format", what
    for name, methods in _ONLY_FOR.items():
        given = not settings.sources[name].startswith(("default", "preset"))
        learned = train.method.split(",") if name in _FOR_ANY_STAGE else [train.last_method]
        if given and not set(learned) & set(methods):
            what = f"has no effect with JOB_TRAIN__METHOD={train.method}, only with {' and '.join(methods)}; remove it"
            yield name, what
    if settings.lora.start is not None or not train.is_one_stage:
        yield from _start(settings)
    if train.is_one_stage:
        for name in FIRST_STAGE_SETTINGS.values():
            if not settings.sources[name].startswith(("default", "preset")):
                yield name, f"has no effect with JOB_TRAIN__METHOD={train.method}, only with two, as sft,dpo; remove it"
    elif settings.data.sft_source is None:
        yield "data.sft_source", f"must be given with JOB_TRAIN__METHOD={train.method}: what the first stage learns"
    if train.label_smoothing and train.preference_loss != "sigmoid":
        yield (
            "train.label_smoothing",
            f"has no effect with JOB_TRAIN__PREFERENCE_LOSS={train.preference_loss}; remove it",
        )


def _compute(settings: Settings) -> Iterator[Fault]:
    """What cannot be trained in FP8 whatever the machine; what this machine cannot, `training.prepare` finds."""
    if settings.train.compute != "fp8":
        return
    name, lora = "train.compute", settings.lora
    if settings.run.device == "cpu":
        yield name, "is fp8, which a CPU does not compute; remove it, or JOB_RUN__DEVICE=cpu"
    if settings.model.dtype not in {"auto", "bf16"}:
        yield name, f"is fp8, which goes with bf16; JOB_MODEL__DTYPE is {settings.model.dtype}: set bf16 or auto"
    slower = {
        "LORA__KIND": lora.kind != "lora",
        "LORA__USE_DORA": lora.use_dora,
        "LORA__MODULES_TO_SAVE": lora.modules_to_save,
        "MODEL__ADD_TOKENS": settings.model.add_tokens,
    }
    if needed := [f"JOB_{setting}" for setting, given in slower.items() if given]:
        yield name, f"is fp8, which only the job's fused layers compute; not with {' and '.join(needed)}; drop it"
    if any(METHODS[method].reference for method in settings.train.method.split(",")):
        why = "its rounding would count as a difference from the reference"
        yield name, f"is fp8, which is not for JOB_TRAIN__METHOD={settings.train.method}: {why}; drop one of the two"


def _start(settings: Settings) -> Iterator[Fault]:
    """Options of a new adapter, where training goes on from one: they would change what it computes."""
    lora = settings.lora
    why = (
        ""
        if settings.train.is_one_stage
        else f", as JOB_TRAIN__METHOD={settings.train.method} does after its first stage"
    )
    if lora.kind != "lora":
        yield "lora.kind", f"is {lora.kind}, which cannot go on from an adapter{why}; take lora"
    if lora.init not in {"default", "gaussian", "orthogonal"}:
        yield (
            "lora.init",
            f"is {lora.init}, a beginning from the base, and training goes on from an adapter{why}; remove it",
        )
