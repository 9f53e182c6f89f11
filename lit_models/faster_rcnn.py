"""Faster R-CNN: the network proposes the regions itself, from the maps that it looks at them in (Ren et al. 2015).

All that comes after the proposals is Fast R-CNN's. With a `FeaturePyramid` each region is cut out of the level that its size
calls for (Lin et al. 2017).

Shapes: B batch, H height, W width, D maps, h and w of a level's maps, A anchors of each place, N anchors of an image on all
levels, P proposals of an image, R regions of all images, K classes.

Departures from the paper: all is trained together, where it takes turns between proposals and detection; anchors that reach
beyond the image learn, too; proposals are suppressed level by level. These, and the numbers, are torchvision's.
"""

import re
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, roi_align, roi_pool

from lit_models.anchors import Anchors, places
from lit_models.backbones import Backbone
from lit_models.boxes import NEGATIVE, clip, decode, encode, iou, match
from lit_models.fast_rcnn import FastRCNN
from lit_models.fpn import load_detector, rename
from lit_models.rcnn import choose
from runner.errors import InputError

BETA = 1 / 9  # smooth L1 is quadratic up to here, and linear from here on
SMALLEST = 1e-3  # pixels: proposals with a shorter side are dropped


class Objectness(NamedTuple):
    """What is said of each anchor, level by level."""

    scores: Tensor  # (B, N): logits of holding an object
    offsets: Tensor  # (B, N, 4)
    anchors: Tensor  # (N, 4)
    counts: list[int]  # anchors of each level


