"""The report in a real browser, as a phone and as a screen show it. Skipped, visibly, where there is no browser."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from vitq import checkpoint, report
from vitq.calibrate import calibrate
from vitq.console import cell
from vitq.models import state_data
from vitq.recipes import parse

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on the PATH (one of {', '.join(NAMES)})")

# The page in a frame of the given width, and what the browser made of it as text that --dump-dom prints. The policy
# holds in the frame, too: whatever it would fetch is an error on the console.
FRAME = """<!DOCTYPE html><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline'">
<iframe width="WIDTH" height="800" srcdoc="PAGE"></iframe><pre></pre>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const boxes = [...page.querySelectorAll("svg")].map(picture => {
    const outer = picture.getBoundingClientRect();
    const inner = [...picture.querySelectorAll("text, path, use")].filter(x => !x.closest("defs, [clip-path]"))
      .map(x => [x, x.getBoundingClientRect()]);
    const outside = inner.filter(([x, r]) => r.left < outer.left - 1 || r.right > outer.right + 1 ||
      r.top < outer.top - 1 || r.bottom > outer.bottom + 1).map(([x, r]) => x.outerHTML);
    const heights = [...picture.querySelectorAll("text")].map(x => x.getBoundingClientRect().height);
    return {label: picture.getAttribute("aria-label"), width: outer.width, height: outer.height, outside,
      text: Math.min(...heights, 99)};
  });
  const tables = {};
  for (const section of page.querySelectorAll("section"))
    tables[section.id] = [...section.querySelectorAll("tr")].map(row => [...row.cells].map(c => c.innerText));
  document.querySelector("pre").textContent = JSON.stringify({scroll: root.scrollWidth, client: root.clientWidth, boxes,
    tables});
};
</script>"""


def shown(page: str, width: int, folder: Path) -> tuple[dict, list[str]]:
    """What the browser made of the page, and what it wrote to the console."""
    file = folder / "frame.html"
    file.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(page)), encoding="utf-8")
    flags = ["--headless", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=300, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)
    assert record, done.stdout[-2000:]
    return json.loads(html.unescape(record.group(1))), re.findall(r"CONSOLE.*", done.stderr)


def faults(record: dict, console: list[str]) -> list[str]:
    """What is wrong with a page as shown."""
    found = list(console)
    if record["scroll"] > record["client"]:
        found.append(f"{record['scroll']} pixels on {record['client']}")
    for box in record["boxes"]:
        found += [f"{box['label']}: outside: {x}" for x in box["outside"]]
        if min(box["width"], box["height"]) < 50 or box["text"] < 8:
            found.append(f"{box['label']} is {box['width']} by {box['height']}, its text {box['text']} high")
    return found


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    """Of a model with everything that a page can show: packs, a frontier, branches, an evaluation."""
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 5, "num_heads": 2, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", **small).eval()
    allocate = [
        {"method": "packs", "cap": 2, "precision": "optimal", "average": 5.3},
        {"method": "pareto", "budget": {"size": 0.5}, "bits": [3, 5, 8]},
    ]
    recipe = parse(
        {"name": "a-recipe-of-a-long-name-" * 3, "summary": "All of it. " * 20, "initialise": ["scales"],
         "bits": dict.fromkeys(("weights", "activations", "operands", "softmax"), 4),
         "low_rank": {"kind": "subspace", "rank": 16}, "allocate": allocate, "compensate": [{"method": "closed_form"}]}
    )  # fmt: skip
    about = {"architecture": "vit_tiny_patch16_224", "kwargs": small, "data": state_data(model)}
    folder = tmp_path_factory.mktemp("browser") / "c"
    checkpoint.save(folder, calibrate(model, torch.randn(4, 3, 16, 16), recipe, **about).state)
    values = {key: 0.5 + i for i, key in enumerate((*report.ACCURACY, *report.LATENCY))}
    report.write_evaluation(folder, [{**values, "split": split} for split in ("test", "hard")])
    return report.collect(folder)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_readable_and_its_figures_are_the_json(figures, width, tmp_path):
    record, console = shown(report.render(figures), width, tmp_path)
    assert not faults(record, console)
    # layers, errors, an attention per block, bytes, packs, frontier
    assert len(record["boxes"]) == 2 + 5 + 3
    tables = record["tables"]
    assert set(tables) == {"accuracy", "errors", "layers", "attentions", "bytes", "packs", "frontier"}
    assert tables["accuracy"][1:] == [[cell(v) for v in row.values()] for row in figures["accuracy"]]
    assert tables["bytes"][1:] == [[part, cell(n / 1e3)] for part, n in figures["bytes"].items()]
    assert tables["layers"][1:] == [[cell(v) for v in row.values()] for row in figures["layers"]]
    assert tables["errors"][1:] == [[cell(v) for v in row.values()] for row in figures["errors"]["units"]]
    scalars = [[cell(v) for k, v in row.items() if k != "levels"] for row in figures["attentions"]]
    assert tables["attentions"][1:] == scalars
    omegas = [[cell(o) for o in row] for row in figures["frontier"]["sensitivity"].values()]
    assert [row[2:] for row in tables["frontier"][1:]] == omegas
    assert len(tables["packs"]) == 1 + 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ('<p style="width: 500px">wide</p>', "pixels on"),
        ('<svg viewBox="0 0 9 9" width="99" height="99"><rect width="-3" height="1"/></svg>', "CONSOLE"),
        ('<svg viewBox="0 0 9 9" width="99" height="99"><text x="8" y="5">out of it</text></svg>', "outside"),
        ('<script>console.error("said")</script>', "said"),
        ('<img src="no-such-picture.png">', "no-such-picture.png"),
    ],
)
def test_a_planted_fault_is_found(planted, fault, tmp_path):
    page = f"<!DOCTYPE html><body>{planted}</body>"
    assert fault in " ".join(faults(*shown(page, 360, tmp_path)))
