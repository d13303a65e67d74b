"""Tests on the loaded model whether it computes packed sequences correctly, before evaluation and training.

There is no list of model families. A few real sequences are computed packed (one of them with a prefix that two
continuations share), and each separately by the model's own attention. If logits and the adapter's gradient agree
within the rounding error of the dtype, packing is used. If they do not (a convolution or recurrence carries state into
the next sequence, position biases, chunked attention), sequences are computed one at a time, which is correct for every
causal model and only slower. A model that is wrong even then is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from job import log
from job.common.formatting import first_line
from job.common.out_of_memory import out_of_memory
from job.errors import DataError, JobError, Problem, SettingsError
from job.model.load_base import PLAIN
from job.model.lora import trainable
from job.model.model_record import held
from job.model.packed_attention import CHECKED, NAME, Unpackable, use
from job.model.packed_layout import Segment, build_layout
from job.records import Example, Packing

SHORT = 8
"""Examples of fewer tokens are taken where there are no others."""
TOKENS = 48
"""Of each sequence at most: enough for every layer to do all it does, and a fraction of a second on a GPU."""
FIRST = 2
"""Tokens behind the end of a sequence that are compared each: state that runs on shows there first."""
SAFE_ROPE = {"default", "linear", "llama3", "proportional", "yarn"}
"""Rotary embeddings that do not depend on the length of the longest sequence in the batch."""


_PASSING = (JobError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Not translated: errors that already have their message, and a lack of memory, which is not the model's fault."""


@dataclass(frozen=True)
class Agreement:
    """Tolerances between two correct computations, by the precision of the computation.

    In fp32 correct results differ by 10^-6 and wrong ones by 10^-3 and more. In half precision the rounding of each
    layer (2^-11 and 2^-8) adds up over layers, and where a mixture's router rounds to another expert a token is off
    by more; int8 also rounds what goes into each layer. Mistral, correct to 10^-6 in fp32, differed by 0.089 in bf16
    (Mistral-7B's shape, random weights, an H200). So in half precision the comparison with each sequence alone is
    coarse, and the one for leaks, whose operations and shapes are the same on both sides, is the sharp one.

    Attributes:
        leak: Relative error of a token's logits when only the sequence next to it changes.
        logits: Relative error of a token's logits, packed against alone.
        gradient: Relative error of the adapter's gradient, packed against alone; see `_distance`.
        tokens: Share of the tokens whose error must be within `leak` and `logits`; the `FIRST` tokens behind another
            sequence must all be within `leak`.
    """

    leak: float
    logits: float
    gradient: float
    tokens: float


NEGLIGIBLE = 1e-2
"""Share of the whole gradient's size below which the error of one parameter's gradient is compared with this share, not
with its own size. Rounding in fp32 is some 1e-7 of the whole, `EXACT` allows 3e-5 of this share."""
EXACT = Agreement(1e-4, 1e-4, 3e-5, 1.0)
HALF = {torch.float16: Agreement(0.02, 0.08, 0.25, 0.9), torch.bfloat16: Agreement(0.08, 0.25, 0.5, 0.9)}


def _agreement(base: Any) -> Agreement:
    return HALF[torch.bfloat16] if held(base).quantization == "int8" else HALF.get(base.dtype, EXACT)


@dataclass(frozen=True)
class Losses:
    """The summed loss of examples, computed as in training, packed and one example at a time."""

    packed: Callable[[Sequence[Example]], torch.Tensor]
    alone: Callable[[Example], torch.Tensor]


def choose_packing(
    model: Any, examples: Sequence[Example], *, max_length: int, losses: Losses | None = None
) -> Packing:
    """Tests whether the model computes packed sequences correctly, and sets the attention that does.

    Args:
        model: A PEFT model over a base of `load_base`, its adapter fresh or trained.
        examples: Real ones; a few of the first are taken, and of these the first `TOKENS` tokens.
        max_length: No sequence that will be computed is longer.
        losses: The gradient is compared too, where they are given.

    Raises:
        SettingsError: The model is not causal, or its own code fails on plain sequences.
        DataError: Its logits are not finite.
    """
    base = model.get_base_model()
    training = model.training
    model.eval()
    try:
        packing = _test_packing(model, _selected_examples(examples), max_length, losses)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
    use(base, NAME if packing.packed else PLAIN)
    if not packing.packed:
        log.get_logger().warning("examples are computed one at a time, which is slower", why=packing.reason)
    return packing


def _selected_examples(examples: Sequence[Example]) -> list[Example]:
    """Three examples, with different first tokens if there are such, cut to a few tokens."""
    few = sorted(examples[:64], key=lambda example: len(example.input_ids) < SHORT)[:3]
    few += [few[-1]] * (3 - len(few))
    return [Example(e.input_ids[: TOKENS - 7 * i], e.targets[: TOKENS - 7 * i]) for i, e in enumerate(few)]


