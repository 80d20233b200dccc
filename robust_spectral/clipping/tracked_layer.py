"""A layer with the singular directions that are followed in it, and the smallest change of a weight that lowers their values.

For weights W in which the operator A is linear, with top triplets (σ_i, u_i, v_i) and G_i = ∂⟨u_i, A v_i⟩/∂W, the update
W - Σ a_i G_i with the a >= 0 that solves Σ_j ⟨G_i, G_j⟩ a_j = σ_i - c brings every ⟨u_i, A v_i⟩ above c to c, and is the
smallest change of W with this effect. For a dense layer it is the exact clip of those singular values. The groups of a grouped
convolution are followed and clipped separately, in the same computations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..devices import to_device
from ..layers import LinearLayer
from ..norms import NormInterval, spectral_norm
from ..operators import LinearOperator, full_precision_no_grad, is_overridden, is_plain
from ..singular_values import (
    Found,
    Lanczos,
    apply_grouped,
    dense_ritz,
    dense_work,
    from_groups,
    next_block,
    power_step,
    random_block,
    unit_rows,
)
from .moved_parameters import Move, MoveWeight
from .weight_updates import add_by_groups_, by_groups, smallest_change

_DENSE_WORK = 3e8  # multiply-adds of a dense decomposition, up to which it is cheaper than a search
_Tracked = TypeVar("_Tracked", bound="TrackedLayer")
TOLERANCE = 1e-3  # a clipped layer's proved norm is at most (1 + TOLERANCE) max_norm


@dataclass(frozen=True)
class Onward:
    """The result of a power step that is not adopted yet: the triplets found, and the right vectors of the next step.

    ``forward`` is set if the step was a half step with the operator; the next half step then applies the adjoint to its left
    vectors.
    """

    found: Found
    vectors: Tensor
    forward: bool = False


@dataclass(eq=False)
class TrackedLayer:
    """A layer with the singular directions that are followed in it."""

    layer: LinearLayer
    move: Move
    vectors: Tensor  # (groups, k, in / groups), orthonormal rows
    composite: bool | None  # whether the batch normalisation is included; None until decided
    operator: LinearOperator
    left: Tensor | None = field(default=None)  # (groups, 1, out / groups) if the last half step applied the operator
    scale: float = field(default=1.0)  # power of two the operator is divided by, so that squares stay finite
    replaced: int = field(default=0)  # the number of times that the vectors have been replaced
    found: Found = field(init=False, repr=False)  # by the last power step or search; its values may be on the host
    _proved: _Proved | None = field(default=None)

    @classmethod
    def of(
        cls: type[_Tracked], layer: LinearLayer, *, vectors: int, composite: bool | None, seed: int, move: Move | None = None
    ) -> _Tracked:
        """Start to follow a layer from random directions; ``composite`` None leaves the choice to a later call of `resolve`."""
        move = move or MoveWeight()
        _check_changeable(layer, move.parameters(layer))
        with full_precision_no_grad():
            operator = _operator(layer, bool(composite))
            size = math.prod(layer.in_shape) // operator.groups
            rows = random_block(operator, min(vectors, size, math.prod(operator.out_shape) // operator.groups), seed)
            if is_overridden(layer.module):  # whose forward pass may not use the parameters that would move
                move.gradients(layer, from_groups(rows[:, :1], operator.in_shape), _ones(operator), bool(composite))
            return cls(layer, move, torch.linalg.qr(rows.mT)[0].mT, composite, operator)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes except those bound to this very module, so that a copy follows the copy of the layer."""
        return {key: value for key, value in self.__dict__.items() if key not in ("operator", "found")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.operator = _operator(self.layer, bool(self.composite))

    @property
    def kind(self) -> str:
        """The layer's kind, with "+bn" only if it is clipped together with its batch normalisation."""
        return self.layer.kind if self.composite else self.layer.kind.removesuffix("+bn")

    def resolve(self, composite: bool) -> None:
        """Decide whether the layer is clipped together with its batch normalisation (if it has one) or alone."""
        self.composite = composite and self.layer.batchnorm is not None
        self.operator = _operator(self.layer, self.composite)
        self.vectors = self.vectors.to(self.operator.device, self.operator.dtype)
        self.left = None if self.left is None else self.left.to(self.operator.device, self.operator.dtype)

    @property
    def device(self) -> torch.device:
        """The device that the layer's parameters are on."""
        return self.move.parameters(self.layer)[0].device

    @property
    def moved(self) -> bool:
        """Whether the layer is on another device than the vectors followed."""
        return self.vectors.device != self.device

    def follow_device(self) -> None:
        """Move the vectors to the layer's device."""
        if self.moved:
            self.resolve(bool(self.composite))

    def power_step(self) -> Tensor:
        """Take a warm power step; return the values found, (groups, k), without a wait for the device."""
        return self.follow(self.next_step())

    def next_step(self) -> Onward:
        """Compute a warm power step, which `follow` adopts. If the weights are not finite, neither are the values found.

        A block of vectors takes a whole step. A single vector takes half a step, with the operator and its adjoint in
        alternation: either half already gives a pair u, v and the value ⟨u, A v⟩ for the current weights.
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
        """Adopt a power step or search; return its values, or the given ``values``, which are their copy on the host."""
        self.found = onward.found if values is None else replace(onward.found, values=values)
        self.vectors, self.left = onward.vectors, onward.found.left if onward.forward else None
        self.replaced += 1
        return self.found.values

    def clip_directions_(self, max_norm: float) -> None:
        """Lower every value found above ``max_norm`` to it, by the smallest change of the parameters that move."""
        excess, G = (self.found.values - max_norm).clamp_min(0), self.gradients()  # (g, k), (g, k, numbers / g)
        parameters = self.move.parameters(self.layer)
        if excess.numel() == 1:  # most layers in most steps, so with few computations
            square = torch.linalg.vector_norm(G).square().clamp_min(torch.finfo(G.dtype).tiny)
            add_by_groups_(parameters, G[:, 0], over=square, times=-float(excess))
        else:
            a = smallest_change(G, to_device(excess, G))
            add_by_groups_(parameters, (-a[:, None] @ G)[:, 0])

    def gradients(self) -> Tensor:
        """The gradients of the values just found with respect to the parameters that move, (groups, k, numbers / groups)."""
        A = self.operator
        X, U = from_groups(self.found.right, A.in_shape), from_groups(self.found.left, A.out_shape)
        return by_groups(self.move.gradients(self.layer, X, U, bool(self.composite)), A.groups)

    def _scaled(self) -> LinearOperator:
        return self.operator if self.scale == 1 else self.operator.divided_by(self.scale)

    def enclosure(self, failure_probability: float, rtol: float = TOLERANCE / 4) -> NormInterval:
        """The enclosure of the current norm, recomputed only if a tensor has changed or another or narrower one is needed.

        The default relative width is narrow enough to compare the norm with a target.
        """
        parts = [self.layer.module, *([self.layer.batchnorm] if self.composite and self.layer.batchnorm is not None else [])]
        tensors = [t.detach() for part in parts for t in [*part.parameters(), *part.buffers()]]
        asked = self.composite, failure_probability
        known = None if is_overridden(self.layer.module) else self._proved  # which may read other tensors
        if known is None or known.asked != asked or known.rtol > rtol or not _same(known.tensors, tensors):
            norm = spectral_norm(self.operator, failure_probability, rtol=rtol)
            known = self._proved = _Proved(norm, rtol, asked, [t.clone() for t in tensors])
        return known.norm

    def largest(self, max_norm: float) -> float:
        """Find and follow the largest singular values, and return the largest: by a power step, then by a Lanczos search.

        The search runs only if the power step finds nothing above ``max_norm``. A small layer is decomposed instead, and up to
        64 of its triplets are kept for the next clip.
        """
        if dense_work(self.operator) <= _DENSE_WORK:
            ritz = dense_ritz(self._scaled(), 64)
            return float(self.follow(self._onward(ritz, ritz.right[:, : self.vectors.shape[1]])).max())
        largest = float(self.power_step().max())
        if largest > max_norm * (1 + TOLERANCE / 4):
            return largest
        steps = 32 if self.operator.groups == 1 else 12
        search = Lanczos(rtol=1e-2, max_steps=steps, each_group=True)
        start = self.vectors + 0.01 * random_block(self.operator, self.vectors.shape[1], seed=1) / self.vectors.shape[2] ** 0.5
        ritz = search.solve(self._scaled(), self.vectors.shape[1], start)  # random parts, so that no direction is missed
        return float(self.follow(self._onward(ritz, torch.linalg.qr(ritz.right.mT)[0].mT)).max())

    def _onward(self, found: Found, vectors: Tensor, forward: bool = False) -> Onward:
        """An `Onward` from triplets of the scaled operator."""
        return Onward(found if self.scale == 1 else replace(found, values=found.values * self.scale), vectors, forward)


@dataclass(frozen=True)
class _Proved:
    """A proved enclosure, the relative width and arguments that it was computed for, and the tensors that it is valid for."""

    norm: NormInterval
    rtol: float
    asked: tuple[Any, ...]
    tensors: list[Tensor]


def _same(kept: list[Tensor], tensors: list[Tensor]) -> bool:
    return len(kept) == len(tensors) and all(
        a.shape == b.shape and a.device == b.device and torch.equal(a, b) for a, b in zip(kept, tensors, strict=True)
    )


def _ones(operator: LinearOperator) -> Tensor:
    return torch.ones(1, *operator.out_shape, dtype=operator.dtype, device=operator.device)


def _check_changeable(layer: LinearLayer, parameters: list[nn.Parameter]) -> None:
    if any(parameter.is_inference() for parameter in parameters):
        raise ValueError(
            f"clipping '{layer.name}' ({type(layer.module).__name__}): its weights were made in torch.inference_mode() and "
            "cannot be changed; make or load the model outside of it"
        )


def _operator(layer: LinearLayer, composite: bool) -> LinearOperator:
    """The operator that is clipped, as a single group if its groups may share parameters and so cannot be clipped separately.

    Its kernel is left out: with strides it is a copy of the weight and would not follow training. Enclosures build their own.
    """
    operator = replace(layer.operator(composite=composite), kernel=None)
    return operator if is_plain(layer.module) else replace(operator, groups=1)
