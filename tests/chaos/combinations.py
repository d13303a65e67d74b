"""`make combinations`: random combinations of valid settings, each planned, run, killed and resumed on a tiny model.

Every combination must either be refused by both `plan` and the job, with the same exit code and before the base is
scored, or be accepted by both and run to its end. Then the run verifies, its manifest is valid by its
schema, a second start changes nothing, and a run that is killed at random points publishes the same bits. Never a
traceback, and `status` answers at any time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jsonschema
import yaml

import job
from job.errors import SettingsError, environment_name, exit_codes
from job.runs.layout import RESULTS, Stage, facts_of
from job.settings.load import load_settings
from job.settings.schema import NAMES, Settings
from tests import clouds
from tests.chaos import hot_forks, small
from tests.helpers import alpaca_rows, arc_rows, write_jsonl

MENDED = LIKELY = 0.9
"""Share of refused combinations that are tried again without the refused settings; share of the likelier choices."""
RARE = 0.1
"""Share of combinations with a classifier, or with an adapter to start from."""
SECONDS = 150
"""A command that takes longer hangs."""
MAX_ATTEMPTS = 8
ENDS = (0, 3)
"""Exit codes of a run that is complete: its gate is met, or is not."""
REFUSED = (2, 65)
"""Exit codes of settings and data that are refused before training."""

Given = dict[str, str]
"""Dotted name of a setting -> its value as a user writes it."""

CHOICES = (
    *("train.method", "model.quantization", "model.dtype", "lora.init", "lora.kind", "train.optimizer"),
    *("train.scheduler", "train.preference_loss", "train.keep", "train.loss_on", "train.compute"),
    *("eval.long_questions", "eval.full_precision", "eval.precision", "data.on_long_row", "data.sft_on_long_row"),
    *("data.on_bad_row", "export.merge_onto", "model.placement", "model.keep_quantized", "train.sequence_parallel"),
    *("data.format", "data.sft_format"),
)
"""Settings drawn from the choices that the schema has for them."""
FLAGS = (
    *("model.double_quantization", "lora.experts", "lora.use_rslora", "lora.use_dora", "data.row_weights"),
    *("model.keep_dequantized", "train.gradient_checkpointing", "train.offload_activations"),
)
VALUES: Mapping[str, Sequence[str]] = {
    "run.seed": ("1", "4294967295"),
    "model.name": ("org/tiny",),
    "model.pretraining_tokens": ("2e12",),
    "model.add_tokens": ("<sum>", "<sum>,<new>", "<unused>"),
    "lora.rank": ("1", "4", "8"),
    "lora.alpha": ("1", "8", "32"),
    "lora.dropout": ("0", "0.1", "0.5"),
    "lora.target_modules": (
        "all-linear",
        "attention",
        "mlp",
        "q_proj,v_proj",
        "down_proj",
        "query_key_value",
        "lm_head",
    ),
    "lora.layers": ("0", "1", "0-1"),
    "lora.rank_pattern": ("q_proj=2", "layers.0.mlp.down_proj=3,k_proj=8"),
    "lora.alpha_pattern": ("v_proj=4", "up_proj=1"),
    "lora.modules_to_save": ("lm_head", "embed_tokens", "embed_tokens,lm_head", "norm"),
    "lora.seed": ("3",),
    "lora.init_rank": ("9", "24"),
    "lora.tinit": ("1", "3"),
    "lora.tfinal": ("1", "4"),
    "lora.delta_t": ("1", "2", "3"),
    "lora.orth_reg_weight": ("0", "0.1"),
    "data.limit": ("9", "16"),
    "data.sft_limit": ("9",),
    "data.on_finding": ("skip", "record", "duplicate=skip,near_duplicate=skip", "email=error", "overlap=skip"),
    "data.unsafe_threshold": ("0.1", "0.9"),
    "data.unsafe_labels": ("unsafe",),
    "data.validation": ("4", "0.2", "FILE"),
    "data.sft_validation": ("3", "0.25"),
    "data.seed": ("5",),
    "data.date": ("2026-01-02",),
    "data.chat_template_arguments": ('{"loud": true}', '{"unknown": 1}'),
    "train.beta": ("0.05", "0.5"),
    "train.label_smoothing": ("0.05", "0.3"),
    "train.desirable_weight": ("0.5", "2"),
    "train.undesirable_weight": ("0.5", "1.33"),
    "train.sft_epochs": ("1", "0.5"),
    "train.sft_learning_rate": ("1e-3", "0"),
    "train.epochs": ("1", "1.5", "3", "0.3"),
    "train.max_steps": ("1", "2", "5", "7", "50"),
    "train.learning_rate": ("0", "1e-4", "5e-3", "2e-2"),
    "train.warmup_steps": ("0", "3", "100"),
    "train.warmup_ratio": ("0", "0.1", "1"),
    "train.min_lr_ratio": ("0", "0.1", "1"),
    "train.decay_ratio": ("0", "0.3", "1"),
    "train.weight_decay": ("0.01", "0.1"),
    "train.max_grad_norm": ("0", "0.01", "1"),
    "train.neftune_noise_alpha": ("5", "15"),
    "train.global_batch_size": ("1", "3", "8", "64"),
    "train.micro_batch_tokens": ("1", "100", "300", "4096"),
    "train.max_length": ("64", "96", "256", "2048"),
    "train.validate_every_steps": ("1", "2", "5"),
    "train.stop_after": ("1", "2"),
    "train.gpu_memory_gb": ("1",),
    "train.log_every_steps": ("2", "50"),
    "checkpoint.every_steps": ("1", "2", "100"),
    "checkpoint.keep": ("1", "3"),
    "checkpoint.settle_seconds": ("0.5",),
    "eval.limit": ("2", "5"),
    "eval.num_fewshot": ("0", "1", "3"),
    "eval.batch_tokens": ("1", "256", "8192"),
    "eval.prompts": ("FILE", "2"),
    "eval.prompts_max_new_tokens": ("1", "5", "63"),
    "eval.principles": ("FILE",),
    "export.formats": (
        *("adapter:bf16", "adapter:fp16", "merged", "merged,adapter:bf16", "fp8", "merged,fp8", "gguf:f16"),
        *("gguf:q8_0", "gguf:q4_k_m", "w4a16", "gptq", "awq", "w4a16,gptq,merged"),
    ),
    "export.calibration_rows": ("4", "1000"),
    "export.quantization_steps": ("0", "2"),
    "gate.on": ("adapter", "merged", "fp8", "adapter:bf16"),
    "gate.metric": ("acc", "acc_norm", "exact_match", "bits_per_byte"),
    "gate.min_delta": ("-1", "0", "0.5"),
    "gate.max_regression": ("0", "0.1", "1"),
    "gate.policy": ("arc", "several", "export"),
}
"""Settings drawn from these values, including those at a limit. FILE, or a name, is a file of `World`."""
OF_THE_WORLD = (
    *("run.id", "run.output", "run.spot_notices", "run.device", "model.id", "lora.start", "data.source", "data.fields"),
    *("data.sft_source", "data.sft_fields", "data.safety_model", "eval.tasks", "eval.data", "eval.judge"),
    *("storage.cache", "log.format", "fault"),
)
"""Settings whose values `draw_settings` chooses by separate rules."""
NOT_DRAWN = (
    *("preset", "run.grace_seconds", "run.max_idle_attempts", "run.processes", "run.nodes", "run.node_rank"),
    *("run.rendezvous", "run.image_digest", "train.stall_seconds", "data.split", "data.sft_split"),
    *("data.validation_split", "data.sft_validation_split", "eval.judge_model", "eval.judge_key", "gate.baseline"),
    *("export.hub", "export.hub_revision", "export.hub_private", "export.oci", "export.oci_plain_http", "export.run"),
    *("log.level", "log.trackers", "metrics.port", "metrics.pod_annotation", "notify.webhook", "cost.usd_per_hour"),
    *("cost.on_demand_usd_per_hour",),
)
"""Settings of other machines, servers, runs and splits, with tests of their own; so have revisions, stores and keys."""
NEEDS: Mapping[str, str] = {
    **dict.fromkeys(("train.keep", "train.validate_every_steps", "train.stop_after"), "data.validation"),
    **dict.fromkeys(
        ("lora.init_rank", "lora.tinit", "lora.tfinal", "lora.delta_t", "lora.orth_reg_weight"), "lora.kind"
    ),
    **dict.fromkeys(("export.calibration_rows", "export.quantization_steps", "export.merge_onto"), "export.formats"),
    **dict.fromkeys(("train.min_lr_ratio", "train.decay_ratio"), "train.scheduler"),
    **dict.fromkeys(("eval.prompts_max_new_tokens", "eval.principles"), "eval.prompts"),
    "gate.metric": "gate.min_delta",
}
"""Setting -> another setting that is drawn with it, because without it the first would mostly be refused."""


def choices_of(name: str) -> list[str]:
    """The values of a setting that are in the schema by name."""
    group, key = name.split(".")
    schema = Settings.model_json_schema()
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, Mapping):
            found.extend(value for value in (*node.get("enum", ()), node.get("const")) if isinstance(value, str))
            for inner in node.get("anyOf", ()):
                walk(inner)

    definition = next(value for title, value in schema["$defs"].items() if title.lower() == group)
    walk(definition["properties"][key])
    assert found, name
    return found


def pool() -> dict[str, Sequence[str]]:
    """Every setting that is drawn -> its values."""
    drawn = {**{name: choices_of(name) for name in CHOICES}, **dict.fromkeys(FLAGS, ("true", "false")), **VALUES}
    others = {name for name in NAMES if name.split(".")[0] in {"storage", "sign"} or name.endswith("revision")}
    left = set(NAMES) - drawn.keys() - set(OF_THE_WORLD) - set(NOT_DRAWN) - others
    assert not left, f"draw these settings too, or say why not: {sorted(left)}"
    return drawn


@dataclass(frozen=True)
class World:
    """The files of all combinations, below `folder`, and the variables that all of them share, in `environment`."""

    folder: Path
    environment: Mapping[str, str]

    def path(self, name: str) -> str:
        """The path of a file or folder."""
        return str(self.folder / name)


def build(folder: Path) -> World:
    """Writes bases, data, tasks, policies, a classifier and adapters."""
    from tests.toy_classifier import WORD, make_classifier
    from tests.unit.evaluation.example_tasks import write_prose, write_task

    folder.mkdir(parents=True, exist_ok=True)
    environment = small.settings(folder, rows=24, questions=16)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    world = World(folder, {**plain, **{key: value for key, value in environment.items() if not key.startswith("JOB_")}})
    if (folder / "made").exists():
        return world
    _bases(folder)
    rows = [{**row, "output": f"{row['output']}{' <sum>' * (n % 2)}"} for n, row in enumerate(alpaca_rows(24))]
    rows[5]["output"], rows[7] = f"{WORD} ask me@example.org", rows[6]
    write_jsonl(folder / "alpaca.jsonl", rows)
    write_jsonl(folder / "more-alpaca.jsonl", [{**row, "output": "It is even."} for row in rows[:9]])
    write_jsonl(folder / "weighted.jsonl", [{**row, "weight": n % 3 / 2} for n, row in enumerate(rows)])
    named = [{"question": row["instruction"], "answers": [{"text": row["output"]}]} for row in rows]
    write_jsonl(folder / "named.jsonl", named)
    (folder / "shards").mkdir()
    pairs = [{"prompt": row["instruction"], "completion": row["output"]} for row in rows]
    (folder / "shards/1.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in pairs[:9]).encode())
    )
    write_jsonl(folder / "shards/2.jsonl", pairs[9:])
    write_jsonl(
        folder / "texts.jsonl",
        [{"text": f"{r['instruction']} {r['output']} " * (1 + n % 5)} for n, r in enumerate(rows)],
    )
    write_jsonl(folder / "bad.jsonl", [*rows[:20], {"instruction": "Nothing?", "output": ""}])
    talks = [
        {
            "messages": [
                {"role": "user", "content": r["instruction"]},
                {"role": "assistant", "content": r["output"], "weight": n % 2},
                {"role": "user", "content": "Again?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
        for n, r in enumerate(rows)
    ]
    write_jsonl(folder / "messages.jsonl", talks)
    write_jsonl(
        folder / "sharegpt.jsonl",
        [
            {"conversations": [{"from": "human", "value": r["instruction"]}, {"from": "gpt", "value": r["output"]}]}
            for r in rows
        ],
    )
    good = [(r["instruction"], r["output"], f"It is not {97 * n % 61}.") for n, r in enumerate(rows)]
    write_jsonl(folder / "pairs.jsonl", [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in good])
    turn = lambda who, what: [{"role": who, "content": what}]  # noqa: E731
    write_jsonl(
        folder / "talked_pairs.jsonl",
        [
            {"prompt": turn("user", p), "chosen": turn("assistant", a), "rejected": turn("assistant", b)}
            for p, a, b in good
        ],
    )
    write_jsonl(
        folder / "labelled.jsonl",
        [{"prompt": p, "completion": a if n % 3 else b, "label": bool(n % 3)} for n, (p, a, b) in enumerate(good)],
    )
    for method, name in (("sft", "alpaca"), ("dpo", "pairs"), ("kto", "labelled")):
        held = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{method}-validation.jsonl").write_text("".join(held[-6:]).replace("It", "So it"), encoding="utf-8")
    write_jsonl(folder / "questions.jsonl", arc_rows(16))
    write_jsonl(folder / "challenge.jsonl", arc_rows(9))
    write_jsonl(folder / "examples.jsonl", [{**row, "question": f"Then {row['question']}"} for row in arc_rows(6)])
    write_task(folder, questions=5)
    (folder / "prose").mkdir()
    write_prose(folder / "prose")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["instruction"]} for row in rows[:3]])
    (folder / "rules.yaml").write_text("- Prefer the shorter answer.\n", encoding="utf-8")
    make_classifier(folder / "classifier")
    rule = {"role": "guarded", "metric": "acc", "max_loss": 0.5}
    generated = {"role": "supporting", "metric": "exact_match", "min_gain": 0.0}
    critical = {"role": "critical", "metric": "acc_norm", "min_gain": 0.0}
    for name, rules in (
        ("arc", {"arc_easy": rule}),
        ("several", {"arc_easy": critical, "sums": generated}),
        ("export", {"arc_easy": rule, "prose": {"role": "guarded", "metric": "bits_per_byte", "max_loss": 1.0}}),
    ):
        (folder / f"policy-{name}.yaml").write_text(yaml.safe_dump({"tasks": rules}), encoding="utf-8")
    (folder / "made").touch()
    return world


BASES = {"base": 8, "chat": 6, "tied": 5, "mixture": 2, "neox": 3}
"""Folder of a base -> how often it is drawn, in proportion."""


def _bases(folder: Path) -> None:
    """Mistral in fp32 (there already); in bf16 with a marked template; a tied Qwen2; a mixture; a GPT-NeoX."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    from job.model.adapter_files import save_adapter
    from job.model.published_names import PublishedNames
    from tests.helpers import fill_adapter, make_model

    plain = AutoConfig.from_pretrained(folder / "base")
    tokens = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")
    heads = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(plain, name) for name in (*tokens, *heads)}
    no_groups = {name: value for name, value in sizes.items() if name != "num_key_value_heads"}
    marked = small.CHAT.replace("{{ m.role }}", "{{ m.role }}{% if loud %}!{% endif %}")
    torch.manual_seed(1)
    made = {
        "chat": lambda: AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16),
        "tied": lambda: Qwen2ForCausalLM(
            Qwen2Config(**sizes, intermediate_size=192, tie_word_embeddings=True, initializer_range=0.1)
        ),
        "mixture": lambda: MixtralForCausalLM(
            MixtralConfig(**sizes, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2)
        ),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**no_groups, intermediate_size=192, initializer_range=0.1)),
    }
    for name, make in made.items():
        place = Path(shutil.copytree(folder / "base", folder / name))
        (place / "model.safetensors").unlink()
        make().save_pretrained(place)
        if name in {"chat", "tied"}:
            (place / "chat_template.jinja").write_text(marked if name == "chat" else small.UNMARKED, encoding="utf-8")
    for rank in (4, 16):
        model = fill_adapter(make_model(folder / "base", rank=rank), 0.01)
        save_adapter(model, folder / f"start-{rank}", base="base", revision=None, names=PublishedNames(""))


