"""Measurements of a layer's norm in a training step: power steps and short Krylov searches, with their device reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..singular_values import rayleigh_ritz
from .device_reads import Asking, together
from .followed_layer import FollowedLayer

_NON_FINITE = "FastClip.step: the weights of layer '{}' contain NaN or infinite values; training has diverged"


class NotFiniteError(ValueError):
    """The error of weights that contain NaN or infinite values."""


def measure(layers: Sequence[FollowedLayer], step: int) -> Asking[list[float]]:
    """`measured` of several layers, with one read from the device for all."""
    return together([measured(tracked, step) for tracked in layers])


def measured(tracked: FollowedLayer, step: int) -> Asking[float]:
    """Take one power step on a layer; return the norm found.

    If another measurement of the layer was made meanwhile, return its estimate instead.

    Raises:
        NotFiniteError: the layer's weights are not finite.
    """
    tracked.note_changes()
    replaced = tracked.replaced
    try:
        onward = tracked.next_step()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise not_finite(tracked) from None
    values = (yield [onward.found.values])[0]
    norm = float(values.max())
    if not math.isfinite(norm):
        raise not_finite(tracked)
    if tracked.replaced == replaced:  # otherwise a later measurement knows more
        tracked.follow(onward, values)
        tracked.estimate, tracked.seen = norm, step
    return tracked.estimate


def look(tracked: FollowedLayer, steps: int, seed: int, beside: Tensor | None = None) -> Asking[float]:
    """Refresh one layer by a short Krylov search; return the norm found.

    Raises:
        NotFiniteError: the layer's weights are not finite.
    """
    return (yield from looks([tracked], [steps], seed, [beside]))[0]


def looks(
    layers: Sequence[FollowedLayer], steps: Sequence[int], seed: int, beside: Sequence[Tensor | None]
) -> Asking[list[float]]:
    """Refresh several layers by short Krylov searches with the given numbers of ``steps``; return the norms found.

    Raises:
        NotFiniteError: the weights of a layer are not finite.
    """
    spaces = []
    for tracked, length, rows in zip(layers, steps, beside, strict=True):
        tracked.note_changes()
        spaces.append(tracked.search(length, seed, rows))
    came = yield [tensor for space in spaces for tensor in space.numbers()]
    found = []
    for tracked, space, ritz in zip(layers, spaces, _ritz_of([came[i : i + 3] for i in range(0, len(came), 3)]), strict=True):
        found.append(tracked.settle(space, *ritz))
        if not math.isfinite(found[-1]):
            raise not_finite(tracked)
        tracked.estimate = found[-1]
    return found


def _ritz_of(numbers: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """`rayleigh_ritz` of the numbers of several spaces, in one computation for all of equal type and size."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, (lengths, rows, _) in enumerate(numbers):
        alike.setdefault((lengths.dtype, lengths.shape[1], rows.shape[1]), []).append(index)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for (dtype, *_), those in alike.items():
        lengths, rows, images = (torch.cat(parts) for parts in zip(*(numbers[i] for i in those), strict=True))
        values, coefficients = rayleigh_ritz(lengths, rows, images, torch.finfo(dtype).eps)
        groups = [len(numbers[i][0]) for i in those]
        found |= dict(zip(those, zip(values.split(groups), coefficients.split(groups), strict=True), strict=True))
    return [found[index] for index in range(len(numbers))]


def not_finite(tracked: FollowedLayer) -> NotFiniteError:
    """The error for a layer whose weights are not finite."""
    return NotFiniteError(_NON_FINITE.format(tracked.layer.name))
