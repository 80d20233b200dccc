"""The callbacks for Lightning and transformers, and the example for accelerate, in the training loops of those libraries."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import norm, same_bits, snapshot
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

pytest.importorskip("lightning")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

from robust_spectral.plugins import lightning as for_lightning
from robust_spectral.plugins import transformers as for_transformers

ROOT = Path(__file__).parents[2]
PROVED = 1.001
EXAMPLE = torch.zeros(1, 1, 8, 8)
SHAPES = {"0": (1, 8, 8), "2": (8, 8, 8), "6": (32,)}

pytestmark = [  # Lightning's own warnings, about torch and small loaders
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images[:256, None] / 16, dtype=torch.float32), torch.tensor(data.target[:256])


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def true_norms(net: nn.Module) -> dict[str, float]:
    return {name: norm(copy.deepcopy(net.get_submodule(name)), shape) for name, shape in SHAPES.items()}


class Automatic(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = convnet()
        self.example_input_array = EXAMPLE

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(20 * self(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Manual(Automatic):
    """A module that steps two optimizers alternately, one of its first layer and one of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first, rest = self.net[0].parameters(), self.net[1:].parameters()
        return [torch.optim.AdamW(first, lr=1e-2), torch.optim.SGD(rest, lr=1e-2, momentum=0.9)]


def fit(module: pl.LightningModule, folder: Path, *callbacks: pl.Callback, epochs: int = 2, **options: object) -> pl.Trainer:
    torch.manual_seed(1)
    ckpt_path = options.pop("ckpt_path", None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=folder, log_every_n_steps=4,
        callbacks=list(callbacks), **(quiet | options),
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*digits()), batch_size=32), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_lightning_keeps_the_norms_near_the_target_and_proves_them(kind: type[Automatic], tmp_path: Path) -> None:
    module, callback = kind(), for_lightning.FastClipCallback(0.8)
    trainer = fit(module, tmp_path, callback)
    assert callback.clipper.steps == trainer.global_step == (32 if kind is Manual else 16)
    assert 0.7 < trainer.callback_metrics["spectral/max_norm"] < 0.8 * 1.02
    assert max(true_norms(module.net).values()) <= 0.8 * PROVED
    assert callback.results.keys() == {"net.0", "net.2", "net.6"}
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_an_infinite_norm_gives_the_weights_of_lightning_alone(kind: type[Automatic], tmp_path: Path) -> None:
    with_us, without = kind(), kind()
    fit(with_us, tmp_path, for_lightning.FastClipCallback(math.inf))
    fit(without, tmp_path)
    assert same_bits(snapshot(with_us), snapshot(without))


def test_a_callback_for_a_submodule_clips_it_alone_after_the_steps_of_its_optimizer(tmp_path: Path) -> None:
    module, callback = Manual(), for_lightning.FastClipCallback(0.5, example_input=EXAMPLE, module="net.0")
    trainer = fit(module, tmp_path, callback)
    norms = true_norms(module.net)
    assert norms["0"] <= 0.5 * PROVED < max(norms.values())
    assert callback.clipper.steps == 16  # of the trainer's 32
    assert "spectral/net.0/max_norm" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")  # the second fit saves nothing
def test_a_fit_resumed_by_lightning_ends_at_the_weights_of_an_uninterrupted_fit(tmp_path: Path) -> None:
    through, resumed = Automatic(), Automatic()
    through.net[3].p = resumed.net[3].p = 0.0  # no dropout: Lightning does not restore random states
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callbacks = [for_lightning.FastClipCallback(0.8, warmup_steps=12) for _ in range(2)]
    fit(through, tmp_path, callbacks[0], saving, enable_checkpointing=True)
    fit(resumed, tmp_path, callbacks[1], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert callbacks[1].clipper.steps == 16
    assert same_bits(snapshot(through), snapshot(resumed))


def test_two_callbacks_clip_two_submodules_to_different_norms(tmp_path: Path) -> None:
    module = Automatic()
    fit(
        module, tmp_path, for_lightning.FastClipCallback(0.5, EXAMPLE, module="net.0"),
        for_lightning.FastClipCallback(0.8, torch.zeros(1, 8, 8, 8), module="net.2"),
    )  # fmt: skip
    norms = true_norms(module.net)
    assert norms["0"] <= 0.5 * PROVED and 0.5 < norms["2"] <= 0.8 * PROVED


def test_averaged_weights_are_proved_if_the_callback_is_the_last_in_the_list(tmp_path: Path) -> None:
    module = Automatic()
    fit(module, tmp_path, EMAWeightAveraging(decay=0.5), for_lightning.FastClipCallback(0.8))
    assert 0.7 < max(true_norms(module.net).values()) <= 0.8 * PROVED
    with pytest.raises(ValueError, match=r"EMAWeightAveraging comes after it .* list FastClipCallback last"):
        fit(Automatic(), tmp_path, for_lightning.FastClipCallback(0.8), EMAWeightAveraging())


def test_a_module_without_an_example_input_is_an_error_with_advice(tmp_path: Path) -> None:
    module = Automatic()
    module.example_input_array = None
    with pytest.raises(ValueError, match=r"Automatic takes, got NoneType; give .*example_input=.*example_input_array"):
        fit(module, tmp_path, for_lightning.FastClipCallback())


class ReplacesOptimizers(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.strategy.optimizers = [module.configure_optimizers()]


def test_a_lightning_fit_in_which_the_hook_never_fired_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="saw none of the 16 optimizer steps"):
        fit(Automatic(), tmp_path, for_lightning.FastClipCallback(), ReplacesOptimizers())


def test_a_fit_that_fails_leaves_no_hook_on_the_optimizer(tmp_path: Path) -> None:
    class Interrupts(pl.Callback):
        def on_train_epoch_end(self, *_: object) -> None:
            raise ArithmeticError

    module, callback = Automatic(), for_lightning.FastClipCallback()
    with pytest.raises(ArithmeticError):
        fit(module, tmp_path, callback, Interrupts())
    assert callback.clipper.steps == 8 and not callback.clipper.attached


class Digits(Dataset):
    def __init__(self) -> None:
        self.images, self.labels = digits()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10,
        downsample_in_first_stage=False,
    )  # fmt: skip
    return ResNetForImageClassification(config)


