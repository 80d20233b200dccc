"""The interface of a defence to a training loop, and the defence that does nothing.

A defence is made with the norm that it allows. The training loop calls `prepare` before training, then `attach` with the
optimizer, adds `penalty` to the loss, and calls `finish` at the end; a defence leaves empty what it does not need. All of them
change the model in place, and leave it with plain weights and the state dict that it had.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Defence(Protocol):
    """The calls of a training loop; made with ``max_norm``, the norm allowed, and options of its own."""

    def prepare(self, model: nn.Module, example_input: Tensor) -> None:
        """Get the model ready, in place; ``example_input`` is a batch that it takes."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Act after every step of the optimizer."""

    def penalty(self) -> Tensor | float:
        """What is added to the loss, a scalar."""

    def finish(self, model: nn.Module) -> None:
        """Leave plain weights behind, in the model prepared or a copy of it."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here, beside the model: plain values and tensors."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class NoDefence:
    """Nothing at all; what the others inherit where they do nothing.

    Args:
        max_norm: The norm allowed in every layer.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        if not max_norm > 0:
            raise ValueError(f"{type(self).__name__}(max_norm={max_norm}): must be positive")
        self.max_norm = max_norm

    def prepare(self, model: nn.Module, example_input: Tensor) -> None:
        """Nothing."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing."""

    def penalty(self) -> Tensor | float:
        """Nothing."""
        return 0.0

    def finish(self, model: nn.Module) -> None:
        """Nothing."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing."""
