"""Models trained elsewhere, adopted by a name or a function, and the one-line errors where that fails."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import call

from robust_spectral import lipschitz_bound
from robust_spectral.evaluations.attacking.evaluation import evaluate
from robust_spectral.evaluations.attacking.work import AttackPlan
from robust_spectral.evaluations.config.recipes import config_of
from robust_spectral.evaluations.models.loading import adopt, load_run
from robust_spectral.evaluations.run_folder import read_json, write_json

MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def nothing():
    return 3

def raises():
    return 1 / 0

def leaves():
    raise SystemExit(3)

def flat():
    return nn.Flatten(0)

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def pair():
    return nn.Sequential(nn.Flatten(), nn.GRU(64, 10))

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(65, 10))
"""


@pytest.fixture(autouse=True)
def _no_trust_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_SPECTRAL_MODEL", "")


@pytest.mark.parametrize(
    "spec, words, suggested",
    [
        ("sub/mine:make", "ModuleNotFoundError", "did you mean the file, sub/mine.py:make?"),
        ("code:make", "code has no 'make'", "did you mean the file, code.py:make?"),
        ("own_module:mistake", "own_module has no 'mistake'; it has make", None),
    ],
)
def test_an_error_about_a_module_suggests_the_file_of_that_name(
    spec: str, words: str, suggested: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import code  # noqa: F401, a standard module that hides the user's file of that name

    (tmp_path / "sub").mkdir()
    for file in ("sub/mine.py", "code.py", "own_module.py"):
        (tmp_path / file).write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match=words) as error:
        adopt(spec, "digits", tmp_path / "run")
    assert suggested in str(error.value) if suggested else "did you mean" not in str(error.value)


