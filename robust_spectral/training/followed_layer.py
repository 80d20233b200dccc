"""A layer as the training hook follows it: its directions from step to step, short Krylov searches, and clips within a step.

`TrackedLayer` keeps the directions and clips along them. `FollowedLayer` adds the last norm and the version counters of the
parameters, a state that can be saved, and the short Krylov searches and clips of a training step.
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
from ..operators import is_overridden, is_plain
from ..singular_values import Found, KrylovSpace, krylov_space, next_block, random_block

_Followed = TypeVar("_Followed", bound="FollowedLayer")
_REACH = 5e-3  # relative excess over its target that a training step clips along the directions found
_STIR = 0.1  # length of a random vector that a search adds to each start vector of length 1, so that no direction is missed
_EASY = 1e4  # no scaling for norms from 1 / _EASY to _EASY, whose fourth powers are far from the limits of float32
_MOST_OF_A_ROW = 64  # upper bound of the coefficients from `rayleigh_ritz`
_AT_ONCE = 4  # directions that a search finds, or more if more are followed; all are clipped
_MOST_MISSED = 1.1  # largest factor by which warm power steps are taken to fall short


@dataclass(eq=False)
class FollowedLayer(TrackedLayer):
    """A layer with the singular directions that are followed in it while it trains.

    Attributes:
        estimate: The norm last found, a lower estimate.
        initial: The norm at the first step, from which a warm-up falls.
        target: The norm to clip to.
    """

    next: Tensor | None = field(default=None)  # (groups, n, in / groups), the next right vectors that the last search found
    estimate: float = field(default=math.nan)
    initial: float = field(default=math.nan)
    target: float = field(default=math.inf)
    missed: float = field(default=1.0)  # factor by which power steps fall short
    seen: int = field(default=-1)  # clipper step of the estimate; -1 if it has to be measured again
    remembers: bool = field(default=True)  # whether `next` is kept, which takes up to three times the memory of the vectors
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
        """Decide whether the layer is clipped together with its batch normalisation (if it has one) or alone."""
        super().resolve(composite)
        self.next = None if self.next is None else self.next.to(self.operator.device, self.operator.dtype)

    def entry(self) -> dict[str, Any]:
        """The state that `restore` takes: plain values and tensors."""
        return {
            "vectors": self.vectors.clone(), "left": None if self.left is None else self.left.clone(),
            "next": None if self.next is None else self.next.clone(),
            "composite": self.composite, "estimate": self.estimate, "seen": self.seen,
            "initial": self.initial, "target": self.target, "missed": self.missed,
        }  # fmt: skip

    def restore(self, entry: dict[str, Any]) -> None:
        """Continue from the entry of a clipper's state dict."""
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
        """Record the current version counters of the parameters, for `changes_unseen`."""
        self._versions = self.versions

    @property
    def changes_unseen(self) -> int:
        """How often a parameter has been changed in place since `note_changes`."""
        return self.changes_since(self._versions or self.versions)

    def changes_since(self, versions: list[int]) -> int:
        """The largest number of in-place changes of a parameter since the version counters were ``versions``."""
        return max(now - then for now, then in zip(self.versions, versions, strict=True))

    @property
    def weights_now(self) -> list[tuple[int, int]]:
        """Version counters and addresses of the tensors that the operator reads.

        Two values differ if a tensor has been replaced or, as far as torch counts it, changed in place.
        """
        module, norm = self.layer.module, self.layer.batchnorm if self.composite else None
        parts: list[nn.Module] = [module] if is_plain(module) else [*module.modules()]
        parts += [] if norm is None else [norm]
        read = [t for part in parts for t in (*part._parameters.values(), *part._buffers.values())]
        return [(t._version, t.data_ptr()) for t in read if t is not None]

    @property
    def changes_in_passes(self) -> bool:
        """Whether a forward pass changes the operator, as it does if a normalisation updates its running statistics."""
        return bool(self.composite) and self.layer.batchnorm is not None and self.layer.batchnorm.training

    def search(self, steps: int, seed: int, beside: Tensor | None = None) -> KrylovSpace:
        """Run a short Krylov search, from which `settle` updates the vectors.

        The search starts from the followed vectors plus a small random part, so that it misses no direction. Its space also
        includes the ``next`` vectors of the last search, and directions ``beside`` of each group, (groups, any number, inputs /
        groups), whose values may have grown.
        """
        self.follow_device()
        known = 0 < self.estimate < math.inf and not 1 / _EASY < self.estimate < _EASY
        self.scale = power_of_two(self.estimate) if known else 1.0
        start, stir = self.vectors, random_block(self.operator, self.vectors.shape[1], seed, self.vectors.device)
        rows = [row for row in (beside, self.next) if row is not None]
        others = torch.cat(rows, 1) if rows else None
        return krylov_space(self._scaled(), torch.add(start, stir, alpha=_STIR / start.shape[2] ** 0.5), steps, others)

    def settle(self, space: KrylovSpace, values: Tensor, coefficients: Tensor) -> float:
        """Follow the result of a search, given the values and coefficients from `rayleigh_ritz`; return the largest value.

        Returns NaN if the values are not finite.
        """
        if not bool(torch.isfinite(values).all()):
            return math.nan
        k = max(self.vectors.shape[1], _AT_ONCE)
        values, C = values[:, :k], coefficients[:, :k]
        left = C / values[..., None].clamp_min(_MOST_OF_A_ROW * torch.finfo(space.V.dtype).tiny)  # finite also for a value of 0
        m = int((C != 0).any(1).any(0).nonzero().amax()) + 1 if bool(C.any()) else 1  # later rows of the space may be NaN
        factors = to_device(torch.stack([left, C])[..., :m], space.V)
        triplets = Found(values.to(space.V.dtype), factors[0] @ space.images[:, :m], factors[1] @ space.V[:, :m])
        right = triplets.right[:, : self.vectors.shape[1]]
        if self.remembers:
            self.next = triplets.right[:, right.shape[1] :]
        onward = self._onward(triplets, right if right.shape[1] == 1 else next_block(right, self.vectors))
        return float(self.follow(onward).max())

    def learn(self, found: float, searched: float) -> None:
        """Update the factor by which power steps fall short, from the norm of a power step and of a search just after it.

        The factor rises at once to the ratio of the two norms, and its excess over 1 decays by a tenth with each search. The
        ratio is capped, as vectors that are far from converged say nothing about warm ones.
        """
        short = min(searched / found, _MOST_MISSED) if found > 0 else 1.0
        self.missed = max(1 + 0.9 * (self.missed - 1), short)

    def hold_(self, target: float) -> None:
        """Clip the values just found to the target: most of the excess by a rescale, the rest along the directions found.

        The values are on the host. A norm far above the target is spread over more directions than are found, as at the start
        of training. Each group is rescaled separately. A parametrised weight, or one of several in a replaced forward pass, is
        not rescaled, as the norm may not follow.
        """
        values = self.found.values
        if not (parametrize.is_parametrized(self.layer.module, "weight") or is_overridden(self.layer.module)):
            largest = values.amax(1, keepdim=True)
            factors = (target * (1 + _REACH) / largest.clamp_min(target)).clamp_max(1)  # (g, 1)
            multiply_by_groups_(self.move.rescaled(self.layer), factors)
            values = values * factors
        above = max(1, int((values > target).sum(1).max()))
        self.found = Found(values[:, :above], self.found.left[:, :above], self.found.right[:, :above])
        self.clip_directions_(target)
        self.seen = -1  # measured again when requested

    def forget(self) -> None:
        """Drop the triplets last found, which on large feature maps take the memory of some activations; the vectors stay."""
        self.__dict__.pop("found", None)
