"""Average precision of Pascal VOC: how well a detector's boxes, sorted by score, find the objects of each class.

Shapes: K classes, M boxes predicted in a picture, N objects in it, D detections of a class in all pictures.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lit_models.boxes import NEGATIVE, iou, match
from runner.errors import InputError

HIT, MISS, IGNORED = 1, 0, -1


class AveragePrecision(Metric):
    """The area under each class's curve of precision over recall (Everingham et al. 2010; the rule since VOC 2010).

    A class's detections in all pictures are sorted by falling score. Each looks at the object of its class in its picture
    that it overlaps most:

    - IoU below the threshold, or no such object: false positive.
    - The object is difficult: the detection is ignored. Difficult objects are not among those to be found.
    - The object has not been found yet: true positive, and now it has. Else false positive: it was found twice.

    After each detection, recall is the share of the objects found so far, precision the share of the detections so far that
    are true. Precision is then made to fall with recall: at each recall it is the best reached there or later.

    What a detection is depends on its own picture only, so `update` decides it and keeps three numbers of each detection.
    Equal scores keep the order in which they came. VOC's own code counts whole pixels (a box's width is x2 - x1 + 1);
    here coordinates are continuous.

    Args:
        num_classes: K.
        threshold: smallest IoU of a true positive.
        metric: arguments of torchmetrics' `Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    classes: list[Tensor]
    scores: list[Tensor]
    hits: list[Tensor]
    objects: Tensor

    def __init__(self, num_classes: int, threshold: float = 0.5, **metric):
        super().__init__(**metric)
        self.num_classes = num_classes
        self.threshold = threshold
        for name in ("classes", "scores", "hits"):  # of all detections: int64, float32, int8
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state(
            "objects", default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum"
        )  # difficult: no

    def update(self, predictions: list[dict], targets: list[dict]) -> None:
        """Add a batch: for each picture a prediction and a target.

        Args:
            predictions: `boxes` (M, 4), `scores` (M,) and `labels` (M,), classes from 0.
            targets: `boxes` (N, 4), `labels` (N,) and, if there are any, which are `difficult` (N,) bool.

        Raises:
            InputError: a target's label is no class.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            labels = target["labels"].cpu()
            difficult = target.get("difficult", torch.zeros_like(labels, dtype=torch.bool)).cpu()
            if ((labels < 0) | (labels >= self.num_classes)).any():
                raise InputError(
                    f"num_classes: there are objects of the classes {labels.min()} to {labels.max()}, "
                    f"but {self.num_classes} classes are from 0 to {self.num_classes - 1}"
                )
            self.objects += labels[~difficult].bincount(minlength=self.num_classes).to(self.objects.device)

            scores = prediction["scores"].cpu().float()
            order = scores.argsort(descending=True, stable=True)
            classes, boxes = prediction["labels"].cpu()[order], prediction["boxes"].cpu()[order]
            overlaps = iou(boxes, target["boxes"].cpu())  # (M, N)
            overlaps = overlaps.where(classes[:, None] == labels, -1)
            nearest = match(overlaps, positive=self.threshold, negative=self.threshold)  # (M,)
            self.classes.append(classes.to(self.device))
            self.scores.append(scores[order].to(self.device))
            self.hits.append(_judge(nearest, difficult).to(self.device))

    def compute(self) -> Tensor:
        """Average precision of each class (K,), NaN for one without objects: leave it out of a mean (`nanmean`).

        torchmetrics makes a single number of one class's: its shape is ().
        """
        values = torch.tensor([_area(recall, precision) for recall, precision in self.curves()])
        return values.to(self.device).where(self.objects > 0, torch.nan)

    def curves(self) -> list[tuple[Tensor, Tensor]]:
        """Recall (D,) and precision (D,) of each class after each detection, as they are: precision goes up and down.

        Ignored detections are not among the D. Without objects recall is NaN. float64, on the CPU.
        """
        if len(self.scores) == 0:  # no picture yet
            return [(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))] * self.num_classes
        classes, scores, hits = (dim_zero_cat(state).cpu() for state in (self.classes, self.scores, self.hits))
        order = scores.argsort(descending=True, stable=True)
        order = order[hits[order] != IGNORED]
        curves = []
        for k, objects in enumerate(self.objects.tolist()):
            found = hits[order[classes[order] == k]].cumsum(dim=0, dtype=torch.float64)  # (D,): so far
            curves.append((found / objects, found / torch.arange(1, len(found) + 1)))
        return curves


def _judge(nearest: Tensor, difficult: Tensor) -> Tensor:
    """Whether each of a picture's detections, best first, is a HIT, a MISS or IGNORED: (M,) int8.

    Args:
        nearest: (M,) the object that each overlaps most, NEGATIVE if not enough.
        difficult: (N,).
    """
    hits, found = [], set()
    difficult = difficult.tolist()
    for i in nearest.tolist():
        if i != NEGATIVE and difficult[i]:
            hits.append(IGNORED)
        else:
            hits.append(MISS if i == NEGATIVE or i in found else HIT)
            found.add(i)
    return torch.tensor(hits, dtype=torch.int8)


def _area(recall: Tensor, precision: Tensor) -> float:
    """Area under the curve (D,), (D,), where each precision counts as the best of it and those after it."""
    best = precision.flip(0).cummax(dim=0).values.flip(0) if len(precision) else precision
    steps = recall.diff(prepend=recall.new_zeros(1))  # (D,): 0 where a detection is false
    return (steps * best).sum().item()
