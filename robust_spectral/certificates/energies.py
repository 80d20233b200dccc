"""Energies: linear functions of the changes of an operation's arguments, whose norm is at least that of its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Energy = Callable[[list[Any]], list[Tensor]]  # takes changes, (k, images, ...) each


class Scaled:
    """The change of one argument, each element times a factor: its own adjoint."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, given: list[Any]) -> list[Tensor]:
        """The changes, (k, images, ...), multiplied."""
        return [self.factor * given[0]]


def in_precision(energy: Energy, dtype: torch.dtype) -> Energy:
    """The same energy with its factors in a precision, if it has any."""
    return Scaled(energy.factor.to(dtype)) if isinstance(energy, Scaled) else energy
