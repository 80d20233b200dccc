"""Units of an evaluation's work and what is known of each: one immutable file a unit, whole or not there at all.

A unit is an attack on a block of images of one model, with everything its outcome depends on. Its file's name holds a digest
of all that, and the file the full text, which is checked when it is read. So units can be done in any order, on any machine,
twice or after a kill, and what is merged in the end is the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..run_folder import write_atomically, write_json

FOLDER = "records"


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        model_sha256: Of the weights.
        data_sha256: Of all test images and labels.
        task: An attack's name, or "clean", "lipschitz" or "gates".
        config: The task's configuration in full: class, budget, norm, eps, version.
        start: First image of the block.
        stop: The image behind its last.
        seed: Of the attack's random draws.
    """

    model_sha256: str
    data_sha256: str
    task: str
    config: dict[str, Any]
    start: int
    stop: int
    seed: int

    @property
    def text(self) -> str:
        """The unit in full, always in the same words."""
        return json.dumps(asdict(self), sort_keys=True)

    def path(self, folder: Path) -> Path:
        """Its file in a run folder."""
        level = "".join(f"-{self.config[key]:g}" if key == "eps" else f"-{self.config[key]}" for key in ("norm", "eps")
                        if key in self.config)  # fmt: skip
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:12]
        return folder / FOLDER / f"{self.task}{level}-{self.start:06d}-{digest}.safetensors"


@dataclass(frozen=True)
class Record:
    """What came of a unit: tensors, and what else is told of it in JSON."""

    tensors: dict[str, Tensor]
    told: dict[str, Any]


def write_record(folder: Path, unit: Unit, record: Record, seconds: float, hardware: Any) -> None:
    """Write a unit's file; beside it, what may differ between two runs of the same: how long it took, and where."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in record.tensors.items()}
    text = json.dumps({"unit": json.loads(unit.text), "told": record.told}, sort_keys=True, allow_nan=False)
    path = unit.path(folder)
    write_json(path.with_suffix(".json"), {"seconds": round(seconds, 3), "hardware": hardware})
    write_atomically(path, lambda scratch: safetensors.torch.save_file(tensors, scratch, metadata={"record": text}))


def read_told(folder: Path, unit: Unit) -> dict[str, Any] | None:
    """What is told of a unit, without its tensors; None where it was not done yet.

    Raises:
        ValueError: the file is not readable, or is of another unit.
    """
    path = unit.path(folder)
    if not path.is_file():
        return None
    content = _metadata(path)
    if content["unit"] != json.loads(unit.text):
        raise ValueError(f"{path}: is the record of another model, attack, size or block than its name says; remove it")
    told: dict[str, Any] = content["told"]
    return told


def read_record(folder: Path, unit: Unit) -> Record | None:
    """All that is known of a unit; None where it was not done yet.

    Raises:
        ValueError: as `read_told`.
    """
    told = read_told(folder, unit)
    return None if told is None else Record(safetensors.torch.load_file(unit.path(folder)), told)


def seconds_of(folder: Path, unit: Unit) -> float:
    """How long a unit took; 0 where that is not known."""
    path = unit.path(folder).with_suffix(".json")
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else 0.0


def refuse_foreign(folder: Path, model_sha256: str, data_sha256: str) -> None:
    """See that a folder's records are of this model and these images.

    Raises:
        ValueError: one is not, or is not readable.
    """
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        unit = _metadata(path)["unit"]
        for what, wanted in (("model", model_sha256), ("data", data_sha256)):
            if unit[f"{what}_sha256"] != wanted:
                raise ValueError(
                    f"{path}: holds verdicts on another {what} ({unit[f'{what}_sha256'][:12]}… not {wanted[:12]}…); "
                    "evaluate into a folder of its own, or remove the records"
                )


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            content: dict[str, Any] = json.loads(file.metadata()["record"])
            return content
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as a record ({error}); remove it, and it is made anew") from error
