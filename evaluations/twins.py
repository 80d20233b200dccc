"""Runs that differ in one thing, under one folder: the same start, data and budget, so that they can be compared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from .finetune import FinetuneConfig, finetune
from .runs import write_json


def finetune_twins(configs: dict[str, FinetuneConfig], out: Path, *, resume: bool = False) -> None:
    """Fine-tune one run for each configuration, into folders under ``out`` that bear their names.

    Raises:
        ValueError: as `finetune`; ``out`` holds a finished run already.
    """
    if (out / "run.json").exists():
        raise ValueError(f"{out}: holds a finished run already; give another --out, nothing was overwritten")
    for name, config in configs.items():
        if resume and (out / name / "run.json").exists():
            continue
        finetune(config, out / name, resume=resume and (out / name).exists())
    write_json(out / "run.json", {"twins": list(configs), "configs": {name: asdict(c) for name, c in configs.items()}})
