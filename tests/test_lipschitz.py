"""The bound of a network: equal to the known constant, never below a sampled gain, infinite where nothing is known."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import mirrored, randomised
from reference import dense, gain, jacobian_norm, norm, same_bits, snapshot
from torch import Tensor, nn

import robust_spectral as rs


class Call(nn.Module):
    """A network given by a function of its input and of the modules named in it."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def bound(model: nn.Module, *shape: int) -> rs.LipschitzBound:
    return rs.lipschitz_bound(model.double(), torch.zeros(2, *shape, dtype=torch.float64))


def sampled(model: nn.Module, *shape: int) -> float:
    """Largest gain seen: Jacobians at random points, and finite differences short and long."""
    model = model.double().eval()
    x, direction = torch.randn(2, 16, *shape, dtype=torch.float64)
    gains = [gain(model, size * x, size * x + step * direction) for size in (0.1, 1, 10) for step in (1e-3, 1.0)]
    return max(*gains, *(jacobian_norm(model, point) for point in x[:4]))


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
    "concatenation with a constant": (Call(lambda m, x: torch.cat((x, m.c), dim=1), c=torch.ones(2, 4)), (3,), 1.0),
    "mean of the channels added to each": (Call(lambda m, x: x.mean(1, keepdim=True) + x), (4,), 2.0),
    "mean of the channels times many": (Call(lambda m, x: x.mean(1, keepdim=True) * m.c, c=torch.ones(2, 9)), (4,), 1.5),
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
    "a constant": (Call(lambda m, x: torch.ones(2, 3)), (3,), 0.0),
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


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), randomised(nn.BatchNorm2d(channels))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out += x
        return self.act(out)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build().double().eval()


NETWORKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "gelu": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3)), (6,)),
    "dense on a sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)), (3, 4)),
    "dense, batchnorm over the sequence":
        (lambda: nn.Sequential(nn.Linear(4, 5), randomised(nn.BatchNorm1d(3), [1.0, 2.0, -3.0])), (3, 4)),
    "dense, batchnorm": (lambda: nn.Sequential(nn.Linear(4, 3), randomised(nn.BatchNorm1d(3), [1.0, 2.0, -3.0])), (4,)),
    "residual": (lambda: nn.Sequential(Residual(3), nn.MaxPool2d(3, 2, 1), Residual(3)), (3, 6, 6)),
    "concatenation": (lambda: Call(lambda m, x: torch.cat([m.a(x), F.relu(m.b(x)), x], dim=1),
                                   a=nn.Conv2d(2, 3, 3, padding=1), b=nn.Conv2d(2, 2, 1)), (2, 4, 4)),
    "negative axis concatenation": (lambda: Call(lambda m, x: torch.cat([m.a(x), x], -1), a=nn.Linear(3, 2)), (3,)),
    "one layer twice": (lambda: Call(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Conv2d(2, 2, 3, padding=1)), (2, 5, 5)),
    "one layer on two shapes": (lambda: Call(lambda m, x: m.a(m.p(m.a(x))), a=nn.Conv2d(2, 2, 3, padding=1),
                                             p=nn.AvgPool2d(2)), (2, 6, 6)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, 2), nn.ReLU6(), nn.Conv2d(3, 2, 3)), (2, 4, 4)),
    "circular": (lambda: nn.Sequential(nn.Conv2d(2, 3, 4, padding=2, padding_mode="circular"), nn.Mish()), (2, 5, 5)),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.ELU(1.5)), (2, 5, 5)),
    "upsampling": (lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 2, 3)), (2, 4, 4)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), randomised(nn.BatchNorm2d(4), [1.0, 0.0, -2.0, 3.0]),
                                      nn.Hardswish(), nn.Conv2d(4, 6, 1, groups=2)), (4, 6, 6)),
    "normalised input": (lambda: Call(lambda m, x: m.f((x - m.mean) / m.std), f=nn.Conv2d(3, 4, 3),
                                      mean=torch.rand(1, 3, 1, 1), std=torch.rand(1, 3, 1, 1) + 0.1), (3, 5, 5)),
    "gated by a constant": (lambda: Call(lambda m, x: m.gate * m.f(x) + 0.5 * x, f=nn.Linear(4, 4), gate=torch.randn(4)),
                            (4,)),
    "overlapping branches": (lambda: Call(lambda m, x: m.a(x) - m.b(F.softplus(x) if m.training else torch.tanh(x)),
                                          a=nn.Linear(4, 3), b=nn.Linear(4, 3)), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("build, shape", NETWORKS.values(), ids=NETWORKS)
def test_no_sampled_gain_exceeds_the_bound(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(build)
    found = bound(model, *shape)
    assert math.isfinite(found.value) and found.reason is None
    assert sampled(model, *shape) <= found.value


@pytest.mark.parametrize("build, shape", NETWORKS.values(), ids=NETWORKS)
def test_no_rule_is_far_too_careful(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(build)
    assert bound(model, *shape).value <= 12 * sampled(model, *shape)


def test_norms_multiply_along_a_chain() -> None:
    model = seeded(NETWORKS["dense"][0])
    wanted = norm(model[0], (6,)) * norm(model[2], (8,))
    assert bound(model, 6).value == pytest.approx(wanted, rel=1e-9)


def test_residual_sums_add() -> None:
    model = seeded(lambda: Call(lambda m, x: x + m.f(x), f=nn.Linear(4, 4)))
    assert bound(model, 4).value == pytest.approx(1 + norm(model.f, (4,)), rel=1e-9)


def test_concatenation_is_the_root_of_the_sum_of_squares() -> None:
    model = seeded(lambda: Call(lambda m, x: torch.cat([m.f(x), m.g(x)], 1), f=nn.Linear(4, 4), g=nn.Linear(4, 2)))
    assert bound(model, 4).value == pytest.approx(math.hypot(norm(model.f, (4,)), norm(model.g, (4,))), rel=1e-9)


def test_a_composite_counts_at_most_the_product_of_its_parts() -> None:
    conv, batchnorm = nn.Conv2d(3, 4, 3), randomised(nn.BatchNorm2d(4), [4.0, 0.1, -0.5, 1.0])
    model = nn.Sequential(conv, batchnorm).double().eval()
    found, whole = bound(model, 3, 6, 6).value, norm(model, (3, 6, 6))
    product = norm(conv, (3, 6, 6)) * norm(batchnorm, (4, 4, 4))
    assert found == pytest.approx(whole, rel=1e-9)
    assert whole <= found < product


def test_a_convolution_used_twice_does_not_lend_its_composite() -> None:
    model = seeded(
        lambda: Call(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=nn.Conv2d(2, 2, 1), bn=randomised(nn.BatchNorm2d(2)))
    )
    wanted = norm(nn.Sequential(model.conv, model.bn), (2, 3, 3)) + norm(model.conv, (2, 3, 3))
    assert bound(model, 2, 3, 3).value == pytest.approx(wanted, rel=1e-9)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Paired(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 100 * x, x


class Subclassed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


def halves(m: nn.Module, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return first * second


def written_over(m: nn.Module, x: Tensor) -> Tensor:
    y = m.f(x)
    y.mul_(100)
    return y


UNBOUNDED = {
    "square": (Call(lambda m, x: x.square()), "square"),
    "power": (Call(lambda m, x: x**2), "pow"),
    "exponential": (Call(lambda m, x: torch.exp(x)), "exp"),
    "product": (Call(lambda m, x: x * F.relu(x)), "mul"),
    "square by product": (Call(lambda m, x: x * x), "mul"),
    "quotient": (Call(lambda m, x: x / (1 + F.relu(x))), "div"),
    "inverse": (Call(lambda m, x: 1 / x), "div"),
    "division by a constant zero": (Call(lambda m, x: x / m.c, c=torch.zeros(4)), "div"),
    "division rounded down": (Call(lambda m, x: torch.div(x, 3, rounding_mode="floor")), "div"),
    "attention": (Call(lambda m, x: F.scaled_dot_product_attention(x, x, x)), "attention"),
    "causal attention": (Call(lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), "attention"),
    "rounding to whole numbers": (Call(lambda m, x: x.type_as(m.c).float(), c=torch.ones(1, dtype=torch.int64)), "int64"),
    "half precision": (Call(lambda m, x: x.to(torch.bfloat16)), "bfloat16"),
    "index that depends on the input": (Call(lambda m, x: x[:, x.argmax(1)]), "argmax"),
    "power below 1": (Call(lambda m, x: x**0.5), "pow"),
    "root of what may be 0": (Call(lambda m, x: torch.sqrt(x)), "sqrt"),
    "division by what may be 0": (Call(lambda m, x: 1 / x), "truediv"),
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
    "a number read off the input": (Call(lambda m, x: x * x.sum().item()), ""),
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
def test_what_has_no_constant_or_mixes_the_batch_makes_the_bound_infinite(model: nn.Module, culprit: str) -> None:
    found = bound(nn.Sequential(model), 4)
    assert found.value == math.inf
    assert found.reason is not None and culprit in found.reason


PARTIAL = {
    "values of a maximum": (Call(lambda m, x: 100 * torch.max(x, 1, keepdim=True)[0]), 100.0),
    "second part of a chunk": (Call(lambda m, x: 100 * x.chunk(2, 1)[1]), 100.0),
    "part by index": (Call(lambda m, x: 100 * x[:, :2]), 100.0),
    "pair": (Paired(), 100.0),
    "matrix product": (Call(lambda m, x: x @ m.c, c=100 * torch.eye(4)), 100.0),
}


@pytest.mark.parametrize("model, constant", PARTIAL.values(), ids=PARTIAL)
def test_values_picked_from_several_are_not_taken_for_constants(model: nn.Module, constant: float) -> None:
    assert bound(model, 4).value >= constant


def test_a_value_that_is_changed_in_place_counts_with_its_change() -> None:
    model = seeded(lambda: Call(written_over, f=nn.Linear(4, 3)))
    assert bound(model, 4).value >= 100 * norm(model.f, (4,)) * (1 - 1e-12)


def test_an_activation_in_place_counts_on_the_value_it_changes() -> None:
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
def test_arguments_given_by_name_are_understood_or_make_the_bound_infinite(function: Callable[..., Tensor]) -> None:
    model = seeded(lambda: Call(function, f=nn.Linear(4, 3)))
    assert sampled(model, 4) <= bound(model, 4).value * (1 + 1e-12)


def test_a_batch_axis_that_is_squeezed_away_gives_no_wrong_claim() -> None:
    model = Call(lambda m, x: m.f(x.squeeze()), f=nn.Linear(4, 3)).double()
    found = rs.lipschitz_bound(model, torch.zeros(1, 4, 1, dtype=torch.float64))
    assert found.value >= norm(model.f, (4,))


def test_a_weight_normalised_by_a_hook_counts_as_forward_uses_it() -> None:
    layer = torch.nn.utils.spectral_norm(nn.Linear(4, 4))
    with torch.no_grad():
        layer.weight_orig.mul_(0.01)
    model = nn.Sequential(layer).double().eval()
    assert sampled(model, 4) <= bound(model, 4).value


@pytest.mark.parametrize("layer", [Subclassed(2, 3, 3), mirrored(nn.Conv2d(2, 3, 3))], ids=["subclass", "parametrised"])
def test_a_layer_is_known_by_its_exact_type(layer: nn.Module) -> None:
    model = nn.Sequential(layer).double()
    assert bound(model, 2, 5, 5).value >= norm(layer, (2, 5, 5))


@pytest.mark.parametrize("part", [nn.ReLU(), nn.BatchNorm1d(4)], ids=lambda part: type(part).__name__)
def test_a_module_with_a_hook_that_may_do_anything_is_unknown(part: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 2))
    handle = part.register_forward_hook(lambda module, inputs, output: 100 * output)
    assert sampled(model, 4) <= bound(model, 4).value
    assert "hooks" in str(bound(model, 4).reason)
    handle.remove()
    assert math.isfinite(bound(model, 4).value)


def test_an_unknown_node_is_named() -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Sequential(nn.Linear(4, 4), nn.Hardshrink()))
    found = bound(model, 4)
    assert found.value == math.inf
    assert "Hardshrink" in found.reason and "head.1" in found.reason


def test_the_first_unknown_node_is_the_one_named() -> None:
    found = bound(nn.Sequential(nn.Hardshrink(), nn.Threshold(0.0, 1.0)), 4)
    assert "Hardshrink" in found.reason and "Threshold" not in found.reason


def test_an_unknown_branch_that_is_not_used_does_no_harm() -> None:
    def ignores(m: nn.Module, x: Tensor) -> Tensor:
        x.square()
        return 2 * x

    found = bound(Call(ignores), 4)
    assert found.value == pytest.approx(2, rel=1e-12) and found.reason is None


def test_a_model_that_cannot_be_traced_has_an_infinite_bound_and_a_reason() -> None:
    found = bound(Branching(), 4)
    assert found.value == math.inf and found.nodes == ()
    assert "cannot trace Branching" in found.reason


def test_every_node_has_a_row() -> None:
    model = seeded(NETWORKS["dense"][0])
    rows = bound(model, 6).nodes
    assert [(row.name, row.kind) for row in rows] == [("0", "Linear"), ("1", "ReLU"), ("2", "Linear")]
    assert rows[0].bound == pytest.approx(norm(model[0], (6,)), rel=1e-9)
    assert rows[-1].bound == bound(model, 6).value


def test_the_failure_probabilities_of_the_layers_add_up() -> None:
    model = nn.Sequential(nn.Linear(1300, 1300), nn.ReLU(), nn.Linear(1300, 1300), nn.Linear(1300, 3))
    found = rs.lipschitz_bound(model, torch.zeros(1, 1300), 1e-7)
    assert found.failure_probability == pytest.approx(2e-7)


def test_a_layer_applied_twice_fails_only_once() -> None:
    model = Call(lambda m, x: m.f(F.relu(m.f(x))), f=nn.Linear(1300, 1300))
    assert rs.lipschitz_bound(model, torch.zeros(1, 1300), 1e-7).failure_probability == 1e-7


def test_deterministic_bounds_only_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    found = rs.lipschitz_bound(model, torch.zeros(1, 3, 24, 24), 0.0)
    assert found.failure_probability == 0 and math.isfinite(found.value)


@pytest.mark.parametrize("pooled", [False, True], ids=["dense", "pooled and dense"])
def test_pairs_of_outputs_have_the_constant_of_their_difference(pooled: bool) -> None:
    head = (
        nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
        if pooled
        else nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    )
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), *head))
    pairs, features = bound(model, 2, 4, 4).pairs, norm(model[0], (2, 4, 4))
    weight = dense(nn.Sequential(*model[2:]), (3, 4, 4))
    wanted = features * (weight[:, None] - weight[None]).norm(dim=2)
    assert pairs is not None and bool((pairs >= wanted * (1 - 1e-15)).all())
    torch.testing.assert_close(pairs, wanted, rtol=1e-6, atol=1e-5)
    assert float(pairs.max()) <= math.sqrt(2) * bound(model, 2, 4, 4).value * (1 + 1e-9)


def test_a_network_that_does_not_end_in_a_linear_layer_has_no_pairs() -> None:
    assert bound(seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU())), 4).pairs is None


