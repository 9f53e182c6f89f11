"""FCOS: fully convolutional one-stage detection, without anchors (Tian et al. 2019).

RetinaNet's pyramid, heads and focal loss; but a place of a map is no anchor of any size: it lies in an object or does not,
and says how far it is from the object's left, top, right and bottom side. Large objects are found in coarse levels, small
ones in fine levels. Places far from the centre make poor boxes: a third output, centre-ness, lowers their scores.

Shapes: B batch, H height, W width, h, w of a level's map, D maps, P places of a picture, N objects of a picture, K classes.

Departures from the paper, as in torchvision: distances are ReLU(output) * stride, not exp(scale * output) with a scale for
each level; a place is the upper left corner of its stride x stride pixels, not their middle; only places near an object's
centre are positive, the box loss is of the generalised IoU, and centre-ness is told by the boxes' head: the authors' later
improvements; the score is the square root of class times centre-ness. As in `retinanet.py`: the towers' first weights.
Unlike torchvision, a place exactly 4 strides from the farthest side belongs to this level, there to none.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.anchors import Anchors, places
from lit_models.boxes import NEGATIVE, area, clip
from lit_models.detector import Detector
from lit_models.fpn import FeaturePyramid, load_detector
from lit_models.retinanet import BoxHead, ClassHead, best, focal_loss, from_torchvision, last_layer
from runner.errors import InputError


class DistanceHead(BoxHead):
    """Of each level's maps (B, D, h, w), distances (B, h * w, 4) to the sides in strides, and logits of the centre-ness.

    Args:
        channels: D.
        width, depth, norm: of the tower.
    """

    def __init__(self, channels: int, width: int, depth: int, norm: Callable[[int], nn.Module]):
        super().__init__(channels, width, depth, 1, norm)
        self.centerness = last_layer(width if depth else channels, 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return both of each level, in float32; the second (B, h * w, 1)."""
        seen = [self.tower(m) for m in maps]
        distances = [places(F.relu(self.offsets(x)), 4).float() for x in seen]
        return distances, [places(self.centerness(x), 1).float() for x in seen]


class Levels(NamedTuple):
    """What the network says of a batch, for each level."""

    logits: list[Tensor]  # (B, h * w, K)
    distances: list[Tensor]  # (B, h * w, 4): left, top, right, bottom, in strides
    centerness: list[Tensor]  # (B, h * w, 1), logits
    cells: list[Tensor]  # (h * w, 4): a square with the place in its middle, and sides of a stride


