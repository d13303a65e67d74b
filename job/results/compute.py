"""Floating point operations that training took, and their share of what pre-training the base took.

    training     = tokens * (4 * base's parameters + 6 * adapter's parameters)
    reference    = tokens of the rows * 2 * base's parameters, for methods that compare with a reference model
    pre-training = 6 * base's parameters * tokens that it was pre-trained on

Kaplan et al. 2020 (arXiv:2001.08361, section 2.1): a forward pass takes 2 operations for each parameter and token, a
backward pass twice as many, one half for the gradients of activations and one for those of weights. A frozen weight has
no gradient, which leaves 4 of 6. As there, the attention's own products are left out, and embeddings are counted with
the parameters, so that these are estimates; of a mixture of experts, all experts count, which is too many. Repeated
steps, activations that are computed again, and evaluations are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.results.public_bases import PUBLIC_BASES, public_base

PETA = 1e15


def compute_spent(results: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest's `compute`, from its records of model, data, training and settings. Operations are in 10^15.

    A token that a step reads counts as often as it is read: of a last epoch that is not whole, the mean of the rows.

    Args:
        results: The manifest.
        recorded: An earlier result, whose tokens of pre-training are taken unless a setting gives them; None to look
            them up.
    """
    model, dataset, training = (results[name] for name in ("model", "dataset", "training"))
    base, adapter = model["parameters"], model["trainable_parameters"]
    tokens = dataset["tokens"] * training["examples"] / dataset["rows"]
    referenced = dataset["tokens"] if training.get("reference") else 0
    spent = (tokens * (4 * base + 6 * adapter) + referenced * 2 * base) / PETA
    known, source = _pretraining_tokens(results, recorded)
    before = None if known is None else 6 * base * known / PETA
    return {
        "tokens": tokens,
        "training_pflop": spent,
        "pretraining_tokens": known,
        "pretraining_source": source,
        "pretraining_pflop": before,
        "share": None if not before else spent / before,
    }


def _pretraining_tokens(
    results: Mapping[str, Any], recorded: Mapping[str, Any] | None
) -> tuple[float | None, str | None]:
    """Tokens that the base was pre-trained on, and where the number is from; None if it is not known."""
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    given = settings.get("model.pretraining_tokens")
    if given is not None:
        return float(given), "JOB_MODEL__PRETRAINING_TOKENS"
    if recorded is not None:
        return recorded["pretraining_tokens"], recorded["pretraining_source"]
    name, _ = public_base(results["model"]["id"], results["model"]["revision"], settings.get("model.name"))
    known = PUBLIC_BASES.get(name)
    return (None, None) if known is None or known.tokens is None else (known.tokens, known.source)