def _test_packing(model: Any, examples: Sequence[Example], max_length: int, losses: Losses | None) -> Packing:
    base = model.get_base_model()
    use(base, PLAIN)
    sequences = [list(example.input_ids) for example in examples]
    with _own_code(base):
        separate = _reference(model, sequences)
        gradient = None if losses is None else _gradient(model, lambda: [losses.alone(e) for e in examples])
    if not use(base, CHECKED):
        return Packing(packed=False, reason="its attention cannot be replaced")
    if why := _depends_on_length(base.config, max_length):
        return Packing(packed=False, reason=why)
    try:
        _packed_logits(model, [Segment(0, len(sequences[0]))], sequences[0], range(len(sequences[0])))
        use(base, NAME)
        to = _agreement(base)
        leak, logits = _compare(model, sequences, separate, to)
        errors = {"logits with another sequence alongside": (leak, to.leak), "logits": (logits, to.logits)}
        if losses is not None and leak <= to.leak and logits <= to.logits:
            apart = _distance(_gradient(model, lambda: [losses.packed(examples)]), gradient, to)
            errors["the adapter's gradient"] = (apart, to.gradient)
    except _PASSING:
        raise
    except Exception as failed:  # of a stranger's code, which was not written for this
        if out_of_memory(failed):  # most of torch's allocators raise a RuntimeError
            raise
        message = str(failed) if isinstance(failed, Unpackable) else f"{type(failed).__name__}: {failed}"
        return Packing(packed=False, reason=(message.splitlines() or ["it fails"])[0][:300])
    message = ", ".join(f"{name} {error:.0e}" for name, (error, _) in errors.items())
    if wrong := [name for name, (error, most) in errors.items() if not error <= most]:  # NaN is wrong too
        return Packing(packed=False, reason=f"packed and alone, results differ in {' and '.join(wrong)}: {message}")
    return Packing(packed=True, reason=f"packed and alone, results are the same: {message}")


@contextmanager
def _own_code(base: Any) -> Iterator[None]:
    """Turns any exception that the model's code raises on plain sequences into an error about the model."""
    try:
        yield
    except _PASSING:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        first = first_line(error, 300)
        what = f"the code of {type(base).__name__} fails on a plain sequence of text: {type(error).__name__}: {first}"
        raise SettingsError([Problem("JOB_MODEL__ID", what)]) from error


