"""The places that settings come from, as sources of pydantic-settings; `Settings` has them in order of precedence.

pydantic-settings calls the sources one after the other, the strongest first, and merges what they return. A source here
returns raw values, which the fields' types then interpret (`field_types`), and records in the `Request` where each
value came from. Unlike pydantic-settings' own sources, these report unknown names, and all problems at once.

How to add a source: a subclass of `Source` with `_read`, and its place in `Settings.settings_customise_sources`.
"""

from __future__ import annotations

import ast
import json
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
)
from pydantic_settings import SettingsError as BadFolder

from job.common.config_files import ALIAS, GIVEN_TWICE, NotAllowedError, read_mapping, strict_yaml
from job.distributed.ranks import find_machines
from job.errors import Problem, environment_name
from job.platforms.detect import Platform
from job.platforms.sagemaker_copied_folder import copied_folder
from job.settings.field_types import new_run_id, split_items
from job.settings.layers import GivenValue, Layer
from job.settings.markers import BelongsTo, SageMakerChannel, find_markers, setting_names
from job.settings.presets import PRESETS
from job.settings.sagemaker_channels import read_channels

CONFIG = "config"  # the path of a settings file; not a setting itself
SECRETS_DIR = "secrets_dir"  # a folder of files that are named like variables; not a setting either
# Assumed upper bound of SageMaker's delay in copying a folder, for which it states no figure; a few GB take less.
COPIED_WITHIN_SECONDS = 300
_SHOWN_NAME = 80
_MOST_SIMILAR = 3
_NEAR_PART = 0.75  # similarity from which a word is taken for one in a setting's name: epohcs, epochs
_NEAR_GROUP = 0.75  # similarity (difflib's ratio) from which a name is taken for that of a group: modle, model
# Put into hyperparameters.json by SageMaker's own SDK and tuner.
_SAGEMAKER_PREFIXES = ("sagemaker_", "_tuning_")


_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("train_on_inputs", "assistant_only_loss", "completion_only_loss"), ("train.loss_on",)),
    **dict.fromkeys(("roles_to_train", "train_on_prompt"), ("train.loss_on",)),
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "train_batch_size"), ("train.global_batch_size",)
    ),
    "micro_batch_size": ("train.global_batch_size", "train.micro_batch_tokens"),
    **dict.fromkeys(("sequence_len", "max_seq_length", "model_max_length", "cutoff_len"), ("train.max_length",)),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "nproc_per_node", "num_processes"), ("run.processes",)),
    **dict.fromkeys(("nnodes", "num_nodes", "num_machines"), ("run.nodes",)),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), ("train.epochs",)),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), ("train.scheduler",)),
    "early_stopping_patience": ("train.stop_after",),
    "load_best_model_at_end": ("train.keep",),
    **dict.fromkeys(("lr", "max_lr"), ("train.learning_rate",)),
    "optim": ("train.optimizer",),
    "eval_steps": ("train.validate_every_steps",),
    "save_steps": ("checkpoint.every_steps",),
    "save_total_limit": ("checkpoint.keep",),
    **dict.fromkeys(("val_set_size", "eval_dataset", "test_datasets"), ("data.validation",)),
    **dict.fromkeys(("datasets", "dataset_name", "train_dataset"), ("data.source",)),
    **dict.fromkeys(("base_model", "model_name_or_path"), ("model.id",)),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), ("model.quantization",)),
    **dict.fromkeys(("lora_r", "r"), ("lora.rank",)),
    **dict.fromkeys(("loss_type", "rl"), ("train.method", "train.preference_loss")),
    **dict.fromkeys(("rl_beta", "dpo_beta"), ("train.beta",)),
    **dict.fromkeys(("init_lora_weights", "peft_init_lora_weights"), ("lora.init",)),
    "lora_target_linear": ("lora.target_modules",),
    "layers_to_transform": ("lora.layers",),
    "excess_length_strategy": ("data.on_long_row",),
    "output_dir": ("run.output",),
}
"""Names of options in TRL, PEFT and axolotl -> the settings that do the same here; difflib would suggest others."""


