"""Convolutions on smaller feature maps, where an application costs a fraction and the top directions are nearly the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from ..layers import LinearLayer
from ..operators import LinearOperator, is_overridden
from ..singular_values import from_groups, to_groups, unit_rows

_SMALL_MAP = 8  # length of a side, at least; also at least twice the window's extent
_SMOOTH = ("linear", "bilinear", "trilinear")  # modes of interpolation, by number of axes


def on_small_map(layer: LinearLayer) -> LinearLayer:
    """A convolution on a feature map of about `_SMALL_MAP` positions a side; any other layer unchanged.

    With hooks or a replaced forward pass, a convolution may take no other feature map.
    """
    module = layer.module
    if not isinstance(module, _ConvNd) or is_overridden(module) or len(layer.in_shape) != 1 + len(module.kernel_size):
        return layer
    axes = []
    for size, window, stride, dilation in zip(
        layer.in_shape[1:], module.kernel_size, module.stride, module.dilation, strict=True
    ):
        smaller = max(_SMALL_MAP, 2 * (dilation * (window - 1) + 1))
        axes.append(min(size, smaller + (size - smaller) % stride))  # strides are aligned as on the whole map
    return replace(layer, in_shape=(layer.in_shape[0], *axes))


def on_whole_map(rows: Tensor, small: LinearOperator, whole: LinearOperator, layer: LinearLayer) -> Tensor:
    """Rows (groups, 1, n) of the small operator on the whole map: padded with zeros and, without stride, also stretched.

    With zero padding in the layer, the image of the padded row is at least as long as on the small map; the image of the
    stretched row is longer if the direction varies slowly.
    """
    inner, outer = small.in_shape, whole.in_shape
    module: Any = layer.module
    margins: list[int] = []
    for size, large, stride in zip(inner[1:], outer[1:], module.stride, strict=True):
        before = (large - size) // 2 // stride * stride
        margins = [before, large - size - before, *margins]
    X = from_groups(rows, inner)
    inside = to_groups(F.pad(X, margins), whole.groups)
    if set(module.stride) != {1}:
        return inside
    spread = F.interpolate(X, outer[1:], mode=_SMOOTH[len(outer) - 2])
    return torch.cat([inside, unit_rows(to_groups(spread, whole.groups))[0]], 1)
