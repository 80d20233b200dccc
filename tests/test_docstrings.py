"""Docstrings: every public name has one, in the core with all parameters and errors, and its sentences name their subject."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import robust_spectral as rs

ROOT = Path(__file__).parents[1]
_ERRORS = {"ValueError", "TypeError", "NotImplementedError"}
_RULES = {"attention", "interval_arithmetic", "powers", "roundings", "normalised_then_activated"}
_OF_A_PROTOCOL = {"solve", "parameters", "gradients", "rescaled"}  # whose parameters the protocol documents
_FROM_ELSEWHERE = [  # functions whose mathematics is published elsewhere
    "certified_radius", "circular_singular_values", "clip_", "Lanczos", "PowerQR", "projected_weight", "representation_gap",
    "spectral_norm",
]  # fmt: skip


_BAD_START = {"That", "Those", "What", "And", "As", "Them", "Theirs", "They", "It", "Of"}
_BAD_SUBJECT = re.compile(r"(?:^|(?<=[.:;?!])\s+)(That|Those|What|And|They|Them)\b(?! is to say)")


def exported() -> dict[str, Any]:
    return {name: value for name, value in vars(rs).items() if not name.startswith("_") and not isinstance(value, ModuleType)}


def functions_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A function itself, or the public methods and properties of a class, by name."""
    if inspect.isfunction(value) and "<locals>" not in value.__qualname__:
        yield name, value
    for method, attribute in vars(value).items() if inspect.isclass(value) else ():
        function = getattr(attribute, "fget", None) or getattr(attribute, "__func__", attribute)
        if inspect.isfunction(function) and not method.startswith("_"):
            yield f"{name}.{method}", function


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public classes and functions that a module defines, and the public methods of those classes."""
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            if inspect.isclass(value):
                yield f"{module.__name__}.{name}", value
            yield from functions_of(f"{module.__name__}.{name}", value)


FUNCTIONS = dict(pair for name, value in exported().items() for pair in functions_of(name, value))


def modules(folder: str, package: str) -> list[ModuleType]:
    paths = sorted(path.relative_to(ROOT / folder).with_suffix("") for path in (ROOT / folder).rglob("*.py"))
    names = [".".join([package, *path.parts]).removesuffix(".__init__") for path in paths if "benchmarks" not in path.parts]
    return [importlib.import_module(name) for name in names]


def raised_in(function: Any) -> set[str]:
    """The errors that a function raises itself, without those of the functions that it calls."""
    lines, _ = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    raising = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in raising if isinstance(call.func, ast.Name)} & _ERRORS


def named_in(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def told_raised(docstring: str) -> str:
    """The Raises section, or a line that starts with "Raise"."""
    section = re.search(r"^Raises:\n(.*?)(?=^\S|\Z)|^Raise [^\n]*", docstring, re.DOTALL | re.MULTILINE)
    return section[0] if section else ""


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
    assert not [
        name for name, value in named if not (value.__doc__ or "").strip() or value.__doc__.startswith(f"{value.__name__}(")
    ]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.split(".")[-1] not in _OF_A_PROTOCOL])
def test_a_function_of_the_core_names_all_its_parameters(name: str) -> None:
    function = FUNCTIONS[name]
    docstring = inspect.getdoc(function) or ""
    parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    assert not set(parameters) - set(named_in(docstring))


@pytest.mark.parametrize("name", [name for name, value in exported().items() if inspect.isclass(value)])
def test_a_class_of_the_core_names_all_its_parameters_or_attributes(name: str) -> None:
    kind = exported()[name]
    docstring = inspect.getdoc(kind) or ""
    assert not set(inspect.signature(kind).parameters) - set(named_in(docstring))


def test_a_function_documents_the_errors_that_it_raises() -> None:
    """Lipschitz rules, whose errors only withhold a bound, and commands, whose errors are printed, are exempt."""
    telling = [m for m in modules("robust_spectral", "robust_spectral") if m.__name__.split(".")[-1] not in _RULES]
    found = [pair for module in [*telling, *modules("plugins", "robust_spectral.plugins")] for pair in public(module)]
    functions = {name: f for name, f in found if inspect.isfunction(f) and f.__name__ not in _RULES}
    assert not [
        name for name, f in functions.items() if not raised_in(f) <= set(named_in(told_raised(inspect.getdoc(f) or "")))
    ]


def test_published_mathematics_names_its_source() -> None:
    assert not [name for name in _FROM_ELSEWHERE if "Source" not in (inspect.getdoc(exported()[name]) or "")]


@cache
def docstrings() -> list[tuple[str, str]]:
    """Every docstring of the three folders with its place, including those of private functions and of modules."""
    folders = ("robust_spectral", "plugins", "evaluations", "tests")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    nodes = [(path, node) for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [(path, node, ast.get_docstring(node)) for path, node in nodes if isinstance(node, kinds)]
    return [(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text) for path, node, text in found if text]


def test_a_docstring_starts_with_a_noun_of_the_field_or_an_imperative() -> None:
    assert not [
        (place, text.split("\n")[0]) for place, text in docstrings() if re.split(r"\W", text.lstrip(' "'))[0] in _BAD_START
    ]


def test_no_sentence_of_a_docstring_leaves_its_subject_unnamed() -> None:
    found = [(place, match[1], text) for place, text in docstrings() for match in _BAD_SUBJECT.finditer(text)]
    assert not [(place, word) for place, word, _ in found]