def draw_settings(draw: random.Random, world: World) -> tuple[Given, bool]:
    """A combination, and whether settings that the schema's checks refuse were removed from it."""
    drawn, given = pool(), dict[str, str]()

    def take(name: str) -> None:
        given.setdefault(name, draw.choice(list(drawn[name])))
        if (needed := NEEDS.get(name)) is not None and draw.random() < LIKELY:
            take(needed)
        if name.startswith("lora.") and NEEDS.get(name) == "lora.kind":
            given["lora.kind"] = "adalora"

    if draw.random() < 0.6:
        take("train.method")
    for name in draw.sample(sorted(drawn), draw.randint(4, 22)):
        take(name)
    _draw_files(draw, world, given)
    _draw_tasks(draw, world, given)
    mended = draw.random() < MENDED
    for _ in range(30 if mended else 0):
        faulty = _refused(given, world)
        if not faulty & drawn.keys():
            break
        given = {name: value for name, value in given.items() if name not in faulty & drawn.keys()}
    return given, mended


def _refused(given: Given, world: World) -> set[str]:
    """The settings of this combination that the schema's own checks refuse."""
    try:
        load_settings((), environment_of(given, world, "case", world.folder / "case"))
    except SettingsError as error:
        named = {problem.where.split(" ")[0] for problem in error.problems}
        return {name for name in NAMES if environment_name(name) in named}
    return set()


