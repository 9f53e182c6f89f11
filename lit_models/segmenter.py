"""What segmenters share: losses and metrics over pixels, and which pixels count.

Shapes: B batch, C channels, H height, W width, K classes, the background among them, F = K - 1 of the foreground.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.functional.classification import multiclass_confusion_matrix

from callbacks.segmentation import SegmentationPictures
from lit_models.convnet import can_be_channels_last
from lit_models.tasks import Task
from runner.errors import InputError

IGNORE = 255  # a pixel that counts neither in losses nor in metrics: VOC's outlines, and what pads a picture


class Segmenter(Task):
    """Images to a class for each pixel.

    Batches are (images (B, C, H, W), masks (B, H, W) int64): each pixel's class, 0 the background, or `IGNORE`. A
    subclass's forward maps images of any size to logits (B, K, H, W), whose softmax is the classes' probabilities; a
    model with `num_classes: 1` has one output (B, 1, H, W), whose sigmoid is that of class 1, the foreground.

    `train/loss` and `train/acc` are over the pixels since the last log. What `val` and `test` log is over the set:
    `definitions` say what it is, by the names that follow `val/` and `test/`.

    Args:
        num_classes: K, or 1.
        loss: `bce`, for one output, is the mean over pixels of the cross-entropy of its sigmoid; `ce`, for K outputs,
            that of the softmax; `dice` is `dice_loss`; `bce_dice` and `ce_dice` are sums of two. None: `bce` or `ce`.
        channels_last: whether to keep a pixel's channels side by side in memory, which convolutions are faster with.
        task: arguments of `Task`.
    """

    tag = "segmentation"
    pictures = SegmentationPictures
    definitions = {  # noqa: RUF012
        "acc": "share of the set's pixels whose class is right: micro, background in; pixels of 255 left out",
        "miou": "IoU of each class over the set's pixels, mean over classes that occur in truth or prediction: macro, "
        "background in; pixels of 255 left out",
        "dice": "Dice of each class over the set's pixels, mean over classes that occur in truth or prediction: macro, "
        "background out; pixels of 255 left out",
        "dice_per_image": "Dice of each class over a picture's pixels, mean over classes that occur in it, in truth or "
        "prediction, 1 where none does, mean over pictures: macro, background out; pixels of 255 left out",
        "iou/<class>": "IoU of the class over the set's pixels; pixels of 255 left out",
        "dice/<class>": "Dice of the class over the set's pixels; pixels of 255 left out",
    }

    def __init__(
        self,
        num_classes: int,
        loss: Literal["bce", "dice", "bce_dice", "ce", "ce_dice"] | None = None,
        channels_last: bool = True,
        **task,
    ):
        super().__init__(**task)
        if not 1 <= num_classes <= IGNORE:
            raise InputError(
                f"num_classes: 1 for a single output, at most {IGNORE} with the background, got {num_classes}"
            )
        fitting = ("bce", "dice", "bce_dice") if num_classes == 1 else ("ce", "dice", "ce_dice")
        if loss and loss not in fitting:
            raise InputError(f"loss: {loss} is not for num_classes {num_classes}, which has {', '.join(fitting)}")
        self.num_classes, self.channels_last = num_classes, channels_last
        self.loss_name = loss or fitting[0]
        self.val_overlap = Overlap(max(num_classes, 2))
        self.test_overlap = self.val_overlap.clone()
        self.test_dice_per_image = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K, H, W), or (B, 1, H, W)."""
        raise NotImplementedError

    @staticmethod
    def classes_of(logits: Tensor) -> Tensor:
        """Return the most probable classes (B, H, W) int64."""
        if logits.shape[1] == 1:
            return (logits[:, 0] > 0).long()
        # on a CPU it takes 8 times as long, or more, where a pixel's channels lie apart
        return logits.contiguous(memory_format=torch.channels_last).argmax(dim=1)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return the loss, a scalar, in float32 at least: 0 if no pixel counts."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return sum(LOSSES[name](logits, masks) for name in self.loss_name.split("_"))

    # -- steps ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that the data has classes of pixels, and as many; set the memory format."""
        if getattr(self.trainer.datamodule, "target", "classes") != "classes":
            raise InputError(f"{type(self).__name__} needs the class of each pixel: --data.target classes")
        self.check_classes()
        if self.channels_last and can_be_channels_last(self, self.trainer.strategy.root_device):
            self.to(memory_format=torch.channels_last)

    def check_classes(self) -> None:
        """Check the number of classes; a single output tells two apart."""
        if self.num_classes != 1 or len(getattr(self.trainer.datamodule, "classes", None) or ()) != 2:
            super().check_classes()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, masks = batch
        logits = self(images)
        loss = self.loss(logits, masks)
        right = (self.classes_of(logits.detach()) == masks).sum()  # IGNORE is no class: never right
        counted = (masks != IGNORE).sum().float().clamp(min=1e-6)  # of no pixels the mean is 0, too
        self.log_train(batch_idx, counted, loss=loss * counted, acc=right)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation's metrics."""
        images, masks = batch
        self.val_overlap.update(self.classes_of(self(images)), masks)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Add a batch to the test's metrics; return the classes (B, H, W), for the pictures."""
        images, masks = batch
        predicted = self.classes_of(self(images))
        self.test_overlap.update(predicted, masks)
        self.test_dice_per_image.update(dice_per_image(predicted, masks, max(self.num_classes, 2)))
        return predicted

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the classes (B, H, W), uint8, of a batch of (images, ...)."""
        return self.classes_of(self(batch[0])).to(torch.uint8)

    def on_validation_epoch_end(self) -> None:
        """Log.

        Raises:
            InputError: there is no foreground to choose the best epoch by.
        """
        _, dice = self._log_overlap("val", self.val_overlap)
        if all(map(math.isnan, dice[1:])) and self.trainer.state.fn == "fit":
            raise InputError("the masks of val have no foreground: there is nothing to choose the best epoch by")

    def on_test_epoch_end(self) -> None:
        """Log, with the IoU and the Dice of each class; of a class that occurs nowhere there is none."""
        iou, dice = self._log_overlap("test", self.test_overlap)
        self.log("test/dice_per_image", float(self.test_dice_per_image.compute()))
        self.test_dice_per_image.reset()
        classes = getattr(self.trainer.datamodule, "classes", None) or range(len(iou))
        for name, values in (("iou", iou), ("dice", dice)):
            values = zip(classes, values, strict=True)
            self.log_dict({f"test_{name}/{c}": value for c, value in values if not math.isnan(value)})

    def _log_overlap(self, stage: str, overlap: "Overlap") -> tuple[list[float], list[float]]:
        """Log what the metric says, and return the IoU and the Dice of each class."""
        said = overlap.compute()
        overlap.reset()
        for name in ("acc", "miou", "dice"):
            self.log(f"{stage}/{name}", float(said[name]), prog_bar=name == "miou")
        return said["iou_by_class"].tolist(), said["dice_by_class"].tolist()


# -- metrics -----------------------------------------------------------------------------------------------------------


class Overlap(MulticlassConfusionMatrix):
    """How well predicted classes lie over the true ones: torchmetrics' confusion matrix of a set's pixels.

    Of its counts, n[t, p] pixels of class t that are predicted to be p, come

        acc = sum_k n[k, k] / sum n      IoU_k = n[k, k] / (n[k, :] + n[:, k] - n[k, k])
        Dice_k = 2 n[k, k] / (n[k, :] + n[:, k])

    They equal torchmetrics' MulticlassAccuracy (micro), MulticlassJaccardIndex (macro) and DiceScore (macro, global,
    without background), each of which would count the pixels by itself, DiceScore of one-hot copies. (MeanIoU is a mean
    over pictures.) A class that occurs in neither truth nor prediction has no value (NaN), and counts in no mean.

    The notes' Dice is the mean of the batches' Dice, to which a last batch of one picture adds as much as a full one,
    and one without foreground adds 0. By how much that matters: of 17 pictures in batches of 16, let 16 have 100 pixels
    of foreground, of which 90 are found, and the last 10, of which none is. Dice over the set is 0.9443, the mean of
    the batches' 0.4737.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int):
        # one class more, for pixels that do not count: it takes longer to sort them out than to count them
        super().__init__(num_classes + 1, validate_args=False)

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Count pixels: predicted classes (B, H, W) and the true ones, or IGNORE (B, H, W)."""
        super().update(predicted, masks.masked_fill(masks == IGNORE, self.num_classes - 1))

    def compute(self) -> dict[str, Tensor]:
        """Return `acc`, `miou` and `dice`, scalars, NaN if nothing occurs; `iou_by_class` and `dice_by_class`, (K,)."""
        counts = super().compute()[:-1, :-1].cpu().double()  # (K, K), truth by row
        both, either = counts.diag(), counts.sum(dim=0) + counts.sum(dim=1)  # (K,), (K,)
        iou, dice = both / (either - both), 2 * both / either  # 0 / 0 is NaN
        return {
            "acc": both.sum() / counts.sum(),
            "miou": iou.nanmean(),
            "dice": dice[1:].nanmean(),
            "iou_by_class": iou,
            "dice_by_class": dice,
        }


def dice_per_image(predicted: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Return each picture's Dice (B,), see `Segmenter.definitions`, of predicted classes and true ones (B, H, W)."""
    masks = masks.masked_fill(masks == IGNORE, num_classes)
    counts = torch.stack([
        multiclass_confusion_matrix(p, m, num_classes + 1, validate_args=False)[:-1, :-1]
        for p, m in zip(predicted, masks, strict=True)
    ]).float()  # (B, K, K)  # fmt: skip
    dice = 2 * counts.diagonal(dim1=1, dim2=2) / (counts.sum(dim=1) + counts.sum(dim=2))  # (B, K)
    return dice[:, 1:].nanmean(dim=1).nan_to_num(1.0)


