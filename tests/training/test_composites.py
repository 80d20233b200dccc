"""Convolutions clipped together with the batch normalisation that follows them, or alone."""

import pytest
import torch
from convnets import train, true_norms
from reference import norm, snapshot
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.clipping.moved_parameters import Move, MoveGamma, MoveWeightAndGamma


def test_the_composite_is_clipped_where_its_statistics_are_frozen(convnet: nn.Module, images: Tensor) -> None:
    clipper = rs.FastClip(convnet, images, max_norm=0.5)
    clipper.finish()
    assert max(true_norms(convnet)) <= 0.5005
    assert [row["kind"] for row in clipper.report()] == ["conv+bn", "conv+bn", "dense"]


def test_the_convolution_alone_is_clipped_where_its_normalisation_trains(convnet: nn.Module, images: Tensor) -> None:
    convnet.train()
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.0)
    clipper = rs.FastClip(convnet, images, max_norm=0.5)
    clipper.attach(optimizer)
    with pytest.warns(UserWarning, match="batch statistics") as caught:
        train(convnet, optimizer, images, 3)
        clipper.finish()
        clipper.norms()
        clipper.report()
    assert [warning.filename for warning in caught] == [train.__code__.co_filename]  # the file of the caller, not of torch
    assert max(true_norms(convnet, composites=False)) <= 0.5005
    assert [row["kind"] for row in clipper.report()] == ["conv", "conv", "dense"]


def test_a_normalisation_that_trains_again_gives_one_warning(convnet: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.0)
    clipper = rs.FastClip(convnet, images)
    clipper.attach(optimizer)
    train(convnet, optimizer, images)
    convnet.train()
    with pytest.warns(UserWarning, match="2 layers .*trains on batch statistics again") as caught:
        train(convnet, optimizer, images)
    assert len(caught) == 1


def test_frozen_and_training_normalisations_in_one_model_are_distinguished(convnet: nn.Module, images: Tensor) -> None:
    convnet.train()
    convnet[1].eval()
    clipper = rs.FastClip(convnet, images, max_norm=0.5)
    with pytest.warns(UserWarning, match=r"1 layer \('3'\)"):
        clipper.finish()
    assert [row["kind"] for row in clipper.report()] == ["conv+bn", "conv", "dense"]
    assert norm(convnet[:2], (3, 8, 8)) <= 0.5005 and norm(convnet[3], (6, 8, 8)) <= 0.5005


@pytest.mark.parametrize("choice, kinds", [("always", ["conv+bn", "conv+bn", "dense"]), ("never", ["conv", "conv", "dense"])])
@pytest.mark.parametrize("training", [False, True], ids=["frozen", "training"])
def test_composites_can_be_chosen_without_a_warning(
    choice: str, kinds: list[str], training: bool, convnet: nn.Module, images: Tensor
) -> None:
    convnet.train(training)
    clipper = rs.FastClip(convnet, images, max_norm=0.5, composites=choice)
    clipper.finish()
    assert [row["kind"] for row in clipper.report()] == kinds
    assert max(true_norms(convnet, composites=choice == "always")) <= 0.5005


def test_clipping_neither_runs_nor_changes_a_normalisation(convnet: nn.Module, images: Tensor) -> None:
    convnet.train()
    before = snapshot(convnet)
    clipper = rs.FastClip(convnet, images, max_norm=0.1, composites="always")
    clipper.step()
    clipper.finish()
    changed = [name for name, tensor in snapshot(convnet).items() if not torch.equal(tensor, before[name])]
    assert changed == ["0.weight", "3.weight", "8.weight"]
    assert all(part.training for part in convnet.modules())


def test_an_unknown_choice_of_composites_is_an_error(convnet: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match="composites"):
        rs.FastClip(convnet, images, composites="sometimes")


@pytest.mark.parametrize("move", [MoveGamma(), MoveWeightAndGamma()], ids=["gamma", "both"])
def test_moving_gamma_clips_composites_while_their_normalisation_trains(move: Move, convnet: nn.Module, images: Tensor) -> None:
    convnet.train()
    optimizer = torch.optim.SGD(convnet.parameters(), lr=0.05)
    clipper = rs.FastClip(convnet, images, max_norm=1.5, move=move)
    clipper.attach(optimizer)
    labels = torch.arange(len(images)) % 5
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(convnet(images), labels).backward()
        optimizer.step()
    convnet.eval()
    clipper.finish()
    assert [row["kind"] for row in clipper.report()] == ["conv+bn", "conv+bn", "dense"]
    assert max(true_norms(convnet)) <= 1.5 * 1.001
    assert float(convnet[0].weight.detach().norm()) > 0.1
