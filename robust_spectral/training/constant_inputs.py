"""The gain of a layer on inputs that are constant over its feature map, at almost no cost: the norm of a matrix of channels.

Feature maps after an activation are mostly positive, so gradients push a weight along such inputs, and a singular direction
that overtakes the others in training is nearly one of them. With a stride, "constant" means periodic with the period of the
stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..clipping import kernel_map
from ..devices import to_device
from ..layers import LinearLayer
from ..operators import batchnorm_scale, periods, phases_of_taps
from ..singular_values import to_groups, unit_rows

_NOISE = 1e-4  # multiple of the largest squared gain, below which squared gains are rounding errors
_BLOCK = 4  # directions that are followed, so that a growing one is among them before it is the largest


class SlowDirections:
    """The top singular directions of a layer's matrix of channels, followed by one step of subspace iteration at a time.

    Attributes:
        block: The right singular vectors of each group, (groups, inputs / groups, k), the largest first.
        turned: The block after the half iteration of `turn`, before `settle` orthonormalises it.
    """

    def __init__(self, layer: LinearLayer, composite: bool, like: Tensor, seed: int) -> None:
        self.layer, self._batchnorm = layer, layer.batchnorm if composite else None
        self._groups, module = int(getattr(layer.module, "groups", 1)), layer.module
        phases = phases_of_taps(module, layer.in_shape) if isinstance(module, _ConvNd) else torch.ones(1, 1, device="cpu")
        seen = phases.any(0)  # a window shorter than the stride misses some phases
        self._phases = phases[:, seen].to(like)  # (taps, phases seen)
        self._places = torch.eye(len(seen), device="cpu")[seen].to(like)  # (phases seen, phases)
        channels = self._matrix(like).shape[2]
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(self._groups, channels, min(_BLOCK, channels), generator=generator, device="cpu")
        self.block = self.turned = torch.linalg.qr(start.to(like))[0]
        self._on_map: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def turn(self) -> Tensor:
        """Start an iteration by applying Mᵀ M, M the matrix of channels, to the block; `settle` completes it.

        Returns the Gram matrix (g, k, k) of the result, in float64.
        """
        weight: Any = self.layer.module.weight
        known = self.block, self._phases, self._places
        self.block, self._phases, self._places = (tensor.to(weight.device) for tensor in known)
        matrix = self._matrix(self.block)
        self.turned = matrix.mT @ (matrix @ self.block)
        exact = self.turned.double()
        return exact.mT @ exact

    def rows(self, in_shape: tuple[int, ...]) -> Tensor:
        """The first direction of each group as an input of shape ``in_shape`` and length 1, (groups, 1, inputs / groups).

        If the layer pads with zeros, the input fades towards the borders, so that less of its image is lost there.
        """
        weight: Any = self.layer.module.weight
        top = self.block[:, :, 0].to(weight.device)
        if isinstance(self.layer.module, nn.Linear):
            return to_groups(top.expand(1, *in_shape), 1) / math.prod(in_shape[:-1]) ** 0.5
        X = top.reshape(in_shape[0], -1)
        if self._places.numel() > 1 and not self.layer.module.transposed:
            X = X @ self._places.to(top)
        if (in_shape, top.device) not in self._on_map:
            self._on_map[in_shape, top.device] = self._phases_of_map(in_shape, top.device), self._window(in_shape).to(top)
        phases, window = self._on_map[in_shape, top.device]
        return unit_rows(to_groups((X[:, phases] * window)[None], self._groups))[0]

    def _phases_of_map(self, in_shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The index of the stride's phase at each position of a feature map, flattened."""
        module: Any = self.layer.module
        at = torch.zeros(1, dtype=torch.long, device=device)
        lengths = [1] * len(module.stride) if module.transposed else periods(module, in_shape)
        for axis, (size, period) in enumerate(zip(in_shape[1:], lengths, strict=True)):
            at = (at[:, None] * period + (torch.arange(size, device=device) + _before(module, axis)) % period).flatten()
        return at

    def _window(self, in_shape: tuple[int, ...]) -> Tensor:
        """The flattened window over a feature map that loses least at the borders: half a sine wave with zero padding, or 1."""
        module: Any = self.layer.module
        window = torch.ones(1, device="cpu")
        for size in in_shape[1:]:
            places = torch.arange(1, size + 1, device="cpu")
            wave = (
                torch.sin(math.pi * places / (size + 1)) if module.padding_mode == "zeros" else torch.ones(size, device="cpu")
            )
            window = torch.outer(window, wave).flatten()
        return window

    def _matrix(self, like: Tensor) -> Tensor:
        """The matrix of channels, (groups, outputs / groups, inputs / groups), with the phases of a stride as channels.

        Each entry is a sum over the taps of the kernel.
        """
        weight: Any = self.layer.module.weight
        weight = weight.detach().to(like)
        matrix = weight.flatten(1)
        if self._phases.numel() > 1:
            matrix = (weight.flatten(2) @ self._phases).flatten(1)
        if self._batchnorm is not None:
            matrix = matrix * batchnorm_scale(self._batchnorm).to(like)[:, None]
        matrix = matrix.unflatten(0, (self._groups, -1))
        return matrix.mT if getattr(self.layer.module, "transposed", False) else matrix


def slow_directions(layer: LinearLayer, composite: bool, like: Tensor, seed: int) -> SlowDirections | None:
    """Random starting directions for a layer; None if its kernel is not known."""
    return None if kernel_map(layer, composite) is None else SlowDirections(layer, composite, like, seed)


def settle(turned: Sequence[SlowDirections], grams: Sequence[Tensor]) -> list[float]:
    """Complete the iteration of several layers, given their Gram matrices on the host; return the largest gain of each.

    The gain is NaN if it is not finite. If a group's weights are zero, or nearly so, its directions are kept.
    """
    gains = [math.nan] * len(turned)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, (slow, gram) in enumerate(zip(turned, grams, strict=True)):
        if bool(torch.isfinite(gram).all()):
            alike.setdefault((slow.turned.device, slow.turned.dtype, gram.shape[2]), []).append(index)
    for places in alike.values():
        squares, vectors = torch.linalg.eigh(torch.cat([grams[i] for i in places]))
        lengths = squares.clamp_min(0).sqrt()  # squared gains
        largest = lengths.amax(1, keepdim=True)
        least = torch.finfo(turned[places[0]].turned.dtype).tiny / _NOISE
        shorten = 1 / lengths.clamp_min(_NOISE * largest.clamp_min(least))  # directions of rounding errors stay short
        factors = to_device((vectors * shorten[:, None]).flip(2), turned[places[0]].turned)  # the largest first
        groups = [len(grams[i]) for i in places]
        for i, factor, size in zip(places, factors.split(groups), largest.split(groups), strict=True):
            slow, usable = turned[i], size[..., None] > least
            found = slow.turned @ factor
            slow.block = found if bool(usable.all()) else torch.where(to_device(usable, found) > 0, found, slow.block)
            gains[i] = math.sqrt(float(size.max()))
    return gains


def _before(module: Any, axis: int) -> int:
    """The padding before the first input of an axis."""
    return int(module._reversed_padding_repeated_twice[2 * (len(module.kernel_size) - 1 - axis)])
