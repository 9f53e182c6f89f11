"""One line an epoch, on a terminal above Lightning's bar, elsewhere (a file, a batch job) in its place."""

import time

from pytorch_lightning import Callback, LightningModule, Trainer

MOST_LINES = 20


class EpochLines(Callback):
    """Prints the epoch's metrics; of a run with many epochs, about twenty of them."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        every = max(1, epochs // MOST_LINES)
        if epoch % every and epoch not in (1, epochs) or not trainer.is_global_zero:
            return
        metrics = "  ".join(f"{k} {float(v):.4f}" for k, v in sorted(trainer.callback_metrics.items()))
        line = f"epoch {epoch:>{len(str(epochs))}}/{epochs}  {metrics}  {time.perf_counter() - self.start:.1f} s"
        if trainer.progress_bar_callback:
            trainer.progress_bar_callback.print(line)
        else:
            print(line, flush=True)
