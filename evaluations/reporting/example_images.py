"""Adversarial examples of a run as pictures for a page: the image, its adversarial version, and the difference, magnified.

The difference is drawn around middle grey, multiplied by the largest number of the series 1, 2, 5, 10 … that keeps it in range.
The page states this factor, without which the picture would not show how large the change is.
"""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

SHOWN = 8


def examples(folder: Path) -> list[dict[str, Any]]:
    """The first eight examples of a run, with their descriptions and as PNG data URIs; empty if the run stored none.

    Raises:
        ValueError: its examples.safetensors is damaged.
    """
    path = folder / "examples.safetensors"
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="numpy") as file:
            clean, adversarial = file.get_tensor("clean"), file.get_tensor("adversarial")
            told = json.loads((file.metadata() or {})["examples"])
        if not clean.ndim == 4 or clean.shape != adversarial.shape or len(told) != len(clean):
            raise ValueError(f"{path}: {clean.shape}, {adversarial.shape} and {len(told)} descriptions do not fit together")
        return [_example(*parts) for parts in list(zip(told, clean, adversarial, strict=True))[:SHOWN]]
    except (SafetensorError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: not readable: {type(error).__name__}: {error}") from error


def _example(told: dict[str, Any], clean: np.ndarray, adversarial: np.ndarray) -> dict[str, Any]:
    change = np.nan_to_num(adversarial - clean)
    factor = _factor(float(np.abs(change).max()))
    return {
        **{key: str(told.get(f"{key}_name", told.get(key, "unknown")))
           for key in ("sample", "label", "predicted", "attack", "norm")},
        "eps": None if told["eps"] is None else float(told["eps"]), "distance": float(told["distance"]),
        "factor": factor, "height": clean.shape[1],
        "clean": png(clean), "adversarial": png(adversarial), "change": png(0.5 + factor * change),
    }  # fmt: skip


def _factor(largest: float) -> int:
    """The largest number of 1, 2, 5, 10 … that keeps a change within half the range."""
    if largest <= 0:
        return 1
    room = max(0.5 / largest, 1.0)
    decade = 10 ** math.floor(math.log10(room))
    return int(max(digit for digit in (1, 2, 5) if digit * decade <= room or digit == 1) * decade)


def png(image: np.ndarray) -> str:
    """A picture (channels, height, width) in [0, 1] as a data URI; any number of channels except three is averaged to grey."""
    shown = image.transpose(1, 2, 0) if image.shape[0] == 3 else image.mean(axis=0)
    buffer = io.BytesIO()
    Image.fromarray((np.nan_to_num(shown).clip(0, 1) * 255).round().astype(np.uint8)).save(buffer, "PNG")
    return uri("image/png", buffer.getvalue())


def uri(kind: str, content: bytes) -> str:
    """A data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