def _draw_files(draw: random.Random, world: World, given: Given) -> None:
    """Base, data, the adapter to start from, and whatever else is a file."""
    method = given.get("train.method", "sft")
    last = method.rpartition(",")[2]
    base = draw.choices(list(BASES), list(BASES.values()))[0]
    base = "mixture" if given.get("lora.experts") == "true" and draw.random() < LIKELY else base
    given["model.id"] = world.path(base)
    for prefix, stage in (("", last), *((("sft_", "sft"),) if method != last else ())):
        given[f"data.{prefix}source"], fields = _source(draw, world, stage, given)
        if fields:
            given[f"data.{prefix}fields"] = fields
    files = {
        "data.validation": f"{'dpo' if last == 'orpo' else last}-validation.jsonl",
        "eval.prompts": "prompts.jsonl",
        "eval.principles": "rules.yaml",
        "gate.policy": f"policy-{given.get('gate.policy')}.yaml",
    }
    given |= {
        name: world.path(files[name]) for name in files if given.get(name) in {"FILE", "arc", "several", "export"}
    }
    if "eval.principles" in given:
        given["eval.judge"] = world.path("base")
    screened = bool(given.keys() & {"data.unsafe_labels", "data.unsafe_threshold"})
    if draw.random() < (LIKELY if screened else RARE):
        given["data.safety_model"] = world.path("classifier")
        given.update({"data.on_finding": "unsafe=skip"} if draw.random() < 1 / 2 else {})
    if draw.random() < RARE:
        rank = draw.choice(("4", "16"))
        given.update({"lora.start": world.path(f"start-{rank}"), "lora.rank": rank, "lora.alpha": "16"})
    if draw.random() < 3 * RARE:
        given["storage.cache"] = "CACHE"


