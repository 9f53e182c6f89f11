"""Scenes drawn by code, for detection and segmentation without a network: see `scenes.py` for what they look like.

Shapes: B batch, S size, N objects in a scene, at most M.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules import scenes
from datamodules.detections import pad, read_scaled
from datamodules.files import data_dir
from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from datamodules.pictures import require_picture
from datamodules.scenes import CLASSES, Scene, draw_scene
from datamodules.voc_annotations import picture_size
from runner.errors import InputError, one_line

SPLITS = ("train", "val", "test")


class Shapes(InMemoryDataModule):
    """Circles, squares, triangles and stars: where, and what?

    Scene i of a split comes from (scene_seed, split, i), so that more of them are the same ones and others. They are drawn
    once, and kept in `<DATA_DIR>/shapes`, in a file for each configuration (and version of `scenes.py`).

    Args:
        size: S, from 64 to 256 pixels.
        max_objects: M; a scene has 0 to M objects.
        single_object: whether every scene has exactly one.
        target: `boxes` gives (images, list of dicts with `boxes` (N, 4), `labels` (N,), `size` (height, width));
            `instances` adds `masks` (N, S, S) to them, a pixel being of the object that is seen there; `classes` gives
            (images, masks (B, S, S)) of each pixel's class, and the module's `classes` begin with the background.
        train_size, val_size, test_size: scenes in each split.
        flip: whether a training scene is flipped left to right half of the time.
        proposals: a method that finds boxes that may hold an object, such as
            `lit_models.selective_search.SelectiveSearch`; targets then have `proposals` (P, 4).
        scene_seed: of the scenes; another run's seed sees the same ones.
        batch_size: scenes in a training batch.
        eval_batch_size: scenes in a batch of validation and test.
    """

    train_set: "Scenes | None" = None

    def __init__(
        self,
        size: int = 128,
        max_objects: int = 6,
        single_object: bool = False,
        target: Literal["boxes", "instances", "classes"] = "boxes",
        train_size: int = 2000,
        val_size: int = 300,
        test_size: int = 500,
        flip: bool = True,
        proposals: Callable | None = None,
        scene_seed: int = 0,
        batch_size: int = 16,
        eval_batch_size: int = 50,
    ):
        super().__init__(batch_size, eval_batch_size)
        if not 64 <= size <= 256:
            raise InputError(f"size: scenes have 64 to 256 pixels a side, got {size}")
        if not 1 <= max_objects <= 20:
            raise InputError(f"max_objects must be from 1 to 20, got {max_objects}")
        if min(train_size, val_size, test_size) < 1:
            raise InputError("train_size, val_size and test_size start at 1")
        if scene_seed < 0:
            raise InputError(f"scene_seed must be 0 or more, got {scene_seed}")
        self.size, self.scene_seed, self.flip = size, scene_seed, flip
        self.least, self.most = (1, 1) if single_object else (0, max_objects)
        self.target, self.proposals = target, proposals
        self.classes = ("background", *CLASSES) if target == "classes" else CLASSES
        self.counts = dict(zip(SPLITS, (train_size, val_size, test_size), strict=True))
        self.source = f"scenes drawn by code, {size} x {size} pixels, {self.least} to {self.most} objects"

    def setup(self, stage: str | None = None) -> None:
        """Draw the scenes, or read those drawn earlier."""
        if self.train_set is not None:
            return
        made = {split: Scenes(*self._scenes(split), self.target) for split in SPLITS}
        if self.proposals:
            from datamodules.proposals import find_proposals

            for dataset in made.values():
                dataset.proposals = find_proposals([image.numpy() for image in dataset.tensors[0]], self.proposals)
        self.val_set, self.test_set, self.train_set = made["val"], made["test"], made["train"]

    def on_after_batch_transfer(self, batch: tuple[Tensor, Any], dataloader_idx: int) -> tuple[Tensor, Any]:
        """Turn uint8 images (B, 3, S, S) to floats from -1 to 1, on the device; in training, flip some of them."""
        images, targets = batch
        dtype = self.trainer.lightning_module.dtype
        if isinstance(images, list):  # a user's pictures, of different sizes
            return pad([image.to(dtype).div_(127.5).sub_(1) for image in images]), targets
        images = images.to(dtype).div_(127.5).sub_(1)
        if self.flip and self.trainer.training:
            images, targets = flip_some(images, targets)
        return images, targets

    def read_input(self, path: Path) -> Tensor:
        """Read one picture, its shorter side scaled to S: (3, h, w) uint8. It needs no `setup`.

        Raises:
            PictureError: it cannot be read.
        """
        require_picture(path)
        image = read_scaled(path, *picture_size(path), self.size, 4 * self.size)
        return torch.from_numpy(image).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints say of the data."""
        return super().state_dict() | {"classes": list(self.classes)}

    def _scenes(self, split: str) -> list[Tensor]:
        """Return a split's images, instances, labels and boxes, see `Scenes`."""
        count, file = self.counts[split], self._file(split)
        with contextlib.suppress(Exception):  # not there, or damaged: drawn again
            return list(torch.load(file, weights_only=True).values())
        numbers = tqdm(range(count), f"drawing {split} scenes", leave=False, disable=None, delay=2)
        rngs = (np.random.default_rng([self.scene_seed, SPLITS.index(split), i]) for i in numbers)
        tensors = stack_scenes([draw_scene(rng, self.size, self.least, self.most) for rng in rngs], self.most)
        temporary = Path(f"{file}.{os.getpid()}")  # another run may write the same file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(dict(zip(("images", "instances", "labels", "boxes"), tensors, strict=True)), temporary)
            temporary.replace(file)
        except (OSError, RuntimeError) as error:  # the latter is torch.save's
            reason = getattr(error, "strerror", None) or one_line(error)
            warnings.warn(f"scenes cannot be kept in {file.parent}: {reason}", stacklevel=2)
        finally:
            with contextlib.suppress(OSError):  # moved, or never there
                temporary.unlink()
        return tensors

    def _file(self, split: str) -> Path:
        version = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()[:8]
        name = (
            f"{split}-{self.counts[split]}-of-{self.size}px-{self.least}to{self.most}-seed{self.scene_seed}-{version}"
        )
        return data_dir() / "shapes" / f"{name}.pt"


