"""Selective Search: boxes that may hold an object, from segments merged by likeness (Uijlings et al. 2013, IJCV 104).

A picture is cut into small segments of one colour (Felzenszwalb and Huttenlocher 2004). The two neighbours most alike
are merged, again and again, until one region is left. Each region that ever was gives a box: so there are small and
large ones, without a sliding window. It learns nothing, and knows no classes.

Shapes: H height, W width of a picture; N segments; P proposals; D = 315 numbers of a region's two histograms.
"""

import heapq
import json
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from skimage.segmentation import felzenszwalb
from torch import Tensor

from lit_models.boxes import iou
from runner.errors import InputError

COLORS = {"hsv": cv2.COLOR_RGB2HSV_FULL, "lab": cv2.COLOR_RGB2LAB, "rgb": None}
COLOR_BINS, TEXTURE_BINS = 25, 10  # of each channel; of each channel and direction
DIRECTIONS = 8
COLORS_END = 3 * COLOR_BINS  # in a row of both histograms
D = COLORS_END + 3 * DIRECTIONS * TEXTURE_BINS


class SelectiveSearch:
    """Boxes that may hold an object, the most promising first; the same ones each time.

    Every scale is tried in every colour space: where one way of cutting a picture up loses an object, another may not.
    (The paper's fast version tries 8 ways: HSV and Lab, scales 50 and 100, likeness with and without colour. The
    defaults are chosen on drawn training scenes of 128 pixels, where two ways are enough; for photographs take the
    paper's scales, and its sigma 0.8.)

    Args:
        scale: of Felzenszwalb's segments, the larger, the fewer segments; one, or several.
        sigma: of the Gaussian that the picture is smoothed with before.
        min_size: pixels of the smallest segment.
        color_spaces: of `hsv`, `lab`, `rgb`.
        max_proposals: largest P.
        min_side: smallest width and height of a box in pixels, in a picture that is as wide and as high.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        scale: float | list[float] = 50.0,
        sigma: float = 0.5,
        min_size: int = 20,
        color_spaces: tuple[str, ...] = ("hsv", "lab"),
        max_proposals: int = 2000,
        min_side: int = 8,
    ):
        self.scale = [float(s) for s in np.atleast_1d(scale)]
        self.sigma, self.min_size, self.color_spaces = float(sigma), int(min_size), list(color_spaces)
        self.max_proposals, self.min_side = int(max_proposals), int(min_side)
        if not self.scale or min(self.scale) <= 0:
            raise InputError(f"scale must be above 0, or several that are, got {scale}")
        if not self.color_spaces or not COLORS.keys() >= set(self.color_spaces):
            raise InputError(
                f"color_spaces must be some of {', '.join(COLORS)}, got {', '.join(color_spaces) or 'none'}"
            )
        if sigma < 0:
            raise InputError(f"sigma must be at least 0, got {sigma}")
        for name in ("min_size", "max_proposals", "min_side"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What the boxes depend on besides the picture. `version` goes up when the same arguments give other boxes."""
        return {"method": type(self).__name__, "version": 1, **vars(self)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SelectiveSearch) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(json.dumps(self.settings))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return boxes (P, 4) float32 (x1, y1, x2, y2) in a picture (H, W, 3), or grey (H, W), of uint8.

        No two are the same. It takes about 1 kB of memory a pixel.

        Raises:
            InputError: it is no such picture.
        """
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
            raise InputError(f"Selective Search needs a picture (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
        if image.ndim == 2:
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)  # (H, W) -> (H, W, 3)
        height, width = image.shape[:2]
        boxes, order = [], []
        random = np.random.default_rng(0)
        for name in self.color_spaces:
            pixels = image if COLORS[name] is None else cv2.cvtColor(image, COLORS[name])
            bins = histogram_bins(pixels)
            for scale in self.scale:
                segments = felzenszwalb(pixels, scale=scale, sigma=self.sigma, min_size=self.min_size)  # (H, W)
                found = merge(segments, bins)  # the whole picture last
                boxes.append(found)
                # the paper's order: 1 is the whole picture; chance keeps large regions from always being the first
                order.append(random.random(len(found)) * np.arange(len(found), 0, -1))
        boxes = np.concatenate(boxes)[np.argsort(np.concatenate(order), kind="stable")]
        sides = boxes[:, 2:] - boxes[:, :2]
        boxes = boxes[(sides >= np.minimum(self.min_side, (width, height))).all(axis=1)]
        first = np.sort(np.unique(boxes, axis=0, return_index=True)[1])  # of equal boxes, the first
        return boxes[first[: self.max_proposals]].astype(np.float32)


# -- regions -----------------------------------------------------------------------------------------------------------


def histogram_bins(pixels: np.ndarray) -> np.ndarray:
    """Return, for a picture (H, W, 3) of uint8, which of the D bins its pixels count in: (27, H * W).

    Each pixel counts once for each channel's colour (3), then for each direction's and channel's texture (24).
    """
    colors = pixels.reshape(-1, 3).T.astype(np.int64) * COLOR_BINS // 256  # (3, H * W)
    # Gaussian derivatives, sigma 1, along x and y; of any other direction they are a weighted sum of these two
    x = np.arange(-3, 4)
    gaussian = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    across = [
        cv2.sepFilter2D(pixels, cv2.CV_32F, *kernels, borderType=cv2.BORDER_REPLICATE)
        for kernels in ((x * gaussian, gaussian), (gaussian, x * gaussian))
    ]
    angles = 2 * np.pi * np.arange(DIRECTIONS, dtype=np.float32) / DIRECTIONS
    slopes = np.multiply.outer(np.cos(angles), across[0]) + np.multiply.outer(np.sin(angles), across[1])
    slopes = slopes.reshape(DIRECTIONS, -1, 3).transpose(0, 2, 1).reshape(DIRECTIONS * 3, -1)  # (24, H * W)
    # what rises in one direction falls in the opposite one, which is among the eight: there it counts as 0
    steps = TEXTURE_BINS / max(slopes.max(), 1.0)  # a picture's own largest slope: few have the largest possible one
    textures = (slopes * steps).astype(np.int64).clip(0, TEXTURE_BINS - 1)
    starts = COLOR_BINS * np.arange(3), COLORS_END + TEXTURE_BINS * np.arange(3 * DIRECTIONS)
    return np.concatenate([colors + starts[0][:, None], textures + starts[1][:, None]])


def histograms(segments: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Return (N, D): of each segment the histogram of colour (75), which sums to 1, and that of texture (240), too.

    Args:
        segments: (H, W), each pixel's segment, 0 to N - 1.
        bins: of `histogram_bins`.
    """
    segments = segments.reshape(-1)
    sizes = np.bincount(segments)[:, None]  # (N, 1)
    counts = np.bincount((segments * D + bins).reshape(-1), minlength=len(sizes) * D)
    counts = counts.reshape(-1, D).astype(np.float32)  # (N * D,) -> (N, D)
    counts[:, :COLORS_END] /= 3 * sizes
    counts[:, COLORS_END:] /= 3 * DIRECTIONS * sizes
    return counts


