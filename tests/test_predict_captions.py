"""`--predict` of a model that writes captions: a sentence about each picture, the one that the model says."""

import csv

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY
from PIL import Image

from datamodules.captions import Captions, draw_kinds
from lit_models.captioning import ShowAttendTell
from train import main

SMALL = ("--data.train_size=64", "--data.val_size=4", "--data.test_size=5", "--trainer.max_epochs=12")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has learned enough for its sentences to differ."""
    with pytest.MonkeyPatch.context() as patch:
        runs = tmp_path_factory.mktemp("runs")
        patch.setenv("RUNS_DIR", str(runs))
        patch.setenv("WANDB_MODE", "disabled")
        experiment = str(REPOSITORY / "experiments" / "shapes_captioning.yaml")
        assert main([experiment, *TINY, *SMALL, "--model.lr_scheduler=null", "--trainer.precision=32-true"]) == 0
        (run,) = runs.glob("shapes_captioning/*")
        return run


def test_each_picture_gets_the_sentence_of_the_model(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = [draw_kinds(np.random.default_rng([1, i]), 64, 3)[0] for i in range(8)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "no.png").write_bytes(b"nothing")
    words = [str(run / "config.yaml"), f"--ckpt={run / 'best.ckpt'}", f"--predict={tmp_path}"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "warning:" in said.err
    assert "no.png cannot be read" in said.err

    model = ShowAttendTell.load_from_checkpoint(run / "best.ckpt").eval()
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1  # (8, 3, 64, 64)
    with torch.no_grad():
        expected = [Captions.target_vocabulary.decode(row) for row in model.translate(pixels)[0]]
    assert len(set(expected)) > 1
    with open("predictions.csv", newline="") as file:
        rows = {row["file"].rpartition("/")[2]: row for row in csv.DictReader(file)}
    assert [rows[f"{i}.png"]["caption"] for i in range(8)] == expected
    assert rows["no.png"]["caption"] == ""
    assert "cannot be read" in rows["no.png"]["error"]
    assert all(f"{i}.png  {sentence}" in said.out for i, sentence in enumerate(expected))


def test_a_picture_of_another_size_is_squeezed(tmp_path):
    Image.new("L", (100, 30), 128).save(tmp_path / "grey.png")
    image = Captions(size=48).read_input(tmp_path / "grey.png")
    assert image.shape == (3, 48, 48)
    assert image.dtype == torch.uint8
    assert (image == 128).all()