def clips(max_norm: float = 0.8, **options: object) -> for_transformers.FastClipCallback:
    return for_transformers.FastClipCallback(max_norm, example_input=EXAMPLE, composites="never", **options)


def train(model: nn.Module, folder: Path, *callbacks: TrainerCallback, resume: str | None = None, **options: object) -> Trainer:
    defaults = {"save_strategy": "no", "logging_steps": 4, "num_train_epochs": 2}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=32, learning_rate=1e-2, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, **(defaults | options),
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Digits(), eval_dataset=Digits(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def layer_norms(model: nn.Module, callback: for_transformers.FastClipCallback) -> list[float]:
    layers = callback.clipper.layers
    assert {id(layer.module) for layer in layers} == {id(m) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return [norm(layer.module, layer.in_shape) for layer in layers]


def test_the_transformers_trainer_proves_the_norms_of_a_model_with_a_structured_output(tmp_path: Path) -> None:
    model, callback = resnet(), clips()
    assert not isinstance(model.eval()(EXAMPLE), Tensor)
    trainer = train(model, tmp_path, callback)
    assert callback.clipper.steps == trainer.state.global_step == 16
    logged = [row["spectral/max_norm"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 4 and 0.7 < max(logged) < 0.8 * 1.02
    assert 0.7 < max(layer_norms(model, callback)) <= 0.8 * PROVED
    trainer.save_model(tmp_path / "proved")
    assert same_bits(snapshot(ResNetForImageClassification.from_pretrained(tmp_path / "proved")), snapshot(model))


def test_an_infinite_norm_gives_the_weights_of_transformers_alone(tmp_path: Path) -> None:
    with_us, without = resnet(), resnet()
    train(with_us, tmp_path, clips(math.inf))
    train(without, tmp_path)
    assert same_bits(snapshot(with_us), snapshot(without))


def test_a_run_resumed_by_transformers_ends_at_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    through, resumed = resnet(), resnet()
    callbacks = [clips(warmup_steps=12) for _ in range(2)]
    train(through, tmp_path, callbacks[0], save_strategy="epoch")
    train(resumed, tmp_path, callbacks[1], resume=str(tmp_path / "checkpoint-8"))
    assert callbacks[1].clipper.steps == 16
    assert same_bits(snapshot(through), snapshot(resumed))


def test_resuming_without_the_state_of_the_clipper_gives_a_warning(tmp_path: Path) -> None:
    train(resnet(), tmp_path, save_strategy="epoch", num_train_epochs=1)
    with pytest.warns(UserWarning, match=r"continues at step 8 .* no .*checkpoint-8.fastclip\.pt"):
        train(resnet(), tmp_path, clips(), resume=str(tmp_path / "checkpoint-8"))


def test_the_best_weights_that_transformers_loads_at_the_end_are_proved(tmp_path: Path) -> None:
    model, callback = resnet(), clips()
    trainer = train(model, tmp_path, callback, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True)
    assert trainer.state.best_model_checkpoint is not None
    assert max(layer_norms(model, callback)) <= 0.8 * PROVED


class ReplacesOptimizer(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, **_):
        optimizer.optimizer = torch.optim.SGD(optimizer.param_groups)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the scheduler was made for the replaced optimizer
def test_a_transformers_run_in_which_the_hook_never_fired_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="saw none of the 8 steps"):
        train(resnet(), tmp_path, clips(), ReplacesOptimizer(), num_train_epochs=1)


def test_the_example_for_accelerate_ends_with_its_norms_proved() -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "docs" / "examples" / "accelerate_loop.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    uppers = [float(line.split("norm in [")[1].split(", ")[1].rstrip("],")) for line in done.stdout.splitlines()[3:]]
    assert len(uppers) == 3 and max(uppers) <= PROVED
