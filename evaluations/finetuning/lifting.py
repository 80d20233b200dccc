"""Lifting: small singular values are raised during training, so that a layer of norm 1 does not shrink most of its inputs.

Clipping lowers the largest singular values. Where every layer needs a norm of 1 and margins count, the other singular values
have to rise. A Newton-Schulz step W <- W (3 I - Wᵀ W) / 2 takes every singular value σ in (0, 1] to (3 σ - σ³) / 2, which is
larger and not above 1 (Björck and Bowie 1971, An iterative algorithm for computing the best estimate of an orthogonal matrix).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Lift:
    """Raise the singular values of a model's matrices towards the allowed norm, by one Newton-Schulz step per optimizer step.

    Matrices are dense layers and convolutions whose windows do not overlap; other layers are not changed. Attach it after the
    clipper, because the Newton-Schulz step needs singular values below sqrt(3) times the norm.

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
        """Apply one Newton-Schulz step to every matrix."""
        for module in self.matrices:
            W = module.weight.flatten(1) / self.max_norm
            cubed = (W @ W.T) @ W if len(W) <= W.shape[1] else W @ (W.T @ W)
            module.weight.copy_((self.max_norm * (1.5 * W - 0.5 * cubed)).reshape(module.weight.shape))


def _is_matrix(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    patches = type(module) is nn.Conv2d and module.stride == module.kernel_size and module.groups == 1
    return patches and module.padding in (0, (0, 0), "valid")
