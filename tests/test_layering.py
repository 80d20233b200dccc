"""The allowed imports between modules, checked on their syntax trees, and the modules that an import of the core loads."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = ["devices", "numerics", "user_warnings"]  # core modules outside packages; they import nothing of this package
CORE = [{"operators"}, {"singular_values"}, {"norms"}, {"layers"}, {"clipping", "lipschitz"}, {"certificates", "training"}]
EVALUATIONS = [
    {"run_folder", "terminal", "wording"},
    {"attacks", "config", "data", "lite_weights", "records"},
    {"models"},
    {"attacking", "finetuning"},
    {"grids", "reporting"},
    {"leaderboard", "publishing"},
    {"commands"},
    {"__main__"},
]  # a package or module imports from the rows above its own only
FOLDERS = {"robust_spectral": "robust_spectral", "plugins": "robust_spectral.plugins",
           "evaluations": "robust_spectral.evaluations"}  # fmt: skip
NUMERICS = {"torch", "numpy", "scipy"}
PARTS = [
    ["art_preprocessing", "art_clipping", "art_certifying", "art"],
    ["timm_maxmin", "timm_residual", "timm"],
    ["logit_scale", "art_attacks"],
    ["logit_scale", "foolbox"],
]  # files of one plugin or shared by several, in the order of their imports
HOSTS = {
    "art_preprocessing": "art",
    "art_clipping": "art",
    "art_certifying": "art",
    "art_attacks": "art",
    "autoattack": "pyautoattack",
    "timm_blocks": "timm",
    "timm_maxmin": "timm",
    "timm_residual": "timm",
    "timm_task": "timm",
    "defences": "deel",
}  # plugin -> what it imports, where the two names differ


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *parts]).removesuffix(".__init__")


MODULES = {
    module_of(path): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "benchmarks" not in path.parts
}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
HOMES = ("robust_spectral.plugins", "robust_spectral.evaluations")


def imported(name: str) -> set[str]:
    """Absolute names of all modules that a module imports, or imports from, anywhere in it."""
    package = name.split(".") if name in PACKAGES else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {module}
    return found


IMPORTED = {name: imported(name) for name in MODULES}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def home(name: str) -> str:
    """The folder that a module belongs to: the core, the plugins or the evaluations."""
    return next((other for other in HOMES if is_within(name, other)), "robust_spectral")


def room(name: str) -> str:
    """The package or module directly under its folder, which others may import from; "" for the folder's own __init__."""
    return name.removeprefix(home(name)).strip(".").split(".")[0]


def imported_modules(name: str) -> set[str]:
    """The imported modules that belong to this package."""
    return IMPORTED[name] & MODULES.keys()


def of(folder: str) -> list[str]:
    return [name for name in MODULES if home(name) == folder]


def third_party(name: str) -> set[str]:
    tops = {n.split(".")[0] for n in IMPORTED[name]}
    return tops - set(sys.stdlib_module_names) - NUMERICS - {"robust_spectral"}


def out_of_order(folder: str, order: list[set[str]], free: set[str]) -> list[tuple[str, str]]:
    """Pairs of an importing and an imported package of a folder whose second is not in a row above."""
    row = {name: place for place, names in enumerate(order) for name in names} | dict.fromkeys(free, -1)
    pairs = [(room(name), room(other)) for name in of(folder) for other in imported_modules(name) if home(other) == folder]
    return [(one, other) for one, other in pairs if one and one != other and not row[other] < row[one]]


def test_importing_the_core_imports_torch_and_nothing_heavier() -> None:
    heavy = ["scipy", "timm", "art", "matplotlib", "sklearn", "pandas"]
    code = f"import robust_spectral, sys; print([name for name in {heavy} if name in sys.modules], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_core_modules_outside_packages_import_nothing_of_this_package() -> None:
    assert sorted(room(name) for name in of("robust_spectral") if room(name) and name.count(".") == 1) == sorted(
        [*LEAVES, *(name for names in CORE for name in names)]
    )
    assert not [name for name in LEAVES if imported_modules(f"robust_spectral.{name}")]


def test_a_package_of_the_core_imports_only_from_packages_below_it() -> None:
    assert not out_of_order("robust_spectral", CORE, set(LEAVES))


def test_a_package_of_the_evaluations_imports_only_from_packages_below_it() -> None:
    assert {room(name) for name in of("robust_spectral.evaluations")} == {"", *(n for names in EVALUATIONS for n in names)}
    assert not out_of_order("robust_spectral.evaluations", EVALUATIONS, set())


def test_a_package_is_imported_only_through_its_init_file() -> None:
    deep = [
        (name, other)
        for name in MODULES
        for other in imported_modules(name)
        if (home(name), room(name)) != (home(other), room(other)) and other.removeprefix(home(other)).count(".") > 1
    ]
    assert not deep


def test_no_package_has_an_import_cycle() -> None:
    for place in {(home(name), room(name)) for name in MODULES}:
        inside = [name for name in MODULES if (home(name), room(name)) == place and name not in PACKAGES]
        graph = {name: {other for other in imported_modules(name) if other in inside} for name in inside}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(str(error))


def test_no_module_has_the_name_of_an_export_of_its_package() -> None:
    """Otherwise an import of that name from the package could give either of them."""
    offered = {name: set(re.findall(r"from \.\w\S* import (\w+) as", MODULES[name].read_text())) for name in PACKAGES}
    assert not [name for name in MODULES if name.rpartition(".")[2] in offered.get(name.rpartition(".")[0], ())]


def test_importing_the_command_line_imports_no_library_that_only_some_commands_need() -> None:
    heavy = ["timm", "torchvision", "art", "scipy", "pyarrow", "matplotlib", "sklearn"]
    code = f"import robust_spectral.evaluations.commands, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", of("robust_spectral"))
def test_the_core_imports_only_numerical_libraries(name: str) -> None:
    assert third_party(name) == set()
    assert not [n for n in IMPORTED[name] if home(n) in HOMES]


@pytest.mark.parametrize("name", of("robust_spectral.plugins"))
def test_a_plugin_imports_only_the_core_its_host_library_and_its_own_parts(name: str) -> None:
    own = room(name)
    assert third_party(name) - {"safetensors"} <= {HOSTS.get(own, own)}
    assert not [n for n in IMPORTED[name] if is_within(n, "robust_spectral.evaluations")]
    above = [part for parts in PARTS if own in parts for part in parts[: parts.index(own)]]
    assert {room(n) for n in imported_modules(name) if home(n) == "robust_spectral.plugins"} - {""} <= {own, *above}


def test_the_folders_are_not_imported_by_their_top_level_names() -> None:
    assert not [(name, n) for name in MODULES for n in IMPORTED[name] if is_within(n, "plugins") or is_within(n, "evaluations")]


def test_the_reference_of_these_tests_does_not_import_the_package() -> None:
    text = (ROOT / "tests" / "reference.py").read_text()
    named: Iterator[ast.AST] = ast.walk(ast.parse(text))
    modules = [node.module or "" for node in named if isinstance(node, ast.ImportFrom)]
    assert not [name for name in modules if is_within(name, "robust_spectral")] and "import robust_spectral" not in text
