"""Checks of every norm bound of a generated layer against its dense float64 matrix; the only slack is the reference's error."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from generated import Layer
from reference import dense
from torch import Tensor

import robust_spectral as rs
from robust_spectral.norms import enclosures
from robust_spectral.norms.convolution_bounds import frobenius_bound, schur_bound, symbol_bound
from robust_spectral.norms.enclosures import dense_interval
from robust_spectral.norms.lanczos_bound import lanczos_interval
from robust_spectral.operators.base import LinearOperator

EPS = torch.finfo(torch.float64).eps
CHAIN_ROUNDING = 1e-11


@dataclass(frozen=True)
class Verdict:
    """The outcome for one layer: the reason of a refusal, the bounds that fail, and upper / true of two intervals."""

    seed: int
    kind: str
    refusal: str | None = None
    failures: tuple[str, ...] = ()
    ratio: float = math.nan
    lanczos_ratio: float = math.nan


@dataclass(frozen=True)
class Reference:
    """sigma_1 and the Frobenius norm of a matrix, and the error of each: (m + n) eps sigma_1, and m n eps times the norm."""

    norm: float
    error: float
    frobenius: float

    @classmethod
    def of(cls, matrix: Tensor) -> "Reference":
        """Compute both norms from the matrix divided by a power of two, so that nothing under- or overflows."""
        size = 2.0 ** math.frexp(float(matrix.abs().max()))[1]
        norm = size * float(torch.linalg.svdvals(matrix / size)[0])
        frobenius = size * float((matrix / size).norm())
        margin = 8 * (sum(matrix.shape) + matrix.numel()) * EPS
        return cls(norm, sum(matrix.shape) * EPS * norm, frobenius * (1 + margin))


def verdict(layer: Layer) -> Verdict:
    """Check `spectral_norm` and, one by one, all bounds that it chooses from."""
    matrix = dense(layer.module, layer.in_shape)
    if not bool(torch.isfinite(matrix).all()):
        return Verdict(layer.seed, layer.kind, refusal="reference is not finite")
    truth = Reference.of(matrix)
    try:
        operator = rs.linear_operator(layer.module, layer.in_shape)
        found = rs.spectral_norm(operator)
    except (NotImplementedError, ValueError) as error:
        return Verdict(layer.seed, layer.kind, refusal=f"{type(error).__name__}: {error}")
    exact = operator.to(torch.float64)
    rounding = chain_rounding(exact)
    bounds = {"spectral_norm": (found.lower, found.upper), **dict(theorems(exact))}
    failures = [
        f"{name}: [{lower!r}, {upper!r}] against {truth.norm!r} +- {truth.error:.1e}"
        for name, (lower, upper) in bounds.items()
        if not (lower <= truth.norm + truth.error and upper >= truth.norm - truth.error)
    ]
    if found.upper > truth.frobenius + rounding:
        failures.append(f"spectral_norm: {found.upper!r} is above the Frobenius norm {truth.frobenius!r}")
    return Verdict(
        layer.seed,
        layer.kind,
        None,
        tuple(failures),
        ratio(found.upper, truth.norm + rounding),
        ratio(bounds["lanczos"][1], truth.norm),
    )


def theorems(A: LinearOperator) -> Iterator[tuple[str, tuple[float, float]]]:
    """Each bound that applies, as (lower, upper)."""
    interval = dense_interval(A)
    yield "dense", (interval.lower, interval.upper)
    yield "lanczos", lanczos_interval(A, 1e-9)
    with mock.patch.object(enclosures, "_DENSE_WORK", -1):
        interval = rs.spectral_norm(A)
    yield "spectral_norm without dense", (interval.lower, interval.upper)
    if A.kernel is not None:
        yield "schur", (0.0, schur_bound(A.kernel))
        yield "symbol", (0.0, symbol_bound(A.kernel))
        yield "frobenius", (0.0, frobenius_bound(A))


def chain_rounding(A: LinearOperator) -> float:
    """The rounding error of a chain whose parts cancel, proportional to the product of their norms."""
    return CHAIN_ROUNDING * math.prod(rs.spectral_norm(part).upper for part in A.parts) if A.parts else 0.0


def ratio(upper: float, true: float) -> float:
    return upper / true if true > 0 else 1.0 if upper == 0 else math.inf
