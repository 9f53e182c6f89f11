"""A mistake of the user's is one line that says what to do. This module knows how to write that line."""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """What was given cannot be used. `train.py` prints `error: <message>` and exits with code 2."""


class DamagedError(InputError):
    """A file is not what it was when it was written."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest of `names`, else all of them if they are few, else nothing."""
    names = sorted(set(names))
    # "sizes" is as good as "model.init_args.sizes": compare what stands after the last dot, too
    by_end = {n.rsplit(".", 1)[-1].lower(): n for n in names} | {n.lower(): n for n in names}
    for asked in (name, name.rsplit(".", 1)[-1]):
        if close := difflib.get_close_matches(asked.lower(), by_end, n=1, cutoff=0.6):
            return f"; did you mean {by_end[close[0]]!r}?"
    return f"; there are: {', '.join(names)}" if 0 < len(names) <= 12 else ""


def existing_file(path: str | Path, what: str, suffix: str) -> Path:
    """Return `path` as a Path.

    Raises:
        InputError: there is no such file; names the nearest `*<suffix>` beside it.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise InputError(f"{what} {str(path)[:100]} cannot be read: {error.strerror}") from None
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder, not a file{_files_in(path, suffix)}")
    folder = path.parent if path.parent.is_dir() else Path(".")
    hint = did_you_mean(path.name, (p.name for p in folder.glob(f"*{suffix}")))
    where = "" if folder == path.parent else f" (nor is there a folder {path.parent})"
    raise InputError(f"{what} {path} does not exist{where}{hint}")


def _files_in(folder: Path, suffix: str) -> str:
    names = sorted(p.name for p in folder.glob(f"*{suffix}"))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"; in it: {', '.join(names[:5])}{more}" if names else ""


def one_line(text: object) -> str:
    """Fold a message to a single line."""
    return " ".join(str(text).split())
