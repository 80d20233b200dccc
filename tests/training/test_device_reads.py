"""Computations that read numbers from the device in rounds, immediately or one call later, and clipping by them."""

import copy
import pickle
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import orthogonal
from reference import norm
from torch import nn

import robust_spectral as rs
from robust_spectral.training.device_reads import Asking, Later, answered, together
from robust_spectral.training.held_layer import HeldLayer
from robust_spectral.training.schedule import hold


def add(count: int, log: list[str], name: str = "") -> Asking[float]:
    """Request the numbers 1, 2, …, ``count``, one a round, and return their sum."""
    total = 0.0
    for number in range(1, count + 1):
        log.append(f"{name}{number}")
        total += float((yield [torch.tensor(float(number))])[0])
    return total


def test_a_computation_runs_to_its_end_with_the_numbers_it_requests() -> None:
    assert answered(add(4, [])) == 10 and answered(add(0, [])) == 0


def test_several_computations_share_rounds_of_reads_and_return_separate_results() -> None:
    log: list[str] = []
    both = together([add(1, log, "a"), add(3, log, "b"), add(0, log, "c"), add(2, log, "d")])
    rounds = []

    def counting() -> Asking[list[float]]:
        answers = None
        while True:
            try:
                wanted = next(both) if answers is None else both.send(answers)
            except StopIteration as end:
                return end.value
            rounds.append(len(wanted))
            answers = yield wanted

    assert answered(counting()) == [1.0, 6.0, 0.0, 3.0]
    assert rounds == [3, 2, 1] and log == ["a1", "b1", "d1", "b2", "d2", "b3"]


def test_a_deferred_computation_advances_one_round_per_call() -> None:
    log: list[str] = []
    later = Later(add(2, log))
    assert (log, later.done) == (["1"], False)
    later.go_on()
    assert (log, later.done) == (["1", "2"], False)
    later.go_on()
    assert later.done


def test_a_deferred_computation_without_requests_is_done_immediately() -> None:
    assert Later(add(0, [])).done


@pytest.fixture
def a_step_late() -> Iterator[None]:
    """The hook as on a GPU: measurements of a step take effect in the next step."""
    with mock.patch.object(HeldLayer, "on_gpu", True):
        yield


def trained(model: nn.Module, steps: int, **options: object) -> rs.FastClip:
    images, labels = torch.randn(256, 3, 12, 12), torch.randint(5, (256,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clipper = rs.FastClip(model, images, **options)
    clipper.attach(optimizer)
    for index in range(steps):
        part = slice(16 * index % 256, 16 * index % 256 + 16)
        optimizer.zero_grad()
        F.cross_entropy(20 * model(images[part]), labels[part]).backward()
        optimizer.step()
    return clipper


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


SHAPES = {0: (3, 12, 12), 2: (16, 12, 12), 6: (64,)}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"sweeps": 2}, {"vectors": 3}], ids=str)
def test_norms_are_kept_near_the_target_where_reads_arrive_one_step_late(a_step_late: None, options: dict[str, int]) -> None:
    model = convolutions()
    trained(model, 80, **options)
    assert max(norm(copy.deepcopy(model[index]), shape) for index, shape in SHAPES.items()) <= 1.02


def test_the_hooks_and_explicit_calls_of_step_give_the_same_weights(a_step_late: None) -> None:
    images, labels = torch.randn(16, 3, 12, 12), torch.randint(5, (16,))
    ended = []
    start = convolutions()
    for attached in (True, False):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        clipper = rs.FastClip(model, images)
        if attached:
            clipper.attach(optimizer)
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(20 * model(images), labels).backward()
            optimizer.step()
            if not attached:
                clipper.step()
        ended.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ended)


def test_weights_scaled_down_between_two_steps_are_not_clipped_by_stale_measurements(a_step_late: None) -> None:
    model = convolutions()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rs.FastClip(model, torch.randn(1, 3, 12, 12)).attach(optimizer)
    for step in range(40):
        with torch.no_grad():
            model[2].weight.mul_(1.02)
        model(torch.randn(2, 3, 12, 12)).sum().backward()
        optimizer.step()
        if step > 20:
            with torch.no_grad():
                kept = model[2].weight.clone()
                model[2].weight.mul_(0.5)
            optimizer.step()
            assert torch.equal(model[2].weight, kept * 0.5)
            with torch.no_grad():
                model[2].weight.copy_(kept)


def test_only_a_layer_whose_norm_grows_fast_is_clipped_right_after_the_step(a_step_late: None) -> None:
    model = orthogonal(5, 12)
    clipper = rs.FastClip(model, torch.randn(4, 12))
    for _ in range(24):
        clipper.step()
    for step in range(20):
        with torch.no_grad():
            model[3].weight.mul_(1.2)
        with mock.patch("robust_spectral.training.step_runner.hold", side_effect=hold) as turn:
            clipper.step()
        behind = [call.args[0] for call in turn.mock_calls if call.args[0][0].hurried]
        if step >= 4:  # its growth has been measured
            assert [[held.whole.layer.name for held in now] for now in behind] == [["3"]]
            assert norm(model[3], (12,)) <= 1.001
    for _ in range(40):
        clipper.step()
    assert not any(held.hurried for held in clipper._turns._layers)


