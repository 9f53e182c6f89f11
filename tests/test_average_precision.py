"""Average precision, against the lecture's rules one by one, an implementation written otherwise, and COCO's."""

import pickle

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from lit_models.average_precision import AveragePrecision
from runner.errors import InputError

A, B, C = [0, 0, 10, 10], [20, 20, 40, 30], [50, 0, 60, 40]  # boxes that do not touch


def prediction(boxes, scores, labels=None) -> dict:
    labels = [0] * len(boxes) if labels is None else labels
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def target(boxes, labels=None, difficult=None) -> dict:
    labels = [0] * len(boxes) if labels is None else labels
    found = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "size": (64, 64),
    }
    return found if difficult is None else found | {"difficult": torch.tensor(difficult, dtype=torch.bool)}


def values_of(metric) -> list[float]:
    return metric.compute().reshape(-1).tolist()


def average_precision(predictions, targets, num_classes=1, **arguments) -> list[float]:
    metric = AveragePrecision(num_classes, **arguments)
    metric.update(predictions, targets)
    return values_of(metric)


def random_scenes(rng, pictures=4, classes=3, objects=6, detections=15) -> tuple[list[dict], list[dict]]:
    """Whole coordinates and few different scores, so that there are ties, doubles, difficult and missing objects."""
    predictions, targets = [], []
    for _ in range(pictures):
        n, m = rng.integers(0, objects), rng.integers(0, detections)
        corners = rng.integers(0, 16, (n, 2))
        boxes = np.concatenate([corners, corners + rng.integers(0, 12, (n, 2))], 1)
        targets.append(target(boxes, rng.integers(0, classes, n), rng.random(n) < 0.25))
        if n:
            near = boxes[rng.integers(0, n, m)] + rng.integers(-2, 3, (m, 4))
            near = np.concatenate([np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:])], 1)
        else:
            near = np.tile([0, 0, 5, 5], (m, 1))
        predictions.append(prediction(near, rng.integers(0, 20, m) / 20, rng.integers(0, classes, m)))
    return predictions, targets


def by_the_book(predictions, targets, k: int, threshold: float) -> float:
    """Average precision of class k, written otherwise: over all pictures' sorted detections, as VOC's code."""
    detections = [
        (score, picture, box)
        for picture, p in enumerate(predictions)
        for box, score, label in zip(p["boxes"].tolist(), p["scores"].tolist(), p["labels"].tolist(), strict=True)
        if label == k
    ]
    detections.sort(key=lambda detection: -detection[0])
    truth = [
        [
            (box, hard)
            for box, label, hard in zip(t["boxes"].tolist(), t["labels"], t["difficult"], strict=True)
            if label == k
        ]
        for t in targets
    ]
    n = sum(not hard for objects in truth for _, hard in objects)
    if n == 0:
        return float("nan")
    taken, true = set(), []
    for _, picture, (x1, y1, x2, y2) in detections:
        best, j = -1.0, None
        for i, ((u1, v1, u2, v2), _) in enumerate(truth[picture]):
            both = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
            either = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - both
            if either and both / either > best:
                best, j = both / either, i
        if best < threshold:
            true.append(False)
        elif truth[picture][j][1]:
            continue
        else:
            true.append((picture, j) not in taken)
            taken.add((picture, j))
    curve = [(sum(true[: i + 1]) / n, sum(true[: i + 1]) / (i + 1)) for i in range(len(true))]
    return sum(max((p for r, p in curve if r >= i / n - 1e-9), default=0) for i in range(1, n + 1)) / n


def test_a_perfect_detector_has_1_and_an_empty_one_0():
    targets = [target([A, B], [0, 1]), target([]), target([C], [0])]
    perfect = [prediction(t["boxes"].tolist(), [0.9] * len(t["boxes"]), t["labels"].tolist()) for t in targets]
    assert average_precision(perfect, targets, 2) == [1, 1]
    assert average_precision([prediction([], [])] * 3, targets, 2) == [0, 0]
    assert average_precision([prediction([B, A], [0.9, 0.8], [0, 1]), *perfect[1:]], targets, 2) == [0.25, 0]


def test_a_class_without_objects_is_nan_and_does_not_touch_the_others():
    values = average_precision([prediction([A, B], [0.9, 0.8], [0, 1])], [target([A])], 3)
    assert values[0] == 1
    assert np.isnan(values[1:]).all()


