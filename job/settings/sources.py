"""Collects settings from wherever they may be given, each with the place it came from.

pydantic-settings is not used for this: it drops unknown names at the top level, stops at the first value it cannot
parse, and does not say where a value came from. Here a layer is a flat mapping from the dotted name of a setting to its
raw value; `fieldtypes` gives raw values their meaning.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from job.common.config_files import read_mapping
from job.errors import Problem
from job.platforms.detect import Platform
from job.settings.layers import GivenValue, Layer
from job.settings.sagemaker_channels import read_channels

CONFIG = "config"  # names a file of settings; it is no setting itself
_SHOWN_NAME = 80
# A pinned revision belongs to one repository, a need for a GPU to one model: who names another leaves them behind.
_PINS = {"model.id": ("model.revision", "run.device"), "data.source": ("data.revision",)}
# Put into hyperparameters.json by SageMaker's own SDK and tuner.
_SAGEMAKER_PREFIXES = ("sagemaker_", "_tuning_")


def collect(
    names: Collection[str],
    arguments: Sequence[str],
    environ: Mapping[str, str],
    platform: Platform,
    presets: Mapping[str, Mapping[str, object]],
) -> Layer:
    """All that is given, by precedence: command line > environment > hyperparameters.json > file > channels > preset.

    Args:
        names: The dotted names of all settings.
        arguments: Command line overrides, `--train.epochs=3` or `--train.epochs 3`.
        environ: Environment variables; those that begin with `JOB_` are read.
        platform: Where the job runs.
        presets: Preset name -> dotted name -> value. The name is itself a setting, `preset`.
    """
    direct = [
        _from_hyperparameters(platform.hyperparameters, names),
        _from_environment(environ, names, platform),
        _from_command_line(arguments, names),
    ]
    config = _last(CONFIG, direct)
    file = _from_file(config, names) if config and config.value else Layer()
    chosen = _last("preset", [file, *direct]) or GivenValue(next(iter(presets)), "default")
    values = presets.get(chosen.value, {}) if isinstance(chosen.value, str) else {}
    preset = Layer({name: GivenValue(value, f"preset {chosen.value}") for name, value in values.items()})
    settled = [str(item.value) for layer in (file, *direct) for item in layer.given.values()]
    channels = read_channels(platform.inputs, [*settled, *environ.values()])
    layers = [preset, channels, file, *direct]
    given = _merge([layer.given for layer in layers])
    given.pop(CONFIG, None)
    return Layer(given, [problem for layer in layers for problem in layer.problems])


def environment_name(name: str) -> str:
    """`train.epochs` -> `JOB_TRAIN__EPOCHS`."""
    return "JOB_" + name.upper().replace(".", "__")


def _canonical(key: str) -> str:
    """The dotted name behind a spelling: `JOB_TRAIN__EPOCHS`, `train__epochs`, `train.Epochs` -> `train.epochs`."""
    return key.strip().lower().replace("-", "_").removeprefix("job_").replace("__", ".")


def _last(name: str, layers: Sequence[Layer]) -> GivenValue | None:
    return next((layer.given[name] for layer in reversed(layers) if name in layer.given), None)


def _merge(layers: Sequence[Mapping[str, GivenValue]]) -> dict[str, GivenValue]:
    """Later layers win; a pin goes when the thing it pins is replaced."""
    merged: dict[str, GivenValue] = {}
    for layer in layers:
        for pinned, pins in _PINS.items():
            if pinned in layer and pinned in merged and layer[pinned].value != merged[pinned].value:
                for pin in pins:
                    merged.pop(pin, None)
        merged.update(layer)
    return merged


def _from_environment(environ: Mapping[str, str], names: Collection[str], platform: Platform) -> Layer:
    layer = Layer()
    known = {environment_name(name): name for name in (*names, CONFIG)}
    for variable in sorted(environ):
        if variable in known:
            layer.given[known[variable]] = GivenValue(environ[variable], f"environment {variable}")
        elif variable.startswith("JOB_") and not platform.sets(variable):
            layer.problems.append(_unknown("environment ", variable, (*names, CONFIG), environment_name))
    return layer


def _from_command_line(arguments: Sequence[str], names: Collection[str]) -> Layer:
    layer = Layer()
    rest = iter(enumerate(arguments, start=1))
    for position, argument in rest:
        if not argument.startswith("--"):
            # The argument is not repeated: it may be a secret that was left over.
            where = f"command line, argument {position}"
            layer.problems.append(Problem(where, "is no setting; settings are given as --group.name=value"))
            continue
        key, equals, value = argument.removeprefix("--").partition("=")
        follower = arguments[position] if position < len(arguments) else "--"
        if not equals and not follower.startswith("--"):
            value = next(rest)[1]
        name = _canonical(key)
        if name not in names and name != CONFIG:
            layer.problems.append(_unknown("command line --", key, (*names, CONFIG), lambda known: f"--{known}"))
        elif not equals and follower.startswith("--"):
            layer.problems.append(Problem(f"command line --{key}", f"needs a value: --{key}=VALUE"))
        else:
            layer.given[name] = GivenValue(value, "command line")
    return layer


def _from_hyperparameters(path: Path | None, names: Collection[str]) -> Layer:
    """SageMaker makes a string of everything, some of its SDKs by way of JSON: '3', '"nf4"', 'null'."""
    source = "hyperparameters.json"
    if path is None or not path.is_file():
        return Layer()
    content = read_mapping(path, json.loads)
    if isinstance(content, str):
        return Layer(problems=[Problem(source, content)])
    own = {key: _unquoted(value) for key, value in content.items() if not str(key).startswith(_SAGEMAKER_PREFIXES)}
    known = (*names, CONFIG)
    # Here a name may be written without its dot, as tuners and templates like it: train-learning-rate.
    return _from_tree(own, source, known, {name.replace(".", "_"): name for name in known})


def _unquoted(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    # Only the quotes come off here: what a list or a number means is decided where its type is known.
    return decoded if decoded is None or isinstance(decoded, str) else value


def _from_file(config: GivenValue, names: Collection[str]) -> Layer:
    path = Path(str(config.value))
    where = f"{CONFIG} ({config.source})"
    parsers: dict[str, Callable[[str], object]] = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".toml": tomllib.loads}
    if path.suffix.lower() not in parsers:
        return Layer(problems=[Problem(where, "must name a .yaml, .yml or .toml file")])
    content = read_mapping(path, parsers[path.suffix.lower()])
    if isinstance(content, str):
        return Layer(problems=[Problem(where, f"the file {content}")])
    return _from_tree(content, f"file {path}", names)


def _parse_yaml(text: str) -> object:
    import yaml

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"line {mark.line + 1}" if mark else "") from None
    return {} if tree is None else tree


def _from_tree(
    tree: Mapping[object, object], source: str, names: Collection[str], flat: Mapping[str, str] | None = None
) -> Layer:
    """What a mapping gives; `flat` has other spellings of names, all in underscores."""
    layer = Layer()
    for key, value in _leaves(tree, "", {name.partition(".")[0] for name in names if "." in name}):
        name = (flat or {}).get(_canonical(key), _canonical(key))
        if name not in names:
            layer.problems.append(_unknown(f"{source} ", key, names, str))
        elif name in layer.given:
            layer.problems.append(Problem(f"{name} ({source})", "is given twice, in two spellings; keep one"))
        else:
            layer.given[name] = GivenValue(value, source)
    return layer


def _leaves(tree: Mapping[object, object], prefix: str, groups: Collection[str]) -> Iterator[tuple[str, object]]:
    """(dotted key, value) of a mapping whose groups may be nested mappings or dotted keys. An empty group is fine."""
    for key, value in tree.items():
        if not prefix and _canonical(str(key)) in groups and (value is None or isinstance(value, Mapping)):
            yield from _leaves(value or {}, f"{key}.", groups)
        else:
            yield f"{prefix}{key}", value


def _unknown(where: str, key: str, names: Collection[str], spell: Callable[[str], str]) -> Problem:
    """The problem of a name that is none, with the nearest that is, spelled as it would be in that place."""
    shown = ascii(key[:_SHOWN_NAME])[1:-1]
    members = [spell(name) for name in names if name.startswith(_canonical(key) + ".")]
    if members:
        return Problem(where + shown, f"is a group of settings, not one of them; give {', '.join(members)}")
    nearest = get_close_matches(_canonical(key[:_SHOWN_NAME]), names, n=1, cutoff=0.0)[0]
    return Problem(where + shown, f"is no setting; the nearest is {spell(nearest)}")
