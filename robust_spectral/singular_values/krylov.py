"""Krylov spaces of an operator, built for all of its groups in parallel, with full reorthogonalisation.

`golub_kahan` bidiagonalises with any number of steps. `krylov_space` takes a fixed, small number of steps, during which
nothing is read from a GPU; `rayleigh_ritz` then finds the singular values on the host.

A block has shape (groups, k, elements / groups), with one vector per row. One application of a grouped operator maps the
vectors of all groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod

import torch
from torch import Tensor

from ..operators import LinearOperator

_LEAST_GRAM_EIGENVALUE = 3e-3  # combinations of unit rows with a smaller Gram eigenvalue count as linearly dependent
_LEAST_GRAM_ROUNDINGS = 16  # the least value of that threshold, in units of rounding

NOT_FINITE = "the operator returned NaN or infinite values, or their products overflow"


@dataclass(frozen=True)
class Bidiagonalization:
    """The relation A V = U B after some block steps, with vectors as rows of U and V, and the coupling to the next block."""

    U: Tensor  # (g, m, out/g)
    V: Tensor  # (g, m, in/g)
    B: Tensor  # (g, m, m), B[l, j] = <U_l, A V_j>
    coupling: Tensor  # (g, b, b): A.H U_last = (within V) + coupling @ V_next
    block: int

    @property
    def exhausted(self) -> bool:
        """Whether the Krylov space is invariant, so that further steps find nothing new. Waits for the device.

        Raises:
            ValueError: the operator returned NaN or infinite values, or their products overflow.
        """
        size = float(self.coupling.abs().max() + 0 * self.B[:, :, -self.block :].sum())  # 0 times infinity is NaN
        if not math.isfinite(size):
            raise ValueError(NOT_FINITE)
        return size == 0


def golub_kahan(A: LinearOperator, start: Tensor, basis: int | None = None) -> Iterator[Bidiagonalization]:
    """Block Golub-Kahan bidiagonalisation of every group, one block a step, with full reorthogonalisation.

    A direction whose Krylov space has become invariant continues as a zero vector, which changes no result. With ``basis`` the
    bases are limited to about that many vectors: full bases are compressed to the leading half of the Ritz vectors, for which
    A V = U B remains true with a diagonal B, and the run continues with the next block.
    """
    block = start.shape[1]
    V, U = _Basis(start), _Basis(start.new_empty(*start.shape[:2], prod(A.out_shape) // A.groups))
    V.extend(start)
    B = start.new_zeros(A.groups, 0, 0)
    while True:
        size = V.size
        H = U.extend(apply_grouped(A, V.last))
        B = torch.cat([torch.nn.functional.pad(B, (0, 0, 0, block)), H.mT], dim=2)
        coupling = V.extend(apply_grouped(A.H, U.last))[:, :, size:]
        yield Bidiagonalization(U.rows[:, :size], V.rows[:, :size], B, coupling, block)
        if basis is not None and size + block > basis:
            left, values, rightH = torch.linalg.svd(B)
            kept = max(basis // 2, 2 * block)
            U.compress(left[:, :, :kept].mT)
            V.compress(rightH[:, :kept], following=block)
            B = torch.diag_embed(values[:, :kept])


@dataclass(frozen=True)
class KrylovSpace:
    """Rows that span a search space of each group, and their images under A.

    The first rows may be arbitrary, the others are nearly orthonormal Krylov vectors. From the step on at which the Krylov
    space is invariant, the rows consist of rounding errors, zeros or NaN, which `rayleigh_ritz` leaves out.
    """

    V: Tensor  # (g, m, in/g)
    images: Tensor  # (g, m, out/g)
    lengths: Tensor  # (g, Krylov vectors), the length of each before it was divided by it; inf where not recorded

    def numbers(self) -> list[Tensor]:
        """The small tensors that `rayleigh_ritz` takes: lengths, Gram matrix of the rows, Gram matrix of the images."""
        return [self.lengths, self.V @ self.V.mT, self.images @ self.images.mT]


def krylov_space(A: LinearOperator, start: Tensor, steps: int, beside: Tensor | None = None) -> KrylovSpace:
    """The Krylov space of A.H A after a fixed, small number of ``steps`` from ``start``, without waiting for a GPU.

    The singular values of A on this space are those of as many steps of bidiagonalisation, for fewer computations. Each vector
    is orthogonalised against the last two vectors, then once against all: the components along the last two are large, and
    their rounding errors would not be small next to a short remainder.

    Rows ``beside``, (g, any number, in/g), of length 1 or 0, extend the space unchanged. Kept out of the start, they cannot
    cancel its component along a direction that the search should find.
    """
    beside = start[:, :0] if beside is None else beside
    seen = [apply_grouped(A, beside)] if beside.shape[1] else []
    if start.shape[1] > 1:
        state = next(islice(golub_kahan(A, start), steps - 1, None))
        unknown = torch.full_like(state.V[:, :, 0], math.inf)  # `golub_kahan` has set rows without information to zero
        return KrylovSpace(torch.cat([beside, state.V], 1), torch.cat([*seen, state.B.mT @ state.U], 1), unknown)
    V = start.new_empty(len(start), steps, start.shape[2])
    lengths = start.new_empty(len(start), steps, 1)
    rows, sizes, adjoint = V.split(1, 1), lengths.split(1, 1), A.H
    images: list[Tensor] = []
    for i in range(steps):
        if i:
            start = apply_grouped(adjoint, images[-1])
            for known in (V[:, max(i - 2, 0) : i], V[:, :i]):
                start = torch.baddbmm(start, torch.bmm(start, known.mT), known, alpha=-1)
        torch.linalg.vector_norm(start, dim=2, keepdim=True, out=sizes[i])
        tiny = torch.finfo(V.dtype).tiny  # a zero row may become NaN, except where that spreads to other groups
        torch.div(start, sizes[i] if len(V) == 1 else sizes[i].clamp_min(tiny), out=rows[i])
        images.append(apply_grouped(A, rows[i]))
    return KrylovSpace(torch.cat([beside, V], 1) if seen else V, torch.cat(seen + images, 1), lengths[..., 0])


def rayleigh_ritz(lengths: Tensor, rows: Tensor, images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the singular values of each group in descending order, (g, m), and coefficients, (g, m, m).

    The right singular vectors are the coefficients times the rows; the left ones are the coefficients times the images,
    divided by the values. Everything is computed in float64 on the host from `KrylovSpace.numbers`: the ``lengths`` and the
    Gram matrices of the ``rows`` and of the ``images``. Values are NaN in a group whose numbers are not all finite. A Krylov
    vector shorter than sqrt(eps) times the largest squared length of an image before it may be a rounding error: that vector
    and all later ones are left out. The Gram matrix of the rows corrects for their imperfect orthogonality.
    """
    lengths, S, G = lengths.double(), rows.double(), images.double()
    most = G.diagonal(dim1=1, dim2=2).cummax(1).values[:, :-1]
    spent, first = torch.zeros_like(S[:, 0], dtype=torch.bool), S.shape[1] - lengths.shape[1]
    spent[:, first + 1 :] = (lengths[:, 1:] <= eps**0.5 * most[:, first:]).cumsum(1) > 0
    spent |= S.diagonal(dim1=1, dim2=2) == 0
    known = ~(spent[:, :, None] | spent[:, None])
    S, G = torch.where(known, S, 0), torch.where(known, G, 0)
    finite = (torch.isfinite(S) & torch.isfinite(G)).all(1, keepdim=True).all(2, keepdim=True)
    sizes, P = torch.linalg.eigh(torch.where(finite, S, 0))
    least = max(_LEAST_GRAM_EIGENVALUE, _LEAST_GRAM_ROUNDINGS * eps)
    P *= torch.where(sizes > least, sizes.clamp_min(least).rsqrt(), 0)[:, None]  # orthonormal combinations of the rows
    squares, Q = torch.linalg.eigh(P.mT @ torch.where(finite, G, 0) @ P)
    coefficients = torch.where(spent[:, None], 0, (P @ Q).mT.flip(1))
    to_start = coefficients[:, :, first : first + 1]
    coefficients = torch.where(to_start < 0, -coefficients, coefficients)  # the sign nearer to the start
    return torch.where(finite[:, 0], squares.flip(1).clamp_min(0).sqrt(), math.nan), coefficients


