"""CIFAR-10: 32 x 32 colour pictures of 10 classes, 50,000 to train and 10,000 to test.

Source: Krizhevsky 2009 (https://www.cs.toronto.edu/~kriz/cifar.html).

Shapes: B batch; pictures are (B, 3, 32, 32), uint8 in memory, normalised floats on the device.
"""

import functools
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.seeding import epoch_seed
from datamodules.files import data_dir, download
from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from runner.errors import InputError, one_line

BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}  # torchvision's layout
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pictures, in [0, 1]


class CIFAR10(InMemoryDataModule):
    """Found under `DATA_DIR` (default: `data`), the first of these that is there, or downloaded there.

    - `cifar-10-batches-py/`: torchvision's files;
    - `cifar10/train|test/<class>/*`: class folders of pictures;
    - `cifar10.tar.gz`: the same, packed.

    Args:
        batch_size: samples in a training batch.
        val_size: how many of the training samples to validate on, always the same ones; 0 trains on all 50,000, and what
            is best must then be told by a `train/` metric. The test set is never touched.
        crop: training pictures are moved by up to so many pixels each way, a batch at a time, on the device; 0 does not.
        border: what comes in at the sides then: `zeros` (as in He et al. 2016), or a `reflect`ion.
        flip: whether every second training picture, by chance, is mirrored.
        on_device: whether all pictures are kept in the device's memory, 184 MB, not in the computer's.
        eval_batch_size: samples in a batch of validation and test.
    """

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean, std = MEAN, STD

    def __init__(
        self,
        batch_size: int = 128,
        val_size: int = 5000,
        crop: int = 4,
        border: Literal["zeros", "reflect"] = "zeros",
        flip: bool = True,
        on_device: bool = False,
        eval_batch_size: int = 1000,
    ):
        super().__init__(batch_size, eval_batch_size)
        if not 0 <= crop < 32:
            raise InputError(f"crop must be from 0 to 31 pixels, got {crop}")
        self.val_size, self.crop, self.flip, self.on_device = val_size, crop, flip, on_device
        self.pad_mode = {"zeros": "constant", "reflect": "reflect"}[border]
        self.download_error = ""
        self._drawn_for: int | None = None  # the epoch that `_generator` is of

    @property
    def places(self) -> tuple[Path, Path, Path]:
        """Where it may lie: torchvision's files, class folders, an archive of these."""
        return data_dir() / "cifar-10-batches-py", data_dir() / "cifar10", data_dir() / "cifar10.tar.gz"

    def prepare_data(self) -> None:
        """Download what is missing; leave it to `setup` to say what could not be had."""
        if self.download_error or any(place.exists() for place in self.places):
            return
        import torchvision.datasets

        fetch = torchvision.datasets.CIFAR10
        self.download_error = download("CIFAR-10", self.places[0], lambda: fetch(data_dir(), download=True))

    def setup(self, stage: str | None = None) -> None:
        """Read the pictures into memory, and split off the validation set.

        Raises:
            InputError: they are not there, damaged, or not what they should be.
        """
        if self.train_set is None:
            self.read()
        if self.on_device and self.trainer:
            _ = self.fingerprint  # while they are in the computer's memory
            device = self.trainer.strategy.root_device
            for dataset in filter(None, (self.train_set, self.val_set, self.test_set)):
                dataset.tensors = tuple(t.to(device) for t in dataset.tensors)

    def read(self) -> None:
        """Do what `setup` says."""
        batches, folders, _ = self.places
        place = next((place for place in self.places if place.exists()), None)
        if place is None:
            raise InputError(
                f"CIFAR-10 is not in {batches} ({self.download_error or 'no download was tried'}): fetch it with "
                "torchvision.datasets.CIFAR10(root, download=True) on a machine with a network, or put class folders "
                f"(train/airplane/*.png, ...) into {folders}, or set DATA_DIR"
            )
        sets = read_batches(batches) if place == batches else read_class_folders(place, self.classes)
        (images, labels), test = sets["train"], sets["test"]
        if not 0 <= self.val_size < len(images):
            raise InputError(f"val_size must be from 0 to {len(images) - 1:,}, got {self.val_size:,}")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # not the run's seed
        val, train = order[: self.val_size], order[self.val_size :]
        self.val_set = InMemoryDataset(images[val], labels[val]) if self.val_size else None
        self.test_set = InMemoryDataset(*test)
        self.train_set = InMemoryDataset(images[train], labels[train])
        self.source = f"files in {place}"

    def train_dataloader(self):
        """Shuffled batches."""
        self._drawn_for = None
        return super().train_dataloader()

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """On the device: move and mirror training pictures, then turn uint8 pixels to normalised floats."""
        images, labels = batch
        if self.trainer.training:
            images = self.augment(images, self.trainer.current_epoch)
        return normalize(images, self.trainer.lightning_module.dtype), labels

    def augment(self, images: Tensor, epoch: int) -> Tensor:
        """Move and mirror pictures (B, C, H, W), by numbers that come from (seed, epoch)."""
        if epoch != self._drawn_for:
            self._generator = torch.Generator(images.device).manual_seed(epoch_seed(epoch, 1))
            self._drawn_for = epoch
        b, _, h, w = images.shape
        draw = {"generator": self._generator, "device": images.device}
        dy, dx = torch.randint(0, 2 * self.crop + 1, (2, b, 1), **draw)  # (B, 1), (B, 1)
        rows = torch.arange(h, device=images.device) + dy  # (B, H)
        columns = torch.arange(w, device=images.device) + dx  # (B, W)
        if self.flip:
            columns = torch.where(torch.rand(b, 1, **draw) < 0.5, columns.flip(1), columns)
        padded = F.pad(images, (self.crop,) * 4, mode=self.pad_mode)  # (B, C, H + 2 crop, W + 2 crop)
        every = torch.arange(b, device=images.device).view(b, 1, 1)
        moved = padded[every, :, rows.view(b, h, 1), columns.view(b, 1, w)]  # (B, H, W, C)
        return moved.permute(0, 3, 1, 2)  # (B, C, H, W), channels_last in memory

    def read_input(self, path: Path) -> Tensor:
        """Return any picture as the model knows them: (3, 32, 32) uint8, its sides squeezed to a square.

        Raises:
            InputError: it cannot be read.
        """
        from datamodules.pictures import read_picture, require_picture, resize

        require_picture(path)
        return torch.from_numpy(resize(read_picture(path), 32, 32)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)


