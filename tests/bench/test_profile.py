"""Profiles: operations and bytes counted by hand, every operator with its layer, ceilings that rank as they must."""

import json
import shutil

import pytest
import torch
from torch import nn
from vitq.bench import host, profile
from vitq.bench.host import Host
from vitq.cli import main
from vitq.models.digits_vit import NAME

import vitq_kernels as vk
from vitq_kernels.formats import FocusSpec, LinearState, LowRankSpec, QuantSpec
from vitq_kernels.nn import QLinear
from vitq_kernels.testing import cpu_isa, isas

M, K, N, R = 6, 32, 48, 16
FLAT = Host("x", 1, {"float32": 1e9, "int8": 2e9, "int4": 4e9}, {1 << 10: 8e9, 1 << 20: 1e9})


def linear_state(bits: int, rank: int = R) -> LinearState:
    side = {"lora_down": torch.zeros(rank, K).half(), "lora_up": torch.zeros(N, rank).half()} if rank else {}
    return LinearState(
        torch.ones(N, K, dtype=torch.int8),
        torch.ones(N),
        QuantSpec(bits, granularity="per_channel"),
        bias=torch.zeros(N),
        act=QuantSpec(8, granularity="per_token", dynamic=True),
        lora=LowRankSpec(rank),
        **side,
    )


def calls_of(model: nn.Module, x: torch.Tensor) -> list[profile.Call]:
    return profile.calls_of(model, x, 1, passes=2)[0]


@pytest.mark.parametrize(("bits", "operand"), [(8, "int8"), (4, "int4")])
def test_a_layer_is_counted_as_by_hand(bits, operand):
    with vk.backend("cpu" if isas() else "ref"):
        layer = QLinear.from_state(linear_state(bits))
        quantize, product = calls_of(nn.Sequential(layer), torch.randn(M, K))
    assert (quantize.op, product.op) == ("quantize", "qlinear")
    assert (quantize.layer, product.layer) == ("0", "0")
    assert quantize.operations == {"float32": 2 * M * K * R}
    assert product.operations == {operand: 2 * M * N * K, "float32": 2 * M * N * R}
    floats = layer.lora_up.element_size()
    # x, lora_down; codes, scales, t
    assert quantize.bytes == 4 * M * K + floats * R * K + M * K + 4 * M + 4 * M * R
    weight = layer.weight.numel() + 4 * N  # and its col_sum
    assert product.bytes == M * K + 4 * M + 4 * M * R + weight + 4 * N + 4 * N + floats * N * R + 4 * M * N
    assert len(quantize.samples) == 2


def test_float_operators_are_counted_and_views_are_not():
    model = nn.Sequential(nn.Linear(K, N), nn.Flatten(0), nn.Unflatten(0, (M, N)), nn.GELU())
    product, gelu = calls_of(model, torch.randn(M, K))
    assert (product.op, product.layer, product.operations) == ("addmm", "0", {"float32": 2 * M * N * K})
    assert product.bytes == 4 * (M * K + K * N + N + M * N)
    assert (gelu.op, gelu.layer, gelu.bytes, gelu.operations) == ("gelu", "3", 8 * M * N, {})


def test_attention_is_counted():
    q, k, v = (torch.ones(2, 3, 5, 8, dtype=torch.int8) for _ in range(3))
    scale = torch.ones(1)

    class Attention(nn.Module):
        def forward(self, x):
            return vk.qattention(q, k, v, scale, scale, scale, focus=FocusSpec())

    (call,) = [c for c in calls_of(Attention(), torch.zeros(1)) if c.op == "qattention"]
    assert call.operations == {"int8": 2 * 2 * (2 * 3 * 5 * 5 * 8)}


def test_passes_that_differ_are_refused():
    class Moody(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x + 1 if self.calls < 5 else x * 2

    with pytest.raises(RuntimeError, match="two passes of the model consist of different operators"):
        profile.calls_of(Moody(), torch.ones(2), 1, passes=3)


def test_the_floor_is_the_larger_of_memory_and_compute():
    call = lambda moved, **operations: profile.Call("op", "l", (), moved, operations, [2.0, 4.0, 3.0])  # noqa: E731
    # 0.8 kB fit the small set: 0.1 µs; 4 Gop of int4 and 1 of float32 take turns: 2 s.
    (row,) = profile.summary([call(800, int4=4e9, float32=1e9)], lambda c: c.op, FLAT)
    assert (row["floor_ms"], row["bound"], row["ms"]) == (2000.0, "compute", 3.0)
    # 4 MB fit no set: the bandwidth of the largest.
    (row,) = profile.summary([call(4_000_000)], lambda c: c.op, FLAT)
    assert (row["floor_ms"], row["bound"]) == (pytest.approx(4.0), "memory")
    assert row["of_floor"] == pytest.approx(4 / 3)
    both = profile.summary([call(800), call(4_000_000), call(8, int8=2e9)], lambda c: c.op, FLAT)
    assert both[0]["calls"] == 3
    assert both[0]["floor_ms"] == pytest.approx(1004.0, rel=1e-3)
    assert "floor_ms" not in profile.summary([call(800)], lambda c: c.op, None)[0]


@pytest.mark.skipif(shutil.which("cc") is None or len(isas()) < 2, reason="no C compiler, or no x86 kernels here")
def test_ceilings_are_finite_and_of_the_selected_instruction_set():
    for isa in set(isas()) - {"portable"}:
        with cpu_isa(isa):
            found = host.measure(1, seconds=0.005)
        assert found.isa == isa
        assert set(found.peak) == {"float32", "int8", "int4"}
        assert all(1e6 < rate < 1e15 for rate in (*found.peak.values(), *found.bandwidth.values()))
        assert tuple(found.bandwidth) == host.SETS
    with cpu_isa("portable"), pytest.raises(host.Unmeasured, match="instruction set portable"):
        host.measure(1)


def test_without_a_compiler_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(host.shutil, "which", lambda name: None)
    host._library.cache_clear()
    with pytest.raises(host.Unmeasured, match="no C compiler"):
        host._library()


def test_the_command_gives_a_profile_per_model(capsys):
    argv = ["bench", NAME, "--random-weights", "--recipe", "minmax-w4a4", "--batch", "1", "--seconds", "0.01"]
    assert main([*argv, "--profile", "--json"]) == 0
    profiles = json.loads(capsys.readouterr().out)["profiles"]
    assert set(profiles) == {"float32", "minmax-w4a4"}
    for found in profiles.values():
        assert sum(row["ms"] for row in found["layers"]) == pytest.approx(found["recorded_ms"])
        assert sum(row["share"] for row in found["ops"]) == pytest.approx(1)
    ops = {row["name"]: row["calls"] for row in profiles["minmax-w4a4"]["ops"]}
    assert ops["qattention_quantize"] == 6
    assert any(row["name"] == "blocks.0.mlp.fc1" for row in profiles["minmax-w4a4"]["layers"])
