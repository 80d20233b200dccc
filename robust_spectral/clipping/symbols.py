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

    Kernels are (entries, g, o, i), symbols (frequencies, g, o, i). If every pair is counted twice, S is an isometry, except for
    windows that wrap around the grid onto themselves. For windows of few entries two matrix products are faster than an FFT.

    Attributes:
        cosine: Real part, (frequencies, entries).
        sine: Imaginary part, likewise.
        counts: The number of frequencies that each one represents (1 or 2), (frequencies, 1).
        places: The number of positions on the grid.
    """

    cosine: Tensor
    sine: Tensor
    counts: Tensor
    places: int

    @classmethod
    def of(cls, size: Sequence[int], dilation: Sequence[int], grid: Sequence[int], device: torch.device) -> Transform:
        """The transform of a window of a given ``size`` and ``dilation`` on a ``grid``."""
        kept, counts, _ = (index.to(device) for index in representatives(grid))
        waves = []
        for k, d, n in zip(size, dilation, grid, strict=True):
            turns = torch.outer(torch.arange(n, device=device), torch.arange(k, device=device) * d) % n  # exact
            waves.append(torch.polar(torch.ones_like(turns, dtype=torch.float64), turns.double() * (-2 * math.pi / n)))
        wave = reduce(torch.kron, waves)[kept] / math.sqrt(prod(grid))
        return cls(wave.real.contiguous(), wave.imag.contiguous(), counts[:, None].double(), prod(grid))

    def symbols(self, kernel: Tensor) -> Tensor:
        """The symbols S K of a kernel K."""
        flat = kernel.flatten(1)
        return torch.complex(self.cosine @ flat, self.sine @ flat).unflatten(1, kernel.shape[1:])

    def kernel(self, symbols: Tensor) -> Tensor:
        """The adjoint S* applied to symbols, conjugate frequencies included."""
        flat = symbols.flatten(1) * self.counts
        return (self.cosine.mT @ flat.real + self.sine.mT @ flat.imag).unflatten(1, symbols.shape[1:])


def penalty(symbols: Tensor, limit: float, spread: float) -> float:
    """The penalty of the method of multipliers, which converges for any positive penalty, and fast for this one.

    ``spread`` is the number of grid positions per entry of the window. A single frequency determines 1 / spread of the window's
    entries, and the multipliers relate in size to the kernel as the part of the symbols removed by a clip to the part left; the
    exponents are fitted to counted rounds. In a window that fills the grid the first round clips the symbols directly, and is
    exact if the penalty equals ``spread``.
    """
    if spread <= 1:
        return spread
    taken = cut(symbols, limit)[0]
    ratio = float(taken.norm() / (symbols - taken).norm().clamp_min(1e-15 * taken.norm()))
    return spread * ratio**0.25 * (1 + ratio) ** 0.75


def cut(symbols: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The part of each symbol (frequencies, g, o, i) that a clip at ``limit`` removes, and the decrease of each singular value.

    Computed from the eigenvectors of the smaller Gram matrix: faster than a singular value decomposition, and as accurate while
    the largest value is of the order of the limit, which the penalty ensures after the first round.
    """
    rows, columns = symbols.shape[-2:]
    if min(rows, columns) == 1:
        sizes = torch.linalg.vector_norm(symbols, dim=(-2, -1), keepdim=True)
        return symbols * (1 - limit / sizes.clamp_min(limit)), (sizes[..., 0] - limit).clamp_min(0)
    squares, vectors = torch.linalg.eigh(smaller_gram(symbols))
    sizes = squares.clamp_min(0).sqrt().clamp_min(limit)
    rest = int((sizes == limit).sum(-1).min())  # eigenvalues are in ascending order
    top, part = vectors[..., rest:], vectors[..., rest:] * (1 - limit / sizes[..., None, rest:])
    cut = part @ (top.mH @ symbols) if rows <= columns else (symbols @ part) @ top.mH
    return cut, (sizes - limit).clamp_min(0)


def symbol_norms(symbols: Tensor) -> Tensor:
    """The largest singular value of each group over all frequencies: (frequencies, g, o, i) -> (g,)."""
    if min(symbols.shape[-2:]) == 1:
        return torch.linalg.vector_norm(symbols, dim=(-2, -1)).amax(0)
    return torch.linalg.eigvalsh(smaller_gram(symbols))[..., -1].amax(0).clamp_min(0).sqrt()


def by_entries(kernel: Tensor, groups: int) -> Tensor:
    """Rearrange a kernel (out, in/g, *window) to (entries, g, out/g, in/g)."""
    return kernel.reshape(groups, len(kernel) // groups, kernel.shape[1], -1).movedim(-1, 0).contiguous()
