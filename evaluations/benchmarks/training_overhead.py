"""Cost of clipping in training: the time of a clipped step over that of an unclipped one, paired in one run, and peak memory.

    python evaluations/benchmarks/training_overhead.py --out evaluations/benchmarks/results/training_overhead.json
    python evaluations/benchmarks/training_overhead.py --reference PATH   # with a checkout of the authors' code
    python evaluations/benchmarks/training_overhead.py --device cuda   # in bfloat16, with larger batches

Every method trains a model of its own from the same weights on the same random batch. The methods alternate step by step, so
that a slow moment of the machine affects all of them, and the ratio is the median over the rounds. Peak memory comes from a
process of its own for each method.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import robust_spectral as rs
from robust_spectral.evaluations.run_folder import environment, write_json


@dataclass(frozen=True)
class Setting:
    """A model and the batches it is trained on."""

    model: str
    image: int
    batch: int
    rounds: int

    def build(self, device: str) -> nn.Module:
        """The model with random weights; a ResNet for small images has a 3 x 3 stem without pooling."""
        torch.manual_seed(0)
        model: Any = timm.create_model(self.model, num_classes=10)
        if self.image <= 32 and self.model.startswith("resnet"):
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return model.to(device, memory_format=torch.channels_last) if device != "cpu" else model.to(device)


CPU = [
    Setting("test_resnet", 28, 64, 60), Setting("resnet18", 32, 64, 60), Setting("resnet50", 224, 8, 8),
    Setting("mobilenetv3_small_100", 224, 64, 20),
]  # fmt: skip
CUDA = [Setting("test_resnet", 28, 64, 200), Setting("resnet18", 32, 64, 200), Setting("resnet50", 224, 256, 120)]


def plain(model: nn.Module, images: Tensor) -> torch.optim.Optimizer:
    """SGD with momentum, without clipping."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def fastclip(model: nn.Module, images: Tensor, **options: Any) -> torch.optim.Optimizer:
    """FastClip as an optimizer hook, with its defaults except the given options."""
    optimizer = plain(model, images)
    model.train()
    rs.FastClip(model, images[:1].float(), **options).attach(optimizer)
    return optimizer


def torch_spectral_norm(model: nn.Module, images: Tensor) -> torch.optim.Optimizer:
    """torch's parametrisation on every layer: one power iteration on the reshaped weight, another operator."""
    for module in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        parametrizations.spectral_norm(module)
    return plain(model, images)


def torchlip(model: nn.Module, images: Tensor) -> torch.optim.Optimizer:
    """deel-torchlip's spectral normalisation and Björck orthonormalisation hooks on every layer's reshaped weight."""
    from deel.torchlip.utils import bjorck_norm

    for module in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        parametrizations.spectral_norm(module)
        bjorck_norm(module)
    return plain(model, images)


def authors(path: Path, model: nn.Module, images: Tensor) -> torch.optim.Optimizer:
    """The authors' wrapper on every layer: an estimate of the norm at every step, a clip every hundred, as in their scripts."""
    sys.path[:0] = [str(path), str(path / "models")]
    from spectral_normalization_deflate_complex_both_bn import SpectralNorm  # type: ignore[import-not-found]

    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            parent = model.get_submodule(name.rpartition(".")[0])
            wrapped = SpectralNorm(module, clip_steps=100, clip_opt_iter=5, clip_opt_stepsize=0.35, device=images.device.type)
            setattr(parent, name.rpartition(".")[2], wrapped)
    return plain(model, images)


Method = Callable[[nn.Module, Tensor], torch.optim.Optimizer]
METHODS: dict[str, Method] = {
    "plain": plain, "fastclip": fastclip, "fastclip off": partial(fastclip, max_norm=float("inf")),
    "torch spectral_norm": torch_spectral_norm, "deel-torchlip": torchlip,
}  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One training step, in bfloat16 on a GPU."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()


