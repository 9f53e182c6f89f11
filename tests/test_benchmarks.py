"""The benchmarks run; what they measure is in the README."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY


def test_epoch_time_pairs_the_epochs_and_prints_the_ratios():
    command = [sys.executable, "benchmarks/epoch_time.py", "--epochs", "2", "--data.val_size=100"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("A ") and "B " in line and "C " in line for line in lines) == 2
    for ratio in ("A / B", "C / A", "D / A"):
        assert any(line.startswith(ratio) for line in lines), done.stdout


def test_startup_time_ends_at_the_first_step(monkeypatch, capsys):
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks import startup_time

    ended = []
    monkeypatch.setattr(startup_time.os, "_exit", ended.append)
    startup_time.EndAfterFirstStep().on_train_batch_end(None)
    assert ended == [0]
    monkeypatch.setattr(startup_time, "seconds", lambda *command: 2.0 if "train.py" in command else 1.0)
    startup_time.main()
    assert "first step after 2.00 s, import 1.00 s, A / B 2.00" in capsys.readouterr().out


@pytest.mark.parametrize("values", [[1.0, 3.0, 2.0]])
def test_spread(values):
    from benchmarks.epoch_time import spread

    assert spread(values) == "2.00 (1.00 to 3.00)"
