"""Patterns of several operations: the constant of the whole, finite for all inputs, and none for what only looks like them."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Call, bounded, of, sampled, seeded
from reference import gain
from torch import Tensor, nn

import robust_spectral as rs

Build = Callable[[], nn.Module]


def layer_norm(m: nn.Module, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + 0.1)


def channel_norm(m: nn.Module, x: Tensor) -> Tensor:
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    return m.w[:, None, None] * ((x - u) / torch.sqrt(s + 0.1))


def norm_by_power(m: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 0.1).pow(-0.5)


def by_var_mean(m: nn.Module, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + 0.1)


def by_std_mean(m: nn.Module, x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, -1, keepdim=True)
    return m.w * (x - mean) / (std + 0.1)


def gelu(x: Tensor, cubic: float = 0.044715) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + cubic * torch.pow(x, 3.0))))


ROOT, W = math.sqrt(10), torch.tensor([1.0, -2.0, 0.5, 1.5])
PATTERNS: dict[str, tuple[Build, tuple[int, ...], float]] = {
    "x sigmoid(x)": (of(lambda m, x: x * torch.sigmoid(x)), (6,), 1.09984),
    "sigmoid(x) x": (of(lambda m, x: x.sigmoid() * x), (6,), 1.09984),
    "x sigmoid(1.7 x)": (of(lambda m, x: x * torch.sigmoid(1.7 * x)), (6,), 1.09984),
    "hard-swish": (of(lambda m, x: x * F.relu6(x + 3) / 6), (6,), 1.5),
    "hard-swish, gate first": (of(lambda m, x: x * (F.relu6(x + 3) / 6)), (6,), 1.5),
    "hard-swish by clamp": (of(lambda m, x: x * (x + 3).clamp(0, 6) / 6), (6,), 1.5),
    "hard-swish by hardsigmoid": (of(lambda m, x: x * F.hardsigmoid(x)), (6,), 1.5),
    "mish": (of(lambda m, x: x * torch.tanh(F.softplus(x))), (6,), 1.0885),
    "gelu": (of(lambda m, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))), (6,), 1.129),
    "gelu, half last": (of(lambda m, x: x * (1 + torch.erf(x / math.sqrt(2))) * 0.5), (6,), 1.129),
    "gelu at another scale": (of(lambda m, x: x * (1 + torch.erf(-3 * x))), (6,), 2.258),
    "tanh gelu": (of(lambda m, x: gelu(x)), (6,), 1.129),
    "tanh gelu of a multiple": (of(lambda m, x: gelu(2 * x)), (6,), 2.258),
    "tanh gelu in factors": (
        of(lambda m, x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))), (6,), 1.129),
    "tanh gelu, gate halved": (
        of(lambda m, x: x * (0.5 * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))))), (6,), 1.129),
    "x (1 + tanh x)": (of(lambda m, x: 0.5 * x * (1 + torch.tanh(x))), (6,), 1.09984),
    "softsign": (of(lambda m, x: x / (1 + x.abs())), (6,), 1.0),
    "softsign of the library": (nn.Softsign, (6,), 1.0),
    "softsign with 2": (of(lambda m, x: x / (2 + torch.abs(x))), (6,), 0.5),
    "leaky ReLU": (of(lambda m, x: torch.where(x > 0, x, 0.1 * x)), (6,), 1.0),
    "steep leaky ReLU": (of(lambda m, x: torch.where(x >= 0, x, 3 * x)), (6,), 3.0),
    "ReLU": (of(lambda m, x: torch.where(x > 0, x, 0.0)), (6,), 1.0),
    "layer norm": (of(layer_norm), (6,), ROOT), "channel norm": (of(channel_norm, w=W), (4, 2, 2), 2 * ROOT),
    "layer norm by var_mean": (of(by_var_mean), (6,), ROOT),
    "layer norm, weight first": (of(lambda m, x: m.w * (x - x.mean(-1, keepdim=True)) / torch.sqrt(
        x.var(-1, keepdim=True) + 0.1), w=W), (4,), 2 * ROOT),
    "layer norm by a deviation": (of(by_std_mean, w=W), (4,), 20.0),
    "plus a length": (of(lambda m, x: x / (x.norm(dim=1, keepdim=True) + 0.1)), (6,), 10.0),
    "reciprocal of a length": (of(lambda m, x: x * (3 / (x.norm(dim=1, keepdim=True) + 0.1))), (6,), 30.0),
    "energy at least": (of(lambda m, x: x / (x * x).sum(-1, keepdim=True).clamp_min(0.01).sqrt()), (6,), 10.0),
    "layer norm by a power": (of(norm_by_power), (6,), ROOT),
    "root mean square": (of(lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)), (6,), ROOT),
    "root mean square by quotient": (of(lambda m, x: x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()), (6,), ROOT),
    "unit length": (of(lambda m, x: F.normalize(x, eps=0.1)), (6,), 10.0),
    "unit length by hand": (of(lambda m, x: x / x.norm(dim=1, keepdim=True).clamp_min(0.1)), (6,), 10.0),
    "centred": (of(lambda m, x: x - x.mean(-1, keepdim=True)), (6,), 1.0),
}  # fmt: skip


def steepest(model: nn.Module, *shape: int) -> float:
    """Largest slope along lines through the origin, from 1e-3 to 20 away, and other samples."""
    sizes = torch.cat([torch.logspace(-3, 1.3, 60), torch.linspace(-8, 8, 801)]).double()
    lines = [torch.ones(1, *shape, dtype=torch.float64), torch.randn(1, *shape, dtype=torch.float64)]
    points = torch.cat([sizes.reshape(-1, *[1] * len(shape)) * line / line.norm() for line in lines])
    ways = torch.randn_like(points)
    each = [gain(model, points, points + 1e-6 * way) for way in (ways, torch.ones_like(ways))]
    return max(sampled(model, *shape), *each)


@pytest.mark.parametrize("build, shape, constant", PATTERNS.values(), ids=PATTERNS)
def test_a_pattern_has_its_constant_for_all_inputs(build: Build, shape: tuple[int, ...], constant: float) -> None:
    model = seeded(build)
    found = bounded(model, *shape)
    assert found.reason is None and found.value == pytest.approx(constant, rel=2e-4)
    assert 0.8 * constant <= steepest(model, *shape) <= found.value * (1 + 1e-6)


def other_axis(m: nn.Module, x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(2, keepdim=True) + 0.1)


NEAR: dict[str, tuple[Build, tuple[int, ...]]] = {
    "gate of another value": (of(lambda m, x: x * torch.sigmoid(m.f(x)), f=nn.Linear(6, 6)), (6,)),
    "gate of the reversed": (of(lambda m, x: x * torch.sigmoid(x.flip(1))), (6,)),
    "gate of the unscaled": (of(lambda m, x: m.f(x) * torch.sigmoid(x), f=nn.Linear(6, 6)), (6,)),
    "tanh of softplus of another": (of(lambda m, x: x * torch.tanh(F.softplus(x.flip(1)))), (6,)),
    "tanh of a steep softplus": (of(lambda m, x: x * torch.tanh(F.softplus(x, 3.0))), (6,)),
    "clamp at other places": (of(lambda m, x: x * F.relu6(x + 1) / 6), (6,)),
    "clamp of another": (of(lambda m, x: x * F.relu6(x.flip(1) + 3) / 6), (6,)),
    "erf of another": (of(lambda m, x: 0.5 * x * (1 + torch.erf(x.flip(1)))), (6,)),
    "gelu with a steep cube": (of(lambda m, x: gelu(x, 4.0)), (6,)),
    "gelu of a sum of two cubes": (of(lambda m, x: x * (1 + torch.tanh(x + (x**3 + 9 * x**3)))), (6,)),
    "gelu with the cube of another": (of(lambda m, x: x * (1 + torch.tanh(x + 0.07 * x.flip(1) ** 3))), (6,)),
    "twice the deviation's mean": (of(lambda m, x: (x - torch.std_mean(x, -1, keepdim=True)[0]) / (
        torch.std_mean(x, -1, keepdim=True)[1] + 0.1)), (6,)),
    "root of the length": (of(lambda m, x: x / (x.norm(dim=1, keepdim=True) + 0.1).sqrt()), (6,)),
    "energy without a root": (of(lambda m, x: x / (x.square().sum(1, keepdim=True) + 0.1)), (6,)),
    "times the length": (of(lambda m, x: x * (x.norm(dim=1, keepdim=True) + 0.1)), (6,)),
    "weight of the input first": (
        of(lambda m, x: x.flip(1) * (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 0.1)), (6,)),
    "square root without eps": (of(lambda m, x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True))), (6,)),
    "eps = 0": (of(lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.0)), (6,)),
    "negative eps": (of(lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 0.1)), (6,)),
    "variance along another axis": (of(other_axis), (3, 4)),
    "energy of another value": (of(lambda m, x: m.f(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1),
                                   f=nn.Linear(6, 6)), (6,)),
    "not centred": (of(lambda m, x: x / torch.sqrt(x.var(-1, keepdim=True) + 0.1)), (6,)),
    "third power": (of(lambda m, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 0.1)), (6,)),
    "length at most": (of(lambda m, x: x / x.norm(dim=1, keepdim=True).clamp_max(0.1)), (6,)),
    "length without a limit": (of(lambda m, x: x / x.norm(dim=1, keepdim=True)), (6,)),
    "length of another": (of(lambda m, x: m.f(x) / x.norm(dim=1, keepdim=True).clamp_min(0.1), f=nn.Linear(6, 6)), (6,)),
    "sum of absolute values": (of(lambda m, x: F.normalize(x, p=1.0, eps=0.1)), (6,)),
    "softsign of another": (of(lambda m, x: x / (1 + x.flip(1).abs())), (6,)),
    "softsign with 0": (of(lambda m, x: x / x.abs()), (6,)),
    "softsign with less than 1": (of(lambda m, x: x / torch.add(x.abs(), 1.0, alpha=1e-3)), (6,)),
    "jump": (of(lambda m, x: torch.where(x > 0.5, x, 0.1 * x)), (6,)),
    "jump at 0": (of(lambda m, x: torch.where(x > 0, x + 1, x)), (6,)),
    "condition on another": (of(lambda m, x: torch.where(x.flip(1) > 0, x, 0.1 * x)), (6,)),
    "maximum and minimum of others": (
        of(lambda m, x: torch.cat([torch.maximum(x[:, :2], x[:, 2:4]), torch.minimum(x[:, :2], x[:, 4:])], 1)), (6,)),
    "maximum twice": (of(lambda m, x: torch.cat([torch.maximum(x[:, :3], x[:, 3:])] * 2, 1)), (6,)),
    "minus another mean": (of(lambda m, x: x - x.flip(1).mean(1, keepdim=True)), (3, 2)),
    "minus twice the mean": (of(lambda m, x: torch.sub(x, x.mean(1, keepdim=True), alpha=5)), (6,)),
    "plus the mean": (of(lambda m, x: x + x.mean(1, keepdim=True)), (6,)),
    "one patch twice": (of(lambda m, x: torch.cat([x[:, ::2, ::2]] * 2, -1)), (4, 4, 3)),
    "quotient rounded down": (
        of(lambda m, x: torch.div(x, (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt(), rounding_mode="floor")), (6,)),
    "unit length rounded": (
        of(lambda m, x: torch.div(x, x.norm(dim=1, keepdim=True).clamp_min(0.1), rounding_mode="trunc")), (6,)),
    "unit length copied": (
        of(lambda m, x: x[:, None] / x[:, None].norm(dim=-1, keepdim=True).clamp_min(0.1).expand(-1, 5, 6)), (6,)),
    "ReLU copied": (of(lambda m, x: torch.where(x > 0, x, m.c), c=torch.zeros(6)), (1,)),
    "largest in any order": (of(lambda m, x: torch.topk(x, 5, sorted=False)[0]), (32,)),
    "sorted along the batch": (of(lambda m, x: torch.msort(x)), (6,)),
}  # fmt: skip


@pytest.mark.parametrize("build, shape", NEAR.values(), ids=NEAR)
def test_no_sampled_gain_exceeds_the_bound_of_what_looks_alike(build: Build, shape: tuple[int, ...]) -> None:
    model = seeded(build)
    found = bounded(model, *shape)
    assert found.value == math.inf or steepest(model, *shape) <= found.value * (1 + 1e-6)
    points = torch.rand(2, 64, *shape, dtype=torch.float64)
    assert found.local == math.inf or gain(model, points[0], points[1]) <= found.local * (1 + 1e-6)


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_a_quotient_rounded_to_whole_numbers_has_no_bound(mode: str) -> None:
    by_length, by_square = (lambda x: x.norm(dim=1, keepdim=True).clamp_min(0.1), lambda x: (x * x).mean(1, keepdim=True) + 0.1)
    for divisor in (by_length, lambda x: by_square(x).sqrt()):
        model = Call(lambda m, x, divisor=divisor: torch.div(x, divisor(x), rounding_mode=mode)).double()
        assert bounded(model, 6).value == math.inf


@pytest.mark.usefixtures("deadline")
def test_equal_values_are_recognised_without_comparing_every_path() -> None:
    def deep(x: Tensor) -> Tensor:
        for _ in range(30):
            x = x + 0.1 * torch.relu(x)
        return x

    model = Call(lambda m, x: deep(x) * torch.sigmoid(deep(x))).double()
    assert sampled(model, 4) <= bounded(model, 4).value


@pytest.mark.parametrize(
    "function, shrink",
    [(lambda m, x: m.f(x) / (1e-6 + m.f(x).abs()), 1e-6), (lambda m, x: m.f(x) * (1e6 * torch.sigmoid(m.f(x))), 1e6)],
    ids=["steep softsign", "gate times a million"],
)
def test_the_rounding_of_a_pattern_is_at_most_its_bound(function: Callable[..., Tensor], shrink: float) -> None:
    model = seeded(lambda: Call(function, f=nn.Linear(6, 6))).float()
    with torch.no_grad():
        model.f.weight.mul_(shrink)  # type: ignore[union-attr]
        model.f.bias.zero_()  # type: ignore[union-attr]
    x = torch.rand(64, 6)
    found = rs.lipschitz_bound(model, x[:1])
    single = model(x).double()
    apart = (single - copy.deepcopy(model).double()(x.double())).norm(dim=1).max()
    assert 0 < float(apart.detach()) <= found.errors[torch.float32] < math.inf


def test_the_slope_of_gelus_tanh_form_is_at_most_1129_by_intervals() -> None:
    """With t = tanh p and p = u + r u³ the slope is (1 + t + u p' (1 - t²)) / 2, and that at -u is 1 less that at u.

    On a cell of u >= 0 and all r within 1e-7, t and u p' rise with u and r, and 1 - t² falls. Beyond u = 8 the slope is below
    1 + 2 u p' exp(-2 p) < 1 + 2 u (1 + u²) exp(-2 u), which falls.
    """
    r, cells = 0.044715 * math.pi / 2, torch.linspace(0, 8, 2**24 + 1, dtype=torch.float64)
    low, high = cells[:-1], cells[1:]
    least, most = torch.tanh(low + (r - 1e-7) * low**3), torch.tanh(high + (r + 1e-7) * high**3)
    slope = (1 + most + high * (1 + 3 * (r + 1e-7) * high**2) * (1 - least**2)) / 2
    assert 1.1289 < float(slope.max()) < 1.129 - 1e-9
    assert 1 + 16 * 65 * math.exp(-16) < 1.129