GATED = {
    "gate": (Call(lambda m, x: x * torch.sigmoid(x)), (6,)),
    "product": (Call(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(6, 4), b=nn.Linear(6, 4)), (6,)),
    "squeeze and excite": (Call(lambda m, x: x * torch.sigmoid(m.f(x.mean((2, 3), keepdim=True))), f=nn.Conv2d(3, 3, 1)),
                           (3, 4, 4)),
    "attention": (Call(lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), x), q=nn.Linear(4, 4),
                       k=nn.Linear(4, 4)), (5, 4)),
    "attention by hand": (Call(lambda m, x: torch.softmax(m.q(x) @ x.transpose(1, 2), -1) @ x, q=nn.Linear(4, 4)), (5, 4)),
    "normalised by hand": (Call(lambda m, x: x * torch.rsqrt(x.var(-1, keepdim=True) + 0.5)), (6,)),
    "root mean square by hand": (Call(lambda m, x: x / (x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt()), (6,)),
    "square": (Call(lambda m, x: torch.square(m.f(x)), f=nn.Linear(4, 4)), (4,)),
    "quotient": (Call(lambda m, x: m.f(x) / (1 + torch.relu(m.f(x))), f=nn.Linear(4, 4)), (4,)),
    "one matrix for many": (Call(lambda m, x: x @ x.mean(1, keepdim=True)), (3, 4, 4)),
    "products by names": (Call(lambda m, x: torch.einsum("bij,bkj->bik", m.q(x), x), q=nn.Linear(4, 4)), (5, 4)),
    "negative weights": (Call(lambda m, x: m.f(x) * m.f(x), f=nn.Linear(4, 4)), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("model, shape", GATED.values(), ids=GATED)
def test_what_has_a_constant_on_a_box_only_has_a_local_bound(model: nn.Module, shape: tuple[int, ...]) -> None:
    model = model.double().eval()
    found = bound(model, *shape)
    assert found.value == math.inf and math.isfinite(found.local) and found.reason is not None
    x, y = torch.rand(2, 64, *shape, dtype=torch.float64)
    corners = x.round()
    largest = max(*(gain(model, a, b) for a, b in ((x, y), (corners, y), (corners, corners.flip(0)))),
                  *(jacobian_norm(model, point) for point in torch.cat([x[:8], corners[:8]])))  # fmt: skip
    assert largest <= found.local <= 200 * largest


def test_branches_on_sizes_are_taken_and_branches_on_values_are_not() -> None:
    def by_size(m: nn.Module, x: Tensor) -> Tensor:
        batch, _ = x.shape
        return 2 * x if x.shape[1] == 4 and x.size(0) == batch and len(x) > 0 else x

    assert bound(Call(by_size), 4).value == pytest.approx(2, rel=1e-12)
    found = bound(Branching(), 4)
    assert found.value == math.inf and "cannot trace" in str(found.reason)


def test_affine_layers_in_a_row_are_bounded_as_one() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3)))
    whole = float(torch.linalg.matrix_norm(dense(model, (6,)), 2))
    assert whole * (1 - 1e-12) <= bound(model, 6).value <= whole * (1 + 1e-9)


