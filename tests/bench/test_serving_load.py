"""The load bench on little: its clients, its arithmetic, its gates, and that it finds a planted wrong answer."""

import asyncio
from concurrent.futures import Future

import pytest
import torch
from vitq.serving.engine import Answer, Overloaded

pytest.importorskip("starlette", reason="needs the extra 'serve'")
from bench import serving, update_docs


class Engine:
    """Answers with the sum of an image, off by ``error``; full at every ``full``-th request."""

    def __init__(self, error: float = 0.0, full: int = 0) -> None:
        self.error, self.full, self.asked = error, full, 0

    def submit(self, images):
        self.asked += 1
        if self.full and self.asked % self.full == 0:
            raise Overloaded(1, 1, 0.1)
        future = Future()
        future.set_result(Answer(images.sum((1, 2, 3))[:, None] + self.error, 1, 1, 0.0, 0.0))
        return future


IMAGES = torch.randn(serving.IMAGES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
WANTED = torch.stack([image[None].sum((1, 2, 3)) for image in IMAGES])


def test_closed_load_counts_every_answer():
    engine = Engine()
    rate, times = asyncio.run(serving.closed(serving.ask_engine(engine, IMAGES, WANTED, True), 3, 0.1))
    assert len(times) == engine.asked > 3
    assert rate > 0


def test_paced_load_keeps_its_rate_and_counts_refusals():
    engine = Engine(full=4)
    refused, times = asyncio.run(serving.paced(serving.ask_engine(engine, IMAGES, WANTED, True), 400.0, 0.5))
    assert refused == engine.asked // 4
    assert len(times) + refused == engine.asked
    assert 120 < engine.asked < 280, "200 on average, by the same chance every time"
    assert min(times) >= 0


@pytest.mark.parametrize("load", [serving.closed, serving.paced])
def test_a_wrong_answer_ends_the_bench(load):
    with pytest.raises(AssertionError):
        asyncio.run(load(serving.ask_engine(Engine(error=1e-3), IMAGES, WANTED, True), 50, 0.3))


def test_percentages_and_kinds_reach_the_page():
    record = {
        "rows": [{"who": "engine", "model": "integer", "single": 1.0, "capacity": 2.0, "gain": 2.0, "p50": 3.0}],
        "overhead": [{"who": "engine", "ms": 1.0, "over_ms": 0.0}],
        "faults": {"requests": 10, "malformed": {"NaN": 2}, "wrong": [], "statuses": {"200": 8, "400": 2},
                   "resident_mb": [100.0, 101.0, 102.0]},
        "environment": {"cores": 2, "threads": 1}, "load_average": 0.25,
        "scaling": {"replicas": 2, "target": 3, "clients": 4, "seconds": 5.4, "answers": 6},
    }  # fmt: skip
    names = ("serving-load", "serving-scaling", "serving-overhead", "serving-faults")
    empty = "".join(f"<!-- table {n}: x -->\n<!-- end -->\n" for n in names)
    page = update_docs.serving_pages(empty, record)
    assert "the second replica answered after 5 s; 6 requests until then" in page
    assert "Ray was not installed" in update_docs.serving_pages(empty, record | {"scaling": None})
    assert "| engine | integer | 1.00 | 2.00 | 2.00 |" in page
    assert "10 requests, 2 of them malformed: 0 wrong answers or statuses; statuses 200: 8, 400: 2" in page
    assert "| NaN | 2 |" in page
    assert "load average of the minute before: 0.2, of what else ran" in page


@pytest.mark.slow
def test_faults_are_answered_as_they_have_to_be(tmp_path):
    """A short run against a real server, and one whose expectations are off."""
    from vitq import checkpoint, jobs
    from vitq.recipes import load_recipe
    from vitq.sources import ModelSource, load_float

    source = ModelSource(serving.NAME)
    floating, path = load_float(source), str(tmp_path / "model")
    checkpoint.save(path, jobs.quantize(floating, source, load_recipe("minmax-w8a8"), torch.randn(4, 3, 32, 32)).state)
    images = jobs.random_images({"float": floating}, serving.IMAGES)
    with torch.inference_mode():
        wanted = serving.by_one(checkpoint.load(path), images)
    record = asyncio.run(serving.faults(path, (images, wanted), 120, share=0.3))
    assert record["wrong"] == []
    assert sum(record["statuses"].values()) == 120
    assert record["statuses"]["200"] == 120 - sum(record["malformed"].values())
    assert len(record["resident_mb"]) == 11
    off = asyncio.run(serving.faults(path, (images, wanted + 1e-3), 20, share=0.0))
    assert off["wrong"], "a planted wrong expectation is seen"