def _draw_tasks(draw: random.Random, world: World, given: Given) -> None:
    """Tasks of choices, of generated answers and perplexities, and the files of their questions and examples."""
    names = draw.sample(["arc_easy", "arc_challenge", "sums", "prose", "forgetting"], draw.choice((1, 1, 2, 3)))
    files = {"sums": world.path("sums.yaml"), "prose": world.path("prose/prose.yaml")}
    given["eval.tasks"] = ",".join(files.get(name, name) for name in names)
    questions = {"arc_easy": "questions.jsonl", "arc_challenge": "challenge.jsonl"}
    places = {name: world.path(file) for name, file in questions.items() if name in names}
    if given.get("eval.num_fewshot", "0") != "0":
        places |= {f"{name}:examples": world.path("examples.jsonl") for name in places}
    if places:
        given["eval.data"] = ",".join(f"{name}={place}" for name, place in places.items())


def _source(draw: random.Random, world: World, method: str, given: Given) -> tuple[str, str]:
    """A data source for a method, and the names of its fields."""
    if method == "kto":
        names = ["labelled.jsonl"]
    elif method in {"dpo", "orpo"}:
        names = ["pairs.jsonl", "pairs.jsonl", "talked_pairs.jsonl"]
    else:
        names = ["alpaca.jsonl", "named.jsonl", "shards/*", "texts.jsonl", "messages.jsonl", "sharegpt.jsonl"]
        names += ["bad.jsonl"] * (given.get("data.on_bad_row") == "skip")
        names = ["weighted.jsonl"] if given.get("data.row_weights") == "true" else names
    if given["model.id"].rpartition("/")[2] not in {"chat", "tied"} and draw.random() < LIKELY:  # without a template
        names = [name for name in names if name not in {"messages.jsonl", "sharegpt.jsonl", "talked_pairs.jsonl"}]
    name = draw.choice(names)
    source = world.path(name)
    fields = "prompt=question,completion=answers.0.text" if name == "named.jsonl" else ""
    how = draw.random()
    if how < 0.15 and name.endswith(".jsonl"):
        source = f"{source}={draw.choice(('2x', '0.5x', '13rows', '1.3x'))}"
    elif how < 0.3 and name in {"alpaca.jsonl", "pairs.jsonl", "labelled.jsonl", "messages.jsonl"}:
        other = {"alpaca.jsonl": "more-alpaca.jsonl", "messages.jsonl": "sharegpt.jsonl"}.get(name, name)
        source = f"{source}=0.5x,{world.path(other)}=7rows" if other != name else f"{source}=1.5x"
    return source, fields


