"""Digits and image folders: splits, seeds, transforms and refusals."""

import hashlib
import re
from dataclasses import fields

import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF
from vitq.data import (
    calibration_images,
    data_config,
    evaluation_transform,
    load_calibration,
    load_data,
    load_digits,
    load_folder,
    refuse_leak,
)
from vitq.data.bundled import SIZE
from vitq.data.digits import HARD, split_indices
from vitq.data.distort import TRAIN, Distortion, distort
from vitq.models import vit_digits_patch4_32


def rows(images):
    """The images as a set of byte strings, to compare them by identity."""
    return {image.numpy().tobytes() for image in images}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return vit_digits_patch4_32().eval()


# --- digits: splits --------------------------------------------------------------------------------


def test_splits_are_disjoint_and_stratified():
    (train, train_labels), (test, test_labels) = load_digits("train").tensors, load_digits("test").tensors
    assert train.shape == (1097, 3, SIZE, SIZE)
    assert test.shape == (700, 3, SIZE, SIZE)
    assert train.dtype == test.dtype == torch.float32
    assert train_labels.dtype == torch.int64
    assert not rows(train) & rows(test)
    counts = torch.stack([train_labels.bincount(), test_labels.bincount()]).double()
    expected = counts.sum(0) * 700 / 1797
    assert (counts[1] - expected).abs().max() <= 1


def test_split_partitions_any_labels():
    labels = torch.arange(1500) ** 2 % 7
    index = split_indices(labels)
    assert torch.equal(torch.cat([index["train"], index["test"]]).sort().values, torch.arange(1500))


def test_splits_repeat_bit_for_bit_and_are_not_shared():
    for split in ("train", "test", "hard"):
        first, second = load_digits(split).tensors, load_digits(split).tensors
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        first[0].zero_()
        first[1].zero_()
        again = load_digits(split).tensors
        assert torch.equal(again[0], second[0])
        assert torch.equal(again[1], second[1])


@pytest.mark.parametrize(
    ("split", "digest"),
    [("train", "232155519d337cd7"), ("test", "cda0d82d2d80b4aa"), ("hard", "4712fd4e200bf316")],
)
def test_pixels_are_the_ones_that_published_figures_refer_to(split, digest):
    pixels = ((load_digits(split).tensors[0] * 0.5 + 0.5) * 255).round().to(torch.uint8)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16] == digest


def test_splits_do_not_depend_on_global_state_or_threads():
    expected = load_digits("hard").tensors[0]
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    torch.set_num_threads(1)
    try:
        assert torch.equal(load_digits("hard").tensors[0], expected)
    finally:
        torch.set_num_threads(threads)


def test_hard_is_the_test_split_distorted():
    clean, hard = load_digits("test").tensors, load_digits("hard").tensors
    assert torch.equal(clean[1], hard[1])
    assert not torch.equal(clean[0], hard[0])
    assert not rows(hard[0]) & rows(load_digits("train").tensors[0])
    for field in fields(Distortion):
        assert getattr(HARD, field.name) >= getattr(TRAIN, field.name)


def test_pixels_lie_on_the_8_bit_grid():
    for split in ("train", "hard"):
        pixels = (load_digits(split).tensors[0] * 0.5 + 0.5) * 255
        assert (pixels - pixels.round()).abs().max() < 1e-4
        assert pixels.min() >= -1e-4
        assert pixels.max() <= 255 + 1e-4


def test_size_and_normalisation():
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)
    images = load_digits("test", size=48, mean=mean, std=std).tensors[0]
    assert images.shape == (700, 3, 48, 48)
    pixels = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert torch.allclose(pixels[:, 0], pixels[:, 2], atol=1e-6)
    # The mean grey of an image survives resampling.
    assert (pixels.mean() - (load_digits("test").tensors[0] * 0.5 + 0.5).mean()).abs() < 5e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, r"split must be one of .*'hard'.*got 'val'"),
        ({"split": "test", "size": 4}, "size must be at least 8 pixels, got 4"),
        ({"split": "test", "std": (0.5, 0.5, 0.0)}, "std positive"),
        ({"split": "test", "mean": (0.5,)}, "three numbers"),
    ],
)
def test_load_digits_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_digits(**arguments)


# --- digits: calibration images --------------------------------------------------------------------


