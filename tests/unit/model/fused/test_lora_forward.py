"""The fused forward pass with LoRA: fewer operations, the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from job.evaluation.scoring import score_sequence
from job.model.adapter_options import AdapterOptions
from job.model.fused.dropout import reseed
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.fused_decoder import decoder_of
from job.model.fused.kernels import TORCH, Kernels
from job.model.gradient_checkpointing import recompute_activations
from job.model.load_base import load_base
from job.model.lora import adapter_off, add_adapter, trainable
from job.records import Question
from job.training.packing import packed_inputs
from tests.helpers import LINEAR, fill_adapter, make_examples, make_model

CPU = torch.device("cpu")
EXAMPLES = make_examples(6)
QUESTIONS = [Question((0, 5, 6, 7), ((8, 9), (10,))), Question((0, 11), ((12,), (13, 14, 15)))]


def adapted(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: str = "nf4",
    alpha: int = 16,
    dropout: float = 0.0,
) -> Any:
    """The tiny base with a filled adapter, by PEFT's own forward."""
    base = load_base(
        folder, quantization=quantization, double_quantization=True, dtype=dtype, device=CPU, max_length=512
    )
    return fill_adapter(add_adapter(base, rank=16, alpha=alpha, dropout=dropout, target_modules=LINEAR, seed=1))


def lean(folder: Path, *, keep: bool = True, kernels: Kernels | None = TORCH, **loaded: Any) -> Any:
    """The same by the lean forward."""
    model = adapted(folder, **loaded)
    assert fuse_layers(model, keep_dequantized=keep, kernels=kernels) == ("all" if kernels else "layers")
    return model


