"""Your own pictures, in folders: `<folder>/train/<class>/*.jpg`, the same below `val` and, if there is one, `test`.

Shapes: B batch, S image_size; pictures are (B, 3, S, S), uint8 until they are on the device, then normalised floats.
"""

import hashlib
import lzma
import os
import random
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
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
from datamodules.files import data_dir, download
from datamodules.in_memory import EpochShuffle, InMemoryDataModule, InMemoryDataset
from datamodules.pictures import (
    PICTURE_SUFFIXES,
    PictureError,
    check_picture,
    check_pictures,
    make_augmentation,
    read_picture,
    resize,
)
from runner.errors import InputError, did_you_mean, one_line

PARTS = ("train", "val", "test")
Found = dict[str, dict[str, list[Path]]]  # part -> class -> files
LAYOUT = "train/<class>/*.jpg and val/<class>/*.jpg"
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
        if batch_size < 1 or eval_batch_size < 1:
            raise InputError(f"batch sizes start at 1, got batch_size {batch_size}, eval_batch_size {eval_batch_size}")
        if image_size < 1:
            raise InputError(f"image_size must be at least 1, got {image_size}")
        if resize is not None and resize < image_size:
            raise InputError(f"resize must be at least image_size {image_size}, which is cut out of it, got {resize}")
        if num_workers != "auto" and num_workers < 0:
            raise InputError(f"num_workers must be auto, 0 or more, got {num_workers}")
        if normalize and min(normalize[1]) <= 0:
            raise InputError(f"normalize: [means, standard deviations], the latter above 0, got {normalize}")
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
            found = self._find()
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None
        files = _files(found)
        checks = dict(zip(files, check_pictures(files), strict=True))
        digests = {file: digest for file, (digest, _) in checks.items()}
        self._leave_out({file: reason for file, (_, reason) in checks.items() if reason}, found)
        self._warn_of_leaks(found, digests)

        self.classes = tuple(found["train"])
        self.has_test = "test" in found
        self.source = f"pictures in {self.path}{'' if self.has_test else ' (no test folder: val is tested)'}"
        names = ((file.relative_to(self.path).as_posix(), digests[file]) for file in _files(found))
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
        if reason := check_picture(path)[1]:
            raise PictureError(f"{path} cannot be read: {reason}")
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

    # -- setup's steps -----------------------------------------------------------------------------------------------

    def _find(self) -> Found:
        """Return the files of every class of every part there is, sorted; `train` tells which classes there are."""
        folder = self.path
        if not folder.is_dir():
            if self.url:
                reason = self.download_error or "no download was tried"
                raise InputError(f"no {folder}, and {self.url} could not be had ({reason}): put {LAYOUT} into {folder}")
            names = [p.name for parent in {folder.parent, data_dir()} if parent.is_dir() for p in parent.glob("*/")]
            raise InputError(f"there is no folder {folder}, with {LAYOUT} in it{did_you_mean(folder.name, names)}")
        names = [p.name for p in folder.glob("*/")]
        if "train" not in names:
            raise InputError(f"{folder} has no train folder: expected {LAYOUT} in it{did_you_mean('train', names)}")
        if "val" not in names:
            raise InputError(
                f"{folder} has no val folder, to choose the best epoch by: move a fifth of the pictures from "
                f"train/<class> to val/<class>{did_you_mean('val', {*names} - {'train', 'test'})}"
            )
        ignored: Counter[str] = Counter()
        found = {part: _find_classes(folder / part, ignored) for part in PARTS if part in names}
        classes = list(found["train"])
        if len(classes) < 2:
            has = f"one class only, {classes[0]}" if classes else "no folders, one for each class"
            raise InputError(f"{folder / 'train'} has {has}: expected {LAYOUT} in {folder}")
        for part, its_classes in found.items():
            if not its_classes:
                raise InputError(f"{folder / part} has no folders, one for each class: {_some(classes)}")
            for name in its_classes:
                if name not in classes:
                    raise InputError(f"{folder / part / name}: train has no such class{did_you_mean(name, classes)}")
        if ignored:
            kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in ignored.most_common(5))
            warnings.warn(f"{folder}: in no class's folder, or no pictures by their names: {kinds}", stacklevel=3)
        return found

    def _leave_out(self, bad: dict[Path, str], found: Found) -> None:
        """Take what cannot be read out of `found`, or stop; stop, too, at a class that nothing is left of."""
        if bad:
            named = _some(f"{path} ({reason})" for path, reason in bad.items())
            message = f"{len(bad):,} of {len(_files(found)):,} pictures cannot be read: {named}"
            if self.on_bad_image == "stop":
                raise InputError(f"{message}; mend or remove them, or leave them out: --data.on_bad_image skip")
            warnings.warn(f"{message}; left out", stacklevel=3)
            self.left_out = len(bad)
        for part, classes in found.items():
            for name in classes:
                classes[name] = [file for file in classes[name] if file not in bad]
                if not classes[name]:
                    raise InputError(
                        f"{self.path / part / name} has no picture that can be read ({', '.join(PICTURE_SUFFIXES)}): "
                        "put some there, or remove the folder"
                    )

    def _warn_of_leaks(self, found: Found, digests: dict[Path, str]) -> None:
        """Warn of pictures to validate or test on that are trained on."""
        known = {digests[file] for file in _files({"train": found["train"]})}
        for part in PARTS[1:]:
            if leaks := [file for file in _files({part: found.get(part, {})}) if digests[file] in known]:
                warnings.warn(f"{len(leaks)} of the pictures in {part} are in train, too: {_some(leaks)}", stacklevel=3)

    def _pictures(self, classes: dict[str, list[Path]], augment=None) -> "Pictures":
        pairs = [(file, self.classes.index(name)) for name, files in classes.items() for file in files]
        return Pictures(pairs, self.image_size, self.resize, augment)

    def _loader(self, dataset: "Pictures", batch_size: int, **arguments) -> DataLoader:
        workers = self.num_workers
        if workers == "auto":  # each makes whole batches: with more of them than batches, some have nothing to do
            workers = min(available_cpus(), 8, len(dataset) // batch_size)
        return LateLoader(
            dataset,
            batch_size,
            collate_fn=stack,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_one_thread,
            pin_memory=torch.cuda.is_available(),
            **arguments,
        )


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
        seed = epoch_seed(epoch, 1, index)
        # one pair of generators for all transforms: with Compose's `seed=` each gets the same draws as the others
        self.augment.set_random_state(np.random.default_rng(seed), random.Random(seed))
        image = read_picture(path, self.enough)
        try:
            image = self.augment(image=image)["image"]
        except Exception as error:
            raise PictureError(f"augment: {path}: {one_line(error)}") from None
        if getattr(image, "dtype", None) != np.uint8:
            raise PictureError("augment must leave pixels uint8: leave Normalize and ToTensorV2 out of it")
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


def fetch_archive(url: str, folder: Path) -> None:
    """Download a zip or tar, and make the folder in it that holds `train` to `folder`: whole, or not at all.

    Raises:
        OSError, RuntimeError: it cannot be had, or is no such archive.
    """
    from torchvision.datasets.utils import download_url  # a second to import: only if it is needed

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        archive, unpacked = Path(temporary, "archive"), Path(temporary, "unpacked")
        download_url(url, temporary, archive.name)
        try:
            if zipfile.is_zipfile(archive):
                zipfile.ZipFile(archive).extractall(unpacked)
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(unpacked, filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError):
            raise RuntimeError("what came is no zip or tar, or not all of it") from None
        inside = [unpacked, *sorted(unpacked.glob("*/"))]
        found = [path for path in inside if (path / "train").is_dir()]
        if not found:
            raise RuntimeError(f"the archive has no train folder; in it: {_some(p.name for p in unpacked.iterdir())}")
        found[0].rename(folder)


def _find_classes(folder: Path, ignored: Counter) -> dict[str, list[Path]]:
    """Return the picture files of each class, sorted; count others by suffix in `ignored`, hidden ones apart."""
    classes: dict[str, list[Path]] = {}
    ignored.update(p.suffix for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for class_folder in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = []
        for root, folders, names in os.walk(class_folder, onerror=_raise, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files += [Path(root, name) for name in names if not name.startswith(".")]
        pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
        ignored.update(file.suffix for file in files if file.suffix.lower() not in PICTURE_SUFFIXES)
        classes[class_folder.name] = sorted(pictures)
    return classes


def _files(found: Found) -> list[Path]:
    return [file for classes in found.values() for files in classes.values() for file in files]


def _raise(error: OSError) -> None:
    raise error


def _some(names) -> str:
    """Return the first three, and how many more there are."""
    names = [one_line(name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # there are as many workers as CPUs; and its threads do not outlive a fork


@cache
def _row(values: tuple[float, ...], width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a value for each channel, for pixels in 0..255, as a row of a picture in channels_last: (1, 3, 1, width).

    A whole row, since a CPU takes six times as long with three numbers; and made once, since a copy waits for the GPU.
    """
    row = 255 * torch.tensor(values, dtype=torch.float64).repeat(width)  # (3 * width,)
    return row.to(dtype).to(device).view(1, 1, width, 3).permute(0, 3, 1, 2)
