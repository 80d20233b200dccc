"""Docstrings say what a caller has to know: every public name has one, and those of the core name parameters and errors."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import robust_spectral as rs

ROOT = Path(__file__).parents[1]
_ERRORS = {"ValueError", "TypeError", "NotImplementedError"}
_OF_A_PROTOCOL = {"solve", "parameters", "gradients", "rescaled"}  # which says once what these are given
_FROM_ELSEWHERE = [  # whose mathematics is published by others
    "certified_radius", "circular_singular_values", "clip_", "Lanczos", "PowerQR", "projected_weight", "representation_gap",
    "spectral_norm",
]  # fmt: skip


def exported() -> dict[str, Any]:
    return {name: value for name, value in vars(rs).items() if not name.startswith("_") and not isinstance(value, ModuleType)}


def functions() -> dict[str, Any]:
    """The functions and methods that `import robust_spectral` gives, by name."""
    found: dict[str, Any] = {}
    for name, value in exported().items():
        if inspect.isfunction(value):
            found[name] = value
            continue
        for method, function in vars(value).items():
            function = getattr(function, "fget", None) or getattr(function, "__func__", function)
            if inspect.isfunction(function) and not method.startswith("_"):
                found[f"{name}.{method}"] = function
    return found


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public classes and functions that a module defines, and the public methods of those classes."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) or (inspect.isfunction(value) and "<locals>" not in value.__qualname__):
            yield f"{module.__name__}.{name}", value
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(function, "fget", None) or getattr(function, "__func__", function)
            if inspect.isfunction(function) and not method.startswith("_") and function.__module__ == module.__name__:
                yield f"{module.__name__}.{name}.{method}", function


def modules(folder: str, package: str) -> list[ModuleType]:
    paths = sorted((ROOT / folder).glob("*.py"))
    return [importlib.import_module(f"{package}.{path.stem}".removesuffix(".__init__")) for path in paths]


def raised_in(function: Any) -> set[str]:
    """The errors that a function raises itself, not those of what it calls."""
    lines, _ = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    raising = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in raising if isinstance(call.func, ast.Name)} & _ERRORS


def told_raised(docstring: str) -> str:
    """The Raises section."""
    section = re.search(r"^Raises:\n(.*?)(?=^\S|\Z)", docstring, re.DOTALL | re.MULTILINE)
    return section[1] if section else ""


@pytest.mark.parametrize(
    ("folder", "package"),
    [
        ("robust_spectral", "robust_spectral"),
        ("plugins", "robust_spectral.plugins"),
        ("evaluations", "robust_spectral.evaluations"),
    ],
)
def test_every_public_name_of_a_module_has_a_docstring(folder: str, package: str) -> None:
    named = [(name, value) for module in modules(folder, package) for name, value in public(module)]
    assert len(named) > 80
    assert not [name for name, value in named if not (value.__doc__ or "").strip() or value.__doc__.startswith(f"{name}(")]


@pytest.mark.parametrize("name", [name for name in functions() if name.split(".")[-1] not in _OF_A_PROTOCOL])
def test_a_function_of_the_core_names_all_its_parameters(name: str) -> None:
    function = functions()[name]
    docstring = inspect.getdoc(function) or ""
    parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    assert not [p for p in parameters if not re.search(rf"(?<![\w]){re.escape(p)}(?![\w])", docstring)]


@pytest.mark.parametrize("name", [name for name, value in exported().items() if inspect.isclass(value)])
def test_a_class_of_the_core_names_all_its_parameters_or_attributes(name: str) -> None:
    kind = exported()[name]
    docstring = inspect.getdoc(kind) or ""
    missing = [p for p in inspect.signature(kind).parameters if not re.search(rf"(?<![\w]){re.escape(p)}(?![\w])", docstring)]
    assert not missing


@pytest.mark.parametrize("name", functions())
def test_a_function_of_the_core_tells_the_errors_that_it_raises(name: str) -> None:
    function = functions()[name]
    told = told_raised(inspect.getdoc(function) or "")
    assert not {error for error in raised_in(function) if error not in told}


def test_mathematics_from_elsewhere_names_its_source() -> None:
    assert not [name for name in _FROM_ELSEWHERE if "Source" not in (inspect.getdoc(exported()[name]) or "")]
