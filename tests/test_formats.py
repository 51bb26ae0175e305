"""Every format: what it derives, and one test for every input that it refuses, with its message."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitq_kernels.formats import (
    ActQuant,
    AttentionState,
    FocusSpec,
    LevelTable,
    LinearState,
    LowRankSpec,
    PackedWeight,
    QuantSpec,
)

level_tables = st.integers(1, 8).flatmap(
    lambda bits: st.lists(st.integers(-128, 127), min_size=1 << bits, max_size=1 << bits, unique=True).map(sorted)
)


def linear(n=6, k=4, **kw):
    act = kw.pop("act", QuantSpec())
    scale = kw.pop("act_scale", None if act is None or act.dynamic else torch.ones(1))
    return LinearState(torch.zeros(n, k, dtype=torch.int8), torch.ones(n), QuantSpec(4), act=act, act_scale=scale, **kw)


def attention(**kw):
    args = {
        "qkv": linear(12),
        "proj": linear(4),
        "heads": 2,
        "softmax_scale": 0.5,
        "operands": QuantSpec(granularity="per_head"),
        "operand_scale": torch.ones(6),
        "focus": FocusSpec(),
    }
    return AttentionState(**(args | kw))


BAD = {
    "levels_count": (lambda: LevelTable((0, 1, 2)), ValueError, "levels has 3 entries, expected a power of two"),
    "levels_one": (lambda: LevelTable((0,)), ValueError, "levels has 1 entries"),
    "levels_order": (lambda: LevelTable((1, 1)), ValueError, "expected strictly increasing ints"),
    "levels_range": (lambda: LevelTable((0, 128)), ValueError, "levels spans [0, 128], expected a subset"),
    "levels_float": (lambda: LevelTable((0.5, 1.7)), TypeError, "levels has 0.5 (float), expected ints"),
    "bits_low": (lambda: QuantSpec(1), ValueError, "bits is 1, expected an int in [2, 8]"),
    "bits_high": (lambda: QuantSpec(9), ValueError, "bits is 9"),
    "bits_float": (lambda: QuantSpec(4.0), TypeError, "bits is 4.0 (float)"),
    "bits_bool": (lambda: QuantSpec(True), TypeError, "bits is True (bool)"),
    "granularity": (lambda: QuantSpec(granularity="row"), ValueError, "granularity is 'row', expected one of"),
    "scale_rule": (lambda: QuantSpec(scale_rule="x"), ValueError, "scale_rule is 'x', expected one of"),
    "dynamic_asymmetric": (
        lambda: QuantSpec(symmetric=False, dynamic=True),
        ValueError,
        "symmetric is False with dynamic=True",
    ),
    "static_per_token": (
        lambda: QuantSpec(granularity="per_token"),
        ValueError,
        "granularity is 'per_token' with dynamic=False",
    ),
    "table_bits": (lambda: QuantSpec(4, table=LevelTable((0, 1))), ValueError, "table has 1 bits, expected bits=4"),
    "focus_bits": (lambda: FocusSpec(bits=9), ValueError, "bits is 9"),
    "focus_grid": (lambda: FocusSpec(grid=256), ValueError, "grid is 256, expected an int in [1, 255]"),
    "focus_anchor": (lambda: FocusSpec(anchor="col"), ValueError, "anchor is 'col', expected one of"),
    "focus_below": (lambda: FocusSpec(below="b1"), ValueError, "below is 'b1', expected one of"),
    "focus_order": (lambda: FocusSpec(b1=0.5, b2=0.5), ValueError, "(b1, b2) is (0.5, 0.5), expected 0 <= b1"),
    "focus_above": (lambda: FocusSpec(b2=1.5), ValueError, "(b1, b2) is (0.0, 1.5)"),
    "focus_nan": (lambda: FocusSpec(b1=math.nan), ValueError, "(b1, b2) is (nan, 1.0)"),
    "focus_power": (lambda: FocusSpec(power=0.5), ValueError, "power is 0.5, expected a finite number >= 1"),
    "focus_inf": (lambda: FocusSpec(power=math.inf), ValueError, "power is inf"),
    "qmin": (lambda: ActQuant(qmin=1), ValueError, "qmin is 1, expected an int in [-128, 0]"),
    "qmax": (lambda: ActQuant(qmax=128), ValueError, "qmax is 128, expected an int in [1, 127]"),
    "groups": (lambda: ActQuant(groups=0), ValueError, "groups is 0"),
    "zero_point_dynamic": (lambda: ActQuant(zero_point=3), ValueError, "zero_point is 3 with dynamic scales"),
    "zero_point_rows": (
        lambda: ActQuant(scale=torch.ones(1), zero_point=3, row_qmax=torch.ones(1, dtype=torch.int32)),
        ValueError,
        "zero_point is 3 with row_qmax, expected 0",
    ),
    "subspace": (lambda: ActQuant(subspace=True), ValueError, "subspace is True without lora_down"),
    "scale_for_dynamic": (
        lambda: ActQuant.from_spec(QuantSpec(dynamic=True), torch.ones(1)),
        ValueError,
        "scale is given for a dynamic spec",
    ),
    "no_scale": (lambda: ActQuant.from_spec(QuantSpec()), ValueError, "scale is None for a static spec"),
    "rank": (lambda: LowRankSpec(-1), ValueError, "rank is -1"),
    "kind": (lambda: LowRankSpec(4, "svd"), ValueError, "kind is 'svd', expected one of"),
    "codes_dim": (
        lambda: LinearState(torch.zeros(3, dtype=torch.int8), torch.ones(3), QuantSpec()),
        ValueError,
        "codes has shape (3,), expected [N, K]",
    ),
    "codes_dtype": (
        lambda: LinearState(torch.zeros(3, 2), torch.ones(3), QuantSpec()),
        TypeError,
        "codes has dtype torch.float32, expected torch.int8",
    ),
    "weight_scale": (
        lambda: LinearState(torch.zeros(3, 2, dtype=torch.int8), torch.ones(2), QuantSpec()),
        ValueError,
        "weight_scale has shape (2,), expected (3,)",
    ),
    "bias": (lambda: linear(bias=torch.ones(5)), ValueError, "bias has shape (5,), expected (6,)"),
    "weight_asymmetric": (
        lambda: LinearState(torch.zeros(3, 2, dtype=torch.int8), torch.ones(3), QuantSpec(symmetric=False)),
        ValueError,
        "weight is asymmetric",
    ),
    "act_scale_missing": (lambda: linear(act_scale=None), ValueError, "act_scale is None, expected a [1] tensor"),
    "act_scale_dynamic": (
        lambda: linear(act=QuantSpec(dynamic=True), act_scale=torch.ones(1)),
        ValueError,
        "expected a [1] tensor exactly for a static act",
    ),
    "act_zero_point": (
        lambda: linear(act_zero_point=3),
        ValueError,
        "act_zero_point is 3, expected 0 unless act is asymmetric",
    ),
    "lora_down": (
        lambda: linear(lora=LowRankSpec(2), lora_up=torch.zeros(6, 2)),
        ValueError,
        "lora_down is None, expected shape (2, 4)",
    ),
    "lora_up": (
        lambda: linear(lora=LowRankSpec(2), lora_down=torch.zeros(2, 4), lora_up=torch.zeros(2, 6)),
        ValueError,
        "lora_up is (2, 6), expected shape (6, 2)",
    ),
    "lora_dtype": (
        lambda: linear(lora=LowRankSpec(2), lora_down=torch.zeros(2, 4), lora_up=torch.zeros(6, 2).half()),
        TypeError,
        "lora_down has dtype torch.float32, expected torch.float16",
    ),
    "lora_merged": (
        lambda: linear(lora=LowRankSpec(2, "merged"), lora_down=torch.zeros(2, 4)),
        ValueError,
        "lora_down is given without a side branch",
    ),
    "heads": (lambda: attention(heads=0), ValueError, "heads is 0"),
    "heads_divide": (
        lambda: attention(heads=5, operand_scale=torch.ones(15)),
        ValueError,
        "heads is 5, expected a divisor of qkv's 12 / 3",
    ),
    "operands_asymmetric": (
        lambda: attention(operands=QuantSpec(symmetric=False)),
        ValueError,
        "operands is asymmetric",
    ),
    "operands_granularity": (
        lambda: attention(operands=QuantSpec(granularity="per_channel")),
        ValueError,
        "operands.granularity is 'per_channel', expected one of",
    ),
    "operand_scale_none": (lambda: attention(operand_scale=None), ValueError, "operand_scale must be None exactly"),
    "operand_scale_size": (
        lambda: attention(operand_scale=torch.ones(3)),
        ValueError,
        "operand_scale has 3 values, expected 6",
    ),
    "softmax_scale": (
        lambda: attention(softmax_scale=math.nan),
        ValueError,
        "softmax_scale is nan, expected a finite number",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_refuses(case):
    build, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        build()


@given(level_tables)
def test_level_table_snaps_to_the_nearest_level_ties_towards_zero(levels):
    table = LevelTable(tuple(levels))
    lut, indices = table.lut().tolist(), table.indices().tolist()
    for q in range(-128, 128):
        best = min(levels, key=lambda v: (abs(q - v), abs(v)))
        assert lut[q + 128] == best
        assert levels[indices[q + 128]] == best
    assert 1 << table.bits == len(levels)


@pytest.mark.parametrize(
    ("spec", "qmin", "qmax", "divisor"),
    [
        (QuantSpec(8), -127, 127, 127),
        (QuantSpec(4), -7, 7, 7),
        (QuantSpec(2), -1, 1, 1),
        (QuantSpec(4, scale_rule="absmax_half_range"), -8, 7, 7.5),
        (QuantSpec(4, symmetric=False), -8, 7, 7),
        (QuantSpec(8, symmetric=False), -128, 127, 127),
        (QuantSpec(2, table=LevelTable((-100, -3, 4, 90))), -127, 127, 127),
    ],
)
def test_code_range_and_scale_rule(spec, qmin, qmax, divisor):
    assert (spec.qmin, spec.qmax, spec.scale_divisor) == (qmin, qmax, divisor)


def test_focus_affine_forms_use_their_codes_as_levels():
    levels, step, offset = FocusSpec(bits=3, b1=0.01, b2=0.15).decode()
    assert levels.tolist() == list(range(8))
    assert (step, offset) == (pytest.approx(0.02), 0.01)
    levels, step, offset = FocusSpec(bits=2, b2=0.5, below="zero").decode()
    assert levels.tolist() == [0, 1, 2, 3]
    assert (step, offset) == (pytest.approx(0.5 / 3), 0.0)


def test_focus_power_levels_by_hand():
    # (c/3)² · 255 = 0, 28.33, 113.33, 255
    levels, step, offset = FocusSpec(bits=2, b2=0.5, power=2).decode()
    assert levels.tolist() == [0, 28, 113, 255]
    assert (step, offset) == (0.5 / 255, 0.0)


def test_focus_below_decides_what_code_zero_is():
    floor = FocusSpec(bits=2, b1=0.2, power=2, below="floor").decode()[0].tolist()
    zero = FocusSpec(bits=2, b1=0.2, power=2, below="zero").decode()[0].tolist()
    assert floor == [51, 74, 142, 255]  # 255·(0.2 + 0.8·(c/3)²)
    assert zero == [0, *floor[1:]]
    assert FocusSpec(bits=2, b1=0.2, below="zero").decode()[0].tolist() == [0, 119, 187, 255]


@given(
    st.builds(
        FocusSpec,
        bits=st.integers(2, 8),
        b1=st.floats(0, 0.4),
        b2=st.floats(0.5, 1),
        power=st.floats(1, 4),
        below=st.sampled_from(["floor", "zero"]),
        grid=st.integers(1, 255),
    )
)
def test_focus_levels_are_within_half_a_grid_step_of_the_formula(focus):
    levels, step, offset = focus.decode()
    assert levels.numel() == focus.n + 1
    assert 0 <= int(levels.min()) <= int(levels.max()) <= 255
    for c, level in enumerate(levels.tolist()):
        want = focus.b1 + (focus.b2 - focus.b1) * (c / focus.n) ** focus.power
        if c == 0 and focus.below == "zero":
            want = 0.0
        room = 1e-12 if focus.affine else step / 2 * (1 + 1e-9)
        assert abs(level * step + offset - want) <= room


def test_act_quant_from_spec_and_moves():
    table = LevelTable((-90, -3, 4, 90))
    quant = ActQuant.from_spec(QuantSpec(2, table=table), torch.ones(1), groups=3)
    assert (quant.qmin, quant.qmax, quant.groups) == (-127, 127, 3)
    assert torch.equal(quant.lut, table.lut())
    moved = quant.to("meta")
    assert moved.lut.device.type == "meta"
    assert moved.row_qmax is None


def test_linear_state_hands_out_its_quantizing_epilogue():
    state = linear(
        lora=LowRankSpec(2, "subspace"), lora_down=torch.zeros(2, 4).half(), lora_up=torch.zeros(6, 2).half()
    )
    assert state.act_quant.subspace
    assert state.act_quant.lora_down is state.lora_down
    assert not linear().act_quant.subspace


def test_attention_state_groups():
    assert attention().groups == 6
    assert attention(operands=QuantSpec(), operand_scale=torch.ones(3)).groups == 3
    dynamic = attention(operands=QuantSpec(granularity="per_token", dynamic=True), operand_scale=None)
    assert dynamic.groups == 6
    assert dynamic.operand_quant.scale is None


def test_packed_weight_counts_bytes():
    data = torch.zeros(3, 5, dtype=torch.uint8)
    assert PackedWeight(data, "int4", 4, 3, 9, torch.zeros(3, dtype=torch.int32)).nbytes == 15
