"""Networks given by functions, and the proved bound and largest sampled gain of a network."""

from collections.abc import Callable
from typing import Any

import torch
from reference import gain, jacobian_norm
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
    """Largest sampled gain: Jacobians at random points, and finite differences short and long."""
    model = model.double().eval()
    x, direction = torch.randn(2, 16, *shape, dtype=torch.float64)
    gains = [gain(model, size * x, size * x + step * direction) for size in (0.1, 1, 10) for step in (1e-3, 1.0)]
    return max(*gains, *(jacobian_norm(model, point) for point in x[:4]))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build().double().eval()


class Scaled(torch.autograd.Function):
    """A product with a number, and with another one backwards: a gradient that need not be the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, backwards: float) -> Tensor:
        ctx.backwards = backwards
        return factor * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backwards * gradient, None, None


def of(function: Callable[..., Any], **parts: nn.Module | Tensor) -> Callable[[], nn.Module]:
    return lambda: Call(function, **parts)


def bounded(model: nn.Module, *shape: int) -> rs.LipschitzBound:
    """The bound of a model in eval mode as it is, in float64."""
    return rs.lipschitz_bound(model, torch.zeros(1, *shape, dtype=torch.float64))
