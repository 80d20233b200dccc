"""The turns of a clipper: one behind every optimizer step. On a GPU one ends in the steps that follow, so that none waits.

There, what only reads weights is started before a step and not behind the last, as weights are the same then and the GPU has
the pass backwards to do, beside which it finds the time. Layers whose norms run away, as they may where training starts, have
their turn behind the step all the same: what is clipped a step late has passed through all layers once more by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..operators import full_precision_no_grad
from .device_reads import Asking, Later, answered, beside, branch_off
from .followed_layer import FollowedLayer
from .held_layer import HeldLayer, Target
from .measurements import measure
from .schedule import hold


class Turns:
    """Holds layers at their targets, a turn after the other.

    Args:
        layers: All that are held.
        prepare: Called before a turn begins.
        every: Each layer is due once in so many turns.
        sweeps: Power steps and clips of a layer that is due.
        target: From a layer and its norm to the norm allowed now.

    Attributes:
        count: How many have begun.
    """

    def __init__(
        self, layers: Sequence[HeldLayer], prepare: Callable[[], None], every: int, sweeps: int, target: Target
    ) -> None:  # fmt: skip
        self._layers, self._prepare, self._every, self._sweeps, self._target = layers, prepare, every, sweeps, target
        self._parts = [part for held in layers for part in held.parts]
        self.restart(0)

    def restart(self, count: int) -> None:
        """Forget what is under way."""
        self.count, self._waits, self._started = count, False, False
        self._under_way: Later[None] | None = None
        self._weights: list[Any] = []

    @full_precision_no_grad()
    def start(self, held: HeldLayer) -> None:
        """A first, long look at a layer."""
        answered(held.start())

    @full_precision_no_grad()
    def advance(self, early: bool = False) -> bool:
        """Behind a step: go on with the turn that is under way, or begin the next; whether one has ended.

        Args:
            early: Whether `start_early` was called before the step, and will be before the next.

        Raises:
            NotFiniteError: a layer's weights are not finite. What is known of it stays as it was.
        """
        if self._started and not early:
            self._give_up()  # the step that it was started before has not come
        early = early and not self._waits  # if it does, `start_early` was not called after all
        self._started = self._waits = False
        with self._or_give_up():
            hurried, late = self._hurried_and_late()
            if not late:
                self._give_up()
                answered(self._next(hurried))
                ended = True
            else:
                ended = self._act()
                if hurried:
                    answered(hold(hurried, self.count, 1, self._sweeps, self._target))
            if not self._hurried_and_late()[1]:
                return ended
            self._waits = early
            if early:
                self._weights = self._weights_now()
                branch_off(self._devices())
            else:
                self._start()
            return ended

    @full_precision_no_grad()
    def start_early(self) -> None:
        """Before a step: start what only reads weights, beside the pass backwards unless they have changed since the last.

        Raises:
            NotFiniteError: a layer's weights are not finite. What is known of it stays as it was.
        """
        if self._started:
            self._give_up()
        if not self._waits:
            return
        self._waits, self._started = False, True
        if self._weights_now() != self._weights or any(part.changes_in_passes for part in self._parts):
            branch_off(self._devices())
        with self._or_give_up(), beside(self._devices()):
            self._start()

    @full_precision_no_grad()
    def measure(self, layers: Sequence[FollowedLayer]) -> None:
        """A power step, now, on each of those layers that have changed since the last, or had none in the last turns.

        Raises:
            NotFiniteError: a layer's weights are not finite. What is known of it stays as it was.
        """
        self._prepare()
        self._given_up()
        oldest, asks = max(0, self.count - self._every + 1), self._asks()
        chosen = [tracked for tracked in layers if asks or tracked.seen < oldest or tracked.changes_unseen]
        with self._or_give_up():
            answered(measure(chosen, self.count))

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins with a turn of its own."""
        return self.__dict__ | {"_under_way": None, "_waits": False, "_started": False}

    def _hurried_and_late(self) -> tuple[list[HeldLayer], list[HeldLayer]]:
        """Those whose turns are not to wait, where norms run away, and all if one is not on a GPU; and the others."""
        late = [held for held in self._layers if not held.hurried] if all(held.on_gpu for held in self._layers) else []
        return [held for held in self._layers if held.hurried or not late], late

    def _act(self) -> bool:
        """Act upon the numbers that have come; whether the turn has ended with them."""
        if self._under_way is None or self._under_way.resting or self._given_up():
            return False
        for part in self._parts:
            part.note_changes()  # those of the optimizer
        self._under_way.go_on()
        if not self._under_way.done:
            return False
        self._under_way = None
        return True

    def _start(self) -> None:
        """Go on with a turn that rests, or begin the next."""
        if self._under_way is None or self._given_up():
            _, late = self._hurried_and_late()
            self._under_way = Later(self._next(late)) if late else None
        elif self._under_way.resting:
            self._under_way.go_on()

    def _asks(self) -> bool:
        """Whether a turn under way waits for numbers, so that nobody knows yet what it has measured."""
        return self._under_way is not None and not (self._under_way.resting or self._under_way.done)

    def _give_up(self) -> None:
        """Forget the turn that is under way."""
        self._under_way = None

    def _given_up(self) -> bool:
        """Give up what is under way of layers that moved elsewhere; whether they have."""
        moved = any(part.moved for part in self._parts)
        if moved:
            self._give_up()
        return moved

    def _next(self, layers: Sequence[HeldLayer]) -> Asking[None]:
        for part in self._parts:
            part.follow_device()
        self._prepare()
        self.count += 1
        return hold(layers, self.count, self._every, self._sweeps, self._target)

    def _weights_now(self) -> list[Any]:
        return [part.weights_now for part in self._parts]

    def _devices(self) -> set[torch.device]:
        return {part.device for part in self._parts}

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        """Any error ends the turn that is under way."""
        try:
            yield
        except BaseException:
            self._give_up()
            raise
