"""Random parts of affine networks: convolutions, pooling, resampling and normalisations of 1 to 3 spatial axes."""

import random
from collections.abc import Callable
from math import gcd, prod

from torch import nn

Shape = tuple[int, ...]
MODES = ("zeros", "circular", "reflect", "replicate")
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
PAD = (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)


def size(rng: random.Random) -> int:
    """Features of a dense layer, mostly few."""
    return rng.choice((1, rng.randint(1, 12), rng.randint(2, 40), rng.randint(20, 190)))


def spatial(rng: random.Random, dims: int) -> Shape:
    return tuple(rng.randint(1, (30, 9, 4)[dims - 1]) for _ in range(dims))


def each(rng: random.Random, dims: int, values: tuple[int, ...]) -> Shape:
    """One value per axis, the same on every axis half of the time."""
    return tuple(rng.choice(values) for _ in range(dims)) if rng.random() < 0.5 else (rng.choice(values),) * dims


def groups_of(rng: random.Random, channels: int, out: int) -> int:
    """A number of groups, a common divisor of both numbers of channels; 1 half of the time."""
    common = gcd(channels, out)
    return rng.choice([g for g in range(1, common + 1) if common % g == 0]) if rng.random() < 0.5 else 1


def convolution(rng: random.Random, channels: int, dims: int, mode: str = "zeros", padding: str | None = None) -> nn.Module:
    out = rng.choice((1, 2, 3, 4, 6, channels))
    window = each(rng, dims, (1, 2, 3, 3, 4, 5, 7) if dims < 3 else (1, 2, 3))
    stride = (1,) * dims if padding == "same" else each(rng, dims, (1, 1, 1, 2, 3))
    amount = padding or tuple(rng.randint(0, w + (mode == "replicate")) for w in window)
    return CONV[dims - 1](
        channels, out, window, stride, amount, each(rng, dims, (1, 1, 1, 2, 3)), groups_of(rng, channels, out),
        rng.random() < 0.5, mode,
    )  # fmt: skip


def transposed(rng: random.Random, channels: int, dims: int) -> nn.Module:
    out, stride = rng.choice((1, 2, 3, 4, channels)), each(rng, dims, (1, 1, 2, 3))
    return TRANSPOSED[dims - 1](
        channels, out, each(rng, dims, (1, 2, 3)), stride, each(rng, dims, (0, 0, 1)),
        tuple(rng.randint(0, s - 1) for s in stride), groups_of(rng, channels, out), rng.random() < 0.5,
        each(rng, dims, (1, 1, 2)),
    )  # fmt: skip


def pool(rng: random.Random, dims: int) -> nn.Module:
    if rng.random() < 0.3:
        return ADAPTIVE[dims - 1](each(rng, dims, (1, 2, 3)))
    window = each(rng, dims, (2, 3)) if dims > 1 else rng.choice((2, 3, 5))
    return POOL[dims - 1](window, rng.choice((None, 1, 2)), rng.choice((0, 0, 1)), rng.random() < 0.3, rng.random() < 0.5)


def upsample(rng: random.Random, dims: int) -> nn.Module:
    mode = rng.choice(("nearest", "nearest-exact", *[("linear",), ("bilinear", "bicubic"), ("trilinear",)][dims - 1]))
    align = None if mode.startswith("nearest") else rng.random() < 0.5
    if rng.random() < 0.5:
        return nn.Upsample(spatial(rng, dims), mode=mode, align_corners=align)
    return nn.Upsample(scale_factor=rng.choice((0.5, 1.5, 2, 3)), mode=mode, align_corners=align)


def batchnorm(rng: random.Random, channels: int, dims: int) -> nn.Module:
    return BATCHNORM[max(dims, 1) - 1](channels, affine=rng.random() < 0.8)


def chain(
    rng: random.Random, in_shape: Shape, output_shape: Callable[[nn.Module, Shape], Shape], length: int, largest: int = 200
) -> nn.Module:
    """Parts in sequence; a part that does not fit the preceding output is drawn again."""
    parts: list[nn.Module] = []
    shape, tries = in_shape, 0
    while len(parts) < length and (tries := tries + 1) < 100:
        try:
            part = rng.choice(_FOLLOWING[len(shape)])(rng, shape)
            out = output_shape(part, shape)
        except (RuntimeError, ValueError):
            continue
        if 0 < prod(out) <= largest:
            parts, shape = [*parts, part], out
    nested = rng.randint(0, len(parts))
    return nn.Sequential(nn.Sequential(*parts[:nested]), *parts[nested:]) if rng.random() < 0.3 else nn.Sequential(*parts)


def _conv(rng: random.Random, shape: Shape) -> nn.Module:
    return convolution(rng, shape[0], len(shape) - 1, rng.choice(MODES))


def _normal(rng: random.Random, shape: Shape) -> nn.Module:
    return batchnorm(rng, shape[0], len(shape) - 1)


def _linear(rng: random.Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], size(rng))


_ANYWHERE = [
    _conv, _conv, _normal, _normal, lambda rng, shape: transposed(rng, shape[0], len(shape) - 1),
    lambda rng, shape: pool(rng, len(shape) - 1), lambda rng, shape: upsample(rng, len(shape) - 1), _linear,
    lambda rng, shape: nn.Flatten(), lambda rng, shape: nn.Dropout(0.5), lambda rng, shape: nn.Identity(),
]  # fmt: skip
_FOLLOWING: dict[int, list[Callable[[random.Random, Shape], nn.Module]]] = {
    1: [_linear, _linear, _normal, lambda rng, shape: nn.Unflatten(1, (shape[0] // 2, 2))],
    2: _ANYWHERE,
    3: [
        *_ANYWHERE, lambda rng, shape: nn.PixelUnshuffle(2), lambda rng, shape: nn.PixelShuffle(2),
        lambda rng, shape: rng.choice(PAD)(rng.randint(0, 2)),
    ],
    4: _ANYWHERE,
}  # fmt: skip
