"""Networks made for certificates, among timm's models: a product of their layers' norms is little above their own slopes.

Layers between `MaxMin` are dense, or convolutions whose windows do not overlap: matrices, so that their norms are known exactly
and all their singular values can be raised to 1. What larger windows would see, `ChannelShift` brings to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, fx, nn

from robust_spectral.lipschitz import LipschitzWalk, increasing_box, interval, not_rounded, rounds, rule


class MaxMin(nn.Module):
    """The larger and the smaller of each two channels, of the first half and the second: turns gradients, shortens none.

    Source: Anil, Lucas and Grosse (2019), Sorting out Lipschitz function approximation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Values of the same shape; the number of channels must be even."""
        first, second = x.chunk(2, 1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], 1)


class ChannelShift(nn.Module):
    """A fifth of the channels moved by one pixel to each of the four sides, around the edge; lengths stay.

    A 1 x 1 convolution behind it sees a cross of five pixels. Sources: Wu et al. (2018), Shift: a zero FLOP, zero parameter
    alternative to spatial convolutions; Li et al. (2019), Preventing gradient attenuation in Lipschitz constrained
    convolutional networks, whose orthogonal convolutions are made of the same two parts.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Values of the same shape, (batch, channels, height, width)."""
        fifth = x.shape[1] // 5
        kept, up, down, left, right = x.split([x.shape[1] - 4 * fifth, *[fifth] * 4], 1)
        return torch.cat([kept, up.roll(-1, 2), down.roll(1, 2), left.roll(-1, 3), right.roll(1, 3)], 1)


@rule(MaxMin, ChannelShift)
def rearranged(walk: LipschitzWalk, n: fx.Node) -> float:
    """The same values at other places, or each pair sorted, which brings no two vectors further apart."""
    return walk.bound(n.args[0])


interval(MaxMin, ChannelShift)(increasing_box)
rounds(MaxMin, ChannelShift)(not_rounded)


def maxmin_mlp(
    pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, img_size: int = 28, width: int = 512, depth: int = 3,
    **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """Dense layers with `MaxMin` between them, on raw pixels: with orthogonal weights it keeps all lengths of gradients."""
    sizes = [in_chans * img_size**2, *[width] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), MaxMin()]
    return _on_pixels([*layers, nn.Linear(sizes[-1], num_classes)], in_chans, img_size)


def maxmin_shift(
    pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, img_size: int = 28, widths: Sequence[int] = (64, 128),
    depths: Sequence[int] = (3, 6), **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """A convolutional network of the same kind: patches of 2 x 2 halve the size, then 1 x 1 convolutions behind `ChannelShift`.

    ``widths`` are the channels of its stages, even numbers, ``depths`` the layers of each, patches included.
    """
    layers: list[nn.Module] = []
    channels, size = in_chans, img_size
    for width, depth in zip(widths, depths, strict=True):
        layers += [nn.Conv2d(channels, width, 2, stride=2), MaxMin()]
        for _ in range(depth - 1):
            layers += [ChannelShift(), nn.Conv2d(width, width, 1), MaxMin()]
        channels, size = width, size // 2
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.orthogonal_(layer.weight)
    return _on_pixels([*layers, nn.Flatten(), nn.Linear(channels * size**2, num_classes)], in_chans, img_size)


def _on_pixels(layers: list[nn.Module], in_chans: int, img_size: int) -> nn.Module:
    """The layers in a row, as a model of timm's that takes pixels as they are."""
    net: Any = nn.Sequential(*layers)
    pixels = {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans, "input_size": (in_chans, img_size, img_size)}
    net.pretrained_cfg = pixels
    return net


register_model(maxmin_mlp)
register_model(maxmin_shift)
