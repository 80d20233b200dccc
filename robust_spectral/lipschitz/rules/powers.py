"""Powers, roots, exponentials, variances and norms, the parts of normalisations that a model writes out itself.

Most have no global constant, but one on a box, where arguments are bounded, and bounded away from 0 where necessary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics import product_up
from ..boxes import Box
from ..table import NoClaim, operation_of, rule
from ..walk import LipschitzWalk
from .node_arguments import SUM_UP, UP, arguments, aten, axes_of, increasing, sum_of_ends

_ROOTS = {aten.rsqrt: -0.5, aten.sqrt: 0.5, aten.reciprocal: -1.0}


def _exponent(walk: LipschitzWalk, n: fx.Node) -> float:
    operation, a = operation_of(n.target), arguments(n)
    if operation in _ROOTS:
        return _ROOTS[operation]
    if operation is aten.square:
        return 2.0
    if isinstance(a["exponent"], fx.Node) or isinstance(a["self"], int | float):
        raise NoClaim("with an exponent that is no number")
    if not math.isfinite(float(a["exponent"])):
        raise NoClaim("with an infinite exponent")
    return float(a["exponent"])


def power_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """An even power is smallest where |x| is smallest, and largest where |x| is largest; others are monotone for x > 0."""
    exponent, (low, high) = _exponent(walk, n), walk.box(n.args[0])
    if exponent in (2.0, 4.0, 6.0):
        nearest = torch.maximum(low, -high).clamp_min(0)
        return nearest**exponent * (2 - UP), torch.maximum(low.abs(), high.abs()) ** exponent * UP
    if not float(low.min()) > 0 and exponent not in (1.0, 3.0, 5.0):
        raise NoClaim("of numbers that may be 0 or negative")
    ends = low**exponent, high**exponent
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    return low - (UP - 1) * low.abs(), high + (UP - 1) * high.abs()


@rule(aten.pow, aten.square, *_ROOTS, box=power_box)
def power(walk: LipschitzWalk, n: fx.Node) -> float:
    """x^p has slope |p| max |x|^(p-1) at most: for p >= 1 at the largest |x|, else where x >= l > 0, at l. Local only."""
    exponent = _exponent(walk, n)
    if exponent == 1:
        return walk.bound(n.args[0])
    if not walk.local:
        raise NoClaim
    at = float(walk.size(n.args[0]).max()) if exponent >= 1 else float(walk.box(n.args[0])[0].min())
    if exponent < 1 and not at > 0:
        raise NoClaim("of what may be 0")
    if exponent != int(exponent) and not float(walk.box(n.args[0])[0].min()) >= 0:
        raise NoClaim("of what may be negative")
    steepest = float(torch.tensor(at, dtype=torch.float64) ** (exponent - 1))  # inf where it overflows
    return product_up(walk.bound(n.args[0]), abs(exponent) * steepest * UP)


@rule(aten.exp, aten.expm1, box=increasing)
def exponential(walk: LipschitzWalk, n: fx.Node) -> float:
    """exp has its largest slope where its argument is largest: local only."""
    if not walk.local or not (largest := float(walk.box(n.args[0])[1].max())) < 700:
        raise NoClaim("of what may be large" if walk.local else "")
    return product_up(walk.bound(n.args[0]), math.exp(largest) * UP)


@rule(aten.log, aten.log1p, box=increasing)
def logarithm(walk: LipschitzWalk, n: fx.Node) -> float:
    """log x has slope 1 / l at most where x >= l > 0: local only."""
    least = float(walk.box(n.args[0])[0].min()) + (operation_of(n.target) is aten.log1p) if walk.local else 0.0
    if not least > 0:
        raise NoClaim("of what may be 0")
    return product_up(walk.bound(n.args[0]), UP / least)


def moments_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """A variance lies between 0 and Σ (x - c)² / N, a standard deviation between the roots; a mean rises with its elements."""
    (axes, _, degrees), keep = _slices(walk, n), bool(arguments(n)["keepdim"])
    most = _energy(walk, n).sum(axes, keepdim=keep) / degrees * SUM_UP
    if operation_of(n.target) in (aten.std, aten.std_mean):
        most = most.sqrt() * UP
    if operation_of(n.target) in (aten.var, aten.std):
        return torch.zeros_like(most), most
    means = sum_of_ends(lambda end: end.mean(axes, keepdim=keep), walk.box(n.args[0]))
    return (torch.zeros_like(most), means[0]), (most, means[1])


@rule(aten.var, aten.var_mean, box=moments_box)
def variance(walk: LipschitzWalk, n: fx.Node) -> float:
    """The variance of a slice has the gradient 2 (x - mean) / N, of norm <= 2 sqrt(Σ (x - c)²) / N. Local only."""
    if not walk.local:
        raise NoClaim
    axes, _, degrees = _slices(walk, n)
    return _moment(walk, n, 2 * math.sqrt(float(_energy(walk, n).sum(axes).max())) / degrees)


@rule(aten.std, aten.std_mean, box=moments_box)
def deviation(walk: LipschitzWalk, n: fx.Node) -> float:
    """A standard deviation is the norm of x - mean, a projection, over sqrt(N): constant 1 / sqrt(N)."""
    return _moment(walk, n, 1 / math.sqrt(_slices(walk, n)[2]))


def _moment(walk: LipschitzWalk, n: fx.Node, gain: float) -> float:
    """The bound of a variance or standard deviation, alone or together with the mean; slices are disjoint.

    The mean of m elements has constant 1 / sqrt(m), and depends on a part of x that is orthogonal to x - mean.
    """
    if operation_of(n.target) in (aten.var_mean, aten.std_mean):
        gain = max(gain, 1 / math.sqrt(_slices(walk, n)[1]))
    return product_up(walk.bound(n.args[0]), gain * SUM_UP)


def _energy(walk: LipschitzWalk, n: fx.Node) -> Tensor:
    """Largest squared distances of the elements from a number c for each slice: (x - mean)² sums to no more than (x - c)²."""
    low, high = walk.box(n.args[0])
    c = ((low + high) / 2).mean(_slices(walk, n)[0], keepdim=True)
    return torch.maximum(high - c, c - low).square()


def _slices(walk: LipschitzWalk, n: fx.Node) -> tuple[list[int], int, float]:
    """The axes of a variance, the number of elements of a slice, and the divisor N of its sum of squares."""
    a, source = arguments(n), walk.env[n.args[0]]  # type: ignore[index]
    axes = axes_of(walk, n, a.get("dim"))
    correction: Any = a["correction"] if a.get("correction") is not None else int(a.get("unbiased", True))
    count = math.prod(source.shape[axis] for axis in axes)
    if count - float(correction) <= 0:
        raise NoClaim("of a single element")
    return axes, count, count - float(correction)


def norm_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """A norm lies between those of the smallest and of the largest absolute values."""
    a, (low, high) = arguments(n), walk.box(n.args[0])
    ends = torch.maximum(low, -high).clamp_min(0), walk.size(n.args[0])
    least, most = (torch.linalg.vector_norm(end, a["ord"], a["dim"], a["keepdim"]) for end in ends)
    return least * (2 - SUM_UP), most * SUM_UP


@rule(aten.linalg_vector_norm, box=norm_box)
def vector_norm(walk: LipschitzWalk, n: fx.Node) -> float:
    """A p-norm along axes has constant 1 for p >= 2, and m^(1/p - 1/2) for m elements and 1 <= p < 2."""
    a = arguments(n)
    axes, order = axes_of(walk, n, a["dim"]), float(a["ord"])
    if order < 1:
        raise NoClaim("of an order below 1")
    count = math.prod(walk.env[n.args[0]].shape[axis] for axis in axes)  # type: ignore[index]
    return product_up(walk.bound(n.args[0]), 1.0 if order >= 2 else count ** (1 / order - 0.5) * UP)
