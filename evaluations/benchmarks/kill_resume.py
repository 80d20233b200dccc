"""Fine-tuning runs killed at random moments and resumed, until they end: do they end with the very weights of one left alone?

    python evaluations/benchmarks/kill_resume.py --kills 50 --out evaluations/benchmarks/results/kill_resume.json

Every run is a process of its own, ended by SIGKILL after a random time and started again with ``resume``, until it is
complete; then the next run begins, until so many kills are done. Moments range over all that a run does: starting, training,
writing its state, the final clip, and writing the files that make it complete.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetune import finetune
from robust_spectral.evaluations.runs import environment, file_hash, write_json

CONFIG = FinetuneConfig(
    model="test_resnet", data="digits", epochs=4, freeze_bn=True, max_norm=2.0, logit_scale=10.0, model_ema=True, seed=3
)


def started(out: Path) -> int:
    """A process that fine-tunes into a folder, or goes on where one was killed; its id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            finetune(CONFIG, out, resume=True)
            status = 0
        finally:
            os._exit(status)
    return process


def ended(process: int, seconds: float) -> int | None:
    """The exit status of a process that ends by itself within some seconds; None of one that had to be killed."""
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


def main() -> None:
    """Kill and resume, print a line for each complete run, write JSON. Exit status 1 where one fails or differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    kills, runs, failures = 0, 0, list[int]()
    with tempfile.TemporaryDirectory() as scratch:
        whole, clock = Path(scratch) / "whole", time.monotonic()
        if ended(started(whole), 600) != 0:
            raise SystemExit("the run that is left alone failed")
        duration, weights = time.monotonic() - clock, file_hash(whole / "model.safetensors")
        print(f"left alone: {duration:.1f} s, model sha256 {weights[:12]}", flush=True)
        same = 0
        while kills < options.kills:
            folder, before = Path(scratch) / str(runs), kills
            while (code := ended(started(folder), draw.uniform(0.05, 0.6 * duration))) is None:
                kills += 1
            failures += [code] if code else []
            runs += 1
            same += code == 0 and file_hash(folder / "model.safetensors") == weights
            print(f"run {runs}: {kills - before} kills, exit status {code}, {same} of {runs} with the same weights", flush=True)
    if options.out:
        write_json(options.out, {"kills": kills, "runs": runs, "same_weights": same, "failures": failures,
                                 "seconds_left_alone": duration, **environment()})  # fmt: skip
    raise SystemExit(0 if same == runs else 1)


if __name__ == "__main__":
    main()
