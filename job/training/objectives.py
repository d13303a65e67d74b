"""The losses of preferences: pure functions of summed log-probabilities, and their metrics by TRL's names.

Each equals TRL 1.16: `dpo` its DPOTrainer, `kto` its KTOTrainer, `orpo` its ORPOTrainer. A step's loss is the mean over
its examples. A step is computed in parts (micro-batches, processes), so a function returns the contributions of the
examples in its arguments; summed over the parts, they are the step's loss and metrics.

To add one: a function of the type `Objective`, entered in `OBJECTIVES` under its name in `common.methods.METHODS`; and
in `tests/unit/training/test_objectives.py` a comparison with TRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional

from job.records import Example
from job.training.config import Preference

Contributions = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""The examples' part of the loss, () float32 with gradient history, and of each metric, () float32 without."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Log-probabilities of some examples of a step, in nats. Pairs have two columns, chosen and rejected.

    Attributes:
        policy: (examples, columns) float32 with gradient history: summed over the targets of each sequence.
        reference: (examples, columns) float32: the same by the reference model; zeros for a method without one.
        lengths: (examples, columns) float32: number of targets of each sequence.
        whole: (examples,) float32 with gradient history: summed over all tokens of the first sequence except its first
            token. Only for `orpo`, else zeros.
        desirable: (examples,) bool: the labels of single answers; all true for pairs.
        kl: () float32: KTO's estimate of the divergence from the reference over the whole step; else zero.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor
    whole: torch.Tensor
    desirable: torch.Tensor
    kl: torch.Tensor


@dataclass(frozen=True)
class Totals:
    """Totals over all examples of a step; the same in all processes.

    Attributes:
        examples: Number of pairs, or of labelled answers.
        desirable: Number of answers labelled good.
        predicted: Number of tokens of all first sequences, each without its first token.
    """

    examples: int
    desirable: int
    predicted: int


Objective = Callable[[Sums, Totals, Preference], Contributions]


def totals_of(examples: Sequence[Example]) -> Totals:
    """The totals of a step, from all its examples."""
    return Totals(
        examples=len(examples),
        desirable=sum(bool(example.desirable) for example in examples),
        predicted=sum(len(example.sequences[0].input_ids) - 1 for example in examples),
    )


def dpo(sums: Sums, totals: Totals, options: Preference) -> Contributions:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7), or IPO (Azar et al. 2024, eq. 17).

    `label_smoothing` is that of conservative DPO: the assumed share of pairs whose labels are swapped. IPO uses means
    over an answer's tokens instead of sums, as in TRL.
    """
    ratios = sums.policy - sums.reference
    if options.loss == "ipo":
        mean = ratios / sums.lengths
        losses = (mean[:, 0] - mean[:, 1] - 1 / (2 * options.beta)) ** 2
    else:
        margin = options.beta * (ratios[:, 0] - ratios[:, 1])
        losses = -functional.logsigmoid(margin)
        if options.label_smoothing:
            flipped = -functional.logsigmoid(-margin)
            losses = (1 - options.label_smoothing) * losses + options.label_smoothing * flipped
    rewards = options.beta * ratios.detach()
    return losses.sum() / totals.examples, _pair_metrics(rewards, sums.policy.detach(), totals)


def orpo(sums: Sums, totals: Totals, options: Preference) -> Contributions:
    """Odds ratio preference optimization (Hong et al. 2024, eq. 6): the loss on the chosen answer, plus the odds ratio.

    As in TRL, the loss is the mean over all tokens of prompt and answer in the step, and the odds ratio uses means over
    an answer's tokens.
    """
    mean = sums.policy / sums.lengths
    odds = (mean[:, 0] - mean[:, 1]) - (_log1mexp(mean[:, 0]) - _log1mexp(mean[:, 1]))
    ratio = functional.logsigmoid(odds)
    nll = -sums.whole.sum() / totals.predicted
    loss = nll - options.beta * ratio.sum() / totals.examples
    metrics = {
        **_pair_metrics(options.beta * mean.detach(), mean.detach(), totals),
        "nll_loss": nll.detach(),
        "log_odds_ratio": ratio.detach().sum() / totals.examples,
        "log_odds_chosen": odds.detach().sum() / totals.examples,
    }
    return loss, metrics


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it (Mächler 2012, eq. 7)."""
    near = x > -math.log(2)
    # `where` computes both branches, and the gradient of the branch that is not selected must be finite, too.
    close = torch.log(-torch.expm1(torch.where(near, x, -torch.ones_like(x))))
    far = torch.log1p(-torch.exp(torch.where(near, -torch.ones_like(x), x)))
    return torch.where(near, close, far)


def kto(sums: Sums, totals: Totals, options: Preference) -> Contributions:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, eq. 8), on single answers with a label.

    `rewards/chosen` is the mean over the good answers of a step, `rewards/rejected` the mean over the bad ones. A step
    without good (or bad) answers lacks these metrics.
    """
    ratios = (sums.policy - sums.reference)[:, 0]
    good = sums.desirable
    sign = torch.where(good, 1.0, -1.0)
    weights = torch.where(good, options.desirable_weight, options.undesirable_weight)
    losses = weights * (1 - torch.sigmoid(options.beta * sign * (ratios - sums.kl)))
    rewards, logps = options.beta * ratios.detach(), sums.policy.detach()[:, 0]
    metrics = {"kl": sums.kl * (len(ratios) / totals.examples)}
    sides = {"chosen": (good, totals.desirable), "rejected": (~good, totals.examples - totals.desirable)}
    for side, (of_side, count) in sides.items():
        if count:
            metrics[f"rewards/{side}"] = rewards[of_side].sum() / count
            metrics[f"logps/{side}"] = logps[of_side].sum() / count
    if all(count for _, count in sides.values()):
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return losses.sum() / totals.examples, metrics


def _pair_metrics(rewards: torch.Tensor, logps: torch.Tensor, totals: Totals) -> dict[str, torch.Tensor]:
    """The metrics of all losses on pairs; `rewards` and `logps` are (pairs, 2), detached."""
    chosen, rejected = rewards.unbind(1)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    return {name: values.sum() / totals.examples for name, values in metrics.items()}


OBJECTIVES: Mapping[str, Objective] = {"dpo": dpo, "kto": kto, "orpo": orpo}


@lru_cache(maxsize=16)
def metric_names(method: str, totals: Totals) -> tuple[str, ...]:
    """Names of a step's metrics, in the order of its objective's result.

    Computed from empty tensors, because a process without examples in the step needs the names, too.
    """
    columns = 1 if method == "kto" else 2
    empty, flat = torch.zeros(0, columns), torch.zeros(0)
    nothing = Sums(empty, empty, empty, flat, flat.bool(), torch.zeros(()))
    return tuple(OBJECTIVES[method](nothing, totals, Preference(method="sft"))[1])
