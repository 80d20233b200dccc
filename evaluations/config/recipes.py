"""Recipes: the options of a fine-tuning as a TOML file, so that one command repeats a run.

The keys are those of `FinetuneConfig`. A recipe of this package is given by its name, any other by its path.
"""

from __future__ import annotations

import difflib
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from .finetune_config import FinetuneConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}  # all other fields are texts
FOLDER = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The names of the recipes in this package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Read the options of a recipe, given by name or path.

    Raises:
        ValueError: there is no such recipe, it is not TOML, or it contains an unknown option.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=2, cutoff=0.3) or recipe_names()
        raise ValueError(f"recipe {name!r}: no such file; near: {', '.join(near)} (or give the path of a .toml file)")
    return checked(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as TOML: {error}") from error


def checked(options: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the options if all of them are options of fine-tuning.

    Raises:
        ValueError: an option is unknown; similar names are listed.
    """
    known = [field.name for field in fields(FinetuneConfig)]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.3)
            raise ValueError(f"{where}: {key!r} is no option of finetune; near: {', '.join(near) or ', '.join(known)}")
    return options


def config_of(options: dict[str, Any], where: str) -> FinetuneConfig:
    """The configuration with the given options; ``max_norm = inf`` means no clipping.

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
