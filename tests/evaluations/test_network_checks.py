"""Checks of the Lipschitz bound in an evaluation: a refuted bound leaves no certified number, on no page, and exit status 1."""

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from commands import call
from torch import nn

from robust_spectral import LipschitzBound
from robust_spectral.evaluations.attacking import check_model, work
from robust_spectral.evaluations.attacks import predict
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning.objectives import CertifiedCrossEntropy, CrossEntropy
from robust_spectral.evaluations.finetuning.training import finetune
from robust_spectral.evaluations.leaderboard.entries import completed
from robust_spectral.evaluations.records import bound_gate, figures, graph_gate
from robust_spectral.evaluations.run_folder import read_json

INF, NAN = math.inf, math.nan
SLOPE, GRAPH = "sampled slopes <= certified bound", "certified graph = model"


@pytest.mark.parametrize(
    "bound, local, estimate, status",
    [
        (2.0, 2.0, 1.9, "pass"),
        (1.0, 1.0, 1.0009, "pass"),  # rounding in float32
        (1.0, 1.0, 1.002, "fail"),
        (2.0, 1.0, 1.5, "fail"),  # below the bound for all images, above the one between images in the pixel box
        (INF, 1.0, 1.5, "fail"),
        (0.0, 0.0, 17.06, "fail"),
        (0.0, 0.0, 0.0, "pass"),
        (INF, INF, 17.06, "pass"),
        (INF, INF, NAN, "pass"),
        (2.0, 2.0, NAN, "flag"),
        (2.0, 2.0, INF, "fail"),
    ],
    ids=str,
)
def test_a_sampled_slope_above_either_bound_fails(bound: float, local: float, estimate: float, status: str) -> None:
    assert bound_gate(bound, local, estimate)["status"] == status


def test_the_check_of_slopes_tells_both_numbers_and_the_allowance() -> None:
    told = bound_gate(0.0, 0.0, 17.0625)["detail"]
    assert told == "the largest Jacobian norm is 17.06, the bound 0; 0.1% are allowed for rounding"


def test_a_graph_that_differs_fails_with_the_difference() -> None:
    assert graph_gate(True, "logits differ by 3 at batch size 2") == {
        "name": GRAPH, "status": "fail", "detail": "logits differ by 3 at batch size 2"
    }  # fmt: skip
    assert graph_gate(True, None)["status"] == graph_gate(False, None)["status"] == "pass"


ROW = {"sample": 0, "label": 0, "norm": "l2", "predicted": 0, "robust": True, "distance": 0.0, "certified_radius": 0.7}
RUN = {"config": {"model": "m", "data": "d"}, "classes": 4, "defence": "none", "seed": 0, "layers": [], "model_sha256": "",
       "test_data_sha256": "", "versions": {}, "hardware": {}, "seconds": 0}  # fmt: skip


