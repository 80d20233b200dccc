"""Recipes: options of a fine-tuning as a TOML file, so that a run that was worth making is one command to make again.

The keys are those of `FinetuneConfig`. Recipes of this package are known by their names, others by their paths.
"""

from __future__ import annotations

import difflib
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import FinetuneConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}  # all others are texts
FOLDER = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come with this package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The options in a recipe, by name or path.

    Raises:
        ValueError: there is none, or it is not TOML, or holds what fine-tuning has no option for.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=2, cutoff=0.3) or recipe_names()
        raise ValueError(f"recipe {name!r}: no such file; near: {', '.join(near)} (or give the path of a .toml file)")
    return checked(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        ValueError: it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as TOML: {error}") from error


def checked(options: dict[str, Any], where: str) -> dict[str, Any]:
    """The options, if fine-tuning has all of them.

    Raises:
        ValueError: it has not; the near ones are offered.
    """
    known = [field.name for field in fields(FinetuneConfig)]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.3)
            raise ValueError(f"{where}: {key!r} is no option of finetune; near: {', '.join(near) or ', '.join(known)}")
    return options


def config_of(options: dict[str, Any], where: str) -> FinetuneConfig:
    """The configuration that options come to; ``max_norm = inf`` is no clipping.

    Raises:
        ValueError: an option is unknown, missing or out of range.
    """
    given = dict(checked(options, where))
    if given.get("max_norm") == math.inf:
        given["max_norm"] = None
    for field in fields(FinetuneConfig):
        kind = _KINDS.get(str(field.type).partition(" ")[0], (str,))
        value = given.get(field.name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind == (bool,))):
            raise ValueError(f"{where}: {field.name} = {value!r}: expected {field.type}")
    if missing := {"model", "data"} - given.keys():
        raise ValueError(f"{where}: {' and '.join(sorted(missing))} missing")
    try:
        return FinetuneConfig(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
