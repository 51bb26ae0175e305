"""Checkpoints: exact round trips, atomic writes, and a reason for every file that is refused."""

import dataclasses
import fcntl
import json
import os
from pathlib import Path

import minmax
import pytest
import timm
import torch
import vitq
from safetensors.torch import load_file, save_file
from vitq import checkpoint
from vitq.calibrate import calibrate
from vitq.checkpoint import CheckpointError
from vitq.convert import to_integer
from vitq.models import state_data
from vitq.sources import ModelSource, load_float

from vitq_kernels.formats import FocusSpec, LevelTable, QuantSpec

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
SWIN = {"img_size": (24, 40), "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
TOKEN = QuantSpec(8, granularity="per_token", dynamic=True)
HEADS = QuantSpec(8, granularity="per_head", dynamic=True)
TABLE = LevelTable((-120, -90, -60, -40, -30, -20, -10, -5, 0, 5, 10, 20, 35, 50, 70, 110))
CASES = {
    "vit-static": ("vit_tiny_patch16_224", VIT, {}),
    "vit-w3-error": (
        "vit_tiny_patch16_224",
        VIT,
        {"weight": QuantSpec(3, granularity="per_channel"), "act": TOKEN, "operands": HEADS, "rank": 4},
    ),
    "vit-tables": (
        "vit_tiny_patch16_224",
        VIT,
        {
            "weight": QuantSpec(4, granularity="per_channel", table=TABLE),
            "act": QuantSpec(4, table=TABLE),
            "operands": QuantSpec(7),
            "focus": FocusSpec(3, b1=0.01, b2=0.7, power=2.5, below="zero", renormalize=True),
        },
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT, {"rank": 4, "kind": "subspace", "act": TOKEN}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, {"skip": ("head.fc", "layers.0.blocks.0.attn")}),
    "swin-weight-only": (
        "swin_tiny_patch4_window7_224",
        SWIN,
        {"weight_only": ("layers.1.blocks.1.mlp.fc2", "layers.0.blocks.1.attn.qkv"), "rank": 3},
    ),
}


def make(name="vit-static"):
    architecture, kwargs, options = CASES[name]
    torch.manual_seed(0)
    model = minmax.spread(timm.create_model(architecture, **kwargs))
    x = minmax.images(model)
    state = minmax.minmax_state(model, x, **options)
    state = dataclasses.replace(
        state,
        architecture=architecture,
        kwargs=kwargs,
        data=state_data(model),
        recipe={"name": "test", "bits": [4, 8]},
    )
    return model, state, x


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, state, x = make()
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    vitq.save(path, state)
    return path, to_integer(model, state)(x), x


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to break: (folder, config as a dictionary, tensor file)."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    return folder, config, folder / config["weights"]["file"]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name, tmp_path):
    model, state, x = make(name)
    before = torch.get_rng_state()
    written = vitq.save(tmp_path / "c", state)
    loaded = vitq.load(tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), before), "loading must not disturb the global random state"
    assert torch.equal(loaded(x), to_integer(model, state)(x))
    assert not loaded.training
    assert loaded.vitq_config == written == checkpoint.read_config(tmp_path / "c")
    again, _ = checkpoint.load_state(tmp_path / "c")
    assert list(again.sites) == list(state.sites)
    assert all(equal(again.sites[path], site) for path, site in state.sites.items())
    assert again.floats.keys() == state.floats.keys()
    assert all(torch.equal(again.floats[name], t) for name, t in state.floats.items())
    assert again.recipe == {"name": "test", "bits": [4, 8]}
    assert again.data["mean"] == tuple(state.data["mean"])


