"""Every experiment there is runs, and says in its header what it is, how to run it, and what was measured."""

import re

import pytest
import yaml
from conftest import REPOSITORY
from test_train import receipt

EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*.yaml"))


def test_there_are_experiments():
    assert len(EXPERIMENTS) >= 4


def small(config: dict) -> list[str]:
    """Return the settings that make an experiment one of seconds, where one epoch on small data does not."""
    arguments = {
        "datamodules.mnist.MNIST": ["--data.val_size=53"],
        "datamodules.mnist.FashionMNIST": ["--data.val_size=53"],
        "datamodules.cifar10.CIFAR10": ["--data.val_size=30"] * (config["checkpoint"]["monitor"] != "train/loss"),
        "datamodules.image_folder.ImageFolder": ["--data.image_size=32", "--data.num_workers=0"],
        "datamodules.shapes.Shapes": [
            "--data.size=64",
            "--data.train_size=12",
            "--data.val_size=4",
            "--data.test_size=4",
        ],
        "datamodules.voc.VOC": ["--data.image_size=64", "--data.num_workers=0"],
        "datamodules.carvana.ImageMasks": [
            "--data.image_size=[32, 48]",
            "--data.crop=[32, 32]",
            "--data.num_workers=0",
        ],
        "datamodules.pets.Pets": ["--data.image_size=[32, 32]", "--data.num_workers=0"],
        "datamodules.voc_segmentation.VOCSegmentation": [
            "--data.image_size=[32, 32]",
            "--data.augment=[]",
            "--data.num_workers=0",
            "--model.backbone.weights=null",  # they are not there
        ],
    }.get(config["data"]["class_path"], [])
    if config["data"]["class_path"] == "datamodules.voc.VOC" and config["data"]["init_args"].get("year"):
        # its backbone's weights are not there
        arguments = [*arguments, "--data.max_size=100", "--model.backbone.backbone.weights=null"]
    if "features" in config["model"]["init_args"]:  # of a U-Net
        arguments = [*arguments, "--model.features=[4, 8]"]
    return arguments + ["--model.compile=false"] * config["model"]["init_args"].get("compile", False)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
class TestExperiment:
    def test_runs_from_start_to_receipt(self, path, train):
        config = yaml.safe_load(path.read_text())
        run = train(*small(config), "--trainer.max_epochs=1", experiment=str(path), tiny=())
        assert run.parent.name == path.stem
        assert receipt(run)["tested"] == receipt(run)["data"]["test"]

    def test_every_other_command_in_its_header_runs(self, path, train):
        commands = re.findall(rf"^#   python train.py experiments/{path.name} +(--.*)", path.read_text(), flags=re.M)
        for command in commands:
            words = re.split(r"   +", command)[0].split()
            train(*words, "--data.val_size=53", "--trainer.max_epochs=1", experiment=str(path), tiny=())

    def test_header_names_its_command_and_what_was_measured(self, path):
        header = re.match(r"(?:#.*\n)+", path.read_text())[0]
        assert f"#   python train.py experiments/{path.name}\n" in header
        assert re.search(r"^# Measured: (.*\d .* s on (1 CPU core|2 CPU cores)|not measured)", header, flags=re.M)

    def test_readme_says_the_same_number(self, path):
        readme = (REPOSITORY / "README.md").read_text()
        (row,) = (line for line in readme.splitlines() if line.startswith("|") and f"experiments/{path.name}" in line)
        measured = path.read_text().partition("# Measured: ")[2].partition("\n")[0]
        numbers = re.findall(r"test/\w+ ([\d.e-]+(?: ± [\d.e-]+)?(?: %)?)", measured)
        assert numbers or (measured.startswith("not measured") and "not measured" in row)
        assert all(number in row for number in numbers)

    def test_says_nothing_that_train_py_says(self, path):
        config = yaml.safe_load(path.read_text())
        assert set(config) == {"model", "data", "checkpoint", "trainer"}
        assert set(config["checkpoint"]) == {"monitor", "mode"}
