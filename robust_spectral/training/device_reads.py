"""Computations that occasionally read a few numbers from the device, as generators that yield tensors and receive their copies.

`answered` runs such a generator and waits for the device at each read. `Later` does not wait: each call continues with the
numbers that the previous call requested, which have arrived in the meantime. A generator that yields an empty list marks a
point where it may pause: until its next request it only reads data that other computations may read at the same time. `beside`
runs computations concurrently with the other work of a GPU.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


Asking = Generator[list[Tensor], list[Tensor], T]


_FIRST = -1  # stream priority; otherwise small computations would wait for large ones, each time


def answered(asking: Asking[T]) -> T:
    """Run a generator to its end, waiting for the device at each request; return its result."""
    run = Later(asking)
    while not run.done:
        run.go_on()
    return run.result


def together(all_asking: Sequence[Asking[T]]) -> Asking[list[T]]:
    """Merge generators that never pause into one that makes their requests together; return the list of their results."""
    results: dict[int, T] = {}
    answers: dict[int, list[Tensor] | None] = dict.fromkeys(range(len(all_asking)))
    while answers:
        wanted: dict[int, list[Tensor]] = {}
        for index, given in answers.items():
            try:
                wanted[index] = next(all_asking[index]) if given is None else all_asking[index].send(given)
            except StopIteration as end:
                results[index] = end.value
        came = (yield [tensor for tensors in wanted.values() for tensor in tensors]) if wanted else []
        split = iter(came)
        answers = {index: [next(split) for _ in tensors] for index, tensors in wanted.items()}
    return [results[index] for index in range(len(all_asking))]


class Later(Generic[T]):
    """A generator that has run up to a request for numbers, and continues when `go_on` is called.

    Attributes:
        done: Whether the generator has ended.
        result: Its return value, once it has ended.
        resting: Whether it paused, with no request for numbers.
    """

    result: T

    def __init__(self, asking: Asking[T]) -> None:
        self._asking, self.done, self.resting = asking, False, False
        self._copies: _Copies | None = None
        self.go_on()

    def go_on(self) -> None:
        """Continue until the next numbers are requested. Waits for the device only if the last ones have not arrived."""
        if self.done:
            return
        try:
            wanted = next(self._asking) if self._copies is None else self._asking.send(self._copies.arrived())
            self._copies, self.resting = _Copies(wanted), not wanted
        except StopIteration as end:
            self.result, self.done, self.resting = end.value, True, False


class _Copies:
    """Tensors on their way to the host, in one transfer for each type and device."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._parts: list[tuple[list[int], Tensor, torch.cuda.Event]] = []
        for device, dtype in {(t.device, t.dtype): None for t in tensors if t.is_cuda}:
            places = [i for i, t in enumerate(tensors) if (t.device, t.dtype) == (device, dtype)]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            host = torch.empty(flat.shape, dtype=dtype, device="cpu", pin_memory=True).copy_(flat, non_blocking=True)
            with torch.cuda.device(device):
                event = torch.cuda.Event()
                event.record()
            self._parts.append((places, host, event))

    def arrived(self) -> list[Tensor]:
        """The tensors on the host; waits for transfers that are not complete."""
        found = list(self._tensors)
        for places, host, event in self._parts:
            event.synchronize()
            parts = host.split([found[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                found[i] = part.reshape(found[i].shape)
        return found


def branch_off(devices: Iterable[torch.device]) -> None:
    """Let the computations started later under `beside` run after all work queued on the GPUs so far."""
    for device in devices:
        if device.type == "cuda":
            _beside(device).wait_stream(torch.cuda.current_stream(device))


@contextmanager
def beside(devices: Iterable[torch.device]) -> Iterator[None]:
    """Run computations on a side stream of these GPUs, after the work queued before `branch_off`.

    Work queued after the ``with`` block waits for these computations.
    """
    used = {_beside(device): torch.cuda.current_stream(device) for device in devices if device.type == "cuda"}
    with ExitStack() as stack:
        for stream, current in used.items():
            stack.callback(current.wait_stream, stream)
            stack.enter_context(torch.cuda.stream(stream))
        yield


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, _FIRST)
