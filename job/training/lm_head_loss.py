"""The loss of the language-model head where TRL's fused head is too slow or not usable: on a CPU, and in a CUDA graph.

TRL's head projects hidden states onto the vocabulary in tiles, so that the logits are never all in memory. On a GPU it
first selects the target positions; without Triton it computes the logits of every position, twice.

- On a CPU in fp32, `summed_head` replaces it in TRL's `compute_loss`: torch's `linear_cross_entropy` scores only the
  target positions, a few at a time, and computes the gradient in the same pass. On 512 positions of a vocabulary of
  32,000 it took 0.5 s of CPU time, TRL's head 2.0 s.
- In a CUDA graph, `padded_loss` scores every position with TRL's kernel: selecting positions would need their number
  on the host, which is a synchronization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from job.model.fused import fused_decoder
from job.model.packing_check import Losses
from job.records import Example
from job.training.packing import IGNORED, alone_inputs, packed_inputs

POSITIONS = 256
"""Number of positions whose logits are computed at a time. By default torch takes a few dozen, and reads all weights of
the head for each of these groups."""
VOCABULARY_CHUNK = 32768
"""Number of vocabulary entries for which the logits of a padded sequence are computed at a time."""
_linear_cross_entropy: Any = getattr(functional, "linear_cross_entropy", None)
"""torch 2.13 has it."""
HeadLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden states after the final norm (tokens, hidden), labels (tokens,) int64) -> the summed loss, () float32."""


def can_sum(base: Any) -> bool:
    """Whether `summed_head` can compute the loss of this causal language model, on its device.

    The head must be a plain linear layer whose logits are neither scaled nor capped, on a CPU in fp32: with autocast,
    hidden states and head could have different dtypes.
    """
    supported = _linear_cross_entropy is not None and fused_decoder.knows(base) and logits_of(base) == Logits()
    plain = type(base.get_output_embeddings()) is torch.nn.Linear
    return supported and plain and base.device.type == "cpu" and base.dtype is torch.float32


@dataclass(frozen=True)
class Logits:
    """A model's logits from the head's outputs z: cap * tanh(scale * z / cap), or scale * z without a cap."""

    scale: float = 1.0
    cap: float | None = None


def logits_of(base: Any) -> Logits:
    """Scale and cap of the logits of a causal language model.

    Raises:
        ValueError: The model is of no known family.
    """
    if (family := fused_decoder.family_of(base)) is None:
        raise ValueError(f"the output layer of {type(base).__name__} is not known")
    config = base.config.get_text_config(decoder=True)
    return Logits(
        scale=1 / config.logits_scaling if family.divides_logits else 1.0,
        cap=config.final_logit_softcapping if family.caps_logits else None,
    )


@dataclass(frozen=True, eq=False)
class SummedHead:
    """The fields of a fused head's output that TRL's `compute_loss` reads, with the log-probabilities already summed.

    `compute_loss` sums `log_probs`, so their sum can replace one number for each position. It also collects entropy and
    accuracy for TRL's own log, which this job does not write; they are zero here.
    """

    log_probs: torch.Tensor
    """(1,) float32: the sum over all target tokens."""
    label_mask: torch.Tensor
    """(1, tokens - 1) bool: which positions predict a target token."""
    entropy: torch.Tensor
    """(1,) float32: zero."""
    is_top1: torch.Tensor
    """(1,) bool: false."""


def summed_head(
    base: Any, *, labels: torch.Tensor, fused_lm_head: bool, smoothing: float = 0.0, **inputs: Any
) -> SummedHead:
    """Replaces `base(..., fused_lm_head=True)` if `can_sum(base)`.

    Args:
        base: The causal language model with its adapter.
        labels: (1, tokens) int64: token ids, or -100 where there is no target. The label of a token is predicted at the
            position before it. The first token of a segment is never a target, so none is predicted across segments.
        fused_lm_head: Must be true: with this argument TRL selects the fused head.
        smoothing: Label smoothing, see `smoothing_terms`.
        inputs: `input_ids`, `position_ids` and `layout` from `packing.packed_inputs`, and `use_cache=False` from TRL.

    Raises:
        ValueError: `fused_lm_head` is false.
    """
    if not fused_lm_head:
        raise ValueError("this output layer does not compute logits")
    hidden = fused_decoder.decoder_of(base)(**inputs).last_hidden_state[0]  # (tokens, hidden) float32
    following = labels[0, 1:]
    learned = (following != IGNORED).nonzero()[:, 0]
    head = base.get_output_embeddings()
    summed: torch.Tensor = _linear_cross_entropy(
        hidden[learned],
        head.weight,
        following[learned],
        linear_bias=head.bias,
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=POSITIONS),
    )
    if smoothing:
        summed = summed + smoothing * smoothing_terms(hidden[learned], head, following[learned]).sum()
    return SummedHead(
        log_probs=-summed[None],
        label_mask=labels[:, 1:] != IGNORED,
        entropy=summed.new_zeros(1),
        is_top1=torch.zeros(1, dtype=torch.bool),
    )


