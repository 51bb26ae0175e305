"""The whole of calibration: parity with the integer model, determinism, resuming, recipes and what they refuse."""

import re
import sys

import minmax
import numpy as np
import pytest
import timm
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from vitq.calibrate import calibrate, identity
from vitq.convert import to_integer
from vitq.models import adapter_for
from vitq.recipes import load_recipe, names, parse
from vitq.workdir import WorkDir

from vitq_kernels import backend

SMALL = {
    "name": "small",
    "calibration": {"batch": 4},
    "bits": {"weights": 4, "activations": 4, "operands": 4, "softmax": 4},
    "low_rank": {"kind": "error", "rank": 16},
    "transform": [{"method": "reparameterize"}],
    "initialise": [{"method": "scales", "focus_search": 4}],
    "allocate": [{"method": "rank_search", "iterations": 2, "batch": 4}],
    "compensate": [{"method": "closed_form"}],
    "reconstruct": [{"method": "blocks", "iterations": 4, "batch": 4, "lr_rounding": 0.01, "mixing": 0.3}],
}
DYNAMIC = {
    "name": "dynamic",
    "calibration": {"batch": 4},
    "bits": {"weights": 3, "activations": 4},
    "activations": "dynamic",
    "operands": "dynamic",
    "activation_levels": "table",
    "weight_levels": "table",
    "low_rank": {"kind": "subspace", "rank": 16},
    "initialise": ["scales"],
    "compensate": [{"method": "closed_form", "ridge": True, "rounding": "compensated"}],
}
MINMAX = {"name": "minmax", "focus": {"anchor": "absolute", "power": 1.0}, "initialise": ["scales"]}
MERGED = SMALL | {"low_rank": {"kind": "merged", "rank": 16}, "operand_scales": "per_tensor"}


@pytest.mark.parametrize("build", [minmax.vit, minmax.swin])
@pytest.mark.parametrize("recipe", [SMALL, DYNAMIC, MINMAX, MERGED], ids=["small", "dynamic", "minmax", "merged"])
def test_the_integer_model_is_the_simulated_model(build, recipe):
    model = build()
    result = calibrate(model, minmax.images(model, 8), parse(recipe))
    x = minmax.images(model, 8, seed=7)
    with torch.no_grad(), backend("ref"):
        simulated, integer = result.sim(x), to_integer(model, result.state)(x)
    assert torch.equal(simulated.argmax(1), integer.argmax(1))
    # Codes are the same but where a float matmul of another shape moves a value across a tie.
    assert minmax.sqnr(simulated, integer) > 45
    assert minmax.sqnr(model(x), integer) < 60


def test_codes_are_the_same_at_every_site():
    """Without a side branch no float matmul stands between the sites: the first block is bit for bit the same."""
    model = minmax.vit(depth=1)
    result = calibrate(model, minmax.images(model, 8), parse(MINMAX))
    x = minmax.images(model, 4, seed=3)
    with torch.no_grad(), backend("ref"):
        assert torch.equal(result.sim(x), to_integer(model, result.state)(x))


def same(a, b) -> bool:
    if a.floats.keys() != b.floats.keys() or a.sites.keys() != b.sites.keys():
        return False
    pairs = [(a.floats[k], b.floats[k]) for k in a.floats]
    for x, y in zip(a.linears().values(), b.linears().values()):
        if (x.weight, x.act, x.lora, x.act_zero_point) != (y.weight, y.act, y.lora, y.act_zero_point):
            return False
        tensors = ("codes", "weight_scale", "bias", "act_scale", "lora_down", "lora_up")
        pairs += [(getattr(x, k), getattr(y, k)) for k in tensors if getattr(x, k) is not None]
    for path, site in a.sites.items():
        if hasattr(site, "focus"):
            other = b.sites[path]
            if site.focus != other.focus or site.operands != other.operands:
                return False
            pairs += [] if site.operand_scale is None else [(site.operand_scale, other.operand_scale)]
    return all(torch.equal(x, y) for x, y in pairs)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [("allocate", 1), ("compensate", 2), ("reconstruct", 1)])
