"""Pascal VOC's segmentation: palettes become classes, outlines count as nothing, and val is tested."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from mask_files import write_voc_segmentation
from PIL import Image

from datamodules.voc_segmentation import VOCSegmentation
from lit_models.segmenter import IGNORE
from runner.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return write_voc_segmentation(tmp_path)


def ready(**arguments) -> VOCSegmentation:
    data = VOCSegmentation(**{"augment": [], "num_workers": 0, **arguments})
    data.prepare_data()
    data.setup()
    return data


def test_palettes_become_classes_and_outlines_do_not_count(folder):
    data = ready(val_size=2)
    assert (len(data.classes), data.classes[0], data.classes[1], data.classes[20]) == (
        21,
        "background",
        "aeroplane",
        "tvmonitor",
    )
    assert data.sizes == {"train": 6, "val": 2, "test": 3}
    theirs = torchvision.datasets.VOCSegmentation(folder.parent.parent, image_set="val")  # the same files
    for (image, mask), (their_image, their_mask) in zip(data.test_set, theirs, strict=True):
        assert np.array_equal(image, np.asarray(their_image))
        assert np.array_equal(mask, np.asarray(their_mask))
        assert {0, IGNORE} < {*np.unique(mask)} <= {0, 1, 2, 3, IGNORE}
    assert data.source == f"files in {folder} (tested: ImageSets/Segmentation/val.txt)"


def test_val_is_tested_and_validation_is_drawn_from_train(folder, monkeypatch):
    data = ready(val_size=2)
    assert [pair.name for pair in data.test_set.pairs] == ["2007_000009", "2007_000010", "2007_000011"]
    names = [pair.name for pair in data.val_set.pairs]
    assert {*names, *(pair.name for pair in data.train_set.pairs)} == {f"2007_{i:06d}" for i in range(1, 9)}
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert [pair.name for pair in ready(val_size=2).val_set.pairs] == names


def test_a_batch_of_crops_one_of_several_sizes_and_in_evaluation_one_by_one(folder):
    data = ready(batch_size=8, crop=(64, 40), eval_batch_size=3)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(dtype=torch.float32))
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((7, 3, 64, 40), (7, 64, 40))
    assert (masks == IGNORE).sum(dim=(1, 2)).ge(16 * 40).all()  # the pictures are 48 high
    assert [tuple(images.shape[:1]) for images, _ in data.test_dataloader()] == [(1,)] * 3
    data = ready(batch_size=8)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(dtype=torch.float32))
    sizes = {(pair.height, pair.width) for pair in data.train_set.pairs}
    assert len(sizes) > 1
    images, masks = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    height, width = (max(size[i] for size in sizes) for i in (0, 1))
    assert (images.shape, masks.shape) == ((7, 3, height, width), (7, height, width))
    assert (masks == IGNORE).any(dim=2).any(dim=1).sum() > 0


def test_it_is_downloaded_if_it_is_not_there_whole(folder, tmp_path, monkeypatch, capsys):
    whole, asked = Path(shutil.move(folder, tmp_path / "elsewhere")), []

    def fetch(root, year, image_set, download):
        asked.append((root, year, image_set, download))
        shutil.copytree(whole, Path(root, "VOCdevkit", f"VOC{year}"), dirs_exist_ok=True)

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", fetch)
    ready()
    assert asked == [(str(tmp_path), "2012", "trainval", True)]
    assert ready(year="2012").fingerprint == ready(year=2012).fingerprint
    assert len(asked) == 1
    ready(year=2007)
    assert asked[1][1] == "2007"


def test_offline_it_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", fail)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(InputError, match="Name or service not known") as raised:
        ready()
    message = str(raised.value)
    assert message.startswith(
        f"Pascal VOC 2012 is not in {tmp_path}/data/VOCdevkit/VOC2012, whole, and could not be had"
    )
    assert f"unpack VOCtrainval's archive in {tmp_path}/data" in message
    assert "\n" not in message
    assert not (tmp_path / "data").exists()


def test_a_mask_of_a_class_that_is_not_there_is_one_line(folder):
    Image.new("L", (51, 48), 21).save(folder / "SegmentationClass" / "2007_000001.png")
    message = f"{folder}/SegmentationClass/2007_000001.png cannot be used: it has pixels of class 21; there are 0 to 20"
    with pytest.raises(InputError, match=re.escape(message)):
        ready()
