"""U-Net: down to where a pixel sees the whole, and up again beside what was seen on the way (Ronneberger et al. 2015).

Shapes: B batch, C channels, H height, W width, D maps of a level, K classes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.segmenter import Segmenter, pad
from runner.errors import InputError


class DoubleConv(nn.Sequential):
    """Two 3 x 3 convolutions, each with batch norm and ReLU: (B, D_in, H, W) to (B, D, H, W)."""

    def __init__(self, n_in: int, width: int):
        super().__init__(
            nn.Conv2d(n_in, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )


class UNet(Segmenter):
    """U-Net as in the lecture notes; with the defaults, 31,037,633 parameters for one output.

    Each level halves the sides and has more maps. On the way up a level takes the maps from below, twice as large, and
    beside them its own from the way down: these tell where, those from below what.

    Departures from the paper: convolutions are padded, so that maps keep their sides and nothing is cut off; they have
    batch norm, and no bias; there is no dropout, and no weight for pixels between cells.

    Args:
        num_classes: K, or 1: see `Segmenter`.
        channels: C.
        features: D of each level; at the bottom there are twice as many as on the last.
        fit: what is done with sides that do not halve to whole numbers on every level. `pad` repeats the picture's
            edges until they do, and cuts what comes of them off the logits. `resize`, as in the notes, drops a level's
            last row or column, and stretches the maps from below to the level's size, by which they shift against each
            other. In both, sides of less than two pixels at the bottom are padded: batch norm needs more than one.
        segmenter: arguments of `Segmenter`.
    """

    def __init__(
        self,
        num_classes: int = 1,
        channels: int = 3,
        features: tuple[int, ...] = (64, 128, 256, 512),
        fit: Literal["pad", "resize"] = "pad",
        **segmenter,
    ):
        super().__init__(num_classes=num_classes, **segmenter)
        if not features or min(features) < 1 or channels < 1:
            raise InputError(
                f"features: maps of one level at least, and channels from 1, got {features} and {channels}"
            )
        self.fit = fit
        self.downs = nn.ModuleList(
            DoubleConv(n_in, width) for n_in, width in zip((channels, *features), features, strict=False)
        )
        self.bottom = DoubleConv(features[-1], 2 * features[-1])
        self.ups, self.joins = nn.ModuleList(), nn.ModuleList()  # from the bottom up
        for width, below in zip(reversed(features), (2 * features[-1], *reversed(features)), strict=False):
            self.ups.append(nn.ConvTranspose2d(below, width, kernel_size=2, stride=2))
            self.joins.append(DoubleConv(2 * width, width))
        self.last = nn.Conv2d(features[0], num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K, H, W)."""
        height, width = images.shape[2:]
        multiple = 2 ** len(self.downs)
        x = pad(images, multiple if self.fit == "pad" else 1, least=2 * multiple)
        beside = []
        for down in self.downs:
            x = down(x)  # (B, D_in, H, W) -> (B, D, H, W)
            beside.append(x)
            x = F.max_pool2d(x, kernel_size=2)  # -> (B, D, H / 2, W / 2)
        x = self.bottom(x)
        for up, join, own in zip(self.ups, self.joins, reversed(beside), strict=True):
            x = up(x)  # (B, D_below, H / 2, W / 2) -> (B, D, H, W)
            if x.shape[2:] != own.shape[2:]:
                x = F.interpolate(x, own.shape[2:], mode="bilinear")
            x = join(torch.cat([own, x], dim=1))  # (B, 2 D, H, W) -> (B, D, H, W)
        return self.last(x)[:, :, :height, :width]
