"""Computations that now and then need a few numbers of the device, as generators that yield tensors and are sent them back.

`answered` waits for the device each time. `Later` does not: it goes on from one call to the next, by when the numbers have
come. One that yields no tensors says where it may rest: up to the next tensors it only reads what others may read meanwhile.
`beside` runs them beside what else a GPU does.
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


_FIRST = -1  # the priority of small computations beside large ones, which would let them wait at each


def answered(asking: Asking[T]) -> T:
    """Run it to its end, with a wait for each round of numbers."""
    run = Later(asking)
    while not run.done:
        run.go_on()
    return run.result


def together(all_asking: Sequence[Asking[T]]) -> Asking[list[T]]:
    """Several that never rest, with one round for all in place of one for each; their results."""
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
    """Runs up to where numbers are asked for, and on from there when told to.

    Attributes:
        done: Whether it has ended.
        result: Once it has.
        resting: Whether it rests, and asks for nothing.
    """

    result: T

    def __init__(self, asking: Asking[T]) -> None:
        self._asking, self.done, self.resting = asking, False, False
        self._copies: _Copies | None = None
        self.go_on()

    def go_on(self) -> None:
        """As far as what was asked for last time allows, if there is more; waits only if that is still on its way."""
        if self.done:
            return
        try:
            wanted = next(self._asking) if self._copies is None else self._asking.send(self._copies.arrived())
            self._copies, self.resting = _Copies(wanted), not wanted
        except StopIteration as end:
            self.result, self.done, self.resting = end.value, True, False


class _Copies:
    """Tensors on their way to the host, all of one type and device in one transfer."""

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
        """Them, on the host."""
        found = list(self._tensors)
        for places, host, event in self._parts:
            event.synchronize()
            parts = host.split([found[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                found[i] = part.reshape(found[i].shape)
        return found


def branch_off(devices: Iterable[torch.device]) -> None:
    """What `beside` runs from now on comes after all that has been started by now."""
    for device in devices:
        if device.type == "cuda":
            _beside(device).wait_stream(torch.cuda.current_stream(device))


@contextmanager
def beside(devices: Iterable[torch.device]) -> Iterator[None]:
    """Start computations that run after what came before `branch_off`, and before what is started next, on these GPUs."""
    used = {_beside(device): torch.cuda.current_stream(device) for device in devices if device.type == "cuda"}
    with ExitStack() as stack:
        for stream, current in used.items():
            stack.callback(current.wait_stream, stream)
            stack.enter_context(torch.cuda.stream(stream))
        yield


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, _FIRST)
