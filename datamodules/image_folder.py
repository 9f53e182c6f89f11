"""Your own pictures, in folders: `<folder>/train/<class>/*.jpg`, the same below `val` and, if there is one, `test`.

Shapes: B batch, S image_size; pictures are (B, 3, S, S), uint8 until they are on the device, then normalised floats.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cache
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
from datamodules.class_folders import fetch_archive, files_of, find_classes, leave_out, warn_of_leaks
from datamodules.files import data_dir, download
from datamodules.in_memory import EpochShuffle, InMemoryDataModule, InMemoryDataset
from datamodules.pictures import (
    PictureError,
    augmented,
    check_pictures,
    make_augmentation,
    read_picture,
    require_picture,
    resize,
)
from runner.errors import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageFolder(LightningDataModule):
    """Pictures to classify; their class is the name of the folder they are in, directly or in folders below it.

    Every file is read once before anything is trained: what cannot be read is found there, not after an hour. Without
    a `test` folder the `val` folder is tested, and the receipt says so: the number is then of pictures that the best
    epoch was chosen by.

    A picture's augmentation is drawn from (seed, epoch, picture): it is the same with any number of workers, and in a
    run that was stopped and resumed. (Seeding the workers would tie it to their number.)

    Args:
        folder: a path; if it is relative and not there, it is looked for below `DATA_DIR` (default: `data`).
        url: of a zip or tar archive with these folders, or with one folder around them; it is downloaded and unpacked
            to `<DATA_DIR>/<folder>` if the folder is not there.
        image_size: S, of the square that the network gets.
        resize: pixels of the shorter side, before the middle is cut out, in evaluation; None: 8/7 of image_size, as
            256 is of 224.
        augment: albumentations' transforms for training, each `Name` or `{Name: {argument: value}}`, for instance
            `[{RandomResizedCrop: {size: [224, 224], scale: [0.35, 1]}}, HorizontalFlip]`. They must end in a uint8
            picture of image_size. None: RandomResizedCrop to image_size, and HorizontalFlip. An empty list: training
            pictures are prepared as those of evaluation are.
        normalize: mean and standard deviation of red, green and blue, of pixels in [0, 1]; None leaves them there.
        batch_size: pictures in a training batch. If one picture would be left for an epoch's last batch, it is left
            out of the epoch, another one each time: batch norm has no variance of one.
        eval_batch_size: pictures in a batch of validation and test.
        num_workers: processes that read pictures, for training and for validation; auto: one for each CPU,
            8 at most, and no more than there are whole batches.
        on_bad_image: whether a file that cannot be read stops the run, or is left out.
    """

    train_set: "Pictures | None" = None
    val_set: "Pictures"
    test_set: "Pictures"
    precomputed: InMemoryDataModule | None = None  # features, in place of the pictures to train and validate on
    classes: tuple[str, ...] = ()  # known after `setup`
    source: str
    fingerprint: str

    def __init__(
        self,
        folder: str,
        url: str | None = None,
        image_size: int = 224,
        resize: int | None = None,
        augment: list[str | dict[str, Any]] | None = None,
        normalize: tuple[tuple[float, float, float], tuple[float, float, float]] | None = IMAGENET,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int | Literal["auto"] = "auto",
        on_bad_image: Literal["stop", "skip"] = "stop",
    ):
        super().__init__()
        check_arguments(image_size, normalize, batch_size, eval_batch_size, num_workers)
        if resize is not None and resize < image_size:
            raise InputError(f"resize must be at least image_size {image_size}, which is cut out of it, got {resize}")
        if url and not url.startswith(("https://", "http://")):
            raise InputError(f"url must start with https://, got {url}")
        if augment is None:
            augment = [{"RandomResizedCrop": {"size": [image_size, image_size]}}, "HorizontalFlip"]
        self.augmentation = make_augmentation(augment) if augment else None
        self.folder, self.url, self.download_error = folder, url, ""
        self.image_size, self.resize = image_size, round(image_size * 8 / 7) if resize is None else resize
        self.mean, self.std = normalize or ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.on_bad_image = num_workers, on_bad_image
        self.left_out = 0
        self.has_test = True

    @property
    def path(self) -> Path:
        """Where the pictures are, or are unpacked to."""
        path = Path(self.folder).expanduser()
        return path if path.is_dir() else data_dir() / path

    @property
    def is_random(self) -> bool:
        """Whether training pictures are other ones in every epoch."""
        return self.augmentation is not None

    def prepare_data(self) -> None:
        """Download and unpack the archive, if there is one and no folder; `setup` says what is missing."""
        if self.url and not self.path.exists() and not self.download_error:
            self.download_error = download(self.folder, self.path, lambda: fetch_archive(self.url, self.path))

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures, and read each of them once.

        Raises:
            InputError: a folder is missing, empty, or of no class that is trained; a picture cannot be read.
        """
        if self.train_set is not None:
            return
        try:
            found = find_classes(self.path, self.url, self.download_error)
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None
        files = files_of(found)
        checks = dict(zip(files, check_pictures(files), strict=True))
        digests = {file: digest for file, (digest, _) in checks.items()}
        bad = {file: reason for file, (_, reason) in checks.items() if reason}
        leave_out(bad, found, self.path, self.on_bad_image)
        self.left_out = len(bad)
        warn_of_leaks(found, digests)

        self.classes = tuple(found["train"])
        self.has_test = "test" in found
        self.source = f"pictures in {self.path}{'' if self.has_test else ' (no test folder: val is tested)'}"
        names = ((file.relative_to(self.path).as_posix(), digests[file]) for file in files_of(found))
        content = "".join(f"{name} {digest}\n" for name, digest in names)
        self.fingerprint = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
        self.val_set = self._pictures(found["val"])
        self.test_set = self._pictures(found["test"]) if self.has_test else self.val_set
        train_set = self._pictures(found["train"], self.augmentation)
        train_set[0]  # what is wrong with the augmentation shows before a run is begun
        self.train_set = train_set

    # -- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Batches of all pictures in a new order, newly augmented, every epoch."""
        if self.precomputed:
            return self.precomputed.train_dataloader()
        one_left = len(self.train_set) % self.batch_size == 1 < self.batch_size
        sampler = EndlessShuffle(len(self.train_set))
        return self._loader(self.train_set, self.batch_size, sampler=sampler, drop_last=one_left)

    def val_dataloader(self) -> DataLoader:
        """Batches in order."""
        if self.precomputed:
            return self.precomputed.val_dataloader()
        return self._loader(self.val_set, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """Batches in order."""
        return self._loader(self.test_set, self.eval_batch_size)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Any], dataloader_idx: int) -> tuple[Tensor, Any]:
        """Turn uint8 pictures (B, 3, S, S) to normalised floats, on the device; what comes with them is left alone."""
        images, rest = batch
        if self.precomputed and images.ndim == 2:  # features
            return images.to(self.trainer.lightning_module.dtype), rest
        return self.normalized(images, self.trainer.lightning_module.dtype), rest

    def normalized(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Return uint8 pictures (B, 3, S, S) as normalised floats."""
        mean, std = (_row(values, images.shape[3], images.device, dtype) for values in (self.mean, self.std))
        return images.to(dtype).sub_(mean).div_(std)

    @torch.no_grad()
    def precompute(self, features: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Train and validate, until the end of `fit`, on what `features` makes of a picture, computed here, once.

        Args:
            features: from normalised pictures (B, 3, S, S) to (B, D).
            device: to compute them on; they are kept in the computer's memory.
            dtype: of the pictures that it takes.
        """
        kept = InMemoryDataModule(self.batch_size, self.eval_batch_size)
        for name, dataset in (("train_set", self.train_set), ("val_set", self.val_set)):
            batches = []
            for images, labels in tqdm(
                self._loader(dataset, self.eval_batch_size), f"features of {name}", leave=False, disable=None, delay=2
            ):
                batches.append((features(self.normalized(images.to(device), dtype)).cpu(), labels))
            setattr(kept, name, InMemoryDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True))))
        self.precomputed = kept

    def teardown(self, stage: str) -> None:
        """Go back to pictures."""
        self.precomputed = None

    def read_input(self, path: Path) -> Tensor:
        """Read one picture, prepared as in evaluation: (3, S, S) uint8. It needs no `setup`, and no folder.

        Raises:
            PictureError: it cannot be read.
        """
        require_picture(path)
        return torch.from_numpy(prepare(path, self.resize, self.image_size)).permute(2, 0, 1)  # (S, S, 3) -> (3, S, S)

    # -- what receipts and checkpoints say ---------------------------------------------------------------------------

    def describe(self) -> dict:
        """What the receipt says of the data: name, source, sizes, and a fingerprint of every file in its place."""
        said = {"name": type(self).__name__, "source": self.source, "fingerprint": self.fingerprint, **self.sizes}
        said |= {} if self.has_test else {"test_folder": "val: there is no test folder"}
        return said | ({"left_out": self.left_out} if self.left_out else {})

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints say of the data: what it was, and the names of the classes that the network tells apart."""
        return {"fingerprint": self.fingerprint, "source": self.source, "classes": list(self.classes)}

    @property
    def sizes(self) -> dict[str, int]:
        """Pictures in each set."""
        return {"train": len(self.train_set), "val": len(self.val_set), "test": len(self.test_set)}

    def _pictures(self, classes: dict[str, list[Path]], augment=None) -> "Pictures":
        pairs = [(file, self.classes.index(name)) for name, files in classes.items() for file in files]
        return Pictures(pairs, self.image_size, self.resize, augment)

    def _loader(self, dataset: "Pictures", batch_size: int, **arguments) -> DataLoader:
        return make_loader(dataset, batch_size, self.num_workers, collate_fn=stack, **arguments)


class Pictures(Dataset):
    """Pictures and their labels, by number: e * N + i is number i of N, as it is drawn in epoch e.

    Args:
        pairs: N files and their labels.
        size: S.
        resize: pixels of the shorter side in evaluation.
        augment: albumentations' transforms; None prepares as in evaluation.
    """

    def __init__(self, pairs: list[tuple[Path, int]], size: int, resize: int, augment=None):
        self.pairs, self.size, self.resize, self.augment = pairs, size, resize, augment
        # Only where the first step scales whatever comes to a size of its own may a large picture come smaller
        self.enough = getattr(augment.transforms[0], "enough", 0) if augment else 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return (self[i] for i in range(len(self)))  # Python's own would never end

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        epoch, index = divmod(number, len(self))
        path, label = self.pairs[index]
        if self.augment is None:
            return prepare(path, self.resize, self.size), label
        image = read_picture(path, self.enough)
        image = augmented(self.augment, path, epoch_seed(epoch, 1, index), image=image)["image"]
        if image.shape != (self.size, self.size, 3):
            raise PictureError(
                f"augment makes {' x '.join(map(str, image.shape))} of {path}, and image_size is {self.size}: add "
                f"{{RandomResizedCrop: {{size: [{self.size}, {self.size}]}}}} or the like"
            )
        return image, label


class EndlessShuffle(EpochShuffle):
    """EpochShuffle, whose numbers go on: epoch e has those from e * N on. So a worker knows what epoch it draws for."""

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.length
        return iter([first + i for i in super().__iter__()])


class LateLoader(DataLoader):
    """A DataLoader that sends for its first batches when one is asked for.

    (Of a resumed run, Lightning makes the first iterator before it sets the epoch: workers would begin with another.)
    """

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from super().__iter__()


def check_arguments(
    image_size: int, normalize: tuple | None, batch_size: int, eval_batch_size: int, num_workers: int | Literal["auto"]
) -> None:
    """Raise InputError for what no data module of picture files can use."""
    if batch_size < 1 or eval_batch_size < 1:
        raise InputError(f"batch sizes start at 1, got batch_size {batch_size}, eval_batch_size {eval_batch_size}")
    if image_size < 1:
        raise InputError(f"image_size must be at least 1, got {image_size}")
    if num_workers != "auto" and num_workers < 0:
        raise InputError(f"num_workers must be auto, 0 or more, got {num_workers}")
    if normalize and min(normalize[1]) <= 0:
        raise InputError(f"normalize: [means, standard deviations], the latter above 0, got {normalize}")


def make_loader(dataset: Dataset, batch_size: int, num_workers: int | Literal["auto"], **arguments) -> LateLoader:
    """Return a loader of picture files with so many processes; `arguments` are a DataLoader's."""
    if num_workers == "auto":  # each makes whole batches: with more of them than batches, some have nothing to do
        num_workers = min(available_cpus(), 8, len(dataset) // batch_size)
    return LateLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
        **arguments,
    )


