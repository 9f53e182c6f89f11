"""A sweep draws what wandb would, survives whatever ends it, and tells which trial was best."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from sweep import main
from sweeping.distributions import DISTRIBUTIONS
from sweeping.file import read_sweep
from sweeping.trials import draw_trials, fill_command, state_folder

SHIPPED = sorted((REPOSITORY / "sweeps").glob("*.yaml"))

# Stands for train.py: it notes that it was called, then does what x says.
FAKE = """
import json, os, pathlib, sys, time

here = pathlib.Path(__file__).parent
values = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
x = values["x"]
with open(here / "calls.txt", "a") as file:
    print(os.getpid(), x, file=file)
print("epoch 1/1", flush=True)
if x == "crash":
    raise RuntimeError("no such luck")
if x == "refuse":
    sys.exit("error: x cannot be used")
if x == "silent":
    sys.exit()
if x == "wait" and not (here / "go").exists():
    time.sleep(60)
run = pathlib.Path(os.environ["RUNS_DIR"]) / "fake" / f"{x}-{os.getpid()}"
run.mkdir(parents=True)
receipt = {"metrics": {"test/mse": float(values.get("y", 1))}, "checkpoint": {"epoch": 3}}
if x == "nan":
    receipt["metrics"]["test/mse"] = float("nan")
if x == "other":
    receipt["metrics"] = {"test/acc": 0.5, "test/loss": 1.0}
