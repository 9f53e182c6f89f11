"""No work is lost: what was trained before a failure goes on to the same bits."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import REPOSITORY, SMALL_NET, TINY, write_mnist
from test_train import assert_same_run, receipt

import callbacks.checkpoint
import runner.files
from datamodules.mnist import MNIST
from lit_models.mlp import MLP
from lit_models.tasks import Regressor, RegressorByHand
from runner.checkpoints import find_last
from runner.history import read_history
from train import main

SIX_EPOCHS = (*TINY, *SMALL_NET, "--trainer.max_epochs=6")
EXPERIMENT = "experiments/mnist_mlp.yaml"


class Stop(Exception):
    """What ends a run in these tests, as a crash would."""


def stop_at(monkeypatch, epoch: int, batch: int, model: type = MLP) -> None:
    """Make training crash before `batch` of `epoch`."""
    step = model.training_step

    def crash(self, batch_, batch_idx):
        if (self.current_epoch, batch_idx) == (epoch, batch):
            raise Stop
        return step(self, batch_, batch_idx)

    monkeypatch.setattr(model, "training_step", crash)


def only_run(root: Path) -> Path:
    (run,) = root.glob("runs/*/2*")
    return run


@pytest.fixture
def whole_run(train, tmp_path):
    """The run that was never stopped, moved out of the way."""
    run = train(*SIX_EPOCHS, tiny=())
    return Path(shutil.move(run, tmp_path / "whole"))


@pytest.mark.parametrize("batch", [0, 5], ids=["after an epoch", "in the middle of one"])
def test_a_stopped_and_resumed_run_ends_in_the_same_bits(whole_run, train, monkeypatch, tmp_path, batch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, epoch=3, batch=batch)
        with pytest.raises(Stop):
            main([EXPERIMENT, *SIX_EPOCHS])
    run = only_run(tmp_path)
    assert f"python train.py --resume {run}" in capsys.readouterr().err
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 2
    assert not (run / "receipt.json").exists()

    torch.manual_seed(999)  # whatever state the new process is in must not matter
    assert train("--resume", str(run), experiment="") == run
    assert_same_run(whole_run, run)


def test_a_run_stopped_three_times_and_moved_in_between_keeps_its_best(whole_run, monkeypatch, tmp_path):
    argv = [EXPERIMENT, *SIX_EPOCHS]
    for i, (epoch, batch) in enumerate([(1, 3), (2, 0), (4, 7)]):
        with monkeypatch.context() as patch:
            stop_at(patch, epoch, batch)
            with pytest.raises(Stop):
                main(argv)
        (run,) = tmp_path.glob("*/mnist_mlp/*")
        moved = tmp_path / f"elsewhere{i}" / "mnist_mlp" / run.name
        moved.parent.mkdir(parents=True)
        run = Path(shutil.move(run, moved))
        argv = ["--resume", str(run)]
    assert main(argv) == 0
    assert_same_run(whole_run, run)


def test_a_finished_run_can_be_trained_longer(train):
    run = train(*SMALL_NET)
    assert train("--resume", str(run), "--trainer.max_epochs", "4", experiment="") == run
    assert [r["epoch"] for r in read_history(run / "metrics.csv") if r["metric"] == "val/acc"] == [0, 1, 2, 3]
    assert sum(r["metric"] == "test/acc" for r in read_history(run / "metrics.csv")) == 1
    assert "max_epochs: 4" in (run / "config.yaml").read_text()


def test_resume_accepts_the_experiment_it_is_a_run_of_and_no_other(train, capsys):
    run = train(*SMALL_NET)
    assert main([EXPERIMENT, "--resume", str(run)]) == 0
    assert main(["experiments/mnist_softmax.yaml", "--resume", str(run)]) == 2
    assert "is a run of mnist_mlp" in capsys.readouterr().err


def assert_survives_a_stop(argv, train, monkeypatch, tmp_path: Path, experiment: str = EXPERIMENT, **when) -> None:
    """Run `argv` once to its end, once with a stop and a resume, and compare."""
    whole = Path(shutil.move(train(*argv, experiment=experiment, tiny=()), tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, **when)
        with pytest.raises(Stop):
            main([experiment, *argv])
    run = only_run(tmp_path)
    assert main(["--resume", str(run)]) == 0
    assert_same_run(whole, run)


def test_a_plateau_scheduler_survives_a_stop(train, monkeypatch, tmp_path):
    argv = [*SIX_EPOCHS, "--model.lr_scheduler", "pytorch_lightning.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor",
            "val/loss", "--model.lr_scheduler.patience", "0", "--model.lr_scheduler.threshold", "0.2"]  # fmt: skip
    assert_survives_a_stop(argv, train, monkeypatch, tmp_path, epoch=4, batch=2)


def start(argv: list[str], until: str) -> subprocess.Popen:
    """Start train.py as a person would, and wait for a line that starts with `until`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "train.py", *argv],
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in process.stdout:
        if line.startswith(until):
            return process
    raise AssertionError(process.communicate()[1])


