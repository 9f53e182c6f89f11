"""What models of one kind share: loss, metrics, steps, optimiser. A model adds its network and its forward pass."""

import math
import sys
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from callbacks.pictures import ClassificationPictures, RegressionPictures
from lit_models.pretrained import from_checkpoint
from runner.errors import InputError


class Task(LightningModule):
    """Base of all tasks: makes the optimiser, and records how the model was made.

    Args:
        optimizer: from parameters to an optimiser; in an experiment, a class path and its arguments.
        lr_scheduler: from an optimiser to a scheduler; None keeps the learning rate.
        lr_interval: whether the scheduler steps once an epoch, or once a step.
    """

    pretrained: dict | None = None  # the weights that it began with: file and SHA-256, for the receipt

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ):
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self._forget_train_samples()

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

    @classmethod
    def load_from_checkpoint(cls, *arguments, **named):
        """Make the model that a checkpoint is of, as Lightning does.

        The file of weights that training began with is not looked for: the checkpoint has all of them. As Lightning makes
        it in float32, the weights of a run in 64-true are rounded.
        """
        with from_checkpoint():
            return super().load_from_checkpoint(*arguments, **named)

    def configure_optimizers(self):
        """Make the optimiser and, if there is one, its scheduler."""
        try:
            optimizer = self.optimizer(self.parameter_groups())
            scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # such as a negative learning rate
            raise InputError(f"the optimiser or its scheduler cannot be made: {error}") from error
        if scheduler is None:
            return optimizer
        config = {"scheduler": scheduler, "interval": self.lr_interval, "name": "train/lr"}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if not isinstance(scheduler, ReduceLROnPlateau):
                raise InputError(
                    "lr_scheduler: use pytorch_lightning.cli.ReduceLROnPlateau, and tell it what to monitor"
                )
            if self.lr_interval == "step":
                raise InputError(
                    "lr_interval: ReduceLROnPlateau looks at an epoch's metric: it needs lr_interval epoch"
                )
            config |= {"monitor": scheduler.monitor, "frequency": self.trainer.check_val_every_n_epoch or 1}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def parameter_groups(self) -> Iterable:
        """What the optimiser is given: all parameters, or groups of them with settings of their own."""
        return self.parameters()

    def optimizer_defaults(self) -> dict:
        """Return the optimiser's settings, for groups that are to have others: `lr`, `weight_decay`, ..."""
        return self.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults

    def check_classes(self) -> None:
        """Check that the data has as many classes as the model.

        Raises:
            InputError: it has not.
        """
        classes = getattr(self.trainer.datamodule, "classes", None)
        if classes and len(classes) != self.num_classes:
            data = type(self.trainer.datamodule).__name__
            raise InputError(
                f"{type(self).__name__} has {self.num_classes} classes, but {data} has {len(classes)}: "
                f"--model.num_classes {len(classes)}"
            )

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Note which weights training began with: a resumed run does not load them again."""
        checkpoint["pretrained"] = self.pretrained

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Take over the note."""
        self.pretrained = checkpoint.get("pretrained")

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
        step = (
            trainer.fit_loop.epoch_loop._batches_that_stepped
        )  # the loggers' step; global_step counts every optimiser's
        return bool(every) and steps_now and (step + 1) % every == 0

    def log_train(self, batch_idx: int, samples: int, **sums: Tensor) -> None:
        """Log `train/<name>` at a log step: the mean over the samples since the last one.

        Sums here and a division at a log step: a torchmetrics update would cost more than the sums.

        Args:
            batch_idx: of this batch.
            samples: in this batch.
            sums: of a metric over the batch's samples; the first is shown behind the progress bar.
        """
        self._train_samples += samples
        for name, value in sums.items():
            self._train_sums[name] = self._train_sums.get(name, 0) + value.detach()
        if self.is_log_step(batch_idx):
            for i, (name, value) in enumerate(self._train_sums.items()):
                self.log(f"train/{name}", value / self._train_samples, prog_bar=i == 0)
            self._forget_train_samples()

    def on_train_epoch_start(self) -> None:
        """Count a new epoch's samples from zero, as a run resumed here does."""
        self._forget_train_samples()

    def _forget_train_samples(self) -> None:
        self._train_samples, self._train_sums = 0, {}


