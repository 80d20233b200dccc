"""The tables of Lipschitz rules, by module type, function or method name, and the decorators that register rules in them.

`rule` is for the Lipschitz bound of a node, `interval` for the box that contains its values, `rounds` for its rounding error.
The walks look rules up here and never import them, so that plugins can add rules for the layers of other packages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

RULES: dict[Any, Callable[..., Any]] = {}  # (walk, node) -> its Lipschitz bound, or its operator if it is affine
INTERVALS: dict[Any, Callable[..., Any]] = {}  # (walk, node) -> the box of its values, from those of its arguments
ROUNDINGS: dict[Any, Callable[..., Any]] = {}  # (walk, node) -> number of terms, and a bound of their absolute values' sum
JOINERS: dict[Any, Callable[..., Any]] = {}  # module type -> (preceding step, its step) -> one joint step, or None

_Entry = TypeVar("_Entry", bound=Callable[..., Any])


def _registering(table: dict[Any, Callable[..., Any]]) -> Callable[..., Callable[[_Entry], _Entry]]:
    """Make a decorator that registers a function in a table under the module types, functions and method names given."""

    def targets_of(*targets: Any) -> Callable[[_Entry], _Entry]:
        def register(function: _Entry) -> _Entry:
            table.update(dict.fromkeys(targets, function))
            return function

        return register

    return targets_of


rule = _registering(RULES)
interval = _registering(INTERVALS)
rounds = _registering(ROUNDINGS)
