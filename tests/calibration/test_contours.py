"""Contours: bits, independence of what is asked for, classes that differ where they should, nuisances that bite."""

import hashlib
from dataclasses import fields

import pytest
import timm
import torch
from vitq.data import load_calibration, load_data, splits
from vitq.data.contours import (
    CLASSES,
    CLEAN,
    CONTOUR_SET,
    CONTOURS,
    COUNTS,
    FILLS,
    HARD,
    MEAN,
    SIZE,
    STD,
    Nuisance,
    descriptors,
    images,
)

NONE = CLEAN.times(0.0)


def only(**limits: float) -> Nuisance:
    return Nuisance(**{f.name: limits.get(f.name, 0.0) for f in fields(Nuisance)})


@pytest.mark.parametrize(
    ("split", "digest"), [("train", "b350b1eff63b525a"), ("test", "cac9f209ba3949cb"), ("hard", "a91474664e60ad0b")]
)
def test_pixels_are_the_ones_that_published_figures_refer_to(split, digest):
    pixels = (images(split, torch.arange(200))[0] * 255).round().to(torch.uint8)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16] == digest


def test_an_image_is_a_function_of_split_and_index_alone():
    whole, labels = images("test", torch.arange(130))
    index = torch.tensor([128, 3, 64, 3])
    torch.manual_seed(5)
    some, chosen = images("test", index)
    assert torch.equal(some, whole[index])
    assert torch.equal(chosen, labels[index])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        assert torch.equal(images("test", index)[0], some)
    finally:
        torch.set_num_threads(threads)


def test_splits_are_disjoint_balanced_and_on_the_8_bit_grid():
    seen = set()
    for split in ("train", "test", "hard"):
        pixels, labels = images(split, torch.arange(80))
        assert pixels.shape == (80, 3, SIZE, SIZE)
        assert pixels.dtype == torch.float32
        assert labels.bincount().tolist() == [2] * CLASSES
        assert pixels.min() >= 0
        assert pixels.max() <= 1
        assert ((pixels * 255) - (pixels * 255).round()).abs().max() < 1e-4
        seen |= {image.numpy().tobytes() for image in pixels}
    assert len(seen) == 240


def test_training_images_go_on_beyond_the_split():
    assert images("train", torch.tensor([2**31 - 1]))[0].std() > 0.05


def test_hard_is_the_test_scene_under_stronger_nuisances():
    index = torch.arange(200)
    assert torch.equal(images("hard", index)[0], images("test", index, HARD)[0])
    assert all(getattr(HARD, f.name) > getattr(CLEAN, f.name) for f in fields(Nuisance))
    # Without nuisances both splits are one.
    assert torch.equal(images("hard", index, NONE)[0], images("test", index, NONE)[0])


def test_contours_are_ten_closed_curves_in_near_pairs():
    curves = descriptors()
    assert curves.shape[0] == CONTOURS
    angle = torch.arange(256, dtype=torch.float64) * (2 * torch.pi / 256)
    orders = torch.arange(2, 2 + curves.shape[1], dtype=torch.float64)
    radius = 1 + (curves[:, :, None] * torch.exp(1j * orders[:, None] * angle)).real.sum(1)
    assert radius.min() > 0.05
    # The mean square distance of two curves is that of their descriptors, by Parseval.
    distance = (radius[:, None] - radius).square().mean(2)
    assert torch.allclose(distance, (curves[:, None] - curves).abs().square().sum(2) / 2, atol=1e-12)
    pair = torch.arange(CONTOURS) // 2
    same = (pair[:, None] == pair) & ~torch.eye(CONTOURS, dtype=torch.bool)
    assert distance[same].max() < distance[pair[:, None] != pair].min() / 2
    assert distance[same].min() > 1e-3


def test_figure_covers_the_area_of_its_contour():
    """Without nuisances, on the brightness that only the figure has."""
    index = torch.arange(0, CLASSES * 20)
    pixels, labels = images("test", index, NONE)
    curves = descriptors()
    for contour in range(CONTOURS):
        mine = pixels[labels // FILLS == contour].double().mean(1)
        ground = mine[:, 0, 0, None, None]
        share = ((mine - ground).abs() > 0.02).double().mean((1, 2))
        # Area of r(θ) = 1 + Σ Re c e^{ikθ}: π(1 + Σ|c|²/2), in units of the figure's squared radius, 0.58² on average.
        area = torch.pi * (1 + curves[contour].abs().square().sum() / 2) * 0.58**2 / 4
        assert share.mean() == pytest.approx(float(area), rel=0.25)


def test_class_decides_what_is_seen_and_nothing_else_does_without_nuisances():
    """Nearest mean of the grey profile tells the clean classes apart; under shuffled labels it cannot."""
    pixels, labels = images("train", torch.arange(CLASSES * 30), NONE)
    grey = pixels.double().mean(1).flatten(1)
    grey = (grey - grey.mean(1, keepdim=True)) / grey.std(1, keepdim=True)
    train, test = grey[: CLASSES * 20], grey[CLASSES * 20 :]

    def accuracy(by: torch.Tensor) -> float:
        means = torch.stack([train[by[: len(train)] == c].mean(0) for c in range(CLASSES)])
        return float((torch.cdist(test, means).argmin(1) == labels[len(train) :]).double().mean())

    assert accuracy(labels) > 0.95
    assert accuracy(labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]) < 0.1


@pytest.mark.parametrize("name", [f.name for f in fields(Nuisance)])
def test_every_nuisance_changes_images_and_more_so_when_stronger(name):
    index = torch.arange(80)
    clean, strength = images("test", index, NONE)[0], getattr(CLEAN, name)
    change = [(images("test", index, only(**{name: f * strength}))[0] - clean).abs().mean() for f in (0.5, 1.0)]
    assert 5e-5 < change[0] < change[1]


def test_noise_has_the_drawn_deviation():
    index = torch.arange(400)
    difference = images("test", index, only(noise=0.05))[0] - images("test", index, NONE)[0]
    deviation = difference.flatten(1).std(1)
    assert deviation.max() < 0.052
    assert deviation.mean() == pytest.approx(0.65 * 0.05, rel=0.1)


@pytest.fixture(scope="module")
def model():
    overlay = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD}
    with torch.device("meta"):
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=CLASSES, pretrained_cfg_overlay=overlay
        )


def test_loading(model):
    assert splits("contours") == ("test", "hard")
    assert splits("some/folder") == ("test",)
    data = load_data("contours", "hard", model, 12, seed=1)
    index = torch.randperm(COUNTS["hard"], generator=torch.Generator().manual_seed(1))[:12].sort().values
    pixels, labels = images("hard", index)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    assert torch.equal(data.tensors[0], (pixels - mean) / std)
    assert torch.equal(data.tensors[1], labels)
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'test', 'hard'\), got 'val'"):
        load_data("contours", "val", model)
    with pytest.raises(ValueError, match="limit must be between 1 and 2000, the images in split 'test' of the con"):
        load_data("contours", "test", model, 2001)


def test_calibration(model):
    plain, mixed = (load_calibration("contours", model, 24, seed=2, augment=f) for f in (0.0, 0.5))
    assert plain.shape == (24, 3, SIZE, SIZE)
    assert ((plain != mixed).flatten(1).any(1)).sum() == 12
    train = {image.numpy().tobytes() for image in CONTOUR_SET.calibration(24, 2, mean=MEAN, std=STD)}
    assert {image.numpy().tobytes() for image in plain} == train
    assert len(train) == 24
    with pytest.raises(ValueError, match="n must be between 1 and 50000"):
        load_calibration("contours", model, 50_001)