def test_any_model_can_be_adopted_and_evaluated(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    folder = adopt(f"{tmp_path}/mine.py:make", "digits", tmp_path / "run", defence="hope")
    evaluate(folder, [AttackPlan("pgd", "l2", (0.1,), 8)], gate_samples=8, say=lambda text: None)
    report = read_json(folder / "report.json")
    assert report["defence"] == "hope" and report["parameters"] == 650 and [row["name"] for row in report["layers"]] == ["1"]
    assert adopt(f"{tmp_path}/mine.py:make", "digits", tmp_path / "run") == folder  # the same model again
    with pytest.raises(ValueError, match="contains a run of another model or data"):
        adopt("timm/test_resnet", "digits", tmp_path / "run", checkpoint=_checkpoint(tmp_path), image_size=16)


def test_code_named_in_a_run_folder_is_executed_only_on_request(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    spec = f"{tmp_path}/mine.py:make"
    folder = adopt(spec, "digits", tmp_path / "run")
    monkeypatch.delenv("ROBUST_SPECTRAL_MODEL")
    (tmp_path / "mine.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n" + MODULE)
    with pytest.raises(ValueError, match="which is not run unless you ask for it"):
        load_run(folder)
    assert not (tmp_path / "ran").exists()


def _checkpoint(folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict(), path)
    return path


def test_a_checkpoint_of_timm_can_be_adopted(tmp_path: Path) -> None:
    folder = adopt("timm/test_resnet", "digits", tmp_path / "run", checkpoint=_checkpoint(tmp_path), image_size=16)
    model, _, run = load_run(folder)
    plain = timm.create_model("test_resnet", num_classes=10, in_chans=1, checkpoint_path=str(tmp_path / "weights.pth")).eval()
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(model(x), plain(model.normalize(x))) and len(run["layers"]) == 16


def test_a_checkpoint_trained_on_unnormalised_pixels_is_adopted_with_mean_0_and_std_1(tmp_path: Path) -> None:
    options = {"checkpoint": _checkpoint(tmp_path), "image_size": 16}
    folder = adopt("timm/test_resnet", "digits", tmp_path / "run", mean=(0.0,), std=(1.0,), **options)
    assert read_json(folder / "run.json")["config"]["mean"] == [0.0]
    model, data, _ = load_run(folder)
    x = data.test_images(4)[0]
    assert torch.equal(model(x), model.model(x))
    asked = f"--model timm/test_resnet --checkpoint {options['checkpoint']} --mean 0 --std 1 --data digits --image-size 16"
    assert call(f"evaluate {asked} --out {folder} --attack noise --samples 2 --gate-samples 2") == 0
    bound = lipschitz_bound(model.model, x[:1]).value
    assert read_json(folder / "report.json")["lipschitz"]["bound"] == pytest.approx(bound, rel=1e-3)
    with pytest.raises(ValueError, match="contains a run of another model"):
        adopt("timm/test_resnet", "digits", folder, **options)


def test_finetune_applies_the_given_mean_and_std_and_prints_them(tmp_path: Path, capsys) -> None:
    start = f"finetune --model test_resnet --data digits --epochs 0 --max-norm inf --checkpoint {_checkpoint(tmp_path)}"
    assert call(f"{start} --image-size 16 --mean 0 --std 1 --out {tmp_path / 'plain'}") == 0
    said = capsys.readouterr().err
    assert "images 1x16x16 (8x8 -> 16x16), standardised with mean 0, std 1\n" in said
    assert "% on 200 test images, in proportion to their classes" in said
    model, data, run = load_run(tmp_path / "plain")
    x = data.test_images(4)[0]
    assert torch.equal(model(x), model.model(x)) and run["config"]["mean"] == "0"
    assert call(f"{start} --out {tmp_path / 'timm'}") == 0
    assert "images 1x8x8, standardised with mean 0.5, std 0.5\n" in capsys.readouterr().err
    run = read_json(tmp_path / "timm" / "run.json")
    write_json(tmp_path / "timm" / "run.json", run | {"config": _without_statistics(run["config"])})  # without mean and std
    model, data, _ = load_run(tmp_path / "timm")
    assert model.normalize.mean.item() == 0.5


def _without_statistics(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("mean", "std")}


def test_a_configuration_stored_without_mean_and_std_matches_the_default_one() -> None:
    config = config_of({"model": "test_resnet", "data": "digits"}, "here")
    stored = _without_statistics(asdict(config))
    assert config.is_that_of(stored) and not replace(config, mean="0", std="1").is_that_of(stored)
    assert config_of({"model": "test_resnet", "data": "digits", "mean": "0", "std": "1"}, "here").standardisation["std"] == (1,)
    with pytest.raises(ValueError, match=r"--mean 0\.5,x: expected a number"):
        replace(config, mean="0.5,x", std="1")


def test_a_checkpoint_with_another_head_is_refused_with_advice(tmp_path: Path, capsys) -> None:
    path = _checkpoint(tmp_path)
    assert call(f"spectrum test_resnet --checkpoint {path}") == 2
    assert "--num-classes and --in-chans" in capsys.readouterr().err
    assert call(f"finetune --model test_resnet --data photos --checkpoint {path} --out {tmp_path / 'run'}") == 2
    assert "adapted with --pretrained-path" in capsys.readouterr().err
    assert call(f"evaluate --model timm/test_resnet --data photos --checkpoint {path} --out {tmp_path / 'adopted'}") == 2
    assert "finetune --pretrained-path adapts weights of others" in capsys.readouterr().err


def test_spectrum_takes_a_mean_and_std(tmp_path: Path, capsys) -> None:
    bounds, asked = [], f"--checkpoint {_checkpoint(tmp_path)} --image-size 16 --in-chans 1 --num-classes 10 --json"
    for options in ("", "--mean 0 --std 1", "--mean 0 --std 2"):
        assert call(f"spectrum test_resnet {asked} {options}") == 0
        bounds.append(json.loads(capsys.readouterr().out)["lipschitz_bound"])
    assert bounds[1] == pytest.approx(2 * bounds[2], rel=0.05) and bounds[0] > 1.5 * bounds[1]


def test_mean_and_std_are_refused_for_a_model_that_is_not_from_timm(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    with pytest.raises(ValueError, match="a mean and std go with timm/NAME"):
        adopt(f"{tmp_path}/mine.py:make", "digits", tmp_path / "run", mean=(0.0,), std=(1.0,))


@pytest.mark.parametrize("options", ["--shard 3/2", "--engine slurm", "--block 0", "--mean 0.5,x --std 1", "--device nowhere"])
def test_wrong_options_of_evaluate_create_no_folder(options: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    assert call(f"evaluate --model {tmp_path}/mine.py:make --data digits --out {tmp_path / 'run'} {options}") == 2
    assert "error:" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "spec, words",
    [
        ("resnet18", "expected timm/NAME, module:function"),
        ("timm/resnet18x", "near: resnet18"),
        ("no_such_module:make", "ModuleNotFoundError"),
        ("FILE:absent", "has no 'absent'; it has make, nothing, raises, leaves, flat"),
        ("FILE:nothing", "gave a int"),
        ("FILE:raises", r"ZeroDivisionError: division by zero \(mine\.py, line 13\)"),
        ("FILE:leaves", "SystemExit: 3"),
        ("FILE:flat", r"gives \(128,\) for 2 images of digits; expected logits, \(2, classes\) with at least 10"),
        ("FILE:few", r"gives \(2, 3\) for 2 images"),
        ("FILE:pair", "gives tuple for 2 images"),
        ("FILE:wide", r"does not take images of shape \(1, 8, 8\)"),
    ],
)
def test_a_model_that_cannot_be_built_is_an_error_that_says_why(spec: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    with pytest.raises(ValueError, match=words):
        adopt(spec.replace("FILE", f"{tmp_path}/mine.py"), "digits", tmp_path / "run")
