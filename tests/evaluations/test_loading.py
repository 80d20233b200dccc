"""Loading a file executes no code: pickles are read with `weights_only`, and malicious payloads do not run."""

import ast
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from commands import call

from robust_spectral.evaluations.config import FinetuneConfig
from robust_spectral.evaluations.finetuning.training import finetune
from robust_spectral.evaluations.models.loading import adopt
from robust_spectral.evaluations.run_folder import write_atomically
from robust_spectral.plugins.timm import load

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # a pickle that torch does not run
ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("robust_spectral", "plugins", "evaluations") for path in sorted((ROOT / folder).rglob("*.py"))]
UNSAFE = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_uses_an_unsafe_loader(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & UNSAFE
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("allow_pickle", "False") == "False"
            if called in ("torch.load", "timm.models.load_state_dict"):
                assert given.get("weights_only") == "True", f"line {node.lineno}: {called} without weights_only=True"
            assert called not in ("torch.jit.load", "torch.hub.load")


class Payload:
    """An object that creates a file when an unsafe loader unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def plain_pickle(path: Path, payload: object) -> None:
    path.write_bytes(pickle.dumps({"state_dict": payload}))


def torch_zip(path: Path, payload: object) -> None:
    torch.save({"fc.weight": torch.zeros(1), "extra": payload}, path)


def torch_legacy(path: Path, payload: object) -> None:
    torch.save({"fc.weight": payload}, path, _use_new_zipfile_serialization=False)


def zip_by_hand(path: Path, payload: object) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload))
        archive.writestr("archive/version", "3")


WRITERS = [plain_pickle, torch_zip, torch_legacy, zip_by_hand]


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.pth.tar", "weights.bin", "weights.safetensors"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_malicious_checkpoint_is_refused_and_runs_nothing(write, name: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / name
    write(path, Payload(mark))
    for attempt in (
        lambda: load("test_resnet", checkpoint=path),
        lambda: adopt("timm/test_resnet", "digits", tmp_path / "run", checkpoint=path),
    ):
        with pytest.raises(ValueError, match=r"weights|checkpoint"):
            attempt()
    assert not mark.exists()


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("option", ["initial_checkpoint", "pretrained_path"])
def test_a_fine_tuning_from_a_malicious_file_runs_nothing(option: str, write, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "weights.pth"
    write(path, Payload(mark))
    config = FinetuneConfig(model="test_resnet", data="digits", image_size=16, epochs=0, max_norm=None, **{option: str(path)})
    with pytest.raises(ValueError, match=r"not readable|contains more than tensors"):
        finetune(config, tmp_path / "run")
    assert not mark.exists()


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_malicious_state_of_an_interrupted_run_runs_nothing(write, tmp_path: Path) -> None:
    mark, run = tmp_path / "ran", tmp_path / "run"
    config = FinetuneConfig(model="test_resnet", data="digits", image_size=16, epochs=1, max_norm=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robust_spectral.evaluations.finetuning.training._Training.close", lambda training: None)
        finetune(config, run)
    write_atomically(run / "state.pt", lambda scratch: write(scratch, Payload(mark)))
    with pytest.raises(ValueError, match=r"not readable|does not fit"):
        finetune(config, run, resume=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ("cut", "damaged or cut off"),
        ("whole model", "more than tensors; save model.state_dict()"),
        ("pickle", "more than tensors"),
        ("web page", "is a web page, not weights"),
    ],
)
def test_an_unreadable_checkpoint_is_a_one_line_error_without_advice_to_trust_it(
    content, words, tmp_path: Path, capsys
) -> None:
    path, model = tmp_path / "weights.pth", load("test_resnet").model
    torch.save(model if content == "whole model" else model.state_dict(), path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    if content == "pickle":
        path.write_bytes(pickle.dumps(model.state_dict()))
    if content == "web page":
        path.write_text("\n<!DOCTYPE html><html><title>Sign in</title></html>")
    assert call(f"spectrum test_resnet --checkpoint {path}") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: checkpoint '{path}': ") and words in said and "weights_only" not in said


def test_an_unsafe_loader_would_run_the_payload(tmp_path: Path) -> None:
    plain_pickle(tmp_path / "weights.pth", Payload(tmp_path / "ran"))
    pickle.loads((tmp_path / "weights.pth").read_bytes())
    assert (tmp_path / "ran").exists()
