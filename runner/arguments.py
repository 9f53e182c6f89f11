"""The command line, as far as it can be judged without torch, so that a typo is told in a fraction of a second."""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import itertools
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import DamagedError, InputError, did_you_mean, existing_file
from runner.files import PICTURE_SUFFIXES, files_below, list_yaml, list_yaml_names, read_yaml

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

# what goes with a prompt: a number's kind, and the least that it may be
PROMPT = {"--prompt": (str, 0), "--length": (int, 1), "--temperature": (float, 0), "--top_k": (int, 1)}

HELP = """\
Train one experiment, test its best checkpoint, and leave a run that can be trusted.

  python train.py experiments/mnist_mlp.yaml                           train, then test the best checkpoint
  python train.py experiments/mnist_mlp.yaml --trainer.max_epochs 3    any key of the YAML can be overridden
  python train.py experiments/mnist_mlp.yaml --seed_everything 1       another seed
  python train.py experiments/mnist_mlp.yaml --print_config            every key there is, with its value
  python train.py experiments/mnist_mlp.yaml --ckpt RUN/best.ckpt      only test
  python train.py RUN/config.yaml --ckpt RUN/best.ckpt --predict PATH  tell what is in a picture, or in all of a folder
  python train.py RUN/config.yaml --ckpt RUN/best.ckpt --prompt TEXT   go on writing; --length, --temperature, --top_k
  python train.py --resume RUN                                         go on from RUN/last.ckpt
  python train.py --verify RUN/receipt.json                            test again, and compare with what it says
  python train.py RUN/config.yaml                                      the same run again
  python train.py --list [WORD]                                        what each experiment is, of those with WORD in it
  python train.py --doctor                                             versions, devices, data, disks: for a bug report

RUN is a run's folder, such as runs/mnist_mlp/20261122-031023-s42-5coah8hx.

environment:
  DATA_DIR     where datasets are kept         (default: data)
  RUNS_DIR     where runs are kept             (default: runs)
  WANDB_MODE   online, offline or disabled     (default: online with a key, else offline)

experiments:
"""


@dataclass(frozen=True)
class Prompt:
    """A text for a language model to continue.

    Attributes:
        text: what to begin with.
        length: how many characters to write.
        temperature: from 0, which takes the most probable one, by way of 1, the model's own probabilities.
        top_k: only the k most probable characters may be drawn; None: all.
    """

    text: str
    length: int = 500
    temperature: float = 1.0
    top_k: int | None = None


@dataclass
class Arguments:
    """What was asked for.

    Attributes:
        config: the YAML to run: the experiment's, or on `--resume` the run's own.
        name: the experiment's name, under which its runs are kept.
        overrides: everything else on the command line, for LightningCLI.
        ckpt: a checkpoint to test, or to predict with, instead of training.
        resume: the folder of a run to go on with.
        verify: a receipt to hold against a new test.
        predict: pictures or texts to tell what is in, or a prompt to continue.
        doctor: whether to look at the machine, and at no experiment.
    """

    config: Path
    name: str
    overrides: list[str] = field(default_factory=list)
    ckpt: Path | None = None
    resume: Path | None = None
    verify: Path | None = None
    predict: list[Path] | Prompt = field(default_factory=list)
    doctor: bool = False


