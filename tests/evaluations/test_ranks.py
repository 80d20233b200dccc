"""Fine-tuning under torchrun: two processes train as one does and write the run once."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning.process_group import Ranks, Shares
from robust_spectral.evaluations.finetuning.training import finetune
from robust_spectral.evaluations.models.loading import load_run

CONFIG = {"model": "maxmin_mlp", "data": "digits", "image_size": 28, "epochs": 2, "batch_size": 64, "logit_scale": 5.0,
          "opt": "sgd", "lr": 1e-2, "seed": 1}  # fmt: skip


def torchrun(out: Path, **changes: object) -> subprocess.CompletedProcess:
    options = [text for key, value in (CONFIG | changes).items() for text in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511",
               "-m", "robust_spectral.evaluations", "finetune", *options, "--out", str(out)]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("max_norm", "furthest"), [(math.inf, 1e-6), (1.0, 1e-3)], ids=["plain", "clipped"])
def test_two_processes_train_as_one_does_and_end_with_norms_at_most_the_target(
    max_norm: float, furthest: float, tmp_path: Path
) -> None:
    done = torchrun(tmp_path / "two", max_norm=max_norm)
    assert done.returncode == 0, done.stderr
    finetune(FinetuneConfig(**CONFIG, max_norm=max_norm), tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    apart = [abs(a - b) for a, b in zip(one, two, strict=True)]
    assert max(apart[:2]) <= 1e-6 and max(apart) <= furthest  # rounding decides which of tied singular directions is clipped
    assert two[-1] < two[0] / 2
    _, _, run = load_run(tmp_path / "two")
    assert math.isinf(max_norm) or max(row["upper"] for row in run["layers"]) <= 1.001 * max_norm
    assert done.stdout.count("run: ") == 1


def test_a_batch_size_that_processes_cannot_share_is_a_one_line_error(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "run", batch_size=63)
    assert done.returncode != 0 and "must be a multiple of the 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_shares_of_all_processes_partition_the_batches_of_one_process(count: int) -> None:
    whole = list(Shares(range(10), 4, torch.Generator().manual_seed(0), True, Ranks(0, 1)))  # type: ignore[arg-type]
    parts = [list(Shares(range(10), 4, torch.Generator().manual_seed(0), True, Ranks(r, count))) for r in range(count)]  # type: ignore[arg-type]
    assert len(whole) == 2
    for index, batch in enumerate(whole):
        assert sorted(i for part in parts for i in part[index]) == sorted(batch)
