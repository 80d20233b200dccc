"""Matrix products, softmax and attention, in which functions of the input are multiplied with each other.

If one factor is constant, there is a global Lipschitz constant. Otherwise ‖d(X Y)‖ <= ‖dX‖ ‖Y‖ + ‖X‖ ‖dY‖, with the factors'
largest norms on a box: local only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics import product_up
from ..boxes import Box
from ..table import NoClaim, rule
from ..walk import Affine, LipschitzWalk
from .node_arguments import UP, arguments, aten, linear_step, root_of_count

_UP = 1 + 1e-10  # exceeds the rounding error of float64 arithmetic
_SMOOTH = 16


def products_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """|X Y| <= |X| |Y| element by element, with the largest absolute values."""
    most = walk.rerun(n, lambda node: walk.size(node)).abs() * _UP
    return -most, most


def product_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """A product with a constant matrix: as many terms as its inner dimension, of sum at most ‖|W|‖_F ‖x‖ for each product."""
    first, second = n.args[:2]
    function, constant = (first, second) if walk.depends(first) else (second, first)
    if walk.depends(constant):
        raise NoClaim("of two functions of the input")
    matrices = walk.constant(constant).abs()
    gain = _constant_norm(matrices if matrices.ndim > 1 else matrices[None])
    return walk.env[first].shape[-1] + 2, walk.size(function) * gain * _repeats(walk, n, function)


@rule(aten.matmul, aten.bmm, aten.mm, aten.mv, aten.dot, box=products_box, rounding=product_rounding)
def matrix_product(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """‖d(X Y)‖ <= ‖dX‖ ‖Y‖ + ‖X‖ ‖dY‖ with the largest norms, times sqrt(k) for a matrix broadcast to k products."""
    first, second = n.args[:2]
    if walk.depends(first) and walk.depends(second):
        if not walk.local:
            raise NoClaim("of two functions of the input")
        pairs = (first, second), (second, first)
        parts = [product_up(walk.bound(a), _largest_norm(walk.size(b)), _repeats(walk, n, a)) for a, b in pairs]
        return math.nextafter(sum(parts), math.inf)
    function, constant = (first, second) if walk.depends(first) else (second, first)
    assert isinstance(function, fx.Node)
    matrix = walk.constant(constant)
    norm = product_up(_constant_norm(matrix if matrix.ndim > 1 else matrix[None]), _repeats(walk, n, function))
    rows = walk.env[function].ndim > 2 or (function is first and walk.env[function].ndim == 2)
    if matrix.ndim == 2 and rows:
        return linear_step(walk, n, function, norm=norm)
    return product_up(walk.bound(function), norm)


def _scaled(n: fx.Node) -> tuple[Any, Any, Any, float, float]:
    a = arguments(n)
    first, second = (a[name] for name in (("batch1", "batch2") if "batch1" in a else ("mat1", "mat2")))
    return a["self"], first, second, float(a["beta"]), float(a["alpha"])


def sum_and_product_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The box of the summand, widened by the largest absolute value of the product."""
    summand, first, second, beta, alpha = _scaled(n)
    most = walk.size(first) @ walk.size(second) * abs(alpha) * _UP + walk.size(summand) * abs(beta) * _UP
    return -most, most


@rule(aten.addmm, aten.baddbmm, box=sum_and_product_box)
def sum_and_product(walk: LipschitzWalk, n: fx.Node) -> float:
    """β C + α X Y: the bounds of the summand and of the product add."""
    summand, first, second, beta, alpha = _scaled(n)
    both = walk.depends(first) and walk.depends(second)
    if both and not walk.local:
        raise NoClaim("of two functions of the input")
    total = 0.0
    for moving, other in ((first, second), (second, first)):
        if walk.depends(moving):
            gain = _largest_norm(walk.size(other)) if both else _constant_norm(walk.constant(other))
            total += product_up(walk.bound(moving), gain, abs(alpha), _repeats(walk, n, moving))
    if walk.depends(summand):
        copies = root_of_count(walk.env[n].numel() / walk.env[summand].numel())
        total += product_up(walk.bound(summand), abs(beta), copies)
    return total * UP


def einsum_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """No element exceeds that of the einsum of the largest absolute values."""
    first, second, _ = _factors(n)
    most = torch.einsum(n.args[0], walk.size(first), walk.size(second)) * _UP
    return -most, most


@rule(aten.einsum, box=einsum_box)
def einstein_sum(walk: LipschitzWalk, n: fx.Node) -> float:
    """A matrix product for each index on the axes of both factors and the result: the bound of `matrix_product`.

    An axis of one factor alone is summed over first; a sum over m elements has norm sqrt(m).
    """
    first, second, (one, other, out) = _factors(n)
    both = walk.depends(first) and walk.depends(second)
    if both and not walk.local:
        raise NoClaim("of two functions of the input")
    total = 0.0
    for moving, names, factor, axes in ((first, one, second, other), (second, other, first, one)):
        if not walk.depends(moving):
            continue
        if names[0] != out[0]:
            raise NoClaim("over the batch")
        values = walk.size(factor) if both else walk.constant(factor)
        matrices = _as_matrices(values, axes, names, out)
        gain = _largest_norm(matrices) if both else _constant_norm(matrices)
        alone = [walk.env[moving].shape[i] for i, axis in enumerate(names) if axis not in axes + out]
        total = math.nextafter(total + product_up(walk.bound(moving), gain, math.sqrt(math.prod(alone)) * _UP), math.inf)
    return total


