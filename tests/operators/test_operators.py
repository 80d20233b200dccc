"""`linear_operator` and its adjoint against dense float64 matrices."""

import pytest
import torch
from cases import CASES, Case, randomised
from reference import dense, same_bits, snapshot, tolerance
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from torch import nn

import robust_spectral as rs
from robust_spectral.norms.convolution_bounds import frobenius_bound, schur_bound, symbol_bound
from robust_spectral.operators.base import LinearOperator, compose

every_case = pytest.mark.parametrize("case", CASES, ids=str)
same_padding_copies = pytest.mark.filterwarnings("ignore:Using padding='same'")


def batches(A: LinearOperator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, *A.in_shape, dtype=A.dtype), torch.randn(3, *A.out_shape, dtype=A.dtype)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    size = wanted.abs().max()
    return float((got.double() - wanted).abs().max() / size) if size > 0 else float(got.abs().max())


@same_padding_copies
@every_case
def test_matmat_multiplies_by_the_dense_matrix(case: Case) -> None:
    A, D = rs.linear_operator(case.build(), case.in_shape), dense(case.build(), case.in_shape)
    X, _ = batches(A)
    assert relative_error(A.matmat(X).flatten(1), X.flatten(1).double() @ D.T) <= tolerance(A.dtype)


@same_padding_copies
@every_case
def test_rmatmat_multiplies_by_the_transposed_dense_matrix(case: Case) -> None:
    A, D = rs.linear_operator(case.build(), case.in_shape), dense(case.build(), case.in_shape)
    _, Y = batches(A)
    assert relative_error(A.rmatmat(Y).flatten(1), Y.flatten(1).double() @ D) <= tolerance(A.dtype)


@same_padding_copies
@every_case
def test_the_adjoint_identity_is_satisfied(case: Case) -> None:
    A = rs.linear_operator(case.build(), case.in_shape)
    X, Y = batches(A)
    AX, AtY = A.matmat(X).double(), A.rmatmat(Y).double()
    gap = ((AX * Y).sum() - (X * AtY).sum()).abs()
    assert float(gap) <= tolerance(A.dtype) * float(AX.norm() * Y.double().norm())


@same_padding_copies
@every_case
def test_shapes_are_those_of_the_module(case: Case) -> None:
    module = case.build()
    A = rs.linear_operator(module, case.in_shape)
    X, Y = batches(A)
    assert A.in_shape == case.in_shape
    assert A.matmat(X).shape[1:] == A.out_shape == module(X[:2])[0].shape
    assert A.rmatmat(Y).shape[1:] == A.in_shape
    assert A.device == torch.device("cpu")


@same_padding_copies
@every_case
def test_groups_are_blocks_of_the_dense_matrix(case: Case) -> None:
    A, D = rs.linear_operator(case.build(), case.in_shape), dense(case.build(), case.in_shape)
    rows, columns = D.shape[0] // A.groups, D.shape[1] // A.groups
    blocks = [D[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(A.groups)]
    assert torch.equal(torch.block_diag(*blocks), D)


@same_padding_copies
@every_case
def test_the_module_is_left_unchanged(case: Case) -> None:
    module = case.build().train()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    for parameter in list(module.parameters())[::2]:
        parameter.requires_grad_(False)
    modes = [part.training for part in module.modules()]
    wanted = [p.requires_grad for p in module.parameters()]
    before, random = snapshot(module), torch.get_rng_state()

    A = rs.linear_operator(module, case.in_shape)
    for operator in (A, A.to(torch.float64)):
        X, Y = torch.ones(2, *A.in_shape, dtype=operator.dtype), torch.ones(2, *A.out_shape, dtype=operator.dtype)
        operator.matmat(X), operator.rmatmat(Y)

    assert same_bits(before, snapshot(module))
    assert [part.training for part in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == wanted
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_training_modes_that_differ_between_submodules_are_kept() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout())
    module[1].eval()
    modes = [part.training for part in module.modules()]
    A = rs.linear_operator(module, (2, 4, 4))
    A.matmat(torch.ones(1, 2, 4, 4))
    assert [part.training for part in module.modules()] == modes


def test_no_result_carries_an_autograd_graph() -> None:
    A = rs.linear_operator(nn.ConvTranspose1d(2, 3, 3), (2, 5))
    assert not A.matmat(torch.randn(1, 2, 5, requires_grad=True)).requires_grad
    assert not A.rmatmat(torch.randn(1, 3, 7)).requires_grad


@pytest.mark.parametrize("make", [nn.Conv1d, nn.ConvTranspose1d], ids=["direct", "through forward"])
def test_the_operator_follows_changes_of_its_weights(make: type[nn.Module]) -> None:
    module = make(3, 4, 1)
    A = rs.linear_operator(module, (3, 2))
    X, _ = batches(A)
    before = A.matmat(X)
    with torch.no_grad():
        module.weight.mul_(2)
    torch.testing.assert_close(A.matmat(X), 2 * before)
    torch.testing.assert_close(A.to(torch.float64).matmat(X.double()).float(), 2 * before)


def test_to_dense_is_the_dense_matrix() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1).double()
    torch.testing.assert_close(rs.linear_operator(module, (2, 4, 5)).to_dense(), dense(module, (2, 4, 5)))


