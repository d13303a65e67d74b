"""The loss of a padded sequence and its gradient, launched as a CUDA graph if the execution plan says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from job.model.fused.fused_decoder import decoder_of
from job.model.packed_layout import Layout, Segment
from job.records import Example
from job.training.cuda_graphs import CudaGraphs
from job.training.flat_parameters import FlatParameters
from job.training.lm_head_loss import HeadLoss
from job.training.packing import PaddedSequence, blank_sequence, padded_sequence
from job.training.padded_shapes import Shapes, length_increment


class PaddedGradient:
    """Called with a padded sequence, adds the gradient of its loss.

    Args:
        model: A PEFT model over a fused base.
        parameters: The adapter.
        loss: The summed loss from hidden states after the final norm.
        shapes: Returns the shapes to which sequences are padded at present.
        longest: Upper bound of a segment's tokens in sequences that are not padded to these shapes.
        record_all: Whether all shapes are recorded on the first call. Set with several processes: otherwise all would
            wait each time that one of them records a shape.
    """

    def __init__(
        self,
        model: Any,
        parameters: FlatParameters,
        loss: HeadLoss,
        *,
        shapes: Callable[[], Shapes],
        longest: int,
        record_all: bool,
    ) -> None:
        self._model, self._parameters, self._loss = model, parameters, loss
        self._shapes, self._longest, self._record_all = shapes, longest, record_all
        self._graphs: CudaGraphs | None = None

    def __call__(self, sequence: PaddedSequence, weight: torch.Tensor, *, recorded: bool) -> torch.Tensor:
        """Adds the gradient of the weighted loss, which is `weight`, () float32, times the sequence's summed loss.

        Returns:
            The weighted loss, () float32. With `recorded`, a CUDA graph computes it, and the next call overwrites it.
        """
        if not recorded:
            return self._add(sequence.tokens, sequence.ends, weight, segments=sequence.segments)
        return self._recorded(weight.device)(sequence.tokens, sequence.ends, weight)

    def summed_loss(self, sequence: PaddedSequence) -> torch.Tensor:
        """The summed loss of a sequence of any shape, () float32, without a gradient."""
        return self._sum(sequence.tokens, sequence.ends, sequence.segments)

    @property
    def recordable(self) -> bool:
        """False once recording a CUDA graph has failed."""
        return self._graphs is None or self._graphs.possible

    def release(self) -> None:
        """Frees the CUDA graphs with their memory; they are recorded anew when needed."""
        self._graphs = None

    def _add(
        self, tokens: torch.Tensor, ends: torch.Tensor, weight: torch.Tensor, segments: tuple[Segment, ...] = ()
    ) -> torch.Tensor:
        """Adds the gradient of a padded sequence; returns its weighted loss. `CudaGraphs` records this as its `work`.

        Args:
            tokens: (3, length) int64, `PaddedSequence.tokens`.
            ends: (segments + 1,) int32, `PaddedSequence.ends`.
            weight: () float32: factor of the summed loss.
            segments: Used if attention is computed segment by segment; empty in a CUDA graph, which must not depend on
                their number.
        """
        loss = self._sum(tokens, ends, segments) * weight
        loss.backward()  # type: ignore[no-untyped-call] # adds to the flat gradient in place
        return loss.detach()

    def _sum(self, tokens: torch.Tensor, ends: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor:
        """The summed loss of a padded sequence, () float32; arguments as for `_add`."""
        ids, labels, positions = tokens.unbind()
        # An earlier attempt may have had a larger token budget, and therefore longer padding.
        longest = max(
            self._longest,
            self._shapes().longest_padding,
            length_increment(ids.shape[0]),
            *(segment.end - segment.start for segment in segments),
        )
        layout = Layout(segments, ends, ends, longest, longest)
        hidden = decoder_of(self._model.get_base_model())(
            input_ids=ids[None], position_ids=positions[None], layout=layout, use_cache=False
        ).last_hidden_state[0]
        return self._loss(hidden, labels)

    def _recorded(self, device: torch.device) -> CudaGraphs:
        """The CUDA graphs. On the first call the graph of the longest shape is recorded.

        All graphs share one memory pool, so the memory of the largest graph serves the smaller ones, too.
        """
        if self._graphs is None:
            first = padded_sequence([Example((0,), (False,))], device)
            weight = torch.tensor(0.0, device=device)
            leaves = self._parameters.parameters
            self._graphs = CudaGraphs(self._add, (first.tokens, first.ends, weight), leaves)
            shapes = self._shapes().shapes[::-1]
            for shape in shapes if self._record_all else shapes[:1]:
                blank = blank_sequence(shape, device)
                self._graphs.prepare(blank.tokens, blank.ends, weight)
        return self._graphs
