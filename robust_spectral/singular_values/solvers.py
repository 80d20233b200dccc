"""Top singular triplets of a linear operator. The values are estimates from below, not upper bounds.

Two solvers share one interface. `Lanczos` is block Golub-Kahan bidiagonalisation with full reorthogonalisation, the fastest
from a cold start; `PowerQR` is the block power method of Ebrahimpour Boroojeny et al. (2024), for warm starts. Both work on
blocks of k vectors, since a single vector cannot detect how often a singular value repeats, and both treat the groups of an
operator as separate operators that share each application.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ..numerics import power_of_two
from ..operators import LinearOperator, check_operator, full_precision_no_grad
from .krylov import Bidiagonalization, apply_grouped, from_groups, golub_kahan, orthonormal_rows, random_block, to_groups

_STIR = 1e-3  # weight of a random vector added to a warm start, so that no direction is missing


@dataclass(frozen=True)
class SingularTriplets:
    """The k largest singular values found, with vectors: ``A right = values * left`` and ``A.H left = values * right``.

    Attributes:
        values: (k,), descending; zeros beyond the rank. Lower bounds up to rounding, not upper bounds.
        left: (k, *out_shape), orthonormal where the value is not zero.
        right: (k, *in_shape), orthonormal where the value is not zero.
        residuals: (k,), the larger of ‖A right - values left‖ and ‖A.H left - values right‖.
        steps: Block steps taken; each applies A and its adjoint to a block of k vectors.
        converged: Whether every residual is at most the solver's ``rtol`` times the largest value.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    residuals: Tensor
    steps: int
    converged: bool


@dataclass(frozen=True)
class Found:
    """Approximate singular triplets of each group: values (g, k), left (g, k, out/g), right (g, k, in/g)."""

    values: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Ritz(Found):
    """Ritz triplets with their residuals (g, k) and the number of block steps taken."""

    residuals: Tensor
    steps: int


class Solver(Protocol):
    """The interface of a solver to `top_singular`, which gives it a starting block (g, b, in/g)."""

    @property
    def rtol(self) -> float:
        """Residual, relative to the largest value, at which a triplet counts as converged."""

    def solve(self, A: LinearOperator, k: int, start: Tensor) -> Ritz:
        """The k leading Ritz triplets of every group."""


@dataclass(frozen=True)
class Lanczos:
    """Block Golub-Kahan-Lanczos with full reorthogonalisation, stopped when all k residuals are below ``rtol`` times σ₁.

    Cost: 2 k applications a step. The error of a value is about residual² / gap, far below the residual itself. Memory: at
    most about ``basis`` left and right vectors of each group; when the basis is full, the run restarts from the leading half
    of its Ritz vectors and the next block, so that the space remains a Krylov space.

    Attributes:
        rtol: Residual, relative to the largest value, at which a triplet counts as converged.
        max_steps: Largest number of block steps.
        basis: Largest number of left and of right vectors of each group, raised to six blocks if smaller.
        each_group: Whether to continue until the triplets of every group have converged, including those that are, up to
            their residuals, below the k largest of all groups.

    Source: Golub and Kahan (1965); full reorthogonalisation by Gram-Schmidt, repeated where needed (Daniel, Gragg, Kaufman
    and Stewart 1976); thick restart of Baglama and Reichel (2005).
    """

    rtol: float = 1e-4
    max_steps: int = 500
    basis: int = 256
    each_group: bool = False

    def solve(self, A: LinearOperator, k: int, start: Tensor) -> Ritz:
        """The k leading Ritz triplets of every group."""
        for step, state in enumerate(golub_kahan(A, start, max(self.basis, 6 * start.shape[1])), start=1):
            last = state.exhausted or step >= self.max_steps
            if last or (self.rtol > 0 and step % 4 == 0):
                factors = [factor.to(state.B.device) for factor in torch.linalg.svd(state.B.cpu())]  # B is small
                unfinished = _unconverged(
                    factors[1][:, :k], _residuals(state, factors[0][:, :, :k]), self.rtol, self.each_group
                )
                if last or not bool(unfinished.any()):
                    break
        return _ritz_of(state, factors, k, step)


def _ritz_of(state: Bidiagonalization, factors: Sequence[Tensor], k: int, steps: int) -> Ritz:
    """The k leading Ritz triplets of every group, from the factors of the singular value decomposition of B."""
    left, values, rightH = factors[0][:, :, :k], factors[1][:, :k], factors[2][:, :k]
    return Ritz(values, left.mT @ state.U, rightH @ state.V, _residuals(state, left), steps)


def _residuals(state: Bidiagonalization, left: Tensor) -> Tensor:
    """The residuals (g, k) of the Ritz triplets with these left singular vectors (g, m, k) of B."""
    return (left[:, -state.block :].mT @ state.coupling).norm(dim=-1)