def test_adjoint_of_the_adjoint_is_the_operator() -> None:
    A = rs.linear_operator(nn.Conv1d(2, 3, 3), (2, 6))
    torch.testing.assert_close(A.H.to_dense(), A.to_dense().T)
    assert torch.equal(A.H.H.to_dense(), A.to_dense())
    assert (A.H.in_shape, A.H.out_shape) == (A.out_shape, A.in_shape)
    torch.testing.assert_close(A.H.to(torch.float64).to_dense(), A.to(torch.float64).to_dense().T)


def test_composition_is_the_product_of_the_matrices() -> None:
    first, second = nn.Conv1d(2, 4, 3).double(), nn.Conv1d(4, 2, 2, stride=2).double()
    A, B = rs.linear_operator(first, (2, 8)), rs.linear_operator(second, (4, 6))
    torch.testing.assert_close(compose(A, B).to_dense(), dense(second, (4, 6)) @ dense(first, (2, 8)))


def test_operators_whose_shapes_do_not_fit_are_not_composed() -> None:
    A = rs.linear_operator(nn.Linear(3, 4), (3,))
    with pytest.raises(ValueError, match="does not feed"):
        compose(A, A)


def test_an_operator_given_by_functions_cannot_change_its_dtype() -> None:
    A = LinearOperator((2,), (2,), torch.float32, torch.device("cpu"), lambda X: X, lambda Y: Y)
    assert A.to(torch.float32) is A
    with pytest.raises(TypeError, match="build"):
        A.to(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.ConvTranspose1d(6, 5, 3)], ids=["dense", "conv"])
def test_half_precision_weights_are_computed_in_float32(make, dtype: torch.dtype) -> None:
    module = make().to(dtype)
    in_shape = (6,) if isinstance(module, nn.Linear) else (6, 4)
    A = rs.linear_operator(module, in_shape)
    X, _ = batches(A)
    assert A.dtype == A.matmat(X).dtype == torch.float32
    assert relative_error(A.matmat(X).flatten(1), X.flatten(1).double() @ dense(module, in_shape).T) <= tolerance(A.dtype)
    assert module.weight.dtype == dtype


def test_autocast_does_not_lower_the_precision() -> None:
    A = rs.linear_operator(nn.ConvTranspose1d(2, 3, 3), (2, 5))
    X, _ = batches(A)
    wanted = A.matmat(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(A.matmat(X), wanted)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6), lambda: nn.Conv2d(2, 4, 3, padding=1)], ids=["dense", "conv"])
