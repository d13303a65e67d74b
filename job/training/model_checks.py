"""Which settings of a run a model's configuration excludes, checked before weights and data are fetched.

The stage `pull` and the command `plan` pass these problems to `model.load_base.inspect`, which adds those of the
adapter and raises all of them together. What only the loaded model shows is checked later, in `model` and
`training.prepare`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from job.errors import Problem, SettingsError
from job.model.adapter_options import AdapterOptions, pattern_matches, too_high_rank
from job.model.files import in_eight_bits
from job.model.target_modules import adapted_layers, resolve_targets
from job.model.whole_modules import modules_named
from job.records import FP8
from job.training.fp8_check import fp8_problems_of

_INIT, _PLACEMENT = "JOB_LORA__INIT", "JOB_MODEL__PLACEMENT"
_MATRIX = 2
"""Dimensions of what muon updates."""


def model_problems(
    config: Any,
    empty: Any,
    *,
    targets: Sequence[str] | str | None,
    rank: int,
    options: AdapterOptions,
    compute: str,
    placement: str,
    optimizer: str,
) -> Iterator[Problem]:
    """Yields a problem for each setting that this model excludes; problems of the adapter are not included.

    Args:
        config: The model's configuration, of transformers.
        empty: The model on the meta device.
        targets: `JOB_LORA__TARGET_MODULES`; None for the default of the architecture.
        rank: `JOB_LORA__RANK`.
        options: The adapter's other options.
        compute: `JOB_TRAIN__COMPUTE`.
        placement: `JOB_MODEL__PLACEMENT`.
        optimizer: `JOB_TRAIN__OPTIMIZER`.
    """
    try:
        named = resolve_targets(empty, targets)
    except SettingsError:  # `inspect` raises it
        named = []
    published = getattr(config, "quantization_config", None) or {}
    of_initialization = list(_first_values(empty, named, rank, options, published=bool(published)))
    yield from of_initialization or _useless_ranks(empty, named, rank, options)
    if placement in {"sharded", "host"} and in_eight_bits(published):
        yield Problem(
            _PLACEMENT, f"is {placement}, which is for 4-bit weights, and the base is published in 8 bits; take gpu"
        )
    if compute == FP8:
        yield from fp8_problems_of(config, named)
    if optimizer == "muon":
        yield from _no_matrices(empty, options.modules_to_save)


def _useless_ranks(empty: Any, named: Sequence[str], rank: int, options: AdapterOptions) -> Iterator[Problem]:
    """Problems of ranks that no update of an adapted layer can have: mistyped, they only fill the machine's memory."""
    shapes = [empty.get_submodule(name).weight.shape for name in adapted_layers(empty, named, options)]
    most = max(map(min, shapes), default=None)
    ranks = {"JOB_LORA__RANK": rank, "JOB_LORA__RANK_PATTERN": max(options.rank_pattern.values(), default=0)}
    if options.adalora is not None and options.adalora.init_r > 2 * rank:  # by default less
        ranks["JOB_LORA__INIT_RANK"] = options.adalora.init_r
    for setting, value in ranks.items():
        if most is not None and value > most:
            what = f"is {value:,}, and {most:,} is the highest rank that the update of any adapted layer can have"
            yield Problem(setting, f"{what}; lower it")


def _no_matrices(empty: Any, modules_to_save: Sequence[str]) -> Iterator[Problem]:
    """Problems of modules that are trained whole with an optimizer that updates matrices only."""
    for name in modules_to_save:
        parts = {
            f"{full}.{part}": parameter.shape
            for full in modules_named(empty, name)
            for part, parameter in empty.get_submodule(full).named_parameters()
            if parameter.ndim != _MATRIX
        }
        for part, shape in list(parts.items())[:1]:
            what = f"is muon, which updates matrices only, and JOB_LORA__MODULES_TO_SAVE={name} also trains {part}"
            yield Problem("JOB_TRAIN__OPTIMIZER", f"{what}, of shape {tuple(shape)}; change one of the two")


def _first_values(
    empty: Any, named: Sequence[str], rank: int, options: AdapterOptions, *, published: bool
) -> Iterator[Problem]:
    """Problems of JOB_LORA__INIT with this base; `published`: whether the base's files are already quantized.

    `decomposed_init` and `informed_init` check the same when they compute the initialization.
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
        # The weight of GPT-2's Conv1D is (inputs, outputs), and it has no attribute `in_features`.
        inputs = getattr(layer, "in_features", layer.weight.shape[0])
        most = inputs if init == "eva" else min(layer.weight.shape)
        own = next((value for key, value in options.rank_pattern.items() if pattern_matches(key, name)), rank)
        if own > most:
            too_high.append((most, own))
    if too_high:
        most, own = min(too_high)
        yield too_high_rank(init, own, most)
