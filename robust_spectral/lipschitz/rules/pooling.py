"""Rules of maxima, over windows or axes; in overlapping windows an element may be the maximum of several."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...numerics import product_up
from ..registry import rule
from ..walk import LipschitzWalk
from .node_arguments import axes_named, axes_of, given, source_of


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def max_pool(walk: LipschitzWalk, n: fx.Node) -> float:
    """Max-pooling has constant sqrt(k) if an element lies in at most k windows.

    Each output changes by no more than one of the elements in its window. Along each axis an element lies in at most
    ceil(window / stride) windows, or as many as a window has elements if windows are dilated.
    """
    module: Any = walk.called(n)
    overlap = _overlap(axes_named(type(module).__name__), module.kernel_size, module.stride, module.dilation)
    return product_up(walk.bound(source_of(walk, n)), overlap)


@rule(F.max_pool1d, F.max_pool2d, F.max_pool3d)
def max_pool_function(walk: LipschitzWalk, n: fx.Node) -> float:
    """The bound of `max_pool`, for the functions."""
    axes = {F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3}[n.target]  # type: ignore[index]
    told = given(n, "kernel_size", "stride", "padding", "dilation")
    window = told["kernel_size"]
    return product_up(
        walk.bound(source_of(walk, n)), _overlap(axes, window, told.get("stride") or window, told.get("dilation", 1))
    )


def _overlap(axes: int, *settings: Any) -> float:
    """Square root of the most windows that an element lies in, from window, stride and dilation; rounded up."""
    window, stride, dilation = (tuple(v) if isinstance(v, tuple | list) else (v,) * axes for v in settings)
    each = [w if d > 1 else math.ceil(w / s) for w, s, d in zip(window, stride, dilation, strict=True)]
    return math.nextafter(math.sqrt(math.prod(each)), math.inf)


@rule("amax", "amin", torch.amax, torch.amin)
def extreme(walk: LipschitzWalk, n: fx.Node) -> float:
    """A maximum or minimum has constant 1: it changes by no more than one of its elements."""
    axes = axes_of(walk, n)
    return walk.bound(source_of(walk, n)) if axes and 0 not in axes else math.inf


@rule(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def adaptive_max_pool(walk: LipschitzWalk, n: fx.Node) -> float:
    """A maximum over one window per channel has constant 1; several windows may overlap and are not covered."""
    axes = axes_named(type(walk.called(n)).__name__)
    return walk.bound(source_of(walk, n)) if set(walk.env[n].shape[-axes:]) == {1} else math.inf