def environment_of(given: Given, world: World, run: str, output: Path) -> dict[str, str]:
    """The environment of a run with these settings."""
    common = {
        "run.id": run,
        "run.output": str(output),
        "run.spot_notices": "off",
        "run.device": "cpu",
        "train.global_batch_size": "4",
        "train.learning_rate": "2e-3",
        "train.max_length": "512",
        "checkpoint.every_steps": "3",
        "log.format": "json",
    }
    settings = {**common, **given}
    if settings.get("storage.cache") == "CACHE":
        settings["storage.cache"] = str(output / "cache")
    return {**world.environment, **{environment_name(name): value for name, value in settings.items()}}


@dataclass(frozen=True)
class Outcome:
    """One combination: its exit codes by command, the requirement that was violated, and the log of that command."""

    number: int
    given: Given
    ends: tuple[str, ...]
    broken: str | None
    log: str
    seconds: float

    @property
    def kind(self) -> str:
        """The outcome in a word."""
        first = dict(end.split(" ") for end in self.ends).get("run", "")
        return "broken" if self.broken else ("complete" if first in map(str, ENDS) else f"refused with {first}")


class _Broken(Exception):
    """A requirement was violated."""


def try_combination(
    world: World, number: int, seed: int, without: Sequence[str] = (), extra: Given | None = None
) -> Outcome:
    """Draws the combination with this number, and tests all requirements."""
    draw = random.Random(f"{seed} {number}")
    given, _ = draw_settings(draw, world)
    given = {name: value for name, value in given.items() if name not in without} | (extra or {})
    output = world.folder / f"case-{number}"
    shutil.rmtree(output, ignore_errors=True)
    began, ends = time.monotonic(), list[str]()
    trial = _Trial(world, given, output, ends)
    broken = None
    try:
        trial.carry_out(draw)
    except _Broken as error:
        broken = str(error)
    except TimeoutError as error:
        broken = f"hangs: {error}"
    if broken is None:
        shutil.rmtree(output, ignore_errors=True)
    return Outcome(number, given, tuple(ends), broken, trial.log, time.monotonic() - began)


