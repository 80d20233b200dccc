"""Rounding errors of a forward pass: never above their bound, subtracted from margins, and infinite where unknown."""

import copy
import math
from collections.abc import Callable

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robust_spectral as rs
import robust_spectral.plugins.timm

SHAPE = (4, 8, 8)


class Of(nn.Module):
    """A function after a convolution, so that its input is already rounded."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


class Branches(nn.Module):
    """A residual block, in place, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y += x
        return torch.cat([y, self.second(y)], 1).mean((2, 3))


def trained_like(batchnorm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    with torch.no_grad():
        for tensor in (batchnorm.running_mean, batchnorm.bias):
            assert tensor is not None
            tensor.normal_()
        for tensor in (batchnorm.running_var, batchnorm.weight):
            assert tensor is not None
            tensor.uniform_(0.2, 2.0)
    return batchnorm


def slanted(norm: nn.Module) -> nn.Module:
    """Give a normalisation random weights and offsets."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    "conv": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.GELU(), nn.Conv2d(8, 4, 3, padding=1)),
    "circular": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.SiLU(), nn.MaxPool2d(3, 1)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 3, 3, 2), nn.Tanh(), nn.AvgPool2d(2)),
    "batchnorm": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3), trained_like(nn.BatchNorm2d(6)), nn.Softplus(threshold=40), nn.Flatten()
    ),
    "pools": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2), nn.MaxPool2d(2, 1), nn.AdaptiveAvgPool2d(1)),
    "slopes": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.LeakyReLU(0.3), nn.Conv2d(6, 6, 1), nn.PReLU(), nn.ELU()),
    "branches": Branches,
    "factors": lambda: Of(lambda x: (x - 0.3) * 1.7 / 0.9 + torch.sigmoid(x)),
    "parts": lambda: Of(lambda x: torch.sub(x.chunk(2, 1)[0], x[:, 3:].flip(1), alpha=3).flatten(1)),
    "sums": lambda: Of(lambda x: x.sum((2, 3)) + F.avg_pool2d(x, 2).amax((2, 3))),
    "padded": lambda: Of(lambda x: F.hardswish(F.pad(x, (1, 2), value=5.0).permute(0, 2, 3, 1))),
    "group norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), slanted(nn.GroupNorm(2, 6, eps=0.1)), nn.Flatten()),
    "layer norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), slanted(nn.LayerNorm((6, 6), eps=0.1)), nn.ReLU()),
    "instance norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, eps=0.1), nn.ReLU()),
    "root mean square": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), slanted(nn.RMSNorm((6, 6), eps=0.1))),
    "softmax": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Softmax(1)),
    "timm": lambda: nn.Sequential(
        timm.layers.Conv2dSame(4, 6, 3, 2),
        trained_like(timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU)),
        timm.layers.DropPath(),
    ),
}


def points(count: int) -> Tensor:
    """Inputs in the box, half of them corners."""
    inside = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    inside[::2] = inside[::2].round()
    return inside


def measured(net: nn.Module, x: Tensor) -> float:
    """Largest distance between the outputs in float32 and in float64."""
    with torch.no_grad():
        return float((net(x).double() - copy.deepcopy(net).double()(x.double())).flatten(1).norm(dim=1).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_of_a_float32_forward_pass_is_at_most_its_bound(name: str) -> None:
    torch.manual_seed(1)
    net = NETWORKS[name]().eval()
    found = rs.lipschitz_bound(net, torch.zeros(1, *SHAPE))
    assert found.errors_reason is None
    assert 0 < measured(net, points(32)) <= found.errors[torch.float32] < 0.1
    assert found.errors[torch.float64] <= 3e-9 * found.errors[torch.float32]


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(1, 4, eps=1e-3), nn.LayerNorm((4, 8, 8), eps=1e-3), nn.InstanceNorm2d(4, eps=1e-3)]
)
def test_the_error_bound_holds_where_a_variance_cancels(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    nn.init.constant_(model[0].bias, 30.0)  # type: ignore[arg-type]
    found = rs.lipschitz_bound(model, torch.zeros(1, *SHAPE)).errors[torch.float32]
    assert 1e-5 < measured(model, points(16)) <= found


def test_the_error_bound_holds_for_a_worst_case_sum() -> None:
    """A large number followed by many small ones, each of which a sequential sum loses."""
    size = 4096
    net = nn.Sequential(nn.Flatten(), nn.Linear(size, 1, bias=False))
    with torch.no_grad():
        net[1].weight.fill_(2.0**-25)  # type: ignore[union-attr]
        net[1].weight[0, 0] = 1.0  # type: ignore[union-attr, index]
    x = torch.ones(1, 1, 64, 64)
    found = rs.lipschitz_bound(net, x).errors[torch.float32]
    one_by_one = torch.zeros(())
    for weight in net[1].weight.detach()[0]:  # type: ignore[union-attr]
        one_by_one = one_by_one + weight
    assert 1.2e-4 < abs(float(one_by_one) - (1 + (size - 1) * 2.0**-25)) <= found


def test_operations_that_only_select_and_compare_values_do_not_round() -> None:
    net = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout())
    assert rs.lipschitz_bound(net, torch.zeros(1, *SHAPE)).errors[torch.float32] < 1e-280


def test_the_error_grows_with_the_box() -> None:
    net = NETWORKS["dense"]().eval()
    small, large = (rs.lipschitz_bound(net, torch.zeros(1, *SHAPE), box=(0.0, side)).errors[torch.float32] for side in (1, 100))
    assert 10 * small < large < 200 * small


def test_an_operation_of_unknown_rounding_gives_an_infinite_error_and_radius_zero() -> None:
    found = rs.lipschitz_bound(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Flatten()), torch.zeros(1, *SHAPE)
    )
    assert math.isfinite(found.value) and math.isinf(found.errors[torch.float32])
    assert found.reason is None and "upsample_bilinear2d rounds (at '1', Upsample)" in str(found.errors_reason)
    with pytest.warns(UserWarning, match=r"rounding of float32 \(of unknown size\) .* how upsample_bilinear2d rounds"):
        assert float(rs.certified_radius(torch.tensor([[9.0, 0.0]]), torch.tensor([0]), found)) == 0


def test_a_box_that_is_empty_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"box=\(1.0, 0.0\)"):
        rs.lipschitz_bound(nn.Flatten(), torch.zeros(1, *SHAPE), box=(1.0, 0.0))


def test_without_a_box_rounding_errors_are_not_bounded() -> None:
    assert rs.lipschitz_bound(NETWORKS["dense"](), torch.zeros(1, *SHAPE), box=None).errors == {}


def rounding_away(size: int = 64) -> nn.Module:
    """Scores that lose the input in float32: a large offset is added and subtracted."""
    offset, back = nn.Linear(size, 2), nn.Linear(2, 2)
    with torch.no_grad():
        offset.weight.copy_(torch.stack([torch.ones(size), -torch.ones(size)]) / size)
        offset.bias.fill_(2.0**25)
        back.weight.copy_(torch.eye(2))
        back.bias.fill_(-(2.0**25))
    return nn.Sequential(nn.Flatten(), offset, back).eval()


def test_a_margin_within_the_rounding_error_of_float32_is_certified_in_float64_only() -> None:
    net, x = rounding_away(), torch.full((1, 1, 8, 8), 0.9)
    found = rs.lipschitz_bound(net, x)
    label = torch.tensor([0])
    assert float(rs.certified_radius(net(x), label, found)) == 0
    exact = copy.deepcopy(net).double()(x.double())
    radius = float(rs.certified_radius(exact, label, found))
    assert 0.9 * 0.9 * 8 < radius <= 0.9 * 8  # the distance to the boundary, where all pixels are 0


def test_the_errors_of_both_forward_passes_are_subtracted_from_the_margin() -> None:
    bound = rs.LipschitzBound(1.0, errors={torch.float32: 0.1, torch.float64: 0.0})
    logits, label = torch.tensor([[3.0, 1.0]]), torch.tensor([0])
    assert float(rs.certified_radius(logits, label, bound)) == pytest.approx((2 - 2 * math.sqrt(2) * 0.1) / math.sqrt(2))
    assert float(rs.certified_radius(logits.double(), label, bound)) == pytest.approx(math.sqrt(2))


def test_rounding_errors_that_exceed_every_margin_give_a_warning() -> None:
    bound = rs.LipschitzBound(1.0, errors={torch.float32: 10.0, torch.float64: 0.0})
    logits, labels = torch.tensor([[3.0, 1.0], [0.0, 9.0]]), torch.tensor([0, 0])
    with pytest.warns(UserWarning, match=r"rounding of float32 \(28.3 logits\) exceeds every margin; .* model.double\(\)"):
        assert not rs.certified_radius(logits, labels, bound).any()
    rs.certified_radius(logits[1:], labels[1:], bound)  # misclassified, so rounding is not the reason
    rs.certified_radius(torch.tensor([[3.0, 1.0], [50.0, 1.0]]), labels, bound)  # one image keeps a radius
    assert float(rs.certified_radius(logits.double(), labels, bound)[0]) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="prove nothing"):
        rs.certified_radius(torch.tensor([[1.0, 0.0]], dtype=dtype), torch.tensor([0]), rs.LipschitzBound(1.0))


def test_logits_under_autocast_are_refused() -> None:
    with torch.autocast("cpu"), pytest.raises(TypeError, match="under autocast"):
        rs.certified_radius(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), rs.LipschitzBound(1.0))
