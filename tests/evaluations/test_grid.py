"""Recipes and grids of runs: options from files, combinations of lists, finished runs kept, and the frontier."""

import fcntl
import io
import json
import math
import runpy
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robust_spectral.evaluations.commands.cli import app
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.config.recipes import FOLDER, config_of, read_recipe, recipe_names
from robust_spectral.evaluations.data.image_data import data_hash, load_data
from robust_spectral.evaluations.finetuning.training import finetune
from robust_spectral.evaluations.grids.frontier import Frontier, frontier_of
from robust_spectral.evaluations.grids.grid import read_grid, run_grid, write_rows
from robust_spectral.evaluations.models.loading import create_model
from robust_spectral.evaluations.run_folder import read_json
from robust_spectral.plugins.timm import load
from robust_spectral.plugins.timm_blocks import small_stem_

SMALL = """
gate_samples = 4
[finetune]
model = "maxmin_mlp"
data = "held-out:200:digits"
image_size = 28
epochs = 1
max_norm = inf
[[runs]]
name = "plain"
[[runs]]
name = "clipped-{max_norm}-{logit_scale}"
max_norm = [1.0, 2.0]
logit_scale = 10
[[evaluate]]
attack = "fgsm"
eps = ["1/4", 0.5]
samples = 16
[frontier]
plain = "plain"
attack = "fgsm"
"""


def written(folder, text):
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def call(text):
    try:
        app(text.split())
    except SystemExit as exit:
        return exit.code


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_a_valid_configuration(name):
    config_of(read_recipe(name), name)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "start" not in name])
def test_the_model_of_every_recipe_takes_its_images(name):
    config = replace(config_of(read_recipe(name), name), pretrained_path=None, initial_checkpoint=None)
    data = load_data("digits", config.image_size or 28)  # one channel and ten classes as the recipes' data
    assert create_model(config, data).eval()(data.example()).shape == (1, 10)


