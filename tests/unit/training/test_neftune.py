"""NEFTune's noise: that of transformers for one example, and in a packed sequence as if each were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from job.training.neftune import add_noise, segment_lengths
from job.training.packing import alone_inputs, packed_inputs
from tests.helpers import make_examples, make_model

ALPHA = 5.0


@pytest.fixture
def base(base_folder: Path) -> Any:
    """The tiny base in training."""
    return make_model(base_folder).get_base_model().train()


def embedded(base: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the decoder's first layer gets."""
    seen: list[torch.Tensor] = []
    hook = base.model.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    torch.manual_seed(1)
    base.base_model(**inputs, use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("packed", [True, False])
def test_one_example_gets_the_noise_of_transformers(base_folder: Path, *, packed: bool) -> None:
    """Same seed, same noise, up to rounding; also in a model that cannot run packed sequences."""
    plain = MistralForCausalLM.from_pretrained(base_folder, attn_implementation="eager")
    base = (make_model(base_folder).get_base_model() if packed else plain).train()
    (example,), cpu = make_examples(1), torch.device("cpu")
    inputs = packed_inputs([example], cpu) if packed else alone_inputs(example, cpu)
    del inputs["labels"]
    hook = activate_neftune(base, ALPHA)
    expected = embedded(base, inputs)
    deactivate_neftune(base, hook)
    remove = add_noise(base, ALPHA)
    found = embedded(base, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    remove()
    assert not torch.equal(found, embedded(base, inputs))


def test_the_noise_of_an_example_does_not_depend_on_its_neighbours(base: Any) -> None:
    """Its bound depends on its own length, not on that of the packed sequence; an evaluation has no noise."""
    examples = make_examples(4)
    inputs = packed_inputs(examples, torch.device("cpu"))
    del inputs["labels"]
    plain = embedded(base, inputs)
    add_noise(base, ALPHA)
    noise, start = (embedded(base, inputs) - plain)[0], 0
    for example in examples:
        length = len(example.input_ids)
        bound = ALPHA / (length * noise.shape[-1]) ** 0.5
        assert 0.95 * bound < noise[start : start + length].abs().max() <= 1.0001 * bound
        start += length
    base.eval()
    assert torch.equal(embedded(base, inputs), plain)


def test_segments_are_found_by_positions() -> None:
    """Every token knows the length of its own segment."""
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert segment_lengths(positions).tolist() == [[3, 3, 3, 1, 2, 2]]
