"""Localisation of a single object: what is it, and where? One network with two heads.

Shapes: B batch, H height, W width, D maps, S side of the pooled maps, K classes.

Source: the lecture on object detection; Sermanet et al. 2014 (OverFeat) has the same two heads on shared maps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lit_models.backbones import Backbone
from lit_models.boxes import clip
from lit_models.detector import Detector
from runner.errors import InputError


class Localizer(Detector):
    """Images with one object each to its class and its box: the loss is L_class + box_weight * L_box.

    L_class is the cross-entropy; L_box the mean squared error of x1, y1, x2, y2, as shares of the batch's width and
    height. Beside a detector's metrics there are `acc`, the share of classes that are right, and `iou`, the mean overlap
    of the box and the object's.

    Args:
        num_classes: K.
        backbone: with one layer of maps.
        size: S; for the box, the maps are averaged over a grid of S x S cells, which keeps where something is.
        hidden: units of the box head's hidden layer.
        box_weight: lambda.
        detector: arguments of `Detector`, of which the thresholds have no use: one box is found, whatever its score.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        size: int = 8,
        hidden: int = 256,
        box_weight: float = 20.0,
        **detector,
    ):
        super().__init__(num_classes=num_classes, **detector)
        self.backbone, self.pretrained = backbone, backbone.pretrained
        self.box_weight = box_weight
        width = backbone.channels[-1]
        self.class_head = nn.Sequential(
            nn.AdaptiveMaxPool2d(1),  # a class is the same wherever it is: (B, D, h, w) -> (B, D, 1, 1)
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )
        self.box_head = nn.Sequential(
            nn.Conv2d(width, 32, kernel_size=1),  # fewer maps: the next layer has a weight for each pixel
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(size),
            nn.Flatten(),  # (B, 32, S, S) -> (B, 32 * S * S)
            nn.Linear(32 * size**2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 4),
        )
        with torch.no_grad():  # it begins with a box in the middle of the picture
            self.box_head[-1].weight.mul_(0.1)
            self.box_head[-1].bias.copy_(torch.tensor([0.3, 0.3, 0.7, 0.7]))
        for stage in ("val", "test"):
            setattr(self, f"{stage}_acc", MulticlassAccuracy(num_classes, average="micro"))
            setattr(self, f"{stage}_iou", MeanMetric())

    def heads(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K), and boxes (B, 4) as shares of the width and height of the batch's images (B, 3, H, W)."""
        maps = self.backbone(images)[-1]  # (B, D, h, w)
        return self.class_head(maps).float(), self.box_head(maps).float()

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return both losses."""
        logits, boxes = self.heads(images)
        labels, wanted = the_objects(targets)
        return {
            "class_loss": F.cross_entropy(logits, labels),
            "box_loss": self.box_weight * F.mse_loss(boxes, wanted / _scale(images)),
        }

    def forward(self, images: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return one box for each image: see `Detector`."""
        logits, boxes = self.heads(images)
        scores, labels = logits.softmax(dim=1).max(dim=1)  # (B,), (B,)
        boxes = boxes * _scale(images)
        return [
            {"boxes": clip(box[None], target["size"]), "scores": score[None], "labels": label[None]}
            for box, score, label, target in zip(boxes, scores, labels, targets, strict=True)
        ]

    def validation_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> None:
        """Add a batch to the validation's metrics."""
        found = self(*batch)
        self.update_map(self.val_map, found, batch[1])
        self._evaluate("val", found, batch[1])

    def test_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> list[dict[str, Tensor]]:
        """Add a batch to the test's metrics; return the boxes, for the pictures."""
        found = super().test_step(batch, batch_idx)
        self._evaluate("test", found, batch[1])
        return found

    def _evaluate(self, stage: str, found: list[dict], targets: list[dict]) -> None:
        labels, boxes = the_objects(targets)
        acc, iou = getattr(self, f"{stage}_acc"), getattr(self, f"{stage}_iou")
        acc.update(torch.cat([f["labels"] for f in found]), labels)
        iou.update(pairwise_iou(torch.cat([f["boxes"] for f in found]), boxes))
        self.log(f"{stage}/acc", acc, batch_size=len(labels), prog_bar=True)
        self.log(f"{stage}/iou", iou, batch_size=len(labels), prog_bar=True)


def the_objects(targets: list[dict]) -> tuple[Tensor, Tensor]:
    """Return each image's object: labels (B,) and boxes (B, 4).

    Raises:
        InputError: there is an image with none, or with several.
    """
    counts = {len(target["labels"]) for target in targets}
    if counts != {1}:
        raise InputError(f"Localizer finds one object in each picture, and there is one with {max(counts - {1})}: "
                         "another detector finds several; of Shapes, --data.single_object true")  # fmt: skip
    return torch.cat([t["labels"] for t in targets]), torch.cat([t["boxes"] for t in targets])


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of each box of `a` (N, 4) with that of the same number in `b` (N, 4): (N,)."""
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)  # (N, 2)
    shared = sides.prod(dim=1)
    union = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(dim=1) + (b[:, 2:] - b[:, :2]).prod(dim=1) - shared
    return shared / union.clamp(min=1e-6)


def _scale(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    return torch.tensor([width, height, width, height], device=images.device)
