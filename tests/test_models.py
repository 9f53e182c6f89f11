"""Every model learns, memorises one batch, agrees with its reference, and survives its edge cases."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer
from torch import nn
from torchmetrics.functional import mean_squared_error
from torchvision.ops import MLP as TorchvisionMLP

from datamodules.mnist import MNIST
from lit_models.lenet import LeNet
from lit_models.mlp import MLP
from lit_models.softmax_regression import SoftmaxRegression

MODELS = {  # name -> a function of keyword arguments, for images (B, 1, 28, 28) of 10 classes
    "mlp": functools.partial(MLP, (784, 64, 10)),
    "mlp_mse": functools.partial(MLP, (784, 64, 10), loss="mse"),
    "mlp_dropout": functools.partial(MLP, (784, 64, 64, 10), dropout=0.1),
    "softmax_regression": SoftmaxRegression,
    "lenet": LeNet,
}


@pytest.fixture(params=MODELS)
def make(request):
    torch.manual_seed(0)
    return MODELS[request.param]


def test_one_batch_is_memorised(make):
    model = make()
    images, labels = torch.rand(16, 1, 28, 28), torch.arange(16) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = model.loss(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert (model.eval()(images).argmax(dim=1) == labels).all()


def test_the_loss_falls_and_the_accuracy_rises_through_the_trainer(make, tmp_path):
    model = make(optimizer=functools.partial(torch.optim.Adam, lr=3e-3))
    data = MNIST(batch_size=32, val_size=53)
    trainer = Trainer(max_epochs=8, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu")  # fmt: skip
    (before,) = trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    (after,) = trainer.validate(model, data, verbose=False)
    assert after["val/loss"] < 0.6 * before["val/loss"]
    assert after["val/acc"] > 0.9 > 0.3 > before["val/acc"]


@pytest.mark.parametrize("batch", [1, 3])
def test_small_batches_train(make, batch):
    model = make().train()
    loss = model.loss(model(torch.rand(batch, 1, 28, 28)), torch.zeros(batch, dtype=torch.int64))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_checkpoint_made_from_python_holds_plain_types_and_loads_again(make, tmp_path):
    model = make(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    trainer = Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")  # fmt: skip
    trainer.fit(model, MNIST(batch_size=8, val_size=53))
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    again = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(again(images), model.eval()(images))
    assert again.loss_name == model.loss_name


def test_mlp_equals_torchvisions():
    theirs = TorchvisionMLP(784, [512, 512, 10])
    ours = MLP((784, 512, 512, 10))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(b)
    images = torch.rand(7, 1, 28, 28)
    torch.testing.assert_close(ours(images), theirs.eval()(images.flatten(1)))


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 1), (32, 3)])
def test_lenet_equals_its_layers_one_after_the_other(size, channels):
    padding = 2 if size == 28 else 0
    theirs = nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    ours = LeNet(image_size=size, channels=channels)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.copy_(b)
    images = torch.rand(3, channels, size, size)
    torch.testing.assert_close(ours(images), theirs(images))
    if channels == 1:
        assert sum(p.numel() for p in ours.parameters()) == 61_706  # the tutorial's


def test_dropout_works_in_training_only():
    model = MLP((784, 64, 10), dropout=0.5)
    images = torch.rand(5, 1, 28, 28)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_softmax_regression_has_the_lectures_gradient():
    model = SoftmaxRegression(num_inputs=12, num_classes=3).double()
    images, labels = torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])  # colour, odd sizes
    model.loss(model(images), labels).backward()

    x, w, b = images.flatten(1).numpy(), model.linear.weight.detach().numpy(), model.linear.bias.detach().numpy()
    scores = x @ w.T + b
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    error = p - np.eye(3)[labels]  # dL/dscores = (p - y) / B
    np.testing.assert_allclose(model.linear.weight.grad.numpy(), error.T @ x / 5, rtol=1e-10)
    np.testing.assert_allclose(model.linear.bias.grad.numpy(), error.mean(axis=0), rtol=1e-10)


def test_losses_equal_their_references():
    logits, labels = torch.randn(6, 10), torch.arange(6)
    one_hot = F.one_hot(labels, 10).float()
    torch.testing.assert_close(
        MLP(loss="mse").loss(logits, labels), mean_squared_error(logits.flatten(), one_hot.flatten())
    )
    expected = -(F.log_softmax(logits, dim=1) * one_hot).sum(dim=1).mean()
    torch.testing.assert_close(MLP().loss(logits, labels), expected)


def test_metrics_are_over_samples_not_over_batches(small_data):
    """103 test pictures in batches of 50, 50 and 3: a mean over batches would give the last three too much weight."""
    model, data = SoftmaxRegression(), MNIST(batch_size=32, val_size=53, eval_batch_size=50)
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    (metrics,) = trainer.test(model, data, verbose=False)
    images, labels = data.test_set.tensors
    logits = model.eval()(images.float() / 255)
    assert metrics["test/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-7)
    assert metrics["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_train_metrics_are_over_the_samples_since_the_last_log(train, accumulate):
    """With a learning rate of 0 the train metrics of a window must equal those of the same samples, computed at once."""
    from callbacks.seeding import epoch_seed
    from runner.history import read_history

    argv = (
        "--model.sizes=[784, 10]",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0",
        "--trainer.max_epochs=1",
    )
    every = f"--trainer.log_every_n_steps={3 // accumulate}"  # 96 samples
    run = train(*argv, every, f"--trainer.accumulate_grad_batches={accumulate}")
    model = MLP.load_from_checkpoint(run / "best.ckpt", weights_only=True).eval()
    data = MNIST(batch_size=32, val_size=53)
    data.setup()
    order = torch.randperm(247, generator=torch.Generator().manual_seed(epoch_seed(0)))
    logged = {(r["step"], r["metric"]): r["value"] for r in read_history(run / "metrics.csv")}
    for step, samples in ((3 // accumulate - 1, order[:96]), (6 // accumulate - 1, order[96:192])):
        images, labels = data.train_set[samples]
        logits = model(images.float() / 255)
        assert logged[step, "train/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert logged[step, "train/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-6)
