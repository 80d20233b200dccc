"""Certificates around single images in evaluations: recorded, resumed, compared with attacks, and shown in reports."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from commands import call
from rich.console import Console
from torch import nn

from robust_spectral import local_radius
from robust_spectral.certificates import Radii
from robust_spectral.evaluations.attacking import AttackPlan, evaluate, images_to_certify, planned_work, radii, work
from robust_spectral.evaluations.attacking.engine import in_this_process
from robust_spectral.evaluations.data import load_data
from robust_spectral.evaluations.grids import grid
from robust_spectral.evaluations.grids.frontier import row_of
from robust_spectral.evaluations.grids.grid import read_grid
from robust_spectral.evaluations.leaderboard.site import build
from robust_spectral.evaluations.models import adopt, load_run
from robust_spectral.evaluations.records import certified_at
from robust_spectral.evaluations.reporting import charts, print_report, render, write_report
from robust_spectral.evaluations.reporting.report import accuracy_rows
from robust_spectral.evaluations.run_folder import open_run, read_json, write_json
from robust_spectral.evaluations.wording import percent

NETWORK = """
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 10))
"""
PLANS = [AttackPlan("fgsm", "l2", (0.1, 0.5), 20)]
FEW = {"rounds": 2, "steps": 2, "failure_probability": 1e-9, "version": 1}
OPTIONS = {"block": 16, "gate_samples": 16, "say": lambda text: None}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two radii for each image, in blocks of four images."""
    monkeypatch.setattr(work, "SETTINGS", FEW)
    monkeypatch.setattr(work, "BLOCK", 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with a small network, trained on digits for a few steps, that was not evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "nets.py").write_text(NETWORK)
    scope: dict = {}
    exec(NETWORK, scope)
    torch.manual_seed(0)
    model: nn.Module = scope["network"]()
    x, y = load_data("digits", 8).test_images(300)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(10 * model(x), y).backward()
        optimizer.step()
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    spec = f"{folder / 'nets.py'}:network"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUST_SPECTRAL_MODEL", spec)  # trusted within these tests only
        yield adopt(spec, data="digits", out=folder / "run", checkpoint=folder / "weights.safetensors")


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, evaluated with radii around its first 8 images."""
    folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("whole") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "SETTINGS", FEW)
        patch.setattr(work, "BLOCK", 4)
        assert evaluate(folder, PLANS, local_certificates=8, **OPTIONS)
    return folder


@pytest.fixture
def fresh(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def clean_rows(folder: Path) -> list[dict]:
    return [row for row in pq.read_table(folder / "samples.parquet").to_pylist() if row["attack"] == "none"]


def planted(monkeypatch: pytest.MonkeyPatch, size: float, reason: str | None = None) -> None:
    """Certificates of one radius for every image, or a reason for none."""

    def found(model: nn.Module, images: torch.Tensor, *_: object, **__: object) -> Radii:
        given = torch.full((len(images),), size, dtype=torch.float64)
        return Radii(given, given > 0, 1e-9, reason)

    monkeypatch.setattr(radii, "largest_radii", found)


def test_each_of_the_first_images_has_the_larger_of_its_local_and_its_global_radius(whole: Path) -> None:
    rows = clean_rows(whole)
    model, data, _ = load_run(whole)
    images, labels = data.images_at(data.proportional_order[:8])
    for block in (slice(0, 4), slice(4, 8)):
        found = local_radius(model.double(), images[block].double(), labels[block], rounds=2, steps=2)
        assert [row["certified_radius"] for row in rows[block]] == found.tolist()
    for row in rows[:8]:
        assert row["certified_radius"] == max(row["local_radius"], row["global_radius"])
        assert row["certified_by"] == ("local" if row["local_radius"] > row["global_radius"] else "global")
    assert [row["certified_by"] for row in rows[:8]].count("local") >= 6
    assert all(row["certified_radius"] == row["global_radius"] and row["local_radius"] is None for row in rows[8:])
    assert len(rows) == 20 and {row["certified_by"] for row in rows[8:]} == {"global"}


def test_a_global_radius_above_the_local_one_is_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, 1e-6)
    evaluate(fresh, PLANS, local_certificates=4, **OPTIONS)
    rows = clean_rows(fresh)[:4]
    assert all(row["certified_radius"] == row["global_radius"] > 1e-6 and row["certified_by"] == "global" for row in rows)
    report = read_json(fresh / "report.json")
    assert report["local_certificates"]["local"] == 0 and report["certified_local"] == []


def test_an_interrupted_evaluation_keeps_the_radii_that_it_has_and_computes_the_others_only(fresh: Path, whole: Path) -> None:
    done: list[str] = []

    def interrupted(folder, units, device):
        for outcome in in_this_process(folder, units, device):
            yield outcome
            if outcome[0].task == "local-certificates":
                raise KeyboardInterrupt

    def counting(folder, units, device):
        done.extend(unit.task for unit in units)
        return in_this_process(folder, units, device)

    with pytest.raises(KeyboardInterrupt):
        evaluate(fresh, PLANS, local_certificates=8, engine=interrupted, **OPTIONS)
    assert len(list((fresh / "records").glob("local-certificates-*.safetensors"))) == 1
    evaluate(fresh, PLANS, local_certificates=8, engine=counting, **OPTIONS)
    assert done.count("local-certificates") == 1
    assert clean_rows(fresh) == clean_rows(whole)


def test_a_later_evaluation_keeps_the_radii_and_computes_more_of_them_if_asked(whole: Path, tmp_path: Path) -> None:
    folder, done = Path(shutil.copytree(whole, tmp_path / "run")), []

    def counting(folder, units, device):
        done.extend((unit.task, unit.start) for unit in units)
        return in_this_process(folder, units, device)

    evaluate(folder, [AttackPlan("noise", "l2", (0.1,), 20)], engine=counting, **OPTIONS)
    assert "local-certificates" not in dict(done)
    report = read_json(folder / "report.json")
    assert report["planned"]["local_certificates"] == 8 and len(report["planned"]["plans"]) == 2
    assert report["certified_local"] == read_json(whole / "report.json")["certified_local"]
    evaluate(folder, PLANS, local_certificates=10, engine=counting, **OPTIONS)
    assert ("local-certificates", 8) in done and ("local-certificates", 0) not in done
    assert len(planned_work(open_run(folder)).local) == 3


def test_the_number_of_images_is_an_option_of_the_command_and_can_be_all(fresh: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(f"evaluate {fresh} --attack fgsm --eps 0.1 --samples 4 --gate-samples 8 --local-certificates all") == 0
    assert "Certificates around the first 4 images: " in " ".join(capsys.readouterr().out.split())
    report = read_json(fresh / "report.json")
    assert report["planned"]["local_certificates"] == report["local_certificates"]["images"] == 4
    for wrong in ("some", "-1", "2.5"):
        assert call(f"evaluate {fresh} --local-certificates {wrong}") == 2
        assert f"local_certificates '{wrong}': expected a number of images, 0 for none, or all" in " ".join(
            capsys.readouterr().err.split()
        )
    with pytest.raises(ValueError, match="local_certificates=-1"):
        evaluate(fresh, PLANS, local_certificates=-1, **OPTIONS)
    assert images_to_certify(7, PLANS) == 7 and images_to_certify("all", PLANS) == 20


@pytest.mark.parametrize("error", [None, RuntimeError("no float64 here"), ValueError("one logit only")])
def test_a_model_without_certificates_around_images_keeps_the_global_ones_and_the_report_has_the_reason(
    error: Exception | None, fresh: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    why = str(error or "cummax has no bound")
    monkeypatch.setattr(radii, "largest_radii", refused) if error else planted(monkeypatch, 0.0, why)
    said: list[str] = []
    evaluate(fresh, PLANS, local_certificates=8, **OPTIONS | {"say": said.append})
    assert any(text.endswith(f"nothing is proved around the images: {why}") for text in said)
    report, usual = read_json(fresh / "report.json"), read_json(whole / "report.json")
    assert report["certified"] == usual["certified"] and report["certified_local"] == []
    assert report["local_certificates"]["reason"] == why
    figures = write_report(fresh)
    assert not any("around each image" in label for label, _ in accuracy_rows(figures))
    assert why in (fresh / "report.html").read_text()
    console = Console(file=io.StringIO(), width=1000)
    print_report(figures, console)
    assert why in console.file.getvalue()


def test_an_image_broken_within_its_local_radius_refutes_every_certificate(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    planted(monkeypatch, 0.9)
    options = "--attack fgsm --eps 0.1 --eps 0.5 --samples 20 --gate-samples 16"
    assert call(f"evaluate {fresh} {options}") == 0
    assert call(f"evaluate {fresh} {options} --local-certificates 8") == 1
    report = read_json(fresh / "report.json")
    gates = {gate["name"]: gate for gate in report["gates"]}
    assert gates["no attack inside a certified radius"]["status"] == "fail"
    assert gates["certified <= worst case <= attacks <= clean"]["status"] == "fail"
    assert {entry["accuracy"] for kind in ("certified", "certified_local") for entry in report[kind]} == {None}
    assert report["certified_local"] and report["lipschitz"]["bound"] is None
    assert report["local_certificates"]["local"] == 0 and "refuted by a check" in report["local_certificates"]["reason"]
    assert call(f"report {fresh}") == 0
    assert "certified around each image · " not in " ".join(capsys.readouterr().out.split())


def test_a_graph_that_differs_from_the_model_withdraws_the_radii_around_images(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(radii, "disagreement", lambda model, images: "logits differ by 3 at batch size 2")
    evaluate(fresh, PLANS, local_certificates=4, **OPTIONS)
    report = read_json(fresh / "report.json")
    (gate,) = [gate for gate in report["gates"] if gate["name"] == "certified graph = model"]
    assert gate["status"] == "fail" and gate["detail"].startswith("logits differ by 3")
    assert {row["certified_radius"] for row in clean_rows(fresh)} == {0.0}
    assert report["certified_local"] == [] and "logits differ" in report["local_certificates"]["reason"]


def test_the_report_has_rows_and_a_curve_for_the_certificates_around_images_beside_the_global_ones(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, usual = write_report(whole), read_json(whole / "report.json")
    rows = dict(accuracy_rows(found))
    rate = sum(row["certified_radius"] >= 0.2 for row in clean_rows(whole)[:8]) / 8
    assert rows["certified around each image · L2 0.2 · 8 images"][0].startswith(percent(rate))
    assert "certified · L2 0.1 · 20 images" in rows
    known = {entry["eps"]: entry["accuracy"] for entry in usual["certified_local"]}
    assert known[0.2] == rate and {0.1, 0.5} <= known.keys() and all(e["n"] == 8 for e in usual["certified_local"])
    page = (whole / "report.html").read_text()
    assert "certified around each image" in page and "for the forward pass in float64" in page
    lines: list[tuple[str, list[float]]] = []
    drawn = charts._certified_line
    monkeypatch.setattr(
        charts, "_certified_line", lambda *given: lines.append((given[3], [e["eps"] for e in given[4]])) or drawn(*given)
    )
    charts.robustness(found, "l2")
    assert lines[1] == ("certified_local", sorted(known))
    without = {name: {key: value for key, value in one.items() if "local" not in key} for name, one in found.items()}
    assert charts.robustness(without, "l2") != charts.robustness(found, "l2")


def test_a_run_without_the_option_has_the_table_the_report_and_the_page_that_it_had(fresh: Path) -> None:
    evaluate(fresh, PLANS, **OPTIONS)
    columns = ["sample", "label", "attack", "norm", "eps", "predicted", "robust", "distance", "certified_radius", "status"]
    assert list(clean_rows(fresh)[0]) == columns
    report = read_json(fresh / "report.json")
    assert not {"certified_local", "local_certificates"} & report.keys()
    write_report(fresh)
    assert "around" not in (fresh / "report.html").read_text()
    assert certified_at(clean_rows(fresh), "l2", [0.1], 64, around=True)[0]["n"] == 0


def test_twins_have_certificates_around_images_at_the_same_sizes_where_both_have_them(
    whole: Path, fresh: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "twins"
    evaluate(fresh, PLANS, **OPTIONS)
    for name, source in (("one", whole), ("two", whole), ("without", fresh)):
        shutil.copytree(source, folder / name)
    report = read_json(folder / "two" / "report.json")
    write_json(folder / "two" / "report.json", report | {"certified_local": report["certified_local"][:1]})
    write_json(folder / "run.json", {"twins": ["one", "two", "without"]})
    models = write_report(folder)
    assert models["one"]["certified_local"] == models["two"]["certified_local"] == report["certified_local"]
    assert "certified_local" not in models["without"]
    rows = dict(accuracy_rows(models))
    assert [cells[2] for label, cells in rows.items() if "around each image" in label] == ["–"] * 2


def test_the_leaderboard_shows_certificates_around_fewer_images_apart_and_around_all_images_in_their_place(
    whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "runs" / "few")
    every = Path(shutil.copytree(whole, tmp_path / "runs" / "every"))
    evaluate(every, PLANS, local_certificates=20, **OPTIONS)
    rows = {(row["run"], row["eps"]): row for row in build(tmp_path / "runs", tmp_path / "site", print)}
    few, all_of_them = rows["few", 0.1], rows["every", 0.1]
    assert (few["certified"]["n"], few["certified_local"]["n"]) == (20, 8)
    assert all_of_them["certified"] == all_of_them["certified_local"]
    assert all_of_them["certified"]["accuracy"] >= few["certified"]["accuracy"]
    page = " ".join((tmp_path / "site" / "index.html").read_text().split())
    assert page.count("<small>around each image: ") == 2 and f"{percent(few['certified_local']['accuracy'])}, 8 images" in page
    page = (tmp_path / "site" / "models" / "few.html").read_text()
    assert "certified around each image</th>" in page and "Certificates around the first 8 images" in page


def test_the_model_card_has_a_row_for_the_certificates_around_images(whole: Path) -> None:
    run = open_run(whole)
    record = run.record | {"config": run.record["config"] | {"max_norm": None}}
    card = render("card.md", name="net", run=record, report=run.report())
    assert (
        "| certified around each image, L2 0.2 | the first 8 images |" in card and "| certified, L2 0.1 | 20 images |" in card
    )


def test_a_row_of_a_grid_has_the_certificates_around_images_at_the_attacked_sizes(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    record = read_json(folder / "run.json")
    write_json(folder / "run.json", record | {"config": record["config"] | {"max_norm": None, "logit_scale": 1.0}})
    row = row_of("run", folder)
    assert set(row["certified_local"]) == set(row["certified"]) == {"l2 0.1", "l2 0.5"}


def test_a_grid_takes_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[[runs]]\nname = "a"\nmodel = "m"\ndata = "d"\n[[evaluate]]\nattack = "fgsm"\neps = [0.1]\nsamples = 12\n'
    for given, wanted in (("5", 5), ('"all"', 12)):
        (tmp_path / "grid.toml").write_text(f"local_certificates = {given}\n{text}")
        assert read_grid(tmp_path / "grid.toml", tmp_path).local_certificates == wanted
    asked: list[int] = []
    monkeypatch.setattr(grid, "finetune", lambda *_, **__: None)
    monkeypatch.setattr(grid, "evaluate", lambda *_, local_certificates, **__: asked.append(local_certificates))
    assert grid.run_grid(read_grid(tmp_path / "grid.toml", tmp_path), tmp_path, say=lambda text: None) == {} and asked == [12]
    (tmp_path / "grid.toml").write_text(f"local_certificates = 2.5\n{text}")
    with pytest.raises(ValueError, match="expected a number of images"):
        read_grid(tmp_path / "grid.toml", tmp_path)
