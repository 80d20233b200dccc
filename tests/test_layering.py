"""Who may import whom, read off the syntax trees, and what an import of the core brings along."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "caller", "numerics", "operators", "convolutions", "affine", "circular", "projection", "krylov", "spectrum",
    "kernel_bounds", "norms", "layers", "folding", "asking", "moves", "coarse", "slow", "tracking", "clipping", "targets",
    "graph", "nodes", "activations", "affine_rules", "arithmetic", "normalisation", "places", "pooling", "rules", "intervals",
    "powers", "attention", "rounding", "tracing", "lipschitz", "budget", "looking", "small_maps", "holding", "turns", "hooks",
    "composites", "fastclip", "certify",
]  # fmt: skip
CORE = sorted((ROOT / "robust_spectral").glob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
EVALUATIONS = sorted((ROOT / "evaluations").rglob("*.py"))
NUMERICS = {"torch", "numpy", "scipy"}
PARTS = [
    ["art_preprocessing", "art_clipping", "art_certifying", "art"],
    ["timm_maxmin", "timm"],
]  # files of one plugin, in the order of their imports
HOSTS = {
    "art_preprocessing": "art",
    "art_clipping": "art",
    "art_certifying": "art",
    "art_attacks": "art",
    "autoattack": "pyautoattack",
    "timm_blocks": "timm",
    "timm_maxmin": "timm",
    "timm_task": "timm",
    "defences": "deel",
}  # plugin file -> what it imports, where the two names differ


def imported(path: Path, package: str) -> Iterator[str]:
    """Absolute names of all that a file imports, anywhere in it; relative names are resolved against its package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def third_party(names: Iterator[str]) -> set[str]:
    tops = {name.split(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - NUMERICS - {"robust_spectral"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_importing_the_core_brings_torch_and_nothing_heavier() -> None:
    heavy = ["scipy", "timm", "art", "matplotlib", "sklearn", "pandas"]
    code = f"import robust_spectral, sys; print([name for name in {heavy} if name in sys.modules], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_every_file_of_the_core_has_its_place_in_the_order() -> None:
    assert {path.stem for path in CORE} == {*ORDER, "__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_of_the_core_imports_only_from_those_above_it(name: str) -> None:
    ours = {n for n in imported(ROOT / "robust_spectral" / f"{name}.py", "robust_spectral") if is_within(n, "robust_spectral")}
    files = {n.split(".")[1] for n in ours if "." in n}
    assert files <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_the_core_imports_numerics_only(path: Path) -> None:
    names = set(imported(path, "robust_spectral"))
    assert third_party(iter(names)) == set()
    assert not [n for n in names if is_within(n, "robust_spectral.plugins") or is_within(n, "robust_spectral.evaluations")]


@pytest.mark.parametrize("path", PLUGINS, ids=relative)
def test_a_plugin_imports_the_core_its_own_host_and_its_own_parts_only(path: Path) -> None:
    names = set(imported(path, "robust_spectral.plugins"))
    assert third_party(iter(names)) - {"safetensors"} <= {HOSTS.get(path.stem, path.stem)}
    assert not [n for n in names if is_within(n, "robust_spectral.evaluations") or is_within(n, "evaluations")]
    above = [part for parts in PARTS if path.stem in parts for part in parts[: parts.index(path.stem)]]
    assert {n.split(".")[2] for n in names if n.startswith("robust_spectral.plugins.")} <= set(above)


def test_the_folders_are_not_imported_by_their_top_level_names() -> None:
    for path in [*CORE, *PLUGINS, *EVALUATIONS]:
        package = "robust_spectral" if path in CORE else f"robust_spectral.{path.relative_to(ROOT).parts[0]}"
        assert not [n for n in imported(path, package) if is_within(n, "plugins") or is_within(n, "evaluations")]


def test_the_reference_of_these_tests_is_independent() -> None:
    assert not [n for n in imported(ROOT / "tests" / "reference.py", "tests") if is_within(n, "robust_spectral")]