def test_resumed_runs_give_the_identical_result(tmp_path, stop):
    model = minmax.vit()
    images, recipe = minmax.images(model, 8), parse(SMALL)
    whole = calibrate(model, images, recipe, seed=3).state
    assert same(whole, calibrate(model, images, recipe, seed=3).state)
    assert not same(whole, calibrate(model, images, recipe, seed=4).state)

    def interrupt(step: str, done: int, total: int) -> None:
        if stop[0] in step and done == stop[1]:
            raise Interrupted

    with pytest.raises(Interrupted):
        calibrate(model, images, recipe, seed=3, work_dir=tmp_path / "w", progress=interrupt)
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "w").glob("*.safetensors")}
    assert kept
    assert not list((tmp_path / "w").glob("*.partial"))
    seen = []
    resumed = calibrate(model, images, recipe, seed=3, work_dir=tmp_path / "w", progress=lambda *a: seen.append(a))
    assert same(whole, resumed.state)
    assert {k: (tmp_path / "w" / k).stat().st_mtime_ns for k in kept} == kept
    assert seen[-1][1] == seen[-1][2]


def test_foreign_work_directories_are_refused(tmp_path):
    model = minmax.vit()
    images, recipe = minmax.images(model, 4), parse(MINMAX)
    calibrate(model, images, recipe, work_dir=tmp_path / "w")
    with pytest.raises(ValueError, match="another calibration: seed differ"):
        calibrate(model, images, recipe, seed=1, work_dir=tmp_path / "w")
    with pytest.raises(ValueError, match="images differ"):
        calibrate(model, images + 1, recipe, work_dir=tmp_path / "w")
    with pytest.raises(ValueError, match="recipe differ"):
        calibrate(model, images, parse(MINMAX | {"summary": "?"}), work_dir=tmp_path / "w")
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(ValueError, match="model differ"):
        calibrate(model, images, recipe, work_dir=tmp_path / "w")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no calibration\.json"):
        calibrate(model, images, recipe, work_dir=tmp_path / "other")
    (tmp_path / "w" / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        calibrate(model, images, recipe, work_dir=tmp_path / "w")


def test_damaged_units_are_refused(tmp_path):
    model = minmax.vit()
    images, recipe = minmax.images(model, 4), parse({**DYNAMIC})
    calibrate(model, images, recipe, work_dir=tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=re.escape(file.name)):
        calibrate(model, images, recipe, work_dir=tmp_path)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.zeros(3, 16, 16), r"expected a float batch \[B, C, H, W\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "expected a float batch"),
        (torch.zeros(0, 3, 16, 16), "expected a float batch"),
        (torch.full((1, 3, 16, 16), torch.nan), "has NaN or Inf"),
        (torch.zeros(2, 3, 32, 32), r"\(2, 3, 32, 32\), expected \[B, 3, 16, 16\]"),
        (torch.zeros(2, 1, 16, 16), r"\(2, 1, 16, 16\), expected \[B, 3, 16, 16\]"),
    ],
)
def test_bad_images_are_refused(images, reason):
    with pytest.raises(ValueError, match=reason):
        calibrate(minmax.vit(), images, parse(MINMAX))


def test_what_images_may_be_like():
    assert adapter_for(minmax.vit(depth=1)).input_shape() == (3, 16, 16)
    assert adapter_for(minmax.vit(depth=1, dynamic_img_size=True)).input_shape() == (3, None, None)
    with torch.device("meta"):
        assert adapter_for(timm.create_model("vit_tiny_r_s16_p8_224")).input_shape() is None
        assert adapter_for(timm.create_model("point_mae_primitives")).input_shape() == (None, 3)


@pytest.mark.parametrize("kind", [list, np.asarray])
def test_images_that_are_no_tensor_are_refused(kind):
    with pytest.raises(TypeError, match=r"images is (list|ndarray), expected a torch\.Tensor"):
        calibrate(minmax.vit(), kind(torch.zeros(2, 3, 16, 16)), parse(MINMAX))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device is 'cuda:99', expected cpu or one of"):
        calibrate(minmax.vit(depth=1), torch.zeros(2, 3, 16, 16), parse(MINMAX), device="cuda:99")


def test_an_integer_model_is_refused():
    model = minmax.vit(depth=1)
    integer = to_integer(model, calibrate(model, minmax.images(model, 2), parse(MINMAX)).state)
    with pytest.raises(ValueError, match="is a VisionTransformer of integer modules, expected a float model"):
        calibrate(integer, minmax.images(model, 2), parse(MINMAX))


