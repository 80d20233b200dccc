"""RobustBench entries and files of adversarial images."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robust_spectral.plugins import robustbench_images
from robust_spectral.plugins.robustbench import BOARDS, board_of, model_info, problems, write_model_info
from robust_spectral.plugins.robustbench_images import save_adversarial

PAPER = {
    "link": "https://example.org/abs/1",
    "name": "Clipped layers",
    "authors": "Ada Lee, Bo Müller",
    "venue": "ICML 2026",
    "architecture": "ResNet-18",
}
LINF = {
    **PAPER, "additional_data": False, "number_forward_passes": 1, "dataset": "cifar10", "eps": "8/255", "clean_acc": "81.20",
    "reported": "50.1", "autoattack_acc": "49.96", "external": "49.90", "footnote": None, "unreliable": False,
}  # fmt: skip
CORRUPTIONS = {
    **PAPER, "additional_data": True, "number_forward_passes": 6, "dataset": "imagenet", "eps": None, "clean_acc": "76.9",
    "reported": "", "corruptions_acc": "42.0", "corruptions_mce": "100.55", "corruptions_acc_3d": None,
}  # fmt: skip
BASELINE = {
    **PAPER, "authors": "", "venue": "N/A", "additional_data": False, "number_forward_passes": 1, "dataset": "cifar10",
    "eps": "0.5", "clean_acc": "94.78", "reported": "0.0", "autoattack_acc": "0.0",
}  # fmt: skip


def entry(board: str = "cifar10/L2", **changes: object) -> dict:
    given = {**PAPER, "additional_data": False, "images": 10_000, "clean_acc": 0.8534, "autoattack_acc": 0.5342, **changes}
    return model_info(board, **given)


def test_an_entry_has_percentages_as_text_and_the_eps_of_its_board() -> None:
    info = entry(reported=0.58, external=0.531, unreliable=True, footnote="Certified accuracy 31.50 % at 0.1.")
    assert {key: info[key] for key in ("dataset", "eps", "clean_acc", "reported", "autoattack_acc", "external")} == {
        "dataset": "cifar10", "eps": "0.5", "clean_acc": "85.34", "reported": "58.00", "autoattack_acc": "53.42",
        "external": "53.10",
    }  # fmt: skip
    assert info["unreliable"] is True and info["number_forward_passes"] == 1 and info["footnote"].startswith("Certified")


def test_unknown_fields_of_an_entry_are_left_out() -> None:
    info = entry("imagenet/Linf", images=5_000)
    assert info["eps"] == "4/255" and info["reported"] == ""
    assert not {"external", "footnote", "unreliable"} & info.keys()


def test_the_accuracy_under_autoattack_is_required() -> None:
    with pytest.raises(TypeError, match="autoattack_acc"):
        model_info("cifar10/L2", **PAPER, additional_data=False, images=10_000, clean_acc=0.9)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"board": "cifar100/L2"}, "expected one of cifar10/L2"),
        ({"board": "cifar10/corruptions"}, "expected one of"),
        ({"images": 1_000}, "all 10000 test images"),
        ({"clean_acc": 85.34}, "clean_acc=85.34.* not per cent"),
        ({"autoattack_acc": math.nan}, "autoattack_acc=nan"),
        ({"autoattack_acc": 0.9}, "autoattack_acc 90.00 is above clean_acc 85.34"),
        ({"external": 0.54}, "external 54.00 is above autoattack_acc"),
        ({"eps": "1.0"}, "eps is '1.0'; the board cifar10/L2 has '0.5'"),
        ({"link": "2402.16017"}, "link is '2402.16017'"),
        ({"authors": " "}, "authors is ' '"),
    ],
    ids=str,
)
def test_an_entry_that_robustbench_would_not_accept_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry(**changes)


@pytest.mark.parametrize("info", [LINF, CORRUPTIONS, BASELINE], ids=["linf", "corruptions", "baseline"])
def test_a_valid_entry_has_no_problems(info: dict) -> None:
    assert problems(info) == problems(info, board_of(info)) == []


def test_every_board_with_an_eps_accepts_an_entry() -> None:
    for board in (board for board, sizes in BOARDS.items() if sizes):
        info = entry(board, images=5_000 if board.startswith("imagenet") else 10_000)
        assert board_of(info) == board and problems(info, board) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eps": 8 / 255}, "eps is 0.03"),
        ({"eps": None}, "eps is None"),
        ({"clean_acc": 81.2}, "clean_acc is 81.2; expected per cent as a text"),
        ({"clean_acc": "181.20"}, "clean_acc is '181.20'"),
        ({"clean_acc": None}, "clean_acc is None"),
        ({"autoattack_acc": "49.96%"}, "autoattack_acc is '49.96%'"),
        ({"external": None}, "external is None"),
        ({"external": "50.00"}, "external 50.00 is above autoattack_acc 49.96"),
        ({"reported": "null"}, "reported is 'null'"),
        ({"additional_data": "false"}, "additional_data is 'false'; expected true or false"),
        ({"unreliable": 0}, "unreliable is 0"),
        ({"number_forward_passes": True}, "number_forward_passes is True"),
        ({"number_forward_passes": 0}, "number_forward_passes is 0"),
        ({"footnote": 3}, "footnote is 3"),
        ({"name": ""}, "name is ''"),
        ({"certified_acc": "40.00"}, "certified_acc is no field"),
        ({"dataset": "mnist"}, "there is no board 'mnist/Linf'"),
    ],
    ids=str,
)
def test_a_fault_in_an_entry_is_named(changes: dict, message: str) -> None:
    assert any(message in problem for problem in problems({**LINF, **changes}))


def test_missing_fields_and_a_wrong_board_are_named() -> None:
    assert problems({"dataset": "cifar10"})[:2] == ["link is missing", "name is missing"]
    assert "autoattack_acc is missing" in problems({"dataset": "cifar10"})
    assert problems(LINF, "cifar100/Linf") == ["dataset is 'cifar10' on the board cifar100/Linf"]
    assert "eps is '8/255'; the board cifar10/L2 has '0.5'" in problems(LINF, "cifar10/L2")
    assert problems({**CORRUPTIONS, "eps": 0.5}) == ["eps is 0.5; expected null, or the size trained with as a text"]


def test_an_entry_is_written_to_the_folder_of_its_board(tmp_path: Path) -> None:
    for info, board in ((LINF, "cifar10/Linf"), (CORRUPTIONS, "imagenet/corruptions"), (entry(), "cifar10/L2")):
        path = write_model_info(info, tmp_path, "Lee2026Clipped_R-18")
        assert path == tmp_path / board / "Lee2026Clipped_R-18.json"
        assert json.loads(path.read_text()) == info
        assert [other.name for other in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["../Lee2026Clipped", "clipped", "Lee26Clipped", "Lee2026", "Lee2026 Clipped"])
def test_a_name_of_the_wrong_form_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="<Name><Year><FirstWord>"):
        write_model_info(LINF, tmp_path, name)


def test_a_faulty_entry_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reported is 'null'"):
        write_model_info({**LINF, "reported": "null"}, tmp_path, "Lee2026Clipped")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test set of eight small images."""
    monkeypatch.setitem(robustbench_images.TEST_SETS, "cifar10", (8, 3, 4, 4))


