"""R-CNN: regions with CNN features (Girshick et al. 2014).

Another method proposes boxes that may hold something. Each is cut out, warped to a fixed size, and sent through the network
on its own, which tells its class, or that it is background, and how to move the box onto the object.

Shapes: B batch, H height, W width, P proposals of an image, N objects of an image, R regions of all images of a batch,
D maps, K classes.

Departures from the paper: the network, its classifier and the boxes' regression are trained together, by softmax and a
squared error, where the paper fine-tunes the network first, and then fits support vector machines and a ridge regression
to its features; the crops have no context around them; positives and negatives are told apart by the same thresholds
throughout.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchvision.ops import roi_align

from lit_models.backbones import Backbone
from lit_models.boxes import NEGATIVE, clip, decode, encode, iou, match
from lit_models.detector import Detector
from runner.errors import InputError

WEIGHTS = (
    10.0,
    10.0,
    5.0,
    5.0,
)  # of tx, ty, tw, th, which are around 0.1 and 0.2: so they count as much as the classes


class Regions(NamedTuple):
    """Some regions of an image, and what they are to become."""

    boxes: Tensor  # (R, 4)
    labels: Tensor  # (R,): 0 background, k + 1 class k
    objects: Tensor  # (R, 4): the object's box, where there is one
    numbers: Tensor  # (R,): which object of the image it is, or `NEGATIVE`


class Heads(nn.Module):
    """Two hidden layers on a region's features (R, D, size, size); class scores (R, 1 + K) and offsets (R, K, 4) of them.

    Args:
        features: D * size * size.
        hidden: units of each hidden layer.
        num_classes: K.
    """

    def __init__(self, features: int, hidden: int, num_classes: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        self.scores, self.offsets = nn.Linear(hidden, 1 + num_classes), nn.Linear(hidden, 4 * num_classes)
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.normal_(self.offsets.weight, std=0.001)
        for layer in (self.scores, self.offsets):
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and offsets, in float32: the arithmetic of boxes is not for half precision."""
        x = features.flatten(1).to(self.fc1.weight.dtype)  # (R, D * size * size)
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        return self.scores(x).float(), self.offsets(x).float().unflatten(1, (-1, 4))


