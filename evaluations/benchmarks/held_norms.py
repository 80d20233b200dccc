"""Accuracy of clipping by the optimizer hook alone: the true norm of every clipped layer at each epoch's end, without `finish`.

    python evaluations/benchmarks/held_norms.py --out evaluations/benchmarks/results/held_norms.json
    python evaluations/benchmarks/held_norms.py --models test_resnet --checks 6 --seeds 0 1 2 3
    python evaluations/benchmarks/held_norms.py --device cuda

A ResNet-18 with a 3 x 3 stem and timm's test_resnet train on MNIST-5k, with SGD and with AdamW. The clipper controls either
the layers alone (batch normalisations train) or composites, layers together with the batch normalisation after them (running
statistics frozen); its other options have their defaults. The norms are the lower ends of proved intervals in float64, within
1e-3.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.evaluations.data import load_data
from robust_spectral.evaluations.run_folder import environment, write_json
from robust_spectral.operators import is_batchnorm

MODELS = {
    "test_resnet": lambda: timm.create_model("test_resnet", in_chans=1, num_classes=10),
    "resnet18": lambda: small_stem(timm.create_model("resnet18", in_chans=1, num_classes=10)),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}
WHAT = {"layers": False, "composites": True}


def small_stem(model: Any) -> nn.Module:
    """A ResNet for small images: a 3 x 3 first convolution, not followed by pooling."""
    model.conv1, model.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def set_mode(model: nn.Module, frozen: bool) -> None:
    """Set training mode, with or without frozen statistics of the batch normalisations."""
    model.train()
    for module in model.modules():
        if frozen and is_batchnorm(module):
            module.eval()


def epochs(images: Tensor, labels: Tensor, count: int, batch: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Shuffled batches, epoch by epoch."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        order = torch.randperm(len(images), generator=generator)[: len(images) // batch * batch]
        yield [(images[part], labels[part]) for part in order.split(batch)]


def held(name: str, optimizer_name: str, composites: bool, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; the largest true norm over target at ``options.checks`` moments of each epoch, the last one its end."""
    torch.manual_seed(seed)
    data = load_data("mnist5k", options.size)
    pairs = [data.train[i] for i in range(len(data.train))]  # type: ignore[arg-type]
    images = torch.stack([x for x, _ in pairs]).to(options.device)
    labels = torch.tensor([int(y) for _, y in pairs], device=options.device)
    model = MODELS[name]().to(options.device)
    if composites:  # an epoch without a clipper gives realistic statistics to freeze
        set_mode(model, False)
        first = OPTIMIZERS["adamw"](model.parameters())
        for x, y in next(epochs(images, labels, 1, options.batch)):
            first.zero_grad()
            F.cross_entropy(model(x), y).backward()
            first.step()
    set_mode(model, composites)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    target = 1.5 if composites else 1.0
    clipper = rs.FastClip(model, images[:1], target, composites="auto" if composites else "never")
    clipper.attach(optimizer)
    largest, losses = [], []
    for part in epochs(images, labels, options.epochs, options.batch):
        moments = {len(part) * (i + 1) // options.checks for i in range(options.checks)}
        for count, (x, y) in enumerate(part, start=1):
            optimizer.zero_grad()
            loss = F.cross_entropy((20.0 if composites else 1.0) * model(x), y)
            loss.backward()
            optimizer.step()
            if count in moments:
                norms = {row["name"]: row["lower"] / target for row in clipper.report(rtol=1e-3)}
                largest.append(max(norms.values()))
        losses.append(loss.item())
        print(f"{name} {optimizer_name} {'composites' if composites else 'layers'}: largest norm {largest[-1]:.4f} x target, "
              f"at {max(norms, key=lambda n: norms[n])}, loss {losses[-1]:.3f}", flush=True)  # fmt: skip
    return {"model": name, "optimizer": optimizer_name, "composites": composites, "seed": seed, "target": target,
            "layers": len(norms),
            "steps": clipper.steps, "largest_over_target": largest, "losses": losses}  # fmt: skip


def main() -> None:
    """Train, print a line for each epoch, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checks", type=int, default=1, help="number of moments of an epoch at which norms are measured")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for setting in itertools.product(options.models, OPTIMIZERS, WHAT.values(), options.seeds):
        rows.append(held(*setting, options))
        if options.out:
            write_json(options.out, {"rows": rows, **environment(options.device)})
    every = sorted(norm for row in rows for norm in row["largest_over_target"])
    print(f"{len(every)} moments: {every[0]:.4f} to {every[-1]:.4f}, median {statistics.median(every):.4f}, "
          f"above 1.02: {sum(norm > 1.02 for norm in every)}")  # fmt: skip


if __name__ == "__main__":
    main()
