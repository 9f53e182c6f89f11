"""Pictures with masks, which tell each pixel's class: augmented together, and made into batches.

Shapes: B batch; H, W height and width of the batch's largest picture, h, w of one picture; C channels, 3 or 1. Of K
classes, number 0 is the background; a pixel of number IGNORE counts neither in losses nor in metrics.
"""

import hashlib
import statistics
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from callbacks.seeding import epoch_seed
from datamodules.class_folders import warn_of_leaks
from datamodules.detections import channel_values, pad
from datamodules.files import download
from datamodules.image_folder import IMAGENET, EndlessShuffle, check_arguments, make_loader
from datamodules.mask_files import IGNORE, Coding, Pair, check_pairs, read_image, read_mask
from datamodules.pictures import (
    TRANSFORMS,
    PictureError,
    augmented,
    make_augmentation,
    require_picture,
)
from datamodules.voc_annotations import picture_size, read_names
from runner.errors import InputError

NEAREST = (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT)


class MaskFiles(LightningDataModule):
    """What data modules of picture and mask files share. A subclass says in `find` which files, and in `coding` what they mean.

    Every file is read once before anything is trained: what cannot be used is found there, not after an hour.

    A batch is (images, masks). From the loader, images is uint8 (B, C, h, w) and masks int64 (B, h, w), each pixel's
    class; where pictures differ in size, they are lists of (C, h, w) and (h, w). On the device, images is a normalised
    tensor (B, C, H, W), each picture in the upper left corner, zeros beyond it, and masks (B, H, W), there IGNORE.

    A picture's augmentation is drawn from (seed, epoch, picture): it is the same with any number of workers, and in a
    run that was stopped and resumed.

    Args:
        image_size: height and width that pictures are scaled to (with antialiasing; masks, to the nearest pixel); None:
            as they are. Metrics are then of masks of this size.
        crop: height and width cut out of a training picture at random, before `augment`. A smaller one is padded with
            zeros, which are IGNORE in the mask.
        augment: albumentations' transforms for training, of the picture and its mask together, each `Name` or
            `{Name: {argument: value}}`. They must leave pixels uint8; the size may change. None: HorizontalFlip. An
            empty list: none. Masks get the nearest pixel's class. What comes in from outside, as the corners do when a
            picture is rotated, is 0 in the picture (or what `fill` says), and IGNORE in the mask, since nobody knows what
            is there: `fill_mask: 0` in a transform makes it background.
        repeat: how often an epoch has each training picture, each time with another crop and augmentation.
        channels: 3, or 1 for the pictures' brightness. (Grey pictures have three equal channels, or one.)
        normalize: mean and standard deviation of red, green and blue, of pixels in [0, 1]; None leaves them there. With
            one channel, the mean of the three is meant.
        batch_size: pictures in a training batch.
        eval_batch_size: pictures in a batch of validation and test, if they are of one size; else they come one by one.
        num_workers: processes that read pictures, for training and for validation; auto: one for each CPU,
            8 at most, and no more than there are whole batches.
        in_memory: whether decoded and scaled pictures are kept in memory: if there are few, but large ones.
    """

    train_set: "Masks | None" = None
    val_set: "Masks"
    test_set: "Masks"
    classes: tuple[str, ...]
    coding: Coding
    source: str
    fingerprint: str
    no_test = ""  # why there is no test set, if `find` returns none: val is tested then

    def __init__(
        self,
        image_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        augment: list[str | dict[str, Any]] | None = None,
        repeat: int = 1,
        channels: Literal[1, 3] = 3,
        normalize: tuple[tuple[float, float, float], tuple[float, float, float]] | None = IMAGENET,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        in_memory: bool = False,
    ):
        super().__init__()
        check_arguments(min(image_size or (1,)), normalize, batch_size, eval_batch_size, num_workers)
        if crop and min(crop) < 1:
            raise InputError(f"crop: height and width must be at least 1, got {crop}")
        if repeat < 1:
            raise InputError(f"repeat must be at least 1, got {repeat}")
        steps = ["HorizontalFlip"] if augment is None else augment
        if crop:
            steps = [{"RandomCrop": {"height": crop[0], "width": crop[1], "pad_if_needed": True}}, *steps]
        self.augmentation = make_augmentation([for_masks(step) for step in steps]) if steps else None
        self.image_size, self.repeat, self.channels = image_size and tuple(image_size), repeat, channels
        mean, std = normalize or ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.mean, self.std = ((statistics.fmean(v),) if channels == 1 else tuple(v) for v in (mean, std))
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.in_memory = in_memory

    def find(self) -> dict[str, list[Pair]]:
        """Return the pairs of `train`, `val` and, if there is one, `test`; set `source`.

        Raises:
            InputError: there are none; says where they were looked for.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Find the files, and read each of them once.

        Raises:
            InputError: something is missing, or cannot be used; names the file.
        """
        if self.train_set is not None:
            return
        try:
            parts = self.find()
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None
        checked = iter(check_pairs([pair for pairs in parts.values() for pair in pairs], self.coding))
        content, digests = "", {}
        for part, pairs in parts.items():
            occurs = np.zeros(256, bool)
            for i, pair in enumerate(pairs):
                pairs[i], digests[pair.image], mask_digest, there = next(checked)
                content += f"{part} {pair.name} {digests[pair.image]} {mask_digest}\n"
                occurs |= there
            if part != "test":
                self._check_occurring(part, occurs)
        if not self.coding.by_color and any(p.mask.suffix.lower() == ".gif" for ps in parts.values() for p in ps):
            warnings.warn("what writes a GIF may number its colours anew: classes are safer in PNG", stacklevel=1)
        self.fingerprint = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
        warn_of_leaks({part: {"": [pair.image for pair in pairs]} for part, pairs in parts.items()}, digests)
        if self.no_test:
            self.source += f" ({self.no_test}: val is tested)"
        train_set = self._masks(parts["train"], self.augmentation, self.repeat)
        self.val_set = self._masks(parts["val"])
        self.test_set = self._masks(parts["test"]) if "test" in parts else self.val_set
        if self.in_memory:
            for dataset in {train_set, self.val_set, self.test_set}:
                dataset.keep()
        train_set[0]  # what is wrong with the augmentation shows before a run is begun
        self.train_set = train_set

    def _check_occurring(self, part: str, occurs: np.ndarray) -> None:
        """Check that masks have background and foreground; `occurs` (256,) tells which classes there are."""
        missing = "background" if not occurs[0] else "foreground" if not occurs[1 : len(self.classes)].any() else ""
        if missing:
            raise InputError(
                f"no mask of {part} has a pixel of {missing} (classes {', '.join(self.classes)}): look at what the masks' "
                f"values mean, and at what is to be {part}"
            )

    # -- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Batches of all pictures in a new order, newly augmented, every epoch."""
        return self._loader(self.train_set, self.batch_size, sampler=EndlessShuffle(len(self.train_set)))

    def val_dataloader(self) -> DataLoader:
        """Batches in order."""
        return self._loader(self.val_set, self._eval_size(self.val_set))

    def test_dataloader(self) -> DataLoader:
        """Batches in order."""
        return self._loader(self.test_set, self._eval_size(self.test_set))

    def _eval_size(self, dataset: "Masks") -> int:
        """Return pictures in a batch: 1 if they differ in size, since what pads one changes what is said at its edge."""
        one_size = self.image_size or len({(pair.height, pair.width) for pair in dataset.pairs}) == 1
        return self.eval_batch_size if one_size else 1

    def on_after_batch_transfer(self, batch: tuple[Any, Any], dataloader_idx: int) -> tuple[Tensor, Any]:
        """Make a batch of normalised floats (B, C, H, W) and classes (B, H, W), on the device."""
        images, masks = batch
        if isinstance(masks, Sequence):  # of different sizes
            masks = pad_masks(masks)
        return self.normalized(images, self.trainer.lightning_module.dtype), masks

    def normalized(self, images: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return uint8 pictures (B, C, H, W), or some (C, h, w), as normalised floats (B, C, H, W), zeros beyond each."""
        mean, std = (channel_values(values, images[0].device, dtype) for values in (self.mean, self.std))
        if isinstance(images, Tensor):
            return images.to(dtype).sub_(mean).div_(std)
        return pad([image.to(dtype).sub_(mean).div_(std) for image in images])

    def read_input(self, path: Path) -> Tensor:
        """Read one picture, scaled as in evaluation: (C, h, w) uint8. It needs no `setup`, and no masks.

        Raises:
            PictureError: it cannot be read.
        """
        require_picture(path)
        width, height = picture_size(path)
        image = read_image(path, height, width, self.image_size, self.channels)
        return torch.from_numpy(image).permute(2, 0, 1)  # (h, w, C) -> (C, h, w)

    # -- what receipts and checkpoints say ---------------------------------------------------------------------------

    def describe(self) -> dict:
        """What the receipt says of the data: name, source, sizes, and a fingerprint of every file in its place."""
        said = {"name": type(self).__name__, "source": self.source, "fingerprint": self.fingerprint, **self.sizes}
        return said | ({"test_split": f"val: {self.no_test}"} if self.no_test else {})

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints say of the data: what it was, and the names of the classes that the network tells apart."""
        return {"fingerprint": self.fingerprint, "source": self.source, "classes": list(self.classes)}

    @property
    def sizes(self) -> dict[str, int]:
        """Pictures in each set, each counted once."""
        return {"train": len(self.train_set.pairs), "val": len(self.val_set), "test": len(self.test_set)}

    def _masks(self, pairs: list[Pair], augment=None, repeat: int = 1) -> "Masks":
        return Masks(pairs, self.coding, self.image_size, self.channels, augment, repeat)

    def _loader(self, dataset: "Masks", batch_size: int, **arguments) -> DataLoader:
        return make_loader(dataset, batch_size, self.num_workers, collate_fn=collate, **arguments)


class DownloadedMasks(MaskFiles):
    """A known set of pictures and masks, with lists of those to train and to test on, which torchvision downloads.

    What is validated on is drawn from those to train on.

    Args:
        val_size: how many of the training pictures to validate on, or, below 1, which share of them.
        split_seed: of the generator that draws them; not the run's seed.
        files: arguments of `MaskFiles`.
    """

    title: str
    path: Path
    images: str  # the folder of the .jpg below `path`
    masks: str  # that of the .png
    lists: tuple[str, str]  # text files of pictures to train and to test on: each line begins with a name
    archives: str  # what there is to unpack, and where

    def __init__(self, val_size: int | float = 0.1, split_seed: int = 0, **files):
        super().__init__(**files)
        self.val_size, self.split_seed, self.download_error = val_size, split_seed, ""

    def download(self) -> None:
        """Have torchvision download it to `DATA_DIR`."""
        raise NotImplementedError

    @property
    def missing(self) -> list[Path]:
        """What there must be, and is not. (torchvision looks for one or two folders, and not for all of this.)"""
        needed = (self.path / name for name in (self.images, self.masks, *self.lists))
        return [path for path in needed if not path.exists()]

    def prepare_data(self) -> None:
        """Download it if it is not there whole; `setup` says what is missing."""
        if self.missing and not self.download_error:
            self.download_error = download(self.title, self.path, self.download)

    def find(self) -> dict[str, list[Pair]]:
        """Read which pictures are to train and to test on."""
        if self.missing:
            reason = self.download_error or "no download was tried"
            raise InputError(
                f"{self.title} is not in {self.path}, whole, and could not be had ({reason}): unpack {self.archives}, so "
                f"that there is {self.missing[0]}"
            )
        self.source = f"files in {self.path} (tested: {self.lists[1]})"
        pairs = {}
        for part, file in zip(("train", "test"), self.lists, strict=True):
            names = [line.split()[0] for line in read_names(self.path / file)]
            pairs[part] = [
                Pair(name, self.path / self.images / f"{name}.jpg", self.path / self.masks / f"{name}.png")
                for name in names
            ]
        return split(pairs["train"], self.val_size, None, self.split_seed) | {"test": pairs["test"]}


class Masks(Dataset):
    """Pictures (h, w, C) and the classes of their pixels (h, w), both uint8, by number.

    Of N pairs, number e * R * N + r * N + i is number i, as it is drawn for the r-th of R times in epoch e.

    Args:
        pairs: N of them, checked.
        coding: what the masks' pixels mean.
        size: height and width that they are scaled to; None: as they are.
        channels: C.
        augment: albumentations' transforms; None: none.
        repeat: R.
    """

    kept: list[tuple[np.ndarray, np.ndarray]] | None = None  # the pairs, if they are in memory

    def __init__(
        self,
        pairs: list[Pair],
        coding: Coding,
        size: tuple[int, int] | None = None,
        channels: int = 3,
        augment=None,
        repeat: int = 1,
    ):
        self.pairs, self.coding, self.size, self.channels = pairs, coding, size, channels
        self.augment, self.repeat = augment, repeat
        self.known = np.zeros(256, bool)  # classes that a pixel may have
        self.known[[*coding.classes.values(), IGNORE]] = True

    def __len__(self) -> int:
        return self.repeat * len(self.pairs)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self[i] for i in range(len(self)))  # Python's own would never end

    def keep(self) -> None:
        """Read all pairs into memory."""
        with ThreadPoolExecutor() as pool:
            read = pool.map(self._read, self.pairs)
            self.kept = list(
                tqdm(read, "reading", len(self.pairs), leave=False, disable=None, delay=2, unit=" pictures")
            )

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, index = divmod(number, len(self))
        i = index % len(self.pairs)
        image, mask = self.kept[i] if self.kept else self._read(self.pairs[i])
        if self.augment is None:
            return image, mask
        drawn = augmented(self.augment, self.pairs[i].image, epoch_seed(epoch, 1, index), image=image, mask=mask)
        if not (is_known := self.known[drawn["mask"]]).all():
            number = drawn["mask"][~is_known][0]
            raise PictureError(f"augment makes pixels of class {number} in {self.pairs[i].mask}: see its fill_mask")
        return drawn["image"], drawn["mask"]

    def _read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(pair.image, pair.height, pair.width, self.size, self.channels)
        return image, read_mask(pair.mask, self.coding, self.size)


