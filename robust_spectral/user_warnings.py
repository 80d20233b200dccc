"""Warnings that point at the line of whoever uses this package, from however deep inside it or torch they are raised."""

from __future__ import annotations

import sys
import warnings

_PASSED_OVER = (__package__, "torch", "contextlib")  # the last one calls what it decorates


def warn_user(message: str) -> None:
    """Warn with a `UserWarning` at the nearest line that belongs to neither this package nor torch."""
    frame, level = sys._getframe(), 1
    while (caller := frame.f_back) is not None and frame.f_globals.get("__name__", "").split(".")[0] in _PASSED_OVER:
        frame, level = caller, level + 1
    warnings.warn(message, stacklevel=level)


def counted(layers: list[str]) -> str:
    """How many layers a warning is about, and the name of one."""
    return f"1 layer ('{layers[0]}')" if len(layers) == 1 else f"{len(layers)} layers (first: '{layers[0]}')"
