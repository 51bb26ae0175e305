"""The report: a well-formed page without references whose numbers are the state's, and figures that are the records."""

import base64
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from vitq import checkpoint, report
from vitq.allocation.plot import MARKS, draw_frontier, draw_packs
from vitq.calibrate import calibrate
from vitq.console import cell
from vitq.models import state_data
from vitq.recipes import parse

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
ALLOCATE = [
    {"method": "packs", "cap": 2, "precision": "optimal", "average": 5.3},
    {"method": "pareto", "budget": {"size": 0.5}, "bits": [3, 5, 8]},
]


def save(folder: Path, **fields) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(NAME, **KWARGS).eval()
    images = torch.randn(4, 3, 16, 16)
    recipe = parse({"name": "test", "summary": "1 < 2 & so on", "initialise": ["scales"], **fields})
    about = {"architecture": NAME, "kwargs": KWARGS, "data": state_data(model), "metrics": {"calibration_s": 2.5}}
    checkpoint.save(folder, calibrate(model, images, recipe, **about).state)
    return folder


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
    """Tables by the id of their section, attributes that refer to something, images; refuses what is not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.section, self.tables, self.references, self.texts = [], None, {}, [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "action", "data")]
        assert tag not in ("script", "link", "iframe")
        if tag == "section":
            self.section = attributes["id"]
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")
        if tag not in ("meta", "img"):
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
    text = report.render(allocated)
    page = Page(text)
    state, config = checkpoint.load_state(allocated)
    linears = state.linears()
    rows = page.rows("layers")
    assert [r["layer"] for r in rows[:3]] == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert {r["layer"] for r in rows} == set(linears)
    for row in rows:
        linear = linears[row["layer"]]
        assert row["size"] == f"{linear.codes.shape[0]} × {linear.codes.shape[1]}"
        assert (row["weights"], row["activations"]) == (str(linear.weight.bits), str(linear.act.bits))
        assert row["ranges"] == "static per tensor"
        assert row["branch"] == ("subspace, rank 16" if linear.lora.rank else "–")
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


def test_nothing_is_fetched_and_the_same_page_is_written_again(allocated):
    text = report.render(allocated)
    assert text == report.render(allocated)
    assert not re.search(r"@import|url\(|http", text)
    pictures = Page(text).references
    assert len(pictures) == 2
    for picture in pictures:
        head, data = picture.split(",")
        assert head == "data:image/svg+xml;base64"
        svg = ElementTree.fromstring(base64.b64decode(data))
        references = [v for e in svg.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert references
        assert all(r.startswith("#") for r in references)


def test_what_is_not_there_has_no_section(plain):
    page = Page(report.render(plain))
    assert set(page.tables) == {"layers", "attentions"}
    assert page.references == []
    assert page.rows("layers")[1]["ranges"] == "dynamic per token"
    site = checkpoint.load_state(plain)[0].sites["blocks.0.attn"]
    row = page.rows("attentions")[0]
    assert row["heads"] == str(site.heads)
    assert row["Q, K, V"] == str(site.operands.bits)
    assert row["probabilities"] == str(site.focus.bits)


def test_without_matplotlib_the_page_says_what_is_missing(allocated, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    text = report.render(allocated)
    assert text.count("needs matplotlib") == 2
    assert len(Page(text).rows("packs")) == 3


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


# Figures


def packs_record() -> list[dict]:
    block = lambda path, s: {"path": path, "loss": 0.0, "curvature": s, "sensitivity": 2 * s}  # noqa: E731
    return [
        {"blocks": [block("layers.0.blocks.0", 3.0)], "sensitivity": 6.0, "elements": 10, "bits": 6},
        {"blocks": [block("layers.0.blocks.1", s) for s in (1.0, 2.0)], "sensitivity": 3.0, "elements": 20, "bits": 4},
    ]


def spans(plot) -> list[tuple[float, float]]:
    """From where to where the bands go: those drawn behind the bars."""
    return [(p.get_x(), p.get_x() + p.get_width()) for p in plot.patches if p.get_zorder() == 0]


@pytest.mark.parametrize("stacked", [False, True])
def test_packs_are_drawn_as_they_are(stacked):
    figure = draw_packs(packs_record(), "title", stacked)
    for plot, factor in zip(figure.axes, (1, 2)):
        assert [p.get_height() for p in plot.patches if p.get_zorder()] == [3.0 * factor, 1.0 * factor, 2.0 * factor]
        assert spans(plot) == [(-0.5, 0.5), (0.5, 2.5)]
        assert [(t.get_text(), t.xy[0]) for t in plot.texts] == [("6 bits", 0.0), ("4 bits", 1.5)]
        assert [t.get_text() for t in plot.get_xticklabels()] == ["0.0", "0.1", "0.1"]
        assert plot.get_yscale() == "log"
    beside = figure.axes[0].get_position().x1 < figure.axes[1].get_position().x0
    assert beside is not stacked


def test_scores_of_zero_are_drawn():
    record = packs_record()
    record[0]["blocks"][0]["curvature"] = 0.0
    assert [plot.get_yscale() for plot in draw_packs(record).axes] == ["linear", "log"]


@pytest.mark.parametrize("count", [3, MARKS + 1])
def test_the_frontier_is_drawn_as_it_is(count):
    points = [{"error": 1 / (i + 1), "size": 0.1 + i, "latency": 9.0 - i, "chosen": "01"} for i in range(count)]
    record = {"budget": {"size": 1.5, "latency": 8.5}, "points": points, "picked": 1}
    record |= {"sensitivity": {"a": [2, 1], "b": [1, 0]}, "picked_bits": {"a": [4, 8], "b": [6, 5]}}
    size, latency, bits = draw_frontier(record).axes
    for plot, axis in ((size, "size"), (latency, "latency")):
        curve, picked, budget = plot.lines
        assert list(curve.get_xdata()) == [p[axis] for p in points]
        assert list(curve.get_ydata()) == [p["error"] for p in points]
        assert bool(curve.get_rasterized()) == (count > MARKS)
        assert (picked.get_xdata()[0], picked.get_ydata()[0]) == (points[1][axis], 0.5)
        assert budget.get_xdata()[0] == record["budget"][axis]
    assert [bar.get_width() for bar in bits.patches] == [4, 6, 8, 5]
    assert [t.get_text() for t in bits.get_yticklabels()] == ["a", "b"]
