"""Clips of every layer of timm models, checked by independent computations of the norm: targets met, other layers unchanged.

    python evaluations/benchmarks/clip_census.py --out evaluations/benchmarks/results/clip_census.json

For each model the target is the median of its layers' norms, so that about half of them are above it. After `FastClip.finish`,
the norm of each layer is computed anew in float64: up to 4,096 inputs in a group as the largest singular value of the matrix
of each group, otherwise by SciPy's Lanczos bidiagonalisation on an operator that calls torch's own layers, run to a residual
of 1e-8 of the value. A second `finish` must change nothing, and layers below the target must keep their weights bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.evaluations.run_folder import environment, write_json

MODELS = {
    "resnet18": 64, "dla34": 64, "mobilenetv3_small_100": 64, "efficientnet_b0": 64, "convnext_atto": 64, "densenet121": 64,
    "regnetx_002": 64, "vgg11_bn": 32,
}  # fmt: skip


def alone(layer: rs.LinearLayer) -> nn.Module:
    """The layer with its batch normalisation, in float64 and without offsets, as torch computes it."""
    parts = [copy.deepcopy(layer.module), *([] if layer.batchnorm is None else [copy.deepcopy(layer.batchnorm)])]
    if layer.batchnorm is not None:
        plain: Any = nn.BatchNorm2d(len(parts[1].running_var), eps=parts[1].eps)
        plain.load_state_dict(parts[1].state_dict())
        parts[1] = plain
    net = nn.Sequential(*parts).double().eval()
    for part in net:
        if getattr(part, "bias", None) is not None:
            part.bias.data.zero_()
        if getattr(part, "running_mean", None) is not None:
            part.running_mean.zero_()
    return net


def true_norm(layer: rs.LinearLayer) -> float:
    """The spectral norm in float64, by dense decomposition of each group or by SciPy's Lanczos solver."""
    net, shape = alone(layer), layer.in_shape
    size, groups = int(np.prod(shape)), getattr(layer.module, "groups", 1)
    if size // groups <= 4096:
        return max(largest_singular_value(matrix) for matrix in matrices(net, shape, groups))
    example = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    out = net(example)

    def forward(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return net(torch.as_tensor(x.reshape(1, *shape))).flatten().numpy()

    def adjoint(y: np.ndarray) -> np.ndarray:
        return torch.autograd.grad(out, example, torch.as_tensor(y.reshape(out.shape)), retain_graph=True)[0].flatten().numpy()

    A = LinearOperator((out.numel(), size), matvec=forward, rmatvec=adjoint, dtype=np.float64)
    return float(svds(A, k=1, ncv=64, tol=1e-8, return_singular_vectors=False, random_state=0)[0])


@torch.no_grad()
def matrices(net: nn.Module, shape: tuple[int, ...], groups: int) -> Tensor:
    """The matrix of every group, (groups, inputs, outputs). Groups do not interact, so a pass gives a row of each matrix."""
    rows = []
    for chunk in torch.eye(int(np.prod(shape)) // groups, dtype=torch.float64).split(64 if groups > 1 else 512):
        every_group = chunk[:, None].expand(-1, groups, -1).reshape(-1, *shape)
        rows.append(net(every_group).reshape(len(chunk), groups, -1))
    return torch.cat(rows).transpose(0, 1)


def largest_singular_value(matrix: Tensor) -> float:
    """The largest singular value of a dense matrix, from its smaller Gram matrix: accurate to about 1e-12 here, and fast."""
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return float(torch.linalg.eigvalsh(gram)[-1].sqrt())


def census(name: str, size: int) -> dict[str, Any]:
    """Clip one model and check all its layers."""
    torch.manual_seed(0)
    model, example = timm.create_model(name, num_classes=10).eval(), torch.zeros(1, 3, size, size)
    calibrate(model, size)
    target = statistics.median(norm.lower for norm in rs.spectral_norms(model, example).values())
    clipper = rs.FastClip(model, example, target)
    before, clock = {layer.name: layer.module.weight.detach().clone() for layer in clipper.layers}, time.perf_counter()
    results = clipper.finish()
    seconds = time.perf_counter() - clock
    once = {layer.name: layer.module.weight.detach().clone() for layer in clipper.layers}
    again = clipper.finish()
    moved_again = max(float((layer.module.weight - once[layer.name]).detach().abs().max()) for layer in clipper.layers)
    below = [n for n, r in results.items() if r.steps == 0]
    norms = {layer.name: true_norm(layer) / target for layer in clipper.layers}
    clipped = [name for name in norms if name not in below]
    return {
        "model": name, "input": size, "layers": len(norms), "clipped": len(clipped), "target": target, "seconds": seconds,
        "largest_over_target": max(norms.values()), "smallest_clipped_over_target": min(norms[name] for name in clipped),
        "outside_interval": [n for n, true in norms.items() if not results[n].after.lower * (1 - 1e-7) <= true * target
                             <= results[n].after.upper * (1 + 1e-10)],
        "moved_by_a_second_finish": moved_again, "second_steps": sum(r.steps for r in again.values()),
        "below_and_changed": [n for n in below if not torch.equal(before[n], once[n])],
        "distortion": statistics.median(results[n].distortion for n in clipped),
        "distortion_over_rescale": statistics.median(
            results[n].distortion / (1 - target / results[n].before.upper) for n in clipped
        ),
    }  # fmt: skip


@torch.no_grad()
def calibrate(model: nn.Module, size: int) -> None:
    """Give batch normalisations random weights and the running statistics of a random batch, in place of training."""
    normalisations = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in normalisations:
        module.momentum = 1.0
        module.train()
        module.weight.uniform_(0.5, 1.5)
    model(torch.randn(8, 3, size, size))
    model.eval()


def main() -> None:
    """Run the census, print a line for each model, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows.append(census(name, MODELS[name]))
        print({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)
        if options.out:  # after every row, so that a stop loses none
            write_json(options.out, {"rows": rows, **environment()})


if __name__ == "__main__":
    main()
