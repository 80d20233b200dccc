"""Whether a convolution is clipped together with the batch normalisation behind it, and what is said where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..clipping import Move, MoveWeight
from ..layers import LinearLayer
from ..user_warnings import counted, warn_user
from .followed_layer import FollowedLayer

Composites = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Choice:
    """What was asked for: "auto", "always" or "never", and what is moved.

    Raises:
        ValueError: there is no such choice, or the two do not go together.
    """

    composites: Composites
    move: Move

    def __post_init__(self) -> None:
        if self.composites not in ("auto", "always", "never"):
            raise ValueError(f"FastClip(composites={self.composites!r}): expected 'auto', 'always' or 'never'")
        if self.composites == "never" and self._gamma_moves:
            raise ValueError(f"FastClip(composites='never', move={self.move!r}): γ moves composites only")

    @property
    def _gamma_moves(self) -> bool:
        return not isinstance(self.move, MoveWeight)

    def together(self, layer: LinearLayer) -> bool:
        """Whether a layer is clipped with its batch normalisation, in the mode that this is in now."""
        if layer.batchnorm is None or self.composites == "never":
            return False
        return self.composites == "always" or self._gamma_moves or not layer.batchnorm.training

    def _alone(self, layers: Sequence[LinearLayer]) -> list[str]:
        """Names of those with a batch normalisation behind them that are clipped without it."""
        return [layer.name for layer in layers if layer.batchnorm is not None and not self.together(layer)]

    def warn_of_training(self, layers: Sequence[LinearLayer]) -> None:
        """Say which of these are clipped alone as their normalisation trains."""
        if self.composites == "auto" and (alone := self._alone(layers)):
            warn_user(
                f"FastClip: behind {counted(alone)} a batch normalisation trains on batch statistics, so what is in front "
                "of it is clipped alone and the normalisation can undo it. Freeze its statistics (put the batch normalisations "
                "in eval mode) to clip the composites."
            )

    def warn_of_thawed(self, tracked: Sequence[FollowedLayer]) -> bool:
        """Say which composites' normalisations train again that did not where that was settled; whether there are any."""
        if self.composites != "auto" or self._gamma_moves:
            return False
        thawed = [part.layer.name for part in tracked if part.changes_in_passes]
        if not thawed:
            return False
        warn_user(
            f"FastClip: behind {counted(thawed)} the batch normalisation trains on batch statistics again, which were frozen "
            "at the first step. It undoes clips of the composite, which then drive the weight to zero: put the batch "
            "normalisations in eval mode after each model.train()."
        )
        return True

    def check_bound(self, lipschitz_target: float, layers: Sequence[LinearLayer]) -> None:
        """See that what is clipped is what the network's bound is made of.

        Raises:
            ValueError: a layer is clipped without the batch normalisation behind it.
        """
        if alone := self._alone(layers):
            raise ValueError(
                f"FastClip(lipschitz_target={lipschitz_target:g}): {counted(alone)} would be clipped without the batch "
                "normalisation behind, so that no norm of theirs bounds the network. Train with the statistics frozen (batch "
                "normalisations in eval mode), fold them (fold_batchnorms_), or give move=MoveGamma()"
            )
