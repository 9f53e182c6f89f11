"""The pictures of a run show what they say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from callbacks.pictures import ClassificationPictures
from runner.history import read_history
from runner.run import Run

pytestmark = pytest.mark.pictures


class Kept(Run):
    """A run that keeps its figures."""

    def __init__(self, folder):
        super().__init__(folder)
        self.figures = {}

    def save_picture(self, name, figure):
        self.figures[name] = figure
        super().save_picture(name, figure)


@pytest.fixture
def draw(tmp_path):
    """Show (label, prediction) pairs to the callback, in batches of two; returns the run."""

    def call(pairs: list[tuple[int, int]], classes=("cat", "dog", "newt"), channels: int = 1) -> Kept:
        run = Kept(tmp_path)
        callback = ClassificationPictures(run, rows=2, columns=4)
        trainer, model = (
            SimpleNamespace(datamodule=SimpleNamespace(classes=classes)),
            SimpleNamespace(num_classes=len(classes), modules=list),
        )
        callback.on_test_start(trainer, model)
        for start in range(0, len(pairs), 2):
            labels, predictions = torch.tensor(pairs[start : start + 2]).T
            logits = torch.nn.functional.one_hot(predictions, len(classes)).float()
            images = labels.view(-1, 1, 1, 1) / 3 + torch.zeros(len(labels), channels, 5, 7)
            images[..., 0, 0] = 1
            callback.on_test_batch_end(trainer, model, logits, (images, labels), start)
        callback.on_test_end(trainer, model)
        return run

    return call


def titles(figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.images]


def test_wrong_predictions_come_first_with_the_label_in_brackets(draw):
    figure = draw([(0, 0), (1, 1), (2, 1), (0, 0), (0, 2), (1, 1)]).figures["predictions"]
    assert titles(figure) == ["dog (newt)", "newt (cat)", "cat", "dog", "cat", "dog"]
    assert "33.33% of 6 test pictures wrong" in figure.get_suptitle()


def test_right_ones_keep_a_quarter_of_the_grid(draw):
    figure = draw([(0, 1)] * 20 + [(2, 2)] * 20).figures["predictions"]
    assert titles(figure) == ["dog (cat)"] * 6 + ["newt"] * 2


@pytest.mark.parametrize("pairs", [[(0, 0)], [(0, 1)], [(1, 1)] * 9], ids=["one right", "one wrong", "all right"])
@pytest.mark.parametrize("channels", [1, 3])
def test_few_pictures_grey_or_in_colour(draw, pairs, channels):
    run = draw(pairs, channels=channels)
    assert len(titles(run.figures["predictions"])) == min(len(pairs), 8)
    for name in ("predictions", "confusion_matrix"):
        pixels = imread(run.folder / "pictures" / f"{name}.png")
        assert pixels[..., :3].std() > 0.02, f"{name} is blank"


def test_the_confusion_matrix_counts_labels_in_rows(draw):
    axis = draw([(0, 0), (0, 0), (0, 2), (1, 2)]).figures["confusion_matrix"].axes[0]
    counts = {(int(t.get_position()[1]), int(t.get_position()[0])): int(t.get_text()) for t in axis.texts}
    assert counts == {(0, 0): 2, (0, 2): 1, (1, 2): 1}
    assert axis.get_title() == "2 of 4 wrong"


def test_the_curves_mark_the_epoch_that_best_ckpt_is_of(train, monkeypatch):
    """Logged several times an epoch, the least value of all need not be one that could be saved."""
    figures = {}
    monkeypatch.setattr(Run, "save_picture", lambda self, name, figure: figures.setdefault(name, figure))
    run = train("--trainer.max_epochs=20", "--data.batch_size=1", "--model.lr=0.01", "--trainer.log_every_n_steps=5",
                experiment="experiments/line_by_hand.yaml", tiny=())  # fmt: skip
    epoch = torch.load(run / "best.ckpt", weights_only=True)["epoch"]
    rows = [r for r in read_history(run / "metrics.csv") if r["metric"] == "train/mse"]
    assert min(rows, key=lambda row: row["value"])["epoch"] != epoch, "for this test they must differ"
    (axis,) = figures["curves"].axes
    (mark,) = (line for line in axis.lines if line.get_label().startswith("best.ckpt"))
    assert mark.get_xdata()[0] == epoch + 1


def test_a_runs_pictures_are_not_blank(train):
    run = train("--trainer.max_epochs=3")
    for name, least in (("predictions", 0.1), ("confusion_matrix", 0.05), ("curves", 0.02)):
        pixels = imread(run / "pictures" / f"{name}.png")[..., :3]
        assert np.asarray(pixels).std() > least, f"{name} is blank"