@dataclass(frozen=True)
class Request:
    """One reading of the settings: where to look, and the values of each source, the strongest first."""

    arguments: Sequence[str]
    environ: Mapping[str, str]
    platform: Platform
    options: Sequence[str] = ()
    """The command's own options, without dashes, to suggest for a mistyped name on the command line."""
    of_run: Mapping[str, object] = field(default_factory=dict)
    """The settings of the run in JOB_EXPORT__RUN that hold where no others are given, by dotted name."""
    layers: list[Layer] = field(default_factory=list)

    @property
    def given(self) -> dict[str, GivenValue]:
        """Dotted name -> the value of the strongest source that has one."""
        return {name: item for layer in reversed(self.layers) for name, item in layer.given.items() if name != CONFIG}

    @property
    def problems(self) -> list[Problem]:
        """The problems of all sources, the weakest source first."""
        return [problem for layer in reversed(self.layers) for problem in layer.problems]

    def strongest(self, name: str) -> GivenValue | None:
        """The value of a setting in the strongest of the sources read so far; None if none has it."""
        return next((layer.given[name] for layer in self.layers if name in layer.given), None)


class Source(PydanticBaseSettingsSource, ABC):
    """A source of settings. It is read after all stronger sources, whose values are in `request`."""

    def __init__(self, settings_cls: type[BaseSettings], request: Request) -> None:
        super().__init__(settings_cls)
        self.request = request
        self.names = setting_names(settings_cls)

    @abstractmethod
    def _read(self) -> Layer:
        """The values of this source by dotted name, and the problems in it."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002 - pydantic-settings' signature
        """Required by the base class, but not called: `__call__` returns all values at once."""
        return None, "", False

    def __call__(self) -> dict[str, Any]:
        """All values of this source, nested as the settings are."""
        layer = self._read()
        if (run_id := layer.given.get("run.id")) and run_id.value in (None, ""):
            del layer.given["run.id"]  # an empty name means the platform's, or a generated one
        self.request.layers.append(layer)
        return nested({name: item.value for name, item in layer.given.items() if name != CONFIG})


def nested(values: Mapping[str, object]) -> dict[str, Any]:
    """Values by dotted name as a tree, group -> name -> value."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        group, _, key = name.rpartition(".")
        # A mapping such as eval.data is one value; as a dict, pydantic-settings would merge it with a weaker source's.
        whole = MappingProxyType(value) if isinstance(value, dict) else value
        (tree.setdefault(group, {}) if group else tree)[key] = whole
    return tree


def _flat(tree: Mapping[str, Any]) -> dict[str, object]:
    """The inverse of `nested`: values by dotted name."""
    groups = {group: value if isinstance(value, dict) else {"": value} for group, value in tree.items()}
    return {f"{group}.{key}".rstrip("."): value for group, values in groups.items() for key, value in values.items()}


def _canonical(key: str) -> str:
    """The dotted name behind a spelling: `JOB_TRAIN__EPOCHS`, `train__epochs`, `train.Epochs` -> `train.epochs`."""
    return key.strip().lower().replace("-", "_").removeprefix("job_").replace("__", ".")


def setting_at(name: str, source: str) -> str:
    """A setting and the source of its value, as messages name them: `JOB_TRAIN__EPOCHS (file job.yaml)`."""
    variable = environment_name(name)
    return f"{variable} ({'environment' if source == f'environment {variable}' else source})"