def test_a_full_disk_leaves_the_last_finished_epoch_and_says_how_to_go_on(whole_run, monkeypatch, tmp_path, capsys):
    opened = []

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_on_a_small_disk(path, mode):
        opened.append(path.name)
        return Full(path, mode) if opened.count(".last.ckpt.tmp") == 3 else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(runner.files, "open", open_on_a_small_disk, raising=False)
        assert main([EXPERIMENT, *SIX_EPOCHS]) == 2
    run = only_run(tmp_path)
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert f"python train.py --resume {run}" in err
    assert len(err.splitlines()) == 1
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 1
    assert not list(run.glob(".*.tmp"))
    assert main(["--resume", str(run)]) == 0
    assert_same_run(whole_run, run)


def test_a_disk_that_really_fills_up(tmp_path, monkeypatch):
    disk = tmp_path / "runs"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        monkeypatch.setenv("WANDB_MODE", "offline")
        argv = [EXPERIMENT, *TINY, *SMALL_NET, "--trainer.max_epochs=400"]
        process = start(argv, until="epoch  20/")
        with suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        _, err = process.communicate(timeout=60)
        (disk / "filler").unlink()
        run = only_run(tmp_path)
        assert process.returncode == 2
        assert err.startswith("error: [Errno 28] No space left on device")
        assert f"python train.py --resume {run}" in err
        assert err.count("\n") == 1
        monkeypatch.setenv("WANDB_MODE", "disabled")
        epoch = torch.load(run / "last.ckpt", weights_only=True)["epoch"]
        assert main(["--resume", str(run), "--trainer.max_epochs", str(epoch + 3)]) == 0
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_checkpoint_is_on_disk_whole_or_not_at_all(monkeypatch, tmp_path):
    io = callbacks.checkpoint.AtomicCheckpointIO()
    io.save_checkpoint({"epoch": 1}, tmp_path / "last.ckpt")
    before = (tmp_path / "last.ckpt").read_bytes()

    def killed(*_):
        raise Stop

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Stop):
        io.save_checkpoint({"epoch": 2}, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("moves", [0, 1])
def test_a_last_checkpoint_is_there_at_every_moment(monkeypatch, tmp_path, moves):
    io, replace, done = callbacks.checkpoint.AtomicCheckpointIO(), os.replace, []
    io.save_checkpoint({"epoch": 1}, tmp_path / "last.ckpt")

    def stopped(*paths):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(paths)
        replace(*paths)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"epoch": 2}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1
    assert not [*tmp_path.glob(".*")]


DAMAGES = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "all zeros": lambda content: bytes(len(content)),
    "a page of zeros": lambda content: content[:50_000] + bytes(4096) + content[54_096:],
    "missing": None,
}


def damage(file: Path, how: str) -> None:
    file.write_bytes(DAMAGES[how](file.read_bytes())) if DAMAGES[how] else file.unlink()


THREE_EPOCHS = (*TINY, *SMALL_NET, "--trainer.max_epochs=3")


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory, small_data):
    """A run of three epochs, to look at."""
    with pytest.MonkeyPatch.context() as patch:
        runs = tmp_path_factory.mktemp("runs")
        patch.setenv("RUNS_DIR", str(runs))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("DATA_DIR", str(small_data))
        assert main([EXPERIMENT, *THREE_EPOCHS]) == 0
        (run,) = runs.glob("mnist_mlp/*")
        return run