def test_weights_are_stored_at_their_true_width(tmp_path):
    model, state, _ = make("vit-w3-error")
    config = vitq.save(tmp_path / "c", state)
    tensors = load_file(tmp_path / "c" / config.weights.file)
    assert tensors["site.blocks.0.attn.qkv.codes"].shape == (96, 32 * 3 // 8)
    assert config.float_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert checkpoint.disk_bytes(tmp_path / "c") == sum(f.stat().st_size for f in (tmp_path / "c").iterdir())
    assert config.weights.bytes < config.float_bytes


def test_relative_position_bias_is_stored_as_a_table(tmp_path):
    _, state, _ = make("swin")
    config = vitq.save(tmp_path / "c", state)
    tensors = load_file(tmp_path / "c" / config.weights.file)
    table, index = (tensors[f"site.layers.0.blocks.1.attn.bias_{part}"] for part in ("table", "index"))
    assert table.shape[0] <= 7 * 7
    assert index.dtype == torch.int16
    assert config.float_bytes <= 4 * sum(p.numel() for p in make("swin")[0].parameters())


def test_files_hold_no_pickle_and_nothing_temporary(saved):
    assert sorted(f.suffix for f in saved[0].iterdir()) == [".json", ".safetensors"]


def test_backend_is_kept_by_every_module(saved):
    model = vitq.load(saved[0], backend="ref")
    assert torch.equal(model(saved[2]), saved[1]) or minmax.sqnr(saved[1], model(saved[2])) > 30
    assert {m.backend for m in model.modules() if hasattr(m, "repack")} == {"ref"}
    with pytest.raises(ValueError, match="no back end serves"):
        vitq.load(saved[0], backend="triton")


# What is refused, and with which words.


def reseal(folder: Path, config: dict) -> None:
    """Give an altered config a matching digest, as a different writer would."""
    config = checkpoint.Config.model_validate(config).sealed()
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))


def rewrite_tensors(folder: Path, config: dict, tensors: dict, metadata=None) -> None:
    """Replace the tensors with digests that match."""
    file = folder / config["weights"]["file"]
    save_file(tensors, file, metadata=metadata)
    digest = checkpoint._sha256(file)
    config["weights"] = {"file": f"model-{digest[:16]}.safetensors", "sha256": digest, "bytes": file.stat().st_size}
    file.rename(folder / config["weights"]["file"])
    reseal(folder, config)


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        vitq.load(folder)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_missing_files(broken, tmp_path):
    folder, _, tensors = broken
    refused(tmp_path / "nowhere", "no such folder")
    refused(tensors, "is a file, expected a checkpoint folder")
    tensors.unlink()
    refused(folder, "lacks model-.*safetensors")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


@pytest.mark.parametrize(
    "text", ["", "{", "\x00\x01", '{"format": "vitq", "version": 1, "metrics": {"a": NaN}}', "[" * 99999]
)
def test_invalid_json(broken, text):
    (broken[0] / "config.json").write_text(text)
    refused(broken[0], "is no JSON")


@pytest.mark.parametrize("content", [[], {}, {"architectures": ["ViT"]}, {"format": "other", "version": 1}])
def test_foreign_config(broken, content):
    (broken[0] / "config.json").write_text(json.dumps(content))
    refused(broken[0], "is not of a vitq checkpoint")


@pytest.mark.parametrize(
    ("version", "match"), [(2, "version 2, newer than 1"), (0, "expected 1"), ("x", "'x', expected 1")]
)
def test_other_versions(broken, version, match):
    folder, config, _ = broken
    (folder / "config.json").write_text(json.dumps(config | {"version": version}))
    refused(folder, match)


def edit(config, *path, value):
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("surprise",), 1, "surprise: Extra inputs"),
        (("sites", "head", "surprise"), 1, "surprise"),
        (("sites", "head", "weight", "surprise"), 1, "weight.surprise"),
        (("sites", "head", "weight", "bits"), 22, "bits is 22, expected an int in"),
        (("sites", "head", "kind"), "other", "sites.head"),
        (("sites", "blocks.0.attn", "focus", "b1"), 2.0, "expected 0 <= b1"),
        (("weights", "file"), "../model-0123456789abcdef.safetensors", "weights.file"),
        (("data", "mean"), "grey", "data.mean"),
        (("architecture",), None, "architecture"),
    ],
)
def test_config_outside_the_schema(broken, path, value, match):
    folder, config, _ = broken
    edit(config, *path, value=value)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, match)


