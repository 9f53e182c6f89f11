"""Mask R-CNN: Faster R-CNN that also tells which pixels are the object's (He et al. 2017).

Beside the heads for class and box there is one for the mask. Those flatten a region's features; this one keeps them
where they are, with convolutions only. It makes a mask for each class, each pixel by itself: which class it is, is the
other head's to say, and no two classes compete for a pixel. Masks are made of the boxes that are left in the end, not of
all regions.

Shapes: B batch, H height, W width, h and w height and width of a picture without padding, D maps, N objects of a picture,
M detections of a picture, P regions of a picture and R of all, K classes, m side of a region's features, S = 2m side of
a mask.

Departures from the paper: those of `faster_rcnn.py`, which are torchvision's.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from lit_models import faster_rcnn
from lit_models.backbones import Backbone
from lit_models.detector import mean_average_precision
from lit_models.faster_rcnn import FasterRCNN
from lit_models.fpn import load_detector
from runner.errors import InputError


class MaskHead(nn.Module):
    """3 x 3 convolutions, twice the size, and a mask for each class: features (R, D, m, m) to logits (R, K, 2m, 2m).

    Args:
        channels: D.
        widths: maps of each convolution.
        num_classes: K.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], num_classes: int):
        super().__init__()
        pairs = zip((channels, *widths), widths, strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, kernel_size=3, padding=1) for a, b in pairs)
        self.up = nn.ConvTranspose2d(widths[-1], widths[-1], kernel_size=2, stride=2)
        self.logits = nn.Conv2d(widths[-1], num_classes, kernel_size=1)
        for layer in (*self.convs, self.up):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.logits.weight, std=0.001)  # as the authors' code: every pixel begins at 0.5
        nn.init.zeros_(self.logits.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, in float32."""
        x = features.to(self.logits.weight.dtype)
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.logits(F.relu(self.up(x))).float()


class MaskRCNN(FasterRCNN):
    """Faster R-CNN with a mask for each detection.

    Targets have `masks` (N, h, w) bool, as large as the picture; detections too, (M, h, w).

    With ResNet-50, a pyramid of 256 channels with `extra: pool`, and 90 classes it is torchvision's
    `maskrcnn_resnet50_fpn`, whose labels minus 1 are ours.

    Validation and test add `mask_map`, `mask_map_50` and `mask_map_75`, where IoU is that of masks; test also
    `test_mask_ap/<class>`.

    Args:
        num_classes: K.
        backbone, weights: as in `FasterRCNN`.
        mask_size: m.
        mask_widths: maps of each of the mask head's 3 x 3 convolutions.
        faster_rcnn: arguments of `FasterRCNN`. `aligned` goes for masks as well: they are cut out for training, and pasted
            into the picture, with nothing rounded; without it as by torchvision. (Masks in `Shapes`, cut out and pasted
            again, overlap what they were by IoU 0.997 with it, 0.931 without.)
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        weights: str | list[str] | None = None,
        mask_size: int = 14,
        mask_widths: tuple[int, ...] = (256, 256, 256, 256),
        **faster_rcnn,
    ):
        super().__init__(num_classes=num_classes, backbone=backbone, **faster_rcnn)
        if not mask_widths or min(mask_size, *mask_widths) < 1:
            raise InputError(
                f"mask_size {mask_size} and mask_widths {mask_widths} must be 1 or more, with at least one width"
            )
        self.mask_size = mask_size
        self.mask_head = MaskHead(backbone.channels[0], mask_widths, num_classes)
        self.val_mask_map = mean_average_precision("segm", self.max_detections)
        self.test_mask_map = self.val_mask_map.clone()
        last = ("heads.scores", "heads.offsets", "mask_head.logits")
        loaded = load_detector(self, weights, "maskrcnn_resnet50_fpn", from_torchvision, last, eps=0.0)
        self.pretrained = loaded or self.pretrained

    # -- training ----------------------------------------------------------------------------------------------------

    def region_losses(self, maps: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """Return the losses of a random choice of regions, and of the masks of those that are to find an object."""
        chosen = [self.sample(target) for target in targets]
        boxes, labels, wanted = [], [], []
        for target, regions in zip(targets, chosen, strict=True):
            positive = regions.labels > 0
            boxes.append(regions.boxes[positive])
            labels.append(regions.labels[positive] - 1)
            wanted.append(self.cut_out(target["masks"], regions.numbers[positive], boxes[-1]))
        logits = self.mask_logits(maps, boxes, torch.cat(labels))
        return self.losses_of_chosen(maps, chosen) | {"mask_loss": mask_loss(logits, torch.cat(wanted))}

    def mask_logits(self, maps: list[Tensor], boxes: list[Tensor], labels: Tensor) -> Tensor:
        """Return the logits of masks (R, S, S) of boxes (P, 4) in each image: of their K masks those of labels (R,)."""
        masks = self.mask_head(self.features(maps, boxes, self.mask_size))  # (R, D, m, m) -> (R, K, S, S)
        return masks[torch.arange(len(labels), device=labels.device), labels]

    def cut_out(self, masks: Tensor, objects: Tensor, boxes: Tensor) -> Tensor:
        """Return what is in boxes (P, 4) of the masks (N, h, w) of objects (P,), for the head to learn: (P, S, S)."""
        rows = torch.cat([objects[:, None].to(boxes), boxes], dim=1)  # (P, 5): object, x1, y1, x2, y2
        return roi_align(masks[:, None].to(boxes), rows, 2 * self.mask_size, aligned=self.aligned)[:, 0]

    # -- detection ---------------------------------------------------------------------------------------------------

    def find(self, maps: list[Tensor], targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found, with `mask_probabilities` (M, S, S) of each box."""
        found = super().detect(maps, targets)
        logits = self.mask_logits(maps, [f["boxes"] for f in found], torch.cat([f["labels"] for f in found]))
        parts = logits.sigmoid().split([len(f["boxes"]) for f in found])
        return [f | {"mask_probabilities": part} for f, part in zip(found, parts, strict=True)]

    def detect(self, maps: list[Tensor], targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found, with `masks` (M, h, w) bool."""
        found = self.find(maps, targets)
        for f, target in zip(found, targets, strict=True):
            f["masks"] = paste(f.pop("mask_probabilities"), f["boxes"], target["size"], rounded=not self.aligned)
        return found

    def predict_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> list[dict[str, Tensor]]:
        """Return the detections with `mask_probabilities` (M, S, S), to `paste`: masks of all pictures are too large."""
        return self.find(*self.propose(*batch))

    # -- steps -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that there are masks."""
        data = self.trainer.datamodule
        if stage != "predict" and getattr(data, "target", None) != "instances":
            hint = ": --data.target instances" if hasattr(data, "target") else f", and {type(data).__name__} has none"
            raise InputError(f"{type(self).__name__} needs a mask of each object{hint}")
        super().setup(stage)

    def validation_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> None:
        """Add a batch to the validation's metrics."""
        found = self(*batch)
        for metric in (self.val_map, self.val_mask_map):
            self.update_map(metric, found, batch[1])

    def add_to_test(self, found: list[dict[str, Tensor]], targets: list[dict]) -> list[dict[str, Tensor]]:
        """Add what was found to the test's metrics, and return it."""
        self.update_map(self.test_mask_map, found, targets)
        return super().add_to_test(found, targets)

    def on_validation_epoch_end(self) -> None:
        """Log."""
        super().on_validation_epoch_end()
        self._log_map("val", self.val_mask_map, "mask_")

    def on_test_epoch_end(self) -> None:
        """Log, with the average precision of each class."""
        super().on_test_epoch_end()
        classes = getattr(self.trainer.datamodule, "classes", None) or range(self.num_classes)
        by_class = self._log_map("test", self.test_mask_map, "mask_")
        self.log_dict({f"test_mask_ap/{classes[label]}": ap for label, ap in by_class.items()})


def mask_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean binary cross entropy of masks (R, S, S), each for itself; 0 where there is none."""
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    return loss / max(logits.numel(), 1)


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], rounded: bool = False) -> Tensor:
    """Put masks where their boxes are, and tell which pixels are the objects'.

    A pixel's probability is interpolated between the mask's places, at the pixel's middle; the object's are those above 0.5.
    Beyond its box a mask is 0, to which it falls off half a place before the edge and half a place after it.

    Args:
        masks: probabilities (M, S, S).
        boxes: (M, 4).
        size: height and width of the picture, h and w.
        rounded: whether boxes are moved to whole pixels first, as torchvision does.

    Returns:
        (M, h, w) bool.
    """
    with torch.autocast(masks.device.type, enabled=False):
        masks, boxes = masks.float(), boxes.float()
        side = masks.shape[-1]
        if rounded:
            boxes = whole_pixels(boxes, side)
        height, width = size
        rows = interpolation(boxes[:, 1], boxes[:, 3], side, height)  # (M, h, S)
        columns = interpolation(boxes[:, 0], boxes[:, 2], side, width)  # (M, w, S)
        pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
        for i, mask in enumerate(masks):  # one at a time: as floats they would take four times the memory
            pasted[i] = rows[i] @ mask @ columns[i].T > 0.5  # (h, S) (S, S) (S, w)
    return pasted


def interpolation(start: Tensor, end: Tensor, side: int, length: int) -> Tensor:
    """Return how much each of S places from start to end (M,) counts for each of `length` pixels: (M, length, S)."""
    pixels = torch.arange(length, device=start.device) + 0.5
    places = (pixels - start[:, None]) * (side / (end - start).clamp(min=1e-6))[:, None] - 0.5  # (M, length)
    return (1 - (places[..., None] - torch.arange(side, device=start.device)).abs()).clamp(min=0)


def whole_pixels(boxes: Tensor, side: int) -> Tensor:
    """Move boxes (M, 4) as torchvision does before it pastes: with a place more on every side they are whole pixels."""
    scale = (side + 2) / side
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    start, end = (centre - scale * half).trunc(), (centre + scale * half).trunc() + 1  # (M, 2)
    centre, half = (start + end) / 2, (end - start).clamp(min=1) / (2 * scale)
    return torch.cat([centre - half, centre + half], dim=1)


def from_torchvision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict of torchvision's `MaskRCNN` into one of ours, which has no mask for the background."""
    ours = {}
    for name, tensor in faster_rcnn.from_torchvision(weights).items():
        # the convolutions are 0.0, 1.0, ... in its code, mask_fcn1, mask_fcn2, ... in its file
        name = re.sub(r"^roi_heads\.mask_head\.(\d+)\.0\.", r"mask_head.convs.\1.", name)
        name = re.sub(r"^roi_heads\.mask_head\.mask_fcn(\d+)\.", lambda m: f"mask_head.convs.{int(m[1]) - 1}.", name)
        name = name.replace("roi_heads.mask_predictor.conv5_mask.", "mask_head.up.")
        if name.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
            name, tensor = name.replace("roi_heads.mask_predictor.mask_fcn_logits.", "mask_head.logits."), tensor[1:]
        ours[name] = tensor
    return ours