def attacked(clean: Tensor, threat_model: str, size: float) -> Tensor:
    direction = torch.randn_like(clean).sign()
    if threat_model == "L2":
        direction /= math.sqrt(math.prod(clean.shape[1:]))
    return clean + size * direction


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("threat_model, eps, size", [("Linf", "8/255", 8 / 255), ("L2", "0.5", 0.5)])
def test_images_at_eps_up_to_the_rounding_of_float32_are_saved(
    tmp_path: Path, threat_model: str, eps: str, size: float
) -> None:
    clean = torch.rand(8, 3, 4, 4) * 0.6 + 0.2
    images = attacked(clean, threat_model, size)
    path = save_adversarial(images.requires_grad_(), clean, tmp_path / "new" / "a.pt", f"cifar10/{threat_model}", eps)
    read = torch.load(path, weights_only=True)
    assert torch.equal(read, images) and read.dtype == torch.float32 and not read.requires_grad
    with pytest.raises(ValueError, match=r"8 images are farther than .*the farthest is number"):
        save_adversarial(attacked(clean, threat_model, 1.0001 * size), clean, path, f"cifar10/{threat_model}", eps)
    assert torch.equal(torch.load(path, weights_only=True), images)


def test_a_test_set_given_as_a_view_is_saved_at_the_size_of_its_images(tmp_path: Path) -> None:
    clean = torch.full((1, 3, 32, 32), 0.5).expand(10_000, 3, 32, 32)
    images = torch.zeros(2, 3, 32, 32)[:1].expand(10_000, 3, 32, 32)
    with pytest.raises(ValueError, match=r"10000 images are farther .* number 0, at 0.5"):
        save_adversarial(images, clean, tmp_path / "a.pt", "cifar100/Linf", "8/255")
    path = save_adversarial(clean, clean, tmp_path / "a.pt", "cifar100/Linf", "8/255")
    assert torch.load(path, weights_only=True, mmap=True).shape == (10_000, 3, 32, 32)
    assert path.stat().st_size < 10_000 * 3 * 32 * 32 * 4 + 10_000


GREY = torch.full((8, 3, 4, 4), 0.5)
WHITE = torch.ones(8, 3, 4, 4)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    "images, clean, options, message",
    [
        (GREY[:7], GREY[:7], {}, r"images are \(7, 3, 4, 4\); the whole test set of cifar10 is \(8, 3, 4, 4\)"),
        (GREY, GREY[:7], {}, r"the clean ones \(7, 3, 4, 4\)"),
        (GREY[0], GREY[0], {}, "whole test set"),
        (GREY.double(), GREY, {}, "torch.float64; cast them to float32 and predict"),
        (GREY, GREY.byte(), {}, "clean images are torch.uint8"),
        (WHITE + 0.01, WHITE, {}, "8 images or their clean ones leave .*number 0"),
        (WHITE, WHITE + 0.01, {}, "leave"),
        (GREY * math.nan, GREY, {}, "leave"),
        (GREY, GREY, {"eps": "8:255"}, "eps is '8:255'"),
        (GREY, GREY, {"eps": "0"}, "eps is '0'"),
        (GREY, GREY, {"eps": "8/0"}, "eps is '8/0'"),
        (GREY, GREY, {"eps": math.inf}, "eps is inf"),
        (GREY, GREY, {"board": "mnist/Linf"}, "no board mnist/Linf"),
        (GREY, GREY, {"board": "cifar10"}, "no board cifar10/;"),
        (GREY, GREY, {"path": "a.npy"}, "must end in .pt"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str | dict) else "",
)
def test_invalid_adversarial_images_are_not_saved(
    tmp_path: Path, images: Tensor, clean: Tensor, options: dict, message: str
) -> None:
    given = {"path": tmp_path / "a.pt", "board": "cifar10/Linf", "eps": "8/255", **options}
    with pytest.raises(ValueError, match=message):
        save_adversarial(images, clean, **given)
    assert list(tmp_path.iterdir()) == []
