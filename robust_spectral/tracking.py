"""A layer with the singular directions that are followed in it, and the smallest change of a weight that lowers them.

For weights W in which the operator A is linear, with top triplets (σ_i, u_i, v_i) and G_i = ∂⟨u_i, A v_i⟩/∂W, the update
W - Σ a_i G_i with the a >= 0 that solves Σ_j ⟨G_i, G_j⟩ a_j = σ_i - c brings every ⟨u_i, A v_i⟩ above c to c, and is the
smallest change of W that does. For a dense layer it is the exact clip of those singular values. Groups of a grouped
convolution are followed and clipped separately, all at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .affine import is_plain
from .asking import to_device
from .krylov import KrylovSpace, apply_grouped, from_groups, krylov_space, random_block
from .layers import LinearLayer
from .moves import Move, MoveWeight, add_by_groups_, by_groups, multiply_by_groups_, smallest_change
from .norms import NormInterval, spectral_norm
from .numerics import power_of_two
from .operators import LinearOperator
from .spectrum import Found, Lanczos, dense_ritz, dense_work, next_block, power_step, unit_rows

_SMALL = 3e8  # multiply-adds of a dense decomposition that is cheaper than a search
_REACH = 5e-3  # above its target, what a training step takes down along the directions found
_STIR = 0.1  # of a random vector beside one or two in a search, so that it is blind to no direction
_EASY = 1e4  # up to this norm, and down to one over it, fourth powers are far from the limits of float32
_MOST_OF_A_ROW = 64  # more than any coefficient of `rayleigh_ritz`
_AT_ONCE = 4  # directions that a search finds, all of which are clipped
_MOST_MISSED = 1.1  # factor by which warm power steps may be taken to fall short
TOLERANCE = 1e-3  # a clipped layer's proved norm is at most (1 + TOLERANCE) max_norm


@dataclass(frozen=True)
class Onward:
    """Triplets found, and the vectors to go on from, back from their left ones where the last half step was forward."""

    found: Found
    vectors: Tensor
    forward: bool = False


@dataclass(eq=False)
class TrackedLayer:
    """A layer with the singular directions that are followed in it."""

    layer: LinearLayer
    move: Move
    vectors: Tensor  # (groups, k, in / groups), orthonormal rows
    composite: bool | None  # None until settled
    operator: LinearOperator
    next: Tensor | None = field(default=None)  # (groups, n, in / groups), what the last search found next to them
    left: Tensor | None = field(default=None)  # (groups, 1, out / groups) where the last half of a power step was forward
    estimate: float = field(default=math.nan)
    initial: float = field(default=math.nan)
    target: float = field(default=math.inf)
    missed: float = field(default=1.0)  # factor by which power steps fall short
    scale: float = field(default=1.0)  # power of two the operator is divided by, so that squares stay finite
    seen: int = field(default=-1)  # clipper step of the estimate
    replaced: int = field(default=0)  # how often the vectors have been
    remembers: bool = field(default=True)  # what is found next to the vectors, in their memory three times
    found: Found = field(init=False, repr=False)  # by the last power step or search; values on the host once asked for
    _proved: _Proved | None = field(default=None)
    _versions: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls, layer: LinearLayer, *, vectors: int, composite: bool | None, seed: int, move: Move | None = None,
        target: float = math.inf,
    ) -> TrackedLayer:  # fmt: skip
        """Start to follow a layer from random directions; whether with its batch normalisation may be settled later."""
        move = move or MoveWeight()
        move.parameters(layer)
        operator = _operator(layer, bool(composite))
        size = math.prod(layer.in_shape) // operator.groups
        rows = random_block(operator, min(vectors, size, math.prod(operator.out_shape) // operator.groups), seed)
        return cls(layer, move, torch.linalg.qr(rows.mT)[0].mT, composite, operator, target=target)

    def __getstate__(self) -> dict[str, Any]:
        """All but what holds on to this very module: a copy follows the copy of the layer."""
        return {key: value for key, value in self.__dict__.items() if key not in ("operator", "found")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.operator = _operator(self.layer, bool(self.composite))

    @property
    def kind(self) -> str:
        """The layer's kind, "+bn" only where the composite is what is clipped."""
        return self.layer.kind if self.composite else self.layer.kind.removesuffix("+bn")

    def resolve(self, composite: bool) -> None:
        """Settle what is clipped: the composite with the batch normalisation, or the layer alone."""
        self.composite = composite and self.layer.batchnorm is not None
        self.operator = _operator(self.layer, self.composite)
        self.vectors = self.vectors.to(self.operator.device, self.operator.dtype)
        self.left = None if self.left is None else self.left.to(self.operator.device, self.operator.dtype)
        self.next = None if self.next is None else self.next.to(self.operator.device, self.operator.dtype)

    @property
    def moved(self) -> bool:
        """Whether the layer has gone to another device since it was last looked at."""
        return self.vectors.device != self.device

    @property
    def device(self) -> torch.device:
        """Where the layer is now."""
        return self.move.parameters(self.layer)[0].device

    def follow_device(self) -> None:
        """Go there, too."""
        if self.moved:
            self.resolve(bool(self.composite))

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

    def power_step(self) -> Tensor:
        """A warm power step; the values found, (groups, k), without a wait for the device."""
        return self.follow(self.next_step())

    def next_step(self) -> Onward:
        """Where a warm power step leads, which `follow` takes; of weights that are not finite neither are the values found.

        A block takes a whole step. A single vector takes half of one, forward and back in turn, as either half already has a
        pair u, v and a value ⟨u, A v⟩ of the weights as they are.
        """
        self.follow_device()
        if self.vectors.shape[1] > 1:
            ritz, image = power_step(self._scaled(), self.vectors)
            block = next_block(image, self.vectors)
            return self._onward(ritz, torch.where(torch.isfinite(block).all(), block, self.vectors))  # squares may overflow
        if self.left is None:
            right, (left, size) = self.vectors, unit_rows(apply_grouped(self._scaled(), self.vectors))
        else:
            left, (right, size) = self.left, unit_rows(apply_grouped(self._scaled().H, self.left), self.vectors)
        return self._onward(Found(size[..., 0], left, right), right, forward=self.left is None)

    def follow(self, onward: Onward, values: Tensor | None = None) -> Tensor:
        """Go on from there; the values found, or those given, which are the same on the host."""
        self.found = onward.found if values is None else replace(onward.found, values=values)
        self.vectors, self.left = onward.vectors, onward.found.left if onward.forward else None
        self.replaced += 1
        return self.found.values

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

    def clip_directions_(self, max_norm: float) -> None:
        """Bring every followed direction above ``max_norm`` to it, by the smallest change of what moves that does."""
        excess, G = (self.found.values - max_norm).clamp_min(0), self.gradients()  # (g, k), (g, k, numbers / g)
        parameters = self.move.parameters(self.layer)
        if excess.numel() == 1:  # as for most layers in most steps, so in few computations
            square = torch.linalg.vector_norm(G).square().clamp_min(torch.finfo(G.dtype).tiny)
            add_by_groups_(parameters, G[:, 0], over=square, times=-float(excess))
        else:
            a = smallest_change(G, to_device(excess, G))
            add_by_groups_(parameters, (-a[:, None] @ G)[:, 0])

    def forget(self) -> None:
        """Let go of what was last found; the vectors stay. On large maps it would take the memory of some activations."""
        self.__dict__.pop("found", None)

    def gradients(self) -> Tensor:
        """Those of the values just found by what moves, (groups, k, numbers / groups)."""
        A = self.operator
        X, U = from_groups(self.found.right, A.in_shape), from_groups(self.found.left, A.out_shape)
        return by_groups(self.move.gradients(self.layer, X, U, bool(self.composite)), A.groups)

    def _scaled(self) -> LinearOperator:
        return self.operator if self.scale == 1 else self.operator.over(self.scale)

    def enclosure(self, failure_probability: float, rtol: float = TOLERANCE / 4) -> NormInterval:
        """The norm now; computed anew only when a tensor has changed or a closer interval is asked for.

        The default width is close enough to hold the norm against a target.
        """
        parts = [self.layer.module, *([self.layer.batchnorm] if self.composite and self.layer.batchnorm is not None else [])]
        tensors = [t.detach() for part in parts for t in [*part.parameters(), *part.buffers()]]
        asked = self.composite, failure_probability
        known = self._proved
        if known is None or known.asked != asked or known.rtol > rtol or not _same(known.tensors, tensors):
            norm = spectral_norm(self.operator, failure_probability, rtol=rtol)
            known = self._proved = _Proved(norm, rtol, asked, [t.clone() for t in tensors])
        return known.norm

    def largest(self, max_norm: float) -> float:
        """The largest value found, its directions followed: by a power step, and by a closer search once that is content.

        A small layer is decomposed instead, and all its directions above ``max_norm`` are followed (up to 64).
        """
        if dense_work(self.operator) <= _SMALL:
            ritz = dense_ritz(self._scaled(), 64)
            return float(self.follow(self._onward(ritz, ritz.right[:, : self.vectors.shape[1]])).max())
        largest = float(self.power_step().max())
        if largest > max_norm * (1 + TOLERANCE / 4):
            return largest
        steps = 32 if self.operator.groups == 1 else 12
        search = Lanczos(rtol=1e-2, max_steps=steps, each_group=True)
        start = self.vectors + 0.01 * random_block(self.operator, self.vectors.shape[1], seed=1) / self.vectors.shape[2] ** 0.5
        ritz = search.solve(self._scaled(), self.vectors.shape[1], start)  # not blind to what is new
        return float(self.follow(self._onward(ritz, torch.linalg.qr(ritz.right.mT)[0].mT)).max())

    def _onward(self, found: Found, vectors: Tensor, forward: bool = False) -> Onward:
        """From triplets of the scaled operator."""
        return Onward(found if self.scale == 1 else replace(found, values=found.values * self.scale), vectors, forward)


@dataclass(frozen=True)
class _Proved:
    """An interval, the width it was computed for, what was asked, and the tensors it holds for."""

    norm: NormInterval
    rtol: float
    asked: tuple[Any, ...]
    tensors: list[Tensor]


def _same(kept: list[Tensor], tensors: list[Tensor]) -> bool:
    return len(kept) == len(tensors) and all(
        a.shape == b.shape and a.device == b.device and torch.equal(a, b) for a, b in zip(kept, tensors, strict=True)
    )


def _operator(layer: LinearLayer, composite: bool) -> LinearOperator:
    """The operator that is clipped; in one block where groups cannot be clipped apart, as they may share what moves.

    Its kernel, a copy of the weight where there are strides, would not follow training; proofs make their own.
    """
    operator = replace(layer.operator(composite=composite), kernel=None)
    return operator if is_plain(layer.module) else replace(operator, groups=1)
