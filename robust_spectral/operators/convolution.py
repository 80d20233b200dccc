"""The settings of a convolution module for torch.convolution, and the kernel from which bounds of its norm are computed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from .base import Kernel, Shape


def convolution_settings(module: _ConvNd) -> tuple[Any, ...] | None:
    """Return (stride, padding, dilation, transposed, output padding, groups) as torch.convolution takes them.

    None unless the padding is by zeros, equally many at both ends of each axis.
    """
    padding = symmetric_padding(module)
    if padding is None or module.padding_mode != "zeros":
        return None
    return module.stride, padding, module.dilation, module.transposed, module.output_padding, module.groups


def bounding_kernel(module: _ConvNd, weight: Tensor, in_shape: Shape) -> Kernel:
    """The kernel for norm bounds, in polyphase form: each phase of a stride becomes an input channel of its own.

    Circular padding maps each phase onto itself only where the stride divides the input's size. Elsewhere the stride is
    ignored: the strided convolution consists of rows of the one with stride 1, so that the bounds still hold. A transposed
    convolution gets the ``H`` of the kernel of the convolution whose adjoint it is.
    """
    for axis, (stride, dilation) in enumerate(zip(periods(module, in_shape), module.dilation, strict=True)):
        if stride > 1:
            weight = _phases(weight, 2 + axis, stride, dilation)
    gain, wraps = _padding_gain(module, in_shape), module.padding_mode == "circular"
    kernel = Kernel(weight, module.groups, gain, _cyclic_grid(module, in_shape) if wraps and gain == 1 else None)
    return kernel.H if module.transposed else kernel


def phases_of_taps(module: _ConvNd, in_shape: Shape) -> Tensor:
    """A matrix (taps, phases): 1 where a tap of the window multiplies inputs of that phase, else 0.

    The phases are those of all axes together, as many on each axis as `periods` gives.
    """
    table = torch.ones(1, 1, device="cpu")
    for stride, dilation, window in zip(periods(module, in_shape), module.dilation, module.kernel_size, strict=True):
        table = torch.kron(table, F.one_hot(torch.arange(window, device="cpu") * dilation % stride, stride))
    return table


def periods(module: _ConvNd, in_shape: Shape) -> list[int]:
    """The number of phases that `bounding_kernel` turns into channels on each axis: the stride, or 1 where it is ignored."""
    wraps = module.padding_mode == "circular"
    return [1 if wraps and size % stride else stride for size, stride in zip(in_shape[1:], module.stride, strict=True)]


def _cyclic_grid(module: _ConvNd, in_shape: Shape) -> Shape | None:
    """The output's size where a circularly padded convolution without dilation has input size / stride outputs; else None.

    Such a convolution commutes with cyclic shifts of the input by its stride.
    """
    reversed_padding: Any = module._reversed_padding_repeated_twice
    sizes = zip(in_shape[1:], module.kernel_size, module.stride, module.dilation, strict=True)
    grid = []
    for axis, (n, k, s, d) in enumerate(sizes):
        added = sum(reversed_padding[2 * (len(in_shape) - 2 - axis) :][:2])
        if n % s or d != 1 or (n + added - k) // s + 1 != n // s:
            return None
        grid.append(n // s)
    return tuple(grid)


def _phases(weight: Tensor, axis: int, stride: int, dilation: int) -> Tensor:
    """Every stride-th tap of an axis as a channel of its own: (out, in * stride, *window), with a shorter window."""
    places = torch.arange(weight.shape[axis], device=weight.device) * dilation
    length = -(-((weight.shape[axis] - 1) * dilation + 1) // stride)
    spread = weight.new_zeros(*weight.shape[:axis], length * stride, *weight.shape[axis + 1 :])
    spread = spread.index_add(axis, places, weight)
    return spread.unflatten(axis, (length, stride)).movedim(axis + 1, 2).flatten(1, 2)


def _padding_gain(module: _ConvNd, in_shape: Shape) -> float:
    """The norm of the padding, rounded up; 1 for a padding that the bounds from the kernel already cover.

    A padding that repeats inputs is a matrix with a single 1 in each row, so its norm along an axis is the square root of the
    number of copies of the input that is repeated most often. The bounds cover zeros, and circular padding so narrow that no
    input meets a kernel entry twice, with a window short enough not to overlap itself around the grid.
    """
    if module.padding_mode == "zeros":
        return 1.0
    reversed_padding: Any = module._reversed_padding_repeated_twice
    gain = 1.0
    for axis, size in enumerate(in_shape[1:]):
        before, after = reversed_padding[2 * (len(in_shape) - 2 - axis) :][:2]
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        if module.padding_mode == "circular" and before + after <= reach < size:
            continue
        cells = F.pad(
            torch.arange(size, dtype=torch.float64, device="cpu")[None, None], (before, after), mode=module.padding_mode
        )
        gain *= math.sqrt(int(torch.bincount(cells.flatten().long()).max())) * (1 + 1e-15)
    return gain


def symmetric_padding(module: _ConvNd) -> Shape | None:
    """The padding at each end of every spatial axis; None where the two ends differ ('same' with an odd reach).

    The reach of a window is dilation * (taps - 1).
    """
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "valid":
        return (0,) * len(reach)
    return tuple(r // 2 for r in reach) if all(r % 2 == 0 for r in reach) else None
