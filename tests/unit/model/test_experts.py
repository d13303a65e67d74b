"""A mixture's experts in 4 bits: bitsandbytes' values, transformers' results, the same bits in every placement."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from job.distributed.processes import ALONE
from job.errors import SettingsError
from job.export.merge_plan import DEQUANTIZED, ORIGINAL, candidates
from job.model.adapter_files import load_adapter, save_adapter
from job.model.adapter_options import AdapterOptions
from job.model.architecture import read_config
from job.model.experts import expert_tensors, left_plain, packed, quantized_experts
from job.model.fused.frozen_weights import forget_dequantized, fuse_layers
from job.model.fused.kernels import TORCH
from job.model.gradient_checkpointing import recompute_activations
from job.model.load_base import inspect
from job.model.lora import adapter_off, add_adapter, trainable
from job.model.model_record import describe_model, held
from job.model.packed_layout import Segment, build_layout
from job.model.packing_check import choose_packing
from job.model.placed_loading import save_quantized
from job.model.placed_weights import placement_of, taking_part
from job.model.published_names import find_published_names
from job.model.target_modules import resolve_targets
from job.planning.time_model import training_flops
from job.results.compute import PETA, compute_spent
from job.training.lm_head_loss import losses_of
from job.training.memory_model import Setup, weight_bytes
from job.training.setup_of_model import setup_of
from tests.families.models import make_model
from tests.helpers import fill_adapter, load_plain, make_examples

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
"""Two of which the job computes the experts, and one with biases, a gate of its own and weights the other way."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each."""
    made = {family: tmp_path_factory.mktemp("mixtures") / family for family in FAMILIES}
    for family, folder in made.items():
        make_model(family, folder)
    return made


def load(folder: Path, **changes: Any) -> Any:
    """The base in NF4."""
    return load_plain(folder, **{"quantization": "nf4"} | changes)


def with_adapter(base: Any) -> Any:
    """On attention's layers, with random weights."""
    how: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": "attention", "seed": 1}
    return fill_adapter(add_adapter(base, **how))


def logits(model: Any, length: int = 24) -> torch.Tensor:
    """(length, vocabulary) of one packed sequence of two segments."""
    ids = torch.arange(length)[None] * 7 % 390 + 5
    layout = build_layout([Segment(0, 9), Segment(9, length)], torch.device("cpu"))
    positions = torch.tensor([[*range(9), *range(length - 9)]])
    found: torch.Tensor = model(input_ids=ids, position_ids=positions, layout=layout, use_cache=False).logits[0]
    return found


def results(model: Any) -> list[torch.Tensor]:
    """Logits, and the gradient of the adapter."""
    model.zero_grad()
    found = logits(model)
    found.square().mean().backward()  # type: ignore[no-untyped-call]
    return [found.detach(), *(p.grad for p in trainable(model).values())]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("double", [True, False])
def test_they_are_what_bitsandbytes_makes_of_them(bases: dict[str, Path], family: str, *, double: bool) -> None:
    """Packed bytes and dequantized values, of each tensor that transformers loads."""
    plain = {f"{path}.{name}": getattr(m, name) for path, m, name in expert_tensors(load_plain(bases[family]))}
    found = list(expert_tensors(load(bases[family], double_quantization=double)))
    assert len(found) == len(plain) > 0
    for path, module, name in found:
        weight = packed(module, name)
        assert weight is not None
        expected, state = quantize_4bit(plain[f"{path}.{name}"].data, quant_type="nf4", compress_statistics=double)
        assert torch.equal(weight.data, expected)
        assert torch.equal(getattr(module, name), dequantize_4bit(expected, state))
        assert weight.quant_state.nested == double


