"""A mistake is one line on stderr that says what to do, exit code 2, no traceback, and nothing half-written."""

import os
import pickle
import subprocess
import sys
import time
import zipfile

import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, write_mnist

from train import main

EXPERIMENT = "experiments/mnist_mlp.yaml"


@pytest.fixture
def refused(capsys, tmp_path):
    """Call train.py with a mistake; returns the one line it says."""

    def call(*argv: str) -> str:
        capsys.readouterr()
        before = sorted((tmp_path / "runs").rglob("*"))
        assert main(list(argv)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert len(err) < 420, err
        assert sorted((tmp_path / "runs").rglob("*")) == before, "something was left behind"
        assert before or not (tmp_path / "runs").exists()
        return err.strip()

    return call


def test_no_experiment(refused):
    assert "python train.py experiments/mnist_mlp.yaml" in refused()


def test_two_experiments(refused):
    assert "one experiment at a time" in refused(EXPERIMENT, "experiments/mnist_softmax.yaml")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("experiments/mnist_mpl.yaml", "mnist_mlp.yaml"), ("experiments/fashion-mlp.yaml", "fashion_mlp.yaml")],
)
def test_a_file_that_does_not_exist(refused, name, nearest):
    assert f"did you mean '{nearest}'" in refused(name)


def test_a_word_that_no_experiment_has(refused):
    assert "no experiment has 'mnits' in its name or its first line; did you mean 'mnist'?" in refused(
        "--list", "mnits"
    )
    line = refused("--list", "qqqq")
    assert "; there are: " in line
    assert ", mnist, " in line


def test_a_folder_in_place_of_a_file(refused):
    assert "is a folder" in refused("experiments")


