r"""Tasks that users describe themselves: a YAML file in lm-eval's format, with its data next to it.

    task: my_arithmetic
    output_type: generate_until
    dataset_path: json
    dataset_kwargs:
      data_files: {test: questions.jsonl, train: examples.jsonl}
    test_split: test
    fewshot_split: train
    num_fewshot: 3
    doc_to_text: "Question: {{question}}\nAnswer:"
    doc_to_target: " {{answer}}"
    generation_kwargs: {until: ["\n"], max_gen_toks: 16}
    metric_list:
      - {metric: exact_match, aggregation: mean, higher_is_better: true}

A file may also describe a group, of tasks in files next to it or of lm-eval's, and how its figure is computed:

    group: my_group
    task: [my_arithmetic.yaml, arc_easy]
    aggregate_metric_list:
      - {metric: acc, weight_by_size: false}

The file may have come from anywhere, so nothing in it can run code: only plain YAML is read, only the fields of
`FIELDS` are taken, data is read by this job's own readers from the file's folder, metrics, filters and aggregations are
lm-eval's own, by name, and templates are rendered in Jinja's sandbox (`tasks.compiled_once`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from job.common.config_files import strict_yaml
from job.data.formats import Row, RowError, read_rows, reader_of
from job.errors import DataError, Problem, SettingsError

ENDINGS = (".yaml", ".yml")
OWN = Path(__file__).with_name("own_tasks")
MAX_BYTES = 1 << 16
MAX_BRACKETS = 2_000
"""PyYAML takes the square of the depth of nested brackets, minutes for a file of this size."""
MOST = 100
"""Examples in a prompt, or answers to one question."""
FORMATS = ("json", "csv", "parquet", "arrow")
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
TEXTS = (
    "task",
    "task_alias",
    "output_type",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "description",
    "gen_prefix",
    "target_delimiter",
    "fewshot_delimiter",
)
FIELDS = frozenset(
    {
        *SPLITS,
        *TEXTS,
        "dataset_path",
        "dataset_name",
        "dataset_kwargs",
        "tag",
        "num_fewshot",
        "fewshot_config",
        "repeats",
    }
    | {"generation_kwargs", "filter_list", "metric_list", "metadata", "should_decontaminate"}
    | {"doc_to_decontamination_query"}
)
"""The fields of lm-eval's tasks that name no code and lead nowhere else."""
GROUP_FIELDS = frozenset({"group", "group_alias", "task", "aggregate_metric_list", "metadata"})
AGGREGATED = frozenset({"metric", "filter_list", "aggregation", "weight_by_size"})
"""The fields of an entry of `aggregate_metric_list`."""


@dataclass(frozen=True)
class TaskFile:
    """A user's own task.

    Attributes:
        name: Its own.
        path: Path of the file, as in the settings.
        config: What lm-eval takes, without the data.
        rows: By split.
        source: Where the questions are.
        sha256: SHA-256 of the file, hexadecimal.
    """

    name: str
    path: str
    config: Mapping[str, Any]
    rows: Mapping[str, list[Row]]
    source: str
    sha256: str


@dataclass(frozen=True)
class GroupFile:
    """A user's own group of tasks.

    Attributes:
        name: Its own.
        path: Path of the file, as in the settings.
        config: What lm-eval takes, without the tasks.
        members: lm-eval's names of tasks and groups, and the tasks of files next to it.
        sha256: SHA-256 of the file, hexadecimal.
    """

    name: str
    path: str
    config: Mapping[str, Any]
    members: tuple[str | TaskFile, ...]
    sha256: str


def is_task_file(name: str) -> bool:
    """Whether a name in JOB_EVAL__TASKS is that of a file, or of a task of this job, and of no task of lm-eval."""
    return name.endswith(ENDINGS) or name in own_tasks()


@cache
def own_tasks() -> Mapping[str, Path]:
    """The tasks that come with this job, by name; to add one, put its file and its data into `OWN`."""
    return {path.stem: path for path in sorted(OWN.glob("*.yaml"))}


def read_task_file(name: str) -> TaskFile | GroupFile:
    """Reads a file that describes a task or a group of tasks, and their data.

    Args:
        name: Its path, or the name of a task in `own_tasks`.

    Raises:
        SettingsError: It is not there, or not of the format above, with all that is wrong.
        DataError: Its data cannot be read.
    """
    path = own_tasks().get(name) or Path(name)
    text = _read(path)
    config = _parse(path, text)
    if "group" in config:
        return _read_group(path, text, config)
    task = _read_task(path, text, config)
    return replace(task, source=f"qlora-job, {name}") if name in own_tasks() else task  # wherever it is installed


