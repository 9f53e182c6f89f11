"""Anchors: boxes of a few sizes and shapes at every place of the maps, of which a network says how to move them (Ren et al. 2015).

Shapes: h and w of a map, A anchors of each of its places.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from runner.errors import InputError


class Anchors(nn.Module):
    """Each size in each aspect ratio, at each place of each map; the same boxes as torchvision's `AnchorGenerator`.

    Of size s and ratio r, one is s / sqrt(r) wide and s * sqrt(r) high, rounded to even pixels so that its centre is the
    upper left corner of its place. (Half a stride further would be the middle; torchvision's weights expect the corner.)

    Args:
        sizes: of each level: the square root of an anchor's area, in pixels of the picture.
        ratios: height over width.

    Attributes:
        counts: A of each level.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float] = (0.5, 1.0, 2.0)):
        super().__init__()
        if not sizes or not ratios or not all(sizes) or min([*ratios, *(s for level in sizes for s in level)]) <= 0:
            raise InputError(f"anchors: each level needs sizes, and ratios, above 0; got {sizes} and {ratios}")
        self.counts = [len(level) * len(ratios) for level in sizes]
        root = torch.tensor(ratios, dtype=torch.float32).sqrt()
        for i, level in enumerate(sizes):
            scale = torch.tensor(level, dtype=torch.float32)
            width, height = ((1 / root)[:, None] * scale).flatten(), (root[:, None] * scale).flatten()  # (A,)
            corners = torch.stack([-width, -height, width, height], dim=1) / 2  # (A, 4)
            # whole numbers, as integers: a model in half precision does not round them further
            self.register_buffer(f"base{i}", corners.round().long(), persistent=False)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Return each level's anchors (h * w * A, 4), float32: place by place, row by row.

        Args:
            maps: of each level, (..., h, w).
            size: height and width of the batch's pictures. A place is as many whole pixels as fit: size // (h, w).
        """
        if len(maps) != len(self.counts):
            raise InputError(f"anchors: there are sizes for {len(self.counts)} levels, and maps of {len(maps)}")
        anchors = []
        for i, level in enumerate(maps):
            base, (h, w) = getattr(self, f"base{i}"), level.shape[-2:]
            y = torch.arange(h, device=base.device) * (size[0] // h)  # (h,)
            x = torch.arange(w, device=base.device) * (size[1] // w)  # (w,)
            y, x = torch.meshgrid(y, x, indexing="ij")  # (h, w) each
            corner = torch.stack([x, y, x, y], dim=2)  # (h, w, 4)
            anchors.append((corner[:, :, None] + base).flatten(0, 2).float())  # (h, w, A, 4) -> (h * w * A, 4)
        return anchors


def places(x: Tensor, numbers: int) -> Tensor:
    """Turn what a convolution says of each anchor, (B, A * numbers, h, w), to anchors' order: (B, h * w * A, numbers)."""
    return x.unflatten(1, (-1, numbers)).permute(0, 3, 4, 1, 2).flatten(1, 3)
