"""The run folder: the only thing through which the stages of an evaluation talk.

    run.json          configuration, versions, hashes, seed, hardware      training.jsonl   one row a log step
    model.safetensors the model's weights, with timm's keys                samples.parquet  one row per sample, attack and eps
    report.json       the figures                                          report.html      the page

A run with twins holds a folder for each under it, and its own run.json names them. Every file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import safetensors.torch
import torch
from torch import Tensor, nn

from robust_spectral import __version__

PACKAGES = ("torch", "timm", "adversarial-robustness-toolbox", "pyautoattack", "numpy", "scipy")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a file beside ``path``, then put it in place in one step, on disk before it counts.

    Raises:
        ValueError: its folder cannot be made.
    """
    make_folder(path.parent)
    scratch = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        write(scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_folder(folder: Path) -> None:
    """Make a folder, and those it lies in, where they are not there.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written, give another place for it ({error.strerror})") from error


def remove_scratch(folder: Path, older_than: float = 3600.0) -> None:
    """Remove what writers that were killed have left half done in a folder; those of the last hour may still be at it."""
    for scratch in folder.glob(".*.part"):
        if time.time() - scratch.stat().st_mtime > older_than:
            scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that any reader takes: no NaN, no infinity (they become null)."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whatever the machine's own encoding."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        ValueError: it is missing or cut short.
    """
    if not path.is_file():
        raise ValueError(f"{path}: not there; is {path.parent} a finished run folder?")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error


def save_weights(model: nn.Module, path: Path) -> str:
    """Save a model's state dict as safetensors; returns the sha256 of the file."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda scratch: safetensors.torch.save_file(state, str(scratch)))
    return file_hash(path)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def all_finite(state: dict[str, Tensor]) -> bool:
    """Whether every floating-point tensor of a state dict is finite."""
    return all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())


def check_device(device: str) -> None:
    """Raise ValueError unless torch can put tensors on the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r}: not to be had here: {str(error).splitlines()[0]}") from error


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions and hardware that a run on a device was made with."""
    versions = {"robust_spectral": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return {"versions": versions, "hardware": {"machine": platform.machine(), "device": name}}


@dataclass(frozen=True)
class Run:
    """A finished run, opened once: its folder and its record.

    Attributes:
        folder: The run folder.
        record: Content of its run.json.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def has_twins(self) -> bool:
        """Whether the folder holds several runs to compare, each in a folder of its own."""
        return bool(self.record.get("twins"))

    @property
    def models(self) -> dict[str, Run]:
        """The twins of a run that has some, opened, by name; else the run itself, under the name "model".

        Raises:
            ValueError: as `open_run`, of a twin.
        """
        return {name: open_run(self.folder / name) for name in self.record["twins"]} if self.has_twins else {"model": self}

    @property
    def evaluated(self) -> bool:
        """Whether there is a report.json."""
        return (self.folder / "report.json").is_file()

    def report(self) -> dict[str, Any]:
        """The content of report.json.

        Raises:
            ValueError: the run has not been evaluated, or the file is cut short.
        """
        if not self.evaluated:
            raise ValueError(f"{self.folder}: not evaluated yet; run `robust-spectral evaluate` on it first")
        report: dict[str, Any] = read_json(self.folder / "report.json")
        return report


def open_run(folder: Path) -> Run:
    """Open a run folder.

    Raises:
        ValueError: the folder is missing, is not a run, or is one whose training was interrupted.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    if not (folder / "run.json").is_file():
        if begun(folder) or begun(folder / "plain"):  # the first twin
            raise ValueError(
                f"{folder}: the training was interrupted; go on with the same `robust-spectral finetune … --resume`"
            )
        if (folder / "config.json").is_file():
            raise ValueError(f"{folder}: is no run; a model that timm saved is timm/local-dir:{folder}, spectrum: --pretrained")
        raise ValueError(f"{folder}: not a finished run: it has no run.json (make one with `robust-spectral finetune`)")
    return Run(folder, read_json(folder / "run.json"))


def begun(folder: Path) -> bool:
    """Whether a folder has the configuration of a fine-tuning, and not another program's under the same name."""
    path = folder / "config.json"
    return path.is_file() and {"model", "data"} <= set(read_json(path))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if (isinstance(value, float) and value in (float("inf"), float("-inf"))) or value != value:
        return None
    return value
