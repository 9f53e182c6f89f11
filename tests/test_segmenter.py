"""Segmenters: losses and metrics are those of counting pixels, whatever occurs, counts, or is left over at the end."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.segmentation import DiceScore

from datamodules.scenes import CLASSES
from datamodules.shapes import Shapes
from lit_models.segmenter import IGNORE, LOSSES, Overlap, Segmenter, dice_per_image, pad
from lit_models.unet import UNet
from runner.errors import InputError

TINY_SCENES = (
    "--data.size=64",
    "--data.train_size=12",
    "--data.val_size=4",
    "--data.test_size=5",
    "--trainer.max_epochs=1",
)
TRAINER = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu",
           "enable_model_summary": False}  # fmt: skip


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))


class Pixelwise(Segmenter):
    """The smallest segmenter: a linear layer at each pixel."""

    def __init__(self, num_classes: int, **segmenter):
        super().__init__(num_classes, **segmenter)
        self.layer = nn.Conv2d(3, num_classes, kernel_size=1)

    def forward(self, images):
        return self.layer(images)


class Told(Segmenter):
    """One that says of each pixel what the image's first channel says."""

    def __init__(self, num_classes: int, **segmenter):
        super().__init__(num_classes, **segmenter)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        if self.num_classes == 1:
            return self.scale * (images[:, :1] - 0.5)
        return self.scale * -(images[:, :1] - torch.arange(self.num_classes)[:, None, None]).square()


