"""Defences by name: their calls in a training loop, the trained weights, and defences registered by other packages."""

import copy
import subprocess
import sys
import textwrap

import pytest
import reference
import torch
import torch.nn.functional as F
from commands import call
from torch import nn

import robust_spectral as rs
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning.training import finetune
from robust_spectral.evaluations.models.loading import load_run
from robust_spectral.evaluations.run_folder import read_json
from robust_spectral.plugins.defences.base import NoDefence
from robust_spectral.plugins.defences.rivals import Bjorck, Delattre, Gouk, Miyato, Senderovich, clip_symbols_, gram_bound
from robust_spectral.plugins.registry import find, names

pytestmark = pytest.mark.filterwarnings("ignore:FastClip. after 1 layer:UserWarning")  # the batch normalisation trains
NAMES = ["none", "fastclip", "fastclip-composite", "miyato", "gouk", "delattre", "senderovich"]  # bjorck needs deel-torchlip
SHAPE = (2, 8, 8)


def network():
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3, 2, 1, groups=2)
    net = nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    for module in net[::3]:
        module.weight.data.mul_(3)
    return net


def train(defence, net, steps=20):
    """Take training steps with a defence, through its interface alone."""
    generator = torch.Generator().manual_seed(0)
    defence.prepare(net, torch.zeros(1, *SHAPE))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    defence.attach(optimizer)
    net.train()
    for _ in range(steps):
        x, y = torch.randn(16, *SHAPE, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        (F.cross_entropy(net(x), y) + defence.penalty()).backward()
        optimizer.step()
    defence.finish(net)
    return net


def layers(net):
    return {layer.name: layer for layer in rs.linear_layers(net, torch.zeros(1, *SHAPE))}


def true_norms(net):
    return [reference.norm(layer.module, layer.in_shape) for layer in layers(net).values()]


@pytest.mark.parametrize("name", NAMES)
def test_every_defence_leaves_ordinary_weights_under_their_original_names(name):
    before = network()
    net = train(find("defence", name)(max_norm=1.0), network())
    assert {key: t.shape for key, t in net.state_dict().items()} == {key: t.shape for key, t in before.state_dict().items()}
    assert [type(m) for m in net.modules()] == [type(m) for m in before.modules()]
    network().load_state_dict(net.state_dict())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_every_defence_ends_with_smaller_norms_than_no_defence(name):
    plain, defended = (true_norms(train(find("defence", n)(max_norm=0.7), network())) for n in ("none", name))
    assert all(a < 0.98 * b for a, b in zip(defended, plain, strict=True))


def test_no_defence_trains_to_the_weights_of_a_loop_without_a_penalty():
    class Absent(NoDefence):
        def penalty(self):
            return 0

    one, other = train(NoDefence(), network()), train(Absent(), network())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_fastclip_ends_with_every_norm_at_most_the_target():
    assert max(true_norms(train(find("defence", "fastclip")(max_norm=0.7), network()))) <= 0.7 * 1.001


def test_spectral_normalisation_of_a_weight_that_is_zero_is_refused():
    net = network()
    net[3].weight.data.zero_()
    with pytest.raises(ValueError, match="weight of '3' is zero"):
        Miyato().prepare(net, torch.zeros(1, *SHAPE))


def test_miyato_brings_the_norm_of_every_weight_matrix_to_max_norm():
    net = train(Miyato(max_norm=2.0), network(), steps=60)
    for layer in layers(net).values():
        assert float(torch.linalg.matrix_norm(layer.module.weight.detach().flatten(1), 2)) == pytest.approx(2.0, rel=0.05)


def test_gouk_keeps_the_norms_of_operators_and_batch_normalisations_at_max_norm():
    net = train(Gouk(max_norm=0.7), network(), steps=40)
    assert max(true_norms(net)) <= 0.7 * 1.05
    assert float((net[1].weight.detach() / (net[1].running_var + net[1].eps).sqrt()).abs().max()) <= 0.7 * 1.05


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 2)])
def test_the_gram_bound_of_a_circular_convolution_is_above_its_norm_and_close(stride, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride, 1, groups=groups, padding_mode="circular")
    (layer,) = rs.linear_layers(conv, torch.zeros(1, 4, 8, 8))
    true = reference.norm(conv, (4, 8, 8))
    assert true * (1 - 1e-5) <= gram_bound(layer, 5).item() <= 1.05 * true


def test_the_penalty_of_delattre_has_the_gradient_of_the_largest_singular_value():
    dense = nn.Linear(5, 4)
    defence = Delattre(max_norm=0.1, strength=2.0, iterations=9)
    defence.prepare(dense, torch.zeros(1, 5))
    defence.penalty().backward()
    u, _, v = torch.linalg.svd(dense.weight.detach())
    torch.testing.assert_close(dense.weight.grad, 2.0 * torch.outer(u[:, 0], v[0]), rtol=1e-3, atol=1e-3)