def split(
    pairs: Sequence[Pair], val_size: int | float | None, test_size: int | float | None, seed: int
) -> dict[str, list[Pair]]:
    """Draw pairs to validate and to test on, always the same ones; leave the others to `train`.

    Args:
        pairs: N of them.
        val_size: how many, or, below 1, which share of N, rounded, but at least one picture; None: none.
        test_size: likewise.
        seed: of the generator; not the run's seed.

    Raises:
        InputError: there is no such share, or none are left.
    """
    counts = {}
    for part, size in (("val", val_size), ("test", test_size)):
        if size is not None:
            if not size > 0 or (size > 1 and size % 1):  # NaN is not above 0
                raise InputError(f"{part}_size is how many pictures, from 1, or a share below 1, got {size}")
            counts[part] = int(size) if size >= 1 else max(1, round(size * len(pairs)))
    if sum(counts.values()) >= len(pairs):
        said = " and ".join(f"{count:,} to {part}" for part, count in counts.items())
        raise InputError(f"of {len(pairs):,} pictures, {said} leave none to train on")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = {}
    for part, count in counts.items():
        parts[part], order = sorted(order[:count]), order[count:]
    return {part: [pairs[i] for i in numbers] for part, numbers in {"train": sorted(order), **parts}.items()}


# -- augmentation and batches ------------------------------------------------------------------------------------------


