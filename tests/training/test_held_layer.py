"""Clipping after training steps: smaller feature maps, constant inputs, short Krylov searches and their schedule."""

import copy
from unittest import mock

import pytest
import torch
from cases import orthogonal
from reference import norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import robust_spectral as rs
from robust_spectral.layers.discovery import LinearLayer
from robust_spectral.singular_values.krylov import apply_grouped
from robust_spectral.training import held_layer, schedule
from robust_spectral.training.constant_inputs import settle, slow_directions
from robust_spectral.training.device_reads import answered
from robust_spectral.training.followed_layer import FollowedLayer
from robust_spectral.training.measurements import look, looks
from robust_spectral.training.smaller_inputs import on_small_map


@pytest.mark.parametrize(
    "module, before, after",
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32), (3, 8, 8)),
        (nn.Conv2d(3, 8, 3, padding=1), (3, 5, 40), (3, 5, 8)),
        (nn.Conv2d(3, 8, 3, 2, padding=1), (3, 31, 32), (3, 9, 8)),
        (nn.Conv2d(3, 8, 7, 2, padding=3), (3, 64, 64), (3, 14, 14)),
        (nn.Conv2d(3, 8, 3, dilation=3), (3, 40, 40), (3, 14, 14)),
        (nn.Conv2d(3, 8, 16, 16), (3, 64, 64), (3, 32, 32)),
        (nn.Conv1d(2, 2, 5, padding=2), (2, 100), (2, 10)),
        (nn.Linear(7, 3), (7,), (7,)),
    ],
)
def test_a_large_feature_map_has_a_smaller_counterpart_with_the_same_stride_pattern(module, before, after):
    assert on_small_map(LinearLayer("", module, before)).in_shape == after


def test_an_overridden_convolution_is_followed_on_its_own_feature_map():
    module, offset = nn.Conv2d(3, 8, 3, padding=1), torch.randn(32, 32)
    module.register_forward_hook(lambda module, inputs, output: output + offset)
    assert on_small_map(LinearLayer("", module, (3, 32, 32))).in_shape == (3, 32, 32)


CIRCULAR = {"padding": 1, "padding_mode": "circular", "dtype": torch.float64}


@pytest.mark.parametrize(
    "module, in_shape",
    [
        (nn.Conv2d(5, 8, 3, **CIRCULAR), (5, 8, 8)),
        (nn.Conv2d(5, 8, 3, 2, **CIRCULAR), (5, 8, 8)),
        (nn.Conv2d(6, 8, 3, (2, 1), groups=2, **CIRCULAR), (6, 8, 4)),
        (nn.Conv2d(6, 8, 1, 2, groups=2, dtype=torch.float64), (6, 5, 6)),
        (nn.Conv2d(5, 8, 3, 3, dilation=2, **CIRCULAR | {"padding": 2}), (5, 9, 9)),
        (nn.Conv1d(3, 5, 3, **CIRCULAR), (3, 7)),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2, dtype=torch.float64), (4, 5, 5)),
        (nn.Linear(7, 3, dtype=torch.float64), (7,)),
        (nn.Linear(7, 3, dtype=torch.float64), (4, 7)),
    ],
)
def test_slow_directions_find_the_largest_gain_on_inputs_constant_over_the_map(module, in_shape):
    layer = LinearLayer("", module, in_shape)
    slow = slow_directions(layer, False, torch.zeros(1, dtype=torch.float64), seed=0)
    for _ in range(200):
        gain = settle([slow], [slow.turn()])[0]
    rows = slow.rows(in_shape)
    images = apply_grouped(layer.operator(dtype=torch.float64), rows)
    assert rows.norm(dim=2).flatten().tolist() == pytest.approx([1.0] * len(rows))
    assert float(images.norm(dim=2).max()) == pytest.approx(gain, rel=1e-6)
    assert gain <= norm(module, in_shape) * (1 + 1e-9)


def test_a_slow_direction_tapered_at_zero_padded_borders_attains_the_norm():
    layer = LinearLayer("", nn.Conv2d(3, 4, 3, padding=1), (3, 14, 14))
    layer.module.weight.data.copy_(torch.rand_like(layer.module.weight))
    slow = slow_directions(layer, False, torch.zeros(1, dtype=torch.float64), seed=0)
    for _ in range(50):
        settle([slow], [slow.turn()])
    image = apply_grouped(layer.operator(dtype=torch.float64), slow.rows(layer.in_shape))
    assert float(image.norm()) == pytest.approx(norm(layer.module, layer.in_shape), rel=1e-3)


