"""The shape of a language model, read from its config.json: what it takes to count its weights and operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Families whose layers are what `Architecture` describes; biases and norms of queries are too small to matter.
FAMILIES = {"gemma", "granite", "llama", "mistral", "qwen2", "qwen3", "smollm3"}
FUSED_FAMILIES = {"llama", "mistral", "qwen2"}
"""Of one build: RMS norms, rotary positions, SwiGLU, and nothing else. `model/fused` computes all of it."""


def has_fused_decoder(family: str | None, activation: str | None) -> bool:
    """Whether `model/fused` computes the whole decoder of this family, with this activation."""
    return family in FUSED_FAMILIES and activation == "silu"


@dataclass(frozen=True)
class Architecture:
    """A decoder of Llama's kind: grouped attention, and a feed-forward layer of three matrices.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward layer.
        layers: Number of layers.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values, shared by groups of queries.
        head_size: Width of a head.
        vocabulary: Number of tokens.
        tied: Whether the output layer is the embedding.
        window: The most positions of a sequence; None where nothing limits them. A sliding window is no limit.
        fused: Whether `model/fused` computes the whole decoder; of others only the layers with an adapter.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    window: int | None = None
    fused: bool = True

    @property
    def queries(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_size

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one layer, by name."""
        keys = self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """What `JOB_LORA__TARGET_MODULES` may name instead of layers, and the layers that each stands for."""
        everything = tuple(self.linear)
        return {"auto": everything, "all-linear": everything, "attention": everything[:4], "mlp": everything[4:]}

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers, which are what is quantized; the output layer is not."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def head_parameters(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weights: linear layers, embedding, output layer and norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear_parameters + (1 if self.tied else 2) * self.head_parameters + norms

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Weights of a LoRA adapter: two matrices a layer, from the input to the rank and on to the output.

        Source: Hu et al. 2021, LoRA (arXiv:2106.09685), section 4.1.
        """
        return self.layers * sum(rank * sum(self.linear[name]) for name in targets)


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a model's config.json describes.

    Raises:
        ValueError: It is of a family that the formulas do not know, or lacks a number.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{family} models are not known to the formulas (known: {', '.join(sorted(FAMILIES))})")

    def number(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"config.json has no number {name}")
        return value

    heads = number("num_attention_heads")
    hidden = number("hidden_size")
    positions = config.get("max_position_embeddings")
    return Architecture(
        hidden=hidden,
        intermediate=number("intermediate_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads") if config.get("num_key_value_heads") else heads,
        head_size=number("head_dim") if config.get("head_dim") else hidden // heads,
        vocabulary=number("vocab_size"),
        tied=config.get("tie_word_embeddings") is True,
        window=positions if isinstance(positions, int) and positions > 0 else None,
        fused=has_fused_decoder(family, config.get("hidden_act", "silu")),
    )
