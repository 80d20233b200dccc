"""A sampled lower bound of a network's Lipschitz constant: the largest Jacobian norm over a batch of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..operators import evaluating


def lipschitz_estimate(model: nn.Module, images: Tensor) -> float:
    """The largest Jacobian norm over a batch: a lower bound of the Lipschitz constant, never an upper one.

    Args:
        model: A model from images to outputs (n, classes), each row depending on its image only; it runs in eval mode.
        images: (n, ...), the points to sample. Costs one backward pass for every class.
    """
    with evaluating(model), torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        logits = model(x)
        rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0].flatten(1) for column in logits.unbind(1)]
    jacobians = torch.stack(rows, dim=1).double()  # (n, classes, pixels)
    return float(torch.linalg.eigvalsh(jacobians @ jacobians.mT)[:, -1].clamp_min(0).sqrt().max())
