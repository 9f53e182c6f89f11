"""Pictures drawn by code, with a sentence about each: "two red circles and a star".

One to three objects on a soft, grey background: circles, squares, triangles and stars, red, green, blue, yellow or grey, of
different sizes, proportions and rotations, whole (but for a tip), and none over another. The sentence is in a small
language, and there is one right sentence for each picture:

- objects of one shape and colour are told together: `a red star`, `two red stars`, `three red stars`;
- grey is not said: `a star`;
- with `and` between them: the more of a kind first; of as many circles before squares, triangles and stars; of one shape
  red before green, blue, yellow and grey.

Shapes: B batch, S size, T words of the longest sentence, START and END included.

Source: lecture on recurrent networks (captioning).
"""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from datamodules.pictures import read_picture, require_picture, resize
from datamodules.scenes import CLASSES, _cover, _outline, _texture  # that file is part of its scenes' version
from datamodules.shapes import SPLITS
from datamodules.vocabulary import Vocabulary, pad
from runner.errors import InputError

COLOURS = {"red": (205, 40, 40), "green": (45, 155, 60), "blue": (45, 75, 210), "yellow": (230, 205, 50), "": None}
COUNTS = ("a", "two", "three")
LEAST_AREA = 0.025  # of an object, of the picture's
LEAST_INSIDE = 0.97  # of its own area, within the picture
Kind = tuple[int, int]  # of an object: its class, and its colour


class Captions(InMemoryDataModule):
    """Pictures and sentences: batches of (images (B, 3, S, S), sentences (B, T)).

    Picture i of a split comes from (scene_seed, split, i), so that more of them are the same ones and others. They are drawn
    anew for each run. Sentences of the test also occur in training, pictures do not.

    Args:
        size: S, from 48 to 256 pixels.
        max_objects: in a picture, from 1 to 3.
        train_size, val_size, test_size: pictures in each split.
        flip: whether training pictures are mirrored at random, and turned by right angles: no sentence tells of places.
        scene_seed: of the pictures; another run's seed sees the same ones.
        batch_size: pictures in a training batch.
        eval_batch_size: pictures in a batch of validation and test.
    """

    target_vocabulary = Vocabulary(
        [*COUNTS, *filter(None, COLOURS), *(name + s for name in CLASSES for s in ("", "s")), "and"],
        ends=True,
        separator=" ",
    )

    def __init__(
        self,
        size: int = 64,
        max_objects: int = 3,
        train_size: int = 8000,
        val_size: int = 500,
        test_size: int = 1000,
        flip: bool = True,
        scene_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 250,
    ):
        super().__init__(batch_size, eval_batch_size)
        if not 48 <= size <= 256:
            raise InputError(f"size: pictures have 48 to 256 pixels a side, got {size}")
        if not 1 <= max_objects <= len(COUNTS):
            raise InputError(f"max_objects must be from 1 to {len(COUNTS)}, got {max_objects}")
        if min(train_size, val_size, test_size) < 1:
            raise InputError("train_size, val_size and test_size start at 1")
        if scene_seed < 0:
            raise InputError(f"scene_seed must be 0 or more, got {scene_seed}")
        self.size, self.max_objects, self.flip, self.scene_seed = size, max_objects, flip, scene_seed
        self.counts = dict(zip(SPLITS, (train_size, val_size, test_size), strict=True))
        self.source = f"captioned scenes drawn by code, {size} x {size} pixels, 1 to {max_objects} objects"

    def setup(self, stage: str | None = None) -> None:
        """Draw the pictures."""
        if self.train_set is not None:
            return
        made = {split: self._draw(split) for split in SPLITS}
        self.val_set, self.test_set, self.train_set = made["val"], made["test"], made["train"]

    def read_input(self, path: Path) -> Tensor:
        """Read one picture, its sides squeezed to a square: (3, S, S) uint8. It needs no `setup`.

        Raises:
            PictureError: it cannot be read.
        """
        require_picture(path)
        image = resize(read_picture(path, enough=self.size), self.size, self.size)
        return torch.from_numpy(image).permute(2, 0, 1)  # (S, S, 3) -> (3, S, S)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Turn uint8 images (B, 3, S, S) to floats from -1 to 1, on the device; in training, mirror and turn them."""
        images, sentences = batch
        images = images.to(self.trainer.lightning_module.dtype).div_(127.5).sub_(1)
        if self.flip and self.trainer.training:
            for change in (lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.transpose(2, 3)):
                images = torch.where((torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device), change(images), images)
        return images, sentences

    def _draw(self, split: str) -> "Pictures":
        images, sentences = [], []
        for i in tqdm(range(self.counts[split]), f"drawing {split} pictures", leave=False, disable=None, delay=2):
            rng = np.random.default_rng([self.scene_seed, SPLITS.index(split), i])
            image, kinds = draw_kinds(rng, self.size, self.max_objects)
            images.append(image)
            sentences.append(self.target_vocabulary.encode(tell(kinds), ends=True))
        return Pictures(torch.from_numpy(np.stack(images)), pad(sentences))


