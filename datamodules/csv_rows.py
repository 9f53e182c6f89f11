"""Rows and numbers of anyone's CSV file, or one line that names the file, the line in it, and what to do."""

import csv
import math
import re
from pathlib import Path

from runner.errors import InputError, existing_file

MARKS = "\t;,"  # between columns; the comma last, since beside another mark it is one of decimals


def read_rows(path: Path, what: str = "file") -> list[tuple[int, list[str]]]:
    """Return the cells of each row, without the space around them, and the line it begins on; empty rows are left out.

    Columns are parted by the first of tab, semicolon and comma that is in the first row outside of quotes.

    Args:
        path: the file, in UTF-8.
        what: what an error is to call it.

    Raises:
        InputError: it does not exist, or is no table.
    """
    path = existing_file(path, what, ".csv")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    head = re.sub(r'"[^"]*"', "", next((line for line in lines if line.strip()), ""))
    reader = csv.reader(lines, delimiter=next((mark for mark in MARKS if mark in head), ","))
    rows, line = [], 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((line, [cell.strip() for cell in row]))
            line = reader.line_num + 1  # a quoted cell can go over several lines
    except csv.Error as error:
        raise InputError(f"{path}:{line}: {error}") from None
    return rows


def is_name(cell: str) -> bool:
    """Return whether a cell of the first row names its column, and is no number, not even one with a decimal comma."""
    return _number(cell) is None and not _has_decimal_comma(cell)


def finite_number(cell: str, where: str, column: int | str) -> float:
    """Return the number that a cell is.

    Args:
        cell: what stands in it.
        where: file and line.
        column: its name, or its place, counted from 1.

    Raises:
        InputError: it is none, or not finite, or has a decimal comma, which may as well part thousands.
    """
    number = _number(cell)
    if number is not None and math.isfinite(number):
        return number
    hint = "" if number is None else ": drop the row, or fill it in"
    if _has_decimal_comma(cell):
        hint = ": write decimals behind a point"
    raise InputError(f"{where}: expected a number in column {column!r}, got {cell!r}{hint}")


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)  # 1_000 is Python's own
    except ValueError:
        return None


def _has_decimal_comma(cell: str) -> bool:
    return re.fullmatch(r"[+-]?\d+,\d+", cell) is not None
