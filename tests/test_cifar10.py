"""CIFAR-10: every layout it may have, damage told in a line, augmentation that comes from (seed, epoch)."""

import pickle
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_cifar10
from PIL import Image
from test_train import receipt

from datamodules.cifar10 import CIFAR10, MEAN, STD, RandAugmentCIFAR10, normalize
from runner.errors import InputError
from train import main

TINY = ("--data.batch_size=20", "--data.val_size=30", "--trainer.max_epochs=2", "--model.lr_scheduler.total_steps=100")
RESNET = "experiments/cifar10_resnet20.yaml"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A DATA_DIR of the test's own, with torchvision's files in it."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return write_cifar10(tmp_path / "data")


def write_class_folders(root, per_class=3):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in CIFAR10.classes:
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                    root / part / name / f"{i:04}.png"
                )
    return root


class TestLayouts:
    def test_torchvisions_files(self, folder):
        data = CIFAR10(val_size=30)
        data.prepare_data()
        data.setup()
        assert data.sizes == {"train": 70, "val": 30, "test": 23}
        with open(folder / "test_batch", "rb") as file:
            content = pickle.load(file, encoding="bytes")
        images, labels = data.test_set.tensors
        assert labels.tolist() == content[b"labels"]
        assert np.array_equal(images[5].permute(1, 2, 0), content[b"data"][5].reshape(3, 32, 32).transpose(1, 2, 0))

    def test_class_folders_and_an_archive_of_them_are_the_same_data(self, tmp_path, monkeypatch):
        root = write_class_folders(tmp_path / "a" / "cifar10")
        (root / "train" / "cat" / ".DS_Store").write_bytes(b"x")
        (tmp_path / "b").mkdir()
        with tarfile.open(tmp_path / "b" / "cifar10.tar.gz", "w:gz") as archive:
            for part in ("test", "train"):
                archive.add(root / part, arcname=part)
        prints = []
        for place in ("a", "b"):
            monkeypatch.setenv("DATA_DIR", str(tmp_path / place))
            data = CIFAR10(val_size=5)
            data.setup()
            assert data.sizes == {"train": 25, "val": 5, "test": 30}
            prints.append(data.fingerprint)
        assert prints[0] == prints[1]
        pixels = np.asarray(Image.open(root / "test" / "cat" / "0001.png"))
        assert np.array_equal(data.test_set.tensors[0][3 * 3 + 1].permute(1, 2, 0), pixels)

    def test_no_validation_set_on_request(self, folder, train):
        run = train("--data.val_size=0", "--trainer.max_epochs=1", "--model.widths=[8,8,8]", "--model.compile=false",
                    experiment="experiments/cifar10_speed.yaml", tiny=())  # fmt: skip
        assert receipt(run)["data"]["val"] == 0
        assert receipt(run)["tested"] == 23

    def test_setup_twice_is_once(self, folder):
        data = CIFAR10(val_size=30)
        data.setup()
        first = data.train_set
        data.setup()
        assert data.train_set is first


