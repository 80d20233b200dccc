"""Speed of solvers for the largest singular value of convolutions: error against operator applications and seconds.

    python evaluations/benchmarks/spectra.py --out evaluations/benchmarks/results/spectra.json
    python evaluations/benchmarks/spectra.py --reference PATH      # with a checkout of the authors' code (Ali-E/FastClip)

Layers: all convolutions of timm's resnet18 at 224 x 224, and depthwise and strided ones of other families. An application is
one column through the operator or its adjoint; a forward pass for the offset counts as well. The reference value is the lower
end of a proved interval in float64, five times narrower than the target error. Methods that do not reach the target error are
marked.
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import svds
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.evaluations.run_folder import environment, read_json, write_json
from robust_spectral.norms import norm_intervals
from robust_spectral.singular_values import golub_kahan, orthonormal_rows, power_step, random_block

TARGET = 1e-4
OTHERS: dict[str, int] = {"convnext_atto": 4, "tf_efficientnet_lite0": 6, "mobilenetv3_small_100": 4}  # most layers of each


@dataclass
class Counted:
    """A layer that counts the columns through its forward and adjoint."""

    module: nn.Module
    in_shape: tuple[int, ...]
    limit: float = math.inf  # seconds, for a method without intermediate values
    applications: int = 0

    def operator(self) -> rs.LinearOperator:
        """This package's operator of the layer, with counting."""
        A = rs.linear_operator(self.module, self.in_shape)
        forward, adjoint = A.forward, A.adjoint
        return replace(A, forward=lambda X: self.count(forward, X), adjoint=lambda Y: self.count(adjoint, Y))

    def count(self, function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        """Apply a function to a batch and count its rows."""
        self.applications += len(X)
        return function(X)


Trace = Iterator[float]  # the estimate after each step


def lanczos(layer: Counted) -> Trace:
    """Golub-Kahan-Lanczos of this package, with one vector."""
    A = layer.operator()
    B = A.H if math.prod(A.out_shape) < math.prod(A.in_shape) else A
    for state in golub_kahan(B, random_block(B, 1, 0), basis=256):
        yield float(torch.linalg.svdvals(state.B).max())
        if state.exhausted:
            return


def powerqr(layer: Counted, block: int = 4) -> Trace:
    """Block power steps with Rayleigh-Ritz, of this package."""
    A = layer.operator()
    X = orthonormal_rows(random_block(A, min(block, math.prod(A.in_shape) // A.groups), 0))
    while True:
        ritz, image = power_step(A, X)
        X = orthonormal_rows(image)
        yield float(ritz.values.max())


def published(layer: Counted) -> Trace:
    """The paper's PowerQR as published: x + grad of |module(x) - module(0)|^2 / 2, QR, values from R less the shift 1."""
    module, in_shape = layer.module.eval(), layer.in_shape
    generator = torch.Generator().manual_seed(0)
    device = next(module.parameters()).device
    x = torch.randn(1, *in_shape, generator=generator).to(device)
    while True:
        x = x.detach().requires_grad_()
        loss = (module(x) - module(torch.zeros_like(x))).square().sum() / 2
        (gradient,) = torch.autograd.grad(loss, x)
        layer.applications += 3  # forward, forward of the offset, adjoint
        q, r = torch.linalg.qr((x + gradient).detach().flatten(1).T)
        x = q.T.reshape(1, *in_shape)
        yield float((r.diagonal().abs() - 1).abs().sqrt().max())


def arpack(layer: Counted) -> Trace:
    """scipy's svds on this package's operator, to its own tolerance of 1e-5."""
    A = layer.operator()
    n, m = math.prod(A.in_shape), math.prod(A.out_shape)
    deadline = time.perf_counter() + 2 * layer.limit

    def apply(function: Callable[[Tensor], Tensor], v: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if time.perf_counter() > deadline:
            raise TimeoutError(f"no result within {2 * layer.limit:g} s")
        return function(_column(v, shape, A)).cpu().numpy().ravel()

    yield float(svds(ScipyOperator(
        (m, n), dtype=np.float32,
        matvec=lambda v: apply(A.matmat, v, A.in_shape),
        rmatvec=lambda u: apply(A.rmatmat, u, A.out_shape),
    ), k=1, tol=1e-5, return_singular_vectors=False, random_state=0)[0])  # fmt: skip


def torch_reshaped(layer: Counted) -> Trace:
    """torch.nn.utils.parametrizations.spectral_norm: power iteration on the reshaped weight, another operator."""
    weight: Any = layer.module.weight
    probe = nn.Linear(weight[0].numel(), len(weight), bias=False, device=weight.device)
    with torch.no_grad():
        probe.weight.copy_(weight.flatten(1))
        nn.utils.parametrizations.spectral_norm(probe, n_power_iterations=100)
        normalised, original = probe.train().weight, weight.flatten(1)
        yield float(original.norm() / normalised.norm())


def torchlip(layer: Counted) -> Trace:
    """deel-torchlip's spectral_normalization: power iteration on the reshaped weight, another operator."""
    from deel.torchlip.normalizers import spectral_normalization

    weight: Any = layer.module.weight
    yield float(spectral_normalization(weight.detach().flatten(1), None, eps=1e-6, maxiter=1000)[2])


def orthogonium(layer: Counted) -> Trace:
    """orthogonium's get_conv_sv: Gram iteration of the kernel, an upper bound for its own layers.

    Each iteration nearly doubles the window. Of the default four, only the iterations that take seconds are run.
    """
    from orthogonium.layers.conv.singular_values import get_conv_sv

    weight: Any = layer.module.weight
    window, iterations = max(weight.shape[2:]), 0
    while iterations < 4 and min(weight.shape[:2]) ** 3 * (window * (2 * window - 1)) ** 2 < 3e11:
        window, iterations = 2 * window - 1, iterations + 1
    yield float(get_conv_sv(layer.module, n_iter=max(iterations, 1), return_stab_rank=False, imsize=layer.in_shape[-1]))


def authors(path: Path) -> Callable[[Counted], Trace]:
    """The authors' own power_qr, from a checkout."""
    sys.path.insert(0, str(path / "models"))
    from clip_toolbox import power_qr  # type: ignore[import-not-found]

    def trace(layer: Counted) -> Trace:
        module = layer.module.eval()
        x = torch.randn(1, *layer.in_shape, device=next(module.parameters()).device)
        while True:
            layer.applications += 30
            x, values = power_qr(lambda z: module(z) - module(torch.zeros_like(z)), x.detach(), n_iters=10, x0_out=True)
            yield float(torch.as_tensor(values).max())

    return trace


METHODS: dict[str, Callable[[Counted], Trace]] = {
    "lanczos": lanczos, "powerqr": powerqr, "powerqr as published": published, "scipy svds": arpack,
    "torch spectral_norm": torch_reshaped, "deel-torchlip": torchlip, "orthogonium": orthogonium,
}  # fmt: skip


def _column(v: np.ndarray, shape: tuple[int, ...], A: rs.LinearOperator) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(v)).to(A.device, A.dtype).reshape(1, *shape)


class PeakMemory:
    """Peak memory inside the block, above the memory at its start, in MiB: sampled resident memory, or CUDA's own count."""

    def __enter__(self) -> PeakMemory:
        self.cuda = torch.cuda.is_available()
        self.peak, self.start, self.stop = 0.0, self._now(), threading.Event()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.peak = max(torch.cuda.max_memory_allocated() / 2**20 if self.cuda else self.peak, self._now()) - self.start

    def _now(self) -> float:
        if self.cuda:
            return torch.cuda.memory_allocated() / 2**20
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def _sample(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, self._now())


def follow(make: Callable[[Counted], Trace], layer: Counted, truth: float, limit: float) -> dict[str, Any]:
    """Run a method until its error is at most TARGET, its trace ends, or the time limit passes."""
    points: list[tuple[int, float, float]] = []
    started = time.perf_counter()
    with PeakMemory() as memory:
        try:
            for value in make(layer):
                seconds = time.perf_counter() - started
                points.append((layer.applications, seconds, abs(value - truth) / truth))
                if points[-1][2] <= TARGET or seconds > limit:
                    break
        except ImportError as error:
            return {"missing": str(error)}
        except Exception as error:  # noqa: BLE001 - a peer's refusal is a result
            return {"refused": f"{type(error).__name__}: {error}"[:200]}
    applications, seconds, error = points[-1]
    return {"reached": error <= TARGET, "applications": applications, "seconds": seconds, "error": error,
            "memory_mib": round(memory.peak, 1),
            "trace": [(a, round(s, 4), float(f"{e:.3g}")) for a, s, e in points[:: max(1, len(points) // 20)]]}  # fmt: skip


def convolutions(name: str, size: int, most: int | None) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Convolutions of a timm model with random weights: all, or at most ``most`` depthwise and strided ones."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    layers = [layer for layer in rs.linear_layers(model, torch.zeros(1, 3, size, size)) if layer.kind.startswith("conv")]
    if most is not None:
        special = [layer for layer in layers if layer.module.groups > 1 or max(layer.module.stride) > 1]
        layers = special[:: max(1, len(special) // most)][:most]
    return [(f"{name}.{layer.name}", layer.module, layer.in_shape) for layer in layers]


def enclose(device: str) -> dict[str, Any]:
    """Enclose the norms of all layers of resnet18 at 224 x 224 to 2 %, separately and in shared runs for equal shapes."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18").to(device)
    layers = rs.linear_layers(model, torch.zeros(1, 3, 224, 224, device=device))
    operators = [layer.operator(composite=False) for layer in layers]
    norm_intervals([rs.linear_operator(nn.Conv2d(3, 3, 3, device=device), (3, 64, 64))] * 2, together=True)  # warm up
    seconds, widths = {}, []
    for together in (False, True):
        started = time.perf_counter()
        norms = norm_intervals(operators, rtol=0.02, together=together)
        seconds["together" if together else "alone"] = time.perf_counter() - started
        widths += [norm.upper / norm.lower - 1 for norm in norms]
    return {"layers": len(layers), "seconds": seconds, "largest_width": max(widths), "failure_probability": 1e-9}


def measure(
    device: str, limit: float, budget: float, models: dict[str, int | None], methods: dict[str, Callable[[Counted], Trace]],
    only: str = "*",
) -> list[Any]:  # fmt: skip
    """A row for each layer within the budget of seconds: reference norm, top five in float32, result of each method."""
    rows, started = [], time.perf_counter()
    for name, most in models.items():
        for label, module, in_shape in convolutions(name, 224, most):
            if not fnmatchcase(label, only):
                continue
            if time.perf_counter() - started > budget:
                print(f"the budget of {budget:g} s is spent before {label}")
                return rows
            module = module.to(device)
            A = rs.linear_operator(module, in_shape)
            interval = rs.spectral_norm(A, rtol=TARGET / 5, max_steps=500)
            truth = interval.lower
            five = rs.top_singular(A, 5, rs.Lanczos(rtol=1e-5, max_steps=300))
            row: dict[str, Any] = {
                "layer": label, "in_shape": in_shape, "kernel": tuple(module.weight.shape), "stride": module.stride,
                "groups": module.groups, "norm": truth, "interval": [interval.lower, interval.upper],
                "top5_residual": float(five.residuals.max()) / truth, "top5_steps": five.steps, "methods": {},
            }  # fmt: skip
            for method, make in methods.items():
                row["methods"][method] = follow(make, Counted(module, in_shape, limit), truth, limit)
            rows.append(row)
            print(f"{label:45s} {truth:9.5g}  " + "  ".join(f"{m}: {_short(r)}" for m, r in row["methods"].items()), flush=True)
    return rows


def _short(result: dict[str, Any]) -> str:
    if "applications" not in result:
        return "missing" if "missing" in result else "refused"
    return f"{result['applications']} ap {result['seconds']:.2f} s" + (
        "" if result["reached"] else f" (error {result['error']:.1e})"
    )


def summary(rows: list[Any]) -> dict[str, Any]:
    """For each method, the number of layers that reached the target, and least and median ratios of applications and seconds.

    Ratios are relative to lanczos. For a run that was stopped, the ratio at that moment counts, so that the true one is larger.
    """
    table = {}
    for method in rows[0]["methods"]:
        results = [(row["methods"]["lanczos"], row["methods"][method]) for row in rows if "seconds" in row["methods"][method]]
        ratios = [(r["applications"] / o["applications"], r["seconds"] / o["seconds"]) for o, r in results
                  if r["reached"] or len(r["trace"]) > 1]  # fmt: skip
        table[method] = {
            "layers": len(results), "reached": sum(r["reached"] for _, r in results),
            "applications_ratio": [min(a for a, _ in ratios), float(np.median([a for a, _ in ratios]))] if ratios else None,
            "seconds_ratio": [min(s for _, s in ratios), float(np.median([s for _, s in ratios]))] if ratios else None,
            "largest_error": max((math.inf if r["error"] is None else r["error"] for _, r in results), default=None),
            "largest_memory_mib": max((r["memory_mib"] for _, r in results), default=None),
        }  # fmt: skip
    return table


def plot(rows: list[Any], path: Path) -> None:
    """Plot the error against applications and against seconds, with one thin line for each layer."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    shown = ["lanczos", "powerqr", "powerqr as published"]
    for column, (axis, title) in enumerate(zip(axes, ("operator applications", "seconds"), strict=True)):
        for colour, method in enumerate(shown):
            for index, row in enumerate(row for row in rows if "trace" in row["methods"][method]):
                points = row["methods"][method]["trace"]
                axis.loglog([p[column] for p in points], [max(p[2], 1e-8) for p in points], color=f"C{colour}", alpha=0.4,
                            label=method if index == 0 else None)  # fmt: skip
        axis.axhline(TARGET, color="grey", linestyle=":")
        axis.set_xlabel(title)
    axes[0].set_ylabel("relative error of the top singular value")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print the summary, write JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("evaluations/benchmarks/results/spectra.json"))
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' code")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds a method may take on one layer")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all layers together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="*", help="some of the methods; default all")
    parser.add_argument("--models", nargs="*", default=["resnet18", *OTHERS])
    parser.add_argument("--only", help="name pattern of layers to measure again; their rows replace those in --out")
    chosen = parser.parse_args()
    methods = METHODS | ({"authors' code": authors(chosen.reference)} if chosen.reference else {})
    methods = {name: methods[name] for name in chosen.methods or methods}
    known = read_json(chosen.out) if chosen.only else {"layers": []}
    enclosure = known.get("enclosure") or enclose(chosen.device)
    seconds = ", ".join(f"{value:.1f} s {how}" for how, value in enclosure["seconds"].items())
    print(f"resnet18, {enclosure['layers']} layers enclosed to {enclosure['largest_width']:.2%}: {seconds}", flush=True)
    models = {name: OTHERS.get(name) for name in chosen.models}
    fresh = measure(chosen.device, chosen.limit, chosen.budget, models, methods, chosen.only or "*")
    replaced = {row["layer"]: row for row in fresh}
    rows = [replaced.pop(row["layer"], row) for row in known["layers"]] + list(replaced.values())
    table = summary(rows)
    for method, figures in table.items():
        print(method, figures)
    result = {"target": TARGET, "enclosure": enclosure, "summary": table, "layers": rows, **environment(chosen.device)}
    write_json(chosen.out, result)
    plot(rows, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
