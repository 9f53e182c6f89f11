"""Pictures of a language model: what it writes, and what it gains from what was before."""

import math
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import BLUE, GREY, new_figure
from callbacks.seeding import epoch_seed
from datamodules.vocabulary import IGNORE
from runner.files import write_whole
from runner.run import Run

TEMPERATURES = (0.5, 0.8, 1.0)


class LanguagePictures(Callback):
    """`samples.txt` and `samples.png`: text at three temperatures; `context.png`: bits a character by place in the window.

    The text is new: the prompt is a line's end (or the test text's first character), and the run's seed the dice.

    Args:
        run: where the pictures go.
        length: characters of each text.
    """

    def __init__(self, run: Run, length: int = 500):
        self.run, self.length = run, length

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        self.sums: Tensor | float = 0.0
        self.counts: Tensor | float = 0.0

    def on_test_batch_end(
        self, trainer, pl_module, outputs: Tensor, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add each place's losses (B, T), of targets that are there."""
        self.sums = self.sums + outputs.cpu().double().sum(dim=0)  # (T,)
        self.counts = self.counts + (batch[1] != IGNORE).cpu().sum(dim=0)  # (T,)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, and write."""
        carries = "test" in getattr(trainer.datamodule, "streams", ()) and hasattr(pl_module, "carried")
        bits = self.sums / self.counts.clamp(min=1) / math.log(2)  # (T,)
        mean = float(self.sums.sum() / self.counts.sum() / math.log(2))
        self.run.save_picture("context", draw_context(bits, mean, carries))

        vocabulary = trainer.datamodule.vocabulary
        prompt = "\n" if "\n" in vocabulary.numbers else vocabulary.symbols[0]
        texts = {}
        for i, temperature in enumerate(TEMPERATURES):
            dice = torch.Generator().manual_seed(epoch_seed(0, i))
            texts[temperature] = pl_module.write(
                prompt, vocabulary, self.length, temperature=temperature, generator=dice
            )
        self.run.save_picture("samples", draw_samples(texts))
        write_samples(self.run, texts)


def write_samples(run: Run, texts: dict[float, str]) -> None:
    """Write `pictures/samples.txt`, and send it to wandb as a table."""
    parts = [f"-- temperature {temperature} --\n{text}\n" for temperature, text in texts.items()]
    path: Path = run.folder / "pictures" / "samples.txt"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, "\n".join(parts).encode())
    if run.wandb:
        run.wandb.log_text("pictures/samples_text", ["temperature", "text"], [[str(t), s] for t, s in texts.items()])


def draw_context(bits: Tensor, mean: float, carries: bool):
    """Draw the bits (T,) that a character takes, by how many of its window are before it."""
    figure = new_figure(6.4, 4.0)
    axis = figure.subplots()
    axis.plot(range(1, len(bits) + 1), bits, color=BLUE, lw=1.8, marker="o" if len(bits) <= 40 else "", ms=3.5)
    axis.axhline(mean, color=GREY, lw=1, ls="--", label=f"all of the text: {mean:.3f} bits a character")
    axis.set(
        xlabel="characters of the window that are known", ylabel="bits a character", xlim=(0, None), ylim=(0, None)
    )
    before = "the state knows what was before: a flat line" if carries else "nothing is known of what was before"
    axis.set_title(f"What the window buys ({before})", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure


def draw_samples(texts: dict[float, str], columns: int = 80, rows: int = 40):
    """Write texts side by side, each line folded at so many columns; what comes after so many rows is left out."""
    folded = {
        temperature: [line[i : i + columns] for line in text.split("\n") for i in range(0, max(1, len(line)), columns)][
            :rows
        ]
        for temperature, text in ((t, text.expandtabs(4)) for t, text in texts.items())
    }
    figure = new_figure(0.072 * columns * len(texts), 0.14 * max(map(len, folded.values())) + 0.5)
    for axis, (temperature, lines) in zip(
        figure.subplots(1, len(texts), squeeze=False)[0], folded.items(), strict=True
    ):
        axis.axis("off")
        axis.set_title(f"temperature {temperature}", fontsize=10, loc="left")
        how = {"family": "monospace", "fontsize": 8, "va": "top", "parse_math": False}
        axis.text(0, 1, "\n".join(lines), transform=axis.transAxes, **how)
    return figure
