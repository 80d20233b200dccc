"""Two-sided enclosures of an operator's spectral norm: what may be called a bound, and by which theorem.

Everything is computed in float64 and rounded outward by a margin that covers the arithmetic. Small operators get a dense
singular value decomposition. Larger ones get the smallest upper bound of several theorems: some hold for convolutions only
and always, the Lanczos bound holds for any operator with a stated probability of failure over its own random start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from .operators import Kernel, LinearOperator, power_of_two
from .spectrum import dense_blocks, dense_work, golub_kahan, random_block, size_of

_EPS = float(np.finfo(np.float64).eps)
_DENSE_WORK = 2e9  # multiply-adds of a dense decomposition that take about a second on two cores
_SYMBOL_WORK = 4e9
_SYMBOL_GRID = 64


@dataclass(frozen=True)
class NormInterval:
    """``lower <= spectral norm <= upper``.

    Attributes:
        lower: A proven lower end, rounded down.
        upper: A proven upper end, rounded up; ``inf`` where nothing is proved.
        method: The theorem that gave the upper end.
        failure_probability: Probability, over the random start of the computation, that ``upper`` is too small;
            0 for a deterministic bound.
    """

    lower: float
    upper: float
    method: str
    failure_probability: float = 0.0

    def __contains__(self, value: float) -> bool:
        return self.lower <= value <= self.upper


def spectral_norm(
    A: LinearOperator, failure_probability: float = 1e-9, *, rtol: float = 1e-2, max_steps: int = 200, seed: int = 0
) -> NormInterval:
    """An interval that contains the spectral norm of an operator.

    Args:
        A: The operator; the computation runs in float64 whatever its type.
        failure_probability: Of the probabilistic upper bound; 0 allows deterministic bounds only.
        rtol: Width upper / lower - 1 at which the Lanczos run stops early.
        max_steps: Steps of that run at most; each applies A and its adjoint once.
        seed: Seed of its random start.

    Raises:
        ValueError: ``failure_probability`` is outside [0, 1), or the operator returns non-finite values.
    """
    if not 0 <= failure_probability < 1:
        raise ValueError(f"spectral_norm(failure_probability={failure_probability}): must be in [0, 1)")
    exact = A.to(torch.float64)
    found = _enclosed(exact, failure_probability, rtol, max_steps, seed)
    noise = _roundings(exact, failure_probability)
    return replace(found, lower=max(0.0, found.lower - noise), upper=found.upper + noise) if noise else found


def _enclosed(exact: LinearOperator, failure_probability: float, rtol: float, max_steps: int, seed: int) -> NormInterval:
    if dense_work(exact) <= _DENSE_WORK:
        return dense_interval(exact)
    candidates = [(bound(exact.kernel), name) for name, bound in _KERNEL_BOUNDS.items()] if exact.kernel else []
    if exact.kernel:
        candidates.append((frobenius_bound(exact), "frobenius"))
    lower, probable = lanczos_interval(exact, failure_probability, rtol=rtol, max_steps=max_steps, seed=seed)
    upper, method = min(candidates, default=(math.inf, "none"))
    if upper < lower:
        raise RuntimeError(
            f"spectral_norm({exact!r}): the {method} bound {upper} is below the norm, {lower} or more; report this"
        )
    if probable < upper:
        return NormInterval(lower, probable, "lanczos", failure_probability)
    return NormInterval(lower, upper, method)


def _roundings(A: LinearOperator, failure_probability: float) -> float:
    """Absolute error of applying a composition, whose parts may cancel: a few roundings of the product of their norms."""
    if not A.parts:
        return 0.0
    allowed = max(failure_probability, 1e-9)
    product = prod(spectral_norm(part, allowed, rtol=1.0, max_steps=20).upper for part in A.parts)
    return 8 * sum(prod(part.in_shape) + prod(part.out_shape) for part in A.parts) * _EPS * product


def dense_interval(A: LinearOperator) -> NormInterval:
    """Singular value decomposition of the matrix, block by block, with its backward error.

    The computed σ₁ differs from the true one by at most p(m, n) ε ‖A‖ with a modest p (Golub and Van Loan, 4th ed., 8.6);
    the margin here takes p = 8 (m + n), assembling the matrix included.
    """
    rows, columns = prod(A.out_shape) // A.groups, prod(A.in_shape) // A.groups
    blocks = dense_blocks(A)
    scale = power_of_two(float(blocks.abs().max()))
    value = scale * float(torch.linalg.svdvals(blocks / scale).max())
    return NormInterval(_down(value, rows + columns), _up(value, rows + columns), "dense")


def lanczos_interval(
    A: LinearOperator, failure_probability: float, *, rtol: float = 1e-2, max_steps: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Lower and upper end from one cold, uniformly random, single-vector, unrestarted Golub-Kahan run.

    Let v be uniform on the sphere of Rⁿ, v₁ a top right singular vector, and p_j the Lanczos polynomials of AᵀA, so that
    the j-th Lanczos vector is p_j(AᵀA) v. It has norm 1, hence |p_j(σ₁²)| |⟨v, v₁⟩| ≤ 1. Beyond the largest Ritz value
    p_j grows without bound, so unless |⟨v, v₁⟩| < δ, σ₁² is at most the largest root of p_j(t) = 1/δ. The probability of
    that exception is the regularised incomplete beta function I_{δ²}(1/2, (n-1)/2), which fixes δ; it covers all j at once.
    A grouped operator runs once per group. Its norm is that of one of them, whichever the starts turn out to be, so that
    the bound fails only where that one group's does, and the failure probability is not shared out.

    Source: van Dorsselaer, Hochstenbach and van der Vorst (2000); Hochstenbach (2013), Theorem 3.
    """
    try:
        size = size_of(A, seed)
    except ValueError:
        raise ValueError(f"spectral_norm({A!r}): the operator returned NaN or infinite values") from None
    A = A.over(size)
    B = A.H if prod(A.out_shape) < prod(A.in_shape) else A
    n = prod(B.in_shape) // B.groups
    delta = math.sqrt(betaincinv(0.5, max(n - 1, 1) / 2, failure_probability)) if n > 1 else 1.0
    start = random_block(B, 1, seed)
    lower, upper, due = 0.0, math.inf, 10
    for step, state in enumerate(golub_kahan(B, start / start.norm(dim=2, keepdim=True)), start=1):
        last = step >= max_steps or state.exhausted
        if last or step >= due:
            due = step + max(5, step // 5)
            alpha = state.B.diagonal(dim1=1, dim2=2).cpu().numpy()
            beta = torch.cat([state.B.diagonal(1, 1, 2), state.coupling[:, :, 0]], dim=1).cpu().numpy()
            if not (np.isfinite(alpha).all() and np.isfinite(beta).all()):
                raise ValueError(f"spectral_norm({A!r}): the operator returned NaN or infinite values")
            previous = lower
            lower, upper = _ritz_and_root(alpha, beta, delta)
            settled = delta == 0 and lower <= (1 + rtol / 100) * previous  # nothing to wait for but the lower end
            if last or settled or upper <= (1 + rtol) * lower:
                break
    margin = B.groups * n + prod(B.out_shape)
    return _down(size * lower, margin), _up(size * upper, margin)


def _ritz_and_root(alpha: np.ndarray, beta: np.ndarray, delta: float) -> tuple[float, float]:
    """Largest Ritz value, and largest root of p_k(t) = 1/δ, over all groups, as singular values.

    p_k(t) = det(tI - BᵀB) / Π α_j β_j is followed through the pivots of tI - BᵀB, all positive exactly beyond the Ritz
    values. Where a group's Krylov space became invariant at step j (α_j or β_j below the noise), the steps up to and with j
    count, with the noise level as an upper bound of the vanished entry, which keeps the inequality.
    """
    steps = alpha.shape[1]
    size = np.maximum(alpha.max(1), beta.max(1))
    scale, live = np.array([power_of_two(s) for s in size]), size > 0
    if not live.any():
        return 0.0, 0.0
    a, b = alpha[live] / scale[live, None], beta[live] / scale[live, None]
    noise = 100 * _EPS
    goes_on = np.logical_and.accumulate((a > noise) & (b > noise), axis=1)
    counts = np.pad(goes_on[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    a, b = np.where(counts, np.maximum(a, noise), 1.0), np.maximum(b, noise)
    previous_a, previous_b = (np.concatenate([np.zeros((len(a), 1)), x[:, :-1]], axis=1) for x in (a, b))
    diagonal, off, log_ab = a**2 + previous_b**2, previous_a * previous_b, np.log(a * b)  # BᵀB of the upper bidiagonal B

    def log_polynomial(t: np.ndarray) -> np.ndarray:
        """log p(t) of each group at its own points t (g, points); -inf at or below the group's largest Ritz value."""
        total, pivot = np.zeros_like(t), np.ones_like(t)
        for j in range(steps):
            pivot = t - diagonal[:, j, None] - off[:, j, None] ** 2 / pivot
            positive = pivot > 0
            term = np.where(positive, np.log(np.where(positive, pivot, 1.0)) - log_ab[:, j, None], -np.inf)
            total = total + np.where(counts[:, j, None], term, 0.0)
            pivot = np.where(positive & counts[:, j, None], pivot, 1.0)
        return total

    norm_bound = (a * counts + b).max(1) * 2 + 1.0  # Gershgorin: above every Ritz value of B
    ritz, _ = _first(lambda t: np.isfinite(log_polynomial(t)), np.zeros(len(a)), norm_bound**2)
    root = np.full(len(a), np.inf)
    if delta > 0:
        _, root = _first(lambda t: log_polynomial(t) >= -math.log(delta), ritz, norm_bound**2 * 4)
    return float((np.sqrt(ritz) * scale[live]).max()), float((np.sqrt(root) * scale[live]).max())


def _first(holds: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per group, where a monotone condition begins to hold: (last point without it, first point with it)."""
    while not holds(high[:, None]).all():
        high = high * 4
    rows, fractions = np.arange(len(low)), np.linspace(0, 1, 65)
    for _ in range(8):  # every round divides the bracket by 64
        points = low[:, None] + (high - low)[:, None] * fractions
        points[:, -1] = high
        first = np.maximum(holds(points).argmax(1), 1)
        low, high = points[rows, first - 1], points[rows, first]
    return low, high


def schur_bound(kernel: Kernel) -> float:
    """sqrt(‖A‖₁ ‖A‖_∞) from sums of absolute kernel entries, the largest over groups (Schur's test).

    Every output sees each entry of its filter at most once, and every input meets each entry at most once, whatever the
    stride, dilation and amount of zero or circular padding.
    """
    scale = power_of_two(float(kernel.weight.abs().max()))
    size = (kernel.weight / scale).abs().flatten(2).sum(2)  # (out, in/g)
    size = size.reshape(kernel.groups, -1, size.shape[1])  # (g, out/g, in/g)
    largest = float((size.sum(1).amax(1) * size.sum(2).amax(1)).sqrt().max())
    return _up(kernel.gain * scale * largest, kernel.weight[0].numel())


def symbol_bound(kernel: Kernel) -> float:
    """Supremum over all frequencies of the norm of the kernel's Fourier symbol, the largest over groups.

    A zero-padded convolution is a section of the convolution on the infinite grid, whose norm is that supremum, and a
    circular one samples the symbol; a stride only drops rows. A trigonometric polynomial of degree d is at most
    1 / cos(π d / N) above its maximum over N > 2 d equispaced points (Ehlich and Zeller 1964), applied along every axis;
    it applies because ⟨y, K(ω) x⟩ is such a polynomial for fixed x and y, of degree (window - 1) / 2 once centred.
    Returns inf where the decompositions would cost too much.
    """
    c_out, c_in, *window = kernel.weight.shape
    per_out = c_out // kernel.groups
    grid = [1 if w == 1 else max(_SYMBOL_GRID, 16 * w) for w in window]
    if prod(grid) / 2 * kernel.groups * per_out * c_in * min(per_out, c_in) > _SYMBOL_WORK or len(window) > 2:
        return math.inf
    slack = prod(1 / math.cos(math.pi * math.ceil((w - 1) / 2) / n) for w, n in zip(window, grid, strict=True))
    scale = power_of_two(float(kernel.weight.abs().max()))
    largest = max(float(_norms(symbol).max()) for symbol in _symbols(kernel.weight.double() / scale, grid, kernel.groups))
    return _up(kernel.gain * scale * slack * largest, c_out + kernel.weight[0].numel() + prod(grid))


def frobenius_bound(A: LinearOperator) -> float:
    """Frobenius norm, from above: every kernel entry acts at most once for each output position (or input position).

    Where the padding repeats inputs, ‖A‖_F ≤ ‖convolution of the padded input‖_F ‖padding‖, counted by positions of the
    output, of which the adjoint's are the inputs.
    """
    assert A.kernel is not None
    fewest = max if A.kernel.gain > 1 else min
    positions = fewest(prod(A.out_shape[1:]), prod(A.in_shape[1:]))
    scale = power_of_two(float(A.kernel.weight.abs().max()))
    largest = float((A.kernel.weight / scale).norm()) * math.sqrt(positions)
    return _up(A.kernel.gain * scale * largest, A.kernel.weight.numel())


def _symbols(weight: Tensor, grid: list[int], groups: int) -> Iterator[Tensor]:
    """Fourier symbols (frequencies, g, out/g, in/g) in pieces; conjugate frequencies are left out."""
    axes = list(range(2, 2 + len(grid)))
    spectrum = torch.fft.rfftn(weight, s=grid, dim=axes)
    out, inn = weight.shape[:2]
    flat = spectrum.reshape(groups, out // groups, inn, -1).permute(3, 0, 1, 2)
    yield from flat.split(max(1, int(2**22 // (out * inn))))


def _norms(matrices: Tensor) -> Tensor:
    if 1 in matrices.shape[-2:]:
        return matrices.abs().square().sum((-2, -1)).sqrt()
    return torch.linalg.svdvals(matrices)[..., 0]


def _up(value: float, operations: int) -> float:
    """Round a float64 result outward, past the error of about ``operations`` accumulated roundings."""
    return math.nextafter(value * (1 + 8 * operations * _EPS), math.inf) if value > 0 else value


def _down(value: float, operations: int) -> float:
    return max(0.0, math.nextafter(value * (1 - 8 * operations * _EPS), 0.0)) if value > 0 else value


_KERNEL_BOUNDS: dict[str, Callable[[Kernel], float]] = {"schur": schur_bound, "symbol": symbol_bound}
