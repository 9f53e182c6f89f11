"""`--verify` says yes to a run as it was, and no, with the reason, to anything else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL_NET, write_mnist
from test_train import receipt

from callbacks.receipt import sha256
from runner.verify import _print_metrics
from train import main


@pytest.fixture
def run(train) -> Path:
    return train(*SMALL_NET)


@pytest.fixture
def verify(run, capsys):
    """Verify the run; returns the exit code and what was printed."""

    def call(*argv: str) -> tuple[int, str]:
        capsys.readouterr()
        files = sorted(run.parent.parent.rglob("*"))
        code = main(["--verify", str(run / "receipt.json"), *argv])
        assert sorted(run.parent.parent.rglob("*")) == files  # it only looks
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def rewrite(run: Path, **changes) -> None:
    """Change the receipt: `metrics={"test/acc": 1}` is laid over what is there."""
    said = receipt(run)
    for key, value in changes.items():
        said[key] = {**said[key], **value} if isinstance(value, dict) else value
    (run / "receipt.json").write_text(json.dumps(said))


def test_a_run_as_it_was_is_verified_to_the_last_bit(run, verify):
    code, said = verify()
    assert code == 0
    assert "verified: equal to the last bit" in said
    assert said.count("as it was") == 4
    rows = {line.split("  ")[0].strip(): line.split() for line in said.splitlines()}
    for name, value in receipt(run)["metrics"].items():
        assert rows[name].count(repr(value)) == 2  # old and new, side by side


def test_in_another_process_too(run):
    command = [sys.executable, "train.py", "--verify", str(run / "receipt.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "verified: equal to the last bit" in done.stdout


def test_a_moved_run_is_verified(run, tmp_path, capsys):
    moved = shutil.move(run, tmp_path / "elsewhere")
    assert main(["--verify", str(Path(moved) / "receipt.json")]) == 0


def test_a_number_that_is_not_what_the_checkpoint_gives(run, verify):
    rewrite(run, metrics={"test/acc": receipt(run)["metrics"]["test/acc"] + 1e-7})
    code, said = verify()
    assert code == 1
    assert "not verified: not equal to the last bit" in said
    assert "differs by" in said


@pytest.mark.parametrize("shift", [1e-4, 1e-2], ids=["within the tolerance", "beyond it"])
def test_with_other_versions_a_tolerance_holds_and_the_versions_are_named(run, verify, shift):
    rewrite(
        run, versions={"torch": "2.11.0"}, metrics={"test/loss": receipt(run)["metrics"]["test/loss"] * (1 + shift)}
    )
    code, said = verify()
    assert code == (0 if shift == 1e-4 else 1)
    assert f"torch 2.11.0 then, {torch.__version__.partition('+')[0]} now" in said
    assert "within 0.001 of each" in said


def test_another_machine_is_named(run, verify):
    rewrite(run, devices={"kind": "NVIDIA H200", "threads": 99})
    code, said = verify()
    assert code == 0
    assert "NVIDIA H200 then" in said
    assert "threads 99 then" in said


def test_a_cpu_of_another_kind_is_named(run, verify):
    rewrite(run, devices={"cpu": "SSE"}, metrics={"test/loss": receipt(run)["metrics"]["test/loss"] * (1 + 1e-6)})
    code, said = verify()
    assert code == 0
    assert "cpu SSE then" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 7}, "seed is 7, and should be 42"),
        ({"experiment": "mnist_cnn"}, "experiment is mnist_cnn, and should be mnist_mlp"),
        ({"tested": 10_000}, "tested is 10000, and should be 103"),
        ({"parameters": 5}, "parameters is 5"),
        ({"data": {"train": 5}}, "'train': 5"),
    ],
)
def test_a_receipt_that_says_something_else_than_its_run(run, verify, changes, says):
    rewrite(run, **changes)
    code, said = verify()
    assert code == 1
    assert says in said
    assert "not verified: receipt altered" in said


def test_next_to_zero_is_zero_on_another_machine():
    assert _print_metrics({"a": 9.8e-15, "b": float("nan")}, {"a": 0.0, "b": float("nan")}, exact=False)
    assert not _print_metrics({"a": 9.8e-15}, {"a": 0.0}, exact=True)
    assert not _print_metrics({"a": 1.0}, {"a": 1.0, "b": 1.0}, exact=False)


def test_other_weights(run, verify):
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    checkpoint["state_dict"]["layers.1.weight"][0, 0] += 1
    torch.save(checkpoint, run / "best.ckpt")
    code, said = verify()
    assert code == 1
    assert "checkpoint     altered" in said
    assert "not verified: checkpoint altered or missing" in said


@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_checkpoint_that_cannot_be_tested(run, verify, damage):
    if damage == "missing":
        (run / "best.ckpt").unlink()
    else:
        (run / "best.ckpt").write_bytes((run / "best.ckpt").read_bytes()[:5000])
    code, said = verify()
    assert code == 1
    assert f"checkpoint     {'missing' if damage == 'missing' else 'altered'}" in said
    assert "not verified" in said
    assert "Traceback" not in said


def test_another_configuration(run, verify):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("eval_batch_size: 1000", "eval_batch_size: 10"))
    code, said = verify()
    assert code == 1
    assert "configuration  altered" in said


def test_a_run_of_a_machine_that_this_is_not(run, verify):
    config = run / "config.yaml"
    text = config.read_text()
    for was, cluster in (
        ("strategy: auto", "strategy: fsdp"),
        ("num_nodes: 1", "num_nodes: 2"),
        ("devices: 1", "devices: 4"),
    ):
        assert was in text
        text = text.replace(was, cluster)
    config.write_text(text)
    rewrite(run, config_sha256=sha256(config))
    code, said = verify()
    assert (code, "verified: equal" in said) == (0, True), said


def test_other_data(run, verify, tmp_path, monkeypatch):
    write_mnist(tmp_path / "other", seed=5)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "other"))
    code, said = verify()
    assert code == 1
    assert "data           another" in said
    assert "not verified: data altered or missing" in said


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a run's receipt: it has no experiment"),
        ('{"experiment": "a", "metrics": {}}', "it has no checkpoint, config_sha256, data"),
        (
            json.dumps({key: [] for key in ("metrics", "checkpoint", "data", "versions", "devices")} | {"seed": "1"}),
            "it has no exp",
        ),
        (
            json.dumps(
                {
                    "experiment": "a",
                    "metrics": {"x": "y"},
                    "checkpoint": {"path": 1},
                    "config_sha256": "",
                    "data": {},
                    "tested": 1,
                    "seed": 1,
                    "parameters": 1,
                    "versions": {},
                    "devices": {},
                }
            ),
            "it has no checkpoint.path",
        ),
    ],
)
def test_what_is_no_receipt_is_one_line(run, verify, content, line):
    (run / "receipt.json").write_text(content)
    code, said = verify()
    assert code == 2
    assert line in said
    assert said.count("\n") == 1


def test_it_takes_a_receipt_and_nothing_else(run, verify):
    assert verify("--trainer.max_epochs=3")[0] == 2
    assert verify("experiments/mnist_mlp.yaml")[0] == 2
    assert verify("--ckpt", str(run / "best.ckpt"))[0] == 2
    (run / "config.yaml").unlink()
    code, said = verify()
    assert code == 2
    assert "config.yaml does not exist" in said


def test_a_line_in_double_precision(train, capsys):
    run = train("--trainer.max_epochs=20", experiment="experiments/line_by_hand.yaml", tiny=())
    assert main(["--verify", str(run / "receipt.json")]) == 0
    assert "verified: equal to the last bit" in capsys.readouterr().out