class RCNN(Detector):
    """Proposals, warped to a fixed size, one pass of the backbone each.

    A test adds `proposals/recall`: the share of objects, but for difficult ones, that a proposal overlaps by IoU 0.5.

    Args:
        num_classes: K.
        backbone: with one layer of maps.
        size: side of a region's features; the crop has as many times the backbone's stride.
        hidden: units of the heads' hidden layers.
        regions: of each image that a training step looks at.
        positive_share: at most, of these.
        positive_iou: a proposal that overlaps an object by so much is to find it.
        negative_iou: one that overlaps none by so much is background; what is between counts as neither.
        box_loss: `l2`, the squared error, or `smooth_l1` (Girshick 2015).
        ridge: weight of the squares of the weights that give the offsets, which are part of the box loss.
        nms_threshold: as in `Detector`; that of the paper's code.
        detector: arguments of `Detector`.
    """

    needs_proposals = True  # from the data

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        size: int = 7,
        hidden: int = 256,
        regions: int = 32,
        positive_share: float = 0.25,
        positive_iou: float = 0.5,
        negative_iou: float = 0.3,
        box_loss: Literal["l2", "smooth_l1"] = "l2",
        ridge: float = 1e-4,
        nms_threshold: float = 0.3,
        **detector,
    ):
        super().__init__(num_classes=num_classes, nms_threshold=nms_threshold, **detector)
        if not 0 < positive_share <= 1 or regions < 1:
            raise InputError(f"positive_share {positive_share} must be a share, and regions {regions} 1 or more")
        if not 0 <= negative_iou <= positive_iou <= 1:
            raise InputError(f"negative_iou {negative_iou} must not be above positive_iou {positive_iou}")
        self.backbone, self.pretrained = backbone, backbone.pretrained
        self.size, self.regions, self.positive_share = size, regions, positive_share
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.box_loss = F.mse_loss if box_loss == "l2" else F.smooth_l1_loss
        self.ridge = ridge
        self.test_recall = MeanMetric()
        self.heads = Heads(backbone.channels[-1] * size**2, hidden, num_classes)

    def see(self, images: Tensor) -> Tensor:
        """Return what regions are cut out of: here the images (B, 3, H, W) themselves."""
        return images

    def features(self, images: Tensor, boxes: list[Tensor]) -> Tensor:
        """Return features (R, D, size, size) of boxes (P, 4) in each of the images (B, 3, H, W)."""
        crops = roi_align(images.float(), boxes, self.size * self.backbone.strides[-1], sampling_ratio=2, aligned=True)
        parts = [self.backbone(part.to(images.dtype))[-1] for part in crops.split(2048)]  # so that many crops fit
        return torch.cat(parts)

    # -- training ----------------------------------------------------------------------------------------------------

    def sample(self, target: dict) -> Regions:
        """Choose proposals of an image to learn from, at random; the objects' own boxes are among what is chosen from."""
        candidates = torch.cat([target["proposals"], target["boxes"]])  # (P + N, 4)
        matched = match(iou(candidates, target["boxes"]), self.positive_iou, self.negative_iou)  # (P + N,)
        positive = choose(matched >= 0, round(self.regions * self.positive_share))
        negative = choose(matched == NEGATIVE, self.regions - len(positive))
        labels = torch.cat([target["labels"][matched[positive]] + 1, torch.zeros_like(negative)])
        chosen = torch.cat([positive, negative])
        objects = torch.cat([target["boxes"][matched[positive]], candidates[negative]])
        return Regions(candidates[chosen], labels, objects, matched[chosen])

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return the losses of the classes, and of the boxes of regions that hold an object."""
        return self.region_losses(self.see(images), targets)

    def region_losses(self, seen: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return them, with what `see` returned."""
        return self.losses_of_chosen(seen, [self.sample(target) for target in targets])

    def losses_of_chosen(self, seen: Tensor, chosen: list[Regions]) -> dict[str, Tensor]:
        """Return them, of regions of each image."""
        boxes, labels, objects, _ = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        scores, offsets = self.heads(self.features(seen, [regions.boxes for regions in chosen]))
        positive = labels.nonzero()[:, 0]
        offsets = offsets[positive, labels[positive] - 1]  # (R, K, 4) -> (positives, 4): those for its class
        wanted = encode(objects[positive], boxes[positive], WEIGHTS)
        count = max(len(labels), 1)
        return {
            "class_loss": F.cross_entropy(scores, labels, reduction="sum") / count,
            "box_loss": self.box_loss(offsets, wanted, reduction="sum") / count
            + self.ridge * self.heads.offsets.weight.square().sum(),
        }

    # -- detection ---------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found in each image: see `Detector`."""
        return self.detect(*self.propose(images, targets))

    def propose(self, images: Tensor, targets: list[dict]) -> tuple[Tensor, list[dict]]:
        """Return what regions are cut out of, and the targets with proposals: here those of the data."""
        return self.see(images), targets

    def detect(self, seen: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found, with what `see` returned."""
        proposals = [target["proposals"].float() for target in targets]
        scores, offsets = self.heads(self.features(seen, proposals))
        counts = [len(boxes) for boxes in proposals]
        scores = scores.softmax(dim=1)[:, 1:]  # (R, K)
        found = []
        for boxes, score, offset, target in zip(
            proposals, scores.split(counts), offsets.split(counts), targets, strict=True
        ):
            moved = clip(decode(offset, boxes, WEIGHTS), target["size"])  # (P, K, 4)
            labels = torch.arange(self.num_classes, device=score.device).expand_as(score)  # (P, K)
            found.append(self.keep_best(moved.flatten(0, 1), score.flatten(), labels.flatten()))
        return found

    def test_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> list[dict[str, Tensor]]:
        """Add a batch, and its proposals, to the test's metrics; return the detections."""
        seen, targets = self.propose(*batch)
        for target in targets:
            boxes = target["boxes"][~target["difficult"]] if "difficult" in target else target["boxes"]
            if len(boxes):
                overlaps = iou(boxes, torch.cat([target["proposals"], torch.zeros_like(boxes[:1])]))  # (N, P + 1)
                self.test_recall.update((overlaps.amax(dim=1) >= 0.5).float())
        return self.add_to_test(self.detect(seen, targets), targets)

    def on_test_epoch_end(self) -> None:
        """Log."""
        super().on_test_epoch_end()
        if self.test_recall.update_called:
            self.log("proposals/recall", self.test_recall)

    def explain(self, images: Tensor, targets: list[dict]) -> list[tuple[str, str, list[dict[str, Tensor]]]]:
        """Return the proposals, and a draw of those that a training step would look at."""
        best, drawn = [], []
        for target in targets:
            boxes, proposals = target["boxes"], target["proposals"]
            nearest = iou(boxes, proposals).argmax(dim=1) if len(boxes) and len(proposals) else []
            best.append({"proposal": proposals[:100], "object": boxes, "nearest proposal": proposals[nearest]})
            regions = self.sample(target)
            is_object = regions.labels > 0
            drawn.append({"negative": regions.boxes[~is_object], "positive": regions.boxes[is_object], "object": boxes})
        share = f"positive from IoU {self.positive_iou}, negative below {self.negative_iou}"
        return [
            ("proposals", "what is looked at: 100 of the proposals, and for each object the nearest of all", best),
            ("matches", f"proposals that a training step learns from: {share}", drawn),
        ]

    def setup(self, stage: str) -> None:
        """Check the classes, and that there are proposals."""
        super().setup(stage)
        if self.needs_proposals and getattr(self.trainer.datamodule, "proposals", None) is None:
            raise InputError(
                f"{type(self).__name__} needs proposals: --data.proposals lit_models.selective_search.SelectiveSearch"
            )


def choose(mask: Tensor, most: int) -> Tensor:
    """Return the indices of at most so many true elements of a mask (N,), at random."""
    found = mask.nonzero()[:, 0]
    return found[torch.randperm(len(found), device=found.device)[:most]]
