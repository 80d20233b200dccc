"""Rules of matrix products and of attention, in which functions of the input are multiplied with each other.

If one factor is constant, there is a global Lipschitz constant. Otherwise ‖d(X Y)‖ <= ‖dX‖ ‖Y‖ + ‖X‖ ‖dY‖, with the factors'
largest norms on a box: local only.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...numerics import product_up
from ..boxes import Box
from ..registry import interval, rule
from ..walk import LipschitzWalk
from .node_arguments import root_of_count

_UP = 1 + 1e-10  # exceeds the rounding error of float64 arithmetic


@rule(operator.matmul, torch.matmul, "matmul", torch.bmm, "bmm", "__matmul__")
def matrix_product(walk: LipschitzWalk, n: fx.Node) -> float:
    """‖d(X Y)‖ <= ‖dX‖ ‖Y‖ + ‖X‖ ‖dY‖ with the largest norms, times sqrt(k) for a matrix broadcast to k products."""
    first, second = n.args[:2]
    if walk.depends(first) and walk.depends(second):
        if not walk.local:
            return math.inf
        pairs = (first, second), (second, first)
        parts = [product_up(walk.bound(a), _largest_norm(walk.size(b)), _repeats(walk, n, a)) for a, b in pairs]
        return math.nextafter(sum(parts), math.inf)
    function, constant = (first, second) if walk.depends(first) else (second, first)
    return product_up(walk.bound(function), _constant_norm(walk.env[constant]), _repeats(walk, n, function))  # type: ignore[index]


@interval(operator.matmul, torch.matmul, "matmul", torch.bmm, "bmm", "__matmul__")
def matrix_products(walk: LipschitzWalk, n: fx.Node) -> Box:
    """|X Y| <= |X| |Y| element by element, with the largest absolute values."""
    most = walk.size(n.args[0]) @ walk.size(n.args[1]) * _UP
    return -most, most


@rule(torch.einsum)
def einstein_sum(walk: LipschitzWalk, n: fx.Node) -> float:
    """A matrix product for each index on the axes of both factors and the result: the bound of `matrix_product`.

    An axis of one factor alone is summed over first; a sum over m elements has norm sqrt(m).
    """
    first, second, (one, other, out) = _factors(walk, n)
    both = walk.depends(first) and walk.depends(second)
    if both and not walk.local:
        return math.inf
    total = 0.0
    for moving, names, factor, axes in ((first, one, second, other), (second, other, first, one)):
        if not walk.depends(moving):
            continue
        if names[0] != out[0]:  # the batch axis is summed over, or moved
            return math.inf
        values = walk.size(factor) if both else walk.env[factor].double()
        matrices = _as_matrices(values, axes, names, out)
        gain = _largest_norm(matrices) if both else _constant_norm(matrices)
        alone = [walk.env[moving].shape[i] for i, axis in enumerate(names) if axis not in axes + out]
        total = math.nextafter(total + product_up(walk.bound(moving), gain, math.sqrt(math.prod(alone)) * _UP), math.inf)
    return total


@interval(torch.einsum)
def einstein_sums(walk: LipschitzWalk, n: fx.Node) -> Box:
    """No element exceeds that of the einsum of the largest absolute values."""
    first, second, _ = _factors(walk, n)
    most = torch.einsum(n.args[0], walk.size(first), walk.size(second)) * _UP
    return -most, most


def _factors(walk: LipschitzWalk, n: fx.Node) -> tuple[Any, Any, list[str]]:
    """The two factors of an einsum, and the axis names of the factors and of the result.

    Raises:
        ValueError: there are not two factors, the equation has no "->", or an axis has no name or a repeated one.
    """
    equation: Any = n.args[0]
    operands: Any = n.args[1] if isinstance(n.args[1], tuple | list) else n.args[1:]
    first, second = operands
    names = equation.replace(" ", "").replace("->", ",").split(",")
    if "->" not in equation or any(not part.isalpha() or len(set(part)) < len(part) for part in names):
        raise ValueError("axes without names, or named twice")
    return first, second, names


def _as_matrices(values: Tensor, axes: str, others: str, out: str) -> Tensor:
    """A factor as (shared, summed, own): axes of both factors and the result, axes summed over, and axes of this factor."""
    parts = [
        [axis for axis in axes if axis in others and axis in out],
        [axis for axis in axes if axis in others and axis not in out],
        [axis for axis in axes if axis not in others and axis in out],
    ]
    sizes = dict(zip(axes, values.shape, strict=True))
    ordered = torch.einsum(f"{axes}->{''.join(axis for part in parts for axis in part)}", values)
    return ordered.reshape([math.prod(sizes[axis] for axis in part) for part in parts])


@rule(torch.softmax, "softmax", F.softmax, nn.Softmax)
def softmax(walk: LipschitzWalk, n: fx.Node) -> float:
    """Softmax has constant 1/2: its Jacobian diag(p) - p pᵀ has absolute row sums 2 p_i (1 - p_i) <= 1/2 (Gershgorin)."""
    return product_up(walk.bound(n.args[0]), 0.5)


@rule(F.scaled_dot_product_attention)
def attention(walk: LipschitzWalk, n: fx.Node) -> float:
    """softmax(Q Kᵀ s) V has no global constant (Kim et al. 2021), but a local one by the product rule.

    ‖d out‖ <= ‖P‖ ‖dV‖ + s/2 ‖V‖ (‖K‖ ‖dQ‖ + ‖Q‖ ‖dK‖), where the softmax P has rows of sum 1, so that ‖P‖ <= sqrt(queries).
    The scale s is 1 / sqrt(head size) by default.
    """
    if not walk.local or len(n.args) != 3 or n.kwargs.get("is_causal") or n.kwargs.get("enable_gqa"):
        return math.inf
    others: dict[str, Any] = dict(n.kwargs)
    if any(walk.depends(a) for a in others.values()) or float(others.get("dropout_p") or 0.0) != 0.0:
        return math.inf
    query, key, value = n.args
    shape = walk.env[query].shape  # type: ignore[index]
    if any(walk.env[node].shape[:-2] != shape[:-2] for node in (key, value)):  # type: ignore[index]
        return math.inf
    given = others.get("scale")
    s = abs(float(given)) if given is not None else 1 / math.sqrt(shape[-1])
    sizes = {name: _largest_norm(walk.size(node)) for name, node in (("q", query), ("k", key), ("v", value))}
    terms = [
        product_up(walk.bound(value), math.nextafter(math.sqrt(shape[-2]), math.inf)),
        product_up(walk.bound(query), s * (1 + 1e-15) / 2, sizes["v"], sizes["k"]),
        product_up(walk.bound(key), s * (1 + 1e-15) / 2, sizes["v"], sizes["q"]),
    ]
    return sum(terms) * (1 + 1e-15)


@interval(torch.softmax, "softmax", F.softmax, nn.Softmax)
def shares(walk: LipschitzWalk, n: fx.Node) -> Box:
    """Softmax values lie between 0 and 1."""
    return torch.zeros_like(walk.env[n]), torch.ones_like(walk.env[n])


@interval(F.scaled_dot_product_attention)
def averages(walk: LipschitzWalk, n: fx.Node) -> Box:
    """Weighted averages lie between the smallest and the largest value; 0 where all values are masked."""
    low, high = walk.box(n.args[2])
    low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    if n.kwargs.get("attn_mask") is not None:
        low, high = low.clamp_max(0), high.clamp_min(0)
    slack = (_UP - 1) * torch.maximum(low.abs(), high.abs())
    return (low - slack).expand_as(walk.env[n]), (high + slack).expand_as(walk.env[n])


def _largest_norm(size: Tensor) -> float:
    """Bound of the spectral norms of matrices, from bounds of their elements: Frobenius, or row and column sums (Schur)."""
    frobenius = size.square().sum((-2, -1)).sqrt()
    schur = (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt()
    return float(torch.minimum(frobenius, schur).max()) * _UP


def _constant_norm(matrices: Tensor) -> float:
    """Largest spectral norm of known matrices on the last two axes, rounded up."""
    return float(torch.linalg.matrix_norm(matrices.double(), 2).max()) * _UP


def _repeats(walk: LipschitzWalk, n: fx.Node, node: Any) -> float:
    """Square root of the number of products that each matrix of a factor is broadcast to."""
    return root_of_count(math.prod(walk.env[n].shape[:-2]) / math.prod(walk.env[node].shape[:-2]))
