"""What of a run's settings a model's configuration excludes: known before its weights and the data are fetched.

Pull and `plan` pass these problems to `model.base.inspect`, which adds those of the adapter and raises all of them
together. What only the loaded model shows is refused where it is found: in `model` and in `training.prepare`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from job.errors import Problem, SettingsError
from job.model.adapter_options import AdapterOptions, pattern_matches, too_high_rank
from job.model.files import in_eight_bits
from job.model.target_modules import adapted_layers, resolve_targets
from job.records import FP8
from job.training.fp8_check import fp8_problems_of

_INIT, _PLACEMENT = "JOB_LORA__INIT", "JOB_MODEL__PLACEMENT"


def model_problems(
    config: Any,
    empty: Any,
    *,
    targets: Sequence[str] | str | None,
    rank: int,
    options: AdapterOptions,
    compute: str,
    placement: str,
) -> Iterator[Problem]:
    """Yields what of the settings this model excludes, beyond what the adapter cannot be on.

    Args:
        config: Its configuration, of transformers.
        empty: The model on the meta device.
        targets: `JOB_LORA__TARGET_MODULES`; None for the default of the architecture.
        rank: `JOB_LORA__RANK`.
        options: The adapter's other options.
        compute: `JOB_TRAIN__COMPUTE`.
        placement: `JOB_MODEL__PLACEMENT`.
    """
    try:
        named = resolve_targets(empty, targets)
    except SettingsError:  # `inspect` raises it
        named = []
    published = getattr(config, "quantization_config", None) or {}
    yield from _first_values(empty, named, rank, options, published=bool(published))
    if placement in {"sharded", "host"} and in_eight_bits(published):
        yield Problem(
            _PLACEMENT, f"is {placement}, which is for 4-bit weights, and the base is published in 8 bits; take gpu"
        )
    if compute == FP8:
        yield from fp8_problems_of(config, named)


def _first_values(
    empty: Any, named: Sequence[str], rank: int, options: AdapterOptions, *, published: bool
) -> Iterator[Problem]:
    """What the initialization of the adapter cannot begin with; `published` is whether the base's files are quantized.

    The same is refused when it is computed, in `decomposed_init` and `informed_init`.
    """
    init = options.init
    if published and init == "loftq":
        yield Problem(_INIT, "loftq needs the unquantized base, and JOB_MODEL__ID has quantized weights; take another")
    if published and init == "orthogonal":
        what = "orthogonal needs a base in floating point, and JOB_MODEL__ID has quantized weights; take another"
        yield Problem(_INIT, what)
    if init not in {"eva", "loftq"} and not options.decomposed:
        return
    too_high = []
    for name in adapted_layers(empty, named, options):
        layer = empty.get_submodule(name)
        # GPT-2's Conv1D holds (inputs, outputs), and has no such attribute.
        inputs = getattr(layer, "in_features", layer.weight.shape[0])
        most = inputs if init == "eva" else min(layer.weight.shape)
        own = next((value for key, value in options.rank_pattern.items() if pattern_matches(key, name)), rank)
        if own > most:
            too_high.append((most, own))
    if too_high:
        most, own = min(too_high)
        yield too_high_rank(init, own, most)
