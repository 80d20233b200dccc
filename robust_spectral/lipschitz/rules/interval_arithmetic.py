"""Interval rules: a box that contains a node's values, from the boxes of its arguments; the walk rounds it outward."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...operators import batchnorm_scale
from ..boxes import Box
from ..registry import INTERVALS, interval
from ..walk import LipschitzWalk
from .node_arguments import given

_ROUNDINGS = 1e-10  # relative to the sum of absolute products; exceeds the rounding error of float64


@interval(
    nn.ReLU, nn.ReLU6, nn.Tanh, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Identity, nn.Dropout,
    F.relu, F.relu6, F.hardtanh, F.sigmoid, F.hardsigmoid, torch.relu, torch.tanh, torch.sigmoid,
    "relu", "relu_", "tanh", "sigmoid", "sigmoid_", "clamp", torch.clamp,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    operator.add, operator.iadd, torch.add, "add", "add_", torch.cat, torch.concat, torch.stack, torch.mean, "mean",
    torch.sum, "sum", "amax", "amin", torch.amax, torch.amin,
    nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose,
    torch.roll, torch.chunk, torch.split, torch.unbind, torch.tensor_split, torch.flip, F.pad, operator.getitem,
    "flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "permute", "transpose", "roll", "chunk", "split",
    "unbind", "tensor_split", "flip", "t", "movedim", "narrow", "select", "swapaxes", "expand", "expand_as", "repeat",
    "contiguous", "clone", torch.tile, "repeat_interleave", "reshape_as", "view_as", getattr,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.SELU, F.selu, nn.Unfold, F.unfold, "unfold", nn.Fold, F.fold,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip
def increasing_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """A function that increases with every argument is smallest and largest at the ends of their boxes."""
    if n.kwargs.get("alpha", 1) != 1:
        raise ValueError("alpha may be negative")
    return _again(walk, n, 0), _again(walk, n, 1)


# Smallest values, rounded down: SiLU -0.278464…, GELU -0.169971… (tanh form -0.170041…), Mish -0.308840…, Hardswish -3/8.
_LOWEST = {nn.SiLU: -0.2785, F.silu: -0.2785, nn.GELU: -0.1701, F.gelu: -0.1701, nn.Mish: -0.3089, F.mish: -0.3089,
           nn.Hardswish: -0.375, F.hardswish: -0.375}  # fmt: skip


@interval(*_LOWEST)
def falling_then_rising(walk: LipschitzWalk, n: fx.Node) -> Box:
    """A function that falls and then rises is largest at an end, and no smaller than its minimum."""
    module = walk.called(n)
    lowest = _LOWEST[type(module) if module is not None else n.target]
    ends = _again(walk, n, 0), _again(walk, n, 1)
    return torch.minimum(*ends).clamp_max(lowest), torch.maximum(*ends)


def activation_box(module: nn.Module, box: Box) -> Box:
    """The box after an elementwise module that rises, or falls and then rises.

    Raises:
        ValueError: the module is not known to do either.
    """
    if type(module) not in _LOWEST and INTERVALS.get(type(module)) is not increasing_box:
        raise ValueError(f"{type(module).__name__} is not known to rise")
    low, high = (module(end.clone()) for end in box)
    return torch.minimum(low, high).clamp_max(_LOWEST.get(type(module), math.inf)), torch.maximum(low, high)


@interval(operator.sub, operator.isub, torch.sub, "sub", "sub_")
def difference(walk: LipschitzWalk, n: fx.Node) -> Box:
    """x - y lies between low(x) - high(y) and high(x) - low(y)."""
    (low, high), (other_low, other_high) = walk.box(n.args[0]), walk.box(n.args[1])
    if n.kwargs:
        raise ValueError("a factor alpha")
    return low - other_high, high - other_low


@interval(operator.mul, operator.imul, torch.mul, "mul", "mul_")
def multiplied(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The smallest and the largest product of two intervals are products of their ends."""
    one, other = walk.box(n.args[0]), walk.box(n.args[1])
    products = [torch.as_tensor(a * b) for a in one for b in other]
    low, high = products[0], products[0]
    for value in products[1:]:
        low, high = torch.minimum(low, value), torch.maximum(high, value)
    return low, high