@pytest.mark.parametrize("family", FAMILIES)
def test_they_compute_what_transformers_computes(bases: dict[str, Path], family: str) -> None:
    """By its plain loop over experts, with the dequantized values as ordinary weights; forward and backward."""
    model, other = with_adapter(load(bases[family])), with_adapter(dequantized(load(bases[family])))
    other.get_base_model().set_experts_implementation("eager")
    for found, expected in zip(results(model), results(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def dequantized(base: Any) -> Any:
    """The same with its experts' values as ordinary parameters, computed by transformers."""
    for _, module, name in list(expert_tensors(base)):
        values = getattr(module, name).clone()
        torch.nn.utils.parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
        module.__dict__.pop("forward", None)
    assert not any(packed(module, name) is not None for _, module, name in expert_tensors(base))
    return base


def with_experts(base: Any, **options: Any) -> Any:
    """With an adapter on attention and on the experts."""
    how: dict[str, Any] = {"rank": 6, "alpha": 9, "dropout": 0.0, "target_modules": "attention", "seed": 1}
    return fill_adapter(add_adapter(base, **how, options=AdapterOptions(experts=True, **options)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("options", [{}, {"layers": (1, 2), "use_rslora": True}], ids=["all", "some layers"])
def test_peft_loads_an_adapter_of_experts(
    bases: dict[str, Path], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """Onto the plain base, every tensor in its place; and the job reads it back."""
    model = with_experts(load(bases[family]), **options)
    names = find_published_names(model, bases[family])
    save_adapter(model, tmp_path, base=str(bases[family]), revision=None, names=names)
    other = PeftModel.from_pretrained(load_plain(bases[family]), tmp_path)
    theirs = {name: tensor for name, tensor in other.named_parameters() if "lora_" in name}
    ours = trainable(model)
    assert ours.keys() == theirs.keys()
    assert sum("experts" in name for name in ours) == 4 * len(options.get("layers", range(4)))
    assert_same(list(ours.values()), [theirs[name] for name in ours])
    again = with_experts(load(bases[family]), **options)
    for parameter in trainable(again).values():
        parameter.data.zero_()
    load_adapter(again, tmp_path, names)
    assert_same(list(trainable(again).values()), list(ours.values()))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("way", ["added", "fused", "kept"])
def test_adapters_of_experts_compute_what_peft_computes(bases: dict[str, Path], family: str, way: str) -> None:
    """Logits and all gradients are those of PEFT's own modules around ordinary parameters; switched off, the base's."""
    model, other = with_experts(load(bases[family])), with_experts(dequantized(load(bases[family])))
    for module in other.modules():
        module.__dict__.pop("forward", None)
    if way != "added":
        assert fuse_layers(model, keep_dequantized=way == "kept", kernels=TORCH) != "nothing"
    expected = results(other)
    assert sum(float(one.abs().max()) > 0 for one in expected) == len(expected)
    for found, wanted in zip(found_first := results(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=5e-6)
    with adapter_off(model), adapter_off(other), torch.no_grad():
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=5e-6)
    forget_dequantized(model)
    assert_same(results(model), found_first)


def test_experts_of_other_kinds_get_no_adapter(bases: dict[str, Path], base_folder: Path) -> None:
    """Those with biases, and a model without any, are refused before weights are loaded."""
    for folder, why in ((bases["gpt_oss"], "with biases"), (base_folder, "has no experts")):
        with pytest.raises(SettingsError, match=f"JOB_LORA__EXPERTS.*{why}"):
            inspect(folder, max_length=64, targets="attention", options=AdapterOptions(experts=True))


def test_no_dequantized_experts_are_kept_for_the_backward_pass(bases: dict[str, Path]) -> None:
    """What autograd keeps has fewer numbers than a single layer's experts, of which the model has four."""
    model, kept = with_adapter(load(bases["mixtral"])), dict[int, int]()
    largest = max(packed(module, name).quant_state.shape.numel() for _, module, name in expert_tensors(model))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = logits(model)
    assert max(kept.values()) < largest
    del found


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_bits_do_not_depend_on_the_place_or_on_keeping(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """In host memory, sharded, recomputed, from a kept base: the same results; and a kept base has the same files."""
    model = with_adapter(load(bases[family]))
    expected, said, numbers = results(model), held(model), model.num_parameters()
    recompute_activations(model, on=True)
    model.train()
    assert_same(results(model), expected)
    for place in ("gpu", "host", "sharded"):
        (tmp_path / place).mkdir()
        base = load(bases[family], placement=place, group=ALONE)
        assert placement_of(base) == place
        with taking_part(base):
            save_quantized(base, tmp_path / place, shard="100KB")
            assert_same(results(placed := with_adapter(base)), expected)
        assert held(placed) == said
        again = load(tmp_path / place, placement=place, group=ALONE, quantized=True)
        with taking_part(again):
            assert_same(results(placed := with_adapter(again)), expected)
        assert held(placed) == said
        assert placed.num_parameters() == numbers
    files = [{file.name: file.read_bytes() for file in (tmp_path / place).iterdir()} for place in ("gpu", "host")]
    assert files[0] == files[1]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """All bits are."""
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_packed_sequences_are_correct(bases: dict[str, Path], family: str) -> None:
    """As for the unquantized ones."""
    model = with_adapter(load(bases[family]))
    assert choose_packing(model, make_examples(4), max_length=64, losses=losses_of(model)).packed


def bytes_of(base: Any) -> int:
    """Of all weights, with the constants of those that are quantized."""
    found = 0
    for parameter in base.parameters():
        found += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found += state.absmax.nbytes + state.state2.absmax.nbytes
    return found


def with_attention(base: Any) -> Setup:
    """The formulas' input, with an adapter on attention."""
    a = read_config(base.config.to_dict())
    return Setup(
        architecture=a,
        rank=6,
        targets=tuple(a.attention),
        quantization="nf4",
        double_quantization=True,
        value_bytes=2,
        optimizer="adamw",
        recompute=True,
    )


def test_a_base_published_quantized_keeps_its_experts(bases: dict[str, Path], tmp_path: Path) -> None:
    """As bitsandbytes has it, in 16 bits: it is trained, and the forecast counts them so."""
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.bfloat16)
    made = AutoModelForCausalLM.from_pretrained(bases["mixtral"], quantization_config=config, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path)
    assert left_plain(tmp_path)
    assert not left_plain(bases["mixtral"])
    base = load(tmp_path, dtype=torch.bfloat16)
    assert quantized_experts(base) == 0
    setup = replace(with_attention(base), plain_experts=True)
    assert weight_bytes(setup) == pytest.approx(bytes_of(base), rel=0.02)
    assert weight_bytes(replace(setup, plain_experts=False)) < 0.7 * weight_bytes(setup)
    found = setup_of(model := with_adapter(base), "nf4", "adamw")
    assert found is not None
    assert found.plain_experts
    assert all(bool(one.isfinite().all()) for one in results(model))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_forecast_counts_their_bytes(bases: dict[str, Path], family: str) -> None:
    """Weights of the base as it is held, and numbers of an adapter of experts."""
    base = load(bases[family], dtype=torch.bfloat16)
    setup = with_attention(base)
    a = setup.architecture
    assert quantized_experts(base) == a.layers * a.expert_parameters
    assert weight_bytes(setup) == pytest.approx(bytes_of(base), rel=0.02)
    assert a.parameters == pytest.approx(base.num_parameters(), rel=0.01)  # norms of heads are not counted
    model = with_experts(base)
    numbers = sum(parameter.numel() for parameter in trainable(model).values())
    assert setup.adapter + a.expert_adapter_parameters(6) == numbers
    assert a.used_parameters < a.linear_parameters
    found = setup_of(model, "nf4", "adamw")
    assert found is not None
    assert not found.plain_experts
    assert (found.adapter, found.expert_adapter) == (numbers, a.expert_adapter_parameters(6))


def test_a_token_costs_the_adapters_of_its_experts_alone() -> None:
    """Operations of Qwen3-30B-A3B: 8 of 128 experts are used, of the base and of the adapter."""
    config = {"model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
    a = read_config(config | {"num_experts": 128, "num_experts_per_tok": 8})
    assert a.parameters / 1e9 == pytest.approx(30.5, abs=0.05)  # as published, with 3.3 used for a token
    used = a.used_parameters + 2 * a.head_parameters + 48 * 128 * 2048
    assert used / 1e9 == pytest.approx(3.35, abs=0.05)
    how: dict[str, Any] = {"rank": 16, "targets": tuple(a.attention), "quantization": "nf4", "optimizer": "adamw"}
    plain = Setup(a, double_quantization=True, value_bytes=2, recompute=False, **how)
    for layers, count in ((None, 48), ((3, 4), 2)):
        experts = a.expert_adapter_parameters(16, layers)
        assert experts == count * 128 * 16 * (2048 + 1536 + 768 + 2048)
        more = training_flops(replace(plain, expert_adapter=experts), 100, 0) - training_flops(plain, 100, 0)
        assert more == 6 * experts * 8 // 128 * 100


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_manifest_says_how_many_parameters_are_idle(bases: dict[str, Path], quantization: str) -> None:
    """2 of 4 experts are used for a token, of the base and of its adapter, and operations are counted by it."""
    how: dict[str, Any] = {"name": "x", "revision": None, "sha256": "0"}
    model = with_experts(load(bases["qwen3_moe"], quantization=quantization))
    found = describe_model(model, **how)
    a = read_config(model.config.to_dict())
    assert found.idle_parameters == a.linear_parameters - a.used_parameters > 0
    assert found.idle_trainable_parameters == a.expert_adapter_parameters(6) // 2
    results = {
        "model": asdict(found),
        "dataset": {"tokens": 10, "rows": 1},
        "training": {"examples": 1},
        "settings": {},
    }
    used = found.parameters - found.idle_parameters
    trained = found.trainable_parameters - found.idle_trainable_parameters
    assert compute_spent(results)["training_pflop"] == 10 * (4 * used + 6 * trained) / PETA
    gpt_oss = describe_model(with_adapter(load(bases["gpt_oss"])), **how)
    assert (gpt_oss.idle_parameters > 0, gpt_oss.idle_trainable_parameters) == (True, 0)


def test_a_merge_takes_the_original_experts(bases: dict[str, Path]) -> None:
    """No other choice is offered, and settings without effect are refused."""
    model = with_adapter(load(bases["mixtral"]))
    found = candidates(model, bases["mixtral"], "best")
    assert found.names == (ORIGINAL,)
    assert "experts" in found.only
    with pytest.raises(SettingsError, match=r"JOB_EXPORT__MERGE_ONTO.*experts"):
        candidates(model, bases["mixtral"], DEQUANTIZED)
    with pytest.raises(SettingsError, match=r"adapter is also on experts \(JOB_LORA__EXPERTS\)"):
        candidates(with_experts(load(bases["mixtral"])), bases["mixtral"], ORIGINAL)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_has_no_linear_feed_forward_layers(bases: dict[str, Path], family: str) -> None:
    """The layers of attention are not taken for such because their class has the family's name, with `Moe` in it."""
    with pytest.raises(SettingsError, match=r"no linear layers in modules of the kind mlp.*JOB_LORA__EXPERTS=true"):
        inspect(bases[family], max_length=64, targets="mlp")
    _, empty = inspect(bases[family], max_length=64, targets="attention")
    assert resolve_targets(empty, "attention") == ["k_proj", "o_proj", "q_proj", "v_proj"]
