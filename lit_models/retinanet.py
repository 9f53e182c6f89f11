"""RetinaNet: one stage, and a loss that many easy negatives do not drown (Lin et al. 2017, "Focal loss").

Faster R-CNN first asks where something may be, and then looks at a few hundred such regions. Here every anchor of every
level says at once what it is and how far the object's box is from it. Nearly all of some ten thousand anchors are
background, and soon easily told to be; the focal loss counts what is told easily next to nothing.

Shapes: B batch, H height, W width, h, w of a level's map, D maps, A anchors of a place, P anchors of a picture, N objects
of a picture, K classes.

Departures from the paper, all but the last as in torchvision: the box loss is L1, not smooth L1; each picture's losses
are divided by its own positives; up to 1000 candidates a level are pairs of an anchor and a class, not anchors; a
tower's first weights keep the size of what passes through it (He et al. 2015), where the paper's, of standard deviation
0.01, are for 256 maps: in narrower towers the maps fade.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models import fpn
from lit_models.anchors import Anchors, places
from lit_models.boxes import NEUTRAL, clip, decode, encode, iou, match
from lit_models.detector import Detector
from lit_models.fpn import FeaturePyramid, load_detector
from runner.errors import InputError

PRIOR = 0.01  # what a new network says of every class at every anchor: from 0.5, the background would swamp the loss


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cross-entropy that counts less the surer the right answer is:  -alpha_t (1 - p_t)^gamma log p_t.

    p_t is the probability of what is right, sigmoid(logit) for a target of 1 and 1 - sigmoid(logit) for 0. An answer
    with p_t = 0.9 counts a hundredth of what it would in cross-entropy, with gamma 2. It and its gradient are finite for
    every finite logit.

    Args:
        logits: (...).
        targets: (...), 0 or 1.
        alpha: alpha_t of the ones; that of the zeros is 1 - alpha.
        gamma: 0 makes it a weighted cross-entropy.

    Returns:
        (...), float32.
    """
    logits, targets = logits.float(), targets.float()
    right = logits * (2 * targets - 1)  # its sigmoid is p_t
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    log_p = F.logsigmoid(right)
    log_rest = log_p - right  # log(1 - p_t), finite like log_p: no logarithm of a probability that was rounded to 0
    return -alpha_t * torch.exp(gamma * log_rest) * log_p