def smoothing_terms(hidden: torch.Tensor, head: Any, targets: torch.Tensor, logits: Logits = Logits()) -> torch.Tensor:
    """The term that label smoothing adds to the negative log-likelihood of each position, before the factor e.

    With smoothing e, the loss of a target y is (1 - e) * -log p(y) + e * mean over the vocabulary of -log p (Szegedy et
    al. 2016, section 7, as in transformers' LabelSmoother). Both parts contain the logarithm of the sum over all
    logits, so the loss equals -log p(y) + e * (logit of y - mean of all logits). The mean of all logits is one product
    with the mean row of the head's weights, so the logits themselves are not needed. Only if they are capped, they are
    computed, for a few positions at a time.

    Args:
        hidden: (positions, hidden) in the compute dtype.
        head: The output layer, a plain linear one: `weight` (vocabulary, hidden), `bias` (vocabulary,) or None.
        targets: (positions,) int64: tokens of the vocabulary.
        logits: Scale and cap of the logits.

    Returns:
        (positions,) float32.
    """
    if logits.cap is not None:
        compute = partial(checkpoint, _capped_terms, use_reentrant=False, preserve_rng_state=False)
        parts = zip(torch.split(hidden, POSITIONS), torch.split(targets, POSITIONS), strict=True)
        return torch.cat([compute(h, head, t, logits.scale, logits.cap) for h, t in parts])
    rows = head.weight[targets].float() - head.weight.mean(0, dtype=torch.float32)
    terms: torch.Tensor = (hidden.float() * rows).sum(-1)
    if head.bias is not None:
        terms = terms + head.bias[targets].float() - head.bias.mean(dtype=torch.float32)
    return terms if logits.scale == 1 else logits.scale * terms


def _capped_terms(hidden: torch.Tensor, head: Any, targets: torch.Tensor, scale: float, cap: float) -> torch.Tensor:
    """`smoothing_terms` of a few positions from all their logits, which are recomputed in the backward pass."""
    z = cap * torch.tanh(scale * functional.linear(hidden, head.weight, head.bias).float() / cap)
    return z.gather(-1, targets[:, None])[:, 0] - z.mean(-1)


def logits_loss(
    model: Any, *, labels: torch.Tensor, smoothing: float, fused_lm_head: bool = False, **inputs: Any
) -> torch.Tensor:
    """The summed loss of a packed sequence from all its logits: for label smoothing if the head is not a plain one.

    Args:
        model: The causal language model with its adapter.
        labels: (1, tokens) int64, as for `summed_head`.
        smoothing: Label smoothing.
        fused_lm_head: Ignored; TRL passes it.
        inputs: As in `summed_head`.

    Returns:
        () float32.
    """
    del fused_lm_head
    learned = labels[0, 1:] != IGNORED
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    return functional.cross_entropy(
        logits[learned].float(), labels[0, 1:][learned], reduction="sum", label_smoothing=smoothing
    )


@dataclass(frozen=True, eq=False)
class SelectedHead:
    """The result of `selected_head`, with the field name of TRL's fused head."""

    log_probs: torch.Tensor
    """(1, tokens - 1) float32: log-probability of the token after each position; 0 if that token is not a target."""


