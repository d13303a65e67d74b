"""The gradient of a micro-batch with a long row, computed layer by layer to need less GPU memory.

A row of more than `LONG_ROW` tokens does not go through the model and autograd as a whole:

- The forward pass keeps only the input of each layer, and attention's output if there is memory for it, on the GPU or
  in host memory (`activation_store`). The bits are the same in either place.
- The final norm and the loss are computed in tiles over the sequence, each tile forward and backward before the next,
  so the fp32 gradient of the last hidden states exists for one tile at a time.
- Then, from the last layer to the first, each layer is recomputed from its input and backpropagated at once, the
  feed-forward half in tiles (`model.fused.tiled_layer`). Attention is not recomputed if its output was kept.

The sequence is not padded and no CUDA graph is recorded: launching kernels one by one takes no noticeable time for a
row of this length, and empty segments would slow attention down (`model.fused.long_attention`).

A row may be divided over several processes (sequence parallelism). Each process then does this for a part of the
tokens, and they exchange queries, keys, values and outputs around attention (`model.fused.sequence_parallel`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from job.data.examples import lengths_of
from job.model.fused.fused_decoder import decoder_of
from job.model.fused.long_attention import CPU, FLASH, Output, RowAttention, has_kernel
from job.model.fused.sequence_parallel import SequenceParallelAttention, SequenceParallelGroup, parts
from job.model.fused.tiled_layer import backward_layer, forward_layer, is_known
from job.model.lora import trainable
from job.model.packed_layout import build_layout
from job.model.placed_weights import before_backward
from job.records import Example, ExecutionPlan
from job.training.activation_store import ActivationStore, HostBuffers, release
from job.training.lm_head_loss import HeadLoss
from job.training.memory_model import LONG_ROW, TILE_TOKENS
from job.training.packing import PaddedSequence, unpadded_sequence


def has_long_row(examples: Sequence[Example]) -> bool:
    """Whether a micro-batch contains a row of more than `LONG_ROW` tokens."""
    return max(lengths_of(examples)) > LONG_ROW


def why_not_here(model: Any) -> str | None:
    """Why this model's long rows cannot be computed layer by layer; None if they can."""
    base = model.get_base_model()
    layers = decoder_of(base).layers
    if not all(map(is_known, layers)):
        return f"the decoder layers of {type(base).__name__} are not known"
    caps = getattr(layers[0].self_attn, "attn_logit_softcapping", None) is not None
    if caps or not has_kernel(model.device, layers[0].self_attn.head_dim):
        return "there is no attention kernel for this model and device"
    if model.peft_config["default"].lora_dropout:
        return "dropout would repeat its masks in every tile (JOB_LORA__DROPOUT)"
    inside = {id(p) for layer in layers for p in layer.parameters()}
    if any(id(p) not in inside for p in trainable(model).values()):
        return "weights outside of the decoder's layers are trained"
    return None


@dataclass
class LongRows:
    """Computes micro-batches with a long row.

    Attributes:
        model: A PEFT model over a fused base, for which `why_not_here` has no reason.
        loss: Computes the summed loss of one tile of tokens.
        check: Called before each layer in `gradient`, since a row may take minutes; may raise to abort the row.
        progress: Called before each layer in `summed_loss`; must not raise.
        host: Buffers in pinned host memory, kept from step to step.
    """

    model: Any
    loss: HeadLoss
    check: Callable[[], None] = lambda: None
    progress: Callable[[], None] = lambda: None
    host: HostBuffers = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Freeing memory while it is pinned would make later copies fail, so it is unpinned when this object is deleted.
        weakref.finalize(self, release, self.host, self.model.device).atexit = False

    def gradient(
        self,
        examples: Sequence[Example],
        weight: torch.Tensor,
        plan: ExecutionPlan,
        sp_group: SequenceParallelGroup | None = None,
    ) -> torch.Tensor:
        """Adds the gradient of `weight` times the examples' summed loss to the adapter's gradient.

        Args:
            examples: The micro-batch.
            weight: () float32: factor of the loss.
            plan: Whether activations are offloaded, attention's output is kept, and which kernel computes it.
            sp_group: The processes that compute the row together; None if this process computes it alone.

        Returns:
            The weighted loss, () float32, detached. With `sp_group`, loss and gradient are those of this process's
            tokens, to be summed over the processes.

        Raises:
            OtherOutOfMemory: Memory ran out in another process of `sp_group`.
        """
        device = self.model.device
        sequence = unpadded_sequence(examples, device)
        with ActivationStore(device, self.host if plan.offloaded else None) as store:
            layerwise = _LayerwisePass(
                self.model, self.loss, sequence, store, plan, check=self.check, sp_group=sp_group
            )
            return layerwise.backward(layerwise.forward(), weight)

    def summed_loss(
        self, examples: Sequence[Example], plan: ExecutionPlan, sp_group: SequenceParallelGroup | None = None
    ) -> torch.Tensor:
        """The examples' summed loss, () float32, without a gradient; arguments and errors as for `gradient`.

        With `sp_group` it is the loss of this process's tokens, to be summed over the processes.
        """
        sequence = unpadded_sequence(examples, self.model.device)
        layerwise = _LayerwisePass(self.model, self.loss, sequence, None, plan, check=self.progress, sp_group=sp_group)
        return layerwise.summed_loss(layerwise.forward())

    def release(self) -> None:
        """Frees the buffers in host memory."""
        release(self.host, self.model.device)


