"""What a person would rather look at than numbers: `pictures/` in the run's folder, and the same in wandb."""

import math

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from runner.history import read_history
from runner.run import Run

BLUE, ORANGE, RED, GREY = "#2a6f97", "#e07a1f", "#c1292e", "#8a8f98"


def draw_curves(run: Run, trainer: Trainer) -> None:
    """Draw `curves.png`: a panel for each metric, training and validation over the epochs, the best epoch marked.

    It is drawn from metrics.csv, so that a resumed run shows the whole.
    """
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)  # an epoch
    panels: dict[str, dict[str, list[tuple[float, float, int]]]] = {}
    for row in read_history(run.history.path):
        stage, _, name = row["metric"].partition("/")
        if stage in ("train", "val"):
            point = ((row["step"] + 1) / steps, row["value"], row["epoch"])
            panels.setdefault(name, {}).setdefault(stage, []).append(point)
    if not panels:
        return
    for name in [name for name in panels if name.startswith("lr")]:
        panels[name] = panels.pop(name)  # last: beside the loss, not before it

    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    figure = new_figure(5.2 * columns, 3.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in grid[len(panels) :]:
        axis.axis("off")
    best = trainer.checkpoint_callback
    for axis, (name, stages) in zip(grid, panels.items(), strict=False):
        for stage, points in stages.items():
            x, y, _ = zip(*points, strict=True)
            color, marker = {"train": (GREY, ""), "val": (BLUE, "o")}[stage]
            axis.plot(x, y, color=color, label=stage, lw=1.5, marker=marker if len(x) <= 40 else "", ms=3.5)
            if f"{stage}/{name}" == best.monitor:
                last = {epoch: (x, y) for x, y, epoch in points}.values()  # of each epoch: only that can be saved
                at, value = (max if best.mode == "max" else min)(last, key=lambda point: point[1])
                axis.plot(at, value, "o", ms=9, mfc="none", mec=ORANGE, mew=2, label=f"best.ckpt: {value:.4g}")
        values = [value for points in stages.values() for _, value, _ in points]
        scale = "log" if name == "mse" and 0 < 30 * min(values) < max(values) else "linear"  # squares span decades
        axis.set(title=name, xlabel="epoch", xlim=(0, None), yscale=scale)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    run.save_picture("curves", figure)


class ClassificationPictures(Callback):
    """`predictions.png`: test pictures with prediction and label, wrong ones first; `confusion_matrix.png`; `filters.png`.

    Args:
        run: where the pictures go.
        rows, columns: of the grid of predictions; three quarters of it are for wrong ones, if there are so many.
    """

    def __init__(self, run: Run, rows: int = 6, columns: int = 10):
        self.run, self.rows, self.columns = run, rows, columns

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        self.wrong: list[tuple[Tensor, int, int]] = []
        self.right: list[tuple[Tensor, int, int]] = []
        self.pairs: list[Tensor] = []

    def on_test_batch_end(
        self, trainer, pl_module, outputs: Tensor, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep every prediction, and the first few pictures of either kind."""
        images, labels = batch  # (B, C, H, W), (B,)
        predicted = outputs.argmax(dim=1)  # (B, K) -> (B,)
        self.pairs.append(torch.stack([labels, predicted]).cpu())  # (2, B)
        is_wrong = predicted != labels
        for kept, mask in ((self.wrong, is_wrong), (self.right, ~is_wrong)):
            for i in mask.nonzero()[: self.rows * self.columns - len(kept), 0].tolist():
                kept.append((images[i].float().cpu(), int(predicted[i]), int(labels[i])))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them."""
        classes = self.names(trainer, pl_module)
        labels, predicted = torch.cat(self.pairs, dim=1)  # (N,), (N,)
        share = float((labels != predicted).float().mean())
        self.run.save_picture(
            "predictions", self._predictions(classes, f"{share:.2%} of {len(labels):,} test pictures wrong")
        )
        self.run.save_picture("confusion_matrix", _confusion_matrix(labels, predicted, classes))
        if (filters := first_filters(pl_module, (self.wrong + self.right)[0][0].shape)) is not None:
            self.run.save_picture("filters", _filters(filters))

    def some(self, count: int, wrong: int) -> list[tuple[Tensor, int, int]]:
        """Return pictures with prediction and label: so many, `wrong` of them wrong ones if there are both; these first."""
        first = self.wrong[: max(wrong, count - len(self.right))]
        return first + self.right[: count - len(first)]

    @staticmethod
    def names(trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Return the classes' names as matplotlib draws them literally, or their numbers."""
        classes = getattr(trainer.datamodule, "classes", None) or range(pl_module.num_classes)
        return [str(name).replace("$", r"\$") for name in classes]

    def _predictions(self, classes, title: str):
        cells = self.rows * self.columns
        figure = new_figure(1.15 * self.columns, 1.35 * self.rows + 0.5)
        figure.suptitle(f"{title}; wrong ones first, in red: prediction, and the label in brackets", fontsize=11)
        grid = figure.subplots(self.rows, self.columns, squeeze=False).ravel()
        for axis in grid:
            axis.axis("off")
        for axis, (image, predicted, label) in zip(grid, self.some(cells, wrong=cells * 3 // 4), strict=False):
            axis.imshow(pixels(image), cmap="gray")
            name_picture(axis, classes, predicted, label)
        return figure


def name_picture(axis, classes, predicted: int, label: int) -> None:
    """Write the prediction above a picture, in red with the label in brackets if it is wrong."""
    text = classes[predicted] if predicted == label else f"{classes[predicted]} ({classes[label]})"
    axis.set_title(text, fontsize=8, color=RED if predicted != label else "black", pad=2)


def pixels(image: Tensor):
    """Return an image (C, H, W), of whatever range, as matplotlib wants it: (H, W, C) or (H, W), from 0 to 1."""
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).squeeze(-1).numpy()


def first_filters(model: LightningModule, image: torch.Size, most: int = 64) -> Tensor | None:
    """Return the first layer's filters as pictures (N, C, h, w), if it sees pictures: a convolution's, or a linear layer's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            filters = module.weight
        elif isinstance(module, nn.Linear) and module.in_features == image.numel():
            filters = module.weight.view(-1, *image)  # (N, C * H * W) -> (N, C, H, W)
        else:
            continue
        filters = filters.detach().float().cpu()[:most]
        return filters if filters.shape[1] in (1, 3) else filters[:, :1]
    return None


def _filters(filters: Tensor):
    columns = min(16, len(filters))
    rows = math.ceil(len(filters) / columns)
    size = 0.62 if filters.shape[2] <= 16 else 0.9
    figure = new_figure(size * columns, size * rows + 0.5)
    figure.suptitle(f"the first layer's filters ({len(filters)})", fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in grid:
        axis.axis("off")
    for axis, weight in zip(grid, filters, strict=False):
        shown = 0.5 + 0.5 * weight / weight.abs().max().clamp(min=1e-12)  # a weight of 0 is grey
        axis.imshow(shown.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)  # (C, h, w) -> (h, w, C)
        axis.axis("on")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color(GREY)
    return figure


def _confusion_matrix(labels: Tensor, predicted: Tensor, classes):
    """Draw counts, label by row and prediction by column; shaded by the share of the row, so that mistakes show."""
    k = len(classes)
    counts = torch.bincount(labels * k + predicted, minlength=k * k).view(k, k)  # (K, K)
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    figure = new_figure(min(max(4.5, 0.62 * k + 1.5), 20), min(max(4.0, 0.56 * k + 1.2), 19))
    axis = figure.subplots()
    axis.imshow((share**0.35).numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="prediction", ylabel="label", title=f"{int(labels.ne(predicted).sum()):,} of {len(labels):,} wrong")
    long = max(map(len, classes)) > 3
    axis.set_xticks(range(k), classes, rotation=45 if long else 0, ha="right" if long else "center")
    axis.set_yticks(range(k), classes)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    if k <= 20:
        for i in range(k):
            for j in range(k):
                if counts[i, j]:
                    color = "white" if share[i, j] > 0.3 else "black"
                    axis.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=8, color=color)
    return figure


class RegressionPictures(Callback):
    """`fit.png`. With one input: the points, and the fitted curve through them; else predictions against targets.

    Args:
        run: where the picture goes.
    """

    def __init__(self, run: Run):
        self.run = run

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        self.tested: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_test_batch_end(
        self, trainer, pl_module, outputs: Tensor, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep inputs (B, D), targets (B, K) and predictions (B, K)."""
        self.tested.append(tuple(t.float().cpu() for t in (*batch, outputs)))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        inputs, targets, predictions = (torch.cat(parts) for parts in zip(*self.tested, strict=True))
        mse = float((predictions - targets).square().mean())
        figure = new_figure(6.4, 4.4)
        axis = figure.subplots()
        if inputs.shape[1] == targets.shape[1] == 1:
            self._curve(axis, inputs, targets, trainer.datamodule, pl_module)
            axis.set(xlabel="x", ylabel="y", title=f"mean squared error on the test points {mse:.4g}")
            axis.legend(frameon=False)
        else:
            ends = [float(targets.min()), float(targets.max())]
            axis.plot(ends, ends, color=GREY, lw=1)
            axis.plot(targets.flatten(), predictions.flatten(), ".", color=BLUE, ms=4, alpha=0.7)
            axis.set(xlabel="target", ylabel="prediction", title=f"mean squared error {mse:.4g}")
        axis.grid(alpha=0.25)
        self.run.save_picture("fit", figure)

    @staticmethod
    def _curve(axis, inputs: Tensor, targets: Tensor, data, model: LightningModule) -> None:
        train_x, train_y = (t.float() for t in data.train_set.tensors)
        every = torch.cat([train_x, inputs])
        x = torch.linspace(float(every.min()), float(every.max()), 400).unsqueeze(1)  # (400, 1)
        y = model(x.to(model.device, model.dtype)).float().cpu()  # (400, 1)
        size = 5 if len(every) <= 300 else 2
        dots = {"ls": "", "marker": "o", "ms": size, "mew": 0}
        axis.plot(inputs, targets, color=BLUE, alpha=0.35, label=f"{len(inputs):,} points to test", **dots)
        axis.plot(train_x, train_y, color="#3c4148", alpha=0.7, label=f"{len(train_x):,} points to train", **dots)
        axis.plot(x, data.law(x), "--", color="black", lw=1.2, label="the law behind them") if data.law else None
        axis.plot(x, y, color=ORANGE, lw=2.2, label="the model")


def new_figure(width: float, height: float):
    """Return a matplotlib figure of so many inches. (The import is half a second, and waits until it is needed.)"""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