def bounding_boxes(segments: np.ndarray) -> np.ndarray:
    """Return the boxes (N, 4) of segments (H, W); a box ends behind its last pixel."""
    n = int(segments.max()) + 1
    y, x = np.indices(segments.shape)
    boxes = np.tile([*segments.shape[::-1], 0, 0], (n, 1))  # (N, 4)
    for column, values in enumerate((x, y)):
        np.minimum.at(boxes[:, column], segments, values)
        np.maximum.at(boxes[:, column + 2], segments, values + 1)
    return boxes


def touching(segments: np.ndarray) -> np.ndarray:
    """Return the pairs (M, 2) of segments that share an edge of a pixel, the smaller number first, each pair once."""
    sides = ((segments[:, :-1], segments[:, 1:]), (segments[:-1], segments[1:]))
    pairs = np.concatenate([np.stack([a[a != b], b[a != b]], axis=1) for a, b in sides])  # (pixels at a border, 2)
    pairs.sort(axis=1)
    n = segments.max() + 1
    return np.stack(np.divmod(np.unique(pairs[:, 0] * n + pairs[:, 1]), n), axis=1)


def similarity(histograms: tuple, sizes: tuple, boxes: tuple, area: int) -> np.ndarray:
    """Return how alike regions a and b are, 0 to 4: the sum of the paper's similarities of colour, texture, size, fill.

    Args:
        histograms: of a and of b, (..., D); the sum of minima of both kinds is the sum of both similarities.
        sizes: of a and of b in pixels, (...).
        boxes: of a and of b, (..., 4).
        area: H * W.
    """
    alike = np.minimum(*histograms).sum(axis=-1)
    sides = np.maximum(boxes[0][..., 2:], boxes[1][..., 2:]) - np.minimum(boxes[0][..., :2], boxes[1][..., :2])
    both = sizes[0] + sizes[1]
    size = 1 - both / area  # small regions first, so that boxes of all sizes come from all parts of the picture
    fill = 1 - (sides.prod(axis=-1) - both) / area  # a region in a gap of another one: together they fill a box
    return alike + size + fill


