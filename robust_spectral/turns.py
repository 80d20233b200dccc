"""The turns of a clipper: one behind every optimizer step. On a GPU one ends in the steps that follow, so that none waits.

While norms run away, as they may where training starts, there is a wait all the same: what is clipped a step late has
passed through all layers once more by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .asking import Later, answered
from .holding import HeldLayer, Target, hold
from .looking import NotFiniteError, measure
from .operators import in_full
from .tracking import TrackedLayer

Known = list[tuple[Any, dict[str, Any]]]  # attributes by their owners

_RUNNING_AWAY, _CALM = 1.03, 8  # times its target, and how many turns without such a norm there must have been


class Turns:
    """Holds layers at their targets, a turn after the other.

    Attributes:
        count: How many have begun.
    """

    def __init__(self, layers: Sequence[HeldLayer]) -> None:
        self._layers = layers
        self._parts = [part for held in layers for part in held.parts]
        self.restart(0)

    def restart(self, count: int) -> None:
        """Forget what is under way."""
        self.count, self._calm = count, 0
        self._under_way: Later[float] | None = None
        self._before: Known = []

    @in_full()
    def start(self, held: HeldLayer) -> None:
        """A first, long look at a layer."""
        answered(held.start())

    @in_full()
    def advance(self, prepare: Callable[[], None], every: int, sweeps: int, target: Target) -> bool:
        """Go on with the turn that is under way, and once it has ended begin the next; whether one has ended.

        Args:
            prepare: Called before a turn begins.
            every: Each layer is due once in so many turns.
            sweeps: Power steps and clips of a layer that is due.
            target: From a layer and its norm to the norm allowed now.

        Raises:
            NotFiniteError: a layer's weights are not finite. All is known then that was before the turn.
        """
        try:
            ended = self._under_way is not None
            if self._goes_on():
                return False
            self._before = self._known()
            for part in self._parts:
                part.follow_device()
            prepare()
            self.count += 1
            turn = hold(self._layers, self.count, every, sweeps, target)
            if self._calm < _CALM or not self._layers[0].on_gpu:
                self._note(answered(turn))
                return True
            self._under_way = Later(turn)
            return ended
        except NotFiniteError:
            self._put_back(self._before)
            raise

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Leave what is known of the layers as it was, should their weights turn out not to be finite."""
        before = self._known()
        try:
            with in_full():
                yield
        except NotFiniteError:
            self._put_back(before)
            raise

    def measure(self, layers: Sequence[TrackedLayer], every: int) -> None:
        """A power step, now, on each of those layers that were not measured in the last turns."""
        oldest = max(0, self.count - every + 1)
        answered(measure([tracked for tracked in layers if tracked.seen < oldest], self.count))

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins with a turn of its own."""
        return self.__dict__ | {"_under_way": None, "_before": []}

    def _goes_on(self) -> bool:
        """Go on with the turn that is under way; whether it still is then. Of layers that moved elsewhere it is given up."""
        if self._under_way is not None and not any(part.moved for part in self._parts):
            for part in self._parts:
                part.note_changes()  # those of the optimizer
            self._under_way.go_on()
            if not self._under_way.done:
                return True
            self._note(self._under_way.result)
        self._under_way = None
        return False

    def _note(self, excess: float) -> None:
        self._calm = self._calm + 1 if excess <= _RUNNING_AWAY else 0

    def _known(self) -> Known:
        """What is known of the layers now."""
        of_parts = [(p, {"vectors": p.vectors, "left": p.left, "estimate": p.estimate}) for p in self._parts]
        return [*of_parts, *((held.slow, {"block": held.slow.block}) for held in self._layers if held.slow is not None)]

    def _put_back(self, known: Known) -> None:
        """Know that and no more, and give up what is under way."""
        for owner, values in known:
            owner.__dict__.update(values)
        self._under_way = None
