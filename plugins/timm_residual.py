"""A small residual network with ReLU, as a timm model, for certificates around single images.

Convolutions of stride 2 in place of pooling, no normalisation, and few activations: the time of such a certificate grows with
the number of activations that may change their sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a ReLU, added to their input, and a ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Values of the same shape, (batch, channels, height, width)."""
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def relu_residual(
    pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, img_size: int = 28, widths: Sequence[int] = (16, 32),
    depths: Sequence[int] = (0, 1), **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """Stages of a 4 x 4 convolution of stride 2 and residual blocks, and a dense layer, on raw pixels.

    ``widths`` are the channels of the stages, ``depths`` the numbers of their residual blocks.
    """
    layers: list[nn.Module] = []
    channels, size = in_chans, img_size
    for width, depth in zip(widths, depths, strict=True):
        layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU(), *(Residual(width) for _ in range(depth))]
        channels, size = width, size // 2
    net: Any = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size**2, num_classes))
    net.pretrained_cfg = {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans, "input_size": (in_chans, img_size, img_size)}
    return net


register_model(relu_residual)