def test_one_work_dir_takes_one_calibration_at_a_time(tmp_path):
    model = minmax.vit(depth=1)
    images = minmax.images(model, 2)
    calibrate(model, images, parse(MINMAX), work_dir=tmp_path)
    # A lock is of an open file: it excludes this process, too.
    other = WorkDir(tmp_path, identity(model, images, parse(MINMAX), 0)).locked()
    with other, pytest.raises(ValueError, match=f"work_dir is '{tmp_path}', into which another process calibrates"):
        calibrate(model, images, parse(MINMAX), work_dir=tmp_path)
    calibrate(model, images, parse(MINMAX), work_dir=tmp_path)


def test_patches_that_leave_a_margin_stay_float():
    model = minmax.vit(img_size=17)
    images = minmax.images(model, 2)
    done = calibrate(model, images, parse(MINMAX))
    assert "patch_embed.proj" not in done.state.linears()
    integer = to_integer(model, done.state)
    assert "reads 17x17 pixels, no multiple of its patches of 4x4" in integer.vitq_report.floating["patch_embed"]
    with torch.no_grad(), backend("ref"):
        assert torch.equal(integer(images), done.sim(images))


def test_the_float_model_is_left_alone():
    model = minmax.vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate(model, minmax.images(model, 4), parse(SMALL))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# Recipes


