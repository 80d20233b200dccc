"""Who does the units of an evaluation: this process, several on this machine, or a Ray cluster.

Whichever it is, units are independent, and this process alone writes their records, each whole as it comes in. A unit that
was done before is not done again, so a run that was stopped at any moment goes on from there.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..records import Record, Unit, read_told, write_record
from .work import do_unit

Outcome = tuple[Unit, Record, float, dict[str, Any]]
Shipped = tuple[dict[str, np.ndarray], dict[str, Any], float, dict[str, Any]]
_RETRIES = 3


class Engine(Protocol):
    """Does units of a run folder on a device, and gives back what came of each, in whatever order they end."""

    def __call__(self, folder: Path, units: Sequence[Unit], device: str) -> Iterator[Outcome]:
        """The outcomes."""


def run_units(engine: Engine, folder: Path, units: Sequence[Unit], device: str, done: Callable[[Unit], None]) -> None:
    """Have units done, and write each record as it comes in; those that have one are left alone, unless an attack failed."""
    left = [unit for unit in units if not _settled(folder, unit)]
    for unit, record, seconds, hardware in engine(folder, left, device):
        write_record(folder, unit, record, seconds, hardware)
        done(unit)


def _settled(folder: Path, unit: Unit) -> bool:
    told = read_told(folder, unit)
    return told is not None and not told.get("error")


def make_engine(name: str, workers: int = 1, address: str | None = None) -> Engine:
    """An engine by name.

    Args:
        name: "local" or "ray".
        workers: Processes of the local engine.
        address: Of a Ray cluster, "auto" for the one this machine is part of; default one of its own.

    Raises:
        ValueError: an unknown name, or no workers.
    """
    if workers < 1 or (workers > 1 and name != "local"):
        raise ValueError(f"workers={workers}: is a number of processes of the local engine, at least 1; the engine is {name!r}")
    if name == "local":
        return in_this_process if workers == 1 else _in_processes(workers)
    if name == "ray":
        return _on_ray(address)
    raise ValueError(f"engine {name!r}: expected local or ray")


def in_this_process(folder: Path, units: Sequence[Unit], device: str) -> Iterator[Outcome]:
    """One unit after another."""
    for unit in units:
        yield unit, *do_unit(folder, unit, device)


def _in_processes(workers: int) -> Engine:
    """Several at once, each in a process with its share of the processors."""

    def engine(folder: Path, units: Sequence[Unit], device: str) -> Iterator[Outcome]:
        threads = max(1, (os.cpu_count() or 1) // workers)
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(workers, context, _begin, (threads, os.getpid()))
        waiting = {pool.submit(_shipped, folder, unit, device): unit for unit in units}
        try:
            for future in as_completed(list(waiting)):
                yield waiting.pop(future), *_landed(future.result())
        finally:
            pool.shutdown(wait=not waiting, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others if waiting else ():
                process.terminate()  # stopped half-way: what they are at is done again

    return engine


def _begin(threads: int, parent: int) -> None:
    """What a worker does first: take its share of the processors, and see to it that it ends with its parent."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(address: str | None) -> Engine:
    """One Ray task a unit, tried again where a worker dies; one GPU each where the device is one."""

    def engine(folder: Path, units: Sequence[Unit], device: str) -> Iterator[Outcome]:
        import ray

        if not units:
            return
        started = not ray.is_initialized()
        if started:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        needs = {"num_gpus": 1} if device.startswith("cuda") else {"num_cpus": 1}
        task = ray.remote(max_retries=_RETRIES, **needs)(_shipped)
        try:
            waiting = {task.remote(folder.resolve(), unit, device): unit for unit in units}
            while waiting:
                ready, _ = ray.wait(list(waiting))
                yield waiting.pop(ready[0]), *_landed(ray.get(ready[0]))
        finally:
            if started:
                ray.shutdown()

    return engine


def _shipped(folder: Path, unit: Unit, device: str) -> Shipped:
    """A unit done in another process; its tensors as arrays, which travel by value and need no device where they arrive."""
    record, seconds, hardware = do_unit(folder, unit, device)
    return {name: tensor.detach().cpu().numpy() for name, tensor in record.tensors.items()}, record.told, seconds, hardware


def _landed(shipped: Shipped) -> tuple[Record, float, dict[str, Any]]:
    arrays, told, seconds, hardware = shipped
    return Record({name: torch.tensor(array) for name, array in arrays.items()}, told), seconds, hardware
