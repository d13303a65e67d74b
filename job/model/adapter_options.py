"""The adapter's options beyond rank, alpha and dropout, and whether a model supports them. No torch.

Every option is PEFT's, by PEFT's name. The job's fused layers compute those that are only numbers (`use_rslora`,
`rank_pattern`, `alpha_pattern`, `layers`, `init`); the others are left to PEFT's own layers, see `not_fused`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from job.errors import Problem, environment_name

GROUPS: Mapping[str, str] = {
    "attention": "attention",
    "mlp": "mlp|feedforward|expert|moe(block|layer)?$",
}
"""Groups of layers that `JOB_LORA__TARGET_MODULES` may name: what is found in the class names of the modules that hold
them, in lower case. `moe` at the end alone: Qwen3MoeAttention has the name of its family."""
DECOMPOSITIONS = ("pissa", "olora")
"""Initializations that begin with a part of the base's weights, see `decomposed_init`."""


@dataclass(frozen=True)
class AdaLora:
    """Of AdaLoRA, by PEFT's names: ranks begin at `init_r`, and are taken away until they are `target_r` on average.

    The first `tinit` and the last `tfinal` of `total_step` optimizer steps take none away, of the others every
    `delta_t`th.
    """

    init_r: int
    target_r: int
    tinit: int
    tfinal: int
    delta_t: int
    orth_reg_weight: float
    total_step: int


@dataclass(frozen=True)
class AdapterOptions:
    """`JOB_LORA__...`; the defaults are plain LoRA.

    kind: `lora` or `adalora`.
    init: PEFT's `init_lora_weights`; `default` for its own.
    layers: Numbers of the decoder's layers that get an adapter, from 0; None for all.
    rank_pattern, alpha_pattern: Module name, or its end, or PEFT's regular expression -> the value there.
    adalora: For the kind `adalora`.
    experts: Whether a mixture's experts get an adapter.
    modules_to_save: Names of modules, or their ends, that are trained and saved whole.
    added_tokens: New tokens, of which embedding and output layer get rows that are trained.
    """

    kind: str = "lora"
    init: str = "default"
    use_rslora: bool = False
    use_dora: bool = False
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    adalora: AdaLora | None = None
    experts: bool = False
    modules_to_save: tuple[str, ...] = ()
    added_tokens: tuple[str, ...] = ()

    @property
    def decomposed(self) -> bool:
        """Whether the adapter begins with a part of the base's weights."""
        return self.init.startswith(DECOMPOSITIONS)

    @property
    def bytes_beside(self) -> int:
        """Bytes for each of the adapter's numbers that training keeps besides gradients and the optimizer's state.

        AdaLoRA: three means of importance in fp32. A decomposition: where it is frozen, and the values there.
        """
        return 12 if self.kind == "adalora" else 8 if self.decomposed else 0

    @property
    def not_fused(self) -> str | None:
        """The setting that leaves the computation to PEFT's own layers, with the reason; None if the fused ones do."""
        if self.kind == "adalora":
            return "JOB_LORA__KIND is adalora; fused layers cannot compute AdaLoRA's products of three matrices"
        if self.use_dora:
            return "JOB_LORA__USE_DORA is on; fused layers compute LoRA without magnitudes"
        if self.modules_to_save:
            return "JOB_LORA__MODULES_TO_SAVE is set; fused layers train no module whole"
        if self.added_tokens:
            return "JOB_MODEL__ADD_TOKENS is set; fused layers train no rows of the vocabulary"
        return None


PLAIN = AdapterOptions()
MANY_STEPS = 1 << 30
"""For `make_options` before the rows are counted, on which the number of steps depends."""
_INIT_SHARE = 1.5
"""Of AdaLoRA's rank at the end, that at the beginning where none is set; as PEFT's defaults, 12 and 8."""