class Pairs(LightningDataModule):
    """Images and masks as they are."""

    def __init__(self, images, masks, batch_size: int, classes):
        super().__init__()
        self.images, self.masks, self.batch_size, self.classes = images, masks, batch_size, classes

    def train_dataloader(self):
        return DataLoader(list(zip(self.images, self.masks, strict=True)), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def masks_of(count: int, classes: int, seed: int = 0, side: int = 12, ignored: float = 0.2, absent=()) -> torch.Tensor:
    """Return masks (count, side, side), each of its own share of every class; the first is background alone."""
    rng = np.random.default_rng(seed)
    left = [k for k in range(classes) if k not in absent]
    masks = np.stack([rng.choice(left, (side, side), p=rng.dirichlet(np.full(len(left), 0.5))) for _ in range(count)])
    masks[0] = 0
    masks[rng.random(masks.shape) < ignored] = IGNORE
    return torch.from_numpy(masks).long()


def predicted_of(masks: torch.Tensor, classes: int, seed: int = 1, absent=()) -> torch.Tensor:
    """Return predictions that are right of half of the pixels, and anything else of the others."""
    rng = np.random.default_rng(seed)
    others = rng.choice([k for k in range(classes) if k not in absent], masks.shape)
    right = (rng.random(masks.shape) < 0.5) & (masks.numpy() != IGNORE)
    predicted = torch.from_numpy(np.where(right, masks.numpy(), others))
    predicted[0] = 0
    return predicted


def by_counting(predicted, masks, classes: int) -> dict:
    """The metrics, by their definitions: sets of pixels in numpy."""
    predicted, masks = predicted.numpy(), masks.numpy()

    def overlap_of(predicted, masks, k):
        a, b = (predicted == k) & (masks != IGNORE), masks == k
        both, either = np.sum(a & b), np.sum(a | b)
        return (both / either, 2 * both / (np.sum(a) + np.sum(b))) if either else (np.nan, np.nan)

    each = [overlap_of(predicted, masks, k) for k in range(classes)]
    counted = masks != IGNORE
    per_image = []
    for p, m in zip(predicted, masks, strict=True):
        dice = [d for _, d in (overlap_of(p, m, k) for k in range(1, classes)) if not np.isnan(d)]
        per_image.append(np.mean(dice) if dice else 1.0)
    return {
        "acc": np.mean(predicted[counted] == masks[counted]),
        "miou": np.nanmean([iou for iou, _ in each]),
        "dice": np.nanmean([dice for _, dice in each[1:]]),
        "iou_by_class": [iou for iou, _ in each],
        "dice_by_class": [dice for _, dice in each],
        "per_image": per_image,
    }


class TestMetrics:
    CASES = (
        {"classes": 2},
        {"classes": 5},
        {"classes": 5, "ignored": 0.0},
        {"classes": 5, "absent": (3,)},
        {"classes": 5, "absent": (0, 1)},
        {"classes": 4, "ignored": 0.95},
    )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_they_are_those_of_counting_over_uneven_batches(self, case):
        masks = masks_of(11, **case)
        absent = case.get("absent", ())[:1]  # the second is said to be, and is not
        classes, predicted = case["classes"], predicted_of(masks, case["classes"], absent=absent)
        overlap, per_image = Overlap(classes), []
        for start in range(0, 11, 4):  # 4, 4 and 3
            batch = predicted[start : start + 4], masks[start : start + 4]
            overlap.update(*batch)
            per_image += dice_per_image(*batch, classes).tolist()
        expected = by_counting(predicted, masks, classes)
        for name, value in overlap.compute().items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-12)
        np.testing.assert_allclose(per_image, expected["per_image"], rtol=1e-6)
        assert np.isnan(expected["iou_by_class"]).any() == (case.get("absent") == (3,))

    def test_they_are_torchmetrics(self):
        masks = masks_of(9, 5, ignored=0.0, absent=(2,))
        predicted = predicted_of(masks, 5, absent=(2,))
        ours = Overlap(5)
        acc, jaccard = MulticlassAccuracy(5, average="micro"), MulticlassJaccardIndex(5, average="macro")
        dice = DiceScore(5, include_background=False, average="macro", aggregation_level="global", input_format="index")
        for batch in zip(predicted.split(4), masks.split(4), strict=True):
            for metric in (ours, acc, jaccard, dice):
                metric.update(*batch)
        said = ours.compute()
        for name, metric in (("acc", acc), ("miou", jaccard), ("dice", dice)):
            assert float(said[name]) == pytest.approx(float(metric.compute()), rel=1e-6)

    def test_nothing_but_background(self):
        overlap, background = Overlap(3), torch.zeros(2, 4, 4, dtype=torch.int64)
        overlap.update(background, background)
        said = overlap.compute()
        assert said["acc"] == said["miou"] == 1
        assert math.isnan(said["dice"])
        assert dice_per_image(background, background, 3).tolist() == [1, 1]
        assert dice_per_image(background, background + 1, 3).tolist() == [0, 0]
        assert dice_per_image(background + 1, background, 3).tolist() == [0, 0]

    def test_nothing_that_counts(self):
        overlap, masks = Overlap(3), torch.full((2, 4, 4), IGNORE)
        overlap.update(torch.ones(2, 4, 4, dtype=torch.int64), masks)
        assert all(value.isnan().all() for value in overlap.compute().values())
        assert dice_per_image(torch.ones(2, 4, 4, dtype=torch.int64), masks, 3).tolist() == [1, 1]

    def test_the_docstring_tells_by_how_much_a_mean_over_batches_differs(self):
        masks, predicted = torch.zeros(17, 10, 20, dtype=torch.int64), torch.zeros(17, 10, 20, dtype=torch.int64)
        masks[:16, :, :10], predicted[:16, :, :9] = 1, 1
        masks[16, 0, :10] = 1
        overlap, notes = Overlap(2), []
        for p, m in zip(predicted.split(16), masks.split(16), strict=True):
            overlap.update(p, m)
            notes.append(float(2 * (p * m).sum() / ((p + m).sum() + 1e-8)))
        ours, theirs = float(overlap.compute()["dice"]), sum(notes) / 2
        text = " ".join(Overlap.__doc__.split())
        assert f"Dice over the set is {ours:.4f}, the mean of the batches' {theirs:.4f}" in text

    def test_a_validation_set_takes_well_below_a_second(self):
        import time

        logits = torch.randn(50, 5, 128, 128).contiguous(memory_format=torch.channels_last)
        masks, best = torch.randint(0, 5, (50, 128, 128)), math.inf
        for _ in range(5):
            overlap, start = Overlap(5), time.process_time()
            overlap.update(Segmenter.classes_of(logits), masks)
            overlap.compute()
            best = min(best, time.process_time() - start)
        assert 10 * best < 1  # 500 scenes


def losses_by_hand(name: str, logits: np.ndarray, masks: np.ndarray) -> float:
    """One pixel at a time, in double precision."""
    total, places = 0.0, [tuple(place) for place in np.argwhere(masks != IGNORE)]
    one = logits.shape[1] == 1
    p = {}
    for b, y, x in places:
        z = logits[b, :, y, x].astype(float)
        p[b, y, x] = [1 / (1 + math.exp(-z[0]))] if one else list(np.exp(z) / np.exp(z).sum())
    for part in name.split("_"):
        if part == "ce":
            total += sum(-math.log(p[place][masks[place]]) for place in places) / len(places)
        elif part == "bce":
            total += sum(-math.log(p[place][0] if masks[place] else 1 - p[place][0]) for place in places) / len(places)
        else:
            dice = []
            for i, k in [(0, 1)] if one else [(k, k) for k in range(1, logits.shape[1])]:
                both = sum(p[place][i] for place in places if masks[place] == k)
                squares = sum(p[place][i] ** 2 + (masks[place] == k) for place in places)
                dice.append((2 * both + 1) / (squares + 1))
            total += 1 - sum(dice) / len(dice)
    return total


