"""Rules of affine layers: each gives the walk its operator, and a smaller input shape at which the norm is the same.

A batch normalisation is joined with the layer before it. For a function only the norm of its operator is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from ...numerics import product_up
from ...operators import (
    LinearOperator,
    Shape,
    batchnorm_operator,
    batchnorm_scale,
    convolution_then_batchnorm,
    linear_operator,
    norm_shape,
)
from ..registry import JOINERS, rule
from ..walk import Affine, LipschitzWalk
from .node_arguments import axes_named, module_of, source_of


@rule(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def affine_layer(walk: LipschitzWalk, n: fx.Node) -> Affine:
    """The layer's operator, with its norm at the smallest input shape that has the same norm."""
    module, source = module_of(walk, n), source_of(walk, n)
    shape = walk.shape(source)
    return _layer(walk, n, module, shape, norm_shape(module, shape))


def _layer(walk: LipschitzWalk, n: fx.Node, module: nn.Module, shape: Shape, small: Shape) -> Affine:
    """The affine step of a module at an input shape, with its norm from the operator at the shape ``small``."""
    norm = (n.target, small), lambda: linear_operator(module, small)
    return Affine(source_of(walk, n), (n.target, shape), lambda: linear_operator(module, shape), norm, module)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batchnorm_bound(walk: LipschitzWalk, n: fx.Node) -> Affine:
    """A diagonal operator, γ / sqrt(running_var + eps) per channel: its norm is the largest absolute factor.

    The walk joins it with the layer before it where possible.
    """
    module, source = module_of(walk, n), source_of(walk, n)
    shape = walk.shape(source)
    batchnorm_scale(module)  # raises an error without running statistics
    small = (shape[0], *[1] * (len(shape) - 1))
    norm = (n.target, small), lambda: batchnorm_operator(module, small)
    return Affine(source, (n.target, shape), lambda: batchnorm_operator(module, shape), norm, module)


def _with_batchnorm(layer: Affine, step: Affine) -> Affine | None:
    """A layer and the batch normalisation that follows it as one operator; None if they are not joined."""
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
def channelwise(walk: LipschitzWalk, n: fx.Node) -> Affine:
    """An operator that acts on each channel alone and in the same way has the norm that it has on one channel."""
    module, source = module_of(walk, n), source_of(walk, n)
    shape = walk.shape(source)
    axes = len(shape) - 1 if isinstance(module, nn.Upsample) else axes_named(type(module).__name__)
    return _layer(walk, n, module, shape, (1, *shape[-axes:]))


@rule(
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.interpolate, F.linear, F.conv1d, F.conv2d, F.conv3d,
)  # fmt: skip
def linear_function(walk: LipschitzWalk, n: fx.Node) -> float:
    """A linear function with constant weights has its operator's norm; pooling and interpolation act on each channel alike."""
    function, source = n.target, source_of(walk, n)
    shape, name = walk.shape(source), getattr(n.target, "__name__", "")
    axes = len(shape) - 1 if name == "interpolate" else axes_named(name) if "pool" in name else None

    def call(x: Tensor) -> Tensor:
        def constant(a: fx.Node) -> Any:
            value = walk.env[a]
            return value.to(x.dtype) if isinstance(value, Tensor) else value

        args, kwargs = fx.node.map_arg((n.args[1:], n.kwargs), constant)
        return function(x, *args, **kwargs)  # type: ignore[operator]

    part = _Function(call)
    small = shape if axes is None else (1, *shape[-axes:])
    return product_up(
        walk.bound(source), walk.operator_norm((n.name, small), lambda: linear_operator(part, small, torch.float64))
    )


class _Function(nn.Module):
    """A function as a module, so that `linear_operator` takes it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self.function(x)
