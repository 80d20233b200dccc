"""From fine-tuning to the report, on real digits: commands, records, interruptions and errors."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
import typer
from commands import call
from reference import norm
from rich.text import Text

from robust_spectral import FastClip, linear_layers, lipschitz_bound, refined_bound
from robust_spectral.evaluations.attacking.evaluation import evaluate
from robust_spectral.evaluations.attacking.work import AttackPlan
from robust_spectral.evaluations.attacks import into_ball, size_of
from robust_spectral.evaluations.commands.cli import app
from robust_spectral.evaluations.commands.finetune_command import _print_rows
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning.training import _Training, finetune
from robust_spectral.evaluations.models.loading import load_run
from robust_spectral.evaluations.records.accuracy_figures import certified, sandwich
from robust_spectral.evaluations.reporting.charts import robustness
from robust_spectral.evaluations.reporting.report import write_report
from robust_spectral.evaluations.run_folder import read_json, write_atomically, write_json
from robust_spectral.evaluations.wording import percent
from robust_spectral.plugins.timm import load

SMALL = {"model": "test_resnet", "data": "first:512:digits", "image_size": 16, "freeze_bn": True, "batch_size": 128}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A run with the defence and its twin without, trained, attacked and reported by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    command("finetune --model test_resnet --data digits --image-size 16 --epochs 3 --lr 3e-3 --max-norm inf", folder / "start")
    start = folder / "start" / "model.safetensors"
    command(
        f"finetune --model test_resnet --data digits --image-size 16 --epochs 3 --lr 2e-3 --initial-checkpoint {start} "
        "--freeze-bn --max-norm 2 --logit-scale 10 --twin", folder / "run",
    )  # fmt: skip
    options = "--attack pgd --attack autoattack --eps 0.25 --eps 3 --samples 24 --autoattack-eps 3 --autoattack-samples 10"
    assert call(f"evaluate {folder / 'run'} {options}") == 0
    assert call(f"report {folder / 'run'}") == 0
    return folder / "run"


def command(text, out):
    assert call(f"{text} --out {out}") == 0


def test_every_clipped_composite_is_at_most_its_target_in_dense_float64(twins):
    model, data, _ = load_run(twins / "clipped")
    for layer in linear_layers(model, data.example()):
        composite = torch.nn.Sequential(layer.module, *([layer.batchnorm] if layer.batchnorm is not None else []))
        assert norm(composite, layer.in_shape) <= 2 * 1.001


def test_the_report_orders_certified_worst_case_attacked_and_clean_accuracies(twins):
    report = read_json(twins / "report.json")
    assert set(report["models"]) == {"plain", "clipped"}
    for figures in report["models"].values():
        assert "fail" not in {gate["status"] for gate in figures["gates"]}
        for level in figures["sandwich"]:
            assert level["certified"] <= level["worst"] <= min(level["attacks"].values())
            assert max(level["attacks"].values()) <= level["clean"]
        assert max(entry["accuracy"] for entry in figures["certified"]) > 0
        assert all(entry["ci"][0] <= entry["accuracy"] <= entry["ci"][1] for entry in figures["robust"])


def test_the_sample_table_has_a_row_for_every_image_attack_and_eps(twins):
    rows = pq.read_table(twins / "clipped" / "samples.parquet").to_pylist()
    columns = "sample label attack norm eps predicted robust distance certified_radius status"
    assert list(rows[0]) == columns.split()
    assert len(rows) == 24 + 2 * 24 + 10
    assert all(row["distance"] == math.inf if row["robust"] else row["distance"] <= row["eps"] * (1 + 1e-6) for row in rows)
    assert all(row["robust"] == (row["predicted"] == row["label"]) for row in rows)


def test_the_report_page_is_self_contained_and_names_both_runs(twins):
    page = (twins / "report.html").read_text()
    assert "plain" in page and "clipped" in page and page.count("<svg") == 3
    assert "src=" not in page and "@import" not in page and "<script" not in page


def test_the_training_log_contains_the_norm_of_every_layer(twins):
    rows = [json.loads(line) for line in (twins / "clipped" / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["largest_norm"] == max(rows[-1]["norms"].values()) <= 2.1
    assert rows[0]["largest_norm"] > rows[-1]["largest_norm"]


def test_second_run_into_the_same_folder_overwrites_nothing(twins, capsys):
    before = (twins / "run.json").read_bytes()
    assert call(f"finetune --model test_resnet --data digits --twin --out {twins}") == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    assert (twins / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    "text, message",
    [
        ("finetune --model resnet18x --data digits --out OUT", "near: resnet18"),
        ("finetune --model test_resnet --data digitz --out OUT", "near: digits"),
        ("finetune --model test_resnet --data digits --max-norm 0 --out OUT", "must be positive"),
        ("finetune --model test_resnet --data digits --max-norm -1 --out OUT", "must be positive; inf for no clipping"),
        ("finetune --model test_resnet --data digits --out /proc/foo", "/proc/foo: cannot be written, give another place"),
        ("spectrum test_resnet --image-size 16 --plot /proc/foo/norms.svg", "/proc/foo: cannot be written"),
        (
            "evaluate --model timm/test_resnet --data digits --image-size 16 --checkpoint START --out /proc/foo",
            "cannot be written",
        ),
        ("finetune --model test_resnet --data digits --initial-checkpoint nowhere.pth --out OUT", "no such file"),
        ("finetune --model test_resnet --data idx:nowhere.tgz --out OUT", "nowhere.tgz: no such folder"),
        ("finetune --model test_resnet --data digits --lipschitz-target 9 --out OUT", "in eval mode"),
        ("finetune --model test_resnet --data digits --freeze-bn --lr 1e30 --out OUT", "complete epochs are kept"),
        (
            "finetune --model test_resnet --data digits --lipschitz-target -1 --out OUT",
            "lipschitz_target=-1.0: must be positive",
        ),
        (
            "finetune --model test_vit --data digits --image-size 9 --out OUT",
            "test_vit does not take images of shape (1, 9, 9)",
        ),
        ("evaluate OUT", "no such run folder"),
        ("report OUT", "no such run folder"),
        ("evaluate . --attack pdg", "near: pgd"),
        ("evaluate . --eps -1", "positive"),
        ("evaluate . --eps 8/0", "such as 0.5 or 8/255"),
        ("evaluate . --norm L2 --eps 8/255", "not a finished run"),
        ("evaluate OUT --image-size 16", "--image-size goes with --model"),
        ("leaderboard OUT", "no such folder"),
        ("export OUT -o OUT2", "no such run folder"),
        ("evaluate . --norm l7", "expected one of"),
        ("finetune --model test_resnet --data digits --device nowhere --out OUT", "not available here"),
        ("finetune --model test_resnet --data digits --amp-dtype int8 --out OUT", "expected float16 or bfloat16"),
        ("finetune --model test_resnet --data digits --data folder:[/x] --out OUT", "folder:[/x]"),
        ("spectrum resnet18x", "near: resnet18"),
        ("spectrum test_vit --image-size 50", "test_vit does not take images of shape (3, 50, 50)"),
        ("spectrum test_resnet --image-size -3", "must be positive"),
        ("spectrum OUT", "no such run folder"),
        ("spectrum test_resnet --refine -1", "give seconds"),
        ("spectrum test_resnet --refine 5 --failure-probability 0", "a refined bound is probabilistic"),
        ("finetune --model test_vit --data digits --image-size 50 --out OUT", "does not take images of shape (1, 50, 50)"),
        ("finetune --model test_resnet --data digits --image-size -3 --out OUT", "image_size=-3: must be positive"),
        ("finetune --model test_resnet --data torch/cifar10 --out OUT", "as in torch/cifar10:PATH"),
        ("finetune --model test_resnet --data hfds/mnist --out OUT", "needs the package datasets, pip install datasets"),
    ],
)
def test_bad_input_gives_a_one_line_error_and_exit_status_2(text, message, tmp_path, capsys):
    if "START" in text:
        torch.save(load("test_resnet", num_classes=10, in_chans=1).model.state_dict(), tmp_path / "start.pth")
        text = text.replace("START", str(tmp_path / "start.pth"))
    assert call(text.replace("OUT", str(tmp_path / "out"))) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.count("error:") == 1 and message in error.partition("error:")[2] and "Traceback" not in error
    assert (tmp_path / "out" / "config.json").exists() == ("--lr 1e30" in text)  # only a training that has begun can be resumed


def test_spectrum_refines_the_bound_of_a_network(capsys, monkeypatch):
    asked = []

    def by_rounds(net, example, seconds, failure_probability, **options):  # seconds would depend on the machine's load
        asked.append((seconds, failure_probability))
        return refined_bound(net, example, None, failure_probability, rounds=60, **options)

    monkeypatch.setattr("robust_spectral.evaluations.commands.spectrum_command.refined_bound", by_rounds)
    torch.manual_seed(0)
    assert call("spectrum test_resnet --image-size 16 --json") == 0
    plain = json.loads(capsys.readouterr().out)["lipschitz_bound"]
    torch.manual_seed(0)
    assert call("spectrum test_resnet --image-size 16 --json --refine 5") == 0
    assert json.loads(capsys.readouterr().out)["lipschitz_bound"] < plain / 2
    assert asked == [(5.0, 1e-9)]


def test_spectrum_prints_an_interval_for_every_layer_as_json(capsys):
    assert call("spectrum test_resnet --image-size 16 --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["layers"]) == 16 and all(row["lower"] <= row["upper"] for row in shown["layers"])


def test_spectrum_takes_timms_prefix_and_a_number_of_classes(capsys):
    assert call("spectrum timm/test_resnet --image-size 16 --num-classes 7 --failure-probability 1e-3 --json") == 0
    assert json.loads(capsys.readouterr().out)["layers"][-1]["name"] == "model.fc"
    assert call("spectrum test_resnet --num-classes 0") == 2


def test_spectrum_prints_full_layer_names_and_no_progress_to_a_narrow_file(capsys):
    assert call("spectrum test_resnet --image-size 16 --top 5") == 0
    out, err = capsys.readouterr()
    assert err == "" and "…" not in out and "model.layer" in out


def test_help_texts_keep_their_brackets(capsys):
    group = typer.main.get_command(app)
    texts = [text for command in group.commands.values() for text in (command.help, *(p.help for p in command.params))]
    lost = [text for text in texts if text and Text.from_markup(text).plain != text.replace("\\[", "[")]
    assert not lost and any("\\[runs]" in text for text in texts if text)


def test_spectrum_of_a_run_folder_measures_the_weights_of_the_run(twins, capsys):
    assert call(f"spectrum {twins / 'clipped'} --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["layers"][0]["in_shape"] == "1x16x16" and max(row["lower"] for row in shown["layers"]) <= 2 * 1.001
    assert call(f"spectrum {twins / 'clipped'} --image-size 32") == 2
    assert "--image-size goes with a timm model" in " ".join(capsys.readouterr().err.split())
    assert call(f"spectrum {twins}") == 2
    assert "contains twins; give one of" in " ".join(capsys.readouterr().err.split())


def test_spectrum_draws_intervals_and_estimates_the_top_values(tmp_path, capsys):
    assert call(f"spectrum test_resnet --image-size 16 --top 2 --plot {tmp_path / 'new' / 'norms.svg'} --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert all(len(row["top"]) == 2 and row["top"][0] <= row["upper"] * (1 + 1e-5) for row in shown["layers"])
    assert (tmp_path / "new" / "norms.svg").read_text().startswith("<svg")


def test_an_interrupted_run_resumes_to_identical_weights(tmp_path, monkeypatch):
    config = FinetuneConfig(**SMALL, epochs=3, max_norm=2.0, seed=5)
    whole = load_run(finetune(config, tmp_path / "whole"))[0].state_dict()
    train = _Training.train_epoch
    monkeypatch.setattr(
        _Training, "train_epoch", lambda s, e, p: train(s, e, p) if e < 2 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        finetune(config, tmp_path / "cut")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--resume"):
        finetune(config, tmp_path / "cut")
    with pytest.raises(ValueError, match=r"the training was interrupted; continue with the same .* --resume"):
        evaluate(tmp_path / "cut", [AttackPlan("pgd", "l2", (0.5,), 4)])
    resumed = load_run(finetune(config, tmp_path / "cut", resume=True))[0].state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_finetune_names_the_run_of_a_pair_in_training_and_reports_an_interruption(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_Training, "train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(f"finetune --model test_resnet --data digits --image-size 16 --epochs 1 --twin --out {tmp_path / 'run'}") == 130
    said = capsys.readouterr().err
    assert "twin 1 of 2: plain" in said and "interrupted; finished work is kept" in said
    assert call(f"evaluate {tmp_path / 'run'}") == 2
    assert "the training was interrupted" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["finetune --model test_resnet --data digits --epochs 99 --out {}", "grid nowhere --help"])
def test_an_interrupted_process_exits_with_130_and_a_message_and_help_with_0(command, tmp_path):
    start = [sys.executable, "-m", "robust_spectral.evaluations", *command.format(tmp_path / "run").split()]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a process in the background of a shell ignores SIGINT
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    if "--help" in command:
        assert process.communicate(timeout=60)[0] and process.returncode == 0
        return
    while not (tmp_path / "run" / "state.pt").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; finished work is kept" in said and "Traceback" not in said


def test_an_unknown_command_is_a_usage_error(capsys):
    assert call("spectrun test_resnet") == 2
    assert "No such command" in capsys.readouterr().err


def test_resuming_a_finished_run_leaves_it_unchanged(tmp_path):
    config = FinetuneConfig(**SMALL, epochs=0, max_norm=None)
    finetune(config, tmp_path / "run")
    (tmp_path / "run" / "state.pt").touch()  # as after a run killed before it removed this file
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert finetune(config, tmp_path / "run", resume=True) == tmp_path / "run"
    assert (tmp_path / "run" / "run.json").read_bytes() == before and not (tmp_path / "run" / "state.pt").exists()


def test_a_partial_file_of_a_killed_writer_does_not_block_a_new_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.4711.part").write_text("{")
    finetune(FinetuneConfig(**SMALL, epochs=0, max_norm=None), tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


def test_non_finite_losses_are_skipped_and_counted_and_ten_in_a_row_are_an_error(tmp_path, monkeypatch):
    calls, cross_entropy = [0], torch.nn.functional.cross_entropy

    def sometimes(logits, labels):
        calls[0] += 1
        return cross_entropy(logits, labels) * (float("nan") if calls[0] in (2, 3) or calls[0] > 14 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", sometimes)
    _, _, run = load_run(finetune(FinetuneConfig(**SMALL | {"data": "digits"}, epochs=1), tmp_path / "two"))
    assert run["skipped"] == 2
    with pytest.raises(ValueError, match="10 steps in a row"):
        finetune(FinetuneConfig(**SMALL | {"data": "digits"}, epochs=3), tmp_path / "many")


def test_resume_with_another_configuration_is_refused(tmp_path):
    config = FinetuneConfig(**SMALL, epochs=1)
    write_atomically(tmp_path / "config.json", lambda path: path.write_text("{}"))
    (tmp_path / "state.pt").touch()
    with pytest.raises(ValueError, match="another configuration"):
        finetune(config, tmp_path, resume=True)


def test_folder_of_a_run_that_failed_at_the_start_can_be_used_again(tmp_path):
    with pytest.raises(ValueError, match="near"):
        finetune(FinetuneConfig(**SMALL | {"data": "digitz"}), tmp_path / "run")
    assert (finetune(FinetuneConfig(**SMALL, epochs=0, max_norm=None), tmp_path / "run") / "run.json").is_file()


def test_an_optimizer_that_never_calls_the_hook_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(FastClip, "attach", lambda clipper, optimizer: None)
    with pytest.raises(ValueError, match="never called the clipper's hook"):
        finetune(FinetuneConfig(**SMALL, epochs=1), tmp_path / "run")


def test_certified_accuracy_of_a_pair_of_runs_is_reported_at_the_same_eps(twins):
    models = read_json(twins / "report.json")["models"]
    grids = [[entry["eps"] for entry in figures["certified"]] for figures in models.values()]
    assert grids[0] == grids[1]
    for figures in models.values():
        accuracies = [entry["accuracy"] for entry in figures["certified"]]
        assert accuracies == sorted(accuracies, reverse=True)


def test_moving_average_is_clipped_and_saved(tmp_path):
    config = FinetuneConfig(**SMALL, epochs=1, max_norm=2.0, model_ema=True, model_ema_decay=0.9)
    model, data, _ = load_run(finetune(config, tmp_path / "ema"))
    for layer in linear_layers(model, data.example()):
        composite = torch.nn.Sequential(layer.module, *([layer.batchnorm] if layer.batchnorm is not None else []))
        assert norm(composite, layer.in_shape) <= 2 * 1.001


def test_the_moving_average_of_a_short_training_is_far_from_the_initial_weights(tmp_path):
    def last(name, **options):
        model, _, _ = load_run(finetune(FinetuneConfig(**SMALL, max_norm=None, **options), tmp_path / name))
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    start, trained = last("start", epochs=0), last("trained", epochs=1)
    average = last("average", epochs=1, model_ema=True)
    assert (average - start).norm() > 0.3 * (trained - start).norm()


def test_a_lipschitz_target_is_met_by_the_bound_of_the_network(tmp_path):
    command("finetune --model maxmin_mlp --data digits --image-size 28 --epochs 1 --max-norm inf --lipschitz-target 3",
            tmp_path / "run")  # fmt: skip
    model, data, run = load_run(tmp_path / "run")
    assert run["defence"] == "fastclip" and run["config"]["max_norm"] is None
    assert 1 < lipschitz_bound(model, data.example()).value <= 3


def test_a_network_with_squeeze_and_excite_has_a_bound_in_the_pixel_box_in_the_report(tmp_path):
    folder = finetune(
        FinetuneConfig(model="test_efficientnet", data="digits", image_size=32, epochs=0, max_norm=None), tmp_path / "run"
    )
    evaluate(folder, [AttackPlan("pgd", "l2", (0.5,), 2)])
    lipschitz = read_json(folder / "report.json")["lipschitz"]
    assert lipschitz["bound"] is None and lipschitz["bound_in_pixel_box"] > 0
    write_report(folder)
    assert "between images with pixels in [0, 1] the bound is" in (folder / "report.html").read_text()


def test_training_in_mixed_precision_ends_with_every_norm_at_most_the_target(tmp_path):
    config = FinetuneConfig(
        **SMALL | {"data": "held-out:1200:digits", "image_size": 32, "batch_size": 64},
        epochs=1,
        max_norm=2.0,
        amp=True,
        amp_dtype="bfloat16",
    )
    _, _, run = load_run(finetune(config, tmp_path / "amp"))
    assert max(row["upper"] for row in run["layers"]) <= 2 * 1.001


def test_weights_of_another_model_are_refused(twins, tmp_path):
    run = read_json(twins / "clipped" / "run.json")
    write_json(tmp_path / "run.json", run)
    (tmp_path / "model.safetensors").write_bytes((twins / "plain" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"not the model that run\.json describes"):
        evaluate(tmp_path, [AttackPlan("pgd", "l2", (0.5,), 4)])


def test_the_report_of_a_run_that_was_not_evaluated_is_an_error(tmp_path, twins):
    write_json(tmp_path / "run.json", read_json(twins / "clipped" / "run.json"))
    with pytest.raises(ValueError, match="not evaluated yet"):
        write_report(tmp_path)


@pytest.mark.parametrize("kind", ["l2", "linf"])
def test_adversarial_images_are_projected_into_ball_and_box(kind):
    x = torch.rand(5, 1, 4, 4)
    inside = into_ball(x + 3 * torch.randn(5, 1, 4, 4), x, kind, 0.3)
    assert float(size_of(inside.double() - x.double(), kind).max()) <= 0.3 * (1 + 1e-6)
    assert float(inside.min()) >= 0 and float(inside.max()) <= 1


def test_non_finite_adversarial_images_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        into_ball(torch.full((1, 1, 2, 2), float("nan")), torch.zeros(1, 1, 2, 2), "l2", 0.3)


def row(sample, attack, eps, robust, radius=0.0, distance=0.0):
    return {"sample": sample, "label": 0, "attack": attack, "norm": "l2", "eps": eps, "predicted": 0 if robust else 1,
            "robust": robust, "distance": distance, "certified_radius": radius}  # fmt: skip


def test_checks_that_were_not_made_are_summed_up_in_one_line(twins, tmp_path, capsys):
    shutil.copytree(twins / "plain", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "records")
    (tmp_path / "run" / "report.json").unlink()
    for command_line in ("evaluate {} --samples 4 --eps 0.1 --gate-samples 2", "report {}"):
        assert call(command_line.format(tmp_path / "run")) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("not tested (") == said.count("give more --gate-samples") == 1 and "gradients are there" in said
        assert ("2 images for the checks, " in said) == command_line.startswith("evaluate")


def test_a_successful_attack_on_a_certified_image_fails_the_check_of_certificates():
    clean = [row(0, "none", 0, True, radius=1.0), row(1, "none", 0, True)]
    assert sandwich([row(0, "pgd", 0.5, True), row(1, "pgd", 0.5, False)], clean, "l2", 0.5, 16)["holds"]
    assert not sandwich([row(0, "pgd", 0.5, False), row(1, "pgd", 0.5, True)], clean, "l2", 0.5, 16)["holds"]


def test_certified_accuracy_is_reported_down_to_an_eps_where_it_is_positive():
    clean = [row(i, "none", 0, True, radius=1e-5 * (1 + i)) for i in range(8)]
    grid = certified(clean, "l2", [row(0, "pgd", 0.5, True)], 16)
    assert grid[0]["accuracy"] >= 0.75 and grid[-1] == {"norm": "l2", "eps": 0.5, "n": 8, "accuracy": 0.0, "ci": grid[-1]["ci"]}


def test_a_certificate_in_linf_needs_an_l2_radius_of_eps_times_root_d():
    clean = [row(0, "none", 0, True, radius=1.0)]
    attacked = [row(0, "pgd", eps, True) | {"norm": "linf"} for eps in (0.2, 0.3)]
    assert [e["accuracy"] for e in certified(clean, "linf", attacked, 16) if e["eps"] in (0.2, 0.3)] == [1.0, 0.0]


def test_an_invalid_certified_accuracy_is_not_drawn():
    entry = {"norm": "l2", "eps": 0.1, "accuracy": 0.5}
    figures = {"accuracy": {"clean": 0.9}, "robust": [{**entry, "attack": "pgd", "ci": [0.4, 0.6], "valid": True}]}
    drawn = [robustness({"a": figures | {"certified": c}}, "l2") for c in ([], [entry | {"valid": False}], [entry])]
    assert drawn[0] == drawn[1] != drawn[2]


def test_percentages_are_rounded_down(capsys):
    assert percent(0.9999) == "99.9" and percent(0.29) == "29.0" and percent(1.0) == "100.0"
    row = {"name": "a", "clean": 0.9999, "robust": {"pgd": 0.5999}, "largest_norm": 1.0, "seconds": 1.0, "gates_fail": []}
    _print_rows(
        {"rows": [row], "done": 1, "runs": 1, "frontier": [{"drop": 1, "name": "a", "clean": 0.9999, "robust": 0.5999}]}
    )
    said = capsys.readouterr().out
    assert said.count("99.9") == said.count("59.9") == 2 and "100.0" not in said


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(scratch):
        scratch.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert read_json(path) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_infinite_numbers_become_null_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"bound": float("inf"), "rows": [float("nan"), 1.5]})
    assert read_json(tmp_path / "a.json") == {"bound": None, "rows": [None, 1.5]}