@dataclass(frozen=True)
class PowerQR:
    """The block power method X <- QR(A.H A X + shift X), with Rayleigh-Ritz on the block.

    The algorithm of the source is ``PowerQR(shift=1.0, rayleigh_ritz=False)``: values from the diagonal of R, no projection.
    A shift far above σ² makes convergence very slow, so the default is 0. Cost: 2 k applications a step, 4 k without
    Rayleigh-Ritz.

    Attributes:
        steps: Largest number of block steps.
        rtol: Residual, relative to the largest value, at which a triplet counts as converged. With Rayleigh-Ritz the run
            stops when the triplets have converged.
        shift: Multiple of X that is added to A.H A X, in the units of σ².
        rayleigh_ritz: Whether values and vectors come from a projection onto the block. Otherwise values come from the
            diagonal of R: only the largest is a lower bound, and left vectors are not orthonormal.

    Source: Ebrahimpour Boroojeny, Telgarsky and Sundaram (AISTATS 2024), Algorithm PowerQR.
    """

    steps: int = 100
    rtol: float = 1e-4
    shift: float = 0.0
    rayleigh_ritz: bool = True

    def solve(self, A: LinearOperator, k: int, start: Tensor) -> Ritz:
        """The k leading Ritz triplets of every group."""
        X, diagonal = orthonormal_rows(start), start.new_zeros(start.shape[:2])
        for step in range(1, self.steps + 1):  # noqa: B007
            ritz, image = power_step(A, X)
            if self.rayleigh_ritz and not bool(_unconverged(ritz.values, ritz.residuals, self.rtol).any()):
                break
            if not self.rayleigh_ritz:  # the Ritz vectors are a rotation of X
                image = apply_grouped(A.H, apply_grouped(A, X))
            X, diagonal = _qr_rows(image + self.shift * (ritz.right if self.rayleigh_ritz else X), X)
        if self.rayleigh_ritz:
            return replace(ritz, steps=step)
        values = (diagonal.abs() - self.shift).abs().sqrt()
        left = apply_grouped(A, X)
        return Ritz(values, left / values[..., None].clamp_min(torch.finfo(X.dtype).tiny), X, torch.zeros_like(values), step)


def _unconverged(values: Tensor, residuals: Tensor, rtol: float, each_group: bool = False) -> Tensor:
    """Which triplets (g, k) have not converged; without ``each_group``, only of those that may be among the k largest."""
    unconverged = residuals > rtol * values.amax()
    if each_group:
        return unconverged
    return unconverged & (values + residuals >= values.flatten().topk(values.shape[1]).values[-1])