class _Basis:
    """Orthonormal rows of each group in a buffer (g, capacity, n), at first of 17 blocks, whose capacity doubles when full."""

    def __init__(self, like: Tensor) -> None:
        self.block, self.size = like.shape[1], 0
        self.rows = like.new_empty(like.shape[0], 17 * self.block, like.shape[2])  # 16 steps and the start

    @property
    def last(self) -> Tensor:
        return self.rows[:, self.size - self.block : self.size]

    def extend(self, W: Tensor) -> Tensor:
        """Append a block Q with W = H @ cat(rows, Q) and return H. A row of W in the span of the rows gives a zero row of Q.

        The components along the last block are removed first, so that one pass over the whole basis is enough. If a row loses
        more than half its length nevertheless, the pass is repeated (Daniel, Gragg, Kaufman and Stewart 1976).
        """
        if self.size + self.block > self.rows.shape[1]:
            self.rows = torch.cat([self.rows, torch.empty_like(self.rows)], dim=1)
        m = self.size
        H = W.new_zeros(*W.shape[:2], m + self.block)
        threshold = 20 * torch.finfo(W.dtype).eps * W.norm(dim=2)
        W = self._remove(W, H, max(m - self.block, 0), m)
        W = self._remove_carefully(W, H, 0, m)
        for i in range(self.block):
            w, h = W[:, i : i + 1], H[:, i : i + 1]
            shortened = self._remove(w, h, m, m + i) if i else w
            if i and _shrunk(shortened, w):
                shortened = self._remove(shortened, h, 0, m + i)
            norm = shortened[:, 0].norm(dim=1)
            vanished = (norm <= threshold[:, i]) & (norm < math.inf)  # infinity and NaN are kept
            H[:, i, m + i] = torch.where(vanished, 0, norm)
            self.rows[:, m + i] = torch.where(vanished[:, None], 0, shortened[:, 0] / norm[:, None])
        self.size += self.block
        return H

    def compress(self, weights: Tensor, following: int = 0) -> None:
        """Replace all rows except the last ``following`` ones by fewer linear combinations, with weights (g, kept, rows)."""
        kept, combined = weights.shape[1], self.size - following
        rest = self.rows[:, combined : self.size].clone()
        self.rows[:, :kept] = weights @ self.rows[:, :combined]
        self.rows[:, kept : kept + following] = rest
        self.size = kept + following

    def _remove(self, W: Tensor, H: Tensor, low: int, high: int) -> Tensor:
        """Return W without its components along rows[low:high], and add these components to H."""
        known = self.rows[:, low:high]
        C = W @ known.mT
        H[:, :, low:high] += C
        return W - C @ known

    def _remove_carefully(self, W: Tensor, H: Tensor, low: int, high: int) -> Tensor:
        once = self._remove(W, H, low, high)
        return self._remove(once, H, low, high) if _shrunk(once, W) else once


