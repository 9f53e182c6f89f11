"""Pictures with boxes: what is bad is told in one line, boxes stay on their objects, what is random can be repeated."""

import os
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REAL_DATA_DIR
from jsonargparse import ArgumentParser
from PIL import Image
from pytorch_lightning import LightningModule, Trainer

from datamodules.detections import pad
from datamodules.voc import VOC
from datamodules.voc_annotations import picture_size
from runner.errors import InputError

COLOURS = {"cat": (250, 0, 0), "dog": (0, 0, 250)}
W, H = 60, 40  # of the pictures here; `ready` leaves them as large
ONE = ("dog", 11, 6, 30, 25)  # a name, and xmin, ymin, xmax, ymax


def xml(*objects: tuple, size: str = f"<size><width>{W}</width><height>{H}</height></size>", **flags: str) -> str:
    """An annotation of objects (name, xmin, ymin, xmax, ymax); flags give numbers of objects another `difficult`."""
    inner = "".join(
        f"<object><name>{name}</name><difficult>{int(f'difficult_{i}' in flags)}</difficult>"
        "<part><name>head</name><bndbox><xmin>900</xmin></bndbox></part><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for i, (name, *box) in enumerate(objects)
    )
    return f"<annotation><filename>no.jpg</filename>{size}{inner}</annotation>"


def add(root: Path, part: str, name: str, *objects: tuple, size: tuple[int, int] = (W, H), **flags: str) -> Path:
    """Add a picture, grey with a coloured rectangle on each object's pixels; return its annotation's path."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.full((height, width, 3), 128, np.uint8)
    for kind, xmin, ymin, xmax, ymax in objects:
        pixels[ymin - 1 : ymax, xmin - 1 : xmax] = COLOURS[kind]
    Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0, comment=name)
    path = root / "Annotations" / f"{name}.xml"
    path.write_text(xml(*objects, size=f"<size><width>{width}</width><height>{height}</height></size>", **flags))
    with open(root / "ImageSets" / "Main" / f"{part}.txt", "a") as file:
        file.write(f"{name}\n")
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six pictures to train on, the last of them without objects, two to validate on, three to test on."""
    root = tmp_path / "voc"
    for part, n in (("train", 5), ("val", 2), ("test", 3)):
        for i in range(n):
            add(root, part, f"{part}{i}", ("dog", 11 + i, 6, 30, 25), ("cat", 1, 31, 8, 40))
    add(root, "train", "nothing")
    return root


def ready(folder: Path, **arguments) -> VOC:
    data = VOC(str(folder), **{"image_size": H, "batch_size": 4, "num_workers": 0, "augment": [], **arguments})
    data.setup()
    return data


