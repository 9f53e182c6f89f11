"""The story of train.py: a run, what it leaves, and the same numbers when it is repeated."""

import fcntl
import hashlib
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, SMALL_NET, TINY

from runner.history import read_history
from runner.run import Run
from train import main


def weights(run: Path, name: str = "best.ckpt") -> dict[str, torch.Tensor]:
    return torch.load(run / name, weights_only=True)["state_dict"]


def receipt(run: Path) -> dict:
    return json.loads((run / "receipt.json").read_text())


def assert_same_run(a: Path, b: Path) -> None:
    """Same bits in the weights, the metrics, the history, and what the receipts say."""
    for name in ("best.ckpt", "last.ckpt"):
        for key, tensor in weights(a, name).items():
            assert torch.equal(tensor, weights(b, name)[key]), f"{name}: {key}"
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
    told = ("experiment", "metrics", "config_sha256", "data", "tested", "seed", "parameters")
    assert {k: receipt(a)[k] for k in told} == {k: receipt(b)[k] for k in told}
    assert receipt(a)["checkpoint"]["step"] == receipt(b)["checkpoint"]["step"]


@pytest.mark.pictures
def test_a_run_leaves_what_the_design_says(train, capsys, small_data):
    run = train()
    assert sorted(p.name for p in run.iterdir()) == [
        "best.ckpt", "config.yaml", "last.ckpt", "metrics.csv", "pictures", "previous.ckpt", "receipt.json",
    ]  # fmt: skip
    assert sorted(p.name for p in (run / "pictures").iterdir()) == [
        "confusion_matrix.png",
        "curves.png",
        "filters.png",
        "predictions.png",
    ]
    assert re.fullmatch(r"\d{8}-\d{6}-s42-[a-z0-9]{8}", run.name)
    assert run.parent.name == "mnist_mlp"

    said = receipt(run)
    assert said["experiment"] == "mnist_mlp"
    assert said["tested"] == said["data"]["test"] == 103  # not a multiple of any batch: nothing dropped or repeated
    assert (said["data"]["train"], said["data"]["val"]) == (247, 53)
    assert said["data"]["source"] == f"files in {small_data / 'MNIST' / 'raw'}"
    assert said["seed"] == 42
    assert said["parameters"] == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert said["precision"] == "32-true"
    assert said["checkpoint"]["sha256"] == hashlib.sha256((run / "best.ckpt").read_bytes()).hexdigest()
    assert said["config_sha256"] == hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    assert said["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert said["seconds"]["fit"] > 0
    assert said["seconds"]["test"] > 0

    out = capsys.readouterr().out
    assert "MNIST: 247 to train, 53 to validate, 103 to test: files in" in out
    assert "669,706 parameters" in out
    assert f"{said['metrics']['test/acc']:.4f}" in out
    assert str(run) in out
    assert "--resume" in out


def test_history_has_every_stage_once_an_epoch_or_every_n_steps(train):
    rows = read_history(train() / "metrics.csv")
    steps = {}
    for row in rows:
        steps.setdefault(row["metric"], []).append((row["epoch"], row["step"]))
    # 247 samples are 8 batches of 32 an epoch; every third step is logged; both epochs are validated
    assert steps["train/loss"] == steps["train/acc"] == [(0, 2), (0, 5), (1, 8), (1, 11), (1, 14)]
    assert steps["val/loss"] == steps["val/acc"] == [(0, 7), (1, 15)]
    assert len(steps["test/acc"]) == 1


def test_an_epoch_shorter_than_the_logging_interval_is_logged_once(train):
    run = train("--trainer.log_every_n_steps=50")
    assert [r["step"] for r in read_history(run / "metrics.csv") if r["metric"] == "train/acc"] == [7, 15]


def test_the_same_command_twice_gives_the_same_bits(train):
    assert_same_run(train(*SMALL_NET), train(*SMALL_NET))


def test_another_seed_gives_other_weights(train):
    a, b = train(*SMALL_NET), train(*SMALL_NET, "--seed_everything=1")
    assert not torch.equal(weights(a)["layers.1.weight"], weights(b)["layers.1.weight"])
    assert "-s1-" in b.name


def test_config_yaml_repeats_the_run(train):
    a = train(*SMALL_NET)
    b = train(experiment=str(a / "config.yaml"), tiny=())
    assert a != b
    assert b.parent.name == "mnist_mlp"
    assert_same_run(a, b)


def test_testing_the_best_checkpoint_gives_exactly_the_receipts_metrics(train, monkeypatch):
    run = train(*SMALL_NET)
    tested = {}
    monkeypatch.setattr("train.print_metrics", tested.update)
    files = sorted(run.parent.parent.rglob("*"))
    assert main([str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt")]) == 0
    assert tested == receipt(run)["metrics"]
    assert sorted(run.parent.parent.rglob("*")) == files  # testing only tests


def test_best_is_the_best_and_last_is_the_last_epoch(train):
    # With such a learning rate the second epoch is worse than the first; Lightning's save_last would skip it.
    run = train("--model.sizes=[784, 10]", "--model.optimizer.lr=3", "--checkpoint.monitor=val/loss", "--checkpoint.mode=min",
                "--trainer.max_epochs=5", "--seed_everything=3")  # fmt: skip
    losses = [row["value"] for row in read_history(run / "metrics.csv") if row["metric"] == "val/loss"]
    best = losses.index(min(losses))
    assert best < 4, "for this test the last epoch must not be the best"
    assert receipt(run)["checkpoint"]["epoch"] == best
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 4


def test_checkpoints_hold_plain_types_and_the_optimiser_as_strings(train):
    saved = torch.load(train() / "best.ckpt", weights_only=True)
    hyper = saved["hyper_parameters"]
    assert hyper["optimizer"]["class_path"] == "torch.optim.Adam"
    assert hyper["optimizer"]["init_args"]["lr"] == 1e-3
    assert hyper["sizes"] == [784, 512, 512, 10]


def test_two_runs_started_in_the_same_second_do_not_collide(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20261122-031023")
    folders = {Run.create("mnist_mlp", 42).folder for _ in range(50)}
    assert len(folders) == 50


def test_config_yaml_is_resolved(train):
    config = yaml.safe_load((train() / "config.yaml").read_text())
    assert config["experiment"] == "mnist_mlp"
    assert config["seed_everything"] == 42
    assert config["trainer"]["max_epochs"] == 2  # the override
    assert config["model"]["init_args"]["loss"] == "cross_entropy"  # a default
    assert config["model"]["init_args"]["optimizer"]["init_args"]["betas"] == [0.9, 0.999]  # a default's default


def test_the_output_of_a_first_run_fits_on_one_screen_and_warns_of_nothing(tmp_path, small_data):
    done = subprocess.run(
        [sys.executable, "train.py", "experiments/mnist_mlp.yaml", *TINY, "--trainer.max_epochs=10"],
        capture_output=True, text=True, cwd=REPOSITORY, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) <= 25
    text = done.stdout.replace(str(tmp_path), "").replace(str(small_data), "data")
    assert max(map(len, text.splitlines())) <= 110
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("epoch")] == [
        *(f"{i}/10" for i in range(1, 11))
    ]


def test_on_a_terminal_there_is_a_bar_below_the_lines():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "train.py", "experiments/mnist_mlp.yaml", *TINY]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    out = b""
    while True:
        try:
            out += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    text = out.decode()
    assert re.search(r"epoch 2: +\d+%\|", text)
    assert "epoch 3:" not in text
    assert "v_num" not in text
    assert "epoch 1/2  train/acc" in text
    assert any(line.startswith("test/acc ") for line in text.splitlines()[-13:-8])


def test_help_is_for_newcomers_and_needs_no_torch():
    code = "import sys, train; code = train.main(['--help']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    for words in (
        "experiments/mnist_mlp.yaml",
        "--resume",
        "--ckpt",
        "DATA_DIR",
        "RUNS_DIR",
        "WANDB_MODE",
        "mnist_softmax",
    ):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) < 60
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """Write experiments, of which only the first line is looked at: from names to lines."""

    def write(lines: dict[str, str]) -> None:
        for name, line in lines.items():
            (tmp_path / f"{name}.yaml").write_text(f"# {line}\n#   python train.py\n")
        monkeypatch.setattr("runner.arguments.EXPERIMENTS", tmp_path)

    return write


