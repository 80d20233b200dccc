"""The schedule of an optimizer step: which layers are measured, how closely, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .constant_inputs import settle
from .device_reads import Asking, together
from .held_layer import HeldLayer, Target
from .measurements import looks, measured, not_finite

_COSTLY_EVERY, _WHOLE_EVERY = 8, 4  # steps between searches of layers that are not cheap, and between searches on whole maps
_CHEAP_EVERY, _MOST = 5, 6  # steps between searches of a cheap layer, on average; scheduled searches in a step at most
_GPU_EVERY, _GPU_MOST = 2, 8  # likewise on a GPU; also the most layers searched at once because far above their target


def hold(layers: Sequence[HeldLayer], step: int, every: int, sweeps: int, target: Target) -> Asking[None]:
    """Do the measurements and clips that follow the optimizer's step number ``step``; a round may spread them over several.

    Args:
        layers: All layers that the clipper controls.
        step: Number of the step, from 1; the number of the round if a round takes several steps.
        every: Number of steps in which each layer is due once.
        sweeps: Power steps and clips of a layer that is due.
        target: Function from a layer and its norm to the norm allowed now.
    """
    for held in layers:
        held.hurried = max(0, held.hurried - 1)
    whole, glanced, due = _in_this(layers, step, every)
    sensed = [held for held in layers if (step + held.number) % (held.sensed_every * every) == 0]
    first: list[Asking[Any]] = [measured(held.small, step) for held in (*due, *glanced)]
    first.append(sense(list(dict.fromkeys([*sensed, *glanced, *whole]))))
    *found, _ = yield from together(first)
    excesses = [held.hold_found(norm, target) for held, norm in zip(due, found, strict=False)]
    for _ in range(sweeps - 1):
        if not due:
            break
        yield []  # from here on, and at each such pause, the work can wait until before the next step
        found_again = yield from together([measured(held.small, step) for held in due])
        excesses = [held.hold_found(norm, target, again=True) for held, norm in zip(due, found_again, strict=True)]
    excess_of = dict(zip(due, excesses, strict=True))
    jumped = sorted((held for held in due if excess_of[held] > held.far), key=excess_of.__getitem__, reverse=True)
    gain_of = {held: held.gains(target) for held in layers if held not in whole}
    by_gain = [held for held, gain in gain_of.items() if gain > held.far]
    jumped += [held for held in by_gain if held.small is held.whole and held not in (*jumped, *glanced)]
    whole = whole or sorted((held for held in by_gain if held.small is not held.whole), key=gain_of.__getitem__)[-1:]
    if layers[0].on_gpu:
        jumped = jumped[:_GPU_MOST]  # the others are searched as scheduled
    usual = _mean_rate(layers)
    looked_at = dict.fromkeys(jumped, None) | dict(zip(glanced, found[len(due) :], strict=True))
    looked_at = {held: norm for held, norm in looked_at.items() if held not in whole}
    if looked_at:
        yield []
        steps, beside = [held.steps for held in looked_at], [held.beside() for held in looked_at]
        searched = yield from looks([held.small for held in looked_at], steps, step, beside)
        for (held, norm), value in zip(looked_at.items(), searched, strict=True):
            held.act_upon(value, step, target, usual, norm)
    for held in whole:
        yield []
        yield from held.look(step, target, usual)


def _in_this(layers: Sequence[HeldLayer], step: int, every: int) -> tuple[list[HeldLayer], list[HeldLayer], list[HeldLayer]]:
    """The layers to search on the whole map, to search after a power step, and to measure by a power step alone."""
    whole = _in_turn([held for held in layers if held.small is not held.whole], step, _WHOLE_EVERY, "compared")
    glanced = _most_due([held for held in layers if held.cheap and held not in whole], step) if step % every == 0 else []
    glanced += _in_turn([held for held in layers if not held.cheap and held not in whole], step, _COSTLY_EVERY, "looked")
    due = [held for held in layers if (step + held.number) % every == 0 and held not in (*glanced, *whole)]
    awake = [held for held in due if not held.resting]
    for held in due:
        held.resting = max(0, held.resting - 1)
    return whole, glanced, awake


def sense(layers: Sequence[HeldLayer]) -> Asking[None]:
    """Measure the layers' gain on inputs that are constant over the map, if the kernel is known.

    Raises:
        NotFiniteError: the weights of a layer are not finite.
    """
    known = [(held, held.slow) for held in layers if held.slow is not None]
    if not known:
        return
    came = yield [slow.turn() for _, slow in known]
    for (held, _), gain in zip(known, settle([slow for _, slow in known], came), strict=True):
        if not math.isfinite(gain):
            raise not_finite(held.whole)
        held.sensed = gain


def _in_turn(layers: Sequence[HeldLayer], step: int, every: int, last: str) -> list[HeldLayer]:
    """The layer with the smallest value of the attribute named ``last``, once in ``every`` steps; none at the other steps."""
    return [min(layers, key=lambda held: getattr(held, last))] if layers and step % every == 0 else []


def _most_due(layers: Sequence[HeldLayer], step: int) -> list[HeldLayer]:
    """The layers to search in this step: half by the age of their last search, the others by the growth expected since."""
    every, most = (_GPU_EVERY, _GPU_MOST) if layers and layers[0].on_gpu else (_CHEAP_EVERY, _MOST)
    usual, count = _mean_rate(layers) + 1e-12, min(max(2, math.ceil(len(layers) / every)), most)
    first = sorted(layers, key=lambda held: held.looked)[: math.ceil(count / 2)]
    others = [held for held in layers if held not in first]
    return first + sorted(others, key=lambda held: (held.looked - step) * (held.rate + usual))[: count - len(first)]


def _mean_rate(layers: Sequence[HeldLayer]) -> float:
    return sum(held.rate for held in layers) / max(1, len(layers))
