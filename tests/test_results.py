"""The numbers in headers and README are those of recorded runs, and a run is measured once."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import results

EXPERIMENTS = sorted(path.stem for path in (REPOSITORY / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_header_and_readme_say_what_was_measured(name):
    records = results.read_json_lines(results.RESULTS, results.NEEDED)
    if name not in {record["experiment"] for record in records}:
        assert results.measured_line(name).startswith("# Measured: not measured")
        return
    header, cell = results.summary(name, records)
    assert results.measured_line(name) == header, f"python benchmarks/results.py --write {name}"
    (row,) = re.findall(rf"^\|.*`experiments/{name}\.yaml` \| (.*) \|$", results.README.read_text(), flags=re.M)
    assert row.startswith(cell)


FAKE_TRAIN = """
import json, os, pathlib, sys
seed = int(sys.argv[sys.argv.index("--seed_everything") + 1])
with open("calls", "a") as file:
    file.write(f"{pathlib.Path(sys.argv[1]).stem} {seed}\\n")
if os.environ.get("FAIL") == str(seed):
    sys.exit("error: it went wrong")
run = pathlib.Path("runs") / f"{seed}"
run.mkdir(parents=True, exist_ok=True)
(run / "receipt.json").write_text(json.dumps({
    "metrics": {"test/acc": 0.9 + seed / 1000, "test/loss": 0.1}, "parameters": 1, "epochs": 2, "checkpoint": {}, "precision": "32",
    "data": {"source": "files in /home/someone/data/raw", "fingerprint": "ab"}, "devices": {"kind": "cpu (x)", "threads": 2}, "versions": {}, "git": None,
    "seconds": {"fit": 12.3 + seed, "test": 1}}))
print(f"run      {run}")
"""
HEADER = "# A net.\n#   python train.py experiments/{name}.yaml\n# Measured: {measured}\n# The notes say otherwise.\n"
BODY = """model:
  class_path: lit_models.mlp.MLP
  init_args: {sizes: [784, 10]}
