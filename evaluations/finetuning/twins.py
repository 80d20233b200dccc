"""Twins: runs under one folder that differ in one setting, with the same start, data and budget, for comparison.

The command line makes two twins: ``clipped``, and ``plain``, the run trained without the defence.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..config import FinetuneConfig
from ..run_folder import read_json, write_json
from ..terminal import errors
from .process_group import ranks
from .training import finetune


def finetune_twins(configs: dict[str, FinetuneConfig], out: Path, *, resume: bool = False) -> None:
    """Fine-tune one run for each configuration, each into the subfolder of ``out`` with its name.

    Raises:
        ValueError: as `finetune`; or ``out`` contains a finished run already.
    """
    if (out / "run.json").exists() and not resume:
        raise ValueError(f"{out}: contains a finished run already; give another --out, nothing was overwritten")
    finished = {name for name in configs if (out / name / "run.json").exists()}
    if finished and not resume:
        raise ValueError(f"{out}: contains the finished twin {min(finished)!r}; continue with --resume, or give another --out")
    for name in finished:
        if not configs[name].is_that_of(read_json(out / name / "config.json")):
            raise ValueError(f"{out / name}: was finished with another configuration; nothing was overwritten")
    for place, (name, config) in enumerate(configs.items(), start=1):
        if name not in finished:
            if ranks().first:
                errors.print(f"twin {place} of {len(configs)}: {name}", highlight=False, markup=False)
            finetune(config, out / name, resume=resume)
    if not ranks().first:
        return
    write_json(out / "run.json", {"twins": list(configs), "configs": {name: asdict(c) for name, c in configs.items()}})
