"""Rounding rules: the number of terms that an operation sums, and a bound of the sum of their absolute values."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...operators import batchnorm_scale
from ..registry import rounds
from ..rounding_walk import RoundingWalk, Terms
from .activations import activation_slope
from .node_arguments import given, source_of

_SMOOTH = 16  # roundings of an elementary function and the arithmetic around it


@rounds(
    nn.ReLU, nn.ReLU6, nn.Hardtanh, F.relu, F.relu6, F.hardtanh, torch.relu, "relu", "relu_", torch.abs, torch.neg,
    operator.neg, torch.clamp, "abs", "neg", "clamp",
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, "amax", "amin", torch.amax, torch.amin,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout, nn.Flatten, nn.Unflatten, torch.flatten,
    torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose, torch.roll, torch.flip, F.pad, getattr,
    torch.cat, torch.concat, torch.stack, torch.chunk, torch.split, torch.unbind, torch.tensor_split, operator.getitem,
    "flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "permute", "transpose", "roll", "chunk", "split",
    "unbind", "tensor_split", "flip", "t", "movedim", "narrow", "select", "swapaxes", "expand", "expand_as", "repeat",
    "contiguous", "clone", nn.Unfold, F.unfold, "unfold",
)  # fmt: skip
def not_rounded(walk: RoundingWalk, n: fx.Node) -> Terms:
    """Selections, comparisons and changes of sign are exact; an affine one has every element of its argument once."""
    return 0, walk.size(walk.affine[n].source) if n in walk.affine else math.inf


@rounds(nn.LeakyReLU, nn.PReLU)
def slope_times(walk: RoundingWalk, n: fx.Node) -> Terms:
    """One product with a slope."""
    return 2, walk.size(n.args[0]) * activation_slope(_called(walk, n))


@rounds(
    nn.Tanh, nn.Sigmoid, nn.Softsign, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.SELU, nn.ELU, nn.Softplus,
    torch.tanh, torch.sigmoid, F.sigmoid, F.silu, F.gelu, F.mish, F.hardswish, F.hardsigmoid, F.selu, "tanh", "sigmoid",
)  # fmt: skip
def smooth(walk: RoundingWalk, n: fx.Node) -> Terms:
    """An elementary function f, computed to within some roundings of its argument and value; slope <= 2 and |f(0)| <= 0.7."""
    module = walk.called(n)
    if module is not None and not activation_slope(module) <= 2:
        raise ValueError("a slope above 2")
    if isinstance(module, nn.Softplus) and module.beta < 1:
        raise ValueError("beta below 1")
    return _SMOOTH, 3 * walk.size(n.args[0]) + 0.7 * math.sqrt(walk.elements(n))


@rounds(operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, operator.isub, torch.sub, "sub", "sub_")
def sum_of_two(walk: RoundingWalk, n: fx.Node) -> Terms:
    """One addition, and a product with ``alpha``."""
    alpha = abs(float(n.kwargs.get("alpha", 1)))  # type: ignore[arg-type]
    return 2, _spread(walk, n, n.args[0]) + alpha * _spread(walk, n, n.args[1])


@rounds(operator.mul, operator.imul, torch.mul, "mul", "mul_", operator.truediv, operator.itruediv, torch.div, "div", "div_")
def scaled(walk: RoundingWalk, n: fx.Node) -> Terms:
    """A product with a constant, or a quotient by one."""
    first, second = n.args[:2]
    function, constant = (first, second) if walk.depends(first) else (second, first)
    values = torch.as_tensor(walk.env[constant] if isinstance(constant, fx.Node) else constant).double().abs()
    divides = n.target in (operator.truediv, operator.itruediv, torch.div, "div", "div_")
    return 3, _spread(walk, n, function) * float((1 / values if divides else values).max()) * (1 + 1e-12)


@rounds(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def linear_rounding(walk: RoundingWalk, n: fx.Node) -> Terms:
    """One product for each weight of an output, and the bias; the sum of absolute values, |W| |x|, has norm <= ‖|W|‖ ‖x‖.

    ‖|W|‖² is at most the largest row sum times the largest column sum (Schur), and at most ‖W‖_F² for a dense layer.
    """
    module = _called(walk, n)
    weight: Tensor = module.weight.detach().double()
    absolute = {"weight": module.weight.detach().abs()}
    offset = 0.0
    if module.bias is not None:
        absolute["bias"] = torch.zeros_like(module.bias)
        positions = walk.elements(n) / len(module.bias)
        offset = float(module.bias.detach().double().norm()) * math.sqrt(positions)
    with torch.enable_grad():
        ones = torch.ones_like(walk.env[n.args[0]][:1], dtype=weight.dtype, requires_grad=True)  # type: ignore[index]
        rows = torch.func.functional_call(module, absolute, (ones,))
        columns = torch.autograd.grad(rows.sum(), ones)[0]
    gain = math.sqrt(float(rows.detach().max()) * float(columns.max()))
    if isinstance(module, nn.Linear):
        gain = min(gain, float(weight.norm()))
    terms = weight[:, 0].numel() if "Transpose" in type(module).__name__ else weight[0].numel()
    return terms + 2, (gain * walk.size(n.args[0]) + offset) * (1 + 1e-9)


@rounds(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batchnorm_rounding(walk: RoundingWalk, n: fx.Node) -> Terms:
    """(x - mean) γ / sqrt(var + eps) + β, evaluated in any order; the factor is computed to within some roundings."""
    module = _called(walk, n)
    factor = batchnorm_scale(module).abs()
    offset = (
        2 * (factor * module.running_mean.double()).square() + 2 * (0.0 if module.bias is None else module.bias.double()) ** 2
    )
    positions = walk.elements(n) / len(factor)
    total = float(factor.max()) * walk.size(n.args[0]) + math.sqrt(float(offset.sum()) * positions)
    return 12, 2 * total * (1 + 1e-12)


@rounds(
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    torch.mean, "mean", torch.sum, "sum",
)  # fmt: skip
def averaged(walk: RoundingWalk, n: fx.Node) -> Terms:
    """The weights are >= 0, so that the operator with absolute weights is the operator itself and has its norm."""
    source = source_of(walk, n)
    if n in walk.affine:
        gain = walk.product([walk.affine[n]])
    else:
        gain = walk.lipschitz[n] / walk.lipschitz[source] * (1 + 1e-9)
    means = n.target in (torch.mean, "mean", torch.sum, "sum")
    count = walk.elements(source) / walk.elements(n) if means else math.prod(walk.shape(source)[1:])
    return math.ceil(count) + 2, gain * walk.size(source)


@rounds(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm)
def normalised_by_itself(walk: RoundingWalk, n: fx.Node) -> Terms:
    """z γ / sqrt(v + eps) + β with z = x - mean and v the mean of z² of a group of m elements.

    Whether computed by Welford's method or as the mean of x² less the squared mean, v has an error δ <= 4 γ_k ‖x‖² / m (Chan,
    Golub and LeVeque 1983, Algorithms for computing the sample variance). Since ‖z‖ <= sqrt(m (v + eps)), this error changes
    the value by at most sqrt(m) δ / (2 eps) times γ; all other rounded numbers are at most ‖x‖ / sqrt(eps) times γ.
    """
    module = _called(walk, n)
    shape = walk.env[n].shape
    if isinstance(module, nn.GroupNorm):
        count = math.prod(shape[1:]) // module.num_groups
    else:
        count = math.prod(getattr(module, "normalized_shape", shape[2:]))
    eps = torch.finfo(walk.env[n].dtype).eps if module.eps is None else module.eps  # float64's, the smallest default
    gain = 1.0 if module.weight is None else float(module.weight.detach().double().abs().max())
    bias = getattr(module, "bias", None)
    offset = 0.0 if bias is None else float(bias.double().norm()) * math.sqrt(walk.elements(n) / bias.numel())
    size = walk.size(n.args[0])
    total = gain * (4 * size / math.sqrt(eps) + 2 * size**2 / (math.sqrt(count) * eps)) + 2 * offset
    return 4 * count + 16, total * (1 + 1e-9)


@rounds(torch.softmax, "softmax", F.softmax, nn.Softmax)
def shares(walk: RoundingWalk, n: fx.Node) -> Terms:
    """exp(x - max) over a sum of m such terms: a relative error of at most 4 ‖x‖ u + γ_k, in a vector of norm <= 1."""
    module = walk.called(n)
    axis: Any = module.dim if module is not None else given(n, "dim").get("dim")
    count = walk.env[n].shape[axis]
    return count + _SMOOTH, (2 + 8 * walk.size(n.args[0])) * math.sqrt(walk.elements(n) / count)


@rounds("float", "double", "to")
def cast(walk: RoundingWalk, n: fx.Node) -> Terms:
    """One rounding, to another floating-point type."""
    return 1, walk.size(n.args[0])


def _spread(walk: RoundingWalk, n: fx.Node, argument: Any) -> float:
    """Norm of an argument that is broadcast to the shape of the node's value, at most."""
    held = walk.elements(argument) if walk.depends(argument) else torch.as_tensor(walk.env.get(argument, 0.0)).numel()
    return walk.size(argument) * math.sqrt(max(1.0, walk.elements(n) / held)) * (1 + 1e-12)


def _called(walk: RoundingWalk, n: fx.Node) -> Any:
    return walk.called(n)