def test_slow_directions_ignore_a_circular_stride_that_does_not_divide_the_input():
    layer = LinearLayer("", nn.Conv2d(5, 8, (1, 3), 2, **CIRCULAR | {"padding": (0, 1)}), (5, 5, 6))  # 3 of 5 rows are sampled
    slow = slow_directions(layer, False, torch.zeros(1, dtype=torch.float64), seed=0)
    for _ in range(200):
        gain = settle([slow], [slow.turn()])[0]
    images = apply_grouped(layer.operator(dtype=torch.float64), slow.rows(layer.in_shape))
    assert float(images.norm()) == pytest.approx(gain * (3 / 5) ** 0.5, rel=1e-6)


def test_slow_directions_of_a_composite_include_the_scale_of_the_normalisation():
    convolution, batchnorm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval()
    nn.init.uniform_(batchnorm.weight, 1.0, 2.0)
    layer = LinearLayer("", convolution, (3, 4, 4), batchnorm)
    slow = slow_directions(layer, True, torch.zeros(1), seed=0)
    for _ in range(200):
        gain = settle([slow], [slow.turn()])[0]
    assert gain == pytest.approx(norm(nn.Sequential(convolution, batchnorm), (3, 4, 4)), rel=1e-4)


def test_a_parametrised_layer_has_no_slow_directions():
    module = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    assert slow_directions(LinearLayer("", module, (3, 8, 8)), False, torch.zeros(1), seed=0) is None


@pytest.fixture(autouse=True)
def _small_maps_pay(monkeypatch):
    """Let layers as small as those of these tests be measured on smaller feature maps."""
    monkeypatch.setattr(held_layer, "_CHEAP", 1e5)


def convolutions(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    x = torch.rand(1, 8, 16, 16)
    clipper = rs.FastClip(net, x, 1.0)
    clipper.finish()
    return net, clipper


@pytest.mark.slow
def test_a_layer_measured_on_a_small_map_is_kept_near_max_norm_on_the_whole_map():
    net, clipper = convolutions()
    assert all(held.small is not held.whole for held in clipper._held.values())
    for _ in range(60):
        with torch.no_grad():
            for module in (net[0], net[2]):
                module.weight.add_(0.003 * module.weight)
        clipper.step()
    for module in (net[0], net[2]):
        assert 0.97 < norm(module, (8, 16, 16)) <= 1.02


def constant_over_the_map():
    """A direction in a weight of 8 x 8 channels and 3 x 3 taps that acts on inputs that do not vary over the map."""
    torch.manual_seed(5)
    u, v = (nn.functional.normalize(torch.randn(8), dim=0) for _ in range(2))
    return torch.outer(u, v)[:, :, None, None] / 9


@pytest.mark.slow
def test_a_growing_direction_other_than_the_tracked_one_is_found():
    net, clipper = convolutions()
    for _ in range(10):
        clipper.step()
    direction = constant_over_the_map()
    for _ in range(100):
        with torch.no_grad():
            net[0].weight.add_(0.004 * direction)
        clipper.step()
    assert norm(net[0], (8, 16, 16)) <= 1.015


@pytest.mark.slow
def test_a_growing_direction_constant_over_the_map_starts_a_search_on_the_whole_map():
    net, clipper = convolutions()
    for _ in range(12):
        clipper.step()
    held = clipper._held["0"]
    with torch.no_grad():
        net[0].weight.add_(0.8 * constant_over_the_map())
    for _ in range(3):  # within which the gain is measured again
        clipper.step()
        if held.compared > 12:
            break
    assert held.compared == clipper.steps and clipper.report()[0]["upper"] <= 1.01


@pytest.mark.parametrize(("channels", "size", "groups", "alone"), [(8, 24, 1, True), (64, 24, 1, False), (32, 64, 32, False)])
def test_only_cheap_layers_have_no_small_map(channels, size, groups, alone, monkeypatch):
    monkeypatch.undo()
    convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
    held = rs.FastClip(convolution, torch.rand(1, channels, size, size))._held[""]
    assert (held.small is held.whole) == alone


def test_a_krylov_search_includes_the_further_vectors_of_the_last_search():
    torch.manual_seed(0)
    tracked = FollowedLayer.of(LinearLayer("", nn.Linear(400, 300), (400,)), vectors=1, composite=False, seed=3)
    answered(look(tracked, 7, 0))
    assert tracked.next is not None and tracked.next.shape == (1, 3, 400)
    weight = tracked.layer.module.weight
    U, values, Vh = torch.linalg.svd(weight.detach().double())
    tracked.next[0, 1], tracked.vectors[0, 0] = Vh[40].float(), Vh[50].float()
    with torch.no_grad():  # a direction that the next search would miss grows past all others
        weight.add_((1.05 * values[0] - values[40]) * torch.outer(U[:, 40], Vh[40]))
    assert answered(look(tracked, 2, 1)) == pytest.approx(1.05 * float(values[0]), rel=1e-5)
    assert abs(float(tracked.vectors[0, 0].double() @ Vh[40])) > 1 - 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_a_krylov_search_of_a_tiny_layer_finds_a_direction_far_from_its_start(seed, monkeypatch):
    monkeypatch.undo()
    torch.manual_seed(seed)
    net, size = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1, bias=False)), 4 * 14 * 14
    held = rs.FastClip(net, torch.randn(1, 4, 14, 14), 50.0)._held["0"]
    images = held.small.operator.matmat(torch.eye(size).reshape(size, 4, 14, 14)).reshape(size, -1).double()
    squares, directions = torch.linalg.eigh(images @ images.mT)
    held.small.vectors = directions[:, -21][None, None].float()
    assert answered(look(held.small, held.steps, 3)) >= 0.983 * float(squares[-1]) ** 0.5  # seven steps find 0.98 at most


