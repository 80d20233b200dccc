"""Quality of clips: norm reached, ‖ΔW‖/‖W‖, seconds and operator applications.

    python evaluations/benchmarks/clip_quality.py --out evaluations/benchmarks/results/clip_quality.json
    python evaluations/benchmarks/clip_quality.py --reference PATH      # with a checkout of the authors' code (Ali-E/FastClip)

Layers: 3 x 3 convolutions of 16 to 128 channels on 16 x 16, circular and zero padding, clipped from a norm of about 2 to 1.
The true norm comes from a proved interval in float64. With circular padding, the projection is the nearest weight; with zero
padding it is conservative, so its change is an upper bound of the smallest possible one.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral import LinearOperator
from robust_spectral.evaluations.run_folder import environment, write_json

SHAPE, TARGET = (16, 16), 1.0


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the rows that pass through any operator or its adjoint inside the block."""
    applications = [0]
    forward, adjoint = LinearOperator.matmat, LinearOperator.rmatmat

    def counting(function: Callable[[LinearOperator, Tensor], Tensor]) -> Callable[[LinearOperator, Tensor], Tensor]:
        def call(self: LinearOperator, X: Tensor) -> Tensor:
            applications[0] += len(X)
            return function(self, X)

        return call

    LinearOperator.matmat, LinearOperator.rmatmat = counting(forward), counting(adjoint)  # type: ignore[method-assign]
    try:
        yield applications
    finally:
        LinearOperator.matmat, LinearOperator.rmatmat = forward, adjoint  # type: ignore[method-assign]


def rescale(module: nn.Conv2d, in_shape: tuple[int, ...]) -> None:
    """Divide the whole weight by its norm."""
    with torch.no_grad():
        module.weight.div_(rs.spectral_norm(rs.linear_operator(module, in_shape), rtol=1e-4, max_steps=400).upper / TARGET)


def authors(path: Path, module: nn.Conv2d, in_shape: tuple[int, ...], limit: float = 60.0) -> float:
    """Run the authors' deflation, ten rounds at a time with their step size, until 1.01 of the target or the time limit.

    The loop also stops when the weight no longer changes, because the deflation's own estimate, which is too small, meets the
    target. Returns the seconds of the deflation, without the time of the checks of the norm.
    """
    sys.path.insert(0, str(path / "models"))
    from clip_toolbox import deflate_model_multi  # type: ignore[import-not-found]

    seconds, unchanged = 0.0, 0
    while seconds < limit and unchanged < 5 and norm(module, in_shape, 1e-3) > 1.01 * TARGET:
        before, vector, started = module.weight.detach().clone(), torch.randn(1, *in_shape), time.perf_counter()
        deflate_model_multi(module, vector, clip=TARGET, deflate_iter=10, step_size=0.35, device="cpu")
        seconds += time.perf_counter() - started
        unchanged = unchanged + 1 if torch.equal(before, module.weight) else 0
    return seconds


def norm(module: nn.Module, in_shape: tuple[int, ...], rtol: float = 1e-4) -> float:
    """The lower end of a proved interval of relative width ``rtol`` around the true norm."""
    return rs.spectral_norm(rs.linear_operator(module, in_shape), rtol=rtol, max_steps=400).lower


METHODS: dict[str, Callable[[nn.Conv2d, tuple[int, ...]], Any]] = {
    "clip_": rs.clip_,
    "projection": partial(rs.clip_, method="projection"),
    "paper": partial(rs.clip_, method="paper"),
    "rescale": rescale,
}


def layer(channels: int, mode: str) -> nn.Conv2d:
    """A convolution with the usual initial weights, scaled to a norm of about 2."""
    torch.manual_seed(channels)
    module = nn.Conv2d(channels, channels, 3, padding=1, padding_mode=mode, bias=False)
    with torch.no_grad():
        module.weight.mul_(2 * TARGET / norm(module, (channels, *SHAPE)))
    return module


def measure(
    module: nn.Conv2d, method: Callable[[nn.Conv2d, tuple[int, ...]], Any], in_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Norm over target, ‖ΔW‖/‖W‖, seconds and applications of one method on a copy of a layer.

    A method that returns its own seconds does not use this package's operators. Its applications are not reported, because only
    the checks of its norm are counted.
    """
    clipped = copy.deepcopy(module)
    started = time.perf_counter()
    with counted() as applications:
        own_clock = method(clipped, in_shape)
    ours = not isinstance(own_clock, float)
    seconds = time.perf_counter() - started if ours else own_clock
    change = float((clipped.weight - module.weight).detach().norm() / module.weight.detach().norm())
    return {"norm": norm(clipped, in_shape) / TARGET, "distortion": change, "seconds": seconds,
            "applications": applications[0] if ours else None}  # fmt: skip


def main() -> None:
    """Measure, print a row for each layer and method, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' code")
    parser.add_argument("--channels", type=int, nargs="*", default=[16, 32, 64, 128])
    options = parser.parse_args()
    methods = METHODS | ({"authors' code": partial(authors, options.reference)} if options.reference else {})
    rows = []
    for mode in ("circular", "zeros"):
        for channels in options.channels:
            module, in_shape = layer(channels, mode), (channels, *SHAPE)
            for name, method in methods.items():
                row = {"padding": mode, "channels": channels, "method": name, **measure(module, method, in_shape)}
                rows.append(row)
                applied = "–" if row["applications"] is None else row["applications"]
                print(f"{mode:9s} {channels:4d} {name:14s} norm {row['norm']:.5f}  |dW|/|W| {row['distortion']:.4f}  "
                      f"{row['seconds']:8.2f} s  {applied:>6} applications", flush=True)  # fmt: skip
                if options.out:  # after every row, so that a stop loses none
                    write_json(options.out, {"target": TARGET, "input": SHAPE, "rows": rows, **environment("cpu")})


if __name__ == "__main__":
    main()
