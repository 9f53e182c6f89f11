"""Checkpoints as they come: read without running anything in them, and held against the model and the run."""

import re
import sys
import zipfile
from pathlib import Path

import torch
import yaml
from pytorch_lightning import LightningDataModule, LightningModule

from runner.arguments import checkpoint_file
from runner.errors import DamagedError, InputError, one_line
from runner.files import flat
from runner.history import read_history

LIGHTNINGS_KEYS = {
    "state_dict": dict,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "pytorch-lightning_version": str,
}

# What may change when a run goes on: when it ends, where it runs, what is shown. All else makes it another run.
MAY_CHANGE = re.compile(
    r"trainer\.(max_epochs|max_time|accelerator|strategy|devices|num_nodes|enable_progress_bar)|data\.init_args\.num_workers"
)


def read_checkpoint(path: Path, model: LightningModule) -> dict:
    """Read a checkpoint, plain types only, and see that it is of this model.

    Raises:
        DamagedError: it is not as it was written.
        InputError: it does not exist, would run code, or is of another model.
    """
    checkpoint_file(str(path))
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load takes weights without a look at their checksums
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"checkpoint {path} is refused: it holds code ({found[1]}), not just weights; nothing of it was run"
            ) from None
        raise DamagedError(f"checkpoint {path} is damaged: {one_line(error)[:120]}") from None
    for key, kind in LIGHTNINGS_KEYS.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise InputError(f"checkpoint {path} is not one of Lightning's: it has no {key}")

    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in checkpoint["state_dict"].items()}
    if differs := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        name = differs[0]
        hint = f"; its own is {path.parent / 'config.yaml'}" if (path.parent / "config.yaml").exists() else ""
        raise InputError(
            f"checkpoint {path} (of {_made_by(checkpoint)}) does not fit {type(model).__module__}.{type(model).__name__} "
            f"as configured: {name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here{hint}"
        )
    return checkpoint


def check_classes(path: Path, checkpoint: dict, data: LightningDataModule) -> None:
    """Raise InputError if the checkpoint tells other classes apart than the data has, or has them in another order."""
    trained = checkpoint.get(type(data).__qualname__)
    classes = trained.get("classes") if isinstance(trained, dict) else None
    if classes and classes != list(data.classes):
        raise InputError(
            f"checkpoint {path} tells apart {', '.join(classes)}, but the data has {', '.join(data.classes)}"
        )


def has_last(folder: Path | None) -> bool:
    """Whether the run in `folder` had finished an epoch."""
    return bool(folder) and any((folder / name).exists() for name in ("last.ckpt", "previous.ckpt"))


def find_last(folder: Path, model: LightningModule) -> tuple[Path, dict] | None:
    """Find what the run in `folder` goes on from: last.ckpt, or if that is damaged the one before, which a warning says.

    Returns:
        The file and what it holds; None if the run was killed before it had finished an epoch.

    Raises:
        InputError: nothing is left to go on from.
    """
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    again = f"python train.py {folder / 'config.yaml'} begins anew"
    if not has_last(folder):
        if any(row["epoch"] for row in read_history(folder / "metrics.csv")):
            raise InputError(f"{folder} cannot be resumed: it has no last.ckpt; {again}")
        print(f"{folder} had not finished an epoch: it begins again")
        return None
    try:
        if not last.exists():
            raise DamagedError(f"checkpoint {last} is missing")
        return last, read_checkpoint(last, model)
    except DamagedError as error:
        try:
            if not previous.exists():
                raise DamagedError("there is none before it")
            checkpoint = read_checkpoint(previous, model)
        except DamagedError as none:
            raise InputError(f"{error}; {none}; {again}") from None
        print(f"warning: {error}; going on from the one before, {previous}", file=sys.stderr)
        return previous, checkpoint


def check_goes_on(folder: Path, checkpoint: dict | None, experiment) -> None:
    """Check that the run in `folder` would go on from `checkpoint`, or from its beginning, as it began.

    Raises:
        InputError: configuration or data are other ones, the run is to end before where it is, or its best.ckpt is lost.
    """
    texts = (folder / "config.yaml").read_text(), experiment.config_yaml()
    began, goes_on = (flat(yaml.safe_load(text)) for text in texts)
    for key in sorted({**began, **goes_on}):
        if began.get(key) != goes_on.get(key) and not MAY_CHANGE.match(key):
            raise InputError(
                f"--resume goes on with the run as it began: {key} was {began.get(key)}, not {goes_on.get(key)}; "
                f"for another run: python train.py {folder / 'config.yaml'} --KEY VALUE"
            )
    if not checkpoint:
        return
    done, max_epochs = checkpoint["epoch"] + 1, goes_on.get("trainer.max_epochs")
    if checkpoint.get("callbacks", {}).get("BestCheckpoint", {}).get("best_model_path"):
        best = folder / "best.ckpt"
        try:
            if not best.exists():
                raise DamagedError(f"checkpoint {best} is missing")
            done = max(done, read_checkpoint(best, experiment.model)["epoch"] + 1)  # it is written before last.ckpt
        except DamagedError as error:
            raise InputError(
                f"{error}; with it the best of {done} epochs is lost: python train.py {folder / 'config.yaml'} begins anew"
            ) from None
    if max_epochs is not None and 0 <= max_epochs < done:
        raise InputError(f"{folder} has {done} epochs already: trainer.max_epochs {max_epochs} is less")
    data = experiment.datamodule
    saved, now = checkpoint.get(type(data).__qualname__), data.state_dict()
    if saved and saved["fingerprint"] != now["fingerprint"]:
        was, here = (f"{data['source']}, sha256 {data['fingerprint'][:8]}" for data in (saved, now))
        raise InputError(f"{folder} began with other data ({was}) than this ({here})")


def _made_by(checkpoint: dict) -> str:
    hyper_parameters = checkpoint.get("hyper_parameters")
    return (
        hyper_parameters.get("_class_path", "another model") if isinstance(hyper_parameters, dict) else "another model"
    )
