"""Training for certificates: the margin loss, averaged residual blocks, 1-Lipschitz networks; and IDX files."""

import gzip
import tarfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import robust_spectral as rs
from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.data.image_data import load_data
from robust_spectral.evaluations.finetuning.lifting import Lift
from robust_spectral.evaluations.finetuning.objectives import CertifiedCrossEntropy, CrossEntropy
from robust_spectral.evaluations.finetuning.training import finetune
from robust_spectral.evaluations.models.loading import load_run
from robust_spectral.plugins.timm import load
from robust_spectral.plugins.timm_blocks import Averaged, average_residuals_
from robust_spectral.plugins.timm_maxmin import ChannelShift, MaxMin
from robust_spectral.plugins.timm_residual import Residual


@pytest.fixture
def head():
    """A layer of three logits; the difference of any two is 2 sqrt(2)-Lipschitz."""
    net = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(2 * torch.eye(3))
    return net


def test_the_loss_adds_eps_times_the_pairs_constant_to_every_other_logit(head):
    loss, x, labels = CertifiedCrossEntropy(1.0, eps=0.5), torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
    loss.renew(head, x[:1], progress=1.0)
    expected = head(x) + 0.5 * 2 * 2**0.5 * (1 - F.one_hot(labels, 3))
    assert torch.allclose(loss(head(x), labels), F.cross_entropy(expected, labels), rtol=1e-5)


def test_the_added_margin_grows_over_the_first_half_of_training(head):
    x, starts = torch.rand(1, 3), []
    for progress in (0.0, 0.25, 0.5, 1.0):
        loss = CertifiedCrossEntropy(1.0, eps=0.5)
        loss.renew(head, x, progress)
        assert isinstance(loss.head_start, torch.Tensor)
        starts.append(float(loss.head_start[0, 1]) / 2**0.5)
    assert starts == pytest.approx([0, 0.5, 1, 1], rel=1e-5)


def test_a_prediction_that_survives_the_added_margin_is_certified_at_eps(head):
    x, label = torch.tensor([[0.9, 0.1, 0.2]]), torch.tensor([0])
    radius = float(rs.certified_radius(head(x), label, rs.lipschitz_bound(head, x, box=None)))
    for eps, certified in ((0.99 * radius, True), (1.01 * radius, False)):
        loss = CertifiedCrossEntropy(1.0, eps)
        loss.renew(head, x, 1.0)
        scores = head(x) + loss.head_start[label]
        assert bool(scores.argmax(1) == label) == certified


def test_constants_are_renewed_without_a_forward_pass_in_training_mode():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    loss, x = CertifiedCrossEntropy(1.0, eps=0.5), torch.rand(2, 1, 4, 4)
    loss.renew(net, x, progress=1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items()) and net.training
    labels = torch.tensor([0, 2])
    start = 0.5 * 2**0.5 * rs.lipschitz_bound(net, x).value
    logits = net.eval()(x)
    expected = F.cross_entropy(logits + start * (1 - F.one_hot(labels, 3)), labels)
    assert torch.allclose(loss(logits, labels), expected, rtol=1e-5)  # no pairs: the network ends in a maximum


def test_a_network_without_a_bound_cannot_be_trained_for_certificates():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Hardshrink(), nn.Flatten())
    with pytest.raises(ValueError, match=r"objective certified.*Hardshrink"):
        CertifiedCrossEntropy(1.0, 0.1).renew(net, torch.zeros(1, 1, 2, 2), 1.0)
    CrossEntropy(1.0).renew(net, torch.zeros(1, 1, 2, 2), 1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "certified"}, "margin_eps=0.0"),
        ({"margin_eps": 0.1}, "objective='accuracy'"),
        ({"objective": "robust"}, "expected accuracy or certified"),
        ({"residuals": "none"}, "summed or averaged"),
        ({"lift": True}, "takes no spectral_warmup"),
    ],
)
def test_inconsistent_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(model="test_resnet", data="digits", **options)


def test_averaging_residual_blocks_halves_the_bound_for_each_block():
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=5, in_chans=1).eval()
    x = torch.rand(2, 1, 16, 16)
    rs.fold_batchnorms_(net, x)
    rs.FastClip(net, x, 1.0).finish()
    before = rs.lipschitz_bound(net, x).value
    names = average_residuals_(net)
    assert names and all(isinstance(net.get_submodule(name), Averaged) for name in names)
    assert rs.lipschitz_bound(net, x).value <= before / 2 ** len(names) * 1.01