class CommandLine(Source):
    """Options, `--train.epochs=3` or `--train.epochs 3`.

    pydantic-settings' own reader is not used: argparse exits at the first mistake, and repeats what was typed, which
    may be a secret.
    """

    def _read(self) -> Layer:
        layer = Layer()
        arguments = self.request.arguments
        remaining = iter(enumerate(arguments, start=1))
        for position, argument in remaining:
            if not argument.startswith("--"):
                layer.problems.append(self._no_option(argument, position))
                continue
            key, equals, value = argument.removeprefix("--").partition("=")
            follower = arguments[position] if position < len(arguments) else "--"
            if not equals and not follower.startswith("--"):
                value = next(remaining)[1]
            name = _canonical(key)
            if name not in self.names and name != CONFIG:
                known = (*self.names, CONFIG, *self.request.options)
                layer.problems.append(_unknown("command line --", key, known, lambda name: f"--{name}"))
            elif not equals and follower.startswith("--"):
                layer.problems.append(Problem(f"command line --{key}", f"needs a value: --{key}=VALUE"))
            else:
                layer.given[name] = GivenValue(value, "command line")
        return layer

    def _no_option(self, argument: str, position: int) -> Problem:
        """The problem of an argument that does not begin with two dashes."""
        key = argument.partition("=")[0].lstrip("-")
        if argument.startswith("-") and _canonical(key) in self.names:
            return Problem(f"command line -{key}", f"has one dash; write --{key}")
        if argument.startswith("-") and len(key) == 1:
            what = "is not an option; `qlora-job --version` prints the version, `qlora-job --help` what can be given"
            return Problem(f"command line -{key}", what)
        if argument.startswith("-") or any(one.startswith("-") for one in self.request.arguments[:position]):
            # Not repeated: it may be a secret, or behind an option a part of one that has spaces.
            what = "is not a setting; settings are given as --group.name=value, a value with spaces in quotes"
            return Problem(f"command line, argument {position}", what)
        word = ascii(argument[:_SHOWN_NAME])[1:-1]
        what = (
            f"is not a setting; the name of a run is given as --run.id {word}, its data as --data.source PATH, a file "
            "with settings as --config PATH"
        )
        return Problem(f"command line {word}", what)


class Environment(Source):
    """Variables `JOB_GROUP__NAME`, read by pydantic-settings' own source."""

    def _read(self) -> Layer:
        environ, platform = self.request.environ, self.request.platform
        job_variables = {variable: text for variable, text in environ.items() if variable.startswith("JOB_")}
        names = (*self.names, CONFIG, SECRETS_DIR)
        variables = {environment_name(name) for name in names}
        found = _by_variable(
            EnvSettingsSource(self.settings_cls), {v: job_variables[v] for v in job_variables.keys() & variables}
        )
        return Layer(
            {name: GivenValue(value, f"environment {environment_name(name)}") for name, value in found.items()},
            [
                _unknown("environment ", variable, names, environment_name)
                for variable in sorted(job_variables.keys() - variables)
                if not platform.sets(variable, environ[variable])
            ],
        )


class SecretsFolder(Source):
    """Files named like variables in the folder that JOB_SECRETS_DIR names, as Docker and Kubernetes mount secrets.

    Read by pydantic-settings' own source. Files whose names do not begin with JOB_ are ignored.
    """

    def _read(self) -> Layer:
        variable = environment_name(SECRETS_DIR)
        folder = self.request.environ.get(variable)
        if not folder:
            return Layer()
        if not Path(folder).is_dir():
            return Layer(
                problems=[Problem(f"{variable} (environment)", "is not a folder; mount it, or unset the variable")]
            )
        try:
            reader = NestedSecretsSettingsSource(SecretsSettingsSource(self.settings_cls, secrets_dir=folder))
        except (OSError, ValueError, BadFolder):  # whose message may quote a file
            what = "is a folder with a file that is not text, or has more than 16 MiB; correct it"
            return Layer(problems=[Problem(f"{variable} (environment)", what)])
        texts = {name.upper(): text for name, text in reader.env_vars.items() if text is not None}
        names = (*self.names, CONFIG)
        variables = {environment_name(name) for name in names}
        found = _by_variable(reader, {name: texts[name] for name in texts.keys() & variables})
        unknown = sorted(name for name in texts if name.startswith("JOB_") and name not in variables)
        return Layer(
            {name: GivenValue(value, f"secret {environment_name(name)}") for name, value in found.items()},
            [_unknown("secret ", name, names, environment_name) for name in unknown],
        )


