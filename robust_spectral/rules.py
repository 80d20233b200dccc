"""The Lipschitz rules of torch's own modules and functions: for each, the bound of its value from those of its arguments.

A rule gets the walk and a node, and returns the constant from the network's input to the node's value, or inf for no claim.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from .affine import batchnorm_scale, convolution_then_batchnorm, linear_operator, norm_shape
from .graph import Walk, rule, times


@rule(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def affine_layer(walk: Walk, n: fx.Node) -> float:
    """Norm of the layer's operator."""
    module = walk.called(n)
    assert module is not None
    shape = norm_shape(module, walk.shape(n.args[0]))
    norm = walk.operator_norm((id(module), shape), lambda: linear_operator(module, shape))
    return times(walk.bound(n.args[0]), norm)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batchnorm(walk: Walk, n: fx.Node) -> float:
    """Largest |gamma| / sqrt(running_var + eps); behind a convolution or dense layer also the norm of the composite."""
    module = walk.called(n)
    assert module is not None
    previous = n.args[0]
    shape = walk.shape(previous)
    alone = times(walk.bound(previous), float(batchnorm_scale(module).abs().max()) * (1 + 1e-15))
    layer = walk.called(previous)
    if previous in walk.changed or not isinstance(layer, nn.Linear | _ConvNd):
        return alone
    if isinstance(layer, nn.Linear) and len(shape) != 1:
        return alone
    assert isinstance(previous, fx.Node)
    inner = norm_shape(layer, walk.shape(previous.args[0]))
    norm = walk.operator_norm(
        (id(layer), id(module), inner), lambda: convolution_then_batchnorm(layer, module, inner)
    )  # fmt: skip
    return min(alone, times(walk.bound(previous.args[0]), norm))


@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample)
def channelwise(walk: Walk, n: fx.Node) -> float:
    """Norm of an operator that treats every channel alike, from one channel."""
    module = walk.called(n)
    assert module is not None
    axes = len(walk.shape(n.args[0])) - 1 if isinstance(module, nn.Upsample) else int(type(module).__name__[-2])  # …Pool2d
    shape = (1, *walk.shape(n.args[0])[-axes:])
    norm = walk.operator_norm((id(module), shape), lambda: linear_operator(module, shape))
    return times(walk.bound(n.args[0]), norm)


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def max_pool(walk: Walk, n: fx.Node) -> float:
    """sqrt of the number of windows an input element can lie in, ceil(window / stride) along each axis."""
    module: Any = walk.called(n)
    axes = int(type(module).__name__[-2])
    window, stride, dilation = (v if isinstance(v, tuple) else (v,) * axes
                                for v in (module.kernel_size, module.stride, module.dilation))  # fmt: skip
    overlap = [w if d > 1 else math.ceil(w / s) for w, s, d in zip(window, stride, dilation, strict=True)]
    return times(walk.bound(n.args[0]), math.sqrt(math.prod(overlap)))


@rule(operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, operator.isub, torch.sub, "sub", "sub_")
def add(walk: Walk, n: fx.Node) -> float:
    """Bounds of the branches add; a constant counts nothing."""
    first, second = n.args[:2]
    alpha = abs(float(n.kwargs.get("alpha", 1)))  # type: ignore[arg-type]
    if _broadcast(walk, n):
        return math.inf
    return math.nextafter(walk.bound(first) + times(alpha, walk.bound(second)), math.inf)


@rule(operator.mul, operator.imul, torch.mul, "mul", "mul_", operator.truediv, operator.itruediv, torch.div, "div", "div_")
def scale(walk: Walk, n: fx.Node) -> float:
    """A constant factor counts with its largest absolute value; a product of two functions of the input has no constant."""
    first, second = n.args[:2]
    divides = n.target in (operator.truediv, operator.itruediv, torch.div, "div", "div_")
    if divides or walk.bound(second) == 0:
        function, constant = first, second
    else:
        function, constant = second, first
    if walk.bound(constant) != 0 or _broadcast(walk, n) or n.kwargs.get("rounding_mode") is not None:
        return math.inf
    sizes = torch.as_tensor(walk.env[constant] if isinstance(constant, fx.Node) else constant).detach().double().abs()
    factor = float((1 / sizes if divides else sizes).max())
    return times(walk.bound(function), factor) if math.isfinite(factor) else math.inf