def test_help_stays_short_with_many_experiments(experiments, capsys):
    data = ("line", "line-2", "mnist", "fashion", "cifar", "text")
    names = ["line", *(f"{name}_{'x' * (i % 9)}{i}" for name in data for i in range(15))]
    experiments(dict.fromkeys(names, "A net."))
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.split("experiments:\n")[1].splitlines()
    assert sorted(" ".join(lines).split()) == sorted(names)
    assert max(map(len, lines)) <= 100
    assert len(lines) < 30
    assert [line.split()[0].partition("_")[0] for line in lines if line[2] != " "] == sorted(data)  # a paragraph each


def test_list_tells_what_the_experiments_are_and_needs_no_torch():
    code = "import sys, train; code = train.main(['--list']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert listed == sorted(path.name for path in (REPOSITORY / "experiments").glob("*.yaml"))
    assert "Softmax regression on MNIST" in done.stdout


@pytest.mark.parametrize(
    ("words", "listed"),
    [
        (["--list"], ["line_module", "mnist_lenet", "two_layer_net"]),
        (["--list", "lenet"], ["mnist_lenet"]),
        (["--list=MNIST"], ["mnist_lenet", "two_layer_net"]),  # the latter's first line
        (["--list", "two", "layer"], ["two_layer_net"]),
    ],
)
def test_list_of_those_with_a_word(experiments, capsys, words, listed):
    experiments({"line_module": "A line.", "two_layer_net": "Two layers on MNIST.", "mnist_lenet": "LeNet."})
    assert main(words) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [f"{name}.yaml" for name in listed]


def test_a_test_is_of_the_whole_test_set(train):
    assert receipt(train("--trainer.limit_test_batches=1", "--data.eval_batch_size=20"))["tested"] == 103


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train_and_are_told_in_the_receipt(train, precision):
    run = train("--trainer.precision", precision)
    assert receipt(run)["precision"] == precision


def test_early_stopping_from_the_yaml_ends_the_run_with_a_receipt(train):
    run = train("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/acc", "--trainer.callbacks.mode=max",
                "--trainer.callbacks.stopping_threshold=0.01", "--trainer.max_epochs=9")  # fmt: skip
    assert sum(row["metric"] == "val/acc" for row in read_history(run / "metrics.csv")) < 9
