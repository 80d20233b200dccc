"""Random small networks that exercise every Lipschitz rule: branches, sums, gates, attention, slices."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
Step = Callable[["Network", list[Tensor]], Tensor]


@dataclass
class Draft:
    """A network under construction: its steps, its modules, and the shapes of the values so far."""

    draw: random.Random
    shapes: list[Shape]
    steps: list[Step] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def module(self, module: nn.Module) -> int:
        self.modules.append(module)
        return len(self.modules) - 1

    def maps(self) -> list[int]:
        return [i for i, shape in enumerate(self.shapes) if len(shape) == 3]


class Network(nn.Module):
    """The network that a draft describes."""

    def __init__(self, draft: Draft) -> None:
        super().__init__()
        self.parts = nn.ModuleList(draft.modules)
        self.steps, self.kinds = draft.steps, draft.kinds

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        return values[-1]


def by_module(i: int, part: int) -> Step:
    return lambda net, values: net.parts[part](values[i])


def by_function(i: int, function: Callable[[Tensor], Tensor]) -> Step:
    return lambda net, values: function(values[i])


def convolution(draft: Draft, i: int) -> Step:
    channels, height, width = draft.shapes[i]
    kernel, groups = draft.draw.choice([1, 2, 3]), draft.draw.choice([g for g in (1, channels) if channels % g == 0])
    mode = draft.draw.choice(["zeros", "circular", "reflect", "replicate"])
    padding = draft.draw.randrange(min(2, height, width))
    if height + 2 * padding < kernel or width + 2 * padding < kernel:
        kernel = 1
    out = groups * draft.draw.randint(1, 3)
    stride = draft.draw.choice([1, 2])
    conv = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, padding_mode=mode)
    return by_module(i, draft.module(conv))


def batchnorm(draft: Draft, i: int) -> Step:
    norm = nn.BatchNorm2d(draft.shapes[i][0])
    nn.init.uniform_(norm.running_var, 0.2, 2.0)
    nn.init.normal_(norm.running_mean)
    nn.init.normal_(norm.weight)
    return by_module(i, draft.module(norm))


def own_statistics(draft: Draft, i: int) -> Step:
    channels, _, width = draft.shapes[i]
    norm = draft.draw.choice(
        [nn.GroupNorm(1, channels, eps=0.1), nn.LayerNorm(width, eps=0.1), nn.GroupNorm(channels, channels, eps=0.3)]
    )
    nn.init.normal_(norm.weight)
    return by_module(i, draft.module(norm))


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.ReLU6, nn.Softplus,
    nn.Hardsigmoid, lambda: nn.LeakyReLU(-0.7), nn.PReLU, nn.Identity, nn.Dropout,
]  # fmt: skip
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu, F.silu, F.gelu, torch.tanh, torch.sigmoid, torch.abs, F.leaky_relu, lambda x: -x, lambda x: x.clamp(-0.5, 0.5),
    lambda x: 2.5 * x, lambda x: x / 3, lambda x: x - 0.4, lambda x: 0.3 - x, lambda x: x.softmax(1),
    lambda x: F.softmax(x, dim=-1), lambda x: x.transpose(2, 3), lambda x: x.flip(2), lambda x: torch.roll(x, 1, 3),
    lambda x: F.pad(x, (0, 1, 1, 0)), lambda x: x[:, :1], lambda x: x[..., ::2], lambda x: x.amax(1, keepdim=True),
    lambda x: x.mean((2, 3), keepdim=True), lambda x: x.sum(1, keepdim=True), lambda x: x.repeat(1, 2, 1, 1),
    lambda x: x.chunk(2, 2)[0], lambda x: torch.stack([x, 2 * x], 1).flatten(1, 2),
    lambda x: torch.cat(x.unbind(2), 2)[:, :, None], lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: x.reshape(x.shape[0], -1, 1, 1), lambda x: x.unsqueeze(1).squeeze(1),
    lambda x: F.relu(x) - x, lambda x: F.normalize(x, dim=1, eps=0.5), lambda x: x[:, torch.tensor([0, -1, 0])],
    lambda x: x.reshape_as(x.transpose(2, 3)), lambda x: F.pad(x, (1, 0, 1, 1), mode="reflect"),
    lambda x: x.unfold(2, 2, 1).flatten(3), lambda x: F.unfold(x, 2, padding=1, stride=1)[:, :, None],
    lambda x: F.fold(F.unfold(x, 2, stride=1), x.shape[2:], 2), lambda x: x @ ramp(x, x.shape[3], 3),
    lambda x: ramp(x, 3, x.shape[2]) @ x, lambda x: torch.einsum("bhwc,kwc->bhwk", x, ramp(x, 2, x.shape[2], x.shape[3])),
    lambda x: torch.einsum("kc,bcwh->bkh", ramp(x, 2, x.shape[1]), x)[:, None],
]  # fmt: skip
LOCAL_FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x * torch.sigmoid(x), lambda x: x * x.mean((2, 3), keepdim=True), lambda x: F.relu(x) * torch.tanh(x),
    lambda x: x.sigmoid() * x.amax(1, keepdim=True), lambda x: F.scaled_dot_product_attention(x, 0.5 * x, x),
    lambda x: torch.einsum("bchw,bkhw->bckh", x, torch.tanh(x)), lambda x: torch.einsum("bchw,bcwk->bch", x, 2 * x)[:, None],
    lambda x: x @ x.transpose(2, 3), lambda x: x @ x.mean(1, keepdim=True), lambda x: x / (1 + x.abs()),
    lambda x: x * torch.rsqrt(x.var(1, keepdim=True, correction=0) + 0.3), lambda x: F.relu(x) ** 2,
    lambda x: x / (x.pow(2).mean(1, keepdim=True) + 0.2).sqrt(), lambda x: (-x).square() - x, lambda x: 1 / (2 + x.tanh()),
    lambda x: x.mean((2, 3), keepdim=True) / (torch.abs(x).amax(1, keepdim=True) + 0.5).reciprocal(),
]  # fmt: skip


def ramp(like: Tensor, *shape: int) -> Tensor:
    """A constant of different numbers that float32 represents exactly."""
    return ((torch.arange(math.prod(shape)) % 7 - 2.5) / 4).reshape(shape).type_as(like)


def activation(draft: Draft, i: int) -> Step:
    return by_module(i, draft.module(draft.draw.choice(ACTIVATIONS)()))


def function(draft: Draft, i: int) -> Step:
    return by_function(i, draft.draw.choice(FUNCTIONS))


def local_function(draft: Draft, i: int) -> Step:
    return by_function(i, draft.draw.choice(LOCAL_FUNCTIONS))


def pool(draft: Draft, i: int) -> Step:
    size = min(draft.shapes[i][1:])
    window, stride = draft.draw.randint(1, min(3, size)), draft.draw.randint(1, 2)
    kind = draft.draw.choice([nn.MaxPool2d, nn.AvgPool2d])
    return by_module(i, draft.module(kind(window, stride)))


def constant(draft: Draft, i: int) -> Step:
    channels = draft.shapes[i][0]
    c = torch.randn(1, channels, 1, 1, dtype=torch.float64)
    holder = nn.Module()
    holder.register_buffer("c", c)
    part = draft.module(holder)
    choice = draft.draw.choice([lambda x, c: x * c, lambda x, c: x + c, lambda x, c: c - x, lambda x, c: x / (c.abs() + 0.2)])
    return lambda net, values: choice(values[i], net.parts[part].c)


def both(draft: Draft, i: int) -> Step | None:
    """The sum or difference of two values of one shape, or of shapes that broadcast."""
    shape = draft.shapes[i]
    fits = [j for j in draft.maps() if draft.shapes[j] in (shape, (shape[0], 1, 1), (1, *shape[1:]))]
    j = draft.draw.choice(fits)
    return draft.draw.choice([
        lambda net, values: values[i] + values[j],
        lambda net, values: values[i] - values[j],
        lambda net, values: torch.add(values[i], values[j], alpha=-2),
    ])  # fmt: skip


def product(draft: Draft, i: int) -> Step:
    shape = draft.shapes[i]
    j = draft.draw.choice([j for j in draft.maps() if draft.shapes[j] in (shape, (shape[0], 1, 1), (1, *shape[1:]))])
    return lambda net, values: values[i] * torch.sigmoid(values[j])


def concatenation(draft: Draft, i: int) -> Step:
    j = draft.draw.choice([j for j in draft.maps() if draft.shapes[j][1:] == draft.shapes[i][1:]])
    return lambda net, values: torch.cat([values[i], values[j]], 1)


def in_place(draft: Draft, i: int) -> Step:
    part = draft.module(draft.draw.choice([nn.ReLU(inplace=True), nn.Hardswish(inplace=True)]))
    return lambda net, values: net.parts[part](2 * values[i])


GLOBAL = [
    convolution, convolution, batchnorm, own_statistics, activation, function, function, pool, constant, both, both,
    concatenation, in_place,
]  # fmt: skip
LOCAL = [*GLOBAL, local_function, product]


def network(
    draw: random.Random, *, local: bool = False, most: int = 1200, shape: Shape = (2, 4, 4),
    kinds: list[Callable[[Draft, int], Step | None]] | None = None, sizes: tuple[int, ...] = (1, 1, 2, 2, 3, 4, 6, 9),
) -> Network:  # fmt: skip
    """A random network on inputs of a shape, in float64 and eval mode, that ends in a dense layer or in none."""
    torch.manual_seed(draw.randrange(2**31))
    draft = Draft(draw, [shape])
    for _ in range(draw.choice(sizes)):
        i = draw.choice(draft.maps()[-4:])
        kind = draw.choice(kinds or (LOCAL if local else GLOBAL))
        count = len(draft.modules)
        step = kind(draft, i)
        net = Network(draft).double().eval()
        values = [torch.zeros(1, *shape, dtype=torch.float64) for shape in draft.shapes]
        try:
            found = tuple(step(net, values).shape[1:])
        except (ValueError, RuntimeError, IndexError):  # a window, or a statistic, that does not fit the shape
            found = ()
        if len(found) != 3 or math.prod(found) > most or 0 in found:
            del draft.modules[count:]
            continue
        draft.steps.append(step)
        draft.shapes.append(found)
        draft.kinds.append(kind.__name__)
    middle = len(draft.shapes) // 2
    if draw.random() < 0.5:
        draft.steps.append(lambda net, values: values[-1].flatten(1))
    else:
        ends = (-1, middle)
        last = draft.module(nn.Linear(sum(math.prod(draft.shapes[i]) for i in ends), 3))
        draft.steps.append(lambda net, values: net.parts[last](torch.cat([values[i].flatten(1) for i in ends], 1)))
    return Network(draft).double().eval()
