"""Token-wise bits: decisions against numpy, whole models against a float64 oracle, costs against a count by hand."""

import dataclasses
import json
import math

import minmax
import numpy as np
import pytest
import timm
import torch
import vitq
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from timm.models.swin_transformer import window_partition
from vitq import checkpoint
from vitq.allocation.costs import layers_of
from vitq.calibrate import calibrate
from vitq.convert import to_integer
from vitq.export import to_program
from vitq.jobs import average_bits
from vitq.models import adapter_for, state_data
from vitq.recipes import load_recipe, parse
from vitq.restore import to_simulated
from vitq.simulate import SimModel
from vitq.workdir import apply_snapshot, snapshot

from vitq_kernels import ActQuant, _native, backend
from vitq_kernels.formats import LevelTable, QuantSpec, TokenBits
from vitq_kernels.nn import QBlocks, Window, WindowMap
from vitq_kernels.nn.token_bits import RowBits, decide, received
from vitq_kernels.ops.qattention.ref import scattered

BACKENDS = ("ref",) if _native.unavailable("cpu") else ("ref", "cpu")
TOKEN = QuantSpec(8, granularity="per_token", dynamic=True)
HEADS = QuantSpec(8, granularity="per_head", dynamic=True)
TABLE = LevelTable((-120, -90, -60, -40, -30, -20, -10, -5, 0, 5, 10, 20, 35, 50, 70, 110))
MODELS = {
    "vit": lambda: minmax.vit(depth=3),
    "registers": lambda: minmax.vit(reg_tokens=2),
    "no-class-token": lambda: minmax.vit(class_token=False, global_pool="avg"),
    "inner-norms": lambda: minmax.vit(scale_attn_norm=True, scale_mlp_norm=True),
    "swin": minmax.swin,
}


def deciding(model, x, share=0.5, low=4, rank_by="attention", **options):
    """A state whose attentions all decide."""
    state = minmax.minmax_state(model, x, **({"act": TOKEN, "operands": HEADS} | options))
    return minmax.deciding(model, state, share=share, low=low, rank_by=rank_by)


# Decisions


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(0, 3), st.integers(1, 9), st.floats(0, 1))
def test_decisions_are_those_of_a_stable_sort(data, prefix, patches, share):
    values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=prefix + patches, max_size=prefix + patches)
    scores = np.array([data.draw(values) for _ in range(2)], np.float32)
    kept = math.floor(share * patches + 0.5)
    for rank_by, sign in (("attention", -1), ("inverted", 1)):
        bits = decide(TokenBits(share, 3, prefix, rank_by=rank_by), torch.from_numpy(scores))
        for row, high in zip(scores, bits.high.numpy()):
            best = np.argsort(sign * row[prefix:], kind="stable")[:kept]
            assert set(np.flatnonzero(high)) == set(range(prefix)) | set(best + prefix)
        assert bits.low == 3


def test_random_decisions_follow_no_order():
    """As many as asked for, each patch about as often, another choice for another seed, and the same again."""
    scores = torch.rand(2000, 17, generator=torch.Generator().manual_seed(0))
    first, second = (decide(TokenBits(0.5, 4, 1, rank_by="random", seed=s), scores).high for s in (0, 1))
    assert (first.sum(1) == 9).all()
    assert torch.equal(first, decide(TokenBits(0.5, 4, 1, rank_by="random", seed=0), scores).high)
    patches = scores[:, 1:]
    rank = patches.argsort(1).argsort(1).double()
    for high in (first[:, 1:], second[:, 1:]):
        # 2000 fair coins: five deviations are 0.056; the mean rank of 16000 of 0..15: five are 0.19.
        assert (high.double().mean(0) - 0.5).abs().max() < 0.056
        assert abs(rank[high].mean() - 7.5) < 0.19
    assert abs((first[:, 1:] & second[:, 1:]).double().mean() - 0.25) < 0.02


