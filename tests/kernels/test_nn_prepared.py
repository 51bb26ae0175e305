"""What a module prepares once is never stale: whoever changes the module, by whatever door, changes its result."""

import copy
import io
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vitq_kernels as vk
from vitq_kernels import backends
from vitq_kernels.formats import AttentionState, FocusSpec, LinearState, LowRankSpec, QuantSpec
from vitq_kernels.nn import QAttention, QBlock, QLinear, QMlp, Quantizer, prepack
from vitq_kernels.ops import _schema

STATIC = QuantSpec(8, symmetric=False)
DYNAMIC = QuantSpec(8, granularity="per_token", dynamic=True)


def state(n, k, act=STATIC, rank=0, seed=0) -> LinearState:
    g = torch.Generator().manual_seed(seed)
    static = act is not None and not act.dynamic
    return LinearState(
        codes=torch.randint(-7, 8, (n, k), generator=g, dtype=torch.int8),
        weight_scale=torch.rand(n, generator=g) * 0.02 + 0.01,
        weight=QuantSpec(4, granularity="per_channel"),
        bias=torch.randn(n, generator=g),
        act=act,
        act_scale=torch.tensor([0.03]) if static else None,
        act_zero_point=3 if static else 0,
        lora=LowRankSpec(rank),
        lora_down=(torch.randn(rank, k, generator=g) * 0.1).half() if rank else None,
        lora_up=(torch.randn(n, rank, generator=g) * 0.1).half() if rank else None,
    )


def norm(k, seed=5) -> nn.LayerNorm:
    layer = nn.LayerNorm(k).requires_grad_(False)
    layer.weight.copy_(1 + 0.2 * torch.randn(k, generator=torch.Generator().manual_seed(seed)))
    return layer


def attention_state(seed=0, act=STATIC) -> AttentionState:
    qkv, proj = state(48, 16, act, seed=seed), state(16, 16, DYNAMIC, rank=2, seed=seed + 1)
    operands = QuantSpec(8, granularity="per_head")
    focus = FocusSpec(8, power=2.0, anchor="row")
    return AttentionState(qkv, proj, 2, 0.35, operands, torch.linspace(0.03, 0.06, 6), focus)


def block(seed=0) -> QBlock:
    attn = QAttention.from_state(attention_state(seed), norm=norm(16))
    mlp = QMlp.from_states(state(24, 16, seed=seed), state(16, 24, DYNAMIC, seed=seed + 1), norm=norm(16))
    return QBlock(attn, mlp)


def sample(*shape, seed=3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def warm():
    """A layer that has run, its input, and the result."""
    layer, x = QLinear.from_state(state(24, 16), norm=norm(16)), sample(5, 16)
    return layer, x, layer(x)


def test_prepares_once(warm, monkeypatch):
    layer, x, want = warm
    monkeypatch.setattr(_schema, "expect", lambda *a, **k: pytest.fail("checked again"))
    assert torch.equal(layer(x), want)
    assert layer.prepared() is layer.prepared()


def test_what_was_in_a_call_is_checked_when_it_changes(warm):
    layer, x, want = warm
    assert torch.equal(layer(x[:2]), want[:2])
    for bad, error, message in (
        (x.int(), TypeError, "x has dtype torch.int32"),
        (x[:, :8], ValueError, "weight has shape"),
        (x.to("meta"), ValueError, "weight is on cpu, expected meta"),
        ([1.0], TypeError, "x is list, expected a torch.Tensor"),
    ):
        with pytest.raises(error, match=message):
            layer.encode(bad)
    coded = layer.encode(x)
    for bad, error, message in (
        (vk.QTensor(coded.q[:, :8], coded.scale), ValueError, r"x has shape \(5, 8\), expected \[..., 16\]"),
        (vk.QTensor(coded.q.float(), coded.scale), TypeError, "x.q has dtype torch.float32"),
        (vk.QTensor(coded.q, coded.scale.double()), TypeError, "x.scale has dtype torch.float64"),
        (vk.QTensor(coded.q, torch.ones(3)), ValueError, "x.scale has shape"),
        (vk.QTensor(coded.q.to("meta"), coded.scale), ValueError, "x is on meta, expected cpu"),
        (vk.QTensor([1], coded.scale), TypeError, "x.q is list"),
    ):
        with pytest.raises(error, match=message):
            layer(bad)
    with pytest.raises(ValueError, match=r"residual has shape \(5, 3\)"):
        layer(x, residual=torch.zeros(5, 3))
    with pytest.raises(ValueError, match="activation is 'relu'"):
        layer(x, activation="relu")
    assert torch.equal(layer(x), want), "a refused call leaves nothing behind"


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
def test_an_assigned_buffer_is_used(warm, name):
    layer, x, want = warm
    other = QLinear.from_state(state(24, 16, seed=9))
    setattr(layer, name, getattr(other, name))
    if name == "weight":
        layer.col_sum = other.col_sum
    got = layer(x)
    assert not torch.equal(got, want)
    assert torch.equal(got, copy.deepcopy(layer)(x))


def test_a_buffer_that_does_not_fit_is_refused(warm):
    layer, x, _ = warm
    layer.bias = torch.ones(3)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(24\)"):
        layer(x)
    layer.bias = torch.ones(24, device="meta")
    with pytest.raises(ValueError, match="bias is on meta, expected cpu"):
        layer(x)
    layer.bias = None
    layer(x)


def test_buffers_replaced_behind_the_module_are_used(warm):
    layer, x, want = warm
    bias = torch.zeros(24)
    got = torch.func.functional_call(layer, {"bias": bias}, (x,))
    assert torch.allclose(got, want - layer.bias, atol=1e-5)
    assert not torch.equal(got, want)
    assert torch.equal(layer(x), want), "and the layer has its own again"
    layer._buffers["bias"] = bias
    assert torch.equal(layer(x), got)
    layer._buffers.update(bias=None)
    assert torch.equal(layer(x), got)
    layer.register_buffer("bias", torch.ones(24))
    assert not torch.equal(layer(x), got)
    del layer.bias
    with pytest.raises(AttributeError, match="bias"):
        layer(x)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign):
    x, model, other = sample(2, 9, 16), block(), block(seed=4)
    assert not torch.equal(model(x), other(x))
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(model(x), other(x))


