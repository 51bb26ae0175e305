"""Images with boxes: the bundled shapes, and miniature files in COCO's form, whole and broken."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from vitq.data import coco, load_calibration, load_data, shapes, splits
from vitq.detect import average_precision
from vitq.sources import ModelSource, load_float

pytest.importorskip("pycocotools")
KWARGS = {"channels": 16, "head_width": 16, "mask_layers": (16,), "depths": (1, 1, 1, 1), "embed_dim": 16}


@pytest.fixture(scope="module")
def model():
    return load_float(ModelSource("mask_rcnn_shapes", pretrained=False, kwargs=KWARGS | {"num_heads": (1, 1, 1, 1)}))


@pytest.fixture(scope="module")
def two_classes():
    kwargs = KWARGS | {"num_heads": (1, 1, 1, 1), "num_classes": 2, "image_size": (32, 64)}
    return load_float(ModelSource("mask_rcnn_shapes", pretrained=False, kwargs=kwargs))


@pytest.mark.parametrize("split", ["train", "test", "hard"])
def test_scenes(split):
    seen = set()
    for i in range(40):
        scene = shapes.scene(split, i)
        again = shapes.scene(split, i)
        assert torch.equal(scene.image, again.image)
        assert torch.equal(scene.masks, again.masks)
        c, h, w = scene.image.shape
        assert c == 3
        assert all(shapes.SMALLEST <= side <= shapes.LARGEST and side % 8 == 0 for side in (h, w))
        assert scene.masks.shape == (len(scene.labels), h, w)
        assert int(scene.masks.sum(0).max()) <= 1 if len(scene.labels) else True
        assert torch.equal((scene.image * 255).round() / 255, scene.image)
        for box, mask in zip(scene.boxes.long().tolist(), scene.masks):
            inside = mask[box[1] : box[3], box[0] : box[2]]
            assert inside.sum() == mask.sum() > 0
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        seen |= {(h, w), *scene.labels.tolist()}
    assert set(range(1, 7)) <= seen
    assert len(seen) > 20
    assert not torch.equal(shapes.scene(split, 0).image, shapes.scene(split, 1).image)


def test_figures_have_the_area_they_are_said_to_have():
    """By which a figure counts as hidden."""
    y, x = np.mgrid[-1:1:801j, -1:1:801j]
    for kind, area in shapes._AREA.items():
        assert shapes._inside(kind, x, y).mean() * 4 == pytest.approx(area, rel=0.02)
        assert not shapes._inside(kind, x, y)[np.hypot(x, y) > 1.001].any()


def test_scenes_without_figures_are_there(model):
    data = load_data("shapes", "test", model, 60)
    described = {a["image_id"] for a in data.truth["annotations"]}
    assert 0 < sum(image["id"] not in described for image in data.truth["images"]) < 10
    assert shapes.strengthened(0.0) == shapes.CLEAN
    assert shapes.strengthened(1.0) == shapes.USUAL


def test_shapes_as_data(model):
    assert splits("shapes") == ("test", "hard")
    data = load_data("shapes", "test", model, 5, seed=3)
    assert len(data) == 5
    assert data.categories == [1, 2, 3, 4, 5, 6]
    index = [image["id"] for image in data.truth["images"]]
    for i, position in enumerate(index):
        scene = shapes.scene("test", position)
        torch.testing.assert_close(data[i][0], (scene.image - 0.5) / 0.22)
        assert data.size(i) == tuple(scene.image.shape[1:])
    x = load_calibration("shapes", model, 4, seed=1)
    assert x.shape == (4, 3, shapes.LARGEST, shapes.LARGEST)
    chosen = load_data("shapes", "train", model, 4, seed=1)
    for image in x:
        # Each is one of the chosen scenes, and zero beside it.
        match = [y for y, _ in (chosen[i] for i in range(4)) if torch.equal(image[:, : y.shape[1], : y.shape[2]], y)]
        assert len(match) == 1
        assert float(image.abs().sum() - match[0].abs().sum()) == pytest.approx(0, abs=0.05)
    assert not torch.equal(load_calibration("shapes", model, 4, seed=1, augment=1.0), x)


def test_shapes_written_as_coco_are_the_shapes(tmp_path, model):
    coco.write_shapes(tmp_path, "test", 6)
    stored, drawn = load_data(f"coco:{tmp_path}", "test", model), load_data("shapes", "test", model)
    assert len(stored) == 6
    position = {image["id"]: i for i, image in enumerate(drawn.truth["images"])}
    for i in range(6):
        image = stored.read(i)
        assert torch.equal(image, drawn.read(position[i]))
    keys = ("bbox", "category_id", "area", "segmentation", "image_id")
    want = [{k: a[k] for k in keys} for a in drawn.truth["annotations"] if a["image_id"] < 6]
    assert [{k: a[k] for k in keys} for a in stored.truth["annotations"]] == want
    assert stored.truth["categories"][2] == {"id": 3, "name": "square"}


def annotations() -> dict:
    """Two classes with gaps in their identifiers, two images, one of them without annotation."""
    images = [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}]
    images += [{"id": 9, "file_name": "b.png", "height": 48, "width": 16}]
    one = {"id": 1, "image_id": 7, "category_id": 18, "iscrowd": 0, "bbox": [2, 3, 10, 5.5], "area": 55.0}
    one["segmentation"] = [[2, 3, 12, 3, 12, 8.5, 2, 8.5]]
    categories = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}]
    return {"images": images, "annotations": [one], "categories": categories}


def written(folder, truth, name: str = "val2017"):
    for part in ("annotations", name):
        (folder / part).mkdir(exist_ok=True)
    for i, (file, size) in enumerate((("a.png", (30, 20)), ("b.png", (16, 48)))):
        Image.new("RGB", size, (40 * i, 100, 200)).save(folder / name / file)
    text = truth if isinstance(truth, str) else json.dumps(truth)
    (folder / "annotations" / f"instances_{name}.json").write_text(text)
    return f"coco:{folder}"


def test_files_in_cocos_form(tmp_path, two_classes):
    source = written(tmp_path, annotations())
    assert splits(source) == ("test",)
    data = load_data(source, "test", two_classes)
    assert data.categories == [3, 18]
    # The canvas is 32 by 64, upright for upright images.
    assert data[0][0].shape == (3, 32, 48)
    assert data[1][0].shape == (3, 64, 21)
    assert data.size(1) == (48, 16)
    torch.testing.assert_close(data[1][0][:, 5, 5], (torch.tensor([40, 100, 200]) / 255 - 0.5) / 0.22)
    written(tmp_path, annotations(), "train2017")
    x = load_calibration(source, two_classes, 2)
    assert x.shape == (2, 3, 32, 64)
    assert sorted(int((image != 0).any(0).any(0).sum()) for image in x) == [11, 48]
    one = load_data(source, "test", two_classes, 1)
    assert len(one.truth["images"]) == 1
    assert {a["image_id"] for a in one.truth["annotations"]} <= {one.truth["images"][0]["id"]}


def test_the_first_annotation_may_be_number_zero(tmp_path, two_classes):
    truth = annotations()
    truth["annotations"][0]["id"] = 0
    data = load_data(written(tmp_path, truth), "test", two_classes)
    row = {"image_id": 7, "category_id": 18, "bbox": [2, 3, 10, 5.5], "score": 1.0}
    row["segmentation"] = coco.coco_tools().mask.frPyObjects(truth["annotations"][0]["segmentation"], 20, 30)[0]
    assert [average_precision([row], data.truth, kind) for kind in ("bbox", "segm")] == [pytest.approx(100)] * 2


def broken(change):
    truth = annotations()
    change(truth)
    return truth


MALFORMED = {
    "no json": ("{", "cannot be read: Expecting"),
    "a list": ([], "holds a list, expected an object"),
    "no images": (broken(lambda t: t.pop("images")), "lacks the list 'images'"),
    "no width": (broken(lambda t: t["images"][1].pop("width")), r"images\[1\] has no 'width' that is of <class 'int'>"),
    "text for a number": (broken(lambda t: t["annotations"][0].update(area="1")), r"annotations\[0\] has no 'area'"),
    "no mask": (broken(lambda t: t["annotations"][0].pop("segmentation")), "has no 'segmentation'"),
    "entry of another kind": (broken(lambda t: t["annotations"].append(4)), r"annotations\[1\] has no 'id'"),
    "twice": (broken(lambda t: t["images"][1].update(id=7)), "images have an id twice"),
    "unknown image": (broken(lambda t: t["annotations"][0].update(image_id=8)), "image_id 8, which the file"),
    "unknown class": (broken(lambda t: t["annotations"][0].update(category_id=4)), "category_id 4, which"),
    "three numbers": (broken(lambda t: t["annotations"][0].update(bbox=[1, 2, 3])), r"bbox \[1, 2, 3\], expected x, y"),
    "no width of a box": (broken(lambda t: t["annotations"][0].update(bbox=[1, 2, 0, 3])), "positive width and height"),
    "no polygon": (broken(lambda t: t["annotations"][0].update(segmentation=[])), "neither RLE nor polygons"),
    "two points": (broken(lambda t: t["annotations"][0].update(segmentation=[[1, 2, 3, 4]])), "neither RLE"),
    "half an RLE": (broken(lambda t: t["annotations"][0].update(segmentation={"counts": "1"})), "neither RLE"),
    "infinite": (broken(lambda t: t["annotations"][0].update(bbox=[1, 2, 3, float("inf")])), "positive width"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_annotations(name, tmp_path, two_classes):
    truth, message = MALFORMED[name]
    with pytest.raises(ValueError, match=f"instances_val2017.json': .*{message}"):
        load_data(written(tmp_path, truth), "test", two_classes)


def test_what_does_not_fit_is_refused(tmp_path, model, two_classes):
    source = written(tmp_path, annotations())
    with pytest.raises(ValueError, match="has 2 categories, the model tells 6 classes apart"):
        load_data(source, "test", model)
    with pytest.raises(ValueError, match=r"lacks instances_train2017.json or instances_train.json"):
        load_data(source, "train", two_classes)
    with pytest.raises(ValueError, match="data is 'digits', expected shapes or coco:<folder>"):
        load_data("digits", "test", model)
    with pytest.raises(ValueError, match="split must be one of"):
        load_data("shapes", "val", model)
    with pytest.raises(ValueError, match="split must be one of"):
        load_data(source, "hard", two_classes)
    with pytest.raises(ValueError, match="limit must be between 1 and 2"):
        load_data(source, "test", two_classes, 3)
    data = load_data(source, "test", two_classes)
    Image.new("RGB", (31, 20)).save(tmp_path / "val2017" / "a.png")
    with pytest.raises(ValueError, match=r"a.png' is \(31, 20\), its annotations say \(30, 20\)"):
        data[0]
    (tmp_path / "val2017" / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b.png' cannot be read"):
        data[1]