def _by_variable(reader: EnvSettingsSource, texts: Mapping[str, str]) -> dict[str, object]:
    """Raw values by dotted name; pydantic-settings maps each variable to its setting."""
    reader.env_vars = {variable.lower(): text for variable, text in texts.items()}
    found = _flat(reader())
    if (config := texts.get(environment_name(CONFIG))) is not None:
        found[CONFIG] = config
    return found


class Hyperparameters(Source):
    """SageMaker's hyperparameters.json, where everything is a string: JSON ('3', '"nf4"') or Python's literals.

    SDK v3 and the console write JSON, SDK v2 writes what `str` makes of a value (`['q_proj', 'v_proj']`, `None`). A
    group may be an object: `train` = '{"epochs": 1}'.
    """

    def _read(self) -> Layer:
        path, source = self.request.platform.hyperparameters, "hyperparameters.json"
        if path is None or not path.is_file():
            return Layer()
        content = read_mapping(path, json.loads)
        if isinstance(content, str):
            return Layer(problems=[Problem(source, content)])
        names = (*self.names, CONFIG)
        groups = {name.partition(".")[0] for name in names if "." in name}
        hyperparameters = {
            key: _decoded(value, group=_canonical(str(key)) in groups)
            for key, value in content.items()
            if not str(key).startswith(_SAGEMAKER_PREFIXES)
        }
        # Here a name may be written without its dot, as tuners and templates do: train-learning-rate.
        return _from_tree(hyperparameters, source, names, {name.replace(".", "_"): name for name in names})


class ConfigFile(Source):
    """The YAML or TOML file that `--config` or JOB_CONFIG names.

    pydantic-settings' own readers are not used: they treat a missing file, and one that contains a list, as empty.
    """

    def _read(self) -> Layer:
        config = self.request.strongest(CONFIG)
        if config is None or not config.value:
            return Layer()
        path, where = Path(str(config.value)), setting_at(CONFIG, config.source)
        parsers: dict[str, Callable[[str], object]] = {
            ".yaml": _parse_yaml,
            ".yml": _parse_yaml,
            ".toml": tomllib.loads,
        }
        if path.suffix.lower() not in parsers:
            return Layer(problems=[Problem(where, f"must name a .yaml, .yml or .toml file, not {path}")])
        content = read_mapping(path, parsers[path.suffix.lower()])
        if isinstance(content, str):
            return Layer(problems=[Problem(where, f"the file {path} {content}")])
        return _from_tree(content, f"file {path}", self.names)


class SageMakerChannels(Source):
    """Input channels of a SageMaker job that set settings; a problem for each channel that is not used."""

    def _read(self) -> Layer:
        channels = {mark.name: name for name, mark in find_markers(self.settings_cls, SageMakerChannel).items()}
        texts = [str(item.value) for layer in self.request.layers for item in layer.given.values()]
        return read_channels(self.request.platform.inputs, channels, [*texts, *self.request.environ.values()])


class RunToExport(Source):
    """The settings of the run in JOB_EXPORT__RUN, an id made of its id and the formats, and a folder beside it."""

    def _read(self) -> Layer:
        run = self.request.strongest("export.run")
        source = f"run {run.value}" if run else ""
        given = {name: GivenValue(value, source) for name, value in self.request.of_run.items()}
        platform = self.request.platform
        # The platform's own name for this run, and the folder that it keeps, are not replaced.
        for name, own in {"run.id": platform.run_id, "run.output": platform.output}.items():
            if own is not None:
                given.pop(name, None)
        return Layer(given, by_user=False)


