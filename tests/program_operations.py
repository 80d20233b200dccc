"""Steps of a program that are common code: calls with keywords, casts, gradients that are not derivatives, and operations.

A tracer of operations can see nearly all of these steps, so that most of them should have a finite bound.
"""

from typing import Any

import torch
import torch.nn.functional as F
from networks import Scaled
from program_twists import Draft, Twist, matrix, square, step
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


class Rectifier(torch.autograd.Function):
    """The larger of x and 0, with its derivative from a saved mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return 5 * x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 5 * gradient * ctx.saved_tensors[0]


class Weighted(torch.autograd.Function):
    """A dense layer of a matrix, with a gradient for the input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return 10 * x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 10 * gradient @ ctx.saved_tensors[0], None


FUNCTIONS = [
    step("any", lambda self, x: Scaled.apply(x, 20, 20)),
    step("any", lambda self, x: Scaled.apply(x, 20, -0.1)),
    step("any", lambda self, x: Rectifier.apply(x)),
    step("flat", lambda self, x: Weighted.apply(x, self.weight), weight=matrix),
]


class Reversed(nn.Linear):
    """A dense layer with a reversed gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return Scaled.apply(super().forward(input), 20, -0.1)


class Ungraded(nn.Conv2d):
    """A convolution that adds three times itself without a gradient."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        with torch.no_grad():
            z = 3 * super().forward(input)
        return y + z


def without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return 20 * self.fc(x)


def with_hooked_gradient(self: Any, x: Tensor) -> Tensor:
    y = 5 * self.fc(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: 0.1 * gradient)
    return y


def with_backward_hook(d: Draft) -> nn.Module:
    conv = nn.Conv2d(d.shape[0], d.shape[0], 3, padding=1, padding_mode=d.draw.choice(["zeros", "reflect"]))
    conv.register_full_backward_hook(lambda module, to_input, to_output: (0.1 * to_input[0],))
    return conv


WRONG_GRADIENTS = [
    step("map", lambda self, x: self.conv(x), conv=with_backward_hook),
    step("flat", without_gradient, fc=square),
    step("flat", with_hooked_gradient, fc=square),
    step("flat", lambda self, x: self.fc(x), fc=lambda d: Reversed(d.size, d.size)),
    step("map", lambda self, x: self.conv(x), conv=lambda d: Ungraded(d.shape[0], d.shape[0], 1)),
    step("any", lambda self, x: 20 * x.detach() - x + x),
]


def upsampled(d: Draft) -> nn.Module:
    return nn.ConvTranspose2d(d.shape[0], 1, 4, stride=3, padding=2)


CALLS = [
    step("map", lambda self, x: self.up(x, output_size=[3 * x.shape[2] - 1, 3 * x.shape[3] - 1]), up=upsampled),
    step("map", lambda self, x: self.up(x, (x.shape[0], 1, 3 * x.shape[2] - 2, 3 * x.shape[3] - 1)), up=upsampled),
    step("flat", lambda self, x: self.fc(input=x), fc=square),
    step("map", lambda self, x: self.conv(input=x), conv=lambda d: nn.Conv2d(d.shape[0], 2, 3, padding=1)),
    step("flat", lambda self, x: F.linear(input=x, weight=self.fc.weight, bias=self.fc.bias), fc=square),
    step("map", lambda self, x: F.conv2d(x, weight=self.weight, padding="same", bias=None),
         weight=lambda d: torch.randn(2, d.shape[0], 3, 3)),
    step("map", lambda self, x: self.pool(input=x), pool=lambda d: nn.MaxPool2d(2, stride=1, padding=1)),
    step("any", lambda self, x: self.act(input=x), act=lambda d: nn.GELU("tanh")),
]  # fmt: skip

