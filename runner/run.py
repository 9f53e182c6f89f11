"""A run's folder, and the two loggers that write what happens in it.

runs/mnist_mlp/20261122-031023-s42-5coah8hx/    experiment / time - seed - id
  config.yaml   metrics.csv   best.ckpt   last.ckpt   previous.ckpt   receipt.json   pictures/
runs/wandb/                                     wandb's own files, all runs together
"""

import contextlib
import os
import secrets
import shlex
import shutil
import string
import sys
import time
from pathlib import Path

import yaml

from runner.account import PROJECT, wandb_mode
from runner.errors import InputError, one_line
from runner.files import remove_temporaries, write_whole
from runner.loggers import History, RunWandbLogger


class Run:
    """One run: where its files are, and where its metrics and pictures go.

    Args:
        folder: the run's folder, which exists: <root>/<experiment>/<time>-s<seed>-<id>.
    """

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder.parent.parent
        self.history = History(folder)
        self.wandb: RunWandbLogger | None = None

    @classmethod
    def create(cls, experiment: str, seed: int) -> "Run":
        """Make the folder of a new run, below `RUNS_DIR` (default: `runs`). The id tells apart what starts at once.

        Raises:
            InputError: the folder cannot be written.
        """
        root = Path(os.environ.get("RUNS_DIR") or "runs")
        run_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
        folder = root / experiment / f"{time.strftime('%Y%m%d-%H%M%S')}-s{seed}-{run_id}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(
                f"cannot write to the runs folder {root}: {error.strerror}; set RUNS_DIR to one that you can write to"
            ) from None
        return cls(folder)

    def begin(self, experiment, last: tuple[Path, dict] | None) -> None:
        """Write config.yaml and start the loggers; `last` is the checkpoint that the run goes on from, if it does."""
        remove_temporaries(self.folder)
        config = experiment.config_yaml()
        write_whole(self.folder / "config.yaml", config.encode())
        (self.folder / "receipt.json").unlink(missing_ok=True)
        step = 0
        if last:
            file, checkpoint = last
            os.replace(file, self.folder / "last.ckpt")  # where it is, if it is not previous.ckpt
            step = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        self.history.forget_from(step)  # what came after the checkpoint will come again
        self.wandb = RunWandbLogger(
            project=PROJECT,
            group=experiment.name,
            name=f"{experiment.name}-s{experiment.seed}",
            id=self.id,
            job_type="fit",
            tags=[experiment.model.tag],
            config=yaml.safe_load(config),
            save_dir=str(self.root),
            mode=wandb_mode(),
        )

    @property
    def id(self) -> str:
        """The id that ends the folder's name; wandb's id of the run, too."""
        return self.folder.name.rpartition("-")[2]

    @property
    def loggers(self) -> list:
        """For the Trainer."""
        return [self.history, *([self.wandb] if self.wandb else [])]

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Send metrics to both loggers, outside of a Trainer."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def save_picture(self, name: str, figure) -> None:
        """Write a matplotlib figure to `pictures/<name>.png`, and send it to wandb."""
        path = self.folder / "pictures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
        if self.wandb:
            self.wandb.log_image(f"pictures/{name}", [str(path)])

    def sync_command(self) -> str | None:
        """Return the command that sends a run made offline to Weights & Biases; None if there is nothing to send."""
        folders = sorted((self.root / "wandb").glob(f"offline-run-*-{self.id}"))
        return shlex.join(["wandb", "sync", *map(str, folders)]) if folders else None

    def finish(self, exit_code: int = 0) -> None:
        """End the run in wandb, so that everything is on disk or sent; not 0: it was stopped."""
        if self.wandb and self.wandb.is_started:
            try:
                self.wandb.experiment.finish(exit_code=exit_code)
            except Exception as error:  # the disk is full: what matters was said or is done
                if not exit_code:
                    print(f"warning: wandb's record of the run is incomplete: {one_line(error)}", file=sys.stderr)

    def discard(self) -> None:
        """Remove what a run that never began has left."""
        self.finish(exit_code=1)
        shutil.rmtree(self.folder)
        wandb = self.root / "wandb"
        for files in wandb.glob(f"*run-*-{self.id}"):
            shutil.rmtree(files)
        if not any(wandb.glob("*run-*-*")):  # only its logs, and a link to the run that is gone
            shutil.rmtree(wandb, ignore_errors=True)
        for folder in (self.folder.parent, self.root):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing else is in it