def refused(folder: Path, **arguments) -> str:
    """The one line that `setup` ends in."""
    with warnings.catch_warnings(action="ignore"), pytest.raises(InputError) as raised:
        ready(folder, **arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def skipped(folder: Path, **arguments) -> tuple[VOC, str]:
    """The data without what is bad, and the one warning of that."""
    with pytest.warns(UserWarning, match="left out") as warned:
        data = ready(folder, on_bad_annotation="skip", on_bad_image="skip", **arguments)
    assert len(warned) == 1
    return data, str(warned[0].message)


def epoch_of(data: VOC, epoch: int = 0) -> list[tuple[torch.Tensor, dict]]:
    """An epoch's training samples in their order."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [sample for images, targets in loader for sample in zip(images, targets, strict=True)]


def same(some: list, others: list) -> bool:
    """Whether two epochs have the same pictures and boxes."""
    return all(
        a.shape == b.shape and torch.equal(a, b) and torch.equal(s["boxes"], t["boxes"])
        for (a, s), (b, t) in zip(some, others, strict=True)
    )


def extent(image: torch.Tensor, label: int) -> list[int]:
    """x1, y1, x2, y2 of the pixels (3, h, w) with a class's colour: red is cat, 0, and blue dog, 1."""
    y, x = np.nonzero((image[2 * label] > 180).numpy() & (image[1] < 70).numpy())
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


# -- what a batch is ---------------------------------------------------------------------------------------------------


def test_boxes_are_where_the_objects_are(folder):
    data = ready(folder)
    assert data.classes == ("cat", "dog")
    assert data.sizes == {"train": 6, "val": 2, "test": 3}
    images, targets = next(iter(data.val_dataloader()))
    assert [(i.shape, i.dtype) for i in images] == [((3, H, W), torch.uint8)] * 2
    assert targets[0]["boxes"].tolist() == [[10, 5, 30, 25], [0, 30, 8, 40]]
    assert targets[0]["boxes"].dtype == torch.float32
    assert targets[0]["labels"].tolist() == [1, 0]
    assert targets[0]["labels"].dtype == torch.int64
    assert targets[0]["difficult"].tolist() == [False, False]
    assert targets[0]["size"] == (H, W)
    assert all(type(n) is int for n in targets[0]["size"])
    assert targets[0].keys() == {"boxes", "labels", "difficult", "size"}
    for image, target in zip(images, targets, strict=True):
        assert [extent(image, label) for label in target["labels"]] == target["boxes"].tolist()


def test_a_picture_without_objects_is_trained_on(folder):
    for augment in ([], ["HorizontalFlip"]):
        target = ready(folder, augment=augment).train_set[5][1]
        assert (target["boxes"].shape, target["boxes"].dtype) == ((0, 4), torch.float32)
        assert (target["labels"].shape, target["labels"].dtype) == ((0,), torch.int64)
        assert (target["difficult"].shape, target["difficult"].dtype) == ((0,), torch.bool)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((60, 40), (20, 30)),
        ((40, 60), (30, 20)),
        ((200, 40), (10, 50)),  # 100 wide would exceed max_size
        ((101, 40), (19, 50)),
        ((37, 41), (22, 20)),
        ((300, 2), (1, 50)),
    ],
)
def test_pictures_are_scaled_and_boxes_with_them(folder, size, expected):
    width, height = size
    add(folder, "train", "other", ("dog", 1, 1, width, height), size=size)
    data = ready(folder, image_size=20, max_size=50)
    image, target = data.train_set[6]
    assert image.shape == (*expected, 3)
    assert target["size"] == expected
    assert target["boxes"].tolist() == [[0, 0, expected[1], expected[0]]]
    read = data.read_input(folder / "JPEGImages" / "other.jpg")
    assert torch.equal(read, torch.from_numpy(image).permute(2, 0, 1))


def test_width_and_height_have_a_factor_each(folder):
    add(folder, "train", "other", ("dog", 34, 1, 67, 20), size=(101, 40))
    box = ready(folder, image_size=20, max_size=50).train_set[6][1]["boxes"][0]
    assert box.tolist() == pytest.approx([33 * 50 / 101, 0, 67 * 50 / 101, 20 * 19 / 40])


def test_the_longer_side_is_limited_as_in_torchvision():
    assert VOC("x", image_size=800).max_size == 1333
    assert VOC("x").max_size == 533


