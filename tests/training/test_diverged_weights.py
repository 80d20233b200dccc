"""Weights that are not finite, or whose squares overflow: steps are skipped and counted, nothing is clipped or proved."""

import copy
import math

import pytest
import torch
from convnets import true_norms
from reference import same_bits, snapshot
from torch import Tensor, nn

import robust_spectral as rs


def test_reading_norms_of_non_finite_weights_does_not_break_the_clipper(convnet: nn.Module, images: Tensor) -> None:
    clipper = rs.FastClip(convnet, images, max_norm=0.5)
    clipper.step()
    weight, good = convnet[0].weight, convnet[0].weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
        clipper.step()
        with pytest.raises(ValueError, match="NaN or infinite"):
            clipper.norms()
        weight.copy_(good)
    clipper.step()
    assert clipper.skipped == 1 and max(clipper.norms().values()) <= 0.5 * 1.02


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_diverged_weights_raise_with_the_layers_name_and_nothing_is_clipped(
    value: float, convnet: nn.Module, images: Tensor
) -> None:
    clipper = rs.FastClip(convnet, images, max_norm=1e-3)
    clipper.norms()
    with torch.no_grad():
        convnet[3].weight[0, 0, 0, 0] = value
    before = snapshot(convnet)
    for _ in range(9):
        clipper.step()
    with pytest.raises(ValueError, match="'3'"):
        clipper.step()
    assert same_bits(before, snapshot(convnet)) and clipper.skipped == 10


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_weights_that_diverged_before_the_first_step_are_not_clipped(value: float, convnet: nn.Module, images: Tensor) -> None:
    clipper = rs.FastClip(convnet, images, max_norm=1e-3)
    with torch.no_grad():
        convnet[3].weight[0, 0, 0, 0] = value
    before = snapshot(convnet)
    clipper.step()
    assert same_bits(before, snapshot(convnet)) and clipper.skipped == 1


def test_clipping_continues_after_a_skipped_step(convnet: nn.Module, images: Tensor) -> None:
    clipper = rs.FastClip(convnet, images, max_norm=0.5)
    clipper.step()
    good, norms = snapshot(convnet), clipper.norms()
    with torch.no_grad():
        convnet[0].weight.fill_(math.nan)
    clipper.step()
    convnet.load_state_dict(good)
    for _ in range(20):
        clipper.step()
    assert clipper.skipped == 1 and norms.keys() == clipper.norms().keys()
    assert max(true_norms(convnet)) <= 0.5 * 1.02


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    "layer, in_shape",
    [(nn.Linear(4, 4), (4,)), (nn.Linear(1300, 1300), (1300,)), (nn.ConvTranspose2d(3, 2, 3), (3, 4, 4))],
    ids=["dense", "large dense", "transposed"],
)
@pytest.mark.parametrize("call", ["finish", "report"])
def test_diverged_weights_are_never_reported_as_proved(
    call: str, layer: nn.Module, in_shape: tuple[int, ...], value: float
) -> None:
    model = copy.deepcopy(layer)
    clipper = rs.FastClip(model, torch.zeros(1, *in_shape))
    clipper.norms()
    with torch.no_grad():
        model.weight.view(-1)[1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        getattr(clipper, call)()


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("steps", [0, 10])
def test_tracked_vectors_recover_after_a_norm_whose_square_overflows(
    steps: int, vectors: int, convnet: nn.Module, images: Tensor
) -> None:
    clipper = rs.FastClip(convnet, images, vectors=vectors)
    kept = snapshot(convnet)
    for _ in range(steps):
        clipper.step()
    with torch.no_grad():
        next(convnet.parameters()).mul_(1e25)
    clipper.step()
    convnet.load_state_dict(kept)
    for _ in range(4):
        clipper.step()
    assert clipper.skipped <= 1 and max(true_norms(convnet)) <= 1.02
