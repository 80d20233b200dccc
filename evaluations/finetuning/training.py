"""Fine-tuning of a timm model into a run folder, with its spectral norms constrained; every epoch is a point to resume from.

The optimizer, the schedule and the moving average are timm's. The seed of every epoch is fixed, so that a run which was
stopped and resumed ends, on a CPU, with exactly the weights of an uninterrupted run. Under torchrun several processes
share the batches.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from robust_spectral import FastClip, Lanczos, top_singular
from robust_spectral.operators import is_batchnorm
from robust_spectral.plugins.defences import Defence, NoDefence
from robust_spectral.plugins.registry import find
from robust_spectral.plugins.timm import PixelModel

from ..config import MOVES, FinetuneConfig
from ..data import ImageData, check_pixels, data_hash, load_data, stack
from ..models import create_model, input_in_words
from ..run_folder import (
    all_finite,
    check_device,
    environment,
    make_folder,
    read_json,
    remove_scratch,
    save_weights,
    write_atomically,
    write_json,
    write_text,
)
from ..terminal import errors
from ..wording import percent
from .lifting import Lift
from .objectives import CertifiedCrossEntropy, CrossEntropy
from .process_group import Ranks, Shares, ranks

_MOST_SKIPPED = 10  # number of batches in a row with a loss that is not finite, at which training stops
_SHOWN = 200  # number of test images for the accuracy shown at the end
_STOPPED = "stopped, complete epochs are kept; start again with a lower --lr, or without --amp"


def finetune(config: FinetuneConfig, out: Path, *, resume: bool = False) -> Path:
    """Fine-tune a model into the run folder ``out``.

    Args:
        config: The configuration of the run.
        out: The folder; it must not contain another run.
        resume: Continue an interrupted run of exactly this configuration after its last complete epoch; a finished run is not
            changed.

    Raises:
        ValueError: invalid input, a folder that contains a run already, a loss or weights that are not finite for ten steps in
            a row, or weights that are not finite at an epoch's end (complete epochs are kept).
    """
    among = ranks()
    device = among.place(config.device)
    check_device(device)
    if config.batch_size % among.count:
        raise ValueError(f"batch_size={config.batch_size}: must be a multiple of the {among.count} processes")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if not among.told_by_first(lambda: _claim(out, config, resume)):
        return out
    data = load_data(config.data, config.image_size)
    model = create_model(config, data).to(device)
    if not all_finite(model.state_dict()):
        raise ValueError(f"{config.model}: the weights to start from contain NaN or infinite values")
    if among.first:
        errors.print(input_in_words(model, data), highlight=False, markup=False, soft_wrap=True)
    training = _Training(config, data, model, out, among)
    if resume and (out / "state.pt").is_file():
        training.restore()
    if among.first:
        write_text(out / "config.json", json.dumps(asdict(config), sort_keys=True, indent=1))
    with _progress(shown=among.first) as progress:
        for epoch in range(training.epoch, config.epochs):
            training.train_epoch(epoch, progress)
            training.save(epoch + 1)
    training.close()
    return out


class _Training:
    """Model, optimizer, schedule, clipper and log of a running fine-tuning."""

    def __init__(self, config: FinetuneConfig, data: ImageData, model: PixelModel, out: Path, among: Ranks) -> None:
        self.config, self.data, self.model, self.out, self.among = config, data, model, out, among
        self.device, self.example = among.place(config.device), data.example().to(among.place(config.device))
        self.replica = among.replica(model)
        self.epoch, self.rows, self.started = 0, list[dict[str, Any]](), time.time()
        self.skipped = self.skipped_in_a_row = 0
        self.batches = max(1, len(data.train) // config.batch_size)  # type: ignore[arg-type]
        self._set_mode(training=True)
        self.clipper = self._clipper(model)
        self.before = {row["name"]: row["upper"] for row in self.clipper.report(rtol=0.02)}
        self.rival: Defence = NoDefence() if config.fastclip else find("defence", config.defence)(config.finite_max_norm or 1.0)
        self.rival.prepare(model, self.example)
        self.optimizer = create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=config.sched, num_epochs=max(1, config.epochs), warmup_epochs=config.warmup_epochs,
            step_on_epochs=False, updates_per_epoch=self.batches,
        )  # fmt: skip
        self.ema = ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=True) if config.model_ema else None
        self.scaler = torch.amp.GradScaler(config.device.split(":")[0], enabled=config.amp and config.amp_dtype == "float16")
        certified = config.objective == "certified"
        self.loss = (
            CertifiedCrossEntropy(config.logit_scale, config.margin_eps) if certified else CrossEntropy(config.logit_scale)
        )
        attack = (config.adversarial_norm, config.adversarial_eps, config.adversarial_steps)
        self.adversary = find("attack", "pgd")(*attack) if config.adversarial_eps > 0 else None
        if config.fastclip:
            self.clipper.attach(self.optimizer)
        self.rival.attach(self.optimizer)
        if config.lift and config.max_norm is not None:
            Lift(model, config.max_norm).attach(self.optimizer)

    def train_epoch(self, epoch: int, progress: Progress) -> None:
        """Train for one pass over the training split; every random draw follows from the seed and the epoch."""
        seed = self.config.seed * 100_003 + epoch
        torch.manual_seed(seed)
        random.seed(seed)  # timm's augmentation draws from here
        np.random.seed(seed % 2**32)
        self._set_mode(training=True)
        task = progress.add_task(f"epoch {epoch + 1}/{self.config.epochs}", total=self.batches, stats="")
        quarter = max(1, self.batches // 4)
        for index, (images, labels) in enumerate(self._loader(seed)):
            if index == 0 and epoch == 0:
                check_pixels(images, self.data.name)
            if index % quarter == 0:
                self.loss.renew(self.model, self.example, (epoch + index / self.batches) / self.config.epochs)
            loss, accuracy = self._update(images.to(self.device), labels.to(self.device))
            step = epoch * self.batches + index + 1
            if self.ema is not None:
                self.ema.update(self.model, step)
            if self.scheduler is not None:
                self.scheduler.step_update(step)
            if index % quarter == 0 or index + 1 == self.batches:
                self._log(epoch, step, loss, accuracy, progress, task)
            progress.advance(task)
        if self.config.clips and self.clipper.steps == 0:
            raise ValueError(f"{self.out}: optimizer {self.config.opt!r} never called the clipper's hook; use another --opt")

    def _update(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Take one step; return its loss and accuracy over all processes."""
        config = self.config
        if self.adversary is not None:  # every image is attacked, in eval mode, as in ART's Madry trainer
            images = self.adversary(self.model.eval(), images, labels)
            self._set_mode(training=True)
        device, dtype = config.device.split(":")[0], getattr(torch, config.amp_dtype)
        with torch.autocast(device, dtype=dtype) if config.amp else nullcontext():
            logits = self.replica(images)
            loss = self.loss(logits.float(), labels)
        loss = loss + self.rival.penalty()
        value, accuracy = self.among.mean(loss.item(), float((logits.argmax(1) == labels).double().mean()))
        self.optimizer.zero_grad()
        if not math.isfinite(value):
            self._skip(value)
            return value, 0.0
        self.skipped_in_a_row = 0
        self.scaler.scale(loss).backward()
        try:
            self.scaler.step(self.optimizer)
        except ValueError as error:  # the clipper saw weights that are not finite
            raise ValueError(f"{self.out}: {error}; {_STOPPED}") from error
        self.scaler.update()
        return value, accuracy

    def _skip(self, loss: float) -> None:
        """Count a batch whose loss is not finite; the weights do not change."""
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
        if self.among.first:
            write_atomically(self.out / "state.pt", lambda scratch: torch.save(state, scratch))

    def restore(self) -> None:
        """Restore the saved state."""
        try:
            state = torch.load(self.out / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{self.out / 'state.pt'}: not readable, remove the folder and start again: {error}") from error
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
        """Clip a last time, with proof, and write the files that complete the run; run.json comes last."""
        trained, config, clipper = self.model if self.ema is None else self.ema.module, self.config, self.clipper
        if self.ema is not None:
            clipper = self._clipper(trained)
            clipper.load_state_dict(self.clipper.state_dict())  # with the same composites and vectors
        self._set_mode(training=False)
        self.rival.finish(trained)
        if not config.fastclip:  # the defence's finish may replace the weights that the clipper was made for
            clipper = self._clipper(trained)
        clipper.finish()
        after = clipper.report()
        if self.among.first:
            self._write(trained, after)
        self.among.told_by_first(lambda: None)  # the files exist before any process continues
        if self.among.first:
            self._show_accuracy(trained)

    def _write(self, trained: PixelModel, layers: list[dict[str, Any]]) -> None:
        """Write the files of the complete run."""
        config = self.config
        write_text(self.out / "training.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        weights = save_weights(trained.model, self.out / "model.safetensors")
        write_json(self.out / "run.json", {
            "config": asdict(config) | {"max_norm": config.finite_max_norm},
            "classes": self.data.classes, "class_names": self.data.class_names, "channels": self.data.channels,
            "image_size": self.data.image_size,
            "model_sha256": weights, "test_data_sha256": data_hash(self.data), "seed": config.seed,
            "defence": self.defence, "layers": [row | {"before": self.before[row["name"]]} for row in layers],
            "skipped": self.skipped, "seconds": round(time.time() - self.started, 1), **environment(self.device),
        })  # fmt: skip
        (self.out / "state.pt").unlink(missing_ok=True)

    @torch.no_grad()
    def _show_accuracy(self, trained: PixelModel) -> None:
        images, labels = self.data.images_at(self.data.proportional_order[:_SHOWN].tolist())
        guesses = torch.cat([trained(part.to(self.device)).argmax(1).cpu() for part in images.split(self.config.batch_size)])
        told = percent(float((guesses == labels).double().mean()))
        errors.print(f"clean accuracy {told} % on {len(labels)} test images, in proportion to their classes", highlight=False)

    @property
    def defence(self) -> str:
        """The name of the defence for the record, with "adversarial" added after adversarial training."""
        named = self.config.defence if self.config.clips or not self.config.fastclip else "none"
        return "+".join([*([named] if named != "none" else []), "adversarial"]) if self.adversary is not None else named

    def _clipper(self, model: nn.Module) -> FastClip:
        config = self.config
        return FastClip(
            model,
            self.example,
            config.finite_max_norm if config.clips and config.finite_max_norm is not None else math.inf,
            composites="always" if config.defence == "fastclip-composite" else config.composites,
            move=MOVES[config.move](),
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
        generator, count = torch.Generator().manual_seed(seed), len(self.data.train)  # type: ignore[arg-type]
        size = self.config.batch_size
        batches = Shares(self.data.train, size, generator, count >= size, self.among)
        return DataLoader(self.data.train, batch_sampler=batches, generator=generator, collate_fn=stack)

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
    """Check that the folder is free or contains the run to resume; return whether anything is left to do."""
    marker = out / "config.json"
    remove_scratch(out, older_than=0.0)
    if (out / "run.json").exists():
        if resume and marker.exists() and config.is_that_of(read_json(marker)):
            (out / "state.pt").unlink(missing_ok=True)
            return False
        raise ValueError(f"{out}: contains a finished run already; give another --out, nothing was overwritten")
    interrupted = marker.exists() and (out / "state.pt").exists()
    if interrupted and not resume:
        raise ValueError(f"{out}: contains an interrupted run; continue with --resume, or give another --out")
    if interrupted and not config.is_that_of(read_json(marker)):
        raise ValueError(f"{out}: the interrupted run there has another configuration; nothing was overwritten")
    if out.exists() and not marker.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty and not a run; give another --out")
    make_folder(out)
    return True


def _progress(shown: bool) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                    TextColumn("{task.fields[stats]}"), disable=not shown, console=errors)  # fmt: skip
