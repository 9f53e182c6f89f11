"""Selective Search: likeness as the paper has it, boxes that are valid and the same each time, none found twice."""

import pickle

import cv2
import numpy as np
import pytest
import torch

from datamodules.scenes import draw_scene
from lit_models.selective_search import (
    COLORS_END,
    SelectiveSearch,
    bounding_boxes,
    histogram_bins,
    histograms,
    merge,
    recall,
    similarity,
    touching,
)
from runner.errors import InputError


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def scenes(n: int, size: int = 128, split: int = 0) -> list:
    """Training scenes: number i of Shapes."""
    return [draw_scene(np.random.default_rng([0, split, i]), size, 0, 6) for i in range(n)]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Patches of 4 x 4 pixels, each of a random colour."""
    colors = np.random.default_rng(seed).integers(0, 256, ((height + 3) // 4, (width + 3) // 4, 3), np.uint8)
    return np.ascontiguousarray(colors.repeat(4, axis=0).repeat(4, axis=1)[:height, :width])


def uniform_bins(segments: np.ndarray) -> np.ndarray:
    """Bins of a picture of one colour."""
    return histogram_bins(np.full((*segments.shape, 3), 90, np.uint8))


# -- likeness ----------------------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    """A picture of 10 x 10: a is its left upper 2 x 5 pixels, b 3 of the 2 x 2 pixels beneath it to the right."""
    h_a, h_b = np.array([0.5, 0.5, 0.0, 1.0, 0.0]), np.array([0.25, 0.25, 0.5, 0.5, 0.5])
    box_a, box_b = np.array([0, 0, 2, 5]), np.array([2, 4, 4, 6])
    got = similarity((h_a, h_b), (10.0, 3.0), (box_a, box_b), area=100)
    histograms_alike = 0.25 + 0.25 + 0 + 0.5 + 0
    size = 1 - (10 + 3) / 100
    fill = 1 - (4 * 6 - 10 - 3) / 100  # the box around both is 4 wide and 6 high
    assert got == pytest.approx(histograms_alike + size + fill)


def test_similarity_of_one_region_with_many_is_that_of_pairs():
    rng = np.random.default_rng(0)
    hists, sizes = rng.random((5, 7)), rng.integers(1, 20, 5)
    boxes = np.concatenate([rng.integers(0, 5, (5, 2)), rng.integers(6, 10, (5, 2))], axis=1)
    many = similarity((hists[0], hists[1:]), (sizes[0], sizes[1:]), (boxes[0], boxes[1:]), 100)
    pairs = [similarity((hists[0], hists[i]), (sizes[0], sizes[i]), (boxes[0], boxes[i]), 100) for i in range(1, 5)]
    np.testing.assert_allclose(many, pairs)
    assert similarity((hists[1], hists[0]), (sizes[1], sizes[0]), (boxes[1], boxes[0]), 100) == pytest.approx(many[0])


def test_color_histogram_by_hand():
    """Two segments: in the left one half the pixels are red 0 and half 255, green is 128, blue 10."""
    image = np.zeros((4, 8, 3), np.uint8)
    image[..., 1:] = (128, 10)
    image[:2, :4, 0] = 255
    segments = np.repeat([[0] * 4 + [1] * 4], 4, axis=0)
    found = histograms(segments, histogram_bins(image))
    assert found.shape == (2, 75 + 240)
    expected = np.zeros(75)
    expected[[0, 24, 25 + 12, 50]] = 1 / 6, 1 / 6, 1 / 3, 1 / 3  # 128 * 25 / 256 = 12.5
    np.testing.assert_allclose(found[0, :75], expected, rtol=1e-6)
    expected[[0, 24]] = 1 / 3, 0
    np.testing.assert_allclose(found[1, :75], expected, rtol=1e-6)
    np.testing.assert_allclose(found[:, :COLORS_END].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[:, COLORS_END:].sum(axis=1), 1, rtol=1e-5)


def test_texture_tells_the_directions_apart():
    """Brightness that rises to the right: direction 0 has the largest slope, 180 degrees none, 45 degrees 0.7 of it."""
    image = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 60, axis=0).repeat(3, axis=2)
    inside = histogram_bins(image)[3:, 30 * 60 + 30] - COLORS_END  # of a pixel in the middle: (24,)
    bins = (inside - 10 * np.arange(24)).reshape(8, 3)  # (directions, channels)
    assert (bins == bins[:, :1]).all()  # grey: channels are the same
    # rounding errors may put the largest slope into the last bin but one, cos 45 degrees is 0.707
    assert bins[0, 0] >= 8
    assert bins[[1, 7], 0].tolist() == [7, 7]
    assert bins[2:7, 0].tolist() == [0, 0, 0, 0, 0]
    turned = histogram_bins(np.ascontiguousarray(image.transpose(1, 0, 2)))[3:, 30 * 60 + 30] - COLORS_END
    assert (turned - 10 * np.arange(24)).reshape(8, 3)[:, 0].tolist() == np.roll(bins[:, 0], 2).tolist()


def test_boxes_and_neighbours_of_segments():
    segments = np.array([[0, 0, 1], [0, 2, 1], [3, 3, 1]])
    assert bounding_boxes(segments).tolist() == [[0, 0, 2, 2], [2, 0, 3, 3], [1, 1, 2, 2], [0, 2, 2, 3]]
    assert touching(segments).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert touching(np.array([[0, 1], [2, 3]])).tolist() == [[0, 1], [0, 2], [1, 3], [2, 3]]  # corners do not touch
    assert touching(np.zeros((3, 3), int)).shape == (0, 2)


def test_merging_takes_the_most_alike_first():
    """Of one colour, so that size and fill decide: 1 and 2 are the smallest, then what they became and 3 (not 0)."""
    segments = np.array([[0, 0, 0, 0, 0, 1, 2, 3, 3]])
    boxes = merge(segments, uniform_bins(segments))
    assert boxes.tolist() == [
        [0, 0, 5, 1], [5, 0, 6, 1], [6, 0, 7, 1], [7, 0, 9, 1], [5, 0, 7, 1], [5, 0, 9, 1], [0, 0, 9, 1]
    ]  # fmt: skip


def test_merging_goes_by_color_too():
    """As above, but 1 is of the colour of 0: they are merged first, small or not."""
    segments = np.array([[0, 0, 0, 0, 0, 1, 2, 3, 3]]).repeat(40, axis=0).repeat(40, axis=1)
    image = np.where(segments[..., None] < 2, np.uint8([200, 30, 30]), np.uint8([20, 40, 220]))
    boxes = merge(segments, histogram_bins(image)) / 40
    assert [0, 0, 6, 1] in boxes.tolist()
    assert [5, 0, 7, 1] not in boxes.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_merging_is_greedy(seed):
    """Against the paper's Algorithm 1 as it stands, with histograms counted anew for each region."""
    rng = np.random.default_rng(seed)
    segments = rng.permutation(20).reshape(4, 5).repeat(4, axis=0).repeat(4, axis=1)
    image = cv2.GaussianBlur(noise(16, 20, seed), (0, 0), 2)
    bins, area = histogram_bins(image), segments.size
    masks = [segments == i for i in range(20)]
    alive = list(range(20))

    def alike(a: int, b: int) -> float:
        pair = np.where(masks[a], 0, np.where(masks[b], 1, 2))
        hists, boxes, sizes = histograms(pair, bins), bounding_boxes(pair), np.bincount(pair.ravel())
        return similarity(hists[:2], sizes[:2], boxes[:2], area)

    def neighbours(a: int, b: int) -> bool:
        return bool(
            (cv2.dilate(masks[a].astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))[masks[b]]).any()
        )

    scores = {(a, b): alike(a, b) for a in alive for b in alive if a < b and neighbours(a, b)}
    while scores:
        a, b = max(scores, key=scores.get)
        masks.append(masks[a] | masks[b])
        scores = {pair: s for pair, s in scores.items() if not {a, b} & set(pair)}
        alive = [i for i in alive if i not in (a, b)]
        new = len(masks) - 1
        scores |= {(i, new): alike(i, new) for i in alive if neighbours(i, new)}
        alive.append(new)
    expected = np.concatenate([bounding_boxes(np.where(mask, 0, 1))[:1] for mask in masks])
    assert merge(segments, bins).tolist() == expected.tolist()