@pytest.mark.parametrize("name", [SLOPE, GRAPH, "no attack inside a certified radius"])
def test_figures_after_a_refuted_certificate_have_no_certified_number(name: str) -> None:
    rows = [ROW | {"attack": "none", "eps": 0.0}, ROW | {"attack": "pgd", "eps": 0.5}]
    gate = {"name": name, "status": "pass", "detail": "so"}
    lipschitz = {"bound": 2.0, "bound_in_pixel_box": 2.0, "estimate": 1.0, "reason": None}
    good, bad = (figures(RUN, rows, lipschitz, 64, [gate | {"status": status}]) for status in ("pass", "fail"))
    assert good["certified"] and all(entry["accuracy"] is not None and entry["valid"] for entry in good["certified"])
    assert good["lipschitz"] == lipschitz and good["sandwich"][0]["certified"] == 1.0
    assert {(entry["accuracy"], entry["ci"], entry["valid"], entry["reason"]) for entry in bad["certified"]} == {
        (None, None, False, f"{name}: so")
    }
    refuted = {"bound": INF, "bound_in_pixel_box": INF, "estimate": 1.0, "reason": f"refuted by a check: {name}: so"}
    assert bad["lipschitz"] == refuted and bad["sandwich"][0]["certified"] is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that is certified at small sizes, not evaluated."""
    torch.manual_seed(0)
    config = FinetuneConfig(model="maxmin_mlp", data="digits", image_size=28, epochs=1, max_norm=1.0, batch_size=256)
    return finetune(config, tmp_path_factory.mktemp("runs") / "run")


def evaluate(run: Path, folder: Path) -> int:
    shutil.copytree(run, folder / "run")
    return call(f"evaluate {folder / 'run'} --attack noise --eps 0.01 --samples 16 --gate-samples 8")


def test_an_unrefuted_bound_is_compared_once_for_a_model_and_certifies(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(work, "disagreement", lambda model, images, errors: asked.append((images.shape, errors)))
    assert evaluate(run, tmp_path) == 0
    report = read_json(tmp_path / "run" / "report.json")
    assert asked == [((16, 1, 28, 28), 2 * report["lipschitz"]["errors"]["float32"])]
    gates = {gate["name"]: gate["status"] for gate in report["gates"]}
    assert gates[SLOPE] == gates[GRAPH] == "pass"
    assert report["lipschitz"]["estimate"] <= report["lipschitz"]["bound"] * 1.001
    assert report["certified"][0]["accuracy"] > 0 and report["checks"]["network"] == 1


def refuting_graph(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(work, "disagreement", lambda model, images, errors: "logits differ by 3.25 at batch size 2")
    return "logits differ by 3.25 at batch size 2"


def bound_of_zero(monkeypatch: pytest.MonkeyPatch) -> str:
    """A bound as of a network whose writes into fresh tensors were taken for constants."""
    zero = LipschitzBound(0.0, local=0.0, errors={torch.float32: 0.0, torch.float64: 0.0})
    monkeypatch.setattr(work, "lipschitz_bound", lambda *_, **__: zero)
    monkeypatch.setattr(work, "disagreement", lambda model, images, errors: None)
    return "the bound 0;"


@pytest.mark.parametrize("plant", [refuting_graph, bound_of_zero])
def test_a_refuted_bound_is_on_no_page_and_the_evaluation_ends_with_status_1(
    plant, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    why = plant(monkeypatch)
    assert evaluate(run, tmp_path) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "check failed: " in said and why in said and "no attacked and no certified accuracy is valid" in said
    report = read_json(tmp_path / "run" / "report.json")
    assert report["lipschitz"]["bound"] is report["lipschitz"]["bound_in_pixel_box"] is None
    assert why in report["lipschitz"]["reason"] and report["lipschitz"]["estimate"] > 0
    assert all(entry["accuracy"] is None and entry["valid"] is False for entry in report["certified"])
    assert not any(entry["valid"] for entry in report["robust"])
    table = pq.read_table(tmp_path / "run" / "samples.parquet").to_pydict()
    assert set(table["certified_radius"]) == {0.0}
    assert call(f"report {tmp_path / 'run'}") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Lipschitz bound ∞" in said and "✗ FAIL" in said and why in said and "certified · " not in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "and nothing of it is certified" in page and "<td>invalid</td><td>invalid</td><td>invalid</td>" in page
    assert read_json(tmp_path / "run" / "report.json")["lipschitz"]["bound"] is None
    assert call(f"leaderboard {tmp_path} -o {tmp_path / 'site'}") == 0
    (row,) = json.loads((tmp_path / "site" / "leaderboard.json").read_text())
    assert row["bound"] is None and row["rank"] is None
    assert row["certified"]["accuracy"] is None and row["certified"]["valid"] is False
    (page,) = (tmp_path / "site" / "models").glob("*.html")
    assert "it read" not in page.read_text().split("certified</th>")[1].split("</tr>")[0] and why in page.read_text()


def old_report(**lipschitz: float) -> dict:
    """A report of a version that did not compare the bound with the estimate."""
    share = {"norm": "l2", "eps": 0.5, "n": 14, "accuracy": 0.5, "ci": [0.2, 0.8], "valid": True, "reason": None}
    return {
        "model": "m", "accuracy": {"clean": 0.9, "n": 14, "ci": [0.7, 1.0]}, "robust": [{"attack": "pgd", **share}],
        "certified": [share], "gates": [{"name": "deterministic", "status": "pass", "detail": ""}], "lipschitz": lipschitz,
    }  # fmt: skip


def test_an_old_report_with_a_bound_below_its_estimate_is_refuted_on_the_leaderboard() -> None:
    found = completed(old_report(bound=0.0, bound_in_pixel_box=0.0, estimate=17.06))
    (cell,) = found["certified"]
    assert cell["valid"] is False and cell["accuracy"] is None and "17.06" in cell["reason"]
    assert found["lipschitz"]["bound"] == INF and found["gates"][-1]["status"] == "fail"
    kept = completed(old_report(bound=20.0, bound_in_pixel_box=20.0, estimate=17.06))
    assert kept["certified"][0]["valid"] and kept["lipschitz"]["bound"] == 20.0 and len(kept["gates"]) == 1


ONE_LOGIT = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
IMAGES = torch.rand(4, 1, 4, 4)


def test_attacks_and_losses_for_one_logit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the model gives one logit for an image.*give two: torch.cat\(\[-z, z\], 1\)"):
        predict(ONE_LOGIT, IMAGES)
    (gate,) = check_model(ONE_LOGIT, IMAGES, torch.zeros(4, dtype=torch.long))
    assert gate.status == "fail" and "one logit for an image" in gate.detail
    for loss in (CrossEntropy(1.0), CertifiedCrossEntropy(1.0, 0.1)):
        with pytest.raises(ValueError, match="needs a logit for each class, and the model gives one"):
            loss(ONE_LOGIT(IMAGES), torch.tensor([0, 1, 1, 0]))
