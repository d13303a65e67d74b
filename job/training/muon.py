"""Muon on the flat parameters: torch's own Muon updates the matrices, which are views of one flat tensor.

Muon (Jordan et al. 2024) orthogonalizes the momentum of one matrix at a time. The matrices of a LoRA adapter, their
gradients and their momenta are views of flat tensors. torch's optimizer updates these views in place; clipping, the sum
over processes and checkpoints use the one flat parameter with its one state tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from job.errors import Problem, SettingsError

_STATE = "momentum_buffer"


class FlatMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` for `FlatParameters`.

    The update of a matrix is scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025, section 2.2), so that
    learning rates found with AdamW can be used.

    Args:
        whole: (size,): the flat parameter, with its gradient in `.grad`.
        views: Returns the matrices as views of a tensor of the shape of `whole`.
        lr: Learning rate; a scheduler changes it in `param_groups`.
        weight_decay: Decoupled weight decay.

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
        # The views are created at every step, because loading a checkpoint replaces the state's tensors.
        parts = zip(self._matrices, self._views(self._whole.grad), self._views(state[_STATE]), strict=True)
        for matrix, gradient, momentum in parts:
            matrix.grad = gradient
            self._muon.state[matrix][_STATE] = momentum
        self._muon.param_groups[0] |= {name: self.param_groups[0][name] for name in ("lr", "weight_decay")}
        self._muon.step()
