"""Boxes, the lowest and highest values of a node's elements: their intersection, widening and outward rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Box = tuple[Any, Any]  # lowest and highest values, tensors or tuples of them


def of_each_part(function: Callable[[Tensor], Box], value: Any) -> Box:
    """A box from a value that may be a tuple of tensors."""
    if isinstance(value, Tensor):
        return function(value)
    lows, highs = zip(*(function(part) for part in value), strict=True)
    return tuple(lows), tuple(highs)


def pairwise(function: Callable[..., Tensor], *values: Any) -> Any:
    """A function of tensors, applied to tensors or, part by part, to tuples of them."""
    if isinstance(values[0], Tensor):
        return function(*values)
    return tuple(function(*parts) for parts in zip(*values, strict=True))


def widened(box: Box, by: Box) -> Box:
    """The box of a tensor whose elements, or some of them, were replaced by others, in whatever order."""
    lowest, highest = (float(end.min() if end is by[0] else end.max()) for end in by)
    return box[0].clamp_max(lowest), box[1].clamp_min(highest)


def box_intersection(one: Box, other: Box) -> Box:
    """The box of values that lie in both boxes."""
    return pairwise(torch.maximum, one[0], other[0]), pairwise(torch.minimum, one[1], other[1])


def rounded_outward(box: Box) -> Box:
    """Moved outward past what float64 arithmetic errs by; rules account for cancellation themselves."""
    low = pairwise(lambda x: x - 1e-12 * x.abs() - 1e-300, box[0])
    return low, pairwise(lambda x: x + 1e-12 * x.abs() + 1e-300, box[1])
