"""The documentation's code runs, its commands exist, and its site builds without a warning and without a network."""

import re
import runpy
import shlex
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from reference import norm
from torch import nn

import robust_spectral as rs
from robust_spectral.evaluations.attacks import run_attack, size_of
from robust_spectral.evaluations.commands.cli import app
from robust_spectral.evaluations.grids.grid import read_grid

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
EXAMPLES = sorted((DOCS / "examples").iterdir())


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in any of the languages; "" for those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in fenced if language in languages]


def taken_for_granted() -> dict[str, Any]:
    """The names that the README's code uses but does not define: a model, its data, an optimizer and a loop."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return {"model": model, "images": images, "labels": labels, "optimizer": optimizer, "train": train}


def run_page(page: Path, namespace: dict[str, Any]) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_the_python_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("my_page")
    monkeypatch.setitem(sys.modules, "my_page", module)
    vars(module).update(taken_for_granted() if page.name == "README.md" else {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(lightning|art|torch)\..*")  # warnings of the host libraries
        run_page(page, vars(module))


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The blocks of the page on defences and attacks, as a module."""
    module = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", module)
    run_page(DOCS / "plugins.md", vars(module))
    return module


def test_the_example_defence_keeps_norms_at_max_norm_or_below(plugins: types.ModuleType) -> None:
    model, images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4)), torch.rand(4, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    defence = plugins.Shrink(0.5)
    defence.prepare(model, images)
    defence.attach(optimizer)
    model(images).sum().backward()
    optimizer.step()
    assert max(norm(model[0], (1, 8, 8)), norm(model[2], (144,))) <= 0.5 * 1.001


def test_the_example_attack_runs_in_the_harness(plugins: types.ModuleType) -> None:
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval(), torch.rand(6, 1, 8, 8)
    verdict = run_attack(plugins.Stripes(), model, images, model(images).argmax(1), seed=0)
    size = float(size_of(verdict.adversarial.double() - images.double(), "linf").max())
    assert verdict.error is None and 0 < size <= 0.1 * (1 + 1e-6)


def test_the_example_lipschitz_rule_bounds_its_layer(plugins: types.ModuleType) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), plugins.Halved())
    x = torch.rand(1, 1, 8, 8)
    assert rs.lipschitz_estimate(model, x) <= rs.lipschitz_bound(model, x).value <= 0.51 * norm(model[1], (64,))


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page: its shell blocks, with continued lines joined, and its inline code."""
    text = page.read_text() if page.suffix == ".sh" else "\n".join(blocks(page, "", "sh", "bash", "console"))
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        yield line.strip()
    if page.suffix == ".md":
        yield from re.findall(r"`([^`\n]+)`", page.read_text())


def words_of(command: str) -> list[str]:
    return [word for word in shlex.split(command, comments=True) if word != "…"]


def parse(words: list[str], whole: bool) -> None:
    """Check that a command exists and takes these options; unless it is ``whole``, required ones may be missing."""
    group: Any = typer.main.get_command(app)
    with group.make_context("robust-spectral", list(words), resilient_parsing=True) as context:
        if words == ["--help"]:
            return
        name, command, rest = group.resolve_command(context, list(words))
        assert command is not None, f"there is no command {words[0]}"
        try:
            command.make_context(name, [word for word in rest if word != "--help"], context)
        except Exception as error:
            if whole or not str(error).startswith("Missing"):
                raise


SHELL = [(page, line) for page in [*PAGES, *EXAMPLES] if page.suffix in (".md", ".sh") for line in commands(page)]
OURS = [(page, line) for page, line in SHELL if line.startswith("robust-spectral ")]


@pytest.mark.parametrize(("page", "line"), OURS, ids=lambda value: value if isinstance(value, str) else page_name(value))
def test_a_command_of_the_documentation_exists_with_its_options(page: Path, line: str) -> None:
    words = [word.replace("$defence", "none") for word in words_of(line)][1:]
    parse([word for word in words if word != "COMMAND"], whole=len(words) > 1 and "…" not in line and "--help" not in line)


def test_torchrun_lines_start_a_command_that_exists() -> None:
    lines = [line for _, line in SHELL if "-m robust_spectral.evaluations " in line]
    assert lines
    for line in lines:
        parse(words_of(line.partition("-m robust_spectral.evaluations ")[2]), whole=False)


def test_the_check_of_commands_detects_unknown_commands_and_options() -> None:
    with pytest.raises(Exception, match="epsilon"):
        parse(["evaluate", "runs/a", "--epsilon", "0.5"], whole=False)
    with pytest.raises(Exception, match="train"):
        parse(["train"], whole=False)
    with pytest.raises(Exception, match="Missing"):
        parse(["finetune", "--model", "test_resnet"], whole=True)


def test_every_make_target_and_script_named_in_the_documentation_exists() -> None:
    targets = set(re.findall(r"^([\w/.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, line in SHELL:
        if match := re.match(r"make ([\w/-]+)", line):
            assert match[1] in targets, f"{page_name(page)}: make {match[1]}"
        if match := re.match(r"(?:python|bash) ([\w/]+\.(?:py|sh))", line):
            assert (ROOT / match[1]).is_file() or match[1] == "train.py", f"{page_name(page)}: {match[1]}"


def test_every_repository_file_named_in_the_documentation_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:docs|tests|evaluations|plugins|robust_spectral)/[\w./-]+\.\w+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page_name(page)}: {name}"


def test_the_relative_links_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_the_grid_in_the_documentation_can_be_read(tmp_path: Path) -> None:
    (text,) = blocks(DOCS / "choosing.md", "toml")
    (tmp_path / "grid.toml").write_text(text)
    grid = read_grid(tmp_path / "grid.toml", tmp_path)
    assert len(grid.runs) == 11 and grid.frontier is not None


@pytest.mark.parametrize("script", ["clip_your_model", "art_madry"])  # accelerate_loop is run by test_host_loops
def test_a_tutorial_in_python_runs(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(art|torch)\..*")
        runpy.run_path(str(DOCS / "examples" / f"{script}.py"), run_name="__main__")
    assert capsys.readouterr().out


def unrolled(script: str) -> Iterator[str]:
    """The lines of a shell script with its one loop, if any, unrolled."""
    joined = re.sub(r"\\\n\s*", " ", script)
    loop = re.search(r"for (\w+) in (.*?); do\n(.*?)done\n", joined, re.DOTALL)
    if loop:
        turns = "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())
        joined = joined.replace(loop[0], turns)
    return (line.strip() for line in joined.splitlines() if line.strip().startswith("robust-spectral"))


@pytest.mark.parametrize("script", [path for path in EXAMPLES if path.suffix == ".sh"], ids=lambda path: path.stem)
def test_a_tutorial_on_the_command_line_can_be_run_twice(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in 2 * list(unrolled(script.read_text())):
        typer.main.get_command(app).main(words_of(line)[1:], standalone_mode=False)
    assert list(tmp_path.rglob("report.html")) or (tmp_path / "site" / "index.html").is_file()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = {"PATH": "", "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


def test_the_site_builds_without_a_warning_and_has_every_page(site: Path) -> None:
    missing = [page for page in DOCS.rglob("*.md") if not (site / page.relative_to(DOCS)).with_suffix(".html").is_file()]
    assert not missing


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?://[^\" >]+)", page.read_text())
        assert not loaded, f"{page.name}: {loaded}"


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = (site / "reference" / "core.html").read_text()
    names = [name for name in vars(rs) if not name.startswith("_") and not isinstance(getattr(rs, name), types.ModuleType)]
    assert len(names) > 25
    assert not [name for name in names if f'id="robust_spectral.{name}"' not in page]


def test_the_check_of_python_code_detects_a_failing_assertion(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nassert 1 + 1 == 3\n```\n")
    with pytest.raises(AssertionError):
        run_page(page, {})
