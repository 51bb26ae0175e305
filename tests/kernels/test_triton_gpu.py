"""Two transformer blocks on a GPU under what deployment does to them: 16 bits, streams, graphs, export, warm-up.

Equal means equal bits, wherever the same shapes run: kernels are deterministic, and chosen from shapes alone.
"""

import copy
import threading

import pytest
import torch
from test_nn import DYNAMIC, gen, linear_state, norm_of
from torch import nn

from vitq_kernels import backends, graphs
from vitq_kernels.formats import AttentionState, FocusSpec, QuantSpec
from vitq_kernels.nn import QAttention, QBlock, QMlp
from vitq_kernels.triton import host, warmup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends.status()["triton"] is not None, reason=f"triton: {backends.status()['triton']}"),
    pytest.mark.skipif(host.INTERPRETED, reason="interpreted kernels run on the CPU"),
]

C, HEADS, TOKENS = 384, 6, 197
DTYPES = [torch.float16, torch.bfloat16]


def block(seed: int) -> QBlock:
    qkv = linear_state(3 * C, C, DYNAMIC, 4, rank=16, seed=seed)
    proj = linear_state(C, C, DYNAMIC, 4, rank=16, kind="subspace", seed=seed + 1)
    operands, focus = QuantSpec(8, granularity="per_head", dynamic=True), FocusSpec(8, power=2.0, anchor="row")
    attention = AttentionState(qkv, proj, HEADS, (C // HEADS) ** -0.5, operands, None, focus, None)
    fc1 = linear_state(4 * C, C, DYNAMIC, 4, rank=16, seed=seed + 2)
    fc2 = linear_state(C, 4 * C, DYNAMIC, 8, rank=16, seed=seed + 3)
    return QBlock(
        QAttention.from_state(attention, norm=norm_of(C), layer_scale=torch.full((C,), 0.1)),
        QMlp.from_states(fc1, fc2, norm=norm_of(C), layer_scale=torch.full((C,), 0.01)),
    )


class Pooled(nn.Module):
    """[B, N, C] to [B, C]: the head of a ViT without its classes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(block(0), block(7))

    def forward(self, x):
        return self.blocks(x).mean(1)


@pytest.fixture(scope="module")
def on_cpu() -> nn.Module:
    return Pooled().eval()


def images(b: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, TOKENS, C, generator=gen(seed)).to("cuda", dtype)


@pytest.fixture(params=DTYPES, ids=str)
def model(request, on_cpu) -> nn.Module:
    model = copy.deepcopy(on_cpu).to("cuda", request.param)
    model.dtype = request.param
    with torch.no_grad():
        yield model


def test_the_same_bits_in_every_call(model):
    x = images(3, model.dtype)
    want = model(x)
    assert want.isfinite().all()
    assert all(torch.equal(model(x), want) for _ in range(10))


def test_two_streams_at_once(model):
    """One module, other images on each stream; a workspace that both used would show."""
    inputs = [images(4, model.dtype, seed) for seed in (0, 1)]
    wanted = [model(x) for x in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in inputs], ([], [])
    for _ in range(20):
        for stream, x, into in zip(streams, inputs, results):
            with torch.cuda.stream(stream):
                into.append(model(x))
    torch.cuda.synchronize()
    for want, got in zip(wanted, results):
        assert all(torch.equal(y, want) for y in got)


def filled_up(model: nn.Module, x: torch.Tensor, size: int) -> torch.Tensor:
    """What a graph of ``size`` images gives for fewer."""
    return model(torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])]))[: len(x)]


def test_graphs_of_a_few_batch_sizes(model):
    served = graphs.capture(model, images(1, model.dtype), (4, 1))
    results = []
    for b in (1, 3, 4, 2, 1):
        x = images(b, model.dtype, seed=b)
        results.append((served(x), filled_up(model, x, 1 if b == 1 else 4)))
    x = images(6, model.dtype, seed=9)
    results.append((served(x), torch.cat([model(x[:4]), filled_up(model, x[4:], 4)])))
    assert all(torch.equal(got, want) for got, want in results)
    assert served(x[:0]).shape == (0, C)
    norm = model.blocks[0].mlp.fc1.norm
    norm.weight.mul_(1.5)  # in place: the graphs read it
    assert torch.equal(served(x[:4]), model(x[:4]))


def test_graphs_shared_by_threads_and_streams(model):
    served = graphs.capture(model, images(1, model.dtype), (2,))
    inputs = [images(2, model.dtype, seed) for seed in range(3)]
    wanted = [model(x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [served(inputs[i]) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        wrong.extend(i for y in results if not torch.equal(y, wanted[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiles_to_one_graph(model):
    x = images(3, model.dtype)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_exports_with_any_batch_size(model):
    program = torch.export.export(model, (images(2, model.dtype),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for b in (1, 5):
        assert torch.equal(program.module()(images(b, model.dtype)), model(images(b, model.dtype)))


@pytest.mark.slow
def test_packages_with_aoti(on_cpu, tmp_path):
    """Operators run through AOTInductor's proxy executor; the mean may be summed in another order."""
    dtype = torch.float16
    model = copy.deepcopy(on_cpu).to("cuda", dtype)
    with torch.no_grad():
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (images(2, dtype),), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        for b in (1, 5):
            want = model(images(b, dtype)).float()
            error = (packaged(images(b, dtype)).float() - want).abs()
            # One rounding to float16 of sums of 197 float32 values: half an ulp more each, of the larger terms.
            assert (error <= 2 * torch.finfo(dtype).eps * want.abs().clamp(min=1)).all()


def test_warmup_leaves_nothing_to_compile(on_cpu, tmp_path, monkeypatch):
    import triton

    dtype, shape = torch.float16, (3, TOKENS, C)
    launches = warmup.record(on_cpu, [shape], warmup.present(), dtype)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    keys = warmup.compile_launches(launches, warmup.present())
    hits = []

    def listener(*, cache_hit, **_):
        hits.append(cache_hit)

    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    for kernel in {launch.kernel for launch in launches}:
        kernel.device_caches.pop(torch.cuda.current_device(), None)
    with torch.no_grad():
        copy.deepcopy(on_cpu).to("cuda", dtype)(images(shape[0], dtype))
    torch.cuda.synchronize()
    assert hits == [True] * len(keys)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(on_cpu):
    dtype, x = torch.float16, images(2, torch.float16)
    with torch.no_grad():
        want = copy.deepcopy(on_cpu).to("cuda:0", dtype)(x.to("cuda:0"))
        model, x = copy.deepcopy(on_cpu).to("cuda:1", dtype), x.to("cuda:1")
        assert torch.cuda.current_device() == 0
        if host.gpu(torch.device("cuda:0")) == host.gpu(torch.device("cuda:1")):
            assert torch.equal(model(x).to("cuda:0"), want)
        assert torch.equal(graphs.capture(model, x, (2,))(x), model(x))
