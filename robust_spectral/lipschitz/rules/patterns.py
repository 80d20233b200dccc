"""Several operations that have a smaller constant together than one by one, or one at all: what a model writes out by hand.

A pattern is recognised by its last operation. Equal subexpressions count as one value, whether or not they are one node.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ...numerics import product_up
from ..table import NoClaim, operation_of, pattern
from ..walk import LipschitzWalk
from .activations import elementwise_slope
from .arithmetic import constant_factor
from .node_arguments import UP, arguments, aten, calls, same


def multiple(node: Any) -> tuple[Any, float]:
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
    axes = {axis % walk.env[node.args[0]].ndim for axis in listed}
    return set() if 0 in axes else axes


_PAIRS = {aten.var: (aten.var_mean,), aten.std: (aten.std_mean,), aten.mean: (aten.var_mean, aten.std_mean)}


def _moment(walk: LipschitzWalk, node: Any, operation: Any) -> tuple[Any, set[int]]:
    """The value that a node is the mean, variance or standard deviation of, and along which axes; no axes where it is none."""
    if calls(node, operator.getitem) and calls(node.args[0], *_PAIRS[operation]) and node.args[1] == (operation is aten.mean):
        node = node.args[0]
    elif not calls(node, operation):
        return None, set()
    return node.args[0], _axes(walk, node)


def _centring(walk: LipschitzWalk, z: Any) -> tuple[Any, set[int]]:
    """The value x and the axes with z = x - mean(x); no axes where there are none."""
    x, mean = z.args[:2] if calls(z, aten.sub) and not z.kwargs else (None, None)
    of, axes = _moment(walk, mean, aten.mean)
    return (x, axes) if same(of, x) else (None, set())


@pattern(aten.sub)
def centred(walk: LipschitzWalk, n: Any) -> float | None:
    """x - mean(x) is a projection: constant 1."""
    x, axes = _centring(walk, n)
    return walk.bound(x) if axes and fits(walk, n, x) else None


@pattern(aten.mul, aten.div)
def normalised(walk: LipschitzWalk, n: Any) -> float | None:
    """z / r has constant 1 / m where r is sqrt(c ‖z‖² + m²), c ‖z‖ + m or max(c ‖z‖, m), with c >= 0; times constants.

    The Jacobian has the eigenvalues 1 / r and (r - ‖z‖ r') / r², with r' the slope of r as a function of ‖z‖. Both lie between
    0 and 1 / m, as 0 <= ‖z‖ r' <= r. The maximum is one of two such functions, equal where they meet.
    """
    power = 1.0 if calls(n, aten.div) else -1.0
    for z, other in (n.args[:2], n.args[1::-1])[: 1 if power == 1 else 2]:
        other, share = multiple(other)
        gain: float | None = abs(share) ** -power
        while gain is not None and isinstance(z, fx.Node):
            least = _least(walk, other, power, z)
            if least > 0 and fits(walk, n, z):
                return product_up(walk.bound(z), gain, UP / least)
            z, gain = _without_constant(walk, z, gain)
    return None


def _without_constant(walk: LipschitzWalk, node: fx.Node, gain: float) -> tuple[Any, float | None]:
    """The factor of a product that depends on the input, and the gain times the largest constant; None where it is none."""
    if not calls(node, aten.mul, aten.div) or node.kwargs or sum(map(walk.depends, node.args[:2])) != 1:
        return node, None
    try:
        function, constants = constant_factor(walk, node)
    except NoClaim:
        return node, None
    largest = float(constants.abs().max()) * UP
    return (function, product_up(gain, largest)) if largest < math.inf else (node, None)


_POWERS = {aten.sqrt: 0.5, aten.rsqrt: -0.5, aten.reciprocal: -1.0, aten.expand: 1.0}


def _least(walk: LipschitzWalk, node: Any, power: float, z: Any) -> float:
    """The smallest value m of r = node^power, for the r of `normalised`; 0 where it is none."""
    while calls(node, aten.pow, *_POWERS):
        exponent = node.args[1] if calls(node, aten.pow) else _POWERS[operation_of(node.target)]
        if not isinstance(exponent, int | float):
            return 0.0
        node, power = node.args[0], power * exponent
    inside, least = plus(node)
    if calls(node, aten.clamp_min, aten.clamp) and len(node.args) == 2 and not node.kwargs:
        inside, least = node.args
    if not isinstance(least, int | float) or not least > 1e-300 or power * _degree(walk, inside, z) != 1:
        return 0.0
    return float(least**power)


def _degree(walk: LipschitzWalk, node: Any, z: Any) -> int:
    """2 or 1 where a value is a positive multiple of ‖z‖² or ‖z‖, for slices of z along some axes; else 0."""
    if calls(node, aten.mean, aten.sum) and _axes(walk, node):
        square = node.args[0]
        power = (calls(square, aten.pow) and square.args[1] == 2) or calls(square, aten.square)
        product = calls(square, aten.mul) and same(square.args[0], square.args[1])
        return 2 if (power or product) and same(square.args[0], z) else 0
    if calls(node, aten.linalg_vector_norm) and _axes(walk, node):
        return int(arguments(node)["ord"] == 2 and same(node.args[0], z))
    x, axes = _centring(walk, z)
    for operation, degree in ((aten.var, 2), (aten.std, 1)):
        of, along = _moment(walk, node, operation)
        if axes and axes == along and same(of, x):
            return degree
    return 0


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
_SHIFTED = {aten.erf: 2 * 1.129, aten.tanh: 2 * 1.09984}  # those of x (1 + s(x)), as 1 + tanh x = 2 sigmoid(2 x)
_CUBIC = 0.044715 * math.pi / 2  # GELU's tanh form is x (1 + tanh(u + _CUBIC u³)) / 2, with u = sqrt(2 / π) x: slope <= 1.129


def gate_rounding(walk: Any, n: Any) -> tuple[int, float]:
    """The product of x with a function of x that is computed to within some roundings and has values up to 6."""
    x, factor, _ = _gate(walk, n)
    return 64, 24 * factor * walk.size(x)


@pattern(aten.mul, rounding=gate_rounding)
def gated_by_itself(walk: LipschitzWalk, n: Any) -> float | None:
    """x s(x) with a bounded s, as in SiLU, Mish, GELU and hard-swish written by hand; x s(b x) has the slope of x s(x)."""
    x, *factors = _gate(walk, n)
    return product_up(walk.bound(x), *factors) if 0 < factors[0] < math.inf else None


def _gate(walk: LipschitzWalk, n: Any) -> tuple[Any, float, float]:
    """The x of a multiple of x s(x), the absolute factor, and the largest slope of x s(x); a factor of 0 where it is none."""
    for one, gate in ((n.args[0], n.args[1]), (n.args[1], n.args[0])):
        (x, factor), (gate, share) = multiple(one), multiple(gate)
        constant = _gate_slope(x, gate) if walk.depends(x) and fits(walk, n, x) else None
        if constant is not None:
            return x, abs(factor * share), constant
    return None, 0.0, 0.0


def _gate_slope(x: Any, gate: Any) -> float | None:
    """Largest slope of x s(x) for the gate s(x); None where it is not known."""
    gate, one = plus(gate)
    if not isinstance(gate, fx.Node) or one not in (0, 1) or gate.kwargs:
        return None
    operation: Any = operation_of(gate.target)
    inner: Any = gate.args[0] if gate.args else None
    if calls(inner, aten.softplus) and operation is aten.tanh and one == 0:
        return 1.0885 if same(inner.args[0], x) and list(inner.args[1:]) in ([], [1, 20]) and not inner.kwargs else None
    terms = monomials(inner, x)
    if operation in (aten.hardtanh, aten.clamp, aten.relu6) and one == 0:
        limits = [0, 6] if operation is aten.relu6 else list(gate.args[1:3])
        return 9.0 if limits == [0, 6] and terms == {1: 1, 0: 3} else None
    if set(terms) == {1} and (operation is not aten.hardsigmoid or terms == {1: 1}):
        return (_SHIFTED if one else _GATES).get(operation)
    if set(terms) == {1, 3} and one and operation is aten.tanh:
        cube = terms[1] * terms[1] * terms[1]
        return 2 * 1.129 if abs(terms[3] - _CUBIC * cube) < 1e-7 * abs(cube) else None
    return None


def monomials(node: Any, x: Any, depth: int = 8) -> dict[int, float]:
    """A value as a sum of powers of x of different degrees: the factor of each; empty where it is not known to be one."""
    if same(node, x):
        return {1: 1.0}
    if isinstance(node, int | float):
        return {0: float(node)}
    if depth == 0 or not calls(node, aten.add, aten.mul, aten.div, aten.pow, aten.square) or node.kwargs:
        return {}
    one = monomials(node.args[0], x, depth - 1)
    if calls(node, aten.pow, aten.square):
        exponent = node.args[1] if calls(node, aten.pow) else 2
        whole = int(exponent) if len(one) == 1 and exponent in (1, 2, 3) else 0
        return {i * whole: math.prod([p] * whole) for i, p in one.items()} if whole else {}
    other = monomials(node.args[1], x, depth - 1) if one else {}
    if calls(node, aten.add):
        return one | other if other and not set(one) & set(other) else {}
    if calls(node, aten.div):
        other = {0: 1 / other[0]} if set(other) == {0} and other[0] != 0 else {}
    return {i + j: p * q for i, p in one.items() for j, q in other.items()} if 1 in (len(one), len(other)) else {}


def branches_rounding(walk: Any, n: Any) -> tuple[int, float]:
    """A product of x with a number, or a constant, in each branch."""
    x, total = n.args[0].args[0], 0.0
    for value in n.args[1:]:
        root, factor = multiple(value)
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
        value, factor = multiple(node)
        inner = _slope_from(walk, value, x) if value is not node else None
        return None if inner is None else abs(factor) * inner * UP
    if calls(node, aten.add, aten.sub) and not node.kwargs:
        both = [_slope_from(walk, value, x) for value in node.args[:2]]
        return None if None in both else sum(filter(None, both)) * UP
    if any(walk.depends(value) for value in node.args[1:]):
        return None
    inner = _slope_from(walk, node.args[0], x)
    try:
        return None if inner is None else product_up(inner, elementwise_slope(walk, node))
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