def test_a_norm_that_jumps_is_clipped_within_two_steps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 30), nn.Linear(30, 20))
    clipper = rs.FastClip(net, torch.rand(1, 60), 1.0)
    for _ in range(8):
        clipper.step()
    with torch.no_grad():
        for module in net:
            module.weight.mul_(1.5)
    for _ in range(2):  # a layer that leaves out the first is measured in the second
        clipper.step()
    assert all(norm(module, (module.in_features,)) <= 1.01 for module in net)


def test_every_cheap_layer_is_searched_however_fast_another_grows():
    net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(9)])
    clipper = rs.FastClip(net, torch.rand(1, 6), 1.0)
    with mock.patch.object(schedule, "looks", side_effect=schedule.looks) as looks:
        for _ in range(20):
            with torch.no_grad():
                net[0].weight.mul_(1.05)
            clipper.step()
    looked = {tracked.layer.name for call in looks.call_args_list for tracked in call.args[0]}
    assert looked == {str(i) for i in range(9)}


def settled(count, values=(0.995,), steps=30, **options):
    """Dense layers with the singular values given, and their clipper after some steps."""
    torch.manual_seed(0)
    net = orthogonal(count, 16, values)
    clipper = rs.FastClip(net, torch.randn(4, 16), **options)
    for _ in range(steps):
        clipper.step()
    return net, clipper


@pytest.mark.slow
@pytest.mark.parametrize("sweeps", [1, 2])
def test_growing_layers_leave_out_no_power_steps(sweeps):
    net, clipper = settled(8, sweeps=sweeps)
    for step in range(80):
        with torch.no_grad():
            for layer in net[:4]:
                layer.weight.mul_(1.02)
        clipper.step()
        if step >= 2:  # before, they may leave out power steps
            assert max(norm(layer, (16,)) for layer in net) <= 1.011
            assert not any(held.resting for held in list(clipper._held.values())[:4])


def test_layers_that_may_leave_out_power_steps_stay_near_a_falling_target(monkeypatch):
    monkeypatch.setattr(held_layer, "_CHEAP", 0.0)  # layers that are not cheap leave out more power steps in a row
    net, clipper = settled(12, torch.linspace(10, 3, 16).tolist(), steps=2, warmup_steps=20)
    for index, layer in enumerate(net):
        layer.weight.data.mul_(0.97 - 0.05 * index)
    for _ in range(18):
        clipper.step()
        allowed = clipper._target(clipper._held["0"], 0.0)
        assert max(norm(layer, (16,)) for layer in net) <= 1.02 * allowed


