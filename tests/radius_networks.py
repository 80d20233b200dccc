"""Networks of several families, trained for a short time on digits of 8 by 8 pixels, around whose images radii are proved."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from local_networks import conv, maxmin
from networks import Call
from torch import Tensor, nn

from robust_spectral.evaluations.data import load_data

Build = Callable[[], nn.Module]


def dense(activation: Build, *widths: int, norm: Callable[[int], nn.Module] | None = None) -> Build:
    """Dense layers with an activation behind each but the last."""

    def build() -> nn.Module:
        parts: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip((64, *widths[:-1]), widths, strict=True):
            parts += [nn.Linear(inputs, outputs), *([norm(outputs)] if norm else []), activation()]
        return nn.Sequential(*parts, nn.Linear(widths[-1], 10))

    return build


def plain(*parts: Build) -> Build:
    """Parts in a row, with a dense layer at the end."""
    return lambda: nn.Sequential(*(part() for part in parts), nn.Flatten(), nn.LazyLinear(10))


def first(stride: int = 2) -> Build:
    return lambda: conv(1, 4, stride)


def second() -> nn.Module:
    return conv(4, 4)


def residual(m: nn.Module, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    y = F.relu(y + m.c(F.relu(m.b(y))))
    return m.head(y.flatten(1))


def excited(m: nn.Module, x: Tensor) -> Tensor:
    y = F.silu(m.a(x))
    y = y * torch.sigmoid(m.up(F.silu(m.down(y.mean((2, 3), keepdim=True)))))
    return m.head(y.flatten(1))


def attended(m: nn.Module, x: Tensor) -> Tensor:
    tokens = m.a(x).flatten(2).mT
    query, key, value = m.qkv(m.norm(tokens)).chunk(3, -1)
    tokens = tokens + m.up(F.scaled_dot_product_attention(query, key, value))
    return m.head(tokens.flatten(1))


def feedforward(m: nn.Module, x: Tensor) -> Tensor:
    tokens = m.a(x).flatten(2).mT
    tokens = tokens + m.down(F.gelu(m.up(m.norm(tokens))))
    return m.head(tokens.flatten(1))


def branches(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(torch.cat([F.relu(m.a(x)), torch.tanh(m.b(x)), F.avg_pool2d(x, 2)], 1).flatten(1))


def patches() -> nn.Module:
    return nn.Conv2d(1, 4, 2, 2)


def residual_of(norm: Callable[[], nn.Module]) -> Build:
    def part(layer: nn.Module) -> nn.Module:
        return nn.Sequential(layer, norm())

    return lambda: Call(residual, a=part(conv(1, 4, 2)), b=part(conv(4, 4)), c=part(conv(4, 4)), head=nn.Linear(64, 10))


FAMILIES: dict[str, Build] = {
    "affine": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "dense, ReLU": dense(nn.ReLU, 32, 32),
    "dense, leaky ReLU": dense(nn.LeakyReLU, 24, 24, 24),
    "dense, GELU": dense(nn.GELU, 24, 24),
    "dense, SiLU": dense(nn.SiLU, 24, 24),
    "dense, tanh": dense(nn.Tanh, 24, 24),
    "dense, ELU": dense(nn.ELU, 24),
    "dense, layer norm": dense(nn.ReLU, 24, norm=nn.LayerNorm),
    "MaxMin": lambda: nn.Sequential(nn.Flatten(), Call(maxmin, a=nn.Linear(64, 32), b=nn.Linear(32, 10))),
    "convolutions": plain(first(), nn.ReLU, second, nn.ReLU),
    "convolutions, Mish": plain(first(), nn.Mish, second, nn.Mish),
    "convolutions, hard-swish": plain(first(), nn.Hardswish),
    "batch norm": plain(first(), lambda: nn.BatchNorm2d(4), nn.ReLU, second, lambda: nn.BatchNorm2d(4), nn.ReLU),
    "group norm": plain(first(), lambda: nn.GroupNorm(2, 4), nn.ReLU),
    "average-pool": plain(first(1), nn.ReLU, lambda: nn.AvgPool2d(2), second, nn.SiLU),
    "max-pool": plain(first(1), nn.ReLU, lambda: nn.MaxPool2d(2), second, nn.ReLU),
    "max-pool, overlapping": plain(first(1), lambda: nn.MaxPool2d(3, 2, 1)),
    "residual": residual_of(nn.Identity),
    "residual, batch norm": residual_of(lambda: nn.BatchNorm2d(4)),
    "two branches": lambda: Call(branches, a=conv(1, 3, 2), b=conv(1, 3, 2), head=nn.Linear(112, 10)),
    "squeeze-excite": lambda: Call(excited, a=conv(1, 4, 2), down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1),
                                   head=nn.Linear(64, 10)),
    "gated units": plain(lambda: conv(1, 8, 2), lambda: nn.GLU(1)),
    "attention": lambda: Call(attended, a=patches(), norm=nn.Identity(), qkv=nn.Linear(4, 12), up=nn.Linear(4, 4),
                              head=nn.Linear(64, 10)),
    "transformer feed-forward": lambda: Call(feedforward, a=patches(), norm=nn.RMSNorm(4, eps=1e-2), up=nn.Linear(4, 12),
                                             down=nn.Linear(12, 4), head=nn.Linear(64, 10)),
}  # fmt: skip


def trained(name: str, count: int, steps: int = 150) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of a family after a short training, in float32 or, every second one, float64; digits, and their labels.

    The digits are test images, and behind these training images.
    """
    data = load_data("digits")
    (images, labels), (tests, test_labels) = data.train.tensors, data.test.tensors  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(list(FAMILIES).index(name))
        model = FAMILIES[name]()
        model(images[:2])  # which makes lazy layers
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        for _ in range(steps):
            some = torch.randint(len(images), (128,))
            noisy = (images[some] + 0.1 * torch.randn_like(images[some])).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(noisy), labels[some], label_smoothing=0.05).backward()
            optimizer.step()
    dtype = torch.float32 if list(FAMILIES).index(name) % 2 == 0 else torch.float64
    return model.to(dtype).eval(), torch.cat([tests, images])[:count].to(dtype), torch.cat([test_labels, labels])[:count]
