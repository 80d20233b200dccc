"""Units of work of an evaluation and their records: one immutable file for each unit, written atomically.

A unit of work is one task on one block of images of one model: an attack at one size, the clean logits, the Lipschitz bound or
the checks, with everything that the result depends on. The name of its file contains a digest of this description, and the
file the description itself, which is checked when it is read. Units can therefore be done in any order, on any machine, twice
or again after a kill, and the merged result is the same.
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
_SCHEMA = 2  # version of the files; 1, before eps could be null and distances inf, is without a number, and is read as well


@dataclass(frozen=True)
class Unit:
    """One unit of work.

    Attributes:
        model_sha256: The sha256 of the weights.
        data_sha256: The sha256 of all test images and labels.
        task: An attack's name, or "clean", "lipschitz" or "gates".
        config: The task's configuration in full: class, budget, norm, eps (null if it is minimised), version.
        start: Place of the first image of the block in the order of the images.
        stop: Place after the last image of the block.
        seed: Seed of the attack's random draws.
        sample_order: The record of the order of the images; None for the data set's own order.
    """

    model_sha256: str
    data_sha256: str
    task: str
    config: dict[str, Any]
    start: int
    stop: int
    seed: int
    sample_order: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The full description of the unit, as JSON with sorted keys; without an order, as before orders were recorded."""
        return json.dumps({k: v for k, v in asdict(self).items() if (k, v) != ("sample_order", None)}, sort_keys=True)

    def path(self, folder: Path) -> Path:
        """The path of the unit's record in a run folder."""
        level = "".join(f"-{self.config[key]:g}" if key == "eps" else f"-{self.config[key]}" for key in ("norm", "eps")
                        if self.config.get(key) is not None)  # fmt: skip
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:12]
        return folder / FOLDER / f"{self.task}{level}-{self.start:06d}-{digest}.safetensors"


@dataclass(frozen=True)
class Record:
    """The result of a unit: tensors, and further values for JSON."""

    tensors: dict[str, Tensor]
    told: dict[str, Any]


def write_record(folder: Path, unit: Unit, record: Record, seconds: float, hardware: Any) -> None:
    """Write a unit's record, and next to it a JSON file with its seconds and hardware, which differ between repetitions."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in record.tensors.items()}
    content = {"schema": _SCHEMA, "unit": json.loads(unit.text), "told": record.told}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    path = unit.path(folder)
    write_json(path.with_suffix(".json"), {"seconds": round(seconds, 3), "hardware": hardware})
    write_atomically(path, lambda scratch: safetensors.torch.save_file(tensors, scratch, metadata={"record": text}))


def read_told(folder: Path, unit: Unit) -> dict[str, Any] | None:
    """The JSON values of a unit's record, without its tensors; None if there is no record.

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
    """The record of a unit; None if there is none.

    Raises:
        ValueError: as `read_told`.
    """
    told = read_told(folder, unit)
    return None if told is None else Record(safetensors.torch.load_file(unit.path(folder)), told)


def seconds_of(folder: Path, unit: Unit) -> float:
    """Seconds that a unit took; 0 if they are not recorded."""
    path = unit.path(folder).with_suffix(".json")
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else 0.0


def refuse_foreign(folder: Path, model_sha256: str, data_sha256: str) -> None:
    """Check that the records in a folder are of this model and these images.

    Raises:
        ValueError: a record is of another model or other images, or is not readable.
    """
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        unit = _metadata(path)["unit"]
        for what, wanted in (("model", model_sha256), ("data", data_sha256)):
            if unit[f"{what}_sha256"] != wanted:
                raise ValueError(
                    f"{path}: contains verdicts on another {what} ({unit[f'{what}_sha256'][:12]}… not {wanted[:12]}…); "
                    "evaluate in another folder, or remove the records"
                )


def recorded_orders(folder: Path, unnamed: str) -> set[str]:
    """The names of the orders of images in the records of a run folder; ``unnamed`` for records without one.

    Raises:
        ValueError: a record is not readable.
    """
    units = [_metadata(path)["unit"] for path in sorted((folder / FOLDER).glob("*.safetensors"))]
    return {unit["sample_order"]["name"] if "sample_order" in unit else unnamed for unit in units}


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            content: dict[str, Any] = json.loads(file.metadata()["record"])
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as a record ({error}); remove it, and it is made again") from error
    if content.get("schema", 1) > _SCHEMA:
        raise ValueError(f"{path}: was written by a newer version of this package; update it, or evaluate in another folder")
    return content