@pytest.mark.slow
def test_clipping_continues_after_a_model_is_moved_between_a_step_and_a_read_of_norms(a_step_late: None) -> None:
    for steps in range(20, 26):
        model = convolutions()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        clipper = trained(model, steps)
        clipper.attach(optimizer)
        with mock.patch.object(HeldLayer, "on_gpu", False):
            clipper.norms()
            optimizer.step()
        for _ in range(12):
            with torch.no_grad():
                model[2].weight.mul_(1.02)
            optimizer.step()
        assert norm(model[2], (16, 12, 12)) <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("hooked", [False, True])
def test_tracked_vectors_recover_after_a_round_dropped_on_non_finite_weights(hooked: bool, a_step_late: None) -> None:
    def fails() -> float:
        raise RuntimeError("no memory")

    for steps in range(20, 26):
        model = convolutions()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        clipper = trained(model, steps)
        kept = copy.deepcopy(model.state_dict())
        if hooked:
            clipper.attach(optimizer)
            optimizer.step()
        with torch.no_grad():
            model[2].weight[0, 0, 0, 0] = torch.nan
        if hooked:
            with pytest.raises(RuntimeError, match="no memory"):
                optimizer.step(fails)
        else:
            clipper.step()
            with pytest.raises(ValueError, match="NaN"):
                clipper.norms()
        model.load_state_dict(kept)
        assert max(clipper.norms().values()) <= 1.02
        skipped = clipper.skipped
        for _ in range(4):
            optimizer.step() if hooked else clipper.step()
        assert clipper.skipped == skipped and max(clipper.norms().values()) <= 1.02


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_hook_continues_at_the_next_step(late: bool) -> None:
    with mock.patch.object(HeldLayer, "on_gpu", late):
        model = convolutions()
        clipper = trained(model, 20)
        with mock.patch.object(HeldLayer, "hold_found", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            for _ in range(12):  # some layers are searched, some leave out power steps
                clipper.step()
        with torch.no_grad():
            model[2].weight.mul_(1.2)
        for _ in range(12):
            clipper.step()
        assert norm(model[2], (16, 12, 12)) <= 1.02


def test_measurements_of_a_failed_step_do_not_clip_the_weights(a_step_late: None) -> None:
    model = convolutions()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rs.FastClip(model, torch.randn(1, 3, 12, 12)).attach(optimizer)
    model(torch.randn(2, 3, 12, 12)).sum().backward()
    for _ in range(30):
        optimizer.step()
    kept = model[2].weight.detach().clone()
    for _ in range(4):
        with torch.no_grad():
            model[2].weight.mul_(1.5)

        def closure() -> float:
            raise RuntimeError("no memory")

        with pytest.raises(RuntimeError, match="no memory"):
            optimizer.step(closure)
        with torch.no_grad():
            model[2].weight.copy_(kept)
        optimizer.step()
        assert torch.equal(model[2].weight, kept)


@pytest.mark.slow
def test_additional_sweeps_with_nothing_to_clip_delay_no_round(a_step_late: None) -> None:
    turns = {}
    for sweeps in (1, 3):
        clipper = trained(convolutions(), 60, sweeps=sweeps)
        turns[sweeps] = clipper._turns.count
    assert turns[3] >= 0.6 * turns[1]


@pytest.mark.slow
def test_an_optimizer_wrapper_with_only_a_post_step_hook_is_supported(a_step_late: None) -> None:
    class Wrapper:
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.register_step_post_hook = inner.register_step_post_hook

    model = convolutions()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipper = rs.FastClip(model, torch.randn(1, 3, 12, 12))
    clipper.attach(Wrapper(optimizer))  # type: ignore[arg-type]
    model(torch.randn(2, 3, 12, 12)).sum().backward()
    for _ in range(40):
        with torch.no_grad():
            model[2].weight.mul_(1.003)
        optimizer.step()
    assert clipper._turns.count >= 14 and norm(model[2], (16, 12, 12)) <= 1.02


def test_removing_a_handle_removes_all_hooks() -> None:
    model = convolutions()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = rs.FastClip(model, torch.randn(1, 3, 12, 12))
    handle = clipper.attach(optimizer)
    assert clipper.attached and optimizer._optimizer_step_pre_hooks and optimizer._optimizer_step_post_hooks
    handle.remove()
    assert not clipper.attached and not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_tied_weights_are_clipped_once_where_reads_arrive_one_step_late(a_step_late: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 12, bias=False))
    model[2].weight = model[0].weight
    clipper = rs.FastClip(model, torch.randn(4, 12))
    for _ in range(40):
        with torch.no_grad():
            model[0].weight.mul_(1.002)
        clipper.step()
        if clipper.steps > 10:
            assert 0.98 <= norm(model[0], (12,)) <= 1.02