def _reference(model: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """(tokens, vocabulary) logits of each sequence alone, and of the second one's two continuations.

    Raises:
        DataError: They are not finite.
        SettingsError: They depend on later tokens.
    """
    name = type(model.get_base_model()).__name__
    first, prefix, first_continuation, second_continuation = _parts(sequences)
    logits = [_logits(model, ids) for ids in (first, prefix + first_continuation, prefix + second_continuation)]
    if not all(bool(part.isfinite().all()) for part in logits):
        dtype = str(model.get_base_model().dtype).removeprefix("torch.")
        what = f"the base's logits are not finite in {dtype}: its weights are broken, or too large for that type"
        raise DataError([Problem("JOB_MODEL__ID", what)])
    if _attends_to_later_tokens(model, first, logits[0], [*prefix, *first_continuation, *second_continuation]):
        what = f"{name} is not a causal language model: its logits for a token depend on later tokens"
        raise SettingsError([Problem("JOB_MODEL__ID", what)])
    return logits


def _attends_to_later_tokens(model: Any, ids: Sequence[int], logits: torch.Tensor, other_tokens: Sequence[int]) -> bool:
    """Whether the logits of the first half of a sequence depend on the tokens of the second.

    Without them the shapes are others, and so is the rounding, which large weights that cancel may multiply. So where
    the half alone differs, the second half is filled with other tokens: then only the tokens differ.

    Args:
        model: The base with its adapter.
        ids: The sequence.
        logits: (tokens, vocabulary) fp32, those of the sequence.
        other_tokens: Tokens to put into the second half.
    """
    half, to = max(1, len(ids) // 2), _agreement(model.get_base_model())
    if _worst([_token_error(_logits(model, ids[:half]), logits[:half], to)]) <= to.logits:
        return False
    tail = list(islice(cycle(other_tokens), len(ids) - half))
    if tail == list(ids[half:]):
        return True
    changed = _logits(model, [*ids[:half], *tail])[:half]
    return _worst([_token_error(changed, logits[:half], to)]) > to.logits


def _parts(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """A sequence, a prefix, and two continuations of the prefix."""
    first, second, third = map(list, sequences)
    half = max(1, len(second) // 2)
    one, other = second[half:] or first[-1:], third[len(third) // 2 :]
    return first, second[:half], one, other


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """(tokens, vocabulary) fp32, by the model's own means: no mask, no positions, nothing kept."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0]
    return logits.float()


def _packed_logits(
    model: Any, segments: Sequence[Segment], ids: Sequence[int], positions: Sequence[int]
) -> torch.Tensor:
    """(tokens, vocabulary) fp32 of one packed sequence, called as the evaluation calls it."""
    device = model.device
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=torch.tensor([list(ids)], device=device),
            position_ids=torch.tensor([list(positions)], device=device),
            layout=build_layout(segments, device),
            logits_to_keep=torch.arange(len(ids), device=device),
            use_cache=False,
        ).logits[0]
    return logits.float()


def _compare(
    model: Any, sequences: Sequence[Sequence[int]], separate: Sequence[torch.Tensor], to: Agreement
) -> tuple[float, float]:
    """The largest error of logits with another sequence in front against this one, and packed against alone.

    The first is by the same operations on numbers of the same shape, so that even in half precision hardly anything
    but a leak from one sequence into the next makes a difference.
    """
    first, prefix, first_continuation, second_continuation = _parts(sequences)
    a, b, c, d = len(first), len(prefix), len(first_continuation), len(second_continuation)
    segments = [Segment(0, a), Segment(a, a + b), Segment(a + b, a + b + c, a, a + b)]
    segments.append(Segment(a + b + c, a + b + c + d, a, a + b))
    positions = [*range(a), *range(b), *range(b, b + c), *range(b, b + d)]
    behind = [*prefix, *first_continuation, *second_continuation]
    packed = _packed_logits(model, segments, [*first, *behind], positions)
    changed = _packed_logits(model, segments, [*first[::-1], *behind], positions)
    shared, end = a + b, a + b + c
    pairs = [
        (packed[:a], separate[0]),
        (packed[a:end], separate[1]),
        (torch.cat([packed[a:shared], packed[end:]]), separate[2]),
    ]
    # The first tokens behind have to agree, for every share: a convolution of a single layer reaches no further.
    behind_it = [_token_error(packed[i : i + 1], changed[i : i + 1], to) for i in range(a, a + FIRST)]
    leak = _worst([_token_error(packed[a:], changed[a:], to), *behind_it])
    return leak, _worst([_token_error(computed, expected, to) for computed, expected in pairs])


def _worst(errors: Sequence[float]) -> float:
    """The largest; infinity where one is NaN, which compares as neither larger nor smaller."""
    return max(float("inf") if math.isnan(error) else error for error in errors)


def _token_error(computed: torch.Tensor, expected: torch.Tensor, to: Agreement) -> float:
    """Relative error of a token's logits: the largest within the share of tokens that must meet the tolerance.

    It is relative to the norm of the expected logits without their mean: a constant added to all logits of a token does
    not change the softmax.
    """
    if computed.shape != expected.shape:
        return float("inf")
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-6)
    errors = (computed - expected).norm(dim=-1) / spread
    return float(errors.quantile(to.tokens))


def _gradient(model: Any, losses: Callable[[], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The adapter's gradient of the sum of the losses, one fp32 tensor for each of its parameters."""
    model.zero_grad(set_to_none=True)
    model.train()
    for module in model.modules():  # the adapter's own dropout, which would draw new numbers for each
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    for loss in losses():
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = [
        (torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()).float() for p in trainable(model).values()
    ]
    model.zero_grad(set_to_none=True)
    model.eval()
    return gradients


def _distance(computed: Sequence[torch.Tensor], expected: Sequence[torch.Tensor] | None, to: Agreement) -> float:
    """Relative error of the gradient as a whole; in full precision of each parameter's too, the largest of them.

    Of each, since Adam takes steps of one size however small a gradient is. What is nearly 0 (that of queries
    where a sequence has two tokens) is rounding alone: see `NEGLIGIBLE`. In half precision that is much.
    """
    if expected is None:
        return 0.0
    errors = [float((f - e).norm()) for f, e in zip(computed, expected, strict=True)]
    sizes = [float(e.norm()) for e in expected]
    whole = max(math.hypot(*sizes), 1e-12)
    own = [error / max(size, NEGLIGIBLE * whole) for error, size in zip(errors, sizes, strict=True)]
    return _worst([math.hypot(*errors) / whole, *(own if to is EXACT else ())])


def _depends_on_length(config: Any, max_length: int) -> str | None:
    """Why a sequence depends on how long the packed one is, which the check's few tokens do not show; None if not."""
    text = config.get_text_config(decoder=True)
    rope_parameters = getattr(text, "rope_parameters", None) or {}
    for part in [rope_parameters, *(value for value in rope_parameters.values() if isinstance(value, dict))]:
        kind = part.get("rope_type", "default")
        owners = (part.get("original_max_position_embeddings"), getattr(text, "original_max_position_embeddings", None))
        whole = next((length for length in owners if length), getattr(text, "max_position_embeddings", 0))
        if kind not in SAFE_ROPE and (kind not in {"dynamic", "longrope"} or max_length > whole):
            return f"its rotary positions ({kind}) depend on the longest sequence alongside"
    if getattr(text, "attn_temperature_tuning", False):  # Llama 4, from `floor_scale` tokens on
        return "the temperature of its attention depends on the place in the packed sequence"
    return None
