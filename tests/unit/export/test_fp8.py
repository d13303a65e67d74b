"""The format `fp8`: its bytes by independent arithmetic, its configuration, and how libraries read it."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from job.common.hashing import hash_file
from job.evaluation.scorer import score_questions
from job.export import fp8, tensor_files
from job.export.exported_model import ScoringOptions, load_exported, load_quantized
from job.export.formats import DerivedInputs
from job.records import QuantizationRecord, Question
from tests.helpers import make_base

LARGEST = 448.0


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16, as a merge leaves it, with a row of zeros."""
    folder = tmp_path_factory.mktemp("merged")
    make_base(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    model.save_pretrained(folder)
    return folder


def make(merged: Path, folder: Path) -> QuantizationRecord:
    """The format's files, in a folder that is made."""
    return fp8.make_fp8(
        DerivedInputs(
            merged=merged,
            kind="",
            folder=folder,
            work=folder.with_name("work"),
            calibration=[],
            device=torch.device("cpu"),
            seed=0,
            check_stop=lambda **_: None,
        )
    )


@pytest.fixture(scope="module")
def made(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizationRecord]:
    """Made once."""
    folder = tmp_path_factory.mktemp("made") / "fp8"
    return folder, make(merged, folder)


def test_the_weights_are_those_of_the_formula(merged: Path, made: tuple[Path, QuantizationRecord]) -> None:
    """Scale, rounding and limits are as documented, computed here by float64; all other tensors are as they were."""
    before, after = load_file(merged / "model.safetensors"), load_file(made[0] / "model.safetensors")
    quantized = {name for name in before if after[name].dtype == torch.float8_e4m3fn}
    assert len(quantized) == made[1].layers == 7 * 2
    for name in before.keys() - quantized:
        assert torch.equal(before[name], after[name])
    for name in quantized:
        weight = before[name].double()
        scale = (weight.abs().amax(1, keepdim=True) / LARGEST).float().bfloat16()
        assert torch.equal(after[f"{name}_scale"][scale > 0], scale[scale > 0])
        step = after[f"{name}_scale"].double()
        error = (after[name].double() * step - weight).abs()
        # E4M3 has three bits of mantissa: half of the last one, or half of the smallest subnormal number
        assert (error <= torch.maximum(weight.abs() * 2**-4, step * 2**-10) * 1.0001).all()
    assert (after["model.layers.0.self_attn.q_proj.weight"][3].float() == 0).all()


def test_the_library_reads_it_alike(merged: Path, made: tuple[Path, QuantizationRecord]) -> None:
    """compressed-tensors decompresses every layer to Q times its scale, by the configuration."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    said = json.loads((made[0] / "config.json").read_text())["quantization_config"]
    how = QuantizationConfig.model_validate(said)
    (group,) = how.config_groups.values()
    assert (how.quant_method, how.format, how.quantization_status.value) == (
        "compressed-tensors",
        "float-quantized",
        "compressed",
    )
    weights, inputs = group.weights, group.input_activations
    assert (weights.num_bits, weights.type, weights.strategy, weights.symmetric, weights.dynamic) == (
        8,
        "float",
        "channel",
        True,
        False,
    )  # fmt: skip - vLLM's CompressedTensorsW8A8Fp8 asks for these
    assert (inputs.num_bits, inputs.type, inputs.strategy, inputs.symmetric, inputs.dynamic) == (
        8, "float", "token", True, True,
    )  # fmt: skip
    assert group.targets == ["Linear"]
    assert how.ignore == ["lm_head"] == made[1].kept
    tensors = load_file(made[0] / "model.safetensors")
    reader = BaseCompressor.get_value_from_registry(said["format"])
    for name in (name for name in tensors if f"{name}_scale" in tensors):
        own = {"weight": tensors[name], "weight_scale": tensors[f"{name}_scale"]}
        found = reader.decompress(own, group)["weight"]
        assert torch.equal(found, (tensors[name].bfloat16() * own["weight_scale"]))


def test_made_twice_it_has_the_same_bytes(merged: Path, made: tuple[Path, QuantizationRecord], tmp_path: Path) -> None:
    """No time, no path and no random number gets into the files."""
    assert make(merged, tmp_path / "again") == made[1]
    files = {path.name: hash_file(path) for path in made[0].iterdir()}
    assert {path.name: hash_file(path) for path in (tmp_path / "again").iterdir()} == files
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= files.keys()
    assert str(merged) not in (made[0] / "config.json").read_text()


def test_several_files_have_a_whole_index(
    merged: Path, made: tuple[Path, QuantizationRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model is written in several files, with the same tensors, and `check_stop` called before each tensor."""
    monkeypatch.setattr(tensor_files, "SHARD", 100_000)
    make(merged, tmp_path / "parts")
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())["weight_map"]
    whole = load_file(made[0] / "model.safetensors")
    assert index.keys() == whole.keys()
    assert len(set(index.values())) > 1
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / "parts" / file)[name].view(torch.uint8), whole[name].view(torch.uint8))


def test_the_record_tells_what_was_done(made: tuple[Path, QuantizationRecord]) -> None:
    """Scheme, bits, library and version, and no calibration."""
    record = made[1]
    assert (record.method, record.scheme, record.bits, record.group_size) == (
        "compressed-tensors",
        "FP8_DYNAMIC",
        8,
        None,
    )
    assert (record.library, record.version) == ("compressed-tensors", version("compressed-tensors"))
    assert record.calibration is None


def test_it_is_scored_as_transformers_loads_it(merged: Path, made: tuple[Path, QuantizationRecord]) -> None:
    """The loaded model computes with weights and activations in 8 bits, packed as alone: near the merged one."""
    questions = [Question((5, 9, number, 40), ((7, 8), (30 + number,), (12, 13, 14))) for number in range(6)]

    def scores(folder: Path, *, packed: bool) -> torch.Tensor:
        how = ScoringOptions(torch.device("cpu"), torch.float32, 512, packed)
        found = (load_exported if folder == merged else load_quantized)(folder, how)
        assert (found.dtype, found.scored_in) == ("bf16", "bf16")
        asked = score_questions(found.model, questions)
        found.close()
        assert not any(parameter.numel() for parameter in found.model.parameters())
        return torch.tensor([choice.log_likelihood for choices in asked for choice in choices])

    plain, packed, alone = scores(merged, packed=True), scores(made[0], packed=True), scores(made[0], packed=False)
    assert not torch.equal(plain, packed)
    assert torch.allclose(plain, packed, rtol=0.1, atol=0.5)
    assert torch.allclose(packed, alone, rtol=0.05, atol=0.1)


def test_experts_in_one_tensor_are_refused() -> None:
    """A family whose experts are one tensor is refused with the tensor's name; before training."""
    config: Any = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert "experts" in fp8.check_fp8(empty, "")


def test_a_model_without_linear_layers_is_refused() -> None:
    """GPT-2's layers are no `Linear`, so nothing would be quantized."""
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert "no linear layers" in fp8.check_fp8(empty, "")
