"""Picture files with boxes: scaled, augmented together, and made into batches.

Shapes: B batch; H, W height and width of the batch's largest picture, h, w of one picture; N objects, P proposals.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.seeding import epoch_seed
from datamodules.pictures import augmented, read_picture, resize
from datamodules.proposals import find_proposals

# What albumentations does with boxes that reach over the edge: cut them, and leave out those of which nothing is left
BOXES = {
    "format": "pascal_voc",
    "clip": True,
    "filter_invalid_bboxes": True,
    "min_area": 1.0,  # pixels
    "label_fields": ["rows"],
}


class Sample(NamedTuple):
    """A picture's file, and what is in it; boxes in pixels of the file's picture."""

    path: Path
    digest: str
    width: int
    height: int
    boxes: np.ndarray  # (N, 4) float64
    labels: np.ndarray  # (N,) int64
    difficult: np.ndarray  # (N,) bool


class Detections(Dataset):
    """Scaled pictures and their targets, by number: e * S + i is number i of S samples, as it is drawn in epoch e.

    Args:
        samples: S of them.
        image_size: pixels of the shorter side.
        max_size: pixels of the longer side at most.
        augment: albumentations' transforms, made with BOXES; None: none.
    """

    proposals: list[np.ndarray] | None = None  # (P, 4) for each sample, in pixels of the scaled picture

    def __init__(self, samples: list[Sample], image_size: int, max_size: int, augment=None):
        self.samples, self.image_size, self.max_size, self.augment = samples, image_size, max_size, augment

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict]]:
        return (self[i] for i in range(len(self)))  # Python's own would never end

    def find_proposals(self, search: Callable) -> None:
        """Find proposals for all scaled pictures."""
        read = [partial(read_scaled, s.path, s.width, s.height, self.image_size, self.max_size) for s in self.samples]
        keys = [f"{s.digest} {self.image_size} {self.max_size}" for s in self.samples]
        keys = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
        self.proposals = find_proposals(read, search, keys)

    def __getitem__(self, number: int) -> tuple[np.ndarray, dict]:
        epoch, index = divmod(number, len(self))
        sample = self.samples[index]
        image = read_scaled(sample.path, sample.width, sample.height, self.image_size, self.max_size)
        height, width = image.shape[:2]
        boxes = sample.boxes * ([width / sample.width, height / sample.height] * 2)
        if self.proposals is not None:  # below the objects' boxes, so that all are augmented alike
            boxes = np.concatenate([boxes, self.proposals[index]])
        rows = np.arange(len(boxes))  # that are left after augmentation
        if self.augment:
            image, boxes, rows = self._augmented(sample.path, image, boxes, epoch_seed(epoch, 1, index))
        is_object = rows < len(sample.labels)
        rows, boxes = rows[is_object], torch.from_numpy(boxes).float()
        target = {
            "boxes": boxes[is_object],
            "labels": torch.from_numpy(sample.labels[rows]),
            "difficult": torch.from_numpy(sample.difficult[rows]),
            "size": image.shape[:2],
        }
        return image, target | ({} if self.proposals is None else {"proposals": boxes[~is_object]})

    def _augmented(self, path: Path, image: np.ndarray, boxes: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
        """Return the picture, the boxes that are left (N, 4), and which rows of those given they were (N,)."""
        drawn = augmented(self.augment, path, seed, image=image, bboxes=boxes, rows=np.arange(len(boxes)))
        return drawn["image"], np.asarray(drawn["bboxes"]).reshape(-1, 4), np.asarray(drawn["rows"], np.int64)


def read_scaled(path: Path, width: int, height: int, image_size: int, max_size: int) -> np.ndarray:
    """Read a picture of known size, its shorter side scaled to image_size, or less if the longer exceeds max_size.

    (As torchvision's detectors do: whole pixels, rounded down.)
    """
    short, long = sorted((width, height))
    new, old = (image_size, short) if long * image_size <= max_size * short else (max_size, long)
    image = read_picture(path, enough=2 * image_size)
    return resize(image, max(height * new // old, 1), max(width * new // old, 1))


def collate(samples: list[tuple[np.ndarray, dict]]) -> tuple[list[Tensor], list[dict]]:
    """Make a batch: pictures (3, h, w) uint8, which lie in memory as channels_last, and their targets."""
    images, targets = zip(*samples, strict=True)
    return [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in images], list(targets)


@cache
def channel_values(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a value for each channel, for pixels in 0..255: (C, 1, 1); made once, since a copy waits for the GPU."""
    return (255 * torch.tensor(values, dtype=torch.float64)).to(dtype).to(device).view(-1, 1, 1)


def pad(images: Sequence[Tensor]) -> Tensor:
    """Put pictures (C, h, w) into one batch (B, C, H, W), each in the upper left corner, zeros beyond it.

    It lies in memory as channels_last if the first picture does.
    """
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    is_last = images[0].stride(0) == 1
    batch = torch.empty(
        (len(images), len(images[0]), height, width),
        dtype=images[0].dtype,
        device=images[0].device,
        memory_format=torch.channels_last if is_last else torch.contiguous_format,
    ).zero_()
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch
