"""The constants of single operations: the known ones, rounded up, and never below a sampled gain."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from cases import randomised
from networks import Call, bound, sampled, seeded
from reference import gain, norm
from torch import Tensor, nn

ELEMENTWISE = {
    "ReLU": (nn.ReLU(), 1.0), "ReLU6": (nn.ReLU6(), 1.0), "Tanh": (nn.Tanh(), 1.0), "Hardtanh": (nn.Hardtanh(), 1.0),
    "Softplus": (nn.Softplus(), 1.0), "Softplus(3)": (nn.Softplus(3.0), 1.0), "Softsign": (nn.Softsign(), 1.0),
    "LeakyReLU": (nn.LeakyReLU(), 1.0), "LeakyReLU(-3)": (nn.LeakyReLU(-3.0), 3.0), "ELU": (nn.ELU(), 1.0),
    "ELU(2)": (nn.ELU(2.0), 2.0), "SELU": (nn.SELU(), 1.0507009873554805 * 1.6732632423543772),
    "GELU": (nn.GELU(), 1.128904), "GELU tanh": (nn.GELU("tanh"), 1.128993), "SiLU": (nn.SiLU(), 1.099839),
    "Mish": (nn.Mish(), 1.088498), "Hardswish": (nn.Hardswish(), 1.5), "Hardsigmoid": (nn.Hardsigmoid(), 1 / 6),
    "Sigmoid": (nn.Sigmoid(), 0.25), "PReLU": (nn.PReLU(1, 0.3), 1.0), "PReLU(-2)": (nn.PReLU(1, -2.0), 2.0),
    "PReLU of two": (nn.PReLU(2, 1.5), 1.5), "Identity": (nn.Identity(), 1.0), "Dropout": (nn.Dropout(), 1.0),
    "F.relu": (Call(lambda m, x: F.relu(x)), 1.0), "F.silu": (Call(lambda m, x: F.silu(x)), 1.099839),
    "F.mish": (Call(lambda m, x: F.mish(x)), 1.088498), "F.hardswish": (Call(lambda m, x: F.hardswish(x)), 1.5),
    "x.relu()": (Call(lambda m, x: x.relu()), 1.0), "torch.sigmoid": (Call(lambda m, x: torch.sigmoid(x)), 0.25),
    "x.tanh()": (Call(lambda m, x: x.tanh()), 1.0), "F.dropout": (Call(lambda m, x: F.dropout(x, 0.5, m.training)), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("activation, constant", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_the_constant_of_an_activation_is_its_largest_slope(activation: nn.Module, constant: float) -> None:
    model = nn.Sequential(activation).double().eval()
    points = torch.linspace(-12, 12, 40001, dtype=torch.float64).repeat(2, 1).T.contiguous().requires_grad_()
    slopes = torch.autograd.grad(model(points).sum(), points)[0].abs()
    found = bound(model, 2).value
    assert float(slopes.max()) <= found
    assert found == pytest.approx(constant, rel=1e-3)


POOL = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
KNOWN = {
    "max-pool 2/2": (nn.MaxPool2d(2), (1, 4, 4), 1.0),
    "max-pool 3/2/1": (nn.MaxPool2d(3, 2, 1), (1, 6, 6), 2.0),
    "max-pool 3/1": (nn.MaxPool2d(3, 1), (1, 6, 6), 3.0),
    "max-pool 1d 5/2": (nn.MaxPool1d(5, 2), (1, 9), math.sqrt(3)),
    "max-pool 3d 2/1": (nn.MaxPool3d(2, 1), (1, 3, 3, 3), math.sqrt(8)),
    "max-pool of unequal windows": (nn.MaxPool2d((3, 2), (1, 2)), (1, 6, 6), math.sqrt(3)),
    "dilated max-pool": (nn.MaxPool2d(2, 1, dilation=2), (1, 6, 6), 2.0),
    "max-pool of rows without channels": (nn.MaxPool1d(3, 1), (6,), math.sqrt(3)),
    "max-pool of images without channels": (nn.MaxPool2d(3, 1), (6, 6), 3.0),
    "average pool of rows without channels": (nn.AvgPool1d(2), (8,), math.sqrt(0.5)),
    "average pool 2": (nn.AvgPool2d(2), (3, 4, 4), 0.5),
    "average pool, padding not counted": (POOL, (2, 5, 5), norm(POOL, (1, 5, 5))),
    "adaptive average pool": (nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 7), norm(nn.AdaptiveAvgPool2d((2, 3)), (1, 5, 7))),
    "global average": (Call(lambda m, x: x.mean((2, 3))), (3, 4, 5), 1 / math.sqrt(20)),
    "mean over one axis": (Call(lambda m, x: torch.mean(x, dim=-1, keepdim=True)), (3, 7), 1 / math.sqrt(7)),
    "nearest upsampling": (nn.Upsample(scale_factor=2), (2, 3, 3), 2.0),
    "flatten": (nn.Flatten(), (2, 3), 1.0),
    "reshape": (Call(lambda m, x: x.reshape(x.shape[0], -1)), (2, 3), 1.0),
    "flatten of the function": (Call(lambda m, x: torch.flatten(x, 1)), (2, 3), 1.0),
    "view of the shape": (Call(lambda m, x: x.view(x.size(0), 6)), (2, 3), 1.0),
    "unsqueeze and squeeze": (Call(lambda m, x: x.unsqueeze(1).squeeze(1)), (3,), 1.0),
    "batchnorm": (randomised(nn.BatchNorm1d(3), [1.0, -4.0, 2.0]), (3, 5), None),
    "x + x": (Call(lambda m, x: x + x), (3,), 2.0),
    "x + 1": (Call(lambda m, x: x + 1), (3,), 1.0),
    "1 - x": (Call(lambda m, x: 1 - x), (3,), 1.0),
    "x plus a constant": (Call(lambda m, x: x + m.c, c=torch.ones(3)), (3,), 1.0),
    "sum with a factor": (Call(lambda m, x: torch.add(x, x, alpha=-3)), (3,), 4.0),
    "difference": (Call(lambda m, x: torch.sub(x, F.relu(x))), (3,), 2.0),
    "x * 3": (Call(lambda m, x: x * 3), (3,), 3.0),
    "-2 * x": (Call(lambda m, x: -2 * x), (3,), 2.0),
    "x / 4": (Call(lambda m, x: x / 4), (3,), 0.25),
    "x times a constant": (Call(lambda m, x: x * m.c, c=torch.tensor([1.0, -5.0, 2.0])), (3,), 5.0),
    "x over a constant": (Call(lambda m, x: x / m.c, c=torch.tensor([1.0, -5.0, 0.5])), (3,), 2.0),
    "concatenation": (Call(lambda m, x: torch.cat([x, 2 * x, x], 1)), (3,), math.sqrt(6)),
    "concatenation with a constant": (
        Call(lambda m, x: torch.cat((x, m.c.expand(len(x), 4)), dim=1), c=torch.ones(1, 4)), (3,), 1.0,
    ),
    "mean of the channels added to each": (Call(lambda m, x: x.mean(1, keepdim=True) + x), (4,), 2.0),
    "mean of the channels times many": (Call(lambda m, x: x.mean(1, keepdim=True) * m.c, c=torch.ones(1, 9)), (4,), 1.5),
    "sum over channels": (Call(lambda m, x: x.sum(1, keepdim=True)), (9,), 3.0),
    "expanded": (Call(lambda m, x: x[:, None].expand(-1, 4, -1)), (3,), 2.0),
    "repeated": (Call(lambda m, x: x.repeat(1, 4)), (3,), 2.0),
    "stacked": (Call(lambda m, x: torch.stack([x, -x], 1)), (3,), math.sqrt(2)),
    "parts put together": (Call(lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1)), (4,), 1.0),
    "padded": (Call(lambda m, x: F.pad(x, (1, 2))), (3,), 1.0),
    "largest": (Call(lambda m, x: x.amax(1, keepdim=True)), (3,), 1.0),
    "permuted": (Call(lambda m, x: x.permute(0, 2, 1)), (2, 3), 1.0),
    "rolled": (Call(lambda m, x: torch.roll(x, 1, 1)), (3,), 1.0),
    "every second": (Call(lambda m, x: x[:, ::2]), (5,), 1.0),
    "index that repeats": (Call(lambda m, x: x[:, m.i], i=torch.tensor([1, 1, 0, 1])), (2,), math.sqrt(3)),
    "normalised to length 1": (Call(lambda m, x: F.normalize(x, eps=0.25)), (3,), 4.0),
    "padding that repeats": (Call(lambda m, x: F.pad(x[:, None], (1, 1), mode="replicate")), (3,), math.sqrt(2)),
    "overlapping windows": (nn.Unfold(2, padding=1), (1, 4, 4), 2.0),
    "windows of a row": (Call(lambda m, x: x.unfold(1, 3, 1)), (6,), math.sqrt(3)),
    "windows put back": (nn.Fold((4, 4), 2, stride=1), (4, 9), 2.0),
    "constant matrix in front": (Call(lambda m, x: m.c @ x, c=torch.tensor([[0.0, 3.0], [0.0, 4.0]])), (2, 3), 5.0),
    "several constant matrices": (Call(lambda m, x: x[:, None] @ m.c, c=torch.stack([torch.eye(2), 2 * torch.eye(2)])), (3, 2),
                                  math.sqrt(2) * 2),
    "sum by names": (Call(lambda m, x: torch.einsum("bij,kj->bki", x, m.c), c=torch.tensor([[0.0, 3.0], [0.0, 4.0]])),
                     (3, 2), 5.0),
    "sum by names over a lone axis": (Call(lambda m, x: torch.einsum("bij,kj->bk", x, m.c), c=torch.eye(2)), (4, 2), 2.0),
    "zeros around": (nn.ZeroPad2d(1), (1, 2, 2), 1.0),
    "in the shape of another": (Call(lambda m, x: x.reshape_as(x.transpose(1, 2))), (2, 3), 1.0),
    "constant matrix": (Call(lambda m, x: x @ m.c, c=torch.tensor([[0.0, 3.0], [0.0, 0.0]])), (2,), 3.0),
    "max-pool function": (Call(lambda m, x: F.max_pool2d(x, 3, 2, 1)), (1, 6, 6), 2.0),
    "average pool function": (Call(lambda m, x: F.avg_pool2d(x, 2)), (3, 4, 4), 0.5),
    "interpolated": (Call(lambda m, x: F.interpolate(x, scale_factor=2, mode="nearest")), (2, 3, 3), 2.0),
    "layer norm": (nn.LayerNorm(5, eps=1e-2), (5,), 10.0),
    "group norm": (nn.GroupNorm(2, 4, eps=1e-2), (4, 3), 10.0),
    "root mean square": (nn.RMSNorm(5, eps=1e-2), (5,), 10.0),
    "dense function": (Call(lambda m, x: F.linear(x, m.c), c=torch.tensor([[3.0, 0.0], [0.0, 1.0]])), (2,), 3.0),
    "softmax of two": (nn.Softmax(1), (2,), 0.5),
    "times zero": (Call(lambda m, x: x * 0), (3,), 0.0),
    "a constant": (Call(lambda m, x: torch.ones(len(x), 3)), (3,), 0.0),
}  # fmt: skip


@pytest.mark.parametrize("model, shape, constant", KNOWN.values(), ids=KNOWN)
def test_the_bound_is_the_known_constant(model: nn.Module, shape: tuple[int, ...], constant: float | None) -> None:
    found = bound(nn.Sequential(model), *shape)
    wanted = norm(model, shape) if constant is None else constant
    assert wanted * (1 - 1e-15) <= found.value <= wanted * (1 + 1e-9)
    assert found.reason is None and found.failure_probability == 0


@pytest.mark.parametrize("model, shape, constant", KNOWN.values(), ids=KNOWN)
def test_the_known_constants_hold_on_samples(model: nn.Module, shape: tuple[int, ...], constant: float | None) -> None:
    x, y = torch.randn(2, 2, *shape, dtype=torch.float64)
    assert gain(nn.Sequential(model).double().eval(), x, y) <= bound(nn.Sequential(model), *shape).value * (1 + 1e-12)


def test_an_overlapping_max_pool_attains_its_constant() -> None:
    x, spike = torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 6, 6)
    spike[0, 0, 1, 1] = 1
    model = nn.Sequential(nn.MaxPool2d(3, 2, 1))
    assert gain(model, x, spike) == pytest.approx(bound(model, 1, 6, 6).value, rel=1e-6) == 2


@pytest.mark.parametrize("size", range(2, 60))
def test_constants_are_rounded_up(size: int) -> None:
    mean = Fraction(bound(Call(lambda m, x: x.mean(1)), size).value)
    assert mean**2 * size >= 1
    assert Fraction(bound(Call(lambda m, x: x / size), 2).value) * size >= 1
    assert Fraction(bound(nn.Sequential(nn.MaxPool1d(size, 1)), 1, size + 1).value) ** 2 >= size
    assert Fraction(bound(Call(lambda m, x: torch.cat([x] * size, 1)), 2).value) ** 2 >= size


@pytest.mark.parametrize("factor", [0.7, 0.1, 1 / 3, 123.456])
def test_a_number_in_the_code_counts_as_it_is(factor: float) -> None:
    assert Fraction(factor) <= Fraction(bound(Call(lambda m, x: x * factor), 2).value) <= Fraction(factor * (1 + 1e-15))


class Paired(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 100 * x, x


def written_over(m: nn.Module, x: Tensor) -> Tensor:
    y = m.f(x)
    y.mul_(100)
    return y


PARTIAL = {
    "values of a maximum": (Call(lambda m, x: 100 * torch.max(x, 1, keepdim=True)[0]), 100.0),
    "second part of a chunk": (Call(lambda m, x: 100 * x.chunk(2, 1)[1]), 100.0),
    "part by index": (Call(lambda m, x: 100 * x[:, :2]), 100.0),
    "pair": (Paired(), 100.0),
    "matrix product": (Call(lambda m, x: x @ m.c, c=100 * torch.eye(4)), 100.0),
}


@pytest.mark.parametrize("model, constant", PARTIAL.values(), ids=PARTIAL)
def test_values_selected_from_tuples_or_slices_are_not_treated_as_constants(model: nn.Module, constant: float) -> None:
    assert bound(model, 4).value >= constant


def test_an_in_place_change_of_a_value_is_part_of_the_bound() -> None:
    model = seeded(lambda: Call(written_over, f=nn.Linear(4, 3)))
    assert bound(model, 4).value >= 100 * norm(model.f, (4,)) * (1 - 1e-12)


def test_an_in_place_activation_is_part_of_the_bound_of_the_value_it_changes() -> None:
    def reused(m: nn.Module, x: Tensor) -> Tensor:
        y = 2 * x
        m.act(y)
        return y

    model = Call(reused, act=nn.Hardswish(inplace=True)).double()
    assert sampled(model, 4) <= bound(model, 4).value


KEYWORDS = {
    "relu": lambda m, x: F.relu(input=x),
    "add": lambda m, x: torch.add(x, other=x),
    "mul": lambda m, x: torch.mul(x, other=3),
    "cat": lambda m, x: torch.cat(tensors=[x, x], dim=1),
    "mean": lambda m, x: torch.mean(input=x, dim=1, keepdim=True),
    "flatten": lambda m, x: torch.flatten(input=x, start_dim=1),
    "layer": lambda m, x: m.f(input=x),
}


@pytest.mark.parametrize("function", KEYWORDS.values(), ids=KEYWORDS)
def test_keyword_arguments_are_understood_or_make_the_bound_infinite(function: Callable[..., Tensor]) -> None:
    model = seeded(lambda: Call(function, f=nn.Linear(4, 3)))
    assert sampled(model, 4) <= bound(model, 4).value * (1 + 1e-11)


def test_a_weight_normalised_by_a_hook_is_bounded_as_the_forward_pass_uses_it() -> None:
    layer = torch.nn.utils.spectral_norm(nn.Linear(4, 4))
    with torch.no_grad():
        layer.weight_orig.mul_(0.01)
    model = nn.Sequential(layer).double().eval()
    assert sampled(model, 4) <= bound(model, 4).value
