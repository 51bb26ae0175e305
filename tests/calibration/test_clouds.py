"""Point-cloud data: the bundled primitives, and miniature data sets in the layouts of the real ones."""

import json

import numpy as np
import pytest
import torch
from vitq.data import clouds, load_calibration, load_data, primitives, splits
from vitq.models.points import PointMAEClassifier, PointMAEPartSegmenter
from vitq.sources import ModelSource, load_float

TINY = {"num_group": 4, "group_size": 4, "trans_dim": 16, "num_heads": 1, "encoder_width": 4, "num_points": 16}


def classifier(classes=3, **more):
    return PointMAEClassifier(num_classes=classes, **(TINY | {"depth": 1} | more))


def segmenter(**more):
    return PointMAEPartSegmenter(**(TINY | {"depth": 3, "propagation": (8, 8)} | more))


def rows(n: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, columns)).astype(np.float32)


def expected(points: np.ndarray, n: int = 16) -> torch.Tensor:
    points = points[:n] - points[:n].mean(0)
    return torch.from_numpy(points / np.sqrt((points**2).sum(1)).max()).float()


def hdf5(file, points, labels, **more):
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w") as f:
        f["data"], f["label"] = points, labels
        for name, value in more.items():
            f[name] = value


@pytest.fixture
def modelnet(tmp_path):
    """Two files of three and two clouds of 20 points."""
    points = np.stack([rows(20, 3, i) for i in range(5)])
    for i, part in enumerate((points[:3], points[3:])):
        labels = np.arange(len(part), dtype=np.uint8)[:, None]
        hdf5(tmp_path / f"ply_data_test{i}.h5", part, labels, normal=np.full_like(part, i))
    names = [f"data/modelnet40_ply_hdf5_2048/ply_data_test{i}.h5" for i in range(2)]
    (tmp_path / "test_files.txt").write_text("\n".join(names) + "\n")
    return tmp_path, points


@pytest.fixture
def resampled(tmp_path):
    """One cloud of each of two classes, one with an underscore in its name."""
    clouds = {"bench": rows(18, 6, 1), "night_stand": rows(18, 6, 2)}
    (tmp_path / "modelnet40_shape_names.txt").write_text("bench\nnight_stand\n")
    (tmp_path / "modelnet40_train.txt").write_text("night_stand_0001\nbench_0001\n")
    for name, points in clouds.items():
        (tmp_path / name).mkdir()
        np.savetxt(tmp_path / name / f"{name}_0001.txt", points, "%.6f", delimiter=",")
    return tmp_path, clouds


