"""Rules of layers that are affine: each hands the walk its operator, and says on which smaller shape the norm is the same.

A batch normalisation behind a layer is joined with it. Of a function the operator is not kept, only its norm.
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
    """The layer's operator; its norm from the smallest shape that has it."""
    module, source = module_of(walk, n), source_of(walk, n)
    shape = walk.shape(source)
    return _layer(walk, n, module, shape, norm_shape(module, shape))


def _layer(walk: LipschitzWalk, n: fx.Node, module: nn.Module, shape: Shape, small: Shape) -> Affine:
    """A step by a module's operator, whose norm is that at a smaller shape."""
    norm = (n.target, small), lambda: linear_operator(module, small)
    return Affine(source_of(walk, n), (n.target, shape), lambda: linear_operator(module, shape), norm, module)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batchnorm_bound(walk: LipschitzWalk, n: fx.Node) -> Affine:
    """Each channel times gamma / sqrt(running_var + eps): the largest of these alone; joined with a layer in front of it."""
    module, source = module_of(walk, n), source_of(walk, n)
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
def channelwise(walk: LipschitzWalk, n: fx.Node) -> Affine:
    """An operator that treats every channel alike; its norm is that on one channel."""
    module, source = module_of(walk, n), source_of(walk, n)
    shape = walk.shape(source)
    axes = len(shape) - 1 if isinstance(module, nn.Upsample) else axes_named(type(module).__name__)
    return _layer(walk, n, module, shape, (1, *shape[-axes:]))


@rule(
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.interpolate, F.linear, F.conv1d, F.conv2d, F.conv3d,
)  # fmt: skip
def linear_function(walk: LipschitzWalk, n: fx.Node) -> float:
    """The same of a function, with constant weights; on one channel where all are treated alike."""
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
    """A function as a module, so that it can be an operator."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self.function(x)