# -- proposals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 1, 3), (1, 90, 3), (90, 1, 3), (3, 400, 3), (2, 2, 3), (40, 60), (61, 47, 3)]
)
@pytest.mark.parametrize("kind", ["constant", "noise"])
def test_boxes_are_valid(shape, kind):
    image = noise(*shape[:2]) if kind == "noise" else np.full((*shape[:2], 3), 77, np.uint8)
    image = image if len(shape) == 3 else image[..., 0]
    boxes = SelectiveSearch()(image)
    assert boxes.dtype == np.float32
    assert boxes.shape[1] == 4
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (shape[1], shape[0])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= np.minimum(8, (shape[1], shape[0]))).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert [0, 0, shape[1], shape[0]] in boxes.tolist()
    assert kind == "noise" or len(boxes) == 1


def test_two_rectangles_are_found_exactly():
    image = np.full((80, 100, 3), 128, np.uint8)
    image[10:40, 20:45] = (220, 40, 40)
    image[50:70, 60:95] = (30, 60, 210)
    boxes = SelectiveSearch(sigma=0)(image).tolist()
    assert [20, 10, 45, 40] in boxes
    assert [60, 50, 95, 70] in boxes


def test_a_grey_picture_is_that_of_three_equal_channels():
    grey = scenes(1)[0].image[..., 0]
    boxes = SelectiveSearch()(grey)
    assert len(boxes) > 5
    np.testing.assert_array_equal(boxes, SelectiveSearch()(np.stack([grey] * 3, axis=2)))


