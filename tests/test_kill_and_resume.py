"""The short form of `kill_and_resume.py`: a kill for each kind of task, at random moments; and it would tell."""

import re
import shutil
import subprocess
import sys

import kill_and_resume
import torch
from conftest import REPOSITORY

KINDS = ["mnist_mlp", "line_by_hand", "shapes_fcos", "shapes_unet", "dates_attention", "mnist_gan", "karate_gcn"]


def test_runs_killed_at_random_moments_end_as_if_nothing_had_happened(tmp_path):
    command = [sys.executable, "tests/kill_and_resume.py", "--quick", "--epochs=3", f"--kills={len(KINDS)}"]
    done = subprocess.run(
        [*command, "--experiments", *KINDS, "--keep", tmp_path], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [re.split(r"  +", line) for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == KINDS
    for name, _, _, killed_in, result, _ in rows:
        assert killed_in, name
        assert result == "the same"


def test_a_difference_is_found():
    a = {"state_dict": {"w": torch.tensor([1.0, float("nan")])}, "epoch": 3, "callbacks": {"P": {"seconds": 1.0}}}
    same = {**a, "state_dict": {"w": a["state_dict"]["w"].clone()}, "callbacks": {"P": {"seconds": 2.0}}}
    assert kill_and_resume.differences(a, same) == []
    for other, where in (
        ({**a, "epoch": 4}, ["epoch"]),
        ({**a, "state_dict": {"w": torch.tensor([1.0 + 1e-7, float("nan")])}}, ["state_dict.w"]),
        ({**a, "state_dict": {"w": a["state_dict"]["w"].double()}}, ["state_dict.w"]),
        ({**a, "state_dict": {}}, ["state_dict"]),
    ):
        assert kill_and_resume.differences(a, other) == where


def test_a_run_that_does_not_go_on_as_it_was_is_told(train, tmp_path):
    """As the runs are compared: rows, receipts and files."""
    run = train("--model.sizes=[784, 10]")
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name / "mnist_mlp" / run.name)
    other = tmp_path / "b" / "mnist_mlp" / run.name
    assert kill_and_resume.compare(tmp_path / "a", tmp_path / "b") == []
    rows = (other / "metrics.csv").read_text()
    (other / "metrics.csv").write_text(rows + rows.splitlines(keepends=True)[-1])
    (other / ".last.ckpt.tmp").write_bytes(b"")
    (other / "receipt.json").write_text((other / "receipt.json").read_text().replace('"tested": 103', '"tested": 104'))
    assert kill_and_resume.compare(tmp_path / "a", tmp_path / "b") == [
        "files: ['.last.ckpt.tmp']",
        "metrics.csv",
        "receipt: tested",
    ]
