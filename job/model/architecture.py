"""The shape of a language model, read from its config.json: what it takes to count its weights and operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.model.families import FAMILIES, caps_scores, fused_family, of_text, why_not_recorded

WIDEST_HEAD = 256
"""Heads that are wider have no attention kernel for long rows (`model/fused/long_attention.py`)."""
HOPPER, TRITON_HEADS = 9, (128,)
"""The major compute capability and the sizes of heads for which the kernel with Triton was measured."""


@dataclass(frozen=True)
class Architecture:
    """A decoder of `FAMILIES`: grouped attention, and a feed-forward layer of three matrices, or a mixture of such.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward layer; of a mixture, of those together that a token goes to.
        layers: Number of layers.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values, shared by groups of queries.
        head_size: Width of a head.
        vocabulary: Number of tokens.
        tied: Whether the output layer is the embedding.
        window: The most positions of a sequence; None where nothing limits them. A sliding window is no limit.
        fused: Whether `model/fused` computes the whole decoder; of others only the layers with an adapter.
        norms: RMS norms of the residual stream's width, a layer.
        query_norm: Whether queries and keys have an RMS norm too.
        joined: Whether queries, keys and values are one linear layer, and gate and up another.
        not_recorded: Why the decoder cannot be recorded as a CUDA graph although it is fused; None if it can.
        caps_scores: Whether attention's scores are capped.
        experts: Of a mixture, how many feed-forward layers a layer has; 0 where it is none.
        chosen: Of a mixture, to how many of them a token goes.
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
    norms: int = 2
    query_norm: bool = False
    joined: bool = False
    not_recorded: str | None = None
    caps_scores: bool = False
    experts: int = 0
    chosen: int = 1

    @property
    def in_tiles(self) -> bool:
        """Whether long rows are computed layer by layer (`training/long_rows.py`), where nothing else is against it."""
        return self.fused and not self.caps_scores and self.head_size <= WIDEST_HEAD

    def attends_by_triton(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability computes attention's backward pass of long rows with Triton.

        Elsewhere it was not measured; see `fused.long_attention` and decision 25.
        """
        return capability[0] == HOPPER and self.head_size in TRITON_HEADS

    @property
    def triton_copies(self) -> int:
        """How many heads' fp32 gradients take as much as what that keeps instead: a number for each head and token."""
        return -(-self.heads // self.head_size)

    @property
    def queries(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of all keys together, and of all values."""
        return self.kv_heads * self.head_size

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one attention layer, by name."""
        first = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}
        if self.joined:
            first = {"qkv_proj": sum(first.values())}
        return {name: (self.hidden, outputs) for name, outputs in first.items()} | {
            "o_proj": (self.queries, self.hidden)
        }

    @property
    def feed_forward(self) -> dict[str, tuple[int, int]]:
        """The same of one feed-forward layer; nothing of a mixture, whose experts are no linear layers."""
        if self.experts:
            return {}
        first = {"gate_proj": self.intermediate, "up_proj": self.intermediate}
        if self.joined:
            first = {"gate_up_proj": sum(first.values())}
        return {name: (self.hidden, outputs) for name, outputs in first.items()} | {
            "down_proj": (self.intermediate, self.hidden)
        }

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one layer, by name."""
        return self.attention | self.feed_forward

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """What `JOB_LORA__TARGET_MODULES` may name instead of layers, and the layers that each stands for."""
        everything = tuple(self.linear)
        attention, mlp = tuple(self.attention), tuple(self.feed_forward)
        return {"auto": everything, "all-linear": everything, "attention": attention, "mlp": mlp}

    @property
    def expert_parameters(self) -> int:
        """Weights of the experts of one layer."""
        return 3 * self.experts * self.hidden * self.expert_width

    @property
    def expert_width(self) -> int:
        """Width of the feed-forward layer that an expert is."""
        return self.intermediate // self.chosen

    @property
    def largest_matrix(self) -> int:
        """Weights that are dequantized at once, where they are for each use: a matrix, or those of all experts."""
        return self.hidden * (2 * self.experts * self.expert_width if self.experts else self.intermediate)

    @property
    def copies(self) -> int:
        """Width of the copies of a token that go to a mixture's experts; 0 where it is none."""
        return self.chosen * self.hidden if self.experts else 0

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers and of experts, which are what is quantized; the output layer is not."""
        linear = sum(inputs * outputs for inputs, outputs in self.linear.values())
        return self.layers * (linear + self.expert_parameters)

    @property
    def used_parameters(self) -> int:
        """Those of them that a token is multiplied by."""
        idle = self.expert_parameters // self.experts * (self.experts - self.chosen) if self.experts else 0
        return self.linear_parameters - self.layers * idle

    @property
    def head_parameters(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weights: linear layers, experts and their routers, embedding, output layer and norms."""
        norms = (self.norms * self.layers + 1) * self.hidden
        routers = self.layers * self.experts * self.hidden
        return self.linear_parameters + (1 if self.tied else 2) * self.head_parameters + norms + routers

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Weights of a LoRA adapter: two matrices a layer, from the input to the rank and on to the output.

        Source: Hu et al. 2021, LoRA (arXiv:2106.09685), section 4.1.
        """
        return self.layers * sum(rank * sum(self.linear[name]) for name in targets)

    def expert_adapter_parameters(self, rank: int, layers: Sequence[int] | None = None) -> int:
        """Weights of the adapters of all experts, of gate and up as one matrix, and of down.

        Args:
            rank: Of each.
            layers: Numbers of the layers whose experts have one; None for all.
        """
        count = self.layers if layers is None else len(layers)
        return count * self.experts * rank * (2 * self.hidden + 3 * self.expert_width)


def key_value_bytes(layers: int, width: int, number_bytes: int) -> int:
    """Bytes of one token's keys and values in a key/value cache.

    Args:
        layers: Layers that have keys and values of their own.
        width: Of all keys of a layer together, which is also that of its values: heads of keys times their size.
        number_bytes: Bytes of one number of the cache.
    """
    return 2 * layers * width * number_bytes


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a model's config.json describes.

    Raises:
        ValueError: It is of a family that the formulas do not know, or lacks a number.
    """
    config = of_text(config)
    name = config.get("model_type")
    if (family := FAMILIES.get(str(name))) is None:
        raise ValueError(f"{name} models are not known to the formulas (known: {', '.join(sorted(FAMILIES))})")

    def number(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"config.json has no number {name}")
        return value

    of = family.experts
    heads = number("num_attention_heads")
    hidden = number("hidden_size")
    positions = config.get("max_position_embeddings")
    return Architecture(
        hidden=hidden,
        intermediate=number("intermediate_size") if of is None else number(of.width) * number("num_experts_per_tok"),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads") if config.get("num_key_value_heads") else heads,
        head_size=number("head_dim") if config.get("head_dim") else hidden // heads,
        vocabulary=number("vocab_size"),
        tied=config.get("tie_word_embeddings", family.tied) is True,
        window=positions if isinstance(positions, int) and positions > 0 else None,
        fused=fused_family(config) is not None,
        norms=family.norms,
        query_norm=family.query_norm is not None,
        joined=family.joined,
        not_recorded=why_not_recorded(config),
        caps_scores=caps_scores(config),
        experts=0 if of is None else number(next((name for name in of.count if config.get(name)), of.count[0])),
        chosen=1 if of is None else number("num_experts_per_tok"),
    )
