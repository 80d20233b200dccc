"""Singular triplets: their defining equations, and values that equal those of the dense float64 matrix."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from cases import CASES, Case
from reference import singular_values, tolerance
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.operators.base import LinearOperator
from robust_spectral.singular_values.krylov import KrylovSpace, golub_kahan, krylov_space, random_block, rayleigh_ritz

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_solver = pytest.mark.parametrize(
    "solver", [rs.Lanczos(rtol=1e-7), rs.PowerQR(steps=500, rtol=1e-7)], ids=["lanczos", "powerqr"]
)
same_padding_copies = pytest.mark.filterwarnings("ignore:Using padding='same'")

LOOSE = 1e-6  # relative error of a value whose residual is 1e-7


def matrix_operator(M: Tensor) -> LinearOperator:
    build: Callable[[torch.dtype], LinearOperator] = lambda dtype: matrix_operator(M.to(dtype))  # noqa: E731
    return LinearOperator(M.shape[1:], M.shape[:1], M.dtype, M.device, lambda X: X @ M.T, lambda Y: Y @ M, build)


def with_spectrum(values: list[float], rows: int, columns: int) -> LinearOperator:
    """A random matrix with the singular values given, the others zero."""
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (rows, columns))
    k = len(values)
    return matrix_operator(left[:, :k] * torch.tensor(values, dtype=torch.float64) @ right[:, :k].T)


def rows(X: Tensor) -> Tensor:
    return X.flatten(1)


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


@same_padding_copies
@pytest.mark.parametrize("solver", [rs.Lanczos(), rs.PowerQR(steps=30)], ids=["lanczos", "powerqr"])
@every_case
def test_triplets_satisfy_their_equations_up_to_the_residuals(case: Case, solver) -> None:
    A = rs.linear_operator(case.build(), case.in_shape, torch.float64)
    t = rs.top_singular(A, 3, solver)
    bound = t.residuals * (1 + 1e-9) + tolerance(A.dtype) * t.values[0]
    assert bool((rows(A.matmat(t.right) - column(t.values, t.left) * t.left).norm(dim=1) <= bound).all())
    assert bool((rows(A.rmatmat(t.left) - column(t.values, t.right) * t.right).norm(dim=1) <= bound).all())
    assert t.converged == bool((t.residuals <= solver.rtol * t.values[0]).all())
    found = t.values > 1e-6 * t.values[0]
    for vectors in (rows(t.left)[found], rows(t.right)[found]):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors), dtype=A.dtype), rtol=0, atol=1e-9)


@same_padding_copies
@every_case
def test_lanczos_finds_the_top_values_of_the_dense_matrix(case: Case) -> None:
    A = rs.linear_operator(case.build(), case.in_shape, torch.float64)
    t, true = rs.top_singular(A, 3, rs.Lanczos(rtol=1e-7)), singular_values(case.build(), case.in_shape)
    wanted = torch.cat([true, torch.zeros(3, dtype=torch.float64)])[:3]
    assert t.converged
    assert float((t.values - wanted).abs().max()) <= LOOSE * float(true[0])


@same_padding_copies
@every_case
def test_powerqr_finds_the_top_value_of_the_dense_matrix(case: Case) -> None:
    A = rs.linear_operator(case.build(), case.in_shape, torch.float64)
    t, true = rs.top_singular(A, 3, rs.PowerQR(steps=300)), singular_values(case.build(), case.in_shape)
    assert float(t.values[0]) == pytest.approx(float(true[0]), rel=LOOSE, abs=0)


@same_padding_copies
@pytest.mark.parametrize("solver", [rs.Lanczos(), rs.PowerQR()], ids=["lanczos", "powerqr"])
@every_case
def test_values_in_the_dtype_of_the_layer_are_within_their_tolerance(case: Case, solver) -> None:
    t = rs.top_singular(rs.linear_operator(case.build(), case.in_shape), 1, solver)
    true = float(singular_values(case.build(), case.in_shape)[0])
    assert float(t.values[0]) == pytest.approx(true, rel=5e-3, abs=0)


@same_padding_copies
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("make", [lambda n: rs.Lanczos(max_steps=n), lambda n: rs.PowerQR(steps=n)], ids=["lanczos", "powerqr"])
@every_case
def test_values_are_never_above_the_true_singular_values(case: Case, make, steps: int) -> None:
    A = rs.linear_operator(case.build(), case.in_shape, torch.float64)
    true = singular_values(case.build(), case.in_shape)
    values = rs.top_singular(A, 2, make(steps)).values[: len(true)]
    assert bool((values <= true[: len(values)] * (1 + tolerance(A.dtype))).all())


@every_solver
def test_a_repeated_singular_value_is_found_with_its_multiplicity(solver) -> None:
    A = with_spectrum([2.0, 2.0, 2.0, 1.0, 0.5], 8, 12)
    t = rs.top_singular(A, 4, solver)
    torch.testing.assert_close(t.values, torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=A.dtype), rtol=LOOSE, atol=0)


@every_solver
def test_the_identity_has_every_value_one(solver) -> None:
    t = rs.top_singular(rs.linear_operator(nn.Identity(), (2, 3)), 6, solver)
    torch.testing.assert_close(t.values, torch.ones(6))


@every_solver
def test_values_beyond_the_rank_are_zero(solver) -> None:
    A = with_spectrum([3.0, 1.0], 6, 7)
    t = rs.top_singular(A, 5, solver)
    torch.testing.assert_close(t.values, torch.tensor([3.0, 1.0, 0, 0, 0], dtype=A.dtype), rtol=LOOSE, atol=1e-12)


@every_solver
@pytest.mark.parametrize(
    "module, in_shape", [(nn.Linear(5, 2), (5,)), (nn.Linear(2, 5), (2,)), (nn.Conv1d(4, 2, 1, groups=2), (4, 1))]
)
def test_more_triplets_than_dimensions_are_padded_with_zeros(module: nn.Module, in_shape: tuple[int, ...], solver) -> None:
    A = rs.linear_operator(module, in_shape)
    t = rs.top_singular(A, 7, solver)
    assert t.values.shape == (7,) and t.left.shape == (7, *A.out_shape) and t.right.shape == (7, *A.in_shape)
    assert not t.values[2:].any()
    torch.testing.assert_close(t.values[:2].double(), singular_values(module, in_shape)[:2], rtol=1e-5, atol=0)


@every_solver
@pytest.mark.parametrize("k", [1, 3])
def test_the_zero_operator_has_values_zero(k: int, solver) -> None:
    t = rs.top_singular(matrix_operator(torch.zeros(4, 5, dtype=torch.float64)), k, solver)
    assert torch.equal(t.values, torch.zeros(k, dtype=torch.float64))
    assert torch.equal(t.residuals, torch.zeros(k, dtype=torch.float64))
    assert t.converged


@every_solver
def test_a_rank_one_operator_is_solved_in_a_few_steps(solver) -> None:
    u, v = torch.randn(6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    t = rs.top_singular(matrix_operator(torch.outer(u, v)), 1, solver)
    assert float(t.values[0]) == pytest.approx(float(u.norm() * v.norm()), rel=1e-12)
    assert float((t.right[0] @ v).abs()) == pytest.approx(float(v.norm()), rel=1e-12)
    assert t.steps <= 4


@every_solver
@pytest.mark.parametrize("exponent", [-100, 100], ids=["tiny", "huge"])
def test_values_scale_with_the_operator(exponent: int, solver) -> None:
    M = torch.randn(7, 6)
    once, scaled = (rs.top_singular(matrix_operator(X), 2, solver) for X in (M, M * 2.0**exponent))
    torch.testing.assert_close(scaled.values / 2.0**exponent, once.values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_triplet_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match="k="):
        rs.top_singular(rs.linear_operator(nn.Linear(3, 4), (3,)), k)


@pytest.mark.parametrize("shape", [(6, 30), (30, 6)], ids=["wide", "tall"])
@pytest.mark.parametrize("wrong", [(1, 7), (1, 5, 6), (7,)], ids=str)
def test_a_warm_start_of_another_shape_is_an_error(shape: tuple[int, int], wrong: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        rs.top_singular(matrix_operator(torch.randn(shape)), 1, right=torch.randn(wrong))


@pytest.mark.parametrize("solver", [rs.Lanczos(rtol=1e-6), rs.PowerQR(steps=2000, rtol=1e-6)], ids=["lanczos", "powerqr"])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=["wide", "tall"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_warm_start_takes_fewer_steps(solver, shape: tuple[int, int], k: int) -> None:
    M = torch.randn(shape, dtype=torch.float64)
    cold = rs.top_singular(matrix_operator(M), k, solver)
    nearby = matrix_operator(M + 1e-6 * torch.randn(shape, dtype=torch.float64))
    warm = rs.top_singular(nearby, k, solver, right=cold.right)
    assert cold.converged and warm.converged
    assert warm.steps < cold.steps
    torch.testing.assert_close(warm.values, rs.top_singular(nearby, k, solver, seed=5).values, rtol=LOOSE, atol=0)


@every_solver
def test_a_warm_start_may_have_fewer_or_more_vectors(solver) -> None:
    A = with_spectrum([3.0, 2.0, 1.0, 0.5], 6, 8)
    for count in (1, 5):
        t = rs.top_singular(A, 3, solver, right=torch.randn(count, 8, dtype=A.dtype))
        torch.testing.assert_close(t.values, torch.tensor([3.0, 2.0, 1.0], dtype=A.dtype), rtol=LOOSE, atol=0)


@every_solver
def test_a_warm_start_from_a_lower_rank_finds_new_singular_values(solver) -> None:
    poor = rs.top_singular(with_spectrum([3.0], 6, 8), 3, solver)
    A = with_spectrum([3.0, 2.0, 1.0, 0.5], 6, 8)
    t = rs.top_singular(A, 3, solver, right=poor.right)
    torch.testing.assert_close(t.values, torch.tensor([3.0, 2.0, 1.0], dtype=A.dtype), rtol=LOOSE, atol=0)


@every_solver
def test_a_warm_start_finds_a_group_that_has_grown(solver) -> None:
    module = nn.Conv1d(4, 4, 1, groups=2).double()
    A = rs.linear_operator(module, (4, 1))
    before = rs.top_singular(A, 1, solver)
    weaker = int(before.right.reshape(2, -1).norm(dim=1).argmin())
    with torch.no_grad():
        module.weight[2 * weaker : 2 * weaker + 2] *= 100
    after = rs.top_singular(A, 1, solver, right=before.right)
    assert float(after.values[0]) == pytest.approx(float(singular_values(module, (4, 1))[0]), rel=LOOSE)


@every_solver
def test_a_zero_warm_start_is_no_worse_than_none(solver) -> None:
    A = with_spectrum([3.0, 2.0, 1.0], 6, 8)
    t = rs.top_singular(A, 1, solver, right=torch.zeros(1, 8, dtype=A.dtype))
    assert float(t.values[0]) == pytest.approx(3.0, rel=LOOSE)


@every_solver
def test_a_start_orthogonal_to_the_top_vector_still_finds_it(solver) -> None:
    A = with_spectrum([3.0, 2.0, 1.0], 6, 8)
    second = rs.top_singular(A, 2, solver).right[1:]
    t = rs.top_singular(A, 1, solver, right=second)
    assert float(t.values[0]) == pytest.approx(3.0, rel=LOOSE)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(6, 6, 3, padding=1), lambda: nn.Conv2d(6, 6, 3, padding=1, groups=3)])
def test_a_restarted_run_keeps_a_small_basis_and_finds_the_same_triplets(make, k: int) -> None:
    A = rs.linear_operator(make().double(), (6, 12, 12))
    free, bounded = (rs.top_singular(A, k, rs.Lanczos(rtol=1e-8, max_steps=2000, basis=size)) for size in (4000, 24))
    assert free.converged and bounded.converged
    assert bounded.steps > 24 // k  # it did restart
    torch.testing.assert_close(bounded.values, free.values, rtol=1e-12, atol=0)
    assert bool((bounded.residuals <= 1e-8 * bounded.values[0]).all())


def test_the_basis_of_a_restarted_run_is_bounded() -> None:
    A = with_spectrum([1.0 - 1e-3 * i for i in range(60)], 80, 90)
    start = torch.randn(1, 2, 90, dtype=A.dtype)
    sizes = [state.V.shape[1] for state, _ in zip(golub_kahan(A, start, basis=20), range(60), strict=False)]
    assert max(sizes) == 20


def test_a_restart_keeps_the_relations_of_the_bidiagonalisation() -> None:
    A = with_spectrum([1.0 - 1e-2 * i for i in range(30)], 40, 50)
    M = A.to_dense()
    for state, _ in zip(golub_kahan(A, torch.randn(1, 2, 50, dtype=A.dtype), basis=16), range(20), strict=False):
        U, V, B = state.U[0], state.V[0], state.B[0]
        torch.testing.assert_close(M @ V.T, U.T @ B)
        torch.testing.assert_close(V @ V.T, torch.eye(len(V), dtype=A.dtype))
        torch.testing.assert_close(U @ U.T, torch.eye(len(U), dtype=A.dtype))


def values_of_a_few_steps(A: rs.LinearOperator, block: int, steps: int, seed: int = 0) -> tuple[KrylovSpace, Tensor, Tensor]:
    """A Krylov space of few steps, its Ritz values and the coefficients of the right singular vectors."""
    space = krylov_space(A, random_block(A, block, seed), steps)
    return space, *rayleigh_ritz(*space.numbers(), torch.finfo(A.dtype).eps)


@pytest.mark.parametrize("block", [1, 2])
def test_a_short_krylov_search_finds_triplets_of_every_group_until_its_space_is_exhausted(block: int) -> None:
    parts = [torch.randn(12, 10, dtype=torch.float64), torch.diag(torch.tensor([3.0, 2.0, 1.0] + [0.0] * 9))[:, :10].double()]
    A = replace(matrix_operator(torch.block_diag(*parts)), groups=2)
    space, values, coefficients = values_of_a_few_steps(A, block, 5)
    reference = next(islice(golub_kahan(A, random_block(A, block, seed=0)), 4, None))
    torch.testing.assert_close(values, torch.linalg.svdvals(reference.B), rtol=0, atol=1e-7)  # roots of squares
    right, images = coefficients @ space.V, coefficients @ space.images
    for M, size, V, U in zip(parts, values, right, images, strict=True):
        torch.testing.assert_close(M @ V.T, U.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(U @ U.T, torch.diag(size.square()), rtol=0, atol=1e-10)
        lengths = V.norm(dim=1).round()
        torch.testing.assert_close(V @ V.T, torch.diag(lengths), rtol=0, atol=1e-10)
    assert int(right[1].norm().square().round()) == 3 + block  # and the components of the start in the null space
    assert values[1, :3].tolist() == pytest.approx([3.0, 2.0, 1.0])


@pytest.mark.parametrize("block", [1, 2])
def test_a_short_krylov_search_includes_additional_rows(block: int) -> None:
    """Rows at any angle to the Krylov space, including a repeated row and zeros."""
    parts = [torch.randn(12, 10, dtype=torch.float64) for _ in range(2)]
    A = replace(matrix_operator(torch.block_diag(*parts)), groups=2)
    beside = torch.nn.functional.normalize(torch.randn(2, 2, 10, dtype=torch.float64), dim=2)
    beside = torch.cat([beside, beside[:, :1], torch.zeros_like(beside[:, :1])], 1)
    start = random_block(A, block, 0)
    space = krylov_space(A, start, 3, beside)
    values, coefficients = rayleigh_ritz(*space.numbers(), torch.finfo(A.dtype).eps)
    for M, size, V in zip(parts, values, coefficients @ space.V, strict=True):
        rank = 3 * block + 2
        torch.testing.assert_close(V[:rank] @ V[:rank].T, torch.eye(rank, dtype=A.dtype), rtol=0, atol=1e-10)
        torch.testing.assert_close((M @ V.T).norm(dim=0)[:rank], size[:rank])
    whole = [torch.cat([V, rows]) for V, rows in zip(krylov_space(A, start, 3).V, beside[:, :2], strict=True)]
    spans = [torch.linalg.svdvals(M @ torch.linalg.qr(rows.T)[0]) for M, rows in zip(parts, whole, strict=True)]
    torch.testing.assert_close(values[:, : 3 * block + 2], torch.stack(spans))


@pytest.mark.parametrize("decay", [0.0, 1e-3, 1e-2, 0.5])
@pytest.mark.parametrize("shape", [(8, 2000), (300, 6), (5, 5)], ids=str)
def test_a_krylov_search_past_the_rank_finds_no_value_above_the_norm(shape: tuple[int, int], decay: float) -> None:
    """In float32, where the rows past an exhausted space are rounding, which could give values of thousands of norms."""
    A = with_spectrum([decay**i for i in range(min(shape))], *shape).to_dense()
    for size in (1e-6, 1.0, 1e6):
        for seed in range(4):
            _, values, _ = values_of_a_few_steps(matrix_operator((size * A).float()), 1, 14, seed)
            assert float(values.max()) == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_a_short_krylov_search_is_accurate_where_all_singular_values_are_close(spread: float) -> None:
    """In float32, where each new row is the small remainder of a much longer image."""
    A = with_spectrum([1 - spread * i / 64 for i in range(64)], 64, 64).to_dense()
    exact = torch.linalg.svdvals(
        next(islice(golub_kahan(matrix_operator(A), random_block(matrix_operator(A), 1, 0)), 13, None)).B
    )[0]
    space, values, _ = values_of_a_few_steps(matrix_operator(A.float()), 1, 14)
    assert float((space.V @ space.V.mT - torch.eye(14)).abs().max()) <= 1e-2 * spread
    torch.testing.assert_close(values[0, :4], exact[:4], rtol=0, atol=5e-5 * spread + 2e-6)


def test_a_short_krylov_search_finds_the_singular_vector_with_the_sign_nearer_to_its_start() -> None:
    """Otherwise rounding would decide the sign, and training in one process and in two would differ."""
    for seed in range(20):
        A = matrix_operator(torch.randn(30, 40, generator=torch.Generator().manual_seed(seed)))
        _, _, coefficients = values_of_a_few_steps(A, 1, 7)
        assert bool((coefficients[:, :, 0] >= 0).all())


def test_a_short_krylov_search_of_a_non_finite_operator_gives_non_finite_values() -> None:
    for value in (float("nan"), float("inf"), 1e200):
        _, values, _ = values_of_a_few_steps(matrix_operator(torch.full((5, 4), value, dtype=torch.float64)), 1, 3)
        assert not bool(torch.isfinite(values).any())


def test_the_papers_variant_of_powerqr_finds_the_same_values() -> None:
    A = with_spectrum([4.0, 3.0, 2.0, 0.5, 0.1], 9, 7)
    t = rs.top_singular(A, 3, rs.PowerQR(steps=400, shift=1.0, rayleigh_ritz=False))
    torch.testing.assert_close(t.values, torch.tensor([4.0, 3.0, 2.0], dtype=A.dtype), rtol=LOOSE, atol=0)
    torch.testing.assert_close(A.matmat(t.right), column(t.values, t.left) * t.left, rtol=0, atol=1e-6)


def test_rayleigh_ritz_gives_larger_values_than_the_papers_variant() -> None:
    A = with_spectrum([1.0, 0.95, 0.9, 0.85, 0.8], 30, 20)
    paper = rs.top_singular(A, 1, rs.PowerQR(steps=20, shift=1.0, rayleigh_ritz=False))
    ours = rs.top_singular(A, 1, rs.PowerQR(steps=20, rtol=0))
    assert float(paper.values[0]) < float(ours.values[0]) <= 1 + 1e-12


@every_solver
def test_the_seed_decides_the_result(solver) -> None:
    A = matrix_operator(torch.randn(20, 30))
    first, again, other = (rs.top_singular(A, 2, solver, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.right, again.right) and torch.equal(first.values, again.values)
    assert not torch.equal(first.right, other.right)


def test_the_global_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    rs.top_singular(matrix_operator(torch.randn(5, 4, generator=torch.Generator().manual_seed(0))), 2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("make", [lambda n: rs.Lanczos(max_steps=n), lambda n: rs.PowerQR(steps=n)], ids=["lanczos", "powerqr"])
def test_a_solver_stopped_early_reports_that_it_has_not_converged(make) -> None:
    A = matrix_operator(torch.randn(60, 50, dtype=torch.float64))
    t = rs.top_singular(A, 1, make(2))
    assert not t.converged and t.steps == 2
    gap = rows(A.matmat(t.right) - column(t.values, t.left) * t.left).norm(dim=1)
    assert float(t.residuals[0]) >= float(gap[0]) * (1 - 1e-9) and float(t.residuals[0]) > 1e-4 * float(t.values[0])


def test_values_of_all_groups_are_merged_in_descending_order() -> None:
    module = nn.Conv2d(6, 6, 3, padding=1, groups=3).double()
    A = rs.linear_operator(module, (6, 4, 4))
    t = rs.top_singular(A, 6, rs.Lanczos(rtol=1e-8))
    torch.testing.assert_close(t.values, singular_values(module, (6, 4, 4))[:6], rtol=LOOSE, atol=0)
    assert bool((t.values.diff() <= 0).all())
    supports = t.right.reshape(6, 3, -1).norm(dim=2) > 0
    assert supports.sum(1).tolist() == [1] * 6


@pytest.mark.parametrize("solver", [rs.Lanczos, rs.PowerQR], ids=["lanczos", "powerqr"])
def test_groups_without_a_top_value_need_not_converge(solver: Callable[..., Any]) -> None:
    weak, strong = torch.randn(30, 30, dtype=torch.float64), torch.diag(torch.tensor([9.0] + [1.0] * 29, dtype=torch.float64))
    together = torch.block_diag(strong, 0.1 * weak / torch.linalg.matrix_norm(weak, 2))
    A = replace(matrix_operator(together), groups=2)
    alone, both = rs.top_singular(matrix_operator(strong), 1, solver()), rs.top_singular(A, 1, solver())
    assert both.converged and float(both.values[0]) == pytest.approx(9.0)
    assert both.steps <= alone.steps + 4


def test_lanczos_converges_in_every_group_on_request() -> None:
    slow = torch.diag(torch.linspace(1, 0.9, 200, dtype=torch.float64))
    A = replace(matrix_operator(torch.block_diag(2 * torch.eye(200, dtype=torch.float64), slow)), groups=2)
    start = random_block(A, 1, 0)
    once, each = (rs.Lanczos(rtol=1e-4, each_group=each_group).solve(A, 1, start) for each_group in (False, True))
    assert once.steps < each.steps
    assert float(each.residuals.max()) <= 1e-4 * 2
