"""`--predict` with a segmenter: masks of the pictures' own sizes, overlays, and each class's share of the pixels."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from test_segmentation_pictures import UNET

from callbacks.segmentation import class_colors
from datamodules.shapes import Shapes
from lit_models.unet import UNet
from runner.errors import InputError
from runner.predict_masks import UnmaskedFiles, WriteMasks, tell_masks, with_legend
from train import main

CLASSES = ["background", "circle", "square", "triangle", "star"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_data) -> Path:
    """The folder of a short run of a small U-Net on scenes."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("unet")
        patch.chdir(REPOSITORY)
        patch.setenv("RUNS_DIR", str(folder / "runs"))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("DATA_DIR", str(small_data))
        patch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, dpi: path.write_bytes(b""))
        patch.setattr("runner.run.RunWandbLogger.log_image", lambda *_: None)
        (folder / "unet.yaml").write_text(UNET)
        assert main([str(folder / "unet.yaml"), "--trainer.max_epochs=4"]) == 0
        (run,) = (folder / "runs").glob("unet/*")
        return run


@pytest.fixture
def folder(tmp_path, monkeypatch, small_data) -> Path:
    """Pictures of three sizes, one of them turned by its camera; the working folder is beside them."""
    monkeypatch.setenv("DATA_DIR", str(small_data))
    scenes = Shapes(size=64, train_size=16, val_size=4, test_size=7)
    scenes.setup()
    images = scenes.test_set.tensors[0].numpy()
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(images[0]).save(folder / "1 as it is.png")
    Image.fromarray(images[1]).resize((150, 100)).save(folder / "2.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(images[2]).convert("L").resize((130, 70)).save(folder / "turned.jpg", exif=exif)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "nothing"))  # what it was trained on is not looked for
    return folder


def words(run: Path, *more: object) -> list[str]:
    return [str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt"), "--predict", *map(str, more)]


def rows() -> list[dict]:
    with open("predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_masks_say_what_the_model_says(run, folder, capsys):
    capsys.readouterr()
    assert main(words(run, folder)) == 0
    table = rows()
    assert list(table[0]) == ["file", "mask", *(f"share_{name}" for name in CLASSES), "error"]
    assert [row["mask"] for row in table] == [f"predictions/{name}.png" for name in ("1_1 as it is", "2_2", "3_turned")]
    sizes = []
    model, data = UNet.load_from_checkpoint(run / "best.ckpt", weights_only=True, map_location="cpu").eval(), Shapes(64)
    for row in table:
        with Image.open(row["mask"]) as mask, Image.open(row["mask"].replace("/", "/overlays/")) as overlay:
            assert mask.mode == "P"
            sizes.append(mask.size)
            assert overlay.size[0] == 400  # small ones are enlarged, the legend is below
            assert overlay.size[1] > round(400 * mask.height / mask.width)
            assert mask.getpalette()[:15] == class_colors(5).ravel().tolist()
            classes = np.array(mask)
        image = data.read_input(Path(row["file"])).float() / 127.5 - 1
        with torch.no_grad():
            right = model(image[None]).argmax(dim=1)[0].numpy()
        h, w = right.shape
        rows_, columns = ((np.arange(n) + 0.5) * m / n for n, m in zip(classes.shape, (h, w), strict=True))
        nearest = right[rows_.astype(int)[:, None], columns.astype(int)]
        assert (classes == nearest).mean() > 0.99  # PIL rounds a middle between two pixels as it likes
        shares = [float(row[f"share_{name}"]) for name in CLASSES]
        assert shares == [(classes == k).mean() for k in range(5)]
        assert row["error"] == ""
    assert sizes == [(64, 64), (150, 100), (70, 130)]
    assert len({share for row in table for share in list(row.values())[2:-1]}) > 3, (
        "for this test it must find something"
    )
    out = capsys.readouterr().out
    for row, line in zip(table, out.splitlines(), strict=False):
        assert line.startswith(row["file"])
        assert len({name for name in CLASSES if f"{name} {100 * float(row[f'share_{name}']):.1f} %" in line}) >= 1
    assert f"masks: {Path('predictions').absolute()}" in out


def test_what_is_said_of_a_picture_does_not_depend_on_others(run, folder):
    paths = sorted(folder.iterdir())
    together = []
    for chosen in (paths, paths[1:2]):
        assert main(words(run, *chosen)) == 0
        together.append({row["file"]: Path(row["mask"]).read_bytes() for row in rows()})
    assert together[0][str(paths[1])] == together[1][str(paths[1])]


def test_pictures_of_different_sizes_one_of_them_none(run, folder, capsys):
    (folder / "no.png").write_bytes(b"nothing")
    capsys.readouterr()
    assert main(words(run, folder)) == 0
    table = rows()
    assert [bool(row["error"]) for row in table] == [False, False, True, False]
    assert {value for key, value in table[2].items() if key not in ("file", "error")} == {""}
    masks = sorted(Path("predictions").glob("*.png"))
    assert [path.name for path in masks] == ["1_1 as it is.png", "2_2.png", "3_turned.png"]
    assert [Image.open(path).size for path in masks] == [(64, 64), (150, 100), (70, 130)]
    said = capsys.readouterr()
    assert said.err == f"warning: {table[2]['error']}\n"


def test_bright_grey_pictures_need_no_hint(folder, monkeypatch, capsys, run):
    """Those of a microscope are as they should be: the hint is for digits."""
    monkeypatch.setattr(UnmaskedFiles, "bright", property(lambda self: 99, lambda self, value: None), raising=False)
    assert main(words(run, folder / "2.png")) == 0
    assert "invert" not in capsys.readouterr().err


def test_none_can_be_read(run, folder, capsys):
    (folder / "2.png").write_text("no picture")
    assert main(words(run, folder / "2.png")) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder / '2.png'} cannot be read")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", ["predictions", "predictions/overlays"])
def test_where_nothing_can_be_written_is_one_line(run, folder, capsys, name):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("a file")
    capsys.readouterr()
    assert main(words(run, folder)) == 2
    assert capsys.readouterr().err == f"error: {Path('predictions/overlays').absolute()} cannot be written: " + (
        "Not a directory\n" if name == "predictions" else "File exists\n"
    )


def test_a_table_that_cannot_be_written(run, folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runner.predict_masks.write_whole", full)
    assert main(words(run, folder)) == 2
    said = capsys.readouterr()
    assert "predictions.csv cannot be written: No space left" in said.err
    assert str(folder / "2.png") in said.out


def writer(folder: Path, classes: list[str] | None, num_classes: int) -> WriteMasks:
    files = UnmaskedFiles([folder / "2.png"], None, classes, False)
    files.read, files.sizes = files.paths, [(5, 10)]
    masks = WriteMasks(files)
    masks.on_predict_start(None, SimpleNamespace(num_classes=num_classes))
    return masks


@pytest.mark.parametrize("num_classes", [1, 2])
def test_two_classes_are_black_and_white(folder, capsys, num_classes):
    masks = writer(folder, ["background", "membrane"], num_classes)
    classes = torch.full((1, 7, 16), 1, dtype=torch.uint8)  # padded, and what is said of that is cut off
    classes[0, :5, :10] = 0
    classes[0, 1, :5] = 1
    masks.on_predict_batch_end(None, None, classes, None, 0)
    tell_masks(masks)
    with Image.open("predictions/1_2.png") as mask, Image.open("predictions/overlays/1_2.png") as drawn:
        assert (mask.mode, mask.size, drawn.size) == ("L", (150, 100), (150, 100))
        pixels = np.array(mask)
    assert (pixels[20:40, :75] == 255).all()
    assert pixels.sum() == 255 * 20 * 75
    assert capsys.readouterr().out.splitlines()[0].endswith("2.png  membrane 10.0 %")
    assert [row["share_membrane"] for row in rows()] == ["0.1"]


def test_nothing_found_and_classes_without_names(folder, capsys):
    masks = writer(folder, None, 3)
    masks.on_predict_batch_end(None, None, torch.zeros(1, 5, 10, dtype=torch.int64), None, 0)
    tell_masks(masks)
    assert capsys.readouterr().out.splitlines()[0].endswith("2.png  nothing but 0")
    assert list(rows()[0])[2:] == ["share_0", "share_1", "share_2", "error"]
    with Image.open("predictions/overlays/1_2.png") as drawn:
        assert drawn.size == (400, 267)  # there is nothing to tell below it


def test_a_legend_of_many_words_has_lines():
    colors = {f"a name of some length {k}": (k, 0, 0) for k in range(6)}
    whole = with_legend(Image.new("RGB", (900, 500), (0, 9, 0)), colors)
    assert whole.size[0] == 900
    below = np.asarray(whole)[500:]
    for k in range(6):
        assert (below == (k, 0, 0)).all(axis=2).sum() > 100, k
    assert np.asarray(whole)[:500].max() == 9
    assert whole.height < 700


def test_a_picture_that_is_gone_is_one_line(folder):
    masks = writer(folder, None, 3)
    (folder / "2.png").unlink()
    with pytest.raises(InputError, match=r"2\.png cannot be read"):
        masks.on_predict_batch_end(None, None, torch.zeros(1, 5, 10), None, 0)
