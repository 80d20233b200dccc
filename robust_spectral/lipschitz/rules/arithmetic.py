"""Sums, differences, products and quotients, means and sums along axes; a sum or product with a constant is affine."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics import product_up
from ...operators import Shape
from ..boxes import Box
from ..table import NoClaim, operation_of, rule
from ..walk import Affine, LipschitzWalk
from .node_arguments import UP, arguments, aten, axes_of, identity, increasing, linear_step, repeats


def _terms(n: fx.Node) -> list[tuple[Any, float]]:
    """The two terms of a sum or difference, each with its factor."""
    a, operation = arguments(n), operation_of(n.target)
    alpha = float(a.get("alpha") or 1.0) if a.get("alpha") != 0 else 0.0
    if operation is aten.rsub:
        return [(a["self"], -alpha), (a["other"], 1.0)]
    return [(a["self"], 1.0), (a["other"], -alpha if operation is aten.sub else alpha)]


def sum_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The ends of a c x + d y are sums of ends, exchanged where a factor is negative."""
    ends = [(walk.box(value), factor) for value, factor in _terms(n)]
    low = sum(factor * torch.as_tensor(box[0 if factor >= 0 else 1]) for box, factor in ends)
    high = sum(factor * torch.as_tensor(box[1 if factor >= 0 else 0]) for box, factor in ends)
    return low, high


def sum_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """One addition, and a product with ``alpha``."""
    return 2, sum(abs(factor) * _spread(walk, n, value) for value, factor in _terms(n))


