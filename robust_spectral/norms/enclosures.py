"""Two-sided enclosures of an operator's spectral norm, with the theorem that proves the upper end.

Everything is computed in float64 and rounded outward by a margin that covers the arithmetic. Small operators are decomposed
densely. Larger ones get the smallest of several upper bounds: those for convolutions are deterministic; the Lanczos bound, for
any operator, has a stated probability of failure over its own random start.
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
_QUICK_SYMBOL = 1e9  # most multiply-adds of a symbol bound that is computed before a Lanczos run


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

    A small operator is decomposed densely, and a circular convolution by the Fourier transform where the cost allows it. For
    all others a Lanczos run, two applications a step, gives the lower end, and the upper end is the smallest of its bound and
    those from a convolution's kernel. The ends are rounded outward.

    Args:
        A: The operator; the computation runs in float64 whatever its type.
        failure_probability: Probability that the Lanczos bound fails; 0 allows deterministic bounds only.
        rtol: Relative width, upper / lower - 1, at which the Lanczos run stops early.
        max_steps: Largest number of steps of the Lanczos run; each applies A and its adjoint once.
        seed: Seed of the random start of the Lanczos run.

    Raises:
        ValueError: ``failure_probability`` is outside [0, 1), or the operator returns non-finite values.
        TypeError: A is not an operator.

    Source: Hochstenbach (2013), Probabilistic upper bounds for the matrix two-norm, Theorem 3, for the Lanczos bound;
    `norms.convolution_bounds` names the source of each bound from a kernel.
    """
    check_operator("spectral_norm", A)
    return norm_intervals([A], failure_probability, rtol=rtol, max_steps=max_steps, seed=seed)[0]


@full_precision_no_grad()
def norm_intervals(
    operators: Sequence[LinearOperator], failure_probability: float = 1e-9, *, rtol: float = 1e-2, max_steps: int = 200,
    seed: int = 0, together: bool | None = None,
) -> list[NormInterval]:  # fmt: skip
    """The interval of `spectral_norm` for each of several operators; Lanczos runs of equal shapes can share their steps.

    Sharing saves time on a GPU, where most of a small computation's time is its launch. On a CPU nearly all time goes into
    applications of the operators, and a shared run takes as many steps as its slowest operator needs.

    Args:
        operators: Operators of any shapes.
        failure_probability: Probability that the Lanczos bound of one operator fails.
        rtol: As in `spectral_norm`.
        max_steps: As in `spectral_norm`.
        seed: As in `spectral_norm`.
        together: Whether operators of equal shapes share steps; by default only if they are not on the CPU.

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
    return [_widened(interval, _rounding_error(A, failure_probability)) for A, interval in zip(exact, found, strict=True)]


def _kernel_interval(A: LinearOperator, most_work: float) -> NormInterval:
    """The norm of a circular convolution where affordable; else the smallest upper bound from the kernel, with lower end 0."""
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
            f"spectral_norm({A!r}): {proved.method} upper bound {proved.upper} < lower bound {run.lower}; please report this"
        )
    return run if run.upper < proved.upper else replace(proved, lower=run.lower)


def _widened(interval: NormInterval, noise: float) -> NormInterval:
    return replace(interval, lower=max(0.0, interval.lower - noise), upper=interval.upper + noise) if noise else interval


def _rounding_error(A: LinearOperator, failure_probability: float) -> float:
    """The absolute rounding error in applying a composition: a few roundings of the product of the norms of its ``parts``."""
    if not A.parts:
        return 0.0
    allowed = max(failure_probability, 1e-9)
    product = prod(spectral_norm(part, allowed, rtol=1.0, max_steps=20).upper for part in A.parts)
    return 8 * sum(prod(part.in_shape) + prod(part.out_shape) for part in A.parts) * EPS * product


def dense_interval(A: LinearOperator) -> NormInterval:
    """The interval from a dense decomposition, block by block, with its rounding error (`largest_singular_value`)."""
    blocks = dense_blocks(A)
    scale = power_of_two(float(blocks.abs().max()))
    value, operations = largest_singular_value(blocks / scale)
    return NormInterval(round_down(scale * value, operations), round_up(scale * value, operations), "dense")
