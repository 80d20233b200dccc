"""Fine-tuning in several processes, as torchrun starts them: the rank of this process, and communication between all.

Every process has the whole model and the same state, and takes its share of every batch; gradients are averaged. The result is
that of one process with whole batches, up to rounding and to batch statistics, which each process computes on its own share.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Dataset, RandomSampler


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes."""

    rank: int
    count: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def place(self, device: str) -> str:
        """The device of this process: a GPU of its own where there are several processes."""
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if device == "cuda" and self.count > 1 else device

    def replica(self, model: nn.Module) -> nn.Module:
        """The model to call in training, so that gradients are averaged; the model itself for a single process."""
        if self.count == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def mean(self, *values: float) -> list[float]:
        """The averages of values over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.count).tolist()

    def told_by_first(self, find: Callable[[], Any]) -> Any:
        """Call a function in the first process, and return its result in all processes."""
        told = [find() if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(told, device=torch.device("cpu"))
        return told[0]


@lru_cache(maxsize=1)
def ranks() -> Ranks:
    """Join the process group, once; without torchrun the group is this process alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks(0, 1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), count)


class Shares(BatchSampler):
    """The share of one process in each batch of a shuffled data set."""

    def __init__(self, data: Dataset[Any], batch_size: int, generator: torch.Generator, drop_last: bool, among: Ranks) -> None:
        super().__init__(RandomSampler(data, generator=generator), batch_size, drop_last)  # type: ignore[arg-type]
        self.among = among

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of this process's share, batch by batch."""
        for batch in super().__iter__():
            yield batch[self.among.rank :: self.among.count]
