"""`--predict` with a detector: boxes in pixels of the picture as it is, in COCO's format, and drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image
from test_detectors import TINY_SCENES

from runner.predict_boxes import BoxFiles, draw, tell_boxes
from train import main

COLOUR = (200, 40, 40)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Pictures of two sizes, and one that is none; the working folder is beside them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (128, 64), COLOUR).save(folder / "wide.png")
    Image.new("L", (50, 90)).save(folder / "high.jpg")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def train_small(train, experiment: str, monkeypatch, *argv: str) -> list[str]:
    """Train a detector for a moment; return the words that predict with it."""
    from conftest import REPOSITORY

    here = Path.cwd()
    monkeypatch.chdir(REPOSITORY)
    run = train(*argv, "--model.score_threshold=0", experiment=f"experiments/{experiment}.yaml", tiny=())
    monkeypatch.chdir(here)
    return [str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt"), "--predict"]


@pytest.mark.parametrize("name", ["shapes_fast_rcnn", "shapes_fcos", "shapes_sliding_window"])
def test_of_scenes(name, folder, train, monkeypatch, capsys):
    words = train_small(train, name, monkeypatch, *TINY_SCENES)
    capsys.readouterr()
    assert main([*words, str(folder)]) == 0
    said = json.loads(Path("predictions.json").read_text())
    sizes = {Path(i["file_name"]).name: (i["width"], i["height"]) for i in said["images"]}
    assert sizes == {"wide.png": (128, 64), "high.jpg": (50, 90)}
    assert [c["name"] for c in said["categories"]] == ["circle", "square", "triangle", "star"]
    by_id = {image["id"]: image for image in said["images"]}
    assert said["annotations"]
    for box in said["annotations"]:
        x, y, w, h = box["bbox"]
        image = by_id[box["image_id"]]
        assert -0.01 <= x < x + w <= image["width"] + 0.01
        assert -0.01 <= y < y + h <= image["height"] + 0.01
        assert 0 <= box["score"] <= 1
    assert max(x + w for x, _, w, _ in (b["bbox"] for b in said["annotations"])) > 64  # in the wide one's own pixels
    assert len(list(Path("predictions").iterdir())) == 2
    out = capsys.readouterr().out
    assert f"all boxes: {Path('predictions.json').absolute()}" in out


def test_coco_reads_the_file(folder, train, monkeypatch, small_data, recwarn):
    monkeypatch.setenv("DATA_DIR", str(small_data))
    words = train_small(train, "bccd_fast_rcnn", monkeypatch, "--data.image_size=64", "--data.num_workers=0",
                        "--trainer.max_epochs=1")  # fmt: skip
    (folder / "no.png").write_bytes(b"nothing")
    monkeypatch.setenv("DATA_DIR", "/nowhere")  # what it was trained on is not looked for
    assert main([*words, str(folder)]) == 0
    coco = COCO("predictions.json")
    assert len(coco.imgs) == 2
    assert [c["name"] for c in coco.cats.values()] == ["Platelets", "RBC", "WBC"]
    assert min(coco.anns) == min(coco.imgs) == min(coco.cats) == 1  # 0 means unmatched there


def files(folder: Path) -> BoxFiles:
    made = BoxFiles([folder / "wide.png"], None, ["cat", "dog"], False)
    made.read, made.sizes = [folder / "wide.png"], [(32, 64)]  # the network saw it at half its size
    return made


def test_boxes_are_scaled_back_and_the_likely_ones_drawn(folder, capsys):
    found = {"boxes": torch.tensor([[4.0, 8, 20, 24], [40, 2, 60, 30]]), "scores": torch.tensor([0.9, 0.2]),
             "labels": torch.tensor([1, 0])}  # fmt: skip
    tell_boxes(files(folder), [found])
    said = json.loads(Path("predictions.json").read_text())
    assert [box["bbox"] for box in said["annotations"]] == [[8, 16, 32, 32], [80, 4, 40, 56]]
    assert [box["category_id"] for box in said["annotations"]] == [2, 1]
    assert said["annotations"][0]["area"] == 32 * 32
    assert capsys.readouterr().out.splitlines()[0].endswith("wide.png  dog 0.90")
    (file,) = Path("predictions").iterdir()
    with Image.open(file) as drawn:
        assert drawn.size == (400, 200)  # small ones are enlarged
        pixels = np.asarray(drawn.convert("RGB"))
    factor = 400 / 128
    changed = (pixels != COLOUR).any(axis=2)
    assert changed[:, round(8 * factor)].mean() > 0.4  # the likely one's left side
    assert not changed[:, round(100 * factor) :].any()  # nothing of the other


def test_nothing_found_is_said(folder, capsys):
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    tell_boxes(files(folder), [nothing])
    assert "nothing likely" in capsys.readouterr().out
    assert json.loads(Path("predictions.json").read_text())["annotations"] == []


def test_a_large_picture_keeps_its_size():
    assert draw(Image.new("RGB", (900, 500)), [([1.0, 2.0, 300.0, 400.0], 0, 0.9)], ["cat"]).size == (900, 500)


def test_where_nothing_can_be_written_is_one_line(folder, monkeypatch):
    from runner.errors import InputError

    Path("predictions").write_text("a file")
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    with pytest.raises(InputError, match="predictions cannot be written: File exists"):
        tell_boxes(files(folder), [nothing])