class _Trial:
    """The commands that are run on a combination, in order; `ends` gets the exit code of each."""

    def __init__(self, world: World, given: Given, output: Path, ends: list[str]) -> None:
        self.world, self.given, self.output, self.ends = world, given, output, ends
        self.log = ""

    def carry_out(self, draw: random.Random) -> None:
        """Plans, runs, reads, and kills.

        Raises:
            _Broken: With the requirement that was violated.
        """
        whole = environment_of(self.given, self.world, "whole", self.output / "one")
        planned = self._do("plan", ["plan", "--format", "json"], whole)
        began = time.monotonic()
        code = self._do("run", [], whole)
        span = time.monotonic() - began
        if code not in ENDS:
            if code not in REFUSED:
                raise _Broken(f"ended with {code}")
            # `plan` names all problems; if there are several, the job may report another one first.
            if planned not in REFUSED:
                raise _Broken(f"`plan` ended with {planned}, and the job refused with {code}")
            started = {json.loads(line).get("stage") for line in self.log.splitlines() if line.startswith("{")}
            if started & {Stage.EVALUATE_BASE, Stage.TRAIN}:
                raise _Broken(f"was refused with {code} only in the stages {started}")
            if "JOB_" not in self.log and str(self.world.folder) not in self.log:
                raise _Broken("was refused without the name of a setting or a file")
            if draw.random() < MENDED and self._mend():
                self.carry_out(draw)
            return
        if planned != 0:
            raise _Broken(f"`plan` ended with {planned}, and the job with {code}")
        results = self._read(self.output / "one/whole", code)
        again = self._do("again", [], whole)
        if again != code:
            raise _Broken(f"ended with {code}, and with {again} when it was started again")
        self._kill(draw, code, span, results)

    def _mend(self) -> bool:
        """Removes what was refused from the combination, as a user would; False if the setting is not known."""
        problems = " ".join(
            p for line in self.log.splitlines() if '"problems"' in line for p in json.loads(line)["problems"]
        )
        named = {name for name in self.given if re.search(rf"\b{environment_name(name)}\b", problems)}
        if "no multiple-choice task" in problems:
            self.given["eval.tasks"] += ",arc_easy"
            self.given["eval.data"] = f"arc_easy={self.world.path('questions.jsonl')}"
            return True
        taken = named & pool().keys()
        for name in taken:
            del self.given[name]
        return bool(taken)

    def _read(self, run: Path, code: int) -> dict[str, Any]:
        """The manifest of a complete run, after checking that it verifies."""
        results: dict[str, Any] = json.loads((run / RESULTS).read_bytes())
        schema = json.loads((Path(job.__file__).parent / "results.schema.json").read_bytes())
        try:
            jsonschema.validate(results, schema)
        except jsonschema.ValidationError as error:
            raise _Broken(f"the manifest is not valid: {error.message} at {list(error.absolute_path)}") from None
        if (results["gate"]["passed"] is False) != (code == 3):
            raise _Broken(f"ended with {code}, and the gate is {results['gate']['passed']}")
        plain = {**self.world.environment, "JOB_LOG__FORMAT": "json"}
        for command in (
            ["verify", str(run)],
            ["status", str(run)],
            ["report", str(run), "--output", str(self.output / "r.html")],
        ):
            if end := self._do(command[0], command, plain):
                raise _Broken(f"`{command[0]}` ended with {end}")
        return results

    def _kill(self, draw: random.Random, code: int, span: float, results: dict[str, Any]) -> None:
        """A second run, killed once or twice, publishes the same."""
        steps = max(1, int(results["training"]["steps"]))
        fault = draw.choice(
            [
                f"kill@step={draw.randint(1, steps)}",
                f"sigterm@step={draw.randint(1, steps)}",
                f"kill@stage={draw.choice(list(Stage))}",
                f"kill@upload={draw.randint(1, 4)}",
                "",
                "",
            ]
        )
        killed = environment_of(
            self.given | ({"fault": fault} if fault else {}), self.world, "whole", self.output / "two"
        )
        plain = {**self.world.environment, "JOB_LOG__FORMAT": "json"}
        after = [draw.uniform(0.1, 1) * span for _ in range(draw.choice((1, 2)))]
        for attempt in range(MAX_ATTEMPTS):
            seconds = after[attempt] if not fault and attempt < len(after) else SECONDS
            end = self._do(f"killed[{fault or f'{seconds:.1f}s'}]".replace(" ", ""), [], killed, seconds)
            if end not in {-signal.SIGKILL, -signal.SIGTERM, os.EX_TEMPFAIL}:
                break
            run = self.output / "two/whole"
            if (
                run.exists()
                and (said := self._do("status", ["status", str(run)], plain))
                and "is no run" not in self.log
            ):
                raise _Broken(f"`status` of the interrupted run ended with {said}")
        if end != code:
            raise _Broken(f"ended with {end} after it was killed, and with {code} undisturbed")
        resumed = self._read(self.output / "two/whole", code)
        if different := [key for key, value in facts_of(results).items() if facts_of(resumed).get(key) != value]:
            raise _Broken(f"resumed, it published other bits: {', '.join(different)}")
        if facts_of(results).keys() != facts_of(resumed).keys():
            raise _Broken("resumed, it published other files")
        for part in ("evaluation", "gate", "exports", "data"):
            if wrong := list(_differences(results.get(part), resumed.get(part), part)):
                raise _Broken(f"resumed, its manifest says otherwise: {'; '.join(wrong)[:500]}")

    def _do(self, name: str, words: list[str], environ: Mapping[str, str], seconds: float = SECONDS) -> int:
        """The exit code of a command; its output goes to the log. A process that takes too long is killed."""
        out, err = self.output / "stdout", self.output / "stderr"
        self.output.mkdir(parents=True, exist_ok=True)
        out.write_text("")
        err.write_text("")
        try:
            code = hot_forks.wait(hot_forks.start(words, environ, out, err), seconds)
        except TimeoutError:
            self.log = err.read_text(errors="replace") + out.read_text(errors="replace")
            if seconds == SECONDS:
                raise
            code = -signal.SIGKILL
        self.log = err.read_text(errors="replace") + out.read_text(errors="replace")
        self.ends.append(f"{name} {code}")
        known = set(exit_codes()) - {1} | {0, -signal.SIGKILL, -signal.SIGTERM}
        if "Traceback" in self.log or "a bug:" in self.log or code not in known:
            raise _Broken(f"{name} ended with {code} and a traceback")
        return code


