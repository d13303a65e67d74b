"""EVA and LoftQ: PEFT's own initial values, with an unchanged base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from job.errors import SettingsError
from job.model.adapter_options import AdapterOptions
from job.model.informed_init import init_eva, init_loftq
from job.model.lora import adapter_off, trainable
from job.model.packed_attention import use
from job.training.packing import packed_inputs
from tests.helpers import LINEAR, fill_adapter, make_examples, make_model

EXAMPLES = make_examples(6, shortest=40, longest=40)
FEW = AdapterOptions(layers=(1,))
"""EVA takes time for every layer."""


def eva(model: Any, batches: int = 3) -> Any:
    """Fills the adapter from packed sequences of two examples each."""
    each = len(EXAMPLES) // batches
    inputs = [packed_inputs(EXAMPLES[n * each : (n + 1) * each], model.device) for n in range(batches)]
    base = model.get_base_model()

    def forward(number: int) -> None:
        base(**{name: value for name, value in inputs[number].items() if name != "labels"}, use_cache=False)

    init_eva(model, [(one["input_ids"], one["labels"]) for one in inputs], forward)
    return model


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage")
def test_eva_begins_as_pefts_own(base_folder: Path) -> None:
    """Packed sequences give the values that PEFT computes from the same rows in a padded batch; ranks stay."""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    ours = eva(make_model(base_folder, rank=4, options=FEW))
    how: dict[str, Any] = {"target_modules": list(LINEAR), "eva_config": EvaConfig(rho=1.0), "init_lora_weights": "eva"}
    how |= {"layers_to_transform": [1], "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    theirs = get_peft_model(plain, LoraConfig(r=4, **how))
    rows = torch.tensor([example.input_ids for example in EXAMPLES])
    labels = torch.where(torch.tensor([example.targets for example in EXAMPLES]), rows, -100)
    batches = [{"input_ids": rows[n : n + 2], "labels": labels[n : n + 2]} for n in (0, 2, 4)]
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    own = trainable(ours)
    for name, expected in trainable(theirs).items():
        torch.testing.assert_close(own[name], expected.float(), rtol=1e-3, atol=1e-4)
    config = ours.peft_config["default"]
    assert (config.init_lora_weights, config.eva_config, dict(config.rank_pattern)) == (True, None, {})
    assert set(config.target_modules) == set(LINEAR)


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("none", marks=pytest.mark.long)])
def test_eva_is_the_same_every_time(base_folder: Path, quantization: str) -> None:
    """Bit for bit, whatever the adapter held before; and it changes nothing yet."""
    how: dict[str, Any] = {"quantization": quantization, "rank": 4, "options": FEW}
    first, second = (eva(change(make_model(base_folder, **how))) for change in (lambda model: model, fill_adapter_a))
    assert trainable(first)
    for name, parameter in trainable(first).items():
        assert torch.equal(parameter, trainable(second)[name])
        assert bool(parameter.any()) == (".lora_A." in name)


def fill_adapter_a(model: Any) -> Any:
    """Other first values of A."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if ".lora_A." in name:
                parameter.fill_(0.5)
    return model


def test_what_eva_cannot_do_is_refused(base_folder: Path) -> None:
    """More ranks than a layer is wide, or than there are tokens, would end in PEFT's own error or never."""
    with pytest.raises(SettingsError, match=r"JOB_LORA__RANK: eva needs a rank of at most .* 128 here, and not 129"):
        eva(make_model(base_folder, rank=129))
    with pytest.raises(
        SettingsError,
        match="JOB_LORA__INIT: eva needs at least as many target tokens in one micro-batch as the rank, 64",
    ):
        eva(make_model(base_folder, rank=64), batches=6)


@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_begins_with_what_quantization_took_away(base_folder: Path, rslora: bool) -> None:  # noqa: FBT001
    """Scale times B A is the best approximation of the error, as by PEFT's decomposition; the base stays the base."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight
    from peft.utils.loftq_utils import _low_rank_decomposition

    model = make_model(base_folder, quantization="nf4", rank=8, options=AdapterOptions(use_rslora=rslora))
    init_loftq(model, base_folder)
    own = dict(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).named_parameters())
    modules = model.get_base_model().named_modules()
    layers = {name: layer for name, layer in modules if isinstance(layer, LoraLayer)}
    assert len(layers) == 14, "seven in each of two decoder layers"
    for name, layer in layers.items():
        error = own[f"{name}.weight"] - dequantize_module_weight(layer.get_base_layer())
        theirs = _low_rank_decomposition(error, 8)
        ours = layer.get_delta_weight("default")
        torch.testing.assert_close(ours, theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-5)
        assert (error - ours).norm() < 0.95 * error.norm()


def test_loftq_brings_the_answers_nearer(base_folder: Path) -> None:
    """With enough ranks nothing is left of the error: the 4-bit base with the adapter is the base in fp32."""
    model, ids = make_model(base_folder, quantization="nf4", rank=64), torch.arange(3, 43)[None]
    init_loftq(model, base_folder)
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    use(model.get_base_model(), "eager")
    with torch.no_grad():
        expected, found = plain(ids).logits, model.eval()(input_ids=ids).logits
        with adapter_off(model):
            without = model(input_ids=ids).logits
    assert (found - expected).norm() < 0.5 * (without - expected).norm()


def test_what_loftq_cannot_do_is_refused(base_folder: Path) -> None:
    """A base in floating point has lost nothing; and no layer has more singular values than it is wide."""
    with pytest.raises(SettingsError, match="JOB_LORA__INIT: loftq needs weights in 4 bits"):
        init_loftq(fill_adapter(make_model(base_folder)), base_folder)
    with pytest.raises(SettingsError, match=r"JOB_LORA__RANK: loftq needs a rank of at most .*, 64 here, and not 65"):
        init_loftq(make_model(base_folder, quantization="nf4", rank=65), base_folder)
