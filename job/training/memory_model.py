"""Formulas for the GPU memory that training and evaluation need, in bytes. Pure functions of numbers.

They count the tensors that the job's code has in memory at its peak (`model/`, `training/`), as torch allocates them.
The driver's context and fragmentation come on top (`usable_bytes`). A micro-batch is one packed sequence. Formulas for
time are in `planning.time_model`.
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
"""A row of more tokens is computed by `training.long_rows`. The default token budgets are not larger than this."""
TILE_TOKENS = 8192
"""Tokens of a tile of such a row (`fused.tiled_layer`): enough for products that use a whole GPU."""
TOKEN_BYTES = 24
"""Bytes of a token's id, label and position, int64 each."""
ATTENTION_COPIES = 132
"""Number of fp32 gradients of one head's queries that the backward pass of flash attention holds for a long row: about
one for each streaming multiprocessor of the GPU, here of an H100."""

MORE_QUERIES = 2
"""Further tensors of the queries' width in that backward pass. Not found in the code; added because measured peaks on
an H200 grow faster with the length than the formula without them. With them the forecast is 3 % too low for 343,000
tokens, and 0 to 12 % too high for 78,500 and 64,000 (`2026-11-29-h200-long-rows.jsonl`,
`2026-11-29-h200-long-rows-cudnn.jsonl`)."""

PLACEMENTS = ("gpu", "sharded", "host")
"""Where the quantized weights of the decoder's layers may be, the fastest place first; see `model.placed_weights`."""
LAYERS_AT_ONCE = {"sharded": 3, "host": 2}
"""Number of complete layers on the GPU if the placement is not `gpu`: the layer that computes, the next one, and, if
sharded, one that only another process needs, in whose all-gather this process takes part."""

EXPERT_COPIES = 4
"""Number of tensors that exist at once with one row for each (token, chosen expert) (`fused/experts.py`). Backward: two
gradients in the order of the experts, and one in the order of the tokens. Forward: the experts' output, the same in the
order of the tokens, and its fp32 product with the router's weights. Counting allows 2 to 4; 4 was chosen by two runs on
an H200: with it and `EXPERT_WIDTHS` the forecast of all activations is 2 % (Mixtral) and 11 % (Qwen3-30B-A3B) higher
than measured. No other model was tested."""
EXPERT_WIDTHS = 4
"""Number of such tensors of the experts' intermediate width: the gated activation, its gradient, and the gradients of
gate and up."""
ORIGINAL_SHARE = 0.9
"""Share of the memory that is free besides the quantized base which scoring the unquantized base may fill. The rest is
for the formula's error and for memory that the allocator cannot use."""
MARGIN = 0.1
"""Relative error of the forecast, including fragmentation: from the measured points of `test_memory_model.py`."""


@dataclass(frozen=True)
class Setup:
    """The model, its adapter, and how they are trained: the input of all formulas.

    Attributes:
        architecture: The base's.
        rank: LoRA's rank.
        targets: Names of the linear layers that have an adapter.
        quantization: `nf4` or `none`.
        double_quantization: Whether the quantization constants are quantized as well.
        value_bytes: Bytes of a number in the compute dtype.
        optimizer: A key of `OPTIMIZERS`.
        recompute: Whether activations are recomputed in the backward pass (gradient checkpointing).
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
    """Number of the adapter's parameters, if it does not follow from rank and targets; else None."""
    expert_adapter: int = 0
    """Number of the adapter's parameters that belong to the experts of a mixture."""
    dora: bool = False
    """Whether the adapter is of the kind DoRA."""
    bytes_beside: int = 0
    """`AdapterOptions.bytes_beside`."""
    merged_rows: int = 0
    """Rows of embedding and output layer that PEFT copies in every pass, to insert the rows of new tokens."""
    placement: str = "gpu"
    """One of `PLACEMENTS`."""
    processes: int = 1
    """Number of processes that the weights are divided over, if `placement` is `sharded`."""
    plain_experts: bool = False
    """Whether a mixture's experts are not quantized, although its linear layers are (`experts.left_plain`)."""

    @property
    def quantized(self) -> int:
        """Number of weights to which `quantization` applies."""
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
        """Number of the adapter's parameters that one token uses: without those of experts it is not routed to."""
        a = self.architecture
        return self.adapter - self.expert_adapter * (a.experts - a.chosen) // max(1, a.experts)


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU at the peak of training, by purpose."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