def prepare(path: Path, short: int, size: int) -> np.ndarray:
    """Read a picture for evaluation, its shorter side resized to `short` and the middle cut out: (size, size, 3)."""
    image = read_picture(path, enough=2 * short)
    height, width = image.shape[:2]
    if (limit := 4 * min(height, width)) < max(height, width):  # a strip: what is far from the middle is not looked at
        image = _middle(image, min(height, limit), min(width, limit))
        height, width = image.shape[:2]
    shorter = min(height, width)
    return _middle(resize(image, height * short // shorter, width * short // shorter), size, size)


def _middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def stack(samples: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """Make a batch: pictures (B, 3, S, S) uint8, which lie in memory as channels_last, and labels (B,) int64."""
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)  # (B, S, S, 3) -> (B, 3, S, S)


def available_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # there are as many workers as CPUs; and its threads do not outlive a fork


@cache
def _row(values: tuple[float, ...], width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a value for each channel, for pixels in 0..255, as a row of a picture in channels_last: (1, 3, 1, width).

    A whole row, since a CPU takes six times as long with three numbers; and made once, since a copy waits for the GPU.
    """
    row = 255 * torch.tensor(values, dtype=torch.float64).repeat(width)  # (3 * width,)
    return row.to(dtype).to(device).view(1, 1, width, 3).permute(0, 3, 1, 2)