def merge(segments: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Merge the two neighbours most alike until one is left; return the boxes (2 N - 1, 4) of all there ever were.

    The N segments come first, then what was merged, the whole picture last.

    Args:
        segments: (H, W), each pixel's segment, 0 to N - 1.
        bins: of `histogram_bins`.
    """
    n, area = int(segments.max()) + 1, segments.size
    # float32 counts pixels exactly up to 16 million
    hists, sizes, boxes = (np.empty((2 * n - 1, *rest), np.float32) for rest in ((D,), (), (4,)))
    hists[:n], boxes[:n] = histograms(segments, bins), bounding_boxes(segments)
    sizes[:n] = np.bincount(segments.reshape(-1))
    neighbours = [set() for _ in range(2 * n - 1)]

    def alike(a: np.ndarray | int, b: np.ndarray) -> np.ndarray:
        return similarity((hists[a], hists[b]), (sizes[a], sizes[b]), (boxes[a], boxes[b]), area)

    pairs = touching(segments)
    for a, b in pairs.tolist():
        neighbours[a].add(b)
        neighbours[b].add(a)
    queue = [(-s, a, b) for s, (a, b) in zip(alike(*pairs.T).tolist(), pairs.tolist(), strict=True)]
    heapq.heapify(queue)  # the most alike first
    for new in range(n, 2 * n - 1):
        _, a, b = heapq.heappop(queue)
        while b not in neighbours[a]:  # one of them has been merged since
            _, a, b = heapq.heappop(queue)
        sizes[new] = sizes[a] + sizes[b]
        hists[new] = (sizes[a] * hists[a] + sizes[b] * hists[b]) / sizes[new]
        boxes[new, :2] = np.minimum(boxes[a, :2], boxes[b, :2])
        boxes[new, 2:] = np.maximum(boxes[a, 2:], boxes[b, 2:])
        around = sorted((neighbours[a] | neighbours[b]) - {a, b})
        for other in around:
            neighbours[other] -= {a, b}
            neighbours[other].add(new)
        neighbours[a], neighbours[b], neighbours[new] = set(), set(), set(around)
        for s, other in zip(alike(new, np.array(around, int)).tolist(), around, strict=True):
            heapq.heappush(queue, (-s, other, new))
    return boxes


def recall(
    proposals: Sequence[np.ndarray | Tensor], boxes: Sequence[np.ndarray | Tensor], threshold: float = 0.5
) -> float:
    """Return the share of all objects that a proposal overlaps with an IoU of at least `threshold`; nan without any.

    Args:
        proposals: of each picture, (P, 4).
        boxes: of each picture's objects, (N, 4).
    """
    hit = [
        (iou(torch.as_tensor(b), torch.as_tensor(p)) >= threshold).any(dim=1)  # (N, P) -> (N,)
        for p, b in zip(proposals, boxes, strict=True)
    ]
    return torch.cat(hit).float().mean().item() if hit else float("nan")