def _read_group(path: Path, text: bytes, config: Mapping[Any, Any]) -> GroupFile:
    if wrong := list(_wrong_group(path, config)):
        raise SettingsError([Problem(str(path), what) for what in wrong])
    members: list[str | TaskFile] = []
    for name in config["task"]:
        if not name.endswith(ENDINGS):
            members.append(name)
            continue
        file = path.parent / name
        described = _read(file)
        if "group" in (member := _parse(file, described)):
            raise SettingsError([Problem(str(path), f"task: {name} is a group, too; name its tasks")])
        members.append(_read_task(file, described, member))
    kept = {name: value for name, value in config.items() if name != "task"}
    return GroupFile(config["group"], str(path), kept, tuple(members), hashlib.sha256(text).hexdigest())


def _wrong_group(path: Path, config: Mapping[Any, Any]) -> Iterator[str]:
    """What is wrong with the fields of a group, a sentence each."""
    for name in config:
        if name not in GROUP_FIELDS:
            yield f"{name}: is not allowed in a user's group; allowed are {', '.join(sorted(GROUP_FIELDS))}"
    yield from _wrong_name("group", config)
    tasks = config.get("task")
    if not (isinstance(tasks, list) and tasks and all(isinstance(name, str) for name in tasks)):
        yield "task: must be a list of task names"
        return
    for name in tasks:
        file = path.parent / name
        if name.endswith(ENDINGS) and not (".." not in PurePosixPath(name).parts and _inside(file, path.parent)):
            yield f"task: {name[:80]!r} is not in the folder of the group"
    if not isinstance(config.get("metadata", {}), dict):
        yield "metadata: is no mapping"
    yield from _wrong_aggregates(config.get("aggregate_metric_list", []))


def _wrong_aggregates(aggregated: Any) -> Iterator[str]:
    if not (isinstance(aggregated, list) and len(_mappings(aggregated)) == len(aggregated)):
        yield "aggregate_metric_list: must be a list of metrics"
    for metric in _mappings(aggregated):
        if not (set(metric) <= AGGREGATED and isinstance(metric.get("metric"), str)):
            yield f"aggregate_metric_list: takes {', '.join(sorted(AGGREGATED))}"
        elif metric.get("aggregation", "mean") != "mean" or not isinstance(metric.get("weight_by_size", True), bool):
            yield (
                f"aggregate_metric_list: {metric['metric'][:80]}: aggregation must be mean, "
                "weight_by_size true or false"
            )
        elif not _is_filters(metric.get("filter_list")):
            yield f"aggregate_metric_list: {metric['metric'][:80]}: filter_list must be a name or a list of names"


def _is_filters(value: Any) -> bool:
    """What lm-eval takes as names of filters: one, several, or nothing for all."""
    names = value if isinstance(value, list) else [value or ""]
    return all(isinstance(name, str) for name in names)


def _inside(file: Path, folder: Path) -> bool:
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError):  # an impossible name, or links that lead in a circle
        return False


def _read_task(path: Path, text: bytes, config: Mapping[Any, Any]) -> TaskFile:
    if wrong := list(_wrong(config)):
        raise SettingsError([Problem(str(path), what) for what in wrong])
    files_by_split = _paths_by_split(path, config)
    scored_split = str(config.get("test_split") or config.get("validation_split"))
    rows, faults = {}, []
    for split, files in files_by_split.items():
        split_rows = [row for file in files for row in read_rows(file, str(file))]
        faults += [Problem(row.where, row.what) for row in split_rows if isinstance(row, RowError)]
        rows[split] = [row for row in split_rows if isinstance(row, Row)]
    few = [split for split, split_rows in rows.items() if len(split_rows) < (2 if split == scored_split else 1)]
    faults += [
        Problem(str(files_by_split[split][0]), "holds too few rows; a comparison needs two questions") for split in few
    ]
    if faults:
        raise DataError(faults)
    kept = {name: value for name, value in config.items() if not name.startswith("dataset_")}
    source = ", ".join(map(str, files_by_split[scored_split]))
    return TaskFile(config["task"], str(path), kept, rows, source, hashlib.sha256(text).hexdigest())


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}; lm-eval's own tasks have no suffix"
        raise SettingsError([Problem("JOB_EVAL__TASKS", what)]) from error
    if len(text) > MAX_BYTES:
        raise SettingsError([Problem(str(path), f"has more than {MAX_BYTES:,} bytes")])
    if text.count(b"[") + text.count(b"{") > MAX_BRACKETS:
        raise SettingsError(
            [Problem(str(path), f"has more than {MAX_BRACKETS:,} brackets; put the data into a file next to it")]
        )
    return text


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """The fields of the file. Raises SettingsError where it is no plain YAML."""
    try:
        # Aliases share a value, and by sharing shares a small file can describe a huge one.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise SettingsError([Problem(str(path), "uses aliases (*name); write the values out")])
        config = strict_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f"{path}:{where.line + 1}" if where else str(path)
        said = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        if "could not determine a constructor" in said:
            said = f"{said}: code of a task file is never run; use the metrics and filters that lm-eval has"
        raise SettingsError([Problem(line, said[:300])]) from error
    if not isinstance(config, dict):
        raise SettingsError([Problem(str(path), "is not a task: it must be a mapping of fields to values")])
    return config


