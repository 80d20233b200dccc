"""Elementwise functions, whose Lipschitz constant is their largest slope, and the identity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...numerics import product_up
from ..boxes import Box
from ..table import NoClaim, operation_of, rule
from ..walk import Affine, LipschitzWalk
from .node_arguments import (
    arguments,
    aten,
    between,
    exact,
    identity,
    increasing,
    repeats,
    selected,
)

_SMOOTH = 16  # roundings of an elementary function and the arithmetic around it

# Largest slopes, rounded up. GELU at √2: Φ(√2) + √2 φ(√2) = 1.128904… (tanh form 1.128993…); SiLU 1.0998393…,
# Mish 1.0884…; erf 2 / √π = 1.1283791…. Below, the smallest values, rounded down: SiLU -0.278464…, GELU -0.169971… (tanh form
# -0.170041…), Mish -0.308840…, Hardswish -3/8.
_SLOPES = {
    aten.relu: 1.0, aten.relu6: 1.0, aten.tanh: 1.0, aten.hardtanh: 1.0, aten.sin: 1.0, aten.cos: 1.0, aten.abs: 1.0,
    aten.neg: 1.0, aten.clamp: 1.0, aten.clamp_min: 1.0, aten.clamp_max: 1.0, aten.sigmoid: 0.25, aten.silu: 1.09984,
    aten.clip: 1.0, aten.gelu: 1.129, aten.mish: 1.0885, aten.hardswish: 1.5, aten.hardsigmoid: 0.16667, aten.erf: 1.12838,
    aten.atan: 1.0, aten.log_sigmoid: 1.0,
    aten.softshrink: 1.0, aten.celu: 1.0, aten.softplus: 1.0, aten.asinh: 1.0, aten.selu: 1.7581,
}  # fmt: skip
_PRELU = (aten.prelu, aten._prelu_kernel)
_LOWEST = {aten.silu: -0.2785, aten.gelu: -0.1701, aten.mish: -0.3089, aten.hardswish: -0.375}


def elementwise_slope(walk: LipschitzWalk, n: fx.Node) -> float:
    """Largest slope of an elementwise operation of one argument, rounded up; walk may be of any kind.

    Raises:
        NoClaim: it is not known, or the function jumps.
    """
    operation, a = operation_of(n.target), arguments(n)
    if operation is aten.leaky_relu:
        return max(1.0, abs(float(a["negative_slope"])))
    if operation in _PRELU:
        return max(1.0, float(walk.constant(a["weight"]).abs().max()))
    if operation is aten.elu:
        if float(a["input_scale"]) < 0:
            raise NoClaim("with a negative scale")
        rising, scale = abs(float(a["alpha"])) * abs(float(a["input_scale"])), abs(float(a["scale"]))
        return product_up(scale, max(1.0, rising))
    if operation is aten.softplus and float(a["threshold"]) < 20:  # jumps where it becomes linear, by exp(-threshold) / beta
        raise NoClaim("that becomes linear early, with a jump")
    if operation is aten.celu and not float(a["alpha"]) > 0:
        raise NoClaim("with a negative alpha")
    if operation not in _SLOPES:
        raise NoClaim
    return _SLOPES[operation]


def elementwise(walk: LipschitzWalk, n: fx.Node) -> float:
    """An elementwise function has its largest slope as Lipschitz constant (mean value theorem)."""
    a = arguments(n)
    if any(walk.depends(value) for name, value in a.items() if name not in ("self", "input")):
        raise NoClaim("with parameters that depend on the input")
    return product_up(walk.bound(n.args[0]), elementwise_slope(walk, n), repeats(walk, n, n.args[0]))


def smooth(walk: Any, n: fx.Node) -> tuple[int, float]:
    """An elementary function f, computed to within some roundings of its argument and value; slope <= 2 and |f(0)| <= 1.

    Softplus with beta computes log(1 + exp(beta x)) / beta, with |f(0)| = log 2 / beta. Where it turns into the identity, at
    beta x = threshold, it jumps by less than exp(-threshold) / beta.
    """
    if not elementwise_slope(walk, n) <= 2:
        raise NoClaim("with a slope above 2")
    offset = 1.0
    if operation_of(n.target) is aten.softplus:
        a = arguments(n)
        beta = float(a["beta"])
        jump = math.exp(-float(a["threshold"])) / beta / (_SMOOTH * walk.unit)
        offset = max(1.0, 1 / beta) + jump if beta > 0 else math.inf
    return _SMOOTH, 3 * walk.size(n.args[0]) + offset * math.sqrt(walk.elements(n))


def falling_then_rising(walk: LipschitzWalk, n: fx.Node) -> Box:
    """A function that falls and then rises is largest at an end, and no smaller than its minimum."""
    ends = increasing(walk, n)
    cancelled = 1e-15 * walk.size(n.args[0])  # in x (1 + erf(x)), for negative x
    return torch.minimum(*ends).clamp_max(_LOWEST[operation_of(n.target)]), torch.maximum(*ends) + cancelled


def absolute(walk: LipschitzWalk, n: fx.Node) -> Box:
    """From the smallest to the largest distance to 0 in the interval."""
    low, high = walk.box(n.args[0])
    return torch.maximum(low, -high).clamp_min(0), torch.maximum(low.abs(), high.abs())


rule(aten.relu, aten.relu6, box=increasing, rounding=exact)(elementwise)
rule(aten.hardtanh, aten.clamp, aten.clip, aten.clamp_min, aten.clamp_max, box=increasing, rounding=selected)(elementwise)
rule(
    aten.tanh, aten.sigmoid, aten.hardsigmoid, aten.softplus, aten.erf, aten.atan, aten.log_sigmoid, aten.celu, aten.softshrink,
    aten.asinh, aten.selu, box=increasing, rounding=smooth,
)(elementwise)  # fmt: skip
rule(*_LOWEST, box=falling_then_rising, rounding=smooth)(elementwise)
rule(aten.abs, box=absolute, rounding=exact)(elementwise)
rule(aten.sin, aten.cos, box=between(-1.0, 1.0), rounding=smooth)(elementwise)
rule(aten.neg, box=lambda walk, n: increasing(walk, n)[::-1], rounding=exact)(elementwise)


def rising_slopes(walk: LipschitzWalk, n: fx.Node) -> Box:
    """Leaky ReLU, PReLU and ELU rise where no slope is negative."""
    slopes = [a for name, a in arguments(n).items() if name != "self"]
    if min(float(walk.constant(value).min()) for value in slopes) < 0:
        raise NoClaim("with a negative slope")
    return increasing(walk, n)


def slope_times(walk: Any, n: fx.Node) -> tuple[int, float]:
    """One product with a slope."""
    return 2, walk.size(n.args[0]) * repeats(walk, n, n.args[0]) * elementwise_slope(walk, n)


rule(aten.leaky_relu, *_PRELU, box=rising_slopes, rounding=slope_times)(elementwise)
rule(aten.elu, box=rising_slopes, rounding=smooth)(elementwise)


@rule(aten.dropout, aten.alpha_dropout, aten.feature_dropout, box=increasing, rounding=exact)
def dropout(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The identity in eval mode."""
    a = arguments(n)
    if a["train"] and a["p"] > 0:
        raise NoClaim("that draws random numbers")
    return identity(walk, n, n.args[0])  # type: ignore[arg-type]


def cast_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """One rounding, to another floating-point type."""
    return 1, walk.size(n.args[0])


@rule(aten._to_copy, aten.to, aten.type_as, box=increasing, rounding=cast_rounding)
def cast(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The identity, between float32 and float64; the walk refuses other types."""
    if not walk.depends(n.args[0]):
        return 0.0
    if not walk.env[n.args[0]].is_floating_point():  # type: ignore[index]
        raise NoClaim("of whole numbers or a comparison, which jump")
    return identity(walk, n, n.args[0])  # type: ignore[arg-type]
