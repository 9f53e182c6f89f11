"""The variational autoencoder's bound is what the paper says it is, and new pictures come of learning by it."""

import math

import pytest
import torch
from test_autoencoder import ADAM, Kept, Pictures, numbers, stop_after_the_first, trainer
from test_train import assert_same_run, receipt
from torch.distributions import Bernoulli, Normal, kl_divergence

from datamodules.mnist import MNIST
from lit_models.autoencoder import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, draws_of
from lit_models.vae import VAE, kl_to_standard_normal, reparameterise
from runner.errors import InputError
from train import main

PRIOR = Normal(0.0, 1.0)


def vae(code: int = 4, **arguments) -> VAE:
    return VAE(MLPEncoder((784, 64, 2 * code)), MLPDecoder((code, 64, 784)), optimizer=ADAM, **arguments)


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


class TestBound:
    def test_the_divergence_is_torchs(self):
        mean, log_var = torch.randn(2, 6, 5, dtype=torch.float64)
        expected = kl_divergence(Normal(mean, log_var.exp().sqrt()), PRIOR).sum(dim=1)
        torch.testing.assert_close(kl_to_standard_normal(mean, log_var), expected)
        assert torch.equal(kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2))

    def test_it_is_that_of_a_computation_of_its_own_with_the_same_weights(self):
        model, images = vae(), torch.rand(3, 1, 28, 28)
        recon, kl = model.negative_elbo(images, draws_of(7))
        (w1, b1, w2, b2), (v1, c1, v2, c2) = (
            [p.detach().double() for p in network.parameters()] for network in (model.encoder, model.decoder)
        )
        x = images.flatten(1).double()
        out = (x @ w1.T + b1).relu() @ w2.T + b2
        q = Normal(out[:, :4], (out[:, 4:] / 2).exp())
        z = q.mean + q.stddev * torch.randn(3, 4, generator=draws_of(7)).double()
        p = Bernoulli(logits=(z @ v1.T + c1).relu() @ v2.T + c2, validate_args=False)  # of grey pixels, too
        torch.testing.assert_close(recon.double(), -p.log_prob(x).sum(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(kl.double(), kl_divergence(q, PRIOR).sum(1), rtol=1e-4, atol=1e-6)

    def test_the_tested_number_is_the_mean_over_all_pictures(self):
        model, data = vae(beta=3.0), MNIST(val_size=53, eval_batch_size=40)
        metrics = numbers(model, data)
        with torch.no_grad():
            parts = (data.test_set.tensors[0] / 255).split(40)  # 40, 40, 23
            recon, kl = torch.cat(
                [torch.stack(model.negative_elbo(x, draws_of(i))) for i, x in enumerate(parts)], 1
            ).mean(1)
        expected = {"recon": recon, "kl": kl, "nelbo": recon + kl, "loss": recon + 3 * kl}
        assert {name: metrics[f"test/{name}"] for name in expected} == pytest.approx(
            {name: float(value) for name, value in expected.items()}, rel=1e-5
        )
        assert {"test/mse", "test/mse_pca"} < set(metrics)

    def test_the_loss_has_beta_and_the_bound_has_not(self, monkeypatch):
        logged = {}
        for beta in (0.0, 1.0, 4.0):
            torch.manual_seed(1)
            model = vae(beta=beta)
            monkeypatch.setattr(model, "log_train", lambda i, n, beta=beta, **sums: logged.update({beta: sums}))
            monkeypatch.setattr(model, "pixels", lambda batch: batch[0])
            torch.manual_seed(2)
            loss = model.training_step((torch.full((5, 1, 28, 28), 0.3),), 0)
            sums = logged[beta]
            assert float(loss) == pytest.approx(float(sums["recon"] + beta * sums["kl"]) / 5, rel=1e-6)
        assert logged[0.0]["nelbo"] == logged[1.0]["nelbo"] == logged[4.0]["nelbo"] == logged[1.0]["loss"]

    def test_codes_have_the_distribution_and_pass_on_gradients(self):
        mean, log_var = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 2 * math.log(3.0)]])
        codes = reparameterise(mean.expand(20000, 2), log_var.expand(20000, 2))
        torch.testing.assert_close(codes.mean(0), mean[0], atol=0.1, rtol=0)
        torch.testing.assert_close(codes.std(0), torch.tensor([1.0, 3.0]), rtol=0.03, atol=0)
        mean.requires_grad_(), log_var.requires_grad_()
        drawn = reparameterise(mean, log_var, draws_of(0))
        drawn.sum().backward()
        assert torch.equal(mean.grad, torch.ones(1, 2))
        torch.testing.assert_close(log_var.grad, 0.5 * (drawn - mean).detach())

    def test_numbers_repeat_and_leave_trainings_draws_alone(self):
        model, data = vae(), MNIST(val_size=53)
        assert numbers(model, data) == numbers(model, data)
        state = torch.get_rng_state()
        model.negative_elbo(torch.rand(3, 1, 28, 28, generator=draws_of(0)), draws_of(1))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf])
    def test_beta_is_a_number_from_0(self, beta):
        with pytest.raises(InputError, match="beta must be a number from 0, got"):
            vae(beta=beta)

    def test_the_encoder_gives_means_and_variances(self):
        with pytest.raises(InputError, match=r"gives 4 numbers, the other takes 4 \(the encoder 2 numbers for each"):
            VAE(MLPEncoder((784, 4)), MLPDecoder((4, 784)))


