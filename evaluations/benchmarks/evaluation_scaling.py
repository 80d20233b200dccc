"""Speed-up of an evaluation by a second process, and the cost of a block: figures for planning large evaluations.

    python evaluations/benchmarks/evaluation_scaling.py runs/demo/clipped --out scaling.json

The same units of work are done by one process with one thread, then by two processes with one thread each, start-up included.
Efficiency is the time of one process over twice the time of two. Needs two idle cores. The size of the records on disk is
reported as well.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from robust_spectral.evaluations.attacking import AttackPlan, make_engine, open_subject, plan_work, run_units
from robust_spectral.evaluations.run_folder import environment, open_run, write_json


def done(folder: Path, plans: list[AttackPlan], workers: int, block: int) -> tuple[float, dict[str, float]]:
    """Seconds that the attacks of an evaluation take, and kilobytes of its records by task."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "run"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("records"))
        subject = open_subject(open_run(copy), "cpu")
        work = plan_work(subject.run.record, subject.data.tests, plans, 0, block, 1)
        units = [unit for unit in work.units if unit.task in {plan.attack for plan in plans}]
        clock = time.perf_counter()
        run_units(make_engine("local", workers), copy, units, "cpu", lambda unit: None)
        seconds = time.perf_counter() - clock
        weight: dict[str, float] = {}
        for unit in units:
            weight[unit.task] = weight.get(unit.task, 0.0) + unit.path(copy).stat().st_size / 1024
        return seconds, weight


def main() -> None:
    """Time one process and two, print a line for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--autoattack-samples", type=int, default=128)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plans = [AttackPlan("pgd", "l2", (0.5, 1.0, 1.5), options.samples),
             AttackPlan("autoattack", "l2", (1.0,), options.autoattack_samples)]  # fmt: skip
    seconds, weight = {}, {}
    for workers in (1, 2):
        seconds[workers], weight = done(options.run, plans, workers, options.block)
        print(f"{workers} processes: {seconds[workers]:.1f} s", flush=True)
    efficiency = seconds[1] / (2 * seconds[2])
    print(f"efficiency of two: {efficiency:.3f}; records, kB: {weight}")
    if options.out:
        write_json(options.out, {
            "model": options.run.name, "samples": options.samples, "autoattack_samples": options.autoattack_samples,
            "block": options.block, "seconds": {str(workers): value for workers, value in seconds.items()},
            "efficiency": efficiency, "records_kB": weight, **environment(),
        })  # fmt: skip


if __name__ == "__main__":
    main()
