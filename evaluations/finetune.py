"""Fine-tuning of a timm model with its spectral norms held, into a run folder; every epoch can be resumed from exactly.

The optimizer, the schedule and the moving average are timm's. The seed of every epoch is fixed, so that a run which was
stopped and resumed ends, on a CPU, with the very weights of one that was not.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from robust_spectral import FastClip, Lanczos, fold_batchnorms_, top_singular
from robust_spectral.affine import is_batchnorm
from robust_spectral.fastclip import Composites
from robust_spectral.plugins.defences import Defence, NoDefence
from robust_spectral.plugins.registry import find
from robust_spectral.plugins.timm import PixelModel, load, load_weights
from robust_spectral.plugins.timm_blocks import average_residuals_

from .data import ImageData, check_pixels, data_hash, load_data, stack
from .lifting import Lift
from .objectives import CertifiedCrossEntropy, CrossEntropy
from .runs import (
    all_finite,
    check_device,
    environment,
    file_hash,
    open_run,
    remove_scratch,
    save_weights,
    write_atomically,
    write_json,
)

_MOST_SKIPPED = 10  # batches in a row with a loss that is not finite
_STOPPED = "stopped, the last complete epoch is kept; start anew with a lower --lr"


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything a fine-tuning run depends on; stored in its run.json."""

    model: str
    data: str
    image_size: int | None = None
    pretrained: bool = False
    pretrained_path: str | None = None
    initial_checkpoint: str | None = None
    epochs: int = 3
    batch_size: int = 64
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    sched: str = "cosine"
    warmup_epochs: int = 0
    defence: str = "fastclip"
    max_norm: float | None = 1.0
    lipschitz_target: float | None = None
    composites: Composites = "auto"
    spectral_warmup: float = 0.5
    logit_scale: float = 1.0
    objective: Literal["accuracy", "certified"] = "accuracy"
    margin_eps: float = 0.0
    lift: bool = False
    freeze_bn: bool = False
    fold_bn: bool = False
    residuals: Literal["summed", "averaged"] = "summed"
    amp: bool = False
    amp_dtype: str = "float16"
    model_ema: bool = False
    model_ema_decay: float = 0.999
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm={self.max_norm}: must be positive (leave it out, or inf, for no clipping)")
        find("defence", self.defence)
        if self.lipschitz_target is not None and not self.fastclip:
            raise ValueError(f"lipschitz_target={self.lipschitz_target}: of fastclip only, not of defence={self.defence!r}")
        if self.lipschitz_target is not None and not 0 < self.lipschitz_target < math.inf:
            raise ValueError(f"lipschitz_target={self.lipschitz_target}: must be positive and finite")
        if self.epochs < 0 or self.batch_size < 1 or not self.lr > 0 or not self.logit_scale > 0:
            raise ValueError("epochs must not be negative; batch_size, lr and logit_scale must be positive")
        if self.amp_dtype not in ("float16", "bfloat16"):
            raise ValueError(f"amp_dtype={self.amp_dtype!r}: expected float16 or bfloat16")
        if self.composites not in ("auto", "always", "never"):
            raise ValueError(f"composites={self.composites!r}: expected auto, always or never")
        if self.objective not in ("accuracy", "certified") or self.residuals not in ("summed", "averaged"):
            given = f"objective={self.objective!r}, residuals={self.residuals!r}"
            raise ValueError(f"{given}: expected accuracy or certified, and summed or averaged")
        if (self.objective == "certified") != (0 < self.margin_eps < math.inf):
            raise ValueError(
                f"objective={self.objective!r}, margin_eps={self.margin_eps}: the certified objective, and no other, takes the "
                "positive radius that images are to be certified at"
            )
        if self.lift and (self.finite_max_norm is None or self.spectral_warmup > 0):
            raise ValueError("lift: raises singular values to a finite max_norm, and takes no spectral_warmup")
        if not 0 <= self.spectral_warmup <= 1:
            raise ValueError(f"spectral_warmup={self.spectral_warmup}: is a share of the training steps, 0 to 1")

    @property
    def clips(self) -> bool:
        """Whether the run holds spectral norms with FastClip."""
        return self.fastclip and (self.finite_max_norm is not None or self.lipschitz_target is not None)

    @property
    def fastclip(self) -> bool:
        """Whether the defence is FastClip, with all its options, and no other."""
        return self.defence in ("fastclip", "fastclip-composite")

    @property
    def finite_max_norm(self) -> float | None:
        """The norm asked of every layer by itself, if any is."""
        return self.max_norm if self.max_norm is not None and math.isfinite(self.max_norm) else None


