"""Files that a run writes: on disk whole, or as they were before; and what is in them."""

import os
from pathlib import Path

import yaml

from runner.errors import InputError, one_line


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write under a temporary name in the same folder, then move it over the old file.

    A full disk, a power cut or a `kill -9` leaves the old one as it was.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_yaml(path: Path) -> object:
    """Return what a YAML file holds.

    Raises:
        InputError: it cannot be read, or is not YAML; names file and line.
    """
    try:
        return yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{path}:{mark.line + 1}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a 30th of February
        raise InputError(f"{path}: not YAML: {one_line(error)}") from None


def flat(config: object, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    values = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return values
