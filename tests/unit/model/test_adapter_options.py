"""Adapter options: computed by PEFT, loaded by PEFT as trained, and refused with a reason if unsupported."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import SettingsError, TrainingFailed
from job.model.adalora import allocate
from job.model.adapter_files import load_adapter, save_adapter
from job.model.adapter_options import PLAIN, AdaLora, AdapterOptions, make_options
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.load_base import inspect, load_base
from job.model.lora import adapter_off, add_adapter, count_parameters, trainable
from job.model.model_record import describe_model
from job.model.packed_attention import use
from job.model.target_modules import resolve_targets
from job.settings.schema import Lora
from tests.helpers import LINEAR, fill_adapter, make_model, without_repacking

ADALORA = AdaLora(init_r=12, target_r=8, tinit=1, tfinal=1, delta_t=1, orth_reg_weight=0.5, total_step=6)
OPTIONS: dict[str, AdapterOptions] = {
    "rslora": AdapterOptions(use_rslora=True),
    "dora": AdapterOptions(use_dora=True),
    "layers": AdapterOptions(layers=(1,)),
    "patterns": AdapterOptions(rank_pattern={"q_proj": 4, r"1\.mlp\.up_proj": 32}, alpha_pattern={"v_proj": 64}),
    "gaussian": AdapterOptions(init="gaussian"),
    "pissa": AdapterOptions(init="pissa"),
    "pissa_niter_16": AdapterOptions(init="pissa_niter_16"),
    "olora": AdapterOptions(init="olora", rank_pattern={"q_proj": 4}),
    "adalora": AdapterOptions(kind="adalora", adalora=ADALORA),
}
FUSED = sorted(name for name, options in OPTIONS.items() if options.not_fused is None)
IDS = torch.arange(3, 43)[None]
EVERY_BASE = pytest.mark.parametrize("quantization", ["nf4", pytest.param("none", marks=pytest.mark.long)])
"""A plain base is the easier one: the adapter's layers compute on it as they do on NF4."""


def make(
    folder: Path,
    options: AdapterOptions,
    *,
    quantization: str = "nf4",
    rank: int = 8,
    targets: Any = LINEAR,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The tiny base with this adapter."""
    base = load_base(
        folder,
        quantization=quantization,
        double_quantization=True,
        dtype=dtype,
        device=torch.device("cpu"),
        max_length=512,
        targets=targets,
        rank=rank,
        options=options,
    )
    use(base, "eager")  # so that it takes one sequence as it is
    how: dict[str, Any] = {"rank": rank, "alpha": 16, "dropout": 0.0, "target_modules": targets, "seed": seed}
    return add_adapter(base, **how, options=options).eval()


def move(model: Any) -> Any:
    """Changes every weight of the adapter a little, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    """Of a fixed sequence, (1, tokens, vocabulary)."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def plain_base(folder: Path, quantization: str) -> Any:
    """The base as a reader of the adapter loads it, with transformers alone."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how = {"quantization_config": nf4} if quantization == "nf4" else {}
    return without_repacking(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how))


# PEFT warns of every AdaLoRA adapter, whose rank pattern is of another kind than LoRA's.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@EVERY_BASE
@pytest.mark.parametrize("name", OPTIONS)
def test_peft_loads_what_was_trained(base_folder: Path, tmp_path: Path, name: str, quantization: str) -> None:
    """`PeftModel.from_pretrained` on a fresh base gives the logits of the trained model, and so does `load_adapter`."""
    from peft import PeftModel

    model = move(make(base_folder, OPTIONS[name], quantization=quantization))
    if OPTIONS[name].adalora is not None:
        allocate_all(model)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", base="the-base", revision=None)
    loaded = PeftModel.from_pretrained(plain_base(base_folder, quantization), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    other = make(base_folder, OPTIONS[name], quantization=quantization, seed=9)
    assert (logits(other) - expected).abs().max() > 1e-3
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)
    load_adapter(model, tmp_path / "adapter")  # as the job does after training, in the process that trained
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("finite", [1, 0])
def test_adalora_takes_the_last_ranks_away_in_a_step_that_overflows(base_folder: Path, finite: int) -> None:
    """By the importance in earlier steps, as PEFT does in that step anyway; without any, training ends with words."""
    model = make_model(base_folder, rank=8, options=AdapterOptions(kind="adalora", adalora=ADALORA))
    fill_adapter(model)
    with pytest.raises(TrainingFailed, match="JOB_MODEL__DTYPE=bf16") if not finite else nullcontext():
        for step in range(1, 6):
            for parameter in trainable(model).values():
                parameter.grad = torch.rand_like(parameter) + (0 if step <= finite else torch.inf)
            allocate(model, step)
    kept = model.peft_config["default"].rank_pattern
    if finite:
        assert sum(map(sum, kept.values())) == ADALORA.target_r * len(kept)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adalora_trains_nothing_that_is_not_published(base_folder: Path, quantization: str, dtype: torch.dtype) -> None:
    """PEFT's `ranknum`, which each layer divides by, stays the constant that readers take it for."""
    options = AdapterOptions(kind="adalora", adalora=ADALORA)
    model = make_model(base_folder, rank=8, options=options, quantization=quantization, dtype=dtype)
    assert {name.split(".")[-2] for name in trainable(model)} == {"lora_A", "lora_B", "lora_E"}
    constants = [parameter for name, parameter in model.named_parameters() if ".ranknum." in name]
    assert {(float(one), one.dtype) for one in constants} == {(ADALORA.init_r, torch.float32)}