(run / "receipt.json").write_text(json.dumps(receipt))
(run / "metrics.csv").write_text("step,epoch,metric,value\\n1,2,val/mse,9\\n2,3,val/mse,4\\n3,4,val/mse,1\\n")
print(f"\\ntest/mse 1\\n\\nrun      {run}\\nlook     {run}/pictures")
"""


@pytest.fixture
def sweep_file(tmp_path):
    """Write a sweep of the fake program; returns its path."""
    (tmp_path / "fake.py").write_text(FAKE)

    def write(parameters: dict | None = None, **keys) -> Path:
        content = {
            "program": str(tmp_path / "fake.py"),
            "method": "grid",
            "metric": {"name": "test/mse"},
            "parameters": {"x": {"values": [3, 1, 2]}} if parameters is None else parameters,
        }
        content |= keys
        path = tmp_path / "fake.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return path

    return write


def calls(tmp_path) -> list[str]:
    """The x of each call of the fake program."""
    return [line.split()[1] for line in (tmp_path / "calls.txt").read_text().splitlines()]


def records(tmp_path) -> list[dict]:
    (path,) = tmp_path.glob("runs/sweeps/*/trials.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if os.path.exists("/proc") else True
    )


def trials(path: Path, seed: int = 0, most: int | None = None) -> list[dict]:
    sweep = read_sweep(path)
    return draw_trials(sweep, seed, most or sweep.run_cap)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_a_grid_is_in_the_order_of_the_file_the_last_key_fastest(sweep_file):
    path = sweep_file(
        {"x": {"values": [3, 1]}, "c": {"value": "k"}, "a": {"values": [[1, 2], None]}, "n": {"min": 1, "max": 2}}
    )
    assert [tuple(trial.values()) for trial in trials(path)] == [
        (x, "k", a, n) for x in (3, 1) for a in ([1, 2], None) for n in (1, 2)
    ]
    assert len(trials(path, most=3)) == 3


def test_nested_parameters_are_joined_by_dots(sweep_file):
    nested = {
        "model": {"parameters": {"optimizer": {"parameters": {"lr": {"values": [1, 2]}}}, "dropout": {"value": 0}}}
    }
    assert trials(sweep_file(nested))[1] == {"model.optimizer.lr": 2, "model.dropout": 0}


RANGES = {
    "constant": ({"value": 7}, 7, 7),
    "categorical": ({"values": [1, 5]}, 1, 5),
    "categorical_w_probabilities": ({"values": [1, 5, 99], "probabilities": [0.5, 0.5, 0]}, 1, 5),
    "int_uniform": ({"min": 2, "max": 4}, 2, 4),
    "uniform": ({"min": 2, "max": 4}, 2, 4),
    "q_uniform": ({"min": 1, "max": 10, "q": 4}, 4, 8),
    "log_uniform": ({"min": -3, "max": 0}, 0.0497, 1),
    "q_log_uniform": ({"min": 0, "max": 3}, 1, 20),
    "inv_log_uniform": ({"min": 0, "max": 3}, 0.0497, 1),
    "log_uniform_values": ({"min": 1e-4, "max": 0.1}, 1e-4, 0.1),
    "q_log_uniform_values": ({"min": 0.2, "max": 0.6, "q": 0.2}, 0.2, 0.6),
    "inv_log_uniform_values": ({"min": 1e-4, "max": 0.1}, 1e-4, 0.1),
    "normal": ({"mu": 5, "sigma": 0.1}, 4, 6),
    "q_normal": ({"mu": 5, "sigma": 0.1, "q": 0.5}, 4.5, 5.5),
    "log_normal": ({"sigma": 0.1}, 0.5, 2),
    "q_log_normal": ({}, 0, 200),
    "beta": ({"a": 2}, 0, 1),
    "q_beta": ({"q": 0.25}, 0, 1),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_are_in_range_differ_and_come_again(sweep_file, name):
    spec, low, high = RANGES[name]
    path = sweep_file({"x": {"distribution": name, **spec}}, method="random", run_cap=200)
    drawn = [trial["x"] for trial in trials(path)]
    assert drawn == [trial["x"] for trial in trials(path)]
    assert drawn[:20] == [trial["x"] for trial in trials(path, most=20)], "a trial depends on how many there are"
    assert all(low <= value <= high for value in drawn)
    if name != "constant":
        assert len(set(drawn)) > 1
        assert drawn != [trial["x"] for trial in trials(path, seed=1)]
    if q := spec.get("q"):
        assert all(abs(value / q - round(value / q)) < 1e-9 for value in drawn)
        assert all(type(value) is type(q) for value in drawn)


def test_log_uniform_values_gives_each_power_of_ten_its_share(sweep_file):
    path = sweep_file(
        {"x": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1}}, method="random", run_cap=900
    )
    shares = [sum(10**-e <= trial["x"] < 10 ** -(e - 1) for trial in trials(path)) for e in (4, 3, 2)]
    assert all(240 < share < 360 for share in shares)  # 300 each; 14 is a standard deviation


def test_the_distribution_that_wandb_implies(sweep_file):
    path = sweep_file({"n": {"min": 1, "max": 3}, "x": {"min": 1, "max": 3.0}}, method="random", run_cap=20)
    assert {type(trial["n"]) for trial in trials(path)} == {int}
    assert {type(trial["x"]) for trial in trials(path)} == {float}


def test_a_random_trial_is_the_same_in_another_process(sweep_file):
    path = sweep_file({"x": {"min": 0.0, "max": 1.0}}, method="random", run_cap=3)
    code = f"from pathlib import Path; from sweep import *; print(draw_trials(read_sweep(Path({str(path)!r})), 0, 3))"
    random.seed(5)
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(trials(path))


# -- running ----------------------------------------------------------------------------------------------------------


def test_a_sweep_from_start_to_end(sweep_file, tmp_path, capsys):
    path = sweep_file({"x": {"values": [1, 2]}, "y": {"values": [0.5, 0.25]}, "z": {"value": 1}})
    assert main([str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "grid: 4 trials, test/mse to minimize"
    assert re.fullmatch(r"trial 1/4  x=1  y=0.5  test/mse 0.5  0 s  \(about \d s left\)", out[2])
    assert re.fullmatch(r"trial 4/4  x=2  y=0.25  test/mse 0.25  0 s", out[5])
    assert [line.split() for line in out[7:12]] == [
        ["trial", "x", "y", "test/mse"],
        ["best", "2", "1", "0.25", "0.25"],
        ["4", "2", "0.25", "0.25"],
        ["1", "1", "0.5", "0.5"],
        ["3", "2", "0.5", "0.5"],
    ]
    found = records(tmp_path)
    assert f"run      {found[1]['run']}" in out
    assert found[1]["parameters"] == {"x": 1, "y": 0.25, "z": 1}
    assert found[1]["metrics"] == {"test/mse": 0.25, "val/mse": 4}, "val/mse is that of the epoch that was tested"
    assert (found[1]["index"], found[1]["state"], found[1]["error"]) == (2, "ok", None)
    assert len(list(tmp_path.glob("runs/sweeps/fake-*/trial-00[1-4].log"))) == 4

    assert main([str(path)]) == 0
    assert len(calls(tmp_path)) == 4, "a finished trial was run again"
    assert "4 of them ended before" in capsys.readouterr().out


def test_the_best_can_be_the_largest_and_a_metric_of_the_validation_set(sweep_file, capsys):
    path = sweep_file({"x": {"value": 1}, "y": {"values": [1, 3, 2]}}, metric={"name": "test/mse", "goal": "maximize"})
    assert main([str(path)]) == 0
    assert "best  2      3  3" in capsys.readouterr().out
    assert main([str(sweep_file(metric={"name": "val/mse", "goal": "maximize"}))]) == 0
    assert "val/mse 4" in capsys.readouterr().out


def test_what_fails_is_recorded_and_stops_nothing(sweep_file, tmp_path, capsys):
    values = ["crash", "refuse", "silent", "nan", "other", "fine"]
    path = sweep_file({"x": {"values": values}})
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    errors = {record["parameters"]["x"]: record["error"] for record in records(tmp_path)}
    assert errors == {
        "crash": "exit code 1: RuntimeError: no such luck",
        "refuse": "exit code 1: error: x cannot be used",
        "silent": "it printed no line `run      FOLDER`",
        "nan": "test/mse is nan",
        "other": "metric test/mse is not in its receipt; there are: test/acc, test/loss, val/mse",
        "fine": None,
    }
    table = out[out.index("\n\n", out.index("trial 6/6")) :]
    rows = [line.split(maxsplit=2) for line in table.split("\n\n")[1].splitlines()[1:]]
    assert rows[0] == ["best", "6", "fine    1"]
    assert rows[1] == ["1", "crash", "failed: exit code 1: RuntimeError: no such luck"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3", "4", "5"]
    assert "failed   5 of 6" in out

    assert main([str(path)]) == 0
    assert calls(tmp_path) == values, "a failed trial was run again"


def test_all_failed_is_exit_code_1(sweep_file, capsys):
    assert main([str(sweep_file({"x": {"values": ["crash"]}}))]) == 1
    assert "best" not in capsys.readouterr().out


def test_more_trials_later_go_on(sweep_file, tmp_path):
    path = sweep_file({"x": {"min": 1, "max": 1000}}, method="random", run_cap=2)
    assert main([str(path)]) == 0
    assert main([str(path), "--trials", "4"]) == 0
    assert calls(tmp_path) == [str(trial["x"]) for trial in trials(path, most=4)]
    assert main([str(path), "--seed=1"]) == 0
    assert calls(tmp_path)[4:] == [str(trial["x"]) for trial in trials(path, seed=1)]


def test_another_file_or_experiment_is_another_sweep(sweep_file, tmp_path):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text("a: 1\n")
    command = ["python", "${program}", str(experiment), "${args}"]
    first = state_folder(read_sweep(sweep_file(command=command)), 0)
    assert state_folder(read_sweep(sweep_file(command=command)), 0) == first
    assert state_folder(read_sweep(sweep_file(command=command, run_cap=1)), 0) != first
    experiment.write_text("a: 2\n")
    assert state_folder(read_sweep(sweep_file(command=command)), 0) != first


def test_a_line_cut_short_costs_one_trial(sweep_file, tmp_path):
    path = sweep_file()
    assert main([str(path)]) == 0
    (file,) = tmp_path.glob("runs/sweeps/*/trials.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    assert main([str(path)]) == 0
    assert calls(tmp_path) == ["3", "1", "2", "2"]
    assert [record["index"] for record in records(tmp_path)] == [1, 2, 3]


# -- ending early -----------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting(sweep_file, tmp_path):
    """Start a sweep whose third trial does not end; returns its process, once it is there."""
    path = sweep_file({"x": {"values": [1, "crash", "wait", 2]}})
    command = [sys.executable, "sweep.py", str(path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: (tmp_path / "calls.txt").exists() and "wait" in calls(tmp_path))
    yield process
    process.kill()
    process.communicate()


def goes_on(tmp_path, capsys) -> None:
    """The killed or interrupted sweep, called again, does what is left and nothing twice."""
    (tmp_path / "go").touch()
    assert main([str(tmp_path / "fake.yaml")]) == 0
    assert calls(tmp_path) == ["1", "crash", "wait", "wait", "2"]
    assert "2 of them ended before" in capsys.readouterr().out
    assert [(record["index"], record["state"]) for record in records(tmp_path)] == [
        (1, "ok"),
        (2, "failed"),
        (3, "ok"),
        (4, "ok"),
    ]


def last_pid(tmp_path) -> int:
    return int((tmp_path / "calls.txt").read_text().splitlines()[-1].split()[0])


def test_kill_9_costs_the_trial_that_was_running(waiting, tmp_path, capsys):
    trial = last_pid(tmp_path)
    waiting.kill()
    waiting.wait()
    if sys.platform == "linux":
        until(lambda: not alive(trial))
    else:
        os.kill(trial, signal.SIGKILL)
    goes_on(tmp_path, capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_trial_too_and_says_how_to_go_on(waiting, tmp_path, capsys, number):
    trial = last_pid(tmp_path)
    waiting.send_signal(number)
    out, err = waiting.communicate(timeout=20)
    assert waiting.returncode == 130
    assert not alive(trial)
    assert err.strip().endswith(f"to go on: python sweep.py {tmp_path / 'fake.yaml'}")
    assert "Traceback" not in err
    assert out.startswith("grid: 4 trials")
    goes_on(tmp_path, capsys)


def test_one_at_a_time(waiting, sweep_file, tmp_path, capsys):
    assert main([str(tmp_path / "fake.yaml")]) == 2
    assert "is running already" in capsys.readouterr().err
    assert len(calls(tmp_path)) == 3


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys, tmp_path):
    """Call sweep.py with a mistake; returns the one line it says."""

    def call(*argv: str) -> str:
        assert main(list(argv)) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert not (tmp_path / "runs").exists()
        return err

    return call


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "try: python sweep.py sweeps/mnist_mlp.yaml"),
        (["sweeps/mnist_mpl.yaml"], "did you mean 'mnist_mlp.yaml'?"),
        (["sweeps/mnist_mlp.yaml", "sweeps/curve_fit.yaml"], "one sweep at a time"),
        (["sweeps/curve_fit.yaml", "--trails", "2"], "did you mean '--trials'?"),
        (["sweeps/curve_fit.yaml", "--trials", "0"], "whole number from 1, got 0"),
        (["sweeps/curve_fit.yaml", "--trials"], "--trials needs a whole number from 1, got nothing"),
        (["sweeps/curve_fit.yaml", "--seed", "one"], "--seed needs a whole number from 0, got one"),
        (["sweeps/mnist_mlp.yaml", "--seed", "1"], "a grid draws nothing"),
    ],
)
def test_the_command_line(refused, argv, says):
    assert says in refused(*argv)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"methud": "grid"}, "unknown key methud; did you mean 'method'?"),
        ({"method": "gird"}, "unknown method gird; did you mean 'grid'?"),
        ({"method": None}, "unknown method none given; there are: bayes, grid, random"),
        ({"method": "bayes"}, "online it is: wandb sweep"),
        ({"scheduler": {"engine": "optuna"}}, "online it is: wandb sweep"),
        ({"method": "random"}, "give run_cap in the file, or --trials"),
        ({"run_cap": 0}, "run_cap: must be a whole number from 1, got 0"),
        ({"metric": None}, "metric: say what trials are compared by"),
        ({"metric": {"name": "a", "gaol": "maximize"}}, "metric: unknown key gaol; did you mean 'goal'?"),
        ({"metric": {"name": "a", "goal": "maximise"}}, "did you mean 'maximize'?"),
        ({"parameters": {}}, "parameters: give at least one"),
        ({"program": "trian.py"}, "did you mean 'train.py'?"),
        ({"program": None}, "there is no key program"),
        ({"command": "python train.py"}, "command: must be a list of words"),
        ({"command": ["${evn}", "${program}"]}, "${evn} is not supported here; did you mean '${env}'?"),
        ({"command": ["${args_append_hydra}"]}, "${args_append_hydra} is not supported here"),
        ({"command": ["no_such_program", "${args}"]}, "there is no program 'no_such_program'"),
    ],
)
def test_keys_of_the_file(refused, sweep_file, keys, says):
    assert says in refused(str(sweep_file(**keys)))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (0.1, "expected {value: ...}"),
        ({}, "it has nothing"),
        ({"min": 1}, "needs value, values, or min and max; it has min"),
        ({"values": []}, "values: must be a list, and not empty"),
        ({"values": 3}, "values: must be a list, and not empty"),
        ({"vales": [3]}, "it has vales"),
        ({"min": 2, "max": 1}, "min 2 is not less than max 1"),
        ({"min": 1.0, "max": 1.0}, "min 1.0 is not less than max 1.0"),
        ({"min": "1e-3", "max": 1.0}, "1e-3 is a word, and 1.0e-3 a number"),
        ({"min": 0.0, "max": float("inf")}, "max: must be a number"),
        ({"min": 1, "max": 2.5, "distribution": "int_uniform"}, "max: must be a whole number"),
        ({"min": 1, "max": 2, "distribution": "log_unifrom_values"}, "did you mean 'log_uniform_values'?"),
        ({"min": 0, "max": 2, "distribution": "log_uniform_values"}, "must be positive"),
        ({"min": 0, "max": 1000, "distribution": "log_uniform"}, "log_uniform_values the values"),
        ({"min": 1, "distribution": "uniform"}, "uniform needs max"),
        ({"min": 1, "max": 2, "q": 1}, "int_uniform has no q"),
        ({"min": 1, "max": 2, "q": 0, "distribution": "q_uniform"}, "q: must be positive"),
        ({"min": 1, "max": 2, "q": 5, "distribution": "q_uniform"}, "no multiple of 5 lies from 1 to 2"),
        ({"mu": 1, "sgima": 2, "distribution": "normal"}, "normal has no sgima; did you mean 'sigma'?"),
        ({"values": [1, 2], "probabilities": [1]}, "2 values, but 1 probabilities"),
        ({"values": [1, 2], "probabilities": [0, 0]}, "not all 0"),
        ({"parameters": {"y": {"min": 1}}}, "parameter x.y: needs"),
        ({"parameters": {}}, "x.parameters: give at least one"),
    ],
)
def test_distributions(refused, sweep_file, spec, says):
    line = refused(str(sweep_file({"x": spec}, method="random", run_cap=50)))
    assert says in line
    assert "x" in line


def test_a_name_that_wandb_refuses_and_one_that_is_there_twice(refused, sweep_file):
    assert "a name is made of letters" in refused(str(sweep_file({"a b": {"value": 1}})))
    twice = {"a.b": {"value": 1}, "a": {"parameters": {"b": {"value": 2}}}}
    assert "a.b is there twice" in refused(str(sweep_file(twice)))


@pytest.mark.parametrize("spec", [{"min": 0.1, "max": 0.5}, {"distribution": "normal"}])
def test_a_grid_over_a_range(refused, sweep_file, spec):
    assert "or use method: random" in refused(str(sweep_file({"x": spec})))


@pytest.mark.parametrize(
    ("text", "says"),
    [(b"a: [1, {", ": not YAML"), (b"- 1", "not a sweep"), (b"", "not a sweep"), (b"\xff\xfe\x00", "not YAML")],
)
def test_a_file_that_is_no_sweep(refused, tmp_path, text, says):
    (tmp_path / "broken.yaml").write_bytes(text)
    assert says in refused(str(tmp_path / "broken.yaml"))


def test_a_runs_folder_that_cannot_be_written(sweep_file, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    assert main([str(sweep_file())]) == 2
    assert "set RUNS_DIR" in capsys.readouterr().err


def test_what_is_ignored_is_told(sweep_file, capsys):
    assert main([str(sweep_file(run_cap=1, early_terminate={"type": "hyperband", "min_iter": 3}))]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "early_terminate is ignored" in line


# -- wandb ------------------------------------------------------------------------------------------------------------

# the keys of src/sweeps/config/schema.json in wandb/sweeps that are read here
WANDB_KEYS = {"program", "method", "metric", "parameters", "command", "run_cap", "name", "description"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_wandbs_and_train_py_takes_their_words(path):
    from wandb.sdk.launch.sweeps import utils

    from runner import arguments
    from runner.cli import Experiment

    sweep = read_sweep(path)
    content = utils.load_sweep_config(str(path))
    assert content.keys() <= WANDB_KEYS
    assert all(isinstance(spec, dict) and "parameters" not in spec for spec in content["parameters"].values())
    for trial in (trials(path)[0], trials(path)[-1]):
        # what wandb's agent would run: its own functions, filled in as in wandb_agent.py
        filled = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in trial.items()}})
        filled |= {"env": [], "interpreter": ["python"], "program": [content["program"]]}
        words = []
        for word in utils.create_sweep_command(content["command"]):
            words += filled[word[2:-1]] if word.startswith("${") else [word]
        ours = fill_command(sweep, trial)
        assert (words[0], ours[0]) == ("python", sys.executable)
        assert words[1:] == ours[1:]
        assert ours[1] == "train.py"
        experiment = Experiment(arguments.parse(ours[2:]))
        assert sweep.metric.removeprefix("val/") in ("acc", "loss", "mse", "mae")
        assert experiment.name == Path(ours[2]).stem


def test_help_lists_the_sweeps(capsys):
    assert SHIPPED
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(path.name in out for path in SHIPPED)


def test_a_shipped_sweep_runs(tmp_path, capsys):
    assert main(["sweeps/curve_fit.yaml", "--trials", "1"]) == 0
    assert "best" in capsys.readouterr().out
    found = records(tmp_path)
    assert [record["state"] for record in found] == ["ok"]
    for record in found:
        assert (Path(record["run"]) / "best.ckpt").exists()
        config = yaml.safe_load((Path(record["run"]) / "config.yaml").read_text())
        lr = config["model"]["init_args"]["optimizer"]["init_args"]["lr"]
        assert lr == record["parameters"]["model.optimizer.lr"]
        assert {"val/mse", "test/mse"} <= record["metrics"].keys()
