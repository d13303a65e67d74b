"""How long the work of a run takes, by formula: floating-point operations and seconds. Pure functions of numbers.

The formulas count what this job's code computes (`model/`, `training/`); the shares of a GPU's peak that it reaches
were measured. The memory that it needs is in `training.memory_model`.
"""

from __future__ import annotations

from job.training.memory_model import Setup, packed_bytes

UTILISATION = 0.18
"""Share of the data sheet's peak FLOP/s that PEFT's layers reach: 0.18 to 0.21 on an H200 (`2026-11-28-h200.json`)."""
FUSED_UTILISATION = 0.46
"""The share for the job's fused layers, once CUDA graphs are recorded: 0.46 on an H100 (`2026-11-28-h100.json`), 0.47
to 0.48 on an H200 at Alpaca's lengths and 0.48 on rows of 4,096 tokens (`2026-11-29-h200-bench-gpu.json`). Assumed on
other GPUs."""
RECORDING_SECONDS = 3.0
"""What recording adds to a run: 2.3 and 3.7 s in two runs of 18 steps on an H200, with two recordings each
(`2026-11-29-h200-recordings-and-scoring.jsonl`)."""
UNRECORDED_UTILISATION = 0.34
"""The share for fused layers without CUDA graphs: 0.33 at Mistral-7B's shape and Alpaca's lengths, in FP8
(`2026-11-29-h200-fp8.jsonl`), 0.35 at Llama-70B's, sharded over two H200s (`2026-11-29-h200-placement.jsonl`)."""
LONG_ROW_UTILISATION = {"triton": 0.5, "flash": 0.4}
"""The share for rows that are computed layer by layer, by the kernel of attention's backward pass. On an H200, with the
operations of recomputing attention counted though it was kept: 0.55 and 0.54 at 64,000 tokens; recomputed: 0.47 there,
0.46 at 343,000 and 0.52 at 78,500 offloaded, less the seconds in which main memory was pinned. Flash: 0.40 at 64,000
(`2026-11-29-h200-long-rows-cudnn.jsonl`). Assumed on other GPUs."""
FINE_EXPERTS, FINE_EXPERTS_UTILISATION = 4096, 0.25
"""Experts less wide than `FINE_EXPERTS` reach less: Qwen3-30B-A3B's shape 0.25 on an H200, 768 wide; Mixtral's, 14,336
wide, 0.51 (`2026-11-29-h200-mixtures.jsonl`). Where between the two it changes was not measured."""
FP8_SPEEDUP = 1.45
"""Factor on `FUSED_UTILISATION` where training computes in FP8: 1.450 on an H200 at Mistral-7B's shape and Alpaca's
lengths, once all is recorded (`2026-11-29-h200-fp8.jsonl`). Assumed elsewhere."""
SCORING_UTILISATION = 0.55
"""The share in an evaluation with fused layers, texts and tokens included: 0.56 on an H200, 1,087 questions a second of
ARC-Easy (`2026-11-29-h200-bench-gpu.json`); scoring alone 0.60 with the adapter and 0.63 without, 1,171 and 1,220
questions a second (`2026-11-29-h200-evaluation.jsonl`). Assumed on other GPUs."""
SCORING_SECONDS = 3.0
"""What an evaluation takes beside: whole stages of 2,376 questions took 6.3 to 6.6 s on an H100 and an H200, of which
scoring was about half (`2026-11-28-h100-job.jsonl`, `2026-11-28-h200-job.jsonl`)."""
LINK_BANDWIDTH = {"sharded": 20e9, "host": 10.6e9}
"""Bytes a second at which a GPU gets the layers that lie elsewhere. `host` by three steps of Llama-70B's shape on an
H200: all packed weights twice a step, in 20.0 s (`2026-11-29-h200-placement.jsonl`). `sharded` is assumed, PCIe 4.0
with 16 lanes; by NVLink, two H200s got them while they computed."""


def training_flops(setup: Setup, tokens: int, squares: int) -> int:
    """Floating-point operations of training on so many tokens in all.

    A weight costs two operations a token in the forward pass, and two more for the gradient of its input; frozen
    weights have no gradient of their own, the adapter's have (two more). Recomputation is one more forward pass. The
    output layer's tiles are computed again in any case. Causal attention of a sequence of n tokens takes 2 n^2 times
    the queries' width in the forward pass, and 2.5 times that in the backward pass.

    Source: Kaplan et al. 2020 (arXiv:2001.08361), section 2.1; Dao 2023, FlashAttention-2 (arXiv:2307.08691), section
    4.1.
    """
    a, recomputed = setup.architecture, 1 if setup.recompute else 0
    linear = (
        (4 + 2 * recomputed) * a.used_parameters + (6 + 2 * recomputed) * setup.used_adapter + 6 * a.head_parameters
    )
    attention = round((3.5 + recomputed) * 2 * a.queries * a.layers * squares)
    return linear * tokens + attention


def evaluation_flops(setup: Setup, tokens: int, reads: int) -> int:
    """Operations of scoring so many tokens, with logits at `reads` of them: one forward pass without attention."""
    a = setup.architecture
    return 2 * (a.used_parameters + setup.used_adapter) * tokens + 2 * a.head_parameters * reads


def seconds(
    flops: int,
    passes: int,
    setup: Setup,
    *,
    rate: float,
    bandwidth: float,
    used: float = UTILISATION,
    transfers: int | None = None,
) -> float:
    """Seconds on a GPU: the largest of the times for the operations, for reading the weights, and for fetching them.

    Args:
        flops: Operations in all.
        passes: How often all weights are read: for each micro-batch forward, backward, and once more for recomputation.
        setup: Of it, the weights' number and format.
        rate: Operations a second, by the data sheet.
        bandwidth: Bytes of memory a second, by the data sheet.
        used: The share of `rate` that is reached, such as `UTILISATION`.
        transfers: How often all weights come to the GPU, where they do not lie there; None for `passes`.

    Source: Williams et al. 2009, Roofline. Quantized weights are read, written out dequantized, and read again.
    """
    a, size = setup.architecture, setup.value_bytes
    traffic = a.linear_parameters * (size if setup.quantization == "none" else 0.5 + 2 * size)
    missing = packed_bytes(setup) * {"gpu": 0.0, "sharded": 1 - 1 / setup.processes, "host": 1.0}[setup.placement]
    link = LINK_BANDWIDTH.get(setup.placement, float("inf"))
    fetching = (passes if transfers is None else transfers) * missing / link
    return max(flops / (rate * used), passes * traffic / bandwidth, fetching)