@rule(aten.add, aten.sub, aten.rsub, box=sum_box, rounding=sum_rounding)
def add(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The branches' bounds add (triangle inequality), times sqrt(k) for a branch broadcast to k copies; a constant adds 0."""
    moving = [(value, factor) for value, factor in _terms(n) if walk.depends(value)]
    value, factor = moving[0]
    if len(moving) == 1 and repeats(walk, n, value) == 1 and factor in (1.0, -1.0):
        if factor == 1:
            return identity(walk, n, value)
        return linear_step(walk, n, value, torch.neg, 1.0, diagonal=True)
    each = [product_up(walk.bound(value), repeats(walk, n, value), abs(factor)) for value, factor in moving]
    return each[0] if len(each) == 1 else math.nextafter(each[0] + each[1], math.inf)


def product_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The smallest and the largest product of two intervals are products of their ends; a square is not negative."""
    one, other = walk.box(n.args[0]), walk.box(n.args[1])
    products = [torch.as_tensor(a * b) for a in one for b in other]
    low, high = reduce(torch.minimum, products), reduce(torch.maximum, products)
    return (low.clamp_min(0), high) if n.args[0] is n.args[1] else (low, high)


def product_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """A product with a constant, or a quotient by one."""
    first, second = n.args[:2]
    if walk.depends(first) and walk.depends(second):
        raise NoClaim("of two functions of the input")
    function, factors = _factors(walk, n)
    return 3, _spread(walk, n, function) * float(factors.abs().max()) * UP


def _factors(walk: LipschitzWalk, n: fx.Node) -> tuple[fx.Node, Tensor]:
    """The factor that depends on the input, and the constant, in float64, by which it is multiplied."""
    first, second = n.args[:2]
    divides = operation_of(n.target) in (aten.div, aten.true_divide)
    if divides and (walk.depends(second) or arguments(n).get("rounding_mode") is not None):
        raise NoClaim("by a function of the input" if walk.depends(second) else "rounded to whole numbers")
    function, constant = (first, second) if walk.depends(first) else (second, first)
    assert isinstance(function, fx.Node)
    values = walk.constant(constant)
    return function, 1 / values if divides else values


@rule(aten.mul, box=product_box, rounding=product_rounding)
def scale(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """A constant factor c is a diagonal operator of norm max |c|; two functions of the input multiply in a local walk only."""
    first, second = n.args[:2]
    if walk.depends(first) and walk.depends(second):
        return _product(walk, n, first, second)
    function, factors = _factors(walk, n)
    largest = float(factors.abs().max())
    if not math.isfinite(largest):
        raise NoClaim("by a constant that is 0 or not finite")
    largest = math.nextafter(largest, math.inf) if largest > 0 else 0.0
    copies, value = repeats(walk, n, function), walk.env[function]
    by_sample = factors.ndim == value.ndim and factors.shape[:1] != (1,)
    if largest == 0 or copies != 1 or by_sample:
        return product_up(walk.bound(function), largest, copies)
    factors = factors.to(value.device)
    step = linear_step(walk, n, function, lambda X: X * factors.to(X.dtype), largest, diagonal=True)
    return replace(step, uneven=bool((factors.abs() != factors.abs().max()).any())) if isinstance(step, Affine) else step


def _product(walk: LipschitzWalk, n: fx.Node, first: Any, second: Any) -> float:
    """‖d(x y)‖ <= max |y| ‖dx‖ + max |x| ‖dy‖, with the largest values of x and y in the box: local only.

    An element that broadcasting multiplies with several others counts with the square root of the sum of their squares.
    """
    if not walk.local:
        raise NoClaim("of two functions of the input")
    total = 0.0
    for moving, other in ((first, second), (second, first)):
        meets = most_met(walk.size(other).expand(walk.env[n].shape), walk.env[moving].shape)
        total = math.nextafter(total + product_up(walk.bound(moving), meets), math.inf)
    return total


def most_met(others: Tensor, shape: Shape) -> float:
    """Largest norm of the ``others`` (>= 0) that multiply one element of a tensor of shape ``shape`` by broadcasting."""
    own = (1,) * (others.ndim - len(shape)) + tuple(shape)
    repeated = [axis for axis, (one, all_) in enumerate(zip(own, others.shape, strict=True)) if one != all_]
    met = others.square().sum(repeated).sqrt() if repeated else others
    return float(met.max()) * UP


def quotient_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The smallest and the largest quotient are quotients of ends, if the divisor's interval excludes 0."""
    (low, high), (least, most) = walk.box(n.args[0]), map(torch.as_tensor, walk.box(n.args[1]))
    if arguments(n).get("rounding_mode") is not None or bool((least * most <= 0).any()):
        raise NoClaim("by what may be 0")
    ends = [torch.as_tensor(x / y) for x in (low, high) for y in (least, most)]
    return reduce(torch.minimum, ends), reduce(torch.maximum, ends)


@rule(aten.div, aten.true_divide, box=quotient_box, rounding=product_rounding)
def quotient(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """d(x / y) = dx / y - x dy / y², with the extreme values of x and y on a box where y is not 0: local only.

    An element that broadcasting puts into several quotients counts with the square root of the sum of their squared factors.
    """
    x, y = n.args[:2]
    if not walk.depends(y):
        return scale(walk, n)
    if not walk.local or arguments(n).get("rounding_mode") is not None:
        raise NoClaim("by a function of the input")
    shape, (low, high) = walk.env[n].shape, walk.box(y)
    least = torch.maximum(low, -high).double().expand(shape)  # the smallest absolute value
    if not float(least.min()) > 0:
        raise NoClaim("by what may be 0")
    met = most_met(walk.size(x).expand(shape) / least.square(), walk.env[y].shape)  # type: ignore[index]
    part = product_up(walk.bound(y), met * UP)
    if walk.depends(x):
        part += product_up(walk.bound(x), most_met(1 / least, walk.env[x].shape) * UP)  # type: ignore[index]
    return math.nextafter(part, math.inf)


def _accumulated(n: fx.Node) -> tuple[Any, Any, Any, float]:
    a = arguments(n)
    return a["self"], a["tensor1"], a["tensor2"], float(a["value"])


@rule(aten.addcmul)
def add_product(walk: LipschitzWalk, n: fx.Node) -> float:
    """x + c y z: the bounds of x and of the product add."""
    x, y, z, factor = _accumulated(n)
    if walk.depends(y) and walk.depends(z):
        if not walk.local:
            raise NoClaim("of two functions of the input")
        parts = [_met(walk, n, y, walk.size(z)), _met(walk, n, z, walk.size(y))]
    else:
        moving, constant = (y, z) if walk.depends(y) else (z, y)
        parts = [_met(walk, n, moving, walk.constant(constant).abs())] if walk.depends(moving) else []
    own = product_up(walk.bound(x), repeats(walk, n, x)) if walk.depends(x) else 0.0
    return (own + sum(product_up(part, abs(factor)) for part in parts)) * UP


def _met(walk: LipschitzWalk, n: fx.Node, moving: Any, others: Tensor) -> float:
    return product_up(walk.bound(moving), most_met(others.expand(walk.env[n].shape), walk.env[moving].shape))


def summed(walk: Any, n: fx.Node) -> tuple[int, float]:
    """A sum of as many terms as elements are reduced to one."""
    gain = walk.product([walk.affine[n]]) if n in walk.affine else math.inf
    return math.ceil(walk.elements(n.args[0]) / walk.elements(n)) + 2, gain * walk.size(n.args[0])


@rule(aten.mean, aten.sum, box=increasing, rounding=summed)
def sum_over(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """A sum over m elements has norm sqrt(m), a mean 1 / sqrt(m) (Cauchy-Schwarz)."""
    axes = axes_of(walk, n, arguments(n).get("dim"))
    source: Any = n.args[0]
    count = math.prod(walk.env[source].shape[a] for a in axes)
    factor = 1 / count if operation_of(n.target) is aten.mean else 1.0
    return linear_step(walk, n, source, norm=math.nextafter(math.sqrt(count) * factor * (1 + 1e-15), math.inf))


@rule(aten.cumsum, box=increasing)
def running_sum(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """A triangular matrix of ones along one axis."""
    (axis,), source = axes_of(walk, n, arguments(n)["dim"]), n.args[0]
    assert isinstance(source, fx.Node)
    shape = walk.shape(source)
    small = tuple(size if a == axis - 1 else 1 for a, size in enumerate(shape))
    return linear_step(walk, n, source, small=small)


def _spread(walk: Any, n: fx.Node, argument: Any) -> float:
    """Norm of an argument that is broadcast to the shape of the node's value, at most."""
    held = walk.elements(argument) if walk.depends(argument) else walk.constant(argument).numel()
    return walk.size(argument) * math.sqrt(max(1.0, walk.elements(n) / max(1.0, held))) * UP
