"""Muon on the flat adapter: torch's own optimizer, on views of the one tensor that everything else sees.

Muon (Jordan et al. 2024) orthogonalizes the momentum of one matrix at a time. The matrices of a LoRA adapter are views
of the flat parameters, and so are their gradients and momenta of flat tensors: torch's optimizer updates them in place,
while clipping, the sum over processes and checkpoints go on seeing one parameter with one tensor of state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from job.errors import Problem, SettingsError

_STATE = "momentum_buffer"


class FlatMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` for `FlatParameters`.

    The step of a matrix is scaled to the size that AdamW's has (`match_rms_adamw`, Liu et al. 2025, section 2.2), so
    that learning rates found with AdamW serve.

    Args:
        whole: (size,): the flat parameter, with its gradient in `.grad`.
        views: Gives the matrices in a tensor of the shape of `whole`.
        lr: Learning rate; a scheduler changes it in `param_groups`.
        weight_decay: Decoupled.

    Raises:
        SettingsError: This torch has no Muon (it came with 2.9).
    """

    def __init__(
        self,
        whole: torch.nn.Parameter,
        views: Callable[[torch.Tensor], list[torch.Tensor]],
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        kind: Any = getattr(torch.optim, "Muon", None)
        if kind is None:
            what = (
                f"is muon, which torch {torch.__version__} does not have; use torch 2.9 or later, or another optimizer"
            )
            raise SettingsError([Problem("JOB_TRAIN__OPTIMIZER", what)])
        super().__init__([whole], {"lr": lr, "weight_decay": weight_decay})
        self._whole, self._views = whole, views
        self._matrices = [torch.nn.Parameter(view) for view in views(whole.detach())]
        self._muon = kind(self._matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, in place, with the gradient of the flat parameter."""
        del closure
        state = self.state[self._whole]
        if _STATE not in state:
            state[_STATE] = torch.zeros_like(self._whole)
        if self._whole.grad is None:
            return
        # Aliases, made anew at every step: loading a checkpoint puts other tensors in place of the state.
        parts = zip(self._matrices, self._views(self._whole.grad), self._views(state[_STATE]), strict=True)
        for matrix, gradient, momentum in parts:
            matrix.grad = gradient
            self._muon.state[matrix][_STATE] = momentum
        self._muon.param_groups[0] |= {name: self.param_groups[0][name] for name in ("lr", "weight_decay")}
        self._muon.step()
