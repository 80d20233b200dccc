"""A probabilistic upper bound of an operator's norm, from one Lanczos run with a random start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..numerics import EPS, power_of_two, round_down, round_up
from ..operators import LinearOperator, direct_sum
from ..singular_values import golub_kahan, random_block, size_of


def lanczos_interval(
    A: LinearOperator, failure_probability: float, *, rtol: float = 1e-2, max_steps: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Lower and upper bound from one Golub-Kahan run from a single, uniformly random vector, without restarts.

    The arguments are those of `spectral_norm`.

    Let v be uniform on the sphere of Rⁿ, v₁ a top right singular vector, and p_j the Lanczos polynomials of AᵀA, so that
    the j-th Lanczos vector is p_j(AᵀA) v. This vector has norm 1, hence |p_j(σ₁²)| |⟨v, v₁⟩| ≤ 1. Beyond the largest Ritz
    value p_j increases without bound, so unless |⟨v, v₁⟩| < δ, σ₁² is at most the largest root of p_j(t) = 1/δ. The
    probability of |⟨v, v₁⟩| < δ is the regularised incomplete beta function I_{δ²}(1/2, (n-1)/2); δ is chosen such that it
    equals ``failure_probability``. One event covers all j.

    A grouped operator has one run per group. Which group attains the operator's norm does not depend on the random starts, and
    the bound fails only if that group's bound does, so that the failure probability need not be divided among the groups.

    Source: van Dorsselaer, Hochstenbach and van der Vorst (2000); Hochstenbach (2013), Theorem 3.
    """
    return lanczos_intervals([A], failure_probability, [math.inf], rtol=rtol, max_steps=max_steps, seed=seed)[0]


def lanczos_intervals(
    operators: Sequence[LinearOperator], failure_probability: float, known: Sequence[float], *, rtol: float, max_steps: int,
    seed: int,
) -> list[tuple[float, float]]:  # fmt: skip
    """`lanczos_interval` of several operators of equal shapes and groups, in one run until all are narrow enough.

    The run stops when min(Lanczos bound, ``known``) / lower end - 1 is at most ``rtol`` for every operator, or after
    ``max_steps``; ``known`` is another upper bound of each operator, inf if there is none.
    """
    sizes = np.array([_norm_scale(A, seed) for A in operators])
    scaled = [A.divided_by(size) for A, size in zip(operators, sizes.tolist(), strict=True)]
    A = scaled[0] if len(scaled) == 1 else direct_sum(scaled)
    B = A.H if prod(A.out_shape) < prod(A.in_shape) else A
    delta = _least_component(B, failure_probability)
    lower, bounds = np.zeros(len(sizes)), np.array(known) / sizes
    for ends in _ends_by_group(B, delta, max_steps, seed):
        previous = lower
        lower, upper = (end.reshape(len(sizes), -1).max(1) for end in ends)
        settled = (delta == 0) & (lower <= (1 + rtol / 100) * previous)  # without a bound, only the lower end improves
        if (settled | (np.minimum(upper, bounds) <= (1 + rtol) * lower)).all():
            break
    margin = prod(B.in_shape) // len(sizes) + prod(B.out_shape) // len(sizes)
    found = zip((sizes * lower).tolist(), (sizes * upper).tolist(), strict=True)
    return [(round_down(low, margin), round_up(high, margin)) for low, high in found]


def largest_by_group(A: LinearOperator, failure_probability: float, *, rtol: float, max_steps: int, seed: int) -> Tensor:
    """An upper bound of each group's norm, (groups,), by the bound of `lanczos_interval`; each has the failure probability.

    No bound is below 1e-140 of the operator's size, where squares underflow.
    """
    size = _norm_scale(A, seed)
    A = A.divided_by(size)
    for lower, upper in _ends_by_group(A, _least_component(A, failure_probability), max_steps, seed):
        if (upper <= (1 + rtol) * lower).all():
            break
    roundings = (prod(A.in_shape) + prod(A.out_shape)) // A.groups
    return torch.tensor(
        [round_up(max(float(high), 1e-140) * size, roundings) for high in upper], dtype=torch.float64, device=A.device
    )


def _least_component(A: LinearOperator, failure_probability: float) -> float:
    """The δ that a group's start has a component below along a given vector with the failure probability."""
    from scipy.special import betaincinv  # takes a tenth of this package's import time

    n = prod(A.in_shape) // A.groups
    return math.sqrt(betaincinv(0.5, max(n - 1, 1) / 2, failure_probability)) if n > 1 else 1.0


