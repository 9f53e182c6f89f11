"""An experiment's YAML, made into objects by LightningCLI."""

import contextlib
import functools
import logging
import os
import sys
import traceback
import warnings
from argparse import ArgumentError
from pathlib import Path

from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim import LBFGS

from callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint, check_logged
from callbacks.progress import Bar
from lit_models.pretrained import from_checkpoint
from lit_models.tasks import RegressorByHand
from runner.arguments import Arguments, check_name
from runner.checkpoints import has_last
from runner.errors import InputError, one_line
from runner.explain import explain, raised_in_init
from runner.precision import check_clipping, put_right
from runner.processes import is_helper

ROOT = Path(__file__).parent.parent
ALONE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}  # arguments of a Trainer, whatever the YAML says


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
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False, "devices": 1},
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
        check_name(self.config["experiment"])
        if not 0 <= self.config["seed_everything"] < 2**32:
            raise InputError(f"seed_everything must be from 0 to 2^32 - 1, got {self.config['seed_everything']}")

    def instantiate_classes(self) -> None:
        """Make model and data; Trainers are made later, one for each thing to do."""
        try:
            brought = from_checkpoint() if self.has_checkpoint else contextlib.nullcontext()
            with brought:
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
    def has_checkpoint(self) -> bool:
        """Whether the weights come from a checkpoint: then no others are looked for."""
        return bool(self.arguments.ckpt or self.arguments.verify or has_last(self.arguments.resume))

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
        if config["sync_batchnorm"]:
            from lit_models.sync_batch_norm import SyncInPlace

            arguments["plugins"].append(SyncInPlace())
        if config["strategy"] == "fsdp":
            from runner.sharding import ShardingStrategy

            config["strategy"] = ShardingStrategy()
        if config["enable_progress_bar"] is None:
            config["enable_progress_bar"] = sys.stdout.isatty()
        if config["enable_progress_bar"] and arguments.get("enable_progress_bar", True):
            arguments["callbacks"].append(Bar())
        try:
            trainer = Trainer(**{**config, **arguments})
        except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
            raise InputError(f"trainer: {one_line(error)}") from error
        put_right(trainer.precision_plugin)
        # Lightning loads a checkpoint before it does this: doubles would be rounded to floats on their way
        self.model = trainer.precision_plugin.convert_module(self.model)
        return trainer

    def trainer_to_fit(self, callbacks: list[Callback], **arguments) -> Trainer:
        """Make a Trainer to train with; of several processes, each has its share of the batches."""
        if self.plan.world_size > 1:
            from callbacks.sharing import Sharing

            callbacks = [*callbacks, Sharing()]
            arguments |= {"use_distributed_sampler": False}
            if not self.model.automatic_optimization and self.config["trainer"]["strategy"] in ("auto", "ddp"):
                arguments |= {"strategy": "ddp_find_unused_parameters_true"}  # each loss is of one network's parameters
            if self.is_sharded:
                arguments |= {"inference_mode": False}  # what is gathered in it could not be trained with
        elif isinstance(self.plan.strategy, DDPStrategy):
            arguments |= {"strategy": "auto"}  # else one process, too, has batches of Lightning's distributed sampler
        return self.trainer(callbacks=callbacks, **arguments)

    @functools.cached_property
    def plan(self) -> Trainer:
        """A Trainer that knows which processes there are to be, and does nothing."""
        return self.trainer(logger=False, enable_progress_bar=False)

    @property
    def is_sharded(self) -> bool:
        """Whether processes divide the network among them."""
        return self.plan.world_size > 1 and self.config["trainer"]["strategy"] == "fsdp"

    @property
    def processes_here(self) -> int:
        """Processes of this machine, if train.py is to start them, else 1."""
        outside = self.plan._accelerator_connector.cluster_environment.creates_processes_externally
        return 1 if outside else self.plan.num_devices

    def check_processes(self) -> None:
        """Check that as many processes are there, or will be, as the settings say, and that they can share this model.

        Raises:
            InputError: they cannot.
        """
        plan, count = self.plan, self.plan.world_size
        cluster = plan._accelerator_connector.cluster_environment
        there = cluster.world_size() if cluster.creates_processes_externally else count
        if there != count or (count == 1 and is_helper()):
            raise InputError(
                f"the environment tells of {max(there, 2)} processes (torchrun, SLURM, LOCAL_RANK), but trainer.num_nodes "
                f"{plan.num_nodes} x trainer.devices {plan.num_devices} are {count}"
            )
        if count == 1:
            return
        model, batch_size = self.model, getattr(self.datamodule, "batch_size", count)
        if isinstance(model, RegressorByHand):
            raise InputError(
                f"trainer.devices: {type(model).__name__} finds its gradients by hand, where no other process adds its own: "
                "set it to 1"
            )
        if batch_size < count:
            raise InputError(f"data.batch_size: {count} processes cannot share a batch of {batch_size}")
        # ddp_spawn and ddp_fork have no command line to start
        if not isinstance(plan.strategy, DDPStrategy) or plan.strategy._start_method != "popen":
            raise InputError(f"trainer.strategy: ddp or fsdp, not {self.config['trainer']['strategy']}")
        if self.is_sharded:
            from runner.sharding import check_sharding

            check_sharding(model, plan.callbacks, self.config["trainer"]["precision"])

    def rehearse(self) -> None:
        """Find what cannot work before anything is written; one batch is validated, as in Lightning's sanity check.

        (Where there is no validation set, the batch is one of the test set, and what comes of it is not looked at.)

        Raises:
            InputError: the settings leave nothing to train or to choose from, model and data do not fit together, or
                something is monitored that nothing logs.
        """
        self._check_settings()
        trainer = self.trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            **ALONE,
            limit_val_batches=1,
            limit_test_batches=1,
            inference_mode=False,  # torchmetrics would keep sums from it that fit cannot add to
        )
        self.load_data()
        has_val = self.datamodule.sizes["val"] > 0
        try:
            (trainer.validate if has_val else trainer.test)(self.model, self.datamodule, verbose=False)
        except InputError:
            raise
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"model and data do not fit: {_where(error)}{one_line(error)}") from error

        watched = {"checkpoint.monitor": self.checkpoint.monitor}
        watched |= {f"{type(c).__name__}.monitor": getattr(c, "monitor", None) for c in trainer.callbacks}
        optimizers = self.model.configure_optimizers()
        clip = trainer.gradient_clip_val or getattr(self.model, "clip", None)  # a GAN clips by itself
        for config in optimizers if isinstance(optimizers, list) else [optimizers]:  # and has two
            optimizer = config["optimizer"] if isinstance(config, dict) else config
            check_clipping(trainer.precision_plugin, clip, optimizer)
            if isinstance(optimizer, LBFGS) and self.plan.world_size > 1:
                raise InputError("optimizer: LBFGS goes by the loss, and each process has its own: trainer.devices 1")
            if isinstance(config, dict) and "lr_scheduler" in config:
                watched["lr_scheduler.monitor"] = config["lr_scheduler"].get("monitor")
                _rehearse_scheduler(trainer, config["lr_scheduler"])
        for key, name in watched.items():
            if name and name.startswith("val/") and not has_val:
                data = type(self.datamodule).__name__
                raise InputError(
                    f"{key}: {data} has no validation set, so there is no {name!r}; a train/ metric would do"
                )
            if name and name.startswith("val/") and self.config["trainer"]["limit_val_batches"] == 0:
                raise InputError(f"trainer.limit_val_batches is 0: there would be no {name} for {key}")
            if name and not name.startswith("train/"):  # nothing was trained yet
                check_logged(key, name, trainer)

    def load_data(self) -> None:
        """Find or make the data, and read it into the data module.

        Raises:
            InputError: it cannot be had as asked for.
        """
        try:
            self.datamodule.prepare_data()
            self.datamodule.setup()
        except InputError:
            raise
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            raise InputError(f"{type(self.datamodule).__name__}: {one_line(error)}") from error

    def _check_settings(self) -> None:
        trainer, monitor = self.config["trainer"], self.checkpoint.monitor
        if trainer["fast_dev_run"] or trainer["enable_checkpointing"] is False:
            raise InputError(
                "trainer: without a checkpoint there is nothing to test; for a quick try: "
                "--trainer.max_epochs 1 --trainer.limit_train_batches 2"
            )
        for key in ("max_epochs", "max_steps", "limit_train_batches"):
            if trainer[key] == 0:
                raise InputError(f"trainer.{key} is 0: nothing would be trained")
        if monitor.startswith("val/"):
            if trainer["limit_val_batches"] == 0:
                raise InputError(f"trainer.limit_val_batches is 0: there would be no {monitor} to choose the best by")
            every, epochs = trainer["check_val_every_n_epoch"] or 1, trainer["max_epochs"] or 0
            if 0 < epochs < every:
                raise InputError(f"trainer.check_val_every_n_epoch {every}: {epochs} epoch(s) would never be validated")
        self.check_processes()


