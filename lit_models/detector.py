"""What object detectors share: losses, evaluation, and what is made of many overlapping boxes.

Shapes: B batch, H height, W width, N boxes of a picture, K classes.
"""

import warnings
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms

from callbacks.detections import DetectionPictures
from lit_models.average_precision import AveragePrecision
from lit_models.boxes import iou
from lit_models.convnet import can_be_channels_last
from lit_models.tasks import Task
from runner.errors import InputError


class Detector(Task):
    """Images to boxes, each with a class and a score.

    Batches are (images (B, 3, H, W), targets): for each image a dict with `boxes` (N, 4), x1, y1, x2, y2 in pixels,
    `labels` (N,) from 0, `size` (height, width) of the image, which may be smaller than the batch's; with `difficult`
    (N,), where there is such a thing, and `proposals` (P, 4), where the data module was given a method for them.

    A subclass has `losses`, and a forward pass. `train/loss` is the sum of the losses, each of which is logged beside it.
    After validation and test, by torchmetrics with faster-coco-eval, `map` (COCO's mean average precision, over IoU
    0.50:0.95), `map_50` and `map_75`. Test adds `test/map_voc`: the area under the curve of precision over recall at
    IoU 0.5, of the VOC challenge; and of each class `test_ap/<class>` and `test_ap_voc/<class>`. By the challenge's
    protocol, objects marked as difficult count neither as found nor as missed, nor what finds them (IoU 0.5). A class without objects has no average precision.

    Args:
        num_classes: K.
        score_threshold: boxes with a lower score are dropped.
        nms_threshold: of two boxes of a class that overlap by more than this IoU, that with the lower score is dropped.
        max_detections: the most boxes of a picture, those with the highest scores.
        channels_last: whether to keep a pixel's channels side by side in memory, which convolutions are faster with.
        task: arguments of `Task`.
    """

    tag = "detection"
    pictures = DetectionPictures

    def __init__(
        self,
        num_classes: int,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        channels_last: bool = True,
        **task,
    ):
        super().__init__(**task)
        if num_classes < 1:
            raise InputError(f"num_classes starts at 1: the background is not counted, got {num_classes}")
        if not 0 < nms_threshold <= 1 or not 0 <= score_threshold < 1:
            raise InputError(f"nms_threshold {nms_threshold} and score_threshold {score_threshold} must be shares")
        if max_detections < 1:
            raise InputError(f"max_detections starts at 1, got {max_detections}")
        self.num_classes = num_classes
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.max_detections, self.channels_last = max_detections, channels_last
        self.val_map = mean_average_precision("bbox", max_detections)
        self.test_map = self.val_map.clone()
        self.test_voc = AveragePrecision(num_classes)

    def losses(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Return the losses by name, each a scalar, the mean over the batch; their sum is minimised."""
        raise NotImplementedError

    def forward(self, images: Tensor, targets: list[dict]) -> list[dict[str, Tensor]]:
        """Return what is found in each image: `boxes` (M, 4), `scores` (M,), `labels` (M,), best first.

        Of the targets only `size` and `proposals` are looked at.
        """
        raise NotImplementedError

    def explain(self, images: Tensor, targets: list[dict]) -> list[tuple[str, str, list[dict[str, Tensor]]]]:
        """Return what else is to be drawn: name, title, and for each image boxes by what they are."""
        return []

    # -- steps -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that the data has boxes, and as many classes; set the memory format."""
        if getattr(self.trainer.datamodule, "target", "boxes") == "classes":
            raise InputError(f"{type(self).__name__} needs boxes: --data.target boxes")
        self.check_classes()
        if self.channels_last and can_be_channels_last(self, self.trainer.strategy.root_device):
            self.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> Tensor:
        """Return the sum of the losses."""
        images, targets = batch
        losses = self.losses(images, targets)
        loss = sum(losses.values())
        sums = {name: value * len(images) for name, value in losses.items()}
        self.log_train(batch_idx, len(images), loss=loss * len(images), **(sums if len(sums) > 1 else {}))
        return loss

    def validation_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> None:
        """Add a batch to the validation's metrics."""
        self.update_map(self.val_map, self(*batch), batch[1])

    def test_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> list[dict[str, Tensor]]:
        """Add a batch to the test's metrics; return the detections, for the pictures."""
        return self.add_to_test(self(*batch), batch[1])

    def add_to_test(self, found: list[dict[str, Tensor]], targets: list[dict]) -> list[dict[str, Tensor]]:
        """Add what was found to the test's metrics, and return it."""
        self.update_map(self.test_map, found, targets)
        self.test_voc.update(found, targets)
        return found

    def predict_step(self, batch: tuple[Tensor, list[dict]], batch_idx: int) -> list[dict[str, Tensor]]:
        """Return the detections."""
        return self(*batch)

    def on_validation_epoch_end(self) -> None:
        """Log.

        Raises:
            InputError: there are no objects to choose the best epoch by.
        """
        by_class = self._log_map("val", self.val_map)
        if not by_class and self.trainer.state.fn == "fit":
            raise InputError("the pictures of val have no objects: there is nothing to choose the best epoch by")

    def on_test_epoch_end(self) -> None:
        """Log, with the average precision of each class."""
        classes = getattr(self.trainer.datamodule, "classes", None) or range(self.num_classes)
        by_class = self._log_map("test", self.test_map)
        self.log_dict({f"test_ap/{classes[label]}": ap for label, ap in by_class.items()})
        voc = self.test_voc.compute().reshape(-1)  # (K,)
        self.test_voc.reset()
        self.log("test/map_voc", voc.nanmean())
        self.log_dict({f"test_ap_voc/{name}": ap for name, ap in zip(classes, voc, strict=True) if not ap.isnan()})

    @staticmethod
    def update_map(metric: MeanAveragePrecision, found: list[dict], targets: list[dict]) -> None:
        """Add detections to the metric, but for difficult objects and what finds these."""
        kept = [without_difficult(f, t) for f, t in zip(found, targets, strict=True)]
        metric.update(*map(list, zip(*kept, strict=True)))

    def _log_map(self, stage: str, metric: MeanAveragePrecision, of: str = "") -> dict[int, float]:
        """Log what the metric says, and return the average precision of each class that has objects.

        Args:
            stage: `val` or `test`.
            metric: that has seen all pictures.
            of: stands before `map` in the names.
        """
        said = metric.compute()
        metric.reset()
        for name in ("map", "map_50", "map_75"):
            value = float(said[name])
            self.log(
                f"{stage}/{of}{name}", value if value >= 0 else float("nan"), prog_bar=name == "map_50"
            )  # -1: no objects
        labels, values = said["classes"].reshape(-1).tolist(), said["map_per_class"].reshape(-1).tolist()
        return {int(label): value for label, value in zip(labels, values, strict=True) if value >= 0}

    # -- from many boxes to few ------------------------------------------------------------------------------------------

    def keep_best(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Drop boxes (N, 4) with low scores (N,), those without area, and of each class those that others suppress."""
        sides = boxes[:, 2:] - boxes[:, :2]
        kept = ((scores > self.score_threshold) & (sides.amin(dim=1) > 0.01)).nonzero()[:, 0]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        kept = batched_nms(boxes, scores, labels, self.nms_threshold)[: self.max_detections]  # by falling score
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def mean_average_precision(kind: Literal["bbox", "segm"], most: int) -> MeanAveragePrecision:
    """Return COCO's metric of boxes or of masks, where a picture has at most so many detections."""
    with warnings.catch_warnings(action="ignore"):
        metric = MeanAveragePrecision(
            iou_type=kind,
            backend="faster_coco_eval",
            class_metrics=True,
            max_detection_thresholds=[1, 10, max(100, most)],  # of a class in a picture; the last is for `map`
        )
    metric.warn_on_many_detections = False
    return metric


def without_difficult(found: dict[str, Tensor], target: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return detections and objects of a picture without difficult objects, and without what overlaps them most.

    (COCO's metric has crowds, which are ignored, too; but it takes whatever lies within one for a part of it.)
    """
    wanted = {"boxes": target["boxes"].float(), "labels": target["labels"]}
    if "masks" in target:
        wanted["masks"] = target["masks"]
    if "difficult" not in target or not target["difficult"].any():
        return found, wanted
    overlaps = iou(found["boxes"], wanted["boxes"]) * (found["labels"][:, None] == wanted["labels"])  # (M, N)
    most, nearest = overlaps.max(dim=1)  # (M,), (M,)
    counts = ~(target["difficult"][nearest] & (most >= 0.5))
    return {n: v[counts] for n, v in found.items()}, {n: v[~target["difficult"]] for n, v in wanted.items()}
