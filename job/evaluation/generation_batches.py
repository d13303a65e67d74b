"""Which prompts are answered together: batches, as large as a GPU's memory for the key/value cache allows.

Decoding takes as long for a hundred answers as for ten on a GPU, so a batch may have more prompts than one forward pass
reads. Its cache has two limits: a share of the GPU's memory (`_cache_tokens`), and what weights and forward pass leave
of it (`_fitting_tokens`).

Batches depend only on all prompts, the model, the kind of device and the number of processes, never on the memory that
is free at the moment: a restarted evaluation makes the same batches, and so computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from job.common.formatting import size
from job.common.gpu_context import CONTEXT_BYTES
from job.log import get_logger
from job.model.architecture import key_value_bytes

BATCH_TOKENS = 8192
"""Maximum number of tokens of one forward pass over prompts, with padding."""
CACHE_BATCHES = 4
"""A batch of one prefill pass may have this many times `BATCH_TOKENS` in its cache, prompts and answers together."""
_CACHE_SHARE = 1 / 16
"""Share of a GPU's memory that the cache of a larger batch, read in several passes, may take; a batch read in one pass
may take twice as much. A token of a model without shared key/value heads takes half a megabyte."""
_FITTING_SHARE = 0.9
"""Share of the memory that weights and forward pass leave, which a cache may take: the allocator cannot use it all."""
_MOST_ROWS = 256
"""Maximum number of prompts in a batch that is read in several passes: its logits are (prompts, vocabulary)."""


def plan_batches(
    lengths: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int,
    *,
    cache_tokens: int = 0,
    fitting_tokens: int | None = None,
    processes: int = 1,
) -> list[list[int]]:
    """Divides prompts into batches, the longest first: this needs little padding, and lack of memory shows at once.

    Args:
        lengths: Tokens of each prompt.
        max_new_tokens: Maximum number of tokens of an answer.
        batch_tokens: Maximum number of tokens of one forward pass, with padding; a longer prompt is a batch by itself.
        cache_tokens: Maximum number of tokens, prompts and answers together, of a batch that is read in several passes;
            a batch that is read in one pass may have twice as many. 0: every batch is read in one pass, without this
            limit.
        fitting_tokens: Maximum number of tokens, prompts and answers together, of any batch of more than one prompt;
            None if the memory for them is not limited.
        processes: Number of processes that share the batches; larger batches are limited so that each process gets one.

    Returns:
        For each batch the numbers of its prompts.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    share = min(_MOST_ROWS, -(-len(lengths) // processes))
    batches: list[list[int]] = []
    while order:
        longest = lengths[order[0]]
        rows = min(batch_tokens // longest, CACHE_BATCHES * batch_tokens // (longest + max_new_tokens))
        if cache_tokens:
            fits = cache_tokens // (longest + max_new_tokens)
            rows = max(min(rows, 2 * fits), min(fits, share))
        if fitting_tokens is not None:
            rows = min(rows, fitting_tokens // (longest + max_new_tokens))
        rows = max(1, rows)
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def batches_for_model(
    model: Any, lengths: Sequence[int], max_new_tokens: int, batch_tokens: int, *, processes: int
) -> list[list[int]]:
    """`plan_batches` with the limits of the model's device; warns where not even one prompt may fit.

    Args:
        model: A causal language model, with or without an adapter, on its device.
        lengths: As for `plan_batches`.
        max_new_tokens: As for `plan_batches`.
        batch_tokens: As for `plan_batches`.
        processes: As for `plan_batches`.
    """
    fitting_tokens = _fitting_tokens(model, batch_tokens)
    _warn_of_memory(model, max(lengths, default=0), max_new_tokens, fitting_tokens)
    return plan_batches(
        lengths,
        max_new_tokens,
        batch_tokens,
        cache_tokens=_cache_tokens(model, batch_tokens),
        fitting_tokens=fitting_tokens,
        processes=processes,
    )


def _cache_tokens(model: Any, batch_tokens: int) -> int:
    """The most tokens in the cache of a batch that is read in several forward passes; 0 if such batches are not used.

    They are used on a GPU only, since a CPU gains nothing by them, and for families with a fused decoder, of which the
    size of a token's keys and values is known. The number depends on the GPU's total memory, not on what is free, so
    that a restart makes the same batches. Lowering the tokens of a forward pass, as after memory ran out, lowers it in
    proportion.
    """
    from job.evaluation.key_value_cache import can_be_reserved, new_cache
    from job.model.fused.fused_decoder import attention_with_cache
    from job.model.lora import base_of
    from job.model.packed_attention import is_packed

    base = base_of(model)
    # What is not packed answers one prompt after the other: a larger batch would only be more to lose by a stop.
    if base.device.type != "cuda" or attention_with_cache(base) is None or not is_packed(model):
        return 0
    if not can_be_reserved(new_cache(model)):
        return 0
    return int(_gpu_bytes(base) * _CACHE_SHARE * min(1.0, batch_tokens / BATCH_TOKENS) / token_bytes(model))


def _fitting_tokens(model: Any, batch_tokens: int) -> int | None:
    """The most tokens of a cache that fits into a GPU's memory beside the model and a forward pass over prompts.

    None where it is not known: on a CPU, where main memory is not this process's alone, and for a cache of another
    kind. Counted are the GPU's total memory and the model's weights, not what is free, so that a restart makes the
    same batches. A step of decoding also needs, of one layer, keys and values for each head of the queries.
    """
    from job.model.lora import base_of

    base = base_of(model)
    if base.device.type != "cuda" or not (token := token_bytes(model)):
        return None
    config, number_bytes = base.config.get_text_config(decoder=True), base.dtype.itemsize
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    forward = batch_tokens * 4 * (wide + config.hidden_size) * number_bytes
    repeated = key_value_bytes(1, config.num_attention_heads * _head_size(config), number_bytes)
    left = _gpu_bytes(base) - CONTEXT_BYTES - _weight_bytes(model) - forward
    return max(0, int(_FITTING_SHARE * left / (token + repeated)))


def _warn_of_memory(model: Any, longest: int, max_new_tokens: int, fitting_tokens: int | None) -> None:
    """Warns where one prompt with its answer alone may not fit. Most answers end early, so it is tried."""
    if fitting_tokens is None or fitting_tokens >= longest + max_new_tokens:
        return
    get_logger().warning(
        "the longest prompt with its answer may not fit into the GPU's memory",
        tokens=longest + max_new_tokens,
        cache=size((longest + max_new_tokens) * token_bytes(model), " "),
        tokens_that_fit=fitting_tokens,
        change="JOB_EVAL__PROMPTS_MAX_NEW_TOKENS, or the max_gen_toks of the task",
    )


def _gpu_bytes(base: Any) -> float:
    """The GPU memory that this process may use, whether or not it is free."""
    import torch

    allowed = torch.cuda.get_per_process_memory_fraction(base.device)
    return float(torch.cuda.get_device_properties(base.device).total_memory * allowed)


def _weight_bytes(model: Any) -> int:
    """Bytes of the model's weights and buffers on its device.

    Each memory counts once: of tied weights, and of layers that pass through the same slots. Numbers are counted by
    their shape, since training lays the adapter's into one memory, with padding.
    """
    bytes_by_address = dict[int, int]()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != model.device.type:
            continue
        if tensor.is_floating_point():
            bytes_by_address[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        else:
            memory = tensor.untyped_storage()
            bytes_by_address[memory.data_ptr()] = memory.nbytes()
    return sum(bytes_by_address.values())


def token_bytes(model: Any) -> int:
    """Bytes of a token's keys and values in all layers; 0 for a model whose cache may be of another kind."""
    from job.evaluation.key_value_cache import new_cache
    from job.model.lora import base_of
    from job.model.packed_attention import is_packed

    if not is_packed(model):
        return 0
    base = base_of(model)
    config = base.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return key_value_bytes(len(new_cache(model).layers), int(heads * _head_size(config)), base.dtype.itemsize)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
