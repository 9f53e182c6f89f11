"""Autoencoders learn, give back any size of picture, leave PCA behind, and their noise is where it should be."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer
from test_train import assert_same_run, receipt

from callbacks.autoencoders import AutoencoderPictures, sheet
from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from datamodules.mnist import MNIST
from lit_models.autoencoder import (
    PCA,
    Autoencoder,
    ConvDecoder,
    ConvEncoder,
    DenoisingAutoencoder,
    MLPDecoder,
    MLPEncoder,
    draws_of,
)
from runner.errors import InputError
from runner.run import Run
from train import main

ADAM = functools.partial(torch.optim.Adam, lr=3e-3)
SMALL = ("--model.encoder.sizes=[784, 48, 4]", "--model.decoder.sizes=[4, 48, 784]")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.1, 0.3)
QUICK = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def mlp(kind=Autoencoder, code: int = 8, shape=(1, 28, 28), **arguments) -> Autoencoder:
    pixels = math.prod(shape)
    return kind(MLPEncoder((pixels, 64, code)), MLPDecoder((code, 64, pixels), shape), optimizer=ADAM, **arguments)


def conv(kind=Autoencoder, code: int = 8, shape=(1, 28, 28), **arguments) -> Autoencoder:
    return kind(ConvEncoder(code, (8, 16), shape), ConvDecoder(code, (16, 8), shape), optimizer=ADAM, **arguments)


class Pictures(InMemoryDataModule):
    """Smooth colour pictures, normalised by the channel, and no labels."""

    source = "drawn"

    def __init__(self, shape=(3, 8, 8), batch_size: int = 16, train: int = 48, test: int = 7, normalize: bool = True):
        super().__init__(batch_size, eval_batch_size=5)
        self.is_normalized = normalize
        self.mean, self.std = (MEAN, STD) if normalize else (0.0, 1.0)
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(train + test, shape[0], 3, 3, generator=generator)
        images = (F.interpolate(coarse, shape[1:], mode="bilinear") * 255).to(torch.uint8)
        self.train_set, self.val_set = InMemoryDataset(images[:train]), InMemoryDataset(images[:9])
        self.test_set = InMemoryDataset(images[train:])

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images = batch[0].to(self.trainer.lightning_module.dtype) / 255
        if self.is_normalized:
            images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return (images,)


def trainer(**arguments) -> Trainer:
    return Trainer(**{**QUICK, "accelerator": "cpu", "max_epochs": 1, **arguments})


def numbers(model, data, **arguments) -> dict[str, float]:
    (metrics,) = trainer(**arguments).test(model, data, verbose=False)
    return metrics


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


class TestPCA:
    def test_it_is_the_singular_value_decomposition_truncated(self):
        images = torch.rand(5003, 1, 3, 4, dtype=torch.float64) @ torch.rand(4, 4, dtype=torch.float64)  # two parts
        pca, new = PCA(images, 5), torch.rand(6, 1, 3, 4, dtype=torch.float64)
        flat = images.flatten(1)
        _, values, rows = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        expected = (new.flatten(1) - flat.mean(0)) @ rows[:5].T @ rows[:5] + flat.mean(0)
        torch.testing.assert_close(pca(new), expected.view_as(new))
        torch.testing.assert_close(pca.explained, (values**2 / (values**2).sum())[:5])

    def test_bytes_stand_for_0_to_1(self):
        images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
        a, b = PCA(images, 3), PCA(images.double() / 255, 3)
        torch.testing.assert_close(a(images[:5].double() / 255), b(images[:5].double() / 255))

    @pytest.mark.parametrize(("count", "components"), [(40, 16), (40, 99), (1, 3)])
    def test_what_it_was_fitted_to_comes_back_where_there_are_enough_components(self, count, components):
        images = torch.rand(count, 1, 4, 4)
        torch.testing.assert_close(PCA(images, components)(images), images)


class TestNetworks:
    @pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 33, 18), (1, 5, 1), (2, 1, 1)], ids=str)
    @pytest.mark.parametrize("make", [mlp, conv])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_pictures_of_any_size_come_back_in_it(self, shape, make, batch):
        model = make(shape=shape)
        images = torch.rand(batch, *shape)
        assert model.encode(images).shape == (batch, 8)
        out = model(images)
        assert out.shape == images.shape
        assert 0 <= out.min() <= out.max() <= 1
        F.mse_loss(out, images).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_the_mlp_is_the_formula(self):
        model, images = mlp(), torch.rand(3, 1, 28, 28)
        (w1, b1, w2, b2), (v1, c1, v2, c2) = model.encoder.parameters(), model.decoder.parameters()
        code = (images.view(3, 784) @ w1.T + b1).clamp(min=0) @ w2.T + b2
        pixels = 1 / (1 + torch.exp(-((code @ v1.T + c1).clamp(min=0) @ v2.T + c2)))
        torch.testing.assert_close(model.encode(images), code)
        torch.testing.assert_close(model(images), pixels.view(3, 1, 28, 28))

    def test_convolutions_halve_and_double_the_sides(self):
        sides = []
        model = conv(shape=(1, 29, 14))
        for layer in [*model.encoder, *model.decoder]:
            layer.register_forward_hook(lambda layer, given, out: sides.append(tuple(out.shape[1:])))
        model(torch.rand(1, 1, 29, 14))
        maps = list(dict.fromkeys(side for side in sides if len(side) == 3))
        assert maps == [(8, 15, 7), (16, 8, 4), (1, 29, 14)]
        assert [s for s in sides if len(s) == 3][-4:] == [(16, 8, 4), (8, 15, 7), (8, 15, 7), (1, 29, 14)]

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: Autoencoder(MLPEncoder((784, 9)), MLPDecoder((8, 784))), ["gives 9 numbers", "takes 8"]),
            (lambda: Autoencoder(torch.nn.Flatten(), MLPDecoder((8, 784))), ["gives None numbers", "takes 8"]),
            (lambda: MLPDecoder((8, 700)), ["784 pixels", "(1, 28, 28)", "got 700"]),
            (lambda: MLPEncoder((784,)), ["sizes"]),
            (lambda: ConvEncoder(8, ()), ["widths", "[]"]),
            (lambda: ConvDecoder(0), ["code_size", "[0]"]),
            (lambda: ConvDecoder(8, image_shape=(1, 0, 28)), ["image_shape", "[1, 0, 28]"]),
            (lambda: mlp(DenoisingAutoencoder, level=0), ["level", "above 0, got 0"]),
            (lambda: mlp(DenoisingAutoencoder, level=math.nan), ["level", "got nan"]),
            (lambda: mlp(DenoisingAutoencoder, noise="masking", level=1.0), ["level", "masking", "below 1, got 1.0"]),
        ],
    )
    def test_what_cannot_be_used_is_told_in_one_line(self, make, words):
        with pytest.raises(InputError) as error:
            make()
        assert all(word in str(error.value) for word in words)
        assert "\n" not in str(error.value)


class TestLearning:
    @pytest.mark.parametrize("make", [mlp, conv])
    def test_one_batch_is_memorised(self, make):
        model, images = make(code=16, shape=(1, 12, 12)), torch.rand(8, 1, 12, 12).round()
        optimizer = ADAM(model.parameters())
        losses = []
        for _ in range(300):
            optimizer.zero_grad()
            loss = F.mse_loss(model(images), images)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 10

    @pytest.mark.parametrize("make", [mlp, conv, functools.partial(mlp, DenoisingAutoencoder, level=0.3)])
    def test_the_error_falls_through_the_trainer(self, make):
        model, data = make(), MNIST(batch_size=32, val_size=53)
        (before,) = trainer().validate(model, data, verbose=False)
        trainer(max_epochs=8).fit(model, data)
        (after,) = trainer().validate(model, data, verbose=False)
        assert after["val/mse"] < 0.4 * before["val/mse"]

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_in_other_precisions(self, precision):
        model, data = conv(DenoisingAutoencoder), MNIST(batch_size=100, val_size=53)
        trainer(precision=precision).fit(model, data)
        metrics = numbers(model, data, precision=precision)
        assert metrics["test/mse"] == pytest.approx(numbers(model.float(), data)["test/mse"], rel=0.02)

    def test_colour_pictures_in_batches_of_one(self):
        model, data = conv(shape=(3, 13, 10)), Pictures((3, 13, 10), batch_size=1)
        before = numbers(model, data)["test/mse"]
        trainer(max_epochs=6).fit(model, data)
        assert numbers(model, data)["test/mse"] < 0.9 * before


class TestErrors:
    @pytest.mark.parametrize("make", [mlp, functools.partial(mlp, DenoisingAutoencoder)])
    def test_they_are_means_over_pixels_and_pictures(self, make):
        """Computed here in one piece, the batches being of 40, 40 and 23."""
        model, data = make(), MNIST(val_size=53, eval_batch_size=40)
        metrics = numbers(model, data)
        images = data.test_set.tensors[0].double() / 255
        inputs = torch.cat(
            [model.corrupt(part, draws_of(i)) for i, part in enumerate(images.float().split(40))]
        ).double()
        flat = data.train_set.tensors[0].flatten(1).double().numpy() / 255
        rows = np.linalg.svd(flat - flat.mean(0))[2][:8]
        pca = (inputs.flatten(1).numpy() - flat.mean(0)) @ rows.T @ rows + flat.mean(0)
        with torch.no_grad():
            expected = {"test/mse": (model(inputs.float()) - images).square().mean()}
        expected["test/mse_pca"] = np.square(pca - images.flatten(1).numpy()).mean()
        if isinstance(model, DenoisingAutoencoder):
            expected["test/mse_noisy"] = (inputs - images).square().mean()
        assert metrics == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)

    def test_normalised_pixels_are_taken_back(self):
        model = mlp()
        a, b = (numbers(model, MNIST(val_size=53, normalize=n)) for n in (None, (0.13, 0.31)))
        assert a == pytest.approx(b, rel=1e-5)

    def test_so_they_are_by_the_channel(self):
        model = conv(shape=(3, 8, 8))
        a, b = (numbers(model, Pictures(normalize=n)) for n in (False, True))
        assert a == pytest.approx(b, rel=1e-5)

    def test_pixels_beyond_0_to_1_are_an_error(self):
        data = Pictures()
        data.mean, data.std = 0.0, 1.0
        with pytest.raises(InputError, match="takes pixels from 0 to 1, and those of Pictures are not"):
            numbers(conv(shape=(3, 8, 8)), data)

    def test_pictures_of_another_shape_are_an_error(self):
        """They could be broadcast to each other."""
        model = Autoencoder(ConvEncoder(8, (4,), (1, 28, 28)), ConvDecoder(8, (4,), (3, 28, 28)))
        with pytest.raises(InputError, match=r"pictures of \(3, 28, 28\), and the data has \(1, 28, 28\)"):
            numbers(model, MNIST(val_size=53))

    def test_data_that_is_not_in_memory_has_no_pca(self):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(4, 1, 28, 28)), 2)
        (metrics,) = trainer().test(mlp(), loader, verbose=False)
        assert set(metrics) == {"test/mse"}


class TestNoise:
    def test_gaussian_noise_has_the_deviation_asked_for(self):
        model, images = mlp(DenoisingAutoencoder, level=0.3), torch.rand(200, 1, 28, 28)
        noise = model.corrupt(images) - images
        assert abs(float(noise.mean())) < 0.003
        assert float(noise.std()) == pytest.approx(0.3, rel=0.01)

    def test_masking_noise_hides_the_share_asked_for(self):
        model, images = mlp(DenoisingAutoencoder, noise="masking", level=0.3), torch.rand(200, 1, 28, 28) + 1
        noisy = model.corrupt(images)
        hidden = noisy == 0
        assert float(hidden.float().mean()) == pytest.approx(0.3, abs=0.005)
        assert torch.equal(noisy[~hidden], images[~hidden])

    @pytest.mark.parametrize("noise", ["gaussian", "masking"])
    def test_it_is_new_in_training_and_a_batchs_own_in_evaluation(self, noise):
        model, images = mlp(DenoisingAutoencoder, noise=noise), torch.rand(4, 1, 28, 28)
        assert not torch.equal(model.corrupt(images), model.corrupt(images))
        state = torch.get_rng_state()
        first, again, other = (model.corrupt(images, draws_of(i)) for i in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), state)  # training draws what it would have drawn

    def test_only_the_input_has_it(self, monkeypatch):
        """With the noise in the target, too, an identity would have no error."""
        model, images = mlp(DenoisingAutoencoder, level=0.5), torch.rand(8, 1, 28, 28)
        monkeypatch.setattr(model, "forward", lambda images: images)
        monkeypatch.setattr(model, "log_train", lambda *_, **__: None)
        model._trainer = SimpleNamespace(datamodule=None)
        assert float(model.training_step((images,), 0)) == pytest.approx(0.25, rel=0.05)

    def test_the_numbers_do_not_depend_on_the_seed(self, monkeypatch):
        model = mlp(DenoisingAutoencoder)
        a = numbers(model, MNIST(val_size=53))
        torch.manual_seed(5)
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
        assert numbers(model, MNIST(val_size=53)) == a


def test_a_checkpoint_made_from_python_holds_plain_types_and_loads_again(tmp_path):
    model = mlp(DenoisingAutoencoder, level=0.2)
    fitted = trainer(limit_train_batches=1, limit_val_batches=1)
    fitted.fit(model, MNIST(batch_size=8, val_size=53))
    fitted.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    networks = {"encoder": MLPEncoder((784, 64, 8)), "decoder": MLPDecoder((8, 64, 784))}
    again = DenoisingAutoencoder.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, **networks)
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(again(images), model(images))
    assert again.level == 0.2


class TestExperiments:
    def test_a_run_verifies_and_goes_on_to_the_same_bits(self, train, tmp_path, monkeypatch):
        experiment = "experiments/mnist_denoising.yaml"
        small = (
            "--model.encoder.widths=[4, 8]",
            "--model.decoder.widths=[8, 4]",
            "--data.batch_size=64",
            "--data.val_size=53",
        )
        whole = train(*small, "--trainer.max_epochs=3", experiment=experiment, tiny=())
        assert set(receipt(whole)["metrics"]) == {"test/mse", "test/mse_pca", "test/mse_noisy"}
        assert receipt(whole)["metrics"]["test/mse_noisy"] == pytest.approx(0.25, rel=0.02)
        assert main(["--verify", str(whole / "receipt.json")]) == 0
        with monkeypatch.context() as patch:
            patch.setenv("RUNS_DIR", str(tmp_path / "parts"))
            patch.setattr(DenoisingAutoencoder, "on_train_epoch_end", stop_after_the_first)
            with pytest.raises(KeyError):
                main([experiment, *small, "--trainer.max_epochs=3"])
        (part,) = (tmp_path / "parts").glob("*/2*")
        torch.manual_seed(999)
        assert main(["--resume", str(part)]) == 0
        assert_same_run(whole, part)


def stop_after_the_first(model) -> None:
    if model.current_epoch == 1:
        raise KeyError("stop")


class Kept(Run):
    """A run that keeps its figures."""

    def save_picture(self, name, figure):
        self.figures = {**getattr(self, "figures", {}), name: figure}
        super().save_picture(name, figure)


@pytest.mark.pictures
class TestPictures:
    @staticmethod
    def draw(folder, model, data, **arguments) -> Kept:
        run = Kept(folder)
        trainer(callbacks=[model.pictures(run)], **arguments).test(model, data, verbose=False)
        return run

    @pytest.mark.parametrize(("code", "label"), [(2, "second number"), (5, "principal component 2 (")])
    def test_of_digits(self, tmp_path, code, label):
        run = self.draw(tmp_path, mlp(DenoisingAutoencoder, code=code), MNIST(val_size=53))
        assert set(run.figures) == {"reconstructions", "latent_plane", "walk"}
        left, right = run.figures["latent_plane"].axes
        assert label in left.get_ylabel()
        assert len(left.lines) == 10
        assert sum(len(line.get_xdata()) for line in left.lines) == 103
        assert left.get_xlim() == right.get_xlim()
        names = [tick.get_text() for tick in run.figures["reconstructions"].axes[0].get_yticklabels()]
        assert [name.split("\n")[0] for name in names] == ["pictures", "with noise", "by the network", "by PCA"]
        assert "nan" not in " ".join(names)

    def test_the_grid_shows_what_the_codes_in_its_cells_become(self, tmp_path):
        model = mlp(code=2)
        run = self.draw(tmp_path, model, MNIST(val_size=53))
        image = run.figures["latent_plane"].axes[1].images[0]
        shown, (x1, x2, y1, y2) = np.asarray(image.get_array()), image.get_extent()
        side = len(shown) // 28
        code = torch.tensor([[x1 + (x2 - x1) * 2.5 / side, y2 - (y2 - y1) * 0.5 / side]])  # first row, third column
        torch.testing.assert_close(torch.tensor(shown[:28, 56:84]), model.decode(code)[0, 0].detach())

    def test_the_walk_begins_and_ends_at_the_pictures_codes(self, tmp_path):
        model, data = mlp(code=3), MNIST(val_size=53)
        run = self.draw(tmp_path, model, data)
        shown = torch.tensor(np.asarray(run.figures["walk"].axes[0].images[0].get_array()))
        first = data.test_set.tensors[0][:2] / 255  # the first 0 and the first 1
        torch.testing.assert_close(shown[:28, :28], first[0, 0])
        torch.testing.assert_close(shown[:28, -28:], first[1, 0])
        torch.testing.assert_close(shown[:28, 29:57], model(first)[0, 0].detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shown[:28, -57:-29], model(first)[1, 0].detach(), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("code", [1, 2, 6])
    @pytest.mark.parametrize("count", [1, 7])
    def test_of_few_pictures_in_colour_without_labels(self, tmp_path, code, count):
        run = self.draw(tmp_path, conv(code=code, shape=(3, 9, 12)), Pictures((3, 9, 12), test=count))
        assert set(run.figures) == {"reconstructions", *(["latent_plane"] * (code > 1))}

    @pytest.mark.parametrize("beside", [torch.zeros(7, 9, 12, dtype=torch.int64), torch.rand(7)])
    def test_what_else_is_in_a_batch_is_no_label(self, tmp_path, beside):
        data = Pictures((3, 9, 12))
        data.test_set = InMemoryDataset(*data.test_set.tensors, beside)
        data.on_after_batch_transfer = lambda batch, _: (batch[0] / 255, *batch[1:])
        data.mean, data.std = 0.0, 1.0
        assert set(self.draw(tmp_path, conv(shape=(3, 9, 12)), data).figures) == {"reconstructions", "latent_plane"}

    def test_of_weights_that_are_no_numbers_there_are_no_codes(self, tmp_path):
        model = mlp()
        torch.nn.init.constant_(model.encoder[-1].bias, math.nan)
        assert set(self.draw(tmp_path, model, MNIST(val_size=53)).figures) == {"reconstructions"}

    def test_pictures_stand_row_by_row(self):
        images = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 2, 3) / 4
        whole = sheet(images, columns=3)
        assert whole.shape == (5, 11)
        assert (whole[0, [0, 3, 4, 7, 8]] == [0, 0.5, 0.25, 0.5, 0.5]).all()
        assert (whole[3, [0, 4]] == [0.75, 1]).all()
        assert (whole[2] == 0.5).all()


def test_pictures_are_counted_over_small_batches(tmp_path):
    model, run = mlp(), Kept(tmp_path)
    callback = AutoencoderPictures(run, count=5)
    trainer(callbacks=[callback]).test(model, MNIST(val_size=53, eval_batch_size=2), verbose=False)
    assert {name: len(images) for name, images in callback.images.items()} == {"image": 5, "mse": 5, "mse_pca": 5}
