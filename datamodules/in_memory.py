"""Data that fits in memory: whole batches by index, in an order that comes from (seed, epoch).

On small networks the Python around the step is the cost. A `DataLoader` over samples decodes, converts and stacks
them one by one; here a batch is one indexing operation on a uint8 tensor, and normalising it happens on the device.
"""

import functools
import hashlib
from collections.abc import Iterator

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from callbacks.seeding import epoch_seed
from runner.errors import InputError


class InMemoryDataset(Dataset):
    """Tensors of N samples each, indexed together.

    `DataLoader` asks `__getitems__` for a whole batch, so the ordinary loader and Lightning's distributed sampler
    work unchanged; the loader's `collate_fn` has nothing left to do.
    """

    def __init__(self, *tensors: Tensor):
        if len({len(t) for t in tensors}) != 1:
            raise ValueError(f"tensors of different lengths: {[len(t) for t in tensors]}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        index, device = torch.as_tensor(indices), self.tensors[0].device
        if device.type == "cuda":  # without waiting for what the GPU is at
            index = index.pin_memory().to(device, non_blocking=True)
        return tuple(t[index] for t in self.tensors)  # each (N, ...) -> (B, ...)


class EpochShuffle(Sampler[int]):
    """A new order every epoch, drawn from (seed, epoch). Lightning calls `set_epoch` before each."""

    def __init__(self, length: int):
        self.length, self.epoch = length, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.epoch))
        return iter(torch.randperm(self.length, generator=generator).tolist())


class InMemoryDataModule(LightningDataModule):
    """A subclass's `setup` sets `train_set`, `test_set`, `source` and, if there is something to validate on, `val_set`.

    Args:
        batch_size: samples in a training batch.
        eval_batch_size: samples in a batch of validation and test, where nothing is gained by small ones.
    """

    train_set: InMemoryDataset | None = None
    val_set: InMemoryDataset | None = None
    test_set: InMemoryDataset
    source: str
    law = None  # of data that has one: from x to y without noise, for the pictures

    def __init__(self, batch_size: int, eval_batch_size: int = 1000):
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise InputError(f"batch sizes start at 1, got batch_size {batch_size}, eval_batch_size {eval_batch_size}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return self._loader(self.train_set, self.batch_size, EpochShuffle(len(self.train_set)))

    def val_dataloader(self) -> DataLoader | list:
        """Large batches in order; an empty list leaves validation out."""
        return self._loader(self.val_set, self.eval_batch_size) if self.val_set else []

    def test_dataloader(self) -> DataLoader:
        """Large batches in order."""
        return self._loader(self.test_set, self.eval_batch_size)

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> tuple[Tensor, ...]:
        """Turn floats to the model's kind of float: the data is kept as exact as it came."""
        dtype = self.trainer.lightning_module.dtype
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)

    def describe(self) -> dict:
        """What the receipt says of the data: name, source, sizes, and a fingerprint of every sample in its place."""
        return {"name": type(self).__name__, "source": self.source, "fingerprint": self.fingerprint, **self.sizes}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all samples in their order."""
        digest = hashlib.sha256()
        for dataset in filter(None, (self.train_set, self.val_set, self.test_set)):
            for tensor in dataset.tensors:
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, str]:
        """What checkpoints say of the data; a run is resumed with the same data only."""
        return {"fingerprint": self.fingerprint, "source": self.source}

    @property
    def sizes(self) -> dict[str, int]:
        """Samples in each set."""
        sets = {"train": self.train_set, "val": self.val_set or (), "test": self.test_set}
        return {name: len(dataset) for name, dataset in sets.items()}

    @staticmethod
    def _loader(dataset: InMemoryDataset, batch_size: int, sampler: Sampler | None = None) -> DataLoader:
        return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=_identity)


def _identity(batch):
    return batch
