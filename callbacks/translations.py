"""Pictures of models that write: what they wrote, and where they looked before each symbol."""

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import RED, new_figure
from datamodules.vocabulary import PAD
from runner.run import Run


class TranslationPictures(Callback):
    """`translations.png`: attention's weights, the source from left to right and what was written from top to bottom.

    Args:
        run: where the pictures go.
    """

    count = 6  # test samples that are drawn; half of them wrong ones, if there are so many

    def __init__(self, run: Run):
        self.run = run

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        self.wrong: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.right: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.tested = self.missed = 0

    def on_test_batch_end(
        self, trainer, pl_module, outputs: tuple[Tensor, Tensor | None], batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first few of either kind: source, target, what was written, weights (T, S)."""
        sources, targets = batch
        tokens, weights = outputs  # (B, T), (B, T, S)
        if weights is None:
            return
        is_right = pl_module.is_exact(tokens, targets)  # (B,)
        self.tested, self.missed = self.tested + len(tokens), self.missed + int((~is_right).sum())
        for kept, mask in ((self.wrong, ~is_right), (self.right, is_right)):
            for i in mask.nonzero()[: self.count - len(kept), 0].tolist():
                kept.append(tuple(t[i].cpu() for t in (sources, targets, tokens, weights.float())))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them."""
        wrong = self.wrong[: max(self.count // 2, self.count - len(self.right))]
        if shown := wrong + self.right[: self.count - len(wrong)]:
            title = f"{self.missed:,} of {self.tested:,} test samples wrong"
            self.draw(shown, title, trainer.datamodule)

    def draw(self, shown: list[tuple[Tensor, Tensor, Tensor, Tensor]], title: str, data) -> None:
        """Draw a panel for each sample."""
        columns = min(2, len(shown))
        rows = -(-len(shown) // columns)
        figure = new_figure(6.6 * columns, 3.3 * rows + 0.5)
        figure.suptitle(f"{title}; where the model looked (dark: most) before it wrote each symbol", fontsize=11)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in grid:
            axis.axis("off")
        for axis, (source, target, tokens, weights) in zip(grid, shown, strict=False):
            letters = [data.source_vocabulary.decode([token]) for token in source[source != PAD].tolist()]
            written = symbols(tokens, data.target_vocabulary)
            axis.axis("on")
            axis.imshow(weights[: len(written), : len(letters)].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axis.set_xticks(range(len(letters)), [_plain(letter) for letter in letters], family="monospace")
            axis.set_yticks(range(len(written)), [_plain(symbol) for symbol in written], family="monospace")
            axis.tick_params(length=0, labelsize=9)
            axis.spines[:].set_visible(False)
            text, color = outcome(tokens, target, data.target_vocabulary)
            axis.set_title(text, color=color, fontsize=9)
        self.run.save_picture("translations", figure)


class CaptionPictures(TranslationPictures):
    """`captions.png`: each picture, and where the model looked in it before it wrote each word."""

    def draw(self, shown: list[tuple[Tensor, Tensor, Tensor, Tensor]], title: str, data) -> None:
        """Draw a row for each picture: as it is, and for each word, lit where the model looked."""
        sentences = [symbols(tokens, data.target_vocabulary) for _, _, tokens, _ in shown]
        columns = 1 + max(map(len, sentences))
        figure = new_figure(1.25 * columns, 1.6 * len(shown) + 0.5)
        figure.get_layout_engine().set(h_pad=0.16)  # room for the sentences above the rows
        figure.suptitle(f"{title}; lit: where the model looked before it wrote each word", fontsize=11)
        grid = figure.subplots(len(shown), columns, squeeze=False)
        for axis in grid.ravel():
            axis.axis("off")
        for row, (image, target, tokens, weights), words in zip(grid, shown, sentences, strict=True):
            picture = (image.float().permute(1, 2, 0) + 1).div(2).clamp(0, 1)  # (3, H, W) of -1 to 1 -> (H, W, 3)
            row[0].imshow(picture.numpy())
            text, color = outcome(tokens, target, data.target_vocabulary)  # it goes on over the words' panels:
            row[0].text(0, 1.05, text, transform=row[0].transAxes, color=color, fontsize=9, in_layout=False)
            for axis, word, seen in zip(row[1:], words, weights, strict=False):
                light = grid_of(seen, picture.shape[:2])  # (H, W)
                axis.imshow((picture * (0.25 + 0.75 * light[..., None])).numpy())
                axis.text(0.5, -0.04, word, transform=axis.transAxes, ha="center", va="top", fontsize=9)
        self.run.save_picture("captions", figure)


def grid_of(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Return weights (S,) of a square grid's places, scaled to a picture's size (H, W); the largest is 1."""
    side = round(len(weights) ** 0.5)
    grid = torch.nn.functional.interpolate(weights.view(1, 1, side, side), tuple(size), mode="bilinear")[0, 0]
    return grid / grid.max().clamp(min=1e-12)


def symbols(tokens: Tensor, vocabulary) -> list[str]:
    """Return what was written, (T,), symbol by symbol, up to END."""
    written = [vocabulary.decode([token]) for token in tokens.tolist()]
    ends = [i for i, token in enumerate(tokens.tolist()) if token == vocabulary.end]
    return [*written[: ends[0]], "END"] if ends else written


def outcome(tokens: Tensor, target: Tensor, vocabulary) -> tuple[str, str]:
    """Return what was written, (T,), with what is right in brackets if it is wrong; and the colour to tell it in."""
    written, right = (_plain(vocabulary.decode(t)) for t in (tokens, target))
    if written == right and vocabulary.end in tokens.tolist():
        return written, "black"
    return f"{written or 'nothing'} ({right})", RED


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # which matplotlib would take for a formula
