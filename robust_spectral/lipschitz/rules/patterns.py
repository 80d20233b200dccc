"""Several operations that have a smaller constant together than one by one, or one at all: what a model writes out by hand.

A pattern is recognised by its last operation. Equal subexpressions count as one value, whether or not they are one node.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...numerics import product_up
from ..table import NoClaim, operation_of, pattern
from ..walk import LipschitzWalk
from .activations import slope
from .node_arguments import UP, arguments, aten, calls, same


def multiple(walk: LipschitzWalk, node: Any) -> tuple[Any, float]:
    """A value as a number times another value: the other value, and the number."""
    factor = 1.0
    while calls(node, aten.mul, aten.div, aten.neg):
        if calls(node, aten.neg):
            node, factor = node.args[0], -factor
            continue
        first, second = node.args[:2]
        if not isinstance(second, int | float) or len(node.args) > 2 or node.kwargs or second == 0:
            break
        node, factor = first, factor * second if calls(node, aten.mul) else factor / second
    return node, factor


def plus(node: Any) -> tuple[Any, float]:
    """A value as another value plus a number: the other value, and the number."""
    if calls(node, aten.add) and isinstance(node.args[1], int | float) and not node.kwargs:
        return node.args[0], float(node.args[1])
    return node, 0.0


def fits(walk: LipschitzWalk, n: Any, x: Any) -> bool:
    """Whether a node has the shape of x, without keyword arguments such as a rounding mode."""
    return not n.kwargs and isinstance(x, fx.Node) and walk.env[n].shape == walk.env[x].shape


def _axes(walk: LipschitzWalk, node: Any) -> set[int]:
    """The axes of a reduction that keeps them; empty where it is not understood, or over the batch."""
    a = arguments(node)
    if not a.get("keepdim") or a.get("dim") is None or a.get("dtype") is not None:
        return set()
    listed = [a["dim"]] if isinstance(a["dim"], int) else a["dim"]
    axes = {axis % walk.env[node].ndim for axis in listed}
    return set() if 0 in axes else axes


@pattern(aten.sub)
def centred(walk: LipschitzWalk, n: Any) -> float | None:
    """x - mean(x) is a projection: constant 1."""
    x, mean = n.args[:2]
    if not fits(walk, n, x) or not calls(mean, aten.mean) or not same(mean.args[0], x) or not _axes(walk, mean):
        return None
    return walk.bound(x)


@pattern(aten.mul, aten.div)
def normalised(walk: LipschitzWalk, n: Any) -> float | None:
    """z / sqrt(c ‖z‖² + eps) with any c >= 0 has constant 1 / sqrt(eps), as in `own_statistics`.

    The mean square of z, or the variance of an x with z = x - mean(x), is c ‖z‖².
    """
    for z, root in ((n.args[0], n.args[1]), (n.args[1], n.args[0])):
        if calls(root, aten.pow) and root.args[1] == (0.5 if calls(n, aten.div) else -0.5):
            inside = root.args[0]
        elif calls(n, aten.div):
            inside = root.args[0] if calls(root, aten.sqrt) else None
        else:
            inside = root.args[0] if calls(root, aten.rsqrt) else None
            inside = root.args[0].args[0] if calls(root, aten.reciprocal) and calls(root.args[0], aten.sqrt) else inside
        energy, eps = plus(inside)
        if inside is not None and eps > 0 and fits(walk, n, z) and _is_energy(walk, energy, z):
            return product_up(walk.bound(z), UP / math.sqrt(eps))
        if calls(n, aten.div):
            return None
    return None


def _is_energy(walk: LipschitzWalk, energy: Any, z: Any) -> bool:
    """Whether a value is a positive multiple of the squared norm of each slice of z."""
    if calls(energy, aten.mean, aten.sum) and _axes(walk, energy):
        square = energy.args[0]
        power = (calls(square, aten.pow) and square.args[1] == 2) or calls(square, aten.square)
        product = calls(square, aten.mul) and same(square.args[0], square.args[1])
        return bool(power or product) and same(square.args[0], z)
    if calls(energy, aten.var) and (axes := _axes(walk, energy)) and calls(z, aten.sub) and not z.kwargs:
        x, mean = z.args[:2]
        return same(energy.args[0], x) and calls(mean, aten.mean) and same(mean.args[0], x) and _axes(walk, mean) == axes
    return False


@pattern(aten.div)
def unit_length(walk: LipschitzWalk, n: Any) -> float | None:
    """x / max(‖x‖, eps) has constant 1 / eps: x / eps in the ball of radius eps; outside, a projection times 1 / ‖x‖."""
    x, length = n.args[:2]
    while calls(length, aten.expand):
        length = length.args[0]
    if not calls(length, aten.clamp_min, aten.clamp) or not calls(norm := length.args[0], aten.linalg_vector_norm):
        return None
    eps, a = length.args[1], arguments(norm)
    if not isinstance(eps, int | float) or eps <= 0 or len(length.args) != 2 or length.kwargs or not fits(walk, n, x):
        return None
    if a["ord"] != 2 or a["dtype"] is not None or not same(a["self"], x) or not _axes(walk, norm):
        return None
    return product_up(walk.bound(x), UP / eps)


def elementwise_rounding(walk: Any, n: Any) -> tuple[int, float]:
    """The product of x with a function of x that is computed to within some roundings and has values up to 6."""
    roots = [multiple(walk, value) for value in n.args[:2]]
    return 64, 24 * abs(roots[0][1] * roots[1][1]) * max(walk.size(x) for x, _ in roots)


def quotient_rounding(walk: Any, n: Any) -> tuple[int, float]:
    """A sum and a quotient, of values between -1 and 1."""
    return 8, math.sqrt(walk.elements(n))


@pattern(aten.div, rounding=quotient_rounding)
def softsign(walk: LipschitzWalk, n: Any) -> float | None:
    """x / (c + |x|) has slope c / (c + |x|)² <= 1 / c."""
    x, (size, c) = n.args[0], plus(n.args[1])
    if not fits(walk, n, x) or c <= 0 or not calls(size, aten.abs) or not same(size.args[0], x):
        return None
    return product_up(walk.bound(x), UP / c)


# Largest slopes of x s(x), rounded up: SiLU 1.0998393…; x tanh x 1.1996786…; x clamp(x + 3, 0, 6) rises by 2 x + 3 <= 9.
_GATES = {aten.sigmoid: 1.09984, aten.hardsigmoid: 1.5, aten.tanh: 1.19968}


@pattern(aten.mul, rounding=elementwise_rounding)
def gated_by_itself(walk: LipschitzWalk, n: Any) -> float | None:
    """x s(x) with a bounded s, as in SiLU, Mish, GELU and hard-swish written by hand; x s(b x) has the slope of x s(x)."""
    for one, gate in ((n.args[0], n.args[1]), (n.args[1], n.args[0])):
        x, factor = multiple(walk, one)
        constant = _gate_slope(walk, x, gate)
        if constant is not None and walk.depends(x) and fits(walk, n, x):
            return product_up(walk.bound(x), abs(factor), constant)
    return None


def _gate_slope(walk: LipschitzWalk, x: Any, gate: Any) -> float | None:
    """Largest slope of x s(x) for the gate s(x); None where it is not known."""
    gate, share = multiple(walk, gate)
    if share != 1:
        whole = _gate_slope(walk, x, gate)
        return None if whole is None else product_up(whole, abs(share))
    if calls(gate, aten.sigmoid, aten.tanh):
        inner, factor = multiple(walk, gate.args[0])
        if same(inner, x) and factor != 0:
            return _GATES[operation_of(gate.target)]
        rising = (
            calls(gate, aten.tanh) and calls(inner, aten.softplus) and factor == 1 and list(inner.args[1:]) in ([], [1, 20])
        )
        return 1.0885 if rising and same(inner.args[0], x) else None
    if calls(gate, aten.hardsigmoid) and same(gate.args[0], x):
        return _GATES[aten.hardsigmoid]
    if calls(gate, aten.hardtanh, aten.clamp, aten.relu6):
        limits = [0, 6] if calls(gate, aten.relu6) else list(gate.args[1:3])
        inner, shift = plus(gate.args[0])
        return 9.0 if limits == [0, 6] and shift == 3 and same(inner, x) and not gate.kwargs else None
    shifted, one = plus(gate)
    if one == 1 and calls(shifted, aten.erf):
        inner, factor = multiple(walk, shifted.args[0])
        return 2 * 1.129 if same(inner, x) and abs(factor - math.sqrt(0.5)) < 1e-6 else None
    return None


def branches_rounding(walk: Any, n: Any) -> tuple[int, float]:
    """A product of x with a number, or a constant, in each branch."""
    x, total = n.args[0].args[0], 0.0
    for value in n.args[1:]:
        root, factor = multiple(walk, value)
        if root is not x and walk.depends(root):
            raise NoClaim("of functions other than multiples")
        total += abs(factor) * walk.size(root) * math.sqrt(walk.elements(n) if root is not x else 1.0)
    return 8, total


@pattern(aten.where, rounding=branches_rounding)
def continuous(walk: LipschitzWalk, n: Any) -> float | None:
    """One function above a threshold and another below, both elementwise and equal there: the larger of their slopes."""
    condition, above, below = n.args
    if not calls(condition, aten.gt, aten.ge, aten.lt, aten.le) or not isinstance(condition.args[1], int | float):
        return None
    x, threshold = condition.args
    slopes = [_slope_from(walk, value, x) for value in (above, below)]
    if None in slopes or not isinstance(x, fx.Node) or not walk.depends(x) or walk.env[x].shape != walk.env[n].shape:
        return None
    at = torch.full_like(walk.env[x], threshold)
    ends = [_value_at(walk, value, x, at) for value in (above, below)]
    if not torch.equal(*(end.expand(walk.env[n].shape) for end in ends)):
        return None
    return product_up(walk.bound(x), max(filter(None, slopes), default=0.0))


def _slope_from(walk: LipschitzWalk, node: Any, x: Any) -> float | None:
    """Largest slope of a value as an elementwise function of x; None if it is not known to be one."""
    if node is x:
        return 1.0
    if not walk.depends(node):
        return 0.0
    if not isinstance(node, fx.Node) or node.op != "call_function" or walk.env[node].shape != walk.env[x].shape:
        return None
    if calls(node, aten.mul, aten.div):
        value, factor = multiple(walk, node)
        inner = _slope_from(walk, value, x) if value is not node else None
        return None if inner is None else abs(factor) * inner * UP
    if calls(node, aten.add, aten.sub) and not node.kwargs:
        both = [_slope_from(walk, value, x) for value in node.args[:2]]
        return None if None in both else sum(filter(None, both)) * UP
    if any(walk.depends(value) for value in node.args[1:]):
        return None
    inner = _slope_from(walk, node.args[0], x)
    try:
        return None if inner is None else product_up(inner, slope(node))
    except NoClaim:
        return None


def _value_at(walk: LipschitzWalk, node: Any, x: Any, at: Any) -> Any:
    """A value where x has other values, through the operations between them."""
    if node is x:
        return at
    if not isinstance(node, fx.Node):
        return torch.as_tensor(node, dtype=torch.float64)
    if not walk.depends(node):
        return walk.env[node]
    return walk.rerun(node, lambda argument: _value_at(walk, argument, x, at))