def selected_head(base: Any, *, labels: torch.Tensor, fused_lm_head: bool, **inputs: Any) -> SelectedHead:
    """Replaces `base(..., fused_lm_head=True)` if `can_sum(base)` and each token's log-probability is needed.

    Uses TRL's kernel on the target positions only; without Triton, TRL's own head computes all positions.

    Args:
        base: As in `summed_head`.
        labels: As in `summed_head`.
        fused_lm_head: As in `summed_head`.
        inputs: As in `summed_head`.
    """
    from trl.kernels import ChunkedLogProbFunction

    if not fused_lm_head:
        raise ValueError("this output layer does not compute logits")
    hidden = fused_decoder.decoder_of(base)(**inputs).last_hidden_state[0]  # (tokens, hidden) float32
    following = labels[0, 1:]
    learned = (following != IGNORED).nonzero()[:, 0]
    head = base.get_output_embeddings()
    log_probs = ChunkedLogProbFunction.apply(
        hidden[learned], head.weight, head.bias, following[learned], 1.0, VOCABULARY_CHUNK, None, 1.0, ()
    )[0]
    return SelectedHead(log_probs.new_zeros(following.shape).index_put((learned,), log_probs)[None])


def padded_loss(
    hidden: torch.Tensor, head: Any, labels: torch.Tensor, smoothing: float = 0.0, logits: Logits = Logits()
) -> torch.Tensor:
    """The summed negative log-likelihood of a padded sequence; all shapes depend on the inputs' shapes only.

    Args:
        hidden: (length, hidden) in the compute dtype: the last hidden states.
        head: The output layer: `weight` (vocabulary, hidden), `bias` (vocabulary,) or None, in the compute dtype.
        labels: (length,) int64: the token that each position predicts, or -100 where there is no target.
        smoothing: Label smoothing, see `smoothing_terms`.
        logits: Scale and cap of the logits.

    Returns:
        () float32.
    """
    from trl.kernels import ChunkedLogProbFunction

    # An index must be valid although its position has no target; its result is masked out below.
    targets = labels.clamp(min=0)
    log_probs: torch.Tensor = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, 1.0, VOCABULARY_CHUNK, logits.cap, logits.scale, ()
    )[0]
    if smoothing:
        log_probs = log_probs - smoothing * smoothing_terms(hidden, head, targets, logits)
    return -log_probs.masked_fill(labels == IGNORED, 0).sum()


def head_loss(base: Any, smoothing: float, logits: Logits) -> HeadLoss:
    """`padded_loss` with the head of this causal language model; `smoothing` and `logits` as there."""
    return lambda hidden, labels: padded_loss(hidden, base.get_output_embeddings(), labels, smoothing, logits)


def alone_log_probs(model: Any, *, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of one example's tokens, by the model's own forward; arguments as in `alone_loss`.

    Returns:
        (tokens,) float32: element i is that of token i + 1, or 0 if that is not a target; the last element is 0.
    """
    learned = (labels[0, 1:] != IGNORED).nonzero()[:, 0]
    logits = model(input_ids=input_ids).logits[0, :-1]
    log_probs = -functional.cross_entropy(logits[learned].float(), labels[0, 1:][learned], reduction="none")
    return log_probs.new_zeros(labels.shape[1]).index_put((learned,), log_probs)


def alone_loss(model: Any, *, input_ids: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """The summed negative log-likelihood of one example by the model's own forward, which works for every causal model.

    Args:
        model: The causal language model with its adapter. It is called without mask and positions.
        input_ids: (1, tokens) int64.
        labels: (1, tokens) int64: token ids, or -100 where there is no target.
        smoothing: Label smoothing.

    Returns:
        () float32.
    """
    learned = labels[0, 1:] != IGNORED
    logits = model(input_ids=input_ids).logits[0, :-1]
    return functional.cross_entropy(
        logits[learned].float(), labels[0, 1:][learned], reduction="sum", label_smoothing=smoothing
    )


def add_head(base: Any) -> None:
    """Gives a causal language model TRL's fused head, which computes log-probabilities without all logits."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(base)


def losses_of(model: Any) -> Losses:
    """Training's two ways to compute the loss, packed and one example at a time, for the check that they agree.

    Adds TRL's fused head to the model if training will use it.
    """
    if not (own := can_sum(base := model.get_base_model())):
        add_head(base)

    def packed(examples: Sequence[Example]) -> torch.Tensor:
        inputs = packed_inputs(examples, model.device)
        with autocast():
            head = partial(summed_head, base) if own else model
            loss: torch.Tensor = -head(**inputs, fused_lm_head=True, use_cache=False).log_probs.sum()
        return loss

    def alone(example: Example) -> torch.Tensor:
        with autocast():
            return alone_loss(model, **alone_inputs(example, model.device))

    half = base.dtype in {torch.float16, torch.bfloat16}
    autocast = partial(torch.autocast, model.device.type, base.dtype if half else None, enabled=half)
    return Losses(packed, alone)
