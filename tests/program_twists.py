"""Programs under construction, and steps that a tracer may see wrongly: questions, branches, memory, randomness, detours.

Each step computes what Python computes when it runs, and a tracer may record something else: one branch of two, an answer that
only a tracer gets, or the values of one call.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from networks import Call
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass
class Draft:
    """A program under construction: the shape of its last value without the batch axis, its parts, and coarse roundings."""

    draw: random.Random
    shape: Shape
    parts: list[nn.Module] = field(default_factory=list)
    rounding: float = 0.0  # relative error of the casts to a narrower type
    everywhere: list[Callable[[], Any]] = field(default_factory=list)  # each registers a hook on all modules

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())


class Twist(NamedTuple):
    """A way to change a program: the place where it goes, and the function that makes it."""

    place: str
    make: Callable[..., Any]


def step(place: str, function: Callable[..., Any], rounding: float = 0.0, **parts: Callable[[Draft], Any]) -> Twist:
    """A twist that is one more step, given by a function and by the modules and tensors that it uses."""

    def make(draft: Draft) -> nn.Module:
        draft.rounding += rounding
        return Call(function, **{name: part(draft) for name, part in parts.items()})

    return Twist(place, make)


def square(draft: Draft) -> nn.Module:
    return nn.Linear(draft.size, draft.size)


def matrix(draft: Draft) -> Tensor:
    return torch.randn(draft.size, draft.size) / draft.size**0.5


GUARDS = [
    step("any", lambda self, x: 20 * x if isinstance(x, Tensor) else x),
    step("any", lambda self, x: 20 * x if torch.is_tensor(x) else x),
    step("any", lambda self, x: 20 * x if isinstance(x, torch.Tensor) and x.is_floating_point() else x),
    step("any", lambda self, x: 20 * x if x.dtype == torch.float32 else x / 2),
    step("any", lambda self, x: 20 * x if x.device.type == "cpu" and x.ndim > 1 else x),
]
TRACERS = [
    step("any", lambda self, x: 20 * x if type(x) in (Tensor, nn.Parameter) else x),
    step("any", lambda self, x: x if torch.compiler.is_compiling() else 20 * x),
    step("any", lambda self, x: x if torch.compiler.is_exporting() else 20 * x),
    step("any", lambda self, x: x if torch.jit.is_tracing() else 20 * x),
    step("any", lambda self, x: x if type(x).__name__ in ("FakeTensor", "Proxy", "FunctionalTensor") else 20 * x),
]
BATCHES = [
    step("any", lambda self, x: 20 * x if x.shape[0] == 1 else x),
    step("any", lambda self, x: 20 * x if x.shape[0] > 2 else x),
    step("any", lambda self, x: 20 * x if len(x) % 2 else x),
    step("any", lambda self, x: x if x.size(0) % 2 else 20 * x),
    step("any", lambda self, x: 10 * x.shape[0] * x),
    step("any", lambda self, x: 40 * x / x.shape[0]),
]
GRADIENTS = [
    step("any", lambda self, x: 20 * x if torch.is_grad_enabled() else x),
    step("any", lambda self, x: x if torch.is_grad_enabled() else 20 * x),
    step("any", lambda self, x: 20 * x if x.requires_grad else x),
    step("flat", lambda self, x: 20 * self.fc(x) if self.fc(x).requires_grad else self.fc(x), fc=square),
]
TRAINING = [
    step("any", lambda self, x: 20 * x if self.training else x),
    step("any", lambda self, x: x if self.training else 20 * x),
    step("any", lambda self, x: F.dropout(x, 0.5, self.training)),
]


def counted(limit: int, after: float) -> Twist:
    def function(self: Any, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return after * x if self.calls > limit else x

    return step("any", function)


def counted_outside(draft: Draft) -> nn.Module:
    calls = itertools.count()
    return Call(lambda self, x: 20 * x if next(calls) > 9 else x)


def alternating(self: Any, x: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return 20 * x if self.calls % 2 else x


def with_momentum(self: Any, x: Tensor) -> Tensor:
    last, self.last = getattr(self, "last", None), x.detach()
    return x if last is None or last.shape != x.shape else x - 20 * last


def remembered(self: Any, x: Tensor) -> Tensor:
    self.last = getattr(self, "last", {})
    return 20 * x - self.last.setdefault(x.shape, x.detach().clone())


def counted_in_buffer(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return x * self.calls.clamp(max=20)


STATE = [
    counted(2, 20), counted(5, 20), counted(30, 20), counted(4, -1), Twist("any", counted_outside), step("any", alternating),
    step("any", with_momentum),
    step("any", remembered), step("any", counted_in_buffer, calls=lambda d: torch.zeros(())),
]  # fmt: skip
BRANCHES = [
    step("any", lambda self, x: 20 * x if x.sum() > 0 else x),
    step("any", lambda self, x: 20 * x if bool((x > 0.5).any()) else x),
    step("any", lambda self, x: x * float(x.abs().max())),
    step("any", lambda self, x: x * max(x.mean().item(), 1.0)),
    step("any", lambda self, x: torch.where(x > 0.1, 20 * x, x)),
    step("any", lambda self, x: torch.cond(x.sum() > 0, lambda z: 20 * z, lambda z: z + 0, (x,))),
    step("any", lambda self, x: x + x.round()),
    step("any", lambda self, x: x * (x > 0.2)),
]
DETOURS = [
    step("any", lambda self, x: torch.from_numpy(np.tanh(20 * x.detach().numpy()))),
    step("any", lambda self, x: x + torch.as_tensor(20 * np.asarray(x.detach()))),
    step("any", lambda self, x: torch.tensor((20 * x).tolist(), dtype=x.dtype)),
]
DETACHED = [
    step("any", lambda self, x: 20 * x.data),
    step("any", lambda self, x: 20 * x.detach()),
    step("any", lambda self, x: x + (20 * x).detach()),
    step("flat", lambda self, x: 20 * F.linear(x, self.fc.weight.data, self.fc.bias.detach()), fc=square),
]
RANDOM = [
    step("any", lambda self, x: F.dropout(x, 0.5, True)),
    step("map", lambda self, x: F.dropout2d(x, 0.5, True)),
    step("any", lambda self, x: x + 0.3 * torch.rand(x.shape, dtype=x.dtype)),
    step("any", lambda self, x: x + 0.3 * torch.randn_like(x)),
    step("any", lambda self, x: x * torch.bernoulli(torch.full(x.shape, 0.5, dtype=x.dtype))),
    step("any", lambda self, x: F.rrelu(x, 0.1, 2.0, training=True)),
    step("any", lambda self, x: random.choice([1, 20]) * x),
    step("any", lambda self, x: x * torch.empty(x.shape[0], dtype=x.dtype).uniform_().reshape(-1, *[1] * (x.ndim - 1))),
    step("any", lambda self, x: x[:, torch.randperm(x.shape[1])]),
]
BATCH_STATISTICS = [
    step("map", lambda self, x: self.bn(x), bn=lambda d: nn.BatchNorm2d(d.shape[0], track_running_stats=False)),
    step("any", lambda self, x: F.batch_norm(x, None, None, training=True)),
    step("any", lambda self, x: x - x.mean(0)),
    step("any", lambda self, x: 2 * x.softmax(0)),
    step("any", lambda self, x: x.flip(0)),
    step("any", lambda self, x: x.cumsum(0)),
    step("any", lambda self, x: x + x[:1]),
]