def batch(setting: Setting, device: str) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, 3, setting.image, setting.image, generator=generator)
    return images.to(device), torch.randint(0, 10, (setting.batch,), generator=generator).to(device)


def ratios(setting: Setting, methods: dict[str, Method], device: str) -> dict[str, Any]:
    """Seconds of an unclipped step, and each method's time relative to it: median and quartiles over rounds, and in all."""
    images, labels = batch(setting, device)
    ready, refused = {}, {}
    for name, prepare in methods.items():
        model = setting.build(device).train()
        try:
            ready[name] = (model, prepare(model, images))
            for _ in range(3):
                step(*ready[name], images, labels)
        except Exception as error:  # noqa: BLE001 - a peer's refusal is a result
            ready.pop(name, None)
            refused[name] = f"{type(error).__name__}: {error}"[:200]
    times: dict[str, list[float]] = {name: [] for name in ready}
    for index in range(setting.rounds):
        order = [*ready][:: 1 if index % 2 else -1]
        for name in order:
            started = time.perf_counter()
            step(*ready[name], images, labels)
            times[name].append(time.perf_counter() - started)
    found: dict[str, Any] = {"seconds": statistics.median(times["plain"]), "refused": refused}
    for name in ready:
        paired = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
        low, middle, high = statistics.quantiles(paired, n=4)
        found[name] = {"ratio": middle, "quartiles": [low, high], "of_all_seconds": sum(times[name]) / sum(times["plain"])}
    return found


def peak_memory(setting: Setting, name: str, options: argparse.Namespace) -> float:
    """Peak memory of a process that does nothing but four training steps, in MiB."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--memory-of",
        name,
        "--setting",
        setting.model,
        "--device",
        options.device,
    ]
    if options.reference:
        command += ["--reference", str(options.reference)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def report_memory(setting: Setting, prepare: Method, device: str) -> None:
    """Print the peak memory of four training steps; `peak_memory` runs this in a process of its own."""
    images, labels = batch(setting, device)
    model = setting.build(device).train()
    optimizer = prepare(model, images)
    for _ in range(4):
        step(model, optimizer, images, labels)
    on_gpu = device != "cpu"
    print(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident_peak())


def resident_peak() -> float:
    """Peak resident memory of this process so far, in MiB; getrusage would include that of its parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def main() -> None:
    """Measure all settings, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' code")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--settings", nargs="*", help="names of models; default all")
    parser.add_argument("--methods", nargs="*", help="default all")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "FastClip:")
    settings = CPU if options.device == "cpu" else CUDA
    methods = METHODS | ({"authors' code": partial(authors, options.reference)} if options.reference else {})
    if options.memory_of:
        report_memory(next(s for s in settings if s.model == options.setting), methods[options.memory_of], options.device)
        return
    methods = {name: methods[name] for name in ["plain", *(options.methods or list(methods)[1:])]}
    rows = []
    for setting in settings:
        if options.settings and setting.model not in options.settings:
            continue
        row = {
            "model": setting.model,
            "image": setting.image,
            "batch": setting.batch,
            **ratios(setting, methods, options.device),
        }
        if not options.no_memory:
            row["memory_mib"] = {name: peak_memory(setting, name, options) for name in methods if name in row}
        rows.append(row)
        print(
            f"{setting.model} {setting.image}², batch {setting.batch}: unclipped step {row['seconds'] * 1e3:.1f} ms", flush=True
        )
        for name in methods:
            got = row.get(name)
            shown = f"{got['ratio']:.3f} x ({got['of_all_seconds']:.3f} in all)" if got else row["refused"][name]
            memory = f"  {row['memory_mib'][name]:.0f} MiB" if name in row.get("memory_mib", {}) else ""
            print(f"  {name:22s} {shown}{memory}", flush=True)
    if options.out:
        write_json(options.out, {"rows": rows, **environment(options.device)})


if __name__ == "__main__":
    main()