@pytest.fixture
def shapenet(tmp_path):
    """A bag in "train", a table in "val", a table of five points in "test"."""
    (tmp_path / "synsetoffset2category.txt").write_text("Bag\t02773838\nTable\t04379243\n")
    (tmp_path / "train_test_split").mkdir()
    made = {}
    for split, synset, name, n, first in (
        ("train", "02773838", "a1", 40, 4),
        ("val", "04379243", "b2", 30, 47),
        ("test", "04379243", "c3", 5, 47),
    ):
        entry = json.dumps([f"shape_data/{synset}/{name}"])
        (tmp_path / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(entry)
        points = np.concatenate([rows(n, 6, n), first + np.arange(n)[:, None] % 2], 1)
        (tmp_path / synset).mkdir(exist_ok=True)
        np.savetxt(tmp_path / synset / f"{name}.txt", points, "%.6f")
        made[split] = points
    return tmp_path, made


def test_modelnet_in_hdf5(modelnet):
    folder, points = modelnet
    data = load_data(f"modelnet40:{folder}", "test", classifier())
    assert len(data) == 5
    assert [int(label) for _, label in data] == [0, 1, 2, 0, 1]
    for (cloud, _), want in zip(data, points):
        torch.testing.assert_close(cloud, expected(want))
    cloud, _ = load_data(f"modelnet40:{folder}", "test", classifier(in_channels=6))[3]
    torch.testing.assert_close(cloud[:, :3], expected(points[3]))
    assert bool((cloud[:, 3:] == 1).all())
    assert splits(f"modelnet40:{folder}") == ("test",)


def test_modelnet_resampled(resampled):
    folder, points = resampled
    data = load_data(f"modelnet40:{folder}", "train", classifier(in_channels=6))
    assert [int(label) for _, label in data] == [1, 0]
    torch.testing.assert_close(data[0][0][:, :3], expected(points["night_stand"][:, :3]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(data[1][0][:, 3:], torch.from_numpy(points["bench"][:16, 3:]), atol=1e-5, rtol=0)


def test_scanobjectnn_variants(tmp_path):
    hard, plain = (np.stack([rows(16, 3, i)]) for i in (1, 2))
    hdf5(tmp_path / "test_objectdataset_augmentedrot_scale75.h5", hard, np.array([2]))
    hdf5(tmp_path / "training_objectdataset.h5", plain, np.array([1]))
    cloud, label = load_data(f"scanobjectnn:{tmp_path}", "test", classifier())[0]
    torch.testing.assert_close(cloud, expected(hard[0]))
    assert label == 2
    cloud, label = load_data(f"scanobjectnn-plain:{tmp_path}", "train", classifier())[0]
    torch.testing.assert_close(cloud, expected(plain[0]))
    with pytest.raises(ValueError, match=r"'.*training_objectdataset_augmentedrot_scale75.h5' is missing"):
        load_data(f"scanobjectnn:{tmp_path}", "train", classifier())


def test_shapenetpart(shapenet):
    folder, made = shapenet
    data = load_data(f"shapenetpart:{folder}", "train", segmenter())
    assert len(data) == 2
    for (cloud, parts), (category, first, name) in zip(data, ((1, 4, "train"), (15, 47, "val"))):
        assert cloud.shape == (16, 4)
        assert bool((cloud[:, 3] == category).all())
        assert set(parts.tolist()) <= {first, first + 1}
        # Points keep their parts.
        stored = torch.from_numpy(made[name][:, :3]).float()
        kept = _affine_matches(cloud[:, :3], stored)
        assert [int(made[name][p, 6]) for p in kept] == parts.tolist()
        assert len(set(kept)) == 16
    again = load_data(f"shapenetpart:{folder}", "train", segmenter())
    assert torch.equal(again[0][0], data[0][0])
    # Five points become sixteen: each at least three times.
    cloud, parts = load_data(f"shapenetpart:{folder}", "test", segmenter())[0]
    assert len(cloud.unique(dim=0)) == 5
    assert set(parts.tolist()) == {47, 48}


def _affine_matches(cloud: torch.Tensor, stored: torch.Tensor) -> list[int]:
    """For every point of ``cloud`` = (stored[chosen] − centre) / radius the row of ``stored`` that it is."""
    ratio = torch.cdist(cloud, cloud)
    distances = torch.cdist(stored, stored)
    for first in range(len(stored)):
        for second in range(len(stored)):
            if first == second:
                continue
            radius = distances[first, second] / ratio[0, 1]
            moved = cloud * radius + (stored[first] - cloud[0] * radius)
            gap, index = torch.cdist(moved, stored).min(1)
            if gap.max() < 1e-3:
                return index.tolist()
    raise AssertionError("the cloud is no selection of the stored points")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "test_files.txt").unlink(), "modelnet40_shape_names.txt' is missing"),
        (lambda f: (f / "test_files.txt").write_text("\n"), "test_files.txt' is empty"),
        (lambda f: (f / "ply_data_test1.h5").unlink(), "ply_data_test1.h5' is missing"),
        (lambda f: (f / "ply_data_test1.h5").write_bytes(b"nothing"), "ply_data_test1.h5' is no HDF5 file"),
        (lambda f: hdf5(f / "ply_data_test1.h5", rows(2, 3), np.zeros(2)), r"clouds \(2, 3\) and 2 labels"),
        (lambda f: hdf5(f / "ply_data_test1.h5", rows(4, 3).reshape(1, 4, 3), np.zeros(2)), "and 2 labels"),
        (lambda f: hdf5(f / "ply_data_test0.h5", np.full((1, 4, 3), np.nan), [0]), "ply_data_test0.h5' has NaN"),
        (lambda f: hdf5(f / "ply_data_test0.h5", np.zeros((1, 4, 3)), [40]), "of class 40, the model knows 3"),
    ],
)
def test_malformed_hdf5(modelnet, change, message):
    folder, _ = modelnet
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_data(f"modelnet40:{folder}", "test", classifier())[0]


