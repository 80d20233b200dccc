"""Rules of sums, differences, products and means: of two values, with broadcasting, or along axes of one value.

A sum or product with a constant is affine.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics import product_up
from ...operators import Shape
from ..registry import rule
from ..walk import Affine, LipschitzWalk
from .node_arguments import axes_of, given, identity, in_place, operator_of, repeats, source_of


@rule(operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, operator.isub, torch.sub, "sub", "sub_")
def add(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The branches' bounds add (triangle inequality), times sqrt(k) for a branch broadcast to k copies; a constant adds 0."""
    first, second = n.args[:2]
    alpha = abs(float(n.kwargs.get("alpha", 1)))  # type: ignore[arg-type]
    if walk.depends(first) and not walk.depends(second) and not in_place(n) and repeats(walk, n, first) == 1:
        return identity(walk, n, first)
    each = [
        product_up(walk.bound(a), repeats(walk, n, a), factor)
        for a, factor in ((first, 1.0), (second, alpha))
        if walk.depends(a)
    ]
    return each[0] if len(each) == 1 else math.nextafter(each[0] + each[1], math.inf)


@rule(operator.mul, operator.imul, torch.mul, "mul", "mul_", operator.itruediv, "div_")
def scale(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """A constant factor c is a diagonal operator of norm max |c|; two functions of the input multiply in a local walk only."""
    first, second = n.args[:2]
    divides = n.target in (operator.truediv, operator.itruediv, torch.div, "div", "div_")
    if walk.depends(first) and walk.depends(second):
        return math.inf if divides else product(walk, n, first, second)
    function, constant = (first, second) if walk.depends(first) else (second, first)
    if (divides and function is second) or n.kwargs.get("rounding_mode") is not None:
        return math.inf
    values = torch.as_tensor(walk.env[constant] if isinstance(constant, fx.Node) else constant).detach().double()
    factors = 1 / values if divides else values
    largest = float(factors.abs().max())
    largest = math.nextafter(largest, math.inf) if largest > 0 else 0.0
    if not math.isfinite(largest):
        return math.inf
    copies = repeats(walk, n, function)
    by_sample = factors.ndim == walk.env[function].ndim and factors.shape[0] != 1  # type: ignore[index]
    if largest == 0 or copies != 1 or by_sample or in_place(n):
        return product_up(walk.bound(function), largest, copies)
    assert isinstance(function, fx.Node)
    shape, factors = walk.shape(function), factors.to(walk.env[function].device)

    def times_factors(X: Tensor) -> Tensor:
        return X * factors.to(X.dtype)

    build = operator_of(walk, function, shape, times_factors, times_factors, diagonal=True)
    return Affine(function, (n.name, shape), build, largest)


def product(walk: LipschitzWalk, n: fx.Node, first: Any, second: Any) -> float:
    """‖d(x y)‖ <= max |y| ‖dx‖ + max |x| ‖dy‖, with the largest values of x and y in the box: local only.

    An element that broadcasting multiplies with several others counts with the square root of the sum of their squares.
    """
    if not walk.local:
        return math.inf
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
    return float(met.max()) * (1 + 1e-12)


@rule(torch.mean, "mean")
def mean(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """A mean over m elements has norm 1 / sqrt(m) (Cauchy-Schwarz)."""
    return _sum_over(walk, n, mean=True)


@rule(torch.sum, "sum")
def total(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """A sum over m elements has norm sqrt(m) (Cauchy-Schwarz)."""
    return _sum_over(walk, n, mean=False)


def _sum_over(walk: LipschitzWalk, n: fx.Node, mean: bool) -> float | Affine:
    axes, source = axes_of(walk, n), source_of(walk, n)
    if not axes or 0 in axes:  # over everything, or over the batch
        return math.inf
    full, keep = walk.env[source].shape, bool(given(n, "dim", "keepdim").get("keepdim", False))
    count = math.prod(full[a] for a in axes)
    factor = 1 / count if mean else 1.0
    shown = tuple(1 if a in axes else size for a, size in enumerate(full))[1:]
    out = shown if keep else tuple(size for a, size in enumerate(full) if a not in axes)[1:]
    build = operator_of(
        walk, source, out,
        lambda X: (X.sum(axes, keepdim=True) * factor).reshape(len(X), *out),
        lambda Y: (Y * factor).reshape(len(Y), *shown).expand(len(Y), *full[1:]),
    )  # fmt: skip
    return Affine(source, (n.name, tuple(full[1:])), build, math.nextafter(math.sqrt(count) * factor * (1 + 1e-15), math.inf))
