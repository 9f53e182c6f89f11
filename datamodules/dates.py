"""Dates as people write them, and as a computer wants them (ISO 8601): "Tuesday, May 3rd 1979" -> "1979-05-03".

A small translation: letters in one order to digits in another, for which it helps to look at the right letters. All made
by code: no network, no file.

Shapes: N dates, S characters of the longest written form, T = 12: START, ten characters, END.

Source: the task is that of Andrew Ng's course "Sequence Models" (Coursera, 2018); forms and dates are our own.
"""

import random
from datetime import date

import numpy as np
import torch
from torch import Tensor

from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from datamodules.vocabulary import Vocabulary, pad
from runner.errors import InputError

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST, LAST = date(1900, 1, 1).toordinal(), date(2099, 12, 31).toordinal()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Dates(InMemoryDataModule):
    """Pairs of a written form and its ISO date, from 1900 to 2099.

    The three sets have no date in common, so that no written form is in two of them either: a model that learned dates by
    heart would know nothing of the test's. Which date is in which set, and how it is written, comes from `data_seed` only,
    and more training dates are the same ones and others.

    Batches are (sources (B, S), targets (B, T)), with PAD behind what is short.

    Args:
        train, val, test: how many dates.
        data_seed: of dates and forms; the run's seed does not change them.
        batch_size: dates in a training batch.
        eval_batch_size: dates in a batch of validation and test.
    """

    source_vocabulary = Vocabulary(" ,./-0123456789" + LETTERS.upper() + LETTERS)
    target_vocabulary = Vocabulary("-0123456789", ends=True)

    def __init__(
        self,
        train: int = 10_000,
        val: int = 1000,
        test: int = 2000,
        data_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 500,
    ):
        super().__init__(batch_size, eval_batch_size)
        if min(train, val, test) < 1:
            raise InputError(f"train, val, test: at least one date each, got {train}, {val} and {test}")
        if train + val + test > LAST - FIRST + 1:
            raise InputError(f"train, val, test: there are {LAST - FIRST + 1:,} dates, got {train + val + test:,}")
        if data_seed < 0:
            raise InputError(f"data_seed must be 0 or more, got {data_seed}")
        self.counts, self.data_seed = (train, val, test), data_seed
        self.source = f"dates from 1900 to 2099 in many forms, data_seed {data_seed}"

    def setup(self, stage: str | None = None) -> None:
        """Write the dates."""
        if self.train_set is not None:
            return
        days = np.random.default_rng(self.data_seed).permutation(np.arange(FIRST, LAST + 1)).tolist()
        train, val, test = self.counts
        self.test_set, self.val_set = self._pairs(days[:test]), self._pairs(days[test : test + val])
        self.train_set = self._pairs(days[test + val : test + val + train])

    def read_line(self, line: str) -> Tensor:
        """Return a written form as a source (S,). It needs no `setup`.

        Raises:
            InputError: there is nothing in it, or a character that no written form has; names it.
        """
        if not line.strip():
            raise InputError("an empty line is no date")
        return torch.tensor(self.source_vocabulary.encode(line.strip()))

    def _pairs(self, days: list[int]) -> InMemoryDataset:
        forms = [write_date(date.fromordinal(day), random.Random(f"{self.data_seed} {day}")) for day in days]
        targets = [self.target_vocabulary.encode(date.fromordinal(day).isoformat(), ends=True) for day in days]
        return InMemoryDataset(pad([self.source_vocabulary.encode(form) for form in forms]), pad(targets))


def write_date(day: date, rng: random.Random) -> str:
    """Write a date as somebody might.

    - With the month's name, whole or short (`Sept` and `Sep.`, too), in the orders day month year, month day year and
      year month day; the day as `3`, `03` or `3rd`; half of the time a weekday before it, whole or short; commas here and
      there, a space too many, `the 3rd of May`, hyphens; capital letters only, or none.
    - In digits, where what is between them tells the order: `5/3/1979` is month/day/year as in the USA, `3.5.1979` is
      day.month.year as in most of Europe, and what begins with the year goes on with the month: `1979/5/3`, `1979.5.3`,
      `1979-5-3`, `1979 5 3`.

    The year always has four digits: of two, nobody could tell the century.
    """

    def one_of(*choices: str) -> str:
        return choices[int(rng.random() * len(choices))]  # of Random's methods, only this will always give the same

    year, month, number = str(day.year), MONTHS[day.month - 1], str(day.day)
    if rng.random() < 0.3:
        m, d = (one_of("{}", "{:02d}").format(value) for value in (day.month, day.day))
        return one_of(f"{m}/{d}/{year}", f"{d}.{m}.{year}", f"{year}{(mark := one_of(*'/.- '))}{m}{mark}{d}")
    month = one_of(month, month, month[:3], month[:3] + "." * (month != "May"), month[: 4 if day.month == 9 else 3])
    last = "th" if number in ("11", "12", "13") else {"1": "st", "2": "nd", "3": "rd"}.get(number[-1], "th")
    ordinal = number + last
    number = one_of(number, number, number.zfill(2), ordinal)
    comma = one_of("", ",", ",", " ,")
    text = one_of(
        f"{number} {month}{comma} {year}",
        f"{month} {number}{comma} {year}",
        f"{year}{comma} {month} {number}",
        f"{number}-{month.rstrip('.')}-{year}",
        f"{one_of('the ', '')}{ordinal} of {month}{comma} {year}",
    )
    if rng.random() < 0.5:
        weekday = WEEKDAYS[day.weekday()]
        text = one_of(weekday, weekday[:3], weekday[:3] + ".") + one_of(" ", ", ") + text
    if rng.random() < 0.2:
        text = text.replace(" ", "  ", 1)
    return one_of(text, text, text.upper(), text.lower())
