"""All singular values of a circular convolution, their multiplicities, and the effect of clipping every one of them.

A convolution with circular padding commutes with cyclic shifts, so the Fourier transform makes it block diagonal, with one
small matrix, the symbol, for each frequency. A stride s keeps every s-th output, so s input frequencies per axis are aliased
to one output frequency, and their symbols are concatenated in one block.
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
from ..operators import Shape, evaluating, is_overridden


@dataclass(frozen=True)
class DuplicateStructure:
    """Pairs of equal singular values in real circular convolutions: ``total = single + 2 * pairs``.

    Attributes:
        total: Number of singular values.
        single: Number of singular values that need not belong to a pair of equal values.
        pairs: Number of pairs of equal singular values, whatever the kernel.
        self_conjugate: The frequencies w = -w, to which the single values belong, with one index per axis.
    """

    total: int
    single: int
    pairs: int
    self_conjugate: tuple[Shape, ...]


@dataclass(frozen=True)
class RepresentationGap:
    """The gap between a circular convolution with clipped singular values and the convolutions with the module's window.

    Attributes:
        energy_outside: Frobenius norm of the clipped kernel's entries outside the window, divided by that of the whole kernel.
        norm_after_projection: Spectral norm after these entries are set to 0, in general above ``max_norm``.
        changed: Number of singular values above ``max_norm`` before the clip.
        total: Number of singular values.
    """

    energy_outside: float
    norm_after_projection: float
    changed: int
    total: int


def circular_singular_values(module: nn.Module, in_shape: Sequence[int]) -> Tensor:
    """All singular values of a convolution with circular padding whose output has the input's size divided by the stride.

    At the output frequency w the block is [K(w + a n / s) for a = 0, …, s - 1] / sqrt(s) on every axis, where K, (out, in), is
    the Fourier transform of the kernel wrapped around the grid. The padding's distribution between the two sides shifts the
    kernel, which multiplies K by phases and leaves the singular values unchanged. Blocks at w and -w are conjugate and
    decomposed once. Each group has its own block.

    Args:
        module: An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with ``padding_mode="circular"``; any dilation and groups,
            and any window. A window wider than the input wraps around, even more than once, where torch refuses to run.
            The module is neither run nor changed.
        in_shape: Shape of one input, (in channels, *grid).

    Returns:
        Singular values in descending order, zeros included, float64, shape (min(out elements, in elements),). The error of
        each is at most a few hundred roundings of the largest one. Costs prod(grid) log(prod(grid)) per pair of channels and
        one decomposition for every second output frequency; no operator applications.

    Raises:
        ValueError: ``in_shape`` does not fit the module, or its weights are not finite.
        NotImplementedError: the module is not such a convolution, or the stride does not divide the grid.

    Source: Sedghi, Gupta and Long, The Singular Values of Convolutional Layers (2019), for stride 1; the stride by the alias
    components of Vaidyanathan, Multirate Systems and Filter Banks (1993).
    """
    convolution, kernel, _, scale = _kernel_on_grid("circular_singular_values", module, in_shape)
    return _singular_values(kernel, convolution.groups, convolution.stride) * scale


def duplicate_structure(in_shape: Sequence[int], channels: int | tuple[int, int]) -> DuplicateStructure:
    """The number of singular values of a real circular convolution of stride 1 that must come in pairs of equal values.

    Let c = min(channels), and let e of the grid's axes have even length. Then at most c 2ᵉ singular values are single, and all
    others come in pairs, whatever the kernel. On one axis these are c values for odd n and 2c for even n; on two axes, c
    where both lengths are odd, 2c where one is even and 4c where both are. The spectrum of such a layer can therefore not be
    chosen freely, and clipping only one value of the largest pair leaves the norm unchanged.

    Proof: the kernel is real, so its transform has K(-w) = conj K(w), and conjugate matrices have the same c singular values.
    The frequencies with w = -w modulo n are w = 0 and, for even n, w = n / 2, on every axis; only their symbols do not
    determine another symbol. The numbers are exact for almost every kernel that fills the grid, because the symbols at one
    frequency of each pair may be any complex matrices, and those at self-conjugate frequencies any real ones. A smaller
    window may imply more equal values: with 1 x 1 kernels, and with windows no wider than the stride, all frequencies have
    the same singular values.

    With groups, give the channels of all groups together. With a stride, give the grid of the output and (out channels,
    prod(stride) · in channels).

    Args:
        in_shape: The grid, (n,) or (h, w), without channels.
        channels: (out channels, in channels), or one number for both.

    Raises:
        ValueError: ``in_shape`` is empty, a size is below 1, or ``channels`` has not one or two numbers.
    """
    grid, both = tuple(in_shape), (channels, channels) if isinstance(channels, int) else tuple(channels)
    if not grid or len(both) != 2 or min(*grid, *both) < 1:
        raise ValueError(
            f"duplicate_structure(in_shape={grid}, channels={channels}): needs a grid and channels, all at least 1"
        )
    own = tuple(product(*[(0,) if n % 2 else (0, n // 2) for n in grid]))
    total, single = prod(grid) * min(both), len(own) * min(both)
    return DuplicateStructure(total, single, (total - single) // 2, own)


def representation_gap(module: nn.Module, in_shape: Sequence[int], max_norm: float = 1.0) -> RepresentationGap:
    """The gap that clipping every singular value of a circular convolution at ``max_norm`` opens to the kernel's window.

    min(σ, max_norm) at every frequency gives the nearest circular convolution with a norm of at most max_norm, but its kernel
    fills the grid. The nearest convolution with the module's window, in Frobenius norm, has the same kernel with all entries
    outside the window set to 0, because the Frobenius norm of a circular convolution is sqrt(positions) times that of its
    kernel wrapped around the grid. Where the window overlaps itself on the grid, each position counts once.

    Args:
        module: As in `circular_singular_values`, with stride 1; it is not changed.
        in_shape: Shape of one input, (in channels, *grid).
        max_norm: Largest singular value after the clip, positive.

    Raises:
        ValueError: ``max_norm`` is not positive, or as `circular_singular_values`.
        NotImplementedError: the module has a stride, or as `circular_singular_values`.

    Source: Sedghi, Gupta and Long (2019) for the clip and the projection; Ebrahimpour Boroojeny, Telgarsky and Sundaram
    (AISTATS 2024) for the limitation that a kernel of a given window cannot have an arbitrary spectrum.
    """
    if not max_norm > 0:
        raise ValueError(f"representation_gap(max_norm={max_norm}): must be positive")
    convolution, kernel, window, scale = _kernel_on_grid("representation_gap", module, in_shape)
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
    projected = _singular_values(torch.where(window, clipped, 0.0), groups, stride)
    return RepresentationGap(
        energy_outside=float(outside / whole) if whole > 0 else 0.0,
        norm_after_projection=scale * float(projected[0]),
        changed=int(((excess > 0).flatten(1).sum(1) * counts.to(S.device)).sum()),
        total=len(projected),
    )


def _kernel_on_grid(call: str, module: nn.Module, in_shape: Sequence[int]) -> tuple[_ConvNd, Tensor, Tensor, float]:
    """The convolution, its kernel / scale wrapped around the grid (out, in/g, *grid), the window's mask (*grid), the scale."""
    convolution, grid = plain_circular(call, module, in_shape), tuple(in_shape)[1:]
    with torch.no_grad(), evaluating(module):
        weight = convolution.weight.detach()
    if weight.is_complex():
        raise NotImplementedError(f"{call}: the weight of {module} is complex; only real layers are covered")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{call}: the weight of {module} contains NaN or infinite values")
    scale = power_of_two(float(weight.abs().max()))
    kernel = _wrap(weight.double() / scale, convolution.dilation, grid)
    return convolution, kernel, _wrap(torch.ones_like(weight[0, 0]).double(), convolution.dilation, grid) > 0, scale