def test_yaml_that_does_not_parse_is_told_with_its_line(refused, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model:\n  class_path: lit_models.mlp.MLP\n  init_args: {sizes: [784, 10}\n")
    assert f"{path}:3: not YAML" in refused(str(path))


def test_yaml_that_is_no_experiment(refused, tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    assert "not an experiment" in refused(str(tmp_path / "list.yaml"))


def edited(tmp_path, *keys: str, value) -> str:
    """Write a copy of the experiment with one key set, as somebody who edits it would; return its path."""
    config = yaml.safe_load((REPOSITORY / EXPERIMENT).read_text())
    config["data"]["init_args"]["val_size"] = 53
    config["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1}
    *path, last = keys
    place = config
    for key in path:
        place = place.setdefault(key, {})
    place[last] = value
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "edited.yaml")


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        # unknown keys, with the nearest valid one
        (("modle",), 3, ["unknown key modle", "did you mean 'model'"]),
        (("model", "init_arg"), 3, ["unknown key model.init_arg", "did you mean 'init_args'"]),
        (("model", "init_args", "sizess"), [3], ["unknown key sizess of lit_models.mlp.MLP", "did you mean 'sizes'"]),
        (("model", "init_args", "los"), "mse", ["did you mean 'loss'"]),  # an argument of the task's
        (("model", "init_args", "optimizer", "init_args", "lrr"), 1, ["unknown key lrr of torch.optim.Adam", "'lr'"]),
        (("data", "init_args", "batchsize"), 3, ["unknown key batchsize", "did you mean 'batch_size'"]),
        (("trainer", "max_epoch"), 3, ["unknown key trainer.max_epoch", "did you mean 'max_epochs'"]),
        (("checkpoint", "monitr"), "x", ["unknown key checkpoint.monitr", "did you mean 'monitor'"]),
        # wrong types and values
        (("model", "init_args", "sizes"), "wide", ["model.sizes: expected tuple", "wide"]),
        (("model", "init_args", "loss"), "mze", ["model.loss: expected one of 'cross_entropy', 'mse', got mze"]),
        (
            ("model", "init_args", "optimizer", "init_args", "lr"),
            "fast",
            ["model.optimizer.lr: expected float, got fast"],
        ),
        (("data", "init_args", "batch_size"), "many", ["data.batch_size: expected int, got many"]),
        (("trainer", "max_epochs"), "three", ["trainer.max_epochs: expected int, got three"]),
        (("trainer", "precision"), "bf17", ["trainer.precision", "'bf16-mixed'", "bf17"]),
        (("checkpoint", "mode"), "biggest", ["checkpoint.mode: expected one of 'min', 'max', got biggest"]),
        (("seed_everything",), "lucky", ["seed_everything: expected int, got lucky"]),
        (("data", "init_args", "batch_size"), 0, ["batch sizes start at 1", "0"]),
        (("data", "init_args", "val_size"), 300, ["val_size must be from 1 to 299"]),
        (("data", "init_args", "normalize"), [0.5, 0.0], ["normalize", "above 0"]),
        (("model", "init_args", "optimizer", "init_args", "lr"), -1, ["Invalid learning rate"]),
        # class paths that do not exist
        (("model", "class_path"), "lit_models.mlp.MPL", ["there is no lit_models.mlp.MPL", "'lit_models.mlp.MLP'"]),
        (("model", "class_path"), "lit_models.mpl.MLP", ["there is no lit_models.mpl", "'lit_models.mlp.MLP'"]),
        (("data", "class_path"), "datamodules.mnist.MNST", ["there is no datamodules.mnist.MNST", "MNIST'"]),
        (("model", "class_path"), "nowhere.at.All", ["there is no nowhere"]),
        (("model", "init_args", "optimizer", "class_path"), "torch.optim.Adm", ["did you mean 'torch.optim.Adam'"]),
        # classes of another kind
        (("model", "class_path"), "torch.nn.Linear", ["model: torch.nn.Linear is no LightningModule"]),
        (("model", "init_args", "optimizer"), "torch.nn.Linear", ["model.optimizer: torch.nn.Linear is no Optimizer"]),
        # monitor
        (("checkpoint",), {"mode": "max"}, ["checkpoint.monitor is missing"]),
        (("checkpoint",), {"monitor": "val/acc"}, ["checkpoint.mode is missing"]),
        (("checkpoint", "monitor"), "val/accuracy", ["'val/accuracy' is never logged", "did you mean 'val/acc'"]),
        (("checkpoint", "monitor"), "train/los", ["'train/los' is never logged", "did you mean 'train/loss'"]),
        # what does not fit together
        (("model", "init_args", "sizes"), [784, 5], ["MLP has 5 classes, but MNIST has 10"]),
        (("model", "init_args", "sizes"), [100, 10], ["lit_models/mlp.py:", "mat1 and mat2 shapes"]),
        (("data",), None, ["data is missing"]),
        (("model", "init_args", "sizes"), [784], ["sizes: the inputs", "[784]"]),
        (("model", "init_args", "sizes"), [784, 0, 10], ["each at least 1"]),
        # a scheduler
        (
            ("model", "init_args", "lr_scheduler"),
            {"class_path": "torch.optim.lr_scheduler.StepLR"},
            ["step_size is missing"],
        ),
        (
            ("model", "init_args", "lr_scheduler"),
            {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"},
            ["use pytorch_lightning.cli.ReduceLROnPlateau"],
        ),
        (
            ("model", "init_args", "lr_scheduler"),
            {"class_path": "pytorch_lightning.cli.ReduceLROnPlateau", "init_args": {"monitor": "val/los"}},
            ["lr_scheduler.monitor: 'val/los' is never logged", "did you mean 'val/loss'"],
        ),
        # settings that leave nothing to test
        (("trainer", "fast_dev_run"), True, ["--trainer.limit_train_batches 2"]),
        (("trainer", "max_epochs"), 0, ["trainer.max_epochs is 0: nothing would be trained"]),
        (("trainer", "max_steps"), 0, ["trainer.max_steps is 0"]),
        (("trainer", "limit_val_batches"), 0, ["no val/acc to choose the best by"]),
        (("trainer", "check_val_every_n_epoch"), 3, ["would never be validated"]),
        (
            ("trainer", "callbacks"),
            [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/acx"}}],
            ["EarlyStopping.monitor: 'val/acx' is never logged"],
        ),
        (("experiment",), "../../evil", ["to name a folder"]),
        (("seed_everything",), -1, ["from 0 to 2^32 - 1"]),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_in_the_yaml(refused, tmp_path, keys, value, words):
    line = refused(edited(tmp_path, *keys, value=value))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--trainer.max_epoch", "3"], ["unknown option --trainer.max_epoch", "did you mean 'max_epochs'"]),
        (["--modle", "x"], ["unknown option --modle", "did you mean 'model'"]),
        (["--model.sizess", "3"], ["unknown key sizess", "did you mean 'sizes'"]),
        (["--trainer.max_epochs"], ["--trainer.max_epochs needs a value"]),
        (["--trainer.accelerator", "tpu"], ["trainer:"]),
        (["--ckpt", "a.ckpt", "--resume", "b"], ["give one of them"]),
        (["--resume", "runs/nothing"], ["does not exist"]),
        (["--config", "experiments/mnist_softmax.yaml"], ["complete in itself"]),
        (["--model.optimizer", "Adm"], ["there is no Adm"]),
        (["--trainer.max_steps", "2", "--data.val_size", "53"], ["ends before the first epoch (3 steps)"]),
    ],
)
def test_a_mistake_on_the_command_line(refused, argv, words):
    line = refused(EXPERIMENT, *argv)
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_data):
    """The folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        runs = tmp_path_factory.mktemp("runs")
        patch.setenv("RUNS_DIR", str(runs))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("DATA_DIR", str(small_data))
        assert main([EXPERIMENT, *TINY, "--model.sizes=[784, 16, 10]"]) == 0
        (run,) = runs.glob("mnist_mlp/*")
        return run


class TestCheckpoints:
    """What `--ckpt` and `--resume` refuse."""

    def test_does_not_exist(self, refused, run):
        line = refused(EXPERIMENT, "--ckpt", str(run / "bset.ckpt"))
        assert "does not exist" in line
        assert "did you mean 'best.ckpt'" in line

    def test_url(self, refused):
        assert "is a URL" in refused(EXPERIMENT, "--ckpt", "https://example.org/best.ckpt")

    @pytest.mark.parametrize("bytes_left", [0, 1000, -100])
    def test_cut_short(self, refused, run, tmp_path, bytes_left):
        (tmp_path / "cut.ckpt").write_bytes((run / "best.ckpt").read_bytes()[:bytes_left])
        assert "cut short" in refused(str(run / "config.yaml"), "--ckpt", str(tmp_path / "cut.ckpt"))

    def test_damaged_inside(self, refused, run, tmp_path):
        content = bytearray((run / "best.ckpt").read_bytes())
        with zipfile.ZipFile(run / "best.ckpt") as archive:
            (entry,) = (i for i in archive.infolist() if i.filename.endswith("data.pkl"))
        content[entry.header_offset + 200 : entry.header_offset + 400] = os.urandom(200)
        (tmp_path / "damaged.ckpt").write_bytes(content)
        line = refused(str(run / "config.yaml"), "--ckpt", str(tmp_path / "damaged.ckpt"))
        assert "damaged" in line or "refused" in line

    def test_of_another_size(self, refused, run):
        line = refused(EXPERIMENT, "--ckpt", str(run / "best.ckpt"))
        assert (
            "does not fit lit_models.mlp.MLP as configured: layers.1.weight is (16, 784) there and (512, 784) here"
            in line
        )
        assert str(run / "config.yaml") in line

    def test_of_another_model(self, refused, run):
        line = refused("experiments/mnist_softmax.yaml", "--ckpt", str(run / "best.ckpt"))
        assert "of lit_models.mlp.MLP" in line
        assert "does not fit lit_models.softmax_regression.SoftmaxRegression" in line

    def test_no_checkpoint_of_lightnings(self, refused, tmp_path):
        torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.ckpt")
        assert "no state_dict" in refused(EXPERIMENT, "--ckpt", str(tmp_path / "weights.ckpt"))
        torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "weights.ckpt")
        assert "is not one of Lightning's: it has no epoch" in refused(
            EXPERIMENT, "--ckpt", str(tmp_path / "weights.ckpt")
        )

    @pytest.mark.parametrize("option", ["--ckpt", "--resume"])
    def test_pickled_code_is_refused_and_not_run(self, refused, run, tmp_path, option):
        class Attack:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/pwned",)

        good = torch.load(run / "last.ckpt", weights_only=True)
        evil = tmp_path / "evil"
        evil.mkdir()
        (evil / "config.yaml").write_text((run / "config.yaml").read_text())
        torch.save({**good, "extra": Attack()}, evil / "last.ckpt")
        path = evil / "last.ckpt" if option == "--ckpt" else evil
        line = refused(*([str(run / "config.yaml")] if option == "--ckpt" else []), option, str(path))
        assert "refused: it holds code" in line
        assert "system" in line
        assert not (tmp_path / "pwned").exists()
        with open(evil / "last.ckpt", "rb") as file, zipfile.ZipFile(file) as archive:  # it would have run
            (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
            assert b"system" in archive.read(name)
        pickle.loads(pickle.dumps(Attack()))
        assert (tmp_path / "pwned").exists()

    def test_a_run_without_a_checkpoint(self, refused, run, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "has no config.yaml" in refused("--resume", str(tmp_path / "empty"))
        for file in ("config.yaml", "metrics.csv"):  # of epochs that were finished
            (tmp_path / "empty" / file).write_text((run / file).read_text())
        assert "has no last.ckpt" in refused("--resume", str(tmp_path / "empty"))


class TestData:
    """What is wrong with the files is told by the file's name."""

    @pytest.fixture
    def raw(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
        return write_mnist(tmp_path / "data")

    @pytest.mark.parametrize("size", [0, 10, 5000, -1])
    @pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
    def test_cut_short(self, refused, raw, name, size):
        (raw / name).write_bytes((raw / name).read_bytes()[:size] if size != 5000 or "images" in name else b"")
        line = refused(EXPERIMENT, *TINY)
        assert str(raw / name) in line
        assert "delete it to download it again" in line

    def test_too_long(self, refused, raw):
        with open(raw / "train-labels-idx1-ubyte", "ab") as file:
            file.write(b"\0")
        assert "has 309 bytes where its header says 308" in refused(EXPERIMENT, *TINY)

    def test_images_and_labels_that_do_not_belong_together(self, refused, raw, tmp_path):
        other = write_mnist(tmp_path / "other", train=200)
        os.replace(other / "train-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
        assert "300 pictures, but train-labels-idx1-ubyte has 200 labels" in refused(EXPERIMENT, *TINY)

    def test_a_label_that_is_no_class(self, refused, raw):
        content = bytearray((raw / "train-labels-idx1-ubyte").read_bytes())
        content[-1] = 10
        (raw / "train-labels-idx1-ubyte").write_bytes(content)
        assert "label 10, expected 0 to 9" in refused(EXPERIMENT, *TINY)

    def test_half_of_the_files_missing_is_no_reason_for_other_data(self, refused, raw, monkeypatch):
        (raw / "t10k-images-idx3-ubyte").unlink()
        line = refused(EXPERIMENT, *TINY)
        assert "t10k-images-idx3-ubyte" in line
        assert "train-images" not in line.partition("put ")[2].partition(" there")[0]

    def test_neither_files_nor_network(self, refused, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "nothing"))
        line = refused("experiments/fashion_mlp.yaml", *TINY)
        assert str(tmp_path / "nothing" / "FashionMNIST" / "raw") in line
        assert "train-images-idx3-ubyte" in line
        assert "DATA_DIR" in line
        assert not (tmp_path / "nothing" / "FashionMNIST").exists()
        assert "MNIST is not in" in refused(EXPERIMENT, *TINY, "--data.offline_fallback", "false")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail at once, as on a machine without a network."""

    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_a_data_file_that_is_a_folder(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    raw = write_mnist(tmp_path / "data")
    (raw / "train-images-idx3-ubyte").unlink()
    (raw / "train-images-idx3-ubyte").mkdir()
    assert "cannot be read: Is a directory" in refused(EXPERIMENT, *TINY)


def test_a_name_too_long_for_a_file(refused):
    assert "cannot be read" in refused("experiments/" + "x" * 300 + ".yaml")


def test_a_wandb_mode_that_is_none(refused, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert "did you mean 'offline'" in refused(EXPERIMENT, *TINY)


def test_a_runs_folder_that_cannot_be_written(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "file" / "runs"))
    line = refused(EXPERIMENT, *TINY)
    assert str(tmp_path / "file" / "runs") in line
    assert "set RUNS_DIR" in line


@pytest.mark.parametrize("content", [None, "model: [1, 2\n"], ids=["no such file", "not YAML"])
def test_what_needs_no_torch_is_told_in_under_a_second(tmp_path, content):
    path = tmp_path / "x.yaml"
    if content:
        path.write_text(content)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "train.py", str(path)], capture_output=True, text=True, cwd=REPOSITORY)
    assert time.perf_counter() - start < 1
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_missing_package_is_named(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import train; sys.exit(train.main(['experiments/mnist_mlp.yaml']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2
    assert done.stderr == "error: the package torch is missing; try: pip install -r requirements.txt\n"
