"""The command line: the whole path on little data, and one clear line for every kind of bad input."""

import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from vitq import checkpoint, demo
from vitq.cli import main
from vitq.models.digits_vit import NAME
from vitq.sources import ModelSource, load_float

from vitq_kernels.triton import warmup


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    assert main(["quantize", NAME, str(folder), "--recipe", "minmax-w4a4", "--images", "16", "--no-eval"]) == 0
    return folder


def failure(capsys, *argv: str) -> str:
    """Runs a command that must fail; returns its one line on stderr."""
    try:
        code = main(list(argv))
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2, (code, err)
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert "error: " in lines[0]
    return lines[0]


def figures(capsys, *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_quantize_evaluates_and_times_on_the_spot(tmp_path, capsys):
    target = tmp_path / "c"
    argv = ["quantize", NAME, str(target), "--recipe", "minmax-w4a4", "--images", "16", "--eval-images", "32"]
    record = figures(capsys, *argv, "--set", 'bits={"weights": 8, "activations": 8, "operands": 8, "softmax": 8}')
    assert [run["split"] for run in record["runs"]] == ["test", "hard"]
    for run in record["runs"]:
        assert run["agreement_simulated_integer"] == 1.0
        assert run["logit_difference_simulated_integer"] == 0.0
        assert run["images"] == 32
        assert run["average_weight_bits"] == 8
        assert run["logit_sqnr_db"] > 20
        assert run["latency_ms_integer"] > 0
    assert record["runs"][0]["size_bytes_integer"] == checkpoint.disk_bytes(target)
    assert record["runs"][0]["size_bytes_integer"] < 0.4 * record["runs"][0]["size_bytes_float"]
    assert not target.with_name("c.work").exists()
    shown = figures(capsys, "report", str(target), "-o", str(tmp_path / "r.html"))["figures"]
    assert shown["accuracy"][1]["logit SQNR dB"] == record["runs"][1]["logit_sqnr_db"]
    assert shown["latency"]["latency_ms_integer"] == record["runs"][0]["latency_ms_integer"]
    figures(capsys, "quantize", NAME, str(target), "--recipe", "minmax-w4a4", "--images", "4", "--no-eval", "--force")
    assert figures(capsys, "report", str(target), "-o", str(tmp_path / "s.html"))["figures"]["accuracy"] is None


def test_a_budget_picks_a_point_of_the_frontier(tmp_path, capsys):
    argv = ["quantize", NAME, str(tmp_path / "c"), "--recipe", "pmq-mixed", "--images", "4", "--no-eval"]
    figures(capsys, *argv, "--budget", "size=0.17")
    metrics = checkpoint.load_state(tmp_path / "c")[0].metrics
    frontier = metrics["frontier"]
    assert metrics["calibration_s"] > 0
    assert frontier["budget"] == {"size": 0.17}
    assert 0.15 < frontier["points"][frontier["picked"]]["size"] <= 0.17
    whole = json.loads((tmp_path / "c" / "frontier.json").read_text())
    assert len(whole["points"]) > 20
    assert whole["points"][whole["picked"]] == frontier["points"][0]
    with Image.open(tmp_path / "c" / "frontier.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 800)
    page = tmp_path / "new" / "report.html"
    assert figures(capsys, "report", str(tmp_path / "c"), "-o", str(page))["page_bytes"] == page.stat().st_size
    assert f"{len(whole['points'])} points" in page.read_text()
    assert "exists already" in failure(capsys, "report", str(tmp_path / "c"), "-o", str(page))
    figures(capsys, *argv, "--force", "--recipe", "pack-ptq-w4a4", "--set", "reconstruct=[]")
    with Image.open(tmp_path / "c" / "packs.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 800)
    assert not list((tmp_path / "c").glob("frontier.*"))
    figures(capsys, *argv, "--force", "--recipe", "minmax-w4a4")
    assert not list((tmp_path / "c").glob("*.png"))


def test_eval_of_a_checkpoint(quantized, capsys):
    record = figures(capsys, "eval", str(quantized), "--split", "test", "--limit", "32")
    rows = {row["mode"]: row for row in record["rows"]}
    assert set(rows) == {"float", "simulated", "integer"}
    assert rows["integer"]["agreement_simulated"] == 1.0
    assert rows["float"]["sqnr_db"] is None
    assert rows["integer"]["sqnr_db"] == rows["simulated"]["sqnr_db"]
    for backend in ("ref", "cpu"):
        only = figures(capsys, "eval", str(quantized), "--limit", "32", "--backend", backend)["rows"]
        assert only[1]["sqnr_db"] == only[2]["sqnr_db"]
        assert only[2]["sqnr_db"] == pytest.approx(rows["integer"]["sqnr_db"], abs=0.5)


def test_bench_of_a_checkpoint_and_of_an_architecture(quantized, capsys):
    record = figures(capsys, "bench", str(quantized), "--batch", "1,2", "--seconds", "0.01")
    assert [(row["model"], row["batch"]) for row in record["rows"]] == [
        ("float32", 1), ("minmax-w4a4", 1), ("float32", 2), ("minmax-w4a4", 2)
    ]  # fmt: skip
    assert record["rows"][1]["model_bytes"] < record["rows"][0]["model_bytes"] / 4
    argv = ["bench", NAME, "--random-weights", "--recipe", "minmax-w4a4", "--batch", "1", "--seconds", "0.01"]
    rows = figures(capsys, *argv, "--dtype", "bfloat16")["rows"]
    assert [(row["model"], row["device"]) for row in rows] == [("bfloat16", "cpu"), ("minmax-w4a4", "cpu")]


def test_a_profile_is_of_a_processor(capsys, monkeypatch):
    monkeypatch.setattr("vitq.commands._device", torch.device)
    assert "--profile is given with --device cuda" in failure(capsys, "bench", NAME, "--device", "cuda", "--profile")


def test_list_models(capsys):
    assert main(["list-models", "*t*_tiny_patch16_224", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert rows["deit_tiny_patch16_224"]["verdict"] == "integer"
    assert rows["deit_tiny_patch16_224"]["attention"] == 1.0
    assert rows["deit_tiny_patch16_224"]["weights"] > 0.95
    assert main(["list-models", "cait_xxs24_224", "--json"]) == 0
    (cait,) = json.loads(capsys.readouterr().out)["models"]
    assert (cait["verdict"], cait["attention"]) == ("partly", 0.0)
    assert any("talking heads" in reason for reason in cait["reasons"])
    assert main(["list-models", "visformer_tiny"]) == 0
    assert "no adapter" in "".join(capsys.readouterr().out.split("\n"))
    assert main(["list-models", "resnet18"]) == 2
    assert "pattern is 'resnet18'" in capsys.readouterr().err


def test_info(quantized, capsys):
    record = figures(capsys, "info")
    assert record["backends"]["ref"] == "live"
    assert "minmax" in record["recipes"]
    record = figures(capsys, "info", str(quantized))
    assert record["architecture"] == NAME
    assert len(record["integer"]) > 25
    assert record["bytes"] < record["float_bytes"] / 4


def test_demo_writes_summary_and_picture(tmp_path):
    seen = []
    summary = demo.run(tmp_path, lambda *step: seen.append(step), recipes=("minmax-w4a4",), limit=16)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {(r["variant"], r["split"]) for r in summary["runs"]} == {
        (variant, split) for variant in ("plain", "outlier") for split in ("test", "hard")
    }
    assert all(r["agreement_simulated_integer"] == 1.0 for r in summary["runs"])
    assert all(r["logit_difference_simulated_integer"] == 0.0 for r in summary["runs"])
    assert Image.open(tmp_path / "demo.png").size[0] > 800
    assert seen


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["quantize", "vit_of_nobody", "OUT"], "model is 'vit_of_nobody', expected an architecture of timm"),
        (["quantize", NAME, "OUT", "--recipe", "nothing"], "recipe is 'nothing', expected"),
        (["quantize", NAME, "OUT", "--set", "bits.weights"], "is not of the form key=value"),
        (["quantize", NAME, "OUT", "--recipe", "minmax-w4a4", "--set", 'bits={"weights": 1}'], "bits.weights is 1"),
        (["quantize", NAME, "OUT", "--recipe", "minmax-w4a4", "--set", "colour=3"], "colour is no field"),
        (["quantize", NAME, "OUT", "--recipe", "minmax-w4a4", "--budget", "size=1"], "no step of recipe minmax-w4a4"),
        (["quantize", NAME, "OUT", "--recipe", "pmq-mixed", "--budget", "weight=1"], "budget.weight is no field"),
        (["quantize", NAME, "OUT", "--recipe", "adalog"], "recipe adalog exists in simulation only: its levels are"),
        (["quantize", NAME, "OUT", "--recipe", "vitq-w4a"], "did you mean vitq-w4a8 or vitq-w4a4"),
        (["quantize", NAME, "OUT", "--recipe", "minmx-w4a4"], "-static or -dynamic; did you mean minmax"),
        (["quantize", NAME, "OUT", "--data", "/nowhere"], "--data is '/nowhere', expected an image folder"),
        (
            ["quantize", NAME, "OUT", "--data", "contours", "--no-eval"],
            "the contours have 40 classes, the model tells 10",
        ),
        (
            ["quantize", "deit_tiny_patch16_224", "OUT", "--random-weights"],
            "--data is missing, expected the data of deit_",
        ),
        (["quantize", NAME, "FILE", "--force"], "is a file, expected a folder"),
        (["quantize", NAME, "FOREIGN", "--force"], "is not of a vitq checkpoint, expected one: it is not overwritten"),
        (["quantize", NAME, "OUT", "--images", "0"], "'0' is not a positive whole number"),
        (
            ["quantize", NAME, "OUT", "--recipe", "minmax-w4a4", "--images", "100000"],
            "--images is 100000, expected 1 to 1097",
        ),
        (["quantize", NAME, "OUT", "--weights", "/nowhere.pth"], "weights is '/nowhere.pth', expected a file"),
        (["quantize", NAME, "OUT", "--weights", "x", "--random-weights"], "both given"),
        (["quantize", NAME, "OUT", "--model-arg", "colour=3"], "do not fit"),
        (
            ["quantize", NAME, "OUT", "--random-weights", "--model-arg", "embed_dim=100"],
            "{'embed_dim': 100} do not fit",
        ),
        (["quantize", NAME, "OUT", "--random-weights", "--model-arg", "patch_size=0"], "ZeroDivisionError"),
        (["quantize", NAME, "OUT", "--random-weights", "--model-arg", "num_heads=0"], "{'num_heads': 0} do not fit"),
        (["quantize", NAME, "OUT", "--random-weights", "--model-arg", "embed_dim=-3"], "{'embed_dim': -3} do not fit"),
        (["quantize", "resnet18", "OUT", "--random-weights"], "expected one of VisionTransformer"),
        (["quantize", "vit_tiny_patch16_224", "OUT"], "pretrained weights of vit_tiny_patch16_224 cannot be had"),
        (["eval", "/nowhere"], "/nowhere: no such folder"),
        (["bench", "/nowhere"], "model is '/nowhere', where nothing is; expected a checkpoint folder"),
        (["bench", "FOREIGN"], "is not of a vitq checkpoint"),
        (["bench", NAME, "--seconds", "-1"], "--seconds: '-1' is no number of seconds above 0"),
        (["bench", NAME, "--seconds", "nan"], "--seconds: 'nan' is no number of seconds above 0"),
        (["serve", "/nowhere", "--port", "99999"], "--port: '99999' is no port, expected 0 to 65535"),
        (["serve", "/nowhere", "--timeout", "inf"], "--timeout: 'inf' is no number of seconds above 0"),
        (["serve", "/nowhere", "--body-timeout", "nan"], "--body-timeout: 'nan' is no number of seconds above 0"),
        (["serve", "/nowhere", "--max-delay", "-1"], "--max-delay: '-1' is no number of milliseconds"),
        (["serve", "/nowhere", "--backend", "tpu"], "--backend is 'tpu', expected one of"),
        (["bench", NAME, "--batch", "1,x"], "'x' is not a positive whole number"),
        (["bench", NAME, "--device", "cuda:9"], "--device is 'cuda:9', expected cpu or one of"),
        (["bench", NAME, "--dtype", "int8"], "--dtype has 'int8', expected one of float32, "),
        (["info", "/nowhere"], "no such folder"),
        (["report", "/nowhere", "-o", "OUT"], "no such folder"),
        (["warmup", "/nowhere", "--gpu", "h200"], "/nowhere: no such folder"),
        (["warmup", "/nowhere", "--gpu", "tpu"], "gpu is 'tpu', expected one of sm_80, "),
        (["warmup", "/nowhere", "--gpu", "h100"], "fits several GPUs, expected one of NVIDIA H100"),
        (["warmup", "/nowhere", "--gpu", "h200", "--dtype", "int8"], "--dtype has 'int8', expected one of float32, "),
        (["export", "/nowhere", "--output", "OUT"], "expected .pt2"),
        (["export", "/nowhere", "--output", "OUT", "--device", "tpu"], "--device is 'tpu', expected cpu"),
        (
            ["export", "/nowhere", "--output", "OUT", "--format", "tflite"],
            "format is 'tflite', expected one of exported, aoti, onnx, triton",
        ),
        (["export", "/nowhere", "--output", "OUT", "--format", "onnx"], "expected .onnx"),
        (
            ["export", "/nowhere", "--output", "OUT.onnx", "--format", "onnx", "--dtype", "float16"],
            "dtype and device are float16 and cpu, of ONNX expected float32 and cpu",
        ),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_line(argv, said, capsys, tmp_path, monkeypatch):
    # Where there is a network there is none here, nor a cache: pretrained weights cannot be had.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    places = {"OUT": tmp_path / "out", "FILE": tmp_path / "file", "FOREIGN": tmp_path / "foreign"}
    places["FILE"].write_text("precious")
    places["FOREIGN"].mkdir()
    (places["FOREIGN"] / "config.json").write_text("{}")
    argv = [str(places.get(a, a)) for a in argv]
    assert said in failure(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_bad_input_to_eval(quantized, capsys):
    assert "--modes has 'fixed'" in failure(capsys, "eval", str(quantized), "--modes", "fixed")
    assert "--backend is 'tpu'" in failure(capsys, "eval", str(quantized), "--backend", "tpu")
    assert "--device is 'tpu'" in failure(capsys, "eval", str(quantized), "--device", "tpu")
    assert "no back end serves" in failure(capsys, "eval", str(quantized), "--modes", "integer", "--backend", "cuda")
    assert "split" in failure(capsys, "eval", str(quantized), "--split", "evening")
    assert "exists already" in failure(capsys, "quantize", NAME, str(quantized))


def test_warmup_of_a_checkpoint(quantized, capsys, monkeypatch):
    """All but the compiler, which test_warmup.py tries: what is compiled, for which GPU, and the summary."""
    aot = pytest.importorskip("vitq_kernels.triton.aot")
    built = []

    def build(launch, capability):
        built.append((launch, capability))
        return SimpleNamespace(hash=launch.kernel.__name__)

    monkeypatch.setattr(aot, "build", build)
    monkeypatch.setattr(warmup, "present", lambda: None)
    gpus = ["--gpu", "h200", "--gpu", "sm_80"]
    record = figures(capsys, "warmup", str(quantized), "--batch", "1,2", "--dtype", "float16,float32", *gpus)
    cases = [(row["gpu"], row["dtype"], row["batch"]) for row in record["rows"]]
    assert cases == list(itertools.product(("NVIDIA H200", "sm_80"), ("float16", "float32"), (1, 2)))
    assert [capability for _, capability in built] == sorted((capability for _, capability in built), reverse=True)
    assert sum(row["launches"] for row in record["rows"]) == len(built)
    assert record["kernels"] == len({launch.kernel.__name__ for launch, _ in built})
    assert "no CUDA device here; say for which" in failure(capsys, "warmup", str(quantized))


def test_export_of_a_checkpoint(quantized, capsys, tmp_path):
    file = tmp_path / "new" / "model.pt2"
    record = figures(capsys, "export", str(quantized), "--output", str(file), "--dtype", "bfloat16")
    assert record["bytes"] == file.stat().st_size
    model = checkpoint.load(quantized).to(torch.bfloat16)
    x = torch.randn(3, *model.vitq_config.data.input_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(torch.export.load(file).module()(x), model(x))
    assert "exists already; give --force" in failure(capsys, "export", str(quantized), "--output", str(file))
    assert main(["export", str(quantized), "--output", str(file), "--force", "--batch", "1"]) == 0
    program = torch.export.load(file)
    assert not program.range_constraints
    assert torch.equal(program.module()(x[:1].float()), checkpoint.load(quantized)(x[:1].float()))


@pytest.mark.slow
def test_export_of_a_checkpoint_to_onnx(quantized, capsys, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    record = figures(capsys, "export", str(quantized), "--output", str(file), "--format", "onnx")
    assert record["bytes"] == file.stat().st_size
    assert record["int4"] + record["int8"] == 4 * 6 + 2
    model = checkpoint.load(quantized)
    x = torch.randn(3, *model.vitq_config.data.input_size, generator=torch.Generator().manual_seed(0))
    logits = onnxruntime.InferenceSession(file).run(None, {"images": x.numpy()})[0]
    want = model(x)
    assert (torch.from_numpy(logits) - want).abs().max() < 0.1 * want.abs().max()
    assert "exists already; give --force" in failure(
        capsys, "export", str(quantized), "--output", str(file), "--format", "onnx"
    )


def test_damaged_checkpoint(quantized, capsys, tmp_path):
    for file in quantized.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    assert "truncated" in failure(capsys, "eval", str(tmp_path))


def test_bad_image_folder(quantized, capsys, tmp_path):
    for split in ("train", "val"):
        for name in map(str, range(10)):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "a.png")
    assert main(["eval", str(quantized), "--data", str(tmp_path), "--modes", "integer"]) == 0
    capsys.readouterr()
    whole = (tmp_path / "val" / "3" / "a.png").read_bytes()
    (tmp_path / "val" / "3" / "a.png").write_bytes(whole[:40])
    assert "a.png" in failure(capsys, "eval", str(quantized), "--data", str(tmp_path), "--modes", "integer")


def test_one_folder_does_not_both_calibrate_and_test(capsys, tmp_path):
    for name in map(str, range(10)):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (25 * int(name), 9, 9)).save(tmp_path / "data" / name / "a.png")
    argv = ["quantize", NAME, str(tmp_path / "c"), "--data", str(tmp_path / "data"), "--recipe", "minmax-w4a4"]
    assert "data/train' and" in failure(capsys, *argv)
    assert not (tmp_path / "c").exists()
    figures(capsys, *argv, "--images", "4", "--no-eval")
    assert main(["eval", str(tmp_path / "c"), "--data", str(tmp_path / "data"), "--modes", "integer"]) == 0


def test_weights_that_do_not_fit(capsys, tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"other": torch.zeros(3)}, file)
    assert "do not fit the model" in failure(capsys, "quantize", NAME, str(tmp_path / "o"), "--weights", str(file))
    for junk in (b"not a state dict", b"\x80\x02}q\x00(X", bytes(100), b"M" * 50):
        file.write_bytes(junk)
        assert "do not fit the model" in failure(capsys, "quantize", NAME, str(tmp_path / "o"), "--weights", str(file))


def test_local_weights_are_found_from_anywhere(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(load_float(ModelSource(NAME)).state_dict(), "w.pth")
    argv = ["quantize", NAME, "o", "--weights", "w.pth", "--recipe", "minmax-w4a4", "--images", "4", "--no-eval"]
    figures(capsys, *argv)
    assert checkpoint.read_config("o").source["weights"] == str(tmp_path / "w.pth")


def test_an_interruption_says_what_is_left(tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "c"
    argv = ["quantize", NAME, str(out), "--recipe", "minmax-w4a4", "--images", "4", "--eval-images", "4"]
    said = {}
    for where in ("quantize", "evaluate"):
        with monkeypatch.context() as patch:
            patch.setattr(f"vitq.jobs.{where}", stop)
            assert main(argv) == 130
        said[where] = capsys.readouterr().err
    assert "vitq: interrupted; the same command resumes where it stopped" in said["quantize"]
    assert f"vitq: interrupted; the checkpoint is written: vitq eval {out} evaluates it" in said["evaluate"]
    monkeypatch.setattr("vitq.checkpoint.load", stop)
    assert main(["info", str(out)]) == 130
    assert capsys.readouterr().err == "vitq: interrupted\n"


def test_a_page_that_cannot_be_written_leaves_the_old_one(quantized, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("the old page")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        said = failure(capsys, "report", str(quantized), "-o", str(page), "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in said
    assert "page.html" in said
    assert page.read_text() == "the old page"


def test_process_exit_code_and_streams():
    command = [sys.executable, "-m", "vitq", "info", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("vitq: error: ")
