"""Adversarial images as RobustBench requires them from an attack that beats AutoAttack: one tensor over the whole test set.

Images of a part of the test set, outside the pixel box or beyond eps prove nothing, so all of this is checked, distances in
float64, before anything is written.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

TEST_SETS = {"cifar10": (10_000, 3, 32, 32), "cifar100": (10_000, 3, 32, 32), "imagenet": (5_000, 3, None, None)}
_NORMS = {"L2": 2.0, "Linf": math.inf}
_ROUNDING = 2.0**-23  # the distance by which float32 arithmetic may move a pixel out of the ball


def save_adversarial(images: Tensor, clean: Tensor, path: str | Path, board: str, eps: str) -> Path:
    """Write adversarial images to a ``.pt`` file that ``torch.load(..., weights_only=True)`` reads.

    Distances are computed in float64, and may exceed eps by what float32 rounding explains: 2^-23 for each pixel.

    Args:
        images: One for each test image, in order, (n, 3, height, width), float32, in [0, 1]; the clean image where no attack
            succeeded.
        clean: The test images, of the same shape, in [0, 1].
        path: Where to write, ending in ``.pt``.
        board: ``<dataset>/<threat model>``: of cifar10, cifar100 or imagenet, and L2 or Linf.
        eps: Size of the perturbation as RobustBench writes it, such as "8/255" or "0.5".

    Raises:
        ValueError: one of these requirements is not met; the farthest image is named.
    """
    path = Path(path)
    dataset, _, threat_model = board.partition("/")
    found = _option_problems(path, dataset, threat_model, eps) or _shape_problems(images, clean, dataset)
    found = found or _pixel_problems(images, clean, threat_model, eps)
    if found:
        raise ValueError(f"save_adversarial: {'; '.join(found)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    torch.save(images.detach().cpu().clone(memory_format=torch.contiguous_format), scratch)
    os.replace(scratch, path)
    return path


def _option_problems(path: Path, dataset: str, threat_model: str, eps: str) -> list[str]:
    found = [] if path.suffix == ".pt" else [f"path is {str(path)!r}; it must end in .pt"]
    if dataset not in TEST_SETS or threat_model not in _NORMS:
        found.append(f"there is no board {dataset}/{threat_model}; datasets: {', '.join(TEST_SETS)}, threat models: L2, Linf")
    try:
        positive = isinstance(eps, str) and Fraction(eps) > 0
    except (ValueError, ZeroDivisionError):
        positive = False
    return found if positive else [*found, f"eps is {eps!r}; expected a positive size as a text, such as '8/255'"]


def _shape_problems(images: Tensor, clean: Tensor, dataset: str) -> list[str]:
    shape, wanted = tuple(images.shape), TEST_SETS[dataset]
    found = []
    if len(shape) != 4 or any(w is not None and s != w for s, w in zip(shape, wanted, strict=True)):
        text = ", ".join(map(str, wanted)).replace("None, None", "height, width")
        found.append(f"images are {shape}; the whole test set of {dataset} is ({text})")
    if images.shape != clean.shape:
        found.append(f"images are {shape}, the clean ones {tuple(clean.shape)}; give one for each")
    if images.dtype != torch.float32:
        found.append(f"images are {images.dtype}; cast them to float32 and predict them again")
    if not clean.is_floating_point():
        found.append(f"the clean images are {clean.dtype}; give floating point in [0, 1]")
    return found


def _pixel_problems(images: Tensor, clean: Tensor, threat_model: str, eps: str) -> list[str]:
    parts = zip(images.detach().split(500), clean.detach().split(500), strict=True)
    measured = [
        _measure(part.cpu().double().flatten(1), origin.cpu().double().flatten(1), threat_model) for part, origin in parts
    ]
    inside, distance = (torch.cat(column) for column in zip(*measured, strict=True))
    if not bool(inside.all()):
        first = int((~inside).int().argmax())
        return [f"{int((~inside).sum())} images or their clean ones leave [0, 1], the first is number {first}; clamp them"]
    slack = _ROUNDING * (math.sqrt(math.prod(images.shape[1:])) if threat_model == "L2" else 1)
    far = int((distance > float(Fraction(eps)) + slack).sum())
    worst = f"the farthest is number {int(distance.argmax())}, at {float(distance.max()):.6g}"
    advice = "project them and predict again"
    return [f"{far} images are farther than {eps} ({threat_model}) from the clean ones; {worst}; {advice}"] if far else []


def _measure(images: Tensor, clean: Tensor, threat_model: str) -> tuple[Tensor, Tensor]:
    """For each image, (n, pixels): whether it and the clean one lie in the box, and their distance."""
    inside = ((images >= 0) & (images <= 1) & (clean >= 0) & (clean <= 1)).all(1)
    return inside, torch.linalg.vector_norm(images - clean, ord=_NORMS[threat_model], dim=1)
