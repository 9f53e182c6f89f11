"""All randomness of an epoch comes from (seed, epoch).

Then a run that was stopped and resumed draws what it would have drawn had it never been stopped. Storing the
generators' state in the checkpoint does not give that: a resumed Trainer makes its first iterator at another moment.
What a data module draws as it makes an epoch's first batch, though, it draws before that: see `Seeding`.
"""

import os
import random

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer


def epoch_seed(epoch: int, *stream: int) -> int:
    """Return 64 well-mixed bits from the run's seed and `epoch`; other ones for each `stream` that is drawn from.

    The run's seed is the one last given to `pytorch_lightning.seed_everything` (0 if there was none).
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    return int(np.random.SeedSequence([seed, epoch, *stream]).generate_state(1, np.uint64)[0])


class EpochSeeding(Callback):
    """Reseeds Python's, NumPy's and torch's global generators at the first batch of every training epoch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        """Reseed just before the epoch's first forward pass, so that what happened in between does not matter."""
        if batch_idx == 0:
            seed = epoch_seed(trainer.current_epoch)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)


class Seeding(EpochSeeding):
    """The same for runs that are resumed, with what is drawn as an epoch's first batch is made, before it is seeded anew.

    Such as which of its pictures are flipped: that comes from the state that the epoch before has left torch's generator
    in, so the state goes with the checkpoint. (One callback: Lightning calls each of them six times a step.)
    """

    state: torch.Tensor | None = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the generator's state."""
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take it over, for the epoch to come."""
        self.state = state_dict["torch"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it; from here on, all is drawn as it would have been."""
        if self.state is not None:
            torch.set_rng_state(self.state.cpu())
            torch.empty((), dtype=torch.int64).random_()  # a loader draws this for an iterator, which is there already
            self.state = None
