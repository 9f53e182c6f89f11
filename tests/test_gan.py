"""GANs: their losses by hand, their steps beside a plain loop, that they learn, and that runs of them go on to the same bits."""

import copy
import functools
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from test_resume import Stop, only_run, stop_at
from test_train import assert_same_run, receipt

from callbacks.checkpoint import LastCheckpoint
from callbacks.samples import frame, tiles
from callbacks.seeding import EpochSeeding, epoch_seed
from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from datamodules.mnist import MNIST
from lit_models.dcgan import DCGAN
from lit_models.gan import GAN, MLPGAN, loss_of_discriminator, loss_of_generator
from lit_models.sample_quality import frechet_distance
from lit_models.tasks import Task
from runner.errors import InputError
from runner.history import read_history
from train import main

SMALL = {"noise": 8, "judged": 40}
MODELS = {
    "mlp": functools.partial(MLPGAN, hidden=(16, 32), **SMALL),
    "mlp_by_class": functools.partial(MLPGAN, hidden=(16, 32), num_classes=10, **SMALL),
    "dcgan": functools.partial(DCGAN, width=4, channels_last=True, **SMALL),
    "dcgan_by_class": functools.partial(DCGAN, width=4, num_classes=10, loss="hinge", **SMALL),
}


@pytest.fixture(params=MODELS)
def make(request):
    torch.manual_seed(0)
    return MODELS[request.param]


def a_trainer(tmp_path, **arguments) -> Trainer:
    arguments = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu", **arguments}
    return Trainer(
        **arguments,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )


def last_checkpoint(tmp_path) -> LastCheckpoint:
    """Saves as train.py does: after the fit, the averaged weights are all that there is."""
    checkpoint = LastCheckpoint()
    checkpoint.dirpath = str(tmp_path)
    return checkpoint


def mnist() -> MNIST:
    return MNIST(batch_size=32, val_size=53)


# -- losses ----------------------------------------------------------------------------------------------------------


def test_the_non_saturating_losses_are_cross_entropies():
    real, fake = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([0.5, -3.0, 1.0])
    ones, zeros = torch.ones(3), torch.zeros(3)
    expected = F.binary_cross_entropy(real.sigmoid(), ones) + F.binary_cross_entropy(fake.sigmoid(), zeros)
    torch.testing.assert_close(loss_of_discriminator(real, fake), expected)
    torch.testing.assert_close(loss_of_generator(fake), -fake.sigmoid().log().mean())


def test_at_the_equilibrium_they_are_what_the_docstring_says():
    undecided = torch.zeros(5)
    assert loss_of_discriminator(undecided, undecided).item() == pytest.approx(2 * math.log(2))
    assert loss_of_generator(undecided).item() == pytest.approx(math.log(2))


def test_the_generators_loss_has_a_gradient_where_the_discriminator_is_sure():
    for score, least in ((-30.0, 0.99), (0.0, 0.49)):
        fake = torch.tensor([score], requires_grad=True)
        loss_of_generator(fake).backward()
        assert -fake.grad.item() > least
    assert math.isfinite(loss_of_generator(torch.tensor([-1e4])).item())


def test_the_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert loss_of_discriminator(real, fake, "hinge").item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert loss_of_generator(fake, "hinge").item() == pytest.approx(1 / 3)


# -- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_shapes_and_ranges(make, size, channels):
    model = make(image_size=size, channels=channels)
    labels = torch.arange(5)
    samples = model(torch.randn(5, 8), labels)
    assert samples.shape == (5, channels, size, size)
    assert 0 <= samples.min() < samples.max() <= 1
    assert model.discriminator(model.seen(samples, labels)).shape == (5,)


def test_both_networks_of_a_conditional_gan_are_told_the_class():
    torch.manual_seed(0)
    for name in ("mlp_by_class", "dcgan_by_class"):
        model = MODELS[name]().eval()
        noise, images = torch.randn(1, 8).repeat(2, 1), torch.rand(1, 1, 28, 28).repeat(2, 1, 1, 1)
        labels = torch.tensor([3, 7])
        code, seen = model.code(noise, labels), model.seen(images, labels)
        assert code[:, 8:].tolist() == [[float(k == label) for k in range(10)] for label in (3, 7)]
        assert torch.equal(seen[:, 1:], code[:, 8:, None, None].expand(2, 10, 28, 28))
        first, second = model(noise, labels)
        assert not torch.equal(first, second)
        first, second = model.discriminator(seen)
        assert first != second


