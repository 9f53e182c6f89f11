"""Boxes: how much two overlap, how a network describes one, which object an anchor is to find, which boxes to keep.

A box is x1, y1, x2, y2 in pixels, continuous coordinates, x1 <= x2 and y1 <= y2: one that covers the pixel at column 0
only has x1 = 0 and x2 = 1. Every function takes empty tensors, any device and any dtype. What is computed from half
precision or integers is float32: half precision ends at 65504, less than the area of a box of 256 x 256.

Shapes: N and M boxes, K boxes for each of the N (one a class, for instance).
"""

import math

import torch
from torch import Tensor

NEGATIVE = -1  # of `match`: this reference is background
NEUTRAL = -2  # of `match`: too near an object to be called background, not near enough to be the object
SMALLEST = 1e-6  # pixels: `encode` takes smaller widths and heights for this, since log(0) and x / 0 are infinite
LARGEST_LOG_SCALE = math.log(1000 / 16)  # `decode` enlarges no reference more than 62.5 times, so that exp stays finite


def _float(x: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def area(boxes: Tensor) -> Tensor:
    """Width times height: (N, 4) to (N,)."""
    x1, y1, x2, y2 = _float(boxes).unbind(-1)
    return (x2 - x1) * (y2 - y1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of each box in `a` (N, 4) with each in `b` (M, 4): (N, M), in [0, 1].

    It is 0 where the union is empty, as of two boxes without area.
    """
    a, b = _float(a), _float(b)
    upper_left = torch.maximum(a[:, None, :2], b[None, :, :2])  # (N, M, 2)
    lower_right = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = (lower_right - upper_left).clamp(min=0).prod(dim=2)  # (N, M)
    union = area(a)[:, None] + area(b)[None] - intersection
    return intersection / union.where(union > 0, 1)


def _centres_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, width and height, each (...)."""
    x1, y1, x2, y2 = _float(boxes).unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def encode(
    boxes: Tensor, references: Tensor, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """What a network is to say of each reference (anchor, proposal) to become the box (Girshick et al. 2014, C).

        tx = (x - xa) / wa    ty = (y - ya) / ha    tw = log(w / wa)    th = log(h / ha)

    with x, y the centre, w, h the size and a the reference: the same numbers for small and large objects.

    Args:
        boxes: (N, 4).
        references: (N, 4). Sizes of boxes and references below `SMALLEST` are taken for it.
        weights: factors of tx, ty, tw, th. (10, 10, 5, 5), of Faster R-CNN's code, bring the offsets to a variance of about 1.

    Returns:
        Offsets (N, 4), finite.
    """
    x, y, w, h = _centres_and_sizes(boxes)
    xa, ya, wa, ha = _centres_and_sizes(references)
    w, h, wa, ha = (size.clamp(min=SMALLEST) for size in (w, h, wa, ha))
    offsets = (x - xa) / wa, (y - ya) / ha, torch.log(w / wa), torch.log(h / ha)
    return torch.stack([weight * offset for weight, offset in zip(weights, offsets, strict=True)], dim=-1)


def decode(
    offsets: Tensor, references: Tensor, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """The boxes that the offsets make of the references: the inverse of `encode`.

    Args:
        offsets: (N, 4), or (N, K, 4) for K boxes of each reference. tw and th are at most `LARGEST_LOG_SCALE`.
        references: (N, 4).
        weights: those of `encode`.

    Returns:
        Boxes of the offsets' shape. They may reach beyond the picture: see `clip`.
    """
    if offsets.ndim == 3:
        references = references[:, None]  # (N, 1, 4)
    xa, ya, wa, ha = _centres_and_sizes(references)
    tx, ty, tw, th = (t / weight for t, weight in zip(_float(offsets).unbind(-1), weights, strict=True))
    x, y = xa + tx * wa, ya + ty * ha
    w, h = wa * tw.clamp(max=LARGEST_LOG_SCALE).exp(), ha * th.clamp(max=LARGEST_LOG_SCALE).exp()
    return torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], dim=-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of each box (..., 4) inside a picture of `size`, its height and width; one outside keeps no area."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], dim=-1)


def match(overlaps: Tensor, positive: float, negative: float, keep_best: bool = False) -> Tensor:
    """Which object each reference is to find (Ren et al. 2015, section 3.1.2).

    Args:
        overlaps: IoU (N, M) of N references with M objects.
        positive: a reference whose largest IoU is at least this finds that object (the first of equals),
        negative: one whose largest is below this is NEGATIVE, and the rest is NEUTRAL: it teaches nothing.
        keep_best: the references that an object overlaps most, however little, are positive as well. As in torchvision's
            `Matcher`, such a reference finds the object *it* overlaps most, which may be another. Unlike there, an
            object that overlaps no reference has none: torchvision takes all references with IoU 0 for its best, which
            makes the background positive.

    Returns:
        (N,) int64: the object's index, or NEGATIVE or NEUTRAL. Without objects all are NEGATIVE.
    """
    if overlaps.numel() == 0:
        return overlaps.new_full(overlaps.shape[:1], NEGATIVE, dtype=torch.int64)
    largest, nearest = overlaps.max(dim=1)  # (N,)
    matches = nearest.where(largest >= positive, NEUTRAL).where(largest >= negative, NEGATIVE)
    if keep_best:
        best = overlaps.amax(dim=0)  # (M,): the largest IoU of each object
        is_best = ((overlaps == best) & (overlaps > 0)).any(dim=1)  # (N,), equals included
        matches = nearest.where(is_best, matches)
    return matches


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: take the best box, drop those that overlap it by more than the threshold, and so on.

    To be read: the detectors call `torchvision.ops.batched_nms`, which is the same for each class by itself, and fast.
    (On a CPU it compares float32 with the threshold's float64, so that an IoU of 3/10 exceeds a threshold of 0.3.)

    Args:
        boxes: (N, 4).
        scores: (N,); of equal scores the first box comes first.
        threshold: IoU above which the worse box is dropped.

    Returns:
        (K,) int64: the indices of what is kept, by falling score.
    """
    rest = scores.argsort(descending=True, stable=True)
    kept = []
    while len(rest):
        best, rest = rest[:1], rest[1:]
        kept.append(best)
        rest = rest[iou(boxes[best], boxes[rest])[0] <= threshold]
    return torch.cat(kept) if kept else rest


def count_windows(height: int, width: int) -> int:
    """How many boxes a picture has: a window starts and ends at any of its rows and columns. H(H+1)/2 · W(W+1)/2."""
    return (height * (height + 1) // 2) * (width * (width + 1) // 2)
