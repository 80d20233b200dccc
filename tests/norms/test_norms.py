"""Intervals that contain the spectral norm: no slack is allowed on the upper side, for any layer of the table."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from cases import CASES, COMPOSITES, CONVOLUTIONS, SCALES, Case, scaled
from reference import dense, norm
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.norms.convolution_bounds import frobenius_bound, schur_bound, symbol_bound
from robust_spectral.norms.enclosures import norm_intervals
from robust_spectral.norms.lanczos_bound import lanczos_interval, lanczos_intervals
from robust_spectral.numerics import largest_singular_value, round_down, round_up
from robust_spectral.operators.base import LinearOperator

every_case = pytest.mark.parametrize("case", CASES, ids=str)
same_padding_copies = pytest.mark.filterwarnings("ignore:Using padding='same'")


def matrix_operator(M: Tensor, groups: int = 1) -> LinearOperator:
    """A hand-made operator on float64 vectors."""
    build: Callable[[torch.dtype], LinearOperator] = lambda dtype: matrix_operator(M.to(dtype), groups)  # noqa: E731
    return LinearOperator(
        M.shape[1:], M.shape[:1], M.dtype, M.device, lambda X: X @ M.T, lambda Y: Y @ M, build, groups
    )  # fmt: skip


@same_padding_copies
@every_case
def test_the_interval_contains_the_norm(case: Case) -> None:
    true, found = norm(case.build(), case.in_shape), rs.spectral_norm(rs.linear_operator(case.build(), case.in_shape))
    assert found.lower <= true <= found.upper
    assert true in found
    assert found.upper <= true * (1 + 1e-10)


@pytest.mark.parametrize(
    "module, in_shape",
    [
        (nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), (6, 16, 17)),
        (nn.Conv2d(7, 8, 3, stride=2, padding=1, padding_mode="circular"), (7, 22, 22)),
        (nn.Sequential(nn.Conv2d(6, 6, 5, padding=2, padding_mode="circular"), nn.BatchNorm2d(6)), (6, 16, 15)),
        (nn.Conv1d(6, 6, 2, padding="same", padding_mode="circular"), (6, 240)),
    ],
    ids=["plain", "stride", "composite", "even window"],
)
@same_padding_copies
def test_the_norm_of_a_circular_convolution_is_computed_from_its_symbols(module: nn.Module, in_shape: tuple[int, ...]) -> None:
    A = rs.linear_operator(module.eval(), in_shape)
    found = rs.spectral_norm(A, 0)
    assert found.method == "fourier" and found.failure_probability == 0
    assert found.lower <= norm(module, in_shape) <= found.upper <= found.lower * (1 + 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 8, 3, padding=2, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding=1),
    ],
    ids=["another size", "dilation", "a stride that does not divide", "zeros"],
)
def test_the_norm_of_any_other_convolution_is_not_computed_from_symbols(module: nn.Module) -> None:
    found = rs.spectral_norm(rs.linear_operator(module, (8, 17, 17)))
    assert found.method != "fourier" and found.lower <= norm(module, (8, 17, 17)) <= found.upper


@same_padding_copies
@pytest.mark.parametrize("max_steps", [1, 4, 200])
@every_case
def test_the_lanczos_interval_contains_the_norm(case: Case, max_steps: int) -> None:
    A = rs.linear_operator(case.build(), case.in_shape, torch.float64)
    lower, upper = lanczos_interval(A, 1e-9, rtol=0, max_steps=max_steps)
    assert lower <= norm(case.build(), case.in_shape) <= upper


@same_padding_copies
@pytest.mark.parametrize("bound", ["schur", "symbol", "frobenius"])
@pytest.mark.parametrize("case", CONVOLUTIONS + SCALES + COMPOSITES, ids=str)
def test_kernel_bounds_are_never_below_the_norm(case: Case, bound: str) -> None:
    A = rs.linear_operator(case.build(), case.in_shape, torch.float64)
    true = norm(case.build(), case.in_shape)
    assert A.kernel is None or kernel_bound(bound, A) >= true


def kernel_bound(name: str, A: LinearOperator) -> float:
    assert A.kernel is not None
    return frobenius_bound(A) if name == "frobenius" else {"schur": schur_bound, "symbol": symbol_bound}[name](A.kernel)


NEAR = {
    "zeros": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 16, 16)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 16, 16)),
    "even, stride": (lambda: nn.Conv2d(3, 4, 4, stride=2, padding=1), (3, 16, 16)),
    "even, stride, circular": (lambda: nn.Conv2d(3, 4, 4, stride=2, padding=1, padding_mode="circular"), (3, 16, 16)),
    "dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=3, padding=3), (3, 16, 16)),
    "groups": (lambda: nn.Conv2d(4, 4, 5, padding=2, groups=2), (4, 16, 16)),
    "even, circular, 1d": (lambda: nn.Conv1d(3, 4, 6, padding=2, padding_mode="circular"), (3, 40)),
    "1x7": (lambda: nn.Conv2d(3, 4, (1, 7), padding=(0, 3)), (3, 4, 30)),
}


@pytest.mark.parametrize("build, in_shape", NEAR.values(), ids=NEAR)
def test_kernel_bounds_hold_and_the_symbol_bound_is_close(build: Callable[[], nn.Module], in_shape: tuple[int, ...]) -> None:
    module = build()
    A = rs.linear_operator(module, in_shape, torch.float64)
    true = norm(module, in_shape)
    assert all(kernel_bound(name, A) >= true for name in ("schur", "symbol", "frobenius"))
    assert symbol_bound(A.kernel) <= 1.25 * true


STRIDED = {
    "stem": (lambda: nn.Conv2d(3, 8, 7, stride=2, padding=3), (3, 24, 24)),
    "unequal strides": (lambda: nn.Conv2d(2, 3, (3, 5), stride=(2, 3), padding=(1, 2)), (2, 17, 25)),
    "stride and dilation": (lambda: nn.Conv1d(3, 4, 3, stride=2, dilation=2, padding=2), (3, 41)),
    "stride, groups": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (4, 18, 18)),
    "stride above the window": (lambda: nn.Conv2d(3, 4, 2, stride=3), (3, 18, 18)),
    "patches": (lambda: nn.Conv2d(3, 5, 4, stride=4), (3, 16, 16)),
    "circular, stride divides": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular"), (2, 18, 18)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1), (6, 10, 10)),
    "transposed, groups, dilation": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2), (4, 10, 10)
    ),
    "transposed, 1d": (lambda: nn.ConvTranspose1d(3, 4, 5, stride=3, padding=2), (3, 30)),
}  # fmt: skip


@pytest.mark.parametrize("build, in_shape", STRIDED.values(), ids=STRIDED)
def test_the_symbol_bound_of_a_strided_layer_is_close(build: Callable[[], nn.Module], in_shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = build()
    A = rs.linear_operator(module, in_shape, torch.float64)
    true = norm(module, in_shape)
    for operator in (A, A.H):
        assert true <= symbol_bound(operator.kernel) <= 1.15 * true
        assert min(kernel_bound("schur", operator), kernel_bound("frobenius", operator)) >= true


@pytest.mark.parametrize("size", [5, 7, 9])
def test_kernel_bounds_hold_where_a_circular_stride_does_not_divide_the_input(size: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        module = nn.Conv1d(2, 2, 3, stride=2, padding=1, padding_mode="circular", bias=False)
        if seed == 0:
            nn.init.ones_(module.weight)
        A = rs.linear_operator(module, (2, size), torch.float64)
        assert min(kernel_bound(name, A) for name in ("schur", "symbol", "frobenius")) >= norm(module, (2, size))


@pytest.mark.slow
def test_a_wide_convolution_keeps_a_symbol_bound_on_a_coarser_grid() -> None:
    module = nn.Conv2d(256, 256, 3, padding=1, bias=False)
    A = rs.linear_operator(module, (256, 3, 3), torch.float64)
    assert norm(module, (256, 3, 3)) <= symbol_bound(A.kernel) < 0.2 * schur_bound(A.kernel)


@pytest.mark.parametrize("shape", [(5, 7), (3, 8, 2), (4, 6, 6), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_the_largest_singular_value_agrees_with_a_decomposition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrices = torch.randn(shape, dtype=dtype)
    value, operations = largest_singular_value(matrices)
    true = float(torch.linalg.svdvals(matrices).max())
    assert value == pytest.approx(true, rel=1e-13)
    assert round_down(value, operations) <= true <= round_up(value, operations) <= true * (1 + 1e-12)


@pytest.mark.slow
def test_layers_measured_together_get_intervals_as_narrow_as_alone() -> None:
    shapes = [(4, 16, 16), (4, 16, 16), (9, 16, 16), (4, 16, 16)]
    modules = [nn.Conv2d(c, 9, 3, padding=1, groups=1, bias=False) for c, *_ in shapes]
    scaled(modules[0], 1e-18)
    scaled(modules[1], 1e18)
    operators = [rs.linear_operator(module, shape) for module, shape in zip(modules, shapes, strict=True)]
    alone, shared = (norm_intervals(operators, rtol=1e-3, together=together) for together in (False, True))
    for module, shape, own, common in zip(modules, shapes, alone, shared, strict=True):
        true = norm(module, shape)
        assert own.method == common.method == "lanczos"
        assert own.lower <= true <= own.upper <= 1.001 * own.lower
        assert common.lower <= true <= common.upper <= 1.001 * common.lower


def test_grouped_layers_measured_together_keep_their_groups_apart() -> None:
    modules = [nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False) for _ in range(3)]
    scaled(modules[1], 100.0)
    operators = [rs.linear_operator(module, (6, 8, 8), torch.float64) for module in modules]
    ends = lanczos_intervals(operators, 1e-9, [math.inf] * 3, rtol=1e-3, max_steps=100, seed=0)
    for module, (lower, upper) in zip(modules, ends, strict=True):
        assert lower <= norm(module, (6, 8, 8)) <= upper <= 1.002 * lower


def test_a_lanczos_run_stops_early_where_a_known_bound_is_close_enough() -> None:
    A = matrix_operator(torch.diag(torch.linspace(1, 2, 500, dtype=torch.float64)))
    counted: list[int] = []
    counting = replace(A, forward=lambda X: (counted.append(len(X)), A.forward(X))[1])
    for known in (math.inf, 2.0):
        counted.append(0)
        lanczos_intervals([counting], 1e-9, [known], rtol=1e-2, max_steps=200, seed=0)
    steps = counted.index(0, 1)
    assert len(counted) - steps < 0.7 * steps


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding, stride", [((1, 1), 1), ((4, 1), 2), ((0, 5), 1)], ids=str)
def test_kernel_bounds_hold_where_the_padding_repeats_inputs(mode: str, padding: tuple[int, int], stride: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        module = nn.Conv2d(2, 3, 3, stride=stride, padding=padding, padding_mode=mode)
        if seed == 0:
            nn.init.ones_(module.weight)
        A, true = rs.linear_operator(module, (2, 6, 7), torch.float64), norm(module, (2, 6, 7))
        for operator in (A, A.H):
            assert all(kernel_bound(name, operator) >= true for name in ("schur", "symbol", "frobenius"))


def test_the_gain_of_a_padding_is_its_norm() -> None:
    module = nn.Conv2d(1, 1, 1, padding=(2, 3), padding_mode="replicate", bias=False)
    nn.init.ones_(module.weight)
    A = rs.linear_operator(module, (1, 5, 6), torch.float64)
    assert A.kernel.gain == pytest.approx(math.sqrt(3 * 4))
    assert symbol_bound(A.kernel) == pytest.approx(norm(module, (1, 5, 6)))


def test_the_symbol_bound_of_a_circular_convolution_is_exact_up_to_its_slack() -> None:
    module = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    A = rs.linear_operator(module, (2, 64, 64), torch.float64)
    symbols = torch.fft.fft2(module.weight.detach().double(), s=(64, 64)).permute(2, 3, 0, 1)
    true = float(torch.linalg.svdvals(symbols).max())
    slack = 1 / math.cos(math.pi / 64) ** 2
    assert true <= symbol_bound(A.kernel) <= true * slack * (1 + 1e-9)


@pytest.mark.parametrize("channels", [(1, 9), (9, 1), (9, 9)], ids=str)
def test_every_kernel_bound_is_attained_by_constant_pointwise_kernels(channels: tuple[int, int]) -> None:
    module = nn.Conv1d(*channels, 1, bias=False)
    nn.init.ones_(module.weight)
    A = rs.linear_operator(module, (channels[0], 1), torch.float64)
    true = math.sqrt(channels[0] * channels[1])
    assert all(true <= kernel_bound(name, A) <= true * (1 + 1e-12) for name in ("schur", "symbol", "frobenius"))


@pytest.mark.parametrize("bound", ["schur", "symbol", "frobenius"])
@pytest.mark.parametrize("factor", [1e-200, 1e-100, 1e100, 1e200], ids=str)
def test_kernel_bounds_hold_where_squares_under_or_overflow(bound: str, factor: float) -> None:
    module = scaled(nn.Conv2d(2, 3, 3, padding=1, bias=False).double(), factor)
    assert kernel_bound(bound, rs.linear_operator(module, (2, 5, 5))) >= norm(module, (2, 5, 5)) > 0


@pytest.mark.parametrize("factor", [1e-200, 1e-100, 1e100, 1e200], ids=str)
def test_intervals_hold_where_squares_under_or_overflow(factor: float) -> None:
    module = scaled(nn.Linear(6, 5, bias=False).double(), factor)
    A, true = rs.linear_operator(module, (6,)), norm(module, (6,))
    assert true in rs.spectral_norm(A)
    lower, upper = lanczos_interval(A, 1e-9)
    assert lower <= true <= upper


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_layer_too_large_for_a_dense_matrix_has_probable_and_certain_intervals(mode: str) -> None:
    module = nn.Conv2d(4, 9, 3, padding=1, padding_mode=mode, bias=False)
    in_shape = (4, 16, 16)
    A, true = rs.linear_operator(module, in_shape), norm(module, in_shape)
    probable, certain = rs.spectral_norm(A), rs.spectral_norm(A, failure_probability=0)
    assert probable.lower <= true <= probable.upper <= 1.02 * true
    assert certain.lower <= true <= certain.upper <= 1.1 * true
    assert probable.method != "dense" and certain.failure_probability == 0


def test_a_change_of_dtype_keeps_the_kernel() -> None:
    for mode in ("zeros", "circular"):
        A = rs.linear_operator(nn.Conv1d(2, 3, 3, padding=1, padding_mode=mode), (2, 8))
        assert A.kernel is not None and A.to(torch.float64).kernel is not None
        assert A.to(torch.float64).kernel.weight.dtype == torch.float64


def test_a_failure_probability_of_zero_gives_deterministic_bounds_only() -> None:
    assert rs.spectral_norm(rs.linear_operator(nn.Linear(5, 4), (5,)), 0.0).failure_probability == 0
    M = torch.randn(1300, 1300, dtype=torch.float64)
    found = rs.spectral_norm(matrix_operator(M), 0.0, max_steps=10)
    assert (found.upper, found.failure_probability) == (math.inf, 0.0)
    assert 0 < found.lower <= float(torch.linalg.matrix_norm(M, 2))


def test_the_lanczos_upper_end_is_infinite_at_failure_probability_zero() -> None:
    assert lanczos_interval(matrix_operator(torch.randn(20, 30, dtype=torch.float64)), 0.0)[1] == math.inf


def test_a_probabilistic_bound_reports_its_failure_probability() -> None:
    M = torch.randn(1300, 1300, dtype=torch.float64)
    found = rs.spectral_norm(matrix_operator(M), 1e-6, max_steps=20)
    assert (found.method, found.failure_probability) == ("lanczos", 1e-6)
    assert float(torch.linalg.matrix_norm(M, 2)) in found


@pytest.mark.parametrize("probability", [-1e-9, 1.0, 2.0, math.nan, math.inf], ids=str)
def test_a_failure_probability_outside_its_range_is_an_error(probability: float) -> None:
    with pytest.raises(ValueError, match="failure_probability"):
        rs.spectral_norm(rs.linear_operator(nn.Linear(2, 2), (2,)), probability)


SPECTRA = {
    "one large value": [1.0] + [0.02] * 11,
    "equispaced": [i / 12 for i in range(12, 0, -1)],
    "close pair": [1.0, 0.99] + [0.5] * 5 + [0.1] * 5,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "spectrum, steps, groups",
    [("one large value", 1, 1), ("one large value", 3, 1), ("equispaced", 3, 1), ("close pair", 3, 1), ("equispaced", 3, 3)],
)
def test_the_lanczos_bound_fails_no_more_often_than_its_failure_probability(spectrum: str, steps: int, groups: int) -> None:
    probability, runs = 0.2, 400
    M = torch.diag(torch.tensor(SPECTRA[spectrum], dtype=torch.float64))
    A = matrix_operator(M, groups)
    failures = sum(lanczos_interval(A, probability, rtol=0, max_steps=steps, seed=seed)[1] < 1.0 for seed in range(runs))
    assert failures / runs <= probability + 3 * math.sqrt(probability * (1 - probability) / runs)


@pytest.mark.slow
def test_the_lanczos_bound_fails_as_often_as_stated_where_one_singular_value_dominates() -> None:
    """With one step the bound fails almost exactly when the start misses the top singular vector."""
    runs, spread = 1500, 3 * math.sqrt(0.2 * 0.8 / 1500)
    A = matrix_operator(torch.diag(torch.tensor([1.0] + [1e-3] * 11, dtype=torch.float64)))
    failures = sum(lanczos_interval(A, 0.2, rtol=0, max_steps=1, seed=seed)[1] < 1.0 for seed in range(runs))
    assert 0.2 - spread <= failures / runs <= 0.2 + spread


def test_a_smaller_failure_probability_gives_a_larger_bound() -> None:
    A = matrix_operator(torch.randn(60, 50, dtype=torch.float64))
    bounds = [lanczos_interval(A, probability, rtol=0, max_steps=12)[1] for probability in (1e-3, 1e-9, 1e-15, 1e-30)]
    assert bounds == sorted(set(bounds)) and math.isfinite(bounds[-1])


def test_a_long_run_gives_a_narrow_interval() -> None:
    lower, upper = lanczos_interval(matrix_operator(torch.randn(120, 100, dtype=torch.float64)), 1e-9, rtol=0, max_steps=60)
    assert upper <= 1.01 * lower


def test_more_steps_never_widen_the_interval() -> None:
    A = matrix_operator(torch.randn(60, 50, dtype=torch.float64))
    ends = [lanczos_interval(A, 1e-9, rtol=0, max_steps=steps) for steps in (5, 10, 20, 40)]
    assert [low for low, _ in ends] == sorted(low for low, _ in ends)
    assert [high for _, high in ends] == sorted((high for _, high in ends), reverse=True)


def test_grouped_conv_norm_is_the_largest_group_norm() -> None:
    module = scaled(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), 0.1)
    groups = [nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(4)]
    for part, weight in zip(groups, module.weight.detach().split(2), strict=True):
        part.weight = nn.Parameter(weight)
    largest = max(norm(part, (2, 5, 5)) for part in groups)
    found = rs.spectral_norm(rs.linear_operator(module, (8, 5, 5)))
    assert found.lower <= largest <= found.upper <= largest * (1 + 1e-10)


@pytest.mark.parametrize("factor", [1e-30, -3.0, 0.1, 1e30], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 6), lambda: nn.ConvTranspose1d(3, 2, 3)], ids=["dense", "conv"])
def test_the_norm_is_homogeneous(make: Callable[[], nn.Module], factor: float) -> None:
    module = make().double()
    in_shape = (5,) if isinstance(module, nn.Linear) else (3, 4)
    once = rs.spectral_norm(rs.linear_operator(module, in_shape))
    times = rs.spectral_norm(rs.linear_operator(scaled(module, factor), in_shape))
    assert times.upper == pytest.approx(abs(factor) * once.upper, rel=1e-12, abs=0)
    assert times.lower == pytest.approx(abs(factor) * once.lower, rel=1e-12, abs=0)


def test_the_norm_does_not_change_when_channels_are_permuted() -> None:
    module, permuted = nn.Conv1d(4, 5, 3), nn.Conv1d(4, 5, 3)
    with torch.no_grad():
        permuted.weight.copy_(module.weight[torch.randperm(5)][:, torch.randperm(4)])
    first, second = (rs.spectral_norm(rs.linear_operator(m, (4, 7))) for m in (module, permuted))
    assert first.upper == pytest.approx(second.upper, rel=1e-12)


def test_operator_and_adjoint_have_the_same_norm() -> None:
    A = rs.linear_operator(nn.Conv2d(2, 3, 3, stride=2), (2, 7, 7))
    assert rs.spectral_norm(A.H).upper == pytest.approx(rs.spectral_norm(A).upper, rel=1e-12)


def test_the_shear_has_its_textbook_norm() -> None:
    module = nn.Linear(2, 2, bias=False)
    module.weight = nn.Parameter(torch.tensor([[3.0, 3.0], [0.0, 3.0]]))
    found = rs.spectral_norm(rs.linear_operator(module, (2,)))
    golden = 3 * (1 + math.sqrt(5)) / 2  # 4.8541, where the largest eigenvalue is 3
    assert found.lower <= golden <= found.upper
    assert found.upper == pytest.approx(4.8541, abs=1e-4)


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 6), lambda: nn.Conv2d(2, 3, 3, padding=1)], ids=["dense", "conv"])
def test_a_zero_layer_has_norm_exactly_zero(make: Callable[[], nn.Module]) -> None:
    module = scaled(make(), 0.0)
    A = rs.linear_operator(module, (5,) if isinstance(module, nn.Linear) else (2, 4, 4))
    found = rs.spectral_norm(A)
    assert (found.lower, found.upper) == (0.0, 0.0)
    assert lanczos_interval(A.to(torch.float64), 1e-9) == (0.0, 0.0)


@pytest.mark.parametrize("bound", ["schur", "symbol", "frobenius"])
def test_a_zero_kernel_has_bounds_zero(bound: str) -> None:
    assert kernel_bound(bound, rs.linear_operator(scaled(nn.Conv1d(2, 3, 3), 0.0), (2, 5))) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("size", [4, 1300], ids=["dense", "lanczos"])
def test_an_operator_that_is_not_finite_is_an_error(value: float, size: int) -> None:
    M = torch.eye(size, dtype=torch.float64)
    M[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        rs.spectral_norm(matrix_operator(M))


@pytest.mark.parametrize("function", [rs.spectral_norm, rs.top_singular])
def test_a_module_in_place_of_an_operator_is_an_error(function: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match=rf"{function.__name__}\(Conv2d\): takes an operator, as from linear_operator"):
        function(nn.Conv2d(1, 2, 3))


def test_weights_that_became_nan_are_an_error() -> None:
    module = nn.Linear(3, 3)
    A = rs.linear_operator(module, (3,))
    nn.init.constant_(module.weight, math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        rs.spectral_norm(A)


def test_rank_one_matrices_are_never_underestimated() -> None:
    for _ in range(50):
        u, v = torch.randn(24), torch.randn(24)
        module = nn.Linear(24, 24, bias=False)
        module.weight = nn.Parameter(torch.outer(u, v))
        true = float(torch.linalg.matrix_norm(dense(module, (24,)), 2))
        assert true in rs.spectral_norm(rs.linear_operator(module, (24,)))


def test_the_interval_of_a_float32_layer_contains_the_norm_of_its_exact_weights() -> None:
    for _ in range(50):
        module = nn.Linear(16, 16)
        assert norm(module, (16,)) in rs.spectral_norm(rs.linear_operator(module, (16,)))


def test_the_seed_decides_the_interval() -> None:
    A = matrix_operator(torch.randn(60, 50, dtype=torch.float64))
    first, again, other = (lanczos_interval(A, 1e-9, max_steps=10, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_global_random_state_is_not_touched() -> None:
    A = matrix_operator(torch.eye(5, dtype=torch.float64))
    before = torch.get_rng_state()
    lanczos_interval(A, 1e-9)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rank", [1, 2])
def test_a_low_rank_operator_gets_a_narrow_interval(rank: int) -> None:
    M = torch.randn(60, rank, dtype=torch.float64) @ torch.randn(rank, 50, dtype=torch.float64)
    true = float(torch.linalg.matrix_norm(M, 2))
    lower, upper = lanczos_interval(matrix_operator(M), 1e-9)
    assert lower <= true <= upper <= (1 + 1e-9) * lower


def test_kernel_bounds_hold_where_a_circular_window_wraps_onto_itself() -> None:
    module = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    nn.init.ones_(module.weight)
    A = rs.linear_operator(module, (1, 1), torch.float64)
    assert all(kernel_bound(name, A) >= 3 for name in ("schur", "symbol", "frobenius"))


def test_a_chain_whose_parts_cancel_is_enclosed_up_to_rounding() -> None:
    first, second = nn.Linear(1, 2, bias=False).double(), nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.8444218515250481], [0.7579544029403025]], dtype=torch.float64))
        second.weight.copy_(torch.tensor([[1.0767284843826048, -1.1995616845090467]], dtype=torch.float64))
    weights = zip(first.weight.flatten().tolist(), second.weight.flatten().tolist(), strict=True)
    exact = abs(sum(Fraction(a) * Fraction(b) for a, b in weights))
    found = rs.spectral_norm(rs.linear_operator(nn.Sequential(first, second), (1,)))
    assert Fraction(found.lower) <= exact <= Fraction(found.upper) < Fraction(1, 10**12)


def test_norms_clips_and_bounds_are_the_same_under_autocast(convnet: nn.Module, images: Tensor) -> None:
    A = rs.linear_operator(nn.Conv2d(6, 8, 3, padding=1), (6, 20, 20))
    found = []
    for enabled in (False, True):
        module = nn.Linear(60, 50)
        nn.init.constant_(module.weight, 0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            bound = rs.lipschitz_bound(convnet, images, box=None).value
            clipped = rs.clip_(module, (60,), 1.0).after
            found.append((rs.spectral_norm(A), rs.top_singular(A, 2).values.tolist(), clipped, bound))
    assert found[0] == found[1] and math.isfinite(found[0][3])
