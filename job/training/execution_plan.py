"""How training is carried out on this GPU: what is kept in its memory, and what is computed again when it is needed.

Kept or computed again, the bits are the same; only the token budget of a micro-batch changes them. So the budget is
chosen by the GPU's size alone, which a machine of the same kind shares, and the rest by what is free.
"""

from __future__ import annotations

from dataclasses import replace

from job.records import Execution
from job.training.memory_model import CONTEXT_BYTES, MARGIN, Setup, activation_bytes

GIB = 1 << 30
BUDGETS = ((40 * GIB, 16384), (11 * GIB, 4096), (0, 1024))
"""(least bytes of the GPU, token budget of a micro-batch)."""
_REST_BYTES = 4 * GIB
"""What the formulas leave out: tiles of the loss, recordings, the adapter's copies. 4.1 GiB in the run named below."""


def choose_budget(total_bytes: int) -> int:
    """The token budget of a micro-batch, by the size of the GPU or of the part that the job may use."""
    return next(budget for least, budget in BUDGETS if total_bytes >= least)


def kept_activation_bytes(setup: Setup, tokens: int) -> int:
    """Bytes that a row of so many tokens leaves in all layers, as `lean` computes them.

    In the compute dtype, for each layer and token: the stream before both halves, what norms gave, queries and
    attention's output, each as wide as the stream; gate, up and their product.

    Source: counted in `lean` and `kernels`. On an H100, Mistral-7B's shape, 3,722 tokens a row on average: 15.0 GiB by
    this, and a peak of 36.2 GiB in all, of which 4.0 are NF4 weights and 13.0 kept ones.
    """
    a = setup.architecture
    return setup.value_bytes * a.layers * (6 * a.hidden + 3 * a.intermediate) * tokens


def _kept_bytes(setup: Setup, tokens: int, *, lean: bool) -> int:
    """The same; where only the adapted layers are `lean`'s, transformers' own code keeps more between them."""
    return kept_activation_bytes(setup, tokens) if lean else activation_bytes(replace(setup, recompute=False), tokens)


def choose_execution(
    setup: Setup,
    *,
    free_bytes: int,
    row_tokens: int,
    keep_base: bool | None,
    keep_activations: bool | None,
    recorded: bool,
) -> Execution:
    """The fastest way that fits: keep the activations, keep the base's weights dequantized, or compute either again.

    Of the two the activations come first: on an H100 keeping them alone gave 13,960 target tokens/s, the base alone
    10,714, both 15,067, neither 9,861.

    Args:
        setup: What is trained.
        free_bytes: Of the GPU, with the quantized model in it.
        row_tokens: Tokens of the longest row that a step will have.
        keep_base: Whether to keep the dequantized base; None to choose.
        keep_activations: Whether to keep activations; None to choose.
        recorded: Whether the GPU's work is recorded and replayed, as it is where `lean` knows the decoder.
    """
    base = 2 * setup.architecture.linear_parameters if setup.quantization != "none" else 0
    again = activation_bytes(setup, row_tokens)
    tried = []
    for kept_base, kept in ((True, True), (False, True), (True, False), (False, False)):
        if keep_base not in {None, kept_base} or keep_activations not in {None, kept}:
            continue
        activations = _kept_bytes(setup, row_tokens, lean=recorded) if kept else again
        need = int((1 + MARGIN) * (activations + base * kept_base) + _REST_BYTES + CONTEXT_BYTES)
        tried.append((kept_base, kept, need))
        if need <= free_bytes:
            break
    kept_base, kept, need = tried[-1]
    why = f"needs {need / GIB:.1f} of {free_bytes / GIB:.1f} GiB that are free"
    forced = "" if keep_base is None and keep_activations is None else "; partly as set"
    kept_base &= setup.quantization != "none"
    return Execution(kept_base=kept_base, kept_activations=kept, recorded=recorded, reason=why + forced)
