"""Certificates of five small networks of common architectures, and attempts to break them.

    python evaluations/benchmarks/certified_nets.py --out evaluations/benchmarks/results/certified_nets.json

Each network is trained on MNIST-5k at 32 x 32, then fine-tuned for certificates with its composites (layers together with the
batch normalisation after them) clipped and its residual blocks averaged, and certified on its 1,000 test images. Every
certified image is attacked just inside its own radius: by PGD, and by a search for roundings, that is many float32 neighbours
of points on the line to the result of PGD. AutoAttack takes one radius for a batch, so images are grouped in bins and attacked
at the smallest radius of their bin. All verdicts are those of the certified forward pass.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models import register_model
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.dla import DLA, DlaBasic
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.evaluations.attacking import certified_radii
from robust_spectral.evaluations.attacks import into_ball, make_attack, run_attack
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning import finetune
from robust_spectral.evaluations.models import load_run
from robust_spectral.evaluations.run_folder import environment, write_json

_INSIDE = 1 - 1e-6  # size of an attack as a share of the radius


@register_model
def small_resnet(pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, **rest: Any) -> nn.Module:
    """Four stages of one basic block."""
    return ResNet(
        BasicBlock, (1, 1, 1, 1), channels=(16, 24, 32, 48), stem_width=16, num_classes=num_classes, in_chans=in_chans
    )


@register_model
def small_dla(pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, **rest: Any) -> nn.Module:
    """Deep layer aggregation of single levels."""
    return DLA(
        levels=(1, 1, 1, 1, 1, 1), channels=(8, 16, 16, 24, 32, 48), block=DlaBasic, num_classes=num_classes, in_chans=in_chans
    )


@register_model
def small_vgg(pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, **rest: Any) -> nn.Module:
    """Convolutions and pooling in a chain, two dense layers."""
    layers: list[nn.Module] = []
    for before, after, pool in ((in_chans, 16, False), (16, 16, True), (16, 32, True), (32, 32, True)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, num_classes))


@register_model
def small_mobilenet(pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, **rest: Any) -> nn.Module:
    """Four inverted residual blocks, depthwise convolutions between pointwise ones."""
    widths = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2))
    blocks = [InvertedResidual(before, after, stride=stride, exp_ratio=2.0) for before, after, stride in widths]
    stem = [nn.Conv2d(in_chans, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 48, num_classes))


class DenselyConnected(nn.Module):
    """A layer that appends the output of a convolution, a batch normalisation and a ReLU to its input."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, growth, 3, padding=1, bias=False), nn.BatchNorm2d(growth)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with ``growth`` more channels."""
        return torch.cat([x, torch.relu(self.norm(self.conv(x)))], 1)


