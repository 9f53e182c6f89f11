"""A part of a feature map as a fixed number of cells, however large its box: RoIPool and RoIAlign.

Both are here to be read. The detectors call `torchvision.ops.roi_pool(maps, boxes, size, scale)` and
`torchvision.ops.roi_align(maps, boxes, size, scale, sampling_ratio=samples, aligned=True)`, which give the same and are
fast. (torchvision finds RoIPool's cells in float32, this file in whole numbers: there, the last of 7 cells of 57 columns
ends one column late.)

Shapes: B pictures, C channels, H height and W width of the maps, N boxes of all pictures, S cells a side.
"""

import math

import torch
from torch import Tensor


def roi_pool(maps: Tensor, boxes: list[Tensor], size: int, scale: float) -> Tensor:
    """The maximum of each cell, with the box and its cells rounded to whole positions of the map (Girshick 2015, section 2.1).

    The box is rounded to positions first, its last one included, so that it is at least 1 x 1; then each cell is rounded
    outwards: neighbouring cells may share a row or a column. A cell outside the map is 0.

    Args:
        maps: (B, C, H, W).
        boxes: for each picture (N_i, 4), x1, y1, x2, y2 in pixels of the picture. N_i may be 0.
        size: S.
        scale: positions of the map a pixel of the picture, 1 / 16 for a map with stride 16.

    Returns:
        (N, C, S, S), the pictures' boxes one after the other.
    """
    pooled = [maps.new_zeros(0, maps.shape[1], size, size)]
    for features, of_picture in zip(maps, boxes, strict=True):
        for left, top, right, bottom in (of_picture * scale).tolist():
            rows = _whole_cells(_round(top), _round(bottom), size, maps.shape[2])
            columns = _whole_cells(_round(left), _round(right), size, maps.shape[3])
            cells = [_maximum(features[:, y1:y2, x1:x2]) for y1, y2 in rows for x1, x2 in columns]  # S² of (C,)
            pooled.append(torch.stack(cells, dim=1).unflatten(1, (size, size))[None])  # (1, C, S, S)
    return torch.cat(pooled)


def _maximum(cell: Tensor) -> Tensor:
    """The largest of (C, h, w): (C,); 0 if there is none."""
    return cell.amax(dim=(1, 2)) if cell.numel() else cell.new_zeros(len(cell))


def _round(x: float) -> int:
    """To the nearest whole number, halves away from zero: Python's `round` takes them to the even one."""
    return math.floor(x + 0.5) if x >= 0 else math.ceil(x - 0.5)


def _whole_cells(first: int, last: int, size: int, length: int) -> list[tuple[int, int]]:
    """Start and end of each of the cells along one side, from `first` to `last` included, inside a map of `length`."""
    n = max(last - first + 1, 1)
    starts = (first + i * n // size for i in range(size))  # rounded down
    ends = (first - (-(i + 1) * n // size) for i in range(size))  # rounded up
    return [(min(max(start, 0), length), min(max(end, 0), length)) for start, end in zip(starts, ends, strict=True)]


def roi_align(maps: Tensor, boxes: list[Tensor], size: int, scale: float, samples: int = 2) -> Tensor:
    """The mean of points in each cell, interpolated between the map's positions, nothing rounded (He et al. 2017, section 3).

    A map's value belongs to the middle of its position, so a point at x lies at x - 0.5 in the map: torchvision's
    `aligned=True`. (The first implementations missed this half position.)

    Args:
        maps: (B, C, H, W).
        boxes: for each picture (N_i, 4), x1, y1, x2, y2 in pixels of the picture. N_i may be 0.
        size: S.
        scale: positions of the map a pixel of the picture, 1 / 16 for a map with stride 16.
        samples: points along each side of a cell, so that its mean is of samples² points.

    Returns:
        (N, C, S, S), the pictures' boxes one after the other.
    """
    pooled = [maps.new_zeros(0, maps.shape[1], size, size)]
    for features, of_picture in zip(maps, boxes, strict=True):
        for x1, y1, x2, y2 in of_picture * scale - 0.5:
            points = _interpolate(features, _points(y1, y2, size, samples), _points(x1, x2, size, samples))
            # (C, S * samples, S * samples) to (C, S, samples, S, samples)
            cells = points.unflatten(2, (size, samples)).unflatten(1, (size, samples))
            pooled.append(cells.mean(dim=(2, 4))[None])  # (1, C, S, S)
    return torch.cat(pooled)


def _points(start: Tensor, end: Tensor, size: int, samples: int) -> Tensor:
    """The middles of `samples` equal parts of each of `size` equal cells: (size * samples,)."""
    cell = (end - start) / size
    first = start + torch.arange(size, device=cell.device) * cell  # (size,)
    within = (torch.arange(samples, device=cell.device) + 0.5) * cell / samples  # (samples,)
    return (first[:, None] + within).flatten()


def _interpolate(features: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear interpolation of maps (C, H, W) at the rows y (P,) and columns x (Q,): (C, P, Q).

    Points up to 1 position outside take the value of the border; those beyond count as 0.
    """
    top, bottom, down, in_rows = _neighbours(y, features.shape[1])
    left, right, along, in_columns = _neighbours(x, features.shape[2])
    upper = features[:, top][:, :, left] * (1 - along) + features[:, top][:, :, right] * along  # (C, P, Q)
    lower = features[:, bottom][:, :, left] * (1 - along) + features[:, bottom][:, :, right] * along
    return (upper * (1 - down[:, None]) + lower * down[:, None]) * (in_rows[:, None] & in_columns)


def _neighbours(at: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions before and after the points, how far from the first to the second they are, and whether they count."""
    inside = (at >= -1) & (at <= length)
    at = at.clamp(0, length - 1)
    before = at.long()
    return before, (before + 1).clamp(max=length - 1), at - before, inside
