"""The smallest model of every timm family: layers found, a clip, and the Lipschitz bound or the reason why there is none.

    python evaluations/benchmarks/timm_census.py --out evaluations/benchmarks/results/timm_census.json

Weights are random; the input is 64 x 64 if the model takes it, else of the model's own size. Each model has a process of its
own, with a time limit. A census that was stopped continues with the families that its file lacks.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import robust_spectral as rs
from robust_spectral.evaluations.run_folder import environment, write_json


def smallest_models() -> dict[str, str]:
    """The model with the fewest parameters of every family, {family: name}."""
    found: dict[str, tuple[int, str]] = {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in timm.list_modules():
            for name in timm.list_models(module=family):
                if name.startswith("test_"):
                    continue
                try:
                    size = sum(p.numel() for p in timm.create_model(name).parameters())
                except Exception:  # noqa: BLE001 - not on the meta device
                    continue
                found[family] = min(found.get(family, (size, name)), (size, name))
    return {family: name for family, (_, name) in found.items()}


def shape_of(model: Any) -> tuple[int, ...]:
    """64 x 64 if the model takes it, else its own input size."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        return 3, 64, 64
    except Exception:  # noqa: BLE001
        return tuple(model.pretrained_cfg["input_size"])


def entry(name: str) -> dict[str, Any]:
    """The row of one model: for each part its result, or the error it ended with."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for key, parameter in model.named_parameters():  # weights that start at zero would make many bounds trivial
        if not parameter.any() and not key.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    shape = shape_of(model)
    example = torch.zeros(1, *shape)
    row: dict[str, Any] = {"model": name, "input": shape, "parameters": sum(p.numel() for p in model.parameters())}

    def attempt(key: str, part: Callable[[], dict[str, Any]]) -> None:
        started = time.perf_counter()
        try:
            row.update(part())
        except Exception as error:  # noqa: BLE001 - the table gives the error
            row[key] = f"{type(error).__name__}: {str(error)[:200]}"
        row[f"{key}_seconds"] = round(time.perf_counter() - started, 1)

    def layers() -> dict[str, Any]:
        found = rs.linear_layers(model, example)
        return {"layers": len(found), "composites": sum(layer.batchnorm is not None for layer in found)}

    def clip() -> dict[str, Any]:
        clipper = rs.FastClip(model, example, 0.9, relative=True)
        for _ in range(3):
            clipper.step()
        return {"clip": "ok", "clipped": len(clipper.layers)}

    def bound() -> dict[str, Any]:
        found = rs.lipschitz_bound(model, example)
        local = found.local if math.isfinite(found.local) else None
        return {"bound": found.value if math.isfinite(found.value) else None, "local": local, "reason": found.reason}

    attempt("discovery", layers)
    print(json.dumps(row), flush=True)
    attempt("bound", bound)
    print(json.dumps(row), flush=True)
    attempt("clip", clip)
    print(json.dumps(row), flush=True)
    return row


def measured(name: str, limit: int) -> dict[str, Any]:
    """The row of a model from a process of its own, with the parts that were finished within ``limit`` seconds."""
    command = [sys.executable, "-W", "ignore", __file__, "--model", name]
    try:
        output, stopped = subprocess.run(command, capture_output=True, text=True, timeout=limit).stdout, None
    except subprocess.TimeoutExpired as expired:
        output, stopped = (expired.stdout or b"").decode(), f"stopped after {limit} s"
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return {**(json.loads(lines[-1]) if lines else {"model": name}), "stopped": stopped}


def main() -> None:
    """Measure every family that the file lacks, print a line for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--families", nargs="*", help="default all")
    parser.add_argument("--limit", type=int, default=180, help="seconds for a model")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        torch.set_num_threads(1)
        entry(options.model)
        return
    rows: dict[str, dict[str, Any]] = {}
    if options.out and options.out.is_file():
        rows = {row["family"]: row for row in json.loads(options.out.read_text())["rows"]}
    models = smallest_models()
    for family in options.families or sorted(models.keys() - rows.keys()):
        rows[family] = row = {"family": family, **measured(models[family], options.limit)}
        shown = [f"{key} {row.get(key, '-')}" for key in ("layers", "clip", "bound", "local")]
        print(f"{family:24s} {row['model']:34s}", *shown, str(row.get("reason") or row["stopped"] or "")[:160], flush=True)
        if options.out:  # after every row, so that a stop loses none
            write_json(options.out, {"rows": [rows[name] for name in sorted(rows)], **environment()})
    kinds = {
        "discovered": lambda row: "layers" in row,
        "clipped": lambda row: row.get("clip") == "ok",
        "with a global bound": lambda row: row.get("bound"),
        "with a global or a local bound": lambda row: row.get("bound") or row.get("local"),
    }
    print(f"{len(rows)} families:", *[f"{sum(map(bool, map(is_so, rows.values())))} {kind}" for kind, is_so in kinds.items()])


if __name__ == "__main__":
    main()
