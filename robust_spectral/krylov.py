"""Block Golub-Kahan bidiagonalisation of an operator, all of its groups at once, with full reorthogonalisation.

Blocks are kept as (groups, k, elements / groups), one row a vector; a grouped operator takes those of all groups in one
application.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod

import torch
from torch import Tensor

from .operators import LinearOperator

NOT_FINITE = "the operator returned NaN or infinite values, or they overflow"


@dataclass(frozen=True)
class Bidiagonalization:
    """A V = U B after some block steps (rows of U and V are the vectors), and the coupling to the next right block."""

    U: Tensor  # (g, m, out/g)
    V: Tensor  # (g, m, in/g)
    B: Tensor  # (g, m, m), B[l, j] = <U_l, A V_j>
    coupling: Tensor  # (g, b, b): A.H U_last = (within V) + coupling @ V_next
    block: int

    @property
    def exhausted(self) -> bool:
        """Whether the Krylov space is invariant, so that further steps find nothing; waits for the device.

        Raises:
            ValueError: the operator returned NaN or infinite values, or they overflow.
        """
        size = float(self.coupling.abs().max() + 0 * self.B[:, :, -self.block :].sum())  # 0 times infinity is NaN
        if not math.isfinite(size):
            raise ValueError(NOT_FINITE)
        return size == 0


def golub_kahan(A: LinearOperator, start: Tensor, basis: int | None = None) -> Iterator[Bidiagonalization]:
    """Block Golub-Kahan bidiagonalisation of every group, one block a step, with full reorthogonalisation.

    A direction that is spent (its group's Krylov space is invariant) continues as a zero vector, which does no harm. With
    ``basis`` the bases hold about that many vectors: they are then compressed to the leading half of the Ritz vectors, from
    where A V = U B goes on to hold with a diagonal B, and the next block joins them.
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


def bidiagonalized(A: LinearOperator, start: Tensor, steps: int) -> Bidiagonalization:
    """The state after so few steps that all is known in advance: no more memory than they take, and the device is not asked.

    Where the Krylov space is spent zero vectors follow. Single vectors are orthogonalised once, and left ones against
    the one before only: they are as orthogonal as the right ones are (Simon and Zha 2000).
    """
    if start.shape[1] > 1:
        return next(islice(golub_kahan(A, start), steps - 1, None))
    V = start.new_empty(len(start), steps + 1, start.shape[2])
    U = start.new_empty(len(start), steps, prod(A.out_shape) // A.groups)
    lengths = start.new_empty(len(start), 2 * steps + 1, 1)  # of what each row was made from: v, u, v, …, v
    left, right, sizes, adjoint = U.split(1, 1), V.split(1, 1), lengths.split(1, 1), A.H
    _unit_into(right[0], start, sizes[0])
    for i in range(steps):
        rest = apply_grouped(A, right[i])
        if i:
            rest = torch.addcmul(rest, sizes[2 * i], left[i - 1], value=-1)
        _unit_into(left[i], rest, sizes[2 * i + 1])
        known = V[:, : i + 1]
        rest = torch.addcmul(apply_grouped(adjoint, left[i]), sizes[2 * i + 1], right[i], value=-1)
        rest = torch.baddbmm(rest, rest @ known.mT, known, alpha=-1)
        _unit_into(right[i + 1], rest, sizes[2 * i + 2])
    spent = _spent(lengths[:, 1:])
    lengths[:, 1:].masked_fill_(spent, 0)
    U.masked_fill_(spent[:, ::2], 0)
    V[:, 1:].masked_fill_(spent[:, 1::2], 0)
    B = torch.diag_embed(lengths[:, 1::2, 0])
    B.diagonal(1, 1, 2).copy_(lengths[:, 2:-1:2, 0])
    return Bidiagonalization(U, V[:, :steps], B, sizes[-1], 1)


def _unit_into(place: Tensor, rest: Tensor, length: Tensor) -> None:
    """Put a row there at length 1, and its length beside it. A row of zeros becomes NaN, as do those that follow from it.

    Beside other groups it stays zero, as they share each application.
    """
    torch.linalg.vector_norm(rest, dim=2, keepdim=True, out=length)
    torch.div(rest, length if len(rest) == 1 else length.clamp_min(torch.finfo(rest.dtype).tiny), out=place)


def _spent(lengths: Tensor) -> Tensor:
    """Where the space is spent: from the first length on that is so much below the largest before that it may be rounding.

    Half of the digits are asked for, as a row is then orthogonal to the others to the other half, and no value of B is too
    large for that. A length that is not finite is not taken for one.
    """
    limits = torch.finfo(lengths.dtype)
    small = lengths < limits.eps**0.5 * lengths.cummax(1).values + limits.tiny
    return small.cumsum(1) > 0


class _Basis:
    """Orthonormal rows of each group in a buffer (g, capacity, n), at first for sixteen steps, that doubles when full."""

    def __init__(self, like: Tensor) -> None:
        self.block, self.size = like.shape[1], 0
        self.rows = like.new_empty(like.shape[0], 17 * self.block, like.shape[2])  # a right block more than steps

    @property
    def last(self) -> Tensor:
        return self.rows[:, self.size - self.block : self.size]

    def extend(self, W: Tensor) -> Tensor:
        """Append a block Q with W = H @ cat(rows, Q) and return H. A row of W that vanishes gives a zero row of Q.

        The coupling to the last block goes first, so that one pass over the whole basis is enough; where a row loses more
        than half its length all the same, the pass is repeated (Daniel, Gragg, Kaufman and Stewart 1976).
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
            vanished = (norm <= threshold[:, i]) & (norm < math.inf)  # what overflows or is NaN stays so
            H[:, i, m + i] = torch.where(vanished, 0, norm)
            self.rows[:, m + i] = torch.where(vanished[:, None], 0, shortened[:, 0] / norm[:, None])
        self.size += self.block
        return H

    def compress(self, weights: Tensor, following: int = 0) -> None:
        """Replace all rows but the ``following`` last by fewer combinations of them, weights (g, kept, rows)."""
        kept, combined = weights.shape[1], self.size - following
        rest = self.rows[:, combined : self.size].clone()
        self.rows[:, :kept] = weights @ self.rows[:, :combined]
        self.rows[:, kept : kept + following] = rest
        self.size = kept + following

    def _remove(self, W: Tensor, H: Tensor, low: int, high: int) -> Tensor:
        """W less its components along rows low to high, which are added to H."""
        known = self.rows[:, low:high]
        C = W @ known.mT
        H[:, :, low:high] += C
        return W - C @ known

    def _remove_carefully(self, W: Tensor, H: Tensor, low: int, high: int) -> Tensor:
        once = self._remove(W, H, low, high)
        return self._remove(once, H, low, high) if _shrunk(once, W) else once


def _shrunk(after: Tensor, before: Tensor) -> bool:
    """Whether a row lost more than half its length; on a GPU it may have, as a second pass costs less than to ask."""
    return after.is_cuda or bool((after.norm(dim=2) < 0.5 * before.norm(dim=2)).any())


def orthonormal_rows(X: Tensor) -> Tensor:
    """Orthonormal rows that span those of X (g, k, n); a zero row stays zero."""
    basis = _Basis(X)
    basis.extend(X)
    return basis.last


def random_block(A: LinearOperator, block: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A Gaussian block (g, block, in/g), drawn on ``device``: the same for all operators where that is the CPU."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (A.groups, block, prod(A.in_shape) // A.groups)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(device=A.device, dtype=A.dtype)


def apply_grouped(A: LinearOperator, X: Tensor) -> Tensor:
    """Apply a grouped operator to the blocks of all groups at once: (g, k, in/g) -> (g, k, out/g)."""
    return to_groups(A.matmat(from_groups(X, A.in_shape)), A.groups)


def to_groups(X: Tensor, groups: int) -> Tensor:
    """(k, channels, ...) -> (g, k, elements / g)."""
    if groups == 1 or len(X) == 1:  # the same in one view
        return X.reshape(groups, len(X), -1)
    return X.reshape(len(X), groups, -1).transpose(0, 1)


def from_groups(X: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(g, k, elements / g) -> (k, *shape)."""
    if 1 in X.shape[:2]:
        return X.reshape(X.shape[1], *shape)
    return X.transpose(0, 1).reshape(X.shape[1], *shape)
