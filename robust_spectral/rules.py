"""The Lipschitz rules of torch's own modules and functions: for each, the bound of its value from those of its arguments.

A rule gets the walk and a node. It returns the constant from the network's input to the node's value, or inf for no claim; or,
of an affine node, the operator. All samples of a batch count together, so that no rule needs to know which axis they are on,
but for those that would mix them. In a local walk the size of values may be used as well.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from .affine import batchnorm_operator, batchnorm_scale, convolution_then_batchnorm, linear_operator, norm_shape
from .graph import JOINERS, Affine, Walk, rule, times
from .operators import LinearOperator, Shape

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


@rule(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def affine_layer(walk: Walk, n: fx.Node) -> Affine:
    """The layer's operator; its norm from the smallest shape that has it."""
    module, source = _module(walk, n), _source(walk, n)
    shape = walk.shape(source)
    return _layer(walk, n, module, shape, norm_shape(module, shape))


def _layer(walk: Walk, n: fx.Node, module: nn.Module, shape: Shape, small: Shape) -> Affine:
    """A step by a module's operator, whose norm is that at a smaller shape."""
    norm = (n.target, small), lambda: linear_operator(module, small)
    return Affine(_source(walk, n), (n.target, shape), lambda: linear_operator(module, shape), norm, module)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batchnorm(walk: Walk, n: fx.Node) -> Affine:
    """Each channel times gamma / sqrt(running_var + eps): the largest of these alone; joined with a layer in front of it."""
    module, source = _module(walk, n), _source(walk, n)
    shape = walk.shape(source)
    batchnorm_scale(module)  # refuses one without running statistics
    small = (shape[0], *[1] * (len(shape) - 1))
    norm = (n.target, small), lambda: batchnorm_operator(module, small)
    return Affine(source, (n.target, shape), lambda: batchnorm_operator(module, shape), norm, module)


def _with_batchnorm(layer: Affine, step: Affine) -> Affine | None:
    """A layer and the batch normalisation behind it as one operator."""
    module, normalisation, shape = layer.module, step.module, layer.key[-1]
    if not isinstance(module, nn.Linear | _ConvNd) or (isinstance(module, nn.Linear) and len(shape) != 1):
        return None
    assert normalisation is not None
    small = norm_shape(module, shape)

    def operator_at(shape: Shape) -> Callable[[], LinearOperator]:
        return lambda: convolution_then_batchnorm(module, normalisation, shape)

    key = (layer.key[0], step.key[0])
    return replace(layer, key=(*key, shape), build=operator_at(shape), norm=((*key, small), operator_at(small)), module=None)


JOINERS.update(dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _with_batchnorm))


@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample)
def channelwise(walk: Walk, n: fx.Node) -> Affine:
    """An operator that treats every channel alike; its norm is that on one channel."""
    module, source = _module(walk, n), _source(walk, n)
    shape = walk.shape(source)
    axes = len(shape) - 1 if isinstance(module, nn.Upsample) else int(type(module).__name__[-2])  # …Pool2d
    return _layer(walk, n, module, shape, (1, *shape[-axes:]))


@rule(
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.interpolate, F.linear, F.conv1d, F.conv2d, F.conv3d,
)  # fmt: skip
def linear_function(walk: Walk, n: fx.Node) -> float:
    """The same of a function, with constant weights; on one channel where all are treated alike."""
    function, source = n.target, _source(walk, n)
    shape, name = walk.shape(source), getattr(n.target, "__name__", "")
    axes = len(shape) - 1 if name == "interpolate" else int(name[-2]) if "pool" in name else None

    def call(x: Tensor) -> Tensor:
        def constant(a: fx.Node) -> Any:
            value = walk.env[a]
            return value.to(x.dtype) if isinstance(value, Tensor) else value

        args, kwargs = fx.node.map_arg((n.args[1:], n.kwargs), constant)
        return function(x, *args, **kwargs)  # type: ignore[operator]

    part = _Function(call)
    small = shape if axes is None else (1, *shape[-axes:])
    return times(walk.bound(source), walk.operator_norm((n.name, small), lambda: linear_operator(part, small, torch.float64)))


