"""A layer as the training hook follows it: its directions from step to step, closer searches, and clips within a step.

`TrackedLayer` knows the directions and clips along them. `FollowedLayer` adds what a training run needs: a memory of the last
norm and of the parameters' versions, a state that can be saved, and the short Krylov searches and clips of a training step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..clipping import Move, TrackedLayer, multiply_by_groups_
from ..devices import to_device
from ..layers import LinearLayer
from ..numerics import power_of_two
from ..singular_values import Found, KrylovSpace, krylov_space, next_block, random_block

_Followed = TypeVar("_Followed", bound="FollowedLayer")
_REACH = 5e-3  # above its target, what a training step takes down along the directions found
_STIR = 0.1  # of a random vector beside one or two in a search, so that it is blind to no direction
_EASY = 1e4  # up to this norm, and down to one over it, fourth powers are far from the limits of float32
_MOST_OF_A_ROW = 64  # more than any coefficient of `rayleigh_ritz`
_AT_ONCE = 4  # directions that a search finds, all of which are clipped
_MOST_MISSED = 1.1  # factor by which warm power steps may be taken to fall short


@dataclass(eq=False)
class FollowedLayer(TrackedLayer):
    """A layer with the singular directions that are followed in it while it trains."""

    next: Tensor | None = field(default=None)  # (groups, n, in / groups), what the last search found next to them
    estimate: float = field(default=math.nan)
    initial: float = field(default=math.nan)
    target: float = field(default=math.inf)
    missed: float = field(default=1.0)  # factor by which power steps fall short
    seen: int = field(default=-1)  # clipper step of the estimate
    remembers: bool = field(default=True)  # what is found next to the vectors, in their memory three times
    _versions: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls: type[_Followed], layer: LinearLayer, *, vectors: int, composite: bool | None, seed: int, move: Move | None = None,
        target: float = math.inf,
    ) -> _Followed:  # fmt: skip
        """Start to follow a layer from random directions, towards a target norm."""
        followed = super().of(layer, vectors=vectors, composite=composite, seed=seed, move=move)
        followed.target = target
        return followed

    def resolve(self, composite: bool) -> None:
        """Settle what is clipped: the composite with the batch normalisation, or the layer alone."""
        super().resolve(composite)
        self.next = None if self.next is None else self.next.to(self.operator.device, self.operator.dtype)

    def entry(self) -> dict[str, Any]:
        """What `restore` needs: plain values and a tensor."""
        return {
            "vectors": self.vectors.clone(), "left": None if self.left is None else self.left.clone(),
            "next": None if self.next is None else self.next.clone(),
            "composite": self.composite, "estimate": self.estimate, "seen": self.seen,
            "initial": self.initial, "target": self.target, "missed": self.missed,
        }  # fmt: skip

    def restore(self, entry: dict[str, Any]) -> None:
        """Go on from the entry of a clipper's state dict."""
        self.composite = entry["composite"]
        if self.composite is not None:
            self.resolve(self.composite)
        self.vectors = entry["vectors"].to(self.vectors)
        self.left = None if entry["left"] is None else entry["left"].to(self.vectors)
        self.next = entry["next"].to(self.vectors) if self.remembers and entry.get("next") is not None else None
        self.estimate, self.seen, self.initial = entry["estimate"], entry["seen"], entry["initial"]
        self.target, self.missed = entry["target"], entry["missed"]

    @property
    def versions(self) -> list[int]:
        """How often each parameter has been changed in place, as far as torch counts it."""
        return [p._version for p in self.move.parameters(self.layer)]

    def note_changes(self) -> None:
        """Take what has been done to the parameters so far as seen."""
        self._versions = self.versions

    @property
    def changes_unseen(self) -> int:
        """How often a parameter has been changed in place since `note_changes`."""
        return self.changes_since(self._versions or self.versions)

    def changes_since(self, versions: list[int]) -> int:
        """How often a parameter has been changed in place since they had these versions."""
        return max(now - then for now, then in zip(self.versions, versions, strict=True))

    @property
    def weights_now(self) -> list[tuple[int, int]]:
        """What tells whether what the operator reads has been replaced or, as far as torch counts it, changed in place."""
        module, norm = self.layer.module, self.layer.batchnorm if self.composite else None
        parts: list[nn.Module] = [*module.modules()] if parametrize.is_parametrized(module) else [module]
        parts += [] if norm is None else [norm]
        read = [t for part in parts for t in (*part._parameters.values(), *part._buffers.values())]
        return [(t._version, t.data_ptr()) for t in read if t is not None]

    @property
    def changes_in_passes(self) -> bool:
        """Whether a pass forward changes the operator, as it does where a normalisation's statistics follow the batches."""
        return bool(self.composite) and self.layer.batchnorm is not None and self.layer.batchnorm.training

    def search(self, steps: int, seed: int, beside: Tensor | None = None) -> KrylovSpace:
        """A short Krylov run, from which `settle` turns the vectors towards the top singular directions.

        The run starts from where the vectors are, stirred, so that it is blind to no direction. What the last one found next to
        them is taken in, and directions ``beside`` of each group, (groups, any number, inputs / groups), that may have grown.
        """
        self.follow_device()
        known = 0 < self.estimate < math.inf and not 1 / _EASY < self.estimate < _EASY
        self.scale = power_of_two(self.estimate) if known else 1.0
        start, stir = self.vectors, random_block(self.operator, self.vectors.shape[1], seed, self.vectors.device)
        rows = [row for row in (beside, self.next) if row is not None]
        others = torch.cat(rows, 1) if rows else None
        return krylov_space(self._scaled(), torch.add(start, stir, alpha=_STIR / start.shape[2] ** 0.5), steps, others)

    def settle(self, space: KrylovSpace, values: Tensor, coefficients: Tensor) -> float:
        """Follow what a search found, given what `rayleigh_ritz` made of its numbers; the largest value, NaN if not finite."""
        if not bool(torch.isfinite(values).all()):
            return math.nan
        k = max(self.vectors.shape[1], _AT_ONCE)
        values, C = values[:, :k], coefficients[:, :k]
        left = C / values[..., None].clamp_min(_MOST_OF_A_ROW * torch.finfo(space.V.dtype).tiny)  # of a value of 0 finite
        m = int((C != 0).any(1).any(0).nonzero().amax()) + 1 if bool(C.any()) else 1  # rows beyond may be NaN
        factors = to_device(torch.stack([left, C])[..., :m], space.V)
        triplets = Found(values.to(space.V.dtype), factors[0] @ space.images[:, :m], factors[1] @ space.V[:, :m])
        right = triplets.right[:, : self.vectors.shape[1]]
        if self.remembers:
            self.next = triplets.right[:, right.shape[1] :]
        onward = self._onward(triplets, right if right.shape[1] == 1 else next_block(right, self.vectors))
        return float(self.follow(onward).max())

    def learn(self, found: float, searched: float) -> None:
        """Remember by which factor a power step fell short of a search: power steps are taken to miss as much from then on.

        Every search that finds them right makes it less. Of vectors gone cold, which tell nothing of warm ones, little counts.
        """
        short = min(searched / found, _MOST_MISSED) if found > 0 else 1.0
        self.missed = max(1 + 0.9 * (self.missed - 1), short)

    def hold_(self, target: float) -> None:
        """Take what was just found down to the target: most of it by a rescale, the last bit along the directions found.

        Its values are known on the host. What is far above the target is spread over more directions than are found, as it is
        where training starts. Each group goes by itself; of a parametrised weight nobody knows that its norm follows a rescale.
        """
        values = self.found.values
        if not parametrize.is_parametrized(self.layer.module, "weight"):
            largest = values.amax(1, keepdim=True)
            factors = (target * (1 + _REACH) / largest.clamp_min(target)).clamp_max(1)  # (g, 1)
            multiply_by_groups_(self.move.rescaled(self.layer), factors)
            values = values * factors
        above = max(1, int((values > target).sum(1).max()))
        self.found = Found(values[:, :above], self.found.left[:, :above], self.found.right[:, :above])
        self.clip_directions_(target)
        self.seen = -1  # measured again when asked for

    def forget(self) -> None:
        """Let go of what was last found; the vectors stay. On large maps it would take the memory of some activations."""
        self.__dict__.pop("found", None)
