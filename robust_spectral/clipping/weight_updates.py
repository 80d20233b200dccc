"""Changes of a weight by groups: the smallest change that lowers given singular values, additions and scalings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..devices import to_device
from ..singular_values import to_groups


def by_groups(gradients: Sequence[Tensor], groups: int) -> Tensor:
    """Concatenate the gradients with respect to the parameters of one layer: (groups, k, numbers / groups)."""
    parts = [to_groups(g, groups) for g in gradients]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def smallest_change(G: Tensor, excess: Tensor) -> Tensor:
    """Multipliers a >= 0 of the smallest Σ a_i G_i that lowers direction i by at least excess_i; 0 where excess_i is 0.

    The Gram system is solved first with all directions, then without those whose multiplier is negative (the others lower them
    by more than enough), so that nearly dependent directions cannot blow up the change.
    """
    if G.shape[1] == 1:
        return excess / (G.norm(dim=2).square() + torch.finfo(G.dtype).tiny)
    gram, active = G @ G.mT, excess > 0
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = eye * (1e-6 * gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None] + torch.finfo(gram.dtype).tiny)
    for _ in range(gram.shape[-1]):
        pairs = active[:, :, None] & active[:, None, :]
        a = torch.linalg.solve_ex(torch.where(pairs, gram + ridge, eye), torch.where(active, excess, 0))[0]
        negative = a < 0
        if not a.is_cuda and not bool(negative.any()):  # on a GPU the check would wait; more rounds change nothing
            break
        active = active & ~negative
    return a


def add_by_groups_(parameters: Sequence[nn.Parameter], change: Tensor, over: Tensor | None = None, times: float = 1.0) -> None:
    """Add ``times`` * change / ``over`` to parameters; the change, (groups, numbers / groups), is ordered as in `by_groups`."""
    parts = change.split([p.numel() // len(change) for p in parameters], dim=1)
    for parameter, part in zip(parameters, parts, strict=True):
        part = part.reshape(parameter.shape)
        if over is None:
            parameter.add_(part, alpha=times)
        else:
            parameter.addcdiv_(part, over, value=times)


def multiply_by_groups_(parameters: Sequence[nn.Parameter], factors: Tensor) -> None:
    """Multiply each group's part of the parameters by its factor; the factors, (groups, 1), are on the host."""
    if float(factors.min()) == 1 == float(factors.max()):
        return
    for parameter in parameters:
        if len(factors) == 1:
            parameter.mul_(float(factors))
        else:
            each = to_device(factors, parameter).expand(len(factors), parameter.numel() // len(factors))
            parameter.mul_(each.reshape(parameter.shape))