NAMES = [(1, "bce"), (1, "dice"), (1, "bce_dice"), (4, "ce"), (4, "dice"), (4, "ce_dice"), (2, "ce"), (2, "dice")]


@pytest.mark.parametrize(("classes", "name"), NAMES)
class TestLosses:
    def model(self, classes, name, **arguments):
        torch.manual_seed(0)
        adam = functools.partial(torch.optim.Adam, lr=0.05)
        return Pixelwise(classes, loss=name, optimizer=adam, **arguments)

    def test_they_are_those_of_counting(self, classes, name):
        masks = masks_of(3, max(classes, 2), side=6)
        logits = 2 * torch.randn(3, classes, 6, 6)
        loss = self.model(classes, name).loss(logits, masks)
        assert loss.item() == pytest.approx(losses_by_hand(name, logits.numpy(), masks.numpy()), rel=1e-5)

    def test_what_is_ignored_changes_nothing(self, classes, name):
        model, masks = self.model(classes, name), masks_of(3, max(classes, 2), side=6)
        logits = torch.randn(3, classes, 6, 6, requires_grad=True)
        loss = model.loss(logits, masks)
        (gradient,) = torch.autograd.grad(loss, logits)
        ignored = (masks == IGNORE)[:, None].expand_as(logits)
        assert ignored.any()
        assert (gradient[ignored] == 0).all()
        assert (gradient[~ignored] != 0).any()
        torch.testing.assert_close(model.loss(logits.masked_fill(ignored, 9.0), masks), loss)

    def test_all_ignored_is_0_with_a_gradient(self, classes, name):
        logits = torch.randn(2, classes, 5, 5, requires_grad=True)
        loss = self.model(classes, name).loss(logits, torch.full((2, 5, 5), IGNORE))
        loss.backward()
        assert loss == 0
        assert (logits.grad == 0).all()

    @pytest.mark.parametrize("value", [0, 1])
    def test_all_of_one_class(self, classes, name, value):
        """Nothing there, or nothing else: the loss falls to nearly 0 as the network says so."""
        model, masks = self.model(classes, name), torch.full((2, 8, 8), value)
        sign = torch.tensor([1.0 if k == value else -1.0 for k in range(classes)] if classes > 1 else [2.0 * value - 1])
        sign = sign[:, None, None].expand(2, classes, 8, 8)
        right, wrong = model.loss(20 * sign, masks), model.loss(-20 * sign, masks)
        assert 0 <= right < 0.01
        # classes that are not there are 0 apart, and count in the mean over K - 1
        assert wrong > (0.3 if "dice" in name else 5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, classes, name, dtype):
        model, masks = self.model(classes, name), masks_of(4, max(classes, 2), side=256)
        logits = (20 * torch.randn(4, classes, 256, 256)).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            loss = model.loss(logits, masks)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert logits.grad.isfinite().all()
        torch.testing.assert_close(loss, model.loss(logits.float(), masks))

    def test_double_precision(self, classes, name):
        loss = self.model(classes, name).loss(
            torch.randn(2, classes, 4, 4).double(), masks_of(2, max(classes, 2), side=4)
        )
        assert loss.dtype == torch.float64

    def test_it_is_learned(self, classes, name):
        torch.manual_seed(0)
        masks = masks_of(4, max(classes, 2), side=8)
        images = torch.randn(4, 3, 8, 8)
        images[:, 0] += masks.masked_fill(masks == IGNORE, 0)  # so that it can be told
        model = self.model(classes, name)
        first = model.loss(model(images), masks).item()
        optimizer = model.configure_optimizers()
        for _ in range(60):
            optimizer.zero_grad()
            loss = model.loss(model(images), masks)
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.9 * first