@pytest.mark.parametrize("class_token", [True, False])
def test_received_attention_by_hand(class_token):
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randint(-127, 128, (4, 3, 5, 8), generator=g, dtype=torch.int8) for _ in range(2))
    qs, ks = (torch.rand(4, 3, 5, generator=g) * 0.02 for _ in range(2))
    bias = torch.randn(3, 5, 5, generator=g)
    mask = torch.zeros(2, 5, 5)
    mask[1, :, 3] = -torch.inf
    got = received(q, k, qs, ks, 0.35, bias, mask, class_token)
    s = np.einsum("bhid,bhjd->bhij", q.double().numpy(), k.double().numpy()) * 0.35
    s = s * qs.double().numpy()[..., None] * ks.double().numpy()[..., None, :]
    p = softmax(s + bias.double().numpy() + np.tile(mask.double().numpy(), (2, 1, 1))[:, None], -1)
    want = p[:, :, 0].mean(1) if class_token else p.mean((1, 2))
    assert np.allclose(got.double().numpy(), want, atol=1e-6)
    assert (got[1::2, 3] == 0).all()


def test_row_ranges():
    bits = RowBits(torch.tensor([[True, False], [False, True]]), 3)
    assert bits.qmax(127).tolist() == [127, 3, 3, 127]
    assert bits.qmax(1).tolist() == [1, 1, 1, 1]  # a layer of 2 bits keeps them
    assert bits.quant(ActQuant(qmax=7, qmin=-7)).row_qmax.tolist() == [7, 3, 3, 7]
    for quant, found in (
        (ActQuant(scale=torch.ones(1)), "static scales"),
        (ActQuant(lut=TABLE.lut()), "a level table"),
    ):
        with pytest.raises(ValueError, match=f"quant has {found}, expected dynamic scales"):
            bits.quant(quant)


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_windows_are_timms(shift):
    window = Window((3, 4), shift, (7, 10))
    slots = WindowMap(window).token_of_slot
    grid = torch.rand(2, 7, 10, 1, generator=torch.Generator().manual_seed(2))
    rolled = grid.roll((-shift[0], -shift[1]), (1, 2))
    padded = torch.nn.functional.pad(rolled, (0, 0, 0, 2, 0, 2))
    parted = window_partition(padded, (3, 4)).reshape(2 * window.count, 12)
    high = RowBits(grid.reshape(2, 70) > 0.5, 4).in_windows(slots).high
    assert torch.equal(high.reshape(parted.shape), parted > 0.5)
    assert torch.equal(scattered(parted.unsqueeze(-1), slots, 70), grid.reshape(2, 70, 1))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"share": 1.5}, "share is 1.5"),
        ({"low": 9}, "low is 9, expected an int in"),
        ({"rank_by": "size"}, "rank_by is 'size'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_fields(fields, reason):
    with pytest.raises(ValueError, match=reason):
        TokenBits(**({"share": 0.5, "low": 4} | fields))


# Whole models


class Oracle:
    """A ViT's block in float64 from its states, with a code range per token."""

    def __init__(self, block, site, state):
        self.norms, self.attention = (block.norm1, block.norm2), state.sites[site.attention.path]
        self.mlp = [state.sites[linear.path] for linear in (site.mlp.fc1, site.mlp.fc2)]

    def quantized(self, x, qmax):
        scale = x.abs().amax(-1, keepdim=True) / qmax
        return torch.round(x / scale) * scale

    def linear(self, s, x, qmax):
        w = s.codes.double() * s.weight_scale.double()[:, None]
        return self.quantized(x, qmax) @ w.T + s.bias.double()

    def __call__(self, x, high):
        """[B, N, C] and what the block before decided, [B, N] bool, to the block's result and its own decision."""
        a, (b, n, c) = self.attention, x.shape
        own, coarse = torch.tensor(127.0).double(), 2.0 ** (a.token_bits.low - 1) - 1
        qmax = torch.where(high, own, coarse).unsqueeze(-1)
        norm = torch.nn.functional.layer_norm
        y = norm(x, (c,), self.norms[0].weight.double(), self.norms[0].bias.double(), self.norms[0].eps)
        q, k, v = self.linear(a.qkv, y, qmax).reshape(b, n, 3, a.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (self.quantized(p, qmax.unsqueeze(1)) for p in (q, k))
        scale = v.abs().amax(-1, keepdim=True) / 127
        top = scale.amax(-2, keepdim=True)
        v = torch.round(torch.round(v / scale) * scale / top) * top
        p = (q @ k.transpose(-1, -2) * a.softmax_scale).softmax(-1)
        scores = p[:, :, 0, 1:].mean(1)
        kept = scores.argsort(1, descending=True)[:, : a.token_bits.kept(n - 1)] + 1
        decided = torch.zeros(b, n, dtype=torch.bool).scatter(1, kept, True)
        decided[:, 0] = True
        qmax = torch.where(decided, own, coarse).unsqueeze(-1)
        u = p / p.amax(-1, keepdim=True)
        u = (torch.round(255 * u**0.5) / 255) ** 2
        u = torch.round(u * 255) / 255 * p.amax(-1, keepdim=True)
        x = x + self.linear(a.proj, (u @ v).transpose(1, 2).reshape(b, n, c), qmax)
        y = norm(x, (c,), self.norms[1].weight.double(), self.norms[1].bias.double(), self.norms[1].eps)
        hidden = torch.nn.functional.gelu(self.linear(self.mlp[0], y, qmax))
        return x + self.linear(self.mlp[1], hidden, qmax), decided


def agreement(model, integer, state, x) -> float:
    """Share of the tokens of all blocks on which the integer block agrees with the oracle, fed with its own inputs."""
    family, agree = adapter_for(model), []
    x = integer._pos_embed(integer.patch_embed(x))
    high = None
    for site in family.blocks():
        path = site.path
        oracle = Oracle(model.get_submodule(path), site, state)
        entering = torch.ones(x.shape[:2], dtype=torch.bool) if high is None else high
        want, decided = oracle(x.double(), entering)
        got, bits = integer.get_submodule(path).step(x, None if high is None else RowBits(high, 4))
        same = (got - want).abs().amax(-1) <= 2e-4 * want.abs().amax()
        agree.append(same & (bits.high == decided).all(1, keepdim=True))
        x, high = want.float(), decided
    return float(torch.stack(agree).float().mean())


def test_the_integer_model_is_the_oracle():
    """Codes beside a tie may differ: see test_convert.py. What decides or rules the wrong tokens is found."""
    model = MODELS["vit"]()
    x = minmax.images(model, 8)
    state = deciding(model, x)
    assert agreement(model, to_integer(model, state), state, x) > 0.9
    for wrong in ({"rank_by": "inverted"}, {"low": 5}, {"share": 0.6}):
        assert agreement(model, to_integer(model, deciding(model, x, **wrong)), state, x) < 0.6
    integer = to_integer(model, state)
    for block in integer.blocks:
        block.attn._split_at = lambda bits, y, operands, attn=block.attn: attn._split(operands(y), 3)
    assert agreement(model, integer, state, x) < 0.6, "Q and K that keep their bits"


def test_values_keep_their_bits():
    model = MODELS["vit"]()
    x = minmax.images(model, 2)
    attn = to_integer(model, deciding(model, x)).blocks[1].attn
    high = torch.arange(17).expand(2, 17) % 2 == 0
    y = torch.randn(2, 17, 96, generator=torch.Generator().manual_seed(3))
    (q, k, v), (q_scale, _, v_scale) = attn._split_at(RowBits(high, 4), y, attn.operands)
    for codes in (q, k):
        assert codes[:, :, 1::2].abs().amax() == 7
        assert (codes[:, :, ::2].abs().amax(-1) == 127).all()
    assert (v.abs().amax(-1) == 127).all()
    parts = y.reshape(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    assert torch.allclose(q_scale[:, :, 1::2], parts[0].abs().amax(-1)[:, :, 1::2] / 7)
    assert torch.allclose(v_scale, parts[2].abs().amax(-1) / 127)


@pytest.mark.parametrize("rank_by", ["attention", "inverted", "random"])
@pytest.mark.parametrize("name", MODELS)
def test_simulated_and_integer_logits_are_the_same_bits(name, rank_by):
    model = MODELS[name]()
    x = minmax.images(model)
    operands = HEADS if rank_by == "attention" else QuantSpec(8, dynamic=True)
    branch = {"rank": 4, "kind": "subspace"} if rank_by == "random" else {}
    state = deciding(model, x, rank_by=rank_by, operands=operands, **branch)
    for back_end in BACKENDS:
        with backend(back_end), torch.no_grad():
            integer, sim = to_integer(model, state), to_simulated(model, state)
            logits = integer(x)
            assert torch.equal(sim(x), logits)
            # Blocks that run by themselves leave nothing behind.
            for site in sim.family.blocks():
                entering = minmax.inputs_of(sim.model, [site.path], x[:2])[0][site.path]
                sim.model.get_submodule(site.path)(entering)
            assert torch.equal(sim(x), logits)
    assert not torch.equal(to_integer(model, dataclasses.replace(state, sites=undecided(state)))(x), logits)


def undecided(state):
    """The sites without decisions."""
    return {p: dataclasses.replace(s, token_bits=None) if hasattr(s, "qkv") else s for p, s in state.sites.items()}


def test_one_width_for_all_is_that_width():
    """low = 8 and share = 1 change nothing; share = 0 is a model of ``low`` bits but for what keeps its own."""
    model = MODELS["no-class-token"]()
    x = minmax.images(model)
    plain = minmax.minmax_state(model, x, act=TOKEN, operands=HEADS)
    logits = to_integer(model, plain)(x)
    for same in ({"share": 1.0}, {"low": 8}):
        assert torch.equal(to_integer(model, deciding(model, x, **same))(x), logits)
    coarse = dict(undecided(deciding(model, x)))
    act = QuantSpec(4, granularity="per_token", dynamic=True)
    for path, site in coarse.items():
        if hasattr(site, "qkv"):
            coarse[path] = dataclasses.replace(site, proj=dataclasses.replace(site.proj, act=act))
        elif ".mlp." in path:
            coarse[path] = dataclasses.replace(site, act=act)
    want = to_integer(model, dataclasses.replace(plain, sites=coarse))
    # The blocks one by one: nothing is handed on, and all but qkv, Q and K has 4 bits.
    got, y = to_integer(model, deciding(model, x, share=0.0)), torch.randn(2, 16, 32)
    for a, b in zip(got.blocks, want.blocks):
        assert torch.equal(a(y), b(y))


def test_only_deciding_models_hand_anything_on():
    model = MODELS["vit"]()
    x = minmax.images(model)
    assert type(to_integer(model, deciding(model, x)).blocks) is QBlocks
    assert type(to_integer(model, minmax.minmax_state(model, x)).blocks) is torch.nn.Sequential


@pytest.mark.parametrize("model", [minmax.vit(), minmax.swin(depths=(2,), num_heads=(2,))], ids=["vit", "swin"])
def test_is_one_program_for_any_batch(model):
    x = minmax.images(model, 3)
    integer = to_integer(model, deciding(model, x))
    program = to_program(integer, x.shape[1:])
    for batch in (x, x[:1]):
        assert torch.equal(program.module()(batch), integer(batch))


def test_gradients_pass_tokens_of_both_widths():
    model = MODELS["vit"]()
    x = minmax.images(model, 2).requires_grad_()
    sim = to_simulated(model, deciding(model, x.detach()))
    y = sim(x)
    assert minmax.sqnr(sim(x.detach()), y.detach()) > 30
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"act": QuantSpec(8, symmetric=False)}, r"rules 'blocks.0.attn.proj', whose codes are 8 bits static"),
        ({"operands": QuantSpec(8)}, r"rules 'blocks.1.attn', whose codes are 8 bits static"),
        (
            {"act": QuantSpec(4, granularity="per_token", dynamic=True, table=TABLE)},
            r"per_token table, expected dynamic",
        ),
    ],
)
def test_what_cannot_be_ruled_is_refused(change, reason):
    model = MODELS["vit"]()
    state = deciding(model, minmax.images(model), **change)
    for convert in (to_integer, to_simulated):
        with pytest.raises(ValueError, match=reason):
            convert(model, state)


