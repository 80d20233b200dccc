"""Models from a configuration, a run folder or a specification; all take pixels in [0, 1]."""

from __future__ import annotations

import inspect
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from robust_spectral import FastClip, fold_batchnorms_
from robust_spectral.plugins.timm import PixelModel, load, load_weights, unreadable
from robust_spectral.plugins.timm_blocks import average_residuals_, small_stem_

from ..config import FinetuneConfig
from ..data import ImageData, data_hash, load_data
from ..run_folder import Run, environment, file_hash, open_run, save_weights, write_json
from .specs import TRUSTED, check_trust, from_spec, told


def create_model(config: FinetuneConfig, data: ImageData) -> PixelModel:
    """Make the model of a configuration, before fine-tuning.

    Raises:
        ValueError: there is no such model or weights, or the model does not take the images of the data.
    """
    overlay: dict[str, Any] = {"pretrained_cfg_overlay": {"file": config.pretrained_path}} if config.pretrained_path else {}
    if config.pretrained_path and not Path(config.pretrained_path).is_file():
        raise ValueError(f"pretrained_path={config.pretrained_path!r}: no such file")
    torch.manual_seed(config.seed)
    pretrained = config.pretrained or config.pretrained_path is not None
    try:
        model = load(config.model, pretrained, num_classes=data.classes, in_chans=data.channels,
                     **config.standardisation, **overlay, **sized(config.model, data.image_size))  # fmt: skip
    except Exception as error:
        if not config.pretrained_path or isinstance(error, ValueError):
            raise
        raise ValueError(f"pretrained_path={config.pretrained_path!r}: {unreadable(error, config.pretrained_path)}") from error
    if config.initial_checkpoint is not None:
        advice = "a head of other classes and another first convolution are adapted with --pretrained-path"
        load_weights(model.model, config.initial_checkpoint, advice)
    rebuilt = _rebuilt(model, config, data.example())
    logits_of(rebuilt, data.example(), config.model)
    return rebuilt


def sized(name: str, size: int) -> dict[str, Any]:
    """The argument that passes the size of the images to timm, for models that accept one."""
    made = timm.models.model_entrypoint(name) if timm.is_model(name) else None
    return {"img_size": size} if made and "img_size" in inspect.signature(made).parameters else {}


def input_in_words(model: PixelModel, data: ImageData) -> str:
    """The size of a model's input images and their standardisation, in words."""
    size = f"{data.image_size}x{data.image_size}"
    resized = f" ({data.came} -> {size})" if data.came not in (None, size) else ""
    mean, std = (_each_or_one(given) for given in (model.normalize.mean, model.normalize.std))
    return f"images {data.channels}x{size}{resized}, standardised with mean {mean}, std {std}"


def _each_or_one(given: Tensor) -> str:
    values = [f"{value:.4g}" for value in given.flatten().tolist()]
    return ",".join(values if len(set(values)) > 1 else values[:1])


def logits_of(model: nn.Module, images: Tensor, name: str) -> Any:
    """The output of a model for a batch of images.

    Raises:
        ValueError: the model does not take images of this shape.
    """
    try:
        with torch.no_grad():
            return model(images)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        shape = tuple(images.shape[1:])
        raise ValueError(f"{name} does not take images of shape {shape}, give another --image-size: {told(error)}") from error


def _rebuilt(model: PixelModel, config: FinetuneConfig, example: Tensor) -> PixelModel:
    """The model with the changes of its architecture that the configuration requests."""
    if config.small_stem:
        small_stem_(model.model)
    if config.fold_bn:
        fold_batchnorms_(model, example)
    if config.residuals == "averaged":
        average_residuals_(model.model)
    return model


def load_run(folder: Path) -> tuple[nn.Module, ImageData, dict[str, Any]]:
    """Load the model and the data of a finished run, and its record.

    Raises:
        ValueError: the folder is no run, or its weights are not the ones run.json was written for.
    """
    run = open_run(folder)
    model, data = restore(run)
    return model, data, run.record


def restore(run: Run) -> tuple[nn.Module, ImageData]:
    """Load the model and the data of an opened run.

    Raises:
        ValueError: as `load_run`.
    """
    _check(run)
    config = run.record["config"]
    data = load_data(config["data"], config.get("image_size"))
    return _restored(run, data.example()), data


def load_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the model of a finished run, without its data, and the run's record.

    Raises:
        ValueError: as `load_run`.
    """
    run = open_run(folder)
    _check(run)
    record = run.record
    return _restored(run, torch.zeros(1, record["channels"], record["image_size"], record["image_size"])), record


def _check(run: Run) -> None:
    """Raise ValueError unless a run's weights are the recorded ones and its model may be built."""
    folder, record = run.folder, run.record
    if run.has_twins:
        raise ValueError(f"{folder}: contains twins; give one of {', '.join(str(folder / name) for name in record['twins'])}")
    weights = folder / "model.safetensors"
    if not weights.is_file() or file_hash(weights) != record["model_sha256"]:
        raise ValueError(f"{folder}: model.safetensors is not the model that run.json describes; train or copy it again")
    if "spec" in record["config"]:
        check_trust(record["config"]["spec"], folder)