@pytest.mark.parametrize("name", names())
def test_shipped_recipes_are_valid_and_survive_json(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.source
    assert parse(recipe.plain()) == recipe
    assert (recipe.refusal is None) == ("exists in simulation only" not in recipe.summary)
    dynamic = load_recipe(f"{name}-dynamic")
    assert (dynamic.name, dynamic.activations, dynamic.operands) == (f"{name}-dynamic", "dynamic", "dynamic")
    static = load_recipe(f"{name}-static")
    assert (static.activations, static.operands) == ("static", "static")
    assert load_recipe(name, fast=True).effort == recipe.fast_effort


def test_every_promised_recipe_ships():
    promised = {f"aiqvit-{b}" for b in ("w8a8", "w6a6", "w4a8", "w4a4", "w3a3")}
    promised |= {f"vitq-{b}" for b in ("w8a8", "w4a8", "w4a4", "w3a4")}
    assert promised <= set(names())
    for name in promised:
        weights, activations = re.search(r"w(\d)a(\d)", name).groups()
        bits = load_recipe(name).bits
        assert (bits.weights, bits.activations, bits.boundary) == (int(weights), int(activations), 8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": {"weights": 9}}, r"bits\.weights is 9, input should be less than or equal to 8"),
        ({"bits": {"wieghts": 4}}, r"bits\.wieghts is no field"),
        ({"activations": "maybe"}, r"activations is 'maybe', input should be 'static' or 'dynamic'"),
        ({"bit": 4}, "bit is no field"),
        ({"compensate": "closed_form"}, "compensate is 'closed_form', expected a list of steps"),
        ({"compensate": [{"start": "plain"}]}, r"expected \{method: name"),
        ({"compensate": ["magic"]}, r"compensate\.method is 'magic', expected one of closed_form"),
        ({"compensate": [{"method": "closed_form", "start": "hot"}]}, r"compensate\.closed_form: start is 'hot'"),
        ({"compensate": [{"method": "closed_form", "stat": 1}]}, r"stat is no field"),
        ({"reconstruct": [{"method": "blocks", "iterations": -1}]}, r"iterations is -1"),
        ({"allocate": [{"method": "rank_search", "candidates": [-1]}]}, r"expected ranks in \[0, 1024\]"),
        ({"effort": 0}, "effort is 0"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(change, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse(SMALL | change, "recipe x")
    assert str(error.value).startswith("recipe x: ")
    assert "\n" not in str(error.value)


def test_bits_appended_to_a_name():
    recipe = load_recipe("minmax-w3a6-dynamic", bits={"softmax": 8})
    assert (recipe.name, recipe.activations) == ("minmax-w3a6-dynamic", "dynamic")
    assert recipe.bits.model_dump() == {"weights": 3, "activations": 6, "operands": 6, "softmax": 8, "boundary": 8}
    # A file of that name has its own bits.
    assert load_recipe("vitq-w4a4").bits.operands == 8
    with pytest.raises(ValueError, match="recipe is 'minmax-w9a4', expected"):
        load_recipe("minmax-w9a4")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pmq-mixed-w4a4", r"expected pmq-mixed: .*budget does \(--budget bitops="),
        ("pmq-mixed-w8a8-dynamic", r"expected pmq-mixed: .*--budget bitops="),
        ("vitq-latency-w8a8", "expected vitq-latency: .*--budget latency="),
        ("pack-ptq-mixed-w3a3", r"expected pack-ptq-mixed: .*one triple, set all of them \(--set 'bits="),
    ],
)
def test_bits_that_would_decide_nothing_are_refused(name, reason):
    with pytest.raises(ValueError, match=f"recipe is '{name}', {reason}"):
        load_recipe(name)


@pytest.mark.parametrize("name", ["pmq-mixed-w6a6", "pack-ptq-mixed-w4a4", "vitq-latency-w4a4", "vitq-mixed-w3a3"])
def test_bits_that_are_the_recipes_or_its_budgets_are_taken(name):
    assert load_recipe(name).name == name


def test_recipe_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: aiqvit-w4a4\nsummary: mine\nbits: {weights: 3}\n")
    recipe = load_recipe(path, calibration={"images": 7})
    assert (recipe.name, recipe.bits.weights, recipe.bits.activations, recipe.calibration.images) == ("mine", 3, 4, 7)
    for text, reason in (("a: [", "is no YAML"), ("- 1", "holds a list"), ("extends: mine", "extends itself")):
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            load_recipe(path)
    with pytest.raises(ValueError, match=r"recipe is 'nope', expected a YAML file or one of .*aiqvit"):
        load_recipe("nope")
    with pytest.raises(ValueError, match="recipe is a list"):
        parse([1])


class ExplicitDevices(TorchFunctionMode):
    """Refuses to make a tensor for the package without being told where."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _device_constructors() and kwargs.get("device") is None:
            file = sys._getframe(1).f_code.co_filename
            assert not re.search("/python/vitq/|/vitq_kernels/formats", file), f"{function.__name__} in {file}"
        return function(*args, **kwargs)


TWIN = {"method": "twin_uniform", "rounds": 1, "steps": 4, "images": 4, "softmax": False, "tables": True}
SIMULATED = SMALL | {
    "low_rank": {"kind": "none"},
    "initialise": ["scales", {"method": "log_levels", "softmax": "adaptive"}, TWIN],
    "allocate": [],
    "reconstruct": [],
    "refine": ["bias_correction"],
}
QDROP = {"method": "blocks", "iterations": 2, "batch": 4, "lr_rounding": 0.01, "mixing": 0.5, "dropping": 0.5}
REFINED = SMALL | {
    "low_rank": {"kind": "none"},
    "allocate": [{"method": "packs", "cap": 1}],
    "reconstruct": [QDROP | {"loss": loss} for loss in ("fisher_diagonal", "perturbation", "fisher_low_rank")],
    "refine": [{"method": "evolution", "passes": 1, "population": 2, "cycles": 1, "sample": 1, "batch": 4}],
}
BITS = {"bits": [3, 4], "images": 4}
ALLOCATED = SMALL | {
    "low_rank": {"kind": "none"},
    "allocate": [{"method": m, **BITS} for m in ("relevance", "fisher", "greedy")],
    "reconstruct": [],
}


@pytest.mark.parametrize(
    "recipe",
    [SMALL, DYNAMIC, MERGED, REFINED, SIMULATED, ALLOCATED],
    ids=["small", "dynamic", "merged", "refined", "simulated", "allocated"],
)
def test_tensors_are_made_where_the_model_is(recipe, tmp_path):
    """Without a second device at hand: no factory of the package relies on torch's default one."""
    model = minmax.swin()
    with ExplicitDevices():
        sim = calibrate(model, minmax.images(model, 4), parse(recipe), device="cpu", work_dir=tmp_path).sim
        assert {t.device.type for t in (*sim.parameters(), *sim.buffers())} == {"cpu"}


def test_a_tensor_made_anywhere_is_found():
    made = compile("torch.zeros(2)", "/somewhere/python/vitq/stages/planted.py", "eval")
    with ExplicitDevices(), pytest.raises(AssertionError, match="zeros in"):
        eval(made)