def test_checkpoints_hold_decisions_and_are_unchanged_without(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **minmax.TINY | {"depth": 3})
    x = minmax.images(model)
    named = {"kwargs": minmax.TINY | {"depth": 3}, "data": state_data(model)}
    state = dataclasses.replace(deciding(model, x, rank_by="random"), architecture="vit_tiny_patch16_224", **named)
    vitq.save(tmp_path / "a", state)
    assert torch.equal(vitq.load(tmp_path / "a")(x), to_integer(model, state)(x))
    again, config = checkpoint.load_state(tmp_path / "a")
    assert {p: s.token_bits for p, s in again.sites.items() if hasattr(s, "qkv")} == {
        f"blocks.{i}.attn": TokenBits(0.5, 4, 1, True, "random") for i in range(3)
    }
    assert config.sites["blocks.0.attn"].token_bits.share == 0.5
    vitq.save(tmp_path / "b", dataclasses.replace(state, sites=undecided(state)))
    assert "token_bits" not in json.loads((tmp_path / "b" / "config.json").read_text())["sites"]["blocks.0.attn"]


# The method


def recipe(options=None, **fields):
    base = {"name": "test", "calibration": {"batch": 4}, "bits": {"weights": 6}, "initialise": ["scales"]}
    form = {"activations": "dynamic", "operands": "dynamic"}
    return parse(base | form | fields | {"allocate": [{"method": "patchwise", **(options or {})}]})


