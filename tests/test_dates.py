"""Dates: every written form says its date, and the sets have nothing in common."""

import random
import re
from datetime import date

import pytest
import torch

from datamodules.dates import MONTHS, WEEKDAYS, Dates, write_date
from datamodules.vocabulary import PAD
from runner.errors import InputError


def small(**arguments):
    data = Dates(**{"train": 300, "val": 40, "test": 50} | arguments)
    data.setup()
    return data


def texts(data, dataset):
    """The pairs of a set as they are read."""
    sources, targets = dataset.tensors
    return [
        (data.source_vocabulary.decode(source), data.target_vocabulary.decode(target))
        for source, target in zip(sources, targets, strict=True)
    ]


def read_by_rule(text: str) -> date:
    """Read a written form, with what the docstring of `write_date` says and nothing else."""
    text = text.lower()
    if match := re.fullmatch(r"(\d+)/(\d+)/(\d{4})", text):
        return date(int(match[3]), int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+)\.(\d+)\.(\d{4})", text):
        return date(int(match[3]), int(match[2]), int(match[1]))
    if match := re.fullmatch(r"(\d{4})([-/. ])(\d+)\2(\d+)", text):
        return date(int(match[1]), int(match[3]), int(match[4]))
    words = re.findall(r"[a-z]+|\d+", text)
    weekdays = [w for w in words if len(w) >= 3 and any(day.lower().startswith(w) for day in WEEKDAYS)]
    months = [i for w in words for i, name in enumerate(MONTHS, 1) if len(w) >= 3 and name.lower().startswith(w)]
    (year,), (day,) = ([int(w) for w in words if w.isdigit() and (len(w) == 4) is four] for four in (True, False))
    (month,) = months
    found = date(year, month, day)
    assert len(weekdays) <= 1
    assert all(WEEKDAYS[found.weekday()].lower().startswith(w) for w in weekdays)
    suffixes = re.findall(r"\d(st|nd|rd|th)", text)
    assert all(
        s == ("th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")) for s in suffixes
    )
    return found


def test_every_form_says_its_date_and_no_other():
    rng = random.Random(1)
    for _ in range(4000):
        day = date.fromordinal(rng.randrange(date(1900, 1, 1).toordinal(), date(2099, 12, 31).toordinal() + 1))
        assert read_by_rule(write_date(day, rng)) == day


def test_forms_are_many():
    day, rng = date(2001, 9, 3), random.Random(0)
    forms = {write_date(day, rng) for _ in range(20_000)}
    assert len(forms) > 500
    for form in ("9/3/2001", "3.9.2001", "2001-9-03", "2001 09 03", "September 3, 2001", "3RD SEPT 2001", "3-sep-2001"):
        assert form in forms
    assert any(form.startswith("Mon., the 3rd of Sep") for form in forms)
    assert sum(form[0].isalpha() for form in forms) > 100


def test_pairs_are_dates_from_1900_to_2099_with_start_end_and_padding():
    data = small()
    assert data.sizes == {"train": 300, "val": 40, "test": 50}
    sources, targets = data.train_set.tensors
    assert targets.shape == (300, 12)
    assert (targets[:, 0] == data.target_vocabulary.start).all()
    assert (targets[:, -1] == data.target_vocabulary.end).all()
    assert (sources[:, 0] != PAD).all()
    assert (sources[:, -1] == PAD).any()
    assert (sources[:, -1] != PAD).any()  # no column of PAD only
    for text, target in texts(data, data.train_set):
        assert read_by_rule(text) == date.fromisoformat(target)
        assert 1900 <= date.fromisoformat(target).year <= 2099


def test_no_date_and_no_form_is_in_two_sets():
    data = small(train=3000, val=500, test=500)
    sets = [texts(data, dataset) for dataset in (data.train_set, data.val_set, data.test_set)]
    for i in range(2):  # forms, dates
        parts = [{pair[i] for pair in pairs} for pairs in sets]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 4000


def test_more_training_dates_change_neither_the_others_nor_the_test():
    few, many = small(train=100), small(train=300)
    assert texts(few, few.test_set) == texts(many, many.test_set)
    assert texts(few, few.val_set) == texts(many, many.val_set)
    assert texts(few, few.train_set) == texts(many, many.train_set)[:100]


def test_the_seed_of_the_data_alone_decides(monkeypatch):
    one = small()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    torch.manual_seed(7)
    random.seed(7)
    assert small().fingerprint == one.fingerprint
    assert small(data_seed=1).fingerprint != one.fingerprint
    one.setup()  # twice
    assert small().fingerprint == one.fingerprint


def test_todays_dates_will_be_tomorrows():
    """Forms and sets are part of what is measured: they must not change with a version of a library, or by accident."""
    data = small(train=3, val=1, test=2)
    assert texts(data, data.train_set) == PAIRS


PAIRS = [("30.01.1939", "1939-01-30"), ("FRI. 17 NOVEMBER, 1905", "1905-11-17"), ("friday 30 oct, 2082", "2082-10-30")]


def test_a_line_of_ones_own():
    data = Dates()
    tokens = data.read_line("  Tuesday, May 3rd 1979\n")
    assert tokens.dtype == torch.int64
    assert data.source_vocabulary.decode(tokens) == "Tuesday, May 3rd 1979"
    with pytest.raises(InputError, match=r"the character .ä. in .3\. März 1979. is not known"):
        data.read_line("3. März 1979")
    for empty in ("", " \n"):
        with pytest.raises(InputError, match="an empty line is no date"):
            data.read_line(empty)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"train": 0}, "at least one date each, got 0, 1000 and 2000"),
        ({"train": 73_000}, "there are 73,049 dates, got 76,000"),
        ({"data_seed": -1}, "data_seed must be 0 or more, got -1"),
        ({"batch_size": 0}, "batch sizes start at 1"),
    ],
)
def test_bad_arguments(arguments, line):
    with pytest.raises(InputError, match=line):
        Dates(**arguments)


def test_all_dates_there_are():
    data = Dates(train=73_049 - 2, val=1, test=1)
    assert sum(data.counts) == 73_049
