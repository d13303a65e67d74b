"""job/results.schema.json accepts a complete manifest as designed, and nothing less or more."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from job.evaluation.statistics import Comparison, compare, holm
from job.records import Artifact, AttemptRecord, DatasetRecord, ModelRecord, TrainingRecord

SCHEMA: dict[str, Any] = json.loads(files("job").joinpath("results.schema.json").read_text("utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)

HASH = "0123456789abcdef" * 4
COMPARISON = {
    "delta": 0.0139,
    "ci95": [0.0008, 0.027],
    "mcnemar_p": 0.0405,
    "holm_p": 0.081,
    "improved": 139,
    "regressed": 106,
    "minimum_detectable_effect": 0.0188,
    "verdict": "inconclusive",
}
TASK = {"source": "allenai/ai2_arc", "task_hash": HASH, "version": "1.0", "n": 2376}
SCORES = {"acc": 0.798, "acc_norm": 0.783, "stderr": 0.0082, "acc_norm_stderr": 0.0085, "reused_from": None}
EXAMPLE: dict[str, Any] = {
    "schema_version": "1.0",
    "run": {
        "id": "mistral-7b-alpaca-1",
        "status": "complete",
        "attempts": [
            {
                "number": 1,
                "started": "2026-01-05T09:00:00Z",
                "finished": None,
                "outcome": "killed",
                "seconds": 1861.5,
                "stage_seconds": {"pull": 61.5, "train": 1800.0},
                "steps": 42,
                "repeated_steps": 0,
                "last_step": 42,
                "world_size": 8,
                "repeated_seconds": 0.0,
                "usd_per_hour": None,
                "energy_joules": None,
            },
            {
                "number": 2,
                "started": "2026-01-05T09:40:00.250Z",
                "finished": "2026-01-05T11:10:00+00:00",
                "outcome": "complete",
                "seconds": 3900.5,
                "stage_seconds": {"train": 3600, "evaluate adapter": 300.5},
                "steps": 54,
                "repeated_steps": 2,
                "last_step": 94,
                "world_size": 4,
                "repeated_seconds": 80.5,
                "usd_per_hour": 2.5,
                "energy_joules": 1.8e6,
            },
        ],
        "started": "2026-01-05T09:00:00Z",
        "finished": "2026-01-05T11:10:00Z",
    },
    "settings": {
        "train.learning_rate": {"value": 0.0002, "source": "preset mistral-7b-alpaca"},
        "eval.tasks": {"value": ["arc_easy", "swag"], "source": "environment JOB_EVAL__TASKS"},
        "model.revision": {"value": None, "source": "default"},
    },
    "model": {
        "id": "mistralai/Mistral-7B-v0.1",
        "revision": "27d67f1b5f57dc0953326b2601d68371d40ea8da",
        "sha256": HASH,
        "quantization": "nf4",
        "double_quantization": True,
        "dtype": "bfloat16",
        "parameters": 7_241_732_096,
        "trainable_parameters": 41_943_040,
        "architecture": "MistralForCausalLM",
    },
    "dataset": {
        "source": "tatsu-lab/alpaca",
        "revision": "dce01c9b08f87459cf36a430d809084718273017",
        "split": "train",
        "format": "alpaca",
        "rows": 1500,
        "skipped": {"empty target": 28},
        "sha256": HASH,
        "tokens": 180_000,
        "target_tokens": 178_500,
        "longest": 512,
    },
    "training": {
        "steps": 94,
        "examples": 3000,
        "target_tokens": 357_000,
        "loss": 0.91,
        "tokens_per_second": 812.5,
        "seconds": 5400.0,
        "peak_memory_bytes": 14_000_000_000,
        "optimizer": "adamw_8bit",
        "global_batch_size": 32,
        "micro_batch_tokens": 4096,
        "world_size": 4,
        "substitutions": ["fp16 instead of bf16: this GPU has no bf16"],
        "execution": {"kept_base": True, "kept_activations": False, "recorded": True, "reason": "needs 9 of 12 GiB"},
    },
    "evaluation": {
        "harness": {"name": "lm-eval", "version": "0.4.13"},
        "tasks": {
            "arc_easy": {
                **TASK,
                "base": SCORES,
                "adapter": SCORES | {"acc": 0.8119, "reused_from": "s3://bucket/evaluations/0123"},
                **COMPARISON,
                "acc_norm": COMPARISON | {"verdict": "improved"},
            },
            "swag": {
                "source": "allenai/swag",
                "task_hash": HASH,
                "version": "0.0",
                "n": 1,
                "base": SCORES | {"acc_norm": None, "acc_norm_stderr": None},
                "adapter": SCORES | {"acc_norm": None, "acc_norm_stderr": None},
                **COMPARISON,
                "verdict": "regressed",
                "acc_norm": None,
            },
        },
    },
    "gate": {
        "metric": "acc",
        "min_delta": 0.005,
        "max_regression": 0.01,
        "baseline": {
            "run": "mistral-7b-alpaca-0",
            "results": "s3://bucket/mistral-7b-alpaca-0/results.json",
            "sha256": HASH,
            "tasks": {"arc_easy": {**TASK, "base": SCORES, "adapter": SCORES, **COMPARISON, "acc_norm": None}},
        },
        "passed": False,
        "reasons": ["acc fell by more than 0.01"],
    },
    "artifacts": [
        {
            "path": "artifacts/adapter/adapter_model.safetensors",
            "bytes": 83_945_296,
            "sha256": HASH,
            "facts_sha256": None,
        },
        {"path": "artifacts/metrics.jsonl", "bytes": 0, "sha256": HASH, "facts_sha256": HASH},
    ],
    "evidence": [{"path": "settings.json", "bytes": 1210, "sha256": HASH}],
    "hardware": {
        "platform": "Linux-6.8.0-x86_64-with-glibc2.39",
        "machine": "x86_64",
        "cpu": "AMD EPYC 9334",
        "cpus": 16,
        "memory_bytes": 137_438_953_472,
        "gpus": [{"name": "NVIDIA H200", "memory_bytes": 150_754_820_096, "capability": "9.0"}],
        "driver": "570.86.15",
        "cuda": "12.8",
    },
    "software": {
        "python": "3.12.3",
        "packages": {"torch": "2.13.0", "trl": "1.16.0"},
        "git": "5f0c1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b",
        "image_digest": f"sha256:{HASH}",
    },
    "cost": {
        "seconds": 5762.0,
        "usd": 4.0,
        "goodput": 0.93,
        "repeated_steps": 2,
        "wasted_seconds": 120.5,
        "wasted_usd": 0.08,
        "energy_joules": 1.8e6,
        "energy_kwh": 0.5,
        "stages": {"pull": {"seconds": 61.5, "usd": 0.04}, "outside stages": {"seconds": 1.5, "usd": None}},
        "attempts": [
            {
                "number": 1,
                "seconds": 1861.5,
                "usd": None,
                "wasted_seconds": 0.0,
                "wasted_usd": 0.0,
                "energy_joules": None,
            },
        ],
        "savings": {
            "on_demand_usd_per_hour": 7.91,
            "usd": 8.7,
            "percent": 68.4,
            "net_usd": 8.4,
            "net_percent": 67.7,
        },
    },
    "seal": HASH,
}

Path = tuple[str | int, ...]


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All values below `value` with their paths, containers included."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, (*path, index))


def at(document: Any, path: Path) -> Any:
    """The value at a path."""
    for key in path:
        document = document[key]
    return document


def replaced(path: Path, value: Any) -> dict[str, Any]:
    """The example with another value at a path."""
    document = copy.deepcopy(EXAMPLE)
    at(document, path[:-1])[path[-1]] = value
    return document


def name(path: Path) -> str:
    """A readable test id."""
    return ".".join(map(str, path))


# Objects whose keys are the user's or the task's own; all others are closed and all their keys required.
OPEN = {("settings",), ("dataset", "skipped"), ("evaluation", "tasks"), ("software", "packages"), ("cost", "stages")}
OPEN |= {("gate", "baseline", "tasks")}
FREE = {path for path, _ in walk(EXAMPLE) if path[:1] == ("settings",) and path[2:3] == ("value",)}
OPEN |= {path for path, _ in walk(EXAMPLE) if path[-1:] == ("stage_seconds",)}
CLOSED = [path for path, value in walk(EXAMPLE) if isinstance(value, dict) and path not in OPEN]
REQUIRED = [(*path, key) for path in CLOSED for key in at(EXAMPLE, path)]
TYPED = [path for path, _ in walk(EXAMPLE) if path and path not in FREE]


def test_schema_is_valid() -> None:
    """The schema is itself valid JSON Schema 2020-12, and says so."""
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


def test_example_is_valid() -> None:
    """A full manifest with preemption, a GPU, two tasks and a gate is valid."""
    VALIDATOR.validate(EXAMPLE)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("gate", "passed"), None),
        (("gate", "baseline"), None),
        (("gate", "min_delta"), None),
        (("gate", "max_regression"), None),
        (("evidence",), []),
        (("cost", "usd"), None),
        (("cost", "goodput"), None),
        (("cost", "repeated_steps"), None),
        (("cost", "wasted_usd"), None),
        (("cost", "energy_kwh"), None),
        (("cost", "savings"), None),
        (("cost", "savings", "net_usd"), -250.0),
        (("model", "revision"), None),
        (("dataset", "revision"), None),
        (("dataset", "split"), None),
        (("training", "tokens_per_second"), None),
        (("training", "peak_memory_bytes"), None),
        (("training", "loss"), 1),
        (("training", "execution"), None),
        (("training", "execution", "forward"), "peft"),
        (("hardware", "driver"), None),
        (("hardware", "cuda"), None),
        (("hardware", "gpus"), []),
        (("software", "git"), None),
        (("software", "image_digest"), None),
        (("software", "image_digest"), f"registry.example/job@sha256:{HASH}"),
        (("evaluation", "tasks"), {}),
        (("evaluation", "tasks", "arc_easy", "ci95"), [-1, 1]),
    ],
    ids=str,
)
def test_unknown_and_boundary_values_are_valid(path: Path, value: object) -> None:
    """What a run without GPU, git, image, price, hub, gate or evaluation cannot know may be null or empty."""
    VALIDATOR.validate(replaced(path, value))


@pytest.mark.parametrize("path", REQUIRED, ids=name)
def test_every_key_is_required(path: Path) -> None:
    """A manifest that lacks any one key of a closed object is refused."""
    document = copy.deepcopy(EXAMPLE)
    del at(document, path[:-1])[path[-1]]
    assert not VALIDATOR.is_valid(document)


@pytest.mark.parametrize("path", CLOSED, ids=name)
def test_closed_objects_take_no_other_key(path: Path) -> None:
    """A key the schema does not know is refused in every closed object."""
    assert not VALIDATOR.is_valid(replaced((*path, "unknown"), 1))


@pytest.mark.parametrize("path", TYPED, ids=name)
def test_every_type_is_checked(path: Path) -> None:
    """A value of another JSON type is refused wherever the schema gives a type."""
    value = at(EXAMPLE, path)
    other = {str: 1, bool: "true", int: "1", float: "0.5", list: {}, dict: [], type(None): []}[type(value)]
    assert not VALIDATOR.is_valid(replaced(path, other))


@pytest.mark.parametrize(
    "path", [p for p in TYPED if type(at(EXAMPLE, p)) is int and "stage_seconds" not in p], ids=name
)
def test_counts_are_whole_and_not_negative(path: Path) -> None:
    """Counts and sizes are whole numbers, not negative, and no booleans."""
    assert not any(VALIDATOR.is_valid(replaced(path, bad)) for bad in (-1, 1.5, True))


# Nobody knows how much dearer than on demand a run can get.
SIGNED = {("cost", "savings", key) for key in ("usd", "percent", "net_usd", "net_percent")}


@pytest.mark.parametrize("path", [p for p in TYPED if type(at(EXAMPLE, p)) is float and p not in SIGNED], ids=name)
def test_numbers_have_a_lower_bound(path: Path) -> None:
    """Every measured number is refused below its range, which starts at 0, or at -1 for differences."""
    assert not VALIDATOR.is_valid(replaced(path, -1.001))
    signed = not {"delta", "ci95", "min_delta"}.isdisjoint(path)
    assert VALIDATOR.is_valid(replaced(path, -0.001)) == signed


FRACTIONS = {"acc", "stderr", "acc_norm_stderr", "delta", "mcnemar_p", "holm_p", "minimum_detectable_effect", "goodput"}
FRACTIONS |= {"min_delta", "max_regression"}


@pytest.mark.parametrize(
    "path", [p for p in TYPED if type(at(EXAMPLE, p)) is float and (p[-1] in FRACTIONS or "ci95" in p)], ids=name
)
def test_fractions_end_at_one(path: Path) -> None:
    """Accuracies, errors, differences and p values are fractions: 1 is taken and percent are refused."""
    assert VALIDATOR.is_valid(replaced(path, 1))
    assert not VALIDATOR.is_valid(replaced(path, 1.001))


@pytest.mark.parametrize("path", [p for p in TYPED if at(EXAMPLE, p) == HASH], ids=name)
def test_hashes_are_sha256(path: Path) -> None:
    """A hash is exactly 64 lower-case hex digits."""
    assert not any(VALIDATOR.is_valid(replaced(path, bad)) for bad in (HASH[:-1], HASH + "0", HASH.upper(), "g" * 64))


@pytest.mark.parametrize("path", [p for p in TYPED if str(at(EXAMPLE, p)).startswith("2026-01-05T")], ids=name)
@pytest.mark.parametrize("checker", [Draft202012Validator.FORMAT_CHECKER, None], ids=["formats", "no formats"])
def test_times_are_rfc_3339(path: Path, checker: Any) -> None:
    """A time needs date, time and zone, also where jsonschema has no date-time checker installed."""
    validator = Draft202012Validator(SCHEMA, format_checker=checker)
    bad = ("2026-01-05", "2026-01-05T09:00:00", "2026-01-05 09:00:00Z", "yesterday", "")
    assert not any(validator.is_valid(replaced(path, time)) for time in bad)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), "1.1"),
        (("run", "status"), "running"),
        (("run", "id"), ""),
        (("run", "attempts"), []),
        (("run", "attempts", 0, "number"), 0),
        (("run", "attempts", 0, "stage_seconds", "pull"), -1),
        (("evaluation", "tasks", "arc_easy", "verdict"), "better"),
        (("evaluation", "tasks", "arc_easy", "acc_norm", "verdict"), "better"),
        (("evaluation", "tasks", "arc_easy", "ci95"), [0.1]),
        (("evaluation", "tasks", "arc_easy", "ci95"), [0.1, 0.2, 0.3]),
        (("evaluation", "tasks", "arc_easy", "n"), 0),
        (("evaluation", "tasks", "arc_easy", "base", "acc_norm"), 78.3),
        (("hardware", "gpus", 0, "capability"), "sm_90"),
        (("software", "image_digest"), "latest"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(path: Path, value: object) -> None:
    """Values of the right type that no run can have are refused."""
    assert not VALIDATOR.is_valid(replaced(path, value))


@pytest.mark.parametrize("document", [[], "results", 1, None, {}], ids=str)
def test_only_a_full_object_is_a_manifest(document: object) -> None:
    """A document that is no object, or an empty one, is refused."""
    assert not VALIDATOR.is_valid(document)


def test_every_property_is_described() -> None:
    """Every property says what it is, in itself or in what it refers to, for users read this file."""
    silent = [
        f"{name(path)}.{key}"
        for path, node in walk(SCHEMA)
        if path[-1:] == ("properties",)
        for key, property_ in node.items()
        if "description" not in property_
        and "description" not in SCHEMA["$defs"].get(property_.get("$ref", "").removeprefix("#/$defs/"), {})
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("definition", "record"),
    [
        ("model", ModelRecord),
        ("dataset", DatasetRecord),
        ("training", TrainingRecord),
        ("artifact", Artifact),
        ("attempt", AttemptRecord),
    ],
)
def test_schema_and_records_agree(definition: str, record: type) -> None:
    """The schema's groups have exactly the fields of the records they are written from."""
    assert set(SCHEMA["$defs"][definition]["properties"]) == {field.name for field in fields(record)}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_every_comparison_fits(rows: list[tuple[bool, bool]]) -> None:
    """Whatever `compare` finds, with a p value by `holm`, is a valid part of the manifest after a round trip."""
    found = compare(*zip(*rows, strict=True))
    group = {key: value for key, value in asdict(found).items() if key not in {"n", "base", "adapter"}}
    group["holm_p"] = holm([found.mcnemar_p, 0.5])[0]
    assert set(group) == set(SCHEMA["$defs"]["comparison"]["properties"])
    assert {field.name for field in fields(Comparison)} < set(SCHEMA["$defs"]["task"]["properties"])
    document = replaced(("evaluation", "tasks", "arc_easy", "acc_norm"), group)
    VALIDATOR.validate(json.loads(json.dumps(document, allow_nan=False)))
