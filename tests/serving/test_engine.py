"""The engine: the model's bits whatever the batch, and every request answered or refused by name, whatever happens."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from loopback import SIZE, SMALL, quantized, random_images
from vitq import Engine, checkpoint
from vitq.bench import environment
from vitq.convert import to_integer
from vitq.serving.engine import Closed, DeadlineExceeded, Overloaded, WorkerFailed

SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
MODELS = {
    "dynamic, subspace": ("vit_tiny_patch16_224", "vitq-w4a8", SMALL),
    "static": ("vit_tiny_patch16_224", "minmax-w8a8", SMALL),
    "windows": ("swin_tiny_patch4_window7_224", "vitq-w4a8", {**SWIN, "num_classes": 7}),
    "bits per token": ("vit_tiny_patch16_224", "pmq-patchwise", SMALL),
}


def floating(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(SMALL | kwargs)).eval()


def replaced(engine: Engine, run) -> None:
    """Every worker computes with ``run``, which is given what was there before."""
    engine.served = replace(engine.served, runners=tuple(lambda x, r=r: run(r, x) for r in engine.served.runners))


class Gate:
    """A model that waits until it is let through."""

    def __init__(self, engine: Engine) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        replaced(engine, self.run)

    def run(self, before, images):
        self.entered.set()
        assert self.open.wait(20)
        return before(images)


THREADS = """
import sys, time
from pathlib import Path
import torch
from vitq import Engine, checkpoint

def count():
    return len(list(Path("/proc/self/task").iterdir()))

def settled(most):  # a thread that was joined leaves the list a moment later
    end = time.monotonic() + 10
    while count() > most and time.monotonic() < end:
        time.sleep(0.01)
    return count()

torch.set_num_threads(3)  # makes threads that are not OpenMP's
folder, images, start = sys.argv[1], torch.randn(8, *map(int, sys.argv[2:])), count()
with Engine(folder, threads=3, buckets=(8,)) as busy:
    made = settled(start + 1)
    busy(images)
    ran = count()
    busy.swap(folder)
    swapped = settled(ran)
    with Engine(folder, threads=3, keep_threads=False, buckets=(8,)) as rare:
        rare(images)
        beside = settled(ran + 1)
