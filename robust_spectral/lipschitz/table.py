"""The table of operations: for each ATen operation its Lipschitz bound, the box of its values and its rounding error.

`rule` registers a row, also for operations of other packages. `pattern` registers a bound of several
operations together, recognised by the last of them. The walks look rows up here and never import them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch


class NoClaim(Exception):
    """Nothing is proved; the message says what is not known, and where it can, what to do."""


@dataclass(frozen=True)
class Row:
    """The knowledge of an operation, as functions of a walk and a node.

    Attributes:
        bound: The node's Lipschitz bound from those of its arguments, or its operator (`Affine`).
        box: The box of the node's values from those of its arguments; None where only the Lipschitz bound gives one.
        rounding: The number of terms that the operation sums, and a bound of the sum of their absolute values; None where
            its rounding is not known.
    """

    bound: Callable[..., Any]
    box: Callable[..., Any] | None = None
    rounding: Callable[..., Any] | None = None


TABLE: dict[Any, Row] = {}
Pattern = tuple[Callable[..., float | None], Callable[..., Any] | None]  # its bound and its rounding
PATTERNS: dict[Any, list[Pattern]] = {}

_Entry = TypeVar("_Entry", bound=Callable[..., Any])


def rule(
    *operations: Any, box: Callable[..., Any] | None = None, rounding: Callable[..., Any] | None = None
) -> Callable[[_Entry], _Entry]:
    """Register the decorated function as the bound of operations such as ``torch.ops.aten.relu``, with box and rounding."""

    def register(bound: _Entry) -> _Entry:
        TABLE.update(dict.fromkeys(operations, Row(bound, box, rounding)))
        return bound

    return register


def pattern(*operations: Any, rounding: Callable[..., Any] | None = None) -> Callable[[_Entry], _Entry]:
    """Register a bound of several operations that end in one of those given; it returns None where it does not apply.

    ``rounding`` is that of all the operations; without it a pattern does not bound how rounding errors propagate.
    """

    def register(bound: _Entry) -> _Entry:
        for operation in operations:
            PATTERNS.setdefault(operation, []).append((bound, rounding))
        return bound

    return register


def row_of(target: Any) -> Row | None:
    """The row of an overload, or else of its operation; None if there is none."""
    return TABLE.get(target) or TABLE.get(operation_of(target))


def operation_of(target: Any) -> Any:
    """The operation that a node calls, without its overload."""
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
