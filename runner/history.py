"""`metrics.csv`: every metric that was logged, one a row, in the order it was logged.

    step,epoch,metric,value
    49,0,train/loss,0.5716

`step` counts batches that stepped, from 0; `epoch` from 0. One metric a row, so that a metric which first appears
late needs no rewriting of the file: rows are only ever appended. (Lightning's CSVLogger has a column for each
metric, rewrites the file for a new one, and deletes it when a folder is used again.) For a table with a column for each:
`pandas.read_csv("metrics.csv").pivot_table(index=["epoch", "step"], columns="metric", values="value")`.
"""

import contextlib
import csv
from pathlib import Path

COLUMNS = ("step", "epoch", "metric", "value")


def read_history(path: Path) -> list[dict]:
    """Return the rows of a metrics.csv as dictionaries; a row cut short by a crash is left out."""
    if not Path(path).exists():
        return []
    rows = []
    with (
        open(path, newline="", errors="replace") as file,
        contextlib.suppress(csv.Error),
    ):  # from there on it is no table
        for row in csv.DictReader(file):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                step, epoch = int(row["step"]), int(row["epoch"])
                if min(step, epoch) >= 0:
                    value = float(row["value"])
                    rows.append({"step": step, "epoch": epoch, "metric": row["metric"], "value": value})
    return rows
