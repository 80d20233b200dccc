"""The start of a clip of many singular values, which lowers the symbols at all frequencies of a coarse grid together.

Every convolution, whatever its stride, padding and size, has a kernel whose symbols bound its norm (`bounding_kernel`). If the
smallest possible change brings the symbols below a limit on a grid of a few frequencies, they stay close to the limit in
between. Only a few directions then remain above the target, and the change is nearly the smallest there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import LinearLayer
from ..numerics import power_of_two
from ..operators import batchnorm_scale, bounding_kernel, is_plain
from .symbols import RELAXATION, Transform, by_entries, cut, penalty, symbol_norms

_ROUNDS = 12  # of the alternating direction method of multipliers; more do not improve the clips that follow
_MOST_WORK = 6e10  # multiply-adds of the symbols' Gram matrices in all rounds, half a minute
_MOST_OVERSTATED = 1.1  # largest factor by which a kernel may overstate the norm, as on small inputs, and still be used


@torch.no_grad()
def coarse_start(layer: LinearLayer, composite: bool, norm: float, max_norm: float) -> Tensor | None:
    """A weight near the layer's own, with a norm of about ``max_norm``; None if no kernel is known or the start would not pay.

    Args:
        layer: A layer of torch.nn itself; the batch normalisation of a composite is a fixed factor of each channel.
        composite: Whether the norm is that of the layer with its batch normalisation.
        norm: The current norm, or a little more.
        max_norm: The target norm.

    Returns:
        The weight, float64. No norm is proved for it: between the frequencies it may be several percent larger.
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
    if not bool(above.any()) or overstated > _MOST_OVERSTATED:
        return None
    change[:, above] = _nearest(start[:, above], squares[:, above], transform, limit / unit) - start[:, above]
    change = torch.where(squares > 0, change * scale / squares.clamp_min(torch.finfo(squares.dtype).tiny), 0)
    return own.double() + pull(change.movedim(0, -1).reshape(kernel.shape))[0]


def _nearest(start: Tensor, squares: Tensor, transform: Transform, limit: float) -> Tensor:
    """Approximate the kernel K nearest to ``start``, by Σ (ΔK)² / squares, whose symbols obey ``limit``.

    Kernels are (entries, g, out/g, in/g).
    """
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
    """The map from the weight to the kernel whose symbols bound the norm: the entries rearranged, times the channel's factor.

    None if the kernel is unknown: for layers of derived classes, with forward hooks or a replaced forward, or with a batch
    normalisation on another axis than the weight's first.
    """
    module: Any = layer.module
    batchnorm = layer.batchnorm if composite else None
    on_other_axis = getattr(module, "transposed", False) or (isinstance(module, nn.Linear) and len(layer.in_shape) > 1)
    if not is_plain(module) or (batchnorm is not None and on_other_axis):
        return None

    def to_kernel(weight: Tensor) -> Tensor:
        if batchnorm is not None:
            weight = weight * batchnorm_scale(batchnorm).reshape(-1, *[1] * (weight.ndim - 1))
        return weight[..., None] if isinstance(module, nn.Linear) else bounding_kernel(module, weight, layer.in_shape).weight

    return to_kernel