def test_a_network_without_residual_blocks_is_refused():
    with pytest.raises(NotImplementedError, match=r"VGG has no residual block.*resnet\.BasicBlock"):
        average_residuals_(timm.create_model("vgg11", num_classes=2))


def test_only_the_blocks_with_a_shortcut_are_averaged():
    net = timm.create_model("test_efficientnet", num_classes=2)
    blocks = [name for name, block in net.named_modules() if getattr(block, "has_skip", False)]
    assert not blocks  # test_efficientnet has none
    with pytest.raises(NotImplementedError):
        average_residuals_(net)
    net = timm.create_model("mobilenetv2_035", num_classes=2)
    blocks = [name for name, block in net.named_modules() if getattr(block, "has_skip", False)]
    assert average_residuals_(net) == blocks and len(blocks) == 10


def test_maxmin_sorts_pairs_and_is_one_lipschitz():
    x = torch.randn(64, 6, 3, 3, dtype=torch.float64)
    larger, smaller = torch.stack([x[:, :3], x[:, 3:]]).sort(0, descending=True).values
    assert torch.equal(MaxMin()(x), torch.cat([larger, smaller], 1))
    assert rs.lipschitz_bound(MaxMin(), x[:1], box=None).value == 1


def test_a_channel_shift_keeps_every_value_and_moves_in_those_of_neighbouring_pixels():
    x = torch.randn(2, 11, 4, 4, dtype=torch.float64)
    moved = ChannelShift()(x)
    assert torch.equal(moved.flatten(2).sort(2).values, x.flatten(2).sort(2).values)
    assert torch.equal(moved[:, :3], x[:, :3])
    sides = [x[:, 3:5, 2, 1], x[:, 5:7, 0, 1], x[:, 7:9, 1, 2], x[:, 9:, 1, 0]]
    assert torch.equal(moved[:, 3:, 1, 1], torch.cat(sides, 1))
    assert rs.lipschitz_bound(ChannelShift(), x[:1], box=None).value == 1


def test_the_gradients_of_maxmin_shift_attain_its_lipschitz_bound():
    net = load("maxmin_shift", num_classes=10, in_chans=1, widths=(4, 16), depths=(3, 3)).double().eval()
    for module in net.modules():
        if hasattr(module, "weight"):
            torch.nn.init.orthogonal_(module.weight)
    x = torch.rand(1, 1, 28, 28, dtype=torch.float64)
    bound = rs.lipschitz_bound(net, x)
    assert 1 <= bound.value <= 1 + 1e-5 and bound.failure_probability == 0 and bound.errors[torch.float64] < 1e-9
    slopes = torch.linalg.matrix_norm(torch.func.jacrev(lambda image: net(image)[0])(x).flatten(1), 2)
    assert slopes.item() == pytest.approx(1, abs=1e-9)
    assert bound.pairs[0, 1].item() == pytest.approx(2**0.5, rel=1e-5)


def test_a_residual_block_adds_its_convolutions_to_its_input():
    block, x = Residual(3), torch.randn(2, 3, 5, 5)
    branch = F.conv2d(F.conv2d(x, block.first.weight, block.first.bias, padding=1).relu(), block.second.weight, padding=1)
    assert torch.allclose(block(x), (x + branch + block.second.bias[:, None, None]).relu(), atol=1e-6)


def test_a_residual_network_trained_for_certificates_has_larger_radii_around_single_images(tmp_path):
    options = {"spectral_warmup": 0.0, "objective": "certified", "margin_eps": 0.1, "logit_scale": 20.0, "lr": 1e-2}
    finetune(FinetuneConfig(model="relu_residual", data="digits", epochs=3, opt="muon", **options), tmp_path / "run")
    model, data, run = load_run(tmp_path / "run")
    assert all(layer["upper"] <= 1.001 for layer in run["layers"])
    images, labels = data.test_images(4)
    images = images.double()
    with torch.no_grad():
        logits = model.double()(images)
    known = rs.certified_radius(logits, labels, rs.lipschitz_bound(model, images[:2]))
    found = rs.local_radius(model, images, labels, rounds=3, steps=0)
    right = logits.argmax(1) == labels
    assert int(right.sum()) >= 3 and bool((found[right] > 1.3 * known[right]).all())


