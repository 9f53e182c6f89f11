"""A user's pictures, as a data module to predict with."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from tqdm import tqdm

from runner.errors import InputError


class PictureFiles(LightningDataModule):
    """Pictures from files, a batch at a time, prepared as the experiment's data module does in evaluation.

    The Trainer is given this one: it would have the experiment's own look for the training data.

    Args:
        paths: of the pictures.
        data: the experiment's data module.
        classes: the names of the model's classes, where they are known.
        show_progress: on a terminal, if it takes longer than two seconds.

    Attributes:
        read: those that could be read, in the order of the predictions.
        errors: what is wrong with the others.
        bright: how many of those read are grey, and bright at the border.
    """

    def __init__(self, paths: list[Path], data: LightningDataModule, classes: list[str] | None, show_progress: bool):
        super().__init__()
        self.paths, self.data, self.classes, self.show_progress = paths, data, classes, show_progress
        self.read: list[Path] = []
        self.errors: dict[Path, InputError] = {}
        self.bright = 0

    def setup(self, stage: str) -> None:
        """Lend the Trainer to the experiment's data module, which looks up the model's kind of floats there."""
        self.data.trainer = self.trainer

    def predict_dataloader(self) -> Iterator[tuple[Tensor, None]]:
        """Yield batches of what can be read: images (B, C, H, W) uint8, and no labels."""
        size = self.batch_size
        hidden = None if self.show_progress else True  # None: where there is no terminal
        with tqdm(total=len(self.paths), leave=False, disable=hidden, delay=2) as bar, ThreadPoolExecutor() as threads:
            for start in range(0, len(self.paths), size):
                paths, images = self.paths[start : start + size], []
                # The filters of warnings belong to all threads, which may leave each other's behind
                with warnings.catch_warnings(action="ignore"):
                    for path, image in zip(paths, threads.map(self._read, paths), strict=True):
                        bar.update()
                        if image is not None:
                            self.read.append(path)
                            images.append(image)
                self.bright += sum(map(_is_grey_with_bright_border, images))
                if images:
                    yield self.batch(images)

    @property
    def batch_size(self) -> int:
        """Pictures in a batch."""
        return getattr(self.data, "eval_batch_size", 64)

    def batch(self, images: list[Tensor]) -> tuple[Tensor, None]:
        """Make a batch of what was read."""
        return torch.stack(images), None

    def on_after_batch_transfer(self, batch: tuple[Tensor, None], dataloader_idx: int) -> tuple[Tensor, None]:
        """Do as the experiment's data module does."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def _read(self, path: Path) -> Tensor | None:
        try:
            return self.data.read_input(path)
        except InputError as error:
            self.errors[path] = error
            return None


def _is_grey_with_bright_border(image: Tensor) -> bool:
    """Whether a picture (C, H, W) uint8 has one channel, and most of its edges is nearer to white than to black."""
    edges = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)  # (C, 2 H + 2 W)
    return len(image) == 1 and bool(edges.median() > 127)
