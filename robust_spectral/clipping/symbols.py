"""Fourier symbols of convolution kernels on a cyclic grid, and clips of their singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from ..numerics import smaller_gram
from ..singular_values import representatives

RELAXATION = 1.8  # anything in (0, 2) converges


@dataclass(frozen=True)
class Transform:
    """The Fourier transform S of the kernels of a window on a cyclic grid, for one frequency of each conjugate pair.

    Kernels are (entries, g, o, i), symbols (frequencies, g, o, i). With every pair counted twice S is an isometry, but for
    windows that wrap onto themselves. With few entries it is faster by two matrices than by FFT.

    Attributes:
        cosine: Real part, (frequencies, entries).
        sine: Imaginary part, likewise.
        counts: How many frequencies each one stands for, (frequencies, 1).
        places: How many places the grid has.
    """

    cosine: Tensor
    sine: Tensor
    counts: Tensor
    places: int

    @classmethod
    def of(cls, size: Sequence[int], dilation: Sequence[int], grid: Sequence[int], device: torch.device) -> Transform:
        """That of a window of some size and dilation."""
        kept, counts, _ = (index.to(device) for index in representatives(grid))
        waves = []
        for k, d, n in zip(size, dilation, grid, strict=True):
            turns = torch.outer(torch.arange(n, device=device), torch.arange(k, device=device) * d) % n  # exact
            waves.append(torch.polar(torch.ones_like(turns, dtype=torch.float64), turns.double() * (-2 * math.pi / n)))
        wave = reduce(torch.kron, waves)[kept] / math.sqrt(prod(grid))
        return cls(wave.real.contiguous(), wave.imag.contiguous(), counts[:, None].double(), prod(grid))

    def symbols(self, kernel: Tensor) -> Tensor:
        """S."""
        flat = kernel.flatten(1)
        return torch.complex(self.cosine @ flat, self.sine @ flat).unflatten(1, kernel.shape[1:])

    def kernel(self, symbols: Tensor) -> Tensor:
        """The adjoint S*, conjugate frequencies included."""
        flat = symbols.flatten(1) * self.counts
        return (self.cosine.mT @ flat.real + self.sine.mT @ flat.imag).unflatten(1, symbols.shape[1:])


def penalty(symbols: Tensor, limit: float, spread: float) -> float:
    """The penalty: any converges, this one fast. ``spread`` is how many places the grid has per entry of the window.

    A single frequency has a share of 1 / spread in the window's entries, and multipliers compare to kernels as what a clip
    takes to what it leaves; the exponents are fitted to rounds counted. In a window that fills the grid the first round is
    the plain clip, and exact if the penalty is just ``spread``.
    """
    if spread <= 1:
        return spread
    taken = cut(symbols, limit)[0]
    ratio = float(taken.norm() / (symbols - taken).norm().clamp_min(1e-15 * taken.norm()))
    return spread * ratio**0.25 * (1 + ratio) ** 0.75


def cut(symbols: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """What a clip at ``limit`` takes from each symbol (frequencies, g, o, i), and from each singular value, 0 where nothing.

    By the eigenvectors of the smaller Gram matrix, faster than a singular value decomposition, and as exact while the largest
    value is of the order of the limit, which the penalty sees to after the first round.
    """
    rows, columns = symbols.shape[-2:]
    if min(rows, columns) == 1:
        sizes = torch.linalg.vector_norm(symbols, dim=(-2, -1), keepdim=True)
        return symbols * (1 - limit / sizes.clamp_min(limit)), (sizes[..., 0] - limit).clamp_min(0)
    squares, vectors = torch.linalg.eigh(smaller_gram(symbols))
    sizes = squares.clamp_min(0).sqrt().clamp_min(limit)
    rest = int((sizes == limit).sum(-1).min())  # the largest come last
    top, part = vectors[..., rest:], vectors[..., rest:] * (1 - limit / sizes[..., None, rest:])
    cut = part @ (top.mH @ symbols) if rows <= columns else (symbols @ part) @ top.mH
    return cut, (sizes - limit).clamp_min(0)


def symbol_norms(symbols: Tensor) -> Tensor:
    """The largest singular value of each group over all frequencies: (frequencies, g, o, i) -> (g,)."""
    if min(symbols.shape[-2:]) == 1:
        return torch.linalg.vector_norm(symbols, dim=(-2, -1)).amax(0)
    return torch.linalg.eigvalsh(smaller_gram(symbols))[..., -1].amax(0).clamp_min(0).sqrt()


def by_entries(kernel: Tensor, groups: int) -> Tensor:
    """(out, in/g, *window) -> (entries, g, out/g, in/g)."""
    return kernel.reshape(groups, len(kernel) // groups, kernel.shape[1], -1).movedim(-1, 0).contiguous()