class Scenes(InMemoryDataset):
    """Scenes of one split, a batch at a time.

    Args:
        images: (n, S, S, 3) uint8.
        instances: (n, S, S) uint8, 0 background, i the i-th object.
        labels: (n, M) int64, -1 where there is no such object.
        boxes: (n, M, 4) float32.
        target: as in `Shapes`.
    """

    proposals: list[np.ndarray] | None = None

    def __init__(self, images: Tensor, instances: Tensor, labels: Tensor, boxes: Tensor, target: str):
        super().__init__(images, instances, labels, boxes)
        self.target = target

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[dict] | Tensor]:
        images, instances, labels, boxes = super().__getitems__(indices)
        images = images.permute(0, 3, 1, 2)  # (B, S, S, 3) -> (B, 3, S, S), which lies in memory as channels_last
        if self.target == "classes":
            return images, class_masks(instances, labels)
        size = tuple(images.shape[2:])
        targets = []
        for i, index in enumerate(indices):
            n = int((labels[i] >= 0).sum())
            target = {"boxes": boxes[i, :n], "labels": labels[i, :n], "size": size}
            if self.target == "instances":
                numbers = torch.arange(1, n + 1, dtype=torch.uint8)
                target["masks"] = instances[i] == numbers[:, None, None]  # (N, S, S)
            if self.proposals is not None:
                target["proposals"] = torch.from_numpy(self.proposals[index])
            targets.append(target)
        return images, targets


def class_masks(instances: Tensor, labels: Tensor) -> Tensor:
    """Return each pixel's class (B, S, S) int64, 0 the background, from instances (B, S, S) and labels (B, M)."""
    classes = torch.cat([torch.zeros_like(labels[:, :1]), labels + 1], dim=1)  # (B, M + 1)
    return classes.gather(1, instances.flatten(1).long()).view(instances.shape)


def flip_some(images: Tensor, targets: list[dict] | Tensor) -> tuple[Tensor, list[dict] | Tensor]:
    """Flip half of the images (B, C, S, S) left to right, with all that is known of them."""
    chosen = torch.rand(len(images)) < 0.5
    where = chosen.to(images.device)[:, None, None]
    images = torch.where(where[..., None], images.flip(3), images)
    if isinstance(targets, Tensor):
        return images, torch.where(where, targets.flip(2), targets)
    width = images.shape[3]
    flipped = []
    for target, is_chosen in zip(targets, chosen.tolist(), strict=True):
        target = dict(target)
        for name in ("boxes", "proposals") if is_chosen else ():
            if name in target:
                x1, y1, x2, y2 = target[name].unbind(1)
                target[name] = torch.stack([width - x2, y1, width - x1, y2], dim=1)
        if is_chosen and "masks" in target:
            target["masks"] = target["masks"].flip(2)
        flipped.append(target)
    return images, flipped


def stack_scenes(drawn: list[Scene], most: int) -> list[Tensor]:
    """Stack scenes of at most so many objects each: images, instances, labels and boxes, see `Scenes`."""
    images, instances = (torch.from_numpy(np.stack(parts)) for parts in list(zip(*drawn, strict=True))[:2])
    labels = torch.full((len(drawn), most), -1)
    boxes = torch.zeros(len(drawn), most, 4)
    for i, scene in enumerate(drawn):
        labels[i, : len(scene.labels)] = torch.from_numpy(scene.labels)
        boxes[i, : len(scene.labels)] = torch.from_numpy(scene.boxes)
    return [images, instances, labels, boxes]
