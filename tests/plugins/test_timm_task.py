"""`FastClipTask` in timm's training loop: norms, checkpoints, resuming, and an unmodified train.py."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.optim
import timm.task
import torch
from reference import norm
from timm.utils import CheckpointSaver, NativeScaler, unwrap_model
from torch import Tensor, nn

from robust_spectral import linear_layers
from robust_spectral.plugins.timm_task import FastClipTask, main

EXAMPLE = torch.zeros(1, 3, 12, 12)
HELD, PROVED = 1.02, 1.001


def task_of(model: nn.Module, **kwargs: Any) -> FastClipTask:
    options = {"example_input": EXAMPLE, "spectral": {"composites": "never"}, "verbose": False} | kwargs
    return FastClipTask(model, nn.CrossEntropyLoss(), **options)


def net() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


def batches(chosen: range) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 8, 3, 12, 12, generator=generator)
    return list(zip(images, torch.randint(5, (24, 8), generator=generator), strict=True))[chosen.start : chosen.stop]


def train(
    task: FastClipTask, optimizer: torch.optim.Optimizer, updates: range, accumulate: int = 1, half: bool = False
) -> None:
    """Train by the calls of timm's train_one_epoch, in the same order."""
    scaler = NativeScaler(device="cpu")
    task.get_trainable_module().train()
    for index, (x, y) in enumerate(batches(range(updates.start * accumulate, updates.stop * accumulate))):
        update = (index + 1) % accumulate == 0
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = task(x, y)["loss"] / accumulate
        scaler(loss, optimizer, clip_grad=1.0, parameters=task.get_clip_parameters(), need_update=update)
        if update:
            optimizer.zero_grad()
            task.update_ema(step=updates.start + (index + 1) // accumulate)


def largest_norm(model: nn.Module) -> float:
    layers = linear_layers(copy.deepcopy(unwrap_model(model)).float(), EXAMPLE)
    return max(norm(layer.module, layer.in_shape) for layer in layers)


@pytest.mark.parametrize("optimizer", ["adamw", "lookahead_adamw"])
@pytest.mark.parametrize("way", ["plain", "accumulating in bfloat16", "channels_last", "compiled"])
def test_norms_of_the_model_and_its_average_are_kept_in_timms_loop_and_proved_by_finish(way: str, optimizer: str) -> None:
    model = net()
    if way == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    task = task_of(model)
    steps = timm.optim.create_optimizer_v2(model, optimizer, lr=5e-4)
    task.setup_ema(decay=0.8)
    if way == "compiled":
        task.compile(backend="eager")
    train(task, steps, range(12), **({"accumulate": 2, "half": True} if "bfloat16" in way else {}))
    average = task.get_trainable_module(ema=True).module
    assert task.clipper.steps == 12
    assert max(largest_norm(model), largest_norm(average)) <= HELD
    task.finish()
    assert max(largest_norm(model), largest_norm(average)) <= PROVED


def test_a_checkpoint_loads_in_timm_alone_to_the_same_logits_under_the_same_keys(tmp_path: Path) -> None:
    task = task_of(net())
    optimizer = timm.optim.create_optimizer_v2(task.trainable_module, "sgd", lr=1e-2)
    train(task, optimizer, range(4))
    task.finish()
    CheckpointSaver(task.trainable_module, optimizer, task=task, checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    plain = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(tmp_path / "last.pth.tar")).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(plain(x), task.trainable_module.eval()(x))
    assert plain.state_dict().keys() == net().state_dict().keys()


def test_a_run_resumed_by_timm_is_bitwise_identical_to_an_uninterrupted_run(tmp_path: Path) -> None:
    straight, stopped, resumed = (task_of(net()) for _ in range(3))
    optimizers = [timm.optim.create_optimizer_v2(t.trainable_module, "adamw", lr=1e-3) for t in (straight, stopped, resumed)]
    train(straight, optimizers[0], range(8))
    train(stopped, optimizers[1], range(4))
    CheckpointSaver(stopped.trainable_module, optimizers[1], task=stopped, checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    timm.task.resume_task_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer=optimizers[2], log_info=False)
    train(resumed, optimizers[2], range(4, 8))
    assert resumed.clipper.steps == straight.clipper.steps == 8
    pairs = zip(straight.trainable_module.state_dict().values(), resumed.trainable_module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_infinite_norm_gives_bitwise_the_weights_of_timms_own_task() -> None:
    ours, theirs = (
        task_of(net(), max_norm=float("inf")),
        timm.task.ClassificationTask(net(), nn.CrossEntropyLoss(), verbose=False),
    )
    for task in (ours, theirs):
        train(task, timm.optim.create_optimizer_v2(task.trainable_module, "adamw", lr=1e-3), range(4))
    pairs = zip(ours.trainable_module.state_dict().values(), theirs.trainable_module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


SCRIPT = """
import sys, timm, torch
from timm.task import ClassificationTask
from timm.optim import create_optimizer_v2
torch.manual_seed(0)
model = timm.create_model(sys.argv[1], num_classes=5)
task = ClassificationTask(model=model, criterion=torch.nn.CrossEntropyLoss(), verbose=False)
optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    task(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))["loss"].backward()
    optimizer.step()
    task.update_ema(step)
"""


@pytest.mark.filterwarnings("ignore:FastClip. .* a batch normalisation trains")
def test_an_unmodified_training_script_of_timm_ends_with_clipped_weights(tmp_path: Path) -> None:
    script, out = tmp_path / "train.py", tmp_path / "clipped.safetensors"
    script.write_text(SCRIPT)
    before = list(sys.argv)
    task = main(["--max-norm", "0.5", "--image-size", "16", "--out", str(out), str(script), "test_resnet"])
    plain = net()
    plain.load_state_dict(safetensors.torch.load_file(out))
    assert task.clipper.steps == 3 and largest_norm(plain) <= 0.5 * PROVED
    assert sys.argv == before and timm.task.ClassificationTask is not FastClipTask


@pytest.mark.filterwarnings("ignore:FastClip. .* a batch normalisation trains")
def test_weights_are_saved_for_a_script_that_imports_a_neighbour_and_calls_sys_exit(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'test_resnet'")
    script, out = tmp_path / "train.py", tmp_path / "new" / "clipped.safetensors"
    script.write_text("import neighbour\n" + SCRIPT.replace("sys.argv[1]", "neighbour.NAME") + "\nsys.exit(0)\n")
    main(["--image-size", "16", "--out", str(out), str(script)])
    assert out.is_file()
    script.write_text(SCRIPT.replace("sys.argv[1]", "'test_resnet'") + "\nsys.exit(3)\n")
    with pytest.raises(SystemExit):
        main(["--image-size", "16", "--out", str(out), str(script)])


def test_a_script_without_a_task_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import timm.task")
    with pytest.raises(RuntimeError, match=r"made no timm\.task\.ClassificationTask"):
        main([str(script)])