def test_pictures_of_several_sizes_in_a_batch(folder):
    add(folder, "train", "tall", ("cat", 1, 1, 20, 40), size=(40, 70))
    data = ready(folder, batch_size=7, normalize=((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(dtype=torch.float32))
    batch = next(iter(data.train_dataloader()))
    pinned = (
        batch[0],
        [target | {"size": list(target["size"])} for target in batch[1]],
    )  # as pinning memory made it in older versions of torch
    images, targets = data.on_after_batch_transfer(pinned, 0)
    assert images.shape == (7, 3, 66, W)  # 70 high would be too long for 5/3 of 40
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert {target["size"] for target in targets} == {(40, 60), (66, 37)}
    for image, source, target in zip(images, batch[0], targets, strict=True):
        h, w = target["size"]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
        torch.testing.assert_close(image[:, :h, :w], (source / 255 - mean) / std)
        assert not image[:, h:].any()
        assert not image[:, :, w:].any()


def test_padding_keeps_how_pictures_lie_in_memory():
    first, second = torch.rand(3, 4, 6), torch.rand(3, 5, 2)
    batch = pad([first, second])
    assert batch.is_contiguous()
    assert torch.equal(batch[0, :, :4], first)
    assert torch.equal(batch[1, :, :, :2], second)
    assert batch.sum().item() == pytest.approx((first.sum() + second.sum()).item(), rel=1e-5)
    turned = pad([image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in (first, second)])
    assert turned.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(turned, batch)


def test_difficult_objects_are_not_trained_on_but_tested_on(folder):
    for part in ("train", "val", "test"):
        add(folder, part, f"{part}hard", ("dog", 1, 1, 9, 9), ("cat", 11, 11, 20, 20), difficult_0="")
    data = ready(folder)
    assert data.train_set[6][1]["labels"].tolist() == [0]
    assert data.train_set[6][1]["difficult"].tolist() == [False]
    for dataset in (data.val_set, data.test_set):
        assert dataset[len(dataset) - 1][1]["labels"].tolist() == [1, 0]
        assert dataset[len(dataset) - 1][1]["difficult"].tolist() == [True, False]
    assert ready(folder, train_difficult=True).train_set[6][1]["difficult"].tolist() == [True, False]


def test_a_trainer_gets_normalised_batches(folder, tmp_path):
    class Model(LightningModule):
        seen = ()

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def validation_step(self, batch, index):
            assert batch[0].shape == (2, 3, H, W)

        def training_step(self, batch, index):
            images, targets = batch
            self.seen += ((images.shape, images.dtype, [type(target["size"]) for target in targets]),)
            return images.mean() * self.weight

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Model()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=VOC(str(folder), image_size=H, batch_size=4, num_workers=0))
    assert model.seen == tuple(((n, 3, H, W), torch.float32, [tuple] * n) for n in (4, 2))


def test_pictures_of_other_kinds_and_turned_ones(folder):
    (folder / "JPEGImages" / "val0.jpg").unlink()
    Image.new("RGB", (W, H), COLOURS["dog"]).save(folder / "JPEGImages" / "val0.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (H, W)).save(folder / "JPEGImages" / "val1.jpg", exif=exif)  # 60 x 40 once it is turned
    assert picture_size(folder / "JPEGImages" / "val1.jpg") == (W, H)
    data = ready(folder)
    assert data.val_set.samples[0].path.name == "val0.PNG"
    Image.new("RGB", (W, H)).save(folder / "JPEGImages" / "train0.png")
    assert ready(folder).train_set.samples[0].path.name == "train0.jpg"
    assert [image.shape for image, _ in data.val_set] == [(H, W, 3)] * 2
    assert data.read_input(folder / "JPEGImages" / "val1.jpg").shape == (3, H, W)


# -- augmentation ------------------------------------------------------------------------------------------------------


def test_boxes_follow_a_flip_exactly(folder):
    plain, flipped = ready(folder), ready(folder, augment=[{"HorizontalFlip": {"p": 1}}])
    for i in range(5):
        image, target = flipped.train_set[i]
        original, before = plain.train_set[i]
        assert np.array_equal(image, original[:, ::-1])
        x1, y1, x2, y2 = before["boxes"].T
        torch.testing.assert_close(target["boxes"], torch.stack([W - x2, y1, W - x1, y2], dim=1), rtol=0, atol=1e-5)
        assert torch.equal(target["labels"], before["labels"])
    assert VOC("x").augmentation.transforms[0].__class__.__name__ == "HorizontalFlip"
    assert VOC("x", augment=[]).augmentation is None


def test_crops_leave_labels_on_their_boxes_and_no_box_without_area(folder):
    add(folder, "train", "hard", ("dog", 2, 2, 20, 15), ("cat", 30, 20, 50, 38), difficult_1="")
    augment = [{"RandomCrop": {"height": 24, "width": 16}}, "VerticalFlip"]
    data = ready(folder, augment=augment, train_difficult=True)
    counts = set()
    for number in range(40 * 7):
        image, target = data.train_set[number]
        assert image.shape == (24, 16, 3)
        assert target["size"] == (24, 16)
        boxes = target["boxes"]
        assert boxes.shape == (len(target["labels"]), 4)
        assert len(boxes) == len(target["difficult"])
        counts.add(len(boxes))
        assert ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1) >= 0.999).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= 16).all()
        assert (boxes[:, 3] <= 24).all()
        for box, label in zip(boxes, target["labels"], strict=True):
            x1, y1, x2, y2 = box.round().int().tolist()
            centre = image[(y1 + y2) // 2, (x1 + x2) // 2]
            assert centre[2 * label] > 150 > centre[2 - 2 * label]
        if number % 7 == 6:
            assert torch.equal(target["difficult"], target["labels"] == 0)
    assert counts == {0, 1, 2}  # a picture whose boxes are all gone is still there


def test_every_epoch_draws_anew_and_repeatably(folder):
    augment = [{"RandomCrop": {"height": 30, "width": 30}}, "HorizontalFlip", "RandomBrightnessContrast"]
    data = ready(folder, augment=augment)
    first = epoch_of(data)
    assert same(first, epoch_of(data))
    assert not same(first, epoch_of(data, 1))
    flipped, plain = ready(folder, augment=["HorizontalFlip", "VerticalFlip"]), ready(folder).train_set[0][0]
    drawn = {
        name
        for epoch in range(30)
        for name, turned in (("", plain), ("h", plain[:, ::-1]), ("v", plain[::-1]), ("hv", plain[::-1, ::-1]))
        if np.array_equal(flipped.train_set[6 * epoch][0], turned)
    }
    assert drawn == {"", "h", "v", "hv"}  # each transform has draws of its own
    originals = [image for image, _ in ready(folder).train_set][:5]  # the sixth is grey
    kept = [[np.array_equal(flipped.train_set[6 * epoch + i][0], originals[i]) for i in range(5)] for epoch in range(9)]
    assert any(len({*pictures}) == 2 for pictures in kept)  # and each picture


def test_workers_draw_the_same_as_no_workers(folder):
    augment = [{"RandomCrop": {"height": 30, "width": 30}}, "HorizontalFlip"]
    alone, two = ready(folder, augment=augment), ready(folder, augment=augment, num_workers=2, batch_size=2)
    assert same(epoch_of(alone, 3), epoch_of(two, 3))


def test_what_is_wrong_with_an_augmentation_is_one_line(folder):
    assert "uint8" in refused(folder, augment=["Normalize"])
    line = refused(folder, augment=[{"RandomCrop": {"height": 300, "width": 300}}])
    assert line.startswith(f"augment: {folder / 'JPEGImages' / 'train0.jpg'}: ")
    assert "did you mean 'HorizontalFlip'" in refused(folder, augment=["HorizontalFlop"])


def test_steps_that_leave_boxes_where_they_are(folder):
    with warnings.catch_warnings(action="error"):
        data = ready(folder, augment=[{"InvertImg": {"p": 1}}])
    image, target = data.train_set[0]
    original, before = ready(folder).train_set[0]
    assert np.array_equal(image, 255 - original)
    torch.testing.assert_close(target["boxes"], before["boxes"])


def halves(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return np.array([[0, 0, width / 2, height], [width / 2, 0, width, height], [0, 0, width, height]], np.float32)


def test_proposals_are_augmented_as_boxes_are(folder, monkeypatch):
    calls = []

    def find_proposals(images, search, keys):
        assert len({*keys}) == len(keys) == len(images)
        calls.append(len(images))
        return [search(image()) for image in images]

    monkeypatch.setattr("datamodules.detections.find_proposals", find_proposals)
    data = ready(folder, proposals=halves, image_size=20, augment=[{"HorizontalFlip": {"p": 1}}])
    for _ in range(2):
        found = [target for _, targets in data.train_dataloader() for target in targets]
    assert calls[0] == 6
    assert len(calls) == 3  # once for each split
    assert [len(target["boxes"]) for target in found].count(2) == 5
    for target in found:
        assert target["proposals"].dtype == torch.float32
        expected = torch.tensor([[15.0, 0, 30, 20], [0, 0, 15, 20], [0, 0, 30, 20]])  # flipped, as the picture is
        torch.testing.assert_close(target["proposals"], expected)
        assert len(target["labels"]) == len(target["boxes"])
    _, targets = next(iter(data.val_dataloader()))
    assert targets[0]["proposals"][:, 0].tolist() == [0, 15, 0]


def test_real_proposals(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "elsewhere"))
    from lit_models.selective_search import SelectiveSearch

    search = SelectiveSearch(scale=50, min_side=4)
    for image_size in (H, H // 2):  # what is kept for one size is not taken for the other
        data = ready(folder, proposals=search, image_size=image_size)
        target = next(iter(data.val_dataloader()))[1][0]
        assert ((target["proposals"] - target["boxes"][:1]).abs().sum(dim=1) <= 4).any()  # the dog
        assert target["proposals"][:, 2:].amax(dim=0).tolist() == [image_size * W / H, image_size]


# -- what is bad -------------------------------------------------------------------------------------------------------

BAD_BOXES = {
    "reversed": (xml(ONE, ("dog", 30, 6, 11, 25)), "object 2 (dog): its box has no area: xmin 30, ymin 6, xmax 11"),
    "outside": (xml(("dog", 11, 6, 62, 25), ONE), "object 1 (dog): its box is outside the picture of 60 x 40: xmin 11"),
    "below zero": (xml(ONE, ("cat", 11, -1, 30, 25)), "object 2 (cat): its box is outside the picture of 60 x 40"),
    "beyond": (xml(ONE, ("cat", 61, 1, 61, 25)), "object 2 (cat): its box is outside the picture of 60 x 40"),
    "far away": (xml(ONE, ("cat", 100, 1, 120, 25)), "object 2 (cat): its box is outside the picture of 60 x 40"),
    "nan": (xml(ONE, ("cat", "nan", 1, 6, 25)), "object 2 (cat): its box has no area: xmin nan"),
    "text": (xml(ONE, ("cat", "wide", 1, 6, 25)), "object 2 (cat): xmin is no number: wide"),
    "no corner": (xml(ONE, ONE).replace("<xmax>30</xmax>", "", 1), "object 1 (dog): its bndbox has no xmax"),
    "no name": (xml(ONE, ("", 1, 1, 9, 9)), "object 2: it has no name"),
    "class": (xml(ONE, ("dogs", 1, 1, 9, 9)), "object 2: there is no class dogs; did you mean 'dog'?"),
}
BAD_BOXES["no box"] = (
    xml(ONE).replace("</annotation>", "<object><name>dog</name></object></annotation>"),
    "object 2 (dog): its bndbox has no xmin",
)


@pytest.mark.parametrize("name", BAD_BOXES)
def test_a_bad_box_stops_the_run_or_is_left_out(folder, name):
    content, reason = BAD_BOXES[name]
    file = folder / "Annotations" / "val1.xml"
    file.write_text(content)
    line = refused(folder)
    assert line.startswith(f"0 bad annotation files and 1 bad boxes: {file}: {reason}")
    assert line.endswith("mend them, or leave them out: --data.on_bad_annotation skip")
    data, warning = skipped(folder)
    assert f"{file}: {reason}" in warning
    assert data.left_out == {"pictures": 0, "boxes": 1}
    assert data.describe()["left_out"] == {"pictures": 0, "boxes": 1}
    assert data.sizes["val"] == 2
    assert data.val_set[1][1]["boxes"].tolist() == [[10, 5, 30, 25]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is no XML: no element found"),
        (xml(ONE)[:90].encode(), "is no XML: "),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "is no XML: unknown encoding"),
        (b"<html/>", "is no annotation of Pascal VOC's: it begins with <html>"),
    ],
    ids=["gone", "empty", "cut", "encoding", "other"],
)
def test_a_bad_file_stops_the_run_or_leaves_its_picture_out(folder, content, reason):
    file = folder / "Annotations" / "train1.xml"
    file.write_bytes(content) if content is not None else file.unlink()
    assert refused(folder).startswith(f"1 bad annotation files and 0 bad boxes: {file} {reason}")
    data, warning = skipped(folder)
    assert f"{file} {reason}" in warning
    assert data.describe()["left_out"] == {"pictures": 1, "boxes": 0}
    assert data.sizes == {"train": 5, "val": 2, "test": 3}