def _wrong(config: Mapping[Any, Any]) -> Iterator[str]:
    """What is wrong with the fields, a sentence each."""
    yield from _wrong_fields(config)
    yield from _wrong_numbers(config)
    yield from _wrong_names(config)


def _wrong_fields(config: Mapping[Any, Any]) -> Iterator[str]:
    for name in config:
        if name not in FIELDS:
            yield f"{name}: is not allowed in a user's file" + "; give one task a file" * (name == "include")
    for name in ("task", "output_type", "dataset_path"):
        if not isinstance(config.get(name), str):
            yield f"{name}: is missing"
    for name in TEXTS:
        value = config.get(name)
        if value is not None and not isinstance(value, str | int | list):
            yield f"{name}: must be text or a list"
    if isinstance(config.get("task"), str):
        yield from _wrong_name("task", config)
    if isinstance(config.get("dataset_path"), str) and config["dataset_path"] not in FORMATS:
        yield (
            f"dataset_path: is {config['dataset_path']!r}; it is one of {', '.join(FORMATS)}, with the "
            "data in a file next to it"
        )


def _wrong_name(field: str, config: Mapping[Any, Any]) -> Iterator[str]:
    name = config.get(field)
    if not (isinstance(name, str) and name.replace("_", "a").replace("-", "a").isalnum()):
        yield f"{field}: must consist of letters, digits, - and _"


def _wrong_numbers(config: Mapping[Any, Any]) -> Iterator[str]:
    for name, least in (("num_fewshot", 0), ("repeats", 1)):
        if not isinstance(value := config.get(name, least), int) or not least <= value <= MOST:
            yield f"{name}: must be a number from {least} to {MOST}"
    if not (config.get("test_split") or config.get("validation_split")):
        yield "test_split: is missing; it names the questions"
    kwargs = config.get("dataset_kwargs")
    if not (isinstance(kwargs, dict) and set(kwargs) == {"data_files"}):
        yield "dataset_kwargs: needs data_files and nothing else"


def _wrong_names(config: Mapping[Any, Any]) -> Iterator[str]:
    """Metrics, aggregations, filters and samplers that lm-eval does not have itself: it would load them as code."""
    import lm_eval.api.metrics
    import lm_eval.filters  # noqa: F401 - both fill the registry
    from lm_eval.api import registry

    for metric in _mappings(config.get("metric_list")):
        if metric.get("metric") not in registry.METRIC_REGISTRY or metric.get("hf_evaluate"):
            yield f"metric_list: {str(metric.get('metric'))[:80]!r} is not a metric of lm-eval"
        if metric.get("aggregation", "mean") not in registry.AGGREGATION_REGISTRY:
            yield f"metric_list: {str(metric.get('aggregation'))[:80]!r} is not an aggregation of lm-eval"
    for one in _mappings(config.get("filter_list")):
        for step in _mappings(one.get("filter")):
            if step.get("function") not in registry.FILTER_REGISTRY:
                yield f"filter_list: {str(step.get('function'))[:80]!r} is not a filter of lm-eval"
    few = config.get("fewshot_config")
    if few is not None and not (isinstance(few, dict) and set(few) <= {"sampler", "samples", "split"}):
        yield "fewshot_config: may have sampler, samples and split"
    elif few and few.get("sampler", "default") not in {"default", "first_n"}:
        yield "fewshot_config: sampler must be default or first_n"


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _paths_by_split(path: Path, config: Mapping[str, Any]) -> dict[str, list[Path]]:
    """By split its files, all below the folder of the task. Raises SettingsError with all that are not."""
    files_by_split = config["dataset_kwargs"]["data_files"]
    splits = {str(config[name]) for name in SPLITS if config.get(name)}
    if isinstance(few := config.get("fewshot_config"), dict) and few.get("split"):
        splits.add(str(few["split"]))
    if not isinstance(files_by_split, dict):
        files_by_split = dict.fromkeys(splits, files_by_split)  # as `datasets` has it for one split
    faults, paths_by_split = [], {}
    for split in sorted(splits):
        names = files_by_split.get(split)
        paths_by_split[split] = [path.parent / str(name) for name in (names if isinstance(names, list) else [names])]
        if names is None:
            faults.append(f"dataset_kwargs.data_files: has no file for the split {split}")
            continue
        for file in paths_by_split[split]:
            relative = PurePosixPath(*file.parts[len(path.parent.parts) :])
            inside = _inside(file, path.parent) and ".." not in relative.parts
            if "://" in str(file) or not inside:
                faults.append(f"dataset_kwargs.data_files: {file.name[:80]!r} is not in the folder of the task")
            elif not file.is_file():
                faults.append(f"dataset_kwargs.data_files: {file} does not exist")
            elif reader_of(file) is None:
                faults.append(
                    f"dataset_kwargs.data_files: {file} has an unknown format; known are ({', '.join(FORMATS)})"
                )
    if faults:
        raise SettingsError([Problem(str(path), what) for what in faults])
    return paths_by_split
