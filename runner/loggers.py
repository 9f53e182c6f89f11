"""The two loggers of a run: `metrics.csv` in its folder, and Weights & Biases."""

import csv
import io
from pathlib import Path

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from runner.errors import InputError, one_line
from runner.files import write_whole
from runner.history import COLUMNS, read_history


class History(Logger):
    """Appends to `metrics.csv` in `folder`."""

    def __init__(self, folder: Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.save_dir_ = str(folder)

    @property
    def name(self) -> str:
        """Name, for Lightning."""
        return "history"

    @property
    def version(self) -> str:
        """Empty, so that the progress bar shows none."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return self.save_dir_

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        """Nothing to hold open: a row is on disk once it is logged."""

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Do nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row for each metric."""
        metrics = dict(metrics)
        epoch = int(metrics.pop("epoch", 0))
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            writer.writerows((step, epoch, name, repr(float(value))) for name, value in metrics.items())

    def forget_from(self, step: int) -> None:
        """Drop rows of `step` and later: a run that is resumed from a checkpoint makes them again."""
        if not self.path.exists():
            return
        rows = [row for row in read_history(self.path) if row["step"] < step]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((r["step"], r["epoch"], r["metric"], repr(r["value"])) for r in rows)
        write_whole(self.path, text.getvalue().encode())


class RunWandbLogger(WandbLogger):
    """WandbLogger whose x axis is the step.

    Lightning logs the step as a value among others, and wandb counts calls: curves of runs that log at different
    moments would not line up where only wandb's own step is looked at, as `wandb leet` does.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._wandb_init.pop("anonymous")  # Lightning passes it always, and wandb warns that it has no effect
        self.last_step = 0

    @property
    def is_started(self) -> bool:
        """Whether wandb has been told of the run."""
        return self._experiment is not None

    @property
    def experiment(self):
        """wandb's run; without a network it is kept offline."""
        import wandb

        if self._experiment is None:
            # what it prints at the start and the end, train.py says in its own words
            self._wandb_init["settings"] = wandb.Settings(silent=True, init_timeout=30)
            try:
                return super().experiment
            except wandb.errors.CommError as error:
                print(f"W&B: cannot be reached ({one_line(error)}): this run is kept offline")
                self._wandb_init["mode"] = "offline"
            except ValueError as error:  # of its settings, such as a WANDB_BASE_URL that is none
                raise InputError(f"W&B: {one_line(error)}") from None
        return super().experiment

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send metrics; wandb would drop what is logged for an earlier step."""
        self.last_step = max(self.last_step, step or 0)
        self.experiment.log({**metrics, "trainer/global_step": self.last_step}, step=self.last_step)
