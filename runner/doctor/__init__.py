"""Look at this machine, and say what would stop a run: `python train.py --doctor`.

What it prints is what a bug report should contain, and nothing secret. Nothing is downloaded, no server is asked, nothing
is left behind. It must run where torch or another package is missing or broken, so none is imported in this process.
"""

from __future__ import annotations  # so that it runs on a Python that is too old, and says so

import sys
from collections.abc import Callable

from runner.doctor import data, environment, machine, packages
from runner.doctor.imports import try_imports
from runner.doctor.line import Line, shown
from runner.errors import one_line


def doctor() -> int:
    """Print the report; return 0 if all is right, 1 if something would stop a run."""
    print("looking, which takes some seconds ...", file=sys.stderr, flush=True)
    imported = try_imports(list(packages.wanted()))
    sections: list[Callable[[], list[Line]]] = [
        machine.code_and_system, environment.settings, packages.versions, packages.at_odds, packages.harmful,
        lambda: packages.broken(imported), lambda: machine.devices(imported), machine.memory,
        environment.wandb, environment.folders, data.places,
    ]  # fmt: skip
    lines = [line for section in sections for line in _looked(section)]
    for i, line in enumerate(lines):
        print(shown(line, lines[i - 1] if i else None))
    wrong = list(dict.fromkeys(line.name for line in lines if line.level == "wrong"))
    notes = sum(line.level == "note" for line in lines)
    if wrong:
        print(f"\nwrong: {', '.join(wrong)}: a run would stop; the lines marked x tell what to do")
    else:
        known = f" ({notes} to know of, marked !)" if notes else ""
        print(f"\nall right: nothing was found that would stop a run{known}")
    return 1 if wrong else 0


def _looked(section: Callable[[], list[Line]]) -> list[Line]:
    """A doctor that falls ill is no help: what could not be looked at is told, and the rest goes on."""
    try:
        return section()
    except Exception as error:
        return [Line("doctor", f"could not look at all: {type(error).__name__}: {one_line(error)[:200]}", "note")]
