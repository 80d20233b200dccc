"""The wheel contains the package and nothing else, and can be built from the source distribution."""

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import robust_spectral as rs

ROOT = Path(__file__).parents[1]
NAME = f"robust_spectral-{rs.__version__}"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


def build(kind: str, source: Path, out: Path) -> Path:
    """A wheel or sdist of a source tree, made without a network."""
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    made = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks or would add, as in the working tree."""
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tree, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tarfile.TarFile:
    return tarfile.open(build("sdist", tree, tmp_path_factory.mktemp("sdist")))


def shipped() -> set[str]:
    """The paths in an installed package of the files of the three folders."""
    places = {"robust_spectral": "robust_spectral", "plugins": "robust_spectral/plugins",
              "evaluations": "robust_spectral/evaluations"}  # fmt: skip
    modules = {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("*.py")
        if "benchmarks" not in path.parts
    }
    data = {f"robust_spectral/{path.relative_to(ROOT)}" for path in (ROOT / "evaluations" / "templates").iterdir()}
    recipes = {f"robust_spectral/{path.relative_to(ROOT)}" for path in (ROOT / "evaluations" / "recipes").glob("*.toml")}
    return modules | data | recipes | {"robust_spectral/py.typed"}


def test_the_wheel_contains_every_module_template_and_recipe_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    about = {"METADATA", "WHEEL", "entry_points.txt", "top_level.txt", "RECORD", "licenses/LICENSE"}
    assert set(wheel.namelist()) == shipped() | {f"{NAME}.dist-info/{name}" for name in about}


def test_the_wheel_metadata_has_licence_version_and_typing(wheel: zipfile.ZipFile) -> None:
    told = Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
    assert (told["Name"], told["Version"], told["License-Expression"]) == ("robust-spectral", rs.__version__, "MIT")
    assert told["Requires-Python"] == ">=3.10" and told["License-File"] == "LICENSE"
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    assert wheel.read(f"{NAME}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_core_requires_only_numpy_safetensors_scipy_and_torch(wheel: zipfile.ZipFile) -> None:
    told = Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
    needed = [line for line in told.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(needed) == ["numpy>=1.26", "safetensors>=0.4", "scipy>=1.11", "torch>=2.10"]


def test_entry_points_name_modules_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    lines = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode().splitlines()
    modules = {line.split(" = ")[1].split(":")[0] for line in lines if " = " in line}
    assert len(modules) >= 5
    paths = {module.replace(".", "/") for module in modules}
    assert not {path for path in paths if not {f"{path}.py", f"{path}/__init__.py"} & set(wheel.namelist())}


def test_the_wheel_can_be_built_from_the_source_distribution(
    sdist: tarfile.TarFile, wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    top = {name.split("/")[1] for name in sdist.getnames() if "/" in name}
    ours = {"robust_spectral", "plugins", "evaluations", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    assert top == ours | {"PKG-INFO", "setup.cfg", "robust_spectral.egg-info"}
    sdist.extractall(tmp_path / "source", filter="data")
    (tmp_path / "out").mkdir()
    again = zipfile.ZipFile(build("wheel", tmp_path / "source" / NAME, tmp_path / "out"))
    assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_the_citation_has_the_version_and_the_paper() -> None:
    told = (ROOT / "CITATION.cff").read_text()
    assert f"version: {rs.__version__}\n" in told and "2402.16017" in told
    assert all(name in told for name in ("Ebrahimpour Boroojeny", "Telgarsky", "Sundaram"))