def _rehearse_scheduler(trainer: Trainer, config: dict) -> None:
    """Step a learning rate scheduler that nothing else uses, and hold its plan, if it has one, against training."""
    scheduler, interval = config["scheduler"], config["interval"]
    name = type(scheduler).__name__
    planned = getattr(scheduler, "total_steps", None)  # OneCycleLR fails at one step more
    if planned is not None:
        if not trainer.max_epochs or trainer.max_epochs < 0:
            raise InputError(f"lr_scheduler: {name} plans {planned} {interval}s: set trainer.max_epochs to as many")
        steps = trainer.estimated_stepping_batches if interval == "step" else trainer.max_epochs
        if planned < steps:
            raise InputError(f"lr_scheduler: {name} plans {planned} {interval}s, but there are {steps}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no optimiser has stepped before
            scheduler.step(*([0.0] if "monitor" in config else []))
    except (ArithmeticError, ValueError) as error:
        raise InputError(f"lr_scheduler: {name}: {one_line(error)}") from error


def be_quiet() -> None:
    """Silence what libraries print that the user can do nothing about; what matters still shows."""
    logging.raiseExceptions = False  # on a full disk, wandb's log would print a traceback for each line it cannot write
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is CUDA, but no GPU
    for message in (
        ".*does not have many workers.*",  # in-memory data wants none
        "It is recommended to use `self.log.*sync_dist=True.*",  # each process validates the whole set
        "Total length of `list` across ranks is zero.*",  # data without a validation set
        "Checkpoint directory .* exists and is not empty",  # it holds config.yaml
        ".*is smaller than the logging interval.*",  # the tasks lower the interval to an epoch
        "Found .* module\\(s\\) in eval mode at the start of training.*",  # what is frozen
        r"Attribute '\w+' is an instance of `nn.Module`.*",  # the tasks leave it out of the hyperparameters
        "FSDP2-wrapped module .* returned a view tensor.*",  # of which nothing is changed in place
        "Glyph .* missing from font.*",  # the names of classes may be in any script
        ".*could not find the monitored key.*",  # train.py says it in a line of its own
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
