"""The display of a running evaluation: the unit of work in progress, the time left, and after a stop, what is kept.

On a terminal one line is drawn anew several times a second. In a file or a pipe each new unit is a line, and a unit that takes
long is repeated after 2, 4, 8 … seconds, at most a minute apart. The time left is that of units whose kind was timed in this
process; kinds that were not are named beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..records import Unit
from ..wording import NORM_NAMES, size

_KINDS = {
    "clean": "clean accuracy",
    "lipschitz": "Lipschitz bound",
    "gates": "checks",
    "local-certificates": "certificates around images",
}
_FIRST_WAIT, _LONGEST_WAIT, _REDRAWN = 2.0, 60.0, 0.5  # seconds


class EvaluationDisplay:
    """A context in which `watch` shows the progress of an evaluation.

    Args:
        console: The console to show it on.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._live = console, console.is_terminal
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20),
                   MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=not self._live)
        self._task = self._bar.add_task("loading the model and the data", total=None, left="")
        self._name, self._left, self._total = "", list[Unit](), 0
        self._rates: dict[str, tuple[float, int]] = {}  # seconds and images by kind of unit
        self._since, self._now = time.monotonic(), "loading the model and the data"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> EvaluationDisplay:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
        self._bar.stop()

    def watch(self, name: str, left: Sequence[Unit] | None, total: int) -> None:
        """Take the progress of an evaluation, as `evaluate` reports it.

        Args:
            name: The name of the model among twins, or an empty text.
            left: The units that are left, in order; None while the model is loaded.
            total: The number of all units of this model.
        """
        now = time.monotonic()
        if left is not None and name == self._name:
            kept = {id(unit) for unit in left}  # comparing units would cost the square of their number
            for unit in (unit for unit in self._left if id(unit) not in kept):
                seconds, images = self._rates.get(unit.task, (0.0, 0))
                self._rates[unit.task] = seconds + now - self._since, images + unit.stop - unit.start
        self._name, self._left, self._total, self._since = name, list(left or ()), total, now
        doing = "loading the model and the data" if left is None else _in_words(left) if left else "writing the report"
        self._now = f"{name}: {doing}" if name else doing
        self._bar.update(self._task, description=self._now, completed=total - len(self._left), total=total or None,
                         left=self._time_left())  # fmt: skip
        self._line()

    def kept(self) -> str:
        """After a stop: how much of the work has a record, and which unit is lost."""
        of = f" of {self._name}" if self._name else ""
        if not self._total:
            return f"stopped while {self._now}; records of earlier units are kept"
        told = f"kept: {self._total - len(self._left)} of {self._total} units of work{of}"
        return f"{told}; to be done again: {_in_words(self._left)}" if self._left else told

    def _line(self) -> None:
        """Print the present state, where it is not drawn."""
        if not self._live:
            left = self._time_left()
            done = f" [{self._total - len(self._left)}/{self._total}]" if self._total else ""
            self._console.print(
                f"{self._now}{done}{f', {left}' if left else ''}", highlight=False, markup=False, soft_wrap=True
            )

    def _repeat(self) -> None:
        """Show that time passes: the time left on a terminal, else the state once more after ever longer waits."""
        wait, shown = _FIRST_WAIT, self._since
        while not self._stopped.wait(_REDRAWN):
            if self._live:
                self._bar.update(self._task, left=self._time_left())
            elif shown < self._since:
                wait, shown = _FIRST_WAIT, self._since
            elif time.monotonic() - shown >= wait:
                wait, shown = min(2 * wait, _LONGEST_WAIT), time.monotonic()
                self._line()

    def _time_left(self) -> str:
        """The time that units of timed kinds will take, less the time of the present one, and the kinds not timed yet."""
        left = list(self._left)
        timed = [self._rates[u.task][0] / self._rates[u.task][1] * (u.stop - u.start) for u in left if u.task in self._rates]
        first = timed[0] if left and left[0].task in self._rates else 0.0
        seconds = round(sum(timed) - min(first, time.monotonic() - self._since))
        others = list(dict.fromkeys(_KINDS.get(unit.task, unit.task) for unit in left if unit.task not in self._rates))
        told = [f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"] if timed else []
        return "; ".join([*told, *([f"not timed yet: {', '.join(others)}"] if others else [])])


def _in_words(left: Sequence[Unit]) -> str:
    """The first of the units: its task, size, and how many of its images are left."""
    unit = left[0]
    same = [other for other in left if (other.task, other.config) == (unit.task, unit.config)]
    level = "".join(f" {NORM_NAMES[unit.config[key]] if key == 'norm' else size(unit.config[key], unit.config['norm'])}"
                    for key in ("norm", "eps") if unit.config.get(key) is not None)  # fmt: skip
    images, of = sum(other.stop - other.start for other in same), max(other.stop for other in same)
    return f"{_KINDS.get(unit.task, unit.task)}{level}, {images} of {of} images left"