def test_hdf5_without_what_is_asked_for(tmp_path):
    hdf5(tmp_path / "test_objectdataset.h5", np.zeros((1, 4, 3)), [0])
    with pytest.raises(ValueError, match="lacks 'normal', it has data, label"):
        load_data(f"scanobjectnn-plain:{tmp_path}", "test", classifier(in_channels=6))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("modelnet40_train.txt", "chair_0001\n", "lists a 'chair', which the shape names lack"),
        ("night_stand/night_stand_0001.txt", "1,2,3\n", "has 3 columns, expected 6"),
        ("night_stand/night_stand_0001.txt", "1,2,3,4,5,x\n", "is no table of numbers"),
        ("night_stand/night_stand_0001.txt", "1,2,3,4,5,nan\n", "has NaN or Inf"),
        ("night_stand/night_stand_0001.txt", "", "is empty"),
    ],
)
def test_malformed_text(resampled, file, text, message):
    folder, _ = resampled
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_data(f"modelnet40:{folder}", "train", classifier())[0]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("synsetoffset2category.txt", "Boat\t1\n", "has 'Boat 1', expected category, synset"),
        ("synsetoffset2category.txt", "Table\t04379243\n", "lists synset '02773838', which synsetoffset2category"),
        ("train_test_split/shuffled_train_file_list.json", "{", "is no JSON"),
        ("train_test_split/shuffled_train_file_list.json", '["a/b"]', "is no list of shape_data/<synset>/<id>"),
        ("train_test_split/shuffled_val_file_list.json", None, "shuffled_val_file_list.json' is missing"),
        ("02773838/a1.txt", "0 0 0 0 0 0 6\n", r"has parts 6 to 6, expected range\(4, 6\)"),
        ("02773838/a1.txt", "0 0 0 0 0 0 4.5\n", "has parts 4.5 to 4.5"),
    ],
)
def test_malformed_parts(shapenet, file, text, message):
    folder, _ = shapenet
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_data(f"shapenetpart:{folder}", "train", segmenter())[0]


