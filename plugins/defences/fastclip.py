"""FastClip as a defence that fine-tuning selects by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robust_spectral import FastClip

from .base import NoDefence


class FastClipDefence(NoDefence):
    """`FastClip` with its defaults: convolutions and dense layers, each with the batch normalisation after it if frozen."""

    composites: Any = "auto"
    clipper: FastClip

    def prepare(self, model: nn.Module, example_input: Tensor) -> None:
        """Make the clipper, which finds the layers."""
        self.clipper = FastClip(model, example_input, self.max_norm, composites=self.composites)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip after every step of the optimizer."""
        self.clipper.attach(optimizer)

    def finish(self, model: nn.Module) -> None:
        """Clip until every norm is proved.

        Raises:
            ValueError: the model is not the one that was prepared.
        """
        if self.clipper.layers[0].module not in set(model.modules()):
            raise ValueError("FastClipDefence.finish: give the model that was prepared; a copy needs a FastClip of its own")
        self.clipper.finish()

    def state(self) -> dict[str, Any]:
        """The clipper's state."""
        return self.clipper.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a clipper's state."""
        self.clipper.load_state_dict(state)


class FastClipComposite(FastClipDefence):
    """`FastClip` that always clips a layer together with the batch normalisation after it."""

    composites = "always"