def test_the_dcgan_begins_as_the_paper_says():
    torch.manual_seed(0)
    model = DCGAN(width=32)
    assert model.generator[4].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.generator[2].weight.mean().item() == pytest.approx(1, abs=0.02)
    assert model.discriminator[2].weight.std().item() == pytest.approx(0.02, rel=0.05)


# -- training --------------------------------------------------------------------------------------------------------


class KeepBatches(EpochSeeding):
    """Keeps the batches of training as the model was given them."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.batches.append(tuple(t.clone() for t in batch))


@pytest.mark.parametrize("name", MODELS)
def test_three_steps_equal_a_plain_loop(name, tmp_path):
    """Both networks, and the averages that are saved in their place."""
    torch.manual_seed(0)
    optimizers = {
        "optimizer": functools.partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.999)),
        "discriminator_optimizer": functools.partial(torch.optim.SGD, lr=0.05),
    }
    model = MODELS[name](ema=0.7, **optimizers, **({"dropout": 0.0} if "mlp" in name else {}))
    g, d = copy.deepcopy(model.generator).train(), copy.deepcopy(model.discriminator).train()
    keep = KeepBatches()
    saving = {"callbacks": [keep, last_checkpoint(tmp_path)], "enable_checkpointing": True}
    trainer = a_trainer(tmp_path, limit_train_batches=3, limit_val_batches=0, **saving)
    trainer.fit(model, mnist())
    assert trainer.global_step == 6  # both optimisers' steps
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)

    torch.manual_seed(epoch_seed(0))
    g_optimizer, d_optimizer = (
        torch.optim.Adam(g.parameters(), 1e-3, (0.5, 0.999)),
        torch.optim.SGD(d.parameters(), 0.05),
    )
    average = None
    for images, labels in keep.batches:
        noise, real = torch.randn(len(images), 8), images * 2 - 1
        if model.num_classes:
            one_hot = torch.eye(10)[labels]
            noise = torch.cat([noise, one_hot], dim=1)
        planes = [one_hot.view(-1, 10, 1, 1).expand(-1, 10, 28, 28)] if model.num_classes else []
        fake = g(noise)
        on_real, on_fake = (d(torch.cat([x, *planes], dim=1)) for x in (real, fake.detach()))
        if model.loss_name == "hinge":
            loss = (1 - on_real).clamp(min=0).mean() + (1 + on_fake).clamp(min=0).mean()
        else:
            loss = -on_real.sigmoid().log().mean() - (1 - on_fake.sigmoid()).log().mean()
        d_optimizer.zero_grad()
        loss.backward()
        d_optimizer.step()

        on_fake = d(torch.cat([fake, *planes], dim=1))
        loss = -on_fake.mean() if model.loss_name == "hinge" else -on_fake.sigmoid().log().mean()
        g_optimizer.zero_grad()
        loss.backward()
        g_optimizer.step()
        now = {key: value.clone() for key, value in g.state_dict().items()}
        average = average or now
        average = {key: 0.7 * average[key] + 0.3 * value for key, value in now.items()}

    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5)
    for kind, network in (("generator", g), ("discriminator", d)):
        for key, value in network.state_dict().items():
            close(saved["current_model_state"][f"{kind}.{key}"], value)
    for key, value in average.items():
        if "num_batches_tracked" not in key:
            close(saved["state_dict"][f"generator.{key}"], value, msg=key)


class Bars(InMemoryDataModule):
    """Two classes of pictures, 28 x 28: a bright row above, or one below; each with a little noise."""

    classes = ("above", "below")
    mean, std = 0.0, 1.0

    def setup(self, stage=None) -> None:
        g = torch.Generator().manual_seed(0)
        images = torch.randint(0, 40, (600, 1, 28, 28), generator=g).to(torch.uint8)
        labels = torch.arange(600) % 2
        images[labels == 0, :, 4:8] = 250
        images[labels == 1, :, 20:24] = 250
        sets = [InMemoryDataset(images[i : i + n], labels[i : i + n]) for i, n in ((0, 400), (400, 100), (500, 100))]
        self.train_set, self.val_set, self.test_set = sets
        self.source = "bars"

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].to(self.trainer.lightning_module.dtype) / 255, batch[1]


@pytest.mark.parametrize("loss", ["non_saturating", "hinge"])
def test_a_gan_learns_bars_of_the_asked_class(loss, tmp_path):
    torch.manual_seed(0)
    adam = functools.partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))
    model = MLPGAN(hidden=(64, 128), noise=8, num_classes=2, loss=loss, ema=0.9, optimizer=adam, judged=200)
    data = Bars(batch_size=40)
    rows = {"before": model.eval().fixed_samples()[0].mean(dim=(1, 3))}  # (N, 28)
    a_trainer(tmp_path, max_epochs=15, limit_val_batches=0).fit(model.train(), data)
    rows["after"] = model.eval().fixed_samples()[0].mean(dim=(1, 3))
    real = (data.train_set.tensors[0].float() / 255).mean(dim=(1, 3))
    assert frechet_distance(rows["after"], real) < 0.05 * frechet_distance(rows["before"], real)
    for asked, own, other in ((0, slice(4, 8), slice(20, 24)), (1, slice(20, 24), slice(4, 8))):
        samples = rows["after"][asked::2]  # they are asked for in turn
        assert samples[:, own].mean(dim=1).min() > 0.5 > samples[:, other].mean(dim=1).max()


def test_the_discriminator_learns_to_tell_and_the_generators_loss_rises(tmp_path):
    """Against a generator that hardly moves."""
    torch.manual_seed(0)
    adam, still = (functools.partial(torch.optim.Adam, lr=lr) for lr in (1e-3, 1e-9))
    model = MLPGAN(hidden=(32, 64), noise=8, optimizer=still, discriminator_optimizer=adam, judged=20)
    trainer = a_trainer(tmp_path, max_epochs=5, limit_val_batches=0, log_every_n_steps=10)
    trainer.fit(model, Bars(batch_size=40))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["train/discriminator_acc"] > 0.95
    assert logged["train/discriminator_loss"] < 0.3 * 2 * math.log(2)
    assert logged["train/generator_loss"] > 2 * math.log(2)


@pytest.mark.parametrize("size", [1, 3])
def test_small_batches_train(make, size, tmp_path):
    model = make()
    before = copy.deepcopy(model.state_dict())
    data = MNIST(batch_size=size, val_size=53)
    a_trainer(tmp_path, limit_train_batches=2, limit_val_batches=0).fit(model, data)
    after = model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in after if key.startswith("generator"))


def of_precision(precision: str) -> dict:
    """The Trainer takes 16-mixed, whose scaler is what matters here, for bf16-mixed on a CPU, unless it comes as a plugin."""
    return {"plugins": MixedPrecision(precision, "cpu")} if precision == "16-mixed" else {"precision": precision}


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train_and_are_judged(precision, tmp_path):
    torch.manual_seed(0)
    model = MODELS["dcgan_by_class"](ema=0.9, optimizer=functools.partial(torch.optim.Adam, lr=1e-3))
    trainer = a_trainer(tmp_path, limit_train_batches=3, **of_precision(precision))
    trainer.fit(model, mnist())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert all(map(math.isfinite, logged.values()))
    assert logged.keys() >= {"val/frechet", "val/confidence", "val/least_class", "val/right_class"}
    steps = [state["step"].item() for o in trainer.optimizers for state in o.state.values()]
    assert set(steps) <= {2.0, 3.0} if precision == "16-mixed" else set(steps) == {3.0}  # its scale begins too large


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_clip_bounds_the_step_of_either_network_in_every_precision(precision, tmp_path):
    torch.manual_seed(0)
    model = MODELS["mlp"](clip=1e-2, ema=None, optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    before = copy.deepcopy(model)
    trainer = a_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0, **of_precision(precision))
    trainer.fit(model, mnist())
    for name in ("generator", "discriminator"):
        pairs = zip(getattr(before, name).parameters(), getattr(model, name).parameters(), strict=True)
        moved = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs))
        assert moved == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize(
    ("interval", "expected"), [("step", [0.1 * 0.5**4, 0.2 * 0.5**4]), ("epoch", [0.1 * 0.5**2, 0.2 * 0.5**2])]
)
def test_a_schedule_is_stepped_for_both_optimisers(interval, expected, tmp_path):
    sgd = (functools.partial(torch.optim.SGD, lr=lr) for lr in (0.1, 0.2))
    schedule = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    model = MODELS["mlp"](**dict(zip(("optimizer", "discriminator_optimizer"), sgd, strict=True)),
                          lr_scheduler=schedule, lr_interval=interval)  # fmt: skip
    trainer = a_trainer(tmp_path, max_epochs=2, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(model, mnist())
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == pytest.approx(expected)
    assert [config.name for config in trainer.lr_scheduler_configs] == ["train/lr", "train/lr_discriminator"]


# -- samples ---------------------------------------------------------------------------------------------------------


def test_the_fixed_samples_are_the_same_whatever_was_drawn_before(make):
    model = make().eval()
    first, asked = model.fixed_samples()
    torch.manual_seed(123)
    again, _ = model.fixed_samples()
    assert torch.equal(first, again)
    assert first.shape == (40, 1, 28, 28)
    assert len(torch.unique(first, dim=0)) == 40
    assert (asked is None) == (model.num_classes is None)
    assert asked is None or asked.tolist() == [k % 10 for k in range(40)]


def test_samples_are_drawn_from_the_averaged_weights(tmp_path):
    """In validation, and of the checkpoint."""
    torch.manual_seed(0)
    model = MODELS["dcgan"](ema=0.9, optimizer=functools.partial(torch.optim.Adam, lr=1e-2))
    seen = {}
    judge = GAN._judge_samples

    def keep(self):
        judge(self)
        seen["validated"] = self.fixed_samples()[0]

    trainer = a_trainer(tmp_path, callbacks=[last_checkpoint(tmp_path)], enable_checkpointing=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GAN, "_judge_samples", keep)
        trainer.fit(model, mnist())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for key, same in (("state_dict", True), ("current_model_state", False)):
        fresh = MODELS["dcgan"]().to(memory_format=torch.channels_last).eval()
        fresh.load_state_dict(saved[key])
        assert torch.equal(fresh.fixed_samples()[0], seen["validated"]) == same


def test_the_trainer_that_trained_tests_and_validates_the_checkpoint_that_it_is_given(tmp_path):
    """And neither training's weights nor its last average."""
    torch.manual_seed(0)
    model, data = MODELS["dcgan"](ema=0.9, optimizer=functools.partial(torch.optim.Adam, lr=1e-2)), mnist()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = a_trainer(tmp_path, max_epochs=2, callbacks=[every], enable_checkpointing=True)
    trainer.fit(model, data)
    asked = {"ckpt_path": tmp_path / "epoch=0.ckpt", "weights_only": True, "verbose": False}
    for kind in ("validate", "test"):
        assert getattr(trainer, kind)(model, data, **asked) == getattr(a_trainer(tmp_path), kind)(model, data, **asked)
        saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("precision", "ema"), [("bf16-true", 0.998), ("16-true", 0.9995)])