def _restored(run: Run, example: Tensor) -> nn.Module:
    """The model of a run with its weights; ``example`` is an input of the run's image shape."""
    record, given = run.record, run.record["config"]
    model: nn.Module
    if "spec" in given:
        model = from_spec(given["spec"], record["classes"], record["channels"], mean=given.get("mean"), std=given.get("std"))
    else:
        known = {field.name for field in fields(FinetuneConfig)}
        config = FinetuneConfig(**{key: value for key, value in given.items() if key in known})
        model = _rebuilt(load(config.model, num_classes=record["classes"], in_chans=record["channels"],
                              **config.standardisation, **sized(config.model, example.shape[-1])), config, example)  # fmt: skip
    load_weights(weighted(model), run.folder / "model.safetensors")
    return model


def weighted(model: nn.Module) -> nn.Module:
    """The part of a model whose state dict is saved: for a model with an input normalisation, timm's model without it."""
    return model.model if isinstance(model, PixelModel) else model


def adopt(
    spec: str, data: str, out: Path, *, checkpoint: Path | None = None, image_size: int | None = None,
    defence: str = "unknown", mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
) -> Path:  # fmt: skip
    """Make a run folder for a model that was trained elsewhere, so that it can be evaluated.

    Args:
        spec: ``timm/NAME``, or ``module:function`` or ``file.py:function``, a function without arguments that returns a
            module from pixels in [0, 1] to logits.
        data: The data set's name.
        out: The folder; if it contains a run of exactly this model already, it is not changed.
        checkpoint: File of weights, .safetensors or read with ``weights_only``; default: timm's published weights, or the
            weights of the model that the function returns.
        image_size: Height and width of the images.
        defence: Name of the model's defence, for the leaderboard.
        mean: Mean of the pixels that a timm model was trained on, one for each channel or one for all; default: timm's own.
        std: Standard deviation, in the same form; mean 0 and std 1 stand for raw pixels.

    Raises:
        ValueError: no such model or data, weights or images that do not fit, or a folder with other content.
    """
    os.environ[TRUSTED] = spec  # also for the processes that this one starts
    images = load_data(data, image_size)
    model = from_spec(spec, images.classes if checkpoint else None, images.channels, pretrained=checkpoint is None,
                      mean=mean, std=std)  # fmt: skip
    if checkpoint is not None:
        shape = f"{data} has {images.classes} classes and {images.channels} channels"
        load_weights(weighted(model), checkpoint, f"{shape}; finetune --pretrained-path adapts weights of others")
    classes = _classes(model.eval(), images, spec)
    config: dict[str, Any] = {
        "model": spec.removeprefix("timm/"),
        "spec": spec,
        "data": data,
        "image_size": image_size,
        "max_norm": None,
    }
    config |= {key: list(given) for key, given in (("mean", mean), ("std", std)) if given is not None}
    if (out / "run.json").is_file():
        _refuse_another(out, model, config)
        return out
    run = {
        "config": config, "classes": classes, "class_names": images.class_names, "channels": images.channels,
        "image_size": images.image_size,
        "test_data_sha256": data_hash(images), "seed": 0, "defence": defence,
        "layers": _layers(model, images.example()), "seconds": None, **environment(),
    }  # fmt: skip
    write_json(out / "run.json", run | {"model_sha256": save_weights(weighted(model), out / "model.safetensors")})
    return out


def _classes(model: nn.Module, images: ImageData, spec: str) -> int:
    """The number of logits of a model, found with two images.

    Raises:
        ValueError: the model does not take the images, or gives no logits for their classes.
    """
    batch, _ = images.test_images(2)
    logits = logits_of(model, batch, spec)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(batch) or logits.shape[1] < images.classes:
        raise ValueError(
            f"{spec}: gives {shape} for {len(batch)} images of {images.name}; expected logits, ({len(batch)}, classes) with at "
            f"least {images.classes} classes"
        )
    return logits.shape[1]


def _refuse_another(out: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Check that a run folder contains exactly this model and configuration."""
    there = open_run(out).record
    with tempfile.TemporaryDirectory() as scratch:
        same = there["model_sha256"] == save_weights(weighted(model), Path(scratch) / "model.safetensors")
    if not same or there["config"] != config:
        raise ValueError(f"{out}: contains a run of another model or data already; give another --out")


def _layers(model: nn.Module, example: Tensor) -> list[dict[str, Any]]:
    """The norms of the model's layers, as a report has them; empty if a layer has no norm that could be clipped."""
    try:
        return [row | {"before": row["upper"]} for row in FastClip(model, example, math.inf).report(rtol=0.02)]
    except (ValueError, NotImplementedError):
        return []
