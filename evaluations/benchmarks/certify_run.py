"""Certified accuracy of a trained run at given radii, by `certify` around its first test images.

    robust-spectral finetune --recipe fashion-residual --out runs/fashion-residual
    python evaluations/benchmarks/certify_run.py runs/fashion-residual --images 160 \\
      --out evaluations/benchmarks/results/certify_residual.json

`evaluate --local-certificates` searches for the largest radius of each image, and often stops a little below it. Here each
radius is tried as it is. An image that PGD breaks within a radius is not tried there, because it has no certificate, and one
that is certified at a radius counts at every smaller one. The results are written after every block of images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from certify_local import percent, pgd
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.evaluations.models import load_run
from robust_spectral.evaluations.run_folder import environment, write_json

_BLOCK = 16  # images that are certified together


Flags = dict[float, Tensor]  # by radius, whether each image has a property, (n,)


def certified_at(model: nn.Module, images: Tensor, labels: Tensor, kept: Flags, steps: int) -> Flags:
    """Whether each image is certified at each radius of ``kept``, which tells whether it survived an attack there."""
    found: Flags = {}
    larger = torch.zeros(len(images), dtype=torch.bool)
    for radius in sorted(kept, reverse=True):
        tried = (kept[radius] & ~larger).nonzero()[:, 0]
        larger = larger.clone()
        if len(tried):
            larger[tried] = rs.certify(model, images[tried], labels[tried], radius, steps=steps).certified
        found[radius] = larger
    return found


def main() -> None:
    """Certify the images block by block, print the shares so far, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100, help="gradient steps on the bounds of an image")
    parser.add_argument("--radii", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, data, record = load_run(options.run)
    model = model.double().eval()
    images, labels = data.test_images(options.images)
    images = images.double()
    with torch.no_grad():
        logits = model(images)
    proved = rs.certified_radius(logits, labels, rs.lipschitz_bound(model, images[:2]))
    kept = {radius: pgd(model, images, labels, radius) for radius in options.radii}
    found: dict[float, list[Tensor]] = {radius: [] for radius in options.radii}
    clock = time.perf_counter()
    for first in range(0, len(images), _BLOCK):
        part = slice(first, first + _BLOCK)
        here = {radius: kept[radius][part] for radius in options.radii}
        for radius, flags in certified_at(model, images[part], labels[part], here, options.steps).items():
            found[radius].append(flags)
        done = min(first + _BLOCK, len(images))
        rows: list[dict[str, Any]] = [
            {"radius": radius, "images": done, "clean": percent((logits.argmax(1) == labels)[:done]),
             "pgd": percent(kept[radius][:done]), "certified": percent(torch.cat(found[radius])),
             "certified_globally": percent((proved > radius)[:done])}
            for radius in options.radii
        ]  # fmt: skip
        seconds = (time.perf_counter() - clock) / done
        print(f"{seconds:.2f} s an image", *rows, sep="\n", flush=True)
        if options.out:
            told = {"config": record["config"], "model_sha256": record["model_sha256"], "steps": options.steps}
            write_json(options.out, {"rows": rows, "seconds_per_image": seconds, **told, **environment()})


if __name__ == "__main__":
    main()
