"""Boxes, the lowest and highest values of a node's elements: intersection, widening and outward rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Box = tuple[Any, Any]  # lowest and highest values, tensors or tuples of them


def pairwise(function: Callable[..., Tensor], *values: Any) -> Any:
    """Apply a function to tensors, or to the corresponding tensors of several tuples."""
    if isinstance(values[0], Tensor):
        return function(*values)
    return tuple(function(*parts) for parts in zip(*values, strict=True))


def shifted(value: Any, distance: float) -> Any:
    """A tensor, or the tensors of a tuple, plus a number; whole numbers keep their values."""
    return pairwise(lambda x: x + distance if x.is_floating_point() else x, value)


def box_intersection(one: Box, other: Box) -> Box:
    """The box of values that lie in both boxes."""
    return pairwise(torch.maximum, one[0], other[0]), pairwise(torch.minimum, one[1], other[1])


def rounded_outward(box: Box) -> Box:
    """The box enlarged by more than float64 rounding errors; rules account for cancellation themselves."""
    return pairwise(lambda x: _moved(x, -1), box[0]), pairwise(lambda x: _moved(x, 1), box[1])


def _moved(x: Tensor, sign: int) -> Tensor:
    """Numbers moved outward; infinite and whole numbers stay."""
    return torch.where(x.isinf(), x, x + sign * (1e-12 * x.abs() + 1e-300)) if x.is_floating_point() else x
