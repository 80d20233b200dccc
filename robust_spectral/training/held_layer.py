"""What follows every optimizer step: a power step on the layers' top singular directions, closer looks at a few, and clips.

A power step is slow to notice a direction that grows beside the one it follows, so that layers get closer looks (short Krylov
runs) in turn, and at once where a norm has jumped or where the gain on inputs that are constant over the map has. Where its map
is large a layer is followed on a smaller one, where an application costs a fraction: the top directions vary slowly over the
map and are nearly the same there. How much the norm falls short on the smaller map, and a power step short of a closer look, is
learned whenever both are at hand; where the gain on constant inputs has jumped, both are looked at.
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

_LOOK, _WHOLE_LOOK = 7, 10  # steps of a closer look, on the small map or the whole one
_TINY, _TINY_LOOK = 1e6, 12  # multiply-adds of an application that costs next to nothing, and steps of a look there
_CHEAP = 1.2e7  # multiply-adds of an application
_FEW = 2**16  # inputs
_IDLE = 2e-3  # above its target, what is not worth a clip
_MOST_FORESEEN, _MOST_SPARED = 0.05, 0.01  # of growth until the next look: what a look allows for, and any clip
_CAUTION = 1.5  # times the growth foreseen, as it comes in bursts
_MOST_RESTS = 3  # power steps left out in a row, on a layer that is not cheap; 1 on one that is
_FAR, _COSTLY_FAR = 1.005, 1.03  # times its target, from where a layer gets a closer look at once, cheap or not
_RUNNING_AWAY, _CALM = 1.03, 8  # times its target, and how many turns without such a norm end the hurry
_STATE = ("bias", "rate", "foreseen", "looked", "compared", "allowed", "goal", "level", "resting", "share", "sensed", "hurried")


Target = Callable[["HeldLayer", float], float]


@dataclass(eq=False)
class HeldLayer:
    """A layer on its whole map and on a smaller one, which are the same object where there is no smaller one.

    Attributes:
        number: Among the layers, which take turns by it.
        whole: The layer as it is applied; what is proved and reported is about it.
        small: What the power steps follow.
        bias: Norm of the whole over that of the small one.
        rate: By how much, relative to its target, the norm has been growing past it unseen, in a step; it rises at once and
            falls slowly.
        foreseen: By how much, relative to its target, it will have grown unseen by the next look.
        looked: Step of the last closer look.
        compared: Step of the last look at the whole map.
        allowed: Norm that was allowed then.
        goal: Norm that was allowed last time.
        level: Norm over that, as it was left.
        resting: How many power steps are left out, as the last one found nothing to do, nor soon.
        slow: The directions that are constant over the map, where the kernel is known.
        sensed: The gain on them.
        share: The norm over that gain, at most 1.
        hurried: In how many turns to come it is to have its own behind the step, as its norm has run away, or may have.
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
        """A layer with its smaller twin, where there is one that pays; none does on a GPU, nor of what is cheap as it is."""
        layer, alone, size = on_small_map(whole.layer), cls(number, whole, whole), math.prod(whole.layer.in_shape)
        if alone.on_gpu or (alone.cheap and size <= _FEW) or math.prod(layer.in_shape) > 0.6 * size:
            return alone
        small = FollowedLayer.of(layer, vectors=whole.vectors.shape[1], composite=whole.composite, seed=seed, move=whole.move)
        whole.remembers = False
        return cls(number, whole, small)

    @property
    def on_gpu(self) -> bool:
        """Whether the layer lives on one, where starting a small computation takes the time, not its size."""
        return self.small.vectors.is_cuda

    @property
    def cheap(self) -> bool:
        """Whether a closer look at the small one costs little."""
        return self.on_gpu or self._work <= _CHEAP

    @cached_property
    def _work(self) -> int:
        weights = max(parameter.numel() for parameter in self.small.layer.module.parameters())
        return weights * math.prod(self.small.operator.out_shape[1:])

    @property
    def steps(self) -> int:
        """Of a closer look at the small one."""
        return _TINY_LOOK if self._work <= _TINY else _LOOK

    @property
    def sensed_every(self) -> int:
        """How many times as rare as power steps the gain on slow directions is found."""
        return 1 if self._work <= _TINY else 3 if self.cheap else 8

    @property
    def far(self) -> float:
        """By which factor above its target the layer gets a closer look at once."""
        return _FAR if self.cheap else _COSTLY_FAR

    @property
    def parts(self) -> list[FollowedLayer]:
        """The whole, and the small one where that is another."""
        return [self.whole] if self.small is self.whole else [self.whole, self.small]

    def start(self) -> Asking[None]:
        """A first, long look, behind a power step, whose value tells it the scale."""
        self._find_slow()
        found = []
        for tracked in self.parts:
            yield from measured(tracked, 0)
            found.append((yield from look(tracked, 2 * _LOOK, 0)))
        self._learn(found[-1], found[0])
        for tracked in self.parts:
            tracked.forget()

    def entry(self) -> dict[str, Any]:
        """What `restore` needs."""
        named = zip(("whole", "small"), self.parts, strict=False)
        slow = None if self.slow is None else self.slow.block.clone()
        return {key: getattr(self, key) for key in _STATE} | {"slow": slow} | {name: part.entry() for name, part in named}

    def restore(self, entry: dict[str, Any]) -> None:
        """Go on from the entry of a clipper's state dict."""
        for key in _STATE:
            setattr(self, key, entry.get(key, getattr(self, key)))
        self.whole.restore(entry["whole"])
        if self.small is self.whole:
            self.bias = 1.0
        elif "small" in entry:
            self.small.restore(entry["small"])
        elif self.whole.composite is not None:  # of a clipper on a GPU, which has no small ones
            self.small.resolve(self.whole.composite)
        if entry["slow"] is not None:
            self._find_slow()
            assert self.slow is not None
            self.slow.block = entry["slow"].to(self.slow.block)

    def _find_slow(self) -> None:
        self.slow = slow_directions(self.whole.layer, bool(self.whole.composite), self.whole.vectors, 0)

    def beside(self) -> Tensor | None:
        """Where on the small map a direction may have grown beside the one that is followed."""
        return None if self.slow is None else self.slow.rows(self.small.operator.in_shape)

    def hold(self, tracked: FollowedLayer, norm: float, missed: float, target: float) -> float:
        """Clip what was just found, if the norm, times what the finding is known to miss, is above the target; what is left.

        A little of the target is left to what is foreseen to grow beside it.
        """
        target = target / missed / (1 + min(self.foreseen, _MOST_SPARED))
        if norm > target * (1 + _IDLE) and not tracked.changes_unseen:  # a shared weight has been taken down already
            tracked.hold_(target)
            self.sensed *= target / norm
            norm = target
        tracked.forget()
        return norm * missed

    def hold_found(self, norm: float, target: Target, again: bool = False) -> float:
        """Clip what a power step found, ``again`` in the same turn or not, if it is above the target; by which factor it is."""
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
        """By which factor the norm is above its target, as far as slow directions tell; 0 of a layer not looked at yet."""
        if math.isinf(self.allowed):  # whose first norm, from which a target may start, is still to be found
            return 0.0
        norm = self.sensed * self.share
        return norm / target(self, norm)

    def act_upon(self, searched: float, step: int, target: Target, usual: float, found: float | None = None) -> None:
        """Do what a closer look at the small one asks for; what a power step just before found tells what such steps miss."""
        if self.small is self.whole:  # the small one tells less of it than its gain on slow directions does
            self._share(searched)
        norm = searched * self.bias
        allowed = aim = target(self, norm)
        self._hurry(norm / allowed)
        if found is not None:
            self.small.learn(found, searched)
            aim = self._with_growth(norm, allowed, step, usual)
        self._leave(self.hold(self.small, searched, self.bias, aim), allowed)

    def look(self, step: int, target: Target, usual: float) -> Asking[None]:
        """A closer look at both, from which it is learned what the small one misses."""
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
        """What to clip to, so that by the next look the norm, growing unseen as it lately did, is about what is allowed.

        A layer that has not grown so may begin to: it is taken to grow at the ``usual`` rate of all layers.
        """
        waited, self.looked = max(1, step - self.looked), step
        grown = max(0.0, norm / self.allowed - 1) / waited
        self.rate = max(grown, (self.rate + grown) / 2)
        self.allowed = allowed
        self.foreseen = min(_CAUTION * max(self.rate, usual) * waited, _MOST_FORESEEN)
        return allowed / (1 + self.foreseen)

    def _learn(self, found: float, searched: float) -> None:
        """Quick to believe that the small one falls short, slow to forget it: a short search of the whole finds too little."""
        bias = min(max(searched / found, 0.9), 1.3) if found > 0 else 1.0
        self.bias = max(bias, (self.bias + bias) / 2)