def test_calibration_images_are_distinct_training_images():
    images = calibration_images(256, seed=1)
    assert images.shape == (256, 3, SIZE, SIZE)
    assert len(rows(images)) == 256
    assert rows(images) <= rows(load_digits("train").tensors[0])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_augmented_fraction(fraction):
    plain, mixed = calibration_images(64, seed=3), calibration_images(64, seed=3, augment=fraction)
    changed = (plain != mixed).flatten(1).any(1)
    assert changed.sum() == round(64 * fraction)
    # At random positions, not the first ones.
    if fraction == 0.25:
        assert not changed[:16].all()


def test_calibration_is_reproducible_and_seeded():
    assert torch.equal(calibration_images(40, 5, 0.5), calibration_images(40, 5, 0.5))
    assert not torch.equal(calibration_images(40, 5, 0.5), calibration_images(40, 6, 0.5))


@pytest.mark.parametrize(
    ("n", "augment", "message"),
    [
        (0, 0.0, "n must be between 1 and 1097 .*got 0"),
        (1098, 0.0, "got 1098"),
        (8, 1.5, "augment must be a fraction between 0 and 1, got 1.5"),
        (8, float("nan"), "got nan"),
    ],
)
def test_calibration_images_refuses(n, augment, message):
    with pytest.raises(ValueError, match=message):
        calibration_images(n, 0, augment)


# --- distortion ------------------------------------------------------------------------------------


def test_no_distortion_only_rounds():
    images = torch.rand(4, 3, 12, 20, generator=seeded())
    assert torch.equal(distort(images, Distortion(), seeded()), (images.double() * 255).round().div(255).float())


def test_shift_moves_by_the_drawn_fraction():
    images = torch.zeros(200, 1, 32, 32)
    images[:, :, 16, 16] = 1.0
    moved = distort(images, Distortion(shift=0.25), seeded())
    place = torch.arange(32.0)
    x = (moved.sum((1, 2)) * place).sum(1) / moved.sum((1, 2, 3)) - 16
    assert 7.0 < x.abs().max() <= 8.01
    assert x.min() < -6 < 6 < x.max()


def test_rotation_angle_is_bounded_and_used():
    image = torch.zeros(1, 1, 65, 65)
    image[..., 32, 60] = 1.0
    turned = distort(image.expand(300, -1, -1, -1), Distortion(rotate=30.0), seeded())
    position = torch.arange(65.0) - 32
    y = (turned.sum((1, 3)) * position).sum(1) / turned.sum((1, 2, 3))
    x = (turned.sum((1, 2)) * position).sum(1) / turned.sum((1, 2, 3))
    angle = torch.atan2(y, x).rad2deg()
    assert 25 < angle.abs().max() < 31
    assert torch.allclose(torch.hypot(x, y), torch.tensor(28.0), atol=0.5)


def test_blur_is_the_gaussian_of_torchvision():
    image = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    image[..., 16, 16] = 1.0
    generator = seeded(4)
    blurred = distort(image, Distortion(blur=0.1), generator)
    # The only draw that matters comes after shift (2), angle and scale: replay it.
    replay = seeded(4)
    draws = [torch.empty(1, k, dtype=torch.float64).uniform_(generator=replay) for k in (2, 1, 1, 1)]
    sigma = 3.3 * draws[-1].item()
    expected = TF.gaussian_blur(image, [33, 33], [sigma, sigma])
    assert sigma > 0.5
    assert (blurred - expected).abs().max() < 1 / 255


def test_noise_has_the_drawn_deviation():
    noisy = distort(torch.full((400, 1, 32, 32), 0.5), Distortion(noise=0.1), seeded())
    deviation = noisy.flatten(1).std(1)
    assert deviation.max() < 0.11
    assert 0.04 < deviation.mean() < 0.06


