"""Runs, read from their folders: what is broken, half-finished, foreign or empty is a record, too, with its problem."""

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from runner.errors import InputError, did_you_mean, one_line
from runner.files import flat
from runner.history import read_history

RUN_NAME = re.compile(r"\d{8}-\d{6}-s\d+-[a-z0-9]{8}")
FILES = ("receipt.json", "config.yaml", "metrics.csv", "last.ckpt")
NOT_RUNS = ("wandb", "sweeps", "judges")  # what else there is in a runs folder

# Where and how fast a run was made is no difference between experiments; nor is the seed, over which they are averaged.
NO_DIFFERENCE = re.compile(
    r"(seed_everything|experiment|trainer\.(accelerator|devices|num_nodes|strategy|enable_progress_bar|logger))(\.|$)"
)


@dataclass
class Record:
    """One run.

    Attributes:
        folder: the run's.
        experiment: the name it is kept under.
        seed: of the run.
        metrics: test results, by name; empty if it was not tested.
        monitor, mode: by what the best checkpoint was chosen, and whether more of it is better ("max") or less ("min").
        parameters: weights of the model.
        seconds: of training.
        config: the settings that make a difference, flat: `model.init_args.lr` -> value; `data` is its fingerprint.
        data: where it came from, in words.
        code: git's commit.
        history: rows of metrics.csv.
        pictures: file by name.
        problem: why the run is left out of the averages; empty if it is not.
    """

    folder: Path
    experiment: str
    seed: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    monitor: str = ""
    mode: str = "max"
    parameters: int = 0
    seconds: float = 0.0
    config: dict[str, object] = field(default_factory=dict)
    data: str = ""
    code: str = ""
    history: list[dict] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)
    problem: str = ""


def find_runs(paths: list[str]) -> list[Path]:
    """Return the folders of runs: those named, and those below the folders that are named.

    Raises:
        InputError: there is no such folder.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        try:
            is_folder = path.is_dir()
        except OSError as error:
            raise InputError(f"{str(path)[:100]} cannot be read: {error.strerror}") from None
        if not is_folder:
            beside = path.parent.glob("*/") if path.parent.is_dir() else ()
            raise InputError(f"{path} is not a folder of runs{did_you_mean(path.name, (p.name for p in beside))}")
        found |= dict.fromkeys(_runs_in(path))
    return list(found)


def _runs_in(path: Path, depth: int = 2) -> list[Path]:
    if RUN_NAME.fullmatch(path.name) or any((path / name).exists() for name in FILES):
        return [path]
    below = sorted(p for p in path.iterdir() if p.is_dir() and p.name not in NOT_RUNS)
    if depth == 0 or not below:
        return [] if path.name in NOT_RUNS else [path]  # read_run says what it is not
    return [run for folder in below for run in _runs_in(folder, depth - 1)]


def read_run(folder: Path) -> Record:
    """Read a run's folder; whatever is wrong with it is told in the record's `problem`."""
    record = Record(folder, experiment=folder.parent.name or folder.name)
    try:
        return _read(record, folder)
    except Exception as error:  # one broken run must not stop the comparison of all others
        record.metrics, record.problem = {}, f"cannot be read: {type(error).__name__}: {one_line(error)[:80]}"
        return record


def _read(record: Record, folder: Path) -> Record:
    if not any(folder.iterdir()):
        record.problem = "empty"
        return record
    if not any((folder / name).exists() for name in FILES):
        record.problem = "no run: it has none of " + ", ".join(FILES)
        return record
    try:
        config = yaml.load((folder / "config.yaml").read_text(), Loader=yaml.CSafeLoader)
        values = flat(config)
        record.experiment = str(config.get("experiment") or record.experiment)
        record.seed = int(config["seed_everything"])
        record.monitor, record.mode = str(config["checkpoint"]["monitor"]), str(config["checkpoint"]["mode"])
        record.config = {key: value for key, value in values.items() if not NO_DIFFERENCE.match(key)}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        record.problem = _problem("config.yaml", folder, error)
        return record
    with contextlib.suppress(OSError):
        record.history = read_history(folder / "metrics.csv")
    record.pictures = {path.stem: path for path in sorted((folder / "pictures").glob("*.png"))}

    if not (folder / "receipt.json").exists():
        epochs = 1 + max((row["epoch"] for row in record.history), default=-1)
        record.problem = f"not finished: no receipt.json after {epochs} epoch(s)"
        return record
    try:
        receipt = json.loads((folder / "receipt.json").read_text())
        record.metrics = {n: float(v) for n, v in receipt["metrics"].items() if n.startswith("test/")}  # not each class
        record.parameters, record.seconds = int(receipt["parameters"]), float(receipt["seconds"]["fit"])
        git = receipt.get("git") or {}
        record.code = f"{git.get('commit')}{' and changes' * bool(git.get('dirty'))}"
        record.config["data"], record.data = receipt["data"]["fingerprint"][:8], str(receipt["data"]["source"])
        if not record.metrics:
            record.problem = "receipt.json has no metrics"
    except (OSError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        record.metrics, record.problem = {}, _problem("receipt.json", folder, error)
    return record


def _problem(name: str, folder: Path, error: Exception) -> str:
    if not (folder / name).exists():
        return f"{name} is missing"
    what = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)[:80]
    return f"{name} is broken: {what}"