class TestDamagedCheckpoints:
    """What the disk did not keep: the last checkpoint has one before it, the best has none."""

    @pytest.fixture
    def run(self, three_epochs, tmp_path):
        return Path(shutil.copytree(three_epochs, tmp_path / "runs" / "mnist_mlp" / three_epochs.name))

    def test_the_last_checkpoint_but_one_is_kept(self, run):
        epochs = [torch.load(run / name, weights_only=True)["epoch"] for name in ("previous.ckpt", "last.ckpt")]
        assert epochs == [1, 2]

    @pytest.mark.parametrize("how", DAMAGES)
    def test_whatever_the_damage_it_is_found(self, how, run, capsys):
        damage(run / "last.ckpt", how)
        file, checkpoint = find_last(run, MLP(sizes=(784, 32, 10), dropout=0.3))
        assert file == run / "previous.ckpt"
        assert checkpoint["epoch"] == 1
        assert f"warning: checkpoint {run / 'last.ckpt'}" in capsys.readouterr().err

    def test_a_damaged_last_one_falls_back_to_the_one_before(self, three_epochs, run, capsys):
        damage(run / "last.ckpt", "a page of zeros")
        for name in (".last.ckpt.tmp", ".metrics.csv.tmp"):  # what a process was writing when it was killed
            (run / name).write_bytes(b"half of")
        capsys.readouterr()
        assert main(["--resume", str(run)]) == 0
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith(f"warning: checkpoint {run / 'last.ckpt'}")
        assert warning.endswith(f"; going on from the one before, {run / 'previous.ckpt'}")
        assert_same_run(three_epochs, run)  # so metrics.csv was cut back to there
        assert not list(run.glob(".*"))

    def test_the_good_one_is_never_overwritten_by_the_damaged_one(self, run, monkeypatch):
        damage(run / "last.ckpt", "cut short")
        stop_at(monkeypatch, epoch=2, batch=1)
        with pytest.raises(Stop):
            main(["--resume", str(run)])
        assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 1
        assert not (run / "previous.ckpt").exists()

    @pytest.mark.parametrize("previous", ["cut short", "missing"])
    def test_with_none_left_one_line_says_so_and_all_stays_as_it_is(self, previous, run, capsys):
        damage(run / "last.ckpt", "empty")
        damage(run / "previous.ckpt", previous)
        before = {path: path.read_bytes() for path in run.glob("*.*")}
        capsys.readouterr()
        assert main(["--resume", str(run)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"python train.py {run / 'config.yaml'} begins anew")
        assert "(0 bytes) is cut short" in line
        assert ("there is none before it" if previous == "missing" else "previous.ckpt") in line
        assert {path: path.read_bytes() for path in run.glob("*.*")} == before

    @pytest.mark.parametrize("how", ["a page of zeros", "missing"])
    def test_a_lost_best_one_is_told_before_training_goes_on(self, how, run, capsys):
        damage(run / "best.ckpt", how)
        capsys.readouterr()
        assert main(["--resume", str(run), "--trainer.max_epochs=5"]) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert line.startswith(f"error: checkpoint {run / 'best.ckpt'} is")
        assert "the best of 3 epochs is lost" in line
        assert "epoch 4" not in out
        assert (run / "receipt.json").exists()

    def test_a_best_one_of_a_later_epoch_than_is_asked_for_is_not_tested(self, run, capsys):
        """Killed between the two, best.ckpt is of the epoch after that of last.ckpt."""
        epochs = torch.load(run / "best.ckpt", weights_only=True)["epoch"] + 1
        assert epochs == 3
        damage(run / "last.ckpt", "empty")
        assert main(["--resume", str(run), "--trainer.max_epochs=2"]) == 2
        assert "has 3 epochs already: trainer.max_epochs 2 is less" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [3, None], ids=["in its first epoch", "between the first best.ckpt and last.ckpt"])
