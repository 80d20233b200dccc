"""Upper bounds of a convolution's norm from its kernel, one theorem each: deterministic, in float64, rounded outward.

The bounds are valid for zero and circular padding and any input size, stride and dilation. A padding that repeats inputs
multiplies them by its own norm, `Kernel.gain`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from ..numerics import largest_singular_value, power_of_two, round_down, round_up
from ..operators import Kernel, LinearOperator

SYMBOL_WORK = 8e9  # multiply-adds that take a few seconds on two cores


def schur_bound(kernel: Kernel) -> float:
    """The bound sqrt(‖A‖₁ ‖A‖_∞) from sums of absolute kernel entries, the largest over groups (Schur's test).

    Each output uses each entry of its filter at most once, and each input is multiplied by each entry at most once, whatever
    the stride, dilation and amount of zero or circular padding.
    """
    scale = power_of_two(float(kernel.weight.abs().max()))
    size = (kernel.weight / scale).abs().flatten(2).sum(2)  # (out, in/g)
    size = size.reshape(kernel.groups, -1, size.shape[1])  # (g, out/g, in/g)
    largest = float((size.sum(1).amax(1) * size.sum(2).amax(1)).sqrt().max())
    return round_up(kernel.gain * scale * largest, kernel.weight[0].numel())


def symbol_bound(kernel: Kernel, most_work: float = SYMBOL_WORK) -> float:
    """An upper bound of the supremum over all frequencies of the norm of the kernel's symbol, the largest over groups.

    A zero-padded convolution is a section of the convolution on the infinite grid, whose norm is this supremum, and a circular
    one samples the symbol. The modulus of a trigonometric polynomial of degree d is at most 1 / cos(π d / N) times its largest
    value at N > 2 d equispaced points (Ehlich and Zeller 1964). This is applied along every axis to ⟨y, K(ω) x⟩, for fixed x
    and y such a polynomial, of degree (window - 1) / 2 once centred. The grid is the finest that ``most_work`` multiply-adds
    allow; the bound is inf where even the coarsest grid costs more, or with more than two axes.
    """
    c_out, c_in, *window = kernel.weight.shape
    per_out = c_out // kernel.groups
    work = kernel.groups * per_out * c_in * min(per_out, c_in) / 2
    degrees = [math.ceil((w - 1) / 2) for w in window]
    grid = next((grid for grid in _grids(degrees) if prod(grid) * work <= most_work), None)
    if grid is None or len(window) > 2:
        return math.inf
    slack = prod(1 / math.cos(math.pi * d / n) for d, n in zip(degrees, grid, strict=True))
    largest, operations = _largest_symbol(kernel, grid)
    return round_up(kernel.gain * slack * largest, operations)


def fourier_norm(kernel: Kernel, most_work: float = SYMBOL_WORK) -> tuple[float, float] | None:
    """The norm of a circular convolution, rounded down and up; None for others, and where it costs more than ``most_work``.

    The Fourier transform makes a circular convolution block diagonal, with the symbols at the frequencies of its grid as
    blocks.
    """
    c_out, c_in = kernel.weight.shape[:2]
    per_out = c_out // kernel.groups
    if kernel.grid is None or prod(kernel.grid) * c_out * c_in * min(per_out, c_in) / 2 > most_work:
        return None
    value, operations = _largest_symbol(kernel, list(kernel.grid))
    return round_down(value, operations), round_up(value, operations)


def _largest_symbol(kernel: Kernel, grid: list[int]) -> tuple[float, float]:
    """The largest norm of the symbols on a grid no smaller than the window, and a number of roundings that bounds the error."""
    scale = power_of_two(float(kernel.weight.abs().max()))
    pieces = [largest_singular_value(piece) for piece in _symbols(kernel.weight.double() / scale, grid, kernel.groups)]
    operations = max(operations for _, operations in pieces) + kernel.weight[0].numel() + prod(grid)
    return max(pieces)[0] * scale, operations


def _grids(degrees: list[int]) -> Iterator[list[int]]:
    """Numbers of points on the axes, from many to the fewest that give a bound; one on an axis where the window has one tap."""
    for halvings in range(6):
        yield [max(max(64, 32 * d) >> halvings, 2 * d + 2) if d else 1 for d in degrees]


def frobenius_bound(A: LinearOperator) -> float:
    """An upper bound of the Frobenius norm: each kernel entry acts at most once per output position, and per input position.

    Where the padding repeats inputs, ‖A‖_F ≤ ‖convolution of the padded input‖_F ‖padding‖, and entries are counted only per
    output position, which for an adjoint is an input position; the larger number of the two is taken.
    """
    assert A.kernel is not None
    choose = max if A.kernel.gain > 1 else min
    positions = choose(prod(A.out_shape[1:]), prod(A.in_shape[1:]))
    scale = power_of_two(float(A.kernel.weight.abs().max()))
    largest = float((A.kernel.weight / scale).norm()) * math.sqrt(positions)
    return round_up(A.kernel.gain * scale * largest, A.kernel.weight.numel())


def _symbols(weight: Tensor, grid: list[int], groups: int) -> Iterator[Tensor]:
    """The symbols (frequencies, g, out/g, in/g) in pieces, without the conjugate half of the frequencies on the last axis."""
    axes = list(range(2, 2 + len(grid)))
    spectrum = torch.fft.rfftn(weight, s=grid, dim=axes)
    out, inn = weight.shape[:2]
    flat = spectrum.reshape(groups, out // groups, inn, -1).permute(3, 0, 1, 2)
    yield from flat.split(max(1, int(2**22 // (out * inn))))