def test_a_krylov_search_ends_the_omission_of_power_steps():
    net, clipper = settled(1)
    held = clipper._held["0"]
    held.resting = 1
    for glanced, grown in (([held], 1.0), ([], 1.05)):
        net[0].weight.data.mul_(grown)
        with mock.patch.object(schedule, "_most_due", return_value=glanced):
            clipper.step()
    assert norm(net[0], (16,)) <= 1.006


@pytest.mark.slow
def test_a_growing_direction_of_a_tiny_layer_other_than_the_tracked_one_is_clipped_at_once():
    net, clipper = settled(24, [0.99, 0.98, *[0.5] * 14])
    for layer in net:
        with torch.no_grad():
            layer.weight[1] *= 1.04
        clipper.step()
        assert norm(layer, (16,)) <= 1.006


@pytest.mark.slow
@pytest.mark.parametrize("vectors", [1, 3])
def test_a_step_under_autocast_is_clipped_in_full_precision(vectors):
    net, _ = convolutions()
    clipper = rs.FastClip(net, torch.randn(1, 8, 16, 16), vectors=vectors)
    for _ in range(30):
        with torch.no_grad():
            net[0].weight.mul_(1.01)
        with torch.autocast("cpu", torch.bfloat16):
            clipper.step()
    assert norm(net[0], (8, 16, 16)) <= 1.02
    with torch.autocast("cpu", torch.bfloat16):
        clipper.finish()
    assert norm(net[0], (8, 16, 16)) <= 1.001


@pytest.mark.parametrize("size", [0.0, 1e-19])
@pytest.mark.parametrize(
    "module, in_shape",
    [(nn.Linear(6, 5), (6,)), (nn.Conv2d(4, 4, 3, padding=1), (4, 8, 8)), (nn.Conv2d(4, 4, 3, groups=2), (4, 8, 8))],
    ids=["dense", "convolution", "grouped"],
)
def test_a_layer_that_starts_at_zero_is_kept_near_max_norm_once_it_has_grown(module, in_shape, size):
    module = copy.deepcopy(module)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.mul_(size)
    clipper = rs.FastClip(module, torch.rand(1, *in_shape))
    for _ in range(14):
        clipper.step()
    for step in range(20):
        with torch.no_grad():
            module.weight.add_(0.1 * start * (step + 1))
        clipper.step()
    assert clipper.skipped == 0 and 0.9 < norm(module, in_shape) <= 1.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_zero_group_stays_zero_while_another_group_is_clipped(seed):
    torch.manual_seed(seed)
    module = nn.Conv2d(32, 32, 1, groups=2, bias=False)
    with torch.no_grad():
        module.weight[:16] = 0
        module.weight[16:, :, 0, 0] = 0.5 * torch.linalg.qr(torch.randn(16, 16))[0]
    clipper = rs.FastClip(module, torch.randn(1, 32, 8, 8), 0.5)
    for _ in range(8):
        with torch.no_grad():
            module.weight[16:] *= 1.02
            module.weight[16:] += 2e-4 * torch.randn(16, 16, 1, 1)
        clipper.step()
    assert not module.weight[:16].any() and 0.48 < norm(module, (32, 8, 8)) <= 0.51


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("wrapped", [lambda module: module, nn.utils.parametrizations.weight_norm], ids=["own", "weight_norm"])
def test_a_warm_up_starts_at_each_layers_own_norm(wrapped, every):
    net = nn.Sequential(*[wrapped(nn.Linear(30, 30)) for _ in range(4)])
    with torch.no_grad():
        for module in net:
            (module.parametrizations.weight.original0 if hasattr(module, "parametrizations") else module.weight).mul_(5)
    before = [norm(module, (30,)) for module in net]
    clipper = rs.FastClip(net, torch.rand(1, 30), 1.0, warmup_steps=1000, every=every)
    for _ in range(every):
        clipper.step()
    for module, start in zip(net, before, strict=True):
        assert 0.9 * start <= norm(module, (30,)) <= 1.001 * start


