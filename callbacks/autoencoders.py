"""Pictures of autoencoders: what becomes of test pictures, and what lies where among the codes.

Shapes: N pictures, C channels, H height, W width, D numbers in a code.
"""

import math

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import BLUE, new_figure
from runner.run import Run

ROWS = {"image": "pictures", "mse_noisy": "with noise", "mse": "by the network", "mse_pca": "by PCA"}


class AutoencoderPictures(Callback):
    """`reconstructions.png`, `latent_plane.png`, `walk.png`.

    Args:
        run: where the pictures go.
        count: test pictures that are drawn with what becomes of them.
        side: of the grid of decoded codes.
        steps: decoded codes on the way from one picture's to another's.
    """

    def __init__(self, run: Run, count: int = 12, side: int = 16, steps: int = 9):
        self.run, self.count, self.side, self.steps = run, count, side, steps

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        self.images: dict[str, Tensor] = {}
        self.codes: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.first: dict[int, tuple[Tensor, Tensor]] = {}

    def on_test_batch_end(
        self, trainer, pl_module, outputs: dict, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep every code (B, D), the first few pictures with what became of them, and the first picture of each class."""
        for name, images in outputs["images"].items():
            kept = self.images.get(name, images[:0].cpu())
            self.images[name] = torch.cat([kept, images[: self.count - len(kept)].cpu()])  # (N, C, H, W)
        images, codes = outputs["images"]["image"], outputs["codes"].float().cpu()
        labels = torch.zeros(len(codes), dtype=torch.int64)
        if len(batch) > 1 and isinstance(batch[1], Tensor) and batch[1].dtype == torch.int64 and batch[1].ndim == 1:
            labels = batch[1].cpu()  # anything else is none: masks, boxes, numbers
        for label in set(labels.tolist()) - set(self.first):
            i = int((labels == label).nonzero()[0])
            self.first[label] = images[i].cpu(), codes[i]
        self.codes.append(codes)
        self.labels.append(labels)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw; of a network whose weights are no longer numbers there are no codes to draw."""
        codes, labels = torch.cat(self.codes), torch.cat(self.labels)  # (N, D), (N,)
        self.run.save_picture("reconstructions", self._reconstructions(trainer, codes.shape[1]))
        if not codes.isfinite().all():
            return
        if codes.shape[1] > 1:
            self.run.save_picture("latent_plane", self._latent_plane(trainer, pl_module, codes, labels))
        if len(self.first) > 1:
            self.run.save_picture("walk", self._walk(pl_module))

    def _reconstructions(self, trainer: Trainer, code_size: int):
        height, width = next(iter(self.images.values())).shape[2:]
        columns = len(self.images["image"])
        names = [name for name in ROWS if name in self.images]
        figure = new_figure(2.2 + 0.85 * columns, 0.6 + 0.85 * len(names) * height / width)
        figure.suptitle(
            f"{columns} test pictures; the numbers are mean squared errors of the whole test set", fontsize=11
        )
        axis = figure.subplots()
        axis.imshow(sheet(torch.cat([self.images[name] for name in names]), columns), cmap="gray", vmin=0, vmax=1)
        errors = {name: float(trainer.callback_metrics.get(f"test/{name}", math.nan)) for name in names}
        below = {name: f"{error:.4g}" for name, error in errors.items()} | {"image": f"(codes of {code_size})"}
        middles = [(height + 1) * (i + 0.5) - 1 for i in range(len(names))]
        axis.set_yticks(middles, [f"{ROWS[name]}\n{below[name]}" for name in names])
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        return figure

    def _latent_plane(self, trainer: Trainer, model: LightningModule, codes: Tensor, labels: Tensor):
        """Draw test codes, and the pictures that codes there become; both over the same part of the same plane."""
        origin, directions = plane(codes)
        points = (codes - origin) @ directions  # (N, D) -> (N, 2)
        low, high = points.quantile(torch.tensor([0.01, 0.99]), dim=0)  # (2,), (2,)
        high = torch.maximum(high, low + 1e-3)
        middles = (torch.arange(self.side) + 0.5) / self.side  # of a grid's cells
        x, y = (low + middles.unsqueeze(1) * (high - low)).T  # (side,), (side,)
        grid = torch.stack([x.repeat(self.side), y.flip(0).repeat_interleave(self.side)], dim=1)  # upper row first
        pictures = decode(model, origin + grid @ directions.T)  # (side^2, 2) -> (side^2, D) -> (side^2, C, H, W)

        figure = new_figure(13.5, 7.2)
        left, right = figure.subplots(1, 2)
        classes = [str(name).replace("$", r"\$") for name in getattr(trainer.datamodule, "classes", None) or ()]
        for label, color in colors(sorted(self.first)):
            name = classes[label] if label < len(classes) else str(label)
            dots = {"ms": 4 if len(points) > 500 else 7, "mew": 0, "alpha": 0.7, "color": color}
            left.plot(*points[labels == label].T, ".", label=name, **dots)
        axes = ("first number of the code", "second number")
        if codes.shape[1] > 2:
            shares = points.var(dim=0, correction=0) / codes.var(dim=0, correction=0).sum().clamp(min=1e-12)
            axes = [
                f"principal component {i} ({s:.0%} of the variance)" for i, s in enumerate(shares.tolist(), start=1)
            ]
        left.set(xlabel=axes[0], ylabel=axes[1], title=f"codes of {len(codes):,} test pictures")
        if 1 < len(self.first) <= 20:
            legend = {"loc": "outside lower center", "ncols": 10, "frameon": False, "markerscale": 2.5}
            figure.legend(*left.get_legend_handles_labels(), **legend)
        (x1, y1), (x2, y2) = low.tolist(), high.tolist()
        shown = {"extent": (x1, x2, y1, y2), "aspect": "auto", "cmap": "gray", "vmin": 0, "vmax": 1}
        right.imshow(sheet(pictures, self.side, gap=0), **shown)
        right.set(xlabel=axes[0], title="what codes there become")
        left.set(xlim=(x1, x2), ylim=(y1, y2))
        left.grid(alpha=0.25)
        return figure

    def _walk(self, model: LightningModule):
        """Draw a row for each two classes: a picture of either at the ends, and between them the way between their codes."""
        ends = [self.first[label] for label in sorted(self.first)]
        share = torch.linspace(0, 1, self.steps).unsqueeze(1)  # (steps, 1)
        rows = []
        for (from_image, from_code), (to_image, to_code) in list(zip(ends[::2], ends[1::2], strict=False))[:8]:
            between = decode(model, from_code + share * (to_code - from_code))  # (steps, C, H, W)
            rows.append(torch.cat([from_image[None], between, to_image[None]]))
        columns, (height, width) = self.steps + 2, rows[0].shape[2:]
        figure = new_figure(0.85 * columns, 0.6 + 0.85 * len(rows) * height / width)
        figure.suptitle(
            "outside: two test pictures; inside: from the code of the one to that of the other", fontsize=11
        )
        axis = figure.subplots()
        axis.imshow(sheet(torch.cat(rows), columns), cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
        return figure


class VAEPictures(AutoencoderPictures):
    """`samples.png` beside them: pictures of codes that are drawn from the prior."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        super().on_test_end(trainer, pl_module)
        images = pl_module.sample(self.side**2, torch.Generator().manual_seed(0)).float().cpu()
        height, width = images.shape[2:]
        figure = new_figure(0.5 * self.side, 0.4 + 0.5 * self.side * height / width)
        figure.suptitle(f"codes drawn from N(0, I), decoded ({len(images)})", fontsize=11)
        axis = figure.subplots()
        axis.imshow(sheet(images, self.side), cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
        self.run.save_picture("samples", figure)


def plane(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the plane in which codes (N, D) vary most: a point of it (D,), and two directions (D, 2)."""
    if codes.shape[1] == 2:
        return torch.zeros(2), torch.eye(2)  # as they are
    mean = codes.mean(dim=0)
    _, directions = torch.linalg.eigh((codes - mean).T @ (codes - mean))  # (D, D), that of the least variance first
    return mean, directions.flip(1)[:, :2]


def decode(model: LightningModule, codes: Tensor) -> Tensor:
    """Return the pictures (N, C, H, W) of codes (N, D)."""
    return model.decode(codes.to(model.device)).float().cpu()


def colors(labels: list[int]) -> list[tuple[int, tuple | str]]:
    """Return labels with a colour each, ten that are easy to tell apart if they are enough."""
    from matplotlib import colormaps

    if len(labels) == 1:
        return [(labels[0], BLUE)]
    few, many = colormaps["tab10"], colormaps["turbo"]
    return [(n, few(i) if len(labels) <= 10 else many(i / (len(labels) - 1))) for i, n in enumerate(labels)]


def sheet(images: Tensor, columns: int, gap: int = 1):
    """Return pictures (N, C, H, W) in [0, 1] side by side, row by row, for matplotlib: (h, w, C) or (h, w)."""
    n, c, height, width = images.shape
    rows = math.ceil(n / columns)
    cells = torch.full((rows * columns, c, height + gap, width + gap), 0.5)
    cells[:n, :, :height, :width] = images.clamp(0, 1)  # with noise, pixels can be outside
    whole = cells.view(rows, columns, c, height + gap, width + gap).permute(0, 3, 1, 4, 2)  # (rows, h, columns, w, C)
    whole = whole.reshape(rows * (height + gap), columns * (width + gap), c)
    return whole[: len(whole) - gap, : whole.shape[1] - gap].squeeze(-1).numpy()
