"""What keeps numbers honest: exact scaling by powers of two, outward rounding, and top singular values with their error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = float(torch.finfo(torch.float64).eps)


def power_of_two(size: float) -> float:
    """The power of two just below a size, so that dividing by it is exact; 1 for 0.

    Raises:
        ValueError: the size is not finite.
    """
    if not math.isfinite(size):
        raise ValueError("the operator returned NaN or infinite values")
    return 2.0 ** math.floor(math.log2(size)) if size > 0 else 1.0


def round_up(value: float, operations: float) -> float:
    """A float64 result moved outward, past the error of about ``operations`` accumulated roundings; 0 stays 0."""
    return math.nextafter(value * (1 + 8 * operations * EPS), math.inf) if value > 0 else value


def round_down(value: float, operations: float) -> float:
    """A float64 result moved towards 0, past the error of about ``operations`` accumulated roundings."""
    return max(0.0, math.nextafter(value * (1 - 8 * operations * EPS), 0.0)) if value > 0 else value


def smaller_gram(matrices: Tensor) -> Tensor:
    """M Mᴴ or Mᴴ M, whichever is smaller, of matrices (..., m, n)."""
    rows, columns = matrices.shape[-2:]
    return matrices @ matrices.mH if rows <= columns else matrices.mH @ matrices


def largest_singular_value(matrices: Tensor) -> tuple[float, float]:
    """The largest singular value of a batch of matrices, and how many roundings its error amounts to.

    Taken as the root of the largest eigenvalue of the smaller Gram matrix, several times faster than a singular value
    decomposition and as exact for the largest value: the product errs by at most n u |M||Mᵀ|, which in norm is no more than
    n u ‖M‖_F², u being the unit roundoff and n the inner dimension (Higham, Accuracy and Stability of Numerical Algorithms,
    2nd ed., 3.5; a factor below 3 more for complex numbers), and the eigenvalue by a modest multiple of u ‖M‖².

    Args:
        matrices: (..., m, n), float64 or complex128, with a largest entry of the order of 1, so that squares stay finite.
    """
    m, n = matrices.shape[-2:]
    gram = smaller_gram(matrices)
    largest = float(torch.linalg.eigvalsh(gram)[..., -1].max()) if min(m, n) > 1 else float(gram.real.max())
    energy = float(gram.diagonal(dim1=-2, dim2=-1).real.sum(-1).max())
    return math.sqrt(max(largest, 0.0)), m + n + (max(m, n) * energy / largest / 8 if largest > 0 else 0.0)


def product_up(*factors: float) -> float:
    """Product of non-negative numbers, rounded up; 0 times anything is 0."""
    if 0 in factors:
        return 0.0
    product = 1.0
    for factor in factors:
        product = math.nextafter(product * factor, math.inf)
    return product
