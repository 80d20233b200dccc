"""Two-sided enclosures of an operator's spectral norm: what may be called a bound, and by which theorem.

Everything is computed in float64 and rounded outward by a margin that covers the arithmetic. Small operators get a dense
singular value decomposition. Larger ones get the smallest upper bound of several theorems: some hold for convolutions only
and always, the Lanczos bound holds for any operator with a stated probability of failure over its own random start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from ..numerics import EPS, largest_singular_value, power_of_two, round_down, round_up
from ..operators import LinearOperator, check_operator, full_precision_no_grad
from ..singular_values import dense_blocks, dense_work
from .convolution_bounds import SYMBOL_WORK, fourier_norm, frobenius_bound, schur_bound, symbol_bound
from .lanczos_bound import lanczos_intervals

_DENSE_WORK = 2e9  # multiply-adds of a dense decomposition that take a quarter of a second on two cores
_QUICK_SYMBOL = 1e9  # of a symbol bound that is worth a try before a Lanczos run


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


@full_precision_no_grad()
def spectral_norm(
    A: LinearOperator, failure_probability: float = 1e-9, *, rtol: float = 1e-2, max_steps: int = 200, seed: int = 0
) -> NormInterval:
    """An interval that contains the spectral norm of an operator.

    A small operator gets a dense decomposition, a convolution the smallest of the bounds that its kernel gives, and whatever
    these leave wide a Lanczos run, two applications a step. The ends are rounded outward.

    Args:
        A: The operator; the computation runs in float64 whatever its type.
        failure_probability: Of the probabilistic upper bound; 0 allows deterministic bounds only.
        rtol: Width upper / lower - 1 at which the Lanczos run stops early.
        max_steps: Steps of that run at most; each applies A and its adjoint once.
        seed: Seed of its random start.

    Raises:
        ValueError: ``failure_probability`` is outside [0, 1), or the operator returns non-finite values.
        TypeError: A is not an operator.

    Source: of the Lanczos bound, Hochstenbach (2013), Probabilistic upper bounds for the matrix two-norm, Theorem 3; of the
    others, what `kernel_bounds` names at each.
    """
    check_operator("spectral_norm", A)
    return norm_intervals([A], failure_probability, rtol=rtol, max_steps=max_steps, seed=seed)[0]


@full_precision_no_grad()
def norm_intervals(
    operators: Sequence[LinearOperator], failure_probability: float = 1e-9, *, rtol: float = 1e-2, max_steps: int = 200,
    seed: int = 0, together: bool | None = None,
) -> list[NormInterval]:  # fmt: skip
    """`spectral_norm` of several operators; Lanczos runs of equal shapes share their steps where that pays.

    It pays where the time goes into starting small computations, which is on a GPU; on a CPU the applications of the operators
    take nearly all of it, and a run that is shared lasts as long as its slowest member.

    Args:
        operators: Any, of any shapes.
        failure_probability: Of each interval on its own.
        rtol: As in `spectral_norm`.
        max_steps: As in `spectral_norm`.
        seed: As in `spectral_norm`.
        together: Whether to share steps; by default where the device is not the CPU.

    Raises:
        ValueError: as `spectral_norm`.
    """
    if not 0 <= failure_probability < 1:
        raise ValueError(f"spectral_norm(failure_probability={failure_probability}): must be in [0, 1)")
    exact = [A.to(torch.float64) for A in operators]
    most_work = _QUICK_SYMBOL if failure_probability > 0 else SYMBOL_WORK
    found = [dense_interval(A) if dense_work(A) <= _DENSE_WORK else _kernel_interval(A, most_work) for A in exact]
    alike: dict[Any, list[int]] = {}
    for index, (A, interval) in enumerate(zip(exact, found, strict=True)):
        if interval.method not in ("dense", "fourier"):
            shared = together if together is not None else A.device.type != "cpu"
            alike.setdefault((A.in_shape, A.out_shape, A.groups, A.device) if shared else index, []).append(index)
    for members in alike.values():
        runs = lanczos_intervals(
            [exact[i] for i in members], failure_probability, [found[i].upper for i in members], rtol=rtol,
            max_steps=max_steps, seed=seed,
        )  # fmt: skip
        for i, (lower, upper) in zip(members, runs, strict=True):
            found[i] = _intersection(exact[i], found[i], NormInterval(lower, upper, "lanczos", failure_probability))
    return [_widened(interval, _roundings(A, failure_probability)) for A, interval in zip(exact, found, strict=True)]


def _kernel_interval(A: LinearOperator, most_work: float) -> NormInterval:
    """The norm itself where the kernel has it; else the smallest upper bound it gives, and nothing of the lower end."""
    if A.kernel is None:
        return NormInterval(0.0, math.inf, "none")
    ends = fourier_norm(A.kernel)
    if ends is not None:
        return NormInterval(*ends, "fourier")
    candidates = [
        (schur_bound(A.kernel), "schur"),
        (symbol_bound(A.kernel, most_work), "symbol"),
        (frobenius_bound(A), "frobenius"),
    ]
    return NormInterval(0.0, *min(candidates))


def _intersection(A: LinearOperator, proved: NormInterval, run: NormInterval) -> NormInterval:
    if proved.upper < run.lower:
        raise RuntimeError(
            f"spectral_norm({A!r}): the {proved.method} bound {proved.upper} is below {run.lower}, the norm is not; report it"
        )
    return run if run.upper < proved.upper else replace(proved, lower=run.lower)


def _widened(interval: NormInterval, noise: float) -> NormInterval:
    return replace(interval, lower=max(0.0, interval.lower - noise), upper=interval.upper + noise) if noise else interval


def _roundings(A: LinearOperator, failure_probability: float) -> float:
    """Absolute error of applying a composition, whose parts may cancel: a few roundings of the product of their norms."""
    if not A.parts:
        return 0.0
    allowed = max(failure_probability, 1e-9)
    product = prod(spectral_norm(part, allowed, rtol=1.0, max_steps=20).upper for part in A.parts)
    return 8 * sum(prod(part.in_shape) + prod(part.out_shape) for part in A.parts) * EPS * product


def dense_interval(A: LinearOperator) -> NormInterval:
    """Decomposition of the matrix, block by block, with its backward error (`largest_singular_value`)."""
    blocks = dense_blocks(A)
    scale = power_of_two(float(blocks.abs().max()))
    value, operations = largest_singular_value(blocks / scale)
    return NormInterval(round_down(scale * value, operations), round_up(scale * value, operations), "dense")