def _differences(one: Any, two: Any, where: str) -> Iterator[str]:
    """Where two parts of manifests differ, except for seconds and figures computed from them."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in [*one, *(key for key in two if key not in one)]:
            if not any(
                word in key
                for word in ("seconds", "_at", "per_second", "cache", "attempt", "joules", "memory", "reused_from")
            ):
                yield from _differences(one.get(key), two.get(key), f"{where}.{key}")
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for n, (left, right) in enumerate(zip(one, two, strict=True)):
            yield from _differences(left, right, f"{where}[{n}]")
    elif one != two:
        yield f"{where}: {one!r} and {two!r}"


def main() -> int:
    """Tries the combinations and prints each outcome; exit code 1 if a requirement was violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first combination")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no combination after so many")
    parser.add_argument("--case", type=int, help="repeat this one, and print its log")
    parser.add_argument("--without", default="", help="leave these settings out, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="with this value in addition")
    parser.add_argument("--world", type=Path, help="folder for the files, to use them again")
    chosen = parser.parse_args()
    numbers = [chosen.case] if chosen.case is not None else range(chosen.first, chosen.first + chosen.count)
    hot_forks.heat([])
    outcomes, began = list[Outcome](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qlora-job-combinations-") as name:
        world = clouds.in_fork(partial(build, (chosen.world or Path(name)).absolute()))  # threads do not survive a fork
        for number in numbers:
            if time.monotonic() - began > 60 * chosen.minutes:
                break
            extra = dict(item.split("=", 1) for item in chosen.set)
            outcome = try_combination(world, number, chosen.seed, chosen.without.split(","), extra)
            outcomes.append(outcome)
            which = f"--seed {chosen.seed} --case {number}"
            print(f"{which}: {outcome.kind}, {outcome.seconds:.1f} s; {', '.join(outcome.ends)}", flush=True)
            if outcome.broken or chosen.case is not None or outcome.kind.startswith("refused"):
                folder = f"{world.folder}/"
                print(
                    "    " + " ".join(f"{key}={value}" for key, value in outcome.given.items()).replace(folder, ""),
                    flush=True,
                )
            if outcome.broken or chosen.case is not None:
                print(f"    BROKEN: {outcome.broken}", flush=True)
            if outcome.kind != "complete" or chosen.case is not None:
                lines = [line for line in outcome.log.splitlines() if '"error"' in line] or outcome.log.splitlines()
                print("\n".join(f"    {line[:3000]}" for line in lines[-2:]), flush=True)
    kinds = Counter(outcome.kind for outcome in outcomes)
    told = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    print(f"{len(outcomes)} combinations in {time.monotonic() - began:.0f} s, seed {chosen.seed}: {told}")
    return 1 if kinds["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
