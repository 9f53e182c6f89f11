"""A sweep's trials: the parameters and the command of each, and what has come of those that have ended."""

import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
from pathlib import Path

from runner.errors import InputError, did_you_mean, one_line
from runner.files import printed_run, read_json_lines
from runner.history import read_history
from sweeping.distributions import DISTRIBUTIONS
from sweeping.file import REPOSITORY, Sweep

MOST_VALUES = 10_000  # of one parameter in a grid
RECORD = {"index", "parameters", "state", "run", "metrics", "error", "seconds"}  # of a trial that has ended


def draw_trials(sweep: Sweep, seed: int, most: int | None) -> list[dict]:
    """Return each trial's parameters.

    In a grid the last key changes fastest. A random trial depends on the seed and its own number alone: it is the same
    after a restart, and however many there are.

    Raises:
        InputError: random without `most`, a range in a grid, or a distribution that has nothing to draw.
    """
    if sweep.method == "grid":
        choices = [_choices(sweep, key) for key in sweep.parameters]
        grid = itertools.islice(itertools.product(*choices), most)
        return [dict(zip(sweep.parameters, values, strict=True)) for values in grid]
    if most is None:
        raise InputError(f"{sweep.path}: method random has no end: give run_cap in the file, or --trials")
    sources = (random.Random(f"{seed} {index}") for index in range(1, most + 1))
    return [{key: _draw(sweep, key, source) for key in sweep.parameters} for source in sources]


def _choices(sweep: Sweep, key: str) -> list:
    match sweep.parameters[key]:
        case {"distribution": "constant", "value": value}:
            return [value]
        case {"distribution": "categorical", "values": values}:
            return values
        case {"distribution": "int_uniform", "min": low, "max": high}:
            if high - low >= MOST_VALUES:
                raise InputError(
                    f"{sweep.path}: parameter {key}: a grid of {high - low + 1:,} values; try method: random"
                )
            return list(range(low, high + 1))
        case {"distribution": name}:
            raise InputError(
                f"{sweep.path}: parameter {key}: {name} has no list of values: give one, or use method: random"
            )


def _draw(sweep: Sweep, key: str, source: random.Random) -> object:
    spec = dict(sweep.parameters[key])
    name = spec.pop("distribution")
    try:
        return DISTRIBUTIONS[name](source, **spec)
    except InputError as error:
        raise InputError(f"{sweep.path}: parameter {key}: {error}") from None
    except OverflowError:
        hint = "; it takes exponents, log_uniform_values the values" if name.endswith("log_uniform") else ""
        raise InputError(f"{sweep.path}: parameter {key}: too large for {name}{hint}") from None


def fill_command(sweep: Sweep, parameters: dict) -> list[str]:
    """Return a trial's command, wandb's macros filled in.

    Raises:
        InputError: there is a macro that is not known here, or no such command.
    """
    pairs = [f"{key}={as_word(value)}" for key, value in parameters.items()]
    macros = {
        "${env}": [],  # online it is /usr/bin/env
        "${interpreter}": [sys.executable],
        "${program}": [sweep.program],
        "${args}": [f"--{pair}" for pair in pairs],
        "${args_no_hyphens}": pairs,
        "${args_json}": [json.dumps(parameters, default=str)],
    }
    words = []
    for word in sweep.command:
        if word.startswith("${") and word not in macros:
            raise InputError(f"{sweep.path}: command: {word} is not supported here{did_you_mean(word, macros)}")
        if word == "${program}" and not sweep.program:
            raise InputError(f"{sweep.path}: the command names {word}, but there is no key program")
        words += macros.get(word, [word])
    if any("\0" in word for word in words):
        raise InputError(f"{sweep.path}: a value holds a zero byte, which no command line can")
    if words[:1] == ["python"]:
        words[0] = sys.executable  # online, whatever is called python; here, the one that has the packages
    if not words or not shutil.which(REPOSITORY / words[0] if "/" in words[0] else words[0]):
        raise InputError(f"{sweep.path}: command: there is no program {words[0] if words else ''!r}")
    return words


def as_word(value: object) -> str:
    """Return a value as it is written on the command line: a string as it is, else as JSON, which YAML contains."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def state_folder(sweep: Sweep, seed: int) -> Path:
    """Return the folder of what is known of a sweep; that of sweep.py says what makes it the same one."""
    digest = hashlib.sha256(f"{seed}\n".encode() + sweep.path.read_bytes())
    for word in sweep.command:
        if word.endswith(".yaml") and (REPOSITORY / word).is_file():
            digest.update((REPOSITORY / word).read_bytes())
    # a relative RUNS_DIR is below the repository, since the trials run there
    root = REPOSITORY / (os.environ.get("RUNS_DIR") or "runs")
    return root / "sweeps" / f"{sweep.path.stem}-{digest.hexdigest()[:8]}"


def read_records(path: Path) -> dict[int, dict]:
    """Return index -> record of the trials that have ended. A line cut short is left out: its trial runs again."""
    return {r["index"]: r for r in read_json_lines(path, RECORD) if isinstance(r["index"], int)}


def judge(log: Path, code: int, metric: str) -> dict:
    """Return what came of a trial: `state` (ok or failed), `run` (its folder), `metrics`, `error`.

    The folder is the one that the trial printed after the word "run". The metrics are those of its receipt.json and,
    from its metrics.csv, those of the epoch that was tested: a sweep should choose by what the validation set says.
    """
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    run = printed_run("\n".join(lines))
    result = {"state": "failed", "run": run, "metrics": {}, "error": None}
    if code:
        what = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        return result | {"error": ": ".join([what, *lines[-1:]])}
    if not run:
        return result | {"error": "it printed no line `run      FOLDER`"}
    folder = REPOSITORY / run
    try:
        receipt = json.loads((folder / "receipt.json").read_text())
        epoch = receipt.get("checkpoint", {}).get("epoch")
        metrics = {row["metric"]: row["value"] for row in read_history(folder / "metrics.csv") if row["epoch"] == epoch}
        metrics |= {name: float(value) for name, value in receipt["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return result | {"error": f"its receipt.json cannot be read: {one_line(error)}"}
    result["metrics"] = metrics
    if metric not in metrics:
        return result | {"error": f"metric {metric} is not in its receipt; there are: {', '.join(sorted(metrics))}"}
    if not math.isfinite(metrics[metric]):
        return result | {"error": f"{metric} is {metrics[metric]}"}
    return result | {"state": "ok"}
