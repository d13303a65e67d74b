"""The adapter as one flat tensor: its parameters are views of it, and their gradients are views of another one.

An operation on all parameters (an optimizer step, clipping, the sum over processes) is then one kernel instead of
hundreds. Nothing changes for PEFT: its parameters keep their names, shapes and values, and are saved as usual.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

SUMMED_BESIDE = 64
"""Maximum count of numbers (loss and metrics) that a step sums over the processes together with the gradient."""


class FlatParameters:
    """The parameters end to end in one tensor, each from a multiple of `block` on, with zeros between them.

    Args:
        parameters: Of any shapes, of one dtype (fp32) on one device. Their values are kept; they become views of
            the flat tensor.
        block: `OptimizerSpec.block`: an 8-bit optimizer quantizes blocks of this many neighbouring numbers, each with
            one constant, and no block may span two parameters.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], block: int) -> None:
        self._parameters, self._block = list(parameters), block
        first = self._parameters[0]
        size = sum(self._padded(p) for p in self._parameters)
        self.whole = torch.nn.Parameter(torch.zeros(size, dtype=first.dtype, device=first.device))
        """(size,): the single parameter that the optimizer updates."""
        self._summed = torch.zeros(size + SUMMED_BESIDE, dtype=first.dtype, device=first.device)
        self.gradient = self._summed[:size]
        """(size,): its gradient."""
        self._gradients = self.views(self.gradient)
        self._trained: torch.Tensor | None = None
        self._before_step: torch.Tensor | None = None
        for parameter, view in zip(self._parameters, self.views(self.whole.detach()), strict=True):
            view.copy_(parameter.detach())
            # Aliases: an optimizer step on `whole` is one on each parameter, and loading an adapter fills `whole`.
            parameter.data = view

    def gradient_and(self, numbers: torch.Tensor) -> torch.Tensor:
        """The gradient followed by these numbers, in one tensor, so that one all-reduce sums both in place.

        Args:
            numbers: (n,), of at most `SUMMED_BESIDE`; they are copied.

        Returns:
            (size + n,): a view, of which the first `size` elements are the gradient itself.
        """
        size = self.gradient.shape[0]
        both = self._summed[: size + numbers.shape[0]]
        both[size:].copy_(numbers)
        return both

    @property
    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """The parameters whose values and gradients are parts of the flat tensors."""
        return self._parameters

    def freeze(self, index: int, trained: torch.Tensor) -> None:
        """Marks where a parameter is trained: `trained` is 1 there and 0 elsewhere, in the parameter's shape."""
        if self._trained is None:
            self._trained = torch.ones_like(self.gradient)
        self.views(self._trained)[index].copy_(trained)

    def before_step(self) -> None:
        """Zeroes the gradient, in place, where a parameter is not trained, and copies the values before the step."""
        if self._trained is not None:
            self.gradient.mul_(self._trained)
            self._before_step = self.whole.detach().clone()

    def after_step(self) -> None:
        """Restores, in place, the values that are not trained: weight decay and 8-bit optimizers change them.

        With an 8-bit optimizer, a moment of zero is not exactly zero after it was quantized in a block with others.
        """
        if self._trained is not None and self._before_step is not None:
            self.whole.data.copy_(torch.where(self._trained.bool(), self.whole, self._before_step))

    def clear(self) -> None:
        """Zeroes the gradient in place, and makes the parameters' `.grad` views of it.

        Autograd then accumulates into this memory, whose address a CUDA graph relies on. Called for every step,
        because trainers set `.grad` to None.
        """
        self.gradient.zero_()
        self.whole.grad = self.gradient
        for parameter, view in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = view

    def _padded(self, parameter: torch.nn.Parameter) -> int:
        """Elements that a parameter takes in the flat tensor, including the zeros after it."""
        return -(-parameter.numel() // self._block) * self._block

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's part of a tensor (size,), in the parameter's shape."""
        views, start = [], 0
        for parameter in self._parameters:
            views.append(flat[start : start + parameter.numel()].view_as(parameter))
            start += self._padded(parameter)
        return views