def test_config_changed_by_hand(broken):
    folder, config, _ = broken
    edit(config, "sites", "head", "act_zero_point", value=3)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "config.json: does not match its digest")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_tensors(broken, size):
    folder, _, tensors = broken
    tensors.write_bytes(tensors.read_bytes()[:size])
    refused(folder, "truncated or replaced")


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_tampered_tensors(broken, where):
    folder, _, tensors = broken
    content = bytearray(tensors.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    tensors.write_bytes(content)
    refused(folder, "does not match its SHA-256")


def test_no_safetensors_behind_a_matching_digest(broken):
    folder, config, tensors = broken
    tensors.write_bytes(b"not a tensor in sight" * 40)
    digest = checkpoint._sha256(tensors)
    config["weights"] = {"file": tensors.name, "sha256": digest, "bytes": tensors.stat().st_size}
    reseal(folder, config)
    refused(folder, "is no safetensors file")


def test_foreign_tensors(broken):
    folder, config, _ = broken
    rewrite_tensors(folder, config, {"cls_token": torch.zeros(1, 1, 32)})
    refused(folder, "lacks 'site.blocks.0.attn")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("site.head.codes", lambda t: t[:, :-1], "'site.head.codes' has shape"),
        ("site.head.codes", lambda t: t.to(torch.int8), "has dtype torch.int8"),
        ("site.head.weight_scale", lambda t: t.double(), "has dtype torch.float64"),
        ("site.head.act_scale", lambda t: t.repeat(2), "has shape"),
        ("site.blocks.0.attn.operand_scale", lambda t: t[1:], "operand_scale"),
        ("float.pos_embed", lambda t: t[:, 1:], "'pos_embed'.* has shape"),
        ("float.pos_embed", lambda t: t.half(), "pos_embed.* torch.float16"),
        ("float.pos_embed", None, "lacks pos_embed"),
        ("site.head.bias", None, "lacks 'site.head.bias'"),
    ],
)
def test_tensors_that_do_not_fit(broken, name, change, match):
    folder, config, file = broken
    tensors = load_file(file)
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = change(value).contiguous()
    rewrite_tensors(folder, config, tensors)
    refused(folder, match)


@pytest.mark.parametrize(
    ("name", "match"), [("site.head.spare", "does not mention"), ("float.spare", "floats has spare")]
)
def test_tensors_left_over(broken, name, match):
    folder, config, file = broken
    rewrite_tensors(folder, config, load_file(file) | {name: torch.zeros(1)})
    refused(folder, match)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("architecture", "vit_that_nobody_made", "which timm .* lacks"),
        ("architecture", "resnet18", "resnet18 refuses|does not fit resnet18"),
        ("kwargs", {"depth": 2, "colour": "red"}, "refuses"),
        ("kwargs", VIT | {"depth": 1}, "does not fit vit_tiny_patch16_224: 'blocks.1"),
        ("kwargs", VIT | {"embed_dim": 48}, "expected \\(144, 48\\)"),
    ],
)
def test_architectures_that_do_not_fit(broken, field, value, match):
    folder, config, _ = broken
    reseal(folder, config | {field: value})
    refused(folder, match)


def test_a_config_that_has_a_pickle_loaded(broken, monkeypatch):
    """``checkpoint_path`` is timm's own argument, and old ones unpickle what it names."""
    folder, config, _ = broken
    weights = folder / "weights.pth"
    weights.write_bytes(b"never read")
    monkeypatch.setattr(timm, "create_model", None)
    kwargs = config["kwargs"] | {"checkpoint_path": str(weights)}
    reseal(folder, config | {"kwargs": kwargs})
    refused(folder, f"checkpoint_path='{weights}', expected weights=<file>")
    with pytest.raises(ValueError, match="expected weights=<file>"):
        load_float(ModelSource(config["architecture"], pretrained=False, kwargs=kwargs))


# Writing.


