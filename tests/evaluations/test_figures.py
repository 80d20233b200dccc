"""The figures in the documentation agree with the reports in the repository."""

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from robust_spectral.evaluations.attacking import DEFAULT_ATTACKS
from robust_spectral.evaluations.wording import NORM_NAMES

ROOT = Path(__file__).parents[2]
TWINS = [
    ("docs/figures.md", 0, "mnist5k/demo"),
    ("docs/figures.md", 1, "photos/demo-pretrained"),
    ("docs/experiments.md", 0, "fashion-mnist/lite0"),
]
MEASURED = {"apgd-t-3": "apgd-t, 50 steps, 3 targets"}  # the budget by which the comparison of attacks names it
CERTIFIED = {"MNIST": "mnist/maxmin_mlp", "Fashion-MNIST": "fashion-mnist/maxmin_mlp"}
ATTACKS = {"PGD-40": "pgd", "AutoAttack standard": "autoattack"}


def report(name: str) -> Any:
    return json.loads((ROOT / "evaluations" / "results" / name / "report.json").read_text())


def tables(page: str, header: str) -> list[list[list[str]]]:
    """The rows of cells of every table of a page with this header."""
    found = re.findall(rf"^{re.escape(header)}\n\|[-:| ]+\|\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()] for table in found]


def at(entries: list[Any], eps: float) -> Any:
    (entry,) = [entry for entry in entries if entry["eps"] == pytest.approx(eps)]
    return entry


def figure(label: str, figures: Any) -> tuple[float, int | None]:
    """The value in a report for a table's label, in the table's unit, and the number of images."""
    if label == "Lipschitz bound (proved)":
        return figures["lipschitz"]["bound"], None
    if label == "Lipschitz estimate (sampled)":
        return figures["lipschitz"]["estimate"], None
    if label == "largest layer norm (proved)":
        return max(layer["upper"] for layer in figures["layers"]), None
    kind, *rest = label.split(", ")
    if kind == "clean":
        return 100 * figures["accuracy"]["clean"], figures["accuracy"]["n"]
    eps = float(rest[0].removeprefix("L2 "))
    attacked = [entry for entry in figures["robust"] if entry["attack"] == ATTACKS.get(kind)]
    proved = {"certified": "certified", "certified around each image": "certified_local"}
    entry = at(figures[proved[kind]] if kind in proved else attacked, eps)
    return 100 * entry["accuracy"], entry["n"]


@pytest.mark.parametrize(("page", "index", "name"), TWINS)
def test_a_table_of_a_pair_of_runs_agrees_with_their_report(page: str, index: int, name: str) -> None:
    rows = tables(page, "| | plain | clipped |")[index]
    assert len(rows) >= 7
    for label, *cells in rows:
        for twin, cell in zip(("plain", "clipped"), cells, strict=True):
            value, images = figure(label, report(name)["models"][twin])
            tolerance = {"abs": 0.1} if images else {"rel": 1e-3}
            assert float(cell) == pytest.approx(value, **tolerance), f"{page}: {label}, {twin}"
            assert images is None or "images" not in label or f"{images} images" in label


def test_the_table_of_certified_accuracies_agrees_with_the_reports() -> None:
    (rows,) = tables("docs/figures.md", "| | clean | PGD-40 | certified |")
    for label, *cells in rows:
        data, size = label.split(", ")
        found, eps = report(CERTIFIED[data]), float(Fraction(size))
        attacked = [entry for entry in found["robust"] if entry["attack"] == "pgd"]
        values = [found["accuracy"]["clean"], at(attacked, eps)["accuracy"], at(found["certified"], eps)["accuracy"]]
        assert [float(cell) for cell in cells] == pytest.approx([100 * value for value in values], abs=0.1), label


def test_the_certified_accuracy_in_the_readme_agrees_with_its_report() -> None:
    (percent, eps) = re.search(r"has ([\d.]+) % .*? certified at L2 ([\d.]+)", (ROOT / "README.md").read_text()).groups()  # type: ignore
    assert 100 * at(report("mnist/maxmin_mlp")["certified"], float(eps))["accuracy"] == pytest.approx(float(percent), abs=0.1)


def test_the_accuracy_around_images_in_the_readme_agrees_with_its_result() -> None:
    told = re.search(r"prove ([\d.]+) % of (\d+) images .*? L2 ([\d.]+)", (ROOT / "README.md").read_text())
    assert told is not None
    share, images, radius = told.groups()
    rows = json.loads((ROOT / "evaluations/benchmarks/results/certify_demo.json").read_text())["rows"]
    assert [round(row["certified"], 1) for row in rows if f"{row['radius']:g}" == radius] == [float(share)]
    assert {row["images"] for row in rows} == {int(images)}


def test_the_readme_and_contributing_are_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 50


def test_the_table_of_certificates_around_images_agrees_with_the_stored_result() -> None:
    rows = json.loads((ROOT / "evaluations/benchmarks/results/certify_local.json").read_text())["rows"]
    header = "| network | L2 radius | clean | PGD | certified | global bound | SDP-CROWN | s an image |"
    (table,) = tables("docs/figures.md", header)
    shares = ("clean", "pgd", "certified", "certified_globally")
    wanted = [
        [row["network"], f"{row['radius']:.3g}", *(f"{row[share]:.1f}" for share in shares),
         f"{row['published']['sdp_crown']:.1f}", f"{row['seconds_per_image']:.2g}"]
        for row in rows if row["factor"] == 1 and row["published"]["sdp_crown"]
    ]  # fmt: skip
    assert table == wanted and not any(row["certified_and_broken"] for row in rows)


def test_the_table_of_attacks_agrees_with_the_stored_comparison() -> None:
    cases = json.loads((ROOT / "evaluations/benchmarks/results/attack_ensembles.json").read_text())["cases"]
    (table,) = tables("docs/figures.md", "| network, size | images | AutoAttack | PGD | DDN | FMN | default | its time |")
    wanted = []
    for case in cases:
        rows, norm = {row["attack"]: row for row in case["rows"]}, case["norm"]
        default = rows[" + ".join(MEASURED.get(name, name) for name in DEFAULT_ATTACKS[norm])]
        shares = (f"{rows[name]['robust']:.1f}" if name in rows else "–" for name in ("autoattack", "pgd", "ddn", "fmn"))
        wanted.append([f"{case['run']}, {NORM_NAMES[norm]} {case['eps']:g}", str(case["images"]), *shares,
                       f"{default['robust']:.1f}", f"{default['share_of_autoattack']:.2f}"])  # fmt: skip
        assert default["robust"] <= rows["autoattack"]["robust"] + 2 and default["share_of_autoattack"] <= 0.25
    assert table == wanted


def test_the_table_of_own_networks_certified_around_images_agrees_with_the_stored_results() -> None:
    (table,) = tables("docs/figures.md", "| run | L2 radius | images | clean | PGD | certified | global bound | s an image |")
    wanted = []
    for run in ("demo", "residual"):
        stored = json.loads((ROOT / f"evaluations/benchmarks/results/certify_{run}.json").read_text())
        wanted += [
            [run, f"{row['radius']:g}", str(row["images"]),
             *(f"{row[share]:.1f}" for share in ("clean", "pgd", "certified", "certified_globally")),
             f"{stored['seconds_per_image']:.1f}"]
            for row in stored["rows"]
        ]  # fmt: skip
        assert all(row["certified"] <= row["pgd"] for row in stored["rows"])
    assert table == wanted
