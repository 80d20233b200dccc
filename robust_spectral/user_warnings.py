"""Warnings that point at a line of the user's code, from any depth inside this package or torch."""

from __future__ import annotations

import sys
import warnings

_SKIPPED_PACKAGES = (__package__, "torch", "contextlib")  # contextlib's decorators call what they decorate


def warn_user(message: str) -> None:
    """Warn with a `UserWarning` at the nearest line that belongs to neither this package nor torch."""
    frame, level = sys._getframe(), 1
    while (caller := frame.f_back) is not None and frame.f_globals.get("__name__", "").split(".")[0] in _SKIPPED_PACKAGES:
        frame, level = caller, level + 1
    warnings.warn(message, stacklevel=level)


def counted(layers: list[str]) -> str:
    """A phrase for warnings: the number of ``layers`` and the name of the first one."""
    return f"1 layer ('{layers[0]}')" if len(layers) == 1 else f"{len(layers)} layers (first: '{layers[0]}')"