def test_autocast_does_not_lower_the_precision_of_the_direct_path(make) -> None:
    module = make()
    A = rs.linear_operator(module, (8,) if isinstance(module, nn.Linear) else (2, 5, 5))
    X, Y = batches(A)
    wanted = A.matmat(X), A.rmatmat(Y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(A.matmat(X), wanted[0])
        assert torch.equal(A.rmatmat(Y), wanted[1])


@pytest.mark.parametrize(
    "module, in_shape",
    [(StdConv2d(3, 4, 3, padding=1), (3, 5, 5)), (Conv2dSame(3, 4, 3, stride=2), (3, 5, 6))],
    ids=["weight standardisation", "asymmetric same padding"],
)
def test_weights_and_padding_computed_in_forward_are_part_of_the_operator(module: nn.Module, in_shape: tuple[int, ...]) -> None:
    A = rs.linear_operator(module.double(), in_shape)
    torch.testing.assert_close(A.to_dense(), dense(module, in_shape))


def test_the_operator_uses_the_weight_normalised_by_a_hook() -> None:
    module = torch.nn.utils.spectral_norm(nn.Linear(5, 4)).double().eval()
    torch.testing.assert_close(rs.linear_operator(module, (5,)).to_dense(), dense(module, (5,)))


def test_a_forward_hook_that_changes_the_output_is_part_of_the_operator() -> None:
    module = nn.Conv1d(2, 3, 3).double()
    module.register_forward_hook(lambda module, inputs, output: 3 * output)
    torch.testing.assert_close(rs.linear_operator(module, (2, 5)).to_dense(), dense(module, (2, 5)))


def test_a_batchnorm_act_whose_activation_is_the_identity_is_affine() -> None:
    module = randomised(BatchNormAct2d(3, apply_act=False), [1.0, -2.0, 0.5]).double().eval()
    torch.testing.assert_close(rs.linear_operator(module, (3, 2, 2)).to_dense(), dense(module, (3, 2, 2)))


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square()


@pytest.mark.parametrize(
    "module, in_shape, culprit",
    [
        (nn.GELU(), (4,), "GELU"),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (4,), "ReLU"),
        (nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Identity(), nn.SiLU())), (4,), "SiLU"),
        (BatchNormAct2d(3), (3, 2, 2), "BatchNormAct2d"),
        (nn.LayerNorm(4), (4,), "LayerNorm"),
        (nn.MaxPool2d(2), (1, 4, 4), "MaxPool2d"),
        (Squared(), (4,), "Squared"),
        (nn.BatchNorm2d(3, track_running_stats=False), (3, 2, 2), "BatchNorm2d"),
        (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), (2, 2, 2), "BatchNorm2d"),
        (nn.Linear(4, 3, dtype=torch.complex64), (4,), "complex"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_modules_that_are_not_affine_are_refused_by_name(module: nn.Module, in_shape: tuple[int, ...], culprit: str) -> None:
    with pytest.raises(NotImplementedError, match=culprit):
        rs.linear_operator(module, in_shape)


@pytest.mark.parametrize("in_shape", [(), (0,), (3, 0), (-1,)], ids=str)
def test_an_empty_shape_is_refused(in_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="in_shape"):
        rs.linear_operator(nn.Linear(3, 4), in_shape)


@pytest.mark.parametrize(
    "module, in_shape",
    [
        (nn.Linear(3, 4), (4,)),
        (nn.Conv2d(3, 4, 3), (4, 5, 5)),
        (nn.Conv2d(3, 4, 3), (3, 5)),
        (nn.Conv2d(3, 4, 3), (3, 2, 2)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (4, 5, 5)),
        (nn.ConvTranspose2d(3, 4, 3), (4, 5, 5)),
        (nn.BatchNorm2d(3), (4, 5, 5)),
        (nn.BatchNorm2d(3), (1, 5, 5)),
        (nn.BatchNorm2d(3), (3,)),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 4)), (3,)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)), (3, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_shape_that_does_not_fit_is_refused(module: nn.Module, in_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        rs.linear_operator(module, in_shape)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: nn.ConvTranspose1d(2, 2, 1)], ids=["dense", "conv"])
def test_weights_that_are_not_finite_are_refused(make, value: float) -> None:
    module = make()
    with torch.no_grad():
        module.weight.view(-1)[1] = value
    with pytest.raises(ValueError, match=r"'weight'.*NaN or infinite"):
        rs.linear_operator(module, (2,) if isinstance(module, nn.Linear) else (2, 3))


def test_a_module_on_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        rs.linear_operator(nn.Linear(3, 4, device="meta"), (3,))


