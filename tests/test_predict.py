"""`--predict` needs a checkpoint and pictures, and nothing else; what it says is what the model says."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY
from PIL import Image

from datamodules.mnist import MNIST, read_idx
from lit_models.mlp import MLP
from runner.picture_files import PictureFiles
from runner.predict import tell_classes
from train import main

SMALL = "--model.sizes=[784, 16, 10]"


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_data) -> Path:
    """The folder of a run on the small MNIST."""
    with pytest.MonkeyPatch.context() as patch:
        runs = tmp_path_factory.mktemp("runs")
        patch.setenv("RUNS_DIR", str(runs))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("DATA_DIR", str(small_data))
        normalize = ("--data.normalize=[0.13, 0.31]", "--model.optimizer.lr=0.01", "--trainer.max_epochs=4")
        assert main([str(REPOSITORY / "experiments" / "mnist_mlp.yaml"), *TINY, SMALL, *normalize]) == 0
        (run,) = runs.glob("mnist_mlp/*")
        return run


@pytest.fixture(scope="module")
def tested(small_data) -> torch.Tensor:
    """The test set's pictures (N, 28, 28) uint8."""
    return read_idx(small_data / "MNIST" / "raw" / "t10k-images-idx3-ubyte", 3)


@pytest.fixture
def folder(tmp_path, tested) -> Path:
    """The first 12 of them as PNG: 0.png to 11.png."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(tested[i].numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def nothing_else(tmp_path, monkeypatch):
    """A folder of one's own to work in, no data, no network, and no run that is begun."""

    def refuse(*_, **__):
        raise OSError("what has no part in a prediction")

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(MNIST, "prepare_data", refuse)
    monkeypatch.setattr(MNIST, "setup", refuse)
    yield
    assert not (tmp_path / "nothing").exists()
    assert {path.name for path in work.iterdir()} <= {"predictions.csv"}
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("mnist*"))


