"""The decoder that scores questions, for families like Llama: the same numbers with fewer passes over memory."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from job.evaluation.scoring import _pack, score_sequence
from job.model.fused.kernels import TORCH
from job.model.fused.precise_forward import precise_forward
from job.model.fused.scoring_decoder import Decoder, TorchOperations
from job.model.lora import adapter_off
from job.model.packed_layout import build_layout
from job.records import Question
from tests.unit.model.fused.test_precise_forward import adapted, loaded, scores

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TRITON = pytest.mark.skipif(
    not (ON_GPU or os.environ.get("TRITON_INTERPRET")), reason="Triton needs a GPU, or TRITON_INTERPRET=1"
)


def questions_with_examples(count: int) -> list[Question]:
    """Questions of two tasks, those of each after the same long examples; choices that begin alike."""
    chance = random.Random(count)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(chance.randrange(3, 400) for _ in range(length))

    examples = [(0, *tokens(90)), (0, *tokens(70))]
    made = []
    for number in range(count):
        stem = tokens(2)
        choices = [stem + tokens(chance.randint(1, 6)) for _ in range(3)]
        made.append(
            Question(examples[2 * number // count] + tokens(chance.randint(1, 20)), (*choices, stem, tokens(1)))
        )
    return made


def test_what_is_behind_the_last_attention_is_computed_where_logits_are_read(base_folder: Path) -> None:
    """Only the tokens whose logits are read go through the last feed-forward layer, and each once."""
    model = loaded(base_folder, torch.bfloat16)
    asked = questions_with_examples(6)
    packed, rows = _pack(asked), []

    class Counting(TorchOperations):
        def swiglu(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
            rows.append(len(gate))
            super().swiglu(gate, up, out)

    forward: Any = precise_forward(model, torch.float32, TORCH, keep=False)
    (decoder,) = forward.args
    assert isinstance(decoder, Decoder)
    object.__setattr__(decoder, "operations", Counting())
    score_sequence(model, asked, forward)
    assert rows == [len(packed.ids)] * (len(rows) - 1) + [len(packed.reads)]
    assert len(packed.reads) < len(packed.ids) / 3


@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "o_proj", "up_proj", "down_proj")], ids=str)
def test_a_product_with_the_adapter_beside_it_is_peft_s(base_folder: Path, targets: tuple[str, ...]) -> None:
    """Whichever of the layers with a common input have an adapter, with biases and without."""
    exact, model = (adapted(loaded(base_folder, torch.float32, "none"), targets) for _ in range(2))
    for one in (exact, model):
        for layer in one.get_base_model().model.layers:
            for projection in (layer.self_attn.k_proj, layer.mlp.gate_proj):
                projection.bias = torch.nn.Parameter(torch.linspace(-1, 1, projection.out_features))
    forward = precise_forward(model, torch.float32, TORCH, keep=True)
    for model_alone in (False, True):
        if model_alone:
            with adapter_off(model), adapter_off(exact):
                assert (scores(model, forward) - scores(exact)).abs().max() < 1e-5
        else:
            assert (scores(model, forward) - scores(exact)).abs().max() < 1e-5


class Raising(TorchOperations):
    """A kernel that does not compile here."""

    def attend(self, *_given: Any) -> None:
        """Raises as Triton does."""
        raise RuntimeError("out of resource: shared memory")


class Wrong(TorchOperations):
    """A kernel that is wrong by a little in one number of each head."""

    def attend(self, query: Any, key: Any, value: Any, *others: Any) -> None:
        """A twentieth too much."""
        value = value.clone()
        value[:, :, 0] += 0.05
        super().attend(query, key, value, *others)


class NotANumber(TorchOperations):
    """A kernel that writes nothing useful."""

    def attend(self, *given: Any) -> None:
        """Fills the output."""
        given[-1].fill_(float("nan"))


@pytest.mark.parametrize("kernels", [Raising, Wrong, NotANumber, TorchOperations])
def test_attention_that_fails_or_is_wrong_is_left_to_torch(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, kernels: type[TorchOperations]
) -> None:
    """It is tried once, said once, and the scores are torch's; one that is right is used, without a line."""
    model = loaded(base_folder, torch.bfloat16)
    triton_scoring = ModuleType("triton_scoring")

    class Operations(kernels):  # type: ignore[misc,valid-type]
        pass

    vars(triton_scoring)["TritonOperations"] = Operations
    monkeypatch.setitem(sys.modules, "job.model.fused.triton_scoring", triton_scoring)
    expected = scores(model, precise_forward(model, torch.float16, TORCH, keep=False))
    with capture_logs() as lines:
        forward: Any = precise_forward(model, torch.float16, replace(TORCH, name="triton"), keep=False)
    assert torch.equal(scores(model, forward), expected)
    (decoder,) = forward.args
    assert isinstance(decoder.operations, Operations)
    if kernels is TorchOperations:
        assert not lines
        assert isinstance(decoder.attend.__self__, Operations)
    else:
        (line,) = lines
        assert ("shared memory" if kernels is Raising else "differ from torch's by") in line["why"]