def weight_bytes(setup: Setup) -> int:
    """Bytes of the frozen base on the GPU.

    NF4 takes half a byte per weight, and one constant per 64 weights: 4 bytes, or with double quantization 1 byte, plus
    4 bytes per 256 constants. Embedding, output layer and norms are in the compute dtype. If the layers' weights are
    sharded or in host memory, a few complete layers are on the GPU at any time.

    Source: Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3; bitsandbytes' block sizes.
    """
    a = setup.architecture
    plain = (a.parameters - setup.quantized) * setup.value_bytes
    if setup.quantization == "none":
        return a.parameters * setup.value_bytes
    return plain + _held_bytes(setup)


def packed_bytes(setup: Setup) -> int:
    """Bytes of all layers' NF4 weights with their constants, in any placement."""
    blocks = -(-setup.quantized // NF4_BLOCK)
    constants = blocks + 4 * -(-blocks // DOUBLE_BLOCK) if setup.double_quantization else 4 * blocks
    return setup.quantized // 2 + constants


MAIN_MEMORY_SHARE = 0.8
"""Share of the available main memory that the base's weights may fill; the rest is for the job itself. Assumed."""


def copies_in_main_memory(setup: Setup, processes: int) -> str:
    """How much main memory the placement `host` takes, in words: each of the machine's processes has a copy."""
    copy = size(packed_bytes(setup), " ")
    if processes == 1:
        return f"the base's 4-bit weights take {copy} of main memory"
    whole = size(processes * packed_bytes(setup), " ")
    return f"the base's 4-bit weights take {whole} of main memory, {copy} for each of {processes} processes"


def _held_bytes(setup: Setup) -> int:
    """The part of `packed_bytes` that is on this process's GPU."""
    whole = packed_bytes(setup)
    if setup.placement == "gpu":
        return whole
    complete_layers = LAYERS_AT_ONCE[setup.placement] * whole // setup.architecture.layers
    own_shard = -(-whole // setup.processes) if setup.placement == "sharded" else 0
    return min(whole, own_shard + complete_layers)


def kept_bytes(setup: Setup) -> int:
    """Bytes that one layer keeps per token for its backward pass, with PEFT's layers.

    In fp32: the inputs of all norms, including those of queries and keys. In the compute dtype: the input of the query,
    key and value projections, and that of the feed-forward layer; queries, keys and values (keys and values repeated to
    the queries' width), attention's output and a copy of it for the output projection; gate, its activation, up, and
    their product. The adapter's A reads the same inputs as the frozen weights, so they count once; the input of its B
    has width `rank`.

    Source: counted in the code, like Korthikanti et al. 2022 (arXiv:2205.05198), section 4; a test counts what autograd
    keeps.
    """
    a = setup.architecture
    # DoRA scales the outputs of base and adapter, and needs both for the gradient of its magnitudes.
    outputs = 2 * sum(a.linear[name][1] for name in setup.targets if name in a.linear) if setup.dora else 0
    # Of quantized experts only gate and up are kept (`fused/experts.py`).
    intermediates = 2 if a.experts and setup.quantization != "none" and not setup.plain_experts else 4
    wide = outputs + 2 * a.hidden + 5 * a.queries + intermediates * a.intermediate + setup.rank * len(setup.targets)
    normed = a.norms * a.hidden + (a.queries + a.keys if a.query_norm else 0)
    return FP32 * normed + setup.value_bytes * wide


def activation_bytes(setup: Setup, tokens: int) -> int:
    """Bytes of activations at the peak of a micro-batch of this many tokens, with PEFT's layers.

    Without recomputation, the activations of all layers are in memory when the backward pass begins; with it, the input
    of each layer and all activations of the current one. The larger of two is added: the working space of one layer's
    backward pass (two gradients of the intermediate width, two of the residual stream, and the largest matrix
    dequantized), or that of the chunked loss (the last hidden states, their fp32 gradient, and one tile of logits).
    """
    a, value_bytes = setup.architecture, setup.value_bytes
    layer = kept_bytes(setup) * tokens
    dequantized = a.largest_matrix * value_bytes if setup.quantization != "none" else 0
    widths = EXPERT_WIDTHS if a.experts else 2
    backward = value_bytes * (widths * a.intermediate + 2 * a.hidden + EXPERT_COPIES * a.copies) * tokens + dequantized
    tile = min(tokens, HEAD_ROWS) * min(a.vocabulary, HEAD_COLUMNS) * value_bytes
    loss = tokens * a.hidden * (value_bytes + FP32) + tile
    if setup.recompute:
        return a.layers * a.hidden * value_bytes * tokens + max(layer + backward, loss)
    return a.layers * layer + max(backward, loss)


def least_activation_bytes(setup: Setup, tokens: int) -> int:
    """A lower bound of the bytes of activations of a row that the model computes as a whole, by any layers.

    The input of each layer, and what the fused layers keep of one layer: the residual stream before attention and
    before the feed-forward layer, the outputs of both norms, queries, attention's output, gate, up and their product.
    """
    a = setup.architecture
    return setup.value_bytes * tokens * (a.layers * a.hidden + 6 * a.hidden + 3 * a.intermediate)


def long_row_bytes(setup: Setup, tokens: int, *, offloaded: bool, kept_attention: bool, copies: int) -> int:
    """Bytes of activations on the GPU at the peak of a row that is computed layer by layer (`training.long_rows`).

    The input of each layer, and attention's output if it is kept, are stored on the GPU or in host memory until the
    backward pass; of those in host memory, two layers' are on the GPU at a time. In addition there is the layer that is
    recomputed. The peak of its backward pass is either in attention (the output of the first norm, queries, keys,
    values and attention's output, the gradients of all of these and of the residual stream, and the kernel's fp32
    gradients) or in the feed-forward half (one tile of it).

    Args:
        setup: The model, its adapter, and how they are trained.
        tokens: Tokens of the micro-batch.
        offloaded: Whether the stored tensors are in host memory.
        kept_attention: Whether attention's output is stored, too.
        copies: Number of fp32 gradients of one head's queries that the kernel holds (`fused.long_attention`).
    """
    a, value_bytes = setup.architecture, setup.value_bytes
    keys, output = a.kv_heads * a.head_size, a.queries * value_bytes + FP32 * a.heads
    waiting = a.hidden * value_bytes + kept_attention * output
    all_waiting = (2 if offloaded else a.layers) * waiting
    recomputed_output = 0 if kept_attention else output
    attention = value_bytes * (2 * a.hidden + (3 + MORE_QUERIES) * a.queries + 4 * keys) + recomputed_output
    attention += FP32 * copies * a.head_size
    feed_forward = value_bytes * (3 * a.hidden + a.queries + 2 * keys) + recomputed_output
    tile = value_bytes * (7 * a.intermediate + 6 * a.hidden + EXPERT_COPIES * a.copies) * min(tokens, TILE_TOKENS)
    positions = 3 * value_bytes * a.head_size + TOKEN_BYTES
    logits = min(tokens, HEAD_ROWS) * min(a.vocabulary, HEAD_COLUMNS) * value_bytes
    loss = logits + FP32 * a.hidden * min(tokens, TILE_TOKENS)
    return (all_waiting + positions) * tokens + max(attention * tokens, feed_forward * tokens + tile, loss)


def long_row_host_bytes(setup: Setup, tokens: int, *, kept_attention: bool) -> int:
    """Bytes of host memory for the tensors that such a row stores until the backward pass, if they are offloaded."""
    a, value_bytes = setup.architecture, setup.value_bytes
    return a.layers * tokens * (a.hidden * value_bytes + kept_attention * (a.queries * value_bytes + FP32 * a.heads))


def attention_copies(architecture: Architecture, capability: tuple[int, int]) -> int:
    """`copies` of `long_row_bytes` on a GPU of this compute capability, which this machine need not have."""
    return architecture.triton_copies if architecture.attends_by_triton(capability) else ATTENTION_COPIES


def training_memory(
    setup: Setup, tokens: int, *, tiles: bool = False, offload: bool | None = None, copies: int = ATTENTION_COPIES
) -> Memory:
    """Bytes at the peak of training with micro-batches of this many tokens.

    The adapter is in fp32, and autocast keeps a copy of it in the compute dtype; gradients are in fp32.

    Args:
        setup: The model, its adapter, and how they are trained.
        tokens: Tokens of the largest micro-batch.
        tiles: Whether a row of more than `LONG_ROW` tokens is computed layer by layer, in the way that needs the least
            memory.
        offload: `JOB_TRAIN__OFFLOAD_ACTIVATIONS`, for such a row; None to choose.
        copies: As in `long_row_bytes`.
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
        # PEFT's copies of the merged rows, and a gradient of the same size for each.
        activations=activations + 2 * setup.merged_rows * setup.architecture.hidden * setup.value_bytes,
    )


def evaluation_bytes(setup: Setup, tokens: int, reads: int) -> int:
    """Bytes at the peak of scoring a packed sequence of this many tokens, with logits at `reads` of them.

    No activation is kept from layer to layer. The feed-forward layer has four tensors of the intermediate width at
    once. There are three tensors of the size of the logits: in the compute dtype, in fp32, and their log-softmax. A
    weight that is dequantized for each use is copied once more, with the adapter's columns appended. In half precision
    the output layer has a copy in fp16 (`fused/precise_forward.py`). After training, gradients and optimizer states may
    still be in memory.
    """
    a, value_bytes = setup.architecture, setup.value_bytes
    logits = reads * a.vocabulary * (value_bytes + 2 * FP32)
    return _held_in_evaluation(setup) + max(_forward_bytes(setup, tokens), logits + value_bytes * a.hidden * tokens)


def generation_bytes(setup: Setup, prompt: int, tokens: int) -> int:
    """Bytes at the peak of answering one prompt.

    More prompts are answered at a time if they fit (`evaluation/generation_batches.py`). The cache has keys and values
    of all layers. Reading the prompt is a forward pass as in scoring; if the decoder is not fused, attention's complete
    scores are in memory three times: in the compute dtype, in fp32, and as probabilities. Each step of decoding repeats
    one layer's keys and values for all query heads.

    Args:
        setup: The model, its adapter, and how they are trained.
        prompt: Tokens of the prompt.
        tokens: Tokens of prompt and answer together.
    """
    a, value_bytes = setup.architecture, setup.value_bytes
    scores = 0 if a.fused else a.heads * prompt**2 * (2 * value_bytes + FP32)
    step = key_value_bytes(1, a.queries, value_bytes) * tokens + a.vocabulary * (value_bytes + 2 * FP32)
    return _held_in_evaluation(setup) + cache_bytes(setup, tokens) + max(_forward_bytes(setup, prompt) + scores, step)


def cache_bytes(setup: Setup, tokens: int) -> int:
    """Bytes of the keys and values of this many tokens in all layers, in the compute dtype."""
    return key_value_bytes(setup.architecture.layers, setup.architecture.keys, setup.value_bytes) * tokens


def _held_in_evaluation(setup: Setup) -> int:
    """Bytes of weights, adapter, gradients and optimizer states, and of the output layer's fp16 copy."""
    held, value_bytes = training_memory(setup, 0), setup.value_bytes
    head = 0 if value_bytes == FP32 else 2 * setup.architecture.vocabulary * setup.architecture.hidden
    return held.total - held.activations + head


def _forward_bytes(setup: Setup, tokens: int) -> int:
    """Bytes of one layer's activations in a forward pass without gradients."""
    a = setup.architecture
    # A dequantized weight, and its copy with the adapter's columns appended.
    copies = 2 * a.largest_matrix
    return setup.value_bytes * ((4 * a.intermediate + 4 * a.hidden + EXPERT_COPIES * a.copies) * tokens + copies)


def usable_bytes(memory_bytes: int) -> int:
    """The largest forecast that fits on a GPU with this memory, after CUDA's context and the forecast's margin."""
    return max(0, round((memory_bytes - CONTEXT_BYTES) / (1 + MARGIN)))


def largest_budget(needs: Callable[[int], int], limit: int, most: int) -> int:
    """The largest number of tokens, up to `most`, that fits within the limit; 0 if not even one token does.

    Args:
        needs: Returns the bytes for a number of tokens, and must not decrease with it.
        limit: Available bytes.
        most: The largest result, since no step has more tokens.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= limit else (low, middle - 1)
    return low
