"""Dense layers, convolutions, batch normalisations, average pools and interpolations: operators with constant weights.

Padding is joined with the convolution after it, and a layer with the batch normalisation after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from ...operators import (
    LinearOperator,
    Shape,
    batchnorm_operator,
    batchnorm_scale,
    compose,
    norm_shape,
    then_batchnorm,
    weights_operator,
)
from ..boxes import Box
from ..graph import module_of
from ..table import NoClaim, operation_of, rule
from ..walk import Affine, Build, LipschitzWalk
from .node_arguments import (
    SUM_UP,
    UP,
    arguments,
    aten,
    exact,
    increasing,
    linear_step,
    most_copies,
    node_function,
    root_of_count,
    rounded_numbers,
    source_of,
    sums,
)

_CONVOLUTIONS = {
    aten.conv1d: nn.Conv1d, aten.conv2d: nn.Conv2d, aten.conv3d: nn.Conv3d, aten.conv_transpose1d: nn.ConvTranspose1d,
    aten.conv_transpose2d: nn.ConvTranspose2d, aten.conv_transpose3d: nn.ConvTranspose3d,
}  # fmt: skip


def linear_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """W x + b maps the box of centre c and radius r into the box of centre W c + b and radius |W| r."""
    low, high = walk.box(n.args[0])
    centre, radius = (low + high) / 2, (high - low) / 2
    reach = _with(walk, n, radius + (SUM_UP - 1) * (centre.abs() + radius), torch.abs, bias=False)
    middle = _with(walk, n, centre, lambda weight: weight)
    return middle - reach, middle + reach


def _with(walk: LipschitzWalk, n: fx.Node, x: Tensor, weight: Callable[[Tensor], Tensor], bias: bool = True) -> Tensor:
    """The layer's value for another input and a function of its weight, with or without bias."""
    args = [x, weight(walk.constant(n.args[1])), *fx.node.map_arg(n.args[2:], walk.env.__getitem__)]
    if not bias and len(args) > 2:
        args[2] = None
    return n.target(*args, **n.kwargs)  # type: ignore[operator]


def linear_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """One product for each weight of an output, and the bias; the sum of absolute values, |W| |x|, has norm <= ‖|W|‖ ‖x‖.

    ‖|W|‖² is at most the largest row sum times the largest column sum (Schur), and at most ‖W‖_F² for a dense layer.
    """
    weight, offset = walk.constant(n.args[1]), arguments(n).get("bias")
    if offset is not None:
        offset = walk.constant(offset)
    with torch.enable_grad():
        ones = torch.ones_like(walk.env[n.args[0]][:1], requires_grad=True)
        rows = _with(walk, n, ones, torch.abs, bias=False)
        columns = torch.autograd.grad(rows.sum(), ones)[0]
    gain = math.sqrt(float(rows.detach().max()) * float(columns.max()))
    if operation_of(n.target) is aten.linear:
        gain = min(gain, float(weight.norm()))
    terms = weight[:, 0].numel() if "transpose" in str(n.target) else weight[0].numel()
    total = 0.0 if offset is None else float(offset.norm()) * math.sqrt(walk.elements(n) / len(offset))
    return terms + 2, (gain * walk.size(n.args[0]) + total) * (1 + 1e-9)


def _constant_weights(walk: LipschitzWalk, n: fx.Node) -> None:
    if any(walk.depends(a) for a in n.args[1:]):
        raise NoClaim("with weights that depend on the input")