def _wrap(kernel: Tensor, dilation: Iterable[int], grid: Sequence[int]) -> Tensor:
    """Wrap the last axes of a kernel around a cyclic grid; entries that fall on one position are added."""
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


def _singular_values(kernel: Tensor, groups: int, stride: Sequence[int]) -> Tensor:
    kept, counts, _ = representatives([n // s for n, s in zip(kernel.shape[2:], stride, strict=True)])
    blocks = _blocks(kernel, groups, stride)[kept]
    if 1 in blocks.shape[-2:]:
        values = torch.linalg.vector_norm(blocks, dim=(-2, -1))
    else:
        values = torch.linalg.svdvals(blocks)
    return values.repeat_interleave(counts.to(values.device), dim=0).flatten().sort(descending=True).values


def representatives(grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One frequency of each pair (w, -w), the number of frequencies it represents (1 or 2), and the index of -w for every w.

    Frequencies are numbered in the order of the flattened grid.
    """
    flat, axes = torch.arange(prod(grid)), tuple(range(len(grid)))
    mirror = flat.reshape(*grid).flip(axes).roll([1] * len(grid), axes).flatten()
    kept = (mirror >= flat).nonzero()[:, 0]
    return kept, 1 + (mirror > flat)[kept].long(), mirror


def plain_circular(call: str, module: nn.Module, in_shape: Sequence[int]) -> _ConvNd:
    """Return the module if it is a circular convolution with torch's own forward pass and an output of size grid / stride.

    Raises:
        ValueError: ``in_shape`` does not fit the module.
        NotImplementedError: the module is not such a convolution, or its stride does not divide the grid.
    """
    own: Any = type(module)
    kind: Any = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind)), None)
    plain = kind is not None and (own.forward, own._conv_forward) == (kind.forward, kind._conv_forward)
    if not isinstance(module, _ConvNd) or not plain or is_overridden(module):
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
                f"pad by {max(r - s + 1, 0)} to {r} in total, not by {pad} (padding='same' is right for stride 1)"
            )
    return module
