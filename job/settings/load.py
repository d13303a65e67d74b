"""Collects, checks and describes the settings of this run. Only this module reads the environment.

A setting is given as `JOB_GROUP__NAME` in the environment, `--group.name` on the command line, `group.name` in
SageMaker's hyperparameters, and as a nested mapping in a file. `schema` has the settings and the precedence, `sources`
reads each place, `combinations` says which values exclude each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pydantic import ValidationError

from job.common.secrets_in_text import is_key, signatures_in
from job.distributed.ranks import Place, find_faults, find_machines, find_place, partial_place
from job.errors import Problem, SettingsError, environment_name
from job.platforms.detect import Platform, detect, is_foreign
from job.records import RecordedSettings
from job.settings.combinations import impossible_values, undeliverable
from job.settings.field_types import LONGEST_RUN_ID, explain, new_run_id
from job.settings.layers import GivenValue
from job.settings.markers import BelongsTo, ResultEffect, find_markers
from job.settings.presets import PRESETS
from job.settings.schema import NAMES, READING, Settings
from job.settings.secret_files import read_secret_files
from job.settings.sources import SECRETS_DIR, Request, nested, setting_at

__all__ = [
    "Settings",
    "current_place",
    "current_platform",
    "describe",
    "exporters",
    "foreign_variables",
    "json_schema",
    "known_machine",
    "known_place",
    "load_reading",
    "load_settings",
    "new_run_id",
    "output_folder",
    "plain_values",
    "preset_values",
    "redacted",
    "secret_files",
    "secrets",
    "trackers",
]

_SECRET = re.compile(
    r"(TOKEN|SECRET|PASSWORD|WEBHOOK|CONNECTION_STRING|(API|JUDGE|ACCESS|ACCOUNT|MASTER|SAS)_KEY)"
    r"(?!.*(FILE|DIR|PATH)$)",
    re.IGNORECASE,
)
_KEY_FILE = re.compile(r"CREDENTIAL|SERVICE_ACCOUNT|TOKEN|_KEY|AWS_CONFIG_FILE")  # and the key itself by mistake
_LOGIN = re.compile(r"://([^/:@\s]+:([^/\s]+)@)")  # in the address of a tracker or a proxy
_HEADERS = re.compile(r"OTEL_EXPORTER_OTLP_(\w+_)?HEADERS")  # name=value pairs with commas, values escaped as in URLs
_QUOTED = "has quotes around its value, which belong to it here, as in a file for Docker's --env-file; remove them"
_EMPTY = "must not be empty; leave it out for the default"
_MAY_BE_QUOTED = ("sign.password",)
_SHORTEST_SECRET, _LARGEST_SECRET = 8, 1 << 16

PROJECT = "qlora-job"
"""The project that trackers put runs into, unless the user names another."""


def load_settings(
    arguments: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    options: Sequence[str] = (),
    of_run: Callable[[Settings], RecordedSettings] | None = None,
) -> Settings:
    """The settings from all sources, by the precedence in `Settings.settings_customise_sources`.

    Args:
        arguments: The command line after the command, without the command's own options.
        environ: The environment; None for that of this process.
        options: The command's own options, without dashes: an error about a mistyped setting may suggest one.
        of_run: Reads the settings of the run in JOB_EXPORT__RUN, which hold where no others are given; None where
            that run does not matter.

    Raises:
        SettingsError: With all problems at once, each with the place its value came from.
        JobError: What `of_run` raises.
    """
    environ = os.environ if environ is None else environ
    request = Request(arguments, environ, detect(environ), options)
    settings, invalid = _read(request, NAMES)
    if of_run is not None and settings.export.run is not None and not (request.problems or invalid):
        recorded = of_run(settings)
        if refused := list(_refused_with(recorded, settings)):
            raise SettingsError([Problem(setting_at(name, settings.sources[name]), what) for name, what in refused])
        request = replace(request, of_run=_settings_of_run(recorded, settings.export.formats), layers=[])
        settings, invalid = _read(request, NAMES)
    problems = [*request.problems, *invalid.values()]
    if fault := find_machines(request.platform).fault:
        problems.append(Problem("resourceconfig.json", fault))
    problems += undeliverable(request.platform)
    faults = impossible_values(settings, request)
    problems += [
        Problem(setting_at(name, settings.sources[name]), what) for name, what in faults if name not in invalid
    ]
    problems += [Problem(f"{variable} (environment)", what) for variable, what in find_faults(environ)]
    problems += read_secret_files(environ)[1]
    if problems:
        raise SettingsError(problems)
    return settings


def _refused_with(recorded: RecordedSettings, settings: Settings) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong) of those that are given and cannot be those of a run that exports the recorded one."""
    if settings.run.id == recorded.run_id:
        yield "run.id", "is that of the run in JOB_EXPORT__RUN; unset it, or give this run another one"
    preset = recorded.values.get("preset")
    if preset in PRESETS and settings.preset != preset and settings.sources["preset"] != "default":
        yield "preset", f"is {settings.preset}, but {preset} in the run in JOB_EXPORT__RUN; remove it"


