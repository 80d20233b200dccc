"""Upper bounds of the norm of each group of an operator, against decompositions."""

import pytest
import torch
from torch import Tensor

from robust_spectral.norms import largest_by_group
from robust_spectral.operators import LinearOperator


@pytest.mark.parametrize("sizes", [(1, 30, 20), (5, 12, 7), (4, 7, 12), (3, 40, 40), (6, 1, 5)], ids=str)
def test_the_largest_norm_of_each_group_is_at_least_that_of_a_decomposition(sizes: tuple[int, int, int]) -> None:
    groups = sizes[0]
    scales = 10.0 ** torch.arange(0, 2 * groups, 2, dtype=torch.float64)
    matrices = torch.randn(sizes, dtype=torch.float64) * scales[:, None, None]
    A = grouped_operator(matrices)
    exact = torch.linalg.svdvals(matrices)[:, 0]
    for max_steps in (1, 4, 100):
        found = largest_by_group(A, 1e-9, rtol=1e-3, max_steps=max_steps, seed=1)
        assert found.shape == (groups,) and bool((found >= exact).all())
    assert bool((found <= 1.02 * exact).all())


def test_a_group_of_zeros_has_norm_zero_and_leaves_the_others_alone() -> None:
    matrices = torch.randn(3, 6, 5, dtype=torch.float64)
    matrices[1] = 0.0
    found = largest_by_group(grouped_operator(matrices), 1e-9, rtol=1e-3, max_steps=50, seed=0)
    exact = torch.linalg.svdvals(matrices)[:, 0]
    assert bool((found >= exact).all()) and float(found[1]) < 1e-9 and bool((found <= 1.02 * exact + 1e-9).all())


def grouped_operator(matrices: Tensor) -> LinearOperator:
    """The operator of a matrix for each group, (groups, rows, columns), on inputs (groups, columns)."""
    groups, height, width = matrices.shape
    return LinearOperator(
        (groups, width), (groups, height), matrices.dtype, matrices.device, lambda X: torch.einsum("gij,kgj->kgi", matrices, X),
        lambda Y: torch.einsum("gij,kgi->kgj", matrices, Y), groups=groups,
    )  # fmt: skip


@pytest.mark.parametrize("exponent", [100, 158, 165])
def test_a_group_far_smaller_than_another_has_no_bound_below_its_norm(exponent: int) -> None:
    matrices = torch.stack(
        [10.0**exponent * torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 2.0, 3.0]).double())]
    )
    large, small = largest_by_group(grouped_operator(matrices), 1e-9, rtol=1e-3, max_steps=50, seed=0).tolist()
    assert large >= 10.0**exponent and small >= 3