def create_model(config: FinetuneConfig, data: ImageData) -> PixelModel:
    """The model of a configuration, before fine-tuning."""
    overlay = {"pretrained_cfg_overlay": {"file": config.pretrained_path}} if config.pretrained_path else {}
    if config.pretrained_path and not Path(config.pretrained_path).is_file():
        raise ValueError(f"pretrained_path={config.pretrained_path!r}: no such file")
    torch.manual_seed(config.seed)
    model = load(
        config.model,
        pretrained=config.pretrained or config.pretrained_path is not None,
        checkpoint=config.initial_checkpoint,
        num_classes=data.classes,
        in_chans=data.channels,
        **overlay,
    )
    return _rebuilt(model, config, data)


def _rebuilt(model: PixelModel, config: FinetuneConfig, data: ImageData) -> PixelModel:
    """The model with the changes of its architecture that the configuration asks for."""
    if config.fold_bn:
        fold_batchnorms_(model, data.example())
    if config.residuals == "averaged":
        average_residuals_(model.model)
    return model


def finetune(config: FinetuneConfig, out: Path, *, resume: bool = False) -> Path:
    """Fine-tune a model into the run folder ``out``.

    Args:
        config: What to do.
        out: The folder; it must not hold another run.
        resume: Go on from the last complete epoch of an interrupted run with this very configuration; one that is finished
            stays as it is.

    Raises:
        ValueError: bad input, a folder that holds a run already, a loss or weights that were not finite for ten steps in a
            row, or weights that are not at an epoch's end (the last complete epoch is kept).
    """
    check_device(config.device)
    if not _claim(out, config, resume):
        return out
    data = load_data(config.data, config.image_size)
    example = data.example().to(config.device)
    model = create_model(config, data).to(config.device)
    if not all_finite(model.state_dict()):
        raise ValueError(f"{config.model}: the weights to start from hold NaN or infinite values")
    try:
        with torch.no_grad():
            model(example)
    except RuntimeError as error:
        shape = tuple(example.shape[1:])
        raise ValueError(f"{config.model} does not take images of shape {shape}, give another --image-size: {error}") from error
    training = _Training(config, data, model, out)
    if resume and (out / "state.pt").is_file():
        training.restore()
    with _progress() as progress:
        for epoch in range(training.epoch, config.epochs):
            training.train_epoch(epoch, progress)
            training.save(epoch + 1)
    training.close()
    return out


