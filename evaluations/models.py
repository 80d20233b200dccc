"""From a configuration, a run folder or a specification to the model that it means, which takes pixels in [0, 1]."""

from __future__ import annotations

import importlib
import math
import os
import runpy
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from robust_spectral import FastClip, fold_batchnorms_
from robust_spectral.plugins.timm import PixelModel, load, load_weights
from robust_spectral.plugins.timm_blocks import average_residuals_, small_stem_

from .config import FinetuneConfig
from .data import ImageData, data_hash, load_data
from .runs import environment, file_hash, open_run, save_weights, write_json

TRUSTED = "ROBUST_SPECTRAL_MODEL"  # environment variable: the one specification whose code may be run


def create_model(config: FinetuneConfig, data: ImageData) -> PixelModel:
    """The model of a configuration, before fine-tuning."""
    overlay = {"pretrained_cfg_overlay": {"file": config.pretrained_path}} if config.pretrained_path else {}
    if config.pretrained_path and not Path(config.pretrained_path).is_file():
        raise ValueError(f"pretrained_path={config.pretrained_path!r}: no such file")
    torch.manual_seed(config.seed)
    pretrained = config.pretrained or config.pretrained_path is not None
    try:
        model = load(
            config.model, pretrained, config.initial_checkpoint, num_classes=data.classes, in_chans=data.channels, **overlay
        )
    except Exception as error:
        if not config.pretrained_path or isinstance(error, ValueError):
            raise
        raise ValueError(f"pretrained_path={config.pretrained_path!r}: not readable as weights: {error}") from error
    return _rebuilt(model, config, data)


def _rebuilt(model: PixelModel, config: FinetuneConfig, data: ImageData) -> PixelModel:
    """The model with the changes of its architecture that the configuration asks for."""
    if config.small_stem:
        small_stem_(model.model)
    if config.fold_bn:
        fold_batchnorms_(model, data.example())
    if config.residuals == "averaged":
        average_residuals_(model.model)
    return model


def load_run(folder: Path) -> tuple[nn.Module, ImageData, dict[str, Any]]:
    """The model and the data of a finished run.

    Raises:
        ValueError: the folder is no run, or its weights are not the ones run.json was written for.
    """
    run = open_run(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file() or file_hash(weights) != run["model_sha256"]:
        raise ValueError(f"{folder}: model.safetensors is not the model that run.json describes")
    if "spec" in run["config"]:
        _check_trust(run["config"]["spec"], folder)
        data = load_data(run["config"]["data"], run["config"]["image_size"])
        model = _from_spec(run["config"]["spec"], run["classes"], run["channels"])
    else:
        known = {field.name for field in fields(FinetuneConfig)}
        config = FinetuneConfig(**{key: value for key, value in run["config"].items() if key in known})
        data = load_data(config.data, config.image_size)
        model = _rebuilt(load(config.model, num_classes=run["classes"], in_chans=run["channels"]), config, data)
    load_weights(weighted(model), weights)
    return model, data, run


def weighted(model: nn.Module) -> nn.Module:
    """The part of a model whose state dict is saved: timm's own where it stands behind a normalisation."""
    return model.model if isinstance(model, PixelModel) else model


def adopt(
    spec: str, data: str, out: Path, *, checkpoint: Path | None = None, image_size: int | None = None, defence: str = "unknown"
) -> Path:
    """Make a run folder of a model that was trained elsewhere, so that it can be evaluated.

    Args:
        spec: ``timm/NAME``, or ``module:function`` or ``file.py:function``, a function without arguments that returns a
            module from pixels in [0, 1] to logits.
        data: The data set's name.
        out: The folder; one that holds this very model already stays as it is.
        checkpoint: Weights, .safetensors or read with ``weights_only``; without them timm's published ones, or those that
            the function gives.
        image_size: Height and width of the images.
        defence: What the leaderboard calls the way it was trained.

    Raises:
        ValueError: no such model or data, weights or images that do not fit, or a folder that holds something else.
    """
    os.environ[TRUSTED] = spec  # for the processes that this one starts, too
    images = load_data(data, image_size)
    model = _from_spec(spec, images.classes if checkpoint else None, images.channels, pretrained=checkpoint is None)
    if checkpoint is not None:
        load_weights(weighted(model), checkpoint)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(images.example())
    except RuntimeError as error:
        raise ValueError(f"{spec} does not take images of shape {tuple(images.example().shape[1:])}: {error}") from error
    if logits.ndim != 2 or logits.shape[1] < images.classes:
        raise ValueError(
            f"{spec}: gives outputs of shape {tuple(logits.shape)} for an image; {data} has {images.classes} classes"
        )
    config = {"model": spec.removeprefix("timm/"), "spec": spec, "data": data, "image_size": image_size, "max_norm": None}
    if (out / "run.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            same = open_run(out)["model_sha256"] == save_weights(weighted(model), Path(scratch) / "model.safetensors")
        if not same or open_run(out)["config"] != config:
            raise ValueError(f"{out}: holds a run of another model or data already; give another --out")
        return out
    weights = save_weights(weighted(model), out / "model.safetensors")
    write_json(out / "run.json", {
        "config": config, "classes": logits.shape[1], "channels": images.channels, "image_size": images.image_size,
        "model_sha256": weights, "test_data_sha256": data_hash(images),
        "seed": 0, "defence": defence, "layers": _layers(model, images.example()), "seconds": None, **environment(),
    })  # fmt: skip
    return out


def _check_trust(spec: str, folder: Path) -> None:
    """A run folder that someone else made must not run code of its choice: only a model named by the user is made."""
    if not spec.startswith("timm/") and os.environ.get(TRUSTED) != spec:
        raise ValueError(
            f"{folder}: its model is made by the code {spec!r}, which is not run unless you ask for it: give "
            f"--model {spec} with --data and --out {folder}, or set {TRUSTED}={spec}"
        )


def _layers(model: nn.Module, example: Tensor) -> list[dict[str, Any]]:
    """Norms of its layers as a report has them; none where a layer has no norm that could be clipped."""
    try:
        return [row | {"before": row["upper"]} for row in FastClip(model, example, math.inf).report(rtol=0.02)]
    except (ValueError, NotImplementedError):
        return []


def _from_spec(spec: str, classes: int | None, channels: int, pretrained: bool = False) -> nn.Module:
    if spec.startswith("timm/"):
        return load(spec.removeprefix("timm/"), pretrained=pretrained, num_classes=classes, in_chans=channels)
    module, colon, function = spec.rpartition(":")
    if not colon:
        raise ValueError(f"model {spec!r}: expected timm/NAME, module:function or file.py:function")
    try:
        found = runpy.run_path(module) if module.endswith(".py") else vars(_imported(module))
        model = found[function]()
    except (ImportError, OSError, KeyError) as error:
        raise ValueError(f"model {spec!r}: cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r}: gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _imported(module: str) -> ModuleType:
    """A module, of the folder one is in as well, as `python -m` would find it."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(module)