def test_sources_that_do_not_fit(modelnet, tmp_path):
    folder, _ = modelnet
    for source, model, message in (
        ("digits", classifier(), "data is 'digits', expected primitives or <layout>:<folder>"),
        (f"modelnet40:{tmp_path}/none", classifier(), "must be in an existing folder"),
        (f"modelnet40:{folder}", segmenter(), "the model tells parts apart, which modelnet40 does not"),
        (f"shapenetpart:{folder}", classifier(), "the model tells classes apart, which shapenetpart does not"),
        ("primitives", classifier(), "the model has clouds of 16 points, primitives of 512"),
        ("primitives", classifier(num_points=512), "the model has clouds of 3 classes, primitives of 12"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(source, "test", model)
    with pytest.raises(ValueError, match="split must be one of"):
        load_data(f"modelnet40:{folder}", "hard", classifier())
    with pytest.raises(ValueError, match="limit must be between 1 and 5"):
        load_data(f"modelnet40:{folder}", "test", classifier(), 6)


def test_a_cloud_at_one_place(tmp_path):
    hdf5(tmp_path / "test_objectdataset.h5", np.full((1, 16, 3), 7.0), [0])
    cloud, _ = load_data(f"scanobjectnn-plain:{tmp_path}", "test", classifier())[0]
    assert bool((cloud == 0).all())


def test_calibration_clouds(shapenet):
    folder, _ = shapenet
    source = f"shapenetpart:{folder}"
    plain, moved = (load_calibration(source, segmenter(), 2, seed=3, augment=a) for a in (0.0, 0.5))
    assert plain.shape == (2, 16, 4)
    changed = [not torch.equal(a, b) for a, b in zip(plain, moved)]
    assert sum(changed) == 1
    assert torch.equal(plain[..., 3], moved[..., 3])
    a, b = plain[changed.index(True)], moved[changed.index(True)]
    for axis in range(3):
        slope = float((b[1, axis] - b[0, axis]) / (a[1, axis] - a[0, axis]))
        torch.testing.assert_close(b[:, axis], b[0, axis] + slope * (a[:, axis] - a[0, axis]), atol=1e-4, rtol=0)
        assert 2 / 3 <= slope <= 3 / 2
    with pytest.raises(ValueError, match="augment must be a fraction"):
        load_calibration(source, segmenter(), 2, augment=2.0)


def test_parts_of_shapenet_are_all_and_apart():
    assert [part for parts in clouds.SHAPENET_PARTS.values() for part in parts] == list(range(50))
    assert len(clouds.SHAPENET_PARTS) == 16


def test_primitives_are_the_same_at_every_call():
    index = torch.tensor([5, 100, 11])
    points, labels = primitives.classes("test", index)
    again, _ = primitives.classes("test", index.flip(0))
    assert torch.equal(points, again.flip(0))
    assert labels.tolist() == [5, 4, 11]
    assert not torch.equal(points, primitives.classes("hard", index)[0])
    radius = points.norm(dim=-1).amax(1)
    torch.testing.assert_close(radius, torch.ones(3))
    torch.testing.assert_close(points.mean(1), torch.zeros(3, 3), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="split must be one of"):
        primitives.classes("val", index)


def test_clean_surfaces_lie_where_they_should():
    rng = np.random.default_rng(0)
    n = 4000
    ball = primitives._ellipsoid(2, 2, 2).surface(rng, n)
    np.testing.assert_allclose(np.linalg.norm(ball, axis=1), 2)
    ring = primitives._torus(2, 0.5).surface(rng, n)
    np.testing.assert_allclose((np.hypot(ring[:, 0], ring[:, 1]) - 2) ** 2 + ring[:, 2] ** 2, 0.25)
    # The outer half of a torus has R·π + 2r of R·2π.
    outer = (np.hypot(ring[:, 0], ring[:, 1]) > 2).mean()
    assert abs(outer - (0.5 + 0.5 / (2 * np.pi))) < 4 * np.sqrt(0.25 / n)
    cone = primitives._frustum(1, 0, 1, caps=False).surface(rng, n)
    np.testing.assert_allclose(np.hypot(cone[:, 0], cone[:, 1]), (1 - cone[:, 2]) / 2)
    # Of a cone's wall the lower half of the height is three quarters.
    assert abs((cone[:, 2] < 0).mean() - 0.75) < 4 * np.sqrt(0.25 / n)
    side = primitives._box(1, 2, 3).surface(rng, n)
    assert np.isclose(np.abs(side) / (1, 2, 3), 1).any(1).all()
    assert abs(np.isclose(np.abs(side[:, 0]), 1).mean() - 6 / 11) < 4 * np.sqrt(0.25 / n)


def test_objects_have_their_categories_parts():
    points, parts = primitives.objects("test", torch.arange(12))
    ranges = primitives.parts_of()
    assert ranges[-1].stop == len(primitives.PARTS)
    for cloud, part in zip(points, parts):
        category = int(cloud[0, 3])
        assert bool((cloud[:, 3] == category).all())
        assert set(part.tolist()) <= set(ranges[category])
        assert len(part.unique()) > 1


@pytest.mark.parametrize("name", ["point_mae_primitives", "point_mae_parts"])
def test_models_of_the_primitives_take_them(name):
    model = load_float(ModelSource(name, pretrained=False))
    cloud, label = load_data("primitives", "hard", model, 1)[0]
    assert model(cloud[None]).shape == (*label[None].shape, model.num_classes)
    assert load_calibration("primitives", model, 3, augment=0.5).shape == (3, *model.vitq_data["input_size"])
    assert splits("primitives") == ("test", "hard")