def calibrated(model, options=None, **fields):
    return calibrate(model, minmax.images(model, 8), recipe(options, **fields))


def test_costs_by_hand():
    """ViT of 1 + 16 tokens, width 32, 2 heads, MLP ratio 2, 2 blocks; 5 patches keep 8 bits, 11 get 3."""
    metrics = calibrated(minmax.vit(), {"shares": 0.3, "low": 3}).state.metrics["token_bits"]
    macs = 17 * 32 * 32
    mean = ((1 + 5) * 8 + 11 * 3) / 17
    linear = 6 * macs * (3 * 8 + 3 * mean + 2 * (1 + 2 + 2) * mean)
    scores = 17 * 17 * 32 * (64 + mean**2)
    floating = 1024 * (2 * 8 * macs + 2 * 17 * 17 * 32)
    assert metrics["bitops"] == pytest.approx((linear + scores) / floating, rel=1e-6)
    full = 6 * macs * 8 * 16 + 17 * 17 * 32 * 2 * 64
    assert metrics["bitops_undecided"] == pytest.approx(full / floating, rel=1e-9)
    assert metrics["blocks"] == {f"blocks.{i}.attn": {"share": 0.3, "low": 3} for i in range(2)}


def test_average_bits_count_those_of_the_patches():
    """Half of the patches at 4 instead of 8 bits, but for the first block's qkv and the layers outside blocks."""
    result = calibrated(minmax.vit(depth=2), {"shares": 0.5, "low": 4})
    ruled, own = 32 + 2 * (32 + 32 + 64), 32 + 48 + 32
    weights, activations = average_bits(result.sim)
    assert activations == pytest.approx((6 * ruled + 8 * own) / (ruled + own))
    assert 6 < weights < 7
    for attention in result.sim.attentions.values():
        attention.token_bits = None
    assert average_bits(result.sim) == (weights, 8)


