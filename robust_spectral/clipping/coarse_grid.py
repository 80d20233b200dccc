"""Where a clip of many singular values starts: at the frequencies of a coarse grid, all of them at once.

Every convolution has a kernel whose symbols bound its norm, whatever its stride, padding and size (`bounding_kernel`). Brought
below a limit on a grid of a few frequencies, by the smallest change that does it, they stay close to it in between, so what is
left above are a few directions, and the change is nearly the smallest there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import LinearLayer
from ..numerics import power_of_two
from ..operators import batchnorm_scale, bounding_kernel, has_forward_hooks, is_plain
from .symbols import RELAXATION, Transform, by_entries, cut, penalty, symbol_norms

_ROUNDS = 12  # of the alternating direction method of multipliers; more bring it no nearer to what clips go on to
_MOST_WORK = 6e10  # multiply-adds of the symbols' Gram matrices in all rounds, half a minute
_SLACK = 1.1  # by how much a kernel may overstate the norm, as it does on small inputs, to be of use


@torch.no_grad()
def coarse_start(layer: LinearLayer, composite: bool, norm: float, max_norm: float) -> Tensor | None:
    """A weight near the layer's own, with a norm of about ``max_norm``; None where there is no way, or a costly one.

    Args:
        layer: With a plain module; of a composite the batch normalisation is a fixed factor of each channel.
        composite: Whether the norm is that of the layer with its batch normalisation.
        norm: What it is, or a little more.
        max_norm: What it shall be.

    Returns:
        The weight, float64. Nothing is proved of its norm: between the frequencies it may be several percent larger.
    """
    to_kernel = kernel_map(layer, composite)
    if to_kernel is None:
        return None
    own: Any = layer.module.weight
    kernel, pull = torch.func.vjp(to_kernel, own.detach().double())[:2]
    factors = to_kernel(torch.ones_like(own, dtype=torch.float64))
    groups, window = getattr(layer.module, "groups", 1), kernel.shape[2:]
    transform = Transform.of(window, [1] * len(window), [max(4 * (k - 1), 1) for k in window], kernel.device)
    work = len(transform.cosine) * kernel[..., 0].numel() * min(len(kernel) // groups, kernel.shape[1])
    if work * (_ROUNDS if transform.places > 1 else 1) > _MOST_WORK:
        return None
    scale = power_of_two(float(kernel.abs().max()))
    start, squares = by_entries(kernel / scale, groups), by_entries(factors**2, groups)
    unit = scale * math.sqrt(transform.places)
    norms = symbol_norms(transform.symbols(start)) * unit
    overstated = float(norms.max()) / norm
    limit, change = max_norm * max(1.0, overstated), torch.zeros_like(start)
    above = norms > limit
    if not bool(above.any()) or overstated > _SLACK:
        return None
    change[:, above] = _nearest(start[:, above], squares[:, above], transform, limit / unit) - start[:, above]
    change = torch.where(squares > 0, change * scale / squares.clamp_min(torch.finfo(squares.dtype).tiny), 0)
    return own.double() + pull(change.movedim(0, -1).reshape(kernel.shape))[0]


def _nearest(start: Tensor, squares: Tensor, transform: Transform, limit: float) -> Tensor:
    """About the kernel K (entries, g, out/g, in/g) nearest to ``start`` by Σ (ΔK)² / squares whose symbols obey the limit."""
    symbols = relaxed = transform.symbols(start)
    free = squares > 0
    squares = squares / squares[free].mean()
    squares = squares * penalty(symbols, limit, transform.places * free[0].numel() / int(free.sum()))
    multipliers, kernel = torch.zeros_like(symbols), start
    for _ in range(_ROUNDS):
        wanted = relaxed + multipliers
        multipliers = cut(wanted, limit)[0]
        clipped = wanted - multipliers
        kernel = (start + squares * transform.kernel(clipped - multipliers)) / (1 + squares)
        symbols = transform.symbols(kernel)
        if float((symbols - clipped).norm()) <= 1e-3 * float(clipped.norm()):
            break
        relaxed = RELAXATION * symbols + (1 - RELAXATION) * clipped
    return kernel


def kernel_map(layer: LinearLayer, composite: bool) -> Callable[[Tensor], Tensor] | None:
    """From the weight to the kernel whose symbols bound the norm: its entries elsewhere, times the channel's factor."""
    module: Any = layer.module
    batchnorm = layer.batchnorm if composite else None
    on_other_axis = getattr(module, "transposed", False) or (isinstance(module, nn.Linear) and len(layer.in_shape) > 1)
    if not is_plain(module) or has_forward_hooks(module) or (batchnorm is not None and on_other_axis):
        return None

    def to_kernel(weight: Tensor) -> Tensor:
        if batchnorm is not None:
            weight = weight * batchnorm_scale(batchnorm).reshape(-1, *[1] * (weight.ndim - 1))
        return weight[..., None] if isinstance(module, nn.Linear) else bounding_kernel(module, weight, layer.in_shape).weight

    return to_kernel