def _ends_by_group(A: LinearOperator, delta: float, max_steps: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The lower and the upper end of each group's norm, again and again as a Lanczos run goes on."""
    start, due = random_block(A, 1, seed), 10
    for step, state in enumerate(golub_kahan(A, start / start.norm(dim=2, keepdim=True)), start=1):
        last = state.exhausted or step >= max_steps
        if last or step >= due:
            due = step + max(5, step // 5)
            alpha = state.B.diagonal(dim1=1, dim2=2).cpu().numpy()
            beta = torch.cat([state.B.diagonal(1, 1, 2), state.coupling[:, :, 0]], dim=1).cpu().numpy()
            yield _ritz_and_root(alpha, beta, delta)
        if last:
            return


def _norm_scale(A: LinearOperator, seed: int) -> float:
    try:
        return size_of(A, seed)
    except ValueError:
        raise ValueError(f"spectral_norm({A!r}): the operator returned NaN or infinite values") from None


def _ritz_and_root(alpha: np.ndarray, beta: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest Ritz value and the largest root of p_k(t) = 1/δ of each group, both as singular values (square roots).

    p_k(t) = det(tI - BᵀB) / Π α_j β_j is evaluated by the pivots of tI - BᵀB, which are all positive exactly where t exceeds
    all Ritz values. Where a group's Krylov space became invariant at step j (α_j or β_j below the noise level), only steps up
    to and including j count, with the noise level, an upper bound, in place of the vanished entry: the inequality remains true.
    """
    steps = alpha.shape[1]
    size = np.maximum(alpha.max(1), beta.max(1))
    scale, live = np.array([power_of_two(s) for s in size]), size > 0
    if not live.any():
        return np.zeros(len(size)), np.zeros(len(size))
    a, b = alpha[live] / scale[live, None], beta[live] / scale[live, None]
    noise = 100 * EPS
    continues = np.logical_and.accumulate((a > noise) & (b > noise), axis=1)
    counts = np.pad(continues[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    a, b = np.where(counts, np.maximum(a, noise), 1.0), np.maximum(b, noise)
    previous_a, previous_b = (np.concatenate([np.zeros((len(a), 1)), x[:, :-1]], axis=1) for x in (a, b))
    diagonal, off, log_ab = a**2 + previous_b**2, previous_a * previous_b, np.log(a * b)  # BᵀB of the upper bidiagonal B

    def log_polynomial(t: np.ndarray) -> np.ndarray:
        """log p_k(t) of each group at its own points t (g, points); -inf at or below the group's largest Ritz value."""
        total, pivot = np.zeros_like(t), np.ones_like(t)
        for j in range(steps):
            pivot = t - diagonal[:, j, None] - off[:, j, None] ** 2 / pivot
            positive = pivot > 0
            term = np.where(positive, np.log(np.where(positive, pivot, 1.0)) - log_ab[:, j, None], -np.inf)
            total = total + np.where(counts[:, j, None], term, 0.0)
            pivot = np.where(positive & counts[:, j, None], pivot, 1.0)
        return total

    norm_bound = (a * counts + b).max(1) * 2 + 1.0  # Gershgorin: above every Ritz value of B
    ritz, _ = _bracket(lambda t: np.isfinite(log_polynomial(t)), np.zeros(len(a)), norm_bound**2)
    root = np.full(len(a), np.inf)
    if delta > 0:
        _, root = _bracket(lambda t: log_polynomial(t) >= -math.log(delta), ritz, norm_bound**2 * 4)
    ends = np.zeros((2, len(size)))
    ends[:, live] = np.sqrt([ritz, root]) * scale[live]
    return ends[0], ends[1]


def _bracket(holds: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bracket the point of each group where a monotone condition becomes true: (a point before it, a point at or after it)."""
    while not holds(high[:, None]).all():
        high = high * 4
    rows, fractions = np.arange(len(low)), np.linspace(0, 1, 65)
    for _ in range(8):  # every round divides the bracket by 64
        points = low[:, None] + (high - low)[:, None] * fractions
        points[:, -1] = high
        first = np.maximum(holds(points).argmax(1), 1)
        low, high = points[rows, first - 1], points[rows, first]
    return low, high
