"""What models of one kind share: loss, metrics, steps, optimiser. A model adds its network and its forward pass."""

import math
import sys
from typing import Literal

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from callbacks.pictures import ClassificationPictures
from runner.errors import InputError


class Task(LightningModule):
    """Base of all tasks: makes the optimiser, and records how the model was made.

    Args:
        optimizer: from parameters to an optimiser; in an experiment, a class path and its arguments.
        lr_scheduler: from an optimiser to a scheduler that steps once an epoch; None keeps the learning rate.
    """

    def __init__(
        self, optimizer: OptimizerCallable = torch.optim.Adam, lr_scheduler: LRSchedulerCallable | None = None
    ):
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

        # Hyperparameters are the arguments of the model's own class, so that load_from_checkpoint can call it: look
        # from here outwards for the outermost __init__ of this object.
        frame = sys._getframe()
        while frame.f_back.f_code.co_name == "__init__" and frame.f_back.f_locals.get("self") is self:
            frame = frame.f_back
        self.save_hyperparameters(frame=frame, logger=False)
        # Checkpoints hold plain types only. From an experiment the optimiser comes as strings and numbers; from
        # Python it may come as a function, which a checkpoint could keep only as code to run.
        for name in [name for name, value in self.hparams.items() if callable(value)]:
            del self.hparams[name]

    def configure_optimizers(self):
        """Make the optimiser and, if there is one, its scheduler."""
        try:
            optimizer = self.optimizer(self.parameters())
            scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # such as a negative learning rate
            raise InputError(f"the optimiser or its scheduler cannot be made: {error}") from error
        if scheduler is None:
            return optimizer
        config = {"scheduler": scheduler}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if not isinstance(scheduler, ReduceLROnPlateau):
                raise InputError(
                    "lr_scheduler: use pytorch_lightning.cli.ReduceLROnPlateau, and tell it what to monitor"
                )
            config |= {"monitor": scheduler.monitor, "frequency": self.trainer.check_val_every_n_epoch or 1}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_train_start(self) -> None:
        """Log at least once an epoch: one shorter than the logging interval could go by without a metric."""
        steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        self.trainer.log_every_n_steps = min(self.trainer.log_every_n_steps, steps)

    def is_log_step(self, batch_idx: int) -> bool:
        """Whether this training batch's metrics reach the loggers: every `trainer.log_every_n_steps` steps.

        `self.log` costs about a millisecond here, and what it is given in between goes nowhere.
        """
        trainer, every = self.trainer, self.trainer.log_every_n_steps
        steps_now = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        return bool(every) and steps_now and (self.global_step + 1) % every == 0


class Classifier(Task):
    """Images to one of K classes: loss and accuracy (micro: the share of samples classified right).

    A subclass's forward maps images (B, C, H, W) to logits (B, K). Batches are (images, labels), labels (B,) int64.
    `train/loss` and `train/acc` are over the samples since the last log; those of `val` and `test` over the whole set.

    Args:
        num_classes: K.
        loss: `cross_entropy` of the softmax of the logits, or `mse`: the mean over B x K of the squared difference
            between the logits and the one-hot labels.
        optimizer, lr_scheduler: see `Task`.
    """

    tag = "classification"
    pictures = ClassificationPictures

    def __init__(
        self,
        num_classes: int,
        loss: Literal["cross_entropy", "mse"] = "cross_entropy",
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ):
        super().__init__(optimizer, lr_scheduler)
        self.num_classes = num_classes
        self.loss_name = loss
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = self.val_acc.clone()
        self._forget_train_samples()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of logits (B, K) for labels (B,): a scalar, the batch's mean."""
        if self.loss_name == "mse":
            return F.mse_loss(logits, F.one_hot(labels, self.num_classes).to(logits.dtype))
        return F.cross_entropy(logits, labels)

    def setup(self, stage: str) -> None:
        """Check that the data has as many classes as the model.

        Raises:
            InputError: it has not.
        """
        classes = getattr(self.trainer.datamodule, "classes", None)
        if classes and len(classes) != self.num_classes:
            data = type(self.trainer.datamodule).__name__
            raise InputError(f"{type(self).__name__} has {self.num_classes} classes, but {data} has {len(classes)}")

    def on_train_epoch_start(self) -> None:
        """Count a new epoch's samples from zero, as a run resumed here does."""
        self._forget_train_samples()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss. Sums here and a division at a log step: a torchmetrics update would cost more than the sums."""
        images, labels = batch
        logits = self(images)  # (B, C, H, W) -> (B, K)
        loss = self.loss(logits, labels)
        self._loss_sum += loss.detach() * len(labels)
        self._right += (logits.detach().argmax(dim=1) == labels).sum()
        self._samples += len(labels)
        if self.is_log_step(batch_idx):
            self.log("train/loss", self._loss_sum / self._samples, prog_bar=True)
            self.log("train/acc", self._right / self._samples)
            self._forget_train_samples()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to `val/loss` and `val/acc`."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Add a batch to `test/loss` and `test/acc`; return the logits (B, K), for the pictures."""
        return self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", self.loss(logits, labels), batch_size=len(labels))
        self.log(f"{stage}/acc", accuracy, batch_size=len(labels))
        return logits

    def _forget_train_samples(self) -> None:
        self._loss_sum, self._right, self._samples = 0.0, 0, 0