class _Function(nn.Module):
    """A function as a module, so that it can be an operator."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self.function(x)


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def max_pool(walk: Walk, n: fx.Node) -> float:
    """sqrt of the number of windows an input element can lie in, ceil(window / stride) along each axis."""
    module: Any = walk.called(n)
    return times(
        walk.bound(_source(walk, n)),
        _overlap(int(type(module).__name__[-2]), module.kernel_size, module.stride, module.dilation),
    )


@rule(F.max_pool1d, F.max_pool2d, F.max_pool3d)
def max_pool_function(walk: Walk, n: fx.Node) -> float:
    """The same of a function."""
    axes = {F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3}[n.target]  # type: ignore[index]
    given: dict[str, Any] = dict(zip(("kernel_size", "stride", "padding", "dilation"), n.args[1:], strict=False)) | dict(
        n.kwargs
    )
    window = given["kernel_size"]
    return times(walk.bound(_source(walk, n)), _overlap(axes, window, given.get("stride") or window, given.get("dilation", 1)))


def _overlap(axes: int, *settings: Any) -> float:
    window, stride, dilation = (tuple(v) if isinstance(v, tuple | list) else (v,) * axes for v in settings)
    each = [w if d > 1 else math.ceil(w / s) for w, s, d in zip(window, stride, dilation, strict=True)]
    return math.nextafter(math.sqrt(math.prod(each)), math.inf)


@rule("amax", "amin", torch.amax, torch.amin)
def extreme(walk: Walk, n: fx.Node) -> float:
    """The largest of some values moves by no more than they do."""
    axes = _axes(walk, n)
    return walk.bound(_source(walk, n)) if axes and 0 not in axes else math.inf


@rule(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def adaptive_max_pool(walk: Walk, n: fx.Node) -> float:
    """The same where there is one window; others may overlap and are not covered."""
    axes = int(type(walk.called(n)).__name__[-2])
    return walk.bound(_source(walk, n)) if set(walk.env[n].shape[-axes:]) == {1} else math.inf


@rule(operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, operator.isub, torch.sub, "sub", "sub_")
def add(walk: Walk, n: fx.Node) -> float | Affine:
    """Bounds of the branches add, each times the root of how often its elements are repeated; a constant counts nothing."""
    first, second = n.args[:2]
    alpha = abs(float(n.kwargs.get("alpha", 1)))  # type: ignore[arg-type]
    if walk.depends(first) and not walk.depends(second) and not _in_place(n) and _repeats(walk, n, first) == 1:
        return _identity(walk, n, first)
    each = [
        times(walk.bound(a), _repeats(walk, n, a), factor) for a, factor in ((first, 1.0), (second, alpha)) if walk.depends(a)
    ]
    return each[0] if len(each) == 1 else math.nextafter(each[0] + each[1], math.inf)


@rule(operator.mul, operator.imul, torch.mul, "mul", "mul_", operator.itruediv, "div_")
def scale(walk: Walk, n: fx.Node) -> float | Affine:
    """A constant factor counts with its largest absolute value; a product of two functions of the input only locally."""
    first, second = n.args[:2]
    divides = n.target in (operator.truediv, operator.itruediv, torch.div, "div", "div_")
    if walk.depends(first) and walk.depends(second):
        return math.inf if divides else product(walk, n, first, second)
    function, constant = (first, second) if walk.depends(first) else (second, first)
    if (divides and function is second) or n.kwargs.get("rounding_mode") is not None:
        return math.inf
    values = torch.as_tensor(walk.env[constant] if isinstance(constant, fx.Node) else constant).detach().double()
    factors = 1 / values if divides else values
    largest = float(factors.abs().max())
    largest = math.nextafter(largest, math.inf) if largest > 0 else 0.0
    if not math.isfinite(largest):
        return math.inf
    repeats = _repeats(walk, n, function)
    by_sample = factors.ndim == walk.env[function].ndim and factors.shape[0] != 1  # type: ignore[index]
    if largest == 0 or repeats != 1 or by_sample or _in_place(n):
        return times(walk.bound(function), largest, repeats)
    assert isinstance(function, fx.Node)
    shape, factors = walk.shape(function), factors.to(walk.env[function].device)

    def times_factors(X: Tensor) -> Tensor:
        return X * factors.to(X.dtype)

    build = _operator(walk, function, shape, times_factors, times_factors, diagonal=True)
    return Affine(function, (n.name, shape), build, largest)


def product(walk: Walk, n: fx.Node, first: Any, second: Any) -> float:
    """d(x y) = dx y + x dy, with the largest sizes that x and y have: local only.

    An element that is repeated along some axes meets all the others there, which count with their root of the sum of squares.
    """
    if not walk.local:
        return math.inf
    total = 0.0
    for moving, other in ((first, second), (second, first)):
        meets = most_met(walk.size(other).expand(walk.env[n].shape), walk.env[moving].shape)
        total = math.nextafter(total + times(walk.bound(moving), meets), math.inf)
    return total


def most_met(others: Tensor, shape: Shape) -> float:
    """Root of the sum of squares of the numbers >= 0 that one element of a value meets, repeated to their shape, at most."""
    own = (1,) * (others.ndim - len(shape)) + tuple(shape)
    repeated = [axis for axis, (one, all_) in enumerate(zip(own, others.shape, strict=True)) if one != all_]
    met = others.square().sum(repeated).sqrt() if repeated else others
    return float(met.max()) * (1 + 1e-12)


@rule(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def own_statistics(walk: Walk, n: fx.Node) -> float:
    """Normalised by its own mean and variance: at most max |γ| / sqrt(eps).

    x -> z / sqrt(‖z‖² / n + eps) with z = x - mean(x), a projection, has the Jacobian (I - z zᵀ / (n (var + eps))) / sqrt(var +
    eps) there, whose norm is at most 1 / sqrt(eps). γ multiplies each element.
    """
    module: Any = walk.called(n)
    if getattr(module, "track_running_stats", False):
        return math.inf
    return times(walk.bound(_source(walk, n)), normalising_gain(module.eps, module.weight))


@rule(nn.RMSNorm)
def root_mean_square(walk: Walk, n: fx.Node) -> float:
    """x -> x / sqrt(‖x‖² / n + eps): the same without the mean, and at most max |γ| / sqrt(eps) for the same reason."""
    module: Any = walk.called(n)
    eps = torch.finfo(walk.env[n].dtype).eps if module.eps is None else module.eps
    return times(walk.bound(_source(walk, n)), normalising_gain(eps, module.weight))


def normalising_gain(eps: float, weight: Tensor | None) -> float:
    """max |γ| / sqrt(eps), rounded up; inf where eps is 0."""
    gain = 1.0 if weight is None else float(weight.detach().double().abs().max())
    return gain / math.sqrt(eps) * (1 + 1e-15) if eps > 0 else math.inf


@rule(torch.cat, torch.concat, torch.stack)
def cat(walk: Walk, n: fx.Node) -> float:
    """Root of the sum of the branches' squares; concatenation along the batch axis is no function of one input."""
    parts: Any = n.args[0] if n.args else n.kwargs["tensors"]
    axis: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)
    if axis % walk.env[n].ndim == 0:
        return math.inf
    if isinstance(parts, fx.Node):  # of a value in parts
        return walk.bound(parts)
    return math.nextafter(math.hypot(*(walk.bound(part) for part in parts)), math.inf)