class TestArguments:
    @pytest.mark.parametrize(
        ("classes", "loss", "words"),
        [
            (1, "ce", "loss: ce is not for num_classes 1, which has bce, dice, bce_dice"),
            (1, "ce_dice", "ce_dice is not for num_classes 1"),
            (2, "bce", "loss: bce is not for num_classes 2, which has ce, dice, ce_dice"),
            (5, "bce_dice", "bce_dice is not for num_classes 5"),
            (0, None, "num_classes: 1 for a single output, at most 255 with the background, got 0"),
            (256, None, "at most 255"),
        ],
    )
    def test_what_does_not_fit(self, classes, loss, words):
        with pytest.raises(InputError, match=words):
            Segmenter(classes, loss=loss)

    def test_defaults(self):
        assert Segmenter(1).loss_name == "bce"
        assert Segmenter(2).loss_name == "ce"
        assert all(part in LOSSES for _, name in NAMES for part in name.split("_"))

    def test_classes_of(self):
        logits = torch.randn(2, 5, 7, 9)
        for layout in (torch.contiguous_format, torch.channels_last):
            classes = Segmenter.classes_of(logits.contiguous(memory_format=layout))
            assert classes.dtype == torch.int64
            assert classes.tolist() == np.argmax(logits.numpy(), axis=1).tolist()
        one = Segmenter.classes_of(torch.tensor([[[[-0.1, 0.1], [5.0, -5.0]]]]))
        assert one.dtype == torch.int64
        assert one.tolist() == [[[0, 1], [1, 0]]]

    def test_pad(self):
        image = torch.arange(6.0).view(1, 1, 2, 3)
        assert pad(image, 2, 2)[0, 0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5]]
        assert pad(image, 1, 4).shape == (1, 1, 4, 4)
        assert pad(image, 1, 2) is image
        assert pad(image.bfloat16(), 4, 8).shape == (1, 1, 8, 8)


