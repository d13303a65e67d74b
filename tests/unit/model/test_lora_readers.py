"""The published adapter in vLLM's LoRA reader: required fields, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from job.common.lora_readers import MAX_RANK, published_rank, why_not_served
from job.model.adapter_files import save_adapter
from job.model.adapter_options import AdapterOptions
from job.report.model_card import public_base
from job.settings.load import load_settings, plain_values
from tests.unit.model.test_adapter_options import OPTIONS, make

TENSOR = re.compile(r"base_model\.model\.[\w.]+\.lora_[AB]\.weight")
"""What the reader takes apart; other names are refused."""


def refused(config: Mapping[str, Any], names: list[str]) -> list[str]:
    """What vLLM's reader says to a folder with this configuration and these tensors; its rules in other words."""
    found = [f"missing {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    found += [key for key in ("modules_to_save", "use_dora") if config.get(key)]
    found += ["bias"] if config.get("bias", "none") != "none" else []
    found += ["rank"] if max([config["r"], *config.get("rank_pattern", {}).values()]) > MAX_RANK else []
    found += ["kind"] if config["peft_type"] != "LORA" else []
    return [*found, *(["tensor"] if not all(map(TENSOR.fullmatch, names)) else [])]


def saved(options: AdapterOptions, base: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Configuration and tensor names of a published adapter."""
    save_adapter(
        make(base, options, quantization="none", dtype=torch.float32), folder, base="org/model", revision="abc"
    )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")), names


WORDS = {
    "rslora": ["--lora.use_rslora=true"],
    "dora": ["--lora.use_dora=true"],
    "layers": ["--lora.layers=1"],
    "patterns": ["--lora.rank_pattern=q_proj=4", "--lora.alpha_pattern=v_proj=64"],
    "gaussian": ["--lora.init=gaussian"],
}


@pytest.mark.parametrize("name", ["plain", *WORDS])
def test_what_is_said_of_the_settings_is_what_the_reader_says(name: str, base_folder: Path, tmp_path: Path) -> None:
    """Every kind of adapter, saved: the reader takes it if `why_not_served` has nothing to say, and only then."""
    config, names = saved(OPTIONS.get(name, AdapterOptions()), base_folder, tmp_path)
    said = why_not_served(plain_values(load_settings(WORDS.get(name, []), environ={})))
    assert bool(said) == bool(refused(config, names)), (said, refused(config, names))
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "abc")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--lora.rank=1024"], "rank of 1024"),
        (["--lora.rank=512", "--lora.init=pissa"], "rank of 1024"),
        (["--lora.rank_pattern=q_proj=600"], "rank of 600"),
        (["--lora.modules_to_save=lm_head"], "JOB_LORA__MODULES_TO_SAVE"),
        (["--model.add_tokens=<a>"], "JOB_MODEL__ADD_TOKENS"),
        (["--lora.kind=adalora", "--lora.tinit=1", "--lora.tfinal=1"], "adalora"),
    ],
)
def test_reasons_name_their_setting(words: list[str], part: str) -> None:
    """What is not served is said with the setting that chose it."""
    (reason,) = why_not_served(plain_values(load_settings(words, environ={})))
    assert part in reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (OPTIONS["patterns"], ["--lora.rank_pattern=q_proj=4,1\\.mlp\\.up_proj=32"]),
        (OPTIONS["olora"], ["--lora.init=olora", "--lora.rank_pattern=q_proj=4"]),
    ],
)
def test_the_rank_to_admit_is_the_largest_in_the_file(
    options: AdapterOptions, words: list[str], base_folder: Path, tmp_path: Path
) -> None:
    """What is asked of `--max-lora-rank` is the largest rank that the published adapter has, doubled where it is."""
    config, _ = saved(options, base_folder, tmp_path)
    settings = plain_values(load_settings(["--lora.rank=8", *words], environ={}))
    assert published_rank(settings) == max([config["r"], *config.get("rank_pattern", {}).values()])


def test_old_manifests_have_fewer_settings() -> None:
    """Of a run that was made before these settings there is nothing to say."""
    assert why_not_served({"lora.rank": 16}) == []


def test_the_base_is_named_for_others() -> None:
    """By hub id and commit, by JOB_MODEL__NAME, or by the folder's last part: never by a path of this machine."""
    assert public_base("org/model", "abc", None) == ("org/model", "abc")
    assert public_base("/data/model", None, "org/model") == ("org/model", None)
    assert "/" not in public_base("/data/model", None, None)[0]
