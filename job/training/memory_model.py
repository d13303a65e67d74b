"""What training and evaluation need of memory, by formula: bytes on the GPU. Pure functions of numbers.

The formulas count what this job's code holds (`model/`, `training/`). Memory is what torch allocates; the driver's
context and fragmentation are additional, see `usable_bytes`. A micro-batch is one packed sequence. How long the work
takes is in `planning.time_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from job.common.formatting import size
from job.common.gpu_context import CONTEXT_BYTES
from job.common.optimizers import OPTIMIZERS
from job.model.architecture import Architecture, key_value_bytes

NF4_BLOCK, DOUBLE_BLOCK = 64, 256
"""Weights per quantization constant; with double quantization, constants per second-level constant."""
FP32 = 4
"""Bytes of a number in fp32."""
HEAD_ROWS, HEAD_COLUMNS = 4096, 32768
"""Size of the tiles (tokens, vocabulary entries) in which the logits are computed; they are never kept."""

LONG_ROW = 16384
"""A row of more tokens is computed by `training.long_rows`. No micro-batch is longer without one, unless it is set."""
TILE_TOKENS = 8192
"""Tokens of a tile of such a row (`fused.tiled_layer`): enough for products that use a whole GPU."""
TOKEN_BYTES = 24
"""Of a token's id, label and position."""
ATTENTION_COPIES = 132
"""Heads' fp32 gradients in the backward pass of flash attention of a long row: about one for each of a GPU's
processors, an H100's here."""

MORE_QUERIES = 2
"""Further tensors of the queries' width in that backward pass. Not found in the code, but in peaks on an H200 that grow
faster than what was: with them 343,000 tokens are forecast 3 % too low, 78,500 and 64,000 0 to 12 % too high
(`2026-11-29-h200-long-rows.jsonl`, `2026-11-29-h200-long-rows-cudnn.jsonl`)."""

PLACEMENTS = ("gpu", "sharded", "host")
"""Where the quantized weights of the decoder's layers may lie, the fastest first; see `model.placed_weights`."""
LAYERS_AT_ONCE = {"sharded": 3, "host": 2}
"""How many layers are on the GPU as a whole where not all of them are: the one that computes, the one that comes next,
and, gathered only to take part, one that another process needs."""

EXPERT_COPIES = 4
"""Tensors of the width of a token's copies for its experts (`fused/experts.py`) that there are at once: two
gradients of them and one in the order of the tokens; or what the experts make of them, that in the order of the tokens,
and in fp32 its product with the router's weights. Counted, and of 2 to 4 chosen by two runs on an H200: with it and
`EXPERT_WIDTHS` all activations are 2 % (Mixtral) and 11 % (Qwen3-30B-A3B) more than these took. No other tested it."""
EXPERT_WIDTHS = 4
"""The same of their intermediate width: the gate's output, its gradient, and those of gate and up."""
ORIGINAL_SHARE = 0.9
"""Of the memory that is free beside the quantized base, what scoring the unquantized one may fill: the formula's error,
and what the allocator cannot use."""
MARGIN = 0.1
"""Relative error of the prediction, including fragmentation: from the measured points of `test_memory_model.py`."""


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    rank, targets: Of the adapter: the width of its two matrices, and the layers that have one.
    quantization: `nf4` or `none`.
    value_bytes: Bytes of a number in the compute dtype.
    optimizer: A key of `OPTIMIZERS`.
    recompute: Whether activations are computed again in the backward pass.
    """

    architecture: Architecture
    rank: int
    targets: tuple[str, ...]
    quantization: str
    double_quantization: bool
    value_bytes: int
    optimizer: str
    recompute: bool
    counted: int | None = None
    """The adapter's parameters, where rank and targets alone do not say it."""
    expert_adapter: int = 0
    """How many of them are of a mixture's experts."""
    dora: bool = False
    bytes_beside: int = 0
    """`AdapterOptions.bytes_beside`."""
    merged_rows: int = 0
    """Rows of embedding and output layer that PEFT copies in every pass, to put those of new tokens in place."""
    placement: str = "gpu"
    """One of `PLACEMENTS`."""
    processes: int = 1
    """That hold a share each where `placement` is `sharded`."""
    plain_experts: bool = False
    """Whether a mixture's experts are not quantized, although its linear layers are (`experts.left_plain`)."""

    @property
    def quantized(self) -> int:
        """Number of the weights that `quantization` is about."""
        a = self.architecture
        return a.linear_parameters - self.plain_experts * a.layers * a.expert_parameters

    @property
    def adapter(self) -> int:
        """Number of the adapter's parameters."""
        if self.counted is not None:
            return self.counted
        return self.architecture.adapter_parameters(self.rank, self.targets) + self.expert_adapter

    @property
    def used_adapter(self) -> int:
        """Those of them that a token is multiplied by: not the adapters of experts to which it does not go."""
        a = self.architecture
        return self.adapter - self.expert_adapter * (a.experts - a.chosen) // max(1, a.experts)


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU at the peak of training, by what they are for."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