@rule(torch.mean, "mean")
def mean(walk: Walk, n: fx.Node) -> float | Affine:
    """A mean over m elements has norm 1 / sqrt(m)."""
    return _sum_over(walk, n, mean=True)


@rule(torch.sum, "sum")
def total(walk: Walk, n: fx.Node) -> float | Affine:
    """A sum over m elements has norm sqrt(m)."""
    return _sum_over(walk, n, mean=False)


def _sum_over(walk: Walk, n: fx.Node, mean: bool) -> float | Affine:
    axes, source = _axes(walk, n), _source(walk, n)
    if not axes or 0 in axes:  # over everything, or mixing the batch
        return math.inf
    full, keep = walk.env[source].shape, bool(n.kwargs.get("keepdim", n.args[2] if len(n.args) > 2 else False))
    count = math.prod(full[a] for a in axes)
    factor = 1 / count if mean else 1.0
    shown = tuple(1 if a in axes else size for a, size in enumerate(full))[1:]
    out = shown if keep else tuple(size for a, size in enumerate(full) if a not in axes)[1:]
    build = _operator(
        walk, source, out,
        lambda X: (X.sum(axes, keepdim=True) * factor).reshape(len(X), *out),
        lambda Y: (Y * factor).reshape(len(Y), *shown).expand(len(Y), *full[1:]),
    )  # fmt: skip
    return Affine(source, (n.name, tuple(full[1:])), build, math.nextafter(math.sqrt(count) * factor * (1 + 1e-15), math.inf))


