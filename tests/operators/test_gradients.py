"""Modules whose gradients are not the derivatives of their forward pass, from which no norm may be computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from networks import Scaled
from reference import map_norm
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.operators.through_forward import module_operator


class Once(torch.autograd.Function):
    """Twice the input, with a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Applied(nn.Module):
    """A dense layer, applied by a function."""

    def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(6, 5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc, x)


def without_gradient(fc: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        return fc(x)


def with_hook(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Linear, Tensor], Tensor]:
    """The layer with a hook on its output that changes the gradient."""

    def apply(fc: nn.Linear, x: Tensor) -> Tensor:
        y = fc(x)
        if y.requires_grad:
            y.register_hook(change)
        return y

    return apply


FALSE = {
    "gradient reversal": lambda fc, x: Scaled.apply(fc(x), 1, -0.1),
    "no_grad": without_gradient,
    "data": lambda fc, x: F.linear(x.data, fc.weight),
    "part detached": lambda fc, x: fc(x) + 1e-3 * fc(x).detach(),
    "one output detached": lambda fc, x: torch.cat([fc(x)[:, :4], fc(x)[:, 4:].detach()], 1),
    "hook": with_hook(lambda gradient: 0.5 * gradient),
    "hook that clips": with_hook(lambda gradient: gradient.clamp(-100, 100)),
    "detached hook": with_hook(lambda gradient: 2 * gradient.detach()),
    "once differentiable": lambda fc, x: Once.apply(fc(x)),
    "depends on the grad mode": lambda fc, x: fc(x) * (10 if torch.is_grad_enabled() else 1),
    "depends on the batch size": lambda fc, x: fc(x) * (10 if len(x) == 1 else 1),
    "subtracts the mean of the batch": lambda fc, x: fc(x - x.mean(0)),
    "zero slope at zero": lambda fc, x: fc(x.abs() * x.sign()),
}  # fmt: skip
SIZES = {"as made": (1.0, 1.0), "tiny, large offset": (1e-30, 1e6), "huge": (1e30, 1.0)}


def sized(module: Applied, weight: float, bias: float) -> Applied:
    with torch.no_grad():
        module.fc.weight.mul_(weight)
        module.fc.bias.fill_(bias)
    return module


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("function", FALSE.values(), ids=list(FALSE))
def test_a_module_whose_gradient_is_no_derivative_is_refused(function, size: tuple[float, float]) -> None:
    with pytest.raises(NotImplementedError, match=r"gradients of Applied.* are not the derivatives of its forward pass"):
        rs.linear_operator(sized(Applied(function), *size), (6,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_a_module_whose_gradient_is_the_derivative_is_measured(size: tuple[float, float], dtype: torch.dtype) -> None:
    module = sized(Applied(lambda fc, x: fc(x)), *size)
    wanted = float(torch.linalg.matrix_norm(module.fc.weight.detach().double(), 2))
    assert wanted in rs.spectral_norm(rs.linear_operator(module, (6,), dtype))


def test_the_difference_is_named_in_numbers() -> None:
    with pytest.raises(NotImplementedError, match=r"they give an output of length 0, not [0-9.]+\. Take out what changes"):
        rs.linear_operator(Applied(without_gradient), (6,))


def test_a_backward_hook_that_changes_gradients_is_refused_and_one_that_reads_them_is_not() -> None:
    module = Applied(lambda fc, x: fc(x)).double()
    module.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert map_norm(module, (6,)) in rs.spectral_norm(rs.linear_operator(module, (6,)))
    module.register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],))
    with pytest.raises(NotImplementedError, match="are not the derivatives"):
        rs.linear_operator(module, (6,))


def test_a_reversed_gradient_in_a_model_withholds_its_norms() -> None:
    layer = nn.Linear(6, 5)
    layer.register_forward_hook(lambda module, inputs, output: Scaled.apply(output, 1, -0.1))
    with pytest.raises(NotImplementedError, match=r"Linear \(with forward hooks\)"):
        rs.spectral_norms(nn.Sequential(layer), torch.zeros(1, 6))


@pytest.mark.parametrize("module, returned", [
    (Applied(lambda fc, x: (fc(x), x)), "a tuple"),
    (Applied(lambda fc, x: fc(x).sum(0)), r"a tensor of shape \(5,\)"),
], ids=["tuple", "sum over the batch"])  # fmt: skip
def test_a_module_without_one_output_for_each_input_is_refused(module: nn.Module, returned: str) -> None:
    with pytest.raises(NotImplementedError, match=f"Applied returns {returned} for"):
        rs.linear_operator(module, (6,))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_layer_of_the_table_is_refused_on_the_general_path(case: Case) -> None:
    module = case.build()
    for dtype in (torch.float32, torch.float64):
        operator, known = module_operator(module, case.in_shape, dtype), rs.linear_operator(module, case.in_shape, dtype)
        assert operator.out_shape == known.out_shape and known.groups % operator.groups == 0
    X = torch.randn(2, *case.in_shape, dtype=torch.float64)
    torch.testing.assert_close(operator.matmat(X), known.matmat(X), rtol=1e-9, atol=0)


def test_the_checks_leave_the_random_state_and_the_gradients() -> None:
    module = Applied(lambda fc, x: fc(x))
    before = torch.get_rng_state()
    rs.linear_operator(module, (6,))
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in module.parameters())