@pytest.mark.slow
def test_diverged_weights_are_detected_one_step_late_and_clipping_resumes_once_restored(a_step_late: None) -> None:
    model = convolutions()
    clipper = trained(model, 20)
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    clipper.step()
    clipper.step()
    assert 1 <= clipper.skipped <= 2
    model.load_state_dict(kept)
    for _ in range(6):
        clipper.step()
    assert clipper.skipped <= 3
    assert max(clipper.norms().values()) <= 1.02
    clipper.finish()
    assert max(norm(copy.deepcopy(model[index]), shape) for index, shape in SHAPES.items()) <= 1.001


def test_weights_that_stay_non_finite_are_an_error_where_reads_arrive_one_step_late(a_step_late: None) -> None:
    model = convolutions()
    clipper = trained(model, 5)
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '2' contain NaN"):
        for _ in range(40):
            clipper.step()


def test_a_step_captured_in_a_cuda_graph_is_not_clipped_and_gives_a_warning() -> None:
    model = convolutions()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = rs.FastClip(model, torch.randn(1, 3, 12, 12))
    clipper.attach(optimizer)
    with (
        mock.patch("torch.cuda.is_initialized", return_value=True),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
        pytest.warns(UserWarning, match="after each replay"),
    ):
        optimizer.step()
    assert clipper.steps == 0


def test_a_round_in_which_no_layer_is_due_completes(a_step_late: None) -> None:
    model = convolutions()
    clipper = rs.FastClip(model, torch.randn(1, 3, 12, 12), max_norm=50.0, every=5)  # far above, so power steps are left out
    for _ in range(60):
        clipper.step()
    assert max(clipper.norms().values()) <= 50


def test_a_copy_of_a_clipper_with_a_round_under_way_starts_its_own_round(a_step_late: None) -> None:
    model = convolutions()
    clipper = trained(model, 21)
    both = copy.deepcopy((model, clipper))
    for _ in range(8):
        both[1].step()
    assert max(both[1].norms().values()) <= 1.02 and both[1].steps == 29


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deep", "pickled"])
def test_a_copy_of_a_clipper_clips_the_copy_of_its_model(copied) -> None:
    model = convolutions()
    twin, clipper = copied((model, trained(model, 5)))
    for _ in range(12):
        with torch.no_grad():
            twin[2].weight.mul_(1.05)
        clipper.step()
    assert norm(copy.deepcopy(twin[2]), SHAPES[2]) <= 1.02


def test_reading_norms_between_two_steps_does_not_cause_a_wrong_clip(a_step_late: None) -> None:
    net = orthogonal(40, 8)
    clipper = rs.FastClip(net, torch.rand(1, 8))
    for _ in range(11):
        clipper.step()
    kept = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for layer in net:
            layer.weight.mul_(1.5)
    clipper.step()
    net.load_state_dict(kept)
    clipper.norms()
    clipper.step()
    assert min(norm(layer, (8,)) for layer in net) > 0.8


@pytest.mark.slow
def test_weights_restored_after_a_read_of_non_finite_norms_stay_finite(a_step_late: None) -> None:
    model = convolutions()
    for steps in range(20, 26):
        clipper = trained(model, steps)
        kept = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model[2].weight[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            clipper.norms()
        model.load_state_dict(kept)
        for _ in range(4):
            clipper.step()
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.slow
def test_clippers_with_and_without_small_feature_maps_can_exchange_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_spectral.training.held_layer._CHEAP", 1e5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False))
    images = torch.randn(1, 8, 16, 16)
    with mock.patch("robust_spectral.training.held_layer.on_small_map", lambda layer: layer):
        whole = rs.FastClip(copy.deepcopy(model), images)
    clipper = rs.FastClip(model, images)
    for first, second in ((whole, clipper), (clipper, whole)):
        for _ in range(8):
            first.step()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for _ in range(40):
            with torch.no_grad():
                second.layers[0].module.weight.mul_(1.005)
            second.step()
        assert 0.97 <= norm(copy.deepcopy(second.layers[0].module), (8, 16, 16)) <= 1.02


def test_an_overflow_in_lanczos_is_an_error() -> None:
    layer = nn.Linear(40, 30, bias=False)
    with torch.no_grad():
        layer.weight.mul_(1e21)
    operator = rs.linear_operator(layer, (40,))
    with pytest.raises(ValueError, match="overflow"):
        rs.Lanczos().solve(operator, 1, torch.randn(1, 1, 40))