def test_several_bad_annotations_are_counted(folder):
    for i in range(4):
        (folder / "Annotations" / f"train{i}.xml").write_text(xml(("dog", 50, 1, 70, 9), ("dog", 50, 1, 70, 9), ONE))
    (folder / "Annotations" / "val0.xml").unlink()
    assert refused(folder).startswith("1 bad annotation files and 8 bad boxes: ")
    assert " and 6 more; " in refused(folder)
    assert skipped(folder)[0].left_out == {"pictures": 1, "boxes": 8}


@pytest.mark.parametrize("content", [None, b"", b"no picture"], ids=["gone", "empty", "text"])
def test_a_bad_picture_stops_the_run_or_is_left_out(folder, content):
    file = folder / "JPEGImages" / "test1.jpg"
    file.write_bytes(content) if content is not None else file.unlink()
    assert refused(folder).startswith(f"1 of 11 pictures cannot be read: {file} (")
    data, warning = skipped(folder)
    assert str(file) in warning
    assert data.sizes == {"train": 6, "val": 2, "test": 2}
    assert data.left_out == {"pictures": 1, "boxes": 0}
    # each has its own switch
    assert "on_bad_image skip" in refused(folder, on_bad_annotation="skip")


def test_nothing_left_of_a_split(folder):
    for i in range(2):
        (folder / "Annotations" / f"val{i}.xml").unlink()
    assert refused(folder, on_bad_annotation="skip").endswith("val.txt: none of its pictures can be used")