def test_swin_costs_count_slots_and_tokens():
    """Nothing handed over the change of resolution; padded slots are low, tokens of proj are slots'."""
    model = minmax.swin(depths=(1, 1))
    metrics = calibrated(model, {"shares": 0.0, "low": 4}).state.metrics["token_bits"]
    sim = to_simulated(model, deciding(model, minmax.images(model)))
    inside = {path: 0 for path in sim.linears if ".blocks." in path}
    layers = layers_of(sim, minmax.images(model, 1), inside)
    fixed = sum(layer.bitops(6, 8) for path, layer in layers.items() if path.endswith("qkv"))
    ruled = sum(layer.bitops(6, 4) for path, layer in layers.items() if not path.endswith("qkv"))
    slots = {path: layer.rows for path, layer in layers.items() if path.endswith("qkv")}
    macs = sum(rows * 16 * width for rows, width in zip(slots.values(), (16, 32)))
    floating = sum(layer.float_bitops for layer in layers.values()) + macs * 1024
    assert metrics["bitops"] == pytest.approx((fixed + ruled + macs * 64) / floating, rel=1e-9)


@pytest.mark.parametrize("rank_by", ["attention", "random", "inverted", "uniform"])
def test_controls_cost_the_same(rank_by):
    model = minmax.vit(depth=3)
    options = {"shares": (0.25, 0.5, 0.75), "low": 4}
    wanted = calibrated(model, options).state.metrics["token_bits"]
    result = calibrated(model, options | {"rank_by": rank_by})
    got = result.state.metrics["token_bits"]
    assert got["bitops"] == wanted["bitops"]  # 4, 8 and 12 of 16 patches at 8 bits are 5, 6 and 7 bits on average
    decisions = [s.token_bits for s in result.state.sites.values() if hasattr(s, "qkv")]
    if rank_by == "uniform":
        assert [(d.share, d.low) for d in decisions] == [(0.0, 5), (0.0, 6), (0.0, 7)]
    else:
        assert [(d.share, d.low, d.rank_by) for d in decisions] == [(s, 4, rank_by) for s in options["shares"]]
    assert len({d.seed for d in decisions}) == 3
    x = minmax.images(model, 4, seed=5)
    with torch.no_grad():
        assert torch.equal(result.sim(x), to_integer(model, result.state)(x))


