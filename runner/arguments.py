"""The command line, as far as it can be judged without torch, so that a typo is told in a fraction of a second."""

import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import InputError, did_you_mean, existing_file
from runner.files import list_yaml, read_yaml

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

HELP = """\
Train one experiment, test its best checkpoint, and leave a run that can be trusted.

  python train.py experiments/mnist_mlp.yaml                           train, then test the best checkpoint
  python train.py experiments/mnist_mlp.yaml --trainer.max_epochs 3    any key of the YAML can be overridden
  python train.py experiments/mnist_mlp.yaml --seed_everything 1       another seed
  python train.py experiments/mnist_mlp.yaml --print_config            every key there is, with its value
  python train.py experiments/mnist_mlp.yaml --ckpt RUN/best.ckpt      only test
  python train.py --resume RUN                                         go on from RUN/last.ckpt
  python train.py --verify RUN/receipt.json                            test again, and compare with what it says
  python train.py RUN/config.yaml                                      the same run again

RUN is a run's folder, such as runs/mnist_mlp/20261122-031023-s42-5coah8hx.

environment:
  DATA_DIR     where datasets are kept         (default: data)
  RUNS_DIR     where runs are kept             (default: runs)
  WANDB_MODE   online, offline or disabled     (default: online with a key, else offline)

experiments:
"""


@dataclass
class Arguments:
    """What was asked for.

    Attributes:
        config: the YAML to run: the experiment's, or on `--resume` the run's own.
        name: the experiment's name, under which its runs are kept.
        overrides: everything else on the command line, for LightningCLI.
        ckpt: a checkpoint to test, instead of training.
        resume: the folder of a run to go on with.
        verify: a receipt to hold against a new test.
    """

    config: Path
    name: str
    overrides: list[str] = field(default_factory=list)
    ckpt: Path | None = None
    resume: Path | None = None
    verify: Path | None = None


def parse(argv: list[str]) -> Arguments | None:
    """Read the command line.

    Returns:
        The arguments, or None if all that was wanted was the help text, which is then printed.

    Raises:
        InputError: for whatever can be found wrong without torch.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return None

    experiments, options, overrides = [], {}, []
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            experiments.append(word)
            continue
        key, equals, value = word.partition("=")
        if key == "--print_config":  # the one option of LightningCLI's without a value
            overrides.append(word)
            continue
        if not equals:
            value = next(words, None)
            if value is None:
                raise InputError(f"{key} needs a value")
        if key in ("--ckpt", "--resume", "--verify"):
            options[key] = value
        elif key in ("--config", "-c"):
            raise InputError(f"an experiment is complete in itself: name it without {key}")
        else:
            overrides += [key, value]

    if len(experiments) > 1:
        raise InputError(f"one experiment at a time, got {' and '.join(experiments)}")
    if len(options) > 1:
        raise InputError("--ckpt only tests, --resume goes on training, --verify tests again: give one of them")
    if "--verify" in options:
        if experiments or overrides:
            raise InputError("--verify tests with the run's own config.yaml: give it the receipt, and nothing else")
        receipt = existing_file(options["--verify"], "receipt", ".json").resolve()
        config = existing_file(receipt.parent / "config.yaml", "the run's configuration", ".yaml")
        return Arguments(config, _experiment_name(config), verify=receipt)

    resume = _run_folder(options["--resume"]) if "--resume" in options else None
    if resume:
        config = resume / "config.yaml"
    elif experiments:
        config = existing_file(experiments[0], "experiment", ".yaml")
    else:
        raise InputError("no experiment named; try: python train.py experiments/mnist_mlp.yaml (or --help)")

    name = _experiment_name(config)
    if resume and experiments and _experiment_name(existing_file(experiments[0], "experiment", ".yaml")) != name:
        raise InputError(f"{resume} is a run of {name}, not of {experiments[0]}")
    ckpt = checkpoint_file(options["--ckpt"]) if "--ckpt" in options else None
    return Arguments(config, name, overrides, ckpt, resume)


def help_text() -> str:
    """Return what `--help` prints: how to call, and the experiments there are with the first line of each."""
    return HELP + list_yaml(EXPERIMENTS)


def _experiment_name(path: Path) -> str:
    """Return the experiment's name: what a run's config.yaml says, else the file's own name."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not an experiment: expected keys such as model:, data:, checkpoint:, trainer:")
    return str(content.get("experiment") or path.stem)


def check_name(name: str) -> str:
    """Return an experiment's name; raise InputError for one that cannot be a folder's."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"experiment: {name!r} must be made of letters, digits, '_', '-' and '.', to name a folder")
    return name


def _run_folder(path: str) -> Path:
    folder = Path(path).resolve()
    if folder.name in ("last.ckpt", "best.ckpt", "config.yaml"):
        folder = folder.parent
    if not folder.is_dir():
        hint = did_you_mean(folder.name, (p.name for p in folder.parent.glob("*/"))) if folder.parent.is_dir() else ""
        raise InputError(f"run {folder} does not exist{hint}")
    for file in ("config.yaml", "last.ckpt"):
        if not (folder / file).is_file():
            raise InputError(f"{folder} cannot be resumed: it has no {file}")
    checkpoint_file(str(folder / "last.ckpt"))
    return folder


def checkpoint_file(path: str) -> Path:
    """Return a checkpoint's path; raise InputError for a URL, or what is no whole checkpoint as far as torch is not needed."""
    if "://" in path:
        raise InputError(
            f"checkpoint {path} is a URL: download it yourself, look where it comes from, then name the file"
        )
    file = existing_file(path, "checkpoint", ".ckpt")
    if not zipfile.is_zipfile(file):
        size = os.path.getsize(file)
        raise InputError(f"checkpoint {file} ({size:,} bytes) is cut short, or no checkpoint at all")
    return file