def test_boxes_of_tools_that_count_from_0_are_clipped(folder):
    (folder / "Annotations" / "val0.xml").write_text(
        xml(("dog", 0, 0, 30, 25), ("dog", 40, 30, W + 1, H + 1), ("cat", 5.5, 6.25, 5.5, 7), ("cat", 7, 7, 7, 7))
    )
    boxes = ready(folder).val_set[0][1]["boxes"]
    assert boxes.tolist() == [[0, 0, 30, 25], [39, 29, W, H], [4.5, 5.25, 5.5, 7], [6, 6, 7, 7]]


def test_another_size_than_the_picture_has_is_a_warning(folder):
    file = folder / "Annotations" / "val1.xml"
    file.write_text(xml(ONE, size="<size><width>40</width><height>60</height></size>"))
    with pytest.warns(UserWarning, match=f"1 annotations tell another size .*{file}.*40 x 60, the picture 60 x 40"):
        data = ready(folder)
    assert data.val_set[1][1]["boxes"].tolist() == [[10, 5, 30, 25]]
    for size in ("", "<size><width>0</width><height>0</height></size>", "<size><width>?</width></size>"):
        file.write_text(xml(ONE, size=size))
        with warnings.catch_warnings(action="error"):
            ready(folder)


def test_a_picture_named_twice(folder):
    file = folder / "ImageSets" / "Main" / "train.txt"
    file.write_text(file.read_text() + "train1\n")
    assert f"{file} names train1 more than once" in refused(folder)
    data, _ = skipped(folder)
    assert data.sizes["train"] == 6
    assert len({sample.path for sample in data.train_set.samples}) == 6