def test_weights_too_coarse_to_be_averaged_are_refused(precision, ema, tmp_path):
    """The average would stay where it began."""
    trainer = a_trainer(tmp_path, limit_train_batches=1, precision=precision)
    with pytest.raises(InputError, match=f"decay of {ema}: take --trainer.precision {precision[:-5]}-mixed"):
        trainer.fit(MODELS["mlp"](ema=ema), mnist())


def test_what_is_shown_and_a_class_in_each_row(make, tmp_path):
    model = make(ema=None)
    a_trainer(tmp_path).validate(model, mnist(), verbose=False)
    samples, _ = model.eval().fixed_samples()
    if model.num_classes is None:
        assert model.shown.shape == (6, 6, 1, 28, 28)
        assert torch.equal(model.shown[1, 0], samples[6])
    else:
        assert model.shown.shape == (10, 4, 1, 28, 28)
        assert torch.equal(model.shown[3, 2], samples[23])  # the third that was asked to be a 3


def test_a_checkpoint_holds_plain_types_and_no_judge_and_makes_the_same_samples(make, tmp_path):
    model = make(optimizer=functools.partial(torch.optim.SGD, lr=0.1), ema=None)
    trainer = a_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(model, mnist())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"generator", "discriminator"}
    assert saved["judge"] == model.judge.sha256
    again = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    noise, labels = torch.randn(3, 8), torch.arange(3)
    torch.testing.assert_close(again(noise, labels), model.eval()(noise, labels), rtol=1e-5, atol=1e-6)
    assert (again.loss_name, again.num_classes, again.ema) == (model.loss_name, model.num_classes, None)


