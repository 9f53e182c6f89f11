"""The pictures of segmentation show which pixels are wrong, and of which pictures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from test_pictures import Kept

from callbacks.pictures import GREY, RED
from callbacks.segmentation import COLORS, IGNORE, SegmentationPictures, class_colors, overlay
from lit_models import segmenter

NAMES = ("background", "cat", "dog")


def rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.fixture
def draw(tmp_path):
    """Show batches of images, masks and what is predicted to the callback; returns the run, and the callback."""

    def call(*batches, classes=NAMES, num_classes: int = 3, metrics: dict | None = None):
        callback = SegmentationPictures(Kept(tmp_path))
        trainer = SimpleNamespace(
            datamodule=SimpleNamespace(classes=classes),
            callback_metrics={name: torch.tensor(value) for name, value in (metrics or {}).items()},
        )
        model = SimpleNamespace(num_classes=num_classes)
        callback.on_test_start(trainer, model)
        for i, (images, masks, predicted) in enumerate(batches):
            callback.on_test_batch_end(trainer, model, predicted, (images, masks), i)
        callback.on_test_end(trainer, model)
        return callback.run, callback

    return call


def some(count: int, channels: int = 3, side: int = 10, first: int = 0):
    """Pictures of which number i has i wrong pixels."""
    images = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) - 0.3
    masks = torch.zeros(count, side, side, dtype=torch.int64)
    masks[:, :, side // 2 :] = 1
    predicted = masks.clone()
    for i in range(count):
        predicted[i].view(-1)[: i + first] = 2
    return images, masks, predicted


def cells(run: Kept, half: slice = slice(None)) -> list[tuple[str, np.ndarray]]:
    """Titles and pixels, row by row; of the worst and those drawn by chance there are four columns each."""
    axes = run.figures["segmentation"].axes
    columns = axes[0].get_gridspec().ncols
    kept = [axis for row in range(0, len(axes), columns) for axis in axes[row : row + columns][half]]
    return [(axis.get_title(), axis.images[0].get_array()) for axis in kept if axis.images]


def shares(run: Kept) -> list[list[int]]:
    """The percents that are wrong, of the worst and of those drawn by chance."""
    halves = (cells(run, slice(0, 4)), cells(run, slice(4, None)))
    return [[int(title.split(".")[0]) for title, _ in half if title.endswith("wrong")] for half in halves]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_what_does_not_count_is_the_same_everywhere():
    assert IGNORE == segmenter.IGNORE
    assert segmenter.Segmenter.pictures is SegmentationPictures


def test_the_worst_are_on_the_left_and_others_on_the_right(draw):
    images, masks, predicted = some(20)
    batches = [(images[i : i + 6], masks[i : i + 6], predicted[i : i + 6]) for i in range(0, 20, 6)]
    run, callback = draw(*batches)
    worst, drawn = shares(run)
    assert worst == [19, 18, 17]
    assert len({*drawn} - {*worst}) == 3
    assert run.figures["segmentation"].get_suptitle() == (
        "left: the 3 worst of 20 test pictures; right: 3 drawn by chance"
    )
    assert "above: the 3 worst" in run.figures["overlays"].get_suptitle()
    assert len(callback.kept) <= 12
    for sample in callback.kept.values():
        assert sample.image.dtype == sample.truth.dtype == sample.predicted.dtype == np.uint8
        assert sample.image.base is None or sample.image.base.size == sample.image.size  # no view of a batch

    better = predicted.clone()  # by a model that is bad at others, the same ones are drawn by chance
    better[[19, 18, 17]] = masks[[19, 18, 17]]
    better[0].view(-1)[:50] = 2
    _, callback = draw((images, masks, better))
    assert shares(callback.run)[0] == [50, 16, 15]
    assert {*drawn} - {0, 17, 18, 19} <= {*callback.kept}


def test_all_of_them_bad_leaves_enough_by_chance(draw):
    """The draw may hold the worst, too: these are drawn once."""
    for count in (4, 6, 7):
        worst, drawn = shares(draw(some(count))[0])
        assert worst == [count - 1, count - 2, count - 3]
        assert len({*drawn} & {*worst}) == 0
        assert len(drawn) == min(3, count - 3)


def test_truth_prediction_and_errors(draw):
    images, masks, predicted = some(1)
    masks[0, 9] = IGNORE
    predicted[0, 9] = 2  # that is not wrong
    predicted[0, 4, 0] = 1  # that is
    run, _ = draw((images, masks, predicted))
    titles, arrays = zip(*cells(run), strict=True)
    assert titles == ("image", "truth", "prediction", "1.1% wrong")  # 1 of 90
    image, truth, prediction, errors = (array.tolist() for array in arrays)
    assert truth[0][0] == [0, 0, 0]
    assert truth[0][5] == prediction[0][5] == prediction[4][0] == rgb(COLORS[0])
    assert truth[9][0] == errors[9][0] == rgb(GREY)
    assert prediction[9][0] == rgb(COLORS[1])
    assert errors[4][0] == rgb(RED)
    assert np.argwhere((arrays[3] == rgb(RED)).all(axis=2)).tolist() == [[4, 0]]
    assert max(errors[0][0]) < 120
    assert np.ptp(np.array(image)) == 255
    assert legend(run.figures["segmentation"]) == ["background", "cat", "dog", "does not count", "wrong"]
    assert legend(run.figures["overlays"]) == ["cat", "dog"]
    assert run.figures["segmentation"].get_suptitle() == "test pictures, the worst first"


def test_what_pads_pictures_is_cut_off(draw):
    images, masks = torch.zeros(3, 3, 8, 9), torch.full((3, 8, 9), IGNORE)
    for i, (h, w) in enumerate([(8, 5), (4, 9), (6, 6)]):
        images[i, :, :h, :w] = torch.rand(3, h, w) + 0.1
        masks[i, :h, :w] = 1
    masks[2, 5] = IGNORE  # an outline at the picture's edge is part of it
    predicted = torch.ones(3, 8, 9, dtype=torch.uint8)
    predicted[0, :, 8] = 2
    predicted[0, 0, :2] = 0
    run, _ = draw((images, masks, predicted))
    shapes = {array.shape for _, array in cells(run)}
    assert shapes == {(8, 5, 3), (4, 9, 3), (6, 6, 3)}
    assert [title for title, _ in cells(run) if "wrong" in title] == ["5.0% wrong", "0.0% wrong", "0.0% wrong"]


def test_a_black_picture_of_which_nothing_counts(draw):
    run, _ = draw((torch.zeros(1, 1, 5, 6), torch.full((1, 5, 6), IGNORE), torch.zeros(1, 5, 6, dtype=torch.int64)))
    assert [array.shape for _, array in cells(run)] == [(5, 6, 3)] * 4


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("channels", "classes", "num_classes"), [(1, None, 1), (3, [f"kind {k}" for k in range(21)], 21)]
)
def test_one_class_or_many_grey_or_in_colour(draw, channels, classes, num_classes):
    images, masks, predicted = some(7, channels, side=24)
    if num_classes > 1:
        masks = masks * torch.arange(14, 21)[:, None, None]
    predicted = predicted.clamp(max=max(num_classes - 1, 1)).to(torch.uint8)
    run, _ = draw(
        (images.half(), masks, predicted), classes=classes, num_classes=num_classes, metrics={"test_dice/1": 0.5}
    )
    told = legend(run.figures["segmentation"])
    assert told == (["0", "1", "wrong"] if num_classes == 1 else told)
    assert told[-1] == "wrong"
    for name in ("segmentation", "overlays"):
        pixels = imread(run.folder / "pictures" / f"{name}.png")[..., :3]
        assert pixels.std() > 0.1, f"{name} is blank"
    assert ("dice" in run.figures) == (num_classes == 1)


def test_a_bar_for_each_class_that_has_a_dice(draw):
    metrics = {
        "test_dice/background": 0.99,
        "test_dice/dog": 0.25,
        "test_dice/$cat$": 0.75,
        "test/dice": 0.5,
        "test/acc": 0.9,
    }
    run, _ = draw(some(1), classes=("background", "$cat$", "newt", "dog"), num_classes=4, metrics=metrics)
    (axis,) = run.figures["dice"].axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.99, 0.75, 0.25])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["background", r"\$cat\$", "dog"]
    assert [text.get_text() for text in axis.texts] == ["0.990", "0.750", "0.250"]
    assert axis.get_title().endswith("0.500")
    assert [round(line.get_xdata()[0], 3) for line in axis.lines] == [0.5]


def test_the_mean_of_one_class_is_no_news(draw):
    metrics = {"test_dice/background": 0.99, "test_dice/cell": 0.7, "test/dice": 0.7}
    run, _ = draw(some(1), classes=("background", "cell"), num_classes=1, metrics=metrics)
    (axis,) = run.figures["dice"].axes
    assert (axis.get_title(), len(axis.lines), len(axis.patches)) == ("", 0, 2)


def test_colours_differ_and_do_not_depend_on_how_many_there_are():
    colors = class_colors(22)
    told = [*colors.tolist(), rgb(RED), rgb(GREY)]
    nearest = min(np.abs(np.subtract(a, b)).sum() for i, a in enumerate(told) for b in told[:i])
    assert nearest > 40
    assert colors[0].tolist() == [0, 0, 0]
    assert np.array_equal(class_colors(256)[:22], colors)
    assert class_colors(256).shape == (256, 3)
    assert class_colors(256)[22:].max(axis=1).min() > 0  # none looks like the background


def test_the_overlay_has_outlines_and_shines_through():
    image, classes = np.full((9, 12, 3), 100, np.uint8), np.zeros((9, 12), np.uint8)
    classes[2:7, 2:6], classes[2:7, 6:10] = 1, 2
    drawn, colors = overlay(image, classes), class_colors(3)
    assert (drawn[classes == 0] == 100).all()
    assert drawn[2, 2].tolist() == drawn[4, 5].tolist() == colors[1].tolist()  # two classes side by side have one, too
    assert drawn[4, 6].tolist() == colors[2].tolist()
    np.testing.assert_allclose(drawn[4, 3], 0.6 * 100 + 0.4 * colors[1], atol=1)
    assert (image == 100).all(), "what it was given stays"
    large = overlay(np.zeros((4, 1600, 3), np.uint8), np.ones((4, 1600), np.uint8))
    assert (large != class_colors(2)[1]).any(axis=2).all()  # the edge of a picture is no outline


UNET = """
model:
  class_path: lit_models.unet.UNet
  init_args:
    num_classes: 5
    features: [4, 8]
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
data:
  class_path: datamodules.shapes.Shapes
  init_args: {target: classes, size: 64, train_size: 16, val_size: 4, test_size: 7, batch_size: 8, eval_batch_size: 4}
checkpoint: {monitor: val/miou, mode: max}
trainer: {max_epochs: 1}
"""


def test_a_run_draws_them_and_its_receipt_says_what_is_measured(train, tmp_path, capsys):
    (tmp_path / "unet.yaml").write_text(UNET)
    run = train(experiment=str(tmp_path / "unet.yaml"), tiny=())
    for name in ("segmentation", "overlays", "dice"):
        assert (run / "pictures" / f"{name}.png").exists()
    receipt = json.loads((run / "receipt.json").read_text())
    logged = {name.partition("/")[2] for name in receipt["metrics"] if name.startswith("test/")}
    assert logged <= receipt["definitions"].keys()
    assert "background out" in receipt["definitions"]["dice"]
    assert "weakest iou" in capsys.readouterr().out


def test_other_models_receipts_have_no_definitions(train):
    run = train("--trainer.max_epochs=2", experiment="experiments/line_module.yaml", tiny=())
    assert "definitions" not in json.loads((run / "receipt.json").read_text())
