"""What every page is made with: the templates, and how figures are written in words and digits.

Templates escape whatever they are given and stop at a name they do not know, so that no page shows a gap as if it were a
figure. Shares are rounded down, and a number that is not finite is written as ∞.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

NORM_NAMES = {"l2": "L2", "linf": "L∞"}
VERDICTS = {"pass": "✓ pass", "flag": "! flag", "skip": "– not tested"}
ABSOLUTE = re.compile(r"""(?:^|(?<=[\s'"=:,(\[]))(?:[A-Za-z]:)?[/\\](?![/\\\s])(?:[^\s/\\'"]+[/\\])*""")


def render(template: str, **values: Any) -> str:
    """A template of this package, filled in."""
    return _environment().get_template(template).render(norm_names=NORM_NAMES, **values)


def number(value: float | None) -> str:
    """Four digits; a value that is not finite is written as ∞ (it is null in JSON)."""
    return "∞" if value is None or math.isinf(value) else f"{value:.4g}"


def percent(value: float) -> str:
    """A share in per cent, one decimal, rounded down so that no figure is flattered."""
    return f"{math.floor(round(value * 1000, 9)) / 10:.1f}"


def interval(ci: tuple[float, float] | list[float] | None) -> str:
    """A 95 % interval in whole per cent."""
    return "unknown" if ci is None else f"{100 * ci[0]:.0f}–{100 * ci[1]:.0f}"


def verdict(status: str) -> str:
    """The status of a check in words; one that is unknown is a failure."""
    return VERDICTS.get(status, "✗ FAIL")


def not_tested(gates: list[dict[str, Any]]) -> str:
    """One line for all checks that were not made; nothing where there are none."""
    names = [gate["name"] for gate in gates if gate["status"] == "skip"]
    return f"{len(names)} gates not tested ({', '.join(names)}); give more --gate-samples" if names else ""


def size(eps: float, norm: str) -> str:
    """The size of a perturbation; in the largest-change norm as a fraction of 255 where it is one."""
    levels = eps * 255
    if norm == "linf" and round(levels) > 0 and abs(levels - round(levels)) < 1e-3:
        return f"{round(levels)}/255"
    return f"{eps:g}"


def duration(seconds: float | None) -> str:
    """A time in the unit that suits it."""
    if seconds is None:
        return "unknown"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def count(value: float | None) -> str:
    """A count in thousands (k) or millions (M)."""
    if value is None:
        return "unknown"
    for unit, length in (("M", 10**6), ("k", 10**3)):
        if value >= length:
            return f"{value / length:.3g} {unit}"
    return str(int(value))


def portable(text: object) -> str:
    """A text whose absolute paths are cut down to their last part, as they mean nothing on another machine."""
    return ABSOLUTE.sub("…/", str(text))


def breakable(text: str) -> Markup:
    """A name that may be broken behind its separators, where a column is narrow."""
    return Markup(re.sub(r"([_/.-])(?=\w)", r"\1<wbr>", str(escape(text))))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("robust_spectral.evaluations"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    filters = (number, percent, interval, verdict, size, duration, count, breakable)
    environment.filters.update({function.__name__: function for function in filters})
    return environment