class Classifier(Task):
    """Images to one of K classes: loss and accuracy (micro: the share of samples classified right).

    A subclass's forward maps images (B, C, H, W) to logits (B, K). Batches are (images, labels), labels (B,) int64.
    `train/loss` and `train/acc` are over the samples since the last log; those of `val` and `test` over the whole set.
    Test adds `test/acc_top5` (the label is among the five largest logits) where K > 5, and for each class the share of
    its samples classified right, `test_acc/<class>`.

    Args:
        num_classes: K.
        loss: `cross_entropy` of the softmax of the logits, or `mse`: the mean over B x K of the squared difference
            between the logits and the one-hot labels.
        label_smoothing: how much of a training label's weight is shared out among all classes, with `cross_entropy`
            (Szegedy et al. 2016).
        task: arguments of `Task`.
    """

    tag = "classification"
    pictures = ClassificationPictures

    def __init__(
        self,
        num_classes: int,
        loss: Literal["cross_entropy", "mse"] = "cross_entropy",
        label_smoothing: float = 0.0,
        **task,
    ):
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be from 0 to below 1, got {label_smoothing}")
        super().__init__(**task)
        self.num_classes = num_classes
        self.loss_name, self.label_smoothing = loss, label_smoothing
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = self.val_acc.clone()
        self.test_acc_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=5) if num_classes > 5 else None
        self.test_counts = MulticlassConfusionMatrix(num_classes)

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Loss of logits (B, K) for labels (B,): a scalar, the batch's mean."""
        if self.loss_name == "mse":
            return F.mse_loss(logits, F.one_hot(labels, self.num_classes).to(logits.dtype))
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is minimised for images (B, C, H, W), a scalar, and their logits (B, K)."""
        logits = self(images)
        return self.loss(logits, labels, self.label_smoothing), logits

    def setup(self, stage: str) -> None:
        """Check the classes."""
        self.check_classes()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        loss, logits = self.training_loss(images, labels)
        right = (logits.detach().argmax(dim=1) == labels).sum()
        self.log_train(batch_idx, len(labels), loss=loss * len(labels), acc=right)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to `val/loss` and `val/acc`."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Add a batch to the test's metrics; return the logits (B, K), for the pictures."""
        logits = self._evaluate(batch, "test", self.test_acc)
        self.test_counts.update(logits, batch[1])
        if self.test_acc_top5:
            self.test_acc_top5.update(logits, batch[1])
            self.log("test/acc_top5", self.test_acc_top5, batch_size=len(logits))
        return logits

    def on_test_epoch_end(self) -> None:
        """Log each class's accuracy; of a class without samples there is none."""
        counts = self.test_counts.compute()  # (K, K), labels by row
        self.test_counts.reset()
        right, samples = counts.diag().tolist(), counts.sum(dim=1).tolist()
        classes = getattr(self.trainer.datamodule, "classes", None) or range(self.num_classes)
        self.log_dict({f"test_acc/{c}": r / n for c, r, n in zip(classes, right, samples, strict=True) if n})

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the probabilities (B, K) of a batch of (images, ...)."""
        return self(batch[0]).float().softmax(dim=1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", self.loss(logits, labels), batch_size=len(labels))
        self.log(f"{stage}/acc", accuracy, batch_size=len(labels))
        return logits


class Regressor(Task):
    """Inputs (B, D) to numbers (B, K), by squared error.

    A subclass's forward maps (B, D) to (B, K). Batches are (inputs, targets). The loss is the mean over B x K of the
    squared difference, so it is logged as what it is: `mse`; beside it `mae`, the mean absolute difference.
    `train/mse` is over the samples since the last log; those of `val` and `test` are over the whole set.

    Args:
        task: arguments of `Task`.
    """

    tag = "regression"
    pictures = RegressionPictures

    def __init__(self, **task):
        super().__init__(**task)
        self.val_mse, self.val_mae = MeanSquaredError(), MeanAbsoluteError()
        self.test_mse, self.test_mae = self.val_mse.clone(), self.val_mae.clone()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        inputs, targets = batch
        loss = F.mse_loss(self(inputs), targets)
        self.log_train(batch_idx, len(targets), mse=loss * len(targets))
        return loss

    def double(self):
        """Compute in double precision, as Lightning's `64-true` does; torchmetrics' sums follow only if they are told."""
        for metric in (self.val_mse, self.val_mae, self.test_mse, self.test_mae):
            metric.set_dtype(torch.float64)
        return super().double()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to `val/mse` and `val/mae`."""
        self._evaluate(batch, "val", self.val_mse, self.val_mae)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Add a batch to `test/mse` and `test/mae`; return the predictions (B, K), for the pictures."""
        return self._evaluate(batch, "test", self.test_mse, self.test_mae)

    def _evaluate(self, batch, stage: str, mse: MeanSquaredError, mae: MeanAbsoluteError) -> Tensor:
        inputs, targets = batch
        predictions = self(inputs).to(targets.dtype)  # under bf16-mixed they come in bfloat16
        for name, metric in (("mse", mse), ("mae", mae)):
            metric.update(predictions.flatten(), targets.flatten())
            self.log(f"{stage}/{name}", metric, batch_size=len(targets))
        return predictions


class RegressorByHand(Regressor):
    """A regressor whose lecture does without an optimiser: `descend` finds the gradients and moves the parameters.

    It is run as the step of an optimiser that does nothing else, so that Lightning counts it: without a step counted
    there would be no checkpoint (`ModelCheckpoint` saves nothing new while `global_step` stands still).

    Args:
        lr: learning rate.
    """

    def __init__(self, lr: float):
        if not lr > 0:
            raise InputError(f"lr: the learning rate must be above 0, got {lr}")
        super().__init__()
        self.lr = lr
        self.automatic_optimization = False

    def setup(self, stage: str) -> None:
        """Check that the precision needs no optimiser of its own.

        Raises:
            InputError: `16-mixed`, which scales the loss, and unscales the gradients in the optimiser.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None):
            raise InputError(f"{type(self).__name__} has no optimiser, as 16-mixed needs one; bf16-mixed works")

    def descend(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Move the parameters by one step of gradient descent; return the predictions (B, K) from before it."""
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimiser whose step is `descend`."""
        return _CountedStep(self.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Take the step."""
        inputs, targets = batch
        predictions = self.optimizers().step(lambda: self.descend(inputs, targets)).detach()
        self.log_train(batch_idx, len(targets), mse=F.mse_loss(predictions, targets) * len(targets))


class _CountedStep(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, defaults={})

    def step(self, closure):
        return closure()
