"""An already quantized base is recorded as such, and parameters that are not quantized are counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import DataError
from job.evaluation.scoring import score_sequence
from job.model.load_base import load_base
from job.model.lora import add_adapter
from job.model.model_record import describe_model, held
from job.model.packing_check import choose_packing
from job.records import ModelRecord, Question
from job.training.lm_head_loss import losses_of
from tests.families.models import make_model as make_family
from tests.helpers import LINEAR, load_plain, make_examples, make_model

CPU = torch.device("cpu")


def quantized(base_folder: Path, folder: Path, **how: Any) -> Path:
    """The tiny base as somebody published it, quantized by bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        base_folder, quantization_config=BitsAndBytesConfig(**how), device_map={"": CPU}, dtype=torch.bfloat16
    )
    shutil.copytree(base_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder)
    return folder


def load(folder: Path, quantization: str = "nf4") -> Any:
    """With an adapter on what is found."""
    base = load_base(
        folder,
        quantization=quantization,
        double_quantization=True,
        dtype=torch.float32,
        device=CPU,
        max_length=64,
    )
    return add_adapter(base, rank=4, alpha=8, dropout=0.0, target_modules=None, seed=1)


def record(model: Any) -> ModelRecord:
    """What the manifest would say."""
    return describe_model(model, name="x", revision=None, sha256="0")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, ("fp4", False)),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, ("nf4", False)),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            | {"bnb_4bit_compute_dtype": torch.bfloat16},
            ("nf4", True),
        ),
    ],
    ids=["fp4", "nf4", "nf4, double, for bf16"],
)
@pytest.mark.parametrize("asked", ["nf4", "none"])
def test_a_base_that_came_quantized_is_what_it_is(
    base_folder: Path, tmp_path: Path, how: dict[str, Any], expected: tuple[str, bool], asked: str
) -> None:
    """Whatever was asked for; it computes in this machine's dtype, trains packed, and its weights are counted once."""
    model = load(quantized(base_folder, tmp_path / "base", **how), asked)
    said = record(model)
    assert (said.quantization, said.double_quantization) == expected
    plain = record(make_model(base_folder))
    assert said.parameters == plain.parameters
    assert 0 < said.quantized_parameters < said.parameters
    assert {m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")} == {torch.float32}
    assert choose_packing(model, make_examples(4), max_length=64, losses=losses_of(model)).packed
    assert score_sequence(model.eval(), [Question((0, 5, 6), ((7, 8),))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "how",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    ],
    ids=["nf4", "int8", "nf4, stored as bf16"],
)
def test_what_is_not_quantized_is_in_the_dtype_asked_for(
    base_folder: Path, tmp_path: Path, how: dict[str, Any], dtype: torch.dtype
) -> None:
    """Embedding, norms and head of a base saved in bf16 compute in the run's dtype, which the record names."""
    folder = quantized(base_folder, tmp_path / "base", **how)
    base = load_base(folder, quantization="nf4", double_quantization=True, dtype=dtype, device=CPU, max_length=64)
    plain = [p for p in base.parameters() if p.is_floating_point() and getattr(p, "quant_state", None) is None]
    assert len(plain) > 4
    assert {p.dtype for p in plain} == {dtype}
    assert base.dtype == dtype
    expected = "int8" if "load_in_8bit" in how else "nf4"
    assert held(base).quantization == expected


@pytest.mark.parametrize("said", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_weights_that_are_not_quantized_as_config_json_says_are_refused(
    base_folder: Path, tmp_path: Path, said: dict[str, Any]
) -> None:
    """Plain weights under a configuration of quantized ones are no model, and no bug of the job."""
    shutil.copytree(base_folder, tmp_path / "base")
    path = tmp_path / "base/config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes", **said}}
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"for quantized weights, but those of model\.layers\.0.* are not"):
        load(tmp_path / "base")


def test_what_is_asked_for_is_counted(base_folder: Path) -> None:
    """In NF4 all projections are; unquantized nothing is."""
    model = make_model(base_folder, quantization="nf4")
    linear = sum(m.weight.numel() for n, m in make_model(base_folder).named_modules() if n.endswith(LINEAR))
    assert record(model).quantized_parameters == linear
    assert held(make_model(base_folder)).weights == 0
    assert record(model).adapted == sorted(LINEAR)


def test_experts_are_held_in_four_bits(tmp_path: Path) -> None:
    """Of a mixture all but embedding, head, norms and routers is, and the record counts it."""
    make_family("mixtral", tmp_path)
    model = load(tmp_path)
    said = record(model)
    plain = sum(p.numel() for n, p in load_plain(tmp_path).named_parameters() if "experts" in n or "_proj" in n)
    assert said.quantization == "nf4"
    assert said.quantized_parameters == plain > 0.8 * said.parameters
    assert said.adapted == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("gpt_neox", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
        ("falcon", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
        ("opt", ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]),
        ("bloom", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
        *((name, sorted(LINEAR)) for name in ("llama", "mistral", "qwen2", "gemma3")),
        ("mamba", ["dt_proj", "in_proj", "x_proj"]),
    ],
)
def test_layers_are_found_in_the_model(tmp_path: Path, family: str, names: list[str]) -> None:
    """All linear ones but the head, by whatever name; of Llama's family the seven of the reference recipe."""
    make_family(family, tmp_path)
    model = load(tmp_path, "none")
    assert record(model).adapted == names


def test_of_a_model_that_also_sees_the_text_part_is_adapted(tmp_path: Path) -> None:
    """No layer of its vision tower is, although some bear the same names; and PEFT reads that from the file."""
    from job.model.adapter_files import save_adapter
    from job.model.lora import trainable

    make_family("gemma3", tmp_path / "mm")
    config = json.loads((tmp_path / "mm/config.json").read_text())
    if "vision_config" not in config:
        pytest.skip("this version of transformers saves its text part alone")
    model = load(tmp_path / "mm", "none")
    assert all("language_model" in name for name in trainable(model))
    save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    outside = [n for n, _ in model.get_base_model().named_modules() if "vision" in n and n.endswith("q_proj")]
    assert bool(outside) == all("." in name for name in saved["target_modules"])  # full names: no other layer is meant
    assert not any("vision" in name for name in saved["target_modules"])
