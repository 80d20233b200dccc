"""The work on one layer after optimizer steps: power steps on its top singular directions, short Krylov searches, and clips.

A power step is slow to notice a direction that grows next to the followed one. Layers are therefore refreshed by short Krylov
searches: in turn, and immediately if a norm has jumped or the gain on inputs that are constant over the feature map has. A
layer with a large feature map is followed on a smaller map, where an application costs a fraction: the top directions vary
slowly over the map and are nearly the same there. The factor by which the norm falls short on the smaller map, and the factor
by which a power step falls short of a search, are updated whenever both numbers are known. If the gain on constant inputs has
jumped, both maps are searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .constant_inputs import SlowDirections, slow_directions
from .device_reads import Asking
from .followed_layer import FollowedLayer
from .measurements import look, measured
from .smaller_inputs import on_small_map, on_whole_map

_LOOK, _WHOLE_LOOK = 7, 10  # steps of a search, on the small map and on the whole one
_TINY, _TINY_LOOK = 1e6, 12  # multiply-adds of an application that costs almost nothing, and steps of a search there
_CHEAP = 1.2e7  # multiply-adds of an application of a cheap layer, at most
_FEW = 2**16  # inputs of a cheap layer that needs no smaller map, at most
_IDLE = 2e-3  # relative excess over the target that is not worth a clip
_MOST_FORESEEN, _MOST_SPARED = 0.05, 0.01  # largest growth allowed for: in a clip after a search, and in any clip
_CAUTION = 1.5  # multiple of the growth expected, which comes in bursts
_MOST_RESTS = 3  # power steps left out in a row, at most, on a layer that is not cheap; 1 on a cheap one
_FAR, _COSTLY_FAR = 1.005, 1.03  # multiples of its target above which a layer is searched at once, if cheap and if not
_RUNNING_AWAY, _CALM = 1.03, 8  # multiple of its target above which a norm cannot wait, and rounds below until it can again
_STATE = ("bias", "rate", "foreseen", "looked", "compared", "allowed", "goal", "level", "resting", "share", "sensed", "hurried")


Target = Callable[["HeldLayer", float], float]


@dataclass(eq=False)
class HeldLayer:
    """A layer on its whole feature map and on a smaller one, which are the same object if there is no smaller one.

    Attributes:
        number: Index of the layer, which decides at which steps it is due.
        whole: The layer as the model applies it, for which norms are proved and reported.
        small: The layer on the smaller map, which the power steps follow.
        bias: The norm on the whole map divided by the norm on the small one.
        rate: Growth of the norm past its target, per step and relative to the target, that power steps missed between searches;
            rises at once and falls slowly.
        foreseen: Such growth, relative to the target, that is expected until the next search.
        looked: Step of the last search that updated ``rate``.
        compared: Step of the last search on the whole map.
        allowed: Target norm at the last search that updated ``rate``.
        goal: Target norm at the last measurement.
        level: Norm left by that measurement and its clip, divided by ``goal``.
        resting: Number of power steps to leave out, as the last one found nothing to clip, and no growth that soon needs it.
        slow: The directions of inputs that are constant over the map, if the kernel is known.
        sensed: The layer's gain on those inputs.
        share: The norm divided by that gain, at most 1.
        hurried: Number of coming rounds in which the layer is clipped right after the step, because its norm may grow fast.
    """

    number: int
    whole: FollowedLayer
    small: FollowedLayer
    bias: float = 1.0
    rate: float = 0.0
    foreseen: float = 0.0
    looked: int = 0
    compared: int = 0
    allowed: float = math.inf
    goal: float = 0.0
    level: float = -math.inf
    resting: int = 0
    slow: SlowDirections | None = None
    sensed: float = 0.0
    share: float = 1.0
    hurried: int = _CALM

    @classmethod
    def of(cls, whole: FollowedLayer, number: int, seed: int) -> HeldLayer:
        """A layer with its counterpart on a smaller map if that saves time: not on a GPU, nor for most cheap layers."""
        layer, alone, size = on_small_map(whole.layer), cls(number, whole, whole), math.prod(whole.layer.in_shape)
        if alone.on_gpu or (alone.cheap and size <= _FEW) or math.prod(layer.in_shape) > 0.6 * size:
            return alone
        small = FollowedLayer.of(layer, vectors=whole.vectors.shape[1], composite=whole.composite, seed=seed, move=whole.move)
        whole.remembers = False
        return cls(number, whole, small)

    @property
    def on_gpu(self) -> bool:
        """Whether the layer is on a GPU, where a small computation costs the time to launch it, whatever its size."""
        return self.small.vectors.is_cuda

    @property
    def cheap(self) -> bool:
        """Whether a search on the small map costs little."""
        return self.on_gpu or self._work <= _CHEAP

    @cached_property
    def _work(self) -> int:
        weights = max(parameter.numel() for parameter in self.small.layer.module.parameters())
        return weights * math.prod(self.small.operator.out_shape[1:])

    @property
    def steps(self) -> int:
        """The number of steps of a search on the small map."""
        return _TINY_LOOK if self._work <= _TINY else _LOOK

    @property
    def sensed_every(self) -> int:
        """The number of scheduled steps of the layer from one measurement of the gain on constant inputs to the next."""
        return 1 if self._work <= _TINY else 3 if self.cheap else 8

    @property
    def far(self) -> float:
        """The multiple of its target above which the layer is searched at once."""
        return _FAR if self.cheap else _COSTLY_FAR

    @property
    def parts(self) -> list[FollowedLayer]:
        """The layer on the whole map, and on the small one if that is another object."""
        return [self.whole] if self.small is self.whole else [self.whole, self.small]

    def start(self) -> Asking[None]:
        """Run a first, long search on each map, after a power step, whose value gives the search its scale."""
        self._find_slow()
        found = []
        for tracked in self.parts:
            yield from measured(tracked, 0)
            found.append((yield from look(tracked, 2 * _LOOK, 0)))
        self._learn(found[-1], found[0])
        for tracked in self.parts:
            tracked.forget()

    def entry(self) -> dict[str, Any]:
        """The state that `restore` takes."""
        named = zip(("whole", "small"), self.parts, strict=False)
        slow = None if self.slow is None else self.slow.block.clone()
        return {key: getattr(self, key) for key in _STATE} | {"slow": slow} | {name: part.entry() for name, part in named}

    def restore(self, entry: dict[str, Any]) -> None:
        """Continue from the entry of a clipper's state dict."""
        for key in _STATE:
            setattr(self, key, entry.get(key, getattr(self, key)))
        self.whole.restore(entry["whole"])
        if self.small is self.whole:
            self.bias = 1.0
        elif "small" in entry:
            self.small.restore(entry["small"])
        elif self.whole.composite is not None:  # the entry of a clipper on a GPU, which has no small maps
            self.small.resolve(self.whole.composite)
        if entry["slow"] is not None:
            self._find_slow()
            assert self.slow is not None
            self.slow.block = entry["slow"].to(self.slow.block)

    def _find_slow(self) -> None:
        self.slow = slow_directions(self.whole.layer, bool(self.whole.composite), self.whole.vectors, 0)

    def beside(self) -> Tensor | None:
        """The inputs constant over the small map, along which the norm may have grown; None if the kernel is not known."""
        return None if self.slow is None else self.slow.rows(self.small.operator.in_shape)

    def hold(self, tracked: FollowedLayer, norm: float, missed: float, target: float) -> float:
        """Clip the values just found if ``norm`` times ``missed`` is above ``target``; return the norm left, times ``missed``.

        ``missed`` is the factor by which the measurement is known to fall short. The clip goes a little below the target, to
        leave room for the growth that is expected until the next search.
        """
        target = target / missed / (1 + min(self.foreseen, _MOST_SPARED))
        if norm > target * (1 + _IDLE) and not tracked.changes_unseen:  # otherwise a shared weight has been clipped already
            tracked.hold_(target)
            self.sensed *= target / norm
            norm = target
        tracked.forget()
        return norm * missed

    def hold_found(self, norm: float, target: Target, again: bool = False) -> float:
        """Clip the values of a power step if they are above the target; return the norm before the clip divided by the target.

        ``again`` marks a further power step in the same round.
        """
        missed, resting = self.small.missed * self.bias, self.resting
        allowed = target(self, norm * missed)
        excess, level, falls = norm * missed / allowed, self.level, allowed < self.goal
        self._leave(self.hold(self.small, norm, missed, allowed), allowed)
        slack, pace = 1 + _IDLE - excess, max(2 * self.rate + _IDLE / 8, excess - level)
        rests = 0 if falls else min(1 if self.cheap else _MOST_RESTS, int(max(0.0, slack) / pace))
        self.resting = min(resting, rests) if again else rests
        self._hurry(excess)
        return excess

    def gains(self, target: Target) -> float:
        """The norm divided by its target, estimated from the gain on constant inputs; 0 before the layer's first search."""
        if math.isinf(self.allowed):  # a warm-up starts from the first norm, which is not known yet
            return 0.0
        norm = self.sensed * self.share
        return norm / target(self, norm)

    def act_upon(self, searched: float, step: int, target: Target, usual: float, found: float | None = None) -> None:
        """Clip after a search on the small map with the value ``searched``.

        If a power step just before gave ``found``, update the factor by which power steps fall short, and clip lower, by the
        growth that is expected until the next search (see `_with_growth` for ``usual``).
        """
        if self.small is self.whole:  # on a small map the norm says less about the whole one than the gain does
            self._share(searched)
        norm = searched * self.bias
        allowed = aim = target(self, norm)
        self._hurry(norm / allowed)
        if found is not None:
            self.small.learn(found, searched)
            aim = self._with_growth(norm, allowed, step, usual)
        self._leave(self.hold(self.small, searched, self.bias, aim), allowed)

    def look(self, step: int, target: Target, usual: float) -> Asking[None]:
        """Search on both maps, and update the factor by which the small one falls short."""
        found = yield from look(self.small, self.steps, step, self.beside())
        self.whole.estimate = found * self.bias
        yield []
        on_whole = on_whole_map(self.small.vectors[:, :1], self.small.operator, self.whole.operator, self.whole.layer)
        searched = yield from look(self.whole, _WHOLE_LOOK, step, on_whole)
        self._share(searched)
        self.compared = step
        self._learn(found, searched)
        allowed = target(self, searched)
        aim = self._with_growth(searched, allowed, step, usual)
        self._leave(self.hold(self.whole, searched, 1.0, aim), allowed)

    def _leave(self, norm: float, allowed: float) -> None:
        self.goal, self.level, self.resting = allowed, norm / allowed, 0

    def _hurry(self, excess: float) -> None:
        self.hurried = _CALM if excess > _RUNNING_AWAY else self.hurried

    def _share(self, norm: float) -> None:
        if self.sensed > 0:
            self.share = min(1.0, norm / self.sensed)

    def _with_growth(self, norm: float, allowed: float, step: int, usual: float) -> float:
        """The norm to clip to, so that growth at the recent rate reaches about ``allowed`` by the next search.

        A layer that has not grown recently may begin to: its rate is taken to be at least the ``usual`` rate, the mean of all
        layers.
        """
        waited, self.looked = max(1, step - self.looked), step
        grown = max(0.0, norm / self.allowed - 1) / waited
        self.rate = max(grown, (self.rate + grown) / 2)
        self.allowed = allowed
        self.foreseen = min(_CAUTION * max(self.rate, usual) * waited, _MOST_FORESEEN)
        return allowed / (1 + self.foreseen)

    def _learn(self, found: float, searched: float) -> None:
        """Update ``bias``, which rises at once and falls slowly, because a short search on the whole map finds too little."""
        bias = min(max(searched / found, 0.9), 1.3) if found > 0 else 1.0
        self.bias = max(bias, (self.bias + bias) / 2)
