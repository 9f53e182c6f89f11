"""Random inputs with random targets: nothing to understand, but a net with enough weights learns them by heart.

Shapes: N pairs; inputs (N, D) and targets (N, K), from N(0, 1), float32.

Source: lecture on tensors, autograd and nn.Module.
"""

import torch

from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from runner.errors import InputError


class RandomPairs(InMemoryDataModule):
    """One batch of pairs, to train on and to test on: there is no law that other pairs would follow.

    Args:
        pairs: N, which is the size of the batch, too.
        inputs: D.
        outputs: K.
        data_seed: of the pairs; the run's seed does not change them.
    """

    def __init__(self, pairs: int = 64, inputs: int = 1000, outputs: int = 10, data_seed: int = 0):
        if min(pairs, inputs, outputs) < 1:
            raise InputError(f"pairs, inputs and outputs start at 1, got {pairs}, {inputs} and {outputs}")
        super().__init__(batch_size=pairs, eval_batch_size=pairs)
        self.shape, self.data_seed = (inputs, outputs), data_seed
        self.source = f"random numbers, data_seed {data_seed}; tested on the pairs it was trained on"

    def setup(self, stage: str | None = None) -> None:
        """Draw the pairs."""
        generator = torch.Generator().manual_seed(self.data_seed)
        pairs = (torch.randn(self.batch_size, width, generator=generator) for width in self.shape)
        self.train_set = self.test_set = InMemoryDataset(*pairs)
