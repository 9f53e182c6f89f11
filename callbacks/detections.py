"""Pictures of detectors: what is there beside what was found, precision over recall, and what a model wants to explain."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import BLUE, GREY, ORANGE, RED, new_figure, pixels
from runner.run import Run

COLORS = ("#2a6f97", "#e07a1f", "#3c8d40", "#c1292e", "#7b4ea3", "#00868b", "#b5651d", "#d1478b")  # one a class
MOST_LABELS = 8  # beside the boxes of a picture: more would hide it
OPACITY = 0.5  # of masks over a picture; their edges let nothing through


class DetectionPictures(Callback):
    """`detections.png`, `precision_recall.png`, and one for each thing that the model's `explain` returns.

    Args:
        run: where the pictures go.
        count: test pictures that are drawn.
        least_score: of the boxes that are drawn; those below are many, and count for little.
    """

    def __init__(self, run: Run, count: int = 12, least_score: float = 0.5):
        self.run, self.count, self.least_score = run, count, least_score

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        self.kept: list[tuple[Tensor, dict, dict]] = []

    def on_test_batch_end(
        self, trainer, pl_module, outputs: list[dict], batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first few pictures, without what pads them, with their targets and what was found."""
        images, targets = batch
        if batch_idx == 0:
            self.first = images[:6], targets[:6]  # as the network got them
        for image, target, found in list(zip(images, targets, outputs, strict=True))[: self.count - len(self.kept)]:
            height, width = target["size"]
            self.kept.append((image[:, :height, :width], target, found))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw precision over recall; the model forgets it after this."""
        curves, ap = pl_module.test_voc.curves(), pl_module.test_voc.compute().reshape(-1)
        self.run.save_picture("precision_recall", _curves(curves, ap, self.names(trainer, pl_module)))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the rest."""
        classes = self.names(trainer, pl_module)
        title = f"left: what is there; right: what was found, with scores from {self.least_score}"
        pairs = [
            (image, {"": target}, {"": {n: v[found["scores"] >= self.least_score] for n, v in found.items()}})
            for image, target, found in self.kept
        ]
        cells = [cell for image, there, found in pairs for cell in ((image, there), (image, found))]
        self.run.save_picture("detections", draw_boxes(cells, title, 6, classes))
        images, targets = self.first
        with torch.inference_mode(), torch.random.fork_rng():  # what it draws at random changes nothing else
            torch.manual_seed(0)
            explained = pl_module.explain(images, targets)
        for name, said, boxes in explained:
            cells = [
                (image, {what: {"boxes": b} for what, b in each.items()})
                for image, each in zip(images, boxes, strict=True)
            ]
            self.run.save_picture(name, draw_boxes(cells, said, 3))

    @staticmethod
    def names(trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Return the classes' names as matplotlib draws them literally, or their numbers."""
        classes = getattr(trainer.datamodule, "classes", None) or range(pl_module.num_classes)
        return [str(name).replace("$", r"\$") for name in classes]


def draw_boxes(cells: list[tuple[Tensor, dict[str, dict]]], title: str, columns: int, classes: list[str] | None = None):
    """Return a figure of images with boxes.

    Args:
        cells: an image (3, H, W), and by what they are, `boxes` (N, 4), with `labels`, `scores` and `masks` (N, H, W) where
            there are any.
        title: of the figure.
        columns: of the grid.
        classes: names of the labels, which are written beside the boxes, or told by a legend where there are many; None
            colours boxes by what they are, and a legend tells.
    """
    columns = min(columns, len(cells))
    rows = math.ceil(len(cells) / columns)
    height, width = cells[0][0].shape[1:]
    side = 13 / columns
    figure = new_figure(side * columns, rows * side * height / width + 0.6)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in grid:
        axis.axis("off")
    legend = {}
    for axis, (image, groups) in zip(grid, cells, strict=False):
        height, width = image.shape[1:]
        axis.imshow(pixels(image.float().cpu()))
        for number, (what, said) in enumerate(groups.items()):
            boxes = said["boxes"].float().cpu().tolist()
            labels = said["labels"].tolist() if classes else [None] * len(boxes)
            scores = said["scores"].tolist() if "scores" in said else [None] * len(boxes)
            if "masks" in said and classes:
                axis.imshow(_layer(said["masks"].cpu(), labels))
            for (x1, y1, x2, y2), label, score in zip(boxes, labels, scores, strict=True):
                color = (GREY, BLUE, ORANGE, RED)[number % 4] if label is None else COLORS[label % len(COLORS)]
                x, y = (x1, x2, x2, x1, x1), (y1, y1, y2, y2, y1)
                # a pixel's middle is its coordinate in matplotlib, and half a pixel more in ours
                (line,) = axis.plot(
                    [v - 0.5 for v in x],
                    [v - 0.5 for v in y],
                    color=color,
                    lw=1 if number == 0 and not classes else 1.6,
                )
                if label is None or len(boxes) > MOST_LABELS:
                    legend[what if label is None else classes[label]] = line
                else:
                    text = classes[label] if score is None else f"{classes[label]} {score:.2f}"
                    axis.text(x1, max(y1 - 1.5, 6), text, fontsize=7, color="white",
                              bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8}, clip_on=True)  # fmt: skip
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _layer(masks: Tensor, labels: list[int]) -> np.ndarray:
    """Return masks (N, H, W) in the colours of their classes, and how opaque each pixel is: (H, W, 4), from 0 to 1."""
    from matplotlib.colors import to_rgba

    layer = np.zeros((*masks.shape[1:], 4))
    for mask, label in reversed(list(zip(masks, labels, strict=True))):  # the best on top
        opaque = opacity(mask)
        layer[opaque > 0] = to_rgba(COLORS[label % len(COLORS)])
        layer[opaque > 0, 3] = opaque[opaque > 0]
    return layer


def opacity(mask: Tensor) -> np.ndarray:
    """Return how opaque the pixels of a mask (H, W) bool are to be drawn, from 0 to 1: (H, W) float32."""
    width = max(1, round(max(mask.shape) / 400))  # of the edge, in pixels
    inner = -F.max_pool2d(-mask[None].float(), 2 * width + 1, stride=1, padding=width)[0]  # 1 far enough from the edge
    return (mask.float() - (1 - OPACITY) * inner).numpy()


def _curves(curves: list[tuple[Tensor, Tensor]], ap: Tensor, classes: list[str]):
    """Draw precision over recall of each class, with the area below it."""
    figure = new_figure(6.4, 5.2)
    axis = figure.subplots()
    for i, ((recall, precision), value, name) in enumerate(zip(curves, ap.tolist(), classes, strict=True)):
        if math.isnan(value):
            continue
        color, envelope = COLORS[i % len(COLORS)], precision.flip(0).cummax(dim=0).values.flip(0)
        x, y = [0.0, *recall.tolist()], [*envelope[:1].tolist(), *envelope.tolist()]
        axis.plot(recall, precision, color=color, lw=0.7, alpha=0.5)
        axis.plot(x, y or [0.0], color=color, lw=1.8, label=f"{name}: {value:.3f}", drawstyle="steps-pre")
    axis.set(
        xlabel="recall: share of the objects that were found",
        ylabel="precision: share of the boxes that are right",
        title=f"at IoU 0.5: the mean of the areas is {float(ap.nanmean()):.3f}\n(thin: as it is; thick: as VOC counts it)",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    axis.grid(alpha=0.25)
    if axis.lines and len(classes) <= 30:
        axis.legend(frameon=False, fontsize=9, ncols=1 if len(classes) <= 10 else 2)
    return figure