def _broadcast(walk: Walk, n: fx.Node) -> bool:
    """Whether an argument that depends on the input is repeated along an axis, which would count its change several times."""
    out = walk.env.get(n)
    shapes = [walk.env[a].shape for a in n.args[:2] if isinstance(a, fx.Node) and walk.bound(a) > 0]
    wanted = out.shape if out is not None else torch.broadcast_shapes(*[
        walk.env[a].shape for a in n.args[:2] if isinstance(a, fx.Node) and isinstance(walk.env[a], Tensor)
    ])  # fmt: skip
    return any(shape != wanted for shape in shapes)


@rule(torch.cat, torch.concat)
def cat(walk: Walk, n: fx.Node) -> float:
    """Root of the sum of the branches' squares; concatenation along the batch axis is no function of one input."""
    parts: Any = n.args[0]
    axis: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)
    if axis % walk.env[parts[0]].ndim == 0:
        return math.inf
    return math.nextafter(math.hypot(*(walk.bound(part) for part in parts)), math.inf)


@rule(torch.mean, "mean")
def mean(walk: Walk, n: fx.Node) -> float:
    """A mean over m elements has norm 1 / sqrt(m)."""
    axes: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
    full = walk.env[n.args[0]].shape  # type: ignore[index]
    listed = [axes] if isinstance(axes, int) else list(axes) if axes is not None else []
    if not listed or 0 in [a % len(full) for a in listed]:
        return math.inf  # mixes the batch
    return times(walk.bound(n.args[0]), 1 / math.sqrt(math.prod(full[a] for a in listed)))


# Largest slopes, rounded up. GELU at √2: Φ(√2) + √2 φ(√2) = 1.128904… (tanh form 1.128993…); SiLU 1.0998393…,
# Mish 1.0884…, SELU 1.0507 · 1.6733 = 1.7581….
_SLOPES: dict[float, list[Any]] = {
    1.0: [
        nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten,
        nn.ReLU, nn.ReLU6, nn.Tanh, nn.Hardtanh, nn.Softsign,
        F.relu, F.relu6, torch.relu, torch.tanh, "relu", "relu_", "tanh",
        torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze,
        "flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous", "float",
    ],
    0.25: [nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"],
    1.09984: [nn.SiLU, F.silu],
    1.129: [nn.GELU, F.gelu],
    1.0885: [nn.Mish, F.mish],
    1.5: [nn.Hardswish, F.hardswish],
    0.16667: [nn.Hardsigmoid, F.hardsigmoid],
    1.7581: [nn.SELU, F.selu],
}  # fmt: skip
_SLOPE_OF = {target: constant for constant, targets in _SLOPES.items() for target in targets}


def activation_slope(module: nn.Module) -> float:
    """Largest slope of an elementwise module, rounded up; inf where it is not known."""
    if isinstance(module, nn.PReLU):
        return max(1.0, float(module.weight.detach().abs().max()))
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.ELU):
        return max(1.0, abs(module.alpha))
    if isinstance(module, nn.Softplus):  # it jumps where it turns linear, by less than a rounding from 20 on
        return 1.0 if module.threshold >= 20 else math.inf
    return _SLOPE_OF.get(type(module), math.inf)


@rule(*_SLOPE_OF, nn.PReLU, nn.LeakyReLU, nn.ELU, nn.Softplus)
def elementwise(walk: Walk, n: fx.Node) -> float:
    """Largest slope of a function applied to every element; 1 for those that only rearrange elements."""
    module = walk.called(n)
    slope = _SLOPE_OF[n.target] if module is None else activation_slope(module)
    return times(walk.bound(n.args[0]), slope)


@rule(F.dropout)
def functional_dropout(walk: Walk, n: fx.Node) -> float:
    """The identity, as long as it is told that the model is not training."""
    training = n.kwargs.get("training", n.args[2] if len(n.args) > 2 else True)
    return math.inf if training else walk.bound(n.args[0])
