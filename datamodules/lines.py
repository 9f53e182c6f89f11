"""A line with noise, y = slope * x + intercept + noise * N(0, 1), by way of a CSV file; or any two-column CSV of yours.

Shapes: B batch; inputs (B, 1) and targets (B, 1), kept in float64.

Source: lecture on linear regression.
"""

import csv
import io
from pathlib import Path

import numpy as np
import torch

from datamodules.csv_rows import finite_number, is_name, read_rows
from datamodules.files import data_dir
from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from runner.errors import InputError, did_you_mean
from runner.files import write_whole


class Line(InMemoryDataModule):
    """The first rows of the file train, the others test. There is no validation set: the lecture has none.

    Args:
        file: a CSV file with two columns or more, with or without names in its first line; comma, semicolon or tab
            between them. None draws the points, writes them below `DATA_DIR` (default: `data`), and reads them back.
        columns: the names of the input's and the target's column; None takes the first two.
        slope, intercept, noise, points, seed: of the line that is drawn: `np.random.seed(seed)`, then x from
            `np.random.rand(points)`, and noise times `np.random.randn(points)`.
        train_share: of the rows, to train on.
        batch_size: points in a training batch; None takes them all, as gradient descent does.
    """

    def __init__(
        self,
        file: str | None = None,
        columns: tuple[str, str] | None = None,
        slope: float = 2.0,
        intercept: float = 3.0,
        noise: float = 1.0,
        points: int = 100,
        seed: int = 0,
        train_share: float = 0.8,
        batch_size: int | None = None,
    ):
        super().__init__(1 if batch_size is None else batch_size)
        if not 0 < train_share < 1:
            raise InputError(f"train_share must be between 0 and 1, got {train_share}")
        if points < 2:
            raise InputError(f"points: one to train and one to test at least, got {points}")
        self.file, self.columns, self.full_batch = file, columns, batch_size is None
        self.slope, self.intercept, self.noise, self.points, self.seed = slope, intercept, noise, points, seed
        self.train_share = train_share
        if not np.isfinite([slope, intercept, noise]).all():
            raise InputError(f"slope, intercept and noise must be numbers, got {slope}, {intercept} and {noise}")
        self.law = None if file else lambda x: slope * x + intercept

    @property
    def path(self) -> Path:
        """The file that is read."""
        name = f"{self.slope!r}x{self.intercept:+}_noise{self.noise!r}_n{self.points}_seed{self.seed}.csv"
        return Path(self.file) if self.file else data_dir() / "lines" / name

    def prepare_data(self) -> None:
        """Draw the points and write the file, if there is none.

        Raises:
            InputError: it cannot be written.
        """
        if self.file or self.path.exists():
            return
        random = np.random.RandomState(self.seed)  # the same numbers as np.random.seed, and no other state touched
        x = random.rand(self.points)
        y = self.slope * x + self.intercept + self.noise * random.randn(self.points)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("x", "y"), *zip(x.tolist(), y.tolist(), strict=True)])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, text.getvalue().encode())
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; set DATA_DIR to a folder that you can write to"
            ) from None

    def setup(self, stage: str | None = None) -> None:
        """Read the file.

        Raises:
            InputError: it does not exist, or is no table of numbers; names the line.
        """
        if self.train_set is not None:
            return
        table = torch.tensor(read_columns(self.path, self.columns), dtype=torch.float64)  # (N, 2)
        x, y = table.split(1, dim=1)  # (N, 1), (N, 1)
        n = round(self.train_share * len(table))
        if not 0 < n < len(table):
            raise InputError(
                f"{self.path} has {len(table)} row(s): train_share {self.train_share} of them leaves none to "
                f"{'test' if n else 'train'}"
            )
        if self.full_batch:
            self.batch_size = n
        self.test_set = InMemoryDataset(x[n:], y[n:])
        self.train_set = InMemoryDataset(x[:n], y[:n])
        self.source = f"rows of {self.path}"


def read_columns(path: Path, columns: tuple[str, str] | None = None) -> list[tuple[float, float]]:
    """Read two columns of numbers from a CSV file: those named, or the first two.

    Raises:
        InputError: no such file or column, no rows, or what is no finite number; names file and line.
    """
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path}:1: no rows: expected two columns of numbers")

    first, names = rows[0]
    has_names = bool(columns) or all(map(is_name, names))
    for column in columns or ():
        if names.count(column) != 1:
            why = f"{names.count(column)} columns {column!r}" if column in names else f"no column {column!r}"
            raise InputError(f"{path}:{first}: {why} in its first line{did_you_mean(column, names)}")
    if columns and columns[0] == columns[1]:
        raise InputError(f"columns: the input's and the target's, two different ones, got {list(columns)}")
    indices = [names.index(column) for column in columns] if columns else [0, 1]
    if has_names and len(rows) == 1:
        raise InputError(f"{path}:{first}: no rows below the names of the columns")
    return [tuple(_number(path, line, row, i) for i in indices) for line, row in rows[has_names:]]


def _number(path: Path, line: int, row: list[str], i: int) -> float:
    if i >= len(row):
        raise InputError(f"{path}:{line}: column {i + 1} is missing: expected two numbers, got {','.join(row)!r}")
    return finite_number(row[i], f"{path}:{line}", i + 1)
