"""The gradient of preference objectives, which are functions of summed log-probabilities of packed sequences.

The sequences of an example are next to each other in one packed sequence and do not attend to each other. None depends
on the rest of the micro-batch, so micro-batches and processes change the result by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from job.errors import TrainingFailed
from job.model.packed_attention import is_packed
from job.records import Example
from job.training.config import Preference
from job.training.lm_head_loss import add_head, alone_log_probs, can_sum, selected_head
from job.training.objectives import OBJECTIVES, Sums, Totals, metric_names
from job.training.packing import alone_inputs, packed_inputs

TokenLogProbs = Callable[[Sequence[Example]], list[torch.Tensor]]
"""Returns for each sequence the log-probabilities of its tokens, (tokens,) float32: element i is that of token i + 1,
or 0 if that is not a target; the last element is 0."""


def token_log_probs(model: Any, head: Any, sequences: Sequence[Example]) -> list[torch.Tensor]:
    """The log-probabilities of each sequence's tokens, as `TokenLogProbs` returns them.

    Args:
        model: The PEFT model; determines the device, and whether sequences are packed.
        head: Called to compute them: the model as Trainer wrapped it, or `selected_head` instead.
        sequences: Computed in one packed sequence, or one by one if the model is not packed.
    """
    if not is_packed(model):
        return [alone_log_probs(head, **alone_inputs(sequence, model.device)) for sequence in sequences]
    inputs = packed_inputs(sequences, model.device)
    log_probs = head(**inputs, fused_lm_head=True, use_cache=False).log_probs[0]  # (tokens - 1,)
    # The last token of a sequence predicts the first token of the next, which is never a target, so the head gives 0.
    whole = torch.cat([log_probs, log_probs.new_zeros(1)]).float()
    return list(torch.split(whole, [len(sequence.input_ids) for sequence in sequences]))


def log_prob_sums(log_probs: TokenLogProbs, sequences: Sequence[Example]) -> torch.Tensor:
    """The summed log-probability of each sequence's targets, (sequences,) float32."""
    # One sum for each sequence instead of `index_add`, whose order of additions on a GPU is not deterministic.
    return torch.stack([of_tokens.sum() for of_tokens in log_probs(sequences)])


def head_of(model: Any, wrapped: Any = None) -> Any:
    """The callable that computes log-probabilities without all logits: TRL's fused head, or `selected_head` on a CPU.

    Args:
        model: A PEFT model.
        wrapped: The model as Trainer wrapped it; None if it did not.
    """
    base = model.get_base_model()
    if can_sum(base) and is_packed(model):
        return partial(selected_head, base)
    return model if wrapped is None else wrapped


def reference_log_probs(model: Any, *, fused: bool) -> Callable[[Sequence[Example]], list[list[float]]]:
    """A function that returns, for each example, the summed log-probability of each of its sequences, in nats.

    Computed with the model's current weights, without gradient, in the precision of training.

    Args:
        model: A PEFT model.
        fused: Whether the job's fused layers compute, which need no autocast.

    Raises:
        TrainingFailed: From the returned function: a log-probability is not finite.
    """
    base = model.get_base_model()
    if is_packed(model) and not can_sum(base):
        add_head(base)
    half = base.dtype in {torch.float16, torch.bfloat16} and not fused

    def compute(examples: Sequence[Example]) -> list[list[float]]:
        model.eval()
        sequences = [one for example in examples for one in example.sequences]
        with torch.inference_mode(), torch.autocast(model.device.type, base.dtype if half else None, enabled=half):
            sums = log_prob_sums(partial(token_log_probs, model, head_of(model)), sequences)
        if not bool(sums.isfinite().all()):
            raise TrainingFailed(
                "the reference's log-probabilities are not finite: the base's numbers are too large for its dtype; set "
                "JOB_MODEL__DTYPE to bf16 or fp32"
            )
        remaining = iter(sums.tolist())
        return [[next(remaining) for _ in example.sequences] for example in examples]

    return compute


@dataclass(frozen=True)
class PreferenceGradient:
    """The gradient of an objective over micro-batches.

    Attributes:
        options: Method and its settings.
        log_probs: Log-probabilities by the model that is trained, with gradient history.
        backward: Backpropagates a loss.
    """

    options: Preference
    log_probs: TokenLogProbs
    backward: Callable[[torch.Tensor], None]

    def names(self, totals: Totals) -> tuple[str, ...]:
        """Names of the metrics, in the order in which they follow the loss in a micro-batch's tensor."""
        return metric_names(self.options.method, totals)

    @property
    def estimates_kl(self) -> bool:
        """Whether a step needs KTO's estimate of the divergence before its gradient."""
        return self.options.method == "kto"

    def kl(self, examples: Sequence[Example], totals: Totals) -> torch.Tensor:
        """A micro-batch's part of the step's estimate of the divergence, () float32, from its mismatched answers."""
        with torch.no_grad():
            sums = log_prob_sums(self.log_probs, [example.sequences[1] for example in examples])
        reference = torch.tensor([example.reference[1] for example in examples], device=sums.device)
        return (sums - reference).sum() / totals.examples

    def __call__(self, examples: Sequence[Example], totals: Totals, kl: torch.Tensor) -> torch.Tensor:
        """Adds a micro-batch's gradient; returns its part of loss and metrics, (1 + metrics,) float32, detached."""
        return self._computed(examples, totals, kl, self.backward)

    def measure(self, examples: Sequence[Example], totals: Totals, kl: torch.Tensor) -> torch.Tensor:
        """A micro-batch's part of loss and metrics, (1 + metrics,) float32, without a gradient."""
        with torch.no_grad():
            return self._computed(examples, totals, kl, lambda _: None)

    def _computed(
        self, examples: Sequence[Example], totals: Totals, kl: torch.Tensor, use: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        loss, metrics = OBJECTIVES[self.options.method](self._sums(examples, kl), totals, self.options)
        use(loss)
        return torch.stack([loss.detach(), *(metrics[name] for name in self.names(totals))])

    def _sums(self, examples: Sequence[Example], kl: torch.Tensor) -> Sums:
        columns = 1 if self.estimates_kl else 2
        sequences = [one for example in examples for one in example.sequences[:columns]]
        targets = [one.targets for one in sequences]
        device = kl.device
        # ORPO also learns the prompt: all tokens are scored, and those of the prompt are masked afterwards.
        scored = sequences if self.options.method != "orpo" else [_all_learned(one) for one in sequences]
        log_probs = self.log_probs(scored)
        if self.options.method == "orpo":
            learned = [torch.tensor([*of_tokens[1:], False], device=device) for of_tokens in targets]
            whole = torch.stack([one.sum() for one in log_probs[::2]])
            log_probs = [one.masked_fill(~mask, 0) for one, mask in zip(log_probs, learned, strict=True)]
        else:
            whole = torch.zeros(len(examples), device=device)
        references = [example.reference[:columns] or (0.0,) * columns for example in examples]
        labels = [example.desirable is not False for example in examples]
        return Sums(
            policy=torch.stack([one.sum() for one in log_probs]).view(-1, columns),
            reference=torch.tensor(references, device=device),
            lengths=torch.tensor([float(sum(one)) for one in targets], device=device).view(-1, columns),
            whole=whole,
            desirable=torch.tensor(labels, device=device),
            kl=kl,
        )


def _all_learned(sequence: Example) -> Example:
    return Example(sequence.input_ids, (False, *(True,) * (len(sequence.input_ids) - 1)))
