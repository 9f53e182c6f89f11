"""Proposals of many pictures: each found once, in several processes as in one, and kept whatever happens."""

import errno
import os
import sys
import time
import warnings
from functools import partial

import numpy as np
import pytest

from datamodules import proposals
from datamodules.proposals import digest, find_proposals
from datamodules.scenes import draw_scene
from lit_models.selective_search import (
    SelectiveSearch,
)
from runner.errors import InputError


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def scenes(n: int, size: int = 128, split: int = 0) -> list:
    """Training scenes: number i of Shapes."""
    return [draw_scene(np.random.default_rng([0, split, i]), size, 0, 6) for i in range(n)]


class CountingSearch:
    """Says how often it was asked, in files, since it may be in another process; a box of the first pixel's value."""

    def __init__(self, folder):
        self.folder, self.settings = str(folder), {"method": "counting"}

    def __call__(self, image: np.ndarray) -> np.ndarray:
        with open(os.path.join(self.folder, f"asked-{os.getpid()}"), "a") as file:
            file.write(f"{image[0, 0, 0]}\n")
        return np.array([[0, 0, 1, 1 + image[0, 0, 0]]], np.float32)

    def asked(self) -> list[int]:
        """What was asked for since the last time."""
        numbers = []
        for name in os.listdir(self.folder):
            with open(os.path.join(self.folder, name)) as file:
                numbers += [int(line) for line in file]
            os.remove(os.path.join(self.folder, name))
        return sorted(numbers)


@pytest.fixture
def counting(tmp_path) -> CountingSearch:
    (tmp_path / "asked").mkdir()
    return CountingSearch(tmp_path / "asked")


def plain(value: int) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


def stored(data_folder) -> list:
    return sorted(file for file in data_folder.rglob("*") if file.is_file())


def test_nothing_is_computed_twice(counting, data_folder):
    images = [plain(1), plain(2), plain(1)]
    first = find_proposals(images, counting)
    assert [boxes[0, 3] for boxes in first] == [2, 3, 2]
    assert counting.asked() == [1, 2]  # the third is the first
    again = find_proposals([*images, plain(3)], counting)
    assert [boxes[0, 3] for boxes in again] == [2, 3, 2, 4]
    assert counting.asked() == [3]
    counting.settings = {"method": "another"}
    find_proposals(images, counting)
    assert counting.asked() == [1, 2]
    files = stored(data_folder)
    assert len(files) == 5
    for file in files:
        settings, start, name = file.relative_to(data_folder / "proposals").parts
        assert (len(settings), name.removesuffix(".npy")[:2]) == (12, start)
    assert find_proposals([], counting) == []


def test_digests_tell_shapes_apart():
    image = np.arange(48, dtype=np.uint8)
    assert digest(image.reshape(4, 4, 3)) != digest(image.reshape(2, 8, 3))
    assert digest(image.reshape(4, 4, 3)) == digest(np.asfortranarray(image.reshape(4, 4, 3)))


class ExitsWhenRead:
    def __reduce__(self):
        return sys.exit, ()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "zip", "shape", "objects"])
def test_a_damaged_file_is_computed_anew(counting, data_folder, damage):
    expected = find_proposals([plain(7)], counting)
    (file,) = stored(data_folder)
    content = file.read_bytes()
    if damage in ("shape", "objects"):
        np.save(file, np.zeros((3, 5), np.float32) if damage == "shape" else np.array([ExitsWhenRead()]))
    else:
        file.write_bytes(
            {"cut": content[:-3], "empty": b"", "text": b"hello", "zip": b"PK\x03\x04" + content[4:]}[damage]
        )
    counting.asked()
    np.testing.assert_array_equal(find_proposals([plain(7)], counting)[0], expected[0])
    assert counting.asked() == [7]
    assert file.read_bytes() == content
    find_proposals([plain(7)], counting)
    assert counting.asked() == []


def test_a_folder_that_cannot_be_written_is_one_warning(counting, data_folder):
    data_folder.mkdir()
    (data_folder / "proposals").write_text("a file in the folder's place, which not even root can write to")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find_proposals([plain(1), plain(2)], counting)
    assert [boxes[0, 3] for boxes in found] == [2, 3]
    (warning,) = caught
    assert "proposals cannot be kept in" in str(warning.message)
    assert warning.filename == __file__


def test_a_full_disk_leaves_no_half_file(counting, data_folder, monkeypatch):
    def save(file, boxes):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        with pytest.warns(UserWarning, match="No space left"):
            found = find_proposals([plain(1)], counting)
    assert found[0][0, 3] == 2
    assert stored(data_folder) == []
    find_proposals([plain(1)], counting)
    assert len(stored(data_folder)) == 1


def test_with_keys_pictures_are_not_read_again(counting):
    reads = []

    def read(value: int) -> np.ndarray:
        reads.append(value)
        return plain(value)

    images, keys = [partial(read, 1), partial(read, 2)], [digest(plain(1)), "another-key"]
    find_proposals([plain(1)], counting)
    counting.asked()
    assert [boxes[0, 3] for boxes in find_proposals(images, counting, keys)] == [2, 3]
    assert (reads, counting.asked()) == ([2], [2])  # the first was kept under its digest
    find_proposals(images, counting, keys)
    assert (reads, counting.asked()) == ([2], [])
    find_proposals(images, counting)  # without keys, they are read
    assert (reads, counting.asked()) == ([2, 1, 2], [2])
    with pytest.raises(ValueError, match="shorter"):
        find_proposals(images, counting, keys[:1])


def test_processes_find_the_same(monkeypatch, counting, tmp_path):
    images = [scene.image for scene in scenes(6, size=64)]
    images[3] = partial(np.copy, images[3])  # read in the other process
    serial = find_proposals(images, SelectiveSearch())
    monkeypatch.setattr(proposals, "available_cpus", lambda: 2)
    monkeypatch.setattr(proposals, "FEW", 2)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "other"))
    parallel = find_proposals(images, SelectiveSearch())
    for a, b in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(stored(tmp_path / "other")) == 6

    found = find_proposals([plain(i) for i in range(40)], counting)
    assert [boxes[0, 3] for boxes in found] == [1 + i for i in range(40)]
    assert f"asked-{os.getpid()}" not in os.listdir(counting.folder)
    assert counting.asked() == list(range(40))


class Slow(CountingSearch):
    def __call__(self, image: np.ndarray) -> np.ndarray:
        time.sleep(0.05)
        if image[0, 0, 0] == 3:
            raise InputError("picture 3 is bad")
        return super().__call__(image)


def test_what_was_found_before_a_mistake_is_kept(monkeypatch, counting):
    monkeypatch.setattr(proposals, "available_cpus", lambda: 2)
    monkeypatch.setattr(proposals, "FEW", 2)
    images = [plain(i) for i in range(100)]
    slow = Slow(counting.folder)
    with pytest.raises(InputError, match="picture 3 is bad"):
        find_proposals(images, slow)
    found = slow.asked()
    assert {0, 1, 2} <= {*found}
    assert len(found) < 60  # the rest was not computed first
    find_proposals(images[:3], slow)
    assert slow.asked() == []