@pytest.fixture
def tell(run, capsys):
    """Predict with the run's best checkpoint; returns the table's rows, what is printed, and what is warned of."""

    def call(*paths: object, options: tuple[str, ...] = ()) -> tuple[list[dict], list[str], str]:
        capsys.readouterr()
        words = [str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt"), "--predict", *map(str, paths), *options]
        assert main(words) == 0
        said = capsys.readouterr()
        with open("predictions.csv", newline="", errors="surrogateescape") as file:
            return list(csv.DictReader(file)), said.out.splitlines(), said.err

    return call


@pytest.fixture
def refused(run, capsys):
    """Call train.py with a mistake; returns the one line it says."""

    def call(*words: object, config: Path | None = None) -> str:
        capsys.readouterr()
        assert main([str(config or run / "config.yaml"), *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert not Path("predictions.csv").exists()
        return err

    return call


def probabilities(run: Path, images: torch.Tensor) -> torch.Tensor:
    """What the model says of images (N, 28, 28) uint8: (N, K)."""
    model = MLP.load_from_checkpoint(run / "best.ckpt", weights_only=True, map_location="cpu").eval()
    with torch.no_grad():
        return model(((images.unsqueeze(1) / 255) - 0.13) / 0.31).softmax(dim=1)


def test_the_table_says_what_the_model_says(tell, run, folder, tested):
    rows, out, err = tell(folder, options=("--data.eval_batch_size=5",))  # 12 are no multiple of it
    right = probabilities(run, tested[:12])
    assert err == ""
    assert list(rows[0]) == ["file", "class", "probability", *(f"p_{i}" for i in range(10)), "error"]
    assert [row["file"] for row in rows] == [str(folder / f"{i}.png") for i in range(12)]  # 2 before 10
    assert [row["class"] for row in rows] == [str(k) for k in right.argmax(dim=1).tolist()]
    assert len({row["class"] for row in rows}) > 3, "for this test the net must have learned something"
    each = torch.tensor([[float(row[f"p_{i}"]) for i in range(10)] for row in rows])
    torch.testing.assert_close(each, right, rtol=0, atol=1e-6)
    assert [float(row["probability"]) for row in rows] == each.max(dim=1).values.tolist()  # every digit is there
    assert {row["error"] for row in rows} == {""}

    assert out[-1] == f"probabilities of all classes: {Path('predictions.csv').absolute()}"
    for line, row in zip(out[:12], rows, strict=True):
        assert line.split() == [row["file"], row["class"], f"{float(row['probability']):.4f}"]
    assert len({line.rindex("  ") for line in out[:12]}) == 1, "columns are aligned"


def test_one_picture_and_the_same_bytes_twice(tell, folder):
    tell(folder / "3.png")
    first = Path("predictions.csv").read_bytes()
    rows, _, _ = tell(folder / "3.png")
    assert [row["file"] for row in rows] == [str(folder / "3.png")]
    assert Path("predictions.csv").read_bytes() == first


def test_folders_in_folders_hidden_files_and_many_names(tell, folder):
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("more/deep/x10.PNG", "more/deep/x9.Png", "more/deep/\udce9.png", ".hidden/0.png", "more/.0.png"):
        (folder / name).write_bytes((folder / "0.png").read_bytes())
    (folder / "notes.txt").write_text("no picture")
    (folder / "12.png").mkdir()
    rows, _, _ = tell(folder / "more", folder / "1.png", folder / "0.png", folder / "1.png")  # as of 1.png *.png
    assert [row["file"].removeprefix(f"{folder}/") for row in rows] == [
        "more/deep/x9.Png", "more/deep/x10.PNG", "more/deep/\udce9.png", "1.png", "0.png",
    ]  # fmt: skip
    assert len(tell(folder)[0]) == 15


def test_what_cannot_be_read_is_named_and_the_rest_is_told(tell, folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    (folder / "2.png").write_text("no picture")
    rows, out, err = tell(folder, options=("--data.eval_batch_size=1",))  # two batches with nothing in them
    bad = [row for row in rows if row["error"]]
    assert [Path(row["file"]).name for row in bad] == ["1.png", "2.png"]
    assert {value for row in bad for key, value in row.items() if key not in ("file", "error")} == {""}
    assert err.splitlines() == [f"warning: {row['error']}" for row in bad]
    assert all(row["file"] in row["error"] for row in bad)
    assert len(rows) == 12
    assert len(out) == 10 + 2


def test_none_can_be_read(refused, run, folder):
    for i in range(12):
        (folder / f"{i}.png").write_text("no picture")
    assert f"none of 12 pictures can be read, the first: {folder / '0.png'}" in refused(
        "--ckpt", run / "best.ckpt", "--predict", folder
    )
    line = refused("--ckpt", run / "best.ckpt", "--predict", folder / "3.png")
    assert line.startswith(f"error: {folder / '3.png'} cannot be read")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "1"])
def test_pictures_of_any_kind(folder, tested, mode):
    pixels = (tested[7] > 127).byte() * 255 if mode == "1" else tested[7]
    deep = Image.fromarray(pixels.numpy().astype(np.uint16) * 257)
    (deep if mode == "I;16" else Image.fromarray(pixels.numpy()).convert(mode)).save(folder / "x.png")
    assert Image.open(folder / "x.png").mode == mode
    image = MNIST().read_input(folder / "x.png")
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.uint8
    assert torch.equal(image[0], pixels)


def test_colours_sizes_and_turned_photographs(folder):
    Image.new("RGB", (50, 90), (255, 0, 0)).save(folder / "red.bmp")
    assert MNIST().read_input(folder / "red.bmp").unique().tolist() == [76]  # 0.299 of 255
    stripes = np.zeros((280, 280), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(folder / "stripes.png")
    assert MNIST().read_input(folder / "stripes.png").float().sub(127.5).abs().max() < 8, "no aliasing"
    half = np.zeros((40, 20, 3), np.uint8)
    half[:20] = 255  # the upper half; the camera was turned by a quarter
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half).save(folder / "turned.jpg", exif=exif, quality=95)
    image = MNIST().read_input(folder / "turned.jpg")[0]
    assert image[:, 15:].min() > 200
    assert image[:, :13].max() < 50


@pytest.mark.parametrize(("dark", "hinted"), [(2, False), (1, True)])
def test_dark_on_white_gets_a_hint_if_most_are(tell, tmp_path, tested, dark, hinted):
    for i in range(3):
        pixels = tested[i] if i < dark else 255 - tested[i]
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    err = tell(*(tmp_path / f"{i}.png" for i in range(3)))[2]
    assert err == "" or err.count("\n") == 1
    assert ("invert" in err) == hinted


def test_with_the_experiment_and_overrides_as_ckpt_has(run, folder, capsys):
    words = ["--ckpt", str(run / "best.ckpt"), "--predict", str(folder), SMALL, "--data.normalize=[0.13, 0.31]"]
    words += ["--trainer.accelerator=cpu", "--trainer.limit_predict_batches=1", "--data.eval_batch_size=4"]
    assert main([str(REPOSITORY / "experiments/mnist_mlp.yaml"), *words, "--trainer.precision=64-true"]) == 0
    assert len(Path("predictions.csv").read_text().splitlines()) == 13


BEACH = """
model:
  class_path: lit_models.mlp.MLP
  init_args:
    sizes: [192, 2]
    optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 0.05}}}}
data:
  class_path: datamodules.image_folder.ImageFolder
  init_args: {{folder: {folder}, image_size: 8, batch_size: 4, num_workers: 0, augment: []}}
checkpoint: {{monitor: val/acc, mode: max}}
trainer: {{max_epochs: 5, log_every_n_steps: 1}}
"""


def test_classes_have_the_names_that_the_checkpoint_tells(tmp_path, monkeypatch):
    colours = {"sea": (0, 40, 200), "sand, dry": (220, 200, 30)}
    for part, name, i in itertools.product(("train", "val", "new"), colours, range(2)):
        path = tmp_path / "beach" / part / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), tuple(c + 9 * i + 4 * (part != "train") for c in colours[name])).save(path)
    (tmp_path / "beach" / "new").rename(tmp_path / "new")
    (tmp_path / "beach.yaml").write_text(BEACH.format(folder=tmp_path / "beach"))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "beach_runs"))
    assert main([str(tmp_path / "beach.yaml")]) == 0
    (run,) = (tmp_path / "beach_runs" / "beach").iterdir()
    (tmp_path / "beach").rename(tmp_path / "gone")
    assert main([str(run / "config.yaml"), "--ckpt", str(run / "best.ckpt"), "--predict", str(tmp_path / "new")]) == 0
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["sand, dry", "sand, dry", "sea", "sea"]
    assert list(rows[0])[3:] == ["p_sand, dry", "p_sea", "error"]


