"""Every experiment there is runs, and says in its header what it is, how to run it, and what was measured."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from test_train import receipt

from exporting.network import sample_batch
from exporting.networks import network_of
from runner.cli import Experiment

EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*.yaml"))


def test_there_are_experiments():
    assert len(EXPERIMENTS) >= 4


def small(config: dict) -> list[str]:
    """Return the settings that make an experiment one of seconds, where one epoch on small data does not."""
    arguments = {
        "datamodules.mnist.MNIST": ["--data.val_size=53"],
        "datamodules.mnist.FashionMNIST": ["--data.val_size=53"],
        "datamodules.cifar10.CIFAR10": ["--data.val_size=30"] * (config["checkpoint"]["monitor"] != "train/loss"),
        "datamodules.cifar10.RandAugmentCIFAR10": ["--data.val_size=30"],
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
        "datamodules.dates.Dates": ["--data.train=64", "--data.val=10", "--data.test=12"],
        "datamodules.captions.Captions": ["--data.train_size=12", "--data.val_size=4", "--data.test_size=5"],
        "datamodules.series.Series": ["--data.length=700"],
        "datamodules.text.Text": [
            "--data.source=shakespeare",
            *["--data.windows_per_epoch=24"] * ("windows_per_epoch" in config["data"].get("init_args", {})),
        ],
    }.get(config["data"]["class_path"], [])
    if config["data"]["class_path"] == "datamodules.voc.VOC" and config["data"]["init_args"].get("year"):
        # its backbone's weights are not there
        arguments = [*arguments, "--data.max_size=100", "--model.backbone.backbone.weights=null"]
    model = config["model"]["init_args"]
    if "features" in model:  # of a U-Net
        arguments = [*arguments, "--model.features=[4, 8]"]
    if "teacher" in model:  # it has not been trained
        arguments = [*arguments, "--model.teacher=null"]
    if config["model"]["class_path"] == "lit_models.vit.ViT" and "weights" in model:  # they are not there
        arguments = [*arguments, "--model.weights=null", "--model.layers=1", "--model.width=24"]
    return arguments + ["--model.compile=false"] * model.get("compile", False)


def loads_from_its_checkpoint_alone(experiment: Experiment, checkpoint: Path) -> None:
    """`load_from_checkpoint` needs nothing but the file, in which there are plain types only, and gives the same outputs."""
    model, data = experiment.model, experiment.datamodule
    json.dumps(torch.load(checkpoint, weights_only=True)["hyper_parameters"])
    again = type(model).load_from_checkpoint(checkpoint, weights_only=True, map_location="cpu")
    network = network_of(model.to(torch.float32, memory_format=torch.contiguous_format), data)  # as Lightning makes it
    with torch.no_grad():
        inputs = network.example(sample_batch(data, 2))
        for a, b in zip(network(*inputs), network_of(again, data)(*inputs), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
class TestExperiment:
    def test_runs_from_start_to_receipt_and_loads_again(self, path, train, tmp_path, monkeypatch):
        config, made = yaml.safe_load(path.read_text()), []
        make = Experiment.instantiate_classes
        monkeypatch.setattr(Experiment, "instantiate_classes", lambda self: (make(self), made.append(self)))
        run = train(*small(config), "--trainer.max_epochs=1", experiment=str(path), tiny=())
        assert run.parent.name == path.stem
        assert receipt(run)["tested"] == receipt(run)["data"]["test"]
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "nothing"))
        loads_from_its_checkpoint_alone(made[-1], run / "best.ckpt")

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