def allocate_all(model: Any) -> None:
    """Lets AdaLoRA take ranks away to the end of its schedule, with the gradients of a real loss."""
    for step in range(1, 7):
        model.zero_grad()
        model.get_base_model()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        model.base_model.update_and_allocate(step)


def test_orthogonal_is_for_a_base_in_floating_point(base_folder: Path, tmp_path: Path) -> None:
    """PEFT casts its first values to the base's dtype, which is integer in 4 bits: that is refused before loading."""
    from peft import PeftModel

    options = AdapterOptions(init="orthogonal")
    model = move(make(base_folder, options, quantization="none"))
    save_adapter(model, tmp_path, base="the-base", revision=None)
    loaded = PeftModel.from_pretrained(plain_base(base_folder, "none"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(SettingsError, match=r"JOB_LORA__INIT: orthogonal needs a base in floating point"):
        make(base_folder, options, quantization="nf4")
    with pytest.raises(SettingsError, match="orthogonal needs even ranks, not 5"):
        make(base_folder, options, quantization="none", rank=5)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "dora"])
def test_the_base_stays_the_base(base_folder: Path, name: str) -> None:
    """With the adapter off the model computes the base to the bit, whatever the adapter began with."""
    model = make(base_folder, OPTIONS[name])
    with adapter_off(model):
        assert torch.equal(logits(model), logits(make(base_folder, PLAIN)))