def test_precision_is_the_best_there_or_later():
    # true, false, false, true, true: precision 1, 1/2, 1/3, 2/4, 3/5, so from the second object on the best is 3/5
    wrong = [0, 50, 5, 60]
    detections = prediction([A, wrong, wrong, B, C], [0.9, 0.8, 0.7, 0.6, 0.5])
    metric = AveragePrecision(1)
    metric.update([detections], [target([A, B, C])])
    assert metric.compute().item() == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)
    ((recall, precision),) = metric.curves()
    assert recall.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 1])
    assert precision.tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2, 3 / 5])


def test_an_object_is_found_once_by_the_better_score():
    nearly = [0, 0, 10, 9]
    targets = [target([A, B])]
    assert average_precision([prediction([A, nearly, B], [0.9, 0.8, 0.7])], targets) == pytest.approx([(1 + 2 / 3) / 2])
    assert average_precision([prediction([A, nearly, B], [0.8, 0.9, 0.7])], targets) == pytest.approx([(1 + 2 / 3) / 2])
    # the second box overlaps the found object most: it does not get the other one, which it overlaps enough
    targets = [target([A, [0, 0, 10, 8]])]
    assert average_precision([prediction([A, nearly], [0.9, 0.8])], targets) == [0.5]
    # the same place in another picture is another object
    assert average_precision([prediction([A], [0.9]), prediction([A], [0.8])], [target([A]), target([A])]) == [1]


def test_difficult_objects_neither_count_nor_punish():
    detections = [prediction([A, A, B], [0.9, 0.8, 0.7])]
    assert average_precision(detections, [target([A, B], difficult=[True, False])]) == [1]
    assert average_precision([prediction([B], [0.7])], [target([A, B], difficult=[True, False])]) == [1]
    assert average_precision(detections, [target([A, B], difficult=[False, False])]) != [1]
    assert np.isnan(average_precision(detections, [target([A, B], difficult=[True, True])])).all()
    # a difficult object of another class excuses nothing
    assert average_precision([prediction([A, B], [0.9, 0.7])], [target([A, B], [1, 0], [True, False])], 2)[0] == 0.5


def test_the_threshold_itself_is_enough():
    for half, threshold in (([0, 0, 10, 5], 0.5), ([0, 0, 10, 7], 0.7), ([0, 0, 10, 3], 0.3)):
        assert average_precision([prediction([half], [1])], [target([A])], threshold=threshold) == [1]
        assert average_precision([prediction([half], [1])], [target([A])], threshold=threshold + 1e-3) == [0]


def test_it_agrees_with_another_implementation():
    rng = np.random.default_rng(0)
    seen_nan = seen_between = 0
    for case in range(300):
        threshold = (0.5, 0.25, 0.75)[case % 3]
        predictions, targets = random_scenes(rng)
        expected = [by_the_book(predictions, targets, k, threshold) for k in range(3)]
        metric = AveragePrecision(3, threshold)
        metric.update(predictions[:1], targets[:1])
        metric.update(predictions[1:], targets[1:])
        assert metric.compute().tolist() == pytest.approx(expected, nan_ok=True, abs=1e-6)
        seen_nan += np.isnan(expected).sum()
        seen_between += sum(0.05 < value < 0.95 for value in expected)
    assert seen_nan > 20
    assert seen_between > 200


def test_it_is_near_cocos_map_50_where_each_detection_has_one_object_to_find():
    rng = np.random.default_rng(1)
    grid = np.array([[x, y, x + 16, y + 16] for x in range(0, 128, 32) for y in range(0, 128, 32)])
    predictions, targets = [], []
    for _ in range(250):
        boxes = grid[rng.permutation(16)]
        n = rng.integers(0, 9)
        labels = rng.integers(0, 3, n)
        found = np.flatnonzero(rng.random(n) < 0.8)
        found = np.concatenate([found, found[rng.random(len(found)) < 0.2]])  # some twice
        right = boxes[found] + rng.uniform(-3, 3, (len(found), 4))
        guesses = rng.integers(9, 16, 3)
        classes = np.concatenate([np.where(rng.random(len(found)) < 0.9, labels[found], 0), rng.integers(0, 3, 3)])
        scores = np.concatenate([rng.normal(1, 1, len(found)), rng.normal(0, 1, 3)])
        targets.append(target(boxes[:n], labels))
        predictions.append(prediction(np.concatenate([right, boxes[guesses]]), 1 / (1 + np.exp(-scores)), classes))
    coco = MeanAveragePrecision(iou_type="bbox", backend="faster_coco_eval")
    coco.update(predictions, targets)
    expected = coco.compute()["map_50"].item()
    assert 0.4 < expected < 0.8
    assert np.mean(average_precision(predictions, targets, 3)) == pytest.approx(expected, abs=0.01)