SINGLE, HALF, BRAIN = (4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16))
CASTS = [
    step("any", lambda self, x: (8 * x.float()).to(x.dtype), SINGLE),
    step("any", lambda self, x: x.to(torch.float32).sin().to(dtype=x.dtype), SINGLE),
    step("flat", lambda self, x: self.fc(x.to(self.fc.weight.dtype)), fc=square),
    step("any", lambda self, x: F.gelu(x.double() * 8).to(x.dtype)),
    step("any", lambda self, x: x.type(torch.float64).mul(4).type_as(x)),
    step("flat", lambda self, x: self.fc(x.to(self.fc.weight)) + x.to(x.device), fc=square),
    step("any", lambda self, x: F.gelu(x.to(x.dtype, copy=True))),
]


def in_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.fc(x).to(x.dtype)


HALVES = [
    step("any", lambda self, x: x.half().to(x.dtype), HALF),
    step("any", lambda self, x: x.bfloat16().to(x.dtype), BRAIN),
    step("any", lambda self, x: 8 * x.to(torch.float16).to(x.dtype), HALF),
    step("flat", in_autocast, BRAIN, fc=square),
    step("any", lambda self, x: (8 * x).int().to(x.dtype)),
]


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    half = (x.shape[1] + 1) // 2
    return x[:, :half], x[:, -half:]


ORDERS = [
    step("any", lambda self, x: x.sort(1).values),
    step("flat", lambda self, x: torch.cat(pairs(x), 1).reshape(x.shape[0], -1, 2).sort(-1)[0].flatten(1)),
    step("any", lambda self, x: torch.sort(x, dim=-1, descending=True)[0]),
    step("any", lambda self, x: torch.cat([torch.maximum(*pairs(x)), torch.minimum(*pairs(x))], 1)),
    step("any", lambda self, x: torch.cat([torch.max(*pairs(x)), torch.min(*pairs(x))], 1)),
    step("any", lambda self, x: x.max(dim=1, keepdim=True).values - 2 * x.min(1, keepdim=True)[0]),
    step("map", lambda self, x: torch.max(x, 3)[0][..., None] + x),
    step("any", lambda self, x: x.topk(1, 1).values + x),
    step("any", lambda self, x: torch.maximum(x, -0.3 * x)),
]


def blocks(d: Draft) -> Tensor:
    return torch.randn(d.shape[0], d.shape[2], 3)


MATRICES = [
    step("flat", lambda self, x: x @ self.weight.T, weight=matrix),
    step("flat", lambda self, x: (self.weight @ x.T).T, weight=matrix),
    step("flat", lambda self, x: torch.addmm(self.bias, x, self.weight, beta=2, alpha=-3), weight=matrix,
         bias=lambda d: torch.randn(d.size)),
    step("flat", lambda self, x: torch.addmm(x, x, self.weight.mT), weight=matrix),
    step("map", lambda self, x: x.mT @ torch.ones(x.shape[2], 2, dtype=x.dtype)),
    step("map", lambda self, x: torch.baddbmm(x[:, 0], x[:, 0], self.weight.expand(x.shape[0], -1, -1), beta=3)[:, None],
         weight=lambda d: torch.randn(d.shape[2], d.shape[2])),
    step("map", lambda self, x: torch.einsum("bcij,cjk->bcik", x, self.weight), weight=blocks),
    step("map", lambda self, x: x.permute(0, 2, 3, 1).matmul(self.weight.t()).permute(0, 3, 1, 2),
         weight=lambda d: torch.randn(2, d.shape[0])),
    step("flat", lambda self, x: torch.mm(x, self.weight) + torch.matmul(x, self.weight.sum(1, keepdim=True)), weight=matrix),
]  # fmt: skip
CHOICES = [
    step("any", lambda self, x: torch.where(x > 0, x, 0.1 * x)),
    step("any", lambda self, x: torch.where(x < -0.2, torch.zeros_like(x) - 0.2, x) * 3),
    step("any", lambda self, x: x.masked_fill(x < 0, 0.0)),
    step("any", lambda self, x: torch.where(self.mask, 4 * x, -x), mask=lambda d: torch.rand(d.shape) > 0.5),
    step("any", lambda self, x: x.masked_fill(self.mask, 0.5), mask=lambda d: torch.rand(d.shape) > 0.5),
    step("any", lambda self, x: x.clamp_min(0) - 2 * torch.clip(x, -1, 0.5)),
]
POOLS = [
    step("map", lambda self, x: torch.max_pool2d(x, 2, 1, 1)),
    step("map", lambda self, x: F.max_pool2d(x, 2, stride=1, padding=1, return_indices=True)[0]),
    step("map", lambda self, x: F.adaptive_max_pool2d(x, (1, 2)) + F.adaptive_avg_pool2d(x, 1)),
    step("map", lambda self, x: torch.max_pool1d(x.flatten(2), 2, stride=1, padding=1)[:, :, None]),
    step("map", lambda self, x: F.avg_pool2d(x, 2, 1, 1, count_include_pad=False)),
    step("map", lambda self, x: torch.adaptive_avg_pool1d(x.flatten(2), 2).unsqueeze(1)),
]


