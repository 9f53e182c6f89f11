"""A series of numbers in time, to forecast: noisy sums of sines made by code, or a column of any CSV file.

The series made here is a sum of sines whose frequencies wander slowly around their own, each with its own pace, pressed
flat where it is large, with noise on top:

    speed_k(t) = 2 pi / period_k * (1 + wander * sin(2 pi t / (10 period_k) + b_k))
    y(t) = tanh(gain * sum_k sin(speed_k(1) + ... + speed_k(t) + a_k)) + noise * N(0, 1)

Pure sines would be no task for a network: each follows from its two last values, by a linear formula. With frequencies
that wander, the formula must change with them; and where the sum is pressed flat, what comes next is told by how long it
has been so. Both are in the context, but not in a linear combination of it.

Shapes: B batch, T context, H horizon, N values of a part; inputs (B, T) and targets (B, H), float32.

Source: lecture on time series with LSTM.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.csv_rows import finite_number, is_name, read_rows
from datamodules.files import data_dir
from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from runner.errors import InputError, did_you_mean


class Series(InMemoryDataModule):
    """Windows of a series: `context` values, and the `horizon` values that come next.

    The first part of the series trains, the next validates, the last tests: what comes later has no part in what is
    learnt, and no window reaches from one part into another. All are normalised by the mean and the standard deviation
    of the training part, so errors are in its standard deviations, and to predict its mean costs about 1.

    Args:
        file: a CSV file; tab, semicolon or comma between its columns, and decimals behind a point. A relative one that is not there is looked for
            below `DATA_DIR`. None makes the series by code.
        column: of the file: its name in the first line, or its place, counted from 1; None: the last one. What stands in
            the other columns is not looked at, and the rows are taken to be in the order of time.
        context: T.
        horizon: H.
        length: values of the series that is made.
        periods, wander, gain, noise: of the series that is made; the formula is in this file's docstring.
        data_seed: of the series that is made; the run's seed does not change it.
        val_share, test_share: of the series, to validate and to test on.
        batch_size: windows in a training batch.
        eval_batch_size: windows in a batch of validation and test.
    """

    def __init__(
        self,
        file: str | None = None,
        column: int | str | None = None,
        context: int = 48,
        horizon: int = 1,
        length: int = 8000,
        periods: tuple[float, ...] = (23.0, 41.0),
        wander: float = 0.3,
        gain: float = 2.0,
        noise: float = 0.05,
        data_seed: int = 0,
        val_share: float = 0.15,
        test_share: float = 0.15,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
    ):
        super().__init__(batch_size, eval_batch_size)
        if context < 1 or horizon < 1:
            raise InputError(f"context and horizon: one value at least, got {context} and {horizon}")
        if min(val_share, test_share) <= 0 or val_share + test_share >= 1:
            raise InputError(f"val_share and test_share must leave some to train on, got {val_share} and {test_share}")
        if length < 1 or not periods or not np.isfinite([*periods, wander, gain, noise]).all():
            raise InputError("length starts at 1, there must be a period, and periods, wander, gain, noise be numbers")
        if min(periods) < 2 or noise < 0:
            raise InputError("periods are of two steps at least, and noise is not below 0")
        if column is not None and not file:
            raise InputError("column is one of a file: name the file, too")
        self.file, self.column, self.context, self.horizon = file, column, context, horizon
        self.length, self.periods, self.wander, self.gain, self.noise = length, periods, wander, gain, noise
        self.data_seed, self.val_share, self.test_share = data_seed, val_share, test_share

    def setup(self, stage: str | None = None) -> None:
        """Read or make the series, part it, and normalise it.

        Raises:
            InputError: the file has no such column, or no numbers in it; a part is too short for one window.
        """
        if self.train_set is not None:
            return
        if self.file:
            path = Path(self.file).expanduser()
            path = path if path.exists() or path.is_absolute() else data_dir() / path
            values, name = read_column(path, self.column)
            what = str(path)
            self.source = f"column {name} of {path}"
        else:
            values, what = self.make(), "the series"
            self.source = f"tanh of {len(self.periods)} sines that wander, data_seed {self.data_seed}"
        series = np.asarray(values)  # float64
        n, window = len(series), self.context + self.horizon
        train, test = n - round(n * (self.val_share + self.test_share)), n - round(n * self.test_share)
        parts = {"train": series[:train], "val": series[train:test], "test": series[test:]}
        for name, part in parts.items():
            if len(part) < window:
                raise InputError(
                    f"{what} has {n:,} value(s), and {len(part):,} of them are to {name}: too short for one window of "
                    f"context {self.context} and horizon {self.horizon}"
                )
        self.mean, self.std = float(parts["train"].mean()), float(parts["train"].std())
        if not self.std > 1e-12 * abs(self.mean):
            raise InputError(f"{what} is {self.mean:g} in all that is to train: there is nothing to forecast")
        sets = {name: self._windows(torch.from_numpy((part - self.mean) / self.std)) for name, part in parts.items()}
        self.val_set, self.test_set, self.train_set = sets["val"], sets["test"], sets["train"]

    def make(self) -> np.ndarray:
        """Return the series (length,) of this file's docstring."""
        random = np.random.default_rng(self.data_seed)
        t = np.arange(1, self.length + 1)
        total = np.zeros(self.length)
        for period in self.periods:
            a, b = random.uniform(0, 2 * np.pi, 2)
            speed = 2 * np.pi / period * (1 + self.wander * np.sin(2 * np.pi * t / (10 * period) + b))
            total += np.sin(np.cumsum(speed) + a)
        return np.tanh(self.gain * total) + self.noise * random.standard_normal(self.length)

    def baselines(self) -> dict[str, float]:
        """Return the mean squared errors on the test part, in the units of the model's, of what needs no network.

        `persistence`: tomorrow is like today. `linear`: the linear autoregression on the same context, with an
        intercept, that is best in the training part: least squares.
        """
        train_x, train_y = (t.double() for t in self.train_set.tensors)
        test_x, test_y = (t.double() for t in self.test_set.tensors)
        # gelsd copes with contexts that depend on one another, as those of a series that is periodic to the last bit
        weights = torch.linalg.lstsq(_with_one(train_x), train_y, driver="gelsd").solution  # (T + 1, H)
        guesses = {"persistence": test_x[:, -1:], "linear": _with_one(test_x) @ weights}
        return {name: float((guess - test_y).square().mean()) for name, guess in guesses.items()}

    def _windows(self, part: Tensor) -> InMemoryDataset:
        windows = part.float().unfold(0, self.context + self.horizon, 1)  # (N,) -> (N - T - H + 1, T + H): a view
        return InMemoryDataset(windows[:, : self.context], windows[:, self.context :])


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # (N, T) -> (N, T + 1)