data: {class_path: datamodules.mnist.MNIST}
checkpoint: {monitor: val/acc, mode: max}
trainer: {max_epochs: 2}
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small repository with two experiments, and a train.py that only pretends."""
    for folder in ("lit_models", "datamodules", "callbacks"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "experiments").mkdir()
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    for name in ("a", "b"):
        (tmp_path / "experiments" / f"{name}.yaml").write_text(HEADER.format(name=name, measured="not measured") + BODY)
    (tmp_path / "README.md").write_text(
        "| x | y | `experiments/a.yaml` | not measured (notes: 1) |\n| x | y | `experiments/b.yaml` | acc 1, 5 s; but |\n"
    )
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.setattr(results, "README", tmp_path / "README.md")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.jsonl")
    results.module.cache_clear()
    yield tmp_path
    results.module.cache_clear()


def calls(root) -> list[str]:
    """What was run since the last look."""
    file = root / "calls"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_all_is_measured_once_and_written_down(root, capsys):
    assert results.main([]) == 0
    assert calls(root) == ["a 1", "a 2", "a 3", "b 1", "b 2", "b 3"]
    assert re.search(r"^2/6  a, seed 2  \(about \d+ min left\)", capsys.readouterr().out, flags=re.M)
    text = (root / "experiments" / "a.yaml").read_text()
    measured = "test/acc 90.20 ± 0.10 % (mean ± standard deviation of seeds 1, 2, 3), 13 s on 2 CPU cores."
    assert text == HEADER.format(name="a", measured=measured) + BODY  # all else as it was
    assert (root / "README.md").read_text() == (
        "| x | y | `experiments/a.yaml` | acc 90.20 ± 0.10 %, 13 s (notes: 1) |\n"
        "| x | y | `experiments/b.yaml` | acc 90.20 ± 0.10 %, 13 s; but |\n"
    )
    assert "/home/someone" not in (root / "results.jsonl").read_text()
    assert results.main([]) == 0  # nothing left to do
    assert calls(root) == []


def test_what_is_done_is_kept_when_it_is_stopped_or_fails(root, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "2")
    assert results.main(["a"]) == 1
    assert calls(root) == ["a 1", "a 2", "a 3"]
    assert "failed: error: it went wrong" in capsys.readouterr().out
    monkeypatch.delenv("FAIL")
    with open(root / "results.jsonl", "a") as file:
        file.write('{"experiment": "a", "seed": 9, ')  # cut short
    assert results.main(["a"]) == 0
    assert calls(root) == ["a 2"]
    assert "seeds 1, 2, 3)" in results.measured_line("a")


def test_the_header_chooses_metrics_and_seeds(root):
    path = root / "experiments" / "a.yaml"
    path.write_text(HEADER.format(name="a", measured="test/loss 1, test/acc 2 % (of seeds 1, 2, 3, 4, 5)") + BODY)
    assert results.main(["a"]) == 0
    assert len(calls(root)) == 5
    assert (
        "# Measured: test/loss 0.1, test/acc 90.30 ± 0.16 % (mean ± standard deviation of seeds 1, 2, 3, 4, 5)"
        in path.read_text()
    )
    path = root / "experiments" / "b.yaml"
    path.write_text(HEADER.format(name="b", measured="not measured (n = 1, seed 7)") + BODY)
    assert results.main(["b"]) == 0
    assert calls(root) == ["b 7"]
    assert "acc 90.7 % (n = 1, seed 7)" in results.measured_line("b")


def test_fewer_seeds_than_the_header_names_are_kept_but_not_told(root, capsys):
    before = (root / "experiments" / "a.yaml").read_text()
    assert results.main(["a", "--seeds", "1", "1"]) == 2
    assert calls(root) == ["a 1"]
    assert "seeds [2, 3] are not measured" in capsys.readouterr().err
    assert results.main(["--write"]) == 0
    assert (root / "experiments" / "a.yaml").read_text() == before
    assert results.main(["a"]) == 0
    assert calls(root) == ["a 2", "a 3"]


def test_seeds_that_cannot_be_read_are_one_line(root, capsys):
    path = root / "experiments" / "a.yaml"
    path.write_text(HEADER.format(name="a", measured="test/acc 1 (of seeds 1 to 5), 3 s") + BODY)
    assert results.main(["a"]) == 2
    assert "expected (... seeds 1, 2, 3)" in capsys.readouterr().err


def test_other_data_is_not_mixed_in(root, capsys):
    assert results.main(["a"]) == 0
    lines = (root / "results.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    record["data"]["fingerprint"] = "other"
    (root / "results.jsonl").write_text(
        "\n".join([json.dumps(record), *lines[1:], "[1]", '{"experiment": "a"}', "\udcff"[:0]])
    )
    assert results.main(["a"]) == 0
    assert "its runs had other data" in capsys.readouterr().out


def test_code_that_is_changed_while_it_runs_does_not_count(root, capsys):
    with open(root / "train.py", "a") as file:
        file.write("open('lit_models/mlp.py', 'a').write('MLP.more = 1\\n')\n")
    assert results.main(["a", "--seeds", "1"]) == 1
    assert "changed while it ran" in capsys.readouterr().out
    assert not (root / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("lit_models/mlp.py", "nn.ReLU()", "nn.GELU()", False),
        ("lit_models/mlp.py", "class MLP(Classifier):\n", "class MLP(Classifier):\n    # another comment\n", True),
        ("lit_models/mlp.py", '"""Hidden layers of ReLU', '"""Layers of ReLU', True),
        ("lit_models/tasks.py", "logits, labels, label_smoothing=label_smoothing)", "logits, labels, label_smoothing=0.1)", False),
        ("lit_models/tasks.py", "F.mse_loss(self(inputs), targets)", "F.l1_loss(self(inputs), targets)", True),  # a regressor's
        ("lit_models/softmax_regression.py", "self.linear(", "2 * self.linear(", True),
        ("datamodules/in_memory.py", "torch.randperm", "torch.arange", False),
        ("callbacks/seeding.py", "[seed, epoch, ", "[epoch, seed, ", False),
        ("callbacks/pictures.py", "BLUE", "BLAU", True),
        ("lit_models/mlp.py", '"""Multi-layer', 'import torch\ntorch.set_flush_denormal(True)\n"""Multi-layer', False),
        ("lit_models/mlp.py", "def linear_layers(", "MLP.scale = 2\n\n\ndef linear_layers(", False),
        ("experiments/a.yaml", "max_epochs: 2", "max_epochs: 3", False),
        ("experiments/a.yaml", "# A net.", "# The net.", True),
    ],
)  # fmt: skip
def test_what_makes_a_run_another_one(root, file, old, new, same):
    before = results.key("a")
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))
    results.module.cache_clear()
    assert (results.key("a") == before) == same


def test_numbers_of_older_code_are_not_mixed_with_new_ones(root):
    assert results.main(["a"]) == 0
    text = (root / "lit_models" / "mlp.py").read_text()
    (root / "lit_models" / "mlp.py").write_text(text.replace("nn.ReLU()", "nn.GELU()"))
    results.module.cache_clear()
    assert results.main(["a", "--seeds", "1", "2"]) == 2
    assert "seeds 1, 2, 3)" in results.measured_line("a")  # as it was
    calls(root)
    (root / "lit_models" / "mlp.py").write_text(text)  # back again: what was measured for it counts
    results.module.cache_clear()
    assert results.main(["a"]) == 0
    assert calls(root) == []
    assert "seeds 1, 2, 3)" in results.measured_line("a")


@pytest.mark.parametrize(
    ("values", "metric", "text"),
    [
        ([0.9829, 0.9819, 0.9808], "test/acc", "98.19 ± 0.11 %"),
        ([84.0, 84.5, 85.0], "test/mse", "84.50 ± 0.50"),
        ([1.4e-7, 2.3e-7, 0.6e-7], "test/mse", "1.43e-07 ± 0.85e-07"),
        ([1.234e-5, 1.236e-5, 1.232e-5], "test/mse", "1.2340e-05 ± 0.0020e-05"),
        ([12345.0, 12346.0, 12344.0], "test/mse", "1.23450e+04 ± 0.00010e+04"),
        ([-1.0, -2.0, -3.0], "test/nelbo", "-2.0 ± 1.0"),
        ([1.0, float("nan")], "test/mse", "nan"),
        ([0.9014630358776691] * 3, "test/mse", "0.9014630358776691"),
        ([0.97557123e-2], "test/mse", "0.009756"),
    ],
)
def test_numbers_end_where_their_spread_begins(values, metric, text):
    assert results.mean_and_spread(values, metric) == text


def test_a_name_that_is_none_is_one_line(root, capsys):
    assert results.main(["c"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_is_a_command():
    done = subprocess.run(
        [sys.executable, "benchmarks/results.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--seeds" in done.stdout
    assert json.dumps("torch") not in done.stdout