@interval("float", "double", "to", "type_as")
def cast(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The same values; `rounds` rules account for the rounding of a cast."""
    return walk.box(n.args[0])


@interval(operator.neg, torch.neg, "neg")
def opposite(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The negated ends, exchanged."""
    low, high = walk.box(n.args[0])
    return -high, -low


@interval(torch.abs, "abs")
def absolute(walk: LipschitzWalk, n: fx.Node) -> Box:
    """From the smallest to the largest distance to 0 in the interval."""
    low, high = walk.box(n.args[0])
    return torch.maximum(low, -high).clamp_min(0), torch.maximum(low.abs(), high.abs())


@interval(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def linear_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """W x + b maps the box of centre c and radius r into the box of centre W c + b and radius |W| r."""
    module: Any = walk.called(n)
    low, high = walk.box(n.args[0])
    centre, radius = (low + high) / 2, (high - low) / 2
    absolute = {"weight": module.weight.abs()} | ({} if module.bias is None else {"bias": torch.zeros_like(module.bias)})
    reach = torch.func.functional_call(module, absolute, (radius + _ROUNDINGS * (centre.abs() + radius),))
    middle = module(centre)
    return middle - reach, middle + reach


@interval(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batchnorm_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The images of the ends, exchanged in channels whose factor is negative."""
    module: Any = walk.called(n)
    low, high = walk.box(n.args[0])
    scale = batchnorm_scale(module).reshape(-1, *[1] * (low.ndim - 2)).abs()
    offset: Any = 0.0 if module.bias is None else module.bias.reshape(-1, *[1] * (low.ndim - 2)).abs()
    mean = module.running_mean.reshape(-1, *[1] * (low.ndim - 2)).abs()
    slack = _ROUNDINGS * (scale * (low.abs() + high.abs() + mean) + offset)
    ends = (
        F.batch_norm(low, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps),
        F.batch_norm(high, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps),
    )
    return torch.minimum(*ends) - slack, torch.maximum(*ends) + slack


@interval(nn.LayerNorm, nn.GroupNorm, F.layer_norm, F.group_norm)
def normalised(walk: LipschitzWalk, n: fx.Node) -> Box:
    """A normalised vector of m elements has norm <= sqrt(m), which also bounds each element; then times γ, plus β."""
    module: Any = walk.called(n)
    value: Tensor = walk.env[n]
    if module is None:
        told = given(n, "over", "weight", "bias", "eps")
        over: Any = told.get("over", told.get("normalized_shape", told.get("num_groups")))
        weight, bias = (None if told.get(name) is None else walk.env[told[name]] for name in ("weight", "bias"))
    else:
        over, weight, bias = getattr(module, "normalized_shape", None) or module.num_groups, module.weight, module.bias
    grouped = isinstance(over, int)
    count = value[0].numel() // over if grouped else math.prod(over)
    shape = (-1, *[1] * (value.ndim - 2)) if grouped else tuple(over)
    gain = value.new_ones(()) if weight is None else weight.abs().reshape(shape)
    offset = value.new_zeros(()) if bias is None else bias.reshape(shape)
    reach = gain * count**0.5 * (1 + 1e-12) + _ROUNDINGS * offset.abs()
    return (offset - reach).expand_as(value), (offset + reach).expand_as(value)


def _again(walk: LipschitzWalk, n: fx.Node, end: int) -> Any:
    """The node's value at one end of its arguments' boxes."""

    def argument(node: fx.Node) -> Any:
        value = walk.box(node)[end]
        return value.clone() if isinstance(value, Tensor) else value

    return walk.rerun(n, argument)
