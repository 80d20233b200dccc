"""The run folder, through which the stages of an evaluation exchange all their data.

    run.json          configuration, versions, hashes, seed, hardware      training.jsonl   one row for each log step
    model.safetensors the model's weights, with timm's keys                samples.parquet  one row per sample, attack and size
    report.json       the figures                                          report.html      the page

A run with twins (runs that differ in one setting) has a subfolder for each, and its own run.json lists their names. Every file
is written atomically: it appears whole or not at all.
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

PACKAGES = ("torch", "timm", "adversarial-robustness-toolbox", "pyautoattack", "foolbox", "numpy", "scipy")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a scratch file next to ``path``, sync it to disk, then rename it to ``path`` in one step.

    Raises:
        ValueError: the folder of ``path`` cannot be made.
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
    """Make a folder and its missing parents.

    Raises:
        ValueError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written, give another place for it ({error.strerror})") from error


def remove_scratch(folder: Path, older_than: float = 3600.0) -> None:
    """Remove the scratch files of killed writers from a folder, except recent ones, which may be in use.

    Args:
        folder: The folder.
        older_than: Age in seconds from which files are removed.
    """
    for scratch in folder.glob(".*.part"):
        if time.time() - scratch.stat().st_mtime > older_than:
            scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that any reader accepts: NaN and infinities become null."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, independently of the machine's encoding."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        ValueError: the file is missing or cut short.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {path.parent} a finished run folder?")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error


def save_weights(model: nn.Module, path: Path) -> str:
    """Save a model's state dict as safetensors and return the sha256 of the file."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda scratch: safetensors.torch.save_file(state, str(scratch)))
    return file_hash(path)


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def all_finite(state: dict[str, Tensor]) -> bool:
    """Whether every floating-point tensor of a state dict is finite."""
    return all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())


def check_device(device: str) -> None:
    """Raise ValueError unless torch can put tensors on the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r}: not available here: {str(error).splitlines()[0]}") from error


def environment(device: str = "cpu") -> dict[str, Any]:
    """The versions of packages and the hardware of a run on a device."""
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
    """A finished run: its folder and its record.

    Attributes:
        folder: The run folder.
        record: The content of its run.json.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def has_twins(self) -> bool:
        """Whether the folder contains several runs to compare, each in a subfolder."""
        return bool(self.record.get("twins"))

    @property
    def models(self) -> dict[str, Run]:
        """The opened twins by name; for a run without twins the run itself, under the name "model".

        Raises:
            ValueError: as `open_run`, for a twin.
        """
        return {name: open_run(self.folder / name) for name in self.record["twins"]} if self.has_twins else {"model": self}

    @property
    def evaluated(self) -> bool:
        """Whether the run has a report.json."""
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
        ValueError: the folder is missing, is not a run, or contains an interrupted training.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    if not (folder / "run.json").is_file():
        if begun(folder) or begun(folder / "plain"):  # the first twin
            raise ValueError(
                f"{folder}: the training was interrupted; continue with the same `robust-spectral finetune … --resume`"
            )
        if (folder / "config.json").is_file():
            raise ValueError(
                f"{folder}: is no run; a model that timm saved is timm/local-dir:{folder} (for spectrum: add --pretrained)"
            )
        raise ValueError(f"{folder}: not a finished run: it has no run.json (make one with `robust-spectral finetune`)")
    return Run(folder, read_json(folder / "run.json"))


def begun(folder: Path) -> bool:
    """Whether a folder's config.json is the configuration of a fine-tuning, not of another program."""
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
