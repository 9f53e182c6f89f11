"""Weights & Biases: offline unless a key says otherwise, and what is in a run, read back with wandb's own reader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner import run as runner_run
from runner.account import wandb_mode
from runner.history import read_history
from train import main


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """As for somebody without an account."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


def inspect(run: Path, *options: str) -> str:
    (file,) = run.parent.parent.glob(f"wandb/offline-run-*-{run.name.rpartition('-')[2]}/*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [wandb, "leet", "inspect", *options, "--json", file], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.pictures
def test_a_run_holds_the_nested_config_the_metrics_and_the_pictures(offline, train):
    run = train()
    summary = json.loads(inspect(run, "--summary"))
    config = summary["config"]
    assert config["model"]["class_path"] == "lit_models.mlp.MLP"
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-3
    assert config["trainer"]["max_epochs"] == 2
    assert config["seed_everything"] == 42

    records = [json.loads(line) for line in inspect(run).splitlines()]
    assert records
    text = json.dumps(records)
    for metric in ("train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc"):
        assert metric in text
    for picture in ("pictures/predictions", "pictures/confusion_matrix", "pictures/filters", "pictures/curves"):
        assert picture in text
    for name in ("mnist_mlp-s42", "lightning-lectures", "classification"):
        assert name in text
    files = list(run.parent.parent.glob("wandb/offline-run-*/files/media/images/pictures/*.png"))
    assert len(files) == 4

    logged = {row["metric"]: row["value"] for row in read_history(run / "metrics.csv")}  # the last of each
    for metric in ("val/acc", "val/loss", "test/acc", "train/loss"):
        assert logged[metric] == pytest.approx(float(summary["summary"][metric]), rel=1e-6)


def test_no_account_is_no_reason_to_ask_or_to_fail(offline):
    assert wandb_mode() == "offline"


def test_a_key_means_online(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode() == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'x' * 40}\n")
    os.chmod(tmp_path / "netrc", 0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode() == "online"


def test_wandb_mode_overrides(offline, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_online_without_a_network_goes_on_offline(offline, monkeypatch, train, capsys):
    import wandb

    init, modes = wandb.init, []

    def no_network(**arguments):
        modes.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no network in tests")
        return init(**arguments)

    monkeypatch.setattr(wandb, "init", no_network)
    monkeypatch.setenv("WANDB_MODE", "online")
    train()
    assert modes == ["online", "offline"]
    assert "W&B: cannot be reached (no network in tests): this run is kept offline" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_id(offline, train, tmp_path):
    run = train()
    main(["--resume", str(run), "--trainer.max_epochs", "3"])
    files = {path.name for path in (tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb")}
    assert files == {f"run-{run.name.rpartition('-')[2]}.wandb"}


def test_a_step_never_goes_back():
    """wandb drops what is logged for an earlier step than the last."""
    steps = []

    class Sink:
        def log(self, metrics, step):
            steps.append((step, metrics["trainer/global_step"]))

    logger = runner_run.RunWandbLogger(project="p", mode="disabled")
    logger._experiment = Sink()
    for step in (3, 7, 0, None):
        logger.log_metrics({"x": 1.0}, step)
    assert steps == [(3, 3), (7, 7), (7, 7), (7, 7)]


def test_the_command_that_sends_an_offline_run_is_printed_and_finds_it(offline, train, capsys):
    run = train("--trainer.max_epochs=1")
    (command,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("sync "))
    program, verb, folder = command.split()[1:]
    assert Path(folder).name.startswith("offline-run-")
    assert folder.endswith(run.name.rpartition("-")[2])
    wandb = Path(sys.executable).with_name(program)
    done = subprocess.run([wandb, verb, "--dry-run", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(folder).name in done.stdout + done.stderr