def learn(model: Any) -> tuple[float, list[torch.Tensor]]:
    """The summed loss of the examples in one row, and its gradients."""
    inputs = packed_inputs(EXAMPLES, CPU)
    labels = inputs.pop("labels")
    model.train()
    logits = model(**inputs).logits[0, :-1].float()
    loss = functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    loss.backward()
    return loss.item(), [p.grad for p in trainable(model).values()]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """Each gradient differs from what is expected by no more than a share of its norm."""
    for one, other in zip(found, expected, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("kernels", [None, TORCH], ids=["transformers' kernels", "torch kernels"])
@pytest.mark.parametrize(("quantization", "alpha"), [("nf4", 16), ("nf4", 8), ("none", 16)])
def test_equals_pefts_forward(base_folder: Path, kernels: Kernels | None, quantization: str, alpha: int) -> None:
    """In fp32, loss and every gradient are those of PEFT's own layers, whatever the scale of the adapter."""
    loss, gradients = learn(adapted(base_folder, quantization=quantization, alpha=alpha))
    ours, found = learn(lean(base_folder, kernels=kernels, quantization=quantization, alpha=alpha))
    assert ours == pytest.approx(loss, rel=1e-6)
    assert_close(found, gradients, 1e-5)
    assert all(gradient.dtype is torch.float32 for gradient in found)


@pytest.mark.parametrize("options", [{}, {"use_sliding_window": True, "max_window_layers": 1}], ids=["all", "some"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_window_is_that_of_the_family(
    base_folder: Path, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """Llama ignores a config.json's window, Mistral has it in all layers, Qwen2 in those behind the first few."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": family, "sliding_window": 4, **options}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if family == "qwen2":  # it has biases
        _add_biases(folder)
    (loss, gradients), (ours, found) = learn(adapted(folder)), learn(lean(folder))
    assert ours == pytest.approx(loss, rel=1e-6)
    assert_close(found, gradients, 1e-5)


def _add_biases(folder: Path) -> None:
    """Of queries, keys and values."""
    tensors = load_file(folder / "model.safetensors")
    wide = {
        name: tensor
        for name, tensor in tensors.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    tensors |= {f"{name.removesuffix('weight')}bias": 0.1 * tensor[:, 0].clone() for name, tensor in wide.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_pefts(base_folder: Path, dtype: torch.dtype) -> None:
    """Gradients differ from those in fp32 on the same weights no more than PEFT's under autocast do."""
    exact = adapted(base_folder, dtype=dtype, quantization="none").float()
    _, reference = learn(exact)
    with torch.autocast("cpu", dtype=dtype):
        _, theirs = learn(adapted(base_folder, dtype=dtype, quantization="none"))
    _, ours = learn(lean(base_folder, dtype=dtype, quantization="none"))
    errors = [
        sum(((a - b).norm() / b.norm()).item() for a, b in zip(found, reference, strict=True))
        for found in (ours, theirs)
    ]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_weights_change_no_bit(base_folder: Path, dtype: torch.dtype) -> None:
    """Weights dequantized once give the bits of weights dequantized for each use."""
    kept, used = (learn(lean(base_folder, keep=keep, dtype=dtype)) for keep in (True, False))
    assert kept[0] == used[0]
    assert all(torch.equal(a, b) for a, b in zip(kept[1], used[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit(base_folder: Path, dtype: torch.dtype) -> None:
    """Activations computed again in the backward pass give the bits of kept ones."""
    recomputing = lean(base_folder, dtype=dtype)
    recompute_activations(recomputing, on=True)
    (loss, gradients), (kept_loss, kept) = learn(recomputing), learn(lean(base_folder, dtype=dtype))
    assert loss == kept_loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))


def test_trained_weights_are_seen_at_once(base_folder: Path) -> None:
    """A step of the optimizer reaches the copies that are multiplied, in training and in scoring."""
    model, other = lean(base_folder, dtype=torch.bfloat16), adapted(base_folder, dtype=torch.bfloat16)
    score_sequence(model, QUESTIONS)
    fill_adapter(model, scale=0.1)
    fill_adapter(other, scale=0.1)
    fuse_layers(other, keep_dequantized=False, kernels=TORCH)
    assert score_sequence(model.eval(), QUESTIONS) == score_sequence(other.eval(), QUESTIONS)


def test_a_second_try_takes_the_place_of_the_first(base_folder: Path) -> None:
    """A model that is fused again, since memory was too small to keep its weights, refreshes one copy of them."""
    model = lean(base_folder)
    expected = learn(model)
    model.zero_grad()
    assert fuse_layers(model, keep_dequantized=False, kernels=TORCH) == "all"
    assert len(decoder_of(model.get_base_model())._forward_pre_hooks) == 1
    loss, gradients = learn(model)
    assert loss == expected[0]
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected[1], strict=True))


def test_the_adapter_can_be_switched_off(base_folder: Path) -> None:
    """Switched off, an adapted layer is its base's, bit by bit."""
    model = lean(base_folder)
    base = load_base(
        base_folder, quantization="nf4", double_quantization=True, dtype=torch.float32, device=CPU, max_length=512
    )
    with adapter_off(model):
        off = score_sequence(model.eval(), QUESTIONS)
    assert score_sequence(model, QUESTIONS) != off
    for ours, theirs in zip(off, score_sequence(base.eval(), QUESTIONS), strict=True):
        assert [c.log_likelihood for c in ours] == pytest.approx([c.log_likelihood for c in theirs], rel=1e-5)


def test_an_adapter_of_another_kind_stays_with_peft(base_folder: Path) -> None:
    """A model whose adapter is not plain LoRA is left as it is."""
    model = make_model(base_folder, options=AdapterOptions(use_dora=True))
    before = [module.forward for module in model.modules()]
    assert fuse_layers(model, keep_dequantized=True, kernels=TORCH) == "nothing"
    assert [module.forward for module in model.modules()] == before


class _Masked(torch.nn.Dropout):
    """PEFT's dropout with the masks of the fused layers."""

    def __init__(self, rate: float, number: int, state: torch.Tensor) -> None:
        super().__init__(rate)
        self.number, self.state = number, state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ones through the mask give the factors, whatever x is."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.training:
            return x
        return (rows * TORCH.drop(torch.ones_like(rows), self.state, self.number, self.p)).view(x.shape)


@pytest.mark.parametrize("kernels", [None, TORCH], ids=["transformers' kernels", "torch kernels"])
def test_dropout_equals_pefts_with_the_same_masks(base_folder: Path, kernels: Kernels | None) -> None:
    """Loss and every gradient; other micro-batches and steps have other masks, the same ones the same bits."""
    model = lean(base_folder, kernels=kernels, dropout=0.3, alpha=8)
    reseed(model, 12345678901234, 3)
    loss, gradients = learn(model)
    other = adapted(base_folder, dropout=0.3, alpha=8)
    twins = dict(other.named_modules())
    state = torch.tensor([12345678901234, 3])
    names = {module: name for name, module in model.named_modules()}
    for common in (module.fused for module in names if "fused" in module.__dict__):
        for owner, layer in zip(common.modules, common.layers, strict=True):
            twins[names[owner]].lora_dropout["default"] = _Masked(0.3, layer.number, state)
    theirs, expected = learn(other)
    assert loss == pytest.approx(theirs, rel=1e-6)
    assert_close(gradients, expected, 1e-5)
    for seed, micro_batch, same in ((12345678901234, 3, True), (12345678901234, 4, False), (1, 3, False)):
        model.zero_grad()
        reseed(model, seed, micro_batch)
        again, found = learn(model)
        assert (again == loss) is same
        assert torch.equal(found[0], gradients[0]) is same


def test_dropout_is_drawn_again_where_activations_are(base_folder: Path) -> None:
    """Computed again in the backward pass they have the same masks, without a generator's state: the same bits."""
    made = []
    for on in (False, True):
        model = lean(base_folder, dropout=0.3)
        recompute_activations(model, on=on, random=False)
        reseed(model, 7, 0)
        made.append(learn(model))
    assert made[0][0] == made[1][0]
    assert all(torch.equal(a, b) for a, b in zip(made[0][1], made[1][1], strict=True))


def test_dropout_is_for_training_only(base_folder: Path) -> None:
    """In evaluation mode scores are those without it."""
    with_dropout, without = lean(base_folder, dropout=0.3).eval(), lean(base_folder).eval()
    assert score_sequence(with_dropout, QUESTIONS) == score_sequence(without, QUESTIONS)
