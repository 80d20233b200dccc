"""Operations without a known Lipschitz constant make the bound infinite, and the reason names the operation."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import mirrored
from networks import Call, bound, sampled
from reference import norm
from torch import Tensor, nn

import robust_spectral as rs


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Subclassed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


def halves(m: nn.Module, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return first * second


UNBOUNDED = {
    "square": (Call(lambda m, x: x.square()), "square"),
    "power": (Call(lambda m, x: x**2), "pow"),
    "exponential": (Call(lambda m, x: torch.exp(x)), "exp"),
    "product": (Call(lambda m, x: x * F.relu(x)), "mul"),
    "square by product": (Call(lambda m, x: x * x), "mul"),
    "quotient": (Call(lambda m, x: x / (1 + F.relu(x))), "div"),
    "inverse": (Call(lambda m, x: 1 / x), "reciprocal"),
    "division by a constant zero": (Call(lambda m, x: x / m.c, c=torch.zeros(4)), "div"),
    "division rounded down": (Call(lambda m, x: torch.div(x, 3, rounding_mode="floor")), "div"),
    "attention": (Call(lambda m, x: F.scaled_dot_product_attention(x, x, x)), "attention"),
    "causal attention": (Call(lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), "attention"),
    "rounding to whole numbers": (Call(lambda m, x: x.type_as(m.c).float(), c=torch.ones(1, dtype=torch.int64)), "int64"),
    "half precision": (Call(lambda m, x: x.to(torch.bfloat16)), "bfloat16"),
    "index that depends on the input": (Call(lambda m, x: x[:, x.argmax(1)]), "argmax"),
    "power below 1": (Call(lambda m, x: x**0.5), "pow"),
    "root of what may be 0": (Call(lambda m, x: torch.sqrt(x)), "sqrt"),
    "division by what may be 0": (Call(lambda m, x: x / m.f(x), f=nn.Linear(4, 4)), "div (by what may be 0)"),
    "sum by names over the batch": (Call(lambda m, x: torch.einsum("bi,bj->ij", x, m.c), c=torch.ones(2, 3)), "einsum"),
    "an axis named twice": (
        Call(lambda m, x: torch.einsum("bii,ij->bj", x[:, :, None] * x[:, None], m.c), c=torch.eye(4)),
        "mul",
    ),
    "normalised without eps": (nn.LayerNorm(4, eps=0.0), "LayerNorm"),
    "jump": (nn.Hardshrink(), "Hardshrink"),
    "threshold": (nn.Threshold(0.0, 1.0), "Threshold"),
    "softplus cut off early": (nn.Softplus(1.0, 1.0), "Softplus"),
    "argmax": (Call(lambda m, x: x.argmax(1)), "argmax"),
    "dropout that trains": (Call(lambda m, x: F.dropout(x)), "dropout"),
    "product of the parts of a chunk": (Call(halves), ""),
    "a number read off the input": (Call(lambda m, x: x * x.sum().item()), "sum"),
    "sum over the batch": (Call(lambda m, x: x.sum(0)), "sum"),
    "mean over the batch": (Call(lambda m, x: x.mean(0)), "mean"),
    "mean over the batch, counted from the end": (Call(lambda m, x: x.mean(-2)), "mean"),
    "mean over everything": (Call(lambda m, x: x.mean()), "mean"),
    "concatenation along the batch": (Call(lambda m, x: torch.cat([x, x])), "cat"),
    "concatenation along the batch, counted from the end": (Call(lambda m, x: torch.cat([x, x], -2)), "cat"),
    "minus the mean over the batch": (Call(lambda m, x: x - x.mean(0, keepdim=True)), "mean"),
    "batchnorm on batch statistics": (nn.BatchNorm1d(4, track_running_stats=False), "BatchNorm1d"),
}


@pytest.mark.parametrize("model, culprit", UNBOUNDED.values(), ids=UNBOUNDED)
def test_operations_without_a_constant_or_across_the_batch_make_the_bound_infinite(model: nn.Module, culprit: str) -> None:
    found = bound(nn.Sequential(model), 4)
    assert found.value == math.inf
    assert found.reason is not None and culprit in found.reason


def test_squeezing_the_batch_axis_does_not_give_too_small_a_bound() -> None:
    model = Call(lambda m, x: m.f(x.squeeze()), f=nn.Linear(4, 3)).double()
    found = rs.lipschitz_bound(model, torch.zeros(1, 4, 1, dtype=torch.float64))
    assert found.value >= norm(model.f, (4,))


@pytest.mark.parametrize("layer", [Subclassed(2, 3, 3), mirrored(nn.Conv2d(2, 3, 3))], ids=["subclass", "parametrised"])
def test_a_subclassed_or_parametrised_layer_is_not_bounded_as_its_base_class(layer: nn.Module) -> None:
    model = nn.Sequential(layer).double()
    assert bound(model, 2, 5, 5).value >= norm(layer, (2, 5, 5))


@pytest.mark.parametrize("part", [nn.ReLU(), nn.BatchNorm1d(4)], ids=lambda part: type(part).__name__)
def test_a_forward_hook_is_part_of_the_bound(part: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 2))
    without = bound(model, 4).value
    handle = part.register_forward_hook(lambda module, inputs, output: 100 * output)
    assert sampled(model, 4) <= bound(model, 4).value
    assert bound(model, 4).value == pytest.approx(100 * without, rel=1e-6)
    handle.remove()
    assert bound(model, 4).value == without


def test_the_reason_names_an_unknown_node() -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Sequential(nn.Linear(4, 4), nn.Hardshrink()))
    found = bound(model, 4)
    assert found.value == math.inf
    assert "Hardshrink" in found.reason and "head.1" in found.reason


def test_the_reason_names_the_first_unknown_node() -> None:
    found = bound(nn.Sequential(nn.Hardshrink(), nn.Threshold(0.0, 1.0)), 4)
    assert "Hardshrink" in found.reason and "Threshold" not in found.reason


def test_an_unknown_operation_whose_result_is_unused_keeps_the_bound_finite() -> None:
    def ignores(m: nn.Module, x: Tensor) -> Tensor:
        x.square()
        return 2 * x

    found = bound(Call(ignores), 4)
    assert found.value == pytest.approx(2, rel=1e-12) and found.reason is None


def test_a_model_that_cannot_be_traced_has_an_infinite_bound_and_a_reason() -> None:
    found = bound(Branching(), 4)
    assert found.value == math.inf and found.nodes == ()
    assert "cannot follow Branching" in found.reason and "`return x if x.sum() > 0 else -x`" in found.reason


def test_branches_on_sizes_are_traced_and_branches_on_values_are_not() -> None:
    def by_size(m: nn.Module, x: Tensor) -> Tensor:
        batch, _ = x.shape
        return 2 * x if x.shape[1] == 4 and x.size(0) == batch and len(x) > 0 else x

    assert bound(Call(by_size), 4).value == pytest.approx(2, rel=1e-12)
    found = bound(Branching(), 4)
    assert found.value == math.inf and "cannot follow" in str(found.reason)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_has_an_infinite_bound_whose_reason_suggests_float(dtype: torch.dtype) -> None:
    found = rs.lipschitz_bound(nn.Sequential(nn.Linear(4, 3)).to(dtype), torch.zeros(1, 4, dtype=dtype), box=None)
    assert math.isinf(found.value) and found.reason is not None and found.reason.endswith("use model.float()")
    assert found.errors == {} and found.errors_reason is not None