class Tower(nn.Sequential):
    """3 x 3 convolutions and ReLU in turn: maps (B, D, h, w) to (B, width, h, w).

    Args:
        channels: D.
        width: maps of each convolution.
        depth: convolutions.
        norm: from a number of maps to what comes between a convolution and its ReLU; None for nothing.
    """

    def __init__(self, channels: int, width: int, depth: int, norm: Callable[[int], nn.Module] | None = None):
        layers = []
        for i in range(depth):
            conv = nn.Conv2d(width if i else channels, width, kernel_size=3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
            layers += [conv, *([norm(width)] if norm else []), nn.ReLU(inplace=True)]
        super().__init__(*layers)


def last_layer(channels: int, outputs: int, bias: float = 0.0) -> nn.Conv2d:
    """Return a 3 x 3 convolution that says nearly the same, `bias`, everywhere."""
    conv = nn.Conv2d(channels, outputs, kernel_size=3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


class ClassHead(nn.Module):
    """Of each level's maps (B, D, h, w), class logits (B, h * w * A, K). All levels share its weights.

    Args:
        channels: D.
        width, depth, norm: of the tower.
        anchors: A.
        num_classes: K, each with a sigmoid of its own; there is no class for the background.
    """

    def __init__(self, channels: int, width: int, depth: int, anchors: int, num_classes: int, norm=None):
        super().__init__()
        self.num_classes = num_classes
        self.tower = Tower(channels, width, depth, norm)
        self.logits = last_layer(width if depth else channels, anchors * num_classes, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the logits of each level, in float32."""
        return [places(self.logits(self.tower(m)), self.num_classes).float() for m in maps]


class BoxHead(nn.Module):
    """Of each level's maps (B, D, h, w), offsets (B, h * w * A, 4) from its anchors; arguments as of `ClassHead`."""

    def __init__(self, channels: int, width: int, depth: int, anchors: int, norm=None):
        super().__init__()
        self.tower = Tower(channels, width, depth, norm)
        self.offsets = last_layer(width if depth else channels, 4 * anchors)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the offsets of each level, in float32."""
        return [places(self.offsets(self.tower(m)), 4).float() for m in maps]


class Levels(NamedTuple):
    """What the network says of a batch, for each level."""

    logits: list[Tensor]  # (B, h * w * A, K)
    offsets: list[Tensor]  # (B, h * w * A, 4)
    anchors: list[Tensor]  # (h * w * A, 4)


class RetinaNet(Detector):
    """Every anchor is classified, and moved onto an object.

    Args:
        num_classes: K.
        backbone: the maps of several strides.
        width: maps of the heads' convolutions; None: as many as a level has.
        depth: convolutions of each head before its last.
        anchor_scale: side of a level's smallest anchor, in strides; two others are 2^(1/3) and 2^(2/3) times as large.
        ratios: height over width of the anchors, each of which has each size.
        positive_iou: an anchor that overlaps an object by so much is to find it, and so is each that overlaps it most.
        negative_iou: one that overlaps none by so much is background; what is between counts as neither.
        alpha, gamma: of the focal loss.
        candidates: the most pairs of an anchor and a class, of each level, that go on to non-maximum suppression.
        score_threshold, nms_threshold, max_detections: as in `Detector`.
        weights: torchvision's of this detector on COCO (90 classes), by name (`COCO_V1`) or as a file, or a checkpoint of
            ours; what `load_pretrained` takes. For another number of classes their last layer begins anew.
        detector: arguments of `Detector`.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: FeaturePyramid,
        width: int | None = None,
        depth: int = 4,
        anchor_scale: float = 4.0,
        ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        alpha: float = 0.25,
        gamma: float = 2.0,
        candidates: int = 1000,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 300,
        weights: str | list[str] | None = None,
        **detector,
    ):
        super().__init__(
            num_classes=num_classes,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            **detector,
        )
        if not 0 <= negative_iou <= positive_iou <= 1:
            raise InputError(f"negative_iou {negative_iou} must not be above positive_iou {positive_iou}")
        self.backbone = backbone
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.alpha, self.gamma, self.candidates = alpha, gamma, candidates
        sides = [anchor_scale * stride for stride in backbone.strides]
        self.anchors = Anchors([[int(side * 2 ** (i / 3)) for i in range(3)] for side in sides], ratios)
        channels, count = backbone.channels[0], self.anchors.counts[0]
        self.class_head = ClassHead(channels, width or channels, depth, count, num_classes)
        self.box_head = BoxHead(channels, width or channels, depth, count)
        convert = partial(from_torchvision, anchors=count)
        loaded = load_detector(self, weights, "retinanet_resnet50_fpn", convert, ("class_head.logits",), eps=0.0)
        self.pretrained = loaded or backbone.pretrained

    def look(self, images: Tensor) -> Levels:
        """Return what the network says of images (B, 3, H, W)."""
        maps = self.backbone(images)
        return Levels(self.class_head(maps), self.box_head(maps), self.anchors(maps, images.shape[-2:]))

    # -- training ----------------------------------------------------------------------------------------------------

    def match(self, anchors: Tensor, target: dict) -> Tensor:
        """Return what each anchor (P, 4) is to find: (P,), an object's index, NEGATIVE or NEUTRAL."""
        return match(iou(anchors, target["boxes"]), self.positive_iou, self.negative_iou, keep_best=True)

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return the focal loss of all anchors that are not neutral, and the L1 loss of the positives' offsets."""
        logits, offsets, anchors = (
            torch.cat(parts, dim=-2) for parts in self.look(images)
        )  # (B, P, K), (B, P, 4), (P, 4)
        matched = torch.stack([self.match(anchors, target) for target in targets])  # (B, P)
        image, anchor = (matched >= 0).nonzero(as_tuple=True)  # (R,) each: the positives of all images
        objects = torch.cat([t["boxes"][m[m >= 0]] for t, m in zip(targets, matched, strict=True)])  # (R, 4)
        labels = torch.cat([t["labels"][m[m >= 0]] for t, m in zip(targets, matched, strict=True)])  # (R,)
        share = (
            1 / (matched >= 0).sum(dim=1).clamp(min=1) / len(images)
        )  # (B,): how much an anchor of each image counts

        wanted = torch.zeros_like(logits)
        wanted[image, anchor, labels] = 1
        by_anchor = focal_loss(logits, wanted, self.alpha, self.gamma).sum(dim=2)  # (B, P)
        distance = (offsets[image, anchor] - encode(objects, anchors[anchor])).abs().sum(dim=1)  # (R,)
        return {
            "class_loss": ((by_anchor * (matched != NEUTRAL)).sum(dim=1) * share).sum(),
            "box_loss": (distance * share[image]).sum(),
        }

    # -- detection ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found in each image: see `Detector`."""
        logits, offsets, anchors = self.look(images)
        found = []
        for i, target in enumerate(targets):
            chosen = []
            for logit, offset, references in zip(logits, offsets, anchors, strict=True):
                scores, index, labels = best(logit[i].sigmoid(), self.score_threshold, self.candidates)
                chosen.append((decode(offset[i, index], references[index]), scores, labels))
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*chosen, strict=True))
            found.append(self.keep_best(clip(boxes, target["size"]), scores, labels))
        return found

    def explain(self, images: Tensor, targets: list[dict]) -> list[tuple[str, str, list[dict[str, Tensor]]]]:
        """Return the anchors that are to find an object."""
        anchors = torch.cat(self.anchors(self.backbone(images), images.shape[-2:]))  # (P, 4)
        drawn = []
        for target in targets:
            matched = self.match(anchors, target)
            neutral, positive = (clip(anchors[mask], target["size"]) for mask in (matched == NEUTRAL, matched >= 0))
            drawn.append({"neutral": neutral, "positive": positive, "object": target["boxes"]})
        share = f"positive from IoU {self.positive_iou}, negative below {self.negative_iou}"
        return [("anchors", f"of {len(anchors):,} anchors those that are not background: {share}", drawn)]