def make_options(
    lora: Mapping[str, Any], total_steps: int, added_tokens: Sequence[str] | None = None
) -> AdapterOptions:
    """The options of the settings' group `lora`, by its names; for a run of `total_steps` optimizer steps.

    `added_tokens` is `JOB_MODEL__ADD_TOKENS`.
    """
    adalora = None
    if lora["kind"] == "adalora":
        adalora = AdaLora(
            init_r=lora["init_rank"] or ceil(_INIT_SHARE * lora["rank"]),
            target_r=lora["rank"],
            total_step=total_steps,
            **{name: lora[name] for name in ("tinit", "tfinal", "delta_t", "orth_reg_weight")},
        )
    taken = ("kind", "init", "use_rslora", "use_dora", "layers", "rank_pattern", "alpha_pattern", "experts")
    return AdapterOptions(
        **{name: lora[name] for name in taken},
        adalora=adalora,
        modules_to_save=tuple(lora["modules_to_save"] or ()),
        added_tokens=tuple(added_tokens or ()),
    )


def check_options(options: AdapterOptions, *, rank: int, layers: int, adapted: Collection[str]) -> Iterator[Problem]:
    """What of the options this model cannot have.

    Args:
        options: The adapter's options.
        rank: `JOB_LORA__RANK`.
        layers: Number of the decoder's layers.
        adapted: Full names of the modules that get an adapter.
    """
    if beyond := [number for number in options.layers or () if number >= layers]:
        shown = ", ".join(map(str, beyond[:5]))
        yield Problem("JOB_LORA__LAYERS", f"names layer {shown}; the model has {layers}, from 0 to {layers - 1}")
    for setting, pattern in (("rank_pattern", options.rank_pattern), ("alpha_pattern", options.alpha_pattern)):
        where = environment_name(f"lora.{setting}")
        matches = {key: {name for name in adapted if pattern_matches(key, name)} for key in pattern}
        for key in (key for key, matched in matches.items() if not matched):
            yield Problem(where, f"{key} names no module that gets an adapter; give the name of one, or the end of it")
        # PEFT takes the first that matches, in an order that adapter_config.json does not keep.
        for name in sorted(adapted):
            if len(keys := [key for key, matched in matches.items() if name in matched]) > 1:
                yield Problem(where, f"{' and '.join(keys)} both name {name}; keep one")
                break
    yield from too_few_steps(options)
    ranks = {rank, *options.rank_pattern.values()}
    if options.init == "orthogonal" and (odd := sorted(r for r in ranks if r % 2)):
        yield Problem("JOB_LORA__INIT", f"orthogonal needs even ranks, not {', '.join(map(str, odd))}")


def too_few_steps(options: AdapterOptions) -> Iterator[Problem]:
    """Why AdaLoRA's settings do not fit the number of steps, which is known once the rows are read."""
    ada = options.adalora
    if ada is not None and ada.tinit + ada.tfinal >= ada.total_step:
        what = f"and JOB_LORA__TFINAL leave none of the run's {ada.total_step} steps to reduce ranks; lower them"
        yield Problem("JOB_LORA__TINIT", what)
    elif ada is not None and ada.total_step - ada.tfinal == 1:
        # PEFT ranks by the importance in the steps before the one that takes the last ranks away.
        what = f"leaves one of the run's {ada.total_step} steps to reduce ranks, which takes two; train for more steps"
        yield Problem("JOB_LORA__TFINAL", f"{what}, or lower it" if ada.tfinal else what)


def too_high_rank(init: str, rank: int, most: int) -> Problem:
    """The message for a rank that an initialization cannot have in a layer that is `most` wide."""
    of = "layers' inputs" if init == "eva" else "layers"
    return Problem(
        "JOB_LORA__RANK", f"{init} needs a rank of at most the width of the {of}, {most} here, and not {rank}; lower it"
    )


def pattern_matches(key: str, name: str) -> bool:
    """Whether PEFT takes this key of a pattern to mean the module of this name."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def in_group(group: str, classes: Sequence[str]) -> bool:
    """Whether a layer belongs to one of `GROUPS`, by the class names of the modules around it, innermost first."""
    return any(re.search(GROUPS[group], kind.lower()) for kind in classes)


def described(options: AdapterOptions) -> dict[str, Any]:
    """The options that are not the defaults, as JSON can hold them."""
    plain = vars(PLAIN)
    return {
        name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
        for name, value in vars(options).items()
        if value != plain[name]
    }
