"""Quantizers that exist in simulation only: their levels, the searches that choose them, and their refusal."""

import math

import minmax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stages import calibration, step
from vitq import jobs
from vitq.calibrate import calibrate
from vitq.data import load_data
from vitq.fisher import output_gradients
from vitq.quantizers import FocusQuantizer, LogLevels, ShiftedLog, SimLinear, TwinUniform
from vitq.quantizers.simulated import from_plain
from vitq.recipes import load_recipe, parse
from vitq.scales import search_probabilities
from vitq.sources import ModelSource, load_float

from vitq_kernels.formats import FocusSpec, QuantSpec

QUANTIZERS = [
    LogLevels(4, 2.0),
    LogLevels(3, 2**0.5, 0.7),
    LogLevels(4, 1.3, 2.5, 0.17),
    ShiftedLog(4, 0.01),
    ShiftedLog(2, 0.125, 0.5),
    TwinUniform(4, 1 / 64, 1 / 8),
    TwinUniform(4, 0.17 / 8, 0.3, signed=1),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
@given(x=st.lists(st.floats(-0.25, 3.0, width=32), min_size=1, max_size=50))
def test_outputs_are_levels_near_their_inputs(quantizer, x):
    """As many levels as codes, values only on them, monotone, and levels stay themselves."""
    levels = quantizer.levels()
    assert levels.shape == (2**quantizer.bits,)
    x = torch.tensor(x).sort().values
    out = quantizer(x).double()
    assert float((out[:, None] - levels).abs().amin(1).max()) < 1e-6 * float(levels.abs().max())
    assert bool((out.diff() >= -1e-6).all())
    assert torch.allclose(quantizer(levels.float()).double(), levels, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("quantizer", "x", "wanted"),
    [
        # By hand: 0.3 = 2^-1.74 -> 2^-2; 2^-15 is the place of zero at 4 bits; above the scale is the scale.
        (LogLevels(4, 2.0), [0.3, 2**-14.4, 2**-15, 0.0, 2.0], [0.25, 2**-14, 0.0, 0.0, 1.0]),
        (LogLevels(4, 2**0.5), [0.3], [2**-1.5]),
        # 2 bits, η = 1/8, top 7/8: levels 2^-3, 2^-2, 2^-1, 2^0 less 1/8.
        (ShiftedLog(2, 0.125, 0.875), [0.0, 0.1, 0.4, 0.8, 1.0], [0.0, 0.125, 0.375, 0.875, 0.875]),
        # 3 bits: four codes of 1/16 below 1/4, four of 1/4 above.
        (TwinUniform(3, 1 / 16, 1 / 4), [0.2, 0.24, 0.26, 0.9], [3 / 16, 3 / 16, 1 / 4, 3 / 4]),
        (TwinUniform(3, 0.05, 0.5, signed=1), [-0.17, -0.3, -0.02, 0.2, 0.3], [-0.15, -0.2, 0.0, 0.0, 0.5]),
    ],
)
def test_levels_by_hand(quantizer, x, wanted):
    assert torch.allclose(quantizer(torch.tensor(x)), torch.tensor(wanted), atol=1e-6)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_gradients_pass_and_plain_values_come_back(quantizer):
    levels = quantizer.levels().float().unique()[1:]
    x = (0.6 * levels[:-1] + 0.4 * levels[1:]).requires_grad_()
    quantizer(x).sum().backward()
    # Straight through the rounding, by the slope of the decode: about 1, but for the clamp between twin ranges.
    passed = (x.grad > 0.5) & (x.grad < 1.7)
    assert int(passed.sum()) >= len(x) - isinstance(quantizer, TwinUniform)
    other = from_plain(quantizer.plain())
    assert torch.equal(other(x), quantizer(x))


def test_other_bits_keep_the_range():
    twin = TwinUniform(4, 0.01, 0.2, signed=1).at(6)
    assert (twin.bits, twin.values["fine"], twin.values["coarse"]) == (6, 0.0025, 0.05)
    with pytest.raises(ValueError, match="bits of LogLevels is 4 once and for all"):
        LogLevels(4, 2.0).at(3)


@pytest.mark.parametrize("wrong", [{"bits": 9}, {"base": 1.0}, {"scale": 0.0}])
def test_bad_quantizers(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LogLevels(**{"bits": 4, "base": 2.0} | wrong)


def test_a_layer_computes_with_the_decoded_input():
    linear = SimLinear(torch.randn(6, 8), torch.randn(6))
    linear.act.set(QuantSpec(4), torch.tensor([0.1]))
    linear.quant.set(QuantSpec(4, granularity="per_channel"), torch.full((6,), 0.2))
    linear.simulated = TwinUniform(4, 0.02, 0.3, signed=1)
    x = torch.randn(5, 8)
    wanted = linear.simulated(x) @ (linear.codes() * 0.2).T + linear.bias
    assert torch.allclose(linear(x), wanted, atol=1e-6)
    assert not linear.integer
    with pytest.raises(ValueError, match=r"the input of a \(6, 8\) layer has no integer form: a bit of each code"):
        linear.export()


def test_the_search_of_probabilities_finds_the_planted_best():
    """Probabilities that one candidate alone represents exactly; and everything is as it was afterwards."""
    c = calibration(minmax.vit(), {"bits": {"softmax": 8}})
    step(c, "initialise", "scales")
    path, attention = next(iter(c.sim.attentions.items()))
    qkv, before = c.observations().qkv[path], (attention.focus, attention.operands.spec)
    candidates = [LogLevels(2, 2.0), LogLevels(3, 2.0), LogLevels(8, 1.02, 1.0), FocusQuantizer(FocusSpec(2))]
    assert search_probabilities(attention, candidates, qkv, None) is candidates[2]
    assert (attention.focus, attention.operands.spec) == before
    assert attention.simulated is None


def test_gradients_are_those_of_the_sampled_labels():
    """Against autograd, image by image, on a model of its own."""
    model = minmax.vit()
    c = calibration(model, {})
    paths, x = ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head"], minmax.images(model, 4)
    got = output_gradients(c.sim, x.split(2), paths, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    labels = torch.cat([torch.multinomial(model(p).softmax(-1), 1, generator=generator)[:, 0] for p in x.split(2)])
    for path in paths:
        kept = []
        handle = model.get_submodule(path).register_forward_hook(
            lambda m, i, o, kept=kept: kept.append((i[0], o.requires_grad_())) or o
        )
        rows, wanted = [], []
        with torch.enable_grad():
            for image, label in zip(x, labels):
                loss = torch.nn.functional.cross_entropy(model(image[None]), label[None])
                entered, output = kept.pop()
                g = torch.autograd.grad(loss, output)[0]
                wanted.append(g.flatten(2).transpose(1, 2)[0] if path == "patch_embed.proj" else g.flatten(0, -2))
                rows.append(c.sim.linears[path].rows(entered))
        handle.remove()
        assert torch.allclose(got[path][0], torch.cat(rows), atol=1e-5)
        assert torch.allclose(got[path][1], torch.cat(wanted), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"gelu": "ratio"}, {"tables": True}, {"gelu": "uniform", "softmax": False}])
def test_twin_ranges_lower_the_weighted_output_error(options):
    model = minmax.vit()
    bits = {"weights": 4, "activations": 4, "operands": 8, "softmax": 4}
    c = calibration(model, {"bits": bits, "focus": {"anchor": "absolute", "power": 1.0}}, 16)
    step(c, "initialise", "scales", weights={"method": "minmax"}, activations={"method": "minmax"})
    batches, linears = c.batches(c.images), c.sim.linears
    gradients = output_gradients(c.reference, batches, linears, c.generator("labels"))

    def errors() -> dict[str, float]:
        out = {}
        for path, (x, g) in gradients.items():
            linear = linears[path]
            y = linear.decoded(x) @ (linear.codes() * linear.quant.scale[:, None]).T
            out[path] = float(((y - x @ linear.weight.T) * g).square().sum())
        return out

    with torch.no_grad():
        before = errors()
        step(c, "initialise", "twin_uniform", images=16, rows=4096, steps=25, **options)
        after = errors()
    assert all(after[p] <= 1.001 * before[p] for p in before)
    assert sum(after.values()) < 0.9 * sum(before.values())
    refused = bool(c.sim.refusals())
    assert refused == bool(c.sim.linears["blocks.0.mlp.fc2"].simulated or c.sim.attentions["blocks.0.attn"].simulated)
    assert refused == ("tables" not in options and options.get("gelu") != "uniform")


SMALL = {
    "name": "small",
    "bits": {"weights": 4, "activations": 4, "operands": 4, "softmax": 4},
    "focus": {"anchor": "absolute", "power": 1.0},
}
LOG = {"method": "log_levels", "softmax": "adaptive", "gelu": "adaptive"}


def test_no_integer_form_is_refused_with_the_reason_and_resumes_identically(tmp_path):
    model = minmax.vit()
    x = minmax.images(model, 8)
    recipe = parse(SMALL | {"initialise": ["scales", LOG], "compensate": ["closed_form"]})
    done = calibrate(model, x, recipe, work_dir=tmp_path / "work")
    assert set(done.refusals) == {f"blocks.{i}.{m}" for i in (0, 1) for m in ("attn", "mlp.fc2")}
    with pytest.raises(ValueError, match=r"no integer form: blocks\.0\.mlp\.fc2: .* \(4 such sites\)"):
        _ = done.state
    assert recipe.refusal in done.refusals.values()
    again = calibrate(model, x, recipe, work_dir=tmp_path / "work")
    with torch.no_grad():
        assert torch.equal(done.sim(x), again.sim(x))
        assert math.isfinite(float(done.sim(x).sum()))


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
def test_the_tables_of_the_same_method_are_deployable(build):
    model = build()
    x = minmax.images(model, 8)
    done = calibrate(model, x, parse(SMALL | {"initialise": ["scales", LOG | {"tables": True}]}))
    assert not done.refusals
    linear = next(l for p, l in done.state.linears().items() if p.endswith("fc2"))
    assert linear.act.table is not None


@pytest.mark.parametrize("step", [LOG, LOG | {"tables": True}, {"method": "twin_uniform", "softmax": False}])
def test_ranges_after_gelu_need_static_activations(step):
    """Scales per token would put the method's own quantizer aside without a word."""
    model = minmax.vit()
    recipe = parse(SMALL | {"activations": "dynamic", "initialise": ["scales", step]})
    with pytest.raises(ValueError, match=f"activations is 'dynamic', expected 'static' for {step['method']} with gelu"):
        calibrate(model, minmax.images(model, 4), recipe)


def test_evaluation_without_an_integer_model():
    source = ModelSource("vit_digits_patch4_32")
    model = load_float(source)
    recipe = load_recipe("repq-vit-w3a4", calibration={"images": 8})
    assert (recipe.name, recipe.bits.weights, recipe.bits.softmax) == ("repq-vit-w3a4", 3, 4)
    done = jobs.quantize(model, source, recipe, "digits")
    assert done.integer is None
    splits = {"test": load_data("digits", "test", model, 16)}
    (row,) = jobs.evaluate(jobs.predict_splits(model, splits), done.calibrated.sim, done.integer, splits)
    assert row["top1_integer"] is None
    assert 0 < row["logit_sqnr_db"] < 60
    weights, activations = jobs.average_bits(done.calibrated.sim)
    assert 3 < weights < 3.2
    assert 4 < activations < 4.5