@rule(
    nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze,
    "flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten",
)  # fmt: skip
def rearranged(walk: Walk, n: fx.Node) -> float | Affine:
    """The same elements in another shape."""
    source = _source(walk, n)
    before, after = tuple(walk.env[source].shape), tuple(walk.env[n].shape)
    if after[0] != before[0] or not before[1:] or not after[1:]:
        return walk.bound(source)
    build = _operator(
        walk, source, after[1:], lambda X: X.reshape(len(X), *after[1:]), lambda Y: Y.reshape(len(Y), *before[1:])
    )
    return Affine(source, (n.name, before[1:]), build, 1.0)


@rule(
    torch.permute, torch.transpose, torch.roll, torch.chunk, torch.split, torch.unbind, torch.tensor_split, torch.flip,
    "permute", "transpose", "roll", "chunk", "split", "unbind", "tensor_split", "flip", "t", "movedim", "narrow", "select",
    "swapaxes", "clone", "masked_fill", nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip
def picked(walk: Walk, n: fx.Node) -> float:
    """The same elements in another order, or in parts, which count together; or some of them; or constants around them."""
    return walk.bound(_source(walk, n))


@rule("type_as", "reshape_as", "view_as")
def like_another(walk: Walk, n: fx.Node) -> float:
    """The same elements in the type or the shape of another value, which counts for nothing else."""
    return walk.bound(n.args[0])


@rule(
    operator.getitem, F.pad, nn.Unfold, F.unfold, "unfold", "expand", "expand_as", "repeat", torch.tile, "repeat_interleave",
)  # fmt: skip
def copied(walk: Walk, n: fx.Node) -> float:
    """Elements in other places, and constants: root of how often the element is there that is there most often."""
    source: Any = n.args[0]
    value = walk.env[source]
    if n.target != "expand_as" and any(walk.depends(node) for node in n.all_input_nodes if node is not source):
        return math.inf
    if not isinstance(value, Tensor):  # a part of several values
        return walk.bound(source)
    numbers = torch.arange(1.0, value.numel() + 1, dtype=torch.float64, device=value.device).reshape(value.shape)
    found = walk.rerun(n, lambda node: numbers if node is source else walk.env[node]).flatten()
    places = found[(found >= 1) & (found <= value.numel())].long()  # a constant may pass for an element, and count too much
    most = int(torch.bincount(places).max()) if places.numel() else 1
    return times(walk.bound(source), 1.0 if most == 1 else math.nextafter(math.sqrt(most), math.inf))


@rule(nn.Fold, F.fold)
def summed_where_they_overlap(walk: Walk, n: fx.Node) -> float:
    """Each sum has elements of its own: root of the longest one's number of terms."""
    source = _source(walk, n)
    terms = float(walk.rerun(n, lambda node: torch.ones_like(walk.env[node])).max())
    return times(walk.bound(source), math.nextafter(math.sqrt(terms), math.inf))


@rule(getattr)
def attribute(walk: Walk, n: fx.Node) -> float:
    """A transposed matrix."""
    return walk.bound(n.args[0]) if n.args[1] in ("T", "mT", "H", "mH") else math.inf


@rule(F.layer_norm, F.group_norm)
def own_statistics_function(walk: Walk, n: fx.Node) -> float:
    """As `own_statistics`, of the functions."""
    source = _source(walk, n)
    names = ("normalized_shape" if n.target is F.layer_norm else "num_groups", "weight", "bias", "eps")
    given: dict[str, Any] = dict(zip(names, n.args[1:], strict=False)) | dict(n.kwargs)
    weight = given.get("weight")
    return times(
        walk.bound(source), normalising_gain(float(given.get("eps", 1e-5)), None if weight is None else walk.env[weight])
    )


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
    return 1.0 if type(module) in _UNCHANGED else _SLOPE_OF.get(type(module), math.inf)


@rule(*_SLOPE_OF, nn.PReLU, nn.LeakyReLU, nn.ELU, nn.Softplus)
def elementwise(walk: Walk, n: fx.Node) -> float:
    """Largest slope of a function applied to every element."""
    module = walk.called(n)
    slope = _SLOPE_OF[n.target] if module is None else activation_slope(module)
    return times(walk.bound(_source(walk, n)), slope)


@rule(F.leaky_relu)
def leaky_relu(walk: Walk, n: fx.Node) -> float:
    """The larger of its two slopes."""
    slope = n.args[1] if len(n.args) > 1 else n.kwargs.get("negative_slope", 0.01)
    return times(walk.bound(_source(walk, n)), max(1.0, abs(float(slope))))  # type: ignore[arg-type]


_UNCHANGED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@rule(*_UNCHANGED, "contiguous", "float", "double", "to")
def unchanged(walk: Walk, n: fx.Node) -> Affine:
    """The identity, in eval mode; the walk sees to it that no type with fewer digits comes out."""
    return _identity(walk, n, _source(walk, n))


@rule(F.dropout)
def functional_dropout(walk: Walk, n: fx.Node) -> float | Affine:
    """The identity, as long as it is told that the model is not training."""
    training = n.kwargs.get("training", n.args[2] if len(n.args) > 2 else True)
    return math.inf if training else _identity(walk, n, _source(walk, n))


def _identity(walk: Walk, n: fx.Node, source: Any) -> Affine:
    shape = walk.shape(source)
    return Affine(source, (n.name, shape), _operator(walk, source, shape, lambda X: X, lambda Y: Y, diagonal=True), 1.0)


def _operator(
    walk: Walk, source: fx.Node, out_shape: Shape, forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor],
    diagonal: bool = False,
) -> Callable[[], LinearOperator]:  # fmt: skip
    """A builder of the operator of a function of tensors."""
    in_shape, device = walk.shape(source), walk.env[source].device

    def build(dtype: torch.dtype = torch.float64) -> LinearOperator:
        return LinearOperator(in_shape, out_shape, dtype, device, forward, adjoint, build, diagonal=diagonal)

    return build


def _module(walk: Walk, n: fx.Node) -> nn.Module:
    module = walk.called(n)
    assert module is not None
    return module


def _source(walk: Walk, n: fx.Node) -> fx.Node:
    """The one argument that depends on the network's input.

    Raises:
        ValueError: there are others.
    """
    depending = [node for node in n.all_input_nodes if walk.depends(node)]
    if len(depending) != 1:
        raise ValueError("several arguments depend on the input")
    return depending[0]


def _axes(walk: Walk, n: fx.Node) -> list[int]:
    """The axes that a reduction goes over, counted from the front; none where it goes over everything."""
    axes: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
    listed = [axes] if isinstance(axes, int) else list(axes) if axes is not None else []
    return [a % walk.env[_source(walk, n)].ndim for a in listed]


def _in_place(n: fx.Node) -> bool:
    return n.target in _IN_PLACE or (isinstance(n.target, str) and n.target.endswith("_"))


def _repeats(walk: Walk, n: fx.Node, argument: Any) -> float:
    """Root of how often each element of an argument appears in what two arguments give together, rounded up."""
    count = walk.env[n].numel() / walk.env[argument].numel()
    return 1.0 if count == 1 else math.nextafter(math.sqrt(count), math.inf)
