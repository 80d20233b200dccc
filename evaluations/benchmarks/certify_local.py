"""Certified accuracy of five published ReLU networks, by bounds around single images, against SDP-CROWN's figures.

    python evaluations/benchmarks/certify_local.py --nets FOLDER --out evaluations/benchmarks/results/certify_local.json

The networks, images and radii are those of Chiu, Chen, Zhang and Zhang (SDP-CROWN, 2025, arXiv 2506.06665, Table 1), whose
figures are printed next to ours; this repository contains neither networks nor images. FOLDER has a state dict for each
network, NAME.pth, with its values in the order of the layers, and 200 images and labels of each data set, mnist_X_sdp.npy,
mnist_y_sdp.npy, cifar_X_sdp.npy and cifar_y_sdp.npy (NHWC, in [0, 1]). Networks for CIFAR-10 standardise their input. The
standardisation is part of the model here, so that all radii are in pixels. Every image is certified twice, by the global
Lipschitz bound and by `certify`, and attacked by PGD within the ball and the box, at the published radius times each factor of
``--radii``.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.evaluations.run_folder import environment, write_json

Layer = int | tuple[int, int, int, int]  # features of a dense layer; channels, kernel, stride and padding of a convolution


@dataclass(frozen=True)
class Published:
    """A network, its radius, and its row of SDP-CROWN's Table 1: accuracies in %, seconds an image on their GPU."""

    layers: tuple[Layer, ...]
    data: str
    radius: float
    clean: float | None = None
    pgd: float | None = None
    product: float | None = None
    sdp_crown: float | None = None
    seconds: float | None = None


_SMALL: tuple[Layer, ...] = ((16, 4, 2, 1), (32, 4, 2, 1), 100, 10)
NETWORKS = {
    "mnist_mlp": Published((100, 100, 10), "mnist", 1.0, 79.0, 54.0, 29.0, 32.5, 2.5),
    "mnist_convsmall": Published(_SMALL, "mnist", 0.3, 87.5, 84.5, 77.5, 81.5, 12.0),
    "cifar10_cnn_a": Published(_SMALL, "cifar", 24 / 255, 62.0, 55.5, 39.0, 49.0, 12.0),
    "cifar10_cnn_c": Published(((8, 4, 2, 0), (16, 4, 2, 0), 128, 64, 10), "cifar", 24 / 255),
    "cifar10_convdeep": Published(
        ((8, 4, 2, 1), (8, 3, 1, 1), (8, 3, 1, 1), (8, 4, 2, 1), 100, 10), "cifar", 24 / 255, 53.0, 50.5, 39.5, 46.0, 25.0
    ),
}  # fmt: skip
_MEAN, _STD = tuple(level / 255 for level in (125.3, 123.0, 113.9)), 0.225  # of CIFAR-10, as the networks were trained


class Standardise(nn.Module):
    """The standardisation of pixels in [0, 1]."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The standardised images."""
        return (x - self.mean) / _STD


