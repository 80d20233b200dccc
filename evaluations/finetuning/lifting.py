"""Small singular values raised while a network trains, so that a norm of at most 1 does not become a gain of much less.

Clipping takes the largest singular values down; where every layer must have a norm of 1 and margins count, the others have to
come up. A Newton-Schulz step W <- W (3 I - Wᵀ W) / 2 takes every singular value σ in (0, 1] to (3 σ - σ³) / 2, which is larger
and not above 1 (Björck and Bowie 1971, An iterative algorithm for computing the best estimate of an orthogonal matrix).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Lift:
    """Takes the singular values of a model's matrices towards the norm that is allowed, one step behind every optimizer step.

    Matrices are dense layers and convolutions whose windows do not overlap; other layers are left alone. Attach it behind the
    clipper: singular values above sqrt(3) times the norm would leave.

    Args:
        model: Any model.
        max_norm: The norm allowed in every layer.
    """

    def __init__(self, model: nn.Module, max_norm: float) -> None:
        self.max_norm = max_norm
        self.matrices: list[Any] = [module for module in model.modules() if _is_matrix(module)]

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Lift after every step of an optimizer."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    @torch.no_grad()
    def step(self) -> None:
        """One Newton-Schulz step on every matrix."""
        for module in self.matrices:
            W = module.weight.flatten(1) / self.max_norm
            cubed = (W @ W.T) @ W if len(W) <= W.shape[1] else W @ (W.T @ W)
            module.weight.copy_((self.max_norm * (1.5 * W - 0.5 * cubed)).reshape(module.weight.shape))


def _is_matrix(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    patches = type(module) is nn.Conv2d and module.stride == module.kernel_size and module.groups == 1
    return patches and module.padding in (0, (0, 0), "valid")