class RegionProposals(nn.Module):
    """The region proposal network: at every place of the maps, for each anchor, is there an object, and where exactly?

    Args:
        channels: D, of every level.
        anchors: of every level the same number A.
        before_nms: how many of the best of each level are looked at, in training and in evaluation.
        after_nms: how many proposals are left of an image, in training and in evaluation.
        nms_threshold: of two proposals of a level that overlap by more than this IoU, the worse is dropped.
        positive_iou: an anchor that overlaps an object by so much is to find it, as are those that overlap one most.
        negative_iou: one that overlaps none by so much is background.
        sampled: anchors of each image that a training step looks at.
        positive_share: at most, of these.
    """

    def __init__(
        self,
        channels: int,
        anchors: Anchors,
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (2000, 1000),
        nms_threshold: float = 0.7,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        sampled: int = 256,
        positive_share: float = 0.5,
    ):
        super().__init__()
        self.anchors, self.before_nms, self.after_nms, self.nms_threshold = (
            anchors,
            before_nms,
            after_nms,
            nms_threshold,
        )
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.sampled, self.positive_share = sampled, positive_share
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.scores = nn.Conv2d(channels, anchors.counts[0], kernel_size=1)
        self.offsets = nn.Conv2d(channels, 4 * anchors.counts[0], kernel_size=1)
        for layer in (self.conv, self.scores, self.offsets):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Objectness:
        """Look at every level's maps (B, D, h, w), of images of this size, H and W."""
        hidden = [F.relu(self.conv(level)) for level in maps]  # (B, D, h, w) each
        scores = [places(self.scores(x), 1).squeeze(2).float() for x in hidden]  # (B, A, h, w) -> (B, h * w * A)
        offsets = [places(self.offsets(x), 4).float() for x in hidden]  # (B, 4 * A, h, w) -> (B, h * w * A, 4)
        anchors = torch.cat(self.anchors(maps, size))
        return Objectness(torch.cat(scores, dim=1), torch.cat(offsets, dim=1), anchors, [s.shape[1] for s in scores])

    @torch.no_grad()
    def propose(self, said: Objectness, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Return the best proposals (P, 4) of each image of these sizes, best first. Nothing learns through them."""
        chosen, levels, start = [], [], 0
        for level, scores in enumerate(said.scores.split(said.counts, dim=1)):  # (B, n)
            best = scores.topk(min(self.before_nms[not self.training], scores.shape[1])).indices  # (B, n) -> (B, k)
            chosen.append(start + best)
            levels.append(torch.full_like(best[0], level))
            start += scores.shape[1]
        chosen, levels = torch.cat(chosen, dim=1), torch.cat(levels)  # (B, k of all levels), (k of all levels,)
        proposals = []
        for scores, offsets, best, size in zip(said.scores, said.offsets, chosen, sizes, strict=True):
            boxes = clip(decode(offsets[best], said.anchors[best]), size)  # (k, 4)
            large = ((boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= SMALLEST).nonzero()[:, 0]
            kept = batched_nms(boxes[large], scores[best][large], levels[large], self.nms_threshold)
            proposals.append(boxes[large][kept[: self.after_nms[not self.training]]])
        return proposals

    def match(self, said: Objectness, target: dict) -> Tensor:
        """Return (N,): the object that each anchor is to find, or `NEGATIVE` or `NEUTRAL`."""
        return match(iou(said.anchors, target["boxes"]), self.positive_iou, self.negative_iou, keep_best=True)

    def losses(self, said: Objectness, targets: list[dict]) -> dict[str, Tensor]:
        """Return the losses of a random choice of anchors: object or not, and the boxes of those that are to find one."""
        scores, labels, offsets, wanted = [], [], [], []
        for i, target in enumerate(targets):
            matched = self.match(said, target)
            positive = choose(matched >= 0, round(self.sampled * self.positive_share))
            negative = choose(matched == NEGATIVE, self.sampled - len(positive))
            scores += [said.scores[i, positive], said.scores[i, negative]]
            labels += [torch.ones_like(scores[-2]), torch.zeros_like(scores[-1])]
            offsets.append(said.offsets[i, positive])
            wanted.append(encode(target["boxes"][matched[positive]], said.anchors[positive]))
        scores, labels, offsets, wanted = (torch.cat(parts) for parts in (scores, labels, offsets, wanted))
        count = max(len(labels), 1)
        return {
            "objectness_loss": F.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / count,
            "rpn_box_loss": F.smooth_l1_loss(offsets, wanted, beta=BETA, reduction="sum") / count,
        }


class FasterRCNN(FastRCNN):
    """Fast R-CNN, with a network of few layers for proposals; the defaults are torchvision's.

    With ResNet-50, a pyramid of 256 channels with `extra: pool`, and 90 classes it is torchvision's
    `fasterrcnn_resnet50_fpn`, whose labels minus 1 are ours.

    A test adds `proposals/recall`, as in `RCNN`, of its own proposals.

    Args:
        num_classes: K.
        backbone: with one layer of maps, or a `FeaturePyramid`.
        weights: of the whole detector: `COCO_V1`, torchvision's, or what else `load_pretrained` takes; the last layers begin
            anew if they are for another number of classes.
        anchor_sizes: of each level, in pixels; None: 8 strides, and of one level only also 16 and 32 strides.
        aspect_ratios: of the anchors, height over width.
        before_nms, after_nms, proposal_nms_threshold: of `RegionProposals`.
        anchors, positive_anchors: how many anchors of an image a training step looks at; the share of positive ones.
        canonical_size: side of a region that is cut out of the level with stride 16; one twice as large, of that with 32.
        aligned: whether RoI align takes a pixel's centre to be at 0.5, as it is (see `roi_pooling.py`). torchvision's weights
            were trained with centres at 0.
        size, hidden, regions, positive_share, positive_iou, negative_iou, nms_threshold, ridge: of `RCNN`.
        box_loss: `smooth_l1` is steeper here than in `FastRCNN`: quadratic up to 1 / 9 only.
        fast_rcnn: arguments of `FastRCNN`.
    """

    needs_proposals = False

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        weights: str | list[str] | None = None,
        anchor_sizes: tuple[tuple[float, ...], ...] | None = None,
        aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (2000, 1000),
        proposal_nms_threshold: float = 0.7,
        anchors: int = 256,
        positive_anchors: float = 0.5,
        canonical_size: float = 224.0,
        aligned: bool = False,
        size: int = 7,
        hidden: int = 1024,
        regions: int = 512,
        positive_share: float = 0.25,
        positive_iou: float = 0.5,
        negative_iou: float = 0.5,
        nms_threshold: float = 0.5,
        ridge: float = 0.0,
        box_loss: Literal["l2", "smooth_l1"] = "smooth_l1",
        **fast_rcnn,
    ):
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            size=size,
            hidden=hidden,
            regions=regions,
            positive_share=positive_share,
            positive_iou=positive_iou,
            negative_iou=negative_iou,
            nms_threshold=nms_threshold,
            ridge=ridge,
            box_loss=box_loss,
            **fast_rcnn,
        )
        if min(*before_nms, *after_nms, anchors) < 1 or canonical_size <= 0:
            raise InputError("before_nms, after_nms and anchors start at 1, and canonical_size is above 0")
        if not 0 < proposal_nms_threshold <= 1 or not 0 < positive_anchors <= 1:
            raise InputError(
                f"proposal_nms_threshold {proposal_nms_threshold} and positive_anchors {positive_anchors} must be shares"
            )
        if box_loss == "smooth_l1":
            self.box_loss = partial(F.smooth_l1_loss, beta=BETA)
        self.canonical_size, self.aligned = canonical_size, aligned
        self.levels = getattr(backbone, "levels", len(backbone.strides))  # that regions are cut out of
        scales = (8, 16, 32) if len(backbone.strides) == 1 else (8,)
        sizes = anchor_sizes or [[scale * stride for scale in scales] for stride in backbone.strides]
        made = Anchors(sizes, aspect_ratios)
        if len({*backbone.channels}) > 1:
            raise InputError(f"backbone: levels of {backbone.channels} maps; a FeaturePyramid makes them alike")
        if len(made.counts) != len(backbone.strides) or len({*made.counts}) > 1:
            raise InputError(
                f"anchor_sizes: the backbone has {len(backbone.strides)} levels; give each the same number of sizes"
            )
        self.rpn = RegionProposals(
            backbone.channels[0],
            made,
            before_nms,
            after_nms,
            proposal_nms_threshold,
            sampled=anchors,
            positive_share=positive_anchors,
        )
        loaded = load_detector(
            self, weights, "fasterrcnn_resnet50_fpn", from_torchvision, ("heads.scores", "heads.offsets"), eps=0.0
        )
        self.pretrained = loaded or self.pretrained

    def see(self, images: Tensor) -> list[Tensor]:
        """Return each level's maps (B, D, H / stride, W / stride) of images (B, 3, H, W)."""
        return self.backbone(images)

    def look(self, images: Tensor, targets: list[dict]) -> tuple[list[Tensor], Objectness, list[dict]]:
        """Return the maps, what the proposal network says of the anchors, and the targets with its proposals."""
        maps = self.see(images)
        said = self.rpn(maps, images.shape[-2:])
        proposals = self.rpn.propose(said, [target["size"] for target in targets])
        return maps, said, [t | {"proposals": boxes} for t, boxes in zip(targets, proposals, strict=True)]

    def features(self, maps: list[Tensor], boxes: list[Tensor], size: int | None = None) -> Tensor:
        """Return features (R, D, size, size) of boxes (P, 4) in each of the images, each cut out of the level for its size.

        A region whose area has the side s comes from the level with stride 16 * 2^floor(log2(s / canonical_size)), or
        the next there is (Lin et al. 2017, equation 1).
        """
        size = size or self.size
        rows = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])  # (R, 5): image, x1, y1, x2, y2
        side = (rows[:, 3:] - rows[:, 1:3]).prod(dim=1).sqrt()  # (R,)
        # 1e-6: a side of exactly canonical_size must not fall below it by rounding
        stride = 2 ** torch.floor(4 + torch.log2(side / self.canonical_size) + 1e-6)
        strides = self.backbone.strides[: self.levels]
        level = sum((stride >= s for s in strides[1:]), torch.zeros_like(side))  # (R,)
        features = rows.new_zeros(len(rows), maps[0].shape[1], size, size)
        for i, stride in enumerate(strides):
            here = (level == i).nonzero()[:, 0]
            if self.pool == "roi_pool":
                part = roi_pool(maps[i].float(), rows[here], size, 1 / stride)
            else:
                part = roi_align(maps[i].float(), rows[here], size, 1 / stride, self.samples, self.aligned)
            features[here] = part
        return features

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return the losses of the proposals, and of the regions that they make."""
        maps, said, targets = self.look(images, targets)
        return self.rpn.losses(said, targets) | self.region_losses(maps, targets)

    def propose(self, images: Tensor, targets: list[dict]) -> tuple[list[Tensor], list[dict]]:
        """Return the maps, and the targets with the network's own proposals."""
        maps, _, targets = self.look(images, targets)
        return maps, targets

    def explain(self, images: Tensor, targets: list[dict]) -> list[tuple[str, str, list[dict[str, Tensor]]]]:
        """Return the proposals, those that a training step would look at, and the anchors that are to find an object."""
        _, said, targets = self.look(images, targets)
        positive = [
            {"positive anchor": said.anchors[self.rpn.match(said, target) >= 0], "object": target["boxes"]}
            for target in targets
        ]
        title = f"anchors that are to find an object: IoU {self.rpn.positive_iou}, and the nearest of each object"
        return [*super().explain(images, targets), ("anchors", title, positive)]


def from_torchvision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict of torchvision's `FasterRCNN` into one of ours, which has no offsets for the background."""
    names = {
        r"^rpn\.head\.conv\.(?:0\.0\.)?": "rpn.conv.",
        r"^rpn\.head\.cls_logits\.": "rpn.scores.",
        r"^rpn\.head\.bbox_pred\.": "rpn.offsets.",
        r"^roi_heads\.box_head\.fc6\.": "heads.fc1.",
        r"^roi_heads\.box_head\.fc7\.": "heads.fc2.",
        r"^roi_heads\.box_predictor\.cls_score\.": "heads.scores.",
        r"^roi_heads\.box_predictor\.bbox_pred\.": "heads.offsets.",
    }
    ours = {}
    for name, tensor in weights.items():
        ours_name = rename(name)
        for pattern, replacement in names.items():
            ours_name = re.sub(pattern, replacement, ours_name)
        ours[ours_name] = tensor[4:] if name.startswith("roi_heads.box_predictor.bbox_pred.") else tensor
    return ours
