"""Defences and attacks by name: those of this package and all that other installed packages register.

A package registers its own in its pyproject.toml; they are then available by name wherever this package's are:

    [project.entry-points."robust_spectral.defences"]
    mine = "my_package:MyDefence"
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

Kind = Literal["defence", "attack"]
_GROUPS: dict[Kind, str] = {"defence": "robust_spectral.defences", "attack": "robust_spectral.attacks"}


def names(kind: Kind) -> list[str]:
    """The names of all installed defences or attacks, sorted."""
    return sorted({point.name for point in entry_points(group=_GROUPS[kind])})


def find(kind: Kind, name: str) -> Any:
    """The object registered under a name.

    Raises:
        ValueError: the name is unknown (similar ones are listed), two packages register it, or it cannot be imported.
    """
    points = list(entry_points(group=_GROUPS[kind], name=name))
    if not points:
        near = difflib.get_close_matches(name, names(kind), n=2, cutoff=0.3) or names(kind)
        raise ValueError(f"{kind} {name!r}: unknown; near: {', '.join(near)}")
    if len({point.value for point in points}) > 1:
        raise ValueError(f"{kind} {name!r}: registered by {' and '.join(sorted(map(_package, points)))}; uninstall one of them")
    try:
        return points[0].load()
    except (ImportError, AttributeError) as error:
        entry = f"{kind} {name!r} of {_package(points[0])}"
        raise ValueError(f"{entry}: cannot be imported, {error}; install the packages that it needs") from error


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else point.dist.name
