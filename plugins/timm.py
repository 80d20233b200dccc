"""timm models that take pixels in [0, 1].

`load` puts a model's input normalisation into a submodule before the model, so that perturbation sizes and Lipschitz bounds
are in units of pixels in [0, 1], and 1 / std is part of every bound. The inner model is timm's own: its state dict has timm's
keys.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from . import timm_maxmin, timm_residual  # noqa: F401 (register their models with timm)

Statistics = tuple[float, ...]


class Normalize(nn.Module):
    """(x - mean) / std of every channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Statistics, std: Statistics) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch (n, channels, height, width)."""
        return (x - self.mean) / self.std


class PixelModel(nn.Module):
    """A model preceded by its input normalisation: takes images in [0, 1].

    Attributes:
        normalize: The normalisation.
        model: The inner model, with timm's own state dict keys.
    """

    def __init__(self, model: nn.Module, mean: Statistics, std: Statistics) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images in [0, 1], (n, channels, height, width)."""
        logits: Tensor = self.model(self.normalize(x))
        return logits


def load(
    name: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **kwargs: Any,
) -> PixelModel:
    """A timm model that takes pixels in [0, 1].

    Args:
        name: timm's model name.
        pretrained: Load timm's published weights through its hub, or those of ``pretrained_cfg_overlay=dict(file=...)``,
            with the head and the first convolution adapted by timm.
        checkpoint: A local checkpoint of the same model (.safetensors, or .pth read with weights_only), with timm's keys.
        num_classes: Classes of the head; default the model's own.
        in_chans: Channels of the input. The normalisation of a model published for another number of channels is averaged.
        mean: Mean of each channel, or one for all, that the weights were trained with; default timm's for the model.
        std: Standard deviation, like ``mean``; for weights trained on raw pixels, ``mean=(0,)`` and ``std=(1,)``.
        **kwargs: For ``timm.create_model``.

    Raises:
        ValueError: the name is unknown (similar ones are listed) or has no published weights, the checkpoint is missing or
            does not fit (the keys are named), or mean and std are not one for all channels or one for each.
    """
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(f"load({name!r}): timm has no such model; near: {', '.join(near) or 'none'}")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    try:
        model = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, **kwargs)
    except RuntimeError as error:
        if not pretrained or "No pretrained weights" not in str(error):
            raise
        raise ValueError(f"load({name!r}, pretrained=True): timm has no weights for it; give a checkpoint") from error
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if mean is None and std is None:
        return PixelModel(model.eval(), *_published(model, in_chans))
    return PixelModel(model.eval(), *_given(mean, std, in_chans))


def _published(model: nn.Module, channels: int) -> tuple[Statistics, Statistics]:
    """timm's mean and std of a model, averaged for another number of channels."""
    config = resolve_model_data_config(model)
    mean, std = config["mean"], config["std"]
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return mean, std


def _given(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> tuple[Statistics, Statistics]:
    """The user's mean and std, for every channel."""
    if mean is None or std is None:
        raise ValueError(f"load(mean={mean}, std={std}): give both; 0 and 1 for a model that takes raw pixels")
    both = [tuple(map(float, given)) * (channels if len(given) == 1 else 1) for given in (mean, std)]
    if any(len(given) != channels or not all(map(math.isfinite, given)) for given in both) or min(both[1], default=0.0) <= 0:
        raise ValueError(
            f"load(mean={tuple(mean)}, std={tuple(std)}): expected one number, or one for each of {channels} channels, "
            "std positive"
        )
    return both[0], both[1]


def load_weights(model: nn.Module, checkpoint: str | Path, advice: str = "") -> None:
    """Load a local checkpoint into a timm model; all keys and shapes must match, or the error ends with ``advice``.

    Raises:
        ValueError: the file is missing, is damaged, contains more than tensors, or does not fit the model.
    """
    if not Path(checkpoint).is_file():
        raise ValueError(f"checkpoint {str(checkpoint)!r}: no such file")
    try:
        found = timm.models.load_state_dict(str(checkpoint), device="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint {str(checkpoint)!r}: {unreadable(error, checkpoint)}") from error
    wanted = model.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in wanted]
    problems += [
        f"{key} is {tuple(found[key].shape)} where the model has {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        told = f"{'; '.join(problems[:5])}{more}{'; ' if advice else ''}{advice}"
        raise ValueError(f"checkpoint {str(checkpoint)!r}: does not fit the model: {told}")
    model.load_state_dict(found, strict=True)


def unreadable(error: Exception, path: str | Path) -> str:
    """A short text for an error in reading weights from a file, without torch's advice to trust the file."""
    if isinstance(error, PermissionError):
        return str(error)
    if "loading state_dict" in str(error):
        return f"does not fit the model: {' '.join(str(error).split())}"
    if isinstance(error, AttributeError) or "weights_only" in str(error):
        if Path(path).read_bytes()[:512].lstrip().startswith(b"<"):
            return "is a web page, not weights; download the file itself"
        return "contains more than tensors; save model.state_dict()"
    return "not readable as a checkpoint, it is damaged or cut off"