def test_the_state_of_other_parameters_is_refused():
    """Zero points, intervals and layouts are no tensors: what is calibrated under others must not be taken for ours."""
    ours, theirs = attention_state(), attention_state(seed=4)
    cases = {
        "zero_point=3, expected zero_point=5": replace(ours, qkv=replace(ours.qkv, act_zero_point=5)),
        "softmax_scale=0.35, expected softmax_scale=0.5": replace(ours, softmax_scale=0.5),
        "b2=1.0, .*expected .*b2=0.5": replace(ours, focus=replace(ours.focus, b2=0.5)),
    }
    for message, own in cases.items():
        layer = QAttention.from_state(own, norm=norm(16))
        scale = layer.qkv.input.scale.clone()
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(QAttention.from_state(theirs, norm=norm(16)).state_dict())
        assert torch.equal(layer.qkv.input.scale, scale)
    packed, flat = QLinear.from_state(state(8, 128)), QLinear.from_state(state(8, 128), backend="ref")
    if packed.layout != flat.layout:
        with pytest.raises(RuntimeError, match=f"layout={packed.layout}, expected layout={flat.layout}"):
            flat.load_state_dict(packed.state_dict())


def test_a_state_dict_is_tensors_only(tmp_path):
    x, model, other = sample(2, 9, 16), block(), block(seed=4)
    save_file(other.state_dict(), tmp_path / "block.safetensors")
    model.load_state_dict(load_file(tmp_path / "block.safetensors"))
    assert torch.equal(model(x), other(x))


