"""Average precision on cases with known answers, and what becomes of detections before it."""

import numpy as np
import pytest
import torch
from vitq.data import load_data
from vitq.detect import as_tensor, average_precision, compare, detect, precisions, results
from vitq.sources import ModelSource, load_float

mask = pytest.importorskip("pycocotools.mask")
SIZE = (100, 100)


def rle(*box: int) -> dict:
    x, y, w, h = box
    pixels = np.zeros(SIZE, np.uint8)
    pixels[y : y + h, x : x + w] = 1
    return mask.encode(np.asfortranarray(pixels))


def truth(*boxes: tuple[int, list[int], int]) -> dict:
    """(image, box, class) each, on two images of 100 by 100."""
    images = [{"id": i, "file_name": "", "height": 100, "width": 100} for i in (1, 2)]
    annotations = [
        {"id": i, "image_id": image, "bbox": box, "category_id": label, "iscrowd": 0, "area": float(box[2] * box[3])}
        | {"segmentation": rle(*box)}
        for i, (image, box, label) in enumerate(boxes, 1)
    ]
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def found(image: int, box: list[int], label: int, score: float, pixels: list[int] | None = None) -> dict:
    row = {"image_id": image, "bbox": box, "category_id": label, "score": score}
    return row | {"segmentation": rle(*(pixels or box))}


A, B = [10, 10, 40, 50], [60, 20, 20, 20]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_by_hand(kind):
    both = truth((1, A, 1), (1, B, 1))
    right = [found(1, A, 1, 0.9), found(1, B, 1, 0.8)]
    assert average_precision(right, both, kind) == pytest.approx(100)
    # One of two: precision 1 at the recalls 0, 0.01, ..., 0.5 of 101.
    assert average_precision(right[:1], both, kind) == pytest.approx(100 * 51 / 101)
    # A wrong one in front: precision 1/2 up to recall 1/2, then 2/3.
    wrong = found(1, [0, 90, 10, 5], 1, 0.95)
    assert average_precision([wrong, *right], both, kind) == pytest.approx(100 * 2 / 3)
    assert average_precision([found(2, A, 1, 0.9)], both, kind) == 0
    assert average_precision([found(1, A, 2, 0.9)], both, kind) == 0
    assert average_precision([], both, kind) == 0
    # Overlap 0.8: 7 of the 10 thresholds.
    assert average_precision([found(1, [10, 10, 40, 40], 1, 0.9)], truth((1, A, 1)), kind) == pytest.approx(70)
    # A class that is not there does not count; one that is and is not found does.
    assert average_precision(right[:1], truth((1, A, 1), (2, B, 2)), kind) == pytest.approx(50)
    # Found twice: the second is wrong, behind full recall, and costs nothing; in front of the other it does.
    assert average_precision([*right, found(1, B, 1, 0.1)], both, kind) == pytest.approx(100)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_is_that_of_torchmetrics(kind):
    from torchmetrics.detection import MeanAveragePrecision

    def pixels(box):
        return torch.from_numpy(mask.decode(rle(*box)).astype(bool))

    def side(rows, *scores):
        boxes = torch.tensor([box for box, _ in rows], dtype=torch.float32)
        masks = torch.stack([pixels(box) for box, _ in rows])
        out = {"boxes": boxes, "labels": torch.tensor([label for _, label in rows]), "masks": masks}
        return out | ({"scores": torch.tensor(scores)} if scores else {})

    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        boxes = torch.randint(5, 45, (2, 4, 4), generator=generator)
        moved = boxes + torch.randint(-4, 5, boxes.shape, generator=generator).clamp(min=0)
        labels = torch.randint(1, 3, (2, 4), generator=generator)
        scores = torch.rand(2, 4, generator=generator)
        wanted = [[(boxes[i, j].tolist(), int(labels[i, j])) for j in range(4)] for i in range(2)]
        guessed = [[(moved[i, j].tolist(), int(labels[i, j])) for j in range(4)] for i in range(2)]
        own = average_precision(
            [found(i + 1, *guessed[i][j], float(scores[i, j])) for i in range(2) for j in range(4)],
            truth(*((i + 1, *row) for i in range(2) for row in wanted[i])),
            kind,
        )
        # Its own thresholds are rounded to float32: overlaps of 3/5 would miss 0.6.
        thresholds = {
            "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
            "rec_thresholds": np.linspace(0, 1, 101).tolist(),
        }
        judge = MeanAveragePrecision(box_format="xywh", iou_type=kind, **thresholds)
        judge.update([side(guessed[i], *scores[i].tolist()) for i in range(2)], [side(rows) for rows in wanted])
        assert 0 < own < 100
        assert own == pytest.approx(100 * float(judge.compute()["map"]), abs=1e-4)