def test_distort_refuses_wrong_batches():
    for images in (torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images must be floating point \[N, C, H, W\]"):
            distort(images, TRAIN, seeded())


# --- image folders ---------------------------------------------------------------------------------


def write_digits(root, split, count=20):
    """The first digits of a split as an image folder of PNG files; returns their order in the folder."""
    images, labels = (tensor[:count] for tensor in load_digits(split).tensors)
    for i, (image, label) in enumerate(zip(images, labels)):
        folder = root / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(((image * 0.5 + 0.5) * 255).round().to(torch.uint8)).save(folder / f"{i:03}.png")
    return labels.argsort(stable=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ImageNet layout, every class present: train/ with 40 images, val/ with 30."""
    root = tmp_path_factory.mktemp("folder")
    write_digits(root / "train", "train", 40)
    write_digits(root / "val", "test", 30)
    return root


def test_bundled_sets_are_of_models_with_as_many_classes():
    model = vit_digits_patch4_32()
    with pytest.raises(ValueError, match="the contours have 40 classes, the model tells 10 classes apart"):
        load_data("contours", "test", model)
    with pytest.raises(ValueError, match="the contours have 40 classes"):
        load_calibration("contours", model, 4)
    assert load_calibration("contours", vit_digits_patch4_32(num_classes=0), 4).shape == (4, 3, 32, 32)


def test_folder_gives_the_very_tensors_of_the_digits(folder, model):
    images, labels = load_digits("test").tensors
    order = labels[:30].argsort(stable=True)
    loaded = load_data(folder, "test", model)
    assert torch.equal(torch.stack([image for image, _ in loaded]), images[order])
    assert [label for _, label in loaded] == labels[order].tolist()


def test_layouts(folder, model):
    assert len(load_folder(folder, "train", model)) == 40
    assert len(load_folder(str(folder), "test", model)) == 30
    # Class folders directly under the root serve both splits.
    assert len(load_folder(folder / "val", "test", model)) == 30
    assert len(load_folder(folder / "val", "train", model)) == 30


def test_images_for_both_splits_are_refused(folder, tmp_path, model):
    """Class folders, or two names of one folder, would be calibrated with and evaluated on."""
    refuse_leak(folder, model)
    refuse_leak("digits", model)
    (tmp_path / "train").symlink_to(folder / "val")
    (tmp_path / "val").symlink_to(folder / "val")
    for root in (folder / "val", tmp_path):
        with pytest.raises(
            ValueError, match=f"data is '{root}', whose images .* expected '{root}/train' and .*--no-eval"
        ):
            refuse_leak(str(root), model)


def test_a_class_named_train_is_not_a_split(tmp_path):
    for name in ("boat", "train"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    assert load_folder(tmp_path, "test", vit_digits_patch4_32(num_classes=2)).classes == ["boat", "train"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    (tmp_path / "grey").mkdir()
    Image.radial_gradient("L").resize((32, 32)).convert(mode).save(tmp_path / "grey" / "0.png")
    image, _ = load_folder(tmp_path, "train", vit_digits_patch4_32())[0]
    assert image.shape == (3, SIZE, SIZE)


def test_gray_models_see_gray(folder):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
    gray, many = (timm.create_model("vit_tiny_patch16_224", in_chans=n, **options) for n in (1, 5))
    assert data_config(gray)["input_size"] == (1, 32, 32)
    assert data_config(gray)["mean"] == data_config(gray)["std"] == (0.5,)
    image = Image.merge(
        "RGB", [Image.radial_gradient("L").resize((32, 32)).point(lambda v, n=n: v // n) for n in (1, 2, 3)]
    )
    resized = TF.resize(image.convert("L"), int(32 / data_config(gray)["crop_pct"]), TF.InterpolationMode.BICUBIC)
    want = TF.normalize(TF.to_tensor(TF.center_crop(resized, 32)), (0.5,), (0.5,))
    assert torch.equal(evaluation_transform(gray)(image), want)
    assert load_calibration(str(folder), gray, 6, augment=0.5).shape == (6, 1, 32, 32)
    with pytest.raises(ValueError, match="the model takes images of 5 channels, expected 3, or 1 for gray ones"):
        load_folder(folder, "train", many)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_transform_is_the_models_own(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    config = model.pretrained_cfg
    image = Image.radial_gradient("L").resize((300, 200)).convert("RGB")
    short = int(224 / config["crop_pct"])
    resized = TF.resize(image, short, TF.InterpolationMode.BICUBIC)
    expected = TF.normalize(TF.to_tensor(TF.center_crop(resized, 224)), config["mean"], config["std"])
    assert torch.equal(evaluation_transform(model)(image), expected)
    assert data_config(model)["input_size"] == (3, 224, 224)


def test_limit_is_a_seeded_subset_in_order(folder, model):
    everything = [label for _, label in load_data(folder, "train", model)]
    some = load_data(folder, "train", model, 12, seed=1)
    assert len(some) == 12
    assert some.indices == sorted(set(some.indices))
    assert [label for _, label in some] == [everything[i] for i in some.indices]
    assert some.indices == load_data(folder, "train", model, 12, seed=1).indices
    assert some.indices != load_data(folder, "train", model, 12, seed=2).indices
    assert len({everything[i] for i in some.indices}) > 3
    whole, part = load_digits("hard").tensors[0], load_digits("hard", limit=20, seed=1).tensors[0]
    assert len(rows(part)) == 20
    assert torch.equal(torch.stack([x for x in whole if x.numpy().tobytes() in rows(part)]), part)
    images, labels = next(iter(DataLoader(load_data("digits", "hard", model, 7), batch_size=7)))
    assert images.shape == (7, 3, SIZE, SIZE)
    assert labels.shape == (7,)


def test_calibration_from_either_source(folder, model):
    images = load_calibration("digits", model, 16, seed=2, augment=0.5)
    assert torch.equal(images, calibration_images(16, 2, 0.5))
    plain = load_calibration(folder, model, 16, seed=2)
    assert rows(plain) <= rows(load_digits("train").tensors[0][:40])
    mixed = load_calibration(folder, model, 16, seed=2, augment=0.5)
    assert ((plain - mixed).abs() > 1e-5).flatten(1).any(1).sum() == 8
    assert torch.equal(mixed, load_calibration(folder, model, 16, seed=2, augment=0.5))


def test_digits_follow_the_models_input():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    image, _ = load_data("digits", "test", model, limit=3)[0]
    assert image.shape == (3, 224, 224)


# --- refusals --------------------------------------------------------------------------------------


def test_missing_folder(tmp_path, model):
    with pytest.raises(ValueError, match=r"source must be an existing folder, got '.*absent'"):
        load_data(tmp_path / "absent", "test", model)


def test_no_class_folders(tmp_path, model):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"is not an image folder: Couldn't find any class folder"):
        load_data(tmp_path, "test", model)


def test_no_images(tmp_path, model):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="is not an image folder: Found no valid file for the classes cat"):
        load_data(tmp_path, "test", model)


def test_missing_split(folder, tmp_path, model):
    (tmp_path / "val").symlink_to(folder / "val")
    with pytest.raises(ValueError, match=r"split 'train' needs '.*train', '.*' has only val"):
        load_data(tmp_path, "train", model)
    with pytest.raises(ValueError, match=r"split must be one of .* for an image folder, got 'hard'"):
        load_data(tmp_path, "hard", model)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_unreadable_image_is_named(tmp_path, model, damage):
    write_digits(tmp_path, "test", 30)
    victim = next((tmp_path / "3").iterdir())
    content = victim.read_bytes()
    victim.write_bytes({"truncated": content[: len(content) // 2], "text": b"not a picture", "empty": b""}[damage])
    data = load_data(tmp_path, "test", model)
    with pytest.raises(ValueError, match=re.escape(f"image '{victim}' cannot be read: ")):
        for _ in data:
            pass


def test_fewer_images_than_asked_for(folder, model):
    for source, split, limit, there in ((folder, "train", 41, 40), ("digits", "test", 701, 700)):
        with pytest.raises(ValueError, match=rf"limit must be between 1 and {there}, .*; got {limit}"):
            load_data(source, split, model, limit)
    with pytest.raises(ValueError, match="got 41"):
        load_calibration(folder, model, 41)
    with pytest.raises(ValueError, match="got 0"):
        load_data("digits", "test", model, 0)


def test_class_count_must_match_to_test(folder):
    five = vit_digits_patch4_32(num_classes=5)
    with pytest.raises(ValueError, match="has 10 class folders, the model tells 5 classes apart"):
        load_data(folder, "test", five)
    assert len(load_data(folder, "train", five)) == 40


def test_model_without_preprocessing(folder):
    with pytest.raises(ValueError, match=r"model must be a timm model.*got Linear"):
        load_data(folder, "test", torch.nn.Linear(2, 2))
    odd = vit_digits_patch4_32(pretrained_cfg_overlay={"input_size": (1, 32, 32)})
    with pytest.raises(ValueError, match="square 3-channel"):
        load_data("digits", "test", odd)