def test_a_lazy_module_is_refused_until_it_has_run() -> None:
    module = nn.LazyLinear(4)
    with pytest.raises(ValueError, match="lazy"):
        rs.linear_operator(module, (3,))
    module(torch.zeros(1, 3))
    assert rs.linear_operator(module, (3,)).out_shape == (4,)


def test_a_batch_of_another_shape_or_type_is_refused() -> None:
    A = rs.linear_operator(nn.Linear(3, 4), (3,))
    with pytest.raises(ValueError, match="matmat"):
        A.matmat(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="matmat"):
        A.matmat(torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="rmatmat"):
        A.rmatmat(torch.zeros(1, 3))


def test_an_empty_batch_gives_an_empty_batch() -> None:
    A = rs.linear_operator(nn.ConvTranspose1d(2, 3, 3), (2, 5))
    assert A.matmat(torch.zeros(0, 2, 5)).shape == (0, 3, 7)
    assert A.rmatmat(torch.zeros(0, 3, 7)).shape == (0, 2, 5)


@pytest.mark.parametrize(
    ("module", "in_shape", "axis"),
    [(nn.Linear(6, 9), (6,), -1), (nn.Linear(6, 9), (4, 6), -1), (nn.Conv2d(2, 6, 3), (2, 5, 5), 0)],
)  # fmt: skip
def test_a_fused_projection_splits_into_three_operators(module: nn.Module, in_shape: tuple[int, ...], axis: int) -> None:
    A = rs.linear_operator(module.double(), in_shape)
    whole = dense(module, in_shape).reshape(*A.out_shape, -1)
    parts = A.split(3, axis)
    for part, block in zip(parts, whole.chunk(3, axis if axis >= 0 else whole.ndim - 1 + axis), strict=True):
        assert part.out_shape == tuple(block.shape[:-1])
        torch.testing.assert_close(part.to_dense(), block.reshape(-1, whole.shape[-1]))
        torch.testing.assert_close(part.H.to_dense(), block.reshape(-1, whole.shape[-1]).T)
        norm = rs.spectral_norm(part)
        assert float(torch.linalg.matrix_norm(block.reshape(-1, whole.shape[-1]), 2)) in norm


@pytest.mark.parametrize("adjoint", [False, True])
def test_a_part_of_a_convolution_has_the_kernel_of_that_part(adjoint: bool) -> None:
    module = nn.Conv2d(4, 4, 3, padding=1).double()
    with torch.no_grad():
        module.weight[:, 2:] *= 100  # the inputs of the second part
    A = rs.linear_operator(module, (4, 5, 5))
    for part in (A.H if adjoint else A).split(2):
        true = float(torch.linalg.matrix_norm(part.to_dense(), 2))
        assert part.kernel is not None and part.kernel.weight.shape[0] == part.out_shape[0]
        assert min(schur_bound(part.kernel), symbol_bound(part.kernel), frobenius_bound(part)) >= true


def test_a_projection_is_not_split_unequally() -> None:
    with pytest.raises(ValueError, match="not 4 parts"):
        rs.linear_operator(nn.Linear(6, 9), (6,)).split(4, -1)


@pytest.mark.parametrize("arrange", [
    lambda w: w.to(memory_format=torch.channels_last),
    lambda w: w[:1].expand_as(w),
    lambda w: w[:, :, :1].expand_as(w),
], ids=["channels last", "one filter expanded", "one row expanded"])  # fmt: skip
def test_weights_of_any_memory_layout_are_read_and_left_unchanged(arrange) -> None:
    module = nn.Conv2d(4, 4, 3, padding=1)
    module.weight = nn.Parameter(arrange(module.weight.detach()))
    stride = module.weight.stride()
    A = rs.linear_operator(module, (4, 5, 5), torch.float64)
    torch.testing.assert_close(A.to_dense(), dense(plain_copy(module), (4, 5, 5)))
    assert module.weight.stride() == stride


def plain_copy(module: nn.Conv2d) -> nn.Conv2d:
    """A convolution with the same weight in contiguous memory."""
    copy = nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        copy.weight.copy_(module.weight.contiguous())
    return copy