def test_the_order_of_pictures_does_not_matter_and_equal_scores_keep_theirs():
    predictions, targets = random_scenes(np.random.default_rng(2), pictures=20)
    for i, p in enumerate(predictions):  # no two scores are equal
        p["scores"] = p["scores"] + (torch.arange(len(p["scores"])) * 100 + i) * 1e-5
    there = average_precision(predictions, targets, 3)
    assert average_precision(predictions[::-1], targets[::-1], 3) == there
    hit_first = average_precision([prediction([A, B], [0.5, 0.5])], [target([A])])
    miss_first = average_precision([prediction([B, A], [0.5, 0.5])], [target([A])])
    assert (hit_first, miss_first) == ([1], [0.5])


def test_no_picture_no_box_no_object():
    metric = AveragePrecision(2)
    metric.update([], [])
    assert metric.compute().isnan().all()
    assert [len(recall) for recall, _ in metric.curves()] == [0, 0]
    metric.update([prediction([], []), prediction([A], [0.5])], [target([A]), target([])])
    assert metric.compute()[0] == 0
    recall, precision = metric.curves()[0]
    assert (recall.tolist(), precision.tolist()) == ([0], [0])


def test_a_mistake_is_told():
    with pytest.raises(InputError, match="num_classes: there are objects of the classes 0 to 2, but 2 classes"):
        average_precision([prediction([], [])], [target([A, B], [0, 2])], 2)
    with pytest.raises(ValueError, match="zip"):
        average_precision([prediction([], [])], [], 2)


def test_reset_pickle_clone_and_state_dict():
    scenes = random_scenes(np.random.default_rng(3))
    metric = AveragePrecision(3)
    metric.update(*scenes)
    values = metric.compute()
    assert metric.state_dict() == {}  # a checkpoint is not to hold a validation's detections
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        other._computed = None
        torch.testing.assert_close(other.compute(), values, equal_nan=True)
        other.update(*scenes)
        assert other.objects.sum() == 2 * metric.objects.sum()
    metric.reset()
    assert metric.objects.sum() == 0
    metric.update(*scenes)
    torch.testing.assert_close(metric.compute(), values, equal_nan=True)
    metric.persistent(True)
    restored = AveragePrecision(3)
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    with pytest.warns(UserWarning, match="before the ``update``"):
        torch.testing.assert_close(restored.compute(), values, equal_nan=True)


def test_forward_gives_the_batch_and_adds_it():
    metric = AveragePrecision(1)
    assert metric([prediction([A], [0.9])], [target([A])]).item() == 1
    assert metric([prediction([B], [0.95])], [target([A])]).item() == 0
    assert values_of(metric) == [0.25]


def test_two_processes_have_what_one_has():
    """Through torchmetrics' own synchronisation, with the other process's states handed to it."""
    predictions, targets = random_scenes(np.random.default_rng(4), pictures=8)
    second, whole = AveragePrecision(3), AveragePrecision(3)
    second.update(predictions[5:], targets[5:])
    whole.update(predictions, targets)
    others = iter([*(torch.cat(states) for states in (second.classes, second.scores, second.hits)), second.objects])
    first = AveragePrecision(
        3, dist_sync_fn=lambda mine, group: [mine, next(others)], distributed_available_fn=lambda: True
    )
    first.update(predictions[:5], targets[:5])
    torch.testing.assert_close(first.compute(), whole.compute(), equal_nan=True)
    assert next(others, None) is None
    assert len(first.scores) == 5  # its own again


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_no_gradient(dtype):
    big = [0, 0, 512, 512]  # its area is beyond float16
    guess = prediction([big, [0, 0, 512, 128]], [0.75, 0.5])
    guess = {name: x.to(dtype).requires_grad_() if x.is_floating_point() else x for name, x in guess.items()}
    metric = AveragePrecision(1)
    metric.update([guess], [target([big])])
    assert values_of(metric) == [1]
    assert metric.curves()[0][1].tolist() == [1, 0.5]
    assert metric.scores[0].dtype == torch.float32
    assert not any(x.requires_grad for name in ("classes", "scores", "hits") for x in getattr(metric, name))
    assert not metric.compute().requires_grad
