"""Rules of powers, roots, quotients, variances and norms, the parts of normalisations that a model writes out itself.

Most have no global constant, but one on a box, where arguments are bounded, and bounded away from 0 where necessary.
"""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...numerics import product_up
from ..boxes import Box
from ..registry import interval, rule
from ..walk import Affine, LipschitzWalk
from .arithmetic import most_met, scale
from .node_arguments import given

_UP = 1 + 1e-12  # exceeds the rounding error of float64 arithmetic


@rule(operator.pow, torch.pow, "pow", torch.square, "square")
def power(walk: LipschitzWalk, n: fx.Node) -> float:
    """x^p with a constant p >= 1 has slope p max |x|^(p-1) at most: local only."""
    exponent = _exponent(n)
    if not walk.local or walk.depends(n.args[1:]) or exponent < 1:
        return math.inf
    slope = exponent * float(walk.size(n.args[0]).max()) ** (exponent - 1)
    return product_up(walk.bound(n.args[0]), slope * _UP)


@interval(operator.pow, torch.pow, "pow", torch.square, "square")
def even_power(walk: LipschitzWalk, n: fx.Node) -> Box:
    """An even power is smallest where |x| is smallest, and largest where |x| is largest."""
    exponent, (low, high) = _exponent(n), walk.box(n.args[0])
    if exponent not in (2.0, 4.0):
        raise ValueError("a power other than 2 and 4")
    nearest = torch.maximum(low, -high).clamp_min(0)
    return nearest**exponent * (2 - _UP), torch.maximum(low.abs(), high.abs()) ** exponent * _UP


def _exponent(n: fx.Node) -> float:
    return 2.0 if n.target in (torch.square, "square") else float(given(n, "exponent")["exponent"])


_ROOTS = {torch.rsqrt: -0.5, "rsqrt": -0.5, torch.sqrt: 0.5, "sqrt": 0.5, torch.reciprocal: -1.0, "reciprocal": -1.0}


@rule(*_ROOTS)
def root(walk: LipschitzWalk, n: fx.Node) -> float:
    """x^p with p < 1 has slope |p| l^(p-1) at most where x >= l > 0: local only."""
    exponent = _ROOTS[n.target]
    lowest = float(walk.box(n.args[0])[0].min()) if walk.local else 0.0
    return product_up(walk.bound(n.args[0]), abs(exponent) * lowest ** (exponent - 1) * _UP) if lowest > 0 else math.inf


@interval(*_ROOTS)
def rising_or_falling(walk: LipschitzWalk, n: fx.Node) -> Box:
    """A monotone function is smallest and largest at the ends of an interval."""
    low, high = walk.box(n.args[0])
    if not float(low.min()) > 0:
        raise ValueError("a root of numbers that may be 0 or negative")
    ends = low ** _ROOTS[n.target], high ** _ROOTS[n.target]
    return torch.minimum(*ends) * (2 - _UP), torch.maximum(*ends) * _UP


@rule(operator.truediv, torch.div, "div")
def quotient(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """d(x / y) = dx / y - x dy / y², with the extreme values of x and y on a box where y is not 0: local only.

    An element that broadcasting puts into several quotients counts with the square root of the sum of their squared factors.
    """
    x, y = n.args[:2]
    if not walk.depends(y):
        return scale(walk, n)
    if not walk.local or n.kwargs:
        return math.inf
    shape, (low, high) = walk.env[n].shape, walk.box(y)
    least = torch.maximum(low, -high).double().expand(shape)  # the smallest absolute value
    if not float(least.min()) > 0:
        return math.inf
    part = product_up(walk.bound(y), most_met(walk.size(x).expand(shape) / least.square(), walk.env[y].shape) * _UP)  # type: ignore[index]
    if walk.depends(x):
        part += product_up(walk.bound(x), most_met(1 / least, walk.env[x].shape) * _UP)  # type: ignore[index]
    return math.nextafter(part, math.inf)


@interval(operator.truediv, torch.div, "div")
def quotients(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The smallest and the largest quotient are quotients of ends, if the divisor's interval excludes 0."""
    (low, high), (least, most) = walk.box(n.args[0]), map(torch.as_tensor, walk.box(n.args[1]))
    if n.kwargs or bool((least * most <= 0).any()):
        raise ValueError("a divisor that may be 0")
    ends = [torch.as_tensor(x / y) for x in (low, high) for y in (least, most)]
    return reduce(torch.minimum, ends), reduce(torch.maximum, ends)


@rule(torch.var, "var")
def variance(walk: LipschitzWalk, n: fx.Node) -> float:
    """The variance of a slice has the gradient 2 (x - mean) / N, of norm <= 2 ‖x‖ / N; slices are disjoint. Local only."""
    if not walk.local:
        return math.inf
    axes, degrees = _slices(walk, n)
    size = walk.size(n.args[0]).square().sum(axes).sqrt().max()
    return product_up(walk.bound(n.args[0]), 2 * float(size) / degrees * _UP)


@interval(torch.var, "var")
def spread(walk: LipschitzWalk, n: fx.Node) -> Box:
    """A variance lies between 0 and ‖x‖² / N."""
    axes, degrees = _slices(walk, n)
    keep = walk.env[n].ndim == walk.env[n.args[0]].ndim  # type: ignore[index]
    most = walk.size(n.args[0]).square().sum(axes, keepdim=keep) / degrees * _UP
    return torch.zeros_like(most), most


def _slices(walk: LipschitzWalk, n: fx.Node) -> tuple[list[int], int]:
    """The axes of a variance, and the divisor N of its sum of squares."""
    value: Tensor = walk.env[n.args[0]]  # type: ignore[index]
    axes: Any = given(n, "dim").get("dim")
    unbiased = bool(n.kwargs.get("unbiased", n.args[2] if len(n.args) > 2 and isinstance(n.args[2], bool) else True))
    correction: Any = n.kwargs.get("correction", int(unbiased))
    over = [axes] if isinstance(axes, int) and not isinstance(axes, bool) else list(axes)
    over = [axis % value.ndim for axis in over]
    degrees = math.prod(value.shape[axis] for axis in over) - int(correction)
    if 0 in over or degrees < 1:
        raise ValueError("a variance over the batch or of a single element")
    return over, degrees


@rule(F.normalize)
def unit_length(walk: LipschitzWalk, n: fx.Node) -> float:
    """x / max(‖x‖, eps) has constant 1 / eps: x / eps in the ball of radius eps; outside, a projection times 1 / ‖x‖."""
    power, axis, eps = _normalize_settings(n)
    if power != 2 or not isinstance(axis, int) or axis % walk.env[n].ndim == 0 or not eps > 0:
        return math.inf
    return product_up(walk.bound(n.args[0]), 1 / eps * _UP)


@interval(F.normalize)
def at_most_one(walk: LipschitzWalk, n: fx.Node) -> Box:
    """No element of a vector exceeds the vector's norm, so that all lie between -1 and 1."""
    if _normalize_settings(n)[0] < 1:
        raise ValueError("p below 1")
    most = torch.full_like(walk.env[n], _UP)
    return -most, most


def _normalize_settings(n: fx.Node) -> tuple[float, Any, float]:
    told = given(n, "p", "dim", "eps")
    return float(told.get("p", 2.0)), told.get("dim", 1), float(told.get("eps", 1e-12))
