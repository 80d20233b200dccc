"""Optimizers that call a clipper, and warnings where they do not."""

import copy
import gc
import math
import pickle

import pytest
import torch
from convnets import train, true_norms
from reference import same_bits, snapshot
from torch import Tensor, nn

import robust_spectral as rs


def test_a_removed_handle_ends_the_clipping(convnet: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.0)
    clipper = rs.FastClip(convnet, images, max_norm=1e-3)
    handle = clipper.attach(optimizer)
    handle.remove()
    before = snapshot(convnet)
    train(convnet, optimizer, images)
    assert clipper.steps == 0
    assert same_bits(before, snapshot(convnet))


def test_a_skipped_step_of_a_gradient_scaler_skips_the_clip(convnet: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.1)
    clipper = rs.FastClip(convnet, images)
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(convnet(images).sum() * math.inf).backward()
    scaler.step(optimizer)
    assert clipper.steps == 0


def test_attaching_twice_is_attaching_once(convnet: nn.Module, images: Tensor) -> None:
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (convnet[:3], convnet[3:])]
    clipper = rs.FastClip(convnet, images)
    handles = [clipper.attach(optimizer) for optimizer in (*optimizers, *optimizers)]
    assert handles[:2] == handles[2:] and handles[0] is not handles[1]
    train(convnet, optimizers[0], images, 3)
    assert clipper.steps == 3
    handles[0].remove()
    clipper.attach(optimizers[0])
    train(convnet, optimizers[0], images, 2)
    assert clipper.steps == 5


def test_an_optimizer_inside_a_wrapper_without_hooks_is_found(convnet: nn.Module, images: Tensor) -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.0)
    clipper = rs.FastClip(convnet, images)
    clipper.attach(Wrapper(optimizer))  # type: ignore[arg-type]
    optimizer.step()
    assert clipper.steps == 1


def test_a_second_clipper_of_the_same_layers_is_refused_until_the_first_is_removed(convnet: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.0)
    handle = rs.FastClip(convnet, images).attach(optimizer)
    with pytest.raises(ValueError, match="'0' is controlled by another clipper"):
        rs.FastClip(convnet, images).attach(optimizer)
    rs.FastClip(convnet, images, max_norm=math.inf).attach(optimizer)
    handle.remove()
    rs.FastClip(convnet, images).attach(optimizer)


def test_clippers_of_different_layers_can_share_an_optimizer(convnet: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.0)
    rs.FastClip(convnet, images, 0.3, include="0").attach(optimizer)
    rs.FastClip(convnet, images, 0.6, exclude="0").attach(optimizer)


@pytest.mark.parametrize("how", ["deepcopy", "replaced", "pickled"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_hook_that_no_longer_fires_gives_a_warning(steps: int, how: str, convnet: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.01)
    clipper = rs.FastClip(convnet, images)
    clipper.attach(optimizer)
    train(convnet, optimizer, images, steps)
    assert clipper.attached
    other = {
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "replaced": lambda: torch.optim.AdamW(convnet.parameters(), lr=0.01),
        "pickled": lambda: pickle.loads(pickle.dumps(optimizer)),
    }[how]()
    if how != "replaced":  # a copy carries copies of the parameters, too
        other.param_groups[0]["params"] = list(convnet.parameters())
    train(convnet, other, images, 4)
    assert clipper.steps == steps
    clipper.norms()  # reading norms does not count as a call of the hook
    with pytest.warns(UserWarning, match=f"3 layers .* since step {steps} .* does not call the clipper") as caught:
        clipper.finish()
    assert [warning.filename for warning in caught] == [__file__]
    assert max(true_norms(convnet)) <= 1.001


@pytest.mark.parametrize(("steps", "cleared"), [(4, False), (20, True)])
def test_a_clipper_that_was_never_attached_gives_a_warning_after_training(
    steps: int, cleared: bool, convnet: nn.Module, images: Tensor
) -> None:
    clipper = rs.FastClip(convnet, images)
    train(convnet, torch.optim.SGD(convnet.parameters(), lr=1e-3), images, steps)
    if cleared:
        convnet.zero_grad()
    with pytest.warns(UserWarning, match="since step 0 .* does not call the clipper"):
        clipper.finish()


@pytest.mark.parametrize("attached", [False, True])
def test_loaded_or_newly_initialised_weights_are_not_mistaken_for_training(
    attached: bool, convnet: nn.Module, images: Tensor
) -> None:
    clipper = rs.FastClip(convnet, images)
    if attached:
        clipper.attach(torch.optim.SGD(convnet.parameters(), lr=0.01))
    convnet.load_state_dict(copy.deepcopy(convnet.state_dict()))
    if not attached:
        nn.init.trunc_normal_(convnet[0].weight)  # several changes
    clipper.finish()


def test_a_clipper_whose_optimizer_was_deleted_is_not_attached(convnet: nn.Module, images: Tensor) -> None:
    clipper = rs.FastClip(convnet, images)
    assert not clipper.attached
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.01)
    clipper.attach(optimizer)
    assert clipper.attached
    del optimizer
    gc.collect()
    assert not clipper.attached
