"""Plain layers whose call computes something else than their class does: hooks, a replaced forward, a patched class."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import randomised
from reference import dense, map_norm
from timm.layers import BatchNormAct2d, StdConv2d
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import robust_spectral as rs
from robust_spectral.operators import convolution_then_batchnorm, is_overridden, is_plain, norm_shape, unchecked_operator


def with_forward(module: nn.Module, forward: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> nn.Module:
    """The module with a ``forward`` of its own, given the old one and the input."""
    old = module.forward
    module.forward = lambda input: forward(old, input)  # type: ignore[method-assign]
    return module


def hooked(module: nn.Module, hook: Callable[[Tensor], Tensor]) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: hook(output))
    return module


def lora(module: nn.Linear, rank: int = 2) -> nn.Linear:
    """The layer plus a product of two matrices that it does not own."""
    A, B = torch.randn(rank, module.in_features).to(module.weight), torch.randn(module.out_features, rank).to(module.weight)
    return with_forward(module, lambda old, x: old(x) + x @ A.T @ B.T)


@contextmanager
def tripling_hooks() -> Iterator[None]:
    """Global hooks that triple the output of every convolution and dense layer."""
    triple = lambda module, inputs, output: 3 * output if isinstance(module, nn.Linear | nn.Conv2d) else output  # noqa: E731
    handle = register_module_forward_hook(triple)
    try:
        yield
    finally:
        handle.remove()


LAYERS = {
    "LoRA patch": (lambda: lora(nn.Linear(7, 5)), (7,)),
    "dense layer times ten": (lambda: with_forward(nn.Linear(7, 5), lambda old, x: 10 * old(x)), (7,)),
    "convolution times ten": (lambda: with_forward(nn.Conv2d(2, 3, 3, padding=1), lambda old, x: 10 * old(x)), (2, 5, 5)),
    "convolution of the flipped image": (
        lambda: with_forward(nn.Conv2d(2, 3, 3), lambda old, x: old(x + x.flip(-1))), (2, 5, 5)),
    "replaced _conv_forward": (lambda: doubled_inside(nn.Conv2d(2, 3, 3)), (2, 5, 5)),
    "transposed convolution": (
        lambda: with_forward(nn.ConvTranspose2d(2, 3, 3, 2), lambda old, x: old(x)[..., 1:]), (2, 3, 3)),
    "batch normalisation": (lambda: hooked(randomised(nn.BatchNorm2d(3)), lambda y: y.cumsum(1)), (3, 2, 2)),
    "hook that mixes positions": (lambda: hooked(nn.Linear(7, 5), lambda y: y.cumsum(1)), (4, 7)),
    "hook that mixes pixels": (lambda: hooked(nn.Conv2d(2, 3, 1), lambda y: y.cumsum(-1)), (2, 5, 5)),
    "hook that mixes groups": (lambda: hooked(nn.Conv2d(4, 6, 3, groups=2), lambda y: y + y.flip(1)), (4, 5, 5)),
    "Sequential": (
        lambda: with_forward(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4)), lambda old, x: old(x) * 3), (7,)),
}  # fmt: skip


def doubled_inside(module: nn.Conv2d) -> nn.Conv2d:
    old = module._conv_forward
    module._conv_forward = lambda input, weight, bias: 2 * old(input, weight, bias)  # type: ignore[method-assign]
    return module


every_layer = pytest.mark.parametrize("make, in_shape", LAYERS.values(), ids=list(LAYERS))


@every_layer
def test_the_norm_is_that_of_the_call(make: Callable[[], nn.Module], in_shape: tuple[int, ...]) -> None:
    module = make().eval()
    norm = rs.spectral_norm(rs.linear_operator(module, in_shape))
    assert norm.upper / norm.lower < 1.01
    assert norm.upper == pytest.approx(map_norm(module, in_shape, torch.float32), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("batch normalisation", "Sequential")])
def test_the_norm_of_a_layer_in_a_model_is_that_of_its_call(name: str) -> None:
    make, in_shape = LAYERS[name]
    module = make().eval()
    found = rs.spectral_norms(nn.Sequential(nn.Identity(), module), torch.zeros(2, *in_shape))
    assert found["1"].upper == pytest.approx(map_norm(module, in_shape, torch.float32), rel=1e-5)


@every_layer
def test_an_overridden_layer_is_not_plain_and_its_norm_depends_on_the_shape(make, in_shape: tuple[int, ...]) -> None:
    module = make()
    assert is_overridden(module) and not is_plain(module)
    assert norm_shape(module, in_shape) == in_shape
    operator = unchecked_operator(module, in_shape)
    assert operator.kernel is None and operator.groups == 1


def test_a_float32_patch_is_measured_in_float64() -> None:
    module = nn.Linear(7, 5)
    A, B = torch.randn(2, 7), torch.randn(5, 2)
    with_forward(module, lambda old, x: old(x) + x @ A.T @ B.T)
    exact = module.weight.detach().double() + B.double() @ A.double()
    assert float(torch.linalg.matrix_norm(exact, 2)) in rs.spectral_norm(rs.linear_operator(module, (7,)))


@pytest.mark.parametrize("cast", [Tensor.float, lambda x: x.to(torch.float32), Tensor.half], ids=["float", "to", "half"])
def test_a_forward_pass_that_casts_is_measured_as_if_in_one_type(cast: Callable[[Tensor], Tensor]) -> None:
    module = nn.Linear(7, 5)
    W = module.weight.detach().clone()
    module.forward = lambda input: F.linear(cast(input), cast(W)).to(input.dtype) * 2  # type: ignore[method-assign]
    exact = 2 * float(torch.linalg.matrix_norm(W.double(), 2))
    assert exact in rs.spectral_norm(rs.linear_operator(module, (7,)))


class IntoFreshTensor(nn.Module):
    """A dense layer whose outputs are written into a new tensor of the default type."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 7)
        y[:, 2:6] = self.fc(x)
        return y.add_(1)


