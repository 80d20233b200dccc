"""Jobs killed at random moments and restarted until they end: do they leave exactly the files of an uninterrupted job?

    python evaluations/benchmarks/kill_resume.py --kills 50 --out kill_resume.json
    python evaluations/benchmarks/kill_resume.py --job evaluate --kills 20 --out kill_evaluate.json

Every job is a process of its own, ended by SIGKILL after a random time and restarted, until it is complete; then the next one
begins, until the given number of kills is reached. The moments range over everything that a job does: for a fine-tuning the
start, training, writing its state, the final clip, and writing the files that complete it; for an evaluation every unit of
work, and the merge.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from robust_spectral.evaluations.attacking import AttackPlan, evaluate
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning import finetune
from robust_spectral.evaluations.run_folder import environment, file_hash, write_json

CONFIG = FinetuneConfig(
    model="test_resnet", data="digits", epochs=4, freeze_bn=True, max_norm=2.0, logit_scale=10.0, model_ema=True, seed=3
)
PLANS = [AttackPlan("pgd", "l2", (0.5, 1.0), 160), AttackPlan("autoattack", "linf", (0.1,), 32)]


def attack(folder: Path, base: Path) -> None:
    """Evaluate a copy of a finished run; the first process makes the copy, whole or not at all."""
    if not folder.exists():
        half = folder.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(base, half)
        os.replace(half, folder)
    evaluate(folder, PLANS, block=32, gate_samples=16, say=lambda text: None)


def verdicts(folder: Path) -> str:
    """One hash of all records of verdicts and the table made of them."""
    paths = sorted([*(folder / "records").glob("*.safetensors"), folder / "samples.parquet"])
    return hashlib.sha256("".join(path.name + file_hash(path) for path in paths).encode()).hexdigest()


def started(job: Callable[[Path], object], out: Path) -> int:
    """Start a process that does a job into a folder, or continues it after a kill; return the id of the process."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            job(out)
            status = 0
        finally:
            os._exit(status)
    return process


def ended(process: int, seconds: float) -> int | None:
    """The exit status of a process that ends by itself within the given seconds; None if it had to be killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def jobs(scratch: Path) -> dict[str, tuple[Callable[[Path], object], Callable[[Path], str]]]:
    """Each job by name: a function that does it into a folder, and a function that hashes its result."""
    base = scratch / "base"
    if ended(started(lambda out: finetune(CONFIG, out, resume=True), base), 600) != 0:
        raise SystemExit("the run to evaluate failed")
    return {
        "finetune": (lambda out: finetune(CONFIG, out, resume=True), lambda out: file_hash(out / "model.safetensors")),
        "evaluate": (lambda out: attack(out, base), verdicts),
    }


def main() -> None:
    """Kill and resume, print a line for each complete run, write JSON. Exit status 1 if a run fails or differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=("finetune", "evaluate"), default="finetune")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    kills, runs, failures = 0, 0, list[int]()
    with tempfile.TemporaryDirectory() as scratch:
        job, result = jobs(Path(scratch))[options.job]
        whole, clock = Path(scratch) / "whole", time.monotonic()
        if ended(started(job, whole), 600) != 0:
            raise SystemExit("the uninterrupted job failed")
        duration, expected = time.monotonic() - clock, result(whole)
        print(f"uninterrupted: {duration:.1f} s, sha256 {expected[:12]}", flush=True)
        same = 0
        while kills < options.kills:
            folder, before = Path(scratch) / str(runs), kills
            while (code := ended(started(job, folder), draw.uniform(0.05, 0.6 * duration))) is None:
                kills += 1
            failures += [code] if code else []
            runs += 1
            same += code == 0 and result(folder) == expected
            print(f"run {runs}: {kills - before} kills, exit status {code}, {same} of {runs} with the same files", flush=True)
    if options.out:
        write_json(options.out, {"job": options.job, "kills": kills, "runs": runs, "same_files": same, "failures": failures,
                                 "seconds_left_alone": duration, **environment()})  # fmt: skip
    raise SystemExit(0 if same == runs else 1)


if __name__ == "__main__":
    main()
