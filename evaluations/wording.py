"""The format of figures, the same on the terminal and on every page.

Shares are rounded down, and infinity is written as ∞.
"""

from __future__ import annotations

import math
import re
from typing import Any

NORM_NAMES = {"l2": "L2", "linf": "L∞"}
VERDICTS = {"pass": "✓ pass", "flag": "! flag", "skip": "– not tested"}
ABSOLUTE = re.compile(r"""(?:^|(?<=[\s'"=:,(\[]))(?:[A-Za-z]:)?[/\\](?![/\\\s])(?:[^\s/\\'"]+[/\\])*""")


def number(value: float | None) -> str:
    """A number with four significant digits; infinity, which is null in JSON, is written as ∞."""
    return "∞" if value is None or math.isinf(value) else f"{value:.4g}"


def percent(value: float) -> str:
    """A share in per cent with one decimal, rounded down so that no figure looks better than it is."""
    return f"{math.floor(round(value * 1000, 9)) / 10:.1f}"


def interval(ci: tuple[float, float] | list[float] | None) -> str:
    """A 95 % interval in whole per cent."""
    return "unknown" if ci is None else f"{100 * ci[0]:.0f}–{100 * ci[1]:.0f}"


def verdict(status: str) -> str:
    """The status of a check in words; an unknown status counts as a failure."""
    return VERDICTS.get(status, "✗ FAIL")


def not_tested(gates: list[dict[str, Any]]) -> str:
    """One line for all checks that were not tested; an empty text if there are none."""
    names = [gate["name"] for gate in gates if gate["status"] == "skip"]
    return f"{len(names)} checks not tested ({', '.join(names)}); give more --gate-samples" if names else ""


def local_in_words(found: dict[str, Any]) -> str:
    """One sentence on the certificates around single images, from the entry ``local_certificates`` of a report."""
    first, better = found["images"], found["local"]
    told = f"Certificates around the first {first} images: {better} above the global radius"
    if better:
        told += f", for the forward pass in {found['dtype']}, failure probability {number(found['failure_probability'])} each"
    around = "some of the images" if better else "the images"
    return f"{told}; nothing is proved around {around}: {found['reason']}" if found["reason"] else told


def images_in_words(report: dict[str, Any]) -> str:
    """Which test images a report is on; reports without a record of it are on the first ones."""
    evaluated, tests = report["accuracy"].get("n"), report.get("test_images")
    drawn = (report.get("planned") or {}).get("sample_order")
    if evaluated is None:
        return "an unknown number of test images"
    if evaluated == tests:
        return f"all {tests} test images"
    if drawn is None:
        return f"the first {evaluated} {f'of {tests} ' if tests else ''}test images"
    return f"{evaluated} of {tests} test images, drawn in proportion to their classes (order {drawn['sha256'][:12]})"


def size(eps: float, norm: str) -> str:
    """The size of a perturbation; in L∞ as a fraction of 255 where it is a whole number of 255ths."""
    levels = eps * 255
    if norm == "linf" and round(levels) > 0 and abs(levels - round(levels)) < 1e-3:
        return f"{round(levels)}/255"
    return f"{eps:g}"


def duration(seconds: float | None) -> str:
    """A time in hours, minutes or seconds."""
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
    """Shorten each absolute path in a text to its last part, because paths differ between machines."""
    return ABSOLUTE.sub("…/", str(text))