def test_classes_without_names_are_numbers(folder, capsys):
    files = PictureFiles([folder / "0.png"], MNIST(), None, show_progress=False)
    files.read = files.paths
    tell_classes(files, torch.tensor([[0.25, 0.75]]))
    assert Path("predictions.csv").read_text() == (
        f"file,class,probability,p_0,p_1,error\n{folder / '0.png'},1,0.75,0.25,0.75,\n"
    )


def test_pictures_are_read_as_they_are_needed(folder):
    data = MNIST(eval_batch_size=5)
    files = PictureFiles(sorted(folder.iterdir()), data, None, show_progress=False)
    batches = files.predict_dataloader()
    assert next(batches)[0].shape == (5, 1, 28, 28)
    assert len(files.read) == 5
    assert [len(images) for images, _ in batches] == [5, 2]


class TestMistakes:
    """One line each, and no table."""

    def test_without_a_checkpoint(self, refused, folder):
        assert "--ckpt RUN/best.ckpt" in refused("--predict", folder)

    @pytest.mark.parametrize("option", ["--resume", "--verify"])
    def test_with_what_does_something_else(self, refused, run, folder, option):
        for more in ((), ("--ckpt", run / "best.ckpt")):
            assert "--predict needs a trained model: give it --ckpt RUN/best.ckpt, not --resume" in refused(
                option, run, "--predict", folder, *more
            )

    def test_no_such_picture_or_folder(self, refused, run, folder):
        line = refused("--ckpt", run / "best.ckpt", "--predict", folder / "00.png")
        assert "00.png does not exist; did you mean '0.png'?" in line
        line = refused("--ckpt", run / "best.ckpt", "--predict", folder.parent / "digit")
        assert "did you mean 'digits'?" in line
        assert "needs a value" in refused("--ckpt", run / "best.ckpt", "--predict")

    def test_a_folder_without_pictures(self, refused, run, tmp_path):
        (tmp_path / "empty" / ".git").mkdir(parents=True)
        (tmp_path / "empty" / ".git" / "x.png").write_text("")
        (tmp_path / "empty" / "notes.txt").write_text("")
        line = refused("--ckpt", run / "best.ckpt", "--predict", tmp_path / "empty")
        assert f"folder {tmp_path / 'empty'} has no pictures in it (.jpg" in line

    def test_two_experiments(self, refused, run, folder):
        words = ("--ckpt", run / "best.ckpt", "--predict", folder)
        assert "one experiment at a time" in refused(*words, "experiments/mnist_mlp.yaml")

    def test_a_checkpoint_of_another_model(self, refused, run, folder):
        softmax = REPOSITORY / "experiments" / "mnist_softmax.yaml"
        assert "does not fit" in refused("--ckpt", run / "best.ckpt", "--predict", folder, config=softmax)

    def test_a_checkpoint_of_other_classes(self, refused, run, folder):
        fashion = REPOSITORY / "experiments" / "fashion_mlp.yaml"
        line = refused("--ckpt", run / "best.ckpt", "--predict", folder, SMALL, config=fashion)
        assert "was trained on other data than FashionMNIST" in line

    def test_what_is_not_about_pictures(self, refused, run, folder):
        curve = REPOSITORY / "experiments" / "curve_fit.yaml"
        line = refused("--ckpt", run / "best.ckpt", "--predict", folder, config=curve)
        assert "curve_fit (CurveFitting on NoisyPolynomial) does not" in line

    def test_data_without_pictures(self, refused, run, folder):
        words = ("--ckpt", run / "best.ckpt", "--predict", folder, "--data=datamodules.random_pairs.RandomPairs")
        assert "mnist_mlp (MLP on RandomPairs) does not" in refused(*words)

    def test_a_table_that_cannot_be_written(self, refused, run, folder, monkeypatch, capsys):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("runner.predict.write_whole", full)
        assert "predictions.csv cannot be written: No space left" in refused(
            "--ckpt", run / "best.ckpt", "--predict", folder
        )

    def test_they_are_told_without_torch(self, run, tmp_path):
        code = f"""if True:
            import sys, train
            words = [{str(run / "config.yaml")!r}, "--ckpt", {str(run / "best.ckpt")!r}, "--predict"]
            for path in {[str(tmp_path / "nowhere"), str(tmp_path)]}:
                assert train.main([*words, path]) == 2
            assert "torch" not in sys.modules
        """
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
