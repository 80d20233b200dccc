"""Small networks with logits, the local walk of a network, and the smallest margin that a search finds around an image."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from networks import Call, seeded
from torch import Tensor, nn

from robust_spectral.certificates.forms import written_out
from robust_spectral.certificates.local_walk import LocalWalk
from robust_spectral.lipschitz import graph_of, preserved

Build = Callable[[], nn.Module]


def walk_of(
    model: nn.Module, images: Tensor, radii: Tensor, low: Tensor | float, high: Tensor | float,
    kind: type[LocalWalk] = LocalWalk,
) -> LocalWalk:  # fmt: skip
    """The local walk of a float64 model, after its run; the box may differ by image and element."""
    box = tuple(torch.as_tensor(end, dtype=torch.float64).expand_as(images) for end in (low, high))
    with torch.no_grad(), preserved(model):
        graph = graph_of(model, images, written_out)
        walk = kind(graph, graph.values(images), radii, box, 1e-13)
        walk.run()
    return walk


def smallest_margins(
    model: nn.Module, images: Tensor, labels: Tensor, radius: float | Tensor, box: tuple[float, float] | None = (0.0, 1.0),
    restarts: int = 4, steps: int = 30,
) -> Tensor:  # fmt: skip
    """The smallest margins that normalised gradient steps find in the ball and the box, (n,)."""
    low, high = box or (-math.inf, math.inf)
    radii = torch.as_tensor(radius, dtype=images.dtype).expand(len(images))
    wide = radii.reshape(-1, *[1] * (images.ndim - 1))
    best = torch.full((len(images),), math.inf, dtype=images.dtype)
    for restart in range(restarts):
        moved = step_of(torch.randn_like(images), wide) if restart else torch.zeros_like(images)
        for step in range(steps + 1):
            moved = ((images + moved).clamp(low, high) - images).requires_grad_()
            scores = model(images + moved)
            own = scores.gather(1, labels[:, None])
            margins = (own - scores.scatter(1, labels[:, None], -math.inf)).amin(1)
            best = torch.minimum(best, margins.detach())
            (slope,) = torch.autograd.grad(margins.sum(), moved)
            moved = moved.detach() - step_of(slope, wide * 2 * (1 - step / (steps + 1)))
            moved = moved * (wide / length(moved).clamp_min(1e-300)).clamp_max(1.0)
    return best


def length(moved: Tensor) -> Tensor:
    return moved.flatten(1).norm(dim=1).reshape(-1, *[1] * (moved.ndim - 1))


def step_of(direction: Tensor, size: Tensor) -> Tensor:
    return direction / length(direction).clamp_min(1e-300) * size


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


def head(features: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 4))


def running(norm: Any) -> nn.Module:
    nn.init.uniform_(norm.running_var, 0.2, 2.0)
    nn.init.normal_(norm.running_mean, 0.0, 0.3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def maxmin(m: nn.Module, x: Tensor) -> Tensor:
    first, second = m.a(x.flatten(1)).chunk(2, 1)
    return m.b(torch.cat([torch.maximum(first, second), torch.minimum(first, second)], 1))


def attended(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(2).mT
    query, key, value = m.qkv(tokens).chunk(3, -1)
    return m.out((tokens + m.up(F.scaled_dot_product_attention(query, key, value))).mean(1))


def gated(m: nn.Module, x: Tensor) -> Tensor:
    y = F.silu(m.c(x))
    return m.h(y * torch.sigmoid(m.e(F.relu(m.s(y.mean((2, 3), keepdim=True))))))


def residual(m: nn.Module, x: Tensor) -> Tensor:
    y = m.c(x).relu()
    y = F.max_pool2d(y + m.d(y).relu(), 2)
    return m.h(y)


NETWORKS: dict[str, Build] = {  # on images (2, 4, 4), with 4 classes
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)),
    "convolutions": lambda: nn.Sequential(conv(2, 4), nn.LeakyReLU(), conv(4, 4, 2), nn.ReLU(), head(16)),
    "residual": lambda: Call(residual, c=conv(2, 3), d=conv(3, 3), h=head(12)),
    "max-pool": lambda: nn.Sequential(conv(2, 4), nn.MaxPool2d(3, 2, 1), nn.ReLU(), head(16)),
    "max-pool without a ReLU": lambda: nn.Sequential(conv(2, 4), nn.MaxPool2d(3, 1, 1), head(64)),
    "batch norm": lambda: nn.Sequential(conv(2, 4), running(nn.BatchNorm2d(4)), nn.ReLU(), conv(4, 4), nn.AvgPool2d(2),
                                        running(nn.BatchNorm2d(4)), nn.ReLU(), head(16)),
    "GELU": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 9), nn.GELU(), nn.Linear(9, 8), nn.GELU("tanh"), nn.Linear(8, 4)),
    "gates": lambda: Call(gated, c=conv(2, 4), s=nn.Conv2d(4, 2, 1), e=nn.Conv2d(2, 4, 1), h=head(64)),
    "attention": lambda: Call(attended, qkv=nn.Linear(2, 12), up=nn.Linear(4, 2), out=nn.Linear(2, 4)),
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)),
    "softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.Softmax(1), nn.Linear(6, 4)),
    "MaxMin": lambda: Call(maxmin, a=nn.Linear(32, 10), b=nn.Linear(10, 4)),
    "two branches": lambda: Call(lambda m, x: m.h(torch.cat([m.c(x).tanh(), F.softplus(m.d(x))], 1)),
                                 c=conv(2, 2), d=conv(2, 2), h=head(64)),
}  # fmt: skip


def network(name: str, sharper: float = 2.0) -> nn.Module:
    """A network of the table in float64 and eval mode, with larger weights than the initial ones, which are nearly linear."""
    model = seeded(NETWORKS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharper)
    return model


def some_images(model: nn.Module, count: int = 4) -> tuple[Tensor, Tensor]:
    """Images with a fifth of their pixels at the ends of the box, and the classes that the model predicts."""
    generator = torch.Generator().manual_seed(3)
    images = (torch.rand(count, 2, 4, 4, dtype=torch.float64, generator=generator) * 1.25 - 0.125).clamp(0, 1)
    return images, model(images).argmax(1)
