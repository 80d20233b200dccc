"""The display of a running evaluation, its results as they come, and its message after a stop."""

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import call
from rich.console import Console

from robust_spectral.evaluations import attacking
from robust_spectral.evaluations.attacking import AttackPlan, evaluate
from robust_spectral.evaluations.attacking.engine import in_this_process
from robust_spectral.evaluations.commands import evaluation_display
from robust_spectral.evaluations.commands.evaluation_display import EvaluationDisplay
from robust_spectral.evaluations.models import adopt
from robust_spectral.evaluations.records import Unit
from robust_spectral.evaluations.run_folder import read_json, write_json

NETWORK = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
PLANS = [AttackPlan("noise", "l2", (0.1, 0.2), 16), AttackPlan("fgsm", "l2", (0.1,), 16)]
OPTIONS = {"block": 8, "gate_samples": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with a small model that was not evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "nets.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUST_SPECTRAL_MODEL", "")  # set back when these tests end
        yield adopt(f"{folder / 'nets.py'}:network", "digits", folder / "run")


@pytest.fixture
def fresh(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUST_SPECTRAL_MODEL", read_json(run / "run.json")["config"]["spec"])
    return Path(shutil.copytree(run, tmp_path / "run"))


def unit(task: str, start: int, stop: int, **config: object) -> Unit:
    return Unit("0", "0", task, config, start, stop, 0)


PGD = [unit("pgd", start, start + 50, norm="linf", eps=8 / 255) for start in (0, 50, 100)]
CHECKS = unit("gates", 0, 64, norm="l2", eps=0.5)


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(evaluation_display, "time", clock)
    return clock


def display() -> tuple[EvaluationDisplay, io.StringIO]:
    file = io.StringIO()
    return EvaluationDisplay(Console(file=file, width=40)), file


def test_each_unit_is_a_line_with_the_model_the_attack_its_size_and_the_images_that_are_left(clock: Clock) -> None:
    shown, file = display()
    shown.watch("plain", None, 0)
    shown.watch("plain", [*PGD, CHECKS], 5)
    shown.watch("plain", [*PGD[1:], CHECKS], 5)
    shown.watch("plain", [CHECKS], 5)
    shown.watch("plain", [], 5)
    lines = file.getvalue().splitlines()
    assert lines[0] == "plain: loading the model and the data"
    assert lines[1] == "plain: pgd L∞ 8/255, 150 of 150 images left [1/5], not timed yet: pgd, checks"
    assert lines[2].startswith("plain: pgd L∞ 8/255, 100 of 150 images left [2/5]")
    assert lines[3].startswith("plain: checks L2 0.5, 64 of 64 images left [4/5]") and lines[4].startswith(
        "plain: writing the report"
    )


def test_the_time_left_is_that_of_timed_units_and_falls_while_a_unit_runs(clock: Clock) -> None:
    shown, _ = display()
    shown.watch("", [*PGD, CHECKS], 5)
    clock.now = 20.0
    shown.watch("", [*PGD[1:], CHECKS], 5)
    assert shown._time_left() == "0:00:40 left; not timed yet: checks"
    clock.now = 33.0
    assert shown._time_left() == "0:00:27 left; not timed yet: checks"
    clock.now = 99.0  # the unit takes longer than its like did
    assert shown._time_left() == "0:00:20 left; not timed yet: checks"


def test_units_with_records_of_earlier_are_not_timed(clock: Clock) -> None:
    shown, _ = display()
    clock.now = 5.0
    shown.watch("", PGD[2:], 3)
    assert shown._time_left() == "not timed yet: pgd"


def test_a_unit_that_takes_long_is_shown_again_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_display, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(evaluation_display, "_REDRAWN", 0.005)
    shown, file = display()
    with shown:
        shown.watch("", [CHECKS], 1)
        for _ in range(2000):
            if file.getvalue().count("checks L2 0.5, 64") > 2:
                break
            shown._stopped.wait(0.005)
    assert file.getvalue().count("checks L2 0.5, 64") > 2


def test_a_terminal_shows_the_unit_in_one_line_that_is_drawn_anew() -> None:
    file = io.StringIO()
    shown = EvaluationDisplay(Console(file=file, width=160, force_terminal=True))
    with shown:
        shown.watch("clipped", PGD[1:], 3)
        shown._bar.refresh()
    assert "clipped: pgd L∞ 8/255, 100 of 150 images left" in file.getvalue() and "1/3" in file.getvalue()


def named(text: str) -> str:
    """The attack, norm and size of a result that was said."""
    return re.sub(r": [\d.]+ % at (eps [\d.]+) of .*", r" \1", text)


def test_each_result_is_said_once_and_as_soon_as_all_images_of_an_attack_are_done(fresh: Path) -> None:
    said: list[str] = []
    seen: dict[str, list[str]] = {}

    def listening(folder, units, device):
        for outcome in in_this_process(folder, units, device):
            yield outcome
            seen[f"{outcome[0].task} {outcome[0].config.get('eps', '')} {outcome[0].stop}"] = list(said)

    evaluate(fresh, PLANS, engine=listening, say=said.append, **OPTIONS)
    assert any(text.startswith("clean accuracy") for text in seen["clean  16"])
    assert not any(text.startswith("noise") for text in seen["noise 0.1 8"])
    assert [text for text in seen["noise 0.1 16"] if text.startswith("noise")] == [
        t for t in said if named(t) == "noise l2 eps 0.1"
    ]
    assert len(said) == len(set(said)) and [named(text) for text in said[1:4]] == [
        "noise l2 eps 0.1", "noise l2 eps 0.2", "fgsm l2 eps 0.1"
    ]  # fmt: skip


def test_a_size_is_not_told_before_the_smaller_ones_of_its_attack(fresh: Path) -> None:
    order: list[str] = []

    def backwards(folder, units, device):
        return in_this_process(folder, list(reversed(units)), device)

    evaluate(fresh, PLANS, engine=backwards, say=order.append, **OPTIONS)
    told = [named(text) for text in order if text.startswith("noise")]
    assert told == ["noise l2 eps 0.1", "noise l2 eps 0.2"]
    again: list[str] = []
    evaluate(fresh, PLANS, say=again.append, **OPTIONS)
    assert sorted(again) == sorted(order)


def test_progress_names_the_model_and_counts_down_its_units(fresh: Path, tmp_path: Path) -> None:
    folder, seen = tmp_path / "twins", []
    for name in ("plain", "clipped"):
        shutil.copytree(fresh, folder / name)
    write_json(folder / "run.json", {"twins": ["plain", "clipped"]})
    evaluate(folder, PLANS, say=lambda text: None, progress=lambda *told: seen.append(told), **OPTIONS)
    for name in ("plain", "clipped"):
        mine = [left for model, left, _ in seen if model == name]
        assert mine[0] is None and [len(left) for left in mine[1:]] == list(range(len(mine) - 2, -1, -1))


def test_a_stopped_evaluation_says_what_is_kept_and_continues(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(folder, units, device):
        for outcome in in_this_process(folder, units, device):
            if outcome[0].task == "noise":
                raise KeyboardInterrupt
            yield outcome

    command = f"evaluate {fresh} --attack noise --eps 0.1 --samples 16 --gate-samples 4 --block 8"
    with monkeypatch.context() as patch:
        patch.setattr(attacking, "make_engine", lambda *_: stopped)
        assert call(command) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert "kept: 4 of 6 units of work; to be done again: noise L2 0.1, 16 of 16 images left" in said
    assert len(list((fresh / "records").glob("*.safetensors"))) == 4
    assert call(command) == 0
    assert "[4/6]" in capsys.readouterr().err
