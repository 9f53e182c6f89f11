"""`metrics.csv`: every metric that was logged, one a row, in the order it was logged.

    step,epoch,metric,value
    49,0,train/loss,0.5716

`step` counts batches that stepped, from 0; `epoch` from 0. One metric a row, so that a metric which first appears
late needs no rewriting of the file: rows are only ever appended. (Lightning's CSVLogger has a column for each
metric, rewrites the file for a new one, and deletes it when a folder is used again.) For a table with a column for each:
`pandas.read_csv("metrics.csv").pivot_table(index=["epoch", "step"], columns="metric", values="value")`.
"""

import csv
import io
from pathlib import Path

from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from runner.files import write_whole

COLUMNS = ("step", "epoch", "metric", "value")


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
        rows = [row for row in read_history(self.path) if row["step"] < step]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((r["step"], r["epoch"], r["metric"], repr(r["value"])) for r in rows)
        write_whole(self.path, text.getvalue().encode())


def read_history(path: Path) -> list[dict]:
    """Return the rows of a metrics.csv as dictionaries; a row cut short by a crash is left out."""
    if not Path(path).exists():
        return []
    rows = []
    with open(path, newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                rows.append(
                    {
                        "step": int(row["step"]),
                        "epoch": int(row["epoch"]),
                        "metric": row["metric"],
                        "value": float(row["value"]),
                    }
                )
            except (TypeError, ValueError):
                continue
    return rows
