"""Run one experiment: train it, test its best checkpoint, leave a receipt.

python train.py experiments/mnist_mlp.yaml
python train.py --help
"""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import copy
import sys
from pathlib import Path
from shlex import quote

from runner import arguments, processes
from runner.errors import InputError, one_line


def main(argv: list[str] | None = None) -> int:
    """Return the exit code.

    0; 1 if --verify finds a difference, or --doctor what would stop a run; 2 for a mistake, told in one line; 130 after
    Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if processes.is_helper():
        return help_to_train(argv)
    try:
        asked = arguments.parse(argv)
        if asked is None:
            return 0
        if asked.doctor:
            from runner.doctor import doctor

            return doctor()
        from runner.cli import Experiment  # torch and Lightning take seconds: a typo was told before

        experiment = Experiment(asked)
        if asked.verify:
            from runner.verify import verify

            return verify(asked.verify, experiment, test)
        if asked.predict:
            from runner.predict import predict

            predict(experiment, asked.ckpt, asked.predict)
        elif asked.ckpt:
            print_metrics(test(experiment, asked.ckpt))
        else:
            train(experiment, asked.resume, argv)
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name in ("runner", "callbacks", "lit_models", "datamodules"):
            raise
        print(f"error: the package {error.name} is missing; try: pip install -r requirements.txt", file=sys.stderr)
        return 2
    except SystemExit as end:
        if end.code != 1:
            raise
        return 130  # Lightning's answer to Ctrl-C
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted: {interrupt}".rstrip(": "), file=sys.stderr)
        return 130


def train(experiment, resume: Path | None = None, argv: list[str] = ()) -> None:
    """Fit, test the best checkpoint, write the receipt; `resume` is the folder of a run to go on with.

    Other processes of this machine, if any are to help, are started with `argv`.
    """
    from callbacks.pictures import draw_curves
    from callbacks.progress import Progress
    from callbacks.receipt import CountTested, write_receipt
    from runner.checkpoints import check_goes_on, find_last
    from runner.run import Run

    last = find_last(resume, experiment.model) if resume else None
    experiment.rehearse()  # what does not fit together is found before anything is written
    if resume:
        check_goes_on(resume, last[1] if last else None, experiment)
    print_what_runs(experiment)
    run = Run(resume) if resume else Run.create(experiment.name, experiment.seed)
    progress, count = Progress(), CountTested()
    try:
        run.begin(experiment, last)
        with processes.helpers(experiment.processes_here, argv, last_words=lambda: how_to_go_on(run)):
            trainer = fit(experiment, run.folder, progress, run.loggers)
        draw_curves(run, trainer)
        metrics = test(experiment, run.folder / "best.ckpt", run, count)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the loggers'; global_step counts each optimiser's
        run.log_metrics({**metrics, "epoch": trainer.current_epoch}, step)
        receipt = write_receipt(run, experiment, metrics, trainer, progress.seconds, count)
    except InputError:
        how_to_go_on(run)
        raise
    except OSError as error:  # such as a full disk
        raise InputError(f"{one_line(error)}; {how_to_go_on(run)}") from error
    except (KeyboardInterrupt, SystemExit):  # the latter is Lightning's answer to Ctrl-C
        raise KeyboardInterrupt(how_to_go_on(run)) from None
    except Exception:
        print(how_to_go_on(run), file=sys.stderr)
        raise
    finally:
        run.finish(exit_code=1 if sys.exc_info()[0] else 0)
    print_metrics(metrics)
    print_what_next(experiment, run, receipt, trainer)


def help_to_train(argv: list[str]) -> int:
    """Do what another process than the first does: its share of training, and nothing else; return the exit code."""
    processes.begin_to_help()
    try:
        asked = arguments.parse(argv)
        if asked is None or asked.doctor or asked.verify or asked.ckpt:
            return 0
        from callbacks.progress import Progress
        from runner.cli import Experiment

        experiment = Experiment(asked)
        experiment.check_processes()
        with processes.helpers(experiment.processes_here, argv, last_words=str):  # those of another machine
            fit(experiment, asked.resume, Progress())
        return 0
    except (KeyboardInterrupt, SystemExit):
        return 130
    except ConnectionError as error:
        folder = experiment.checkpoint.dirpath  # the first process tells it, if they got so far
        begun = folder and Path(folder, "last.ckpt").exists()
        processes.say_last(f"{error}{f'; to go on: python train.py --resume {quote(folder)}' if begun else ''}")
        return 2
    except (InputError, OSError) as error:
        processes.say_last(one_line(error))
        return 2


def fit(experiment, folder: Path | None, progress, loggers=False):
    """Train to the end in the run's folder, and return the Trainer. What helps knows the folder only of a resumed run."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from callbacks.checkpoint import LastCheckpoint, check_logged
    from callbacks.progress import LearningRate
    from callbacks.seeding import Seeding
    from runner.checkpoints import has_last

    best, last = experiment.checkpoint, LastCheckpoint()
    rate = [LearningRate()] if experiment.model.lr_scheduler and loggers else []
    best.dirpath = last.dirpath = folder and str(folder.resolve())
    trainer = experiment.trainer_to_fit(
        logger=loggers,
        callbacks=[Seeding(), *rate, progress, best, last],
        default_root_dir=folder and str(folder),
    )
    # a network that was divided is not put together again: the first process keeps a copy, to test with the best weights
    is_copied = experiment.is_sharded and not processes.is_helper()
    model = copy.deepcopy(experiment.model) if is_copied else experiment.model
    try:
        trainer.fit(
            model,
            experiment.datamodule,
            ckpt_path=folder / "last.ckpt" if has_last(folder) else None,
            weights_only=True,
        )
    except MisconfigurationException as error:
        if "could not find the monitored key" in str(error):
            check_logged("checkpoint.monitor", best.monitor, trainer)
        raise InputError(one_line(error)) from error
    if trainer.is_global_zero and not (folder / "best.ckpt").exists():
        check_logged("checkpoint.monitor", best.monitor, trainer)
        raise InputError("training ended without a best checkpoint to test")
    return trainer