def test_clipping_the_symbols_of_a_window_as_large_as_the_grid_gives_the_requested_norm():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    (layer,) = rs.linear_layers(conv, torch.zeros(1, 3, 3, 3))
    clip_symbols_(layer, 0.3)
    assert reference.norm(conv, (3, 3, 3)) == pytest.approx(0.3, rel=1e-6)


def test_senderovich_clips_the_copy_given_at_the_end_and_not_the_network():
    net = network()
    defence = Senderovich(max_norm=0.7, every=10**9)
    defence.prepare(net, torch.zeros(1, *SHAPE))
    averaged, before = copy.deepcopy(net), true_norms(net)
    defence.finish(averaged)
    assert true_norms(net) == before and all(a < b for a, b in zip(true_norms(averaged), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_norm_that_is_not_positive_is_refused(name):
    with pytest.raises(ValueError, match="must be positive"):
        find("defence", name)(max_norm=-1.0).prepare(network(), torch.zeros(1, *SHAPE))


def test_bjorck_makes_dense_layers_orthogonal_or_names_the_missing_package():
    with pytest.raises(ValueError, match="give 1"):
        Bjorck(max_norm=2.0)
    try:
        import deel.torchlip  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="needs the package deel-torchlip"):
            Bjorck().prepare(network(), torch.zeros(1, *SHAPE))
        return
    dense = train(Bjorck(), network())[6].weight.detach()
    torch.testing.assert_close(dense @ dense.mT, torch.eye(3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["miyato", "gouk", "delattre", "senderovich"])
def test_a_competing_defence_fine_tunes_and_is_named_in_the_run(name, tmp_path):
    config = FinetuneConfig(
        model="test_resnet", data="first:512:digits", image_size=16, batch_size=128, epochs=1, max_norm=1.0, defence=name
    )
    model, data, run = load_run(finetune(config, tmp_path / "run"))
    assert run["defence"] == name
    assert {row["name"] for row in run["layers"]} == {layer.name for layer in rs.linear_layers(model, data.example())}


def test_the_plain_twin_of_a_competing_defence_is_trained_without_it(tmp_path):
    assert (
        call(f"finetune --model maxmin_mlp --data digits --image-size 28 --epochs 0 --defence gouk --twin --out {tmp_path}")
        == 0
    )
    records = {name: read_json(tmp_path / name / "run.json") for name in ("plain", "clipped")}
    assert {name: record["defence"] for name, record in records.items()} == {"plain": "none", "clipped": "gouk"}


def test_an_interrupted_run_with_a_competing_defence_resumes_to_the_same_weights(tmp_path, monkeypatch):
    config = FinetuneConfig(
        model="test_resnet", data="first:512:digits", image_size=16, batch_size=128, epochs=2, defence="gouk"
    )
    whole, _, _ = load_run(finetune(config, tmp_path / "whole"))
    from robust_spectral.evaluations.finetuning import training as module

    save = module._Training.save

    def stop(training, epoch):
        save(training, epoch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Training, "save", stop)
        finetune(config, tmp_path / "stopped")
    resumed, _, _ = load_run(finetune(config, tmp_path / "stopped", resume=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_a_defence_of_another_package_is_found_once_it_is_installed(tmp_path):
    (tmp_path / "source" / "tiny_defence").mkdir(parents=True)
    (tmp_path / "source" / "tiny_defence" / "__init__.py").write_text(
        "from robust_spectral.plugins.defences import NoDefence\n\nclass Tiny(NoDefence):\n    pass\n"
    )
    (tmp_path / "source" / "pyproject.toml").write_text(
        textwrap.dedent("""
            [build-system]
            requires = ["setuptools"]
            build-backend = "setuptools.build_meta"
            [project]
            name = "tiny-defence"
            version = "1"
            [project.entry-points."robust_spectral.defences"]
            tiny = "tiny_defence:Tiny"
            gone = "tiny_defence:Gone"
            miyato = "tiny_defence:Tiny"
        """)
    )
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target",
               str(tmp_path / "site"), str(tmp_path / "source")]  # fmt: skip
    subprocess.run(install, check=True, capture_output=True)
    code = textwrap.dedent("""
        from robust_spectral.plugins.registry import find, names
        print(find("defence", "tiny").__name__, "tiny" in names("defence"))
        for name in ("gone", "miyato", "tinny"):
            try:
                find("defence", name)
            except ValueError as error:
                print(error)
    """)
    path = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin"}
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=path, check=True
    ).stdout.splitlines()
    assert shown[0] == "Tiny True"
    assert "'gone' of tiny-defence: cannot be imported" in shown[1]
    assert "registered by robust-spectral and tiny-defence" in shown[2]
    assert "near: tiny" in shown[3]


def test_the_defences_and_attacks_of_this_package_are_registered():
    assert {*NAMES, "bjorck"} <= set(names("defence")) and {"pgd", "autoattack"} <= set(names("attack"))