def test_a_run_killed_before_it_had_finished_an_epoch_begins_again(batch, three_epochs, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("train.how_to_go_on", lambda run: "")  # killed, it cleans nothing away
        if batch:
            stop_at(patch, epoch=0, batch=batch)
        else:
            patch.setattr(callbacks.checkpoint.LastCheckpoint, "on_train_epoch_end", Mock(side_effect=Stop))
        with pytest.raises(Stop):
            main([EXPERIMENT, *THREE_EPOCHS])
    run = only_run(tmp_path)
    assert read_history(run / "metrics.csv")
    assert main(["--resume", str(run)]) == 0
    assert "had not finished an epoch: it begins again" in capsys.readouterr().out
    assert_same_run(three_epochs, run)


def test_what_is_drawn_as_a_first_batch_is_made_is_what_would_have_been(train, monkeypatch, tmp_path):
    """Such as flips: EpochSeeding hears of the batch after that."""
    normalise = MNIST.on_after_batch_transfer

    def add_noise(self, batch, dataloader_idx):
        images, labels = normalise(self, batch, dataloader_idx)
        return images + self.trainer.training * torch.rand(images.shape), labels

    monkeypatch.setattr(MNIST, "on_after_batch_transfer", add_noise)
    assert_survives_a_stop(
        [*TINY, *SMALL_NET, "--trainer.max_epochs=3"], train, monkeypatch, tmp_path, epoch=1, batch=2
    )


def test_ctrl_c_says_how_to_go_on_and_what_was_trained_is_kept(tmp_path):
    argv = [EXPERIMENT, *TINY, *SMALL_NET, "--trainer.max_epochs=400"]
    process = start(argv, until="epoch  20/")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    run = only_run(tmp_path)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert f"python train.py --resume {run}" in err
    epoch = torch.load(run / "last.ckpt", weights_only=True)["epoch"]
    assert main(["--resume", str(run), "--trainer.max_epochs", str(epoch + 3)]) == 0
    assert receipt(run)["tested"] == 103


class TestOtherCircumstances:
    """A run goes on as it began, or not at all."""

    @pytest.fixture
    def refused(self, capsys):
        def call(run: Path, *argv: str) -> str:
            before = {path: path.read_bytes() for path in run.glob("*.*")}
            capsys.readouterr()
            assert main(["--resume", str(run), *argv]) == 2
            assert {path: path.read_bytes() for path in run.glob("*.*")} == before
            err = capsys.readouterr().err
            assert err.count("\n") == 1
            return err

        return call

    @pytest.mark.parametrize(
        "override",
        ["--seed_everything=7", "--data.batch_size=17", "--model.optimizer=torch.optim.SGD", "--checkpoint.mode=min"],
    )
    def test_other_settings_are_refused(self, train, refused, override):
        key = override.partition("=")[0].removeprefix("--").rpartition(".")[2]
        line = refused(train(*SMALL_NET), override)
        assert "goes on with the run as it began" in line
        assert key in line

    def test_fewer_epochs_than_there_are_is_refused(self, train, refused):
        assert "has 2 epochs already" in refused(train(*SMALL_NET), "--trainer.max_epochs=1")

    def test_other_data_is_refused(self, train, refused, tmp_path, monkeypatch):
        run = train(*SMALL_NET)
        write_mnist(tmp_path / "other", seed=5)
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "other"))
        assert "began with other data" in refused(run, "--trainer.max_epochs=3")

    def test_a_checkpoint_without_the_loops_state_is_refused(self, train, refused):
        run = train(*SMALL_NET)
        saved = torch.load(run / "last.ckpt", weights_only=True)
        del saved["loops"]
        torch.save(saved, run / "last.ckpt")
        assert "it has no loops" in refused(run, "--trainer.max_epochs=3")

    def test_a_relative_runs_folder_and_an_absolute_resume(self, train, monkeypatch, tmp_path):
        whole = Path(shutil.move(train(*SIX_EPOCHS, tiny=()), tmp_path / "whole"))
        monkeypatch.setenv("RUNS_DIR", os.path.relpath(tmp_path / "runs"))
        with monkeypatch.context() as patch:
            stop_at(patch, epoch=1, batch=0)
            with pytest.raises(Stop):
                main([EXPERIMENT, *SIX_EPOCHS])
        run = only_run(tmp_path)
        monkeypatch.chdir(run.parent)  # and by its bare name, from beside it
        assert main(["--resume", run.name]) == 0
        assert_same_run(whole, run)

    def test_a_run_that_goes_on_has_no_receipt_until_it_is_tested_again(self, train, monkeypatch):
        run = train(*SMALL_NET)
        stop_at(monkeypatch, epoch=2, batch=1)
        with pytest.raises(Stop):
            main(["--resume", str(run), "--trainer.max_epochs=4"])
        assert not (run / "receipt.json").exists()

    def test_max_steps_in_mid_epoch_keeps_the_last_whole_one(self, train):
        run = train(*SMALL_NET, "--trainer.max_epochs=4", "--trainer.max_steps=20")  # 8 steps an epoch
        assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 1

    def test_a_run_that_early_stopping_ended_has_ended(self, train):
        argv = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/acc", "--trainer.callbacks.mode=max",
                "--trainer.callbacks.stopping_threshold=0.01", "--trainer.max_epochs=9"]  # fmt: skip
        run = train(*SMALL_NET, *argv)
        epochs = receipt(run)["epochs"]
        assert epochs < 9
        assert main(["--resume", str(run)]) == 0
        assert receipt(run)["epochs"] == epochs