@TRITON
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_triton_computes_what_torch_does(dtype: torch.dtype) -> None:
    """Norms, gates and positions, in views of wider matrices; what is beyond the limit becomes NaN."""
    from job.model.fused.triton_scoring import TritonOperations

    torch.manual_seed(0)
    ways = TorchOperations(40.0), TritonOperations(40.0)
    x, update = torch.randn(5, 96, device=DEVICE), torch.randn(5, 96, device=DEVICE).to(dtype)
    weight = torch.randn(96, device=DEVICE).to(dtype)
    both = torch.randn(5, 192, device=DEVICE).to(dtype)
    heads = (torch.randn(5, 6, 32, device=DEVICE) * 15).to(dtype)
    cosine, sine = torch.randn(2, 5, 32, device=DEVICE)
    found = []
    for way in ways:
        stream, wide = x.clone(), torch.zeros(3, 5, 128, dtype=dtype, device=DEVICE)
        turned = heads.clone()
        way.add_norm(stream, update, weight, 1e-5, wide[0, :, :96])
        way.add_norm(stream, None, weight, 1e-5, wide[1, :, :96])
        way.swiglu(*both.chunk(2, -1), wide[2, :, :96])
        way.turn(turned[:, :4], cosine, sine)
        found.append((stream, wide, turned))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3, equal_nan=True)
    assert found[0][2].isnan().any()
    assert torch.equal(found[1][2][:, 4:], heads[:, 4:])


@TRITON
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 32), (3, 3, 40), (6, 1, 16)])
@pytest.mark.parametrize("window", [None, 30])
def test_attention_walks_the_tree(heads: int, groups: int, size: int, window: int | None) -> None:
    """Over several tiles, each token sees its own path alone: that of torch's kernel with the mask written out."""
    from job.model.fused.triton_scoring import TritonOperations

    packed = _pack(sorted(questions_with_examples(8), key=lambda question: question.context))
    layout = build_layout(packed.segments, DEVICE)
    tokens, all_heads = len(packed.ids), heads + 2 * groups
    torch.manual_seed(0)
    made = torch.randn(tokens, all_heads, size, device=DEVICE).half()
    parts = made.split_with_sizes([heads, groups, groups], 1)
    exact, found = (
        torch.zeros(tokens, heads * size + 16, device=DEVICE, dtype=dtype) for dtype in (torch.float32, torch.float16)
    )
    out = [x[:, :-16].unflatten(1, (heads, size)) for x in (exact, found)]
    TorchOperations().attend(*(x.float() for x in parts), layout, 0.2, window, out[0])
    TritonOperations().attend(*parts, layout, 0.2, window, out[1])
    torch.testing.assert_close(found.float(), exact, rtol=5e-3, atol=5e-3)
    assert not found[:, -16:].any()


@TRITON
def test_what_is_too_large_for_attention_shows() -> None:
    """A key that is not a number makes those that see it NaN, and a masked one changes nothing else."""
    from job.model.fused.triton_scoring import TritonOperations

    packed = _pack([Question((1, 2, 3), ((4, 5), (6, 7, 8)))])
    layout = build_layout(packed.segments, DEVICE)
    made = torch.randn(len(packed.ids), 3, 16, device=DEVICE).half()
    made[-1, 1] = float("nan")
    out = torch.zeros(len(packed.ids), 1, 16, device=DEVICE, dtype=torch.float16)
    TritonOperations().attend(*made.split(1, 1), layout, 1.0, None, out)
    assert out[-1].isnan().all()
    assert out[:-1].isfinite().all()