def weight_bytes(setup: Setup) -> int:
    """Bytes of the frozen base on the GPU.

    NF4 holds half a byte a weight, and a constant for each 64 weights: of four bytes, or with double quantization of
    one, and another four for each 256 of these. Embedding, output layer and norms are held in the compute dtype.
    Where the layers' weights are sharded or in host memory, a few whole layers are on the GPU at any time.

    Source: Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3; bitsandbytes' block sizes.
    """
    a = setup.architecture
    plain = (a.parameters - setup.quantized) * setup.value_bytes
    if setup.quantization == "none":
        return a.parameters * setup.value_bytes
    return plain + _held_bytes(setup)


def packed_bytes(setup: Setup) -> int:
    """Bytes of all layers' NF4 weights with their constants, wherever they lie."""
    blocks = -(-setup.quantized // NF4_BLOCK)
    constants = blocks + 4 * -(-blocks // DOUBLE_BLOCK) if setup.double_quantization else 4 * blocks
    return setup.quantized // 2 + constants


MAIN_MEMORY_SHARE = 0.8
"""Of the main memory that is available, what the base's weights may fill; the rest is for the job itself. Assumed."""


def copies_in_main_memory(setup: Setup, processes: int) -> str:
    """What `host` takes of a machine's main memory, in words: each of its processes has a copy of the weights."""
    copy = size(packed_bytes(setup), " ")
    if processes == 1:
        return f"the base's 4-bit weights take {copy} of main memory"
    whole = size(processes * packed_bytes(setup), " ")
    return f"the base's 4-bit weights take {whole} of main memory, {copy} for each of {processes} processes"


def _held_bytes(setup: Setup) -> int:
    """Those of them that are on the GPU."""
    whole = packed_bytes(setup)
    if setup.placement == "gpu":
        return whole
    passing = LAYERS_AT_ONCE[setup.placement] * whole // setup.architecture.layers
    own = -(-whole // setup.processes) if setup.placement == "sharded" else 0
    return min(whole, own + passing)


def kept_bytes(setup: Setup) -> int:
    """Bytes that one layer keeps per token for its backward pass, with PEFT's layers.

    In fp32: the inputs of the norms, also of those of queries and keys. In the compute dtype: the input of the query,
    key and value layers and that of the feed-forward layer; queries, keys and values (these repeated to the queries'
    width), the attention's output and its copy for the output layer; the gate, its activation, the other branch and
    their product. Inputs of the frozen weights need not be kept, those of the adapter beside them are the same tensors;
    its own are `rank` wide.

    Source: counted in the code, in the manner of Korthikanti et al. 2022 (arXiv:2205.05198), section 4; a test counts
    what autograd keeps.
    """
    a = setup.architecture
    # DoRA scales the outputs of base and adapter, and needs both for the gradient of its magnitudes.
    outputs = 2 * sum(a.linear[name][1] for name in setup.targets if name in a.linear) if setup.dora else 0
    # Of quantized experts only gate and up are kept (`fused/experts.py`).
    halves = 2 if a.experts and setup.quantization != "none" and not setup.plain_experts else 4
    wide = outputs + 2 * a.hidden + 5 * a.queries + halves * a.intermediate + setup.rank * len(setup.targets)
    normed = a.norms * a.hidden + (a.queries + a.keys if a.query_norm else 0)
    return FP32 * normed + setup.value_bytes * wide


def activation_bytes(setup: Setup, tokens: int) -> int:
    """Bytes of activations at the peak of a micro-batch of so many tokens, where PEFT's own layers compute.

    Without recomputation, the activations of all layers are in memory when the backward pass begins; with it, the input
    of each layer and all activations of the current one. Added to them are either the working space of that layer's
    backward pass (gradients twice as wide as the feed-forward layer and twice as the stream, and the largest matrix
    dequantized), or that of the chunked loss: the last hidden states, their gradient in fp32, and one tile of logits.
    """
    a, size = setup.architecture, setup.value_bytes
    layer = kept_bytes(setup) * tokens
    dequantized = a.largest_matrix * size if setup.quantization != "none" else 0
    widths = EXPERT_WIDTHS if a.experts else 2
    backward = size * (widths * a.intermediate + 2 * a.hidden + EXPERT_COPIES * a.copies) * tokens + dequantized
    tile = min(tokens, HEAD_ROWS) * min(a.vocabulary, HEAD_COLUMNS) * size
    loss = tokens * a.hidden * (size + FP32) + tile
    if setup.recompute:
        return a.layers * a.hidden * size * tokens + max(layer + backward, loss)
    return a.layers * layer + max(backward, loss)


def least_activation_bytes(setup: Setup, tokens: int) -> int:
    """A lower bound of the bytes of activations of a row that goes through the model as a whole, by any layers.

    The input of each layer, and what the fused layers keep of one layer: the stream before both halves, the outputs of
    both norms, queries and attention's output; gate, up and their product.
    """
    a = setup.architecture
    return setup.value_bytes * tokens * (a.layers * a.hidden + 6 * a.hidden + 3 * a.intermediate)


def long_row_bytes(setup: Setup, tokens: int, *, offloaded: bool, kept_attention: bool, copies: int) -> int:
    """Bytes of activations on the GPU at the peak of a row that is computed layer by layer (`training.long_rows`).

    The input of each layer, and attention's output where it is kept, wait on the GPU or in host memory; of those in
    host memory two layers' are on the GPU. Beside them is the layer that is computed again. Its backward pass is at its
    peak in attention, with the output of the first norm, queries, keys, values and the output, the gradients of all of
    these and of the stream, and the kernel's fp32 sums; or in the feed-forward half, with one tile of it.

    Args:
        setup: What is trained.
        tokens: Of the micro-batch.
        offloaded: Whether what waits lies in host memory.
        kept_attention: Whether attention's output is kept.
        copies: Heads' fp32 gradients of the queries that the kernel holds (`fused.long_attention`).
    """
    a, size = setup.architecture, setup.value_bytes
    keys, output = a.kv_heads * a.head_size, a.queries * size + FP32 * a.heads
    waiting = a.hidden * size + kept_attention * output
    all_waiting = (2 if offloaded else a.layers) * waiting
    again = 0 if kept_attention else output
    attention = size * (2 * a.hidden + (3 + MORE_QUERIES) * a.queries + 4 * keys) + again
    attention += FP32 * copies * a.head_size
    feed_forward = size * (3 * a.hidden + a.queries + 2 * keys) + again
    tile = size * (7 * a.intermediate + 6 * a.hidden + EXPERT_COPIES * a.copies) * min(tokens, TILE_TOKENS)
    positions = 3 * size * a.head_size + TOKEN_BYTES
    loss = min(tokens, HEAD_ROWS) * min(a.vocabulary, HEAD_COLUMNS) * size + FP32 * a.hidden * min(tokens, TILE_TOKENS)
    return (all_waiting + positions) * tokens + max(attention * tokens, feed_forward * tokens + tile, loss)


def long_row_host_bytes(setup: Setup, tokens: int, *, kept_attention: bool) -> int:
    """Bytes of host memory for what waits for the backward pass of such a row, where it is offloaded."""
    a, size = setup.architecture, setup.value_bytes
    return a.layers * tokens * (a.hidden * size + kept_attention * (a.queries * size + FP32 * a.heads))


def attention_copies(architecture: Architecture, capability: tuple[int, int]) -> int:
    """`copies` of `long_row_bytes`, by the compute capability of a GPU that need not be at hand."""
    return architecture.triton_copies if architecture.attends_by_triton(capability) else ATTENTION_COPIES


def training_memory(
    setup: Setup, tokens: int, *, tiles: bool = False, offload: bool | None = None, copies: int = ATTENTION_COPIES
) -> Memory:
    """Bytes at the peak of training with micro-batches of so many tokens.

    The adapter is in fp32, and autocast keeps a copy of it in the compute dtype; gradients are in fp32.

    Args:
        setup: What is trained.
        tokens: Of the largest micro-batch.
        tiles: Whether a row of more than `LONG_ROW` tokens is computed layer by layer, in the way that takes the least.
        offload: Of such a row, `JOB_TRAIN__OFFLOAD_ACTIVATIONS`; None to choose.
        copies: Of such a row, as in `long_row_bytes`.
    """
    activations = activation_bytes(setup, tokens)
    if tiles and tokens > LONG_ROW:
        offloaded = offload is not False
        activations = long_row_bytes(setup, tokens, offloaded=offloaded, kept_attention=False, copies=copies)
    copy = setup.value_bytes if setup.value_bytes < FP32 else 0
    return Memory(
        weights=weight_bytes(setup),
        adapter=setup.adapter * (FP32 + copy + setup.bytes_beside),
        gradients=FP32 * setup.adapter,
        optimizer=OPTIMIZERS[setup.optimizer].state_bytes(setup.adapter),
        # The copies, and as large a gradient of each.
        activations=activations + 2 * setup.merged_rows * setup.architecture.hidden * setup.value_bytes,
    )


def evaluation_bytes(setup: Setup, tokens: int, reads: int) -> int:
    """Bytes at the peak of scoring a packed sequence of so many tokens, at `reads` of which logits are formed.

    Nothing is kept from layer to layer. The feed-forward layer has four tensors of its width at once; the logits are
    there in the compute dtype, in fp32, and once more as their logarithms. A weight that is
    dequantized for each use is there once more, with the adapter's columns beside it. In half precision the output
    layer has a copy in fp16 (`fused/precise_forward.py`). After training, gradients and moments may still be there.
    """
    a, size = setup.architecture, setup.value_bytes
    logits = reads * a.vocabulary * (size + 2 * FP32)
    return _held_in_evaluation(setup) + max(_forward_bytes(setup, tokens), logits + size * a.hidden * tokens)


def generation_bytes(setup: Setup, prompt: int, tokens: int) -> int:
    """Bytes at the peak of answering one prompt of so many tokens, which has `tokens` with its answer.

    More prompts are answered at a time where they fit (`evaluation/generation_batches.py`). The cache has keys and
    values of all layers. Reading the prompt is a forward pass as in scoring; where the decoder is not fused,
    attention's scores are there as a whole, in the compute dtype, as probabilities, and in fp32. Each step of decoding
    repeats one layer's keys and values for all heads of the queries.
    """
    a, size = setup.architecture, setup.value_bytes
    scores = 0 if a.fused else a.heads * prompt**2 * (2 * size + FP32)
    step = key_value_bytes(1, a.queries, size) * tokens + a.vocabulary * (size + 2 * FP32)
    return _held_in_evaluation(setup) + cache_bytes(setup, tokens) + max(_forward_bytes(setup, prompt) + scores, step)


def cache_bytes(setup: Setup, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in all layers, in the compute dtype."""
    return key_value_bytes(setup.architecture.layers, setup.architecture.keys, setup.value_bytes) * tokens


def _held_in_evaluation(setup: Setup) -> int:
    """What is there in every forward pass of an evaluation."""
    held, size = training_memory(setup, 0), setup.value_bytes
    head = 0 if size == FP32 else 2 * setup.architecture.vocabulary * setup.architecture.hidden
    return held.total - held.activations + head


def _forward_bytes(setup: Setup, tokens: int) -> int:
    """Activations of a layer in a forward pass without gradients."""
    a = setup.architecture
    # A weight that is dequantized for its use is copied beside the adapter's factor.
    copies = 2 * a.largest_matrix
    return setup.value_bytes * ((4 * a.intermediate + 4 * a.hidden + EXPERT_COPIES * a.copies) * tokens + copies)


def usable_bytes(memory_bytes: int) -> int:
    """Bytes of a GPU that a prediction may use: its memory without the context and the prediction's margin."""
    return max(0, round((memory_bytes - CONTEXT_BYTES) / (1 + MARGIN)))


def largest_budget(needs: Callable[[int], int], limit: int, most: int) -> int:
    """The largest number of tokens, up to `most`, that fits within the limit; 0 if not even one token does.

    Args:
        needs: Bytes for a number of tokens; must not decrease with it.
        limit: Available bytes.
        most: Upper bound: no step has more tokens.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= limit else (low, middle - 1)
    return low