class TestDamage:
    def damaged(self, words):
        with pytest.raises(InputError) as caught:
            CIFAR10(val_size=3).setup()
        assert len(str(caught.value).splitlines()) == 1
        assert not [word for word in words if word not in str(caught.value)]

    def test_nothing_there_and_no_network(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "none"))

        def fail(*_, **__):
            raise OSError("no route to host")

        monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
        assert main([RESNET, *TINY]) == 2
        error = capsys.readouterr().err
        assert "no route to host" in error
        assert "cifar10" in error
        assert not (tmp_path / "none").exists()

    def test_a_file_is_missing(self, folder):
        (folder / "data_batch_3").unlink()
        self.damaged(["data_batch_3 is missing"])

    def test_a_file_is_cut_short(self, folder):
        (folder / "test_batch").write_bytes((folder / "test_batch").read_bytes()[:1000])
        self.damaged(["test_batch is damaged"])

    def test_a_file_that_would_run_code_is_refused(self, folder):
        (folder / "test_batch").write_bytes(pickle.dumps({b"data": print, b"labels": [0]}))
        self.damaged(["test_batch is damaged", "it would run builtins.print"])

    def test_labels_of_another_number_of_classes(self, folder):
        (folder / "test_batch").write_bytes(
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [77]}, protocol=2)
        )
        self.damaged(["test_batch: expected a label from 0 to 9"])

    def test_a_class_is_missing(self, folder, tmp_path):
        shutil.rmtree(folder)
        root = write_class_folders(tmp_path / "data" / "cifar10")
        shutil.rmtree(root / "test" / "frog")
        self.damaged(["no pictures in test/frog"])

    def test_a_picture_of_another_size_is_named(self, folder, tmp_path):
        shutil.rmtree(folder)
        root = write_class_folders(tmp_path / "data" / "cifar10")
        Image.new("RGB", (40, 30)).save(root / "train" / "cat" / "0001.png")
        self.damaged(["0001.png is 40 x 30 pixels, not 32 x 32"])

    def test_an_archive_is_cut_short(self, folder, tmp_path):
        shutil.rmtree(folder)
        (tmp_path / "data" / "cifar10.tar.gz").write_bytes(b"\x1f\x8b\x08\x00 no archive")
        self.damaged(["cifar10.tar.gz is damaged"])


