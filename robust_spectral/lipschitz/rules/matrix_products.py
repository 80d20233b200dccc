"""Matrix products, softmax and attention, in which functions of the input are multiplied with each other.

If one factor is constant, there is a global Lipschitz constant. Otherwise ‖d(X Y)‖ <= ‖dX‖ ‖Y‖ + ‖X‖ ‖dY‖, with the factors'
largest norms on a box: local only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics import product_up
from ..boxes import Box
from ..table import NoClaim, rule
from ..walk import Affine, LipschitzWalk
from .arithmetic import weighted_sum
from .node_arguments import SUM_UP, UP, arguments, aten, axes_of, between, linear_step, root_of_count

_SMOOTH = 16


def products_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The box of a product of two matrices in boxes."""
    return sums_of_products(torch.matmul, walk.box(n.args[0]), walk.box(n.args[1]))


def sums_of_products(product: Callable[[Tensor, Tensor], Tensor], one: Box, other: Box) -> Box:
    """The box of sums of products x y of elements of two boxes.

    With positive and negative parts, x y = x⁺ y⁺ + x⁻ y⁻ - x⁺ y⁻ - x⁻ y⁺, and each of the four is smallest or largest at ends
    of the parts. A sum of numbers of one sign has a small relative rounding error. The box is also within that of |x| |y|.
    """
    (low, high), (least, most) = one, other

    def lowest(low: Tensor, high: Tensor) -> Tensor:
        added = product(low.clamp_min(0), least.clamp_min(0)) + product((-high).clamp_min(0), (-most).clamp_min(0))
        taken = product(high.clamp_min(0), (-least).clamp_min(0)) + product((-low).clamp_min(0), most.clamp_min(0))
        return added * (2 - SUM_UP) - taken * SUM_UP

    size = product(torch.maximum(high, -low), torch.maximum(most, -least)) * SUM_UP
    return torch.fmax(lowest(low, high), -size), torch.fmin(-lowest(-high, -low), size)


def product_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """A product with a constant matrix: as many terms as its inner dimension, of sum at most ‖|W|‖_F ‖x‖ for each product."""
    first, second = n.args[:2]
    function, constant = (first, second) if walk.depends(first) else (second, first)
    if walk.depends(constant):
        raise NoClaim("of two functions of the input")
    gain = _norm(walk, constant, lambda values: torch.atleast_2d(values.abs()))
    return walk.env[first].shape[-1] + 2, walk.size(function) * gain * _repeats(walk, n, function)


