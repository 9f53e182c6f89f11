"""Pictures of models that make pictures up: samples from the same noise over the epochs, and what the judge sees in them."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import BLUE, GREY, ORANGE, new_figure
from lit_models.sample_quality import class_shares
from runner.run import Run

SCALE, MARGIN, CAPTION = 2, 2, 16  # of a frame: its enlargement, pixels around a sample, and above all of them
SECONDS = 0.5  # that a frame is shown; the last one four times as long


class SampleFrames(Callback):
    """Keeps a frame for each validated epoch of training, `pictures/samples/<epoch>.png` in the Trainer's folder.

    Files, and not a list: a run that was stopped and resumed has them all. The model's `shown` are the samples (R, S, C, H,
    W) in [0, 1]: R rows of S.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if not trainer.sanity_checking and trainer.is_global_zero:
            epoch = trainer.current_epoch + 1
            path = Path(trainer.default_root_dir) / "pictures" / "samples" / f"{epoch:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            frame(pl_module.shown, f"epoch {epoch}").save(path)


class SamplePictures(Callback):
    """`samples.png`: the tested checkpoint's; `samples.gif`: over the epochs; `judged.png`: the classes seen in them.

    Args:
        run: where the pictures go.
    """

    def __init__(self, run: Run):
        self.run = run

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them."""
        classes = [str(name).replace("$", r"\$") for name in trainer.datamodule.classes]
        asked = classes if pl_module.asks_classes else None
        self.run.save_picture("samples", _grid(pl_module.shown, asked))
        self.run.save_picture("judged", _judged(pl_module.probabilities, pl_module.real_probabilities, classes))
        frames = sorted((self.run.folder / "pictures" / "samples").glob("*.png"))
        if frames:
            path = self.run.folder / "pictures" / "samples.gif"
            save_gif(frames, path)
            if self.run.wandb:
                self.run.wandb.log_video("pictures/samples_over_epochs", [str(path)])


def tiles(samples: Tensor) -> Tensor:
    """Lay samples (R, S, C, H, W) in [0, 1] side by side, MARGIN apart: (C, R * (H + MARGIN) + MARGIN, ...), uint8."""
    rows, columns, channels, height, width = samples.shape
    grid = torch.full(
        (channels, rows * (height + MARGIN) + MARGIN, columns * (width + MARGIN) + MARGIN), 110, dtype=torch.uint8
    )
    pixels = samples.float().nan_to_num(0).mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
    for i, row in enumerate(pixels):
        for j, sample in enumerate(row):
            y, x = MARGIN + i * (height + MARGIN), MARGIN + j * (width + MARGIN)
            grid[:, y : y + height, x : x + width] = sample
    return grid


def frame(samples: Tensor, caption: str) -> Image.Image:
    """Return samples (R, S, C, H, W) in [0, 1] as an enlarged picture with a caption."""
    grid = tiles(samples).permute(1, 2, 0).squeeze(-1).numpy()  # (C, h, w) -> (h, w, C), or (h, w)
    picture = Image.fromarray(grid).resize((SCALE * grid.shape[1], SCALE * grid.shape[0]), Image.Resampling.NEAREST)
    whole = Image.new(picture.mode, (picture.width, picture.height + CAPTION), "white")
    whole.paste(picture, (0, CAPTION))
    ImageDraw.Draw(whole).text((4, 2), caption, fill="black")
    return whole


def save_gif(frames: list[Path], path: Path) -> None:
    """Write frames that lie in files as one GIF that begins again at its end."""
    pictures = []
    for file in frames:
        with Image.open(file) as picture:
            pictures.append(picture.convert("P" if picture.mode == "RGB" else "L"))
    pauses = [int(1000 * SECONDS)] * len(pictures)
    pauses[-1] *= 4
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=pauses, loop=0)


def _grid(samples: Tensor, asked: list[str] | None):
    """Draw samples (R, S, C, H, W); `asked` are the rows' classes, if the model was asked for them."""
    rows, columns, _, height, _ = samples.shape
    grid = tiles(samples).permute(1, 2, 0).squeeze(-1)  # (h, w, C) or (h, w)
    figure = new_figure(0.62 * columns + 0.8 * bool(asked), 0.62 * rows + 0.4)
    axis = figure.subplots()
    axis.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_title(f"{rows * columns} samples" + ", a class in each row" * bool(asked), fontsize=11)
    axis.set_xticks([])
    middles = [MARGIN + (i + 0.5) * (height + MARGIN) for i in range(rows)]
    axis.set_yticks(middles if asked else [], asked or [])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def _judged(probabilities: Tensor, real: Tensor, classes: list[str]):
    """Draw, for samples (N, K) and real pictures (M, K), the share of each class, and how sure the judge is."""
    figure = new_figure(min(max(9.5, 0.8 * len(classes) + 4), 20), 3.6)
    left, right = figure.subplots(1, 2)
    at = torch.arange(len(classes))
    left.bar(at - 0.2, class_shares(probabilities), 0.38, color=BLUE, label=f"{len(probabilities):,} samples")
    left.bar(at + 0.2, class_shares(real), 0.38, color=GREY, label=f"{len(real):,} real test pictures")
    long = max(map(len, classes)) > 3
    left.set_xticks(at, classes, rotation=45 if long else 0, ha="right" if long else "center")
    left.set(title="share of the class that the judge sees", xlabel="class")
    right.hist(
        probabilities.amax(dim=1).nan_to_num(0), bins=40, range=(0, 1), color=BLUE, density=True, label="samples"
    )
    right.hist(
        real.amax(dim=1), bins=40, range=(0, 1), histtype="step", color=ORANGE, lw=1.6, density=True, label="real"
    )
    right.set(title="how sure it is of it", xlabel="largest probability", ylabel="density", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.25, axis="y")
        axis.legend(frameon=False)
    return figure