class TestAugmentation:
    images = torch.arange(6 * 3 * 32 * 32).view(6, 3, 32, 32).remainder(251).to(torch.uint8)

    def test_each_picture_is_moved_and_mirrored_as_a_whole(self):
        data = CIFAR10(crop=4)
        for image, moved in zip(self.images, data.augment(self.images, 0), strict=True):
            padded = torch.nn.functional.pad(image, (4,) * 4)
            views = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
            assert any(torch.equal(moved, view) or torch.equal(moved, view.flip(2)) for view in views)

    def test_every_shift_and_both_sides_come_up(self):
        image = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
        image[0, 0, 16, 10] = 1
        moved = CIFAR10(crop=2).augment(image.expand(4000, -1, -1, -1), 0)
        places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
        assert places == {(16 + y, x + column) for y in range(-2, 3) for x in range(-2, 3) for column in (10, 21)}

    def test_it_comes_from_seed_and_epoch(self, monkeypatch):
        draws = {}
        for seed in ("1", "2"):
            monkeypatch.setenv("PL_GLOBAL_SEED", seed)
            for epoch in (0, 1):
                data = CIFAR10()
                draws[seed, epoch] = data.augment(self.images, epoch)
                assert not torch.equal(
                    data.augment(self.images, epoch), draws[seed, epoch]
                )  # the next batch is another
                torch.rand(3)  # what else is drawn changes nothing
                assert torch.equal(CIFAR10().augment(self.images, epoch), draws[seed, epoch])
        assert len({draw.numpy().tobytes() for draw in draws.values()}) == 4

    def test_without_crop_and_flip_nothing_changes(self):
        assert torch.equal(CIFAR10(crop=0, flip=False).augment(self.images, 0), self.images)

    def test_reflection(self):
        moved = CIFAR10(crop=4, border="reflect", flip=False).augment(self.images + 5, 0)
        padded = torch.nn.functional.pad(self.images + 5, (4,) * 4, mode="reflect")
        assert any(torch.equal(moved[0], padded[0, :, y : y + 32, x : x + 32]) for y in range(9) for x in range(9))

    def test_only_training_pictures_are_moved(self, folder):
        data = CIFAR10(val_size=30)
        data.setup()
        batch = (self.images, torch.zeros(6))
        for training in (True, False):
            data.trainer = SimpleNamespace(training=training, current_epoch=0, lightning_module=torch.nn.Linear(1, 1))
            data.trainer.lightning_module.dtype = torch.float32
            images, _ = data.on_after_batch_transfer(batch, 0)
            assert torch.equal(images, normalize(self.images, torch.float32)) is not training

    def test_normalised(self):
        floats = normalize(self.images, torch.float32)
        expected = (self.images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(floats, expected)


class TestRandAugment:
    images = TestAugmentation.images

    def test_it_comes_from_seed_and_epoch_and_leaves_the_global_generator_alone(self, monkeypatch):
        draws = {}
        for seed, epoch in (("1", 0), ("1", 1), ("2", 0)):
            monkeypatch.setenv("PL_GLOBAL_SEED", seed)
            data, state = RandAugmentCIFAR10(together=1), torch.get_rng_state()
            batches = [data.augment(self.images, epoch) for _ in range(2)]
            assert torch.equal(torch.get_rng_state(), state)
            assert not torch.equal(*batches)
            torch.rand(3)  # what else is drawn changes nothing
            again = RandAugmentCIFAR10(together=1)
            assert torch.equal(torch.cat([again.augment(self.images, epoch) for _ in range(2)]), torch.cat(batches))
            draws[seed, epoch] = batches[0].numpy().tobytes()
        assert len(set(draws.values())) == 3

    @pytest.mark.parametrize(("together", "kinds"), [(8, 1), (4, 2), (1, 8)])
    def test_so_many_pictures_share_a_draw(self, together, kinds, monkeypatch):
        monkeypatch.setenv("PL_GLOBAL_SEED", "3")
        data = RandAugmentCIFAR10(together=together, magnitude=25, crop=0, flip=False)
        found = [data.augment(self.images[:1].expand(8, -1, -1, -1), 0) for _ in range(10)]
        assert max(len(batch.unique(dim=0)) for batch in found) == kinds

    def test_pictures_are_moved_and_mirrored_first(self):
        """With a strength of nothing, most operations do nothing: then it is `CIFAR10`'s augmentation."""
        data, plain = RandAugmentCIFAR10(operations=1, magnitude=0, together=1), CIFAR10()
        same = [
            (a == b).all() for a, b in zip(data.augment(self.images, 0), plain.augment(self.images, 0), strict=True)
        ]
        assert any(same)

    def test_every_operation_can_be_had_of_what_a_batch_is(self):
        """Bytes, with channels side by side; the last few are fewer."""
        data, seen = RandAugmentCIFAR10(magnitude=30, together=4), set()
        once = data.operations._apply_image_or_video_transform

        def apply(image, transform_id, *arguments, **settings):
            seen.add(transform_id)
            return once(image, transform_id, *arguments, **settings)

        data.operations._apply_image_or_video_transform = apply
        for epoch in range(60):
            batch = data.augment(self.images, epoch)
            assert (batch.shape, batch.dtype) == (self.images.shape, torch.uint8)
        assert len(seen) == 14

    @pytest.mark.parametrize("wrong", [{"operations": 0}, {"magnitude": 31}, {"together": 0}])
    def test_what_cannot_be_is_one_line(self, wrong):
        with pytest.raises(InputError, match="operations and together start at 1, and magnitude is from 0 to 30"):
            RandAugmentCIFAR10(**wrong)


def test_a_run_stopped_and_resumed_ends_in_the_same_bits(folder, train):
    whole = train(*TINY, experiment=RESNET, tiny=())
    part = train(*TINY, "--trainer.max_epochs=1", experiment=RESNET, tiny=())
    resumed = train("--resume", str(part), "--trainer.max_epochs=2", experiment="", tiny=())
    a, b = (torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_on_device_all_pictures_go_there_once_and_the_fingerprint_stays(folder):
    data, other = CIFAR10(val_size=30, on_device=True), CIFAR10(val_size=30)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    for _ in range(2):
        data.setup()
    other.setup()
    assert all(t.is_meta for part in (data.train_set, data.val_set, data.test_set) for t in part.tensors)
    assert data.fingerprint == other.fingerprint
