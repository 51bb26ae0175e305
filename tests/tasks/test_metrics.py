"""Metrics against cases worked out by hand, scikit-learn and torchmetrics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, jaccard_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from vitq.tasks.metrics import mean_class_accuracy, part_miou

PARTS = [range(0, 2), range(2, 5)]


def one_hot(found, classes: int = 5) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(found), classes).float()


def test_mean_class_accuracy_by_hand():
    # Class 0: 2 of 3; class 1: 0 of 1; class 2 does not occur; class 3: 1 of 1.
    logits, labels = one_hot([0, 0, 2, 0, 3]), torch.tensor([0, 0, 0, 1, 3])
    assert mean_class_accuracy(logits, labels) == pytest.approx(100 * (2 / 3 + 0 + 1) / 3)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_mean_class_accuracy_is_the_balanced_accuracy(pairs):
    found, wanted = zip(*pairs)
    want = 100 * balanced_accuracy_score(wanted, found)
    assert mean_class_accuracy(one_hot(list(found)), torch.tensor(wanted)) == pytest.approx(want)


@given(st.integers(0, 2**31), st.integers(0, 20))
def test_mean_class_accuracy_is_that_of_torchmetrics(seed, more):
    generator = torch.Generator().manual_seed(seed)
    # Every class occurs: torchmetrics counts one that is only ever predicted as 0, the custom leaves it out.
    labels = torch.cat([torch.arange(4), torch.randint(4, (more,), generator=generator)])
    logits = torch.randn(len(labels), 4, generator=generator)
    want = 100 * float(MulticlassAccuracy(4, average="macro")(logits, labels))
    assert mean_class_accuracy(logits, labels) == pytest.approx(want, rel=1e-5)


def test_part_miou_by_hand():
    # Cloud 0 (category 0): part 0 has 1 of 2, part 1 2 of 3. Cloud 1 (category 0): all right, part 1 nowhere: 1.
    # Cloud 2 (category 1): part 2 has 2 of 4, part 3 0 of 2, part 4 nowhere: 1.
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [2, 2, 3, 3]])
    logits = one_hot([[0, 1, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2]])
    of_clouds = [(1 / 2 + 2 / 3) / 2, 1.0, (2 / 4 + 0 + 1) / 3]
    of_class, of_instance = part_miou(logits, labels, PARTS)
    assert of_instance == pytest.approx(100 * sum(of_clouds) / 3)
    assert of_class == pytest.approx(100 * ((of_clouds[0] + of_clouds[1]) / 2 + of_clouds[2]) / 2)


def test_only_parts_of_the_category_are_candidates():
    labels = torch.tensor([[0, 1]])
    logits = torch.tensor([[[2.0, 1, 9, 9, 9], [1.0, 2, 9, 9, 9]]])
    assert part_miou(logits, labels, PARTS) == (100.0, 100.0)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 12))
def test_part_miou_is_the_jaccard_index(seed, b, n):
    generator = torch.Generator().manual_seed(seed)
    category = torch.randint(2, (b,), generator=generator)
    logits = torch.randn(b, n, 5, generator=generator)
    size = torch.tensor([len(span) for span in PARTS])[category].unsqueeze(1)
    labels = (torch.rand(b, n, generator=generator) * size).long() + 2 * category.unsqueeze(1)
    clouds = [[], []]
    for i in range(b):
        span = PARTS[category[i]]
        found = logits[i, :, span.start : span.stop].argmax(-1) + span.start
        ious = jaccard_score(labels[i], found, labels=list(span), average=None, zero_division=1.0)
        clouds[category[i]].append(ious.mean())
    want_class = sum(sum(ious) / len(ious) for ious in clouds if ious) / sum(bool(ious) for ious in clouds)
    want_instance = sum(sum(ious) for ious in clouds) / b
    assert part_miou(logits, labels, PARTS) == pytest.approx((100 * want_class, 100 * want_instance))


@given(st.integers(0, 2**31))
def test_part_miou_of_one_cloud_is_that_of_torchmetrics(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(2, 5), torch.randint(2, 5, (17,), generator=generator)])[None]
    logits = torch.randn(1, 20, 5, generator=generator)
    found = logits[..., 2:].argmax(-1)
    want = 100 * float(MulticlassJaccardIndex(3, average="macro")(found, labels - 2))
    assert part_miou(logits, labels, PARTS) == pytest.approx((want, want), rel=1e-5)


def test_metrics_refuse():
    with pytest.raises(ValueError, match="not empty"):
        mean_class_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(1,\)"):
        mean_class_accuracy(torch.zeros(1, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="up to 3, expected int64 below 3"):
        mean_class_accuracy(torch.zeros(1, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"labels of cloud 0 are \[1, 2\], expected parts of one category"):
        part_miou(torch.zeros(1, 2, 5), torch.tensor([[1, 2]]), PARTS)
