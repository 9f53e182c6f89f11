"""Pictures of segmentation: truth and prediction side by side, where they differ, and how well each class is found.

Shapes: B batch, C channels, H, W height and width of the batch's largest picture, h, w of one picture, K classes.
"""

import random
from heapq import nlargest, nsmallest
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import GREY, RED, new_figure, pixels
from runner.run import Run

# foreground, then lighter and darker ones; red is kept for what is wrong
COLORS = ("#2f8fd0", "#ee7a1c", "#43a047", "#8e5bc4", "#f5dd2a", "#e0529c", "#4dd0d6")
IGNORE = 255  # as in lit_models/segmenter.py, which imports this file: a pixel that does not count


class Sample(NamedTuple):
    """A test picture, without what pads it."""

    wrong: float  # share of the pixels that count
    image: np.ndarray  # (h, w, 3) uint8
    truth: np.ndarray  # (h, w) uint8
    predicted: np.ndarray  # (h, w) uint8


class SegmentationPictures(Callback):
    """`segmentation.png`: image, truth, prediction and errors side by side; `overlays.png`; `dice.png`, a bar a class.

    Half of the pictures are those with the largest shares of wrong pixels, which may be rare accidents; the others are
    drawn by chance, the same ones whatever the model is.

    Args:
        run: where the pictures go.
        count: of either half.
    """

    def __init__(self, run: Run, count: int = 3):
        self.run, self.count = run, count

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        self.tested, self.kept = 0, {}

    def on_test_batch_end(
        self, trainer, pl_module, outputs: Tensor, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep those of classes (B, H, W) and their pictures that may be drawn."""
        images, masks = batch  # (B, C, H, W), (B, H, W)
        counted = masks != IGNORE
        wrong, of = (t.flatten(1).sum(dim=1) for t in ((outputs != masks) & counted, counted))  # (B,), (B,)
        shares = (wrong / of.clamp(min=1)).tolist()
        new = dict(enumerate(zip(shares, images, masks, outputs, strict=True), start=self.tested))
        worst, drawn = self._choose({n: sample[0] for n, sample in (self.kept | new).items()})
        self.kept = {n: self.kept.get(n) or _sample(trainer.datamodule, *new[n]) for n in worst + drawn}
        self.tested += len(masks)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them."""
        names = self.names(trainer, pl_module)
        chosen = self._choose({number: sample.wrong for number, sample in self.kept.items()})
        worst, drawn = ([self.kept[number] for number in part[: self.count]] for part in chosen)
        title = "{}: the %d worst of %s test pictures; {}: %d drawn by chance"
        title = title % (len(worst), f"{self.tested:,}", len(drawn)) if drawn else "test pictures, the worst first"
        self.run.save_picture("segmentation", _side_by_side(worst, drawn, title.format("left", "right"), names))
        self.run.save_picture("overlays", _overlays(worst, drawn, title.format("above", "below"), names))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        by_class = {name: metrics[f"test_dice/{name}"] for name in names if f"test_dice/{name}" in metrics}
        if by_class:
            self.run.save_picture("dice", _dice(by_class, names, metrics.get("test/dice")))

    @staticmethod
    def names(trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Return the classes' names, the background's first, or their numbers."""
        names = getattr(trainer.datamodule, "classes", None) or range(max(pl_module.num_classes, 2))
        return [str(name) for name in names]

    def _choose(self, wrong: dict[int, float]) -> tuple[list[int], list[int]]:
        """Return the numbers of the worst pictures, and of enough others even if all that are drawn are bad ones."""
        worst = nlargest(self.count, wrong, key=wrong.get)
        drawn = nsmallest(2 * self.count, wrong, key=lambda number: random.Random(number).random())
        return worst, [number for number in drawn if number not in worst]


def class_colors(count: int) -> np.ndarray:
    """Return colours (count, 3) uint8: black for the background, then 21 that differ, over and over."""
    base = np.array([_rgb(color) for color in COLORS])  # (7, 3)
    each = np.concatenate([base, 0.6 * base + 0.4 * 255, 0.55 * base])  # (21, 3)
    rows = np.arange(count - 1) % len(each)
    return np.concatenate([np.zeros((1, 3)), each[rows]]).round().astype(np.uint8)


def overlay(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return an image (h, w, 3) uint8 with its classes (h, w) uint8: outlines, and half-transparent within."""
    painted, shown = class_colors(256)[classes], classes > 0  # (h, w, 3), (h, w)
    mixed = np.asarray(Image.blend(Image.fromarray(image), Image.fromarray(painted), 0.4))
    drawn = np.where(shown[..., None], mixed, image)
    numbers = torch.from_numpy(classes).float()[None]  # (1, h, w)
    width = max(1, round(max(classes.shape) / 400))
    edge = shown & (_greatest_near(numbers, width) != -_greatest_near(-numbers, width))[0].numpy()
    drawn[edge] = painted[edge]
    return drawn


def _greatest_near(numbers: Tensor, width: int) -> Tensor:
    """Return of each pixel the greatest of numbers (1, h, w) that are at most so far from it, in a square."""
    columns = F.max_pool2d(numbers, (2 * width + 1, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(columns, (1, 2 * width + 1), stride=1, padding=(0, width))


def _sample(data, wrong: float, *tensors: Tensor) -> Sample:
    """Copy a picture of a batch to the CPU, without what pads it: image (C, H, W), mask and predicted (H, W).

    Its colours are those of the file, if the data module says by which mean and deviation they were normalised.
    """
    image, mask, predicted = (tensor.cpu() for tensor in tensors)
    there = (mask != IGNORE) | (image != 0).any(dim=0)  # (H, W); an outline at the picture's edge is ignored, too
    height, width = (int(there.any(dim=d).nonzero().max()) + 1 if there.any() else there.shape[1 - d] for d in (1, 0))
    image = image[:, :height, :width].float()
    mean, std = (torch.tensor(getattr(data, name, ())).reshape(-1, 1, 1) for name in ("mean", "std"))
    if len(mean) == len(image):
        image = (image * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
    else:
        image = pixels(image)
    image = 255 * image  # (h, w, 3), or (h, w) of one channel
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    mask, predicted = (t[:height, :width].numpy().astype(np.uint8) for t in (mask, predicted))
    return Sample(wrong, image.round().astype(np.uint8), mask, predicted)


def _side_by_side(worst: list[Sample], drawn: list[Sample], title: str, names: list[str]):
    """Draw two pictures a row: one of the worst, and beside it one of those drawn by chance."""
    columns, rows = (4 + 4 if drawn else 4), [[worst[i], *drawn[i : i + 1]] for i in range(len(worst))]
    heights = _heights(rows)
    figure = new_figure(2.4 * columns, sum(2.4 * height + 0.25 for height in heights) + 0.8)
    figure.suptitle(title, fontsize=12)
    widths = [1, 1, 1, 1, 0.1, 1, 1, 1, 1][: columns + columns // 8]
    grid = figure.subplots(len(rows), len(widths), squeeze=False, width_ratios=widths, height_ratios=heights)
    for axis in grid.ravel():
        axis.axis("off")
    for axes, row in zip(grid, rows, strict=True):
        for start, sample in zip((0, 5), row, strict=False):
            cells = {
                "image": sample.image,
                "truth": _painted(sample.truth),
                "prediction": _painted(sample.predicted),
                f"{sample.wrong:.1%} wrong": _errors(sample),
            }
            for axis, (name, cell) in zip(axes[start:], cells.items(), strict=False):
                axis.imshow(cell)
                axis.set_title(name, fontsize=9, pad=3)
    there = {int(k) for sample in worst + drawn for classes in sample[2:] for k in np.unique(classes)}
    others = {"does not count": GREY} if IGNORE in there else {}
    _legend(figure, there, names, others | {"wrong": RED})
    return figure


def _overlays(worst: list[Sample], drawn: list[Sample], title: str, names: list[str]):
    """Draw a row of the worst pictures, and one of those drawn by chance, with what was predicted."""
    rows = [row for row in (worst, drawn) if row]
    heights = _heights(rows)
    side = 12 / max(len(worst), 2)
    figure = new_figure(side * len(worst), side * sum(heights) + 1)
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(len(rows), len(worst), squeeze=False, height_ratios=heights)
    for axis in grid.ravel():
        axis.axis("off")
    for axes, row in zip(grid, rows, strict=True):
        for axis, sample in zip(axes, row, strict=False):
            axis.imshow(overlay(sample.image, sample.predicted))
    there = {int(k) for sample in worst + drawn for k in np.unique(sample.predicted)}
    _legend(figure, there - {0}, names)
    return figure


def _dice(by_class: dict[str, float], names: list[str], mean: float | None):
    """Draw a bar for each class, in the order of the classes."""
    figure = new_figure(7, 0.32 * len(by_class) + 1.3)
    axis = figure.subplots()
    colors = {**dict(zip(names, class_colors(len(names)) / 255, strict=True)), names[0]: GREY}
    labels, values = [_literal(name) for name in by_class], list(by_class.values())
    bars = axis.barh(range(len(values)), values, tick_label=labels, color=[colors[name] for name in by_class])
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line of the mean
    axis.bar_label(bars, [f"{value:.3f}" for value in values], padding=4, fontsize=9, bbox=box)
    if mean is not None and len(by_class.keys() - {names[0]}) > 1:
        axis.axvline(mean, color="black", ls="--", lw=1)
        axis.set_title(f"mean of the foreground's classes (dashed): {mean:.3f}", fontsize=11)
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.set(xlabel="Dice over the test set", xlim=(0, 1.12), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    return figure


def _painted(classes: np.ndarray) -> np.ndarray:
    """Return classes (h, w) in their colours, (h, w, 3) uint8."""
    colors = class_colors(256)
    colors[IGNORE] = _rgb(GREY)
    return colors[classes]


def _errors(sample: Sample) -> np.ndarray:
    """Return the picture in dark grey, (h, w, 3) uint8, red where the prediction is wrong, and grey where none counts."""
    shown = np.repeat((0.45 * sample.image.mean(axis=2, keepdims=True)).astype(np.uint8), 3, axis=2)
    shown[sample.predicted != sample.truth] = _rgb(RED)
    shown[sample.truth == IGNORE] = _rgb(GREY)
    return shown


def _heights(rows: list[list[Sample]]) -> list[float]:
    """Return rows' heights as shares of a picture's width: of the highest picture, so long as it is no higher than wide."""
    return [min(max(len(sample.image) / sample.image.shape[1] for sample in row), 1) for row in rows]


def _legend(figure, there: set[int], names: list[str], others: dict[str, str] | None = None) -> None:
    """Tell the colours of classes and others."""
    from matplotlib.patches import Patch

    colors = class_colors(256) / 255
    told = {_literal(names[k]): colors[k] for k in sorted(there - {IGNORE})} | (others or {})
    handles = [Patch(facecolor=color, edgecolor=GREY, lw=0.5, label=name) for name, color in told.items()]
    columns = int(figure.get_figwidth() / (0.75 + 0.09 * max(map(len, told), default=0)))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(columns, len(told))), frameon=False)


def _rgb(color: str) -> tuple[int, int, int]:
    """Turn "#c1292e" into (193, 41, 46)."""
    return tuple(bytes.fromhex(color[1:]))


def _literal(name: str) -> str:
    """Return a name as matplotlib draws it literally."""
    return name.replace("$", r"\$")