def _settings_of_run(recorded: RecordedSettings, formats: Sequence[str]) -> dict[str, object]:
    """The settings of the run in JOB_EXPORT__RUN that hold where no others are given, by dotted name.

    They are those that decide the result, and what the gate requires; not what is exported, nor how the job runs on its
    machine. Those that this version's preset gives, too, come from it. The new run lies beside that one, and its id is
    the same at every start, so that it resumes.
    """
    effects = find_markers(Settings, ResultEffect)
    defaults = {name: value for name, value, _ in describe(Settings())}
    values = {**defaults, **recorded.values}  # what the version of that run did not have worked as its default
    preset = str(values["preset"])
    preset = preset if preset in PRESETS else str(defaults["preset"])  # that of another version of the job
    given = defaults | preset_values(preset)
    # With another model or data set than the preset's, the preset does not give what it says of them.
    belonging = {name: marker.subject for name, marker in find_markers(Settings, BelongsTo).items()}
    given |= {name: defaults[name] for name, of in belonging.items() if values.get(of) != given[of]}
    own_id = "-".join([recorded.run_id, *formats]).replace(":", "-")[-LONGEST_RUN_ID:].lstrip("._-")
    return {"preset": preset, "run.id": own_id, "run.output": recorded.output} | {
        name: values[name]
        for name in values.keys() & given.keys()
        if values[name] != given[name] and not name.startswith("export.") and name != "gate.on"
        if effects[name].affects_result or name.startswith("gate.")
    }


