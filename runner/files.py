"""Files that a run writes: on disk whole, or as they were before; and what is in them."""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import contextlib
import json
import os
import re
import textwrap
from itertools import groupby
from pathlib import Path

from runner.errors import InputError, one_line

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")  # in any case


def write_whole(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Write under a temporary name in the same folder, then move it over the old file.

    A full disk, a power cut or a `kill -9` leaves the old one as it was.

    Args:
        path: the file.
        content: all that shall be in it.
        keep: a name that the old file keeps, rather than being overwritten.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            _keep(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _keep(path: Path, keep: Path) -> None:
    """Give a file another name, too: whatever stops this process, there is one by the first name at every moment."""
    second = keep.with_name(f".{keep.name}.tmp")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:  # a disk on which a file has one name only
        os.replace(path, keep)
        return
    try:
        os.replace(second, keep)
    finally:
        second.unlink(missing_ok=True)  # it stays also where both were one file already


def remove_temporaries(folder: Path) -> None:
    """Remove what `write_whole` left of files that a process was writing when it was killed."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink()


def read_yaml(path: Path) -> object:
    """Return what a YAML file holds.

    Raises:
        InputError: it cannot be read, or is not YAML; names file and line.
    """
    import yaml  # only here: --doctor runs without it, and says that it is missing

    try:
        return yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{path}:{mark.line + 1}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a 30th of February
        raise InputError(f"{path}: not YAML: {one_line(error)}") from None


def read_json_lines(path: Path, needed: set[str]) -> list[dict]:
    """Return the objects of a file with one a line; what lacks a key that is needed is left out, as a line cut short is."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.keys() >= needed:
                records.append(record)
    return records


def list_yaml(folder: Path, words: str = "") -> str:
    """Return a line for each YAML file: its name, and the first line of what stands in it; of those with all `words`."""
    lines = {p.name: p.read_text().partition("\n")[0].lstrip("# ") for p in sorted(folder.glob("*.yaml"))}
    lines = {n: line for n, line in lines.items() if all(w in f"{n} {line}".lower() for w in words.lower().split())}
    width = max(map(len, lines), default=0) + 2
    return "\n".join(f"  {name:{width}}{line}" for name, line in lines.items())


def list_yaml_names(folder: Path) -> str:
    """Return the names of the YAML files, a paragraph for those that begin with the same word."""
    names = sorted(p.stem.split("_") for p in folder.glob("*.yaml"))
    groups = ("  ".join("_".join(name) for name in group) for _, group in groupby(names, key=lambda name: name[0]))
    indents = {"initial_indent": "  ", "subsequent_indent": "      "}
    return "\n".join(textwrap.fill(group, 100, break_on_hyphens=False, **indents) for group in groups)


def files_below(folder: Path | str) -> list[Path]:
    """Return the files in and below a folder, through links, each folder once; what is hidden is left out.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    files, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = [n for n in folders if n[0] != "." and os.path.realpath(os.path.join(root, n)) not in seen]
        files += [Path(root, name) for name in names if name[0] != "."]
    return files


def printed_run(output: str) -> str | None:
    """Return the run's folder that train.py has printed, None if it has not got so far."""
    folders = re.findall(r"^run {2,}(.*\S)", output, flags=re.M)
    return folders[-1] if folders else None


def flat(config: object, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    values = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return values