def parse(argv: list[str]) -> Arguments | None:
    """Read the command line.

    Returns:
        The arguments, or None if all that was wanted was the help text or the list, which is then printed.

    Raises:
        InputError: for whatever can be found wrong without torch.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return None
    if any(word.partition("=")[0] == "--doctor" for word in argv):
        if argv != ["--doctor"]:
            raise InputError("--doctor looks at this machine, not at an experiment: give it nothing else")
        return Arguments(EXPERIMENTS, "", doctor=True)

    experiments, options, overrides = [], {}, []
    if any(word.partition("=")[0] == "--prompt" for word in argv):
        argv = [word for word in argv if word != "--predict"]  # which may stand beside it, and says no more
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            experiments.append(word)
            continue
        key, equals, value = word.partition("=")
        if key == "--list":
            print(list_experiments(value or " ".join(words)))
            return None
        if key == "--print_config":  # the one option of LightningCLI's without a value
            overrides.append(word)
            continue
        if not equals:
            value = next(words, None)
            if value is None:
                raise InputError(f"{key} needs a value")
        if key in ("--ckpt", "--resume", "--verify", "--predict", *PROMPT):
            if key in options:
                raise InputError(f"{key} is given twice")
            options[key] = value
        elif key in ("--config", "-c"):
            raise InputError(f"an experiment is complete in itself: name it without {key}")
        else:
            overrides += [key, value]

    prompt, pictures = _pop_prompt(options), []
    if "--predict" in options:
        if options.keys() != {"--predict", "--ckpt"}:
            raise InputError("--predict needs a trained model: give it --ckpt RUN/best.ckpt, not --resume or --verify")
        pictures = [options.pop("--predict"), *(word for word in experiments if not word.endswith((".yaml", ".yml")))]
        experiments = [word for word in experiments if word not in pictures]  # a shell makes many words of *.png
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
        config = Path(options.get("--ckpt", "")).parent / "config.yaml"
        known = config if "--ckpt" in options and config.is_file() else "experiments/mnist_mlp.yaml"
        raise InputError(f"no experiment named; try: python train.py {known} (or --help)")

    name = _experiment_name(config)
    if resume and experiments and _experiment_name(existing_file(experiments[0], "experiment", ".yaml")) != name:
        raise InputError(f"{resume} is a run of {name}, not of {experiments[0]}")
    ckpt = checkpoint_file(options["--ckpt"]) if "--ckpt" in options else None
    return Arguments(config, name, overrides, ckpt, resume, predict=prompt or find_pictures(pictures))


def _pop_prompt(options: dict[str, str]) -> Prompt | None:
    """Take what is about a prompt out of the options; None if nothing is."""
    given = {key: options.pop(key) for key in PROMPT if key in options}
    if not given:
        return None
    if "--prompt" not in given:
        raise InputError(f"{next(iter(given))} is about a text to continue: it goes with --prompt TEXT")
    if options.keys() != {"--ckpt"}:
        raise InputError("--prompt needs a trained model: give it --ckpt RUN/best.ckpt, and nothing else to do")
    numbers = {}
    for key, (kind, least) in PROMPT.items():
        if key != "--prompt" and key in given:
            try:
                numbers[key[2:]] = number = kind(given[key])
            except ValueError:
                number = None
            if number is None or not least <= number < float("inf"):
                what = "a whole number" if kind is int else "a number"
                raise InputError(f"{key}: {what} from {least}, got {given[key]!r}")
    return Prompt(given["--prompt"], **numbers)


def help_text() -> str:
    """Return what `--help` prints: how to call, and the names of the experiments there are."""
    return HELP + list_yaml_names(EXPERIMENTS)


def list_experiments(words: str) -> str:
    """Return what `--list` prints: the name and the first line of each experiment that has all `words` in them.

    Raises:
        InputError: none has.
    """
    if listing := list_yaml(EXPERIMENTS, words):
        return listing
    names = [path.stem.split("_") for path in EXPERIMENTS.glob("*.yaml")]
    there_are = "; there are: " + ", ".join(sorted({name[0] for name in names}))
    hint = did_you_mean(words, itertools.chain(*names)) or there_are
    raise InputError(f"no experiment has {words!r} in its name or its first line{hint}")


def _experiment_name(path: Path) -> str:
    """Return the experiment's name: what a run's config.yaml says, else the file's own name."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not an experiment: expected keys such as model:, data:, checkpoint:, trainer:")
    return str(content.get("experiment") or path.stem)


def find_pictures(paths: list[str]) -> list[Path]:
    """Return pictures, and those in and below folders in the order that a person counts them, 2.png before 10.png.

    What is hidden in a folder is left out.

    Raises:
        InputError: there is no such file or folder, it cannot be read, or has no picture in it.
    """
    pictures: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):
            pictures.append(existing_file(path, "picture", ""))
            continue
        try:
            found = [file for file in files_below(path) if file.suffix.lower() in PICTURE_SUFFIXES]
        except OSError as error:
            raise InputError(f"folder {error.filename} cannot be read: {error.strerror}") from None
        if not found:
            raise InputError(f"folder {path} has no pictures in it ({', '.join(PICTURE_SUFFIXES)})")
        pictures += sorted(found, key=_natural)
    return list(dict.fromkeys(pictures))


def _natural(path: Path) -> tuple:
    """Return a key to sort by: numbers in names by their value."""
    words = ([int(word) if i % 2 else word for i, word in enumerate(re.split(r"(\d+)", part))] for part in path.parts)
    return list(words), str(path)


def check_name(name: str) -> str:
    """Return an experiment's name; raise InputError for one that cannot be a folder's."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"experiment: {name!r} must be made of letters, digits, '_', '-' and '.', to name a folder")
    return name


def _run_folder(path: str) -> Path:
    folder = Path(path).resolve()
    if folder.name in ("last.ckpt", "previous.ckpt", "best.ckpt", "config.yaml"):
        folder = folder.parent
    if not folder.is_dir():
        hint = did_you_mean(folder.name, (p.name for p in folder.parent.glob("*/"))) if folder.parent.is_dir() else ""
        raise InputError(f"run {folder} does not exist{hint}")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} cannot be resumed: it has no config.yaml")
    return folder


def checkpoint_file(path: str) -> Path:
    """Return a checkpoint's path, as far as it can be judged without torch.

    Raises:
        DamagedError: it is not whole.
        InputError: it is a URL, or there is no such file.
    """
    if "://" in path:
        raise InputError(
            f"checkpoint {path} is a URL: download it yourself, look where it comes from, then name the file"
        )
    file = existing_file(path, "checkpoint", ".ckpt")
    if not zipfile.is_zipfile(file):
        size = os.path.getsize(file)
        raise DamagedError(f"checkpoint {file} ({size:,} bytes) is cut short, or no checkpoint at all")
    return file
