"""Adapters of multimodal checkpoints: they load into the class that the base's config.json names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import SettingsError
from job.model.adapter_files import load_adapter, save_adapter
from job.model.files import SOURCE_CONFIG
from job.model.load_base import PLAIN, inspect, load_base
from job.model.lora import add_adapter, trainable
from job.model.packed_attention import use
from job.model.published_names import PublishedNames, find_published_names
from job.model.quantized_cache.cache import save
from job.model.quantized_cache.layout import entry_at
from job.model.target_modules import check_targets, find_targets, linear_layers, named_by
from tests.families.models import make_model as make_family
from tests.helpers import fill_adapter

SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR_DIMS = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
QWEN = {
    "text_config": SIZES | HEADS | LINEAR_HEADS | LINEAR_DIMS,
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
}
GEMMA = {
    "text_config": SIZES | HEADS,
    "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def checkpoint(kind: str, parts: dict[str, Any], folder: Path) -> Any:
    """A tiny multimodal checkpoint with random weights; returns the model that its config.json names."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **parts), dtype=torch.float32)
    model.save_pretrained(folder)
    return model


def adapted(folder: Path, *, quantization: str = "none", quantized: bool = False) -> Any:
    """What the job trains on it."""
    base = load_base(
        folder,
        quantization=quantization,
        double_quantization=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_length=512,
        quantized=quantized,
    )
    return add_adapter(base, rank=4, alpha=4, dropout=0.0, target_modules=None, seed=1)


@pytest.mark.parametrize(("kind", "parts"), [("qwen3_5", QWEN), ("gemma3", GEMMA)])
def test_the_adapter_loads_into_the_published_class(kind: str, parts: dict[str, Any], tmp_path: Path) -> None:
    """Every tensor arrives there, none is missing, none is on the part that sees; and the job reads it back."""
    from peft import PeftModel

    published = checkpoint(kind, parts, tmp_path / "base")
    model = fill_adapter(adapted(tmp_path / "base"))
    names = find_published_names(model, tmp_path / "base")
    assert names.architecture == type(published).__name__
    save_adapter(model, tmp_path / "adapter", base="org/model", revision=None, names=names)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "exclude_modules" not in config
    assert ("q_proj" in config["target_modules"]) == (kind == "qwen3_5")  # Gemma's vision has layers of that name, too
    loaded = PeftModel.from_pretrained(published, tmp_path / "adapter")
    tensors = {name: tensor for name, tensor in loaded.state_dict().items() if "lora_" in name}
    expected = {names.published(name): tensor for name, tensor in trainable(model).items()}
    assert len(expected) >= 4 * 7 * 2
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    again = adapted(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter", names)
    assert all(torch.equal(tensor, trainable(model)[name]) for name, tensor in trainable(again).items())
    use(model.get_base_model(), PLAIN)
    loaded.eval()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, loaded(ids).logits, atol=1e-5)


def test_a_restart_from_the_quantized_cache_publishes_the_same_names(base_folder: Path, tmp_path: Path) -> None:
    """The quantized base is saved as the class that was loaded; which one its source names is kept beside it."""
    checkpoint("qwen3_5", QWEN, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base_folder / name, tmp_path / "base" / name)
    first = adapted(tmp_path / "base", quantization="nf4")
    found = find_published_names(first, tmp_path / "base")
    assert found == PublishedNames("Qwen3_5ForConditionalGeneration", "model.", "model.language_model.")
    shelf = entry_at("key", tmp_path / "cache", None)
    assert save(first.unload(), tmp_path / "base", shelf).key == "key"
    again = adapted(shelf.folder, quantization="nf4", quantized=True)
    assert find_published_names(again, shelf.folder, quantized=True) == found
    (shelf.folder / SOURCE_CONFIG).unlink()  # kept by an older version
    assert find_published_names(again, shelf.folder, quantized=True).architecture == "Qwen3_5ForCausalLM"


def test_a_text_model_keeps_its_names(base_folder: Path) -> None:
    """Nothing is renamed where the loaded class is the one that config.json names."""
    assert find_published_names(adapted(base_folder), base_folder) == PublishedNames("MistralForCausalLM")


def test_tensors_bear_the_name_by_which_peft_loads_them(tmp_path: Path) -> None:
    """PEFT renames what bears another name in the checkpoint: of Laguna's adapter every tensor arrives nevertheless."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    make_family("laguna", tmp_path / "base")
    model = fill_adapter(adapted(tmp_path / "base"))
    names = find_published_names(model, tmp_path / "base")
    assert names.files  # otherwise this tests nothing
    save_adapter(model, tmp_path / "adapter", base="org/model", revision=None, names=names)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    tensors = {name: tensor for name, tensor in loaded.state_dict().items() if "lora_" in name}
    assert tensors.keys() == trainable(model).keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in trainable(model).items())
    again = adapted(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter", names)
    assert all(torch.equal(tensor, trainable(model)[name]) for name, tensor in trainable(again).items())


def test_a_layer_whose_adapter_has_no_such_name_gets_none(tmp_path: Path) -> None:
    """Of Inkling 2 PEFT would ignore some tensors under any name: those layers are left out, and refused if named."""
    make_family("inkling2_text", tmp_path)
    base = inspect(tmp_path, max_length=64, targets=None)[1]
    assert "weight_proj" in {name.rsplit(".", 1)[-1] for name in linear_layers(base)}
    found = find_targets(base)
    assert any(".q_proj" in name for name in named_by(linear_layers(base), found))  # q_proj.linear from 5.24 on
    assert "weight_proj" not in found
    with pytest.raises(SettingsError, match=r"JOB_LORA__TARGET_MODULES: .* weight_proj .* leave them out"):
        check_targets(base, [*found, "weight_proj"])


@pytest.mark.parametrize(("family", "router"), [("llama4_text", "router"), ("phimoe", "router")])
def test_a_router_that_is_no_matrix_product_gets_no_adapter(tmp_path: Path, family: str, router: str) -> None:
    """Some classes derive from torch's linear layer and return a tuple: PEFT would fail on them in training."""
    make_family(family, tmp_path)
    base = inspect(tmp_path, max_length=64, targets=None)[1]
    assert any(name.endswith(f".{router}") and hasattr(layer, "in_features") for name, layer in base.named_modules())
    assert router not in find_targets(base)
    with pytest.raises(SettingsError, match=f"no linear {router}"):
        check_targets(base, [router])


def test_a_linear_layer_of_another_class_gets_one(tmp_path: Path) -> None:
    """Falcon's own class computes what torch's does."""
    make_family("falcon", tmp_path)
    assert "query_key_value" in find_targets(inspect(tmp_path, max_length=64, targets=None)[1])
