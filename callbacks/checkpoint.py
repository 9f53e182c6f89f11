"""The checkpoints of a run: `best.ckpt` by a metric, `last.ckpt` after every epoch, `previous.ckpt` the last but one.

None of them is ever half-written. The last but one is there for a disk that did not keep what it was given.
"""

import io
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from runner.errors import InputError, did_you_mean
from runner.files import write_whole


class _RunCheckpoint(ModelCheckpoint):
    """A checkpoint of fixed name in a run's folder, which may be moved between two sessions."""

    def __init__(self, filename: str, **kwargs):
        super().__init__(filename=filename, save_top_k=1, enable_version_counter=False, **kwargs)

    @property
    def state_key(self) -> str:
        """The class's name; Lightning's own puts five arguments together, and asks for it several times a step."""
        return type(self).__name__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state, with its paths in the folder as it is called now.

        With another `dirpath` Lightning forgets the best score; and a best.ckpt that it knows under another path, one
        relative and one absolute, it takes for an older one, and deletes the file.
        """
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        here = {key: self._here(state_dict[key]) for key in paths}
        best = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **here, "best_k_models": best, "dirpath": self.dirpath})

    def _here(self, path: str) -> str:
        return os.path.join(self.dirpath, os.path.basename(path)) if path else path


class BestCheckpoint(_RunCheckpoint):
    """Keeps `best.ckpt`: the epoch with the best `monitor`.

    Both arguments are required: without `monitor`, Lightning's "best" silently means "latest"; and its default
    `mode` would keep the worst accuracy.

    Args:
        monitor: name of a logged metric, such as `val/acc`.
        mode: whether more of it is better, or less.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"]):
        super().__init__("best", monitor=monitor, mode=mode)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if it is the best.

        Raises:
            InputError: what is to be monitored was not logged in the epoch. Of `train/` metrics the rehearsal cannot tell.
        """
        plateaus = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
        for key, name in (
            ("checkpoint.monitor", self.monitor),
            *(("lr_scheduler.monitor", c.monitor) for c in plateaus),
        ):
            if name.startswith("train/"):
                check_logged(key, name, trainer)
        super().on_train_epoch_end(trainer, pl_module)


def check_logged(key: str, name: str, trainer: Trainer) -> None:
    """Raise InputError if nothing was logged under the name that `key` gives."""
    if name not in trainer.callback_metrics:
        raise InputError(f"{key}: {name!r} is never logged{did_you_mean(name, trainer.callback_metrics)}")


class LastCheckpoint(_RunCheckpoint):
    """Keeps `last.ckpt`: the last finished epoch. (`save_last=True` would save it only when the best improves.)

    Two things go with it that Lightning's checkpoints lack, for a resumed run to end in the same bits. It steps a
    ReduceLROnPlateau after the epoch's checkpoint is written, and not again when the run is resumed from it: so the
    metric is noted, and the step is made up for. And it does not tell that an EarlyStopping had ended the run.
    """

    def __init__(self):
        super().__init__("last", save_on_train_epoch_end=True)
        self.missed: dict[str, float] = {}
        self.stopped = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless `max_steps` ended the epoch before its last batch: it could not be gone on with from there."""
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches:
            super().on_train_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what the plateau schedulers are about to look at, and whether this is the end."""
        epochs = trainer.current_epoch + 1
        plateaus = [c for c in trainer.lr_scheduler_configs if c.reduce_on_plateau and epochs % c.frequency == 0]
        metrics = trainer.callback_metrics
        checkpoint["stopped"] = trainer.should_stop
        checkpoint["plateau"] = {c.monitor: float(metrics[c.monitor]) for c in plateaus if c.monitor in metrics}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the notes."""
        self.missed, self.stopped = checkpoint.get("plateau", {}), checkpoint.get("stopped", False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for the step between the checkpoint and the next epoch.

        Raises:
            InputError: `max_steps` would end training before there is anything to save.
        """
        super().on_train_start(trainer, pl_module)
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if 0 < trainer.max_steps < steps:
            raise InputError(
                f"trainer.max_steps {trainer.max_steps} ends before the first epoch ({steps} steps) and its checkpoint; "
                "for shorter epochs: --trainer.limit_train_batches"
            )
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor in self.missed:
                config.scheduler.step(self.missed[config.monitor])
        self.missed = {}
        trainer.should_stop = trainer.should_stop or self.stopped


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and keeps the `last.ckpt` that was there as `previous.ckpt`.

    (Lightning writes its temporary file to the system's folder for them, and a move from there to another disk is a
    copy: it can be cut short.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options: Any | None = None) -> None:
        """Save; raises OSError if the disk is full."""
        content = io.BytesIO()  # torch.save into a full disk dies of an error of its own, which does not say so
        torch.save(checkpoint, content)
        path = Path(path)
        write_whole(
            path, content.getbuffer(), keep=path.with_name("previous.ckpt") if path.name == "last.ckpt" else None
        )