class _Training:
    """Model, optimizer, schedule, clipper and log of a running fine-tuning."""

    def __init__(self, config: FinetuneConfig, data: ImageData, model: PixelModel, out: Path) -> None:
        self.config, self.data, self.model, self.out = config, data, model, out
        self.epoch, self.rows, self.started = 0, list[dict[str, Any]](), time.time()
        self.skipped = self.skipped_in_a_row = 0
        self.batches = max(1, len(data.train) // config.batch_size)  # type: ignore[arg-type]
        self._set_mode(training=True)
        self.clipper = self._clipper(model)
        self.before = {row["name"]: row["upper"] for row in self.clipper.report(rtol=0.02)}
        self.rival: Defence = NoDefence() if config.fastclip else find("defence", config.defence)(config.finite_max_norm or 1.0)
        self.rival.prepare(model, data.example().to(config.device))
        self.optimizer = create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=config.sched, num_epochs=max(1, config.epochs), warmup_epochs=config.warmup_epochs,
            step_on_epochs=False, updates_per_epoch=self.batches,
        )  # fmt: skip
        self.ema = ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema else None
        self.scaler = torch.amp.GradScaler(config.device.split(":")[0], enabled=config.amp and config.amp_dtype == "float16")
        certified = config.objective == "certified"
        self.loss = (
            CertifiedCrossEntropy(config.logit_scale, config.margin_eps) if certified else CrossEntropy(config.logit_scale)
        )
        if config.fastclip:
            self.clipper.attach(self.optimizer)
        self.rival.attach(self.optimizer)
        if config.lift and config.max_norm is not None:
            Lift(model, config.max_norm).attach(self.optimizer)

    def train_epoch(self, epoch: int, progress: Progress) -> None:
        """One pass over the training split, every random draw of which follows from the seed and the epoch."""
        seed = self.config.seed * 100_003 + epoch
        torch.manual_seed(seed)
        random.seed(seed)  # timm's augmentation draws from here
        np.random.seed(seed % 2**32)
        self._set_mode(training=True)
        task = progress.add_task(f"epoch {epoch + 1}/{self.config.epochs}", total=self.batches, stats="")
        for index, (images, labels) in enumerate(self._loader(seed)):
            if index == 0 and epoch == 0:
                check_pixels(images, self.data.name)
            if index % max(1, self.batches // 4) == 0:
                progress_made = (epoch + index / self.batches) / self.config.epochs
                self.loss.renew(self.model, self.data.example().to(self.config.device), progress_made)
            loss, correct = self._update(images.to(self.config.device), labels.to(self.config.device))
            step = epoch * self.batches + index + 1
            if self.scheduler is not None:
                self.scheduler.step_update(step)
            if index % max(1, self.batches // 4) == 0 or index + 1 == self.batches:
                self._log(epoch, step, loss, correct / len(labels), progress, task)
            progress.advance(task)
        if self.config.clips and self.clipper.steps == 0:
            raise ValueError(f"{self.out}: optimizer {self.config.opt!r} never called the clipper's hook; use another --opt")

    def _update(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        config = self.config
        device, dtype = config.device.split(":")[0], getattr(torch, config.amp_dtype)
        with torch.autocast(device, dtype=dtype) if config.amp else nullcontext():
            logits = self.model(images)
            loss = self.loss(logits.float(), labels)
        loss = loss + self.rival.penalty()
        value = loss.item()
        self.optimizer.zero_grad()
        if not math.isfinite(value):
            self._skip(value)
            return value, 0
        self.skipped_in_a_row = 0
        self.scaler.scale(loss).backward()
        try:
            self.scaler.step(self.optimizer)
        except ValueError as error:  # the clipper saw weights that are not finite
            raise ValueError(f"{self.out}: {error}; {_STOPPED}") from error
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)
        return value, int((logits.argmax(1) == labels).sum())

    def _skip(self, loss: float) -> None:
        """Count a batch whose loss is not finite, and leave the weights as they are."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= _MOST_SKIPPED:
            raise ValueError(f"{self.out}: the loss was {loss} for {_MOST_SKIPPED} steps in a row; {_STOPPED}")

    def save(self, epoch: int) -> None:
        """Write the state after an epoch, unless the weights are no longer finite."""
        if not all_finite(self.model.state_dict()):
            raise ValueError(f"{self.out}: weights became NaN or infinite; {_STOPPED}")
        state = {
            "epoch": epoch, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "clipper": self.clipper.state_dict(), "rival": self.rival.state(), "scaler": self.scaler.state_dict(),
            "rows": self.rows, "before": self.before, "ema": None if self.ema is None else self.ema.module.state_dict(),
            "seconds": time.time() - self.started, "skipped": self.skipped,
        }  # fmt: skip
        write_atomically(self.out / "state.pt", lambda scratch: torch.save(state, scratch))

    def restore(self) -> None:
        """Go on from the saved state."""
        state = torch.load(self.out / "state.pt", map_location="cpu", weights_only=True)
        self.epoch, self.rows, self.before = state["epoch"], state["rows"], state["before"]
        self.started, self.skipped = time.time() - state["seconds"], state["skipped"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.clipper.load_state_dict(state["clipper"])
        self.rival.restore(state["rival"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.scheduler is not None:
            self.scheduler.step_update(self.epoch * self.batches)

    def close(self) -> None:
        """Final clip with proof, then the files that make the run complete; run.json last."""
        trained, config, clipper = self.model if self.ema is None else self.ema.module, self.config, self.clipper
        if self.ema is not None:
            clipper = self._clipper(trained)
            clipper.load_state_dict(self.clipper.state_dict())  # the same composites, the same vectors
        self._set_mode(training=False)
        self.rival.finish(trained)
        if not config.fastclip:  # whose weights are plain ones now
            clipper = self._clipper(trained)
        clipper.finish()
        after = clipper.report()
        log = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.out / "training.jsonl", lambda scratch: scratch.write_text(log))
        weights = save_weights(trained.model, self.out / "model.safetensors")
        images, labels = self.data.test_images(len(self.data.test))  # type: ignore[arg-type]
        write_json(self.out / "run.json", {
            "config": asdict(config) | {"max_norm": config.finite_max_norm},
            "classes": self.data.classes, "channels": self.data.channels, "image_size": self.data.image_size,
            "model_sha256": weights, "test_data_sha256": data_hash(images, labels), "seed": config.seed,
            "defence": self.defence, "layers": [row | {"before": self.before[row["name"]]} for row in after],
            "skipped": self.skipped, "seconds": round(time.time() - self.started, 1), **environment(config.device),
        })  # fmt: skip
        (self.out / "state.pt").unlink(missing_ok=True)

    @property
    def defence(self) -> str:
        """What the run does to its layers, in a word."""
        return self.config.defence if self.config.clips or not self.config.fastclip else "none"

    def _clipper(self, model: nn.Module) -> FastClip:
        config = self.config
        return FastClip(
            model,
            self.data.example().to(config.device),
            config.finite_max_norm if config.clips and config.finite_max_norm is not None else math.inf,
            composites="always" if config.defence == "fastclip-composite" else config.composites,
            lipschitz_target=config.lipschitz_target,
            warmup_steps=int(config.spectral_warmup * config.epochs * self.batches),
            seed=config.seed,
        )

    def _set_mode(self, *, training: bool) -> None:
        self.model.train(training)
        if self.config.freeze_bn:
            for module in self.model.modules():
                if is_batchnorm(module):
                    module.eval()

    def _loader(self, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            self.data.train, self.config.batch_size, shuffle=True, drop_last=len(self.data.train) >= self.config.batch_size,  # type: ignore[arg-type]
            generator=generator, collate_fn=stack,
        )  # fmt: skip

    def _norms(self) -> dict[str, float]:
        """Estimates of the norm of every layer: the clipper's, or under another defence those of a few Krylov steps."""
        if self.config.fastclip:
            return self.clipper.norms()
        solver = Lanczos(rtol=1e-2, max_steps=12)
        layers = {layer.name: layer.operator(composite=bool(layer.batchnorm)) for layer in self.clipper.layers}
        return {name: float(top_singular(operator, 1, solver).values[0]) for name, operator in layers.items()}

    def _log(self, epoch: int, step: int, loss: float, accuracy: float, progress: Progress, task: Any) -> None:
        try:
            norms = self._norms()
        except ValueError as error:
            raise ValueError(f"{self.out}: the weights are not finite any more; {_STOPPED}") from error
        largest = max(norms, key=lambda name: norms[name])
        self.rows.append({
            "epoch": epoch, "step": step, "loss": loss, "accuracy": accuracy, "lr": self.optimizer.param_groups[0]["lr"],
            "largest_norm": norms[largest], "largest_layer": largest, "norms": norms,
        })  # fmt: skip
        progress.update(task, stats=f"loss {loss:.3f}  acc {100 * accuracy:.1f} %  largest norm {norms[largest]:.3f}")


def _claim(out: Path, config: FinetuneConfig, resume: bool) -> bool:
    """See that the folder is free, or holds the run that is to be resumed; whether there is anything left to do."""
    marker = out / "config.json"
    wanted = json.dumps(asdict(config), sort_keys=True, indent=1)
    remove_scratch(out)
    if (out / "run.json").exists():
        if resume and marker.exists() and marker.read_text() == wanted:
            (out / "state.pt").unlink(missing_ok=True)
            return False
        raise ValueError(f"{out}: holds a finished run already; give another --out, nothing was overwritten")
    interrupted = marker.exists() and (out / "state.pt").exists()
    if interrupted and not resume:
        raise ValueError(f"{out}: holds an interrupted run; go on with --resume, or give another --out")
    if interrupted and marker.read_text() != wanted:
        raise ValueError(f"{out}: the interrupted run there has another configuration; nothing was overwritten")
    if out.exists() and not marker.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty and not a run; give another --out")
    write_atomically(marker, lambda scratch: scratch.write_text(wanted))
    return True


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                    TextColumn("{task.fields[stats]}"))  # fmt: skip


def load_run(folder: Path) -> tuple[PixelModel, ImageData, dict[str, Any]]:
    """The model and the data of a finished run.

    Raises:
        ValueError: the folder is no run, or its weights are not the ones run.json was written for.
    """
    run = open_run(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file() or file_hash(weights) != run["model_sha256"]:
        raise ValueError(f"{folder}: model.safetensors is not the model that run.json describes")
    known = {field.name for field in fields(FinetuneConfig)}
    config = FinetuneConfig(**{key: value for key, value in run["config"].items() if key in known})
    data = load_data(config.data, config.image_size)
    model = _rebuilt(load(config.model, num_classes=run["classes"], in_chans=run["channels"]), config, data)
    load_weights(model.model, weights)
    return model, data, run
