"""Warm-up for GPUs that are not there: what is recorded, and that the cache's keys are those of a launch."""

from types import SimpleNamespace

import pytest
import torch
from test_nn import DYNAMIC, linear_state, norm_of
from torch import nn

from vitq_kernels import backends
from vitq_kernels.nn import QLinear, QMlp
from vitq_kernels.triton import host, warmup

pytestmark = pytest.mark.skipif(not host.INSTALLED or host.INTERPRETED, reason="needs triton, not interpreted")

H200, A100 = warmup.find_gpu("h200"), warmup.find_gpu("sm_80")


def mlp(bits: int = 4) -> nn.Module:
    fc1 = linear_state(64, 32, DYNAMIC, bits, rank=4)
    return QMlp.from_states(fc1, linear_state(32, 64, DYNAMIC, bits, rank=4), norm=norm_of(32))


def test_gpus_by_name():
    assert H200 == warmup.find_gpu("NVIDIA H200") == host.Gpu(90, "NVIDIA H200", 132)
    assert warmup.find_gpu("sm_90") == host.Gpu(90, "", 132)  # none of them: no measured table
    assert warmup.find_gpu("A100-SXM4-80GB").name == "NVIDIA A100-SXM4-80GB"
    for name, reason in {
        "h100": "fits several GPUs, expected one of NVIDIA H100 80GB HBM3, NVIDIA H100 PCIe",
        "sm_75": "expected one of sm_80, sm_86, sm_89, sm_90",
        "": "expected one of sm_80",
    }.items():
        with pytest.raises(ValueError, match=f"gpu is '{name}', .*{reason}"):
            warmup.find_gpu(name)


def test_records_what_the_target_would_launch():
    """Layouts, tiles and rows per program are those of the target; the model stays as it was."""
    model, x = mlp(), torch.randn(3, 7, 32)
    want, layout = model(x), model.fc1.layout
    launches = warmup.record(model, [(3, 7, 32), (100, 197, 32)], H200, torch.float16)
    assert torch.equal(model(x), want)
    assert model.fc1.layout == layout
    named = [dict(zip(launch.kernel.arg_names, launch.arguments, strict=True)) for launch in launches]
    assert [launch.kernel.__name__ for launch in launches[: len(launches) // 2]] == [
        launch.kernel.__name__ for launch in launches[len(launches) // 2 :]
    ]
    products = [a for launch, a in zip(launches, named) if launch.kernel.__name__ == "_product"]
    assert {a["weight"].dtype for a in products} == {torch.uint8}, "packed as the GPU reads it"
    assert {a["M"] for a in products} == {21, 19700}
    assert products[0]["BLOCK_M"] < products[-1]["BLOCK_M"], "the table of the GPU, not the interpreter's"
    assert all(a["x"].dtype == torch.float16 for a in named if a["x"].dtype.is_floating_point)


def test_choices_do_not_outlive_the_assumption():
    with warmup.without_device(H200):
        assert backends.resolve("qlinear", "cuda", "int4_k64x2").name == "triton"
        assert host.processors(torch.device("cuda")) == 132
        with host.assuming(A100):
            assert host.processors(torch.device("cuda")) == 108
    if not torch.cuda.is_available():
        assert backends.resolve("qlinear", "cuda", "int8").name == "ref"
    with (
        pytest.raises(ValueError, match=r"triton cannot serve: needs compute capability 8\.0, Old has 7\.5"),
        warmup.without_device(host.Gpu(75, "Old", 1)),
    ):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of Triton's and, per compilation in it, whether it was a hit."""
    import triton

    hits = []

    def listener(*, cache_hit, **_):
        hits.append(cache_hit)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    monkeypatch.setattr(warmup, "present", lambda: None)
    yield hits
    for kernel in {launch.kernel for launch in warmup.record(mlp(), [(1, 3, 32)], H200, torch.float16)}:
        kernel.device_caches.clear()  # what was compiled into a folder that is gone


class Gpu:
    """A driver whose launches do nothing: all of a launch up to the GPU's own part."""

    launches = 0

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        def launch(*arguments):
            self.launches += 1

        return launch

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": 1 << 18},
    )


def test_launches_find_what_was_compiled(cache, monkeypatch):
    """The launches themselves, on real tensors, hit the cache; those of another size or dtype do not."""
    from triton.runtime.driver import driver

    model, done = mlp(), []
    launches = warmup.record(model, [(1, 3, 32)], H200, torch.float16)
    keys = warmup.compile_launches(launches, H200, lambda i, n: done.append((i, n)))
    assert done == [(i + 1, len(launches)) for i in range(len(launches))]
    assert cache == [False] * len(keys)
    cache.clear()
    monkeypatch.setattr(driver, "_active", Gpu())

    def launch_on_real_tensors(recorded):
        for launch in recorded:
            launch.kernel.device_caches.pop(0, None)
        for launch in recorded:
            arguments = [
                torch.empty(a.shape, dtype=a.dtype) if isinstance(a, torch.Tensor) else a for a in launch.arguments
            ]
            launch.kernel[launch.grid](*arguments, **launch.options, enable_fp_fusion=False)

    launch_on_real_tensors(launches)
    assert cache == [True] * len(keys)
    assert driver.active.launches == len(launches)
    cache.clear()
    launch_on_real_tensors(warmup.record(model, [(1, 3, 32)], H200, torch.bfloat16)[:1])
    assert cache == [False], "a dtype that was not warmed up would pass unnoticed"


def test_weight_only_layers_are_recorded():
    layer = QLinear.from_state(linear_state(32, 48, None, 8, rank=3))
    (launch,) = warmup.record(layer, [(2, 48)], A100, torch.bfloat16)
    assert launch.arguments[0].dtype == torch.bfloat16
    assert launch.options["num_warps"] in (4, 8)
