"""Scenes drawn by code: what is said of them is what is in them."""

import os
import time

import numpy as np
import pytest
import torch

from datamodules.scenes import CLASSES, LEAST_SEEN, draw_scene
from datamodules.shapes import Shapes, class_masks, flip_some
from runner.errors import InputError


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def scenes(count=40, size=96, least=0, most=6):
    return [draw_scene(np.random.default_rng([7, i]), size, least, most) for i in range(count)]


def small(**arguments):
    shapes = Shapes(**{"size": 64, "train_size": 12, "val_size": 5, "test_size": 7, "batch_size": 4} | arguments)
    shapes.setup()
    return shapes


class TestScene:
    def test_boxes_are_tight_around_the_pixels_of_each_object(self):
        for scene in scenes():
            assert len(scene.boxes) == len(scene.labels) == scene.instances.max()
            for i, box in enumerate(scene.boxes, start=1):
                rows, columns = np.nonzero(scene.instances == i)
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]

    def test_an_object_stands_out_from_what_is_around_it(self):
        differences = []
        for scene in scenes():
            for i in range(1, len(scene.labels) + 1):
                inside, outside = scene.instances == i, scene.instances == 0
                differences.append(np.linalg.norm(scene.image[inside].mean(0) - scene.image[outside].mean(0)))
        assert np.mean(differences) > 80
        assert np.mean(np.array(differences) > 40) > 0.95

    def test_all_classes_and_counts_occur_with_sizes_that_differ(self):
        drawn = scenes(200)
        assert {len(scene.labels) for scene in drawn} == set(range(7))
        labels = np.concatenate([scene.labels for scene in drawn])
        assert np.bincount(labels, minlength=len(CLASSES)).min() > 0.15 * len(labels)
        sides = np.concatenate([scene.boxes[:, 2:] - scene.boxes[:, :2] for scene in drawn])
        assert sides.max() > 3 * sides.min()

    def test_objects_overlap_but_each_is_mostly_seen(self):
        """A full circle has pi / 4 of its box; what covers one leaves at least 60 % of that."""
        share, overlapping = [], 0
        for scene in scenes(200):
            for i, (label, (x1, y1, x2, y2)) in enumerate(zip(scene.labels, scene.boxes, strict=True), start=1):
                inside = scene.instances[int(y1) : int(y2), int(x1) : int(x2)]
                overlapping += bool(np.any((inside != 0) & (inside != i)))
                if CLASSES[label] == "circle":
                    share.append((inside == i).mean())
        assert overlapping > 50
        assert min(share) > LEAST_SEEN * np.pi / 4 - 0.05

    @pytest.mark.parametrize("size", [64, 256])
    def test_any_size(self, size):
        (scene,) = scenes(1, size, 3, 3)
        assert scene.image.shape == (size, size, 3)
        assert scene.image.dtype == np.uint8
        assert len(scene.labels) == 3

    def test_drawn_by_eye_a_square_fills_its_turned_box(self):
        """Pixels of a class against the area that its outline has: squares fill more of their box than stars."""
        filled = {name: [] for name in CLASSES}
        for scene in scenes(300, 128, 1, 1):
            x1, y1, x2, y2 = scene.boxes[0]
            filled[CLASSES[scene.labels[0]]].append((scene.instances == 1).sum() / ((x2 - x1) * (y2 - y1)))
        means = {name: np.mean(values) for name, values in filled.items()}
        assert means["circle"] > means["square"] > means["triangle"] > means["star"]