@rule(*_CONVOLUTIONS, aten.linear, box=linear_box, rounding=linear_rounding)
def layer(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The layer's operator, with its norm at the smallest input shape that has the same norm."""
    _constant_weights(walk, n)
    source, module = n.args[0], _module(walk, n)
    assert isinstance(source, fx.Node)
    shape, name = walk.shape(source), walk.graph.layers.get(n)
    if not shape:
        raise NoClaim("across the batch")
    key, small = (n.target, n.args[1], repr(n.args[3:])), norm_shape(module, shape)
    step = Affine(
        source, (*key, shape), lambda: weights_operator(module, shape),
        norm=((*key, small), lambda: weights_operator(module, small)), layers=() if name is None else (name,), part=module,
    )  # fmt: skip
    return replace(step, joined=lambda before: _with_padding(step, before))


def _module(walk: LipschitzWalk, n: fx.Node) -> Any:
    """A module of torch.nn with the weight of a node, without bias, in float64."""
    a, weight = arguments(n), walk.constant(n.args[1])
    made: Any
    if operation_of(n.target) is aten.linear:
        if weight.ndim != 2:
            raise NoClaim("with a vector as weight")
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        out, inner = weight.shape[:2] if "output_padding" not in a else (weight.shape[1], weight.shape[0])
        scaled = {"out": out * a["groups"], "in": inner} if "output_padding" in a else {"out": out, "in": inner * a["groups"]}
        axes = weight.ndim - 2
        settings = {
            name: value if isinstance(value := a[name], str) else tuple(value) * (axes if len(value) == 1 else 1)
            for name in ("stride", "padding", "dilation", "output_padding")
            if name in a
        }
        kind = _CONVOLUTIONS[operation_of(n.target)]
        made = kind(
            scaled["in"], scaled["out"], tuple(weight.shape[2:]), groups=a["groups"], bias=False, device="meta", **settings
        )
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made.eval()


def _with_padding(step: Affine, before: Affine) -> Affine | None:
    """A convolution and the padding before it as one operator; None if they are not joined."""
    if not isinstance(before.part, _Padding) or not isinstance(step.part, _ConvNd) or step.part.transposed:
        return None
    mode, widths = before.part
    convolution, shape = step.part, before.key[-1]
    if isinstance(convolution.padding, str) or any(convolution.padding) or len(widths) > 2 * (len(shape) - 1):
        return None
    if min(widths, default=0) < 0:
        return None
    kind: Any = type(convolution)
    module: Any = kind(
        convolution.in_channels, convolution.out_channels, convolution.kernel_size, convolution.stride,
        dilation=convolution.dilation, groups=convolution.groups, bias=False, device="meta",
        padding_mode={"constant": "zeros"}.get(mode, mode),
    )  # fmt: skip
    module.weight = convolution.weight
    widths = [*widths, *[0] * (2 * (len(shape) - 1) - len(widths))]
    even = widths[::2] == widths[1::2]
    if mode == "constant" and not even:
        return _padded_apart(step, before, shape)
    module.padding = tuple(map(max, reversed(widths[::2]), reversed(widths[1::2])))
    module._reversed_padding_repeated_twice = list(widths)
    operator = lambda: weights_operator(module.eval(), shape)  # noqa: E731
    return replace(
        step, source=before.source, key=(*step.key, *before.key), build=operator, norm=None, joined=None, part=module
    )


def _padded_apart(step: Affine, before: Affine, shape: Shape) -> Affine:
    """Padding by unequal numbers of zeros, then a convolution, whose kernel's bounds hold for any padding by zeros."""

    def operator() -> LinearOperator:
        pad, convolution = before.build(), step.build()
        return replace(
            compose(pad, convolution), kernel=convolution.kernel, groups=convolution.groups, build=lambda _: operator()
        )

    return replace(step, source=before.source, key=(*step.key, *before.key), build=operator, norm=None, joined=None)


class _Padding(tuple[str, list[int]]):
    """Mode and widths of a padding, last axis first."""


def pad_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """Copies of elements, and constants: no rounding but that of the constant."""
    value, norm = arguments(n).get("value"), walk.affine[n].norm if n in walk.affine else math.inf
    return rounded_numbers(value), walk.size(source_of(walk, n)) * norm * UP + (
        0.0 if value is None else abs(float(value)) * math.sqrt(walk.elements(n))
    )


@rule(aten.pad, aten.constant_pad_nd, box=increasing, rounding=pad_rounding)
def pad(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """Padding has constant sqrt(k), for k copies of the element that is copied most often; 1 for padding by constants."""
    source, a = source_of(walk, n), arguments(n)
    mode = a.get("mode", "constant")
    value = 0.0 if a.get("value") is None else float(a["value"])
    most = 1 if mode == "constant" else most_copies(walk, n, source)
    whole = node_function(walk, n, source)
    blank = whole(torch.zeros_like(walk.env[source][:1])) if value else None
    call = whole if blank is None else lambda X: whole(X) - blank
    groups = walk.env[source].shape[1] if walk.env[source].ndim > 2 and len(a["pad"]) <= 2 * (walk.env[source].ndim - 2) else 1
    found = linear_step(walk, n, source, call, root_of_count(most), selects=True, groups=groups)
    if not isinstance(found, Affine):
        return found
    return replace(found, part=_Padding((mode, [int(w) for w in a["pad"]])))


def _batchnorm(walk: LipschitzWalk, n: fx.Node) -> Any:
    """A module with the statistics, weight and eps of a batch normalisation node, in float64."""
    a = arguments(n)
    made: Any = nn.Module()
    for name in ("weight", "bias", "running_mean", "running_var"):
        made.register_buffer(name, None if a[name] is None else walk.constant(a[name]))
    made.eps = float(a["eps"])
    return made


def batchnorm_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The images of the ends, exchanged in channels whose factor is negative."""
    module, (low, high) = _batchnorm(walk, n), walk.box(n.args[0])
    broadcast = (-1, *[1] * (low.ndim - 2))
    scale, offset = batchnorm_scale(module), 0.0 if module.bias is None else module.bias
    slack = scale.abs().reshape(broadcast) * (low.abs() + high.abs() + module.running_mean.abs().reshape(broadcast))
    slack = (SUM_UP - 1) * (slack + torch.as_tensor(offset).abs().reshape(broadcast))
    shift = (offset - module.running_mean * scale).reshape(broadcast)
    ends = low * scale.reshape(broadcast) + shift, high * scale.reshape(broadcast) + shift
    low, high = torch.minimum(*ends) - slack, torch.maximum(*ends) + slack
    return (low, high) if isinstance(walk.env[n], Tensor) else ((low,), (high,))


def batchnorm_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """(x - mean) γ / sqrt(var + eps) + β, evaluated in any order; the factor is computed to within some roundings."""
    module = _batchnorm(walk, n)
    factor = batchnorm_scale(module).abs()
    offset = 2 * (factor * module.running_mean).square() + 2 * (0.0 if module.bias is None else module.bias) ** 2
    positions = walk.elements(n.args[0]) / len(factor)
    total = float(factor.max()) * walk.size(n.args[0]) + math.sqrt(float(offset.sum()) * positions)
    return 12, 2 * total * (1 + 1e-12)


@rule(aten.batch_norm, aten._native_batch_norm_legit_no_training, box=batchnorm_box, rounding=batchnorm_rounding)
def batchnorm(walk: LipschitzWalk, n: fx.Node) -> Affine:
    """A diagonal operator, γ / sqrt(running_var + eps) per channel: its norm is the largest absolute factor."""
    if arguments(n).get("training") or arguments(n)["running_var"] is None:
        raise NoClaim("by the statistics of the batch")
    _constant_weights(walk, n)
    source, module, name = n.args[0], _batchnorm(walk, n), module_of(n)[0]
    assert isinstance(source, fx.Node)
    key = (batchnorm, *n.args[1:5], float(arguments(n)["eps"]))
    shape = walk.shape(source)
    small = (shape[0], *[1] * (len(shape) - 1))

    def operator_at(shape: Shape) -> Callable[[], LinearOperator]:
        return lambda: batchnorm_operator(module, shape, torch.float64)

    def after_layer(before: Affine) -> Affine | None:
        if not isinstance(before.part, nn.Linear | _ConvNd) or (isinstance(before.part, nn.Linear) and len(shape) != 1):
            return None
        norm = before.norm
        if isinstance(norm, tuple):
            norm = (*key, *norm[0]), _then_batchnorm(norm[1], module, before.part)
        return replace(
            before, key=(*key, *before.key), build=_then_batchnorm(before.build, module, before.part), norm=norm,
            layers=(*before.layers, name) if before.layers else (), joined=None, part=None,
        )  # fmt: skip

    return Affine(source, (*key, shape), operator_at(shape), ((*key, small), operator_at(small)), joined=after_layer)


def _then_batchnorm(build: Build, batchnorm: nn.Module, layer: nn.Module) -> Build:
    """The operator of a layer, then of a batch normalisation, whose factors scale the convolution's kernel."""

    def operator() -> LinearOperator:
        return replace(then_batchnorm(build(), batchnorm, layer), build=lambda _: operator())

    return operator


def averaged(walk: Any, n: fx.Node) -> tuple[int, float]:
    """The weights are >= 0, so that the operator with absolute weights is the operator itself and has its norm."""
    gain = walk.product([walk.affine[n]]) if n in walk.affine else math.inf
    return math.prod(walk.shape(n.args[0])[1:]) + 2, gain * walk.size(n.args[0])


_POOLS = {
    aten.avg_pool1d: 1, aten.avg_pool2d: 2, aten.avg_pool3d: 3, aten.adaptive_avg_pool1d: 1, aten.adaptive_avg_pool2d: 2,
    aten.adaptive_avg_pool3d: 3,
}  # fmt: skip


def channelwise(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """An operator that acts on each channel alone and in the same way has the norm that it has on one channel."""
    source = source_of(walk, n)
    shape = walk.shape(source)
    axes = _POOLS.get(operation_of(n.target), len(shape) - 1)
    if axes > len(shape):
        raise NoClaim("across the batch")
    groups = shape[0] if axes == len(shape) - 1 else 1
    return linear_step(walk, n, source, small=(1, *shape[-axes:]) if axes < len(shape) else tuple(shape), groups=groups)


def pool_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """An average rises with every element, unless it is divided by a negative number."""
    if (arguments(n).get("divisor_override") or 1) < 0:
        raise NoClaim("divided by a negative number")
    return sums(walk, n)


rule(*_POOLS, box=pool_box, rounding=averaged)(channelwise)
rule(aten.upsample_bilinear2d, aten.upsample_linear1d, aten.upsample_trilinear3d, aten._upsample_bilinear2d_aa, box=sums)(
    channelwise
)
rule(aten.upsample_bicubic2d, aten._upsample_bicubic2d_aa)(channelwise)
rule(aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten._upsample_nearest_exact2d,
     box=increasing, rounding=exact)(channelwise)  # fmt: skip
