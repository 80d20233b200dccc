"""Exported runs: timm alone gives the same logits, and the RobustBench entry has the measured accuracies."""

import json
from pathlib import Path

import pytest
import timm
import torch
from commands import call

from robust_spectral.evaluations.attacking.evaluation import evaluate
from robust_spectral.evaluations.attacking.work import AttackPlan
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning.training import finetune
from robust_spectral.evaluations.models.loading import load_run
from robust_spectral.evaluations.publishing.export import to_hub, to_robustbench
from robust_spectral.evaluations.run_folder import open_run, read_json, write_json
from robust_spectral.plugins import robustbench, robustbench_images

SMALL = {"model": "test_resnet", "data": "digits", "image_size": 16, "batch_size": 128, "epochs": 1, "freeze_bn": True}
ABOUT = {"link": "https://example.org/abs/1", "name": "Held norms", "authors": "Ada Lee", "venue": "ICML 2026",
         "architecture": "ResNet", "additional_data": False}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    learns = SMALL | {"epochs": 4, "lr": 3e-3, "freeze_bn": False, "logit_scale": 10.0, "composites": "never"}
    folder = finetune(FinetuneConfig(**learns, max_norm=2.0), tmp_path_factory.mktemp("runs") / "run")
    evaluate(folder, [AttackPlan("autoattack", "l2", (0.5,), 16)], block=8, gate_samples=24, say=lambda text: None)
    return folder


def test_an_exported_hub_folder_gives_the_same_logits_in_timm_alone(run: Path, tmp_path: Path) -> None:
    to_hub(run, tmp_path / "hub")
    plain = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    model, _, _ = load_run(run)
    x = torch.rand(3, 1, 16, 16)
    assert torch.equal(plain(model.normalize(x)), model(x))
    assert timm.data.resolve_model_data_config(plain)["input_size"] == (1, 16, 16)
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_a_folder_that_timm_saved_is_not_mistaken_for_an_interrupted_run(run: Path, tmp_path: Path) -> None:
    to_hub(run, tmp_path / "hub")
    with pytest.raises(ValueError, match="is no run; a model that timm saved is timm/local-dir:"):
        open_run(tmp_path / "hub")
    assert call(f"spectrum timm/local-dir:{tmp_path / 'hub'} --pretrained --image-size 16 --in-chans 1") == 0


def test_the_hub_configuration_and_card_contain_the_proved_and_measured_figures(run: Path, tmp_path: Path) -> None:
    to_hub(run, tmp_path / "hub")
    spectral = json.loads((tmp_path / "hub" / "config.json").read_text())["spectral"]
    assert spectral["max_norm"] == 2.0 and all(row["upper"] <= 2.0 * 1.001 for row in spectral["layers"].values())
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm") and "| autoattack, L2 0.5 | 16 images |" in card and "(proved)" in card


def test_the_card_of_a_run_that_was_not_evaluated_says_so(tmp_path: Path) -> None:
    folder = finetune(FinetuneConfig(**SMALL | {"epochs": 0}, max_norm=None), tmp_path / "run")
    to_hub(folder, tmp_path / "hub")
    assert "not attacked" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize("options", [{"fold_bn": True}, {"residuals": "averaged"}, {"model": "maxmin_mlp", "image_size": 28}])
def test_a_network_that_timm_alone_cannot_build_is_not_exported(options: dict, tmp_path: Path) -> None:
    folder = finetune(FinetuneConfig(**SMALL | {"epochs": 0} | options, max_norm=None), tmp_path / "run")
    with pytest.raises(ValueError, match="plain timm would not make the same network"):
        to_hub(folder, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_export_to_a_folder_that_is_not_empty_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "mine").touch()
    with pytest.raises(ValueError, match="nothing was overwritten"):
        to_hub(run, tmp_path / "hub")


@pytest.fixture
def small_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """RobustBench with a test set of 16 small grey images."""
    monkeypatch.setitem(robustbench.TEST_IMAGES, "cifar10", 16)
    monkeypatch.setitem(robustbench_images.TEST_SETS, "cifar10", (360, 1, 16, 16))


def test_a_robustbench_entry_has_the_accuracy_under_autoattack_and_its_images(
    run: Path, tmp_path: Path, small_board: None
) -> None:
    (tmp_path / "about.json").write_text(json.dumps(ABOUT))
    out = to_robustbench(run, tmp_path / "out", "cifar10/L2", "Lee2026Held", tmp_path / "about.json")
    info, report = json.loads((out / "model_info/cifar10/L2/Lee2026Held.json").read_text()), read_json(run / "report.json")
    found = next(e for e in report["robust"] if e["attack"] == "autoattack")
    assert info["autoattack_acc"] == f"{100 * found['accuracy']:.2f}" and robustbench.problems(info) == []
    images = torch.load(out / "Lee2026Held.pt", weights_only=True)
    model, data, _ = load_run(run)
    attacked, rest = data.proportional_order[:16], data.proportional_order[16:]
    y = data.digest_and_labels[1][attacked]
    assert float((model(images[attacked]).argmax(1) == y).double().mean()) == found["accuracy"]
    assert torch.equal(images[rest], data.test_images(360)[0][rest])


@pytest.mark.parametrize(
    "change, board, words",
    [
        ({"valid": False, "reason": "masked"}, "cifar10/L2", "not valid: masked"),
        ({"eps": 0.25}, "cifar10/L2", "was not attacked by autoattack at l2 0.5"),
        ({}, "cifar10/corruptions", "expected one of cifar10/L2"),
        ({}, "cifar10/L2", "all 10000 test images"),
    ],
)
def test_figures_that_robustbench_would_not_accept_are_refused(change, board, words, run: Path, tmp_path: Path) -> None:
    for name in ("run.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    report = read_json(run / "report.json")
    report["robust"] = [e | change for e in report["robust"]]
    write_json(tmp_path / "report.json", report)
    (tmp_path / "about.json").write_text(json.dumps(ABOUT))
    with pytest.raises(ValueError, match=words):
        to_robustbench(tmp_path, tmp_path / "out", board, "Lee2026Held", tmp_path / "about.json")


@pytest.mark.parametrize("about, words", [("{", r"about\.json: Expecting"), ("{}", r"about\.json: missing 6 required")])
def test_an_error_in_the_file_about_a_run_names_that_file(about: str, words: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text(about)
    with pytest.raises(ValueError, match=words):
        to_robustbench(run, tmp_path / "out", "cifar10/L2", "Lee2026Held", tmp_path / "about.json")
