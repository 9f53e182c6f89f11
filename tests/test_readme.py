"""What the README shows works as it stands."""

import re
import shlex
import sys

import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY
from PIL import Image
from torchvision.models import resnet18

import lit_models
from runner import arguments
from train import main

README = (REPOSITORY / "README.md").read_text()


def block(language: str, containing: str) -> str:
    (found,) = (b for b in re.findall(rf"```{language}\n(.*?)```", README, flags=re.S) if containing in b)
    return found


def test_the_two_commands_do_all_the_setup():
    assert "pip install -r requirements.txt && python train.py experiments/mnist_mlp.yaml" in README
    assert "pip install -r requirements-dev.txt && python -m pytest" in README
    assert "-r requirements.txt" in (REPOSITORY / "requirements-dev.txt").read_text()
    assert "pip install -r requirements-dev.txt" in (REPOSITORY / ".ci" / "run").read_text()
    assert "python -m pytest" in (REPOSITORY / ".ci" / "run").read_text()


def test_the_example_of_a_new_model_runs(tmp_path, monkeypatch):
    package = tmp_path / "new"
    package.mkdir()
    (package / "maxout.py").write_text(block("python", "class Maxout"))
    monkeypatch.setattr(lit_models, "__path__", [*lit_models.__path__, str(package)])
    experiment = tmp_path / "mnist_maxout.yaml"
    experiment.write_text(block("yaml", "Maxout"))
    assert yaml.safe_load(experiment.read_text())["model"]["class_path"] == "lit_models.maxout.Maxout"
    assert main([str(experiment), *TINY]) == 0
    assert list((tmp_path / "runs" / "mnist_maxout").glob("*/receipt.json"))
    monkeypatch.delitem(sys.modules, "lit_models.maxout")


def test_the_example_of_ones_own_pictures_runs(tmp_path, monkeypatch, small_data):
    text = block("yaml", "backbone: resnet18").replace("weights: DEFAULT", "weights: resnet18.pth")
    (tmp_path / "my_pictures.yaml").write_text(
        text.replace("folder: pictures", f"folder: {small_data / 'hymenoptera'}")
    )
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    tiny = ("--data.image_size=32", "--data.num_workers=0", "--trainer.max_epochs=1")
    assert main([str(tmp_path / "my_pictures.yaml"), *tiny]) == 0
    assert list((tmp_path / "runs" / "my_pictures").glob("*/receipt.json"))


BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
LINES = [line for language, text in BLOCKS if not language for line in text.splitlines()]
COMMANDS = [re.split(r"  +", line.lstrip("$ "))[0] for line in LINES]  # then what it does
COMMANDS = [command for command in COMMANDS if command.startswith("python train.py")]


@pytest.mark.parametrize("line", [command for command in COMMANDS if "RUN" not in command])
def test_commands_name_what_there_is(line):
    words = shlex.split(line)[2:]
    assert arguments.parse(words) is not None or "--help" in words or "--list" in words


def test_commands_on_a_run_work(train, tmp_path, monkeypatch):
    run = train("--trainer.max_epochs=1")
    picture = tmp_path / "picture.png"
    Image.new("L", (28, 28)).save(picture)
    monkeypatch.chdir(tmp_path)  # where predictions.csv goes
    commands = [command for command in COMMANDS if "RUN" in command and "--prompt" not in command]
    assert len(commands) >= 3
    for command in commands:
        assert (
            main(
                shlex.split(
                    command.replace("RUN", str(run)).replace("PATH", str(picture)).replace("new/", str(picture))
                )[2:]
            )
            == 0
        )


def test_every_file_that_a_command_names_is_there():
    words = {
        word for line in LINES if line.startswith("python ") for word in line.split() if word.endswith((".yaml", ".py"))
    }
    words = {word for word in words if "RUN" not in word}
    assert {"sweep.py", "compare.py", "sweeps/mnist_mlp.yaml"} <= words
    assert not [word for word in words if not (REPOSITORY / word).is_file()]


def test_every_picture_is_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert (REPOSITORY / picture).is_file()


def test_every_model_file_is_in_the_table_of_lectures():
    files = {path.name for path in (REPOSITORY / "lit_models").glob("*.py")} - {
        "__init__.py",
        "tasks.py",
        "convnet.py",
        "detector.py",
        "pretrained.py",
    }
    for name in files:
        assert f"(lit_models/{name})" in README
