"""Packed sequences are used only if their results are right for the model itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import DataError, SettingsError
from job.evaluation.scoring import score_sequence
from job.model import packed_attention
from job.model.load_base import load_base
from job.model.lora import add_adapter, trainable
from job.model.packed_attention import is_packed
from job.model.packing_check import choose_packing
from job.records import Example, Packing, Question
from job.training.lm_head_loss import losses_of
from tests.families.models import make_model as make_family
from tests.helpers import fill_adapter, make_examples, make_model

CPU = torch.device("cpu")
EXAMPLES = make_examples(6, longest=40)
QUESTIONS = [Question((0, 5, 6, 7), ((8, 9), (10,))), Question((0, 11), ((12,), (13, 14, 15)))]


def check(model: Any, examples: list[Example] = EXAMPLES, max_length: int = 64) -> Packing:
    """The model's verdict, gradients included."""
    return choose_packing(model, examples, max_length=max_length, losses=losses_of(model))


def family(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model of another family, with an adapter."""
    make_family(name, folder, **changes)
    base = load_base(folder, quantization="none", double_quantization=False, dtype=dtype, device=CPU, max_length=64)
    return add_adapter(base, rank=4, alpha=8, dropout=0.1, target_modules=None, seed=1)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_decoder_of_llamas_kind_is_used_packed(base_folder: Path, quantization: str) -> None:
    """It agrees to rounding, and is left as it was: packed, its adapter untouched, without gradients."""
    model = fill_adapter(make_model(base_folder, quantization=quantization))
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    assert check(model).packed
    assert is_packed(model)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trainable(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_reason_against_packing(tmp_path: Path, dtype: torch.dtype) -> None:
    """What two right ways differ by in half precision is allowed for."""
    assert check(family("qwen3", tmp_path, dtype)).packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mamba", "bloom", "lfm2", "falcon"])
def test_a_model_that_packing_gets_wrong_is_used_one_by_one(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """State that runs on, biases of positions, an attention of its own; in half precision too. Scored all the same."""
    model = family(name, tmp_path, dtype)
    found = check(model)
    assert not found.packed
    assert found.reason
    assert not is_packed(model)
    alone = [[float(_likelihood(model, q.context, choice)) for choice in q.choices] for q in QUESTIONS]
    scored = [[choice.log_likelihood for choice in choices] for choices in score_sequence(model.eval(), QUESTIONS)]
    torch.testing.assert_close(torch.tensor(scored), torch.tensor(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_leak_into_a_few_tokens_is_found_out_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """A convolution in the last layer alone reaches two tokens, fewer than may be off by their rounding."""
    layers = ["full_attention", "full_attention", "full_attention", "conv"]
    found = check(family("lfm2", tmp_path, dtype, layer_types=layers))
    assert not found.packed
    assert "another sequence alongside" in found.reason


def _likelihood(model: Any, context: tuple[int, ...], choice: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        said = model(input_ids=torch.tensor([[*context, *choice]])).logits[0].float().log_softmax(-1)
    at = torch.arange(len(context) - 1, len(context) + len(choice) - 1)
    return said[at, torch.tensor(choice)].double().sum()


def _drop(name: str) -> Callable[..., Any]:
    """Packed attention that leaves out one thing a layer asks for."""
    real = packed_attention.packed_attention

    def attend(*arguments: Any, **asked: Any) -> Any:
        mask = arguments[4] if not isinstance(arguments[4], packed_attention.AskedMask) else None
        return real(*arguments[:4], mask, **(asked | {name: None}))

    return attend


@pytest.mark.parametrize(
    ("name", "dropped"), [("gemma2", "softcap"), ("gemma3_text", "sliding_window"), ("gpt_oss", "s_aux")]
)
def test_what_attention_leaves_out_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dropped: str
) -> None:
    """A soft cap, a window or sinks that were dropped in silence: the model's own attention says otherwise."""
    changes = {"attn_logit_softcapping": 0.5} if name == "gemma2" else {}
    assert check(family(name, tmp_path / "right", **changes)).packed
    monkeypatch.setattr(packed_attention, "packed_attention", _drop(dropped))
    found = check(family(name, tmp_path / "wrong", **changes))
    assert not found.packed
    assert "results differ in" in found.reason


def test_a_window_that_a_layer_is_not_told_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than any sequence of the check, so that logits cannot show it: its mask and its arguments disagree."""
    real = packed_attention.packed_attention

    def untold(*arguments: Any, **asked: Any) -> Any:
        return real(*arguments, **(asked | {"sliding_window": None}))

    monkeypatch.setattr(packed_attention, "packed_attention", untold)
    model = family("mistral", tmp_path, sliding_window=300)
    found = check(model)
    assert not found.packed
    assert "window" in found.reason


def test_positions_that_depend_on_the_neighbours_are_packed_only_where_they_cannot(tmp_path: Path) -> None:
    """Models whose rotary positions depend on the longest sequence are packed only if no sequence is that long."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 128}
    model = family("llama", tmp_path, rope_parameters=rope)
    assert check(model, max_length=128).packed
    found = check(model, max_length=129)
    assert not found.packed
    assert "rotary" in found.reason
    assert not is_packed(model)


def test_a_temperature_by_the_place_in_the_packed_sequence_is_found_out(tmp_path: Path) -> None:
    """Llama 4's, which grows with thousands of tokens; whole attention in all layers would hide it from the check."""
    model = family("llama4", tmp_path)
    text = model.get_base_model().config.get_text_config(decoder=True)
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    found = check(model)
    assert not found.packed
    assert "temperature" in found.reason


def test_weights_that_are_no_numbers_are_said_to_be_the_bases(base_folder: Path, tmp_path: Path) -> None:
    """Before training, which would be blamed for it."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="the base's logits are not finite in float32"):
        check(make_model(folder))


def test_a_model_that_sees_the_future_is_refused(tmp_path: Path) -> None:
    """It would learn to read the answer off."""
    with pytest.raises(SettingsError, match="not a causal language model"):
        check(family("bert", tmp_path))


def test_a_model_whose_own_code_fails_is_refused_in_words(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its code raises on a plain sequence is not this job's bug."""
    model = make_model(base_folder)

    def broken(*_: Any, **__: Any) -> Any:
        raise IndexError("index 7 is out of range")

    monkeypatch.setattr(model.get_base_model().model, "forward", broken)
    with pytest.raises(
        SettingsError, match="MistralForCausalLM fails on a plain sequence of text: IndexError: index 7"
    ):
        check(model)


@pytest.mark.parametrize("after", [0, 3, 5])
@pytest.mark.parametrize(
    "says",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ...",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_too_little_memory_is_no_verdict_on_the_model(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, says: str, after: int
) -> None:
    """Torch raises a RuntimeError for it. It is neither the settings' fault, nor one of packed sequences."""
    model = make_model(base_folder)
    forward, calls = type(model.get_base_model()).forward, list[int]()

    def full(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError(says)
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model.get_base_model()), "forward", full)
    with pytest.raises(RuntimeError, match=re.escape(says)):
        check(model)
    assert len(calls) == after + 1


@pytest.mark.parametrize("lengths", [[2], [2, 3], [1, 2, 3, 4], [60]])
def test_any_examples_do(base_folder: Path, lengths: list[int]) -> None:
    """Few of them, short ones, or one alone."""
    examples = [Example(tuple(range(3, 3 + n)), (False, *[True] * (n - 1))) for n in lengths]
    assert check(make_model(base_folder), examples).packed
