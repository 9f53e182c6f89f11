"""Fully convolutional network: a classifier of convolutions alone tells the class of every place (Long et al. 2015).

What was done before is a sliding window: the class of a pixel is that of a crop around it, and takes a pass of the
network. Neighbours' crops share almost all of their pixels, so almost all of the work is done again and again. For the
network of shapes_fcn.yaml, on 128 x 128 pixels, with crops of 64 x 64:

    sliding window    16,384 passes of 48.1 million multiply-adds    788 billion
    convolutional     1 pass                                         192.5 million, 1/4,096 of it

Shapes: B batch, C channels, H height, W width, D maps of a layer, h and w their sides, K classes, r a factor.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.backbones import Backbone
from lit_models.segmenter import Segmenter, pad
from runner.errors import InputError


class FCN(Segmenter):
    """FCN: scores of coarse maps, enlarged and added to those of finer ones, and enlarged to the picture.

    With maps at strides 8, 16 and 32, `skips` 0, 1 and 2 are the paper's FCN-32s, FCN-16s and FCN-8s. Coarse maps know
    what is there, fine ones where. Scores are enlarged in one of three ways:

    - `bilinear`: interpolated, nothing is learned.
    - `transposed`: by a transposed convolution of 2 r x 2 r, which begins as bilinear interpolation. As in the paper,
      those between maps are learned, and the last, to the picture, stays what it is.
    - `unpool`: max unpooling. A coarse score goes to one place of the r x r that it stands for, that at which max
      pooling of the finer scores finds its maximum; elsewhere are zeros, which a convolution then fills. (In Noh et al.
      2015 the network's own pooling tells the place; many backbones have strides instead.) From the finest map to the
      picture, where nothing tells, it is bilinear.

    Pictures are padded with copies of their edges until all maps have whole sides, of two at least: batch norm needs
    more than one pixel.

    Args:
        num_classes: K, or 1: see `Segmenter`.
        backbone: its layers' maps, from fine to coarse, of which the coarsest `skips` + 1 are used.
        skips: how many finer maps are added.
        upsample: how scores are enlarged.
        hidden: D of a 3 x 3 convolution with batch norm before the coarsest map's scores; 0: none. (The paper has two,
            of 7 x 7 and 1 x 1, with 4096; torchvision one like this, with a quarter of the coarsest map's D.)
        dropout: share of these dropped.
        segmenter: arguments of `Segmenter`.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        skips: int = 2,
        upsample: Literal["bilinear", "unpool", "transposed"] = "transposed",
        hidden: int = 0,
        dropout: float = 0.1,
        **segmenter,
    ):
        super().__init__(num_classes=num_classes, **segmenter)
        channels, strides = backbone.channels, backbone.strides
        if not 0 <= skips < len(channels):
            raise InputError(
                f"skips: the backbone has maps of {len(channels)} layers, so 0 to {len(channels) - 1}, got {skips}"
            )
        if any(coarse % fine for fine, coarse in pairwise(strides)):
            raise InputError(f"backbone: its strides are {strides}; each must be a multiple of the one before")
        if upsample == "unpool" and not skips:
            raise InputError("upsample: unpool needs finer maps to tell the place: --model.skips 1, or more")
        if hidden < 0 or not 0 <= dropout < 1:
            raise InputError(f"hidden starts at 0, and dropout is a share, got {hidden} and {dropout}")
        self.backbone, self.skips, self.pretrained = backbone, skips, backbone.pretrained
        coarsest = channels[-1]
        self.head = nn.Sequential(nn.Conv2d(coarsest, num_classes, kernel_size=1))
        if hidden:
            self.head = nn.Sequential(
                nn.Conv2d(coarsest, hidden, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Conv2d(hidden, num_classes, kernel_size=1),
            )
        finer = range(len(channels) - 2, len(channels) - 2 - skips, -1)  # layers, from coarse to fine
        self.scores = nn.ModuleList(nn.Conv2d(channels[i], num_classes, kernel_size=1) for i in finer)
        for score in self.scores:  # as in the paper: what the coarsest map says comes first
            nn.init.zeros_(score.weight)
            nn.init.zeros_(score.bias)
        kind = {"bilinear": Bilinear, "unpool": MaxUnpool, "transposed": Transposed}[upsample]
        self.ups = nn.ModuleList(kind(strides[i + 1] // strides[i], num_classes) for i in finer)
        self.to_picture = (Bilinear if upsample == "unpool" else kind)(strides[-1 - skips], num_classes)
        self.to_picture.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K, H, W)."""
        height, width = images.shape[2:]
        stride = self.backbone.strides[-1]
        *fine, coarsest = self.backbone(pad(images, stride, least=2 * stride))  # each (B, D, h, w)
        scores = self.head(coarsest)  # (B, K, h, w)
        for maps, score, up in zip(
            reversed(fine), self.scores, self.ups, strict=False
        ):  # until there are no more skips
            own = score(maps)  # (B, K, r h, r w)
            scores = own + up(scores, own)
        return self.to_picture(scores)[:, :, :height, :width]


class Bilinear(nn.Module):
    """Bilinear interpolation: (B, K, h, w) to (B, K, r h, r w).

    Args:
        factor: r.
        channels: K.
    """

    def __init__(self, factor: int, channels: int):
        super().__init__()
        self.factor = factor

    def forward(self, scores: Tensor, finer: Tensor | None = None) -> Tensor:
        """Return the scores, enlarged; what the finer map says is not looked at."""
        return F.interpolate(scores, scale_factor=self.factor, mode="bilinear")


class Transposed(nn.ConvTranspose2d):
    """Transposed convolution that begins as bilinear interpolation, but at the border, beyond which it sees zeros.

    (B, K, h, w) to (B, K, r h, r w).

    Args:
        factor: r.
        channels: K.
    """

    def __init__(self, factor: int, channels: int):
        side = 2 * factor - factor % 2  # a pixel reaches to the middles of those beside it
        super().__init__(channels, channels, side, stride=factor, padding=(side - factor) // 2, bias=False)
        near = 1 - (torch.arange(side) - (side - 1) / 2).abs() / factor  # 1 at the pixel's middle, falling to 0
        with torch.no_grad():
            self.weight.zero_()
            self.weight[range(channels), range(channels)] = near[:, None] * near  # of each class to itself

    def forward(self, scores: Tensor, finer: Tensor | None = None) -> Tensor:
        """Return the scores, enlarged; what the finer map says is not looked at."""
        return super().forward(scores)


class MaxUnpool(nn.Module):
    """Max unpooling, and a convolution over the zeros that it leaves: (B, K, h, w) to (B, K, r h, r w).

    Args:
        factor: r.
        channels: K.
    """

    def __init__(self, factor: int, channels: int):
        super().__init__()
        self.factor = factor
        # so large that every pixel sees the place that its r x r was given
        self.fill = nn.Conv2d(channels, channels, kernel_size=2 * factor - 1, padding=factor - 1)

    def forward(self, scores: Tensor, finer: Tensor) -> Tensor:
        """Return the scores, enlarged, by where the finer ones (B, K, r h, r w) have their maxima."""
        _, places = F.max_pool2d(finer, self.factor, return_indices=True)  # (B, K, h, w)
        return self.fill(F.max_unpool2d(scores, places, self.factor))