@EVERY_BASE
@pytest.mark.parametrize("name", OPTIONS)
def test_a_new_adapter_changes_nothing_yet(base_folder: Path, name: str, quantization: str) -> None:
    """Every first value computes the base, up to rounding: PiSSA's and OLoRA's parts cancel out."""
    model = make(base_folder, OPTIONS[name], quantization=quantization)
    with adapter_off(model):
        expected = logits(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_decomposition_begins_as_pefts_own(base_folder: Path, init: str) -> None:
    """The trained half has the values, and the first gradients, that PEFT gives it, which changes the base for it."""
    from peft import LoraConfig, get_peft_model

    ours = make(base_folder, AdapterOptions(init=init), quantization="none")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEAR), init_lora_weights=init, task_type="CAUSAL_LM")
    theirs = get_peft_model(plain_base(base_folder, "none"), config).eval()
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    own = trainable(ours)
    for name, expected in trainable(theirs).items():
        half = slice(0, 8) if ".lora_A." in name else (slice(None), slice(0, 8))
        torch.testing.assert_close(own[name][half], expected, rtol=1e-5, atol=1e-5)
        gradient = own[name].grad[half]
        assert (gradient - expected.grad).norm() < 1e-3 * expected.grad.norm()
    assert describe_model(ours, name="x", revision=None, sha256="0" * 64).trainable_parameters == sum(
        parameter.numel() for parameter in trainable(theirs).values()
    )


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_compute_it(base_folder: Path, name: str) -> None:
    """Options that are only numbers have the logits and gradients of PEFT's layers in the fused ones."""
    found = []
    for fused in (False, True):
        model = move(make(base_folder, OPTIONS[name], quantization="none")).train()
        if fused:
            assert fuse_layers(model, keep_dequantized=True, kernels=None) == "layers"
        model.zero_grad()
        out = model.get_base_model()(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        found.append((out.logits.detach(), {key: p.grad for key, p in trainable(model).items()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for key, gradient in found[0][1].items():
        assert (gradient - found[1][1][key]).norm() <= 1e-4 * gradient.norm(), key


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - set(FUSED)))
def test_the_rest_is_left_to_peft(base_folder: Path, name: str) -> None:
    """What the fused layers do not compute they leave alone, and the reason names the setting."""
    model = make(base_folder, OPTIONS[name])
    assert fuse_layers(model, keep_dequantized=False, kernels=TORCH) == "nothing"
    assert "JOB_LORA__" in (OPTIONS[name].not_fused or "")


def test_the_scale_of_rank_stabilized_lora(base_folder: Path) -> None:
    """It is alpha over the root of the rank, in PEFT's layers as they are used."""
    model = make(base_folder, OPTIONS["rslora"])
    assert model.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] == pytest.approx(16 / 8**0.5)


@pytest.mark.parametrize("name", [*OPTIONS, "orthogonal"])
def test_parameters_are_counted_without_weights(base_folder: Path, name: str) -> None:
    """`plan` counts what a run will train, of the frozen half of a decomposition too, which takes memory."""
    options = OPTIONS.get(name, AdapterOptions(init="orthogonal"))
    _, empty = inspect(base_folder, max_length=64, targets=LINEAR, rank=8, options=options)
    counted = count_parameters(empty, rank=8, target_modules=LINEAR, options=options)
    made = make(base_folder, options, quantization="none")
    assert counted == sum(parameter.numel() for parameter in trainable(made).values())


def test_groups_of_layers(base_folder: Path) -> None:
    """`attention` and `mlp` are found in the model, and are all linear layers together."""
    base = make(base_folder, PLAIN).get_base_model()
    from transformers import MistralForCausalLM

    empty = MistralForCausalLM(base.config)
    assert resolve_targets(empty, "attention") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert resolve_targets(empty, "mlp") == ["down_proj", "gate_proj", "up_proj"]
    assert resolve_targets(empty, "all-linear") == resolve_targets(empty, "auto") == sorted(LINEAR)


def test_a_group_whose_names_are_another_ones_too() -> None:
    """GPT-2 calls the output of both halves c_proj: the names say which is meant."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=64))
    assert resolve_targets(model, "attention") == ["attn.c_proj", "c_attn"]
    adapted = add_adapter(model, rank=2, alpha=2, dropout=0.0, target_modules="mlp", seed=0)
    names = {name.split(".lora_")[0].partition(".h.")[2] for name in trainable(adapted)}
    assert names == {f"{layer}.mlp.{leaf}" for layer in (0, 1) for leaf in ("c_fc", "c_proj")}


def test_everything_impossible_is_said_at_once(base_folder: Path) -> None:
    """Layers beyond the model and patterns that name nothing, or one module twice, are one error."""
    options = AdapterOptions(
        layers=(0, 2, 40),
        rank_pattern={"gate": 4, "q_proj": 2, r"self_attn\.q_proj": 4},
        alpha_pattern={r"1\.mlp\.up_proj": 8},
    )
    with pytest.raises(SettingsError) as caught:
        make(base_folder, options)
    said = str(caught.value)
    for part in (
        "names layer 2, 40; the model has 2, from 0 to 1",
        "gate names no module",
        "both name model.layers.0.self_attn.q_proj",
        r"1\.mlp\.up_proj names no module that gets an adapter",
    ):
        assert part in said


def test_a_rank_above_the_width_is_refused_for_a_decomposition(base_folder: Path) -> None:
    """There are no more singular values than that."""
    with pytest.raises(SettingsError, match=r"JOB_LORA__RANK: .*, 64 here"):
        make(base_folder, AdapterOptions(init="pissa"), rank=65)


def test_options_come_from_the_settings() -> None:
    """By default nothing is asked for; AdaLoRA begins with one and a half times the rank."""
    assert make_options(dict(Lora()), 10) == PLAIN
    made = make_options(dict(Lora(kind="adalora", rank=8, tinit=2)), 10)
    assert made == AdapterOptions(kind="adalora", adalora=replace(ADALORA, tinit=2, tfinal=0, total_step=10))
    with pytest.raises(SettingsError, match="leave none of the run's 2 steps"):
        raise SettingsError(list(problems_of(make_options(dict(Lora(kind="adalora", tinit=2)), 2))))


def problems_of(options: AdapterOptions) -> Any:
    """What a model of two layers says."""
    from job.model.adapter_options import check_options

    return check_options(options, rank=8, layers=2, adapted=["model.layers.0.mlp.up_proj"])