class _LayerwisePass:
    """The forward and the backward pass of one micro-batch; with `sp_group`, of this process's part of its tokens."""

    def __init__(
        self,
        model: Any,
        loss: HeadLoss,
        sequence: PaddedSequence,
        store: ActivationStore | None,
        plan: ExecutionPlan,
        *,
        check: Callable[[], None] = lambda: None,
        sp_group: SequenceParallelGroup | None = None,
    ) -> None:
        self._model, self._decoder = model, decoder_of(model.get_base_model())
        self._layers = list(self._decoder.layers)
        self._loss, self._store, self._check, self._sp_group = loss, store, check, sp_group
        self._sequence = sequence if sp_group is None else _own_part(sequence, sp_group)
        self._keep_attention, self._tile = plan.kept_attention, plan.tile_tokens or TILE_TOKENS
        self._kernel = plan.attention or (FLASH if model.device.type == "cuda" else CPU)
        self._layout = build_layout(sequence.segments, model.device)
        self._row_tokens = sequence.tokens.shape[1]
        self._arguments: list[Mapping[str, Any]] = []
        """For each layer, the arguments besides the hidden states with which the decoder calls it."""

    def forward(self) -> torch.Tensor:
        """The output of the last layer, (1, tokens, hidden); transformers' code of the decoder calls the layers."""
        ids, _, positions = self._sequence.tokens.unbind()
        last: list[torch.Tensor] = []  # the output of the last layer so far; a list, so that `one` can replace it

        def one(layer: Any, x: torch.Tensor, **arguments: Any) -> torch.Tensor:
            self._check()
            self._arguments.append(arguments)
            attention = self._attention()
            y = forward_layer(layer, x, arguments, attend=attention, tile=self._tile)
            if self._store is not None:
                self._store.put((x, *attention.output) if self._keep_attention and attention.output else (x,))
                self._store.settle(waiting=1)
            last[:] = [y]
            return y

        ahead = nullcontext() if self._store is None else before_backward(self._model)
        with torch.no_grad(), ahead, _in_place_of_forward(self._layers, one):
            self._decoder(input_ids=ids[None], position_ids=positions[None], layout=self._layout, use_cache=False)
        if self._store is not None:
            self._store.settle()
        return last[0]

    def summed_loss(self, last: torch.Tensor) -> torch.Tensor:
        """The summed loss from the output of the last layer, () float32, without a gradient."""
        with torch.no_grad():
            return torch.stack([self._loss_of(last[:, tile], tile) for tile in self._tiles(last)]).sum()

    def backward(self, last: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Adds the gradient of the weighted loss to the adapter's gradient; returns that loss, () float32.

        `last` is the output of the last layer, (1, tokens, hidden). It is overwritten with its own gradient.
        """
        assert self._store is not None  # noqa: S101 - for the type
        loss = torch.zeros((), device=last.device)
        for tile in self._tiles(last):
            part = last[:, tile].detach().requires_grad_()
            with torch.enable_grad():
                tile_loss = self._loss_of(part, tile) * weight
            tile_loss.backward()  # type: ignore[no-untyped-call]
            assert part.grad is not None  # noqa: S101 - for the type
            last[:, tile] = part.grad  # in place of this tile's hidden states, which are not needed any more
            loss += tile_loss.detach()
        gradient: torch.Tensor | None = last
        del last

        def one(layer: Any, x: torch.Tensor, *, gradient: torch.Tensor, known: Output | None, first: bool) -> Any:
            arguments = self._arguments.pop()
            attention = self._attention(known)
            return backward_layer(
                layer, x, gradient, arguments, attend=attention, tile=self._tile, needs_input=not first
            )

        with torch.no_grad(), _in_place_of_forward(self._layers, one):
            for index in reversed(range(len(self._layers))):
                self._check()
                x, *rest = self._store.take()
                known = (rest[0], rest[1]) if rest else None
                # Through the module's `__call__`, like the decoder's forward pass, so that hooks run in both passes.
                gradient = self._layers[index](x, gradient=gradient, known=known, first=index == 0)
                del x, rest, known
        return loss

    def _attention(self, known: Output | None = None) -> RowAttention | SequenceParallelAttention:
        """Attention of one layer over all tokens of the row; `known` is its output if the forward pass kept it."""
        alone = RowAttention(self._layout, self._kernel, known)
        return alone if self._sp_group is None else SequenceParallelAttention(alone, self._sp_group, self._row_tokens)

    def _loss_of(self, hidden: torch.Tensor, tile: slice) -> torch.Tensor:
        return self._loss(self._decoder.norm(hidden)[0], self._sequence.tokens[1, tile])

    def _tiles(self, x: torch.Tensor) -> list[slice]:
        return [slice(start, start + self._tile) for start in range(0, x.shape[1], self._tile)]


def _own_part(sequence: PaddedSequence, sp_group: SequenceParallelGroup) -> PaddedSequence:
    """The sequence with this process's tokens only: `tokens` is (3, own tokens); `ends` and `segments` are unchanged.

    Labels are already shifted, so the last token of a part has its label although the next token is in another process.
    """
    own = parts(sequence.tokens.shape[1], sp_group.size)[sp_group.rank]
    return replace(sequence, tokens=sequence.tokens[:, own])


@contextmanager
def _in_place_of_forward(layers: Sequence[Any], call: Callable[..., Any]) -> Iterator[None]:
    """Context manager in which calling a layer computes `call(layer, ...)`, without gradient checkpointing."""
    before = [(vars(layer).get("forward"), layer.gradient_checkpointing) for layer in layers]
    for layer in layers:
        layer.forward = _bound(call, layer)
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, (forward, recomputed) in zip(layers, before, strict=True):
            layer.gradient_checkpointing = recomputed
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _bound(call: Callable[..., Any], layer: Any) -> Callable[..., Any]:
    return lambda *inputs, **named: call(layer, *inputs, **named)
