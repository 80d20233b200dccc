"""The work after every optimizer step, in rounds. On a GPU a round ends in later steps, so that no step waits for the device.

A round (`Turns` counts them) is the measurements and clips of one step of the schedule. On a GPU, computations that only read
weights are started before an optimizer step rather than after the last one: the weights are the same then, and the computations
run concurrently with the backward pass. Layers whose norms grow fast, as they may at the start of training, are still clipped
right after the step: a clip one step later would let the excess pass through all layers once more.
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
    """A runner that clips layers to their targets, one round after another.

    Args:
        layers: All layers that the clipper controls.
        prepare: Called before a round begins.
        every: Number of rounds in which each layer is due once.
        sweeps: Power steps and clips of a layer that is due.
        target: Function from a layer and its norm to the norm allowed now.

    Attributes:
        count: The number of rounds begun.
    """

    def __init__(
        self, layers: Sequence[HeldLayer], prepare: Callable[[], None], every: int, sweeps: int, target: Target
    ) -> None:  # fmt: skip
        self._layers, self._prepare, self._every, self._sweeps, self._target = layers, prepare, every, sweeps, target
        self._parts = [part for held in layers for part in held.parts]
        self.restart(0)

    def restart(self, count: int) -> None:
        """Drop the round under way, and set the number of rounds to ``count``."""
        self.count, self._waits, self._started = count, False, False
        self._under_way: Later[None] | None = None
        self._weights: list[Any] = []

    @full_precision_no_grad()
    def start(self, held: HeldLayer) -> None:
        """Run the first, long search of a layer."""
        answered(held.start())

    @full_precision_no_grad()
    def advance(self, early: bool = False) -> bool:
        """After an optimizer step, continue the round under way or begin the next; return whether one has ended.

        Args:
            early: Whether `start_early` was called before the step, and will be before the next.

        Raises:
            NotFiniteError: a layer's weights are not finite. Its vectors and estimate are kept.
        """
        if self._started and not early:
            self._give_up()  # the step that `start_early` announced has not come
        early = early and not self._waits  # still set if `start_early` was not called after all
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
        """Before an optimizer step, start the work that only reads weights.

        The work runs concurrently with the backward pass unless the weights have changed since the last step.

        Raises:
            NotFiniteError: a layer's weights are not finite. Its vectors and estimate are kept.
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
        """Take a power step on each of the layers that has changed since its last measurement, or had none in the last rounds.

        Raises:
            NotFiniteError: a layer's weights are not finite. Its vectors and estimate are kept.
        """
        self._prepare()
        self._given_up()
        oldest, asks = max(0, self.count - self._every + 1), self._asks()
        chosen = [tracked for tracked in layers if asks or tracked.seen < oldest or tracked.changes_unseen]
        with self._or_give_up():
            answered(measure(chosen, self.count))

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which begins with a new round."""
        return self.__dict__ | {"_under_way": None, "_waits": False, "_started": False}

    def _hurried_and_late(self) -> tuple[list[HeldLayer], list[HeldLayer]]:
        """Split the layers into those clipped right after the step (norms grow fast, or a layer is on the CPU) and the rest."""
        late = [held for held in self._layers if not held.hurried] if all(held.on_gpu for held in self._layers) else []
        return [held for held in self._layers if held.hurried or not late], late

    def _act(self) -> bool:
        """Act on the numbers that have arrived; return whether the round has ended with them."""
        if self._under_way is None or self._under_way.resting or self._given_up():
            return False
        for part in self._parts:
            part.note_changes()  # changes made by the optimizer
        self._under_way.go_on()
        if not self._under_way.done:
            return False
        self._under_way = None
        return True

    def _start(self) -> None:
        """Continue a paused round, or begin the next."""
        if self._under_way is None or self._given_up():
            _, late = self._hurried_and_late()
            self._under_way = Later(self._next(late)) if late else None
        elif self._under_way.resting:
            self._under_way.go_on()

    def _asks(self) -> bool:
        """Whether the round under way waits for numbers, so that its measurements are not known yet."""
        return self._under_way is not None and not (self._under_way.resting or self._under_way.done)

    def _give_up(self) -> None:
        """Drop the round under way."""
        self._under_way = None

    def _given_up(self) -> bool:
        """Drop the round under way if a layer has moved to another device; return whether one has."""
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
        """Drop the round under way after any error."""
        try:
            yield
        except BaseException:
            self._give_up()
            raise