@full_precision_no_grad()
def top_singular(
    A: LinearOperator, k: int = 1, solver: Solver | None = None, *, right: Tensor | None = None, seed: int = 0
) -> SingularTriplets:
    """The k largest singular triplets of an operator, as estimates from below.

    Args:
        A: The operator.
        k: Number of triplets; values beyond the rank are zero.
        solver: ``Lanczos()`` by default, or ``PowerQR()``.
        right: Warm start, (any number of vectors, *in_shape), for instance ``.right`` of an earlier result.
        seed: Seed of the random start; the global random state is not used.

    Raises:
        ValueError: k is below 1, ``right`` does not fit the operator, or the operator returned NaN or infinite values.
        TypeError: A is not an operator.
    """
    check_operator("top_singular", A)
    if k < 1:
        raise ValueError(f"top_singular(k={k}): must be at least 1")
    if right is not None and tuple(right.shape[1:]) != A.in_shape:
        raise ValueError(f"top_singular(right=...): expected (any number, {A.in_shape}), got {tuple(right.shape)}")
    chosen = Lanczos() if solver is None else solver
    size = 1.0 if isinstance(chosen, PowerQR) and chosen.shift else size_of(A, seed)  # a shift is in the units of A
    A = A.divided_by(size)
    flip = prod(A.out_shape) < prod(A.in_shape)  # the right vectors are on the smaller side
    B = A.H if flip else A
    block = min(k, prod(B.in_shape) // B.groups)
    start = random_block(B, block, seed)
    if right is not None:
        warm = to_groups(A.matmat(right) if flip else right, B.groups)[:, :block].to(start.dtype)
        rest = start[:, : warm.shape[1]]
        sizes, rests = warm.norm(dim=2, keepdim=True), rest.norm(dim=2, keepdim=True)
        warm = torch.where(sizes == 0, rest, warm / sizes + _STIR * rest / rests)  # a zero row has no direction
        start = torch.cat([warm, start[:, warm.shape[1] :]], dim=1)
    ritz = chosen.solve(B, block, start)
    triplets = _merge_groups(B, ritz, k, chosen.rtol)
    if flip:
        triplets = replace(triplets, left=triplets.right, right=triplets.left)
    return replace(triplets, values=triplets.values * size, residuals=triplets.residuals * size)


def size_of(A: LinearOperator, seed: int) -> float:
    """A power of two of roughly the operator's norm, from one application; 1 for the zero operator.

    Raises:
        ValueError: the operator returned NaN or infinite values.
    """
    return power_of_two(float(A.matmat(from_groups(random_block(A, 1, seed), A.in_shape)).abs().max()))


def dense_blocks(A: LinearOperator) -> Tensor:
    """The transposed matrix of every group, (g, in/g, out/g).

    Costs one application per input element of a group, or per output element where these are fewer.
    """
    size = prod(A.in_shape) // A.groups
    if prod(A.out_shape) // A.groups < size:
        return dense_blocks(A.H).mT
    eye = torch.eye(size, dtype=A.dtype, device=A.device)[None].expand(A.groups, -1, -1)
    return torch.cat([apply_grouped(A, chunk) for chunk in eye.split(1024, dim=1)], dim=1)


def dense_ritz(A: LinearOperator, k: int) -> Ritz:
    """The k leading singular triplets of every group from dense decompositions."""
    right, values, left = torch.linalg.svd(dense_blocks(A), full_matrices=False)
    return Ritz(values[:, :k], left[:, :k], right[:, :, :k].mT, torch.zeros_like(values[:, :k]), 0)


def dense_work(A: LinearOperator) -> int:
    """Multiply-adds of a dense decomposition of every group, up to a constant factor."""
    rows, columns = prod(A.out_shape) // A.groups, prod(A.in_shape) // A.groups
    return A.groups * rows * columns * min(rows, columns)


def power_step(A: LinearOperator, X: Tensor) -> tuple[Ritz, Tensor]:
    """Rayleigh-Ritz on orthonormal rows X (g, k, in/g), and one power step.

    Returns the Ritz triplets and ``A.H A right``, from which `next_block` makes the next X. Costs 2 k applications.
    """
    Y = apply_grouped(A, X)
    if Y.shape[1] == 1:  # one vector needs no decomposition
        left, size = unit_rows(Y)
        back = apply_grouped(A.H, left)
        return Ritz(size[..., 0], left, X, (back - size * X).norm(dim=-1), 1), size * back
    P, values, Q = torch.linalg.svd(Y.mT, full_matrices=False)  # Y.mT: (g, out, k) = P diag(values) Q
    right = Q @ X
    left = P.mT
    back = apply_grouped(A.H, left)
    residuals = (back - values[..., None] * right).norm(dim=-1)
    return Ritz(values, left, right, residuals, 1), values[..., None] * back


def next_block(image: Tensor, previous: Tensor) -> Tensor:
    """Orthonormal rows for the next power step, from the last one's image; a single row with image zero stays ``previous``."""
    return torch.linalg.qr(image.mT)[0].mT if image.shape[1] > 1 else unit_rows(image, previous)[0]


def unit_rows(image: Tensor, fallback: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows (g, k, n) scaled to unit length, zero rows replaced by ``fallback`` if given, and the lengths (g, k, 1)."""
    size = torch.linalg.vector_norm(image, dim=2, keepdim=True)
    if fallback is None:
        return image / size.clamp_min(torch.finfo(image.dtype).tiny), size
    return torch.where(size == 0, fallback, image / size), size


def _qr_rows(X: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
    """Q and the diagonal of R of X's rows; in groups where X is zero, Q is ``fallback``."""
    Q, R = torch.linalg.qr(X.mT)
    alive = X.norm(dim=(1, 2), keepdim=True) > 0
    return torch.where(alive, Q.mT, fallback), R.diagonal(dim1=-2, dim2=-1)


def _merge_groups(A: LinearOperator, ritz: Ritz, k: int, rtol: float) -> SingularTriplets:
    """The k largest triplets of all groups, each vector zero outside its own group, with recomputed residuals."""
    groups, per_group = ritz.values.shape
    values, order = ritz.values.flatten().sort(descending=True)
    values, order = values[:k], order[:k]
    missing = k - len(values)

    def embed(vectors: Tensor, shape: tuple[int, ...]) -> Tensor:
        full = vectors.new_zeros(len(order), groups, vectors.shape[2])
        rows = torch.arange(len(order), device=order.device)
        full[rows, order // per_group] = vectors.reshape(groups * per_group, -1)[order]
        return torch.cat([full.reshape(-1, *shape), full.new_zeros(missing, *shape)])

    right, left = embed(ritz.right, A.in_shape), embed(ritz.left, A.out_shape)
    values = torch.cat([values, values.new_zeros(missing)])
    scale = values.reshape(-1, *[1] * len(A.in_shape)), values.reshape(-1, *[1] * len(A.out_shape))
    residuals = torch.maximum(
        (A.matmat(right) - scale[1] * left).flatten(1).norm(dim=1),
        (A.rmatmat(left) - scale[0] * right).flatten(1).norm(dim=1),
    )
    converged = bool((residuals <= rtol * values[0]).all())
    return SingularTriplets(values, left, right, residuals, ritz.steps, converged)
