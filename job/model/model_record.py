"""The manifest's record of a loaded model: its parameters, and how its weights are held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.model.decomposed_init import frozen_parameters
from job.model.device import DTYPES
from job.model.lora import trainable
from job.records import ModelRecord


@dataclass(frozen=True)
class Held:
    """How the base's weights are held: as what, and how many of them."""

    quantization: str
    """`nf4`, `fp4`, `int8`, or `none`; that of most, where there are several."""
    double: bool
    weights: int


def held(model: Any) -> Held:
    """Inspects the loaded layers, since neither the settings nor config.json have to agree with them.

    Of a mixture the experts are among them, which are no linear layers.
    """
    numbers: Counter[tuple[str, bool]] = Counter()
    for weight in model.parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            numbers[state.quant_type, state.nested] += state.shape.numel()
        elif type(weight).__name__ == "Int8Params":
            numbers["int8", False] += weight.numel()
    if not numbers:
        return Held("none", double=False, weights=0)
    (kind, double), _ = numbers.most_common(1)[0]
    return Held(kind, double, numbers.total())


def describe_model(
    model: Any, *, name: str, revision: str | None, sha256: str, added_tokens: Sequence[str] = ()
) -> ModelRecord:
    """The manifest's record of a PEFT model. Parameters are counted as in the unquantized model."""
    from job.model.experts import expert_parameters, idle_experts
    from job.model.fused.experts import adapter_of_experts

    adapter = sum(parameter.numel() for parameter in trainable(model).values())
    base = model.get_base_model()
    as_held, config = held(base), model.peft_config["default"]
    idle = idle_experts(base)
    return ModelRecord(
        id=name,
        revision=revision,
        sha256=sha256,
        architecture=type(base).__name__,
        quantization=as_held.quantization,
        double_quantization=as_held.double,
        dtype={long: short for short, long in DTYPES.items()}[str(base.dtype).removeprefix("torch.")],
        parameters=base.num_parameters() - adapter,
        trainable_parameters=adapter - frozen_parameters(model),
        quantized_parameters=as_held.weights,
        idle_parameters=round(idle * expert_parameters(base)),
        idle_trainable_parameters=round(idle * adapter_of_experts(model)),
        adapted=sorted({*config.target_modules, *(config.target_parameters or ())}),
        added_tokens=list(added_tokens),
    )
