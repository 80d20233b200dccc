"""Rules of elementwise functions, whose Lipschitz constant is their largest slope, and of the identity."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...numerics import product_up
from ..registry import rule
from ..walk import Affine, LipschitzWalk
from .node_arguments import given, identity, source_of

# Largest slopes, rounded up. GELU at √2: Φ(√2) + √2 φ(√2) = 1.128904… (tanh form 1.128993…); SiLU 1.0998393…,
# Mish 1.0884…, SELU 1.0507 · 1.6733 = 1.7581….
_SLOPES: dict[float, list[Any]] = {
    1.0: [
        nn.ReLU, nn.ReLU6, nn.Tanh, nn.Hardtanh, nn.Softsign,
        F.relu, F.relu6, F.hardtanh, torch.relu, torch.tanh, torch.abs, torch.neg, operator.neg, torch.clamp,
        "relu", "relu_", "tanh", "abs", "neg", "clamp",
    ],
    0.25: [nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"],
    1.09984: [nn.SiLU, F.silu],
    1.129: [nn.GELU, F.gelu],
    1.0885: [nn.Mish, F.mish],
    1.5: [nn.Hardswish, F.hardswish],
    0.16667: [nn.Hardsigmoid, F.hardsigmoid],
    1.7581: [nn.SELU, F.selu],
}  # fmt: skip
_SLOPE_OF = {target: constant for constant, targets in _SLOPES.items() for target in targets}
_UNCHANGED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def activation_slope(module: nn.Module) -> float:
    """Largest slope of an elementwise module, rounded up; inf where it is not known."""
    if isinstance(module, nn.PReLU):
        return max(1.0, float(module.weight.detach().abs().max()))
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.ELU):
        return max(1.0, abs(module.alpha))
    if isinstance(module, nn.Softplus):  # jumps where it becomes linear, from 20 on by less than a float32 rounding
        return 1.0 if module.threshold >= 20 else math.inf
    return 1.0 if type(module) in _UNCHANGED else _SLOPE_OF.get(type(module), math.inf)


@rule(*_SLOPE_OF, nn.PReLU, nn.LeakyReLU, nn.ELU, nn.Softplus)
def elementwise(walk: LipschitzWalk, n: fx.Node) -> float:
    """An elementwise function has its largest slope as Lipschitz constant (mean value theorem)."""
    module = walk.called(n)
    slope = _SLOPE_OF[n.target] if module is None else activation_slope(module)
    return product_up(walk.bound(source_of(walk, n)), slope)


@rule(F.leaky_relu)
def leaky_relu(walk: LipschitzWalk, n: fx.Node) -> float:
    """Leaky ReLU has the larger of its two slopes as Lipschitz constant."""
    slope = given(n, "negative_slope").get("negative_slope", 0.01)
    return product_up(walk.bound(source_of(walk, n)), max(1.0, abs(float(slope))))


@rule(*_UNCHANGED, "contiguous", "float", "double", "to")
def unchanged(walk: LipschitzWalk, n: fx.Node) -> Affine:
    """The identity, in eval mode; the walk refuses casts to types other than float32 and float64."""
    return identity(walk, n, source_of(walk, n))


@rule(F.dropout)
def functional_dropout(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The identity if called with ``training=False``; otherwise no constant."""
    return math.inf if given(n, "p", "training").get("training", True) else identity(walk, n, source_of(walk, n))