class RandAugmentCIFAR10(CIFAR10):
    """CIFAR-10 whose training pictures go through RandAugment, too (Cubuk et al. 2020), on the device.

    Of 14 operations (turn, shear, shift, brighten, equalize, posterize, ...) some are drawn by chance, all of one strength. They
    are drawn for a few pictures at a time, not for each by itself: a GPU takes as long for one as for these.

    Args:
        operations: how many, one after the other.
        magnitude: their strength, from 0 to 30.
        together: pictures of a batch that share a draw.
        cifar10: arguments of `CIFAR10`.

    Raises:
        InputError: one is out of its range.
    """

    def __init__(self, operations: int = 2, magnitude: int = 9, together: int = 8, **cifar10):
        super().__init__(**cifar10)
        if operations < 1 or not 0 <= magnitude <= 30 or together < 1:
            raise InputError(
                f"operations and together start at 1, and magnitude is from 0 to 30: got {operations}, {together}, {magnitude}"
            )
        from torchvision.transforms import v2  # a second to import: only if it is needed

        self.together = together
        self.operations = v2.RandAugment(operations, magnitude, fill=[round(255 * mean) for mean in MEAN])

    def augment(self, images: Tensor, epoch: int) -> Tensor:
        """As in `CIFAR10`, and then these operations, by numbers that come from (seed, epoch), too."""
        if epoch != self._drawn_for:
            self._seeds = torch.Generator().manual_seed(epoch_seed(epoch, 2))
        images = super().augment(images, epoch)
        # torchvision draws from the CPU's global generator, which at an epoch's first batch is not seeded yet
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=self._seeds)))
            return torch.cat([self.operations(few) for few in images.split(self.together)])


