"""How a training step looks at one layer: by a power step or a short Krylov run, whose numbers are asked of the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .asking import Asking, together
from .tracking import TrackedLayer

_NON_FINITE = "FastClip.step: the weights of layer '{}' hold NaN or infinite values; training has diverged"


class NotFiniteError(ValueError):
    """Weights hold NaN or infinite values."""


def measure(layers: Sequence[TrackedLayer], step: int) -> Asking[list[float]]:
    """`measured` of several layers at once."""
    return together([measured(tracked, step) for tracked in layers], [tracked.home for tracked in layers])


def measured(tracked: TrackedLayer, step: int) -> Asking[float]:
    """One power step on a layer; what is found.

    Raises:
        NotFiniteError: its weights are not finite.
    """
    tracked.note_changes()
    try:
        values = tracked.power_step()
        found = tracked.found
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise not_finite(tracked) from None
    values = (yield [values])[0]
    if tracked.found is found:  # none was asked for in between
        tracked.know(values)
    norm = float(values.max())
    if not math.isfinite(norm):
        raise not_finite(tracked)
    tracked.estimate, tracked.seen = norm, step
    return norm


def look(tracked: TrackedLayer, steps: int, seed: int, toward: Tensor | None = None) -> Asking[float]:
    """A closer look at one layer: what a short Krylov run finds.

    Raises:
        NotFiniteError: its weights are not finite.
    """
    tracked.note_changes()
    state = tracked.search(steps, seed, toward)
    found = tracked.settle(state, (yield [state.B])[0])
    if not math.isfinite(found):
        raise not_finite(tracked)
    return found


def not_finite(tracked: TrackedLayer) -> NotFiniteError:
    """The error that says so."""
    return NotFiniteError(_NON_FINITE.format(tracked.layer.name))