class FCOS(Detector):
    """Every place is classified, and tells where the sides are of the object that it lies in.

    Args:
        num_classes: K.
        backbone: the maps of several strides.
        width: maps of the heads' convolutions; None: as many as a level has.
        depth: convolutions of each head before its last.
        groups: of the group norms behind them.
        reach: a level has objects whose farthest side is this to twice this away, in strides; the finest has smaller
            ones too, and the coarsest larger ones.
        radius: a place is positive if it is nearer an object's centre than this, in strides, in x and in y.
        alpha, gamma: of the focal loss.
        candidates: the most pairs of a place and a class, of each level, that go on to non-maximum suppression.
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
        groups: int = 32,
        reach: float = 4.0,
        radius: float = 1.5,
        alpha: float = 0.25,
        gamma: float = 2.0,
        candidates: int = 1000,
        score_threshold: float = 0.2,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
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
        channels = backbone.channels[0]
        width = width or channels
        if reach <= 0 or radius <= 0:
            raise InputError(f"reach {reach} and radius {radius} must be above 0")
        if groups < 1 or width % groups or width == groups:  # a group of one map of one place has no variance
            raise InputError(f"groups {groups} must divide the heads' width {width} into two maps each or more")
        self.backbone, self.reach, self.radius = backbone, reach, radius
        self.alpha, self.gamma, self.candidates = alpha, gamma, candidates
        self.cells = Anchors([[stride] for stride in backbone.strides], [1.0])
        self.class_head = ClassHead(channels, width, depth, 1, num_classes, lambda n: nn.GroupNorm(groups, n))
        self.box_head = DistanceHead(channels, width, depth, lambda n: nn.GroupNorm(groups, n))
        convert = partial(from_torchvision, anchors=1)
        loaded = load_detector(self, weights, "fcos_resnet50_fpn", convert, ("class_head.logits",))
        self.pretrained = loaded or backbone.pretrained

    def look(self, images: Tensor) -> Levels:
        """Return what the network says of images (B, 3, H, W)."""
        maps = self.backbone(images)
        return Levels(self.class_head(maps), *self.box_head(maps), self.cells(maps, images.shape[-2:]))

    # -- training ----------------------------------------------------------------------------------------------------

    def match(self, cells: list[Tensor], target: dict) -> Tensor:
        """Return what each place of the levels (h * w, 4) is to find: (P,), an object's index or NEGATIVE.

        It lies in the object, near its centre, and the farthest side is as far away as the level's are. Of several
        objects it finds the smallest.
        """
        lower = torch.cat([self.reach * side(c) * (i > 0) for i, c in enumerate(cells)])[:, None]  # (P, 1)
        upper = torch.cat(
            [2 * self.reach * side(c) for c in cells[:-1]] + [torch.full_like(cells[-1][:, 0], torch.inf)]
        )[:, None]
        cells, boxes = torch.cat(cells), target["boxes"]
        if len(boxes) == 0:
            return torch.full_like(cells[:, 0], NEGATIVE, dtype=torch.int64)
        from_centre = (middle(cells)[:, None] - middle(boxes)[None]).abs().amax(dim=2)  # (P, N)
        distances = to_sides(middle(cells)[:, None], boxes[None])  # (P, N, 4)
        farthest = distances.amax(dim=2)
        mine = (distances.amin(dim=2) > 0) & (from_centre < self.radius * side(cells)[:, None])
        mine &= (farthest >= lower) & (farthest < upper)
        smallest, index = torch.where(mine, area(boxes), torch.inf).min(dim=1)  # (P,)
        return index.where(smallest < torch.inf, NEGATIVE)

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return the focal loss of all places, and the positives' losses of generalised IoU and centre-ness.

        Each is a sum, divided by the number of positives of the batch.
        """
        logits, distances, centerness, cells = self.look(images)
        matched = torch.stack([self.match(cells, target) for target in targets])  # (B, P)
        logits, distances, centerness, cells = (
            torch.cat(parts, dim=-2) for parts in (logits, distances, centerness, cells)
        )  # (B, P, K), (B, P, 4), (B, P, 1), (P, 4)
        image, place = (matched >= 0).nonzero(as_tuple=True)  # (R,) each: the positives of all images
        objects = torch.cat([t["boxes"][m[m >= 0]] for t, m in zip(targets, matched, strict=True)])  # (R, 4)
        labels = torch.cat([t["labels"][m[m >= 0]] for t, m in zip(targets, matched, strict=True)])  # (R,)
        count = max(len(image), 1)

        wanted = torch.zeros_like(logits)
        wanted[image, place, labels] = 1
        boxes = from_sides(distances[image, place], cells[place])  # (R, 4)
        central = centerness_of(to_sides(middle(cells[place]), objects))  # (R,)
        said = centerness[image, place, 0]
        return {
            "class_loss": focal_loss(logits, wanted, self.alpha, self.gamma).sum() / count,
            "box_loss": giou_loss(boxes, objects).sum() / count,
            "centerness_loss": F.binary_cross_entropy_with_logits(said, central, reduction="sum") / count,
        }

    # -- detection ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found in each image: see `Detector`."""
        levels = self.look(images)
        found = []
        for i, target in enumerate(targets):
            chosen = []
            for logits, distances, centerness, cells in zip(*levels, strict=True):
                score = (logits[i].sigmoid() * centerness[i].sigmoid()).sqrt()  # (h * w, K)
                scores, index, labels = best(score, self.score_threshold, self.candidates)
                chosen.append((from_sides(distances[i, index], cells[index]), scores, labels))
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*chosen, strict=True))
            found.append(self.keep_best(clip(boxes, target["size"]), scores, labels))
        return found

    def explain(self, images: Tensor, targets: list[dict]) -> list[tuple[str, str, list[dict[str, Tensor]]]]:
        """Return the places that are to find an object."""
        cells = self.cells(self.backbone(images), images.shape[-2:])
        drawn = []
        for target in targets:
            positive = torch.cat(cells)[self.match(cells, target) >= 0]
            drawn.append({"positive": clip(positive, target["size"]), "object": target["boxes"]})
        count = sum(len(c) for c in cells)
        return [("places", f"of {count:,} places those that are positive, as squares with sides of a stride", drawn)]


# -- arithmetic of places ----------------------------------------------------------------------------------------------


def middle(boxes: Tensor) -> Tensor:
    """Return the centres (..., 2), x and y, of boxes (..., 4)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def side(cells: Tensor) -> Tensor:
    """Return the width (P,) of squares (P, 4)."""
    return cells[:, 2] - cells[:, 0]


def to_sides(points: Tensor, boxes: Tensor) -> Tensor:
    """Return how far points (..., 2) are from the left, top, right and bottom of boxes (..., 4): (..., 4), < 0 outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def from_sides(distances: Tensor, cells: Tensor) -> Tensor:
    """Return the boxes (R, 4) whose sides are so far, in strides (R, 4), from the middle of cells (R, 4)."""
    distances = distances * side(cells)[:, None]
    return torch.cat([middle(cells) - distances[:, :2], middle(cells) + distances[:, 2:]], dim=1)


def centerness_of(distances: Tensor) -> Tensor:
    """Return sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of distances (R, 4): 1 in the middle, 0 at a side."""
    near = torch.minimum(distances[:, :2], distances[:, 2:])  # (R, 2)
    far = torch.maximum(distances[:, :2], distances[:, 2:])
    return (near / far).prod(dim=1).sqrt()


def giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - generalised IoU of each box in `a` (N, 4) with the one beside it in `b` (N, 4): (N,), in [0, 2].

    IoU less the share of the smallest box around both that neither covers (Rezatofighi et al. 2019): so that boxes that
    do not overlap have a gradient, too. Finite for boxes without area; computed in float32.
    """
    a, b, tiny = a.float(), b.float(), 1e-7
    overlap = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])  # (N, 2): width and height
    around = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    overlap = overlap.clamp(min=0)
    intersection, hull = overlap[:, 0] * overlap[:, 1], around[:, 0] * around[:, 1]  # (N,)
    union = area(a) + area(b) - intersection
    return 1 - intersection / (union + tiny) + (hull - union) / (hull + tiny)
