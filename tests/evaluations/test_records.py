"""Units of work of an evaluation: the same records in any order, on any engine and after interruptions."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from robust_spectral.evaluations.attacking.engine import in_this_process, make_engine
from robust_spectral.evaluations.attacking.evaluation import evaluate, planned_work
from robust_spectral.evaluations.attacking.work import AttackPlan, open_subject
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning.training import finetune
from robust_spectral.evaluations.records.units import Record, read_record, refuse_foreign
from robust_spectral.evaluations.reporting.report import accuracy_rows, write_report
from robust_spectral.evaluations.run_folder import open_run, read_json, write_json

PLANS = [AttackPlan("pgd", "l2", (0.3, 0.6), 40), AttackPlan("square", "linf", (0.5,), 24)]
OPTIONS = {"block": 8, "gate_samples": 8, "say": lambda text: None}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that was not evaluated."""
    torch.manual_seed(0)
    config = FinetuneConfig(model="test_resnet", data="digits", image_size=16, epochs=1, batch_size=128, max_norm=None)
    return finetune(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def fresh(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, evaluated without interruption in one process."""
    folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("whole") / "run"))
    assert evaluate(folder, PLANS, **OPTIONS)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of every record file and of the sample table."""
    paths = [*(folder / "records").glob("*.safetensors"), folder / "samples.parquet"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def figures(folder: Path) -> dict:
    """The report without its timings."""
    report = read_json(folder / "report.json")
    for entry in report["robust"]:
        entry.pop("seconds")
    return {key: value for key, value in report.items() if key != "attack_seconds"}


@pytest.mark.parametrize("shares, order", [(2, [2, 1]), (4, [3, 1, 4, 2]), (7, [5, 2, 7, 1, 6, 4, 3])])
def test_shards_in_any_order_give_the_files_of_an_unsharded_evaluation(
    shares: int, order: list[int], fresh: Path, whole: Path
) -> None:
    complete = [evaluate(fresh, PLANS, shard=(share, shares), **OPTIONS) for share in order]
    assert complete == [False] * (shares - 1) + [True]
    assert hashes(fresh) == hashes(whole) and figures(fresh) == figures(whole)


def test_worker_processes_give_the_files_of_a_single_process(fresh: Path, whole: Path) -> None:
    assert evaluate(fresh, PLANS, engine=make_engine("local", workers=2), **OPTIONS)
    assert hashes(fresh) == hashes(whole)


@pytest.mark.filterwarnings("default")
def test_killed_ray_workers_do_not_change_the_files(fresh: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killed: list[int] = []

    def watched(folder, units, device):
        for outcome in make_engine("ray")(folder, units, device):
            if len(killed) < 2:
                killed.extend(workers_of_ray()[:1])
                os.kill(killed[-1], signal.SIGKILL)
            yield outcome

    assert evaluate(fresh, PLANS, engine=watched, **OPTIONS)
    assert len(killed) == 2 and hashes(fresh) == hashes(whole)


def workers_of_ray() -> list[int]:
    """Process ids of the Ray workers that are processing a unit of work."""
    while not (found := subprocess.run(["pgrep", "-f", "^ray::_shipped"], capture_output=True, text=True).stdout.split()):
        time.sleep(0.01)
    return [int(pid) for pid in found]


def test_a_second_evaluation_repeats_no_unit_of_work(whole: Path) -> None:
    done = []

    def counting(folder, units, device):
        done.extend(units)
        return in_this_process(folder, units, device)

    before = figures(whole)
    assert evaluate(whole, PLANS, engine=counting, **OPTIONS)
    assert done == [] and figures(whole) == before


def test_an_evaluation_killed_at_any_moment_resumes_and_loses_at_most_one_block(fresh: Path, whole: Path) -> None:
    code = textwrap.dedent(f"""
        import torch
        from pathlib import Path
        from robust_spectral.evaluations.attacking import AttackPlan, evaluate
        torch.set_num_threads(1)
        plans = [AttackPlan("pgd", "l2", (0.3, 0.6), 40), AttackPlan("square", "linf", (0.5,), 24)]
        evaluate(Path({str(fresh)!r}), plans, block=8, gate_samples=8, say=lambda text: None)
    """)
    for records in (3, 9):
        process = subprocess.Popen([sys.executable, "-c", code])
        while len(list((fresh / "records").glob("*.safetensors"))) < records and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
    kept = len(list((fresh / "records").glob("[!.]*.safetensors")))
    assert kept >= 9
    assert evaluate(fresh, PLANS, **OPTIONS)
    assert hashes(fresh) == hashes(whole)


def test_accuracy_under_attack_does_not_increase_with_eps(whole: Path) -> None:
    entries = {e["eps"]: e["accuracy"] for e in figures(whole)["robust"] if e["attack"] == "pgd"}
    assert entries[0.3] >= entries[0.6]


def test_a_record_of_another_model_or_of_other_data_is_refused(whole: Path, fresh: Path) -> None:
    shutil.copytree(whole / "records", fresh / "records")
    told = open_subject(open_run(fresh), "cpu").run.record
    refuse_foreign(fresh, told["model_sha256"], told["test_data_sha256"])
    with pytest.raises(ValueError, match="verdicts on another model"):
        refuse_foreign(fresh, "0" * 64, told["test_data_sha256"])
    with pytest.raises(ValueError, match="verdicts on another data"):
        refuse_foreign(fresh, told["model_sha256"], "0" * 64)
    other = finetune(FinetuneConfig(model="test_resnet", data="digits", image_size=16, epochs=0, max_norm=None, seed=9),
                     fresh.parent / "other")  # fmt: skip
    shutil.copytree(whole / "records", other / "records")
    with pytest.raises(ValueError, match="verdicts on another model"):
        evaluate(other, PLANS, **OPTIONS)


def test_a_record_under_the_file_name_of_another_eps_is_refused(whole: Path, fresh: Path) -> None:
    work = planned_work(open_run(whole))
    small, large = (work.attacks["pgd", "l2", eps][0] for eps in (0.3, 0.6))
    (fresh / "records").mkdir()
    shutil.copy(small.path(whole), large.path(fresh))
    with pytest.raises(ValueError, match="is the record of another model, attack, size or block"):
        read_record(fresh, large)


def test_a_truncated_record_is_an_error_with_advice(whole: Path, fresh: Path) -> None:
    shutil.copytree(whole / "records", fresh / "records")
    path = next((fresh / "records").glob("pgd*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not readable as a record .* remove it"):
        evaluate(fresh, PLANS, **OPTIONS)


def test_records_of_another_attack_version_are_not_reused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(fresh, PLANS[:1], **OPTIONS)
    before = len(list((fresh / "records").glob("pgd*.safetensors")))
    monkeypatch.setattr("robust_spectral.evaluations.attacks.version", lambda package: "0.0.0")
    evaluate(fresh, PLANS[:1], **OPTIONS)
    assert len(list((fresh / "records").glob("pgd*.safetensors"))) == 2 * before


def test_a_failed_attack_is_invalid_in_table_and_report(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(attack, model, images, labels):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("robust_spectral.plugins.autoattack.AutoAttack.__call__", failing)
    assert evaluate(fresh, [AttackPlan("autoattack", "l2", (0.3,), 8)], **OPTIONS)
    attacked = [e for e in figures(fresh)["robust"] if e["attack"] == "autoattack"]
    assert not attacked[0]["valid"] and "out of luck" in attacked[0]["reason"]
    assert ("autoattack · L2 0.3 · 8 images", ["invalid"]) in accuracy_rows(write_report(fresh))
    page = (fresh / "report.html").read_text()
    assert "FAIL" in page and "no accuracy under attack of model is valid" in page


def test_a_failed_attack_is_repeated_by_the_next_evaluation(fresh: Path) -> None:
    plans = [AttackPlan("square", "l2", (8.0,), 10)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robust_spectral.plugins.autoattack.AutoAttack.__call__", lambda *_: 1 / 0)
        evaluate(fresh, plans, **OPTIONS)
    assert any(entry["valid"] is False for entry in figures(fresh)["robust"])
    evaluate(fresh, plans, **OPTIONS)
    assert all(entry["valid"] is not False for entry in figures(fresh)["robust"])


def test_a_later_attack_is_added_to_the_report_of_earlier_attacks(fresh: Path) -> None:
    evaluate(fresh, [AttackPlan("pgd", "l2", (1.0,), 16)], **OPTIONS)
    before = next(e for e in figures(fresh)["robust"] if e["attack"] == "worst case")
    evaluate(fresh, [AttackPlan("noise", "l2", (1.0,), 16)], **OPTIONS)
    after = figures(fresh)["robust"]
    assert {e["attack"] for e in after} == {"pgd", "noise", "worst case"}
    assert next(e for e in after if e["attack"] == "worst case")["accuracy"] <= before["accuracy"]
    said = []
    evaluate(fresh, [AttackPlan("noise", "l2", (1.0,), 8)], **OPTIONS | {"say": said.append})
    assert any("left out of the report: noise" in text for text in said)


def test_logits_computed_on_another_device_are_certified_in_float64(fresh: Path, whole: Path) -> None:
    def elsewhere(folder, units, device):
        for unit, record, seconds, hardware in in_this_process(folder, units, device):
            yield unit, Record(record.tensors, record.told | {"device": "cuda"}), seconds, hardware

    evaluate(fresh, PLANS, engine=elsewhere, **OPTIONS)
    assert figures(fresh)["lipschitz"]["certified_dtype"] == "float64"


def test_saved_adversarial_examples_are_misclassified_by_the_model(whole: Path) -> None:
    subject = open_subject(open_run(whole), "cpu")
    tensors = safetensors.torch.load_file(whole / "examples.safetensors")
    with safetensors.safe_open(whole / "examples.safetensors", "pt") as file:
        told = json.loads(file.metadata()["examples"])
    assert subject.model(tensors["adversarial"]).argmax(1).tolist() == [example["predicted"] for example in told]
    assert all(example["predicted"] != example["label"] for example in told)
    assert torch.equal(tensors["clean"], subject.data.images_at(example["sample"] for example in told)[0])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shard": (3, 2)}, "shard 3/2: from 1/n to n/n"),
        ({"block": 0}, "at least 1"),
        ({"device": "nowhere"}, "not available here"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, words: str, fresh: Path) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(fresh, PLANS, **OPTIONS | options)


@pytest.mark.parametrize("arguments", [("local", 0), ("ray", 2), ("slurm", 1)])
def test_an_unknown_or_inconsistent_engine_is_refused(arguments: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match=r"engine"):
        make_engine(*arguments)


def test_a_changed_run_json_is_read_again(fresh: Path) -> None:
    first = open_subject(open_run(fresh), "cpu")
    time.sleep(0.01)
    write_json(fresh / "run.json", read_json(fresh / "run.json") | {"seed": 7})
    assert first.run.record["seed"] == 0 and open_subject(open_run(fresh), "cpu").run.record["seed"] == 7