class Pictures(InMemoryDataset):
    """Images (N, S, S, 3) uint8 and sentences (N, T), a batch at a time."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, sentences = super().__getitems__(indices)
        return images.permute(0, 3, 1, 2), sentences  # (B, S, S, 3) -> (B, 3, S, S), channels_last in memory


def tell(kinds: list[Kind]) -> str:
    """Return the one right sentence about objects of these kinds, in whatever order they come."""
    said, colours = [], list(COLOURS)
    for (shape, colour), count in sorted(Counter(kinds).items(), key=lambda item: (-item[1], item[0])):
        noun = CLASSES[shape] + "s" * (count > 1)
        said.append(" ".join(filter(None, (COUNTS[count - 1], colours[colour], noun))))
    return " and ".join(said)


def draw_kinds(rng: np.random.Generator, size: int, most: int) -> tuple[np.ndarray, list[Kind]]:
    """Draw a picture (S, S, 3) uint8 of one to `most` objects, each number as often, and return their kinds.

    An object is of the same kind as the one before it two times in five, so that there is something to count; else each
    kind is as likely. They have been chosen before a place is looked for: which ones fit does not change how often they are.
    """
    kinds: list[Kind] = []
    for _ in range(rng.integers(1, most + 1)):
        again = kinds and rng.random() < 0.4
        kinds.append(kinds[-1] if again else (int(rng.integers(len(CLASSES))), int(rng.integers(len(COLOURS)))))
    while True:
        grey = rng.uniform(70, 180)
        base = grey + rng.uniform(-12, 12, 3)  # (3,)
        texture = sum(_texture(rng, size, cells) * weight for cells, weight in ((3, 1.0), (7, 0.6)))
        image = base + texture[..., None] * rng.uniform(0, 12)  # (S, S, 3)
        taken = np.zeros((size, size), np.float32)
        for shape, colour in kinds:
            cover = _find_place(rng, shape, size, taken)  # (S, S)
            if cover is None:
                break  # too full: begin anew, with the same kinds
            image = image + cover[..., None] * (_paint(rng, list(COLOURS.values())[colour], grey) - image)
            taken += cover
        else:
            grain = rng.standard_normal((size, size, 3), dtype=np.float32) * rng.uniform(2, 8)
            return np.clip(image + grain, 0, 255).astype(np.uint8), kinds


def _find_place(rng: np.random.Generator, shape: int, size: int, taken: np.ndarray) -> np.ndarray | None:
    """Return where an object is, as shares of pixels (S, S); None if there seems to be no room beside what is taken."""
    for _ in range(60):
        outline = _outline(rng, shape, size)
        area = cv2.contourArea(outline.astype(np.float32))
        if area < LEAST_AREA * size**2:
            continue
        cover = _cover(outline, size)
        if cover.sum() >= LEAST_INSIDE * area and not (cover * taken).any():
            return cover
    return None


def _paint(rng: np.random.Generator, colour: tuple[int, int, int] | None, grey: float) -> np.ndarray:
    """Return a shade (3,) of a colour, or a grey that stands out from the background's."""
    if colour is not None:
        return colour + rng.uniform(-25, 25, 3)
    return np.full(3, rng.uniform(10, grey - 50) if rng.random() < 0.5 else rng.uniform(grey + 50, 245))
