"""The layers that a clipper controls and their target norms, by name patterns, as in shells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from ..clipping import check_max_norm

Patterns = str | Sequence[str]


def targets_by_name(
    names: list[str], max_norm: float | Mapping[str, float], include: Patterns, exclude: Patterns
) -> dict[str, float]:
    """The target of every layer that is to be clipped, by name.

    Patterns also match the name of a layer applied to several shapes without its "#2", "#3", ….

    Raises:
        ValueError: a norm is not positive, a pattern matches no layer, or no layer is left.
        TypeError: a norm is not a number.
    """
    by_pattern = max_norm if isinstance(max_norm, Mapping) else {"*": max_norm}
    wanted, unwanted = _as_list(include), _as_list(exclude)
    for value in by_pattern.values():
        check_max_norm("FastClip", value)
    for argument, patterns in (("max_norm", list(by_pattern)), ("include", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                raise ValueError(f"FastClip({argument}=...): the pattern {pattern!r} matches none of the layers {names}")
    targets: dict[str, float] = {}
    for name in names:
        if any(_matches(name, p) for p in wanted) and not any(_matches(name, p) for p in unwanted):
            found = [value for pattern, value in by_pattern.items() if _matches(name, pattern)]
            targets |= {name: float(found[0])} if found else {}
    if not targets:
        raise ValueError(f"FastClip(include={include!r}, exclude={exclude!r}): no layer is left of {names}")
    return targets


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.split("#")[0], pattern)


def _as_list(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