@rule(aten.matmul, aten.bmm, aten.mm, aten.mv, aten.dot, box=products_box, rounding=product_rounding)
def matrix_product(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The product with a constant matrix is affine; for two functions of the input see `_product`."""
    pair: Any = n.args[:2]
    first, second = pair
    function: Any = first if walk.depends(first) else second
    constant: Any = second if function is first else first
    rows = walk.env[function].ndim > 2 or (function is first and walk.env[function].ndim == 2)
    if not walk.depends(constant) and walk.env[constant].ndim == 2 and rows:
        return linear_step(walk, n, function, norm=product_up(_norm(walk, constant), _repeats(walk, n, function)))
    return _product(walk, n, first, second)


def _product(walk: LipschitzWalk, n: fx.Node, first: Any, second: Any) -> float:
    """‖d(X Y)‖ <= ‖dX‖ ‖Y‖ + ‖X‖ ‖dY‖ with the largest norms, times sqrt(k) for a matrix broadcast to k products."""
    pairs = (first, second), (second, first)
    parts = [product_up(walk.bound(a), _norm(walk, b), _repeats(walk, n, a)) for a, b in pairs if walk.depends(a)]
    return math.nextafter(sum(parts), math.inf) if len(parts) > 1 else sum(parts)


def _scaled(n: fx.Node) -> tuple[Any, Any, Any, float, float]:
    a = arguments(n)
    first, second = (a[name] for name in (("batch1", "batch2") if "batch1" in a else ("mat1", "mat2")))
    return a["self"], first, second, float(a["beta"]), float(a["alpha"])


def sum_and_product_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The box of the product and that of the summand, each times its factor."""
    summand, first, second, beta, alpha = _scaled(n)
    product = sums_of_products(torch.matmul, walk.box(first), walk.box(second))
    return weighted_sum([(walk.box(summand), beta), (product, alpha)])


@rule(aten.addmm, aten.baddbmm, box=sum_and_product_box)
def sum_and_product(walk: LipschitzWalk, n: fx.Node) -> float:
    """β C + α X Y: the bounds of the summand and of the product add."""
    summand, first, second, beta, alpha = _scaled(n)
    total = product_up(_product(walk, n, first, second), abs(alpha)) if walk.depends([first, second]) else 0.0
    if walk.depends(summand):
        copies = root_of_count(walk.env[n].numel() / walk.env[summand].numel())
        total += product_up(walk.bound(summand), abs(beta), copies)
    return total * UP


def einsum_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """An element of the result is a sum of products."""
    first, second, _ = _factors(n)
    return sums_of_products(partial(torch.einsum, n.args[0]), walk.box(first), walk.box(second))


@rule(aten.einsum, box=einsum_box)
def einstein_sum(walk: LipschitzWalk, n: fx.Node) -> float:
    """A matrix product for each index on the axes of both factors and the result: the bound of `matrix_product`.

    An axis of one factor alone is summed over first; a sum over m elements has norm sqrt(m).
    """
    first, second, (one, other, out) = _factors(n)
    total = 0.0
    for moving, names, factor, axes in ((first, one, second, other), (second, other, first, one)):
        if not walk.depends(moving):
            continue
        if names[0] != out[0]:
            raise NoClaim("over the batch")
        gain = _norm(walk, factor, partial(_as_matrices, axes=axes, others=names, out=out))
        alone = [walk.env[moving].shape[i] for i, axis in enumerate(names) if axis not in axes + out]
        total = math.nextafter(total + product_up(walk.bound(moving), gain, math.sqrt(math.prod(alone)) * SUM_UP), math.inf)
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


def shares_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """exp(x - max) over a sum of m such terms: a relative error of at most 4 ‖x‖ u + γ_k, in a vector of norm <= 1."""
    count = walk.env[n].shape[arguments(n)["dim"]]
    return count + _SMOOTH, (2 + 8 * walk.size(n.args[0])) * math.sqrt(walk.elements(n) / count)


@rule(aten.softmax, aten._softmax, box=between(0.0, 1.0), rounding=shares_rounding)
def softmax(walk: LipschitzWalk, n: fx.Node) -> float:
    """Softmax has constant 1/2: its Jacobian diag(p) - p pᵀ has absolute row sums 2 p_i (1 - p_i) <= 1/2 (Gershgorin)."""
    axes_of(walk, n, arguments(n)["dim"])
    return product_up(walk.bound(n.args[0]), 0.5)


@rule(aten.log_softmax, aten._log_softmax)
def log_softmax(walk: LipschitzWalk, n: fx.Node) -> float:
    """x - log Σ exp x: its Jacobian I - 1 pᵀ has norm at most sqrt(m) for m elements, the largest at a vertex of the simplex.

    With p a distribution, ‖I - 1 pᵀ‖² is the largest eigenvalue of I - 1 pᵀ - p 1ᵀ + m p pᵀ, at most m.
    """
    (axis,) = axes_of(walk, n, arguments(n)["dim"])
    return product_up(walk.bound(n.args[0]), math.sqrt(walk.env[n].shape[axis]) * UP)


def averages_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """Weighted averages lie between the smallest and the largest value; 0 where all values are masked."""
    a = arguments(n)
    low, high = walk.box(a["value"])
    low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    if a["attn_mask"] is not None:
        low, high = low.clamp_max(0), high.clamp_min(0)
    slack = (SUM_UP - 1) * torch.maximum(low.abs(), high.abs())
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


def _largest_norm(matrices: Tensor) -> float:
    """Bound of the spectral norms of matrices, from bounds of their elements: Frobenius, or row and column sums (Schur)."""
    frobenius = matrices.square().sum((-2, -1)).sqrt()
    schur = (matrices.sum(-1).amax(-1) * matrices.sum(-2).amax(-1)).sqrt()
    return float(torch.minimum(frobenius, schur).max()) * SUM_UP


def _norm(walk: LipschitzWalk, factor: Any, matrices: Callable[[Tensor], Tensor] = torch.atleast_2d) -> float:
    """Largest spectral norm of a factor's matrices on the last two axes, rounded up: of a function of the input on the box."""
    if not walk.depends(factor):
        return float(torch.linalg.matrix_norm(matrices(walk.constant(factor)), 2).max()) * SUM_UP
    if not walk.local:
        raise NoClaim("of two functions of the input")
    return _largest_norm(matrices(walk.size(factor)))


def _repeats(walk: LipschitzWalk, n: fx.Node, node: Any) -> float:
    """Square root of the number of products that each matrix of a factor is broadcast to."""
    return root_of_count(max(1.0, math.prod(walk.env[n].shape[:-2]) / math.prod(walk.env[node].shape[:-2])))