@register_model
def small_densenet(pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, **rest: Any) -> nn.Module:
    """Three blocks of two densely connected layers, a 1 x 1 convolution and pooling between them."""
    layers: list[nn.Module] = [nn.Conv2d(in_chans, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for width in (16, 24, 32):
        layers += [DenselyConnected(width, 16), DenselyConnected(width + 16, 16)]
        layers += [nn.Conv2d(width + 32, width + 8, 1, bias=False), nn.BatchNorm2d(width + 8), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(40 * 4, num_classes))


KINDS = ("small_resnet", "small_dla", "small_vgg", "small_mobilenet", "small_densenet")
RESIDUAL = ("small_resnet", "small_dla", "small_mobilenet")  # kinds whose residual blocks are averaged


def trained(name: str, epochs: int, folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, trained without clipping and then fine-tuned with every composite clipped, and 1,000 test images."""
    start = FinetuneConfig(model=name, data="mnist5k", image_size=32, epochs=epochs, lr=2e-3, max_norm=None)
    finetune(start, folder / "start")
    held = replace(start, initial_checkpoint=str(folder / "start" / "model.safetensors"), epochs=2 * epochs, freeze_bn=True,
                   residuals="averaged" if name in RESIDUAL else "summed", opt="muon", lr=0.01, max_norm=1.0,
                   logit_scale=20.0, spectral_warmup=0.5, objective="certified", margin_eps=0.1)  # fmt: skip
    finetune(held, folder / "held")
    model, data, _ = load_run(folder / "held")
    return model.eval(), *data.test_images(1000)


def pgd(model: nn.Module, x: Tensor, labels: Tensor, radii: Tensor, steps: int = 40) -> Tensor:
    """PGD with L2 steps on the margin loss, each image in its own ball."""
    size = radii.reshape(-1, 1, 1, 1)
    delta = torch.zeros_like(x)
    for step in range(steps):
        delta.requires_grad_()
        scores = model(x + delta)
        own = scores.gather(1, labels[:, None])[:, 0]
        others = scores.scatter(1, labels[:, None], -torch.inf).amax(1)
        gradient = torch.autograd.grad((others - own).sum(), delta)[0]
        direction = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, 1, 1, 1)
        with torch.no_grad():
            delta = delta + size * direction * (2.5 / steps if step else 1.0)
            delta = into_ball(x + delta, x, "l2", size) - x
    return (x + delta).detach()


def broken(model: nn.Module, x: Tensor, adversarial: Tensor, labels: Tensor, radii: Tensor) -> Tensor:
    """The mask of images whose adversarial image has another class and is no further away than their radius."""
    with torch.no_grad():
        inside = (adversarial - x).flatten(1).norm(dim=1) <= radii
        return inside & (model(adversarial).argmax(1) != labels)


def rounding_search(
    model: nn.Module, x: Tensor, ends: Tensor, labels: Tensor, radii: Tensor, tries: int = 40
) -> tuple[Tensor, int]:
    """The mask of images broken by a float32 neighbour of points between ``x`` and ``ends``, and the tries for each."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(len(x), dtype=torch.bool)
    for index in range(tries):
        share = 1.0 if index % 2 else float(torch.rand((), generator=generator))
        point = (x + share * (ends - x)).float()
        jitter = torch.randint(-2, 3, point.shape, generator=generator, dtype=torch.int32)
        moved = torch.where(point > 0, (point.view(torch.int32) + jitter).view(torch.float32), point)
        found |= broken(model, x, moved.double().clamp(0, 1).to(x.dtype), labels, radii)
    return found, tries


def verdict(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one kind of network, certify it and attack it."""
    folder = Path(tempfile.mkdtemp())
    try:
        model, images, labels = trained(name, options.epochs, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    bound = rs.lipschitz_bound(model, images[:1])
    with torch.no_grad():
        logits, exact = model(images), copy.deepcopy(model).double()(images.double())
    radii, dtype = certified_radii(logits, exact, labels, bound)
    model, images = copy.deepcopy(model).to(dtype), images.to(dtype)
    sure = radii > 0
    x, y, r = images[sure], labels[sure], radii[sure] * _INSIDE
    ends = pgd(model, x, y, r.to(dtype))
    by_pgd = broken(model, x, ends, y, radii[sure])
    by_rounding, tries = rounding_search(model, x, ends, y, radii[sure])
    steps = sorted(radii.tolist(), reverse=True)
    stated = steps[max(0, int(0.3 * len(steps)) - 1)]
    estimate = rs.lipschitz_estimate(copy.deepcopy(model).float(), images[:64].float())
    return {
        "model": name, "bound": bound.value, "estimate": estimate,
        "errors": {str(kind): value for kind, value in bound.errors.items()}, "certified_dtype": str(dtype),
        "accuracy": float((logits.argmax(1) == labels).float().mean()), "images": len(labels), "certified": int(sure.sum()),
        "radius_of_30_percent": stated, "largest_radius": steps[0], "broken_by_pgd": int(by_pgd.sum()),
        "broken_by_rounding": int(by_rounding.sum()), "roundings_tried_each": tries,
        **binned(model, x, y, r, options.autoattack),
    }  # fmt: skip


def binned(model: nn.Module, x: Tensor, labels: Tensor, radii: Tensor, count: int, bins: int = 4) -> dict[str, Any]:
    """AutoAttack on bins of images, each bin at its smallest radius."""
    order = radii.argsort(descending=True)[: count // bins * bins]
    single = copy.deepcopy(model).float()
    fallen, sizes = 0, []
    for part in order.chunk(bins) if len(order) else []:
        eps = float(radii[part].min())
        found = run_attack(make_attack("autoattack", "l2", eps), single, x[part].float(), labels[part], seed=0).adversarial
        found = into_ball(found.to(x.dtype), x[part], "l2", eps)
        fallen += int(broken(model, x[part], found, labels[part], torch.full_like(radii[part], eps * (1 + 1e-9))).sum())
        sizes.append(eps)
    return {"autoattack_images": len(order), "autoattack_eps": sizes, "broken_by_autoattack": fallen}


def main() -> int:
    """Test every kind, print a line for each, write JSON; status 1 if a certificate was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--autoattack", type=int, default=100, help="number of images for AutoAttack")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.kinds:
        rows.append(verdict(name, options))
        print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)
        if options.out:  # after every row, so that a stop loses none
            write_json(options.out, {"rows": rows, **environment()})
    return int(any(value for row in rows for key, value in row.items() if key.startswith("broken")))


if __name__ == "__main__":
    raise SystemExit(main())