def test_uniform_bits_come_as_close_as_whole_bits_do():
    options = {"shares": 0.4, "low": 3}
    model = minmax.vit(depth=3)
    wanted, got = (
        calibrated(model, options | {"rank_by": r}).state.metrics["token_bits"] for r in ("attention", "uniform")
    )
    assert len({b["low"] for b in got["blocks"].values()}) > 1
    widths = [{path: b["low"] for path, b in got["blocks"].items()}]
    assert all(4 <= low <= 6 for low in widths[0].values())
    assert got["bitops"] == pytest.approx(wanted["bitops"], rel=0.03)


def test_snapshots_hold_decisions():
    model = minmax.vit()
    deciding_model, other = calibrated(model).sim, SimModel(adapter_for(model))
    for block in ("blocks.0", "blocks.1"):
        tensors, meta = snapshot(deciding_model.model.get_submodule(block))
        apply_snapshot(other.model.get_submodule(block), tensors, json.loads(json.dumps(meta)))
        found = other.attentions[f"{block}.attn"].token_bits
        assert found == deciding_model.attentions[f"{block}.attn"].token_bits
        assert found.share == 0.5


def test_a_budget_buys_the_best_shares():
    model = minmax.vit(depth=3)
    options = {"low": 3, "budget": {"bitops": 0.03}, "candidates": (0.0, 0.5, 1.0), "images": 8}
    record = calibrated(model, options).state.metrics["token_bits"]
    assert record["bitops"] <= 0.03 < record["bitops_undecided"]
    fitting = [p for p in record["points"] if p["bitops"] <= 0.03]
    best = min(fitting, key=lambda p: p["error"])
    assert [b["share"] for b in record["blocks"].values()] == best["shares"]
    assert record["bitops"] == pytest.approx(best["bitops"], rel=1e-9)
    assert len(record["points"]) > 3
    assert record["points"][-1]["error"] == 0.0  # all keep their bits
    with pytest.raises(ValueError, match=r"budget is bitops=0\.001, expected at least 0\.0"):
        calibrated(model, options | {"budget": {"bitops": 0.001}})
    assert load_recipe("pmq-patchwise").with_budget({"bitops": 0.04}).allocate[0].options.budget.bitops == 0.04


@pytest.mark.parametrize(
    ("options", "fields", "reason"),
    [
        ({}, {"activations": "static"}, "activations is 'static', expected 'dynamic' for allocate.patchwise"),
        ({}, {"operands": "static"}, "operands is 'static'"),
        ({}, {"activation_levels": "table"}, "activation_levels is 'table'"),
        ({"shares": (0.5, 0.5, 0.5)}, {}, "shares has 3 numbers, expected one for each of 2 attentions"),
    ],
)
def test_bad_recipes(options, fields, reason):
    with pytest.raises(ValueError, match=reason):
        calibrated(minmax.vit(), options, **fields)


@pytest.mark.parametrize(
    "step",
    [
        {"compensate": ["closed_form"]},
        {"compensate": ["erq"]},
        {"reconstruct": [{"method": "blocks", "iterations": 2}]},
        {"refine": ["bias_correction"]},
        {"refine": [{"method": "evolution", "passes": 1}]},
    ],
)
def test_what_runs_blocks_alone_is_refused(step):
    """No block before hands one its bits, so that the loss would be another model's."""
    with pytest.raises(ValueError, match=r"token_bits of 'blocks\.0\.attn' is set, expected none for 2\."):
        calibrated(minmax.vit(), **step)


def test_the_recipe_on_whole_models():
    for name in ("vit", "swin"):
        model = MODELS[name]()
        shipped = load_recipe("pmq-patchwise", calibration={"images": 8, "batch": 4})
        result = calibrate(model, minmax.images(model, 8), shipped)
        integer, x = to_integer(model, result.state), minmax.images(model, 5, seed=9)
        with torch.no_grad():
            assert torch.equal(result.sim(x), integer(x))
        assert "leaves 50% of the patches their bits, 4 to the others" in str(integer.vitq_report)
        assert sum(isinstance(m, QBlocks) for m in integer.modules()) == {"vit": 1, "swin": 2}[name]