# -- losses: of logits (B, K or 1, H, W) for masks (B, H, W), a scalar -------------------------------------------------


def cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the pixels that count; 0 if none does."""
    return F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum") / (masks != IGNORE).sum().clamp(min=1)


def binary_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the pixels that count, of the single output; 0 if none does."""
    counted = masks != IGNORE
    x, wanted, weight = logits[:, 0], (masks == 1).to(logits.dtype), counted.to(logits.dtype)  # each (B, H, W)
    return F.binary_cross_entropy_with_logits(x, wanted, weight, reduction="sum") / counted.sum().clamp(min=1)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 less the Dice of probabilities (Milletari et al. 2016), the mean over the foreground's classes.

        1 - (2 sum_i p_i g_i + 1) / (sum_i p_i^2 + sum_i g_i^2 + 1)

    i runs over the batch's pixels that count, p is the probability of the class, g whether it is there, 1 or 0. The 1
    above and below, which the paper has not, makes it 0 where nothing is and nothing is said to be.
    """
    p = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)[:, 1:]  # (B, F, H, W)
    p = p * (masks != IGNORE)[:, None]
    classes = torch.arange(1, p.shape[1] + 1, device=masks.device)
    there = masks[:, None] == classes[:, None, None]  # (B, F, H, W)
    both, squares = (
        (p * there).sum(dim=(0, 2, 3)),
        p.square().sum(dim=(0, 2, 3)) + there.sum(dim=(0, 2, 3)),
    )  # (F,), (F,)
    return (1 - (2 * both + 1) / (squares + 1)).mean()


LOSSES = {"ce": cross_entropy, "bce": binary_cross_entropy, "dice": dice_loss}


# -- networks ----------------------------------------------------------------------------------------------------------


def pad(images: Tensor, multiple: int, least: int) -> Tensor:
    """Pad images (B, C, H, W) below and at the right with copies of their edges, to sides that are multiples."""
    height, width = (max(-(-side // multiple) * multiple, least) for side in images.shape[2:])
    if (height, width) == images.shape[2:]:
        return images
    return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]), mode="replicate")
