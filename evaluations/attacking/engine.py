"""Engines that do the units of work of an evaluation: in this process, in several on this machine, or on a Ray cluster.

Units are independent of each other. Only this process writes their records, each as a whole when it arrives. A unit that has a
record is not done again, so an evaluation that was stopped at any moment continues from there.
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
    """The interface of an engine, which does units of a run folder on a device and yields their outcomes in any order."""

    def __call__(self, folder: Path, units: Sequence[Unit], device: str) -> Iterator[Outcome]:
        """Yield each unit with its record, the seconds it took and the hardware."""


def run_units(engine: Engine, folder: Path, units: Sequence[Unit], device: str, done: Callable[[Unit], None]) -> None:
    """Do units with an engine and write each record when it arrives; skip units with a record, unless their attack failed."""
    left = [unit for unit in units if not _settled(folder, unit)]
    for unit, record, seconds, hardware in engine(folder, left, device):
        write_record(folder, unit, record, seconds, hardware)
        done(unit)


def _settled(folder: Path, unit: Unit) -> bool:
    told = read_told(folder, unit)
    return told is not None and not told.get("error")


def make_engine(name: str, workers: int = 1, address: str | None = None) -> Engine:
    """Make an engine by name.

    Args:
        name: "local" or "ray".
        workers: Number of processes of the local engine.
        address: Address of a Ray cluster, "auto" for the one that this machine is part of; default: a new cluster.

    Raises:
        ValueError: the name is unknown, or the number of workers does not fit the engine.
    """
    if workers < 1 or (workers > 1 and name != "local"):
        raise ValueError(f"workers={workers}: must be at least 1, and 1 unless the engine is local; the engine is {name!r}")
    if name == "local":
        return in_this_process if workers == 1 else _in_processes(workers)
    if name == "ray":
        return _on_ray(address)
    raise ValueError(f"engine {name!r}: expected local or ray")


def in_this_process(folder: Path, units: Sequence[Unit], device: str) -> Iterator[Outcome]:
    """Do one unit after another in this process."""
    for unit in units:
        yield unit, *do_unit(folder, unit, device)


def _in_processes(workers: int) -> Engine:
    """An engine of several processes, each with its share of the processors."""

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
                process.terminate()  # stopped early: a later evaluation does their units again

    return engine


def _begin(threads: int, parent: int) -> None:
    """Prepare a worker: limit its threads to its share of the processors, and let it exit once its parent has ended."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(address: str | None) -> Engine:
    """An engine with one Ray task for each unit, retried if a worker dies; on a GPU device each task gets one GPU."""

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
    """Do a unit in another process; its tensors become arrays, which are copied by value and need no device on arrival."""
    record, seconds, hardware = do_unit(folder, unit, device)
    return {name: tensor.detach().cpu().numpy() for name, tensor in record.tensors.items()}, record.told, seconds, hardware


def _landed(shipped: Shipped) -> tuple[Record, float, dict[str, Any]]:
    arrays, told, seconds, hardware = shipped
    return Record({name: torch.tensor(array) for name, array in arrays.items()}, told), seconds, hardware
