"""The tables of Lipschitz rules, by module type, function or method name, and the decorators that enter a rule into them.

`rule` is for the bound of a node's value, `interval` for the box that its values stay in, `rounds` for what computing them
rounds. The walks look rules up here and never import them, so that a plugin can add rules for the layers of its host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

RULES: dict[Any, Callable[..., Any]] = {}  # (walk, node) -> its bound, or the affine step that it is
INTERVALS: dict[Any, Callable[..., Any]] = {}  # (walk, node) -> the box of its values, from those of its arguments
ROUNDINGS: dict[Any, Callable[..., Any]] = {}  # (walk, node) -> how many terms are summed, and a bound of their sum
JOINERS: dict[Any, Callable[..., Any]] = {}  # module type -> (step in front of it, its step) -> both as one, or None

_Entry = TypeVar("_Entry", bound=Callable[..., Any])


def _registering(table: dict[Any, Callable[..., Any]]) -> Callable[..., Callable[[_Entry], _Entry]]:
    """A decorator, of module types, functions and method names, that enters what it decorates into a table."""

    def targets_of(*targets: Any) -> Callable[[_Entry], _Entry]:
        def register(function: _Entry) -> _Entry:
            table.update(dict.fromkeys(targets, function))
            return function

        return register

    return targets_of


rule = _registering(RULES)
interval = _registering(INTERVALS)
rounds = _registering(ROUNDINGS)
