"""The evaluated images: a draw in proportion to the classes, recorded, nested, and the same for all models."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import call
from PIL import Image

from robust_spectral.evaluations.attacking.engine import in_this_process
from robust_spectral.evaluations.attacking.evaluated_images import class_gate, ordered
from robust_spectral.evaluations.attacking.evaluation import evaluate, planned_work
from robust_spectral.evaluations.attacking.work import AttackPlan
from robust_spectral.evaluations.data import load_data, order_record, proportional_order
from robust_spectral.evaluations.leaderboard.site import build
from robust_spectral.evaluations.models import adopt
from robust_spectral.evaluations.reporting import write_report
from robust_spectral.evaluations.run_folder import open_run, read_json, write_json

SIZES = {
    "two": (70, 30),
    "alike": (30,) * 7,
    "rare": (900, 90, 10),
    "many": (500, *[20] * 25),
    "all differ": tuple(range(5, 60, 3)),
}
FOLDER = {"ape": 20, "bee": 10, "cat": 6}  # test images by class
MODELS = """
import torch
from torch import nn

def constant(index):
    dense = nn.Linear(3 * 8 * 8, 3)
    nn.init.zeros_(dense.weight)
    dense.bias.data = 5.0 * torch.eye(3)[index]
    return nn.Sequential(nn.Flatten(), dense)

def ape(): return constant(0)
def bee(): return constant(1)
def cat(): return constant(2)