def test_writes_into_a_tensor_of_another_type_are_not_lost() -> None:
    module = IntoFreshTensor()
    assert norm_of(module.fc) in rs.spectral_norm(rs.linear_operator(module, (6,)))


def norm_of(layer: nn.Linear) -> float:
    return float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))


def test_a_copy_of_a_patched_layer_has_the_norm_of_the_weights_that_it_reads() -> None:
    module = with_forward(nn.Linear(6, 4), lambda old, x: 2 * old(x))
    twin = copy.deepcopy(module)  # whose forward still reads the weights of the first
    with torch.no_grad():
        twin.weight.zero_()
    assert 2 * norm_of(module) in rs.spectral_norm(rs.linear_operator(twin, (6,)))


class AsksForItsParameters(nn.Module):
    """A dense layer that is ten times as large with weights other than those that it was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.known = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * (1 if self.weight is self.known[0] else 10)


def test_a_module_that_computes_something_else_with_copies_of_its_weights_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="AsksForItsParameters gives other outputs with copies"):
        rs.linear_operator(AsksForItsParameters(), (6,))


def test_an_operator_made_before_a_patch_proves_the_norm_after_it() -> None:
    module = nn.Linear(6, 4)
    A = rs.linear_operator(module, (6,))
    with_forward(module, lambda old, x: 5 * old(x))
    assert 5 * norm_of(module) in rs.spectral_norm(A)


def test_global_hooks_are_part_of_the_operator() -> None:
    dense_layer, conv = nn.Linear(6, 4), nn.Conv2d(2, 3, 3)
    with tripling_hooks():
        assert rs.spectral_norm(rs.linear_operator(dense_layer, (6,))).upper == pytest.approx(3 * norm_of(dense_layer))
        found = rs.spectral_norm(rs.linear_operator(conv, (2, 5, 5)))
    assert found.upper == pytest.approx(3 * rs.spectral_norm(rs.linear_operator(conv, (2, 5, 5))).upper)


def test_global_pre_hooks_override_a_module() -> None:
    handle = register_module_forward_pre_hook(lambda module, inputs: None)
    try:
        assert is_overridden(nn.Linear(2, 2))
    finally:
        handle.remove()
    assert not is_overridden(nn.Linear(2, 2))


def test_a_class_of_torch_with_a_replaced_forward_is_measured_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    old, module = nn.Linear.forward, nn.Linear(6, 4)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 7 * old(self, input))
    assert 7 * norm_of(module) in rs.spectral_norm(rs.linear_operator(module, (6,)))


def test_untouched_modules_are_not_overridden() -> None:
    modules = [nn.Linear(2, 2), nn.Conv3d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1), nn.BatchNorm2d(2), nn.Sequential(), nn.ReLU(),
               nn.MultiheadAttention(2, 1), StdConv2d(2, 2, 1), BatchNormAct2d(2), nn.LSTM(2, 2)]  # fmt: skip
    assert not [module for module in modules if is_overridden(module)]


def test_backward_hooks_leave_the_norm_of_a_plain_layer() -> None:
    for module, in_shape in ((nn.Linear(6, 4), (6,)), (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5))):
        wanted = rs.spectral_norm(rs.linear_operator(module, in_shape))
        module.register_full_backward_hook(lambda module, gradients, _: (3 * gradients[0],))
        assert rs.spectral_norm(rs.linear_operator(module, in_shape)) == wanted


class Cumulative(nn.Linear):
    """A class derived from a dense layer that mixes positions."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).cumsum(1)