def _shrunk(after: Tensor, before: Tensor) -> bool:
    """Whether a row lost more than half its length; always true on a GPU, where a second pass costs less than the answer."""
    return after.is_cuda or bool((after.norm(dim=2) < 0.5 * before.norm(dim=2)).any())


def orthonormal_rows(X: Tensor) -> Tensor:
    """Orthonormal rows that span those of X (g, k, n); a zero row stays zero."""
    basis = _Basis(X)
    basis.extend(X)
    return basis.last


def random_block(A: LinearOperator, block: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A Gaussian block (g, block, in/g), drawn on ``device``. A draw on the CPU is the same whatever the operator's device."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (A.groups, block, prod(A.in_shape) // A.groups)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(device=A.device, dtype=A.dtype)


def apply_grouped(A: LinearOperator, X: Tensor) -> Tensor:
    """Apply a grouped operator to the blocks of all groups at once: (g, k, in/g) -> (g, k, out/g)."""
    return to_groups(A.matmat(from_groups(X, A.in_shape)), A.groups)


def to_groups(X: Tensor, groups: int) -> Tensor:
    """Reshape a batch of vectors to a block: (k, channels, ...) -> (g, k, elements / g)."""
    if groups == 1 or len(X) == 1:  # a view without a transpose gives the same
        return X.reshape(groups, len(X), -1)
    return X.reshape(len(X), groups, -1).transpose(0, 1)


def from_groups(X: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape a block to a batch of vectors: (g, k, elements / g) -> (k, *shape)."""
    if 1 in X.shape[:2]:
        return X.reshape(X.shape[1], *shape)
    return X.transpose(0, 1).reshape(X.shape[1], *shape)
