"""The average of the weights over the last steps, in place of the weights: they swing less, and are often better."""

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.trainer.states import TrainerFn

from runner.errors import InputError


class AveragedWeights(EMAWeightAveraging):
    """Lightning's exponential moving average, which is what is validated, saved as the checkpoint's weights, and tested.

    Lightning's own goes on after training: a checkpoint that is loaded by the same Trainer to be tested gets the weights that
    were not averaged, and one that is loaded to be validated gives place to training's last average. This one leaves the
    model alone outside of training. And Lightning's makes the average before the model goes to its device, so on a GPU each
    step would copy all weights to the CPU, and average them there: this one keeps it where the model will be.

    Args:
        decay: share of the average that stays at each step.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__(decay=decay)
        self.decay = decay

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the average can be kept in the weights' precision.

        Raises:
            InputError: what a step adds to a weight would be rounded off, and the average would stay where it began.
        """
        kind = next(pl_module.parameters()).dtype
        if 1 - self.decay < torch.finfo(kind).eps:
            name = str(kind).removeprefix("torch.")
            raise InputError(
                f"weights in {name} are too coarse to be averaged with a decay of {self.decay:g}: take --trainer.precision "
                f"{'bf16' if kind == torch.bfloat16 else '16'}-mixed, whose weights are in float32"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the weights' place, in training."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_end(trainer, pl_module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average, on the device that the model is about to be on."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over both kinds of weights, if training goes on from there."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