class TestSteps:
    def told(self, classes: int, masks, predicted, names, batch_size: int = 4):
        data = Pairs(predicted[:, None].float().expand(-1, 3, -1, -1), masks, batch_size, names)
        return Told(classes, optimizer=functools.partial(torch.optim.SGD, lr=0.0)), data

    @pytest.mark.parametrize("classes", [1, 2, 4])
    def test_validation_and_test_log_the_metrics_of_the_whole_set(self, classes):
        k = max(classes, 2)
        names = ("background", "a", "b", "c")[:k]
        masks = masks_of(11, k)
        predicted = predicted_of(masks, k)
        model, data = self.told(classes, masks, predicted, names)
        (val,) = Trainer(**TRAINER).validate(model, data, verbose=False)
        (test,) = Trainer(**TRAINER).test(model, data, verbose=False)
        expected = by_counting(predicted, masks, k)
        for name in ("acc", "miou", "dice"):
            assert val[f"val/{name}"] == test[f"test/{name}"] == pytest.approx(expected[name], rel=1e-6)
        assert test["test/dice_per_image"] == pytest.approx(np.mean(expected["per_image"]), rel=1e-6)
        for metric in ("iou", "dice"):
            for name, value in zip(names, expected[f"{metric}_by_class"], strict=True):
                assert test[f"test_{metric}/{name}"] == pytest.approx(value, rel=1e-6)
        kinds = {name.replace("test_", "").replace("test/", "") for name in test}
        kinds = {f"{name.partition('/')[0]}/<class>" if "/" in name else name for name in kinds}
        assert kinds == set(model.definitions)

    def test_a_class_that_occurs_nowhere_has_none(self):
        masks = masks_of(5, 4, absent=(2,))
        model, data = self.told(4, masks, masks.masked_fill(masks == IGNORE, 0), ("background", "a", "b", "c"))
        (test,) = Trainer(**TRAINER).test(model, data, verbose=False)
        assert "test_iou/b" not in test
        assert "test_dice/b" not in test
        assert test["test/miou"] == test["test/dice"] == test["test_iou/c"] == 1

    def test_predictions_are_classes(self):
        masks = masks_of(5, 4, ignored=0.0)
        for classes, batches in ((4, masks), (1, (masks > 0).long())):
            model, data = self.told(classes, batches, batches, None)
            (*_, last) = made = Trainer(**TRAINER).predict(model, data)
            assert len(last) == 1
            assert torch.cat(made).dtype == torch.uint8
            assert torch.equal(torch.cat(made).long(), batches)

    def test_training_logs_the_mean_over_the_pixels_that_count(self):
        masks = masks_of(6, 4)
        masks[4:] = IGNORE  # a batch of which nothing counts
        predicted = predicted_of(masks, 4)
        model, data = self.told(4, masks, predicted, None, batch_size=2)
        trainer = Trainer(max_epochs=1, limit_val_batches=0, log_every_n_steps=3, **TRAINER)
        trainer.fit(model, data)
        expected = by_counting(predicted, masks, 4)["acc"]
        assert trainer.callback_metrics["train/acc"].item() == pytest.approx(expected, rel=1e-6)
        images = next(iter(DataLoader(data.images, 6)))
        assert trainer.callback_metrics["train/loss"].item() == pytest.approx(
            model.loss(model(images), masks).item(), rel=1e-5
        )

    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true", "64-true"])
    @pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
    def test_precisions(self, precision):
        masks = masks_of(6, 3, side=17)
        masks[2:4] = IGNORE
        data = Pairs(torch.randn(6, 3, 17, 17), masks, 2, None)
        if precision == "64-true":
            data.images = data.images.double()
        model = UNet(3, features=(4, 8))
        trainer = Trainer(max_epochs=2, precision=precision, log_every_n_steps=1, **TRAINER)
        trainer.fit(model, data)
        assert all(value.isfinite() for value in trainer.callback_metrics.values())
        assert all(p.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("loss", ["ce", "dice", "ce_dice"])
    def test_float16_autocast(self, loss):
        model, masks = UNet(3, features=(4, 8), loss=loss), masks_of(2, 3, side=20)
        with torch.autocast("cpu", dtype=torch.float16):
            value = model.loss(model(torch.randn(2, 3, 20, 20)), masks)
        value.backward()
        assert value.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestShapes:
    def test_classes_begin_with_the_background_where_they_are_those_of_pixels(self):
        data = Shapes(size=64, train_size=3, val_size=2, test_size=12, target="classes")
        assert data.classes == ("background", *CLASSES)
        assert Shapes(size=64).classes == Shapes(size=64, target="instances").classes == CLASSES
        data.setup()
        assert data.state_dict()["classes"] == ["background", *CLASSES]
        masks = torch.cat([masks for _, masks in data.test_dataloader()])
        assert set(masks.unique().tolist()) == set(range(5))

    def test_run(self, train):
        from test_train import receipt

        run = train(*TINY_SCENES, experiment="experiments/shapes_unet.yaml", tiny=())
        metrics = receipt(run)["metrics"]
        assert {"test/acc", "test/miou", "test/dice", "test/dice_per_image"} <= set(metrics)
        assert receipt(run)["tested"] == 5
        saved = torch.load(run / "best.ckpt", weights_only=True)
        assert isinstance(saved["hyper_parameters"]["features"], list)
        assert saved["hyper_parameters"]["optimizer"]["class_path"] == "torch.optim.AdamW"
        assert saved["Shapes"]["classes"] == ["background", *CLASSES]

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--data.target=boxes"], "UNet needs the class of each pixel: --data.target classes"),
            (["--data.target=instances"], "UNet needs the class of each pixel: --data.target classes"),
            (["--model.num_classes=4"], "UNet has 4 classes, but Shapes has 5: --model.num_classes 5"),
            (["--model.num_classes=1"], "but Shapes has 5: --model.num_classes 5"),
            (["--model.loss=bce"], "loss: bce is not for num_classes 5, which has ce, dice, ce_dice"),
            (
                ["--data=datamodules.mnist.MNIST", "--model.channels=1", "--model.num_classes=10"],
                "model and data do not fit",
            ),
        ],
    )
    def test_what_cannot_be_used_is_one_line(self, argv, words, capsys, small_data, monkeypatch):
        from train import main

        monkeypatch.setenv("DATA_DIR", str(small_data))
        scenes = TINY_SCENES if "MNIST" not in argv[0] else ("--data.val_size=53",)
        assert main(["experiments/shapes_unet.yaml", *argv, *scenes]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
        assert len(error.strip().splitlines()) == 1

    def test_a_single_output_on_two_classes(self):
        masks = masks_of(4, 2)
        data = Pairs(torch.randn(4, 3, 12, 12), masks, 2, ("background", "cell"))
        Trainer(max_epochs=1, log_every_n_steps=1, **TRAINER).fit(Pixelwise(1), data)
        data.classes = ("background", "a", "b")
        with pytest.raises(InputError, match=r"but Pairs has 3: --model\.num_classes 3"):
            Trainer(**TRAINER).validate(Pixelwise(1), data, verbose=False)


def test_a_checkpoint_made_from_python_holds_plain_types_and_loads_again(tmp_path):
    data = Pairs(torch.randn(4, 3, 16, 16), masks_of(4, 2, side=16), 2, None)
    model = UNet(1, features=(4,), loss="bce_dice", optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, **TRAINER)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    again = UNet.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(images), model.eval()(images))
    assert again.loss_name == "bce_dice"


def test_there_must_be_foreground_to_choose_the_best_epoch_by(monkeypatch):
    model, nothing = UNet(1, features=(4,)), torch.zeros(1, 8, 8, dtype=torch.int64)
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    model._trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    model.val_overlap.update(nothing, nothing + (torch.arange(8) > 5))
    model.on_validation_epoch_end()
    model.val_overlap.update(nothing, nothing)
    with pytest.raises(InputError, match="masks of val have no foreground"):
        model.on_validation_epoch_end()