def test_a_network_of_fixed_input_size_is_built_for_the_size_of_the_images(tmp_path):
    finetune(FinetuneConfig(model="maxmin_shift", data="digits", image_size=16, epochs=0, max_norm=None), tmp_path / "run")
    model, data, _ = load_run(tmp_path / "run")
    assert model(data.example()).shape == (1, 10) and data.image_size == 16


def test_a_network_trained_for_certificates_is_certified_more_often(tmp_path):
    accuracies = {}
    options = {"image_size": 28, "lift": True, "spectral_warmup": 0.0, "logit_scale": 10.0, "epochs": 5}
    for name, objective in {"accuracy": {}, "certified": {"objective": "certified", "margin_eps": 1.0}}.items():
        finetune(FinetuneConfig(model="maxmin_mlp", data="digits", **options, **objective), tmp_path / name)
        model, data, run = load_run(tmp_path / name)
        assert all(layer["upper"] <= 1.001 for layer in run["layers"])
        images, labels = data.test_images(360)
        with torch.no_grad():
            radii = rs.certified_radius(model(images), labels, rs.lipschitz_bound(model, images[:1]))
        accuracies[name] = float((radii >= 1.0).float().mean())
    assert accuracies["certified"] > 0.5 and accuracies["certified"] > accuracies["accuracy"] + 0.05


def test_lifting_raises_small_singular_values_to_max_norm_and_none_above_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(3, 2, 2, stride=2), nn.Conv2d(2, 2, 3))
    before = [torch.linalg.svdvals(module.weight.detach().flatten(1)) for module in net]
    kept = net[2].weight.detach().clone()
    lift = Lift(net, max_norm=2.0)
    lift.step()
    for values, module in zip(before[:2], net, strict=False):
        expected = values * (3 - (values / 2) ** 2) / 2
        assert torch.linalg.svdvals(module.weight.detach().flatten(1)).numpy() == pytest.approx(expected.numpy(), rel=1e-5)
    for _ in range(30):
        lift.step()
    for module in net[:2]:
        assert torch.linalg.svdvals(module.weight.detach().flatten(1)).numpy() == pytest.approx(2.0, rel=1e-5)
    assert torch.equal(net[2].weight, kept)  # not lifted, as its windows overlap


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def mnist_like(seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    files = {}
    for split, count in (("train", 12), ("t10k", 5)):
        files[f"{split}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 6, 7), dtype=np.uint8))
        files[f"{split}-labels-idx1-ubyte"] = idx((np.arange(count) % 3).astype(np.uint8))
    return files


def test_idx_files_are_read_from_a_folder_and_from_an_archive(tmp_path):
    inner = tmp_path / "set" / "data"
    inner.mkdir(parents=True)
    for name, content in mnist_like().items():
        (inner / f"{name}.gz").write_bytes(gzip.compress(content))
    packed = tmp_path / "plain"
    packed.mkdir()
    for name, content in mnist_like().items():
        (packed / name).write_bytes(content)
    with tarfile.open(tmp_path / "set.tgz", "w:gz") as archive:
        archive.add(packed, "package/data")
    for source in ("set", "set.tgz"):
        data = load_data(f"idx:{tmp_path / source}")
        images, labels = data.test_images(5)
        assert images.shape == (5, 1, 6, 7) and labels.tolist() == [0, 1, 2, 0, 1] and len(data.train) == 12
        expected = np.frombuffer(mnist_like()["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(5, 1, 6, 7) / 255
        assert images.numpy() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda files: files.pop("train-labels-idx1-ubyte"), "no IDX file there is called train-labels"),
        (lambda files: files.update({"train-labels-idx1-ubyte": b"\x1f\x8b garbage"}), "is not an IDX file of bytes"),
        (lambda files: files.update({"t10k-labels-idx1-ubyte": idx(np.zeros(4, np.uint8))}), "as many images as labels"),
        (lambda files: files.update({"t10k-labels-idx1-ubyte": idx(np.zeros(5, np.uint8))[:-1]}), "contains 4 values"),
    ],
)
def test_idx_files_that_are_missing_or_broken_are_named(change, message, tmp_path):
    files = mnist_like()
    change(files)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data(f"idx:{tmp_path}")


def test_an_idx_path_that_is_no_folder_or_archive_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing: no such folder or tar archive"):
        load_data(f"idx:{tmp_path / 'nothing'}")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="text: is no folder and no tar archive"):
        load_data(f"idx:{tmp_path / 'text'}")