def test_boxes_and_masks_are_judged_apart():
    one, off = truth((1, A, 1)), [found(1, A, 1, 0.9, pixels=[10, 10, 40, 40])]
    assert average_precision(off, one, "bbox") == pytest.approx(100)
    assert average_precision(off, one, "segm") == pytest.approx(70)


def test_without_annotations_there_is_no_precision():
    with pytest.raises(ValueError, match="truth has no annotations"):
        average_precision([found(1, A, 1, 0.9)], truth(), "bbox")


@pytest.fixture(scope="module")
def model():
    kwargs = {"channels": 16, "head_width": 16, "mask_layers": (16,), "depths": (1, 1, 1, 1), "embed_dim": 16}
    return load_float(ModelSource("mask_rcnn_shapes", pretrained=False, kwargs=kwargs | {"num_heads": (1, 1, 1, 1)}))


def perfect(data) -> list[dict]:
    """The truth as a detector would say it, its masks in 28 by 28."""
    out = []
    for i, image in enumerate(data.truth["images"]):
        own = [a for a in data.truth["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in own]).view(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        masks = torch.zeros(len(own), 1, 28, 28)
        for n, (box, a) in enumerate(zip(boxes.long().tolist(), own)):
            pixels = torch.from_numpy(mask.decode(a["segmentation"]).astype(np.float32))
            pixels = pixels[box[1] : box[3], box[0] : box[2]]
            masks[n, 0] = torch.nn.functional.interpolate(pixels[None, None], (28, 28), mode="bilinear")[0, 0]
        labels = torch.tensor([a["category_id"] for a in own], dtype=torch.int64)
        out.append({"boxes": boxes, "labels": labels, "scores": torch.ones(len(own)), "masks": masks})
        assert data.size(i) == (image["height"], image["width"])
    return out


def test_detections_become_results(model):
    data = load_data("shapes", "test", model, 12)
    said = perfect(data)
    got = precisions(said, data)
    assert got["box AP"] == pytest.approx(100)
    # What 28 by 28 pixels keep of a mask.
    assert got["mask AP"] > 80
    swapped = [image | {"labels": image["labels"] % 6 + 1} for image in said]
    assert precisions(swapped, data)["box AP"] < 1
    boxes = [{name: value for name, value in image.items() if name != "masks"} for image in said]
    assert precisions(boxes, data) == {"box AP": pytest.approx(100)}
    row = compare(said, said, swapped, data)
    assert (row["box AP float"], row["box AP simulated"]) == (pytest.approx(100), pytest.approx(100))
    assert row["box AP integer"] < 1
    assert row["identical"] is False
    assert compare(boxes, boxes, None, data)["box AP integer"] is None


def test_boxes_are_scaled_to_the_stored_image(model):
    data = load_data("shapes", "test", model, 12)
    said = perfect(data)
    first = next(i for i, image in enumerate(said) if len(image["boxes"]))
    read = data.read
    data.read = lambda i: torch.nn.functional.interpolate(read(i)[None], scale_factor=2)[0]
    doubled = [image | {"boxes": 2 * image["boxes"]} for image in said]
    assert precisions(doubled, data)["box AP"] == pytest.approx(100)
    assert results(doubled, data)[0]["image_id"] == data.truth["images"][first]["id"]
    assert precisions(said, data)["box AP"] < 20


def test_scenes_without_figures(model):
    data = load_data("shapes", "test", model, 60)
    described = {a["image_id"] for a in data.truth["annotations"]}
    where = [i for i, image in enumerate(data.truth["images"]) if image["id"] not in described]
    said = perfect(data)
    assert all(len(said[i]["boxes"]) == 0 for i in where)
    assert precisions(said, data)["box AP"] == pytest.approx(100)
    # Something found where nothing is, surer than all the rest: its class has precision n/(n + 1) at every recall.
    one = next(image for image in said if len(image["boxes"]) == 1)
    said[where[0]] = one | {"scores": one["scores"] + 1}
    n = sum(a["category_id"] == int(one["labels"]) for a in data.truth["annotations"])
    assert precisions(said, data)["box AP"] == pytest.approx(100 * (5 + n / (n + 1)) / 6)
    assert as_tensor(said).shape == (60, 100, 6 + 28 * 28)


def test_images_are_run_by_themselves(model):
    data = load_data("shapes", "test", model, 3)
    counted = []
    got = detect(model, data, counted.append)
    assert counted == [1, 1, 1]
    with torch.no_grad():
        alone = model([data[1][0]])[0]
    assert all(torch.equal(got[1][name], alone[name]) for name in alone)
