"""Local errors: how far an operation is from a linear function of its arguments, while these stay in their boxes.

An operation y = φ(z) is written as Δy = S Δz + e around the values at an image. A rule gives S, the largest |e| of each element
(``reach``), and a linear map G with ‖e‖ ≤ ‖G Δz‖ (``energy``), so that a change that is small in L2 leaves an error that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..lipschitz import NoClaim, arguments, normalisation_settings, operation_of
from .energies import Energy, Scaled

aten = torch.ops.aten
_NEAR = 1e-9  # a secant over a shorter distance, relative to 1 + |z|, is not computed
_UP = 1 + 1e-9


@dataclass(frozen=True)
class LocalError:
    """An operation as S Δz + e, for arguments in their boxes.

    Attributes:
        slope: S for each element; None for the derivative at the centre; 0.0 where e is the whole change.
        reach: Largest |e| of each element.
        energy: Maps the changes of the sources, each (k, images, ...) or None, to tensors whose joint norm is at least ‖e‖.
        size: Another bound of ‖e‖ for each image.
        pieces: For an elementwise operation, its graph: see `Pieces`.
        by_element: Whether the energy's tensors have, for each image, the elements of y once or several times, with |e_i|² at
            most the sum of their squares at i.
        linear: A linear function of a batch of arguments in place of the derivative, where ``slope`` is None.
    """

    slope: Tensor | float | None
    reach: Tensor
    energy: Energy | None = None
    size: Tensor | None = None
    pieces: Pieces | None = None
    by_element: bool = False
    linear: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Pieces:
    """The graph of an elementwise operation around the centre.

    Attributes:
        ends: Ends of pieces of Δz, in rising order.
        slopes: On piece i, from ends[i] to ends[i + 1], y changes by slopes[i] Δz + offsets[i]. Of a sector, one: e is at most
            that times |Δz|.
        offsets: See ``slopes``; empty for a sector.
        sector: Whether only the secants' range is known.
    """

    ends: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...] = ()
    sector: bool = False


RULES: dict[Any, Callable[..., LocalError]] = {}


def local(*operations: Any) -> Callable[[Any], Any]:
    """Register the local error of operations."""

    def register(rule: Any) -> Any:
        RULES.update(dict.fromkeys(operations, rule))
        return rule

    return register


def _between(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(t, low), high)


# Kinks of piecewise linear functions, by their arguments, with their least and largest slope.
def _slopes_of(walk: Any, n: fx.Node) -> tuple[Any, Any]:
    slope = arguments(n)["weight" if "weight" in arguments(n) else "negative_slope"]
    if walk.depends(slope):
        raise NoClaim("with slopes that depend on the input")
    value = walk.constant(slope)
    if value.numel() > 1:
        value = value.reshape(-1, *[1] * (walk.env[n].ndim - 2)).expand_as(walk.env[n])
    return value.clamp_max(1.0), value.clamp_min(1.0)


def _limits(n: fx.Node) -> list[float]:
    a = arguments(n)
    found = [a.get(name) for name in ("min", "max", "min_val", "max_val")]
    if any(isinstance(limit, fx.Node) for limit in found):
        raise NoClaim("with limits that are tensors")
    return [float(limit) for limit in found if limit is not None]


KINKS: dict[Any, Callable[..., tuple[list[float], Any, Any]]] = {
    aten.relu: lambda walk, n: ([0.0], 0.0, 1.0),
    aten.relu6: lambda walk, n: ([0.0, 6.0], 0.0, 1.0),
    aten.abs: lambda walk, n: ([0.0], -1.0, 1.0),
    **dict.fromkeys((aten.leaky_relu, aten.prelu, aten._prelu_kernel), lambda walk, n: ([0.0], *_slopes_of(walk, n))),
    **dict.fromkeys((aten.hardtanh, aten.clamp, aten.clip, aten.clamp_min, aten.clamp_max),
                    lambda walk, n: (_limits(n), 0.0, 1.0)),
}  # fmt: skip


@local(*KINKS)
def piecewise_linear(walk: Any, n: fx.Node) -> LocalError:
    """The secant from the centre to t is monotone in t on each piece, so that its extremes are at kinks and ends.

    Where no kink is in the box, there is no error. Where a kink is next to the centre, or nothing moves, the secants are only
    known to be between the least and largest slope.
    """
    kinks, least, most = KINKS[operation_of(n.target)](walk, n)
    z, (low, high) = walk.env[n.args[0]], walk.box(n.args[0])
    least, most = (torch.as_tensor(slope, dtype=z.dtype, device=z.device).expand_as(z) for slope in (least, most))
    ends = [low, *(_between(torch.full_like(z, kink), low, high) for kink in sorted(kinks)), high]
    values = [_value(walk, n, t) for t in ends]
    lower, upper = torch.full_like(z, math.inf), torch.full_like(z, -math.inf)
    for t, value in zip(ends, values, strict=True):
        apart = (t - z).abs() > _NEAR * (1 + z.abs())
        secant = (value - walk.env[n]) / torch.where(apart, t - z, 1.0)
        slack = 1e-15 * (2 + z.abs() + value.abs()) / (t - z).abs().clamp_min(1e-300)
        lower = torch.where(apart, torch.minimum(lower, secant - slack), lower)
        upper = torch.where(apart, torch.maximum(upper, secant + slack), upper)
    unknown = lower > upper
    for kink in kinks:
        unknown |= (z - kink).abs() <= 2 * _NEAR * (1 + z.abs())
    lower = torch.where(unknown, least, torch.maximum(lower, least))
    upper = torch.where(unknown, most, torch.minimum(upper, most))
    linear = torch.ones_like(unknown)
    for kink in kinks:
        linear &= (high < kink) | (low > kink)
    steep = _derivative(walk, n, z)
    lower, upper = (torch.where(linear, steep, slope) for slope in (lower, upper))
    slopes, offsets = [], []
    for i in range(len(ends) - 1):
        width = ends[i + 1] - ends[i]
        slope = _between(torch.where(width > 0, (values[i + 1] - values[i]) / width.clamp_min(1e-300), 0.0), least, most)
        slopes.append(slope)
        offsets.append(values[i] - walk.env[n] - slope * (ends[i] - z))
    graph = Pieces(tuple(t - z for t in ends), tuple(slopes), tuple(offsets))
    return elementwise_error(walk, n, lower, upper, graph)


def elementwise_error(walk: Any, n: fx.Node, lower: Tensor, upper: Tensor, graph: Pieces | None = None) -> LocalError:
    """The error of an elementwise function whose secants from the centre are between two slopes: S is their middle."""
    z, (low, high) = walk.env[n.args[0]], walk.box(n.args[0])
    slope, half = (lower + upper) / 2, (upper - lower) / 2 * _UP
    furthest = torch.maximum(high - z, z - low)
    graph = graph or Pieces((low - z, high - z), (half,), sector=True)
    return LocalError(slope, half * furthest, Scaled(half), pieces=graph, by_element=True)


def _value(walk: Any, n: fx.Node, t: Tensor) -> Tensor:
    return walk.rerun(n, lambda node: t if node is n.args[0] else walk.env[node])


def _derivative(walk: Any, n: fx.Node, t: Tensor) -> Tensor:
    with torch.enable_grad():
        at = t.detach().requires_grad_()
        return torch.autograd.grad(_value(walk, n, at).sum(), at)[0]


# Largest |φ''|, rounded up, with the least and largest slope: tanh 4/(3√3), sigmoid 1/(6√3), erf √(8/(π e)) · …
CURVED = {
    aten.tanh: (0.7699, 0.0, 1.0), aten.sigmoid: (0.09623, 0.0, 0.25), aten.sin: (1.0, -1.0, 1.0), aten.cos: (1.0, -1.0, 1.0),
    aten.gelu: (0.80, -0.1295, 1.1295), aten.silu: (0.5001, -0.1, 1.09984), aten.erf: (0.9679, 0.0, 1.12838),
    aten.atan: (0.6496, 0.0, 1.0), aten.log_sigmoid: (0.2501, 0.0, 1.0),
    aten.mish: (0.65, -0.115, 1.0885),
}  # fmt: skip


@local(*CURVED)
def curved(walk: Any, n: fx.Node) -> LocalError:
    """Secants from the centre are within M / 2 times the distance of the derivative there, where |φ''| ≤ M."""
    most, least, largest = CURVED[operation_of(n.target)]
    z, (low, high) = walk.env[n.args[0]], walk.box(n.args[0])
    slope, reach = _derivative(walk, n, z), torch.maximum(high - z, z - low) * (most / 2 * _UP)
    lower, upper = (slope - reach - 1e-12).clamp_min(least), (slope + reach + 1e-12).clamp_max(largest)
    return elementwise_error(walk, n, lower, upper)


@local(aten.softplus)
def softplus(walk: Any, n: fx.Node) -> LocalError:
    """Softplus has slopes from 0 to 1 and |φ''| ≤ β / 4."""
    a = arguments(n)
    beta = float(a["beta"])
    z, (low, high) = walk.env[n.args[0]], walk.box(n.args[0])
    jumps = (beta * low <= float(a["threshold"])) & (beta * high >= float(a["threshold"]))
    if beta <= 0 or bool(jumps.any()):
        raise NoClaim("where it becomes linear, with a jump")
    slope = torch.sigmoid(beta * z)
    reach = torch.maximum(high - z, z - low) * (beta / 8 * _UP)
    return elementwise_error(walk, n, (slope - reach - 1e-8).clamp_min(0.0), (slope + reach + 1e-8).clamp_max(1.0))


_CONVEX = (aten.exp, aten.log, aten.sqrt, aten.rsqrt, aten.reciprocal, aten.square, aten.pow, aten.expm1, aten.log1p)


@local(*_CONVEX)
def convex_or_concave(walk: Any, n: fx.Node) -> LocalError:
    """The secant of a convex or concave function rises or falls with its end, and lies between the derivatives at the ends."""
    low, high = walk.box(n.args[0])
    _check_domain(n, low, high)
    slopes = torch.stack([_derivative(walk, n, t) for t in (low, high)])
    if not bool(torch.isfinite(slopes).all()):
        raise NoClaim("where it is steep without limit")
    slack = 1e-9 * slopes.abs().amax(0)
    return elementwise_error(walk, n, slopes.amin(0) - slack, slopes.amax(0) + slack)


@local(aten.elu, aten.selu, aten.celu)
def exponential_below_zero(walk: Any, n: fx.Node) -> LocalError:
    """The derivative rises up to 0 and is constant above: its extremes in a box are at the ends and on both sides of 0."""
    operation, a, (low, high) = operation_of(n.target), arguments(n), walk.box(n.args[0])
    left, right = 1.0, 1.0
    if operation is aten.selu:
        left, right = 1.0507009873554805 * 1.6732632423543772, 1.0507009873554805
    elif operation is aten.elu:
        left, right = float(a["alpha"]) * float(a["scale"]) * float(a["input_scale"]), float(a["scale"])
    if not all(float(a.get(name, 1.0)) > 0 for name in ("alpha", "scale", "input_scale")):
        raise NoClaim("with a negative or no slope")
    slopes = torch.stack([_derivative(walk, n, t) for t in (low, high)])
    bends = (low <= 0) & (high >= 0)
    least, most = slopes.amin(0), slopes.amax(0)
    least = torch.where(bends, least.clamp_max(min(left, right)), least)
    most = torch.where(bends, most.clamp_min(max(left, right)), most)
    return elementwise_error(walk, n, least - 1e-9 * most, most + 1e-9 * most)


def _check_domain(n: fx.Node, low: Tensor, high: Tensor) -> None:
    operation = operation_of(n.target)
    if operation in (aten.exp, aten.square, aten.expm1):
        return
    if operation is aten.pow:
        exponent = n.args[1]
        if not isinstance(exponent, int | float):
            raise NoClaim("with an exponent that is a tensor")
        if exponent == int(exponent) and exponent > 0 and exponent % 2 == 0:
            return
    least = float(low.min()) + (1.0 if operation is aten.log1p else 0.0)
    if not (least > 0 or (operation is aten.reciprocal and float(high.max()) < 0)):
        raise NoClaim("of values that may be 0 or less")


@local(aten.mul)
def product(walk: Any, n: fx.Node) -> LocalError:
    """x s changes by x̂ Δs + ŝ Δx + Δx Δs, and |Δx Δs| ≤ ½ (b_s |Δx| + b_x |Δs|), whose square is ≤ ½ (b_s² Δx² + b_x² Δs²)."""
    first, second = n.args[:2]
    if first is second:
        z, (low, high) = walk.env[first], walk.box(first)
        return elementwise_error(walk, n, low + z, high + z)
    reaches = [walk.furthest(node) for node in (first, second)]
    half = math.sqrt(0.5) * _UP

    def energy(given: list[Any]) -> list[Tensor]:
        pairs = zip(given, reversed(reaches), strict=True)
        return [part * reach * half for part, reach in pairs if part is not None]

    return LocalError(None, (reaches[0] * reaches[1] * _UP).expand_as(walk.env[n]), energy, by_element=True)


@local(aten.matmul, aten.bmm, aten.mm)
def matrix_product(walk: Any, n: fx.Node) -> LocalError:
    """X Y changes by X̂ ΔY + ΔX Ŷ + ΔX ΔY, and ‖ΔX ΔY‖ ≤ ‖ΔX‖ ‖ΔY‖."""
    first, second = n.args[:2]
    reach = walk.furthest(first) @ walk.furthest(second) * _UP
    return LocalError(None, reach, None, walk.ball(first) * walk.ball(second) * _UP)


@local(aten.softmax, aten._softmax)
def softmax(walk: Any, n: fx.Node) -> LocalError:
    """The derivative diag(p) - p pᵀ differs from that at the centre by ≤ max |p - p̂| + ‖p - p̂‖ (‖p‖ + ‖p̂‖) in norm.

    While z is in its box, p_i is at least exp(low_i) / (exp(low_i) + Σ_{j≠i} exp(high_j)), and at most with the ends exchanged.
    """
    z, (low, high), p, dim = walk.env[n.args[0]], walk.box(n.args[0]), walk.env[n], arguments(n)["dim"]
    if dim % z.ndim == 0:
        raise NoClaim("over the batch")
    least, most = _extreme_share(low, high, dim, 1.0), _extreme_share(high, low, dim, -1.0)
    far = torch.maximum(most - p, p - least).clamp_min(0) * _UP + 1e-14
    both = most.norm(dim=dim, keepdim=True).clamp_max(1.0) + p.norm(dim=dim, keepdim=True)
    gain = (far.amax(dim, keepdim=True) + far.norm(dim=dim, keepdim=True) * both).clamp_max(1.0)
    reach = (gain * torch.maximum(high - z, z - low).norm(dim=dim, keepdim=True) * _UP).expand_as(p)
    return LocalError(None, reach, Scaled(gain * _UP))


def _extreme_share(own: Tensor, others: Tensor, dim: int, sign: float) -> Tensor:
    """The softmax of each element alone at ``own``, all others at ``others``; rounded down for sign 1, up for -1."""
    top = torch.maximum(own, others).amax(dim, keepdim=True)
    mine, rest = (own - top).exp(), (others - top).exp()
    slack = sign * 1e-14 * own.shape[dim]
    total = torch.maximum(rest.sum(dim, keepdim=True) - rest + mine + slack, mine)
    return (mine / total.clamp_min(1e-300)).clamp_max(1.0)


_BEND = 1.1548  # bound of ‖ρ² D²(u / ρ)‖ with ρ² = ‖u‖² + a²; 2 / √3 at the most


@local(aten.layer_norm, aten.group_norm, aten.instance_norm, aten.rms_norm)
def normalised(walk: Any, n: fx.Node) -> LocalError:
    """√m u / ρ(u) with ρ² = ‖u‖² + m ε for each group of m elements: the second derivative has norm ≤ (2 / √3) √m / ρ².

    So the error is ≤ √m ‖v‖² / (√3 ρ²) with v the change of u and ρ the least on the way, times max |γ|.
    """
    eps, weight, _, m = normalisation_settings(walk, n)
    z, a = walk.env[n.args[0]], arguments(n)
    lead = z.ndim - len(a["normalized_shape"]) if "normalized_shape" in a else 1
    if lead == 0 or (lead == 1 and "normalized_shape" not in a and z.ndim < 2):
        raise NoClaim("over the batch")
    groups = z.reshape(*(z.shape[:lead] if "normalized_shape" in a else (len(z), -1)), m)
    low, high = (end.expand_as(z).reshape(groups.shape) for end in walk.box(n.args[0]))
    u = groups if operation_of(n.target) is aten.rms_norm else groups - groups.mean(-1, keepdim=True)
    far = torch.maximum(high - groups, groups - low).norm(dim=-1, keepdim=True) * _UP
    energy = (u.norm(dim=-1, keepdim=True) * (1 - 1e-9) - far).clamp_min(0).square() + m * eps
    gain = math.sqrt(m) * _UP * torch.minimum(far * (_BEND / 2) / energy, 2 / energy.sqrt())
    gain = gain * (1.0 if weight is None else float(weight.abs().max()))
    whole = gain.expand_as(groups).reshape(z.shape)
    reach = (gain * far).expand_as(groups).reshape(z.shape)
    return LocalError(None, reach, Scaled(whole))
