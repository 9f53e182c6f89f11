"""Pictures of tasks on sequences: a series with its forecast; texts with their classes, and which are taken for which."""

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    ClassificationPictures,
    RegressionPictures,
    _confusion_matrix,
    new_figure,
)
from runner.run import Run


class SeriesPictures(RegressionPictures):
    """`forecast.png`: the test part with what was predicted of each next value, and with forecasts that run free.

    Args:
        run: where the picture goes.
        steps: of the series that are drawn.
        free: of them that a forecast runs on by itself, before the next one begins anew from what was.
    """

    def __init__(self, run: Run, steps: int = 300, free: int = 60):
        super().__init__(run)
        self.steps, self.free = steps, free

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, in the units that the data came in."""
        inputs, targets, predictions = (torch.cat(parts) for parts in zip(*self.tested, strict=True))  # (N, T), (N, H)
        data, n = trainer.datamodule, min(self.steps, len(inputs))
        starts = inputs[: n : self.free].to(pl_module.device, pl_module.dtype)  # (S, T)
        free = pl_module.forecast(starts, min(self.free, n)).float().cpu()  # (S, free)
        there, predicted, free = (t * data.std + data.mean for t in (targets[:n, 0], predictions[:n, 0], free))

        figure = new_figure(12, 6.4)
        above, below = figure.subplots(2, 1, sharex=True, sharey=True)
        mse = float((predictions - targets).square().mean())
        above.set_title(f"the next value, predicted from what came before: mean squared error {mse:.4g} (normalised)")
        below.set_title(f"{len(free)} forecasts that run free for {free.shape[1]} steps, from the dots on")
        for axis in (above, below):
            axis.plot(range(n), there, color=GREY, lw=1.2, label="test part")
            axis.grid(alpha=0.25)
        above.plot(range(n), predicted, color=BLUE, lw=1.2, label="prediction")
        for i, forecast in enumerate(free):
            first = i * self.free
            shown = forecast[: n - first]
            label = "forecast" if i == 0 else None
            below.plot(range(first, first + len(shown)), shown, color=ORANGE, lw=1.6, label=label)
            below.plot(first, shown[0], "o", color=ORANGE, ms=5)
        below.set_xlabel("steps of the test part, behind the first context")
        for axis in (above, below):
            axis.legend(frameon=False, loc="upper right", ncols=2)
        self.run.save_picture("forecast", figure)


class TextClassPictures(ClassificationPictures):
    """`predictions.png`: test texts with prediction and label; `confusion_matrix.png`; `classes.png`: accuracy of each.

    Args:
        run: where the pictures go.
        rows, columns: of the table of texts; three quarters of it are for wrong ones, if there are so many.
    """

    def __init__(self, run: Run, rows: int = 20, columns: int = 3):
        super().__init__(run, rows, columns)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them."""
        classes = self.names(trainer, pl_module)
        labels, predicted = torch.cat(self.pairs, dim=1)  # (N,), (N,)
        share = float((labels != predicted).float().mean())
        title = f"{share:.2%} of {len(labels):,} test texts wrong"
        self.run.save_picture("predictions", self._table(classes, title, trainer.datamodule.vocabulary))
        self.run.save_picture("confusion_matrix", _confusion_matrix(labels, predicted, classes))
        self.run.save_picture("classes", _accuracies(labels, predicted, classes))

    def _table(self, classes: list[str], title: str, vocabulary):
        cells = self.rows * self.columns
        figure = new_figure(4.4 * self.columns, 0.24 * self.rows + 0.8)
        figure.suptitle(f"{title}; wrong ones first, in red: text, prediction, and the label in brackets", fontsize=11)
        grid = figure.subplots(1, self.columns, squeeze=False).ravel()
        shown = self.some(cells, wrong=cells * 3 // 4)
        for column, axis in enumerate(grid):
            axis.axis("off")
            axis.set(xlim=(0, 1), ylim=(self.rows, 0))
            for row, (tokens, said, label) in enumerate(shown[column * self.rows : (column + 1) * self.rows]):
                text = vocabulary.decode(tokens.long()).replace("$", r"\$")
                text = text if len(text) <= 24 else f"{text[:23]}…"
                told = classes[said] if said == label else f"{classes[said]} ({classes[label]})"
                color = "black" if said == label else RED
                axis.text(0.0, row + 0.5, text, fontsize=9, va="center", family="monospace")
                axis.text(0.5, row + 0.5, told, fontsize=9, va="center", color=color)
        return figure


def _accuracies(labels: Tensor, predicted: Tensor, classes: list[str]):
    """Draw each class's share of texts that are classified right, the largest class first; beside it, of how many."""
    k = len(classes)
    samples = torch.bincount(labels, minlength=k)  # (K,)
    right = torch.bincount(labels[labels == predicted], minlength=k)  # (K,)
    order = [i for i in samples.argsort(descending=True, stable=True).tolist() if samples[i]]
    figure = new_figure(7, 0.28 * len(order) + 1.2)
    axis = figure.subplots()
    shares = [float(right[i] / samples[i]) for i in order]
    axis.barh(range(len(order)), shares, color=BLUE, height=0.7)
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the line does not go through numbers
    for row, (i, share) in enumerate(zip(order, shares, strict=True)):
        axis.text(
            share + 0.01,
            row,
            f"{share:.0%} of {int(samples[i]):,}",
            va="center",
            fontsize=8,
            color="#3c4148",
            bbox=clear,
        )
    mean = float(right.sum() / samples.sum())
    axis.axvline(mean, color=ORANGE, lw=1.5)
    axis.set(
        xlim=(0, 1.18), xlabel="share classified right", title=f"accuracy of each class (line: of all, {mean:.1%})"
    )
    axis.set_yticks(range(len(order)), [classes[i] for i in order], fontsize=9)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    return figure