def test_another_judge_is_told(make, tmp_path):
    model = make(ema=None)
    trainer = a_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, mnist())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    checkpoint["judge"] = "f" * 64
    torch.save(checkpoint, tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match="judged by another LeNet"):
        a_trainer(tmp_path).test(model, mnist(), ckpt_path=tmp_path / "model.ckpt", weights_only=True, verbose=False)


def test_the_tests_numbers(tmp_path):
    model = MODELS["dcgan_by_class"]()
    data = mnist()
    (metrics,) = a_trainer(tmp_path).test(model, data, verbose=False)
    assert metrics.keys() == {f"test/{name}" for name in ("frechet", "frechet_floor", "confidence", "least_class", "right_class",
                                                          "judge_acc")} | {f"test_share/{digit}" for digit in range(10)}  # fmt: skip
    samples, asked = model.eval().fixed_samples()
    images, labels = data.test_set.tensors
    real, probabilities = model.judge.look(images.float() / 255)
    seen, of_samples = model.judge.look(samples)
    # (a judge of small data gives features that are small, too)
    assert metrics["test/frechet"] == pytest.approx(frechet_distance(seen, real), rel=1e-3)
    assert metrics["test/frechet_floor"] < 0.5 * metrics["test/frechet"]
    assert metrics["test/judge_acc"] == pytest.approx((probabilities.argmax(dim=1) == labels).double().mean())
    assert metrics["test/right_class"] == pytest.approx((of_samples.argmax(dim=1) == asked).double().mean())
    assert sum(metrics[f"test_share/{digit}"] for digit in range(10)) == pytest.approx(1)


