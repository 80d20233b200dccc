"""Networks with known counterexamples: no certified radius reaches the nearest of them."""

import copy
import random

import pytest
import torch
from generated_graphs import Network, network
from torch import Tensor, nn

import robust_spectral as rs

SHAPE = (2, 4, 4)


def scores(net: Network, x: Tensor) -> Tensor:
    """The network's first outputs as scores of classes."""
    with torch.no_grad():
        return net(x).flatten(1)


def boundary(net: Network, x: Tensor, other: Tensor, halvings: int = 50) -> Tensor:
    """A point just beyond where the class changes on the way from x to another, which has another class."""
    label, near, far = scores(net, x).argmax(1), x, other
    for _ in range(halvings):
        middle = (near + far) / 2
        if bool(scores(net, middle).argmax(1) == label):
            near = middle
        else:
            far = middle
    return far


class Scores(nn.Module):
    """A network whose outputs are flattened."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).flatten(1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:certified_radius. rounding")  # rounding leaves some of these networks no radius
@pytest.mark.parametrize("seed", range(100))
def test_no_radius_reaches_a_point_of_another_class(seed: int) -> None:
    net = network(random.Random(seed))
    points = torch.rand(24, *SHAPE, dtype=torch.float64)
    labels = scores(net, points).argmax(1)
    bound = rs.lipschitz_bound(Scores(net), points[:1])
    radii = rs.certified_radius(scores(net, points), labels, bound)
    for i in range(6):
        for j in (labels != labels[i]).nonzero()[:, 0].tolist()[:4]:
            found = boundary(net, points[i : i + 1], points[j : j + 1])
            assert float(radii[i]) < float((found - points[i]).norm())


def thresholds(gap: float, offset: float, seed: int) -> tuple[nn.Sequential, Tensor]:
    """A linear classifier that adds and subtracts a large offset, and an input at distance ``gap`` from its boundary."""
    torch.manual_seed(seed)
    normal = torch.randn(32)
    normal = normal / normal.norm()
    first, last = nn.Linear(32, 2), nn.Linear(2, 2)
    x = 0.5 + 0.1 * torch.rand(1, 32)
    with torch.no_grad():
        first.weight.copy_(torch.stack([normal, -normal]))
        first.bias.copy_(torch.stack([gap - x[0] @ normal, x[0] @ normal - gap]) + offset)
        last.weight.copy_(torch.eye(2))
        last.bias.fill_(-offset)
    return nn.Sequential(first, last).eval(), x


@pytest.mark.filterwarnings("ignore:certified_radius. rounding")  # rounding leaves some of these networks no radius
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_no_radius_reaches_a_point_that_rounding_gives_another_class(seed: int, dtype: torch.dtype) -> None:
    """Counterexamples of the floating-point forward pass only: the offset cancels the last digits of the scores."""
    net, x = thresholds(gap=0.02 + 0.002 * seed, offset=2.0 ** (10 + seed % 12), seed=seed)
    bound = rs.lipschitz_bound(net, x)
    net, x = copy.deepcopy(net).to(dtype), x.to(dtype)
    with torch.no_grad():
        logits = net(x)
        label = logits.argmax(1)
        radius = float(rs.certified_radius(logits, label, bound))
        direction = net[0].weight[1] - net[0].weight[0]  # type: ignore[union-attr, operator]
        steps = torch.linspace(0, 1, 4001, dtype=dtype)[:, None]
        path = x + 0.12 * steps * direction / direction.norm()
        path = torch.cat([path, path * (1 + 4 * torch.finfo(dtype).eps * torch.randn(len(path), 32, dtype=dtype))])
        ahead = net(path) @ (2 * nn.functional.one_hot(label, 2).to(dtype) - 1).T
        broken = path[(ahead[:, 0] <= 0) & (path - x).ne(0).any(1)]  # tied scores are no prediction either
    assert len(broken)
    assert radius < float((broken.double() - x.double()).norm(dim=1).min())
