"""The Triton back end without a GPU: dispatch, tables, the PTX that decodes 4-bit weights, and the interpreted run."""

import contextlib
import subprocess
import sys
import threading
import unittest.mock
from pathlib import Path

import interpreter
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitq_kernels as vk
from vitq_kernels import backends, packing, tuning
from vitq_kernels.formats import LevelTable
from vitq_kernels.triton import host

HERE = Path(__file__).parent
OPS = ("quantize", "layer_norm_quantize", "qattention", "qattention_quantize")
OPS += ("qlinear", "qlinear_quantize", "qlinear_norm_quantize", "qlinear_weight_only")
pytestmark = pytest.mark.skipif(not host.INSTALLED, reason="triton is not installed")


def test_kernels_under_the_interpreter():
    """Every kernel test of the other back ends, and Triton's own; attention's: test_triton_attention.py."""
    files = ("test_quantize.py", "test_layer_norm_quantize.py", "test_qlinear.py", "test_float_stages.py")
    files += ("test_learning.py",)
    interpreter.run(*files, "interpreted_triton.py", "interpreted_triton_fixup.py", least=230)


@pytest.mark.skipif(host.INTERPRETED, reason="interpreted kernels run on the CPU")
def test_reasons():
    assert host.unavailable("cpu").startswith("runs on cuda tensors, not cpu (TRITON_INTERPRET=1")
    with vk.backend("triton"), pytest.raises(ValueError, match="triton: runs on cuda tensors, not cpu"):
        vk.quantize(torch.zeros(2, 8), vk.ActQuant())
    assert backends.status()["triton"] == host.unavailable("cuda")


def test_old_gpu_is_refused_with_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for capability, reason in ((75, "needs compute capability 8.0, Some GPU has 7.5"), (80, None)):
        gpu = host.Gpu(capability, "Some GPU", 1)
        monkeypatch.setattr(host, "_properties", lambda device, found=gpu: found)
        assert host._gpu_reason() == reason
        with host.assuming(gpu):
            assert host.unavailable("cuda") == reason


@pytest.mark.skipif(host.INTERPRETED, reason="interpreted kernels are called past the dispatcher")
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_dispatched_to_triton_on_a_gpu(op, monkeypatch):
    monkeypatch.setattr(host, "_gpu", [None])
    layout = "int4_k64x2" if op.startswith("qlinear") else None
    found = backends.resolve(op, "cuda", layout)
    assert found.name == "triton"
    assert found.fn is getattr(torch.ops.vitq, op).default  # what compile, export and graphs can see
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vitq::{op}", "CUDA")
    if layout:
        reason = "triton: reads weight layouts int4_k64x2, int8.*, not int4_n16k4"
        with vk.backend("triton"), pytest.raises(ValueError, match=reason):
            backends.resolve(op, "cuda", "int4_n16k4")


@pytest.mark.skipif(host.INTERPRETED, reason="interpreted kernels are not resolved on cuda")
def test_dispatch_is_traceable(monkeypatch):
    monkeypatch.setattr(host, "_gpu", [None])

    @torch.compile(fullgraph=True, backend="eager")
    def name(x):
        return x + len(backends.resolve("quantize", "cuda").name)

    assert name(torch.zeros(1)).item() == len("triton")