def test_a_picture_to_train_and_to_test_on(folder):
    with warnings.catch_warnings(action="error"):
        ready(folder)
    shutil.copy(folder / "JPEGImages" / "train2.jpg", folder / "JPEGImages" / "test0.jpg")
    with pytest.warns(UserWarning, match=r"1 of the pictures in test are in train, too: .*test0\.jpg"):
        ready(folder)
    with open(folder / "ImageSets" / "Main" / "val.txt", "a") as names:
        names.write("train3\n")
    (folder / "ImageSets" / "Main" / "test.txt").unlink()
    with pytest.warns(UserWarning, match=r"1 of the pictures in val are in train, too: .*train3\.jpg"):
        assert ready(folder).sizes == {"train": 6, "val": 3, "test": 3}


def test_classes_given(folder):
    data = ready(folder, classes=["dog", "cow", "cat"])
    assert data.classes == ("dog", "cow", "cat")
    assert data.val_set[0][1]["labels"].tolist() == [0, 2]
    assert data.state_dict()["classes"] == ["dog", "cow", "cat"]
    assert "object 2: there is no class cat; there are: dog" in refused(folder, classes=["dog"])
    data, _ = skipped(folder, classes=["dog"])
    assert data.left_out["boxes"] == 10
    assert data.val_set[0][1]["labels"].tolist() == [0]
    add(folder, "val", "new", ONE).write_text(xml(("bird", 1, 1, 9, 9)))
    assert "object 1: there is no class bird; there are: cat, dog" in refused(folder)  # train has none


