"""The interface of a defence to a training loop, and the defence that does nothing.

A defence is constructed with the largest norm that it allows. The training loop calls `prepare` before training, then `attach`
with the optimizer, adds `penalty` to the loss, and calls `finish` at the end; a method that a defence does not need does
nothing. All defences change the model in place, and leave it without parametrisations and with its original state dict keys.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Defence(Protocol):
    """The methods that a training loop calls; constructed with ``max_norm``, the norm allowed, and its own options."""

    def prepare(self, model: nn.Module, example_input: Tensor) -> None:
        """Prepare the model in place; ``example_input`` is a batch for the model."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook the optimizer, to act after each of its steps."""

    def penalty(self) -> Tensor | float:
        """A scalar that is added to the loss."""

    def finish(self, model: nn.Module) -> None:
        """End the defence of the prepared model, or of a copy of it, which then has no parametrisations."""

    def state(self) -> dict[str, Any]:
        """The defence's state for `restore`, without the model's: plain values and tensors."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""


class NoDefence:
    """No defence, and the base class of the other defences: its methods do nothing.

    Args:
        max_norm: The norm allowed in every layer.

    Raises:
        ValueError: ``max_norm`` is not positive.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        if not max_norm > 0:
            raise ValueError(f"{type(self).__name__}(max_norm={max_norm}): must be positive")
        self.max_norm = max_norm

    def prepare(self, model: nn.Module, example_input: Tensor) -> None:
        """Do nothing."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing."""

    def penalty(self) -> Tensor | float:
        """Zero."""
        return 0.0

    def finish(self, model: nn.Module) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Any]:
        """An empty state."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing."""