def test_wrappers_do_not_import_triton():
    """The package stays importable, and as quick to import, where nothing runs on a GPU."""
    code = "import sys, vitq_kernels; sys.exit('triton' in sys.modules or 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.permutations(range(4)),
    st.lists(st.sampled_from([slice(None), slice(1, None), slice(None, None, 2)]), min_size=4, max_size=4),
)
def test_rows_of_any_view(shape, order, cuts):
    x = torch.arange(4**4).reshape(4, 4, 4, 4).permute(*order)[tuple(cuts)]
    x = x[tuple(slice(0, size) for size in shape)]
    rows = host.rows_of(x)
    assert (rows.m, rows.k) == (x.shape[:-1].numel(), x.shape[-1])
    flat = rows.tensor.as_strided((rows.tensor.untyped_storage().nbytes() // 8,), (1,), 0)
    start = rows.tensor.storage_offset()
    want = x.reshape(rows.m, rows.k)
    for m in range(rows.m):
        outer, inner = divmod(m, rows.inner) if rows.inner is not None else (0, m)
        at = start + outer * (rows.outer_stride or 0) + inner * rows.row_stride
        assert [int(flat[at + k * rows.col_stride]) for k in range(rows.k)] == want[m].tolist()
    assert host.rows_of(x, contiguous_columns=True).col_stride == 1


def test_rows_are_not_copied_where_two_strides_describe_them():
    x = torch.zeros(3, 7, 16)
    for view in (x, x[:, 1:], x[::2], x[:, ::3, :5], x.transpose(0, 1)):
        assert host.rows_of(view).tensor.data_ptr() == view.data_ptr()


CPU = torch.device("cpu")


@pytest.fixture
def no_counters(monkeypatch):
    for name in ("_counters", "_reserve"):
        monkeypatch.setattr(host, name, {})
    monkeypatch.setattr(host, "_captured", [])


def test_counters_of_a_stream_are_shared(no_counters):
    first = host.counters(7, CPU)
    assert first.tolist() == [0] * 7
    assert host.counters(5, CPU).data_ptr() == first.data_ptr()
    many = host.counters(5000, CPU)
    assert many.tolist() == [0] * 5000
    assert host.counters(7, CPU).data_ptr() == many.data_ptr()


def test_counters_are_not_made_by_a_thread_that_prepares_a_graph(no_counters, monkeypatch):
    """Its allocations are the graph's: torch.compile refuses one that is left behind."""
    zeros, made_by = torch.zeros, []

    def recorded(n, dtype, device):
        made_by.append(threading.get_ident())
        return zeros(n, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", recorded)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", unittest.mock.MagicMock())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(host, "_capturing", lambda device: False)
    assert host.counters(7, torch.device("cuda", 0)).tolist() == [0] * 7
    assert len(made_by) == 2  # the stream's own, and the reserve
    assert threading.get_ident() not in made_by


def test_every_capture_has_counters_of_its_own(no_counters, monkeypatch):
    assert host._taken(4, CPU).tolist() == [0] * 4  # nothing ready yet: zeroed in the graph
    eager = host.counters(4, CPU)
    monkeypatch.setattr(host, "_RESERVE", 100)
    host._reserve.clear()
    host.counters(4, CPU)
    taken = [host._taken(30, CPU) for _ in range(4)]
    begins = [t.data_ptr() for t in taken]
    assert begins[1] - begins[0] == begins[2] - begins[1] == 30 * 4
    assert [t.data_ptr() for t in host._captured] == begins[:3]  # the fourth did not fit
    assert eager.data_ptr() not in begins
    assert all(not t.any() for t in taken)
    host.counters(4, CPU)
    assert host._reserve[CPU].numel() == 100  # a new one, and the old one stays alive for the graphs


def test_traced_counters_are_part_of_the_trace(no_counters):
    @torch.compile(fullgraph=True, backend="eager")
    def count(x):
        return x + host.counters(3, x.device)

    assert count(torch.ones(3)).tolist() == [1.0] * 3
    assert not host._counters


@pytest.mark.parametrize("path", tuning.files(), ids=lambda p: p.stem)
def test_tables_are_sound(path):
    tables = tuning.load(path.stem)
    for kind in tuning.KINDS:
        assert len({row[:2] for row in tables[kind]}) == len(tables[kind]) > 0
        for _, _, c in tables[kind]:
            assert all(v & (v - 1) == 0 for v in (c.block_m, c.block_n, c.block_k, c.num_warps))
            assert min(c.block_m, c.block_n) >= 16
            assert c.block_k >= 32
            assert c.swap in (0, 1)
            if kind.startswith("w4"):
                assert c.block_k == 128  # a run of the layout
    rows = tables["attention"]
    assert len({row[:2] for row in rows}) == len(rows) > 0
    for _, _, c in rows:
        assert all(v & (v - 1) == 0 for v in (c.block_m, c.block_n, c.num_warps))
        assert c.block_m >= 16
        assert c.block_n >= 32
    # How a row is summed up must not depend on head_dim, which focus_position does not know.
    assert len({(keys, c.block_n) for keys, _, c in rows}) == len({keys for keys, _, _ in rows})
    assert '"measured": false' in path.read_text() or not path.stem.startswith("sm_")


@pytest.mark.parametrize("path", tuning.files(), ids=lambda p: p.stem)
def test_tiles_that_hold_whole_rows_fit_shared_memory(path):
    from vitq_kernels.ops.qlinear.triton import _hold_groups

    capability = int(path.stem.split("_")[1]) if path.stem.startswith("sm_") else 90
    shared = host.Gpu(capability, "", 1).shared
    for kind in ("w8", "w4"):
        for _, _, config in tuning.load(path.stem)[kind]:
            for n in (64, 200, 256):
                held, _ = _hold_groups(config, n, 1, shared)
                buffers = (held.num_stages - 1) * (held.block_m + held.block_n) * held.block_k
                assert buffers <= shared, (kind, n, held)
                assert held.num_stages >= min(2, config.num_stages)


def test_nearest_row():
    def look(capability, m, n, name="NVIDIA Unknown", kind="w8"):
        return tuning.nearest(capability, name, kind, m, n)

    table = {row[:2]: row[2] for row in tuning.load("sm_90")["w8"]}
    assert look(90, 1, 768) == look(90, 16, 100) == table[16, 768]
    assert look(90, 197, 4096) == table[197, 3072]
    assert look(90, 10**6, 1) == table[6304, 768]
    assert look(100, 197, 768) == table[197, 768]  # the nearest capability below
    small = {row[:2]: row[2] for row in tuning.load("sm_86")["w8"]}
    assert look(89, 6304, 768) == look(120, 6304, 768) == small[6304, 768]
    assert tuning.slug("NVIDIA H200") == "nvidia_h200"


def test_pinned_configuration_wins():
    c = tuning.Config(16, 16, 32, 1, 0, 4, 1)
    with tuning.config(c):
        assert tuning.lookup(torch.device("cpu"), "w8", 1, 1) is c
        a = tuning.Attention(16, 32, 4, 1)
        with tuning.config(a):
            assert tuning.attention(torch.device("cpu"), 1, 1) is a
            assert tuning.lookup(torch.device("cpu"), "w8", 1, 1) is c
    assert tuning.lookup(torch.device("cpu"), "w8", 1, 1) is not c


def emulate(ptx: str, operands: dict[str, int]) -> tuple[int, int]:
    """Runs the four-byte integer instructions that the unpacking consists of; ($0, $1)."""
    registers = dict(operands)

    def value(name):
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else registers[name]

    def prmt(a, b, selector):
        source = (b << 32 | a).to_bytes(8, "little")
        picks = [(selector >> 4 * i) & 15 for i in range(4)]
        assert all(p < 8 for p in picks), "the sign-replicating mode is not meant here"
        return int.from_bytes(bytes(source[p] for p in picks), "little")

    compute = {
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "xor.b32": lambda a, b: a ^ b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: (a << b) % (1 << 32),
        "lop3.b32": lambda a, b, c, table: sum(
            (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)
        ),
        # The selector's upper half is ignored.
        "prmt.b32": lambda a, b, c: prmt(a, b, c & 0xFFFF),
    }
    for line in ptx.strip().strip("{}").strip().splitlines():
        opcode, _, rest = line.rstrip(";").partition(" ")
        if opcode == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        registers[target] = compute[opcode](*map(value, sources))
    return registers["$0"], registers["$1"]


def signed_bytes(word: int) -> list[int]:
    return [b - 256 if b > 127 else b for b in word.to_bytes(4, "little")]


@given(st.binary(min_size=4, max_size=4))
def test_ptx_unpacks_nibbles(data):
    from vitq_kernels.triton import device

    low, high = emulate(device.UNPACK.value, {"$2": int.from_bytes(data, "little")})
    assert signed_bytes(low) == [16 * ((b & 15) - 8) for b in data]
    assert signed_bytes(high) == [16 * ((b >> 4) - 8) for b in data]


@given(st.binary(min_size=4, max_size=4), st.lists(st.integers(-128, 127), min_size=16, max_size=16))
def test_ptx_decodes_a_table(data, table):
    from vitq_kernels.triton import device

    words = [int.from_bytes(bytes(v % 256 for v in table[i : i + 4]), "little") for i in range(0, 16, 4)]
    operands = {f"${3 + i}": words[i // 4] for i in range(16)}
    low, high = emulate(device.UNPACK_TABLE.value, {"$2": int.from_bytes(data, "little"), **operands})
    assert signed_bytes(low) == [table[b & 15] for b in data]
    assert signed_bytes(high) == [table[b >> 4] for b in data]


def test_emulation_finds_a_planted_bug():
    from vitq_kernels.triton import device

    right = [16 * code for code in (-5, -6, -7, -8, 4, 5, 6, 7)]
    for old, new in (("0x80808080", "0x80808081"), (", 4;", ", 3;"), ("0x6a", "0x6b")):
        wrong = device.UNPACK.value.replace(old, new)
        assert wrong != device.UNPACK.value
        low, high = emulate(wrong, {"$2": 0xF0E1D2C3})
        assert signed_bytes(low) + signed_bytes(high) != right
    low, high = emulate(device.UNPACK.value, {"$2": 0xF0E1D2C3})
    assert signed_bytes(low) + signed_bytes(high) == right


def test_short_tables_fill_the_sixteen_entries_that_the_kernel_reads():
    weight = packing.pack_weight(
        torch.tensor([[5, -3]], dtype=torch.int8), 1 + 1, "int4_k64x2", LevelTable((-3, 0, 1, 5))
    )
    assert weight.lut.shape == (16,)
