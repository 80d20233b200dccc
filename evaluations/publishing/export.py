"""Export of a run for use without this package: in timm and on the Hugging Face hub, or on RobustBench.

Weights are timm's, under timm's names. Proved and measured figures go into the configuration and the model card, or into
RobustBench's entry, always with the data that they were measured on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from robust_spectral.plugins.robustbench import BOARDS, TEST_IMAGES, model_info, write_model_info
from robust_spectral.plugins.robustbench_images import save_adversarial
from robust_spectral.plugins.timm import PixelModel

from ..attacking import open_subject, ordered, planned_work
from ..attacks import predict
from ..records import read_record
from ..reporting import render
from ..run_folder import Run, open_run

_REBUILT: dict[str, Any] = {"fold_bn": False, "small_stem": False, "residuals": "summed"}  # the values in plain timm


def to_hub(folder: Path, out: Path) -> Path:
    """Write a folder for the hub, which plain timm (timm without this package) also loads as ``local-dir:``.

    The folder contains the weights, timm's configuration with a section ``spectral``, and a model card, with the report's table
    if the run was evaluated. Before the folder is written, plain timm is checked to give exactly the same logits.

    Raises:
        ValueError: the folder is no finished run, plain timm does not make its network, or ``out`` is not empty.
    """
    opened = _without_twins(folder)
    pixels, run = _plain(open_subject(opened, "cpu").model, opened.record, folder), opened.record
    model, norm = pixels.model, pixels.normalize
    _refuse_filled(out)
    report = opened.report() if opened.evaluated else None
    data: dict[str, Any] = {
        "input_size": (run["channels"], run["image_size"], run["image_size"]),
        "crop_pct": 1.0,
        "mean": tuple(norm.mean.flatten().tolist()),
        "std": tuple(norm.std.flatten().tolist()),
    }
    with tempfile.TemporaryDirectory() as scratch:
        ready = Path(scratch) / "model"
        extra = {"spectral": _spectral(run, report), **_labels(run)}
        save_for_hf(model, str(ready), model_config=extra, safe_serialization=True, data_config=data)
        name = run["config"]["model"]
        (ready / "README.md").write_text(render("card.md", name=name, run=run, report=report), encoding="utf-8")
        again = timm.create_model(f"local-dir:{ready}", pretrained=True).eval()
        x = torch.rand(2, *data["input_size"])
        with torch.no_grad():
            if not torch.equal(again(x), model(x)):
                raise ValueError(f"{folder}: plain timm gives other logits from the exported weights; nothing was written")
        shutil.copytree(ready, out, dirs_exist_ok=True)
    return out


def to_robustbench(folder: Path, out: Path, board: str, entry: str, about: Path) -> Path:
    """Write the entry of a run on a RobustBench board, and the adversarial images that support it.

    Args:
        folder: The run, evaluated with ``autoattack`` at the board's size on the whole test set.
        out: Folder for ``model_info`` and the images.
        board: The board, such as ``cifar10/L2``.
        entry: The entry's name.
        about: JSON file with the fields that a run lacks: link, name, authors, venue, architecture, additional_data, ….

    Raises:
        ValueError: the run was not evaluated in this way, its figures are not valid, or RobustBench would not accept the entry.
    """
    if not BOARDS.get(board):
        raise ValueError(f"export(board={board!r}): expected one of {', '.join(b for b, sizes in BOARDS.items() if sizes)}")
    run = _without_twins(folder)
    report, norm, eps = run.report(), board.split("/")[1].lower(), BOARDS[board][0]
    found = [
        e for e in report["robust"] if (e["attack"], e["norm"]) == ("autoattack", norm) and abs(e["eps"] - Fraction(eps)) < 1e-6
    ]
    if not found:
        raise ValueError(
            f"{folder}: was not attacked by autoattack at {norm} {eps}, which the board {board} requires; run `robust-spectral "
            f"evaluate {folder} --attack autoattack --norm {norm} --eps {eps} --samples {TEST_IMAGES[board.split('/')[0]]}`"
        )
    if not found[0]["valid"]:
        raise ValueError(f"{folder}: the figure of autoattack is not valid: {found[0]['reason']}")
    flagged = any(gate["status"] == "flag" for gate in report["gates"])
    try:
        info = model_info(board, images=found[0]["n"], clean_acc=report["accuracy"]["clean"],
                          autoattack_acc=found[0]["accuracy"], unreliable=flagged, **json.loads(about.read_text()))  # fmt: skip
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{about}: {str(error).removeprefix('model_info() ')}") from error
    _refuse_filled(out)
    write_model_info(info, out / "model_info", entry)
    save_adversarial(*_adversarial(run, norm, found[0]), out / f"{entry}.pt", board, eps)
    return out


def _adversarial(run: Run, norm: str, found: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The test images, each fallen one replaced by its adversarial image, and the original test images.

    An image has fallen if autoattack broke it at the size of ``found`` or a smaller one.

    Raises:
        ValueError: the model's accuracy on the adversarial images is not the reported one.
    """
    subject = open_subject(run, "cpu")
    clean, labels = subject.data.test_images(subject.data.tests)
    images, work = clean.clone(), planned_work(run)
    order = ordered(subject.data, work.sample_order)
    levels = sorted((level for level in work.attacks.items() if level[0][:2] == ("autoattack", norm)), reverse=True)
    for unit in (unit for (_, _, eps), units in levels if eps <= found["eps"] for unit in units):
        record = read_record(run.folder, unit)
        if record is None:
            raise ValueError(f"{unit.path(run.folder)}: is missing, evaluate again")
        images[order[unit.start + record.tensors["fallen"]]] = record.tensors["adversarial"]
    attacked = order[: found["n"]]
    right = predict(subject.model, images[attacked]) == labels[attacked]
    if float(right.double().mean()) != found["accuracy"]:
        raise ValueError(f"{run.folder}: the adversarial images do not give the accuracy of the report; evaluate again")
    return images, clean


def _plain(model: nn.Module, run: dict[str, Any], folder: Path) -> PixelModel:
    """The network without its input normalisation, if plain timm makes the same one."""
    config = run["config"]
    changed = [key for key, usual in _REBUILT.items() if config.get(key, usual) != usual]
    if isinstance(model, PixelModel) and not changed and _of_timm(config["model"]):
        return model
    what = f"trained with {changed[0]}={config[changed[0]]!r}" if changed else "no model of timm's own"
    raise ValueError(f"{folder}: {config['model']} is {what}, so plain timm would not make the same network")


def _of_timm(name: str) -> bool:
    return timm.models.model_entrypoint(name).__module__.startswith("timm.")


def _spectral(run: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    """The proved figures: the norm of each layer, and the network's bound if the run was evaluated."""
    layers = {row["name"]: {key: row[key] for key in ("lower", "upper", "target")} for row in run["layers"]}
    bound = {} if report is None else {"lipschitz_bound": report["lipschitz"]["bound"], "input": "pixels in [0, 1]"}
    return {"defence": run["defence"], "max_norm": run["config"]["max_norm"], "layers": layers, **bound}


def _labels(run: dict[str, Any]) -> dict[str, list[str]]:
    """timm's entry of the names of the classes, where the run has a name for each logit."""
    names = run.get("class_names") or []
    return {"label_names": list(names)} if names and len(names) == run["classes"] else {}


def _without_twins(folder: Path) -> Run:
    run = open_run(folder)
    if run.has_twins:
        raise ValueError(f"{folder}: contains twins; export one of {', '.join(str(folder / name) for name in run.models)}")
    return run


def _refuse_filled(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; give another --out, nothing was overwritten")