def load(name: str, folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64 that takes pixels in [0, 1], its images and their labels."""
    network = NETWORKS[name]
    images = torch.tensor(np.load(folder / f"{network.data}_X_sdp.npy")).double().permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(np.load(folder / f"{network.data}_y_sdp.npy")).long()
    modules: list[nn.Module] = [Standardise()] if network.data == "cifar" else []
    channels, size = images.shape[1:3]
    width = 0  # of the last dense layer; 0 before the first
    for layer in network.layers:
        if isinstance(layer, tuple):
            out, kernel, stride, padding = layer
            modules += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
            channels, size = out, (size + 2 * padding - kernel) // stride + 1
        else:
            if width == 0:
                modules.append(nn.Flatten())
            modules += [nn.Linear(width or channels * size * size, layer), nn.ReLU()]
            width = layer
    model = nn.Sequential(*modules[:-1]).double().eval()
    values = torch.load(folder / f"{name}.pth", weights_only=True, map_location="cpu").values()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value.reshape(parameter.shape))
    return model, images, labels


def pgd(model: nn.Module, images: Tensor, labels: Tensor, radius: float, steps: int = 40, restarts: int = 3) -> Tensor:
    """Whether each image keeps its class under PGD on the margin, with normalised steps, within the ball and [0, 1]."""
    torch.manual_seed(0)

    def inside(x: Tensor) -> Tensor:
        """The ball's centre is in the box, so that moving a point of the ball into the box leaves it in the ball."""
        change = (x - images).flatten(1)
        change = change * (radius / change.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
        return (images + change.reshape(images.shape)).clamp(0, 1)

    def margins(x: Tensor) -> Tensor:
        logits = model(x)
        own = logits.gather(1, labels[:, None])
        return (own - logits.scatter(1, labels[:, None], -math.inf).amax(1, keepdim=True))[:, 0]

    kept = torch.ones(len(images), dtype=torch.bool)
    for restart in range(restarts):
        x = inside(images + radius * torch.randn_like(images)) if restart else images
        for step in range(steps + 1):
            x = x.detach().requires_grad_()
            margin = margins(x)
            kept &= margin.detach() > 0
            if step < steps:
                (slope,) = torch.autograd.grad(margin.sum(), x)
                size = slope.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)
                x = inside(x.detach() - 2.5 * radius / steps * slope / size)
    return kept


def rows_of(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network, one for each radius."""
    network = NETWORKS[name]
    model, images, labels = load(name, options.nets)
    images, labels = images[: options.images], labels[: options.images]
    with torch.no_grad():
        logits = model(images)
    proved = rs.certified_radius(logits, labels, rs.lipschitz_bound(model, images[:2]))
    rows = []
    for factor in options.radii:
        radius = network.radius * factor
        clock = time.perf_counter()
        found = rs.certify(model, images, labels, radius, steps=options.steps)
        seconds = (time.perf_counter() - clock) / len(images)
        kept = pgd(model, images, labels, radius)
        rows.append({
            "network": name, "radius": radius, "factor": factor, "images": len(images), "steps": options.steps,
            "clean": percent(logits.argmax(1) == labels), "pgd": percent(kept), "certified": percent(found.certified),
            "certified_globally": percent(proved > radius), "certified_of_kept": percent(found.certified[kept]),
            "seconds_per_image": seconds, "failure_probability": found.failure_probability, "reason": found.reason,
            "certified_and_broken": int((found.certified & ~kept).sum()),
            "published": published_figures(network) if factor == 1 else None,
        })  # fmt: skip
        print(line(rows[-1]), flush=True)
    return rows


def published_figures(network: Published) -> dict[str, float | None]:
    """The figures of SDP-CROWN's table."""
    return {key: getattr(network, key) for key in ("clean", "pgd", "sdp_crown", "product", "seconds")}


def percent(flags: Tensor) -> float:
    """The share of images, in %."""
    return 100 * float(flags.double().mean()) if len(flags) else math.nan


_COLUMNS = ("network", "radius", "clean", "PGD", "certify", "global", "of PGD's", "s/image",
            "clean", "PGD", "SDP-CROWN", "product", "s/image")  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row of the printed table: our figures, then the published ones."""
    ours = [row[key] for key in ("clean", "pgd", "certified", "certified_globally", "certified_of_kept")]
    theirs = (row["published"] or {}).values()
    shown = [f"{row['radius']:.4g}", *(f"{v:.1f}" for v in ours), f"{row['seconds_per_image']:.2f}"]
    return formatted([row["network"], *shown, *("" if v is None else f"{v:.1f}" for v in theirs)])


def formatted(cells: list[str] | tuple[str, ...]) -> str:
    """Cells in columns."""
    return " ".join([f"{cells[0]:<17}", *(f"{cell:>9}" for cell in cells[1:])])


def main() -> int:
    """Measure every network, print a table, write JSON; status 1 if PGD broke a certified image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=Path, required=True, help="folder of the networks and images")
    parser.add_argument("--only", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100, help="gradient steps on the bounds of an image")
    parser.add_argument("--radii", type=float, nargs="*", default=[0.5, 1.0, 1.5], help="factors of the published radius")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(formatted(_COLUMNS))
    rows: list[dict[str, Any]] = []
    for name in options.only:
        rows += rows_of(name, options)
        if options.out:  # after every network, so that a stop loses none
            write_json(options.out, {"rows": rows, **environment()})
    return int(any(row["certified_and_broken"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
