"""Networks for certificates, as timm models: the product of their layers' norms is close to their true Lipschitz constant.

Layers between `MaxMin` are dense, or convolutions whose windows do not overlap: matrices, so that their norms are known exactly
and all their singular values can be raised to 1. `ChannelShift` gives 1 x 1 convolutions access to neighbouring pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn


class MaxMin(nn.Module):
    """The maximum and minimum of each channel of the first half and its partner in the second; preserves gradient norms.

    Source: Anil, Lucas and Grosse (2019), Sorting out Lipschitz function approximation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Values of the same shape; the number of channels must be even."""
        first, second = x.chunk(2, 1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], 1)


class ChannelShift(nn.Module):
    """Shift a fifth of the channels by one pixel in each of the four directions, cyclically; preserves norms.

    A 1 x 1 convolution after it reads a cross of five pixels. Sources: Wu et al. (2018), Shift: a zero FLOP, zero parameter
    alternative to spatial convolutions; Li et al. (2019), Preventing gradient attenuation in Lipschitz constrained
    convolutional networks, whose orthogonal convolutions consist of the same two parts.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Values of the same shape, (batch, channels, height, width)."""
        fifth = x.shape[1] // 5
        kept, up, down, left, right = x.split([x.shape[1] - 4 * fifth, *[fifth] * 4], 1)
        return torch.cat([kept, up.roll(-1, 2), down.roll(1, 2), left.roll(-1, 3), right.roll(1, 3)], 1)


def maxmin_mlp(
    pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, img_size: int = 28, width: int = 512, depth: int = 3,
    **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """Dense layers with `MaxMin` between them, on raw pixels; orthogonal weights preserve gradient norms."""
    sizes = [in_chans * img_size**2, *[width] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), MaxMin()]
    return _on_pixels([*layers, nn.Linear(sizes[-1], num_classes)], in_chans, img_size)


def maxmin_shift(
    pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, img_size: int = 28, widths: Sequence[int] = (64, 128),
    depths: Sequence[int] = (3, 6), **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """A convolutional network with `MaxMin`: 2 x 2 patches halve the size, then 1 x 1 convolutions follow `ChannelShift`.

    ``widths`` are the channels of its stages, even numbers, ``depths`` the convolutions of each stage, patches included.
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
    """A sequential model of the layers, with timm's configuration for raw pixels."""
    net: Any = nn.Sequential(*layers)
    pixels = {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans, "input_size": (in_chans, img_size, img_size)}
    net.pretrained_cfg = pixels
    return net


register_model(maxmin_mlp)
register_model(maxmin_shift)
