"""An experiment's YAML, made into objects by LightningCLI."""

import logging
import os
import re
import sys
import traceback
import warnings
from argparse import ArgumentError
from pathlib import Path

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint
from callbacks.progress import Bar
from runner.arguments import Arguments
from runner.errors import InputError, did_you_mean, one_line
from runner.explain import explain, raised_in_init

ROOT = Path(__file__).parent.parent


class Experiment(LightningCLI):
    """The experiment's model and data, and Trainers for them.

    Attributes:
        config: the resolved configuration, with every default.
        model, datamodule: made from it.

    Raises:
        InputError: for anything in the YAML or on the command line that cannot be used.
    """

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        be_quiet()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=42,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "dump_header": None},
            # the rehearsal takes the place of Lightning's sanity check; train.py prints its own summary
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
            run=False,
            args=["--config", str(arguments.config), *arguments.overrides],
        )

    # -- LightningCLI's own steps ------------------------------------------------------------------------------------

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the experiment's name, and the seed: a number, since a run without one cannot be repeated."""
        parser.add_argument("--experiment", type=str, default=self.arguments.name, help="Name its runs are kept under.")
        parser.add_argument("--seed_everything", type=int, default=self.seed_everything_default, help="The run's seed.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `checkpoint:`, which must say what "best" means."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse; a mistake becomes one line."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise InputError(f"{self.arguments.config}: {explain(error.message, parser)}") from None

    def instantiate_classes(self) -> None:
        """Make model and data; Trainers are made later, one for each thing to do."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise InputError(f"{self.arguments.config}: {_where(error)}{raised_in_init(str(error))}") from error
        self.model, self.datamodule = self.config_init["model"], self.config_init["data"]
        self.checkpoint: BestCheckpoint = self.config_init["checkpoint"]

    # -- what train.py asks for --------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name its runs are kept under."""
        return self.config["experiment"]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config["seed_everything"]

    @property
    def max_epochs(self) -> int | None:
        """When training ends, if it ends by epochs."""
        return self.config["trainer"]["max_epochs"]

    def config_yaml(self) -> str:
        """Return the resolved configuration; `python train.py` on it repeats the run."""
        return self.parser.dump(self.config, skip_none=False)

    def trainer(self, **arguments) -> Trainer:
        """Make a Trainer from the configuration's `trainer:`, with `arguments` in place of or beside it.

        Raises:
            InputError: what is asked for is not to be had here, a GPU for instance.
        """
        config = dict(self.config_init["trainer"])
        for key in ("callbacks", "plugins"):
            given = config[key] if isinstance(config[key], list) else [config[key]] if config[key] else []
            arguments[key] = [*given, *arguments.get(key, [])]
        arguments["plugins"].append(AtomicCheckpointIO())
        if config["enable_progress_bar"] is None:
            config["enable_progress_bar"] = sys.stdout.isatty()
        if config["enable_progress_bar"] and arguments.get("enable_progress_bar", True):
            arguments["callbacks"].append(Bar())
        try:
            return Trainer(**{**config, **arguments})
        except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
            raise InputError(f"trainer: {one_line(error)}") from error

    def rehearse(self) -> None:
        """Validate on one batch before anything is written, as Lightning's sanity check does after.

        Raises:
            InputError: model and data do not fit together, or nothing is logged under the name that `checkpoint:`
                monitors.
        """
        trainer = self.trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            devices=1,
            strategy="auto",
            num_nodes=1,
            limit_val_batches=1,
            fast_dev_run=False,
        )
        try:
            trainer.validate(self.model, self.datamodule, verbose=False)
        except (RuntimeError, IndexError, TypeError) as error:
            raise InputError(f"model and data do not fit: {_where(error)}{one_line(error)}") from error
        if not self.checkpoint.monitor.startswith("train/"):
            self.check_monitor(trainer)

    def check_monitor(self, trainer: Trainer) -> None:
        """Raise InputError if nothing was logged under the name that `checkpoint:` monitors."""
        monitor, logged = self.checkpoint.monitor, list(trainer.callback_metrics)
        if monitor not in logged:
            raise InputError(f"checkpoint.monitor: {monitor!r} is never logged{did_you_mean(monitor, logged)}")

    def load_checkpoint(self, path: Path) -> dict:
        """Read a checkpoint, plain types only, and see that it is of this model.

        Raises:
            InputError: it is damaged, would run code, or is of another model.
        """
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if "Unsupported" in str(error) or "weights_only" in str(error).lower():
                found = re.search(r"GLOBAL ([\w.]+)", str(error))
                raise InputError(
                    f"checkpoint {path} is refused: it holds code ({found[1] if found else 'pickled objects'}), not just "
                    "weights; nothing of it was run"
                ) from None
            raise InputError(f"checkpoint {path} is damaged: {one_line(str(error))[:120]}") from None
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise InputError(f"checkpoint {path} is not one of Lightning's: it has no state_dict")

        ours, theirs = self.model.state_dict(), checkpoint["state_dict"]
        differs = [
            k for k in {**ours, **theirs} if k not in ours or k not in theirs or ours[k].shape != theirs[k].shape
        ]
        if differs:
            name = differs[0]
            shapes = [f"{tuple(d[name].shape)}" if name in d else "nothing" for d in (theirs, ours)]
            made_by = checkpoint.get("hyper_parameters", {}).get("_class_path", "another model")
            config = path.parent / "config.yaml"
            hint = f"; its own is {config}" if config.exists() else ""
            raise InputError(
                f"checkpoint {path} (of {made_by}) does not fit {self.config['model']['class_path']} as configured: "
                f"{name} is {shapes[0]} there and {shapes[1]} here{hint}"
            )
        return checkpoint


def be_quiet() -> None:
    """Silence what libraries print that the user can do nothing about; what matters still shows."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # in-memory data wants none
        "Checkpoint directory .* exists and is not empty",  # it holds config.yaml
        ".*is smaller than the logging interval.*",  # tiny data; the epoch's metrics are logged all the same
        ".*callbacks used to create the checkpoint need to be provided.*",  # testing needs none of them
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = lambda message, category, *_: f"warning: {one_line(message)}\n"


def _where(error: BaseException) -> str:
    """Return `file:line: ` of the innermost of our own lines that an error came through."""
    ours = [
        f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT / "lit_models")
    ]
    return f"{os.path.relpath(ours[-1].filename, ROOT)}:{ours[-1].lineno}: " if ours else ""
