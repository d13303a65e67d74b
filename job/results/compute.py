"""Floating point operations of training, and their ratio to those of pre-training the base.

    training     = tokens * (4 * base's parameters + 6 * adapter's parameters)
    reference    = tokens of the rows * 2 * base's parameters, added for methods with a reference model
    pre-training = 6 * base's parameters * pre-training tokens

Kaplan et al. 2020 (arXiv:2001.08361, section 2.1): a forward pass takes 2 operations for each parameter and token, a
backward pass twice as many, one half for the gradients of activations and one for those of weights. A frozen weight has
no gradient, which leaves 4 of 6. These are estimates: the products of the attention scores are left out, embeddings
count as parameters, and all experts of a mixture of experts are counted, which is too many. Repeated steps, recomputed
activations and evaluations are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.results.public_bases import PUBLIC_BASES, public_base

PETA = 1e15


def compute_spent(results: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest's `compute`, from its records of model, data, training and settings. Operations are in 10^15.

    A token counts once for each epoch. For a partial last epoch, the mean length of all rows is assumed.

    Args:
        results: The manifest.
        recorded: An earlier result. Its number of pre-training tokens is used, unless a setting gives one; None to look
            it up.
    """
    model, dataset, training = (results[name] for name in ("model", "dataset", "training"))
    base = model["parameters"] - model.get("idle_parameters", 0)  # which older manifests lack
    adapter = model["trainable_parameters"] - model.get("idle_trainable_parameters", 0)
    tokens = dataset["tokens"] * training["examples"] / dataset["rows"]
    referenced = dataset["tokens"] if training.get("reference") else 0
    spent = (tokens * (4 * base + 6 * adapter) + referenced * 2 * base) / PETA
    pretraining_tokens, source = _pretraining_tokens(results, recorded)
    before = None if pretraining_tokens is None else 6 * base * pretraining_tokens / PETA
    return {
        "tokens": tokens,
        "training_pflop": spent,
        "pretraining_tokens": pretraining_tokens,
        "pretraining_source": source,
        "pretraining_pflop": before,
        "share": None if not before else spent / before,
    }


def _pretraining_tokens(
    results: Mapping[str, Any], recorded: Mapping[str, Any] | None
) -> tuple[float | None, str | None]:
    """Number of pre-training tokens of the base, and the source of the number; None if it is unknown."""
    settings = {name: setting["value"] for name, setting in results["settings"].items()}
    pretraining_tokens = settings.get("model.pretraining_tokens")
    if pretraining_tokens is not None:
        return float(pretraining_tokens), "JOB_MODEL__PRETRAINING_TOKENS"
    if recorded is not None:
        return recorded["pretraining_tokens"], recorded["pretraining_source"]
    name, _ = public_base(results["model"]["id"], results["model"]["revision"], settings.get("model.name"))
    base = PUBLIC_BASES.get(name)
    return (None, None) if base is None or base.tokens is None else (base.tokens, base.source)