class Preset(Source):
    """The values of the selected preset, without those for a model or data set that was replaced.

    A preset's revision, number of rows or need for a GPU apply to the model and data that it names (`BelongsTo` in the
    schema). With another model or data set the defaults are used instead.
    """

    def _read(self) -> Layer:
        selected = self.request.strongest("preset")
        name = selected.value if selected else next(iter(PRESETS))
        values = dict(PRESETS.get(name, {})) if isinstance(name, str) else {}
        values = {key: self._asked(value) if key == "eval.data" else value for key, value in values.items()}
        return Layer(
            {
                key: GivenValue(value, f"preset {name}")
                for key, value in values.items()
                if self._still_holds(key, values)
            },
            by_user=False,
        )

    def _asked(self, questions: Any) -> Mapping[str, object]:
        """The preset's files of questions of tasks that JOB_EVAL__TASKS names; without a valid setting, all.

        Not of tasks that are only in a group: its aggregate figure would mix the benchmark's questions with made-up
        ones. Who wants that names the file in JOB_EVAL__DATA.
        """
        tasks = self.request.strongest("eval.tasks")
        try:
            named = None if tasks is None else split_items(tasks.value)
        except ValueError:  # which is reported with the setting
            named = None
        return {task: file for task, file in questions.items() if not isinstance(named, Collection) or task in named}

    def _still_holds(self, name: str, preset: Mapping[str, object]) -> bool:
        belongs = find_markers(self.settings_cls, BelongsTo).get(name)
        stronger = self.request.strongest(belongs.subject) if belongs else None
        return belongs is None or stronger is None or same(stronger.value, preset.get(belongs.subject))


def same(first: object, second: object) -> bool:
    """Whether two raw values of a model or data set are the same text."""
    return str(first).strip() == str(second).strip()


class PlatformDefaults(Source):
    """Values from the platform, such as run id and number of machines; every other source overrides them."""

    def _read(self) -> Layer:
        platform = self.request.platform
        folder = copied_folder(platform.inputs) or platform.output
        values = {
            **find_machines(platform).settings,
            "run.id": platform.run_id,
            "run.output": folder and str(folder),
            "run.grace_seconds": platform.grace_seconds,
        }
        output = self.request.strongest("run.output")
        if folder and (output is None or Path(str(output.value)).is_relative_to(folder)):
            values["checkpoint.settle_seconds"] = COPIED_WITHIN_SECONDS
        given = {name: GivenValue(value, "platform") for name, value in values.items() if value is not None}
        given.setdefault("run.id", GivenValue(new_run_id(), "generated"))
        return Layer(given, by_user=False)


def _decoded(value: object, *, group: bool) -> object:
    """A hyperparameter's value; with `group`, the hyperparameter may be a JSON object of a group's settings."""
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return _python_literal(value)
    if group and isinstance(decoded, Mapping):
        return decoded
    # Otherwise only the quotes are removed here: lists and numbers are parsed by the fields' types.
    return decoded if decoded is None or isinstance(decoded, str) else value


def _python_literal(text: str) -> object:
    """The value of None, a list, a tuple (returned as a list) or a dict in Python's notation; other text unchanged."""
    if text != "None" and not text.startswith(("[", "(", "{")):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return list(value) if isinstance(value, tuple) else value


def _parse_yaml(text: str) -> object:
    import yaml

    try:
        tree = strict_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1} column {mark.column + 1}" if mark else ""
        if (what := getattr(error, "problem", None)) in {GIVEN_TWICE, ALIAS}:
            raise NotAllowedError(f"{place}: {what}") from None
        raise ValueError(place) from None
    return {} if tree is None else tree