class TestLearning:
    def test_one_batch_is_memorised(self):
        model, images = vae(), torch.rand(16, 1, 28, 28).round()
        optimizer = ADAM(model.parameters())
        losses = []
        for _ in range(400):
            optimizer.zero_grad()
            loss = sum(model.negative_elbo(images)).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > 500
        assert losses[-1] < 50  # to tell 16 apart takes log 16 = 2.8 nats

    def test_the_bound_falls_through_the_trainer(self):
        model, data = vae(), MNIST(batch_size=32, val_size=53)
        (before,) = trainer().validate(model, data, verbose=False)
        trainer(max_epochs=8).fit(model, data)
        (after,) = trainer().validate(model, data, verbose=False)
        assert after["val/nelbo"] < 0.75 * before["val/nelbo"]
        assert after["val/kl"] > 1  # the codes tell something

    def test_more_beta_makes_codes_say_less(self):
        divergences = []
        for beta in (0.1, 30.0):
            torch.manual_seed(0)
            model, data = vae(beta=beta), MNIST(batch_size=32, val_size=53)
            trainer(max_epochs=4).fit(model, data)
            divergences.append(numbers(model, data)["test/kl"])
        assert divergences[1] < divergences[0] / 3

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_in_other_precisions(self, precision):
        model, data = vae(), MNIST(batch_size=100, val_size=53)
        trainer(precision=precision).fit(model, data)
        metrics = numbers(model, data, precision=precision)
        assert metrics["test/nelbo"] == pytest.approx(numbers(model.float(), data)["test/nelbo"], rel=0.02)

    def test_colour_pictures_by_convolutions_in_batches_of_one(self):
        networks = ConvEncoder(6, (4, 8), (3, 13, 10)), ConvDecoder(3, (8, 4), (3, 13, 10))
        model, data = VAE(*networks, optimizer=ADAM), Pictures((3, 13, 10), batch_size=1)
        before = numbers(model, data)["test/nelbo"]
        trainer(max_epochs=2).fit(model, data)
        assert numbers(model, data)["test/nelbo"] < before

    def test_samples_are_pictures_that_repeat_with_the_generator(self):
        model = vae()
        a, b, c = (model.sample(3, draws_of(i)) for i in (0, 0, 1))
        assert a.shape == (3, 1, 28, 28)
        assert 0 <= a.min() <= a.max() <= 1
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        codes = torch.randn(3, 4, generator=draws_of(0))
        torch.testing.assert_close(a, model.decode(codes))


class TestExperiment:
    def test_a_run_verifies_and_goes_on_to_the_same_bits(self, train, tmp_path, monkeypatch):
        experiment = "experiments/mnist_vae.yaml"
        small = ("--model.encoder.sizes=[784, 48, 8]", "--model.decoder.sizes=[4, 48, 784]", "--data.val_size=53",
                 "--trainer.max_epochs=3")  # fmt: skip
        whole = train(*small, experiment=experiment, tiny=())
        assert {"test/nelbo", "test/recon", "test/kl", "test/loss"} < set(receipt(whole)["metrics"])
        assert main(["--verify", str(whole / "receipt.json")]) == 0
        with monkeypatch.context() as patch:
            patch.setenv("RUNS_DIR", str(tmp_path / "parts"))
            patch.setattr(VAE, "on_train_epoch_end", stop_after_the_first)
            with pytest.raises(KeyError):
                main([experiment, *small])
        (part,) = (tmp_path / "parts").glob("*/2*")
        torch.manual_seed(999)
        assert main(["--resume", str(part)]) == 0
        assert_same_run(whole, part)


@pytest.mark.pictures
def test_samples_are_drawn_beside_the_other_pictures(tmp_path):
    model, run = vae(code=2), Kept(tmp_path)
    trainer(callbacks=[model.pictures(run)]).test(model, MNIST(val_size=53), verbose=False)
    assert set(run.figures) == {"reconstructions", "latent_plane", "walk", "samples"}
    (image,) = run.figures["samples"].axes[0].images
    first = model.sample(256, draws_of(0))[0, 0].detach()
    torch.testing.assert_close(torch.tensor(image.get_array()[:28, :28]), first)
