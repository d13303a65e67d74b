"""The settings of this run: collected, checked, explained. The only reader of the environment.

A setting is given as `JOB_GROUP__NAME` in the environment, `--group.name` on the command line, `group.name` in
SageMaker's hyperparameters, and as a nested mapping in a file: `groups` has the names, `collect` the precedence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.distributed.ranks import VARIABLES, Place, find_faults, find_machines, find_place
from job.errors import Problem, SettingsError
from job.platforms.detect import Platform, detect
from job.platforms.sagemaker import copied_folder
from job.settings.field_types import explain
from job.settings.layers import GivenValue
from job.settings.presets import PRESETS
from job.settings.schema import NAMES, Settings, new_run_id
from job.settings.sources import collect
from job.storage.location import is_remote

__all__ = [
    "Settings",
    "current_place",
    "current_platform",
    "describe",
    "json_schema",
    "load_reading",
    "load_settings",
    "new_run_id",
    "preset_values",
    "redacted",
    "secrets",
    "trackers",
]

_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY_ID)(?!.*(FILE|DIR|PATH)$)", re.IGNORECASE)
_LOGIN = re.compile(r"://([^/@\s]+:[^/@\s]+@)")  # of a tracker's or a proxy's address
_SHORTEST_SECRET = 8

READING = ("storage.", "log.")
"""Groups of the settings that count where published runs are read."""
# How far SageMaker's copy of a folder may lag behind; it gives no figure, an upload of a few GB takes less than this.
COPIED_WITHIN_SECONDS = 300
PROJECT = "qlora-job"
"""What a tracker files runs under, unless the user says otherwise."""

Fault = tuple[str, str]
"""Name of a setting, and what is wrong with it beside the others."""


def load_settings(arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Settings:
    """The settings that arguments, environment, hyperparameters, file and preset add up to.

    Raises:
        SettingsError: With all problems at once, each with the place its value came from.
    """
    environ = os.environ if environ is None else environ
    platform = detect(environ)
    layer = collect(NAMES, arguments, environ, platform, PRESETS)
    machines = find_machines(platform)
    settings, wrong = _validated(_with_defaults_of(platform, machines.settings, layer.given))
    problems = [*layer.problems, *wrong.values()]
    if machines.fault:
        problems.append(Problem("resourceconfig.json", machines.fault))
    faults = [
        *_processes(settings, environ),
        *_places(settings, platform),
        *_pins(settings),
        *_tasks(settings),
        *_gate(settings),
    ]
    sources = {**settings.sources, **dict.fromkeys(VARIABLES, "environment")}
    problems += [Problem(f"{name} ({sources[name]})", what) for name, what in faults if name not in wrong]
    if problems:
        raise SettingsError(problems)
    return settings


def load_reading(arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Settings:
    """The settings for a command that only reads published runs: how to reach them, and how to log.

    What else is set, say in an environment that a run shares, is left alone and has its default in what is returned.

    Raises:
        SettingsError: With all problems at once.
    """
    environ = os.environ if environ is None else environ
    layer = collect(NAMES, arguments, environ, detect(environ), PRESETS)
    useful = {name: item for name, item in layer.given.items() if name.startswith(READING)}
    settings, wrong = _validated(useful)
    useless = [
        Problem(f"{name} (command line)", f"is of no use here; only {' and '.join(READING)} settings are")
        for name, item in layer.given.items()
        if item.source == "command line" and name not in useful
    ]
    if problems := [*layer.problems, *useless, *wrong.values()]:
        raise SettingsError(problems)
    return settings


def _with_defaults_of(
    platform: Platform, machines: Mapping[str, object], given: Mapping[str, GivenValue]
) -> dict[str, GivenValue]:
    """What is given, and what the platform says, of itself and of the run's machines, where nothing is."""
    folder = copied_folder(platform.inputs) or platform.output
    said = {
        **machines,
        "run.id": platform.run_id,
        "run.output": folder and str(folder),
        "run.grace_seconds": platform.grace_seconds,
    }
    whole = {name: GivenValue(value, "platform") for name, value in said.items() if value is not None}
    whole |= {name: item for name, item in given.items() if name != "run.id" or item.value not in (None, "")}
    whole.setdefault("run.id", GivenValue(new_run_id(), "generated"))
    if folder and Path(str(whole["run.output"].value)).is_relative_to(folder):
        whole.setdefault("checkpoint.settle_seconds", GivenValue(COPIED_WITHIN_SECONDS, "platform"))
    return whole


def current_platform(environ: Mapping[str, str] | None = None) -> Platform:
    """The platform this process runs on. It needs no valid settings: their errors are reported by its means."""
    return detect(os.environ if environ is None else environ)


def current_place(environ: Mapping[str, str] | None = None) -> Place | None:
    """Which process of how many torchrun or our own launcher says this is; None where they started none.

    Call it when `load_settings` found no fault.
    """
    return find_place(os.environ if environ is None else environ)


def environment() -> dict[str, str]:
    """A copy of the environment, for processes that the job starts."""
    return dict(os.environ)


