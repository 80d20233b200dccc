"""Distances: one run of an attack that minimises the perturbation decides about every size, in records, figures and charts."""

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from commands import call
from safetensors import safe_open

from robust_spectral.evaluations.attacking import DEFAULT_ATTACKS, evaluate
from robust_spectral.evaluations.attacking.engine import in_this_process
from robust_spectral.evaluations.attacking.work import AttackPlan
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning import finetune
from robust_spectral.evaluations.leaderboard.entries import completed
from robust_spectral.evaluations.records.accuracy_figures import figures, sandwich
from robust_spectral.evaluations.records.attack_checks import autoattack_gate, certificate_gate, pgd_gate
from robust_spectral.evaluations.records.distances import at_sizes, curves, falls_at
from robust_spectral.evaluations.reporting import robustness
from robust_spectral.evaluations.run_folder import read_json

INF = math.inf
OPTIONS = {"block": 8, "gate_samples": 8, "say": lambda text: None}
PLANS = [AttackPlan("pgd", "l2", (0.3, 0.6), 16), AttackPlan("ddn", "l2", (0.6, 1.2), 16)]


def row(sample, attack, eps, distance, radius=0.0, norm="l2"):
    robust = distance == INF
    return {"sample": sample, "label": 0, "attack": attack, "norm": norm, "eps": eps, "predicted": 0 if robust else 1,
            "robust": robust, "distance": distance, "certified_radius": radius, "status": "ok"}  # fmt: skip


def test_an_image_falls_at_its_distance_or_at_the_size_of_an_attack_that_exceeds_it_by_rounding() -> None:
    cases = [(None, 0.7, 0.7), (None, INF, INF), (0.5, 0.5 + 1e-8, 0.5), (0.5, 0.4, 0.4), (0.5, INF, INF), (0.5, 0.0, 0.0)]
    assert [falls_at(row(0, "pgd", eps, distance)) for eps, distance, _ in cases] == [at for *_, at in cases]


def test_a_distance_gives_a_verdict_at_the_sizes_of_its_norm_alone() -> None:
    rows = [row(0, "ddn", None, 0.7), row(1, "ddn", None, INF), row(0, "pgd", 0.5, INF), row(0, "pgd", 0.1, INF, norm="linf")]
    found = [(r["sample"], r["eps"], r["robust"]) for r in at_sizes(rows, {"l2": [1.0]}) if r["attack"] == "ddn"]
    assert found == [(0, 0.5, True), (0, 1.0, False), (1, 0.5, True), (1, 1.0, True)]


def test_the_worst_case_counts_attacks_that_succeed_at_smaller_sizes() -> None:
    clean = [row(i, "none", 0, INF) for i in range(3)]
    found = [row(0, "autoattack", 0.5, 0.5), *(row(i, "pgd", 1.0, INF) for i in range(3)),
             *(row(i, "ddn", None, distance) for i, distance in enumerate((INF, 0.9, 1.1)))]  # fmt: skip
    level = sandwich(at_sizes(found, {}), clean, "l2", 1.0, 16)
    assert level["worst"] == pytest.approx(1 / 3) and level["attacks"] == {"pgd": 1.0, "ddn": pytest.approx(2 / 3)}


def test_a_curve_falls_by_one_image_at_every_distance() -> None:
    found = [row(i, "ddn", None, distance) for i, distance in enumerate((0.0, 0.5, 0.5, INF))]
    curve, worst = curves([*found, row(3, "pgd", 1.0, 0.8), *(row(i, "pgd", 1.0, INF) for i in range(3))])
    assert (curve["attack"], curve["eps"], curve["n"], curve["median"]) == ("ddn", None, 4, 0.5)
    assert (curve["sizes"], curve["accuracies"]) == ([0.0, 0.5], [0.75, 0.25])
    assert worst["attack"] == "worst case" and (worst["sizes"][-1], worst["accuracies"][-1]) == (0.8, 0.0)
    long = curves([row(i, "ddn", None, 1.0 + i) for i in range(1000)])[0]
    assert len(long["sizes"]) == 200 and (long["sizes"][0], long["sizes"][-1]) == (0.0, 1000.0)