def test_accumulated_gradients_resume_to_the_same_bits(train, monkeypatch, tmp_path):
    argv = [*SIX_EPOCHS, "--trainer.accumulate_grad_batches=3", "--trainer.log_every_n_steps=1"]
    assert_survives_a_stop(argv, train, monkeypatch, tmp_path, epoch=2, batch=4)


@pytest.mark.parametrize(
    ("experiment", "argv", "stop"),
    [
        ("line_by_hand", ["--trainer.max_epochs=6", "--data.batch_size=30"], {"epoch": 3, "batch": 1}),
        ("two_layer_function", ["--trainer.max_epochs=6"], {"epoch": 3, "batch": 0}),
        ("schedule_onecycle", ["--trainer.max_epochs=6"], {"epoch": 3, "batch": 5}),
        ("schedule_warmup_cosine", ["--trainer.max_epochs=6"], {"epoch": 4, "batch": 2}),
        ("schedule_plateau", ["--trainer.max_epochs=6", "--model.lr_scheduler.patience=0"], {"epoch": 4, "batch": 2}),
        # a plateau that is looked at every second epoch, and a stop after one in which it was not
        ("schedule_plateau", ["--trainer.max_epochs=8", "--model.lr_scheduler.patience=0", "--model.lr_scheduler.threshold=0.9",
                              "--trainer.check_val_every_n_epoch=2"], {"epoch": 3, "batch": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_ways_of_descending_resume_to_the_same_bits(experiment, argv, stop, train, monkeypatch, tmp_path):
    model = RegressorByHand if experiment.startswith(("line", "two_layer")) else Regressor
    path = f"experiments/{experiment}.yaml"
    assert_survives_a_stop(argv, train, monkeypatch, tmp_path, experiment=path, model=model, **stop)


def test_the_static_graphs_choice_survives_a_stop(train, monkeypatch, tmp_path):
    """Stopped where the last loss is under 5: the next step's weights are chosen by what the checkpoint says of it."""
    argv = [
        "--trainer.max_epochs=50",
        "--model.compile=false",
        "--data.pairs=3",
        "--model.lr=3e-4",
        "--model.hidden=20",
    ]
    argv += [f"--{part}.{size}={n}" for part in ("data", "model") for size, n in (("inputs", 4), ("outputs", 2))]
    path = "experiments/two_layer_static_graph.yaml"
    assert_survives_a_stop(argv, train, monkeypatch, tmp_path, path, model=RegressorByHand, epoch=34, batch=0)
    rows = {row["epoch"]: row["value"] for row in read_history(tmp_path / "whole" / "metrics.csv")}
    assert 6 * rows[33] < 5 < 6 * rows[34]