def test_no_objects_at_all(folder):
    for file in (folder / "Annotations").iterdir():
        file.write_text(xml())
    assert refused(folder).endswith("train.txt has an object: there is no class to train")
    assert ready(folder, classes=["dog"]).sizes["train"] == 6


# -- folders -----------------------------------------------------------------------------------------------------------


def test_without_a_test_split_val_is_tested(folder):
    (folder / "ImageSets" / "Main" / "test.txt").unlink()
    data = ready(folder)
    said = data.describe()
    assert said["test"] == said["val"] == 2
    assert said["test_split"] == "val: there is no ImageSets/Main/test.txt"
    assert "val is tested" in said["source"]
    assert data.test_set is data.val_set
    assert "test_split" not in ready_with_test(folder).describe()


def ready_with_test(folder: Path) -> VOC:
    (folder / "ImageSets" / "Main" / "test.txt").write_bytes(
        b"\xef\xbb\xbftest0\r\n\r\ntest1\r\n"
    )  # by Windows' Notepad
    return ready(folder)


def test_what_is_missing_is_named(folder, tmp_path):
    main = folder / "ImageSets" / "Main"
    assert "with Annotations/*.xml, JPEGImages/*.jpg" in refused(tmp_path / "nowhere")
    assert "did you mean 'voc'" in refused(tmp_path / "vox")
    (main / "val.txt").rename(main / "trainval.txt")
    assert refused(folder).startswith(f"there is no {main / 'val.txt'}: expected ")
    (main / "val.txt").write_text("\n \n")
    assert refused(folder).startswith(f"{main / 'val.txt'} is empty")
    (main / "val.txt").write_bytes(b"\xff\xfe\xff")
    assert refused(folder).startswith(f"{main / 'val.txt'} is no text in UTF-8")
    (main / "val.txt").write_text("val0.jpg\n")
    (folder / "JPEGImages" / "val0.jpg.jpg").write_bytes((folder / "JPEGImages" / "val0.jpg").read_bytes())
    assert "ImageSets name pictures without suffix" in refused(folder)
    (main / "val.txt").write_text(f"{'x' * 5000}\n")
    assert refused(folder).endswith("(File name too long); mend them, or leave them out: --data.on_bad_image skip")
    shutil.rmtree(folder / "JPEGImages")
    assert refused(folder).startswith(f"{folder / 'JPEGImages'} cannot be read: No such file or directory; expected")


def test_relative_folders_are_below_data_dir(folder, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(folder.parent))
    assert ready("voc").path == folder
    monkeypatch.chdir(folder.parent)
    assert ready("voc").path == Path("voc")


def test_setup_twice_is_setup_once(folder):
    data = ready(folder)
    dataset = data.train_set
    shutil.rmtree(folder)
    data.setup("test")
    assert data.train_set is dataset


def test_the_fingerprint_is_of_every_file_in_its_place(folder):
    found = [ready(folder).fingerprint]
    assert ready(folder, augment=["HorizontalFlip"], batch_size=2).fingerprint == found[0]
    assert ready(folder).state_dict()["fingerprint"] == found[0]
    annotation = folder / "Annotations" / "test2.xml"
    annotation.write_text(annotation.read_text().replace("<xmax>30</xmax>", "<xmax>31</xmax>"))
    found.append(ready(folder).fingerprint)
    Image.new("RGB", (W, H)).save(folder / "JPEGImages" / "train0.jpg")
    found.append(ready(folder).fingerprint)
    names = folder / "ImageSets" / "Main" / "test.txt"
    names.write_text("test1\ntest0\ntest2\n")
    found.append(ready(folder).fingerprint)
    assert len({*found}) == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"folder": None}, "folder or year must be given"),
        ({"batch_size": 0}, "batch sizes start at 1"),
        ({"eval_batch_size": 0}, "batch sizes start at 1"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"max_size": 300}, "max_size must be at least image_size 320, got 300"),
        ({"num_workers": -1}, "num_workers must be auto"),
        ({"normalize": ((0, 0, 0), (1, 1, 0))}, "normalize"),
        ({"classes": []}, "classes must be different names, at least one"),
        ({"classes": ["a", "a"]}, "classes must be different names"),
    ],
)
def test_arguments_out_of_range(arguments, line):
    with pytest.raises(InputError, match=re.escape(line)):
        VOC(**{"folder": "x", **arguments})