def test_command_line_options_override_those_of_a_recipe(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('model = "maxmin_mlp"\ndata = "digits"\nimage_size = 28\nepochs = 0\nmax_norm = 2.0\nlogit_scale = 5.0\n')
    assert call(f"finetune --recipe {recipe} --max-norm 3 --out {tmp_path / 'run'}") == 0
    config = read_json(tmp_path / "run" / "config.json")
    assert (config["max_norm"], config["logit_scale"], config["model"]) == (3.0, 5.0, "maxmin_mlp")


@pytest.mark.parametrize(
    "text, message",
    [
        ("logit_scales = 3", "near: logit_scale"),
        ("epochs = ", "not readable as TOML"),
        ('model = "maxmin_mlp"', "data missing"),
        ('model = "maxmin_mlp"\ndata = "digits"\nmove = "beta"', "expected weight, gamma"),
        ('model = "maxmin_mlp"\ndata = "digits"\nadversarial_eps = -1.0', "0 for none"),
        ('model = "maxmin_mlp"\ndata = "digits"\nadversarial_norm = "l1"', "expected l2 or linf"),
        ('model = "maxmin_mlp"\ndata = "digits"\nepochs = "three"', "epochs = 'three': expected int"),
        ('model = "maxmin_mlp"\ndata = "digits"\nfreeze_bn = "false"', "freeze_bn = 'false': expected bool"),
        ('model = "maxmin_mlp"\ndata = "digits"\nmax_norm = true', "max_norm = True: expected float"),
        ('model = 3\ndata = "digits"', "model = 3: expected str"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_the_file_and_the_option(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.toml") as error:
        config_of(read_recipe(str(path)), str(path))
    assert message in str(error.value)


def test_an_unknown_recipe_is_an_error_with_advice():
    with pytest.raises(ValueError, match="give the path of a"):
        read_recipe("nothing-like-it")


@pytest.mark.parametrize("path", sorted((FOLDER / "grids").glob("*.toml")), ids=lambda path: path.stem)
def test_every_grid_of_the_package_can_be_read(path, tmp_path):
    assert len(read_grid(path, tmp_path).runs) > 1


def test_the_tables_of_the_experiments_are_up_to_date_with_their_figures():
    script = runpy.run_path(str(Path(__file__).parents[2] / "evaluations" / "benchmarks" / "experiments.py"))
    for path, made in ((script["PAGE"], lambda text: script["page"](text)[0]), (script["README"], script["readme"])):
        assert made(path.read_text()) == path.read_text()


def test_lists_in_a_grid_are_expanded_to_every_combination(tmp_path):
    text = SMALL.replace("logit_scale = 10", "logit_scale = [10, 30]")
    grid = read_grid(written(tmp_path, text), tmp_path)
    assert list(grid.runs) == ["plain", "clipped-1.0-10", "clipped-1.0-30", "clipped-2.0-10", "clipped-2.0-30"]
    assert grid.runs["plain"].max_norm is None and grid.runs["clipped-2.0-30"].logit_scale == 30
    assert grid.plans[0].eps == (0.25, 0.5)


def test_out_in_braces_is_replaced_by_the_folder_of_the_grid(tmp_path):
    text = SMALL + '[[runs]]\nname = "second"\ninitial_checkpoint = "{out}/plain/model.safetensors"\n'
    assert read_grid(written(tmp_path, text), tmp_path / "o").runs["second"].initial_checkpoint == str(
        tmp_path / "o" / "plain" / "model.safetensors"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (("clipped-{max_norm}-{logit_scale}", "clipped"), "two runs are named 'clipped'"),
        (("clipped-{max_norm}-{logit_scale}", "clipped/{max_norm}"), "not a valid folder name"),
        (("clipped-{max_norm}-{logit_scale}", "{norm}"), "'norm' is missing"),
        (('attack = "fgsm"\neps', 'atack = "fgsm"\neps'), "takes attack, norm, eps"),
        (('plain = "plain"', 'plain = "plane"'), "'plane' is no run"),
        (("gate_samples", "gates"), "gates unknown"),
        (("epochs", "epoch"), "near: epochs"),
        (('"1/4"', '"1/0"'), "such as 0.5 or 8/255"),
        (('"1/4"', "inf"), "such as 0.5 or 8/255"),
        (('[[runs]]\nname = "plain"', '[runs]\nname = "plain"'), "not readable as TOML"),
        (("clipped-{max_norm}-{logit_scale}", "a{0}"), "needs a name"),
        (("clipped-{max_norm}-{logit_scale}", ""), "not a valid folder name"),
        (('plain = "plain"', 'plain = "plain"\neps = 0.3'), "is under no [[evaluate]]"),
        (("gate_samples = 4", "gate_samples = 0"), "at least 1"),
    ],
)
def test_a_wrong_grid_is_an_error_that_says_why(change, message, tmp_path):
    with pytest.raises(ValueError) as error:
        read_grid(written(tmp_path, SMALL.replace(*change)), tmp_path)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a grid that was run, and what the command printed."""
    folder = tmp_path_factory.mktemp("grid")
    with redirect_stdout(io.StringIO()) as printed:
        assert call(f"grid {written(folder, SMALL)} -o {folder / 'runs'} --json") == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder


def test_grid_with_json_prints_only_json(done):
    assert json.loads((done / "printed.txt").read_text())["done"] == 3


def test_a_grid_records_an_accuracy_for_every_run_and_attack(done):
    found = read_json(done / "runs" / "grid.json")
    assert found["done"] == found["runs"] == 3
    for row in found["rows"]:
        assert {"fgsm l2 0.25", "fgsm l2 0.5"} <= row["robust"].keys() and 0 <= row["clean"] <= 1
    norms = {row["name"]: row["largest_norm"] for row in found["rows"]}
    assert norms["clipped-1.0-10"] <= 1.001 < norms["plain"]


def test_a_finished_grid_is_not_run_again(done, capsys):
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("report.json")}
    assert call(f"grid {done / 'grid.toml'} -o {done / 'runs'}") == 0
    assert {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("report.json")} == before
    assert "3 of 3 runs done" in capsys.readouterr().out


def test_a_run_folder_of_another_configuration_is_an_error_and_is_not_overwritten(done, tmp_path):
    changed = read_grid(written(tmp_path, SMALL.replace("epochs = 1", "epochs = 2")), done / "runs")
    failed = run_grid(changed, done / "runs", say=lambda text: None)
    assert failed.keys() == changed.runs.keys() and "nothing was overwritten" in failed["plain"]


def test_a_run_evaluated_at_more_eps_than_the_grid_has_counts_as_done(done, tmp_path):
    fewer = read_grid(written(tmp_path, SMALL.replace('eps = ["1/4", 0.5]', "eps = [0.5]")), done / "runs")
    assert write_rows(fewer, done / "runs")["done"] == 3


def test_a_run_locked_by_another_process_is_skipped(tmp_path):
    grid = read_grid(written(tmp_path, SMALL.replace("epochs = 1", "epochs = 0")), tmp_path)
    with open(tmp_path / ".plain.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run_grid(grid, tmp_path, say=lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["clipped-1.0-10", "clipped-2.0-10"]
    assert write_rows(grid, tmp_path)["done"] == 2


def test_a_failed_run_is_reported_and_the_other_runs_continue(tmp_path, capsys):
    text = SMALL.replace("max_norm = [1.0, 2.0]", 'max_norm = 1.0\ninitial_checkpoint = "nowhere.pth"')
    with pytest.raises(ValueError, match="1 of 2 runs failed"):
        call(f"grid {written(tmp_path, text)} -o {tmp_path / 'runs'}")
    assert (tmp_path / "runs" / "plain" / "report.json").is_file()
    assert read_json(tmp_path / "runs" / "grid.json")["done"] == 1
    assert "no such file" in capsys.readouterr().err


FIGURES = [("plain", 0.92, 0.1), ("a", 0.916, 0.5), ("b", 0.90, 0.7), ("c", 0.5, 0.9), ("d", 0.92, None)]


def test_the_frontier_is_the_most_robust_run_within_each_drop_of_clean_accuracy():
    rows = [{"name": name, "clean": clean, "robust": {"pgd l2 0.5": robust}} for name, clean, robust in FIGURES]
    found = frontier_of(rows, Frontier("plain", drops=(0.1, 0.5, 2.0)))
    assert [(best["name"], best["robust"]) for best in found] == [("plain", 0.1), ("a", 0.5), ("b", 0.7)]


def test_held_out_images_are_the_last_training_images():
    whole, held = load_data("digits"), load_data("held-out:200:digits")
    assert held.tests == 200 and len(held.train) == len(whole.train) - 200
    images, labels = held.test_images(200)
    assert torch.equal(images, whole.train.tensors[0][-200:]) and torch.equal(labels, whole.train.tensors[1][-200:])


def test_a_first_part_of_the_training_images_keeps_the_test_images():
    whole, part = load_data("digits"), load_data("first:50:digits")
    assert len(part.train) == 50 and torch.equal(part.train[49][0], whole.train[49][0])
    assert data_hash(part) == data_hash(whole)


@pytest.mark.parametrize("name", ["held-out:0:digits", "held-out:x:digits", "held-out:99999:digits", "first::digits"])
def test_a_part_of_a_data_set_needs_a_valid_number_of_images(name):
    with pytest.raises(ValueError, match=":N:NAME"):
        load_data(name)


def test_adversarial_training_makes_small_perturbations_harmless(tmp_path):
    how = {"model": "maxmin_mlp", "data": "digits", "image_size": 28, "epochs": 8, "max_norm": None, "batch_size": 128}
    plain = finetune(FinetuneConfig(**how), tmp_path / "plain")
    hard = finetune(FinetuneConfig(**how, adversarial_eps=2.0, adversarial_steps=3), tmp_path / "hard")
    assert [read_json(folder / "run.json")["defence"] for folder in (plain, hard)] == ["none", "adversarial"]
    fell = [attacked(folder) for folder in (plain, hard)]
    assert fell[1] < 0.8 * fell[0]


def attacked(folder):
    """Share of correct predictions that FGSM at L2 eps 2 makes wrong."""
    from robust_spectral.evaluations.attacks import make_attack
    from robust_spectral.evaluations.models.loading import load_run

    model, data, _ = load_run(folder)
    images, labels = data.test_images(300)
    found = make_attack("fgsm", "l2", 2.0)(model.eval(), images, labels)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
        return float((model(found).argmax(1) != labels)[right].double().mean())


def test_a_small_stem_keeps_the_weights_and_the_size_of_small_images():
    net = load("resnet18", num_classes=10, in_chans=1)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    small_stem_(net.model)
    assert net.state_dict().keys() == state.keys()
    assert net.model.forward_features(torch.zeros(1, 1, 28, 28)).shape[-1] == 4
    with pytest.raises(NotImplementedError, match="not of timm's ResNets"):
        small_stem_(load("test_vit").model)


def test_moving_gamma_alone_clips_composites_while_the_normalisations_train(tmp_path):
    config = FinetuneConfig("test_resnet", "digits", image_size=16, epochs=1, max_norm=2.0, spectral_warmup=0.0, move="gamma")
    run = read_json(finetune(config, tmp_path / "run") / "run.json")
    assert math.isclose(max(row["target"] for row in run["layers"]), 2.0)
    assert max(row["upper"] for row in run["layers"]) <= 2.002