def _factors(n: fx.Node) -> tuple[Any, Any, list[str]]:
    """The two factors of an einsum, and the axis names of the factors and of the result.

    Raises:
        NoClaim: there are not two factors, the equation has no "->", or an axis has no name or a repeated one.
    """
    equation: Any = n.args[0]
    operands: Any = n.args[1]
    names = equation.replace(" ", "").replace("->", ",").split(",")
    if len(operands) != 2 or "->" not in equation or any(not part.isalpha() or len(set(part)) < len(part) for part in names):
        raise NoClaim("with axes without names, or named twice")
    return operands[0], operands[1], names


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


def shares_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """Softmax values lie between 0 and 1."""
    return torch.zeros_like(walk.env[n]), torch.ones_like(walk.env[n])


def shares_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """exp(x - max) over a sum of m such terms: a relative error of at most 4 ‖x‖ u + γ_k, in a vector of norm <= 1."""
    count = walk.env[n].shape[arguments(n)["dim"]]
    return count + _SMOOTH, (2 + 8 * walk.size(n.args[0])) * math.sqrt(walk.elements(n) / count)


@rule(aten.softmax, aten._softmax, box=shares_box, rounding=shares_rounding)
def softmax(walk: LipschitzWalk, n: fx.Node) -> float:
    """Softmax has constant 1/2: its Jacobian diag(p) - p pᵀ has absolute row sums 2 p_i (1 - p_i) <= 1/2 (Gershgorin)."""
    if arguments(n)["dim"] % walk.env[n].ndim == 0 and len(walk.env[n]) == 2:
        raise NoClaim("over the batch")
    return product_up(walk.bound(n.args[0]), 0.5)


@rule(aten.log_softmax, aten._log_softmax)
def log_softmax(walk: LipschitzWalk, n: fx.Node) -> float:
    """x - log Σ exp x: its Jacobian I - 1 pᵀ has norm at most sqrt(m) for m elements, the largest at a vertex of the simplex.

    With p a distribution, ‖I - 1 pᵀ‖² is the largest eigenvalue of I - 1 pᵀ - p 1ᵀ + m p pᵀ, at most m.
    """
    if arguments(n)["dim"] % walk.env[n].ndim == 0 and len(walk.env[n]) == 2:
        raise NoClaim("over the batch")
    return product_up(walk.bound(n.args[0]), math.sqrt(walk.env[n].shape[arguments(n)["dim"]]) * UP)


def averages_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """Weighted averages lie between the smallest and the largest value; 0 where all values are masked."""
    a = arguments(n)
    low, high = walk.box(a["value"])
    low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    if a["attn_mask"] is not None:
        low, high = low.clamp_max(0), high.clamp_min(0)
    slack = (_UP - 1) * torch.maximum(low.abs(), high.abs())
    return (low - slack).expand_as(walk.env[n]), (high + slack).expand_as(walk.env[n])


@rule(aten.scaled_dot_product_attention, box=averages_box)
def attention(walk: LipschitzWalk, n: fx.Node) -> float:
    """softmax(Q Kᵀ s + M) V has no global constant (Kim et al. 2021), but a local one by the product rule.

    ‖d out‖ <= ‖P‖ ‖dV‖ + 1/2 ‖V‖ (s ‖K‖ ‖dQ‖ + s ‖Q‖ ‖dK‖ + ‖dM‖), where the softmax P has rows of sum 1, so that
    ‖P‖ <= sqrt(queries). The scale s is 1 / sqrt(head size) by default. A causal mask leaves out some keys.
    """
    a = arguments(n)
    if not walk.local:
        raise NoClaim("of functions of the input")
    if a.get("enable_gqa") or float(a["dropout_p"] or 0.0) != 0.0:
        raise NoClaim("with dropout or groups of queries")
    query, key, value, mask = (a[name] for name in ("query", "key", "value", "attn_mask"))
    shape = walk.env[query].shape
    if len(shape) < 3:
        raise NoClaim("over the batch")
    if any(walk.env[node].shape[:-2] != shape[:-2] for node in (key, value)):
        raise NoClaim("with broadcast heads")
    s = abs(float(a["scale"])) if a["scale"] is not None else 1 / math.sqrt(shape[-1])
    sizes = {name: _largest_norm(walk.size(node)) for name, node in (("q", query), ("k", key), ("v", value))}
    terms = [
        product_up(walk.bound(value), math.nextafter(math.sqrt(shape[-2]), math.inf)),
        product_up(walk.bound(query), s * (1 + 1e-15) / 2, sizes["v"], sizes["k"]),
        product_up(walk.bound(key), s * (1 + 1e-15) / 2, sizes["v"], sizes["q"]),
    ]
    if walk.depends(mask):
        scores = math.prod(shape[:-1]) * walk.env[key].shape[-2]
        terms.append(product_up(walk.bound(mask), 0.5, sizes["v"], root_of_count(scores / walk.env[mask].numel())))
    return sum(terms) * (1 + 1e-15)


def _largest_norm(size: Tensor) -> float:
    """Bound of the spectral norms of matrices, from bounds of their elements: Frobenius, or row and column sums (Schur)."""
    matrices = size if size.ndim > 1 else size[None]
    frobenius = matrices.square().sum((-2, -1)).sqrt()
    schur = (matrices.sum(-1).amax(-1) * matrices.sum(-2).amax(-1)).sqrt()
    return float(torch.minimum(frobenius, schur).max()) * _UP


def _constant_norm(matrices: Tensor) -> float:
    """Largest spectral norm of known matrices on the last two axes, rounded up."""
    return float(torch.linalg.matrix_norm(matrices, 2).max()) * _UP


def _repeats(walk: LipschitzWalk, n: fx.Node, node: Any) -> float:
    """Square root of the number of products that each matrix of a factor is broadcast to."""
    return root_of_count(max(1.0, math.prod(walk.env[n].shape[:-2]) / math.prod(walk.env[node].shape[:-2])))