def test_no_image_may_be_misclassified_within_its_certified_radius() -> None:
    found = [row(0, "ddn", None, 0.9, radius=0.5), row(0, "pgd", 1.0, 1.0, radius=0.5), row(1, "ddn", None, INF, radius=9.0)]
    good = certificate_gate(found, 16)
    assert good["status"] == "pass" and good["detail"].endswith("image is at 1.8 times the certified radius")
    bad = certificate_gate([*found, row(1, "fmn", None, 2.0, radius=9.0, norm="linf")], 16)  # at most 8 in L2
    assert bad["status"] == "fail" and bad["detail"].startswith("1 of 2 images are misclassified inside")
    assert certificate_gate([row(0, "pgd", 1.0, 0.0)], 16)["status"] == "pass"  # misclassified as it is, and not certified


def test_images_that_only_other_attacks_break_are_a_flag_on_autoattack_and_on_pgd() -> None:
    ddn = [row(i, "ddn", None, 0.9 if i < 3 else INF) for i in range(10)]
    for name, gate in (("autoattack", autoattack_gate), ("pgd", pgd_gate)):
        (missed,) = gate([*ddn, *(row(i, name, 1.0, INF) for i in range(10))])
        assert missed["status"] == "flag" and "(3 of 10 at l2 1)" in missed["detail"]
        (equal,) = gate([*ddn, *(row(i, name, 1.0, 1.0 if i < 3 else INF) for i in range(10))])
        (below,) = gate([*ddn, *(row(i, name, 0.8, INF) for i in range(10))])
        assert equal["status"] == below["status"] == "pass"
        assert gate(ddn) == gate([row(0, name, 1.0, INF)]) == []