class TestShapes:
    def test_the_same_scenes_again_and_others_with_another_seed(self):
        first, again, other = small(), small(), small(scene_seed=1)
        for a, b in zip(first.train_set.tensors, again.train_set.tensors, strict=True):
            assert torch.equal(a, b)
        assert first.fingerprint == again.fingerprint != other.fingerprint
        assert not torch.equal(first.train_set.tensors[0][:5], first.val_set.tensors[0])

    def test_more_scenes_are_the_same_and_others(self):
        assert torch.equal(small(train_size=20).train_set.tensors[0][:12], small().train_set.tensors[0])

    def test_drawn_once(self, data_dir, monkeypatch):
        small()
        files = list((data_dir / "shapes").iterdir())
        assert len(files) == 3
        monkeypatch.setattr("datamodules.shapes.draw_scene", lambda *_: pytest.fail("drawn again"))
        small()
        files[0].write_bytes(b"damaged")
        with pytest.raises(pytest.fail.Exception):
            small()

    def test_other_configurations_are_kept_beside_them(self, data_dir):
        small()
        small(size=72)
        small(single_object=True)
        small(max_objects=3)
        assert len(list((data_dir / "shapes").iterdir())) == 12

    def test_where_nothing_can_be_kept_it_says_so_and_goes_on(self, data_dir):
        data_dir.parent.mkdir(exist_ok=True)
        data_dir.write_text("a file")
        with pytest.warns(UserWarning, match="scenes cannot be kept in .*shapes: Not a directory"):
            assert len(small().train_set) == 12

    def test_neither_is_it_a_mistake_if_the_file_cannot_be_opened(self, data_dir):
        (data_dir / "shapes").mkdir(parents=True)
        for split, count in (("train", 12), ("val", 5), ("test", 7)):
            shapes = Shapes(size=64, train_size=12, val_size=5, test_size=7)
            assert shapes.counts[split] == count
            (data_dir / "shapes" / f"{shapes._file(split).name}.{os.getpid()}").mkdir()
        with pytest.warns(UserWarning, match="scenes cannot be kept in"):
            assert len(small().train_set) == 12

    def test_one_object_each(self):
        shapes = small(single_object=True)
        images, targets = next(iter(shapes.train_dataloader()))
        assert images.shape == (4, 3, 64, 64)
        assert images.dtype == torch.uint8
        assert [target["boxes"].shape for target in targets] == [(1, 4)] * 4

    def test_masks_of_instances_and_of_classes_agree(self):
        shapes, classes = small(target="instances"), small(target="classes")
        for (images, targets), (same, masks) in zip(shapes.test_dataloader(), classes.test_dataloader(), strict=True):
            assert torch.equal(images, same)
            assert masks.dtype == torch.int64
            for target, mask in zip(targets, masks, strict=True):
                assert target["size"] == (64, 64)
                expected = torch.zeros(64, 64, dtype=torch.int64)
                for label, instance in zip(target["labels"], target["masks"], strict=True):
                    expected[instance] = label + 1
                assert torch.equal(mask, expected)

    def test_scenes_without_objects_are_there(self):
        targets = [target for _, batch in small(train_size=40).train_dataloader() for target in batch]
        empty = [target for target in targets if not len(target["labels"])]
        assert empty
        assert empty[0]["boxes"].shape == (0, 4)

    def test_thousands_of_scenes_a_second(self):
        shapes = small(size=128, train_size=100, batch_size=16)
        best = 0.0
        for _ in range(5):
            started = time.perf_counter()
            seen = sum(len(images) for images, _ in shapes.train_dataloader())
            best = max(best, seen / (time.perf_counter() - started))
        assert best > 2000

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"size": 32}, "64 to 256 pixels a side, got 32"),
            ({"max_objects": 0}, "max_objects must be from 1 to 20"),
            ({"val_size": 0}, "val_size and test_size start at 1"),
            ({"scene_seed": -1}, "scene_seed must be 0 or more"),
        ],
    )
    def test_what_cannot_be_used(self, arguments, words):
        with pytest.raises(InputError, match=words):
            Shapes(**arguments)


class TestFlip:
    def test_everything_that_is_known_of_a_scene_is_flipped_with_it(self):
        shapes = small(target="instances", train_size=30, batch_size=30)
        shapes.train_set.proposals = [np.array([[1, 2, 11, 22]], np.float32)] * 30
        images, targets = next(iter(shapes.train_dataloader()))
        torch.manual_seed(0)
        flipped_images, flipped = flip_some(images, targets)
        count = 0
        for image, target, other, new in zip(images, targets, flipped_images, flipped, strict=True):
            if torch.equal(image, other):
                assert torch.equal(target["boxes"], new["boxes"])
                continue
            count += 1
            assert torch.equal(other, image.flip(2))
            assert torch.equal(new["masks"], target["masks"].flip(2))
            assert new["proposals"].tolist() == [[53, 2, 63, 22]]
            for box, mask in zip(new["boxes"], new["masks"], strict=True):
                columns = mask.any(dim=0).nonzero()
                assert [columns.min(), columns.max() + 1] == [box[0], box[2]]
        assert 5 < count < 25

    def test_class_masks(self):
        images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
        masks = class_masks(torch.tensor([[[0, 1], [2, 2]]]), torch.tensor([[3, 0, -1]]))
        assert masks.tolist() == [[[0, 4], [1, 1]]]
        masks = torch.arange(32).view(2, 4, 4)
        torch.manual_seed(1)
        new_images, new_masks = flip_some(images, masks)
        for image, mask, new_image, new_mask in zip(images, masks, new_images, new_masks, strict=True):
            assert torch.equal(new_image, image) == torch.equal(new_mask, mask)
            assert torch.equal(new_image, image) or torch.equal(new_mask, mask.flip(1))
