"""Public names: the modules that they are imported from, their signatures and their attributes."""

import importlib
import inspect
import math

import pytest
import torch
from torch import nn

import robust_spectral as rs

CORE = [
    "linear_operator", "top_singular", "spectral_norm", "spectral_norms", "clip_", "FastClip", "lipschitz_bound",
    "lipschitz_estimate", "certified_radius", "Lanczos", "PowerQR", "NormInterval", "LinearOperator", "LipschitzBound",
    "ClipResult", "SingularTriplets", "LinearLayer", "linear_layers", "circular_singular_values",
    "duplicate_structure", "representation_gap", "DuplicateStructure", "RepresentationGap", "MoveWeight",
    "MoveGamma", "MoveWeightAndGamma", "projected_weight", "fold_batchnorms_", "refined_bound", "__version__",
]  # fmt: skip
HOMES = {
    "operators": ["LinearOperator", "linear_operator"],
    "singular_values": [
        "PowerQR",
        "Lanczos",
        "top_singular",
        "SingularTriplets",
        "circular_singular_values",
        "duplicate_structure",
        "representation_gap",
        "DuplicateStructure",
        "RepresentationGap",
    ],
    "norms": ["spectral_norm", "NormInterval"],
    "layers": ["linear_layers", "LinearLayer", "spectral_norms", "fold_batchnorms_"],
    "clipping": ["clip_", "ClipResult", "projected_weight", "MoveWeight", "MoveGamma", "MoveWeightAndGamma"],
    "training": ["FastClip"],
    "lipschitz": ["lipschitz_bound", "lipschitz_estimate", "LipschitzBound", "certified_radius"],
    "certificates": ["refined_bound"],
}
PLUGINS = {
    "art": ["FastClipTrainer", "FastClipTransformer", "LipschitzClassifier", "register"],
    "timm": ["load"],
    "timm_task": ["FastClipTask"],
    "lightning": ["FastClipCallback"],
    "transformers": ["FastClipCallback"],
    "maite": ["ImageClassifier", "CertifiedAccuracy"],
    "robustbench": ["model_info", "problems", "write_model_info"],
    "robustbench_images": ["save_adversarial"],
}


@pytest.mark.parametrize("name", CORE)
def test_a_core_name_is_importable_from_the_package(name: str) -> None:
    assert hasattr(rs, name)


@pytest.mark.parametrize("module, name", [(module, name) for module, names in HOMES.items() for name in names])
def test_a_core_name_is_defined_in_its_package(module: str, name: str) -> None:
    found = getattr(importlib.import_module(f"robust_spectral.{module}"), name)
    assert found is getattr(rs, name)
    assert found.__module__.startswith(f"robust_spectral.{module}.")


@pytest.mark.parametrize("plugin, name", [(plugin, name) for plugin, names in PLUGINS.items() for name in names])
@pytest.mark.filterwarnings("default")
def test_a_name_of_a_plugin_is_importable_from_its_file(plugin: str, name: str) -> None:
    assert callable(getattr(importlib.import_module(f"robust_spectral.plugins.{plugin}"), name))


@pytest.mark.parametrize("name", [name for name in CORE if not name.startswith("__")])
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(rs, name))


@pytest.mark.parametrize(
    "call, arguments",
    [
        (rs.linear_operator, ["module", "in_shape"]),
        (rs.top_singular, ["A", "k", "solver", "right"]),
        (rs.spectral_norm, ["A", "failure_probability"]),
        (rs.spectral_norms, ["model", "example_input"]),
        (rs.clip_, ["module", "in_shape", "max_norm"]),
        (rs.FastClip, ["model", "example_input", "max_norm", "composites"]),
        (rs.lipschitz_bound, ["model", "example_input"]),
        (rs.lipschitz_estimate, ["model", "images"]),
        (rs.certified_radius, ["logits", "labels", "bound"]),
        (rs.Lanczos, ["rtol", "max_steps"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_public_function_keeps_the_order_of_its_arguments(call, arguments: list[str]) -> None:
    assert list(inspect.signature(call).parameters)[: len(arguments)] == arguments


def test_public_defaults_are_kept() -> None:
    default = {name: p.default for name, p in inspect.signature(rs.FastClip).parameters.items()}
    assert (default["max_norm"], default["composites"]) == (1.0, "auto")
    assert inspect.signature(rs.clip_).parameters["max_norm"].default == 1.0
    assert inspect.signature(rs.spectral_norm).parameters["failure_probability"].default == 1e-9
    assert (rs.Lanczos().rtol, rs.Lanczos().max_steps) == (1e-4, 500)


def test_results_have_their_public_attributes() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3)
    A = rs.linear_operator(model[0], (3,))
    t, n, b = rs.top_singular(A, 2), rs.spectral_norm(A), rs.lipschitz_bound(model, x)
    r, clipper = rs.clip_(nn.Linear(3, 2), (3,)), rs.FastClip(model, x)
    found = {
        A: ["in_shape", "out_shape", "dtype", "device", "matmat", "rmatmat", "H", "to_dense"],
        n: ["lower", "upper", "method", "failure_probability"],
        r: ["before", "after", "distortion", "steps"],
        b: ["value", "nodes", "reason", "failure_probability", "local"],
        clipper: ["attach", "step", "norms", "finish", "report", "layers", "state_dict", "load_state_dict"],
    }
    assert all(hasattr(owner, name) for owner, names in found.items() for name in names)
    assert all(hasattr(t, name) for name in ("values", "left", "right", "residuals", "steps", "converged"))
    assert isinstance(n.lower, float) and isinstance(n.upper, float) and isinstance(b.value, float)
    assert isinstance(r.distortion, float) and math.isfinite(b.value)


def test_a_row_of_the_clippers_report_has_the_keys_of_a_layer_in_report_json() -> None:
    rows = rs.FastClip(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3)).report()
    assert {"name", "kind", "lower", "upper", "target"} <= rows[0].keys()