def for_masks(step: str | dict) -> str | dict:
    """Return an albumentations step which fills masks with IGNORE, if it does not say with what, as its pictures with 0.

    Raises:
        InputError: it would mix the classes of pixels.
    """
    name, arguments = next(iter(step.items())) if isinstance(step, dict) and len(step) == 1 else (step, {})
    if not isinstance(name, str) or name not in TRANSFORMS or not isinstance(arguments or {}, dict):
        return step  # make_augmentation says what is wrong
    arguments = dict(arguments or {})
    if arguments.get("mask_interpolation", cv2.INTER_NEAREST) not in NEAREST:
        raise InputError(f"augment: {name}: mask_interpolation would mix classes: leave it out")
    if isinstance(arguments.get("transforms"), list):  # of OneOf, SomeOf, Sequential
        arguments["transforms"] = [for_masks(inner) for inner in arguments["transforms"]]
    known = signature(TRANSFORMS[name].__init__).parameters
    if "area_for_downscale" in known:  # it resizes: plain INTER_NEAREST, its default, is half a pixel off the picture
        arguments = {"mask_interpolation": cv2.INTER_NEAREST_EXACT} | arguments
        if arguments.get("area_for_downscale") == "image_mask":
            raise InputError(f"augment: {name}: area_for_downscale image_mask would mix classes: use image")
    fill = known.get("fill_mask")
    if fill is not None and fill.default == 0:  # None is of those that leave masks as they are
        arguments = {"fill_mask": IGNORE} | arguments
    return {name: arguments}


def collate(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Any, Any]:
    """Make a batch: pictures uint8, which lie in memory as channels_last, and masks int64; of several sizes, lists."""
    images, masks = zip(*samples, strict=True)
    if len({image.shape for image in images}) == 1:
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        return images, torch.from_numpy(np.stack(masks)).long()
    images = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in images]
    return images, [torch.from_numpy(np.ascontiguousarray(mask)).long() for mask in masks]


def pad_masks(masks: Sequence[Tensor]) -> Tensor:
    """Put masks (h, w) into one batch (B, H, W), each in the upper left corner, IGNORE beyond it."""
    height, width = (max(mask.shape[i] for mask in masks) for i in (0, 1))
    batch = masks[0].new_full((len(masks), height, width), IGNORE)
    for place, mask in zip(batch, masks, strict=True):
        place[: mask.shape[0], : mask.shape[1]] = mask
    return batch