@pytest.mark.parametrize(("on_gpu", "most", "most_in_a_step"), [(False, 6, 6), (True, 16, 32)])
def test_a_step_searches_few_of_many_layers_however_many_are_far_from_their_target(on_gpu, most, most_in_a_step):
    net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(40)])
    with mock.patch.object(held_layer.HeldLayer, "on_gpu", on_gpu):
        clipper = rs.FastClip(net, torch.rand(1, 6), 1.0)
        of_turns, of_steps = [], []
        for step in range(12):
            with torch.no_grad():
                for module in net:
                    module.weight.mul_(1.02 if on_gpu else 1.0)
            with mock.patch.object(schedule, "looks", side_effect=schedule.looks) as looks:
                clipper.step()
            if step:  # in the first step all layers may be searched
                of_turns += [len(call.args[0]) for call in looks.call_args_list]
                of_steps.append(sum(len(call.args[0]) for call in looks.call_args_list))
    assert max(of_turns) == most and max(of_steps) <= most_in_a_step  # scheduled layers and those clipped right after the step


class Computations(TorchDispatchMode):
    """Counts the operations that are run while it is active, except views."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **kwargs or {})


def test_measuring_and_clipping_a_layer_launch_few_operations():
    """On a GPU the host takes as long to launch a small operation as a large one, and training leaves it little time."""
    layer = LinearLayer("", nn.Conv2d(8, 8, 3, padding=1), (8, 6, 6))
    tracked = FollowedLayer.of(layer, vectors=1, composite=False, seed=0)
    many = [FollowedLayer.of(layer, vectors=1, composite=False, seed=seed) for seed in range(8)]
    counts = []
    for start in (
        tracked.power_step,
        tracked.power_step,
        lambda: answered(looks(many, [7] * 8, 3, [None] * 8)),
        lambda: tracked.hold_(0.5),
    ):
        with torch.no_grad(), Computations() as computations:
            start()
        counts.append(computations.count)
    assert counts[0] <= 4 and counts[1] <= 6 and counts[2] <= 8 * 100 and counts[3] <= 24


@pytest.mark.slow
def test_norms_read_before_the_first_step_are_those_of_a_krylov_search():
    net, clipper = convolutions()
    norms = clipper.norms()
    assert all(
        value >= 0.97 * norm(net[int(name)], held.whole.layer.in_shape)
        for (name, value), held in zip(norms.items(), clipper._held.values(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_a_layer_whose_norm_changes_by_orders_of_magnitude_is_kept_near_max_norm(size):
    net, clipper = convolutions()
    start = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.mul_(size)
    for step in range(80):
        clipper.step()
        with torch.no_grad():
            net[0].weight.add_(start, alpha=0.02 * (step < 79))
    assert 0.9 < norm(net[0], (8, 16, 16)) <= 1.02


def test_vectors_of_a_block_search_have_unit_length_where_its_space_is_exhausted():
    weight = torch.diag(torch.tensor([1.0] * 5 + [1e-3] + [0.0] * 4))
    for seed in range(20):
        layer = nn.Linear(10, 10, bias=False)
        layer.weight.data.copy_(weight)
        tracked = FollowedLayer.of(LinearLayer("", layer, (10,)), vectors=3, composite=False, seed=seed)
        with torch.no_grad():
            answered(looks([tracked], [7], seed, [None]))
        kept = tracked.found.values[0] > 0.5
        torch.testing.assert_close(tracked.found.right[0, kept].norm(dim=1), torch.ones(int(kept.sum())))


@pytest.mark.slow
def test_clipping_on_small_maps_continues_from_a_saved_state():
    net, clipper = convolutions()
    for _ in range(7):
        with torch.no_grad():
            net[0].weight.mul_(1.02)
        clipper.step()
    other_net = copy.deepcopy(net)
    other = rs.FastClip(other_net, torch.rand(1, 8, 16, 16), 1.0)
    other.load_state_dict(copy.deepcopy(clipper.state_dict()))
    for _ in range(12):
        for model, held in ((net, clipper), (other_net, other)):
            with torch.no_grad():
                model[0].weight.mul_(1.02)
            held.step()
    assert torch.equal(net[0].weight, other_net[0].weight) and torch.equal(net[2].weight, other_net[2].weight)
