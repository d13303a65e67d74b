"""EVA and LoftQ: first values of an adapter from the data, or from the quantization error.

EVA begins with the directions in which the inputs of each layer vary most, on the first rows of the run: A holds the
first principal components, B is zero. PEFT computes it, with the same rank for every layer (its `rho` of 1). PEFT's
default moves ranks between layers; then the adapter's shapes would be known only after the weights are loaded.

LoftQ begins with the quantization error: B A is the best approximation of W - Q that the adapter's rank allows, where
Q is the dequantized 4-bit weight. The quantized base is not changed, since it is evaluated without the adapter as well,
and is what readers of the adapter load. So this is one step of the paper's iteration, as in PEFT's
`replace_lora_weights_loftq`. PEFT's function needs a GPU and ignores the adapter's scale, so it is right only for
alpha = rank; here B is divided by the scale.

Source: Paischer et al. 2024, EVA (arXiv:2410.07170), section 3; Li et al. 2023, LoftQ (arXiv:2310.08659), section 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from job.errors import Problem, SettingsError
from job.model.adapter_options import too_high_rank
from job.model.loading_errors import loading_weights

IGNORED = -100
"""Label of a token that does not count, as in torch and PEFT."""
MANY_PASSES = 2000
"""Forward passes after which EVA has not converged: far more than it takes on real rows, a few dozen."""
_SETTING = "JOB_LORA__INIT"


def too_few_targets(rank: int) -> Problem:
    """The message where no micro-batch of the first rows has as many target tokens as ranks."""
    what = (
        f"eva needs at least as many target tokens in one micro-batch as the rank, {rank}; lower JOB_LORA__RANK, or "
        "use another"
    )
    return Problem(_SETTING, what)


def init_eva(
    model: Any, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], forward: Callable[[int], object]
) -> None:
    """Fills the adapter by EVA, in place.

    Args:
        model: A PEFT model with plain LoRA layers of one rank, its adapter fresh.
        batches: (token ids, labels) of each, (1, tokens) int64; `IGNORED` for tokens that do not count.
        forward: Computes the base on the batch of this number.

    Raises:
        SettingsError: The rank is more than a layer is wide, or than the batches have tokens; or EVA does not converge.
    """
    from peft import EvaConfig, initialize_lora_eva_weights
    from peft.tuners.lora import LoraLayer

    config, rank = model.peft_config["default"], model.peft_config["default"].r
    narrowest = min(layer.in_features for layer in model.modules() if isinstance(layer, LoraLayer))
    if rank > narrowest:
        raise SettingsError([too_high_rank("eva", rank, narrowest)])
    # PEFT passes over batches with fewer tokens than ranks, and would do so for ever.
    usable = [number for number, (_, labels) in enumerate(batches) if int((labels != IGNORED).sum()) >= rank]
    if not usable:
        raise SettingsError([too_few_targets(rank)])
    passes = 0

    def run(_model: Any, inputs: dict[str, torch.Tensor]) -> None:
        nonlocal passes
        passes += 1
        if passes > MANY_PASSES:
            raise SettingsError([Problem(_SETTING, f"eva has not converged after {MANY_PASSES} passes; use another")])
        with torch.no_grad():
            forward(int(inputs["number"]))

    loader = [
        {"input_ids": batches[n][0], "labels": batches[n][1], "number": torch.tensor(n, device="cpu")} for n in usable
    ]
    before = {name: getattr(config, name) for name in ("target_modules", "rank_pattern", "alpha_pattern")}
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123 - a device
            # Only process 0 is here: PEFT would wait for the inputs of the others for ever.
            options: dict[str, Any] = {"show_progress_bar": False, "gather_distributed_inputs": False}
            initialize_lora_eva_weights(model, loader, forward_fn=run, **options)
    finally:
        # Ranks and names are unchanged; readers of the adapter must not compute initial values.
        config.init_lora_weights, config.eva_config = True, None
        for name, value in before.items():
            setattr(config, name, value)


def init_loftq(model: Any, folder: Path, check_stop: Callable[[], None] = lambda: None) -> None:
    """Fills the adapter by LoftQ, in place.

    Args:
        model: A PEFT model over a base in 4 bits, its adapter fresh.
        folder: The base's own files, unquantized. Its weights are read into this machine's memory.
        check_stop: Called for each layer.

    Raises:
        SettingsError: The base's own files are quantized, or the loaded base is not.
    """
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    if any(layer.get_base_layer().weight.is_floating_point() for layer in layers.values()):
        raise SettingsError([Problem(_SETTING, "loftq needs weights in 4 bits; set JOB_MODEL__QUANTIZATION=nf4")])
    with loading_weights(folder):
        unquantized = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map={"": "cpu"}, use_safetensors=True, trust_remote_code=False
        )
    for name, layer in layers.items():
        check_stop()
        own = unquantized.get_submodule(name)
        weight = own.weight.T if isinstance(own, Conv1D) else own.weight  # GPT-2's Conv1D holds (inputs, outputs)
        if not weight.is_floating_point():
            what = "loftq needs the unquantized base, but JOB_MODEL__ID has quantized weights; use another"
            raise SettingsError([Problem(_SETTING, what)])
        _approximate(layer, weight)


def _approximate(layer: Any, weight: torch.Tensor) -> None:
    """Gives one layer the part of W - Q with the largest singular values; `weight` is W (outputs, inputs)."""
    from peft.utils.integrations import dequantize_module_weight

    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (rank, inputs), (outputs, rank)
    rank = a.shape[0]
    if rank > min(weight.shape):
        raise SettingsError([too_high_rank("loftq", rank, min(weight.shape))])
    with torch.no_grad():
        quantized = dequantize_module_weight(layer.get_base_layer()).float()
        u, s, v = torch.linalg.svd(weight.to(quantized.device, torch.float32) - quantized, full_matrices=False)
        root = s[:rank].sqrt()
        a.copy_(root[:, None] * v[:rank])
        b.copy_(u[:, :rank] * root / layer.scaling["default"])