def test_load_state_dict_by_swapping():
    x, model, other = sample(2, 9, 16), block(), block(seed=4)
    model(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(other.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(model(x), other(x))


def test_in_place_changes_show(warm):
    layer, x, want = warm
    layer.bias.add_(1)
    assert torch.allclose(layer(x), want + 1, atol=1e-5)
    layer.norm.weight.mul_(2)
    layer.norm.eps = 1.0
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    layer.norm.weight = nn.Parameter(torch.ones(16), requires_grad=False)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    layer.norm = None
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    before = layer(x)
    layer.input.qmax = 5
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_replaced_children_are_used():
    x, model, other = sample(2, 9, 16), block(), block(seed=4)
    model(x)
    for path in ("attn.qkv", "attn.proj.input", "attn.operands", "mlp.fc1", "mlp.fc2.input"):
        model.set_submodule(path, other.get_submodule(path))
        assert torch.equal(model(x), copy.deepcopy(model)(x)), path
    model.mlp._modules["fc2"] = other.mlp.fc2
    model.mlp.fc2.norm = norm(24)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_moving_there_and_back(warm):
    layer, x, want = warm
    meta = copy.deepcopy(layer).to("meta")
    with pytest.raises(ValueError, match="expected cpu"):
        meta(x)
    assert torch.equal(layer.to("cpu")(x), want)
    assert torch.equal(layer.half().float()(x), layer(x))
    filled = meta.to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(filled(x), layer(x))


def test_pins_are_read_in_every_call(monkeypatch):
    seen, original = [], backends.resolve

    def spy(*args, **kwargs):
        seen.append(original(*args, **kwargs).name)
        return original(*args, **kwargs)

    monkeypatch.setattr(backends, "resolve", spy)
    x, layer = sample(5, 16), QLinear.from_state(state(24, 16), norm=norm(16))
    best = "cpu" if backends.status()["cpu"] is None else "ref"

    def used(*, pin=None):
        seen.clear()
        with backends.backend(pin) if pin else torch.no_grad():
            layer(x)
        return set(seen)

    assert used() == {best}
    assert used(pin="ref") == {"ref"}
    assert used() == {best}
    layer.backend = "ref"
    assert used() == {"ref"}
    assert used(pin=best) == {"ref"}, "the module's own pin wins"
    layer.backend = None
    assert used() == {best}
    prepack(layer, "ref")
    assert used() == {"ref"}
    layer.backend = "triton"
    with pytest.raises(ValueError, match="no back end serves layer_norm_quantize on cpu: triton"):
        layer(x)


def test_copies_share_nothing(warm):
    layer, x, want = warm
    model, y = block(), sample(2, 9, 16)
    model(y)
    assert b"Prepared" not in pickle.dumps(model), "what is prepared is no part of a module's state"
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(y), model(y))
        before = model(y)
        twin.mlp.fc2.bias = twin.mlp.fc2.bias + 1
        twin.attn.proj._buffers["bias"] = twin.attn.proj.bias + 1
        assert not torch.equal(twin(y), before)
        assert torch.equal(model(y), before)
    shallow = copy.copy(layer)
    shallow.bias = layer.bias + 1
    assert torch.equal(layer(x), want)
    assert torch.allclose(shallow(x), want + 1, atol=1e-5)
    replica = layer._replicate_for_data_parallel()
    assert torch.equal(replica(x), want)
    replica._buffers["bias"] = layer.bias + 1
    assert torch.equal(layer(x), want)
    assert torch.allclose(replica(x), want + 1, atol=1e-5)


def test_modules_are_freed_without_the_garbage_collector():
    import gc
    import weakref

    model, x = block(), sample(2, 9, 16)
    model(x)
    gone = weakref.ref(model.attn.qkv)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_hooks_run():
    model, x, seen = block(), sample(2, 9, 16), []
    model(x)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, y, name=name: seen.append(name))
    model(x)
    assert seen == ["attn.proj", "attn", "mlp.fc1", "mlp.fc2", "mlp", ""]


def test_compile_and_export_see_the_buffers():
    model, x = block(), sample(2, 9, 16)
    want = model(x)  # has prepared before it is traced
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    model.mlp.fc2.bias = model.mlp.fc2.bias + 1
    assert not torch.equal(model(x), want)
    assert torch.equal(compiled(x), model(x))
    with backends.backend("ref"):
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert torch.equal(program.module()(x), model(x))
        assert not program.graph_signature.lifted_tensor_constants
        program.state_dict["mlp.fc2.bias"].add_(1)
        assert torch.allclose(program.module()(x), model(x), atol=1e-5)
    assert torch.equal(model(x), copy.deepcopy(model)(x)), "no traced tensor outlives its trace"


def test_concurrent_calls_of_all_shapes():
    """Threads that share a model, each with shapes, dtypes and a pin of its own, get what they get alone."""
    model = block()
    cases = [(sample(b, n, 16, seed=b), pin) for b, n, pin in ((1, 9, None), (3, 9, None), (2, 5, "ref"), (1, 7, None))]

    def run(x, pin):
        with backends.backend(pin) if pin else torch.no_grad():
            return model(x)

    want = [run(*case) for case in cases]
    fresh, wrong = block(), []
    model = fresh
    start = threading.Barrier(len(cases))

    def work(i):
        start.wait()
        for _ in range(60):
            if not torch.equal(run(*cases[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_pin_belongs_to_its_thread():
    seen = []
    with backends.backend("ref"):
        thread = threading.Thread(target=lambda: seen.append(backends.pinned()))
        thread.start()
        thread.join()
        assert backends.pinned() == "ref"
    assert seen == [backends._ENVIRONMENT or None]


def test_quantizer_takes_any_columns():
    quantizer = Quantizer(vk.ActQuant(scale=torch.tensor([0.1, 0.2]), groups=2))
    assert quantizer(sample(3, 8)).q.shape == (3, 8)
    assert quantizer(sample(3, 6)).q.shape == (3, 6)
    with pytest.raises(ValueError, match="groups is 2, expected a divisor of the 7 columns"):
        quantizer(sample(3, 7))
