"""Fine-tuning in several processes, as torchrun starts them: which one this is, and what the first does for all.

Every process holds the whole model and the same state; each takes its share of every batch, and gradients are averaged. So what
they do is what one process would do with whole batches, up to rounding and to batch statistics, which stay each process's own.
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
    """This process's place among all."""

    rank: int
    count: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def place(self, device: str) -> str:
        """The device of this process: of several GPUs its own."""
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if device == "cuda" and self.count > 1 else device

    def replica(self, model: nn.Module) -> nn.Module:
        """The model to call in training, so that gradients are averaged; the model itself where there is one process."""
        if self.count == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def mean(self, *values: float) -> list[float]:
        """Averages over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.count).tolist()

    def told_by_first(self, find: Callable[[], Any]) -> Any:
        """What a function gives in the first process, in all of them."""
        told = [find() if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(told, device=torch.device("cpu"))
        return told[0]


@lru_cache(maxsize=1)
def ranks() -> Ranks:
    """Join the others, once; alone where torchrun has not started this process."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks(0, 1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), count)


class Shares(BatchSampler):
    """The batches of a shuffled data set, of each the share of one process."""

    def __init__(self, data: Dataset[Any], batch_size: int, generator: torch.Generator, drop_last: bool, among: Ranks) -> None:
        super().__init__(RandomSampler(data, generator=generator), batch_size, drop_last)  # type: ignore[arg-type]
        self.among = among

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of this process's share, batch by batch."""
        for batch in super().__iter__():
            yield batch[self.among.rank :: self.among.count]