def secrets(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The credentials in the environment, by the ecosystem's own names, so that the log can leave them out."""
    environ = os.environ if environ is None else environ
    named = [value for name, value in environ.items() if _SECRET.search(name)]
    in_urls = [found for value in environ.values() for found in _LOGIN.findall(value)]
    return tuple(secret for secret in (*named, *in_urls) if len(secret) >= _SHORTEST_SECRET)


def trackers(settings: Settings, environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """The experiment trackers that the environment asks for by their own names, and the project to put the run into.

    The project is None where the user named one by the tracker's own variable, which it then reads itself.
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


def describe(settings: Settings) -> list[tuple[str, Any, str]]:
    """(dotted name, JSON-able value, source) of every setting, in their order here."""
    tree = settings.model_dump(mode="json")  # writes a SecretStr as asterisks
    flat = {
        name: tree[group] if not key else tree[group][key] for name in NAMES for group, _, key in [name.partition(".")]
    }
    return [(name, flat[name], settings.sources[name]) for name in NAMES]


def redacted(settings: Settings) -> dict[str, dict[str, Any]]:
    """Dotted name -> {"value", "source"}, for the manifest."""
    return {name: {"value": value, "source": source} for name, value, source in describe(settings)}


def preset_values(preset: str) -> dict[str, Any]:
    """Dotted name -> JSON-able value of every setting as the preset has it; empty for one that is not known here."""
    if preset not in PRESETS:
        return {}
    given = {"preset": preset, **PRESETS[preset]}
    settings, _ = _validated({name: GivenValue(value, "preset") for name, value in given.items()})
    return {name: value for name, value, _ in describe(settings)}


def json_schema() -> dict[str, Any]:
    """JSON Schema of all settings, as a file of settings nests them."""
    return Settings.model_json_schema()


def _validated(given: Mapping[str, GivenValue]) -> tuple[Settings, dict[str, Problem]]:
    """Settings from all values that are right alone, and a problem for each that is not."""
    tree: dict[str, Any] = {}
    for name, item in given.items():
        group, _, key = name.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[key] = item.value
    sources = {name: item.source for name, item in given.items()}
    try:
        return Settings.model_validate(tree, context=sources), {}
    except ValidationError as error:
        wrong: dict[str, Problem] = {}
        for record in error.errors(include_url=False, include_input=False):
            name = ".".join(map(str, record["loc"][: 1 if record["loc"][0] == "preset" else 2]))
            wrong.setdefault(name, Problem(f"{name} ({sources[name]})", explain(record)))
        # No check spans two settings, so what is left is valid and the checks on combinations can go on.
        rest, _ = _validated({name: item for name, item in given.items() if name not in wrong})
        return rest, wrong


def _processes(settings: Settings, environ: Mapping[str, str]) -> Iterator[Fault]:
    run = settings.run
    if faults := list(find_faults(environ)):
        yield from faults
        return
    place = find_place(environ)
    if place is None and run.nodes > 1:
        if run.rendezvous is None:
            yield "run.rendezvous", "must be given where run.nodes is more than 1: host:port of machine 0, on all alike"
        if run.node_rank >= run.nodes:
            yield "run.node_rank", f"counts from 0, so it must be less than run.nodes, {run.nodes}; change one"
    several = run.nodes > 1 if place is None else place.world_size > 1
    if several and settings.sources["run.id"] == "generated":
        yield "run.id", "must be given: each machine or process would make up its own"


def _places(settings: Settings, platform: Platform) -> Iterator[Fault]:
    output, cache = settings.run.output, settings.storage.cache
    own = copied_folder(platform.inputs) or platform.output
    if own and settings.run.nodes > 1 and Path(output).is_relative_to(own):
        yield "run.output", "is a folder of this machine alone; with several machines give s3://bucket/prefix"
    if not is_remote(output) and (why := _why_not_writable(Path(output) / settings.run.id)):
        yield "run.output", why
    if cache and (why := _why_not_writable(Path(cache))):
        yield "storage.cache", why


def _why_not_writable(path: Path) -> str | None:
    """Why a folder of this name cannot be made or written to; None when it can. Creates nothing."""
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
            return f"cannot be written: {place} is not writable for this user; mount it writable or give another path"
        return None
    return "cannot be written: no folder above it exists; give another path"


def _pins(settings: Settings) -> Iterator[Fault]:
    for name, place, pin in (
        ("model.revision", settings.model.id, settings.model.revision),
        ("data.revision", settings.data.source, settings.data.revision),
    ):
        if pin and (is_remote(place) or place.startswith(("/", "."))):
            yield name, "pins a commit of a hub repository, but what is pinned is a path or s3:// URI; remove it"


def _tasks(settings: Settings) -> Iterator[Fault]:
    # A preset's files may serve none of the tasks that the user asks for; the user's own files are meant to be used.
    own = not settings.sources["eval.data"].startswith("preset")
    if own and not set(settings.eval.data) <= set(settings.eval.tasks):
        named = " (a channel's files are named after their tasks)" * settings.sources["eval.data"].startswith(
            "sagemaker channel"
        )
        what = f"has a file for a task that is not in eval.tasks{named}; add the task there, or drop the file"
        yield "eval.data", what


def _gate(settings: Settings) -> Iterator[Fault]:
    gain, loss = settings.gate.min_delta, settings.gate.max_regression
    if settings.sources["gate.metric"] != "default" and gain is None and loss is None:
        yield "gate.metric", "has no threshold; give gate.min_delta or gate.max_regression as well"
    if settings.gate.baseline is not None and gain is None and loss is None:
        yield "gate.baseline", "has no threshold; give gate.min_delta or gate.max_regression as well"
    if gain is not None and loss is not None and gain < -loss:
        yield "gate.min_delta", "allows a greater loss than gate.max_regression; raise it, or remove one of the two"
