"""torchvision's Faster R-CNN, RetinaNet and FCOS, built like detectors of ours, for `detector_speed.py`.

The same: the backbone's layers, which are copied; a pyramid of torchvision's own with as many maps; the anchors, box for box;
depth and width of the heads; how many proposals, samples and candidates; thresholds; the weights, which are copied too.
Pictures are neither resized nor normalised: they have been.

Not the same, because torchvision has it no other way:
    Faster R-CNN: RoI align takes a pixel's centre to be at 0 (`aligned` is ours); boxes are predicted for the background too.
    FCOS: objects of a level are 4 to 8 strides large, whatever our `reach` is.
RetinaNet and FCOS are given K outputs, and labels from 0: no output is spent on a background that nothing is trained to be.

Shapes: B batch, H height, W width, D maps, N boxes of a picture, K classes.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from lit_models import faster_rcnn, retinanet
from lit_models.anchors import Anchors
from lit_models.faster_rcnn import FasterRCNN
from lit_models.fcos import FCOS
from lit_models.fpn import FeaturePyramid
from lit_models.retinanet import RetinaNet, Tower
from runner.errors import InputError


class Pyramid(nn.Module):
    """A copy of our backbone, and torchvision's pyramid of its maps: images (B, 3, H, W) to maps by name (B, D, h, w)."""

    def __init__(self, ours: FeaturePyramid):
        super().__init__()
        self.body, self.out_channels = copy.deepcopy(ours.backbone), ours.channels[0]
        extra = {
            "none": lambda: None,
            "pool": LastLevelMaxPool,
            "p6p7": partial(LastLevelP6P7, self.out_channels, self.out_channels),
        }[ours.extra]()
        self.fpn = FeaturePyramidNetwork(ours.backbone.channels, self.out_channels, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps, from fine to coarse."""
        return self.fpn({str(i): maps for i, maps in enumerate(self.body(images))})


class TorchvisionDetector(nn.Module):
    """torchvision's detector with the settings and the weights of one of ours, called as ours are.

    Args:
        ours: on a `FeaturePyramid`.
        side: the longest of a picture, in pixels.

    Raises:
        InputError: torchvision has no such detector.
    """

    def __init__(self, ours: nn.Module, side: int):
        super().__init__()
        makers = {FasterRCNN: like_faster_rcnn, RetinaNet: like_retinanet, FCOS: like_fcos}
        if type(ours) not in makers or not isinstance(ours.backbone, FeaturePyramid):
            raise InputError(
                f"--torchvision: {type(ours).__name__} is not compared; FasterRCNN, RetinaNet and FCOS "
                "on a FeaturePyramid are"
            )
        unchanged = {"min_size": side, "max_size": side, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        self.theirs, self.first_label, convert = makers[type(ours)](ours, Pyramid(ours.backbone), unchanged)
        self.theirs.transform.resize = lambda image, target: (image, target)  # else it interpolates at a scale of 1
        copy_weights(ours, self.theirs, convert)

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return the losses by torchvision's names; needs training mode."""
        wanted = [{"boxes": t["boxes"], "labels": t["labels"] + self.first_label} for t in targets]
        return self.theirs(list(images), wanted)

    def forward(self, images: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found, with labels from 0; needs evaluation mode."""
        return [{**found, "labels": found["labels"] - self.first_label} for found in self.theirs(list(images))]


def like_faster_rcnn(ours: FasterRCNN, backbone: Pyramid, unchanged: dict) -> tuple[nn.Module, int, Callable]:
    """Return torchvision's detector, what its first class is called, and how its names become ours."""
    if ours.pool != "roi_align":
        raise InputError("--torchvision: its Faster R-CNN has RoI align only: --model.pool roi_align")
    rpn, hidden = ours.rpn, ours.heads.fc1.out_features
    made = detection.FasterRCNN(
        backbone,
        **unchanged,
        rpn_anchor_generator=same_anchors(rpn.anchors),
        rpn_pre_nms_top_n_train=rpn.before_nms[0],
        rpn_pre_nms_top_n_test=rpn.before_nms[1],
        rpn_post_nms_top_n_train=rpn.after_nms[0],
        rpn_post_nms_top_n_test=rpn.after_nms[1],
        rpn_nms_thresh=rpn.nms_threshold,
        rpn_fg_iou_thresh=rpn.positive_iou,
        rpn_bg_iou_thresh=rpn.negative_iou,
        rpn_batch_size_per_image=rpn.sampled,
        rpn_positive_fraction=rpn.positive_share,
        box_roi_pool=MultiScaleRoIAlign(
            [str(i) for i in range(ours.levels)], ours.size, ours.samples, canonical_scale=ours.canonical_size
        ),
        box_head=TwoMLPHead(ours.heads.fc1.in_features, hidden),
        box_predictor=FastRCNNPredictor(hidden, ours.num_classes + 1),
        box_score_thresh=ours.score_threshold,
        box_nms_thresh=ours.nms_threshold,
        box_detections_per_img=ours.max_detections,
        box_fg_iou_thresh=ours.positive_iou,
        box_bg_iou_thresh=ours.negative_iou,
        box_batch_size_per_image=ours.regions,
        box_positive_fraction=ours.positive_share,
    )
    return made, 1, faster_rcnn.from_torchvision


def like_retinanet(ours: RetinaNet, backbone: Pyramid, unchanged: dict) -> tuple[nn.Module, int, Callable]:
    """As `like_faster_rcnn`."""
    channels, count = backbone.out_channels, ours.anchors.counts[0]
    head = RetinaNetHead(channels, count, ours.num_classes)
    for part, tower in ((head.classification_head, ours.class_head.tower), (head.regression_head, ours.box_head.tower)):
        part.conv = part.conv[: depth(tower, channels)]  # it has four, and no argument for that
    made = detection.RetinaNet(
        backbone,
        ours.num_classes,
        **unchanged,
        anchor_generator=same_anchors(ours.anchors),
        head=head,
        fg_iou_thresh=ours.positive_iou,
        bg_iou_thresh=ours.negative_iou,
        **evaluation(ours),
    )
    return made, 0, partial(retinanet.from_torchvision, anchors=count)


def like_fcos(ours: FCOS, backbone: Pyramid, unchanged: dict) -> tuple[nn.Module, int, Callable]:
    """As `like_faster_rcnn`."""
    channels = backbone.out_channels
    head = FCOSHead(channels, 1, ours.num_classes, depth(ours.class_head.tower, channels))
    for norm in (module for module in head.modules() if isinstance(module, nn.GroupNorm)):
        norm.num_groups = next(m.num_groups for m in ours.class_head.tower if isinstance(m, nn.GroupNorm))
    made = detection.FCOS(
        backbone,
        ours.num_classes,
        **unchanged,
        anchor_generator=same_anchors(ours.cells),
        head=head,
        center_sampling_radius=ours.radius,
        **evaluation(ours),
    )
    return made, 0, partial(retinanet.from_torchvision, anchors=1)


def evaluation(ours: RetinaNet | FCOS) -> dict:
    """Return torchvision's arguments of what is done after the network."""
    return {
        "score_thresh": ours.score_threshold,
        "nms_thresh": ours.nms_threshold,
        "detections_per_img": ours.max_detections,
        "topk_candidates": ours.candidates,
    }


def depth(tower: Tower, channels: int) -> int:
    """Return how many convolutions a tower has."""
    convs = [module for module in tower if isinstance(module, nn.Conv2d)]
    if any(conv.out_channels != channels for conv in convs):
        raise InputError("--torchvision: its heads are as wide as the pyramid: leave --model.width out")
    return len(convs)


def same_anchors(ours: Anchors) -> AnchorGenerator:
    """Return what makes the same anchors."""
    made = AnchorGenerator(tuple((1,) * count for count in ours.counts), ((1.0,),) * len(ours.counts))  # only counted
    made.cell_anchors = [getattr(ours, f"base{i}").float() for i in range(len(ours.counts))]
    return made


@torch.no_grad()
def copy_weights(ours: nn.Module, theirs: nn.Module, convert: Callable[[dict], dict]) -> None:
    """Copy our weights, but for the backbone's. What ours has no row for, boxes of the background, stays at random."""
    weights = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        if not name.startswith("backbone.body."):
            (our_name,) = convert({name: tensor})
            source = weights[our_name]
            tensor[len(tensor) - len(source) :].copy_(source)  # the background's rows are the first