def best(scores: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest of scores (P, K) that are above the threshold: (M,) each, scores, rows, columns."""
    chosen = (scores > threshold).nonzero()  # (M, 2)
    scores = scores[chosen[:, 0], chosen[:, 1]]
    scores, order = scores.topk(min(most, len(scores)))
    row, column = chosen[order].unbind(dim=1)
    return scores, row, column


# -- torchvision's weights ---------------------------------------------------------------------------------------------

NAMES = {
    "head.classification_head.conv.": "class_head.tower.",
    "head.classification_head.cls_logits.": "class_head.logits.",
    "head.regression_head.conv.": "box_head.tower.",
    "head.regression_head.bbox_reg.": "box_head.offsets.",
    "head.regression_head.bbox_ctrness.": "box_head.centerness.",  # FCOS's
}


def rename(name: str) -> str:
    """Return our name of one in torchvision's RetinaNet or FCOS; of the old files' names and the new ones'."""
    name = fpn.rename(name)
    name = re.sub(r"_head\.conv\.(\d+)\.0\.", lambda m: f"_head.conv.{2 * int(m[1])}.", name)  # new: blocks are counted
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def from_torchvision(weights: dict[str, Tensor], anchors: int) -> dict[str, Tensor]:
    """Turn a state dict of torchvision's RetinaNet or FCOS, with so many anchors of a place, into one of ours.

    torchvision's class 0 is the background, which no anchor is trained to be: its outputs are left out, so that
    torchvision's class k + 1 is our k.
    """
    ours = {}
    for name, tensor in weights.items():
        if name.startswith("head.classification_head.cls_logits."):  # (A * (1 + K), ...) -> (A * K, ...)
            tensor = tensor.unflatten(0, (anchors, -1))[:, 1:].flatten(0, 1)
        ours[rename(name)] = tensor
    return ours