def naive(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Of a chain of residual blocks: every layer apart, 1 + the branch at each sum."""
    total = 1.0
    for block in model:
        alone = norm(block.conv, shape) * float(norm(block.bn, (*shape[:1], 1, 1)))
        total *= 1 + alone
    return total


def test_on_a_residual_network_the_bound_is_far_below_that_of_the_layers_apart() -> None:
    model = seeded(lambda: nn.Sequential(*(Residual(6) for _ in range(6))))
    assert bound(model, 6, 5, 5).value <= naive(model, (6, 5, 5)) / 2


def test_the_local_bound_is_never_above_the_global_one() -> None:
    found = bound(seeded(NETWORKS["dense"][0]), 6)
    assert found.local <= found.value


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.PReLU(4), nn.BatchNorm1d(4)], ids=lambda layer: type(layer).__name__)
def test_a_weight_that_is_not_finite_is_an_error(layer: nn.Module) -> None:
    nn.init.constant_(layer.weight, math.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        rs.lipschitz_bound(nn.Sequential(layer), torch.zeros(2, 4))


def test_an_input_that_the_model_does_not_take_is_an_error() -> None:
    with pytest.raises(ValueError):
        rs.lipschitz_bound(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 5))


def test_an_image_without_a_batch_axis_is_told_from_a_batch() -> None:
    with pytest.raises(ValueError, match=r"a batch \(n, ...\) of shape \(1, 8, 8\), .* the first input twice"):
        rs.lipschitz_bound(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.zeros(1, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_has_no_bound_and_the_reason_says_what_has(dtype: torch.dtype) -> None:
    found = rs.lipschitz_bound(nn.Sequential(nn.Linear(4, 3)).to(dtype), torch.zeros(1, 4, dtype=dtype), box=None)
    assert math.isinf(found.value) and found.reason is not None and found.reason.endswith("use model.float()")
    assert found.errors == {} and found.errors_reason is not None


def test_a_bound_is_shown_on_one_line(convnet: nn.Module, images: Tensor) -> None:
    found = rs.lipschitz_bound(convnet, images, box=None)
    assert found.pairs is not None
    smallest = min(float(found.pairs[i, j]) for i in range(5) for j in range(5) if i != j)
    assert repr(found) == f"LipschitzBound(value={found.value}, local={found.value}, smallest pair={smallest}, reason=None)"
    assert repr(rs.LipschitzBound(math.inf, reason="so")) == "LipschitzBound(value=inf, local=inf, reason='so')"


def test_the_model_and_the_example_are_left_as_they_were(convnet: nn.Module, images: Tensor) -> None:
    convnet.train()
    convnet[1].eval()
    before, modes, random, example = (
        snapshot(convnet), [part.training for part in convnet.modules()], torch.get_rng_state(), images.clone(),
    )  # fmt: skip
    found = rs.lipschitz_bound(convnet, images, box=None)
    estimate = rs.lipschitz_estimate(convnet, images)
    assert 0 < estimate <= found.value < math.inf
    assert same_bits(before, snapshot(convnet))
    assert [part.training for part in convnet.modules()] == modes
    assert torch.equal(random, torch.get_rng_state()) and torch.equal(example, images)
    assert all(parameter.grad is None for parameter in convnet.parameters())


def test_only_the_shape_of_the_example_matters(convnet: nn.Module, images: Tensor) -> None:
    assert rs.lipschitz_bound(convnet, images, box=None).value == rs.lipschitz_bound(convnet, torch.zeros(5, 3, 8, 8)).value


def test_an_example_that_leaves_the_box_is_warned_of(convnet: nn.Module, images: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"box=\(0, 1\).*values from 0 to 255"):
        rs.lipschitz_bound(convnet, torch.linspace(0, 255, 192).reshape(1, 3, 8, 8))
    rs.lipschitz_bound(convnet, images, box=(-9.0, 9.0))


def test_the_estimate_is_the_largest_jacobian_norm() -> None:
    model = seeded(NETWORKS["gelu"][0])
    x = torch.randn(5, 6, dtype=torch.float64)
    assert rs.lipschitz_estimate(model, x) == pytest.approx(max(jacobian_norm(model, point) for point in x), rel=1e-9)


def test_the_estimate_of_a_linear_network_is_its_norm() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    assert rs.lipschitz_estimate(model, torch.zeros(1, 5, dtype=torch.float64)) == pytest.approx(norm(model, (5,)), rel=1e-9)


def test_the_bound_of_a_timm_resnet_is_finite_and_above_its_estimate() -> None:
    model = timm.create_model("test_resnet", pretrained=False, num_classes=4)
    images = torch.rand(3, 3, 16, 16)
    found = rs.lipschitz_bound(model, images)
    assert found.reason is None
    assert 0 < rs.lipschitz_estimate(model, images) <= found.value < math.inf


def test_clipping_a_network_lowers_its_bound(convnet: nn.Module, images: Tensor) -> None:
    rs.FastClip(convnet, images, max_norm=1.0).finish()
    found = rs.lipschitz_bound(convnet, images, box=None)
    assert found.value <= 1.001**3
    assert rs.lipschitz_estimate(convnet, images) <= found.value
