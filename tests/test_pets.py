"""Oxford-IIIT Pet: its trimaps become classes, its split is the official one, and what is missing is one line."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from mask_files import write_pets
from PIL import Image
from torchvision.datasets import OxfordIIITPet

from datamodules.pets import Pets
from lit_models.segmenter import IGNORE
from runner.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return write_pets(tmp_path)


def ready(**arguments) -> Pets:
    data = Pets(**{"augment": [], "num_workers": 0, **arguments})
    data.prepare_data()
    data.setup()
    return data


def trimap(folder: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(folder / "annotations" / "trimaps" / f"{name}.png"))


@pytest.mark.parametrize(("outline", "number"), [("ignore", IGNORE), ("class", 2)])
def test_trimaps_become_classes(folder, outline, number):
    data = ready(outline=outline)
    assert data.classes == ("background", "pet", "outline")[: 3 if outline == "class" else 2]
    for dataset in (data.train_set, data.val_set, data.test_set):
        for pair, (image, mask) in zip(dataset.pairs, dataset, strict=True):
            expected = np.choose(trimap(folder, pair.name), [0, 1, 0, number])
            assert np.array_equal(mask, expected)
            assert (mask == number).any()
            assert image.shape == (*mask.shape, 3)


def test_the_official_split_is_kept_and_validation_is_drawn_from_trainval(folder, monkeypatch):
    data = ready(val_size=2)
    assert data.sizes == {"train": 6, "val": 2, "test": 3}
    names = {part: [pair.name for pair in getattr(data, f"{part}_set").pairs] for part in ("train", "val", "test")}
    assert names["test"] == ["Abyssinian_9", "Abyssinian_10", "Abyssinian_11"]
    assert {*names["train"], *names["val"]} == {f"Abyssinian_{i}" for i in range(1, 9)}
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert [pair.name for pair in ready(val_size=2).val_set.pairs] == names["val"]
    assert [pair.name for pair in ready(val_size=2, split_seed=1).val_set.pairs] != names["val"]
    assert data.source == f"files in {folder} (tested: annotations/test.txt)"
    assert "test_split" not in data.describe()


def test_torchvision_reads_the_same_files_to_the_same_masks(folder):
    """So these small files are in its layout."""
    theirs = OxfordIIITPet(folder.parent, split="test", target_types="segmentation")
    data = ready(outline="class")
    for (image, mask), (their_image, their_mask) in zip(data.test_set, theirs, strict=True):
        assert np.array_equal(image, np.asarray(their_image))
        assert np.array_equal(mask, np.choose(np.asarray(their_mask), [0, 1, 0, 2]))


def test_it_is_downloaded_if_it_is_not_there_whole(folder, tmp_path, monkeypatch, capsys):
    whole, asked = Path(shutil.move(folder, tmp_path / "elsewhere")), []

    def fetch(root, download):
        asked.append((root, download))
        shutil.copytree(whole, Path(root, "oxford-iiit-pet"), dirs_exist_ok=True)

    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet", fetch)
    ready()
    assert asked == [(str(tmp_path), True)]
    ready()
    assert len(asked) == 1
    (folder / "annotations" / "test.txt").unlink()
    ready()
    assert len(asked) == 2


def test_offline_it_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr("torchvision.datasets.oxford_iiit_pet.download_and_extract_archive", fail)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(InputError, match="Name or service not known") as raised:
        ready()
    message = str(raised.value)
    assert message.startswith(f"Oxford-IIIT Pet is not in {tmp_path}/data/oxford-iiit-pet, whole, and could not be had")
    assert "unpack images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets" in message
    assert "\n" not in message
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "images" / "Abyssinian_3.jpg").unlink(),
            "1 of 11 pictures with their masks cannot be used: {0}/images/Abyssinian_3.jpg cannot be read: No such file",
        ),
        (
            lambda f: (f / "annotations" / "trimaps" / "Abyssinian_3.png").unlink(),
            "{0}/annotations/trimaps/Abyssinian_3.png cannot be used: No such file",
        ),
        (
            lambda f: Image.new("L", (60, 43), 4).save(f / "annotations" / "trimaps" / "Abyssinian_3.png"),
            "Abyssinian_3.png cannot be used: it has pixels of class 4; there are 1 to 3",
        ),
        (lambda f: (f / "annotations" / "test.txt").write_text(""), "{0}/annotations/test.txt is empty"),
    ],
)
def test_what_is_missing_is_one_line_that_names_it(folder, change, message):
    change(folder)
    with pytest.raises(InputError, match=re.escape(message.format(folder))) as raised:
        ready()
    assert "\n" not in str(raised.value)
