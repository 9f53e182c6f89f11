"""A model as a function of tensors: what `export.py` hands on, and what it is tried with.

A model's own forward pass may take more than tensors (targets with the sizes of pictures), give more (as many boxes as there
are), or keep something from call to call. Here each kind of model is one function, of tensors whose first dimension, the
batch, may have any length; all others are those of the run's own test data.
"""

from typing import Any

from pytorch_lightning import LightningDataModule
from torch import Tensor, nn


class Network(nn.Module):
    """A model as a function of tensors; this one of what comes first in a batch.

    Args:
        model: in evaluation mode.
        data: that it was trained on, set up.

    Attributes:
        inputs, outputs: names.
        says: what the inputs and outputs are.
        why_not: why neither ONNX nor torch.export can hold it; None: they can.
        batch_dim: which dimension of an input or output is the batch, where it is not the first.
    """

    inputs: tuple[str, ...] = ("inputs",)
    outputs: tuple[str, ...] = ("outputs",)
    says = "inputs (B, ...) to outputs (B, ...)"
    why_not: str | None = None
    batch_dim: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, model: nn.Module, data: LightningDataModule):
        super().__init__()
        self.model, self.data = model, data

    def example(self, batch: Any) -> tuple[Any, ...]:
        """Return what `forward` is given for a batch of the data module's."""
        return (batch[0],)

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Return the outputs."""
        return (self.model(*inputs),)


class Batches(Network):
    """Models whose forward pass is no function of tensors alone: only what comes first in a batch has a name."""

    outputs = ()

    def example(self, batch: Any) -> tuple[Any, ...]:
        """Return all of the batch."""
        return tuple(batch)


def sample_batch(data: LightningDataModule, count: int) -> Any:
    """Return the first test batch as the model gets it, of at most so many samples; the data module has a trainer."""
    if hasattr(data, "num_workers"):
        data.num_workers = 0  # for one batch
    batch = next(iter(data.test_dataloader()))
    if not any(hasattr(part, "edges") for part in batch):  # a graph is whole
        batch = tuple(part[:count] for part in batch)
    return data.on_after_batch_transfer(batch, 0)
