"""Sums, differences and products, means and sums along axes; a sum or product with a constant is affine."""

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
from ..walk import Affine, LipschitzWalk, is_decision
from .node_arguments import UP, arguments, aten, axes_of, identity, linear_step, repeats, sums


def _terms(n: fx.Node) -> list[tuple[Any, float]]:
    """The two terms of a sum or difference, each with its factor."""
    a, operation = arguments(n), operation_of(n.target)
    alpha = float(a.get("alpha") or 1.0) if a.get("alpha") != 0 else 0.0
    if operation is aten.rsub:
        return [(a["self"], -alpha), (a["other"], 1.0)]
    return [(a["self"], 1.0), (a["other"], -alpha if operation is aten.sub else alpha)]


def sum_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The ends of a c x + d y are sums of ends, exchanged where a factor is negative."""
    return weighted_sum([(walk.box(value), factor) for value, factor in _terms(n)])


def weighted_sum(terms: list[tuple[Box, float]]) -> Box:
    """The box of a sum of values in boxes, each times a number; products with numbers other than 1 and -1 round."""
    ends = [[factor * torch.as_tensor(end) for end in (box if factor >= 0 else box[::-1])] for box, factor in terms]
    low, high = (reduce(torch.add, end) for end in zip(*ends, strict=True))
    rounding = [torch.maximum(*map(torch.abs, end)) for end, (_, factor) in zip(ends, terms, strict=True) if abs(factor) != 1]
    slack = reduce(torch.add, rounding) * 1e-15 if rounding else 0.0
    return low - slack, high + slack


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
    function, factors = constant_factor(walk, n)
    return 3, _spread(walk, n, function) * float(factors.abs().max()) * UP


def constant_factor(walk: LipschitzWalk, n: fx.Node) -> tuple[fx.Node, Tensor]:
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
    function, factors = constant_factor(walk, n)
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
    if any(walk.bound(value) == math.inf and is_decision(walk.env[value]) for value in (first, second)):
        raise NoClaim("by a comparison of the input, which jumps")
    pairs = [(moving, other) for moving, other in ((first, second), (second, first)) if walk.depends(moving)]
    if len(pairs) == 2 and not walk.local:
        raise NoClaim("of two functions of the input")
    each = [_met(walk, n, a, walk.size(b) if walk.depends(b) else walk.constant(b).abs()) for a, b in pairs]
    return math.nextafter(sum(each), math.inf)


def most_met(others: Tensor, shape: Shape) -> float:
    """Largest norm of the ``others`` (>= 0) that multiply one element of a tensor of shape ``shape`` by broadcasting."""
    own = (1,) * (others.ndim - len(shape)) + tuple(shape)
    repeated = [axis for axis, (one, all_) in enumerate(zip(own, others.shape, strict=True)) if one != all_]
    met = others.square().sum(repeated).sqrt() if repeated else others
    return float(met.max()) * UP


@rule(aten.addcmul)
def add_product(walk: LipschitzWalk, n: fx.Node) -> float:
    """x + c y z: the bounds of x and of the product add."""
    a = arguments(n)
    x, y, z = a["self"], a["tensor1"], a["tensor2"]
    own = product_up(walk.bound(x), repeats(walk, n, x)) if walk.depends(x) else 0.0
    return (own + product_up(_product(walk, n, y, z), abs(float(a["value"])))) * UP


def _met(walk: LipschitzWalk, n: fx.Node, moving: Any, others: Tensor) -> float:
    return product_up(walk.bound(moving), most_met(others.expand(walk.env[n].shape), walk.env[moving].shape))


def summed(walk: Any, n: fx.Node) -> tuple[int, float]:
    """A sum of as many terms as elements are reduced to one."""
    gain = walk.product([walk.affine[n]]) if n in walk.affine else math.inf
    return math.ceil(walk.elements(n.args[0]) / walk.elements(n)) + 2, gain * walk.size(n.args[0])


@rule(aten.mean, aten.sum, box=sums, rounding=summed)
def sum_over(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """A sum over m elements has norm sqrt(m), a mean 1 / sqrt(m) (Cauchy-Schwarz)."""
    axes = axes_of(walk, n, arguments(n).get("dim"))
    source: Any = n.args[0]
    count = math.prod(walk.env[source].shape[a] for a in axes)
    factor = 1 / count if operation_of(n.target) is aten.mean else 1.0
    return linear_step(walk, n, source, norm=math.nextafter(math.sqrt(count) * factor * (1 + 1e-15), math.inf))


@rule(aten.cumsum, box=sums)
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