@pytest.mark.parametrize(("year", "image_sets"), [("2007", ["trainval", "test"]), ("2012", ["trainval"])])
def test_a_year_is_downloaded_to_its_layout(folder, tmp_path, monkeypatch, year, image_sets, capsys):
    asked = []

    def fetch(root, year, image_set, download):
        asked.append(image_set)
        target = Path(root, "VOCdevkit", f"VOC{year}")
        shutil.copytree(folder, target, dirs_exist_ok=True)
        if image_sets == ["trainval"]:
            (target / "ImageSets" / "Main" / "test.txt").unlink()
        assert download

    monkeypatch.setattr("torchvision.datasets.VOCDetection", fetch)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    data = VOC(year=year, num_workers=0)
    data.prepare_data()
    data.setup()
    assert asked == image_sets
    assert data.path == tmp_path / "data" / "VOCdevkit" / f"VOC{year}"
    assert data.has_test == (year == "2007")
    again = VOC(year=year)
    again.prepare_data()
    again.setup()
    assert asked == image_sets  # what is there is not fetched again
    (data.path / "ImageSets" / "Main" / "train.txt").unlink()
    VOC(year=year).prepare_data()
    assert asked == 2 * image_sets


def test_half_of_2007_is_not_taken_for_the_whole(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    shutil.copytree(folder, tmp_path / "data" / "VOCdevkit" / "VOC2007")
    (tmp_path / "data" / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "test.txt").unlink()
    data = VOC(year="2007")
    with pytest.raises(InputError, match=r"not in .*VOC2007, whole.*test\.txt"):
        data.setup()
    assert ready("VOCdevkit/VOC2007").has_test is False  # as a folder like any other


def test_offline_a_download_fails_in_one_line(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", fail)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    data = VOC(year="2007")
    data.prepare_data()
    with pytest.raises(InputError, match="Name or service not known") as raised:
        data.setup()
    assert str(raised.value).startswith(f"Pascal VOC 2007 is not in {tmp_path / 'data' / 'VOCdevkit' / 'VOC2007'}")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "data").exists()


def test_a_folder_that_is_given_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.VOCDetection", None)
    data = VOC(str(tmp_path / "mine"), year="2007")
    data.prepare_data()
    with pytest.raises(InputError, match="there is no folder"):
        data.setup()


def test_an_experiment_can_say_all_of_it(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VOC, "data")
    config = parser.parse_object({
        "data": {
            "folder": "x", "year": "2007", "augment": ["HorizontalFlip", {"RandomCrop": {"height": 9, "width": 9}}],
            "proposals": {"class_path": "lit_models.selective_search.SelectiveSearch", "init_args": {"scale": 70}},
        }
    })  # fmt: skip
    data = parser.instantiate_classes(config).data
    assert data.proposals.scale == [70]
    file = tmp_path / "x.yaml"
    for year in ("2007", "'2007'"):
        file.write_text(f"data:\n  year: {year}\n")
        read = parser.instantiate_classes(parser.parse_path(str(file))).data
        assert (read.year, read.folder) == ("2007", "VOCdevkit/VOC2007")


BCCD = Path(REAL_DATA_DIR or "nowhere", "BCCD")


@pytest.mark.skipif(not BCCD.is_dir(), reason="no BCCD in DATA_DIR")
def test_real_blood_cells():
    with warnings.catch_warnings(action="error"):
        data = ready(BCCD, image_size=320, augment=None)
    assert data.sizes == {"train": 205, "val": 87, "test": 72}
    assert data.classes == ("Platelets", "RBC", "WBC")
    assert not any(data.left_out.values())
    samples = [sample for dataset in (data.train_set, data.val_set, data.test_set) for sample in dataset.samples]
    assert sum(len(sample.boxes) for sample in samples) == 4888
    images, targets = next(iter(data.val_dataloader()))
    assert {image.shape for image in images} == {(3, 320, 426)}
    assert os.path.commonpath([sample.path for sample in samples]) == str(BCCD / "JPEGImages")
    assert all((target["boxes"] <= torch.tensor([426, 320, 426, 320])).all() for target in targets)
