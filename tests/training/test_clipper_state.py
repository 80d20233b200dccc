"""The saved state of a clipper, and trainings that a clipper with nothing to clip leaves bitwise unchanged."""

import copy
import math

import pytest
import torch
from convnets import train
from reference import same_bits, snapshot
from torch import Tensor, nn

import robust_spectral as rs


def test_an_infinite_target_trains_bit_by_bit_as_without_a_clipper(convnet: nn.Module, images: Tensor) -> None:
    twin = copy.deepcopy(convnet)
    optimizer, other = (torch.optim.AdamW(model.parameters(), lr=0.01) for model in (convnet, twin))
    random = torch.get_rng_state()
    clipper = rs.FastClip(convnet, images, max_norm=math.inf)
    clipper.attach(optimizer)
    train(convnet, optimizer, images)
    clipper.finish()
    train(twin, other, images)
    assert same_bits(snapshot(convnet), snapshot(twin))
    assert torch.equal(random, torch.get_rng_state())


def test_layers_below_the_target_train_bit_by_bit_as_without_a_clipper(convnet: nn.Module, images: Tensor) -> None:
    twin = copy.deepcopy(convnet)
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=1e-4) for model in (convnet, twin))
    clipper = rs.FastClip(convnet, images, max_norm=1e3)
    clipper.attach(optimizer)
    train(convnet, optimizer, images)
    clipper.finish()
    train(twin, other, images)
    assert same_bits(snapshot(convnet), snapshot(twin))


def test_the_keys_of_the_models_state_dict_do_not_change(convnet: nn.Module, images: Tensor) -> None:
    keys = list(convnet.state_dict())
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.1)
    clipper = rs.FastClip(convnet, images)
    clipper.attach(optimizer)
    train(convnet, optimizer, images, 1)
    clipper.finish()
    assert list(convnet.state_dict()) == keys
    assert optimizer.state_dict()["param_groups"][0]["params"] == list(range(len(list(convnet.parameters()))))


def test_a_restored_run_continues_bit_by_bit(convnet: nn.Module, images: Tensor, tmp_path) -> None:
    def start(model: nn.Module) -> tuple[rs.FastClip, torch.optim.Optimizer]:
        clipper = rs.FastClip(model, images, max_norm=0.5, warmup_steps=6, every=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        clipper.attach(optimizer)
        return clipper, optimizer

    clipper, optimizer = start(convnet)
    train(convnet, optimizer, images, 3)
    torch.save([part.state_dict() for part in (convnet, optimizer, clipper)], tmp_path / "state.pt")
    train(convnet, optimizer, images, 5)

    twin = copy.deepcopy(convnet)
    other, second = start(twin)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip((twin, second, other), saved, strict=True):
        part.load_state_dict(state)
    train(twin, second, images, 5)

    assert other.steps == clipper.steps == 8
    assert same_bits(snapshot(convnet), snapshot(twin))
    assert other.norms() == clipper.norms()


def test_a_saved_state_is_not_changed_by_later_steps(convnet: nn.Module, images: Tensor) -> None:
    clipper = rs.FastClip(convnet, images, max_norm=0.5)
    clipper.step()
    state = clipper.state_dict()
    vectors = {name: entry["whole"]["vectors"].clone() for name, entry in state["layers"].items()}
    clipper.step()
    assert all(torch.equal(vectors[name], entry["whole"]["vectors"]) for name, entry in state["layers"].items())


def test_a_state_of_another_model_is_refused(convnet: nn.Module, images: Tensor) -> None:
    other = rs.FastClip(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), images)
    with pytest.raises(ValueError, match="other layers"):
        rs.FastClip(convnet, images).load_state_dict(other.state_dict())


def test_a_state_saved_with_another_max_norm_continues_with_the_new_max_norm(convnet: nn.Module, images: Tensor) -> None:
    first = rs.FastClip(convnet, images, max_norm=0.5)
    first.step()
    second = rs.FastClip(convnet, images, max_norm=0.3)
    second.load_state_dict(first.state_dict())
    second.finish()
    assert second.steps == 1 and max(row["upper"] for row in second.report()) <= 0.3 * 1.001


def test_clipping_does_not_depend_on_the_global_random_state(convnet: nn.Module, images: Tensor) -> None:
    twin = copy.deepcopy(convnet)
    for model, seed in ((convnet, 1), (twin, 2)):
        torch.manual_seed(seed)
        clipper = rs.FastClip(model, images, max_norm=0.3)
        clipper.step()
        clipper.finish()
    assert same_bits(snapshot(convnet), snapshot(twin))


def test_clipping_leaves_gradients_unchanged(convnet: nn.Module, images: Tensor) -> None:
    convnet(images).sum().backward()
    before = [parameter.grad.clone() for parameter in convnet.parameters()]
    clipper = rs.FastClip(convnet, images, max_norm=0.3)
    clipper.step()
    clipper.finish()
    assert all(torch.equal(grad, p.grad) for grad, p in zip(before, convnet.parameters(), strict=True))
    assert all(p.is_leaf and p.requires_grad for p in convnet.parameters())


def test_loading_a_state_from_before_the_first_step_restores_the_relative_targets() -> None:
    model = nn.Linear(6, 6)
    clipper = rs.FastClip(model, torch.zeros(1, 6), max_norm=0.5, relative=True)
    state = clipper.state_dict()
    first = [row["target"] for row in clipper.report()]
    clipper.load_state_dict(state)
    assert [row["target"] for row in clipper.report()] == first
