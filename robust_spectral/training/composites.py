"""The choice of whether a convolution is clipped together with the batch normalisation that follows it, and its warnings."""

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
    """The options ``composites`` ("auto", "always" or "never") and ``move`` of `FastClip`.

    Raises:
        ValueError: ``composites`` is unknown, or "never" is combined with a move of γ.
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
        """Whether a layer is clipped together with its batch normalisation, given the current mode of the normalisation."""
        if layer.batchnorm is None or self.composites == "never":
            return False
        return self.composites == "always" or self._gamma_moves or not layer.batchnorm.training

    def _alone(self, layers: Sequence[LinearLayer]) -> list[str]:
        """The names of the layers that a batch normalisation follows and that are clipped without it."""
        return [layer.name for layer in layers if layer.batchnorm is not None and not self.together(layer)]

    def warn_of_training(self, layers: Sequence[LinearLayer]) -> None:
        """Warn of the layers that are clipped alone because the batch normalisation after them trains."""
        if self.composites == "auto" and (alone := self._alone(layers)):
            warn_user(
                f"FastClip: after {counted(alone)} a batch normalisation trains on batch statistics, so the layer before it "
                "is clipped alone and the normalisation can undo the clip. Freeze its statistics (put the batch normalisations "
                "in eval mode) to clip the composites."
            )

    def warn_of_thawed(self, tracked: Sequence[FollowedLayer]) -> bool:
        """Warn of composites whose normalisation trains again but was frozen at the first step; return whether any does."""
        if self.composites != "auto" or self._gamma_moves:
            return False
        thawed = [part.layer.name for part in tracked if part.changes_in_passes]
        if not thawed:
            return False
        warn_user(
            f"FastClip: after {counted(thawed)} the batch normalisation trains on batch statistics again; it was frozen "
            "at the first step. The normalisation undoes clips of the composite, which then drive the weight to zero: put the "
            "batch normalisations in eval mode after each model.train()."
        )
        return True

    def check_bound(self, lipschitz_target: float, layers: Sequence[LinearLayer]) -> None:
        """Check that the clipped operators are the ones in the network's bound.

        Raises:
            ValueError: a layer is clipped without the batch normalisation that follows it.
        """
        if alone := self._alone(layers):
            raise ValueError(
                f"FastClip(lipschitz_target={lipschitz_target:g}): {counted(alone)} would be clipped without the batch "
                "normalisation that follows, so clipped norms do not bound the network. Train with frozen statistics (batch "
                "normalisations in eval mode), fold them (fold_batchnorms_), or give move=MoveGamma()"
            )
