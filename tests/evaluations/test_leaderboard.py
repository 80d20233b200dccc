"""The leaderboard of small run folders: valid, invalid, old and hostile runs, and its pages in a browser."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from html import unescape
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from robust_spectral.evaluations.leaderboard.entries import completed
from robust_spectral.evaluations.leaderboard.scatter import SHAPES, markers
from robust_spectral.evaluations.leaderboard.site import build
from robust_spectral.evaluations.reporting.report import accuracy_rows
from robust_spectral.evaluations.run_folder import read_json, write_json
from robust_spectral.evaluations.wording import count, duration, portable, size

HOSTILE = "<script>alert('x')</script>$\\frac{\"&"
PASS = {"name": "certified <= worst case", "status": "pass", "detail": "holds at all 2 sizes"}
CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine; pages are not rendered")


def share(accuracy, n=200):
    return {"accuracy": accuracy, "n": n, "ci": [max(0.0, accuracy - 0.05), min(1.0, accuracy + 0.05)]}


def attacked(name, eps, accuracy, valid=True, reason=None):
    return {"attack": name, "norm": "l2", "eps": eps, **share(accuracy), "valid": valid, "reason": reason, "seconds": 1.5}


def report(worst=0.5, **changes):
    robust = [attacked(name, eps, max(worst + more - eps / 10, 0.0)) for eps in (0.5, 1.0)
              for name, more in (("pgd", 0.05), ("autoattack", 0.02), ("square", 0.08), ("worst case", 0.0))]  # fmt: skip
    layer = {"kind": "conv+bn", "lower": 0.99, "upper": 1.0, "target": 1.0, "before": 3.0}
    whole = {
        "model": "resnet18", "defence": "fastclip", "data": "digits", "seed": 0,
        "accuracy": {"clean": 0.9, "n": 200, "ci": [0.85, 0.93]}, "robust": robust,
        "certified": [{"norm": "l2", "eps": eps, **share(accuracy)} for eps, accuracy in ((0.1, 0.6), (0.5, 0.3), (1.0, 0.0))],
        "lipschitz": {"bound": 12.5, "bound_in_pixel_box": 12.5, "estimate": 2.5, "failure_probability": 1e-9, "reason": None,
                      "certified_dtype": "float64"},
        "layers": [{"name": name, **layer} for name in ("conv1", "conv2")], "gates": [PASS], "config": {"epochs": 3},
        "model_sha256": "ab" * 32, "data_sha256": "cd" * 32, "versions": {"torch": "2.10"},
        "hardware": {"machine": "x86_64", "device": "CPU"}, "training_seconds": 30.0, "attack_seconds": 60.0,
        "parameters": 11_173_962, "command": "robust-spectral finetune --model resnet18 --out /home/someone/runs/a",
    }  # fmt: skip
    return whole | changes


def old_report():
    """A report without validity, hashes, cost or command."""
    old = report(0.45, model="old_net")
    for key in ("data_sha256", "attack_seconds", "parameters", "command", "gates", "hardware"):
        del old[key]
    for entry in old["robust"]:
        del entry["valid"], entry["reason"], entry["seconds"]
    return old


def write_examples(folder):
    clean = np.full((2, 1, 4, 4), 0.5, dtype=np.float32)
    told = {"label": 3, "predicted": 8, "attack": "pgd", "norm": "l2", "eps": 0.5, "distance": 0.08}
    metadata = {"examples": json.dumps([{"sample": i, **told} for i in (7, 9)])}
    save_file({"clean": clean, "adversarial": clean + np.float32(0.02)}, folder / "examples.safetensors", metadata=metadata)


def write_runs(root):
    invalid = [attacked("autoattack", 0.5, 0.99, False, "gradients vanish"),
               attacked("worst case", 0.5, 0.99, False, "gradients vanish")]  # fmt: skip
    no_bound = {"bound": None, "bound_in_pixel_box": None, "estimate": 9.0, "failure_probability": 0.0, "reason": "softmax"}
    failed = {"name": "no attack inside a certified radius", "status": "fail", "detail": "1 of 400 attacks"}
    runs = {
        "good/clip": report(0.6), "good/worse": report(0.3, model="vit", lipschitz=no_bound), "old": old_report(),
        "invalid": report(robust=invalid, model="masked_net"), "broken": report(0.95, gates=[PASS, failed], model="broken_net"),
        "twins/plain": report(0.2, defence="none"), "twins/clipped": report(0.4, parameters=42),
        "hostile": report(0.1, model=HOSTILE, defence=HOSTILE, gates=[{**PASS, "detail": HOSTILE}],
                          layers=[{"name": HOSTILE, "kind": "dense", "upper": None}]),
    }  # fmt: skip
    for name, figures in runs.items():
        write_json(root / name / "report.json", figures)
        write_json(root / name / "run.json", {})
    nested = {name: runs[f"twins/{name}"] | {"model": "nested"} for name in ("plain", "clipped")}
    write_json(root / "twins" / "report.json", {"models": nested})
    write_json(root / "twins" / "run.json", {"twins": ["plain", "clipped"]})
    write_examples(root / "good" / "clip")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_runs(root)
    return root


@pytest.fixture(scope="module")
def site(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    build(runs, out)
    return out


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_at(site, eps):
    return [row for row in json.loads((site / "leaderboard.json").read_text()) if row["eps"] == eps]


def test_models_are_ranked_by_worst_case_and_invalid_ones_come_last_without_a_rank(site):
    ranks = [(row["run"], row["rank"]) for row in rows_at(site, 0.5)]
    assert ranks == [
        ("good/clip", 1), ("old", 2), ("twins/clipped", 3), ("good/worse", 4), ("twins/plain", 5), ("hostile", 6),
        ("broken", None), ("invalid", None),
    ]  # fmt: skip


def test_models_of_equal_accuracy_share_a_rank(tmp_path):
    for name, worst in (("a", 0.5), ("b", 0.5), ("c", 0.4)):
        write_json(tmp_path / "runs" / name / "report.json", report(worst))
    rows = build(tmp_path / "runs", tmp_path / "site")
    assert [row["rank"] for row in rows if row["eps"] == 0.5] == [1, 1, 3]


def test_models_not_attacked_by_autoattack_rank_below_those_attacked_by_it(tmp_path):
    def robust(name, worst):
        return [attacked(name, 0.5, worst), attacked("worst case", 0.5, worst)]

    for folder, name, worst in (("a", "noise", 0.9), ("b", "pgd", 0.8), ("c", "autoattack", 0.6)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "report.json").write_text(json.dumps(report() | {"robust": robust(name, worst)}))
    rows = build(tmp_path, tmp_path / "site")
    assert [(row["run"], row["rank"]) for row in rows] == [("c", 1), ("b", 2), ("a", 3)]
    assert "Not all models of this board were attacked by AutoAttack" in (tmp_path / "site" / "index.html").read_text()


def test_each_run_of_a_pair_is_a_row_and_their_parent_folder_is_not(site):
    assert sum(row["run"].startswith("twins") for row in rows_at(site, 0.5)) == 2
    assert not [row for row in rows_at(site, 0.5) if row["model"] == "nested"]


def test_a_pair_of_runs_without_folders_is_read_from_the_report_of_the_parent(tmp_path):
    models = {"plain": report(0.2), "../../clipped": report(0.4)}
    write_json(tmp_path / "runs" / "a" / "report.json", {"models": models})
    rows = build(tmp_path / "runs", tmp_path / "site")
    assert {row["run"] for row in rows} == {"a/plain", "a/clipped"}
    assert sorted(contents(tmp_path / "site" / "models")) == ["a-clipped.html", "a-plain.html"]


def test_the_board_shows_no_number_for_an_invalid_accuracy(site):
    index = (site / "index.html").read_text()
    row = re.search(r'<tr data-id="invalid".*?</tr>', index, re.S)[0]
    assert "99.0" not in row and row.count('<span class="invalid">invalid</span>') == 2 and 'title="gradients vanish"' in row
    assert re.search(r"<li id=[^>]*>masked_net \(invalid\), worst case, autoattack: gradients vanish\.</li>", index)
    assert "(it read 99.0 %)" in (site / "models" / "invalid.html").read_text()


def test_a_failed_check_makes_the_accuracies_that_it_checks_invalid(site):
    row = next(row for row in rows_at(site, 0.5) if row["run"] == "broken")
    assert not row["worst_case"]["valid"] and not row["certified"]["valid"]
    assert "1 of 400 attacks" in row["worst_case"]["reason"] and not row["attacks"]["pgd"]["valid"]
    masked = completed(report(gates=[{"name": "gradients are there", "status": "fail", "detail": "zero at 9 of 9 images"}]))
    assert not any(e["valid"] for e in masked["robust"]) and all(e["valid"] for e in masked["certified"])


def test_a_check_that_was_not_made_is_shown_as_not_tested_and_not_as_passed(tmp_path):
    skipped = {"name": "gradients are there", "status": "skip", "detail": "too few images to tell"}
    robust = [attacked(name, 0.5, 0.5, None, "not tested: too few images to tell") for name in ("pgd", "worst case")]
    write_json(tmp_path / "runs" / "a" / "report.json", report(gates=[PASS, skipped], robust=robust))
    (row,) = build(tmp_path / "runs", tmp_path / "site")
    assert row["rank"] == 1 and row["worst_case"]["valid"] is None
    index, page = ((tmp_path / "site" / name).read_text() for name in ("index.html", "models/a.html"))
    assert '<span class="skip">– not tested</span><small>1 of 2</small>' in index and "✓ pass</span><small>" not in index
    assert "worst case: not tested: too few images to tell.</li>" in index
    assert '<span class="skip">– not tested</span> gradients are there' in page
    models = {"model": read_json(tmp_path / "runs" / "a" / "report.json")}
    assert ("pgd · L2 0.5 · 200 images", ["50.0 (45–55), not tested"]) in accuracy_rows(models)


def test_an_accuracy_is_shown_with_its_number_of_images_and_interval(site):
    assert 'title="55.0 % of 200 images, 95 % interval 50–60 %"' in (site / "index.html").read_text()


def test_fields_missing_from_an_old_report_are_shown_as_unknown_or_not_recorded(site):
    page = (site / "models" / "old.html").read_text()
    assert "unknown parameters" in page and "The command was not recorded" in page and "No check was recorded" in page
    assert "old_net (old), worst case: whether the attacks were valid was not recorded" in (site / "index.html").read_text()


def test_the_page_of_a_model_has_its_hashes_and_command_and_no_machine_paths(site):
    page = (site / "models" / "good-clip.html").read_text()
    for part in ("--out …/a</pre>", "ab" * 32, "cd" * 32, "x86_64", "rank 1 of 8", "11.2 M parameters", "1.0 min", "✓ pass"):
        assert part in page
    assert "/home/" not in page


def test_adversarial_examples_are_shown_with_their_magnified_change(site):
    page = (site / "models" / "good-clip.html").read_text()
    assert "change × 20" in page and "predicted 8" in page and "L2 size 0.08 of 0.5 allowed" in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    values = [int(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).max()) for text in pictures]
    assert values == [128, 133, 229] * 2


def test_a_damaged_file_of_examples_is_reported_and_left_out_of_the_page(tmp_path):
    write_json(tmp_path / "runs" / "a" / "report.json", report())
    (tmp_path / "runs" / "a" / "examples.safetensors").write_bytes(b"cut short")
    told = []
    build(tmp_path / "runs", tmp_path / "site", told.append)
    assert len(told) == 1 and "not readable" in told[0]
    assert "Adversarial examples" not in (tmp_path / "site" / "models" / "a.html").read_text()


def test_html_in_names_is_escaped(site):
    for name, content in contents(site).items():
        if name.endswith(".html"):
            text = content.decode()
            assert "<script>alert" not in text and "alert('x')</script>" not in text, name
    assert HOSTILE in unescape((site / "models" / "hostile.html").read_text())


def test_building_again_gives_the_same_bytes_wherever_the_runs_are(site, tmp_path):
    write_runs(tmp_path / "elsewhere")
    build(tmp_path / "elsewhere", tmp_path / "site")
    assert contents(tmp_path / "site") == contents(site)
    build(tmp_path / "elsewhere", tmp_path / "site")
    assert contents(tmp_path / "site") == contents(site)


def test_pages_reference_only_files_of_the_site(site):
    for name, content in contents(site).items():
        if name.endswith(".html"):
            references = re.findall(r'(?:src|href)="([^"]*)"', content.decode())
            targets = [unescape(ref).split("#")[0] for ref in references if not ref.startswith(("data:", "#"))]
            assert all((site / name).parent.joinpath(target).is_file() for target in targets), name


def test_the_page_of_a_deleted_run_is_removed_and_no_other_file(site, tmp_path):
    for name in "ab":
        write_json(tmp_path / "runs" / name / "report.json", report())
    build(tmp_path / "runs", tmp_path / "site")
    (tmp_path / "site" / "models" / "mine.html").write_text("mine")
    shutil.rmtree(tmp_path / "runs" / "b")
    build(tmp_path / "runs", tmp_path / "site")
    assert sorted(contents(tmp_path / "site" / "models")) == ["a.html", "mine.html"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not readable as JSON"),
        ("[]", "not a report"),
        ('"text"', "not a report"),
        ("{}", "not evaluated"),
        (None, "not evaluated"),
        (json.dumps(report(robust=[])), "not evaluated"),
        (json.dumps(report(robust=[attacked("pgd", 0.5, 1.5)])), "not a share"),
        (json.dumps(report(robust=["pgd"])), "not a report"),
        (json.dumps(report(robust=[attacked("pgd", 0.5, 0.5, valid="maybe")])), "neither true nor false"),
        (json.dumps(report(lipschitz={"bound": "12"})), "not a number"),
        (json.dumps({"models": [1]}), "not a report"),
        (json.dumps({"models": {"plain": None}}), "not a report"),
    ],
)
def test_an_unreadable_run_is_left_out_and_reported(text, message, tmp_path):
    write_json(tmp_path / "good" / "report.json", report())
    write_json(tmp_path / "bad" / "run.json", {})
    if text is not None:
        (tmp_path / "bad" / "report.json").write_text(text)
    told = []
    rows = build(tmp_path, tmp_path / "site", told.append)
    assert {row["run"] for row in rows} == {"good"}
    assert len(told) == 1 and "bad" in told[0] and "left out" in told[0] and message in told[0]


def test_an_interrupted_training_is_reported_and_another_programs_config_is_ignored(tmp_path):
    write_json(tmp_path / "good" / "report.json", report())
    write_json(tmp_path / "cut" / "config.json", {"model": "resnet18", "data": "digits"})
    write_json(tmp_path / "hub" / "config.json", {"architecture": "resnet18"})
    told = []
    build(tmp_path, tmp_path / "site", told.append)
    assert len(told) == 1 and told[0].startswith(f"{tmp_path / 'cut'}: left out: the training was interrupted")


def test_the_chart_names_both_axes_and_the_page_explains_certificates(site):
    page = (site / "index.html").read_text()
    assert ">Worst-case accuracy</text>" in page and ">Lipschitz bound (logarithmic)</text>" in page
    assert "for the forward pass in the dtype" in page and "rounded down" in page


def test_a_report_that_is_not_text_is_left_out_and_reported(tmp_path):
    write_json(tmp_path / "good" / "report.json", report())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_bytes(b"\xff\xfe\x00")
    told = []
    build(tmp_path, tmp_path / "site", told.append)
    assert len(told) == 1 and "bad" in told[0]


def test_a_folder_without_runs_is_an_error_with_advice(tmp_path):
    with pytest.raises(ValueError, match="robust-spectral evaluate"):
        build(tmp_path, tmp_path / "site")
    with pytest.raises(ValueError, match="no such folder"):
        build(tmp_path / "nowhere", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_names_that_differ_only_in_case_or_punctuation_have_separate_pages(tmp_path):
    for name in ("a-b", "a_b", "A b", "…"):
        write_json(tmp_path / "runs" / name / "report.json", report())
    build(tmp_path / "runs", tmp_path / "site")
    pages = [path.name for path in (tmp_path / "site" / "models").iterdir()]
    assert len({page.lower() for page in pages}) == 4 and "model.html" in pages


def test_a_board_of_models_tested_on_different_images_says_so(tmp_path):
    for name in "ab":
        write_json(tmp_path / "runs" / name / "report.json", report(data_sha256=name * 64))
    build(tmp_path / "runs", tmp_path / "site")
    assert "not all tested on the same images" in (tmp_path / "site" / "index.html").read_text()


def test_an_infinite_bound_has_its_own_column_and_an_unknown_one_is_not_drawn(tmp_path):
    bounds = {"proved": {"bound": 100.0}, "endless": {"bound": None, "reason": "softmax"}, "unknown": {},
              "boxed": {"bound": None, "bound_in_pixel_box": 10.0}}  # fmt: skip
    for name, found in bounds.items():
        write_json(tmp_path / "runs" / name / "report.json", report(lipschitz=found))
    build(tmp_path / "runs", tmp_path / "site")
    board = re.search(r'<section class="board".*?</section>', (tmp_path / "site" / "index.html").read_text(), re.S)[0]
    marks = dict(re.findall(r'<a href="models/(\w+).html" data-id.*?translate\(([\d.]+) ', board))
    assert float(marks["boxed"]) < float(marks["proved"]) < float(marks["endless"]) and "unknown" not in marks
    assert ">∞</text>" in board and "1 without a valid accuracy or a known bound is not drawn" in board


def test_markers_use_every_shape_before_they_repeat_one_in_another_colour():
    shown = markers([f"defence{i}" for i in range(2 * len(SHAPES))])
    assert len({shape for shape, _ in shown.values()}) == len(SHAPES) and len(set(shown.values())) == 2 * len(SHAPES)


def test_an_infinite_bound_and_a_missing_one_are_distinguished():
    assert completed(report(lipschitz={"bound": None}))["lipschitz"]["bound"] == math.inf
    assert completed(report(lipschitz={}))["lipschitz"]["bound"] is None


def test_numbers_are_written_in_suitable_units():
    assert [duration(s) for s in (None, 5, 90, 7200)] == ["unknown", "5.0 s", "1.5 min", "2.0 h"]
    assert [count(n) for n in (None, 42, 1500, 11_173_962)] == ["unknown", "42", "1.5 k", "11.2 M"]
    assert [size(8 / 255, "linf"), size(0.0313, "linf"), size(0.5, "l2")] == ["8/255", "0.0313", "0.5"]


def test_absolute_paths_are_shortened_and_other_slashes_kept():
    assert portable("--data folder:/home/a/cifar --out='/x/y z'") == "--data folder:…/cifar --out='…/y z'"
    kept = "runs/a 8/255 https://example.org/a and / or hfds/mnist"
    assert portable(kept) == kept


# In a browser


FRAME = """<!doctype html><iframe src="{}" width="{}" height="800" style="border: 0"></iframe><script>
addEventListener("message", (event) => {{ document.getElementById("result").append(event.data); }});
</script><pre id="result"></pre>"""


def browse(page: Path, folder: Path, script: str, *, width: int | None = None, dark: bool = False) -> str:
    """The HTML of a page after a script has run in it, with nothing printed to the console.

    A window cannot be as narrow as a telephone, but a frame can: if a width is given, the page is loaded in a frame, and the
    HTML is that of the page around the frame.
    """
    copy, opened = page.with_name(f"{page.stem}-tested.html"), folder / "frame.html"
    copy.write_text(page.read_text() + f"<script>{script}</script>")
    opened.write_text(FRAME.format(copy.as_uri(), width))
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=3000 --enable-logging=stderr --dump-dom"
    )
    look = [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--window-size=1300,900", (copy if width is None else opened).as_uri()]  # fmt: skip
    try:
        done = subprocess.run([CHROMIUM, *options.split(), *look], capture_output=True, text=True, timeout=60)
    finally:
        copy.unlink()
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


def result(dom):
    return json.loads(unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)[1]))


TELL = """
function tell(value) {
  if (parent !== window) return parent.postMessage(JSON.stringify(value), "*");
  const place = document.createElement("pre");
  place.id = "result";
  place.textContent = JSON.stringify(value);
  document.body.append(place);
}
const board = () => [...document.querySelectorAll("section.board")].filter((one) => !one.hidden);
const runs = () => [...board()[0].querySelectorAll("tbody tr")].filter((row) => !row.hidden).map((row) => row.dataset.id);
const head = (name) => [...board()[0].querySelectorAll("thead th")].find((one) => one.textContent.startsWith(name));
const press = (name) => { head(name).querySelector("button").click(); return [head(name).getAttribute("aria-sort"), runs()]; };
const set = (id, value, kind) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event(kind, { bubbles: true }));
};
"""


@in_browser
def test_boards_can_be_sorted_filtered_and_chosen(site, tmp_path):
    script = """
    const told = { boards: board().length, ranked: runs() };
    told.bound = [press("Lipschitz bound"), press("Lipschitz bound")];
    told.worst = press("Worst case");
    told.model = press("Model");
    set("filter", "TWINS", "input");
    told.text = runs();
    told.points = [...board()[0].querySelectorAll("svg.scatter a:not([hidden])")].map((one) => one.dataset.id).sort();
    set("defence", "none", "change");
    told.both = runs();
    told.status = document.getElementById("status").textContent;
    document.querySelector("button[type=reset]").click();
    told.cleared = runs().length;
    set("level", document.getElementById("level").options[1].value, "change");
    told.level = [board().length, board()[0].id, location.hash, runs()[0]];
    tell(told);
    """
    told = result(browse(site / "index.html", tmp_path, TELL + script))
    ranked = ["good-clip", "old", "twins-clipped", "good-worse", "twins-plain", "hostile", "broken", "invalid"]
    assert told["boards"] == 1 and told["ranked"] == ranked
    rising, falling = ([run for run in runs if run != "broken"] for _, runs in told["bound"])  # broken has no valid bound
    assert [order for order, _ in told["bound"]] == ["ascending", "descending"]
    assert rising[-1] == falling[0] == "good-worse"
    assert told["worst"] == ["descending", ranked]
    assert told["model"][1][:2] == ["hostile", "broken"]
    assert sorted(told["text"]) == told["points"] == ["twins-clipped", "twins-plain"] and told["both"] == ["twins-plain"]
    assert told["status"] == "1 of 8 models shown, sorted by model, ascending." and told["cleared"] == 8
    assert told["level"] == [1, "digits-l2-1", "#digits-l2-1", "hostile"]


@in_browser
@pytest.mark.parametrize("width, wider", [(1450, False), (360, True)])
def test_a_table_wider_than_the_window_shows_a_hint(width, wider, site, tmp_path):
    script = """
    const table = board()[0].querySelector(".scroll"), hint = board()[0].querySelector(".hint");
    table.focus();
    tell([!hint.hidden, table.scrollWidth > table.clientWidth, document.activeElement === table]);
    """
    assert result(browse(site / "index.html", tmp_path, TELL + script, width=width)) == [wider, wider, True]


@in_browser
def test_a_link_of_the_board_opens_the_page_of_its_model(site, tmp_path):
    dom = browse(site / "index.html", tmp_path, 'document.querySelector("tbody th a").click();')
    assert "<h1>resnet18</h1>" in dom and "rank 1 of 8" in dom


@in_browser
@pytest.mark.parametrize("page", ["index.html", "models/good-clip.html"])
@pytest.mark.parametrize("width, dark", [(1200, False), (360, True)])
def test_a_page_has_no_accessibility_violation_and_fits_its_window(page, width, dark, site, tmp_path):
    axe = files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    script = """
    document.querySelectorAll("details").forEach((one) => { one.open = true; });
    const { scrollWidth, clientWidth } = document.documentElement, wide = [innerWidth, scrollWidth - clientWidth];
    axe.run().then(({ violations, passes }) => tell({ wide, passes: passes.length, violations:
      violations.map((one) => [one.id, one.nodes.map((node) => node.html.slice(0, 200) + node.failureSummary)]) }));
    """
    told = result(browse(site / page, tmp_path, f"{axe}</script><script>{TELL}{script}", width=width, dark=dark))
    assert told["violations"] == [] and told["passes"] > 10
    assert told["wide"] == [width, 0]
