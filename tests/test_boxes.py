"""The arithmetic of boxes, against torchvision's on many random cases: whole coordinates so that there are ties, no
boxes, boxes without area, boxes beyond the picture.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torchvision import ops
from torchvision.models.detection._utils import BoxCoder, Matcher

from lit_models.boxes import NEGATIVE, NEUTRAL, area, clip, count_windows, decode, encode, iou, match, nms
from lit_models.roi_pooling import roi_align, roi_pool

NONE = torch.zeros(0, 4)


def whole_boxes(n: int, generator: torch.Generator, limit: int = 8) -> Tensor:
    """(n, 4) with few different coordinates, some without width or height."""
    corners = torch.randint(0, limit, (n, 2), generator=generator)
    return torch.cat([corners, corners + torch.randint(0, limit, (n, 2), generator=generator)], dim=1).float()


def real_boxes(n: int, generator: torch.Generator, limit: float = 100) -> Tensor:
    """(n, 4) of sizes between a twentieth of `limit` and `limit`."""
    corners = torch.rand(n, 2, generator=generator) * limit
    return torch.cat([corners, corners + (0.05 + 0.95 * torch.rand(n, 2, generator=generator)) * limit], dim=1)


# area and IoU


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 40]])
    b = torch.tensor([[0.0, 0, 10, 5], [5, 5, 15, 15], [10, 0, 20, 10], [25, 20, 35, 40], [3, 3, 3, 9]])
    expected = torch.tensor([[0.5, 25 / 175, 0, 0, 0], [0, 0, 0, 100 / 300, 0]])
    torch.testing.assert_close(iou(a, b), expected)
    assert area(b).tolist() == [50, 100, 100, 200, 0]


def test_area_and_iou_are_torchvisions():
    g = torch.Generator().manual_seed(0)
    for case in range(1500):
        n, m = torch.randint(0, 12, (2,), generator=g).tolist()
        a, b = (whole_boxes(k, g) if case % 2 else real_boxes(k, g) for k in (n, m))
        assert torch.equal(area(a), ops.box_area(a))
        expected = ops.box_iou(a, b).nan_to_num(0)  # NaN there where both are the same point
        torch.testing.assert_close(iou(a, b), expected)
        assert iou(a, b).shape == (n, m)


def test_iou_of_nothing_is_0():
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert iou(point, point).tolist() == [[0]]
    boxes = torch.tensor([[3.0, 3, 3, 3], [0, 0, 2, 2]], requires_grad=True)
    iou(boxes, boxes).sum().backward()
    assert boxes.grad.isfinite().all()
    for n, m in ((0, 3), (3, 0), (0, 0)):
        assert iou(torch.ones(n, 4), torch.ones(m, 4)).shape == (n, m)
    assert area(NONE).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_every_dtype_has_room_for_an_area(dtype):
    a = torch.tensor([[0, 0, 512, 512], [512, 512, 1024, 1024]], dtype=dtype)
    assert area(a).tolist() == [2**18, 2**18]
    assert iou(a, a).tolist() == [[1, 0], [0, 1]]
    assert iou(a, a).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert encode(a, a).isfinite().all()
    torch.testing.assert_close(decode(encode(a, a.flip(0)), a.flip(0)), a.to(iou(a, a).dtype))
    assert nms(a, torch.tensor([1, 2], dtype=dtype), 0.5).tolist() == [1, 0]


# encode and decode


def test_encode_by_hand():
    reference = torch.tensor([[10.0, 20, 30, 60]])  # centre 20, 40; size 20, 40
    box = torch.tensor([[20.0, 30, 60, 50]])  # centre 40, 40; size 40, 20
    torch.testing.assert_close(encode(box, reference), torch.tensor([[1, 0, math.log(2), -math.log(2)]]))
    torch.testing.assert_close(encode(box, reference, (10, 10, 5, 5))[0, 2], torch.tensor(5 * math.log(2)))
    assert encode(box, box).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)])
def test_encode_and_decode_are_torchvisions_and_inverse(weights):
    g = torch.Generator().manual_seed(1)
    coder = BoxCoder(weights)
    for n in range(1, 40):
        boxes, references = real_boxes(n, g), real_boxes(n, g)
        offsets = encode(boxes, references, weights)
        torch.testing.assert_close(offsets, coder.encode_single(boxes, references))
        torch.testing.assert_close(decode(offsets, references, weights), boxes, rtol=1e-4, atol=1e-3)
        for several in (torch.randn(n, 4, generator=g) * 5, torch.randn(n, 3, 4, generator=g) * 5):
            decoded = decode(several, references, weights)
            torch.testing.assert_close(decoded.reshape(n, -1, 4), coder.decode(several.flatten(1), [references]))
            assert decoded.shape == several.shape


def test_offsets_stay_finite():
    g = torch.Generator().manual_seed(2)
    boxes, references = whole_boxes(200, g, limit=3), whole_boxes(200, g, limit=3)
    assert ((boxes[:, 2:] == boxes[:, :2]) & (references[:, 2:] > references[:, :2])).any()
    assert ((boxes[:, 2:] > boxes[:, :2]) & (references[:, 2:] == references[:, :2])).any()
    assert encode(boxes, references).isfinite().all()
    assert encode(boxes.half(), references.half()).isfinite().all()
    largest = decode(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0, 16, 16]]))[0]
    torch.testing.assert_close(largest[2:] - largest[:2], torch.tensor([1000.0, 1000.0]))
    assert decode(torch.tensor([[0.0, 0, -1e4, -1e4]]), torch.tensor([[0.0, 0, 16, 16]])).tolist() == [[8, 8, 8, 8]]


def test_the_gradient_of_a_decoded_box_reaches_its_offsets():
    offsets = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    references = real_boxes(5, torch.Generator().manual_seed(0)).double()
    assert torch.autograd.gradcheck(lambda t: decode(t, references, (2, 2, 1, 1)), offsets)


def test_no_boxes_are_encoded_to_none():
    assert encode(NONE, NONE).shape == (0, 4)
    assert decode(NONE, NONE).shape == (0, 4)
    assert decode(torch.zeros(0, 3, 4), NONE).shape == (0, 3, 4)


# clip


def test_clip_is_torchvisions():
    g = torch.Generator().manual_seed(3)
    boxes = real_boxes(60, g) * 3 - 100
    assert torch.equal(clip(boxes, (50, 120)), ops.clip_boxes_to_image(boxes, (50, 120)))
    assert torch.equal(clip(boxes.view(20, 3, 4), (50, 120)).view(60, 4), clip(boxes, (50, 120)))
    assert clip(torch.tensor([-5.0, -5, 500, 500]), (50, 120)).tolist() == [0, 0, 120, 50]
    assert clip(NONE, (50, 120)).shape == (0, 4)


# match


def test_match_by_hand():
    overlaps = torch.tensor([[0.8, 0.1], [0.1, 0.5], [0.4, 0.3], [0.1, 0.29], [0.0, 0.0]])
    assert match(overlaps, 0.7, 0.3).tolist() == [0, NEUTRAL, NEUTRAL, NEGATIVE, NEGATIVE]
    assert match(overlaps, 0.7, 0.3, keep_best=True).tolist() == [0, 1, NEUTRAL, NEGATIVE, NEGATIVE]
    assert match(overlaps, 0.5, 0.5).tolist() == [0, 1, NEGATIVE, NEGATIVE, NEGATIVE]


def test_match_is_torchvisions():
    g = torch.Generator().manual_seed(4)
    thresholds = ((0.7, 0.3), (0.5, 0.5), (0.5, 0.4), (0.25, 0.125))
    low_quality = 0
    for case in range(1500):
        n, m = torch.randint(1, 15, (2,), generator=g).tolist()
        references, objects = whole_boxes(n, g), whole_boxes(m, g)
        overlaps = iou(references, objects)
        overlaps = overlaps[:, overlaps.amax(dim=0) > 0]  # see the next test
        if overlaps.shape[1] == 0:
            continue
        positive, negative = thresholds[case % 4]
        for keep_best in (False, True):
            matches = match(overlaps, positive, negative, keep_best)
            assert torch.equal(matches, Matcher(positive, negative, keep_best)(overlaps.T.contiguous()))
            assert matches.dtype == torch.int64
        low_quality += not torch.equal(matches, match(overlaps, positive, negative))
    assert low_quality > 500


def test_an_object_that_nothing_overlaps_makes_no_background_positive():
    overlaps = torch.tensor([[0.9, 0.0], [0.0, 0.0], [0.1, 0.0]])
    assert match(overlaps, 0.7, 0.3, keep_best=True).tolist() == [0, NEGATIVE, NEGATIVE]
    assert Matcher(0.7, 0.3, True)(overlaps.T).tolist() == [0, 0, 0]  # if this changes, so may `match`'s docstring


def test_match_without_objects_or_references():
    for keep_best in (False, True):
        assert match(torch.zeros(3, 0), 0.7, 0.3, keep_best).tolist() == [NEGATIVE] * 3
        for m in (0, 3):
            nothing = match(torch.zeros(0, m), 0.7, 0.3, keep_best)
            assert (nothing.shape, nothing.dtype) == ((0,), torch.int64)


# non-maximum suppression


def test_nms_is_torchvisions():
    g = torch.Generator().manual_seed(5)
    dropped = 0
    for case in range(1500):
        n = int(torch.randint(0, 25, (), generator=g))
        if case % 2:  # ties, and thresholds that an IoU can equal
            boxes, scores = whole_boxes(n, g, limit=6), torch.randint(0, 6, (n,), generator=g).float()
            threshold = (0.0, 0.25, 0.5, 0.75, 1.0)[case // 2 % 5]
        else:
            boxes, scores = real_boxes(n, g), torch.rand(n, generator=g)
            threshold = (0.1, 0.3, 0.5, 0.7)[case // 2 % 4]
        kept = nms(boxes, scores, threshold)
        assert torch.equal(kept, ops.nms(boxes, scores, threshold))
        assert kept.dtype == torch.int64
        dropped += n - len(kept)
    assert dropped > 2000


def test_nms_for_each_class_is_torchvisions_batched_nms():
    g = torch.Generator().manual_seed(6)
    boxes, scores, labels = real_boxes(200, g), torch.rand(200, generator=g), torch.randint(0, 3, (200,), generator=g)
    kept = torch.cat(
        [(labels == k).nonzero()[:, 0][nms(boxes[labels == k], scores[labels == k], 0.3)] for k in range(3)]
    )
    kept = kept[scores[kept].argsort(descending=True)]
    assert torch.equal(kept, ops.batched_nms(boxes, scores, labels, 0.3))
    assert len(kept) > len(nms(boxes, scores, 0.3))


def test_count_windows_is_the_number_of_all_boxes():
    for height, width in ((1, 1), (2, 3), (5, 4)):
        rows = list(itertools.combinations(range(height + 1), 2))
        columns = list(itertools.combinations(range(width + 1), 2))
        assert count_windows(height, width) == len(list(itertools.product(rows, columns)))
    assert count_windows(500, 375) == 125250 * 70500
    assert count_windows(0, 5) == 0


# RoIPool and RoIAlign


def regions(case: int, g: torch.Generator) -> tuple[Tensor, list[Tensor], int, float]:
    """Maps of several pictures, boxes inside, partly and wholly outside, S, scale.

    Whole coordinates only where all that follows is exact in float32 (powers of 2): else the last bit decides, in
    torchvision's code as in ours, on which side of a border a point lies.
    """
    pictures, height, width = (int(torch.randint(1, limit, (), generator=g)) for limit in (4, 14, 14))
    maps = torch.randn(pictures, 2, height, width, generator=g)
    exact = case % 2
    scale = (1.0, 0.5, 0.25, 0.0625)[case // 2 % 4] if exact else (1.0, 0.3, 0.1)[case // 2 % 3]
    size = (1, 2, 4)[case // 2 % 3] if exact else (1, 2, 3, 5, 7)[case // 2 % 5]
    boxes, picture = [], torch.tensor([width, height]) / scale
    for _ in range(pictures):
        n = int(torch.randint(0, 5, (), generator=g))
        centres = (torch.rand(n, 2, generator=g) * 1.6 - 0.3) * picture
        sizes = torch.rand(n, 2, generator=g) * picture * (0.0, 0.05, 1.0, 1.5, 3.0)[case // 2 % 5]
        of_picture = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)
        boxes.append(of_picture.round() if exact else of_picture)
    return maps, boxes, size, scale


def test_roi_pool_is_torchvisions():
    g = torch.Generator().manual_seed(7)
    outside = 0
    for case in range(600):
        maps, boxes, size, scale = regions(case, g)
        pooled = roi_pool(maps, boxes, size, scale)
        assert torch.equal(pooled, ops.roi_pool(maps, boxes, size, scale))
        assert pooled.shape == (sum(map(len, boxes)), 2, size, size)
        outside += (pooled == 0).sum()
    assert outside > 1000


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_roi_align_is_torchvisions(samples):
    g = torch.Generator().manual_seed(8)
    for case in range(0, 400, 1 if samples != 3 else 2):  # a third is not exact
        maps, boxes, size, scale = regions(case, g)
        pooled = roi_align(maps, boxes, size, scale, samples)
        expected = ops.roi_align(maps, boxes, size, scale, samples, aligned=True)
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
        assert pooled.shape == (sum(map(len, boxes)), 2, size, size)


def test_roi_pool_rounds_and_roi_align_does_not():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)  # the middle of column x has the value x
    box = [torch.tensor([[1.0, 1, 5, 5]])]  # columns 1 to 4, whose middles are 1.5 to 4.5 in pixels
    assert roi_align(ramp, box, 2, 1.0)[0, 0, 0].tolist() == [1.5, 3.5]
    assert roi_pool(ramp, box, 2, 1.0)[0, 0, 0].tolist() == [3, 5]  # columns 1 to 5, in cells 1 to 3 and 3 to 5
    nearby = [box[0] + 0.25]
    assert roi_align(ramp, nearby, 2, 1.0)[0, 0, 0].tolist() == [1.75, 3.75]
    assert torch.equal(roi_pool(ramp, nearby, 2, 1.0), roi_pool(ramp, box, 2, 1.0))


def test_roi_gradients_are_torchvisions():
    g = torch.Generator().manual_seed(9)
    maps = torch.randn(2, 3, 9, 9, generator=g, requires_grad=True)
    boxes = [real_boxes(4, g, limit=30) - 5, NONE]
    weights = torch.randn(4, 3, 3, 3, generator=g)
    for ours, theirs in (
        (roi_pool, ops.roi_pool),
        (roi_align, lambda *arguments: ops.roi_align(*arguments, sampling_ratio=2, aligned=True)),
    ):
        gradients = [torch.autograd.grad((f(maps, boxes, 3, 0.3) * weights).sum(), maps)[0] for f in (ours, theirs)]
        torch.testing.assert_close(*gradients)
        assert gradients[0].any()


def test_no_regions():
    maps = torch.randn(2, 3, 5, 5)
    assert roi_pool(maps, [NONE, NONE], 7, 0.5).shape == (0, 3, 7, 7)
    assert roi_align(maps, [NONE, NONE], 7, 0.5).shape == (0, 3, 7, 7)
    with pytest.raises(ValueError, match="zip"):
        roi_pool(maps, [NONE], 7, 0.5)