def _from_tree(
    tree: Mapping[object, object], source: str, names: Collection[str], flat: Mapping[str, str] | None = None
) -> Layer:
    """The settings in a mapping; `flat` maps other spellings, with underscores only, to dotted names."""
    layer = Layer()
    for key, value in _leaves(tree, "", {name.partition(".")[0] for name in names if "." in name}):
        name = (flat or {}).get(_canonical(key), _canonical(key))
        if name not in names:
            layer.problems.append(_unknown(f"{source} ", key, names, str))
        elif name in layer.given:
            layer.problems.append(Problem(setting_at(name, source), "is given twice, in two spellings; keep one"))
        else:
            layer.given[name] = GivenValue(value, source)
    return layer


def _leaves(tree: Mapping[object, object], prefix: str, groups: Collection[str]) -> Iterator[tuple[str, object]]:
    """(dotted key, value) of a mapping whose groups may be nested mappings or dotted keys. A group may be empty."""
    for key, value in tree.items():
        if not prefix and _canonical(str(key)) in groups and (value is None or isinstance(value, Mapping)):
            yield from _leaves(value or {}, f"{key}.", groups)
        else:
            yield f"{prefix}{key}", value


def _unknown(where: str, key: str, names: Collection[str], spell: Callable[[str], str]) -> Problem:
    """The problem of an unknown name, with the nearest known one in the spelling of that source."""
    written_name = ascii(key[:_SHOWN_NAME])[1:-1]
    members = [spell(name) for name in names if name.startswith(_canonical(key) + ".")]
    if members:
        what = f"is a group of settings; use one of its settings, such as {members[0]}"
        return Problem(where + written_name, what)
    if own := _ELSEWHERE.get(_canonical(key).rpartition(".")[2]):
        return Problem(where + written_name, f"is not a setting of this job; use {' or '.join(map(spell, own))}")
    # JOB_MODEL_ID has one underscore where there are two; that is surer than a similar name.
    if (with_group := _canonical(key).replace("_", ".", 1)) in names:
        return Problem(where + written_name, f"is not a setting; the nearest is {spell(with_group)}")
    groups = {name.partition(".")[0] for name in names if "." in name}
    group = get_close_matches(_canonical(key[:_SHOWN_NAME]), groups, n=1, cutoff=_NEAR_GROUP)
    if group and not _canonical(key).startswith(f"{group[0]}."):  # the group of train.lr is right
        return Problem(
            where + written_name, f"is not a setting; the nearest is the group of settings {spell(group[0])}"
        )
    if nearest := _nearest(_canonical(key[:_SHOWN_NAME]), names):
        return Problem(where + written_name, f"is not a setting; the nearest is {' or '.join(map(spell, nearest))}")
    return Problem(
        where + written_name, "is not a setting, and none has a similar name; `qlora-job config` lists all settings"
    )


def similar_names(word: str, names: Collection[str]) -> list[str]:
    """The groups and settings that a word may mean which names none, the likeliest first: at most `_MOST_SIMILAR`."""
    key = _canonical(word[:_SHOWN_NAME])
    last = key.rpartition(".")[2]
    parts: dict[str, list[str]] = {}  # the last part of a name, and each of its words -> the names
    for name in names:
        whole = name.rpartition(".")[2]
        for part in dict.fromkeys([whole, *whole.split("_")]):
            parts.setdefault(part, []).append(name)
    groups = {name.partition(".")[0]: None for name in names if "." in name}
    group = [name for name in groups if key.startswith(name)]
    group = group or get_close_matches(key, groups, n=1, cutoff=_NEAR_GROUP)
    near = [name for part in get_close_matches(last, parts, cutoff=_NEAR_PART) for name in parts[part]]
    return list(dict.fromkeys([*_ELSEWHERE.get(last, ()), *group, *near]))[:_MOST_SIMILAR]


def _nearest(key: str, names: Collection[str]) -> list[str]:
    """Suggestions for a mistyped name: settings of this name in any group, else the most similar name."""
    group, _, last = key.rpartition(".")
    groups = {"", *(name.partition(".")[0] for name in names)}
    of_a_group = [name for name in names if name.rpartition(".")[2] == last] if group in groups else []
    return of_a_group or get_close_matches(key, names, n=1)