def random():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
"""
PLANS = [AttackPlan("noise", "l2", (0.1,), 16)]
OPTIONS = {"block": 4, "gate_samples": 6, "say": lambda text: None}
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # timm leaves files open


def sorted_labels(sizes: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def counts(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """(n, classes), the number of images of each class among the first n."""
    return torch.nn.functional.one_hot(labels, classes).cumsum(0)


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a data set, a folder of images sorted by class."""
    root, noise = tmp_path_factory.mktemp("animals"), np.random.default_rng(0)
    for split in ("train", "validation"):
        for name, count in FOLDER.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / split / name / f"{i:02d}.png")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def run(animals: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with an untrained model that was not evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUST_SPECTRAL_MODEL", "")  # set back when these tests end
        yield adopt(f"{folder / 'models.py'}:random", animals, folder / "run", image_size=8)


@pytest.fixture
def fresh(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUST_SPECTRAL_MODEL", read_json(run / "run.json")["config"]["spec"])
    return Path(shutil.copytree(run, tmp_path / "run"))


def samples(folder: Path, attack: str = "none") -> list[int]:
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    return [row["sample"] for row in rows if row["attack"] == attack]


def gate_of(folder: Path) -> dict[str, str]:
    (found,) = [gate for gate in read_json(folder / "report.json")["gates"] if gate["name"] == "every class attacked"]
    return dict(found)


def counting(done: list[str]):
    def engine(folder, units, device):
        done.extend(unit.task for unit in units)
        return in_this_process(folder, units, device)

    return engine


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_first_part_has_each_class_within_about_one_image_of_its_share(sizes: tuple[int, ...]) -> None:
    labels = sorted_labels(sizes)
    order = proportional_order(labels)
    assert order.sort().values.tolist() == list(range(len(labels)))
    share = torch.tensor(sizes) / len(labels) * torch.arange(1, len(labels) + 1)[:, None]
    found = counts(labels[order], len(sizes))
    far = (found - share).abs().amax(1)
    assert bool((far[(share >= 1).all(1)] < 1.05).all())
    assert bool((found[len(sizes) - 1 :] >= 1).all()) and bool((found[: len(sizes)] <= 1).all())


def test_with_fewer_images_than_classes_the_largest_classes_come_first() -> None:
    labels = sorted_labels((3, 9, 1, 5))
    assert labels[proportional_order(labels)[:4]].tolist() == [1, 3, 0, 2]


def test_the_order_depends_on_the_labels_alone() -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        first = proportional_order(sorted_labels((6, 3, 3)))
        assert first.tolist() == [1, 11, 6, 3, 4, 9, 8, 0, 2, 10, 7, 5]  # records of evaluations depend on it
    assert order_record(first)["sha256"] == hashlib.sha256(np.array(first.tolist(), dtype="<i8").tobytes()).hexdigest()


def test_images_of_a_class_are_not_its_first_ones() -> None:
    taken = proportional_order(sorted_labels((100, 100)))[:20]
    assert int((taken % 100).max()) > 50


@pytest.mark.parametrize("number, name", list(enumerate(FOLDER)))
def test_a_constant_predictor_on_a_sorted_folder_scores_the_share_of_its_class(
    number: int, name: str, animals: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, share = tmp_path / "run", list(FOLDER.values())[number] / sum(FOLDER.values())
    options = f"--attack noise --attack pgd --eps 0.1 --gate-samples 4 --out {folder} --data {animals} --image-size 8"
    assert call(f"evaluate --model {run.parent / 'models.py'}:{name} {options} --samples 16") == 0
    report = read_json(folder / "report.json")
    for entry in (report["accuracy"] | {"accuracy": report["accuracy"]["clean"]}, *report["robust"]):
        assert entry["ci"][0] <= share <= entry["ci"][1] and abs(16 * entry["accuracy"] - 16 * share) < 1
    assert gate_of(folder)["status"] == "pass" and report["class_names"] == list(FOLDER)
    capsys.readouterr()
    assert call(f"report {folder}") == 0
    assert "16 of 36 test images, drawn in proportion to their classes" in " ".join(capsys.readouterr().out.split())


def test_a_class_that_is_missing_among_the_images_fails_a_check_that_names_it_and_what_to_do(fresh: Path) -> None:
    evaluate(fresh, PLANS, sample_order="first", **OPTIONS)
    assert samples(fresh) == list(range(16)) and "sample_order" not in read_json(fresh / "report.json")["planned"]
    gate = gate_of(fresh)
    assert gate["status"] == "fail" and gate["detail"] == (
        "2 of 3 classes are not among the 16 images of noise l2: bee, cat; give at least 31 to every attack (--samples, "
        "--autoattack-samples), or take --sample-order proportional"
    )
    assert not any(entry["valid"] for entry in read_json(fresh / "report.json")["robust"])


def test_the_check_of_classes_looks_at_the_attack_with_the_fewest_images() -> None:
    data = load_data("digits")
    order = data.proportional_order
    assert class_gate(data, order, {("pgd", "l2"): 99, ("autoattack", "l2"): 10}).status == "pass"
    gate = class_gate(data, order, {("pgd", "l2"): 99, ("autoattack", "l2"): 4})
    assert gate.status == "fail" and gate.detail.startswith("6 of 10 classes are not among the 4 images of autoattack l2: ")
    assert gate.detail.endswith(", …; give at least 10 to every attack (--samples, --autoattack-samples)")


def test_each_number_of_images_takes_the_first_ones_of_one_order(animals: str, fresh: Path) -> None:
    plans = [*PLANS, AttackPlan("fgsm", "l2", (0.1,), 8)]
    evaluate(fresh, plans, local_certificates=5, **OPTIONS)
    data = load_data(animals, 8)
    order = data.proportional_order.tolist()
    assert samples(fresh) == samples(fresh, "noise") == order[:16] and samples(fresh, "fgsm") == order[:8]
    rows = pq.read_table(fresh / "samples.parquet").to_pylist()
    assert [row["label"] for row in rows[:16]] == data.digest_and_labels[1][order[:16]].tolist()
    assert [row["local_radius"] is not None for row in rows[:16]] == [True] * 5 + [False] * 11
    planned = read_json(fresh / "report.json")["planned"]
    assert planned["sample_order"] == order_record(data.proportional_order)
    assert all(unit.sample_order == planned["sample_order"] for unit in planned_work(open_run(fresh)).units)


def test_more_images_repeat_no_block_of_fewer(fresh: Path) -> None:
    done: list[str] = []
    evaluate(fresh, PLANS, **OPTIONS)
    evaluate(fresh, [AttackPlan("noise", "l2", (0.1,), 24)], engine=counting(done), **OPTIONS)
    assert done.count("noise") == done.count("clean") == 2 and len(done) == 4


def test_an_order_that_would_differ_here_is_refused(animals: str) -> None:
    data = load_data(animals, 8)
    with pytest.raises(ValueError, match="the images of this evaluation are recorded as"):
        ordered(data, order_record(data.proportional_order) | {"sha256": "0" * 64})


def test_twins_and_models_of_a_leaderboard_are_evaluated_on_the_same_images(fresh: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "runs" / "twins", tmp_path / "runs" / "other"
    for copy in (folder / "plain", folder / "clipped", other):
        shutil.copytree(fresh, copy)
    write_json(folder / "run.json", {"twins": ["plain", "clipped"]})
    assert evaluate(folder, PLANS, **OPTIONS)
    evaluate(other, PLANS, **OPTIONS | {"block": 7})
    assert samples(folder / "plain") == samples(folder / "clipped") == samples(other)
    build(tmp_path / "runs", tmp_path / "site")
    note = "may not all have been evaluated on the same images"
    assert note not in (tmp_path / "site" / "index.html").read_text()
    evaluate(other, PLANS, sample_order="first", **OPTIONS)
    build(tmp_path / "runs", tmp_path / "site")
    assert note in (tmp_path / "site" / "index.html").read_text()
    assert "16 of 36 test images, drawn in proportion" in "".join(
        page.read_text() for page in (tmp_path / "site" / "models").glob("*clipped.html")
    )


def as_before_orders_were_recorded(folder: Path) -> None:
    """Check that the records of a run in the data set's own order have the names and contents of old ones."""
    for unit in planned_work(open_run(folder)).units:
        old = {key: getattr(unit, key) for key in ("model_sha256", "data_sha256", "task", "config", "start", "stop", "seed")}
        assert unit.text == json.dumps(old, sort_keys=True) and unit.path(folder).is_file()


@pytest.mark.parametrize("reported", [True, False], ids=["finished", "interrupted"])
def test_an_evaluation_of_before_is_continued_in_its_own_order(reported: bool, fresh: Path) -> None:
    evaluate(fresh, PLANS, sample_order="first", **OPTIONS)
    as_before_orders_were_recorded(fresh)
    before, done, said = samples(fresh), [], []
    if not reported:
        (fresh / "report.json").unlink()
    evaluate(fresh, PLANS, engine=counting(done), **OPTIONS | {"say": said.append})
    assert done == [] and samples(fresh) == before == list(range(16))
    assert any("the first test images, as earlier here" in text for text in said)
    write_report(fresh)
    assert "the first 16 of 36 test images" in (fresh / "report.html").read_text()


def test_twins_continue_in_the_order_of_the_one_that_was_evaluated(fresh: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twins"
    evaluate(Path(shutil.copytree(fresh, folder / "plain")), PLANS, sample_order="first", **OPTIONS)
    shutil.copytree(fresh, folder / "clipped")
    write_json(folder / "run.json", {"twins": ["plain", "clipped"]})
    evaluate(folder, PLANS, **OPTIONS)
    assert samples(folder / "clipped") == samples(folder / "plain") == list(range(16))


def test_another_order_leaves_the_attacks_of_the_earlier_one_out_of_the_report(fresh: Path) -> None:
    said: list[str] = []
    evaluate(fresh, PLANS, sample_order="first", **OPTIONS)
    evaluate(fresh, [AttackPlan("fgsm", "l2", (0.1,), 16)], sample_order="proportional", **OPTIONS | {"say": said.append})
    assert any(text.startswith("left out of the report: noise l2") and "order" in text for text in said)
    assert {e["attack"] for e in read_json(fresh / "report.json")["robust"]} == {"fgsm", "worst case"}
    assert gate_of(fresh)["status"] == "pass"


def test_an_unknown_order_is_refused(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"evaluate {fresh} --sample-order random") == 2
    assert "sample_order 'random': expected proportional or first" in " ".join(capsys.readouterr().err.split())


def test_adversarial_images_are_named_by_the_classes_of_the_folder(fresh: Path, tmp_path: Path) -> None:
    evaluate(fresh, [AttackPlan("pgd", "l2", (3.0,), 16)], **OPTIONS)
    build(tmp_path, tmp_path / "site")
    (page,) = (tmp_path / "site" / "models").glob("*.html")
    text = page.read_text()
    assert any(f"<figcaption>label {name}</figcaption>" in text for name in FOLDER) and "label 0" not in text