# -- runs ------------------------------------------------------------------------------------------------------------

SMALL_RUN = ("--data.val_size=53", "--data.batch_size=50", "--model.judged=40", "--model.noise=8", "--model.ema=0.8",
             "--trainer.log_every_n_steps=2")  # fmt: skip
BY_CLASS = (
    "--model.width=4",
    "--model.lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
    "--model.lr_scheduler.gamma=0.7",
)


@pytest.mark.parametrize(
    ("experiment", "argv", "batch"),
    [("mnist_gan", ("--model.hidden=[16, 16]",), 0), ("mnist_cgan", (*BY_CLASS, "--model.lr_interval=step"), 2)],
)
def test_a_stopped_and_resumed_run_ends_in_the_same_bits_and_frames(
    experiment, argv, batch, train, monkeypatch, tmp_path
):
    argv = [f"experiments/{experiment}.yaml", *SMALL_RUN, *argv, "--trainer.max_epochs=4"]
    whole = Path(shutil.move(train(*argv, experiment="", tiny=()), tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, epoch=2, batch=batch, model=GAN)
        with pytest.raises(Stop):
            main(argv)
    run = only_run(tmp_path)
    assert [path.name for path in sorted((run / "pictures" / "samples").iterdir())] == ["0001.png", "0002.png"]
    torch.manual_seed(999)
    assert main(["--resume", str(run)]) == 0
    assert_same_run(whole, run)
    state = [torch.load(r / "last.ckpt", weights_only=True)["current_model_state"] for r in (whole, run)]
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    frames = [{path.name: path.read_bytes() for path in (r / "pictures" / "samples").iterdir()} for r in (whole, run)]
    assert frames[0] == frames[1]
    assert len(set(frames[0].values())) == len(frames[0]) == 4
    assert main(["--verify", str(run / "receipt.json")]) == 0


def test_steps_are_counted_for_both_optimisers_and_logged_by_batches(train):
    run = train(
        *SMALL_RUN,
        "--model.hidden=[16, 16]",
        "--trainer.max_epochs=2",
        experiment="experiments/mnist_gan.yaml",
        tiny=(),
    )
    saved = torch.load(run / "last.ckpt", weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (1, 2 * 2 * 5)  # 247 pictures: five batches an epoch
    rows = [row["step"] for row in read_history(run / "metrics.csv") if row["metric"] == "train/generator_loss"]
    assert rows == [1, 3, 5, 7, 9]
    (tested,) = {row["step"] for row in read_history(run / "metrics.csv") if row["metric"].startswith("test")}
    assert tested == 10
    assert receipt(run)["tested"] == 103
    told = f"of 40 samples, by a LeNet with weights of sha256 {saved['judge']}"
    assert receipt(run)["definitions"] == dict.fromkeys(("frechet", "confidence", "least_class"), told)
    assert receipt(run)["parameters"] == sum(saved["state_dict"][name].numel() for name in saved["state_dict"])


def test_max_steps_counts_both_optimisers(train):
    run = train(*SMALL_RUN, "--model.hidden=[16, 16]", "--trainer.max_epochs=9", "--trainer.max_steps=20",
                experiment="experiments/mnist_gan.yaml", tiny=())  # fmt: skip
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 1


def test_max_steps_that_end_in_the_first_epoch_are_refused(capsys, tmp_path):
    small = (*SMALL_RUN, "--model.hidden=[16, 16]")
    assert main(["experiments/mnist_gan.yaml", *small, "--trainer.max_steps=9"]) == 2
    assert "counts the steps of both optimisers, and an epoch has 10" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/mnist_gan"))


ONE_CYCLE = (
    "--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR --model.lr_scheduler.max_lr=1e-3 "
    "--model.lr_scheduler.total_steps=7 --model.lr_interval=step"
)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--trainer.gradient_clip_val=0.5", "whose gradients model.clip clips: --model.clip 0.5"),
        ("--trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches"),
        ("--data.normalize=[0.5,0.5]", "those of MNIST are normalised: leave data.normalize out"),
        ("--model.image_size=32", "--model.channels 1 --model.image_size 28"),
        ("--model.num_classes=7", "--model.num_classes 10"),
        ("--model.judge=nowhere.ckpt", "judge: weights are not there"),
        ("--model.loss=wasserstein", "model.loss: expected one of 'non_saturating', 'hinge'"),
        ("--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "lr_scheduler"),
        (ONE_CYCLE, "OneCycleLR plans 7 steps, but there are 75"),
        ("--model.ema=1", "ema must be from 0 to below 1"),
        ("--model.clip=0", "clip must be above 0"),
        ("--model.judged=1", "at least 2 samples"),
        ("--model.judged=9 --model.num_classes=10", "at least one sample of each of the 10 classes, got 9"),
        ("--model.optimizer=torch.optim.LBFGS", "LBFGS looks for the lowest point"),
        ("--model.hidden=[]", "hidden: widths of hidden layers"),
        ("--model.optimizer.init_args.lr=-1", "optimiser"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(argv, line, capsys, tmp_path):
    assert main(["experiments/mnist_gan.yaml", *SMALL_RUN, "--model.hidden=[16, 16]", *argv.split()]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("runs/mnist_gan"))


def test_pictures_that_are_normalised_are_refused_before_a_judge_is_trained(capsys, tmp_path):
    assert main(["experiments/mnist_dcgan.yaml", "--data=datamodules.cifar10.CIFAR10", "--data.val_size=30"]) == 2
    assert "those of CIFAR10 are normalised" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# -- pictures --------------------------------------------------------------------------------------------------------


def test_tiles_and_frames():
    samples = torch.stack([torch.full((3, 1, 4, 4), 0.2), torch.full((3, 1, 4, 4), 1.0)])  # two rows of three
    samples[0, 1, 0, 0, 0] = math.nan
    grid = tiles(samples)
    assert grid.shape == (1, 2 + 2 * 6, 2 + 3 * 6)
    assert grid[0, 2, 2] == 51
    assert grid[0, 2, 8] == 0
    assert (grid[0, 8:12, 14:18] == 255).all()
    assert frame(samples, "epoch 1").size == (2 * 20, 2 * 14 + 16)


@pytest.mark.pictures
@pytest.mark.parametrize("experiment", ["mnist_gan", "mnist_cgan"])
def test_a_run_leaves_its_pictures(experiment, train):
    small = ("--model.hidden=[16, 16]",) if experiment == "mnist_gan" else ("--model.width=4",)
    run = train(*SMALL_RUN, *small, "--trainer.max_epochs=3", experiment=f"experiments/{experiment}.yaml", tiny=())
    folder = run / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == [
        "curves.png",
        "judged.png",
        "samples",
        "samples.gif",
        "samples.png",
    ]
    with Image.open(folder / "samples.gif") as film, Image.open(folder / "samples" / "0001.png") as first:
        assert film.n_frames == 3
        assert film.size == first.size
        assert film.convert("L").tobytes() == first.tobytes()


def test_the_base_makes_no_networks():
    assert issubclass(GAN, Task)
    with pytest.raises(AttributeError):
        GAN().generator  # noqa: B018


def test_bad_sizes_are_named():
    for arguments, match in (
        ({"noise": 0}, "noise"),
        ({"channels": 0}, "channels"),
        ({"num_classes": 0}, "num_classes"),
    ):
        with pytest.raises(InputError, match=f"{match} must be at least 1"):
            MLPGAN(**arguments)
    with pytest.raises(InputError, match="width must be at least 1"):
        DCGAN(width=0)