def known_machine(arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Settings | None:
    """The settings of which the valid ones say which machine of several this is; None if they do not.

    For a machine whose settings are not valid, to tell the others.
    """
    environ = os.environ if environ is None else environ
    request = Request(arguments, environ, detect(environ))
    settings, wrong = _read(request, NAMES)
    run = settings.run
    known = run.nodes > 1 and run.rendezvous is not None and run.node_rank < run.nodes
    if not known or wrong.keys() & {"run", "run.id", "run.nodes", "run.node_rank", "run.rendezvous"}:
        return None
    return None if list(find_faults(environ)) or find_place(environ) is not None else settings


def known_place(
    arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> tuple[Place, str | None] | None:
    """Rank and world size as another launcher has set them, and the run's id, None where no valid one is given.

    For a process whose settings are not valid, to tell the others. None for a single process, or without a launcher.
    """
    environ = os.environ if environ is None else environ
    if (place := partial_place(environ)) is None or place.world_size == 1:
        return None
    settings, wrong = _read(Request(arguments, environ, detect(environ)), {"run.id"})
    return place, None if wrong or settings.sources["run.id"] == "generated" else settings.run.id


def load_reading(arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of a command that only reads published runs: access to the store, and logging.

    All other settings are returned with their defaults, even if the environment sets them for a run.

    Raises:
        SettingsError: With all problems at once.
    """
    environ = os.environ if environ is None else environ
    request = Request(arguments, environ, detect(environ))
    settings, invalid = _read(request, READING)
    groups = " and ".join(sorted({f"{environment_name(name.partition('.')[0])}__..." for name in READING}))
    useless = [
        Problem(setting_at(name, item.source), f"has no effect on this command; only {groups} have")
        for name, item in request.given.items()
        if item.source == "command line" and name not in READING
    ]
    if problems := [*request.problems, *useless, *invalid.values(), *read_secret_files(environ)[1]]:
        raise SettingsError(problems)
    return settings


def output_folder(environ: Mapping[str, str] | None = None) -> str:
    """Where runs are (JOB_RUN__OUTPUT), for a command that only reads them; the default if the value is not valid."""
    environ = os.environ if environ is None else environ
    settings, _ = _read(Request((), environ, detect(environ)), {"run.output"})
    return settings.run.output


def _read(request: Request, names: Collection[str]) -> tuple[Settings, dict[str, Problem]]:
    """Settings with the valid values of these names, and by name a problem for each invalid value."""
    invalid: dict[str, Problem] = {}
    try:
        settings = Settings(_request=request)  # type: ignore[call-arg]  # not a setting: the sources find it there
    except ValidationError as error:
        records = error.errors(include_url=False, include_input=False)
        # Of a setting that is a word or a list, what is wrong with the list says more; one word is a list, too.
        of_lists = [record for record in records if record["type"] != "literal_error"]
        for record in [*of_lists, *records]:
            group, both = str(record["loc"][0]), ".".join(map(str, record["loc"][:2]))
            name = both if both in NAMES else group  # a deeper location is an item of a value
            given_value = request.given[name]
            what = _EMPTY if given_value.value == "" else explain(record)
            invalid.setdefault(name, Problem(setting_at(name, given_value.source), what))
    invalid |= {
        name: Problem(setting_at(name, item.source), _QUOTED)
        for name, item in request.given.items()
        if _is_quoted(name, item)
    }
    invalid = {name: problem for name, problem in invalid.items() if name in names}
    given = {name: item for name, item in request.given.items() if name in names and name not in invalid}
    if invalid or len(names) < len(NAMES):
        # No validator involves two settings, so the remaining values are valid, and combinations can be checked.
        settings = Settings(**nested({name: item.value for name, item in given.items()}))
    settings.set_sources({name: item.source for name, item in given.items()})
    return settings, invalid


def _is_quoted(name: str, item: GivenValue) -> bool:
    """Whether a value was typed with quotes that a shell would have removed, but Docker's --env-file keeps."""
    text = item.value.strip() if isinstance(item.value, str) else ""
    typed = item.source == "command line" or item.source.startswith("environment ")
    quoted = len(text) >= len("''") and text[0] == text[-1] in "'\"" and text[0] not in text[1:-1]
    return typed and quoted and name not in _MAY_BE_QUOTED


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


def secret_files(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The readable secrets that are given as files, by variable; `load_settings` refuses the others."""
    return read_secret_files(os.environ if environ is None else environ)[0]


def secrets(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The values of known credentials, variables or files of JOB_SECRETS_DIR, which the log must not show."""
    environ = os.environ if environ is None else environ
    files = _secret_files(environ.get(environment_name(SECRETS_DIR)))
    texts = [*environ.items(), *files.items()]
    secret_values = [
        value for name, value in texts if _SECRET.search(name) or (_KEY_FILE.search(name) and is_key(value))
    ]
    secret_values += [signature for _, value in texts for signature in signatures_in(value)]
    in_urls = [part for _, value in texts for login in _LOGIN.findall(value) for part in login]
    in_headers = [
        part
        for name, value in texts
        if _HEADERS.fullmatch(name)
        for pair in value.split(",")
        for part in (pair.partition("=")[2].strip(), *unquote(pair.partition("=")[2]).split())
    ]
    in_forms = [form for value in secret_values for form in _forms(value)]
    values = dict.fromkeys([*in_forms, *in_urls, *map(unquote, in_urls), *in_headers])
    return tuple(secret for secret in values if len(secret) >= _SHORTEST_SECRET)


def _forms(secret: str) -> tuple[str, ...]:
    """A secret as it may be written: without white space around it, each line alone, and as in a URL."""
    lines = [line.strip() for line in (*secret.splitlines(), *secret.split("\\n"))]  # JSON writes \n for its ends
    return (secret, *lines, *(form for line in lines for form in (quote(line), quote(line, ""), unquote(line))))


def _secret_files(folder: str | None) -> dict[str, str]:
    """The texts of the small files in JOB_SECRETS_DIR, by name.

    Empty if the folder cannot be read: `SecretsFolder` then reports it.
    """
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
    variables = {name for name, value in environ.items() if value}
    projects: dict[str, str | None] = {}
    if settings.log.trackers == "off":
        return projects
    if environ.get("WANDB_MODE") != "disabled" and variables & {"WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"}:
        projects["wandb"] = None if "WANDB_PROJECT" in variables else PROJECT
    if "MLFLOW_TRACKING_URI" in variables:
        projects["mlflow"] = None if variables & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} else PROJECT
    return projects


def exporters(settings: Settings, environ: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """The metrics exporters to start (see `tracking.live_metrics`), by name, each with its arguments.

    OTLP is configured by OpenTelemetry's own variables, which its SDK reads itself; the report to a TrainJob by the
    variables that Kubeflow Trainer sets in its pods.
    """
    environ = os.environ if environ is None else environ
    arguments: dict[str, dict[str, Any]] = {}
    disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    otel_exporters = {name.strip() for name in (environ.get("OTEL_METRICS_EXPORTER") or "otlp").split(",")}
    if "otlp" in otel_exporters and not disabled and (_otlp("ENDPOINT", environ)):
        arguments["otlp"] = {"protocol": _otlp("PROTOCOL", environ) or "http/protobuf"}
    if settings.metrics.port is not None:
        arguments["prometheus"] = {"port": settings.metrics.port}
    if url := environ.get("KUBEFLOW_TRAINER_SERVER_URL"):
        files = {"token": "KUBEFLOW_TRAINER_SERVER_TOKEN", "authority": "KUBEFLOW_TRAINER_SERVER_CA_CERT"}
        arguments["train-job"] = {"url": url} | {name: environ.get(variable, "") for name, variable in files.items()}
    if settings.metrics.pod_annotation:
        arguments["pod-annotation"] = _pod(environ)
    return arguments


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


def plain_values(settings: Settings) -> dict[str, Any]:
    """Dotted name -> JSON-able value of every setting."""
    return {name: value for name, value, _ in describe(settings)}


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
