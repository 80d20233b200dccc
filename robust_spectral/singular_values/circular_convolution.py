"""The whole spectrum of a convolution that wraps around, which of its values come twice, and what clipping them all asks.

A convolution with circular padding commutes with cyclic shifts, so the Fourier transform makes it block diagonal: one small
matrix for each frequency, its symbol. A stride s keeps every s-th output, so s input frequencies per axis become one output
frequency and their symbols stand side by side in one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..numerics import power_of_two
from ..operators import Shape, evaluating, has_forward_hooks


@dataclass(frozen=True)
class DuplicateStructure:
    """How the singular values of real circular convolutions are tied: ``total = single + 2 * pairs``.

    Attributes:
        total: How many singular values there are.
        single: How many of them, at most, are not tied to another one.
        pairs: How many pairs of equal singular values there are, at least.
        self_conjugate: The frequencies that are their own mirror image, where the single ones live, one index an axis.
    """

    total: int
    single: int
    pairs: int
    self_conjugate: tuple[Shape, ...]


@dataclass(frozen=True)
class RepresentationGap:
    """How far a spectrum clipped value by value is from the layers that the kernel's window allows.

    Attributes:
        energy_outside: Frobenius norm of what the clipped convolution has outside the window, divided by the whole of it.
        norm_after_projection: Spectral norm once that is cut off, in general above the ``max_norm`` that was asked for.
        changed: How many singular values were above ``max_norm``.
        total: How many there are.
    """

    energy_outside: float
    norm_after_projection: float
    changed: int
    total: int


def circular_singular_values(module: nn.Module, in_shape: Sequence[int]) -> Tensor:
    """All singular values of a convolution with circular padding whose output has the input's size divided by the stride.

    At the output frequency w the block is [K(w + a n / s) for a = 0, …, s - 1] / sqrt(s) on every axis, K being the Fourier
    transform of the kernel laid around the grid, (out, in): a shifted delta's transform has modulus 1, so the amount of
    padding on either side only turns phases. Blocks at w and -w are conjugate and decomposed once. Groups have a block each.

    Args:
        module: An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with ``padding_mode="circular"``; any dilation and groups,
            and any window: it wraps around where it is wider than the input, more than once too, where torch refuses to run.
            It is not run, and not changed.
        in_shape: Shape of one input, (in channels, *grid).

    Returns:
        Singular values, descending, shape (min(out elements, in elements),), zeros included, float64. Each errs, on either
        side, by a few hundred roundings of the largest one. Costs prod(grid) log(prod(grid)) per pair of channels and one
        decomposition for every second output frequency; no operator applications.

    Raises:
        ValueError: ``in_shape`` does not fit the module, or its weights are not finite.
        NotImplementedError: the module is not such a convolution, or the stride does not divide the grid.

    Source: Sedghi, Gupta and Long, The Singular Values of Convolutional Layers (2019), for stride 1; the stride by the alias
    components of Vaidyanathan, Multirate Systems and Filter Banks (1993).
    """
    convolution, kernel, _, scale = _on_grid("circular_singular_values", module, in_shape)
    return _values(kernel, convolution.groups, convolution.stride) * scale


def duplicate_structure(in_shape: Sequence[int], channels: int | tuple[int, int]) -> DuplicateStructure:
    """Which singular values of a real circular convolution of stride 1 are bound to come in pairs.

    Let c = min(channels) and let e of the grid's axes have even length. Then c 2ᵉ singular values may be single, and all the
    others come in pairs, whatever the kernel: on one axis c of them for odd n and 2c for even n, on two axes c where both
    lengths are odd, 2c where one is even and 4c where both are. So the spectrum of such a layer cannot be set at will, and
    clipping one value of a pair alone leaves the norm as it is.

    Proof: the kernel is real, so its transform has K(-w) = conj K(w), and conjugate matrices have the same c singular values.
    The frequencies with w = -w modulo n are w = 0 and, for even n, w = n / 2, on every axis. Only there nothing ties the
    symbol to another one. The numbers are attained: for almost every kernel that fills the grid they are exact, for the
    symbols of one frequency of each pair may be any complex matrices and those of self-conjugate frequencies any real ones.
    A smaller window may tie more: with 1 x 1 kernels, and windows no wider than the stride, all frequencies are alike.

    Groups change nothing when ``channels`` are those of all groups together. With a stride the same holds for the grid of the
    output and (out channels, prod(stride) · in channels).

    Args:
        in_shape: The grid, (n,) or (h, w), without channels.
        channels: (out channels, in channels), or one number for both.

    Raises:
        ValueError: ``in_shape`` is empty, or a size is below 1.
    """
    grid, both = tuple(in_shape), (channels, channels) if isinstance(channels, int) else tuple(channels)
    if not grid or len(both) != 2 or min(*grid, *both) < 1:
        raise ValueError(
            f"duplicate_structure(in_shape={grid}, channels={channels}): give the grid and the channels, from 1 up"
        )
    own = tuple(product(*[(0,) if n % 2 else (0, n // 2) for n in grid]))
    total, single = prod(grid) * min(both), len(own) * min(both)
    return DuplicateStructure(total, single, (total - single) // 2, own)


def representation_gap(module: nn.Module, in_shape: Sequence[int], max_norm: float = 1.0) -> RepresentationGap:
    """What clipping every singular value of a circular convolution at ``max_norm`` asks of the kernel's window.

    min(σ, max_norm) at every frequency gives the nearest circular convolution of no larger norm, but its kernel fills the grid.
    The nearest kernel with the module's window, in Frobenius norm, is what one gets by dropping all other entries, for the
    norm of a convolution is sqrt(positions) times that of its kernel laid around the grid. Where the window wraps onto
    itself, its entries' places count once.

    Args:
        module: As in `circular_singular_values`, with stride 1; it is not changed.
        in_shape: Shape of one input, (in channels, *grid).
        max_norm: Where to clip, positive.

    Raises:
        ValueError: ``max_norm`` is not positive, or as `circular_singular_values`.
        NotImplementedError: the module has a stride, or as `circular_singular_values`.

    Source: the clipped and projected layers are those of Sedghi, Gupta and Long (2019); that a window does not hold a
    spectrum set at will is the limitation named by Ebrahimpour Boroojeny, Telgarsky and Sundaram (AISTATS 2024).
    """
    if not max_norm > 0:
        raise ValueError(f"representation_gap(max_norm={max_norm}): must be positive")
    convolution, kernel, window, scale = _on_grid("representation_gap", module, in_shape)
    if set(convolution.stride) != {1}:
        raise NotImplementedError(f"representation_gap: {module} has a stride; only stride 1 is covered")
    grid, groups, stride = kernel.shape[2:], convolution.groups, convolution.stride
    kept, counts, mirror = representatives(grid)
    U, S, Vh = torch.linalg.svd(_blocks(kernel, groups, stride)[kept], full_matrices=False)
    excess = (S - max_norm / scale).clamp_min(0)
    half = (U * excess[..., None, :]) @ Vh  # (kept, g, out/g, in/g)
    symbols = half.new_empty(prod(grid), *half.shape[1:])
    symbols[mirror[kept]], symbols[kept] = half.conj(), half
    back = symbols.reshape(*grid, *kernel.shape[:2]).movedim((-2, -1), (0, 1))
    change = torch.fft.ifftn(back, dim=list(range(2, kernel.ndim))).real
    clipped = kernel - change
    outside, whole = torch.where(window, 0.0, change).norm(), clipped.norm()
    projected = _values(torch.where(window, clipped, 0.0), groups, stride)
    return RepresentationGap(
        energy_outside=float(outside / whole) if whole > 0 else 0.0,
        norm_after_projection=scale * float(projected[0]),
        changed=int(((excess > 0).flatten(1).sum(1) * counts.to(S.device)).sum()),
        total=len(projected),
    )


def _on_grid(call: str, module: nn.Module, in_shape: Sequence[int]) -> tuple[_ConvNd, Tensor, Tensor, float]:
    """The convolution, its kernel / scale laid around the grid (out, in/g, *grid), where its window lies (*grid), the scale."""
    convolution, grid = plain_circular(call, module, in_shape), tuple(in_shape)[1:]
    with torch.no_grad(), evaluating(module):
        weight = convolution.weight.detach()
    if weight.is_complex():
        raise NotImplementedError(f"{call}: the weight of {module} is complex; only real layers are covered")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{call}: the weight of {module} holds NaN or infinite values")
    scale = power_of_two(float(weight.abs().max()))
    kernel = _wrap(weight.double() / scale, convolution.dilation, grid)
    return convolution, kernel, _wrap(torch.ones_like(weight[0, 0]).double(), convolution.dilation, grid) > 0, scale


def _wrap(kernel: Tensor, dilation: Iterable[int], grid: Sequence[int]) -> Tensor:
    """Lay the last axes of a kernel around a cyclic grid; entries that meet at one place add up."""
    for axis, (d, n) in enumerate(zip(dilation, grid, strict=True), start=kernel.ndim - len(grid)):
        places = torch.arange(kernel.shape[axis], device=kernel.device) * d % n
        kernel = kernel.new_zeros(*kernel.shape[:axis], n, *kernel.shape[axis + 1 :]).index_add(axis, places, kernel)
    return kernel


def _blocks(kernel: Tensor, groups: int, stride: Sequence[int]) -> Tensor:
    """The diagonal blocks (output frequencies, g, out/g, prod(stride) · in/g) of a kernel that fills the grid."""
    out, per_in, *grid = kernel.shape
    dims, size = len(grid), prod(stride)
    split = [side for n, s in zip(grid, stride, strict=True) for side in (s, n // s)]  # frequency = alias · n / s + rest
    spectrum = torch.fft.fftn(kernel, dim=list(range(2, 2 + dims))).reshape(groups, out // groups, per_in, *split)
    axes = [*range(4, 4 + 2 * dims, 2), 0, 1, *range(3, 3 + 2 * dims, 2), 2]
    return spectrum.permute(axes).reshape(prod(grid) // size, groups, out // groups, size * per_in) / math.sqrt(size)


def _values(kernel: Tensor, groups: int, stride: Sequence[int]) -> Tensor:
    kept, counts, _ = representatives([n // s for n, s in zip(kernel.shape[2:], stride, strict=True)])
    blocks = _blocks(kernel, groups, stride)[kept]
    if 1 in blocks.shape[-2:]:
        values = torch.linalg.vector_norm(blocks, dim=(-2, -1))
    else:
        values = torch.linalg.svdvals(blocks)
    return values.repeat_interleave(counts.to(values.device), dim=0).flatten().sort(descending=True).values


def representatives(grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One frequency of each conjugate pair, how many it stands for (1 or 2), and the mirror image of every frequency."""
    flat, axes = torch.arange(prod(grid)), tuple(range(len(grid)))
    mirror = flat.reshape(*grid).flip(axes).roll([1] * len(grid), axes).flatten()
    kept = (mirror >= flat).nonzero()[:, 0]
    return kept, 1 + (mirror > flat)[kept].long(), mirror