def read_column(path: Path, column: int | str | None = None) -> tuple[list[float], str]:
    """Read a column of numbers from a CSV file.

    Args:
        path: the file. Its first line may tell the columns' names: it does if it has no number in this column.
        column: its name, or its place, counted from 1; None: the last one.

    Returns:
        The numbers, and the column's name, or its place where it has none.

    Raises:
        InputError: no such file or column, no rows, or what is no finite number; names file and line.
    """
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path} has no rows: expected a column of numbers")

    first, names = rows[0]
    if column is None or (isinstance(column, int) and 1 <= column <= len(names)):
        place = len(names) - 1 if column is None else column - 1
        has_names = is_name(names[place])
    elif str(column) in names:  # a name that is a number, such as a year, comes as an int, too
        place, has_names = names.index(str(column)), True
    else:
        hint = did_you_mean(str(column), [*names, *map(str, range(1, len(names) + 1))])
        raise InputError(f"{path}:{first}: no column {column!r} among its {len(names)}{hint}")
    cells = ((line, row[place] if place < len(row) else "") for line, row in rows[has_names:])
    values = [finite_number(cell, f"{path}:{line}", place + 1) for line, cell in cells]
    if not values:
        raise InputError(f"{path}:{first}: no rows below the names of the columns")
    return values, names[place] if has_names else str(place + 1)