torch.randn(1 << 20).exp()  # as anybody's would
print(made - start, ran - start, swapped - start, beside - start, settled(start + 2) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to count threads in")
def test_only_workers_keep_openmp_threads(folders):
    """Others, idle, would have libgomp put the workers' to sleep between parallel loops."""
    command = [sys.executable, "-c", THREADS, str(folders[0]), *map(str, SIZE)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == ["1", "3", "3", "4", "2"], found


@pytest.mark.parametrize("backend", ["cpu", "ref"])
@pytest.mark.parametrize("case", MODELS)
def test_an_image_has_the_same_logits_in_every_batch_and_beside_padding(case, backend):
    architecture, recipe, kwargs = MODELS[case]
    state = quantized(0, recipe, architecture, **kwargs)
    model = to_integer(timm.create_model(architecture, **kwargs).eval(), state, backend)
    images = random_images(8)
    images[3] *= 50  # its range is not its neighbours'
    with torch.inference_mode():
        alone = torch.cat([model(image[None]) for image in images])
        for b in range(2, 9):
            assert torch.equal(model(images[:b]), alone[:b]), b
            padded = torch.cat([images[:b], torch.zeros(8 - b, *SIZE)])
            assert torch.equal(model(padded)[:b], alone[:b]), b


def test_a_model_whose_logits_depend_on_the_batch_is_found():
    class Normalizing(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.num_classes = model, model.num_classes
            self.pretrained_cfg = {**model.pretrained_cfg, "input_size": SIZE}

        def forward(self, x):
            return self.model(x / x.abs().max())

    with Engine(Normalizing(floating()).eval(), buckets=(1, 4)) as engine:
        assert not engine.served.invariant


def test_any_mix_of_requests_gets_the_bits_of_the_model(engine, references):
    assert engine.served.invariant
    sizes = [1, 3, 8, 2, 1, 5, 7, 1, 1, 4] * 3
    requests = [random_images(b, seed) for seed, b in enumerate(sizes)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(engine, requests))
    for images, logits in zip(requests, answers):
        assert torch.equal(logits, references[0](images))
    now = engine.snapshot()
    assert (now.requests, now.images, now.queue_depth, now.failed) == (len(sizes), sum(sizes), 0, 0)
    assert now.batches < len(sizes), "some were computed together"
    assert 0 < now.latency_ms["p50"] <= now.latency_ms["p95"] <= now.latency_ms["p99"]
    assert now.queue_ms["p99"] <= now.latency_ms["p99"]


def test_who_has_an_answer_finds_it_counted(engine):
    gate, seen = Gate(engine), []
    answer = engine.submit(random_images(2))
    answer.add_done_callback(lambda _: seen.append(engine.snapshot()))  # before anybody else can
    gate.open.set()
    answer.result(20)
    engine.close()
    assert [(now.requests, now.images, now.batches) for now in seen] == [(1, 2, 1)]


def test_what_waits_is_batched_up_to_the_largest_bucket(engine):
    gate = Gate(engine)
    first = engine.submit(random_images(1))
    assert gate.entered.wait(20)
    rest = [engine.submit(random_images(3, i)) for i in range(6)]
    assert engine.snapshot().queue_depth == 18
    gate.open.set()
    assert first.result().batch == 1
    assert [f.result().batch for f in rest] == [6] * 6, "two requests of three fit into eight"


def test_replicas_work_side_by_side(folders, references):
    with Engine(folders[0], replicas=2, threads=1, buckets=(1, 2), max_delay=0) as engine:
        both = threading.Barrier(2, timeout=20)

        def run(before, images):
            both.wait()
            return before(images)

        replaced(engine, run)
        answers = [engine.submit(random_images(2, i)) for i in range(4)]
        for i, answer in enumerate(answers):
            assert torch.equal(answer.result(20).logits, references[0](random_images(2, i)))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here")
@pytest.mark.parametrize("allowed", [{2, 5}, {2, 5, 7, 8}])
def test_workers_are_pinned_where_all_cores_are_theirs(folders, monkeypatch, allowed):
    """Engines beside one another, each with a part of the cores, would all take the first ones."""
    pinned = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: pinned.append(tuple(cores)))
    with Engine(folders[0], replicas=2, threads=1, buckets=(1,)) as engine:
        assert engine(random_images(1)).shape == (1, 7)
    assert sorted(pinned) == ([(2,), (5,)] if len(allowed) == 2 else [])


def test_threads_keep_to_the_time_that_a_container_has(tmp_path, monkeypatch):
    def group(version, files, path="/pod/box"):
        own, mount = tmp_path / version / "own", tmp_path / version
        for name, text in files.items():
            (mount / name).parent.mkdir(parents=True, exist_ok=True)
            (mount / name).write_text(text)
        own.write_text(f"0::{path}\n" if version == "v2" else f"4:memory:/x\n2:cpu,cpuacct:{path}\n0::/\n")
        return sorted(environment._quotas(own, mount))

    assert group("v2", {"pod/cpu.max": "250000 100000\n", "pod/box/cpu.max": "max 100000\n"}) == [2.5]
    assert group("v2", {"cpu.max": "50000 100000\n"}, "/of/the/host") == [0.5]
    folder = "cpu,cpuacct/pod/box"
    assert group("v1", {f"{folder}/cpu.cfs_quota_us": "300000\n", f"{folder}/cpu.cfs_period_us": "100000\n"}) == [3.0]
    assert group("v1", {f"{folder}/cpu.cfs_quota_us": "-1\n"}) == []
    assert list(environment._quotas(tmp_path / "none", tmp_path)) == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for quotas, cores in (((), 64), ((2.5, 8.0), 3), ((0.5,), 1), ((100.0,), 64)):
        monkeypatch.setattr(environment, "_quotas", lambda quotas=quotas: iter(quotas))
        assert environment.cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here")
def test_workers_that_may_not_be_pinned_work(folders, monkeypatch, caplog):
    def forbidden(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    made = []
    maker = threading.Thread(
        target=lambda: made.append(Engine(folders[0], replicas=2, threads=1, buckets=(1,))), daemon=True
    )
    maker.start()
    maker.join(60)
    assert made
    with made[0] as engine:
        assert engine(random_images(1)).shape == (1, 7)
    assert caplog.text.count("is not pinned to cores") == 2


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        ([[0.0]], TypeError, "images is list"),
        (torch.zeros(1, *SIZE, dtype=torch.float64), ValueError, "images has dtype torch.float64"),
        (torch.zeros(1, *SIZE, dtype=torch.uint8), ValueError, "images has dtype torch.uint8"),
        (torch.zeros(*SIZE), ValueError, r"images has shape \(3, 16, 16\), expected \(1..8, 3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 17), ValueError, "images has shape"),
        (torch.zeros(0, *SIZE), ValueError, "images has shape"),
        (torch.zeros(9, *SIZE), ValueError, "images has shape"),
        (torch.full((1, *SIZE), float("nan")), ValueError, "images has NaN or Inf"),
        (torch.full((1, *SIZE), float("-inf")), ValueError, "images has NaN or Inf"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(engine, images, kind, message):
    with pytest.raises(kind, match=message):
        engine.submit(images)
    assert engine.snapshot().queue_depth == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buckets": ()}, "buckets is"),
        ({"buckets": (1, 0)}, "buckets has 0"),
        ({"replicas": 0}, "replicas has 0"),
        ({"threads": -1}, "threads has -1"),
        ({"max_queue": 4}, "buckets is .* with max_queue=4"),
        ({"max_delay": -1.0}, "max_delay is -1.0"),
        ({"max_delay": float("nan")}, "max_delay is nan"),
    ],
)
def test_arguments_that_cannot_be(folders, arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine(folders[0], **arguments)


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("faster_rcnn_shapes", "a Detector, which takes images and finds boxes"),
        ("point_mae_primitives", "takes clouds"),
    ],
)
def test_what_gives_no_logits_of_images_is_refused(name, takes):
    with pytest.raises(ValueError, match=f"checkpoint is of .*{takes}, expected a model of images to class logits"):
        Engine(timm.create_model(name).eval())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there_is_refused(folders):
    for do in (checkpoint.load, Engine):
        with pytest.raises(ValueError, match="device is 'cuda', expected cpu or one of 0 CUDA devices"):
            do(folders[0], device="cuda")
        with pytest.raises(ValueError, match="device is 'tpu:x', expected cpu, cuda or"):
            do(folders[0], device="tpu:x")


def test_a_full_queue_refuses_and_says_when_to_come_back(engine, references):
    engine(random_images(1))  # so that the engine knows how long an image takes
    gate = Gate(engine)
    answers = [engine.submit(random_images(1))]
    assert gate.entered.wait(20)
    answers += [engine.submit(random_images(8, i)) for i in range(8)]
    with pytest.raises(Overloaded, match="the queue holds 64 images") as refusal:
        engine.submit(random_images(1))
    assert 0 < refusal.value.retry_after < 60
    gate.open.set()
    for i, answer in enumerate(answers[1:]):
        assert torch.equal(answer.result(20).logits, references[0](random_images(8, i)))
    assert engine.snapshot().overloaded == 1
    assert engine(random_images(1)).shape == (1, 7)


def test_a_request_past_its_deadline_is_not_computed(engine):
    gate = Gate(engine)
    first = engine.submit(random_images(1))
    assert gate.entered.wait(20)
    late, patient = engine.submit(random_images(1), timeout=0.01), engine.submit(random_images(1), timeout=60)
    time.sleep(0.02)
    gate.open.set()
    with pytest.raises(DeadlineExceeded, match=r"not begun within 0\.010 s"):
        late.result(20)
    assert patient.result(20).logits.shape == first.result(20).logits.shape
    assert engine.snapshot().expired == 1
    with pytest.raises(ValueError, match="timeout is 0"):
        engine.submit(random_images(1), timeout=0)


def test_what_is_past_its_deadline_takes_no_room_from_others(engine):
    gate = Gate(engine)
    first = engine.submit(random_images(1))
    assert gate.entered.wait(20)
    late = [engine.submit(random_images(8), timeout=0.01) for _ in range(8)]
    time.sleep(0.02)
    fresh = engine.submit(random_images(1))
    for answer in late:
        with pytest.raises(DeadlineExceeded):
            answer.result(0)
    gate.open.set()
    assert fresh.result(20).logits.shape == first.result(20).logits.shape
    assert (engine.snapshot().expired, engine.snapshot().overloaded) == (8, 0)


def test_a_cancelled_request_is_not_computed(engine):
    gate = Gate(engine)
    first = engine.submit(random_images(1))
    assert gate.entered.wait(20)
    gone, stays = engine.submit(random_images(2)), engine.submit(random_images(3))
    assert gone.cancel()
    gate.open.set()
    assert stays.result(20).batch == 3
    assert first.result(20).batch == 1


def test_a_request_on_which_the_model_fails_does_not_harm_its_neighbours(engine, references):
    gate = Gate(engine)
    first = engine.submit(random_images(1))
    assert gate.entered.wait(20)

    def run(before, images):
        if (images == 9).any():
            raise ArithmeticError("nine")
        return before(images)

    answers = [engine.submit(x) for x in (random_images(2, 1), torch.full((1, *SIZE), 9.0), random_images(2, 2))]
    before = engine.served
    replaced(engine, run)
    gate.open.set()
    first.result(20)
    assert torch.equal(answers[0].result(20).logits, references[0](random_images(2, 1)))
    assert torch.equal(answers[2].result(20).logits, references[0](random_images(2, 2)))
    with pytest.raises(ArithmeticError, match="nine"):
        answers[1].result(20)
    assert engine.snapshot().failed == 1
    engine.served = before


def test_workers_killed_under_load_lose_no_request(folders, references):
    """Every twentieth request takes the first worker down that computes it, together with what is in its batch."""
    requests = [random_images(1, i) for i in range(200)]
    deadly = {float(images[0, 0, 0, 0]) for images in requests[::20]}

    def run(before, images):
        logits = before(images)
        if found := deadly & set(images[:, 0, 0, 0].tolist()):
            deadly.difference_update(found)
            raise SystemExit
        return logits

    with Engine(folders[0], replicas=2, threads=1, buckets=(1, 2, 4), max_queue=512) as engine:
        replaced(engine, run)
        answers = [engine.submit(images) for images in requests]
        for images, answer in zip(requests, answers):
            assert torch.equal(answer.result(60).logits, references[0](images))
        now = engine.snapshot()
    assert (now.restarts, now.failed, now.requests) == (10, 0, 200)


def test_a_request_that_kills_workers_is_given_up(engine):
    def run(before, images):
        if (images == 9).any():
            raise SystemExit
        return before(images)

    replaced(engine, run)
    with pytest.raises(WorkerFailed, match="2 workers died"):
        engine(torch.full((1, *SIZE), 9.0))
    assert engine(random_images(1)).shape == (1, 7)
    assert engine.snapshot().restarts == 2


def test_swapping_under_load_drops_nothing_and_mixes_nothing(engine, folders, references):
    stop, answers = threading.Event(), []

    def load(seed):
        while not stop.is_set():
            images = random_images(1 + seed, len(answers))
            answers.append((images, engine.submit(images).result(20)))

    threads = [threading.Thread(target=load, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for i in (1, 0, 1):
        engine.swap(folders[i])
        images = random_images(2)
        assert torch.equal(engine(images), references[i](images)), "from the return of swap on"
    stop.set()
    for thread in threads:
        thread.join(20)
    assert {answer.version for _, answer in answers} >= {1, 2, 3}
    for images, answer in answers[:: max(1, len(answers) // 100)]:
        assert torch.equal(answer.logits, references[(answer.version + 1) % 2](images))
    assert engine.snapshot().failed == 0


def test_a_checkpoint_that_cannot_replace_the_one_that_is_served(engine, references, tmp_path):
    other = floating(num_classes=8)
    with pytest.raises(ValueError, match="num_classes 8, expected 7"):
        engine.swap(other)
    with pytest.raises(ValueError, match="no such folder"):
        engine.swap(tmp_path / "nothing")
    assert torch.equal(engine(random_images(1)), references[0](random_images(1)))
    assert engine.snapshot().version == 1


def test_requests_wait_while_the_device_is_to_be_left_alone(engine, monkeypatch):
    gate = Gate(engine)
    first = engine.submit(random_images(1))
    assert gate.entered.wait(20)
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    pausing = threading.Thread(target=engine._pause)
    pausing.start()
    second = engine.submit(random_images(1))
    time.sleep(0.05)
    assert pausing.is_alive(), "a batch is running"
    gate.open.set()
    pausing.join(20)
    assert first.done()
    assert not second.done()
    with engine._changed:
        engine._paused = False
        engine._changed.notify_all()
    assert second.result(20).batch == 1


def test_closing_answers_what_was_accepted(folders, references):
    engine = Engine(folders[0], buckets=(1, 2), max_queue=64)
    answers = [engine.submit(random_images(1, i)) for i in range(50)]
    engine.close()
    for i, answer in enumerate(answers):
        assert torch.equal(answer.result(0).logits, references[0](random_images(1, i)))
    with pytest.raises(Closed):
        engine.submit(random_images(1))
    engine.close()


def test_closing_gives_up_what_does_not_end_in_time(engine):
    gate = Gate(engine)
    first = engine.submit(random_images(1))
    assert gate.entered.wait(20)
    second = engine.submit(random_images(1))
    engine.close(0.05)
    with pytest.raises(Closed):
        second.result(0)
    gate.open.set()
    assert first.result(20).batch == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu(folders):
    images = random_images(21)
    with Engine(folders[0], device="cuda", dtype=torch.float16, replicas=2, buckets=(1, 4, 8)) as engine:
        requests = [images[:1], images[1:4], images[4:12], images[12:13], images[13:21]]
        before = [engine.submit(x) for x in requests]
        for answer in before:
            assert answer.result(60).logits.isfinite().all()
        again = [engine.submit(x) for x in requests]
        engine.swap(folders[0])
        for one, other in zip(before, again):
            if engine.served.invariant:
                assert torch.equal(one.result().logits, other.result(60).logits)
