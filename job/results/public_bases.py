"""Facts about public base models by name, and the public name of a base.

To add one: an entry in `PUBLIC_BASES`, with the source of the figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_CACHED = re.compile(r"/models--([\w.-]+)/snapshots/([0-9a-f]{40})/*$", re.ASCII)


@dataclass(frozen=True)
class PublicBase:
    """Tokens that a base was pre-trained on, and where the figure is from."""

    tokens: float | None
    source: str


# What the sources say, as read on 2026-11-29.
_LLAMA2 = "arXiv:2307.09288"  # table 1: 2.0T tokens for each size
_PYTHIA = "arXiv:2304.01373"  # "we train all models for 299,892,736,000 tokens"; the cards say the same
_SMOLLM2_135M = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M"  # "trained on 2 trillion tokens"
_SMOLLM2_360M = "https://huggingface.co/HuggingFaceTB/SmolLM2-360M"  # "trained on 4 trillion tokens"
_SMOLLM2 = "arXiv:2502.02737"  # abstract: the model of 1.7B parameters on "~11 trillion tokens"

PUBLIC_BASES: Mapping[str, PublicBase] = {
    "EleutherAI/pythia-160m": PublicBase(299_892_736_000, _PYTHIA),
    "EleutherAI/pythia-410m": PublicBase(299_892_736_000, _PYTHIA),
    "EleutherAI/pythia-1.4b": PublicBase(299_892_736_000, _PYTHIA),
    "EleutherAI/pythia-6.9b": PublicBase(299_892_736_000, _PYTHIA),
    "HuggingFaceTB/SmolLM2-135M": PublicBase(2e12, _SMOLLM2_135M),
    "HuggingFaceTB/SmolLM2-135M-Instruct": PublicBase(2e12, _SMOLLM2_135M),
    "HuggingFaceTB/SmolLM2-360M": PublicBase(4e12, _SMOLLM2_360M),
    "HuggingFaceTB/SmolLM2-360M-Instruct": PublicBase(4e12, _SMOLLM2_360M),
    "HuggingFaceTB/SmolLM2-1.7B": PublicBase(11e12, _SMOLLM2),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": PublicBase(11e12, _SMOLLM2),
    "meta-llama/Llama-2-7b-hf": PublicBase(2e12, _LLAMA2),
    "meta-llama/Llama-2-13b-hf": PublicBase(2e12, _LLAMA2),
    "meta-llama/Llama-2-70b-hf": PublicBase(2e12, _LLAMA2),
    "mistralai/Mistral-7B-v0.1": PublicBase(None, ""),
    # arXiv:2412.15115 gives the size of the data, 18 trillion tokens, not how much of it each model saw.
    "Qwen/Qwen2.5-0.5B": PublicBase(None, ""),
    "Qwen/Qwen2.5-1.5B": PublicBase(None, ""),
    "Qwen/Qwen2.5-7B": PublicBase(None, ""),
}
"""Name on the hub -> what is known. `tokens` is None where it was never published for that model."""


def public_base(location: str, revision: str | None, name: str | None) -> tuple[str, str | None]:
    """The name and the commit by which readers of the adapter can get its base: never a path of this machine.

    Args:
        location: JOB_MODEL__ID.
        revision: The commit that was used; None if `location` is no hub id.
        name: JOB_MODEL__NAME; it has a commit only if it names the same repository as `location`.

    Returns:
        The name that was given, else the hub id (also where `location` is its folder in the hub's cache), else the last
        part of the path or URI, under which PEFT finds a folder in the current directory.
    """
    if name is not None:
        return name, revision if name == location else None
    if revision is not None:
        return location, revision
    if cached := _CACHED.search(location):
        return cached[1].replace("--", "/", 1), cached[2]
    return last_part(location).strip(".") or "base", None


def last_part(location: str) -> str:
    """The last part of a hub id, URI or path."""
    return location.rstrip("/").rpartition("/")[2] or location
