"""Dropout of the adapter. A mask is computed from seed, micro-batch, layer and position: no generator has a state.

PEFT drops entries of a layer's input before the adapter: h = d(x) A', where d(x) is x / (1 - p) with probability 1 - p,
else 0. Which entries are dropped here is Philox of a counter (row, column, number of the layer, micro-batch) and a key,
the seed of the step. The backward pass, activations that are computed again, and a step that is repeated draw the same
masks; a CUDA graph draws new ones each time it is launched, since it reads seed and micro-batch from memory.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox4x32-10).
"""

from __future__ import annotations

from typing import Any

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_LOW = 0xFFFFFFFF


def new_state(device: torch.device) -> torch.Tensor:
    """(2,) int64: the seed of the step, and the number of the micro-batch. Kept at one address, for CUDA graphs."""
    return torch.zeros(2, dtype=torch.int64, device=device)


def reseed(model: Any, seed: int, micro_batch: int) -> None:
    """Sets which masks a fused model's adapter draws from now on: those of one micro-batch. No effect without dropout.

    Args:
        model: A PEFT model.
        seed: Below 2^63; `step_seed` of the step and the process.
        micro_batch: Its number within the step.
    """
    state = model.get_base_model().__dict__.get("dropout_state")
    if state is not None:
        # Filled, not copied from the host: a copy would wait for the GPU.
        state[0].fill_(seed)
        state[1].fill_(micro_batch)


def bound(rate: float) -> int:
    """The threshold for a dropout rate: an entry is dropped if its random number, of 32 bits, is below it."""
    return min(_LOW, round(rate * 2**32))


def drop(x: torch.Tensor, state: torch.Tensor, number: int, rate: float) -> torch.Tensor:
    """(rows, columns) -> the same with some entries 0 and the others divided by 1 - rate, in the dtype of x.

    Args:
        x: In the compute dtype.
        state: The result of `new_state`.
        number: Index of the layer.
        rate: The probability that an entry is dropped.
    """
    kept = x.float() * (1 / (1 - rate))
    return torch.where(_random(x.shape[0], x.shape[1], state, number) < bound(rate), 0.0, kept).to(x.dtype)


def _random(rows: int, columns: int, state: torch.Tensor, number: int) -> torch.Tensor:
    """(rows, columns) int64: random numbers of 32 bits; one counter gives those of four columns, a quarter apart."""
    quarter = -(-columns // 4)
    device = state.device
    counter = [
        torch.arange(quarter, device=device).expand(rows, quarter),
        torch.arange(rows, device=device)[:, None].expand(rows, quarter),
        torch.full((rows, quarter), number, device=device),
        state[1].expand(rows, quarter),
    ]
    key = [state[0] & _LOW, (state[0] >> 32) & _LOW]
    for round_ in range(ROUNDS):
        if round_:
            key = [(k + step) & _LOW for k, step in zip(key, KEY_STEPS, strict=True)]
        # In 64 bits with a sign the product's bits are right although its value is not.
        first, second = (c * m for c, m in zip((counter[0], counter[2]), MULTIPLIERS, strict=True))
        counter = [
            ((second >> 32) & _LOW) ^ counter[1] ^ key[0],
            second & _LOW,
            ((first >> 32) & _LOW) ^ counter[3] ^ key[1],
            first & _LOW,
        ]
    return torch.cat(counter, 1)[:, :columns]