def test_the_same_boxes_each_time():
    image = scenes(1)[0].image
    before = image.copy()
    boxes = SelectiveSearch()(image)
    np.random.default_rng().random()
    np.testing.assert_array_equal(boxes, SelectiveSearch()(image))
    np.testing.assert_array_equal(boxes, pickle.loads(pickle.dumps(SelectiveSearch()))(np.asfortranarray(image)))
    np.testing.assert_array_equal(image, before)


def test_the_most_promising_first():
    """A cut takes the first ones; large regions, that were merged last, tend to be there."""
    images = [scene.image for scene in scenes(5)]
    ranks, whole = [], []
    for image in images:
        every = SelectiveSearch()(image)
        np.testing.assert_array_equal(SelectiveSearch(max_proposals=10)(image), every[:10])
        areas = (every[:, 2:] - every[:, :2]).prod(axis=1)
        whole.append(every.tolist().index([0, 0, 128, 128]))
        ranks.append(areas[: len(every) // 3].mean() / areas[-(len(every) // 3) :].mean())
    assert min(ranks) > 1.5
    assert max(whole) < 30
    assert len({*whole}) > 2  # chance has a say


def test_min_side_and_several_scales():
    image = scenes(1)[0].image
    small, large = (SelectiveSearch(min_side=side)(image) for side in (1, 30))
    assert (small[:, 2:] - small[:, :2]).min() < 30
    assert (large[:, 2:] - large[:, :2]).min() >= 30
    one, other, both = ({*map(tuple, SelectiveSearch(scale)(image).tolist())} for scale in (50, 200, [50, 200]))
    assert one != other
    assert both == one | other


def test_settings_make_equal_what_finds_the_same():
    assert SelectiveSearch() == SelectiveSearch([50]) == pickle.loads(pickle.dumps(SelectiveSearch(50.0)))
    assert hash(SelectiveSearch(50)) == hash(SelectiveSearch([50.0]))
    others = [
        {"scale": 60},
        {"sigma": 1.0},
        {"min_size": 9},
        {"color_spaces": ["lab"]},
        {"max_proposals": 9},
        {"min_side": 9},
    ]
    searches = {SelectiveSearch(), *(SelectiveSearch(**arguments) for arguments in others)}
    assert len(searches) == 7
    assert all(s.settings["version"] for s in searches)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"scale": 0}, "scale"),
        ({"scale": []}, "scale"),
        ({"sigma": -1}, "sigma"),
        ({"min_size": 0}, "min_size"),
        ({"max_proposals": 0}, "max_proposals"),
        ({"min_side": 0}, "min_side"),
        ({"color_spaces": ["cmyk"]}, "color_spaces.*hsv, lab, rgb"),
        ({"color_spaces": []}, "color_spaces"),
    ],
)
def test_arguments_out_of_range(arguments, name):
    with pytest.raises(InputError, match=name):
        SelectiveSearch(**arguments)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_picture(image):
    with pytest.raises(InputError, match="needs a picture"):
        SelectiveSearch()(image)


def test_objects_in_scenes_are_found():
    drawn = scenes(40)
    search = SelectiveSearch(max_proposals=300)
    proposals = [search(scene.image) for scene in drawn]
    boxes = [scene.boxes for scene in drawn]
    assert sum(map(len, boxes)) > 80
    assert recall(proposals, boxes) >= 0.97
    assert recall(proposals, boxes, 0.7) >= 0.9
    elsewhere = [proposals[-1], *proposals[:-1]]  # boxes of other scenes: what chance finds
    assert recall(elsewhere, boxes) < 0.75


def test_recall_by_hand():
    proposals = [np.float32([[0, 0, 10, 10]]), np.zeros((0, 4), np.float32), np.float32([[0, 0, 4, 4], [5, 5, 9, 9]])]
    boxes = [torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 4]]), torch.tensor([[0.0, 0, 1, 1]]), torch.zeros(0, 4)]
    assert recall(proposals, boxes) == pytest.approx(1 / 3)  # IoU 0.5, 0.4, none
    assert recall(proposals, boxes, 0.4) == pytest.approx(2 / 3)
    assert np.isnan(recall(proposals[2:], boxes[2:]))
    assert np.isnan(recall([], []))
