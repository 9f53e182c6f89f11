"""A line of the doctor's report, and how it is shown to anybody."""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import os
import re
import textwrap
from typing import NamedTuple

MARKS = {"": " ", "note": "!", "wrong": "x"}


class Line(NamedTuple):
    """What there is, and whether it is bad."""

    name: str  # what it is about
    text: str
    level: str = ""  # "wrong" if it would stop a run, "note" if it is worth knowing
    advice: str = ""  # what to do about it


def shown(line: Line, before: Line | None = None) -> str:
    """Return the line as it is printed, with the advice below it; what is about the same as the one before has no name."""
    name = "" if before and line.name == before.name and not line.level else line.name
    indents = {"initial_indent": f"{MARKS[line.level]} {name:9} ", "subsequent_indent": " " * 12}
    text = textwrap.fill(without_secrets(line.text), 120, break_on_hyphens=False, break_long_words=False, **indents)
    return text + (f"\n            -> {without_secrets(line.advice)}" if line.advice else "")


def without_secrets(text: str) -> str:
    """Return a text without keys, and without users' names in paths."""
    for key, value in os.environ.items():
        if re.search(r"KEY|TOKEN|SECRET|PASS", key) and len(value) >= 6:
            text = text.replace(value, "***")
    text = re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)  # a password in an address
    home = re.escape(os.path.expanduser("~"))
    text = re.sub(rf"{home}(?![\w.-])", "~", text) if len(home) > 1 else text
    return re.sub(r"([/\\](?:home|Users)[/\\])[^/\\\s:,;)']+", r"\1<user>", text)  # another's, as with sudo


def bytes_text(n: float) -> str:
    """Return a number of bytes as a person reads it: 1,234,567 is 1.2 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {unit}" if n < 10 * size else f"{n / size:,.0f} {unit}"
    return f"{n / 1e3:.0f} kB"
