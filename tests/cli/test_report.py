"""The report: a well-formed page without references, numbers that are the state's, pictures that are the records."""

import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from matplotlib.axes import Axes
from vitq import checkpoint, plots, report
from vitq.allocation.plot import draw_frontier, draw_packs
from vitq.calibrate import calibrate
from vitq.console import cell
from vitq.evaluate import sqnr_db
from vitq.models import state_data
from vitq.propagation import EDGES, propagation
from vitq.recipes import parse
from vitq.simulate import recording

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
ALLOCATE = [
    {"method": "packs", "cap": 2, "precision": "optimal", "average": 5.3},
    {"method": "pareto", "budget": {"size": 0.5}, "bits": [3, 5, 8]},
]


def calibrated(**fields):
    torch.manual_seed(0)
    model = timm.create_model(NAME, **KWARGS).eval()
    images = torch.randn(4, 3, 16, 16)
    recipe = parse({"name": "test", "summary": "1 < 2 & so on", "initialise": ["scales"], **fields})
    about = {"architecture": NAME, "kwargs": KWARGS, "data": state_data(model), "metrics": {"calibration_s": 2.5}}
    return model, images, calibrate(model, images, recipe, **about)


def save(folder: Path, **fields) -> Path:
    checkpoint.save(folder, calibrated(**fields)[2].state)
    return folder


def page_of(folder: Path) -> str:
    return report.render(report.collect(folder))


@pytest.fixture(scope="module")
def allocated(tmp_path_factory) -> Path:
    bits = {"weights": 4, "activations": 4, "operands": 4, "softmax": 4}
    branch = {"kind": "subspace", "rank": 16}
    closed = [{"method": "closed_form"}]
    folder = tmp_path_factory.mktemp("report") / "c"
    return save(folder, bits=bits, low_rank=branch, allocate=ALLOCATE, compensate=closed)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("report") / "c", activations="dynamic", weight_levels="table")


