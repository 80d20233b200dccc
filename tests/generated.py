"""Random affine layers of every kind that the package supports, each determined by its seed.

``generate_layer(seed)`` cycles through the kinds, so consecutive seeds cover all of them; a failing seed can be replayed alone.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from generated_parts import MODES, batchnorm, chain, convolution, groups_of, pool, size, spatial, transposed, upsample
from generated_weights import fill
from timm.layers import BlurPool2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations

Shape = tuple[int, ...]
Made = tuple[nn.Module, Shape]
LARGEST = 200  # elements of an input or output at most


@dataclass(frozen=True)
class Layer:
    """A module in eval mode, and the shape of one input."""

    seed: int
    kind: str
    module: nn.Module = field(repr=False)
    in_shape: Shape

    def __str__(self) -> str:
        dtype = next((str(p.dtype) for p in self.module.parameters()), "no weights")
        return f"seed {self.seed}: {self.kind}, input {self.in_shape}, {dtype}, {' '.join(repr(self.module).split())}"


def generate_layer(seed: int) -> Layer:
    """The layer of a seed, the same on every call; the global random state is left unchanged."""
    layer = draw_layer(list(KINDS)[seed % len(KINDS)], random.Random(seed), seed)
    if layer is None:
        raise AssertionError(f"no layer fits its input, seed {seed}")
    return layer


def draw_layer(kind: str, rng: random.Random, seed: int, tries: int = 1000) -> Layer | None:
    """A layer of a kind, its settings drawn from ``rng`` and its weights from ``seed``; None where no try fits its input."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")
        torch.manual_seed(seed)
        for _ in range(tries):
            try:
                module, in_shape = KINDS[kind](rng)
                fits = prod(in_shape) <= LARGEST and 0 < prod(output_shape(module, in_shape)) <= LARGEST
            except (RuntimeError, ValueError):  # windows, padding and strides that torch refuses for this input
                continue
            if fits:
                module = module.double() if rng.random() < 0.5 else module
                fill(module, rng)
                return Layer(seed, kind, module.eval(), in_shape)
    return None


def output_shape(module: nn.Module, in_shape: Shape) -> Shape:
    with torch.no_grad():
        return tuple(module.eval()(torch.zeros(1, *in_shape)).shape[1:])


def channels_of(rng: random.Random) -> int:
    return rng.choice((1, 2, 3, 4, 6))


def linear(rng: random.Random) -> Made:
    shape = (*[rng.randint(1, 5) for _ in range(rng.choice((0, 0, 1, 2)))], size(rng))
    return nn.Linear(shape[-1], size(rng), rng.random() < 0.5), shape


def conv(rng: random.Random, dims: int = 0, mode: str = "zeros", padding: str | None = None) -> Made:
    channels, dims = channels_of(rng), dims or rng.randint(1, 3)
    return convolution(rng, channels, dims, mode, padding), (channels, *spatial(rng, dims))


def depthwise(rng: random.Random) -> Made:
    channels, window = rng.randint(2, 8), rng.choice((1, 3, 4, 5))
    module = nn.Conv2d(
        channels, channels * rng.choice((1, 1, 2)), window, rng.choice((1, 2)), rng.randint(0, window // 2), groups=channels,
        padding_mode=rng.choice(MODES),
    )  # fmt: skip
    return module, (channels, *spatial(rng, 2))


def deconv(rng: random.Random, dims: int) -> Made:
    channels = channels_of(rng)
    return transposed(rng, channels, dims), (channels, *spatial(rng, dims))


def fixed(rng: random.Random, make: Callable[[random.Random, int], nn.Module]) -> Made:
    dims = rng.randint(1, 3)
    return make(rng, dims), (channels_of(rng), *spatial(rng, dims))


def blur(rng: random.Random) -> Made:
    channels = channels_of(rng)
    mode = rng.choice(("reflect", "constant", "replicate"))
    return BlurPool2d(channels, rng.choice((2, 3, 5)), rng.choice((1, 2)), mode), (channels, *spatial(rng, 2))


def of_timm(rng: random.Random, kind: type[nn.Conv2d]) -> Made:
    channels, out = channels_of(rng), channels_of(rng)
    options = {"stride": rng.choice((1, 1, 2)), "dilation": rng.choice((1, 1, 2)), "groups": groups_of(rng, channels, out)}
    return kind(channels, out, rng.choice((1, 2, 3, 5)), **options), (channels, *spatial(rng, 2))


def weight_normed(rng: random.Random) -> Made:
    module, shape = rng.choice((linear, conv, partial(deconv, dims=rng.randint(1, 3))))(rng)
    return parametrizations.weight_norm(module, dim=rng.choice((0, 0, None))), shape


def orthogonal(rng: random.Random) -> Made:
    module, shape = rng.choice((linear, partial(conv, dims=1), partial(conv, dims=2)))(rng)
    how = rng.choice(("householder", "matrix_exp", "cayley"))
    return parametrizations.orthogonal(module, orthogonal_map=how, use_trivialization=rng.random() < 0.5), shape


def then_batchnorm(rng: random.Random) -> Made:
    modes = [partial(conv, mode=mode) for mode in MODES]
    module, shape = rng.choice([*modes, partial(deconv, dims=2), linear])(rng)
    out = output_shape(module, shape)
    return nn.Sequential(module, batchnorm(rng, out[0], len(out) - 1)), shape


def batchnorm_first(rng: random.Random) -> Made:
    module, shape = rng.choice((linear, conv, partial(conv, mode=rng.choice(MODES))))(rng)
    return nn.Sequential(batchnorm(rng, shape[0], len(shape) - 1), module), shape


def batchnorm_alone(rng: random.Random) -> Made:
    channels, dims = channels_of(rng), rng.randint(0, 3)
    return batchnorm(rng, channels, dims), (channels, *spatial(rng, dims))


def pool_then_linear(rng: random.Random) -> Made:
    dims = rng.randint(1, 3)
    first, shape = nn.Sequential(pool(rng, dims), nn.Flatten()), (channels_of(rng), *spatial(rng, dims))
    return nn.Sequential(*first, nn.Linear(output_shape(first, shape)[0], size(rng))), shape


def long_chain(rng: random.Random) -> Made:
    shape = (channels_of(rng), *spatial(rng, rng.choice((1, 2, 2, 2, 3))))
    return chain(rng, shape, output_shape, rng.randint(2, 6)), shape


KINDS: dict[str, Callable[[random.Random], Made]] = {
    "Linear": linear,
    **{f"Conv{dims}d": partial(conv, dims=dims) for dims in (1, 2, 3)},
    **{f"Conv, {mode} padding": partial(conv, mode=mode) for mode in MODES[1:]},
    "Conv, padding='same'": lambda rng: conv(rng, mode=rng.choice(MODES), padding="same"),
    "Conv, padding='valid'": lambda rng: conv(rng, mode=rng.choice(MODES), padding="valid"),
    "Conv, depthwise": depthwise,
    **{f"ConvTranspose{dims}d": partial(deconv, dims=dims) for dims in (1, 2, 3)},
    "average pooling": partial(fixed, make=pool),
    "upsampling": partial(fixed, make=upsample),
    "blur": blur,
    **{kind.__name__: partial(of_timm, kind=kind) for kind in (Conv2dSame, StdConv2d, ScaledStdConv2d)},
    "weight_norm": weight_normed,
    "orthogonal": orthogonal,
    "BatchNorm": batchnorm_alone,
    "layer -> BatchNorm": then_batchnorm,
    "BatchNorm -> layer": batchnorm_first,
    "pool -> flatten -> Linear": pool_then_linear,
    "chain": long_chain,
}