def plain_circular(call: str, module: nn.Module, in_shape: Sequence[int]) -> _ConvNd:
    """Refuse all but plain convolutions that map the cyclic grid onto every s-th of its points.

    Raises:
        ValueError: ``in_shape`` does not fit the module.
        NotImplementedError: the module is another one, or its stride does not divide the grid.
    """
    own: Any = type(module)
    kind: Any = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind)), None)
    plain = kind is not None and (own.forward, own._conv_forward) == (kind.forward, kind._conv_forward)
    if not isinstance(module, _ConvNd) or not plain or has_forward_hooks(module):
        raise NotImplementedError(f"{call}: {module} is not a plain nn.Conv1d, nn.Conv2d or nn.Conv3d without forward hooks")
    if module.padding_mode != "circular":
        raise NotImplementedError(
            f"{call}: {module} pads with {module.padding_mode!r}; only padding_mode='circular' is covered"
        )
    shape = tuple(in_shape)
    if len(shape) != len(module.kernel_size) + 1 or shape[0] != module.in_channels or min(shape) < 1:
        raise ValueError(
            f"{call}(in_shape={shape}): {module} takes ({module.in_channels}, {len(module.kernel_size)} spatial axes)"
        )
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    padded = {"same": reach, "valid": [0] * len(reach)}
    pads = padded[module.padding] if isinstance(module.padding, str) else [2 * p for p in module.padding]
    for n, pad, r, s in zip(shape[1:], pads, reach, module.stride, strict=True):
        where, m = f"{call}(in_shape={shape}): {module}", (n + pad - r - 1) // s + 1
        if n % s:
            raise NotImplementedError(f"{where} has a stride of {s}, which does not divide {n}; give a multiple of it")
        if m != n // s:
            raise NotImplementedError(
                f"{where} takes {n} positions to {m} in place of {n // s}, so it is not circular; "
                f"pad by {max(r - s + 1, 0)} to {r} in all, not by {pad} (padding='same' does where the stride is 1)"
            )
    return module