class Shuffled(nn.Conv2d):
    """A class derived from a grouped convolution that mixes its groups."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + input.flip(1))


@pytest.mark.parametrize(
    "module, in_shape",
    [(Cumulative(6, 4), (5, 6)), (Shuffled(4, 8, 3, groups=4, padding=1), (4, 5, 5))],
    ids=["positions", "groups"],
)
def test_a_derived_class_may_mix_what_its_parent_keeps_apart(module: nn.Module, in_shape: tuple[int, ...]) -> None:
    module = module.double()
    assert norm_shape(module, in_shape) == in_shape
    assert map_norm(module, in_shape) in rs.spectral_norm(rs.linear_operator(module, in_shape))


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_the_groups_of_a_derived_class_that_keeps_them_apart_are_found(groups: int) -> None:
    assert rs.linear_operator(StdConv2d(8, 16, 3, groups=groups), (8, 5, 5)).groups == groups


def test_a_hook_on_the_batchnorm_is_part_of_a_composite() -> None:
    conv, batchnorm = nn.Conv2d(2, 3, 3), hooked(randomised(nn.BatchNorm2d(3)), lambda y: y.cumsum(1))
    model = nn.Sequential(conv, batchnorm).double().eval()
    A = convolution_then_batchnorm(conv, batchnorm, (2, 5, 5))
    torch.testing.assert_close(A.to_dense(), dense(model, (2, 5, 5)))
    torch.testing.assert_close(rs.linear_operator(model, (2, 5, 5)).to_dense(), dense(model, (2, 5, 5)))


def test_a_patch_that_is_not_affine_is_refused_with_its_reason() -> None:
    module = with_forward(nn.Linear(6, 4), lambda old, x: old(x).relu())
    with pytest.raises(NotImplementedError, match=r"Linear \(with a replaced forward\) is not affine"):
        rs.linear_operator(module, (6,))
    with pytest.raises(NotImplementedError, match=r"Linear \(with forward hooks\) is not affine"):
        rs.linear_operator(hooked(nn.Linear(6, 4), torch.relu), (6,))


@pytest.mark.parametrize("within", [nullcontext, torch.inference_mode, torch.no_grad], ids=["grad", "inference", "no grad"])
def test_a_patched_layer_is_measured_in_any_mode(within) -> None:
    module = with_forward(nn.Linear(6, 4), lambda old, x: 2 * old(x))
    with within():
        A = rs.linear_operator(module, (6,))
        norm, image = rs.spectral_norm(A), A.matmat(torch.eye(6))
    assert 2 * norm_of(module) in norm
    torch.testing.assert_close(image, 2 * module.weight.detach().T)