class Doubled(nn.Module):
    """The parametrisation of a weight as 4 times what is stored, made skew in its first two axes where it is square."""

    def forward(self, weight: Tensor) -> Tensor:
        if weight.shape[0] == weight.shape[1]:
            return 4 * (weight - weight.transpose(0, 1))
        return 4 * weight


def custom(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Doubled())


def square_conv(d: Draft) -> nn.Module:
    return nn.Conv2d(d.shape[0], d.shape[0], 3, padding=1)


PARAMETRISED: list[Twist] = [
    step(place, lambda self, x: 3 * self.layer(x), layer=lambda d, wrap=wrap, build=build: wrap(build(d)))
    for place, build in (("flat", square), ("map", square_conv))
    for wrap in (custom, parametrizations.weight_norm, parametrizations.spectral_norm)
] + [
    step("flat", lambda self, x: self.layer(x), layer=lambda d: parametrizations.orthogonal(square(d))),
    step("flat", lambda self, x: self.layer(x), layer=lambda d: nn.utils.weight_norm(square(d))),
    step("map", lambda self, x: self.layer(x), layer=lambda d: nn.utils.spectral_norm(square_conv(d))),
]


def tokens(self: Any, x: Tensor) -> Tensor:
    return self.fc(x).reshape(x.shape[0], 2, 4)


def heads(d: Draft) -> nn.Module:
    return nn.MultiheadAttention(4, d.draw.choice([1, 2]), batch_first=True)


def into_tokens(d: Draft) -> nn.Module:
    return nn.Linear(d.size, 8)


def attended(self: Any, x: Tensor) -> Tensor:
    z = tokens(self, x)
    return z.add(self.mha(z, z, z, need_weights=False)[0]).flatten(1)


ATTENTION = [
    step("flat", attended, fc=into_tokens, mha=heads),
    step("flat", lambda self, x: self.mha(*[tokens(self, x)] * 3)[0].flatten(1), fc=into_tokens, mha=heads),
    step("flat", lambda self, x: self.mha(self.query.expand(x.shape[0], -1, -1), *[tokens(self, x)] * 2)[0].flatten(1),
         fc=into_tokens, mha=heads, query=lambda d: torch.randn(1, 2, 4)),
    step("flat", lambda self, x: self.layer(tokens(self, x)).flatten(1), fc=into_tokens,
         layer=lambda d: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, layer_norm_eps=0.1)),
]  # fmt: skip


def normalised(self: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 0.1)


def unbiased(self: Any, x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) * (x.var(1, unbiased=False, keepdim=True) + 0.2).rsqrt()


GATES = [
    step("any", lambda self, x: 4 * x * torch.sigmoid(x)),
    step("any", lambda self, x: x * F.relu6(x + 3) / 6),
    step("any", lambda self, x: x * torch.clamp(x + 3, 0, 6) / 6 * 4),
    step("any", lambda self, x: x * torch.tanh(F.softplus(x))),
    step("any", normalised),
    step("any", unbiased),
    step("flat", lambda self, x: self.fc(x) * torch.sigmoid(x), fc=square),
    step("any", lambda self, x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
]
