"""The loss over the vocabulary on a CPU: value and gradient are those of computing all logits at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from job.model.families import FAMILIES
from job.model.fused import fused_decoder
from job.model.lora import trainable
from job.records import Example
from job.training import lm_head_loss
from job.training.lm_head_loss import can_sum, summed_head
from job.training.packing import packed_inputs
from tests.helpers import fill_adapter, make_model

EXAMPLES = [
    Example(tuple(range(5, 5 + length)), tuple(place > 2 for place in range(length))) for length in (9, 4, 30, 300)
]


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Any:
    """The tiny base with an adapter, in training."""
    return fill_adapter(make_model(base_folder)).train()


def gradient_of(model: Any, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The loss, and its gradient end to end."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in trainable(model).values()])


@pytest.mark.parametrize("rows", [1, 7, 256, 4096])
def test_it_is_the_plain_loss(model: Any, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """However many rows are taken at a time: as from all logits at once."""
    monkeypatch.setattr(lm_head_loss, "POSITIONS", rows)
    base, inputs = model.get_base_model(), packed_inputs(EXAMPLES, torch.device("cpu"))
    assert can_sum(base)
    ours = gradient_of(model, -summed_head(base, fused_lm_head=True, use_cache=False, **inputs).log_probs.sum())
    labels = inputs.pop("labels")
    logits = base(**inputs, use_cache=False).logits[0, :-1]
    plain = gradient_of(model, functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-4, atol=1e-5)


def test_other_machines_models_and_dtypes_keep_trls_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that scales or caps its logits or may, half precision, which wants autocast, and a torch without it."""
    base = model.get_base_model()
    for family, name, value in (("gemma2", "final_logit_softcapping", 30.0), ("granite", "logits_scaling", 2.0)):
        monkeypatch.setattr(fused_decoder, "family_of", lambda _, entry=FAMILIES[family]: entry)
        monkeypatch.setattr(base.config, name, value, raising=False)
        assert not can_sum(base)
        monkeypatch.undo()
    monkeypatch.setattr(fused_decoder, "family_of", lambda _: None)
    assert not can_sum(base)
    monkeypatch.undo()
    monkeypatch.setattr(type(base), "dtype", torch.bfloat16)
    assert not can_sum(base)
    monkeypatch.undo()
    monkeypatch.setattr(lm_head_loss, "_linear_cross_entropy", None)
    assert not can_sum(base)
    monkeypatch.undo()
    assert can_sum(base)
