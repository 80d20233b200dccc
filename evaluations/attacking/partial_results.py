"""Progress and results while an evaluation runs: what can be said before all units of work are done.

The verdict on an image at one size depends on the smaller sizes of the same attack, so the finished part of an attack ends
before its first size with a missing record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..records import Unit
from .engine import Engine, run_units
from .work import Work

Say = Callable[[str], None]


def once(say: Say) -> Say:
    """A function that says each text the first time only, so that the final results repeat none that was said before."""
    said: set[str] = set()

    def tell(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    return tell


def do_units(
    engine: Engine, folder: Path, work: Work, units: Sequence[Unit], device: str,
    progress: Callable[[list[Unit], int], None], finished: Callable[[Work], None],
) -> None:  # fmt: skip
    """Do units with an engine.

    Args:
        engine: The engine.
        folder: The run folder.
        work: All units of the evaluation.
        units: The units to do.
        device: Device of the model.
        progress: Called at the start and after every unit with the units that are left, in order, and the number of units.
        finished: Called with the finished part of the work whenever it is larger than before.
    """
    left = [unit for unit in units if not unit.path(folder).is_file()]
    known = _parts(finished_part(work, folder))
    progress(list(left), len(units))

    def done(unit: Unit) -> None:
        nonlocal known
        if unit in left:  # not if it had a record of a failed attack
            left.remove(unit)
        progress(list(left), len(units))
        part = finished_part(work, folder)
        if _parts(part) > known:
            known = _parts(part)
            finished(part)

    run_units(engine, folder, units, device, done)


def finished_part(work: Work, folder: Path) -> Work:
    """The work without the clean logits if a block of them is missing, and with its finished attacks only.

    Args:
        work: All units, with the sizes of each attack in rising order.
        folder: The run folder with the records.
    """
    found = {}
    unfinished: set[tuple[str, str]] = set()
    for (attack, norm, eps), units in work.attacks.items():
        if not _all_done(units, folder):
            unfinished.add((attack, norm))
        if (attack, norm) not in unfinished:
            found[attack, norm, eps] = units
    return replace(work, attacks=found, clean=work.clean if _all_done(work.clean, folder) else [])


def _parts(work: Work) -> int:
    return len(work.attacks) + len(work.clean)


def _all_done(units: Sequence[Unit], folder: Path) -> bool:
    return all(unit.path(folder).is_file() for unit in units)