def test_a_failed_attack_without_a_size_is_invalid_at_every_size() -> None:
    run = {
        key: {} for key in ("defence", "seed", "layers", "model_sha256", "test_data_sha256", "versions", "hardware", "seconds")
    }
    rows = [row(0, "none", 0, INF), row(0, "ddn", None, INF), row(0, "pgd", 0.5, INF)]
    lipschitz = {"bound": 1.0, "bound_in_pixel_box": 1.0, "estimate": 0.5}
    made = figures(run | {"config": {"model": "a", "data": "b"}}, rows, lipschitz, 16, (), {("ddn", "l2", None): "lost"}, None,
                   {"l2": [1.0]})  # fmt: skip
    valid = {(e["attack"], e["eps"]): e["valid"] for e in made["robust"]}
    assert valid == {("ddn", 0.5): False, ("ddn", 1.0): False, ("pgd", 0.5): True, ("worst case", 0.5): False,
                     ("worst case", 1.0): False}  # fmt: skip
    assert {curve["attack"]: curve["valid"] for curve in made["curves"]} == {"ddn": False, "worst case": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, evaluated."""
    torch.manual_seed(0)
    config = FinetuneConfig(model="test_resnet", data="digits", image_size=16, epochs=1, batch_size=128, max_norm=None)
    folder = finetune(config, tmp_path_factory.mktemp("runs") / "run")
    assert evaluate(folder, PLANS, **OPTIONS)
    return folder


@pytest.fixture
def fresh(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def rows_of(folder: Path, attack: str) -> list[dict]:
    return [row for row in pq.read_table(folder / "samples.parquet").to_pylist() if row["attack"] == attack]


def test_an_attack_without_a_size_is_run_once_and_reported_at_every_size(whole: Path) -> None:
    assert len(list((whole / "records").glob("ddn-l2-0000*.safetensors"))) == 2  # two blocks of eight images
    found, report = rows_of(whole, "ddn"), read_json(whole / "report.json")
    assert {row["eps"] for row in found} == {None} and len(found) == 16
    for eps in (0.3, 0.6, 1.2):
        (entry,) = [e for e in report["robust"] if (e["attack"], e["eps"]) == ("ddn", eps)]
        assert entry["accuracy"] == sum(row["distance"] > eps for row in found) / 16 and entry["seconds"] > 0
    assert report["schema"] == 2 and pq.read_schema(whole / "samples.parquet").metadata[b"schema"] == b"2"
    assert {curve["attack"] for curve in report["curves"]} == {"ddn", "worst case"}
    assert all(row["distance"] == INF for row in rows_of(whole, "pgd") if row["robust"])


def test_distances_are_those_of_stored_images_that_the_model_misclassifies(whole: Path) -> None:
    found = [safetensors.torch.load_file(path) for path in sorted((whole / "records").glob("ddn*.safetensors"))]
    assert sum(len(tensors["fallen"]) for tensors in found) > 0
    for tensors in found:
        assert bool((tensors["predicted"] != tensors["labels"])[tensors["fallen"]].all())
        assert float(tensors["adversarial"].min()) >= 0 and float(tensors["adversarial"].max()) <= 1
        assert bool(tensors["distance"][tensors["predicted"] == tensors["labels"]].isinf().all())


def test_another_size_needs_no_further_run_of_an_attack_without_a_size(fresh: Path) -> None:
    done = []

    def counting(folder, units, device):
        done.extend(unit for unit in units if unit.task == "ddn")
        return in_this_process(folder, units, device)

    assert evaluate(fresh, [AttackPlan("ddn", "l2", (2.0,), 16)], engine=counting, **OPTIONS) and done == []
    assert {e["eps"] for e in read_json(fresh / "report.json")["robust"] if e["attack"] == "ddn"} == {0.3, 0.6, 1.2, 2.0}


def rewritten(path: Path, schema: int | None) -> None:
    """Give a record another number of its schema; in the first, without a number, images that stand have distances too."""
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["record"])
    tensors = safetensors.torch.load_file(path)
    content.pop("schema")
    if schema is None and "distance" in tensors:
        tensors["distance"] = tensors["distance"].nan_to_num(posinf=0.3)
    told = {"record": json.dumps(content | ({"schema": schema} if schema else {}), sort_keys=True)}
    safetensors.torch.save_file(tensors, path, metadata=told)


def test_records_of_the_first_schema_are_read_as_those_of_the_second(fresh: Path, whole: Path) -> None:
    for path in (fresh / "records").glob("*.safetensors"):
        rewritten(path, None)
    before = {path: path.stat().st_mtime_ns for path in (fresh / "records").glob("*.safetensors")}
    assert evaluate(fresh, PLANS, **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in (fresh / "records").glob("*.safetensors")} == before
    assert (fresh / "samples.parquet").read_bytes() == (whole / "samples.parquet").read_bytes()


def test_a_record_of_a_newer_schema_is_refused(fresh: Path) -> None:
    rewritten(next((fresh / "records").glob("pgd*.safetensors")), 99)
    with pytest.raises(ValueError, match="written by a newer version"):
        evaluate(fresh, PLANS, **OPTIONS)


def test_a_curve_is_drawn_where_it_is_valid(whole: Path) -> None:
    made = read_json(whole / "report.json")
    for figures_, drawn in ((made, True), (completed(made), True), (made | {"curves": []}, False)):
        figures_ = figures_ | {"accuracy": made["accuracy"]}
        valid = figures_ | {"curves": [curve | {"valid": True} for curve in figures_["curves"]]}
        wrong = figures_ | {"curves": [curve | {"valid": False} for curve in figures_["curves"]]}
        assert (robustness({"a": valid}, "l2") != robustness({"a": wrong}, "l2")) == drawn


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_without_attack_an_evaluation_runs_the_default_ensemble(norm: str, fresh: Path) -> None:
    (fresh / "report.json").unlink()
    shutil.rmtree(fresh / "records")
    assert call(f"evaluate {fresh} --norm {norm} --eps 0.2 --samples 10 --gate-samples 4") == 0
    report = read_json(fresh / "report.json")
    assert {e["attack"] for e in report["robust"]} == {*DEFAULT_ATTACKS[norm], "worst case"}
    assert all(e["valid"] is not False for e in report["robust"] + report["curves"])
