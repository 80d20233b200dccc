"""Lays the three source folders out as the package that they are installed as, where mkdocstrings reads them."""

import shutil
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT / "build" / "docs-source" / "robust_spectral"
_PLACES = {"robust_spectral": ".", "plugins": "plugins", "evaluations": "evaluations"}


def on_startup(**_: Any) -> None:
    """Copy the modules to build/docs-source/robust_spectral."""
    shutil.rmtree(_PACKAGE, ignore_errors=True)
    for folder, place in _PLACES.items():
        for module in (_ROOT / folder).rglob("*.py"):
            copy = _PACKAGE / place / module.relative_to(_ROOT / folder)
            if "benchmarks" not in copy.parts:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(module, copy)
