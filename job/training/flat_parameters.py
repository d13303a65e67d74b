"""The adapter as one vector: its tensors are parts of one, and so are their gradients.

What is done to all of them alike (a step of the optimizer, clipping, adding up over processes) is then one operation
instead of hundreds. To PEFT nothing changes: the parameters are where they were, and are saved as ever.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_BLOCK = 256
"""8-bit optimizers quantize their state in blocks of so many numbers; none shall reach over two tensors."""


class FlatParameters:
    """The parameters, end to end, with zeros between where one does not fill its last block.

    Args:
        parameters: Of one dtype on one device. Their values are kept; their memory is the vector's from now on.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        first = self._parameters[0]
        size = sum(-(-p.numel() // _BLOCK) * _BLOCK for p in self._parameters)
        self.whole = torch.nn.Parameter(torch.zeros(size, dtype=first.dtype, device=first.device))
        """What the optimizer gets."""
        self.gradient = torch.zeros_like(self.whole)
        self._gradients = self._parts(self.gradient)
        for parameter, part in zip(self._parameters, self._parts(self.whole.detach()), strict=True):
            part.copy_(parameter.detach())
            parameter.data = part

    def clear(self) -> None:
        """Makes the gradient zero, and the parameters' gradients its parts."""
        self.gradient.zero_()
        self.whole.grad = self.gradient
        for parameter, part in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = part

    def _parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        parts, start = [], 0
        for parameter in self._parameters:
            parts.append(vector[start : start + parameter.numel()].view_as(parameter))
            start += -(-parameter.numel() // _BLOCK) * _BLOCK
        return parts
