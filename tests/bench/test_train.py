"""The trainer: it learns, repeats itself, goes on where it was interrupted, and writes what the bench reads."""

import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vitq.data import contours, digits
from vitq.models import digits_vit
from vitq.sources import ModelSource, load_float

from bench import train
from bench.models import MODELS, Trained

FEW = replace(MODELS["digits"], images=16 * 12, batch=16, drop_path=0.2)


@pytest.fixture
def two_classes(monkeypatch):
    """Thirty-two digits of two classes: the head's bias alone learns fast."""
    images, labels = digits.images("train", torch.arange(digits.COUNTS["train"]))
    few = (labels < 2).nonzero().squeeze(1)[:32]
    monkeypatch.setattr(train.digits, "images", lambda split, index: (images[few], labels[few]))
    monkeypatch.setattr(train.digits, "COUNTS", {"train": 32})
    monkeypatch.setattr(train, "EVERY", 4)


def weights(trained, checkpoint):
    return train.fit(trained, 1, checkpoint).state_dict()


def test_it_learns_and_the_same_seed_gives_the_same_weights(two_classes, tmp_path, capsys):
    first, second = (weights(FEW, tmp_path / name) for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [float(line.split("loss ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6
    assert losses[2] < losses[0] - 0.3


def test_an_interrupted_training_gives_the_weights_of_an_uninterrupted_one(two_classes, tmp_path, monkeypatch):
    whole = weights(FEW, tmp_path / "whole")
    batches = train.digits_batches

    def broken(*arguments):
        yield from islice(batches(*arguments), 6)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(train.STREAMS, "digits", broken)
        with pytest.raises(KeyboardInterrupt):
            weights(FEW, tmp_path / "part")
    seen = []

    def counted(*arguments):
        for batch in batches(*arguments):
            seen.append(batch)
            yield batch

    monkeypatch.setitem(train.STREAMS, "digits", counted)
    resumed = weights(FEW, tmp_path / "part")
    assert len(seen) == 12 - 4
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_contours_are_new_in_every_batch_and_grow_harder():
    batches = [images for images, _ in train.contours_batches(0, 8, 0, 5)]
    assert len({image.numpy().tobytes() for batch in batches for image in batch}) == 40
    index = torch.arange(8)
    assert torch.equal(batches[0], contours.images("train", index, contours.CLEAN.times(0.0))[0])
    assert torch.equal(batches[4], contours.images("train", index + 32, contours.CLEAN.times(train.PEAK))[0])
    later = list(train.contours_batches(0, 8, 3, 5))
    assert torch.equal(later[0][0], batches[3])
    other = next(train.contours_batches(1, 8, 4, 5))[0]
    assert not torch.equal(other, batches[4])


TINY = {"channels": 16, "head_width": 16, "mask_layers": (16,), "depths": (1, 1, 1, 1), "embed_dim": 16}
TINY |= {"num_heads": (1, 1, 1, 1), "proposals": (40, 10), "image_size": (64, 64)}
DETECTOR = Trained(ModelSource("mask_rcnn_shapes", kwargs=TINY), "shapes", images=10, batch=2)


def test_detectors_learn_pixels_then_boxes(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PIXELS", 0.4)
    alone, forward = [], train.Guided.forward

    def watched(learner, images, targets, pixels_alone):
        alone.append(pixels_alone)
        assert {image.shape for image in images} == {images[0].shape}
        return forward(learner, images, targets, pixels_alone)

    monkeypatch.setattr(train.Guided, "forward", watched)
    first, second = (train.fit(DETECTOR, 1, tmp_path / name) for name in ("a", "b"))
    assert alone == [True, True, False, False, False] * 2
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert not first.training
    # A cascade that begins with its backbone and RPN, and does not learn.
    save_file(first.state_dict(), tmp_path / "start.safetensors")
    source = ModelSource("cascade_rcnn_shapes", kwargs=TINY)
    later = replace(DETECTOR, source=source, learning_rate=0.0, start=str(tmp_path / "start.safetensors"))
    cascade = dict(train.fit(later, 2, tmp_path / "c").named_parameters())
    assert alone[10:] == [False] * 5
    for name, p in first.named_parameters():
        if name.startswith(("backbone.", "rpn.")):
            assert torch.equal(cascade[name], p)


def test_command_writes_float16_weights_and_how_they_were_made(tmp_path, monkeypatch, capsys):
    model = load_float(MODELS["digits"].source)
    monkeypatch.setattr(train, "fit", lambda trained, seed, checkpoint: checkpoint.touch() or model)
    out = tmp_path / "new" / "weights.safetensors"
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", ["train", "digits", "--out", str(out), "--images", "64", "--threads", threads])
    train.main()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with safe_open(out, "pt") as file:
        assert file.metadata() == {
            "model": digits_vit.NAME,
            "command": "python -m bench.train digits --seed 0 --images 64",
        }
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert "3.62 MB, as stored: test 99.43 %, hard 87.57 %" in capsys.readouterr().out