@pytest.mark.parametrize("victim", ["save_tensors", "_sync", "os.replace"])
@pytest.mark.parametrize("survives", [0, 1])
def test_interrupted_write_leaves_the_old_checkpoint(saved, broken, monkeypatch, victim, survives):
    folder = broken[0]
    _, state, _ = make("vit-w3-error")
    owner = os if victim.startswith("os.") else checkpoint
    name, calls = victim.removeprefix("os."), []
    original = getattr(owner, name)

    def fail(*args, **kwargs):
        if len(calls) == survives:
            raise OSError("disk full")
        calls.append(1)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        if victim == "save_tensors" and survives:
            checkpoint.save(folder.parent / "elsewhere", state)  # uses up the call that succeeds
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(folder, state, overwrite=True)
    assert torch.equal(vitq.load(folder)(saved[2]), saved[1])
    assert len(list(folder.iterdir())) == 2, "nothing temporary is left"
    checkpoint.save(folder, state, overwrite=True)
    assert checkpoint.read_config(folder).sites["head"].weight.bits == 3
    assert len(list(folder.iterdir())) == 2, "the old tensors are gone"


def test_rewriting_the_same_state_changes_nothing(broken):
    folder = broken[0]
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    state, _ = checkpoint.load_state(folder)
    checkpoint.save(folder, state, overwrite=True)
    assert {f.name: f.read_bytes() for f in folder.iterdir()}.keys() == before.keys()
    assert torch.equal(vitq.load(folder)(minmax.images(vitq.load(folder))), vitq.load(folder)(minmax.images(make()[0])))


def test_who_saves_into_one_folder_takes_turns(tmp_path, monkeypatch):
    """Else one removes the tensors of the other, whose config stays."""
    state, write, busy = make()[1], checkpoint._write, []

    def watched(folder, *rest):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy.append(folder)
        finally:
            os.close(handle)
        return write(folder, *rest)

    monkeypatch.setattr(checkpoint, "_write", watched)
    vitq.save(tmp_path / "out", state)
    assert busy == [tmp_path / "out"]
    vitq.save(tmp_path / "out", state, overwrite=True)
    assert len(busy) == 2


def test_what_may_not_be_replaced(saved, tmp_path):
    _, state, _ = make()
    with pytest.raises(CheckpointError, match="expected a new folder"):
        vitq.save(saved[0], state)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="is a file"):
        vitq.save(tmp_path / "file", state, overwrite=True)
    (tmp_path / "config.json").write_text('{"architectures": ["somebody else\'s"]}')
    with pytest.raises(CheckpointError, match="not overwritten"):
        vitq.save(tmp_path, state, overwrite=True)
    assert "somebody" in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metrics": {"sqnr": float("inf")}}, "state.metrics holds what JSON cannot"),
        ({"recipe": {"x": torch.zeros(1)}}, "state.recipe holds what JSON cannot"),
        ({"data": {}}, "data.input_size"),
        ({"data": {"input_size": (3, 4, 4), "mean": (0,), "std": (1,), "num_classes": 2, "zoom": 1}}, "data.zoom"),
    ],
)
def test_states_that_cannot_be_written(tmp_path, changes, match):
    _, state, _ = make()
    with pytest.raises(CheckpointError, match=match):
        vitq.save(tmp_path / "c", dataclasses.replace(state, **changes))
    assert not (tmp_path / "c").exists()


def test_a_state_that_nothing_could_load(tmp_path):
    _, state, _ = make()
    with pytest.raises(CheckpointError, match=r"not of the model that .*'depth': 3.*blocks.2.*pass kwargs="):
        vitq.save(tmp_path / "c", dataclasses.replace(state, kwargs=VIT | {"depth": 3}))
    with pytest.raises(CheckpointError, match="pass kwargs="):
        vitq.save(tmp_path / "c", dataclasses.replace(state, kwargs={}))
    with pytest.raises(CheckpointError, match=r"which timm .* lacks"):
        vitq.save(tmp_path / "c", dataclasses.replace(state, architecture="ViTOfMyOwn"))
    assert not (tmp_path / "c").exists()


def test_a_calibrated_model_knows_its_images(tmp_path):
    model = minmax.spread(timm.create_model("vit_tiny_patch16_224", **VIT))
    done = calibrate(model, minmax.images(model), "minmax-w8a8", kwargs=VIT)
    assert done.state.data == state_data(model)
    assert vitq.save(tmp_path / "c", done.state).data.input_size == (3, 32, 32)
