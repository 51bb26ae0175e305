"""Batch buckets of CUDA graphs on the CPU, where a stand-in replays by running the model; capture itself is tested by
test_triton_gpu.py."""

import contextlib
import threading
import unittest.mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitq_kernels import graphs


class Model(nn.Module):
    """Image by image, and nothing but: what an image becomes does not depend on its neighbours."""

    def forward(self, x):
        return x.flatten(1).cumsum(1)[:, ::2] * 3 + 1


class Replayed:
    """Reads its input buffer and writes its output buffer, as a graph does."""

    def __init__(self, model, size, shape=(2, 3)):
        self.model, self.input = model, torch.full((size, *shape), float("nan"))
        self.output = model(self.input)
        self.seen = []

    def replay(self):
        self.seen.append(self.input.clone())
        self.output.copy_(self.model(self.input))


def graphed(sizes, in_order=contextlib.nullcontext):
    model = Model()
    replayed = [Replayed(model, size) for size in sizes]
    return graphs.GraphedModel(model, replayed, in_order), {r.input.shape[0]: r for r in replayed}


@given(st.sets(st.integers(1, 9), min_size=1, max_size=4), st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_any_request_in_a_few_sizes(sizes, requests):
    model, replayed = graphed(sizes)
    assert model.batch_sizes == tuple(sorted(sizes))
    results = []
    for i, b in enumerate(requests):
        x = torch.randn(b, 2, 3, generator=torch.Generator().manual_seed(i))
        results.append((model(x), Model()(x)))
    for got, want in results:  # at the end: no call wrote to what an earlier one returned
        assert torch.equal(got, want)
    largest = max(sizes)
    runs = [min(largest, b - start) for b in requests for start in range(0, max(b, 1), largest)]
    want = {size: sum(size == min(s for s in sizes if s >= run) for run in runs) for size in sizes}
    assert {size: len(r.seen) for size, r in replayed.items()} == want


def test_padding_is_zeros():
    model, replayed = graphed([4])
    model(torch.ones(4, 2, 3))
    model(torch.ones(1, 2, 3))
    assert replayed[4].seen[1][1:].abs().max() == 0, "nobody's images stay in the buffer"


def test_captured_in_inference_mode_and_called_outside(monkeypatch):
    """``capture`` with stand-ins for what only a GPU has."""
    model = Model().eval()
    monkeypatch.setattr(graphs, "Graph", lambda model, input, pool, stream: Made(model, input))
    monkeypatch.setattr(graphs, "_InOrder", lambda device: contextlib.nullcontext)
    monkeypatch.setattr(graphs, "_check", lambda *_: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", unittest.mock.MagicMock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)

    class Made(Replayed):
        def __init__(self, model, input):
            self.model, self.input, self.output, self.seen = model, input, model(input), []

    with torch.inference_mode():
        served = graphs.capture(model, torch.zeros(1, 2, 3), batch_sizes=(4,))
    x = torch.ones(2, 2, 3)
    assert torch.equal(served(x), model(x))


def test_results_that_share_a_buffer_would_be_found():
    """The planted bug: without the copy, the second request overwrites what the first one got."""
    replayed = Replayed(Model(), 2)
    x = torch.randn(2, 2, 2, 3)
    kept = []
    for part in x:
        replayed.input.copy_(part)
        replayed.replay()
        kept.append(replayed.output)
    assert not torch.equal(kept[0], Model()(x[0]))


def test_threads_take_turns():
    lock = threading.Lock()

    @contextlib.contextmanager
    def in_order():
        with lock:
            yield

    model, _ = graphed([1, 3, 4], in_order)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for b in (1, 2, 5, 3) * 20:
            x = torch.randn(b, 2, 3, generator=generator)
            if not torch.equal(model(x), Model()(x)):
                wrong.append(b)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_requests_that_do_not_fit():
    model, _ = graphed([2])
    with pytest.raises(TypeError, match=r"x is list, expected a torch\.Tensor"):
        model([1])
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64, expected torch\.float32, which was captured"):
        model(torch.zeros(1, 2, 3).double())
    for shape in ((1, 3, 3), (2, 3), (1, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"x has shape .*, expected \(any, 2, 3\)"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="x is on meta, expected cpu"):
        model(torch.zeros(1, 2, 3, device="meta"))


def test_models_that_cannot_be_captured():
    model, x = Model().eval(), torch.zeros(1, 2, 3)
    for sizes in ((), (0,), (1, -8), (1.5,), (True,), ("8", 1)):
        with pytest.raises(ValueError, match=r"batch_sizes is \[.*\], expected positive ints"):
            graphs.capture(model, x, sizes)
    with pytest.raises(TypeError, match="example is tuple, expected a torch"):
        graphs.capture(model, (x,))
    with pytest.raises(ValueError, match="example is on cpu, expected a CUDA device"):
        graphs.capture(model, x)
    with torch._subclasses.FakeTensorMode():
        on_gpu = torch.empty(1, 2, 3, device="cuda")
    with pytest.raises(ValueError, match=r"model is in training mode \(the model itself\), expected model\.eval"):
        graphs.capture(Model().train(), on_gpu)
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval()
    with pytest.raises(ValueError, match=r"model has 0\.weight on cpu, expected cuda:0 like the example"):
        graphs.capture(mixed, on_gpu)
    mixed[1].train()
    with pytest.raises(ValueError, match=r"model is in training mode \(1\)"):
        graphs.capture(mixed, on_gpu)


def test_outputs_that_are_no_batch():
    with pytest.raises(TypeError, match=r"model returns tuple, expected one torch\.Tensor"):
        graphs._check_output((torch.zeros(2),), 2)
    with pytest.raises(ValueError, match=r"model returns shape \(3, 4\) for 2 images, expected \(2, \.\.\.\)"):
        graphs._check_output(torch.zeros(3, 4), 2)
