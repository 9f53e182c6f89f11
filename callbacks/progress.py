"""What a run says of itself as it goes: a line an epoch, Lightning's bar below it on a terminal, the learning rate."""

import time

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, TQDMProgressBar
from torch.optim import Optimizer

MOST_LINES = 20


class Bar(TQDMProgressBar):
    """Lightning's bar, which counts epochs from 1, as the lines above it do."""

    def __init__(self):
        super().__init__(refresh_rate=10)  # steps; drawing it after each would take as long as a small network's step

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        """Begin the epoch's bar."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict:
        """Return what stands behind the bar: not the id of wandb's run."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class LearningRate(LearningRateMonitor):
    """Lightning's monitor, which tells its loggers no epoch: metrics.csv has a column for it.

    Lightning logs a rate for each group of an optimiser's parameters. Where they have one rate, and began with one (so that a
    name does not come and go as schedules cross), as groups have that differ in their weight decay, it is logged once.
    """

    def _extract_stats(self, trainer: Trainer, interval: str) -> dict[str, float]:
        stats = super()._extract_stats(trainer, interval)
        return {**stats, "epoch": trainer.current_epoch} if stats else {}

    def _get_optimizer_stats(self, optimizer: Optimizer, names: list[str]) -> dict[str, float]:
        stats = super()._get_optimizer_stats(optimizer, names)
        rates = {(group["lr"], group.get("initial_lr")) for group in optimizer.param_groups}
        if len(names) > 1 and len(rates) == 1:
            return {names[0].rpartition("/")[0]: stats[names[0]]}  # train/lr/matrices -> train/lr
        return stats


class Progress(Callback):
    """Prints the epoch's metrics, of a run with many epochs about twenty of them, and measures the seconds of training.

    The seconds go with the checkpoint, so that a resumed run tells the whole. (One callback for both: Lightning calls
    each of them six times a step, which on a small network can be felt.)
    """

    seconds = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, or go on."""
        self.started = time.perf_counter() - self.seconds

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self.epoch_started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if not trainer.is_global_zero or (epoch % max(1, epochs // MOST_LINES) and epoch not in (1, epochs)):
            return
        metrics = "  ".join(f"{name} {short(float(value))}" for name, value in sorted(trainer.callback_metrics.items()))
        seconds = time.perf_counter() - self.epoch_started
        took = f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"
        of = f"/{epochs}" if epochs > 0 else ""  # none: until max_steps, or max_time
        line = f"epoch {epoch:>{len(str(max(epochs, 0)))}}{of}  {metrics}  {took}"
        if trainer.progress_bar_callback:
            trainer.progress_bar_callback.print(line)
        else:
            print(line, flush=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.started

    def state_dict(self) -> dict[str, float]:
        """Return the seconds until now."""
        return {"seconds": time.perf_counter() - self.started}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take over the seconds until the checkpoint."""
        self.seconds = state_dict["seconds"]
        self.started = time.perf_counter() - self.seconds


def short(value: float) -> str:
    """Return a metric as a person wants to read it: four decimals, or powers of ten where these would hide it."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"
