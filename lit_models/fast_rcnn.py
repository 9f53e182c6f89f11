"""Fast R-CNN: the network sees the image once, and regions are cut out of its maps (Girshick 2015).

All else is R-CNN's: sampling, matching, heads. So the difference is what the two methods below say.

Shapes: B batch, H height, W width, R regions of all images, D maps.

Departures from the paper: its ancestor's matching, where the paper's negatives are the regions from IoU 0.1 to 0.5.
"""

from typing import Literal

from torch import Tensor
from torchvision.ops import roi_align, roi_pool

from lit_models.backbones import Backbone
from lit_models.rcnn import RCNN


class FastRCNN(RCNN):
    """One pass of the backbone for the whole image; each proposal's features come from its maps.

    Args:
        num_classes: K.
        backbone: with one layer of maps.
        pool: `roi_pool`, the paper's: the largest value in each cell of a grid of whole pixels; or `roi_align` (He et al.
            2017): values between pixels, so that nothing is rounded. Both are written out in `roi_pooling.py`.
        samples: values that RoI align takes from each of a cell's sides; their mean counts.
        box_loss: the paper's has a slope of at most 1, so that a box far off does not outweigh all others.
        rcnn: arguments of `RCNN`.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        pool: Literal["roi_pool", "roi_align"] = "roi_align",
        samples: int = 2,
        box_loss: Literal["l2", "smooth_l1"] = "smooth_l1",
        **rcnn,
    ):
        super().__init__(num_classes=num_classes, backbone=backbone, box_loss=box_loss, **rcnn)
        self.pool, self.samples = pool, samples

    def see(self, images: Tensor) -> Tensor:
        """Return the maps (B, D, H / stride, W / stride) of images (B, 3, H, W)."""
        return self.backbone(images)[-1].float()

    def features(self, maps: Tensor, boxes: list[Tensor]) -> Tensor:
        """Return features (R, D, size, size) of boxes (P, 4) in each of the images, cut out of the maps."""
        scale = 1 / self.backbone.strides[-1]
        if self.pool == "roi_pool":
            return roi_pool(maps, boxes, self.size, scale)
        return roi_align(maps, boxes, self.size, scale, sampling_ratio=self.samples, aligned=True)