class Page(HTMLParser):
    """Tables by the id of their section, attributes that refer to something, pictures; refuses what is not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.section, self.tables, self.references, self.texts = [], None, {}, [], {}
        self.pictures = [ElementTree.fromstring(picture) for picture in re.findall(r"<svg .*?</svg>", text, re.S)]
        self.feed(re.sub(r"<svg .*?</svg>", "", text, flags=re.S))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "action", "data")]
        assert tag not in ("script", "link", "iframe", "img")
        if tag == "section":
            self.section = attributes["id"]
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[self.section][-1][-1] += data
        elif self.open and self.open[-1] in ("dt", "dd"):
            self.texts.setdefault(self.open[-1], []).append(data)

    @property
    def facts(self) -> dict[str, str]:
        return dict(zip(self.texts["dt"], self.texts["dd"]))

    def rows(self, section: str) -> list[dict[str, str]]:
        head, *rows = self.tables[section]
        return [dict(zip(head, row, strict=True)) for row in rows]


def test_numbers_are_the_states(allocated):
    text = page_of(allocated)
    page = Page(text)
    state, config = checkpoint.load_state(allocated)
    linears, errors = state.linears(), state.metrics["errors"]
    rows = page.rows("layers")
    assert [r["layer"] for r in rows[:3]] == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert {r["layer"] for r in rows} == set(linears)
    for row in rows:
        linear = linears[row["layer"]]
        assert (row["out"], row["in"]) == tuple(map(str, linear.codes.shape))
        assert (row["weights"], row["activations"]) == (str(linear.weight.bits), str(linear.act.bits))
        assert row["ranges"] == "static per tensor"
        assert (row["branch"], row["rank"]) == (("subspace", "16") if linear.lora.rank else ("–", "0"))
        measured = errors["layers"][row["layer"]]
        assert row["SQNR by itself, dB"] == cell(measured["own_db"])
        assert row["with all before it, dB"] == cell(measured["through_db"])
    assert [r["block"] for r in page.rows("errors")] == ["patch_embed.proj", *(f"blocks.{i}" for i in range(3)), "head"]
    packs = page.rows("packs")
    blocks = [(pack, block) for pack in state.metrics["packs"] for block in pack["blocks"]]
    assert len(packs) == len(blocks) == 3
    for row, (pack, block) in zip(packs, blocks):
        assert row["block"] == block["path"]
        assert row["pack"] == str(state.metrics["packs"].index(pack) + 1)
        assert (row["S"], row["Ω"]) == (cell(block["curvature"]), cell(block["sensitivity"]))
        assert (row["bits"], row["elements of the pack"]) == (str(pack["bits"]), str(pack["elements"]))
    frontier = state.metrics["frontier"]
    for row in page.rows("frontier"):
        omegas = frontier["sensitivity"][row["layer"]]
        assert [row[f"Ω at W{b}A{b}"] for b in (3, 5, 8)] == [cell(o) for o in omegas]
        assert row["picked"] == "W{}A{}".format(*frontier["picked_bits"][row["layer"]])
        assert row["picked"] == f"W{linears[row['layer']].weight.bits}A{linears[row['layer']].act.bits}"
    point = frontier["points"][frontier["picked"]]
    size = checkpoint.disk_bytes(allocated)
    assert page.facts["Σ Ω"] == cell(point["error"])
    assert page.facts["size"] == f"{cell(point['size'])} of float32, budget 0.5"
    assert page.facts["calibration s"] == "2.5"
    assert page.facts["recipe"] == "1 < 2 & so on"
    assert f"{size / 1e6:.2f} MB, {size / config.float_bytes:.1%} of the float model" in text
    assert sum(float(r["kB"]) for r in page.rows("bytes")) == pytest.approx(size / 1e3, rel=1e-3)
    branches = sum(p.nbytes for s in linears.values() for p in (s.lora_down, s.lora_up) if p is not None)
    assert report.collect(allocated)["bytes"]["low-rank branches"] == branches


def test_nothing_is_fetched_and_the_same_page_is_written_again(allocated):
    text = page_of(allocated)
    assert text == page_of(allocated)
    page = Page(text)
    assert page.references == []
    # layers, errors, an attention each, bytes, packs, frontier
    assert len(page.pictures) == 2 + 3 + 3
    assert not re.search(r"@import|http|(href=\"|url\()(?!#)", re.sub(r'xmlns(:xlink)?="[^"]*"', "", text))


def test_what_is_not_there_has_no_section(plain):
    page = Page(page_of(plain))
    assert set(page.tables) == {"errors", "layers", "attentions", "bytes"}
    assert page.rows("layers")[1]["ranges"] == "dynamic per token"
    site = checkpoint.load_state(plain)[0].sites["blocks.0.attn"]
    row = page.rows("attentions")[0]
    assert row["heads"] == str(site.heads)
    assert row["Q, K, V"] == str(site.operands.bits)
    assert row["probabilities"] == str(site.focus.bits)


def test_a_checkpoint_without_the_diagnosis_has_a_page(plain, tmp_path):
    state, _ = checkpoint.load_state(plain)
    state.metrics.pop("errors")
    checkpoint.save(tmp_path / "old", state)
    page = Page(page_of(tmp_path / "old"))
    assert set(page.tables) == {"layers", "attentions", "bytes"}
    assert page.rows("layers")[0]["SQNR by itself, dB"] == "–"


def test_an_evaluation_is_of_its_checkpoint(plain, allocated, tmp_path):
    run = dict.fromkeys((*report.ACCURACY, *report.LATENCY), 0.5) | {"split": "test"}
    folder = tmp_path / "c"
    checkpoint.save(folder, checkpoint.load_state(plain)[0])
    report.write_evaluation(folder, [run])
    assert Page(page_of(folder)).rows("accuracy")[0]["integer %"] == "0.5"
    checkpoint.save(folder, checkpoint.load_state(allocated)[0], overwrite=True)
    with pytest.raises(ValueError, match="is of another checkpoint"):
        report.collect(folder)
    for broken in ("[", "[]", '{"runs": [], "digest": ""}', '{"runs": [{"split": "test"}], "digest": ""}'):
        (folder / report.EVALUATION).write_text(broken)
        with pytest.raises(ValueError, match="cannot be read as an evaluation"):
            report.collect(folder)


# Error propagation


def test_errors_are_those_of_hooks_over_whole_models():
    model, images, done = calibrated(bits={"weights": 3, "activations": 8, "operands": 8, "softmax": 8})
    errors = done.state.metrics["errors"]
    paths, outputs = [row["path"] for row in errors["units"]], ({}, {})
    for net, kept in ((model, outputs[0]), (done.sim.model, outputs[1])):
        modules = {path: net.get_submodule(path) for path in paths}
        with torch.no_grad(), recording(modules, lambda path, _, y, kept=kept: kept.__setitem__(path, y.flatten(1))):
            net(images)
    for row in errors["units"]:
        expected = sqnr_db(*(kept[row["path"]].flatten() for kept in outputs))
        assert row["through_db"] == pytest.approx(expected, abs=0.02), row["path"]
    # The first layer sees what the float model sees.
    assert errors["units"][0]["own_db"] == errors["units"][0]["through_db"]
    assert all(row["own_db"] > row["through_db"] for row in errors["units"][2:])
    assert set(errors["layers"]) == set(done.sim.linears)


def test_a_layer_that_is_float_has_no_error_of_its_own():
    _, images, done = calibrated()
    twin = done.sim.twin()
    for linear in twin.linears.values():
        linear.quant.set(None)
        linear.act.set(None)
    same = propagation(twin, twin.twin(), images)
    assert all(row["own_db"] is row["through_db"] is None for row in same["units"])
    worse = twin.twin()
    worse.linears["blocks.1.mlp.fc2"].weight.data.mul_(1.1)
    changed = propagation(twin, worse, images)
    assert changed["layers"]["blocks.1.mlp.fc2"]["own_db"] is not None
    assert changed["layers"]["blocks.2.mlp.fc1"]["own_db"] is None
    assert changed["layers"]["blocks.2.mlp.fc1"]["through_db"] is not None
    assert changed["units"][1] == {"path": "blocks.0", "own_db": None, "through_db": None}


def test_histograms_hold_every_probability():
    _, images, done = calibrated(focus={"anchor": "row", "power": 2.0})
    reference = done.sim.twin()
    for linear in reference.linears.values():
        linear.quant.set(None)
        linear.act.set(None)
    for attention in reference.attentions.values():
        attention.operands.set(None)
        attention.focus = None
    softmax = propagation(reference, done.sim, images)["softmax"]["blocks.0.attn"]
    assert sum(softmax["count"]) == pytest.approx(1, abs=1e-4)
    assert sum(softmax["mass"]) == pytest.approx(1, abs=1e-4)
    # Relative to its row's largest, one of the 17 keys of every row lies in the last bin.
    assert softmax["count"][-1] >= 1 / 17 - 1e-6
    assert EDGES[0] == 2.0**-16
    assert EDGES[-1] == 1.0


def test_the_whole_frontier_comes_from_beside_the_checkpoint(tmp_path):
    point = {"error": 0.5, "size": 0.2, "chosen": "0"}
    whole = {"points": [point, {"error": 0.1, "size": 0.3, "chosen": "1"}], "picked": 0}
    whole |= {"sensitivity": {"a": [0.5, 0.1]}, "picked_bits": {"a": [4, 4]}}
    kept = whole | {"points": [point]}
    assert report.read_frontier(tmp_path, {"frontier": kept}) == kept
    file = tmp_path / "frontier.json"
    file.write_text(json.dumps(whole))
    assert report.read_frontier(tmp_path, {"frontier": kept}) == whole
    assert report.read_frontier(tmp_path, {}) is None
    file.write_text(json.dumps(whole | {"picked": 1}))
    with pytest.raises(ValueError, match="is of another checkpoint"):
        report.read_frontier(tmp_path, {"frontier": kept})
    for text in ("[", "[]", json.dumps(whole | {"picked": 2}), "{}"):
        file.write_text(text)
        with pytest.raises(ValueError, match="cannot be read as a frontier"):
            report.read_frontier(tmp_path, {"frontier": kept})


# Pictures


def packs_record() -> list[dict]:
    block = lambda path, s: {"path": path, "loss": 0.0, "curvature": s, "sensitivity": 2 * s}  # noqa: E731
    return [
        {"blocks": [block("layers.0.blocks.0", 3.0)], "sensitivity": 6.0, "elements": 10, "bits": 6},
        {"blocks": [block("layers.0.blocks.1", s) for s in (1.0, 2.0)], "sensitivity": 3.0, "elements": 20, "bits": 4},
    ]


def panels(picture: plots.Picture) -> list[Axes]:
    return picture.save(io.StringIO(), format="svg").axes


def data(axes: Axes, name: str) -> list[tuple[float, float]]:
    """The points of a series."""
    (line,) = (line for line in axes.lines if line.get_label() == name)
    return list(zip(*line.get_data()))


def test_packs_are_drawn_as_they_are():
    record = packs_record()
    curvature, sensitivity = panels(draw_packs(record, "title"))
    blocks = [block for pack in record for block in pack["blocks"]]
    for axes, key in ((curvature, "curvature"), (sensitivity, "sensitivity")):
        assert [y for _, y in data(axes, "_")] == [block[key] for block in blocks]
        assert axes.get_yscale() == "log"
        (first, second) = ((band.get_x(), band.get_x() + band.get_width()) for band in axes.patches)
        assert [first, second] == [(-0.5, 0.5), (0.5, 2.5)]
        assert [note.get_text() for note in axes.texts] == ["6 bits", "4 bits"]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.0", "0.1", "0.1"]
    assert ">title<" in draw_packs(record, "title").svg()


def test_scores_of_zero_are_drawn():
    record = packs_record()
    record[0]["blocks"][0]["curvature"] = 0.0
    assert panels(draw_packs(record))[0].get_yscale() == "linear"


def test_the_frontier_is_drawn_as_it_is():
    points = [{"error": 1 / (i + 1), "size": 0.1 + i, "latency": 9.0 - i, "chosen": "01"} for i in range(3)]
    record = {"budget": {"size": 1.5, "latency": 8.5}, "points": points, "picked": 1}
    record |= {"sensitivity": {"a": [2, 1], "b": [1, 0]}, "picked_bits": {"a": [4, 8], "b": [6, 5]}}
    size, latency, bits = panels(draw_frontier(record))
    for axes, axis in ((size, "size"), (latency, "latency")):
        assert sorted(data(axes, "frontier")) == sorted((p[axis], p["error"]) for p in points)
        assert data(axes, "picked") == [(points[1][axis], 0.5)]
        (budget,) = (line for line in axes.lines if line.get_linestyle() == "--")
        assert set(budget.get_xdata()) == {record["budget"][axis]}
    drawn = {bars.get_label(): [bar.get_width() for bar in bars] for bars in bits.containers}
    assert drawn == {"weight bits": [4, 6], "activation bits": [8, 5]}
    assert [tick.get_text() for tick in bits.get_yticklabels()] == ["a", "b"]


def test_thousands_of_points_stay_a_small_picture():
    points = [{"error": 1 / (i + 1), "size": 0.1 + i / 1e4, "chosen": ""} for i in range(20_000)]
    record = {
        "budget": {"size": 1.5},
        "points": points,
        "picked": 1,
        "sensitivity": {"a": [1]},
        "picked_bits": {"a": [4, 8]},
    }
    assert len(draw_frontier(record).svg()) < 300_000


def line(points: list[tuple[float, float]], log: bool = False) -> plots.Picture:
    return plots.plot([plots.Series("", points)], plots.Axis("x"), plots.Axis("y", log), "label")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.03, 0.04), (1.0, 900.0), (1e-9, 1e9), (5.0, 5.0)])
def test_axes_have_few_and_readable_ticks(log, low, high):
    (axes,) = panels(line([(0.0, low), (1.0, high)], log))
    bottom, top = axes.get_ylim()
    inside = [tick for tick in axes.yaxis.get_major_ticks() if bottom <= tick.get_loc() <= top]
    assert 1 <= len(inside) <= 12
    texts = [tick.label1.get_text() for tick in inside]
    assert all(0 < len(text) <= 7 for text in texts)
    assert len(set(texts)) == len(texts)


def test_what_an_axis_cannot_show_is_refused():
    with pytest.raises(ValueError, match="logarithmic axis 'y' go down to 0"):
        line([(0.0, 0.0), (1.0, 1.0)], log=True).svg()
    for values in ([math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="expected finite numbers"):
            line([(0.0, value) for value in values]).svg()


def test_text_in_a_picture_is_escaped_and_no_formula():
    picture = plots.bars({"<a&b>": [1.0], "$x$": [2.0]}, ["x"], 'la"bel')
    root = ElementTree.fromstring(picture.svg())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<a&b>", "$x$"} <= set(texts)
    assert root.get("aria-label") == 'la"bel'


def test_ids_of_pictures_on_a_page_differ():
    svgs = [plots.bars({"a": [1.0]}, ["x"], label).svg() for label in ("one", "two")]
    first, second = (set(re.findall(r'\bid="([^"]+)"', text)) for text in svgs)
    assert first
    assert not first & second
    for text, ids in zip(svgs, (first, second)):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= ids


def test_without_matplotlib_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'vitq-kernels\[report\]'"):
        plots.bars({"a": [1.0]}, ["x"], "label").svg()
