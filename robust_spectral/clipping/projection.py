"""The nearest convolution of at most a given norm, found by clipping every symbol while the kernel keeps its window.

On a cyclic grid a convolution is one matrix per frequency, its symbol. Clipping the singular values of the symbols gives the
nearest convolution of smaller norm, but its kernel fills the grid. The nearest one that keeps the window lies in the
intersection of two convex sets, each of which is easy to project onto, and is found by alternating between them with
multipliers. The multipliers also give a lower bound of the distance of every feasible weight, which decides when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..numerics import power_of_two
from ..operators import Shape, evaluating, is_overridden
from ..singular_values import plain_circular
from .symbols import RELAXATION, Transform, by_entries, cut, penalty, symbol_norms

_CHECK_EVERY = 5  # rounds from one check of the norm and of the lower bound to the next


@torch.no_grad()
def projected_weight(
    module: nn.Module, in_shape: Sequence[int], max_norm: float, *, rtol: float = 1e-4, max_rounds: int = 2000
) -> Tensor:
    """The weight nearest to a layer's own, in Frobenius norm, with which the layer's spectral norm is at most ``max_norm``.

    A convolution with circular padding that keeps the input's size has the norm of its largest symbol on the input's grid, and
    the result is the projection itself. A convolution with any amount of zero padding is a section of the circular convolution
    on a grid larger by the window's reach, d (k - 1) an axis, whose norm is an upper bound: the result is feasible but
    conservative, its true norm a little below ``max_norm``. A dense layer and a 1 x 1 kernel have one symbol only; their
    singular values are clipped directly, in one round. Groups of channels are independent of each other.

    Args:
        module: A dense layer, or an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` of stride 1 padded with zeros or, to the
            input's size, circularly; any dilation and groups. The module is not run, and not changed.
        in_shape: Shape of one input, without the batch axis.
        max_norm: The spectral norm allowed, positive.
        rtol: How far ‖ΔW‖² may be above the smallest, relative to the lesser of ‖ΔW‖² and ‖W + ΔW‖²; the distance from the
            projection is then at most sqrt(rtol) times the root of that lesser number. A group with a norm of up to (1 + rtol)
            max_norm counts as feasible and is left unchanged, bit by bit.
        max_rounds: The largest number of rounds; after them, the nearest feasible weight found so far is returned, which is
            never farther than a rescale.

    Returns:
        The weight in float64, in the module's shape. The norm on the grid is at most ``max_norm``, to rounding, except for
        groups left unchanged. A round costs one decomposition for every second frequency. The number of rounds grows with the
        number of grid positions per entry of the window: to half the norm, a window of 3 x 3 takes 120 to 250 on 16 x 16, 500
        to 850 on 32 x 32.

    Raises:
        ValueError: ``max_norm`` is not positive, ``in_shape`` does not fit, or the weights are not finite.
        NotImplementedError: any other module: strided, transposed, padded otherwise, complex, or with a forward pass of its
            own.

    Source: symbols as in Sedghi, Gupta and Long, The Singular Values of Convolutional Layers (2019).
    """
    if not max_norm > 0:
        raise ValueError(f"projected_weight(max_norm={max_norm}): must be positive")
    _check_plain(module)
    weight = _weight(module)
    transform, groups = _transform(module, weight, tuple(in_shape)), getattr(module, "groups", 1)
    scale = power_of_two(float(weight.abs().max()))
    limit = max(max_norm / scale / math.sqrt(transform.places), torch.finfo(torch.float64).tiny)
    kernel = by_entries(weight, groups).clone()
    above = symbol_norms(transform.symbols(kernel / scale)) > limit * (1 + rtol)
    if bool(above.any()):
        kernel[:, above] = _project(kernel[:, above] / scale, transform, limit, rtol, max_rounds) * scale
    return kernel.movedim(0, -1).reshape(weight.shape).contiguous()


def _project(start: Tensor, transform: Transform, limit: float, rtol: float, max_rounds: int) -> Tensor:
    """The kernel K nearest to K₀ = ``start`` whose symbols have no singular value above ``limit``.

    Minimises ½ ‖K - K₀‖² subject to S K = Z and ‖Z‖ <= limit by the alternating direction method of multipliers, over-relaxed.
    With multipliers Y and y = S*Y any feasible K is at most ½ ‖K - K₀ + y‖² + limit ‖Y‖₁ - ⟨K, y⟩ worse than the best, ‖Y‖₁
    being the sum of all singular values. This duality gap also bounds half the squared distance of K from the best.

    Source: Eckstein and Bertsekas, On the Douglas-Rachford splitting method and the proximal point algorithm (1992).
    """
    symbols = relaxed = transform.symbols(start)
    weight = penalty(symbols, limit, transform.places / len(start))
    eye = torch.eye(len(start), dtype=start.dtype, device=start.device)
    inverse = torch.linalg.inv(eye + weight * transform.kernel(transform.symbols(eye)))
    multipliers = torch.zeros_like(symbols)
    nearest = start * _feasible_factors(symbols, limit)
    for done in range(1, max_rounds + 1):
        wanted = relaxed + multipliers
        multipliers, excess = cut(wanted, limit)
        clipped = wanted - multipliers
        pulled = start + weight * transform.kernel(clipped - multipliers)
        kernel = (inverse @ pulled.flatten(1)).view_as(start)
        symbols = transform.symbols(kernel)
        relaxed = RELAXATION * symbols + (1 - RELAXATION) * clipped
        if done % _CHECK_EVERY == 1 or done == max_rounds:
            feasible = kernel * _feasible_factors(symbols, limit)
            distance, y = _half_square(feasible - start), weight * transform.kernel(multipliers)
            if distance < _half_square(nearest - start):
                nearest = feasible
            trace_norm = weight * float((transform.counts * excess.flatten(1)).sum())
            gap = _half_square(feasible - start + y) + limit * trace_norm - float((feasible * y).sum())
            if gap <= rtol * min(distance, _half_square(feasible)):
                break
    return nearest


def _feasible_factors(symbols: Tensor, limit: float) -> Tensor:
    """The factors (g, 1, 1) that make each group feasible."""
    return (limit / symbol_norms(symbols).clamp_min(limit))[:, None, None]


def _half_square(kernel: Tensor) -> float:
    return float(kernel.square().sum()) / 2


def _weight(module: nn.Module) -> Tensor:
    """The module's weight in float64, (out, in/g, *window)."""
    with evaluating(module):
        weight: Any = module.weight
    if weight.is_complex():
        raise NotImplementedError(f"projected_weight: the weight of {module} is complex; only real layers are covered")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"projected_weight: the weight of {module} contains NaN or infinite values")
    return weight.detach().double()


def _transform(module: nn.Module, weight: Tensor, in_shape: Shape) -> Transform:
    """The transform on a grid on which the circular convolution has at least the layer's norm.

    Along an axis on which the window has a single entry all frequencies are alike, and one grid position suffices.
    """
    where = f"projected_weight(in_shape={in_shape}): {module}"
    if not isinstance(module, _ConvNd):
        if in_shape[-1:] != weight.shape[1:]:
            raise ValueError(f"{where} takes {weight.shape[1]} features on the last axis")
        return Transform.of((1,), (1,), (1,), weight.device)
    window, dilation = module.kernel_size, module.dilation
    if set(module.stride) != {1}:
        raise NotImplementedError(f"{where} has a stride; only stride 1 is covered")
    if module.padding_mode not in ("zeros", "circular"):
        raise NotImplementedError(f"{where} pads with {module.padding_mode!r}; only 'zeros' and 'circular' are covered")
    if len(in_shape) != len(window) + 1 or in_shape[0] != module.in_channels or min(in_shape) < 1:
        raise ValueError(f"{where} takes ({module.in_channels}, {len(window)} spatial axes)")
    reach = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
    if module.padding_mode == "circular":
        plain_circular("projected_weight", module, in_shape)  # raises if the padding changes the size
        reach = [0] * len(reach)
    grid = [n + r if k > 1 else 1 for n, r, k in zip(in_shape[1:], reach, window, strict=True)]
    return Transform.of(window, dilation, grid, weight.device)


def _check_plain(module: nn.Module) -> None:
    """Raise NotImplementedError unless the module is a dense or convolutional layer with torch's forward pass and no hooks."""
    own: Any = type(module)
    kind: Any = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) if isinstance(module, kind)), None)
    calls = [call for call in ("forward", "_conv_forward") if hasattr(kind, call)]
    plain = kind is not None and all(getattr(own, call) is getattr(kind, call) for call in calls)
    if not plain or is_overridden(module):
        raise NotImplementedError(
            f"projected_weight: {module} is not a plain nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d without forward hooks "
            "or a replaced forward"
        )
