"""Exact scaling by powers of two, outward rounding, and largest singular values with a bound of their error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = float(torch.finfo(torch.float64).eps)


def power_of_two(size: float) -> float:
    """A power of two between size / 2 and ``size``, up to rounding, by which a division is exact; 1 for a size of 0.

    Raises:
        ValueError: the size is not finite.
    """
    if not math.isfinite(size):
        raise ValueError("the operator returned NaN or infinite values")
    return 2.0 ** math.floor(math.log2(size)) if size > 0 else 1.0


def round_up(value: float, operations: float) -> float:
    """Round a float64 ``value`` up, past the error of about ``operations`` accumulated roundings; 0 stays 0."""
    return math.nextafter(value * (1 + 8 * operations * EPS), math.inf) if value > 0 else value


def round_down(value: float, operations: float) -> float:
    """Round a float64 ``value`` towards 0, past the error of about ``operations`` accumulated roundings."""
    return max(0.0, math.nextafter(value * (1 - 8 * operations * EPS), 0.0)) if value > 0 else value


def smaller_gram(matrices: Tensor) -> Tensor:
    """The smaller of the Gram matrices M Mᴴ and Mᴴ M of matrices M (..., m, n)."""
    rows, columns = matrices.shape[-2:]
    return matrices @ matrices.mH if rows <= columns else matrices.mH @ matrices


def largest_singular_value(matrices: Tensor) -> tuple[float, float]:
    """The largest singular value in a batch of matrices, and the number of roundings (see `round_up`) that bounds its error.

    Computed as the square root of the largest eigenvalue of the smaller Gram matrix, several times faster than a singular
    value decomposition and as accurate for the largest value. The error of the product is at most n u |M||Mᵀ|, in norm at
    most n u ‖M‖_F², where u is the unit roundoff and n the inner dimension (Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., 3.5; less than 3 times as much for complex numbers). The error of the eigenvalue is a modest multiple
    of u ‖M‖².

    Args:
        matrices: (..., m, n), float64 or complex128, with a largest entry of the order of 1, so that squares stay finite.
    """
    m, n = matrices.shape[-2:]
    gram = smaller_gram(matrices)
    largest = float(torch.linalg.eigvalsh(gram)[..., -1].max()) if min(m, n) > 1 else float(gram.real.max())
    energy = float(gram.diagonal(dim1=-2, dim2=-1).real.sum(-1).max())
    return math.sqrt(max(largest, 0.0)), m + n + (max(m, n) * energy / largest / 8 if largest > 0 else 0.0)


def product_up(*factors: float) -> float:
    """Product of non-negative numbers, rounded up; 0 times anything is 0, and a factor of 1 changes nothing."""
    if 0 in factors:
        return 0.0
    product = 1.0
    for factor in factors:
        if 1.0 in (product, factor):
            product *= factor
        else:
            product = math.nextafter(product * factor, math.inf)
    return product