def test(experiment, checkpoint: Path, run=None, count=None) -> dict[str, float]:
    """Test a checkpoint on one device, where no sample is counted twice, and return the metrics."""
    from runner.checkpoints import check_classes, read_checkpoint
    from runner.cli import ALONE

    saved = read_checkpoint(checkpoint, experiment.model)
    experiment.load_data()
    check_classes(checkpoint, saved, experiment.datamodule)
    pictures = [experiment.model.pictures(run)] if run else []
    trainer = experiment.trainer(
        logger=False,
        enable_checkpointing=False,
        callbacks=[*([count] if count else []), *pictures],
        **ALONE,
        limit_test_batches=1.0,  # part of a test set is no test
    )
    (metrics,) = trainer.test(
        experiment.model, experiment.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False
    )
    return metrics


def print_what_runs(experiment) -> None:
    """Print which data was found, and what is trained on it."""
    model, data = experiment.model, experiment.datamodule
    verbs = {"train": "to train", "val": "to validate", "test": "to test"}
    sizes = ", ".join(f"{size:,} {verbs[name]}" for name, size in data.sizes.items() if size)
    print(f"{type(data).__name__}: {sizes}: {data.source}")
    print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters, seed {experiment.seed}")
    if experiment.plan.num_nodes > 1:
        print(f"{experiment.plan.num_nodes} machines: training begins as soon as all are there")
    print(f"weights: {model.pretrained['file']}\n" if model.pretrained else "")


def print_metrics(metrics: dict[str, float]) -> None:
    """Print a short table and, where there is one for each class, those with the least."""
    from callbacks.progress import short

    by_class = {name: value for name, value in metrics.items() if name.startswith("test_")}
    rows = {name: short(metrics[name]) for name in sorted(metrics.keys() - by_class.keys())}
    if "test/acc_top5" in rows:
        rows["test/acc"] += f"  (among the first five: {rows.pop('test/acc_top5')})"
    for kind in sorted({name.partition("/")[0] for name in by_class}):  # such as test_acc, test_ap_voc, test_iou
        each = {name.partition("/")[2]: value for name, value in by_class.items() if name.startswith(f"{kind}/")}
        least = ", ".join(f"{name} {each[name]:.4f}" for name in sorted(each, key=each.get)[:5])
        rows["weakest" if kind == "test_acc" else f"weakest {kind.removeprefix('test_')}"] = least
    width = max(map(len, rows))
    print("\n" + "\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))


def print_what_next(experiment, run, receipt: dict, trainer) -> None:
    """Print where the run is, and the next commands to type."""
    from runner.predict import can_be_given

    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    has_plan = any(hasattr(s, "total_steps") or hasattr(s, "T_max") for s in schedulers)  # to an end that was reached
    best, trained, seconds = receipt["checkpoint"]["epoch"] + 1, receipt["epochs"], receipt["seconds"]["fit"]
    print(
        f"\nbest     epoch {best}, by {experiment.checkpoint.monitor}, of {seconds:.0f} s of training"
        f"\nrun      {run.folder}"
        f"\nlook     {run.folder / 'pictures'}"
        f"\ncompare  python compare.py {quote(str(run.folder.parent))}"
        f"\nverify   python train.py --verify {quote(str(run.folder / 'receipt.json'))}"
    )
    again = f"python train.py {quote(str(run.folder / 'config.yaml'))}"
    if can_be_given(experiment.model, experiment.datamodule) == "prompt":
        print(f'write    {again} --ckpt {quote(str(run.folder / "best.ckpt"))} --prompt "..."')
    print(f"again    {again}")
    if not has_plan:
        print(f"longer   python train.py --resume {quote(str(run.folder))} --trainer.max_epochs {2 * trained}")
    if sync := run.sync_command():
        print(f"sync     {sync}")


def how_to_go_on(run) -> str:
    """Return how to resume a run that was stopped; one that had not finished an epoch is removed."""
    from runner.checkpoints import has_last

    if has_last(run.folder):
        checkpoint = run.folder / "last.ckpt"
        return (
            f"{checkpoint} holds the last finished epoch; to go on: python train.py --resume {quote(str(run.folder))}"
        )
    run.discard()
    return "no epoch was finished, and nothing is kept"


if __name__ == "__main__":
    sys.exit(main())