def normalize(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn uint8 pixels (B, 3, H, W) to floats of mean 0 and standard deviation 1."""
    mean, std = (_per_channel(values, images.device, dtype) for values in (MEAN, STD))
    return images.to(dtype).div_(255).sub_(mean).div_(std)


@functools.cache
def _per_channel(values: tuple[float, float, float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (3, 1, 1). It is made once: a copy to a GPU waits for what that is at."""
    return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1)


def read_batches(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read torchvision's files.

    Returns:
        For `train` and `test`: images (N, 3, 32, 32) uint8, labels (N,) int64.

    Raises:
        InputError: one is missing, or damaged.
    """
    sets = {}
    for part, names in BATCHES.items():
        images, labels = [], []
        for name in names:
            try:
                with open(folder / name, "rb") as file:
                    content = _Unpickler(file, encoding="bytes").load()
                images.append(torch.from_numpy(np.array(content[b"data"], np.uint8)).view(-1, 3, 32, 32))
                labels.append(torch.tensor(content[b"labels"], dtype=torch.int64))
            except FileNotFoundError:
                raise InputError(f"{folder / name} is missing: delete {folder} to download it again") from None
            except Exception as error:  # unpickling raises many kinds
                raise InputError(
                    f"{folder / name} is damaged: {one_line(error)[:80]}; delete {folder} to download it again"
                ) from None
            if len(images[-1]) != len(labels[-1]) or not 0 <= labels[-1].min() <= labels[-1].max() <= 9:
                raise InputError(
                    f"{folder / name}: expected a label from 0 to 9 for each of {len(images[-1]):,} pictures"
                )
        sets[part] = torch.cat(images), torch.cat(labels)
    return sets


class _Unpickler(pickle.Unpickler):
    """Arrays of bytes are all that these files hold: what else a pickle could call is refused."""

    def find_class(self, module: str, name: str):
        if (module.replace("numpy._core", "numpy.core"), name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def read_class_folders(place: Path, classes: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Read `train|test/<class>/*`, pictures of 32 x 32 pixels, from a folder or a tar archive of it.

    Returns:
        For `train` and `test`: images (N, 3, 32, 32) uint8, labels (N,) int64, ordered by class and file name.

    Raises:
        InputError: a class has no pictures, or a file is no picture of this size.
    """
    import cv2

    images: dict[tuple[str, int, str], np.ndarray] = {}
    for path, content in _files(place):
        if len(path.parts) < 3 or path.name.startswith("."):
            continue
        part, name = path.parts[-3:-1]
        if part not in BATCHES or name not in classes:
            continue
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB) if content else None
        if pixels is None or pixels.shape != (32, 32, 3):
            what = "not a picture" if pixels is None else f"{pixels.shape[1]} x {pixels.shape[0]} pixels, not 32 x 32"
            raise InputError(f"{place}: {path} is {what}")
        images[part, classes.index(name), path.name] = pixels
    sets = {}
    for part in BATCHES:
        keys = sorted(key for key in images if key[0] == part)
        if absent := [name for i, name in enumerate(classes) if i not in {key[1] for key in keys}]:
            raise InputError(
                f"{place}: no pictures in {part}/{absent[0]}; expected {part}/<class>/* of {len(classes)} classes"
            )
        pixels = torch.from_numpy(np.stack([images[key] for key in keys])).permute(
            0, 3, 1, 2
        )  # (N, H, W, C) -> (N, C, H, W)
        sets[part] = pixels.contiguous(), torch.tensor([key[1] for key in keys])
    return sets


def _files(place: Path) -> Iterator[tuple[Path, bytes]]:
    if place.is_dir():
        for path in place.rglob("*"):
            if path.is_file():
                yield path, path.read_bytes()
        return
    try:
        with tarfile.open(place, "r|*") as archive:
            for member in archive:
                if member.isfile():
                    yield Path(member.name), archive.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{place} is damaged: {one_line(error)}") from None
