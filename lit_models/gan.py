"""Generative adversarial networks: one network makes pictures up from noise, another tells them from real ones.

Shapes: B batch, Z numbers of noise, C channels, H = W image size, K classes.

The discriminator D scores a picture: above 0 it takes it for real. With D's probability sigmoid(D(x)) that x is real:

    discriminator    -log sigmoid(D(x)) - log(1 - sigmoid(D(G(z))))      hinge:  max(0, 1 - D(x)) + max(0, 1 + D(G(z)))
    generator        -log sigmoid(D(G(z)))                               hinge:  -D(G(z))

The generator's loss is the non-saturating one: that of the minimax game, log(1 - sigmoid(D(G(z)))), has hardly a gradient
where the discriminator is sure of itself, as it is at the beginning. At the game's equilibrium the discriminator's loss is
2 log 2 = 1.386, the generator's log 2; on the way there neither tells how good the samples are: a judge does (`val/frechet`).

Sources: Goodfellow et al. 2014; by class: Mirza and Osindero 2014; hinge: Lim and Ye 2017; averaged weights: Yazici et al. 2019.
"""

import warnings
from itertools import pairwise, repeat
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from callbacks.averaged_weights import AveragedWeights
from callbacks.samples import SampleFrames, SamplePictures
from lit_models.sample_quality import Judge, as_pixels, class_shares, find_judge, frechet_distance, sample_quality
from lit_models.tasks import Task
from runner.errors import InputError


class GAN(Task):
    """The two networks' game; a subclass makes `generator`, from codes (B, Z or Z + K) to images (B, C, H, W) in [-1, 1],
    and `discriminator`, from images (B, C or C + K, H, W) to scores (B,).

    Batches are (images, labels), images in [0, 1] as the data module gives them; samples are in [0, 1], too.

    Each batch is a step of the discriminator's optimiser, then one of the generator's. Lightning's `global_step`, and with
    it `trainer.max_steps`, counts both; epochs, and the steps at which is logged, count batches.

    `train/` has `generator_loss`, `discriminator_loss` and `discriminator_acc`, the share of real pictures and samples that
    the discriminator tells right (0.5: it cannot). In validation and test, a LeNet judges samples from noise that is always
    the same: `frechet`, `confidence`, `least_class` and, if conditional, `right_class`: see `sample_quality`. Test adds
    `test/frechet_floor`, the Frechet distance of as many real training pictures, `test/judge_acc`, the judge's accuracy on
    the test pictures, and for each class the share of samples that it is seen in, `test_share/<class>`.

    Args:
        noise: Z.
        channels: C.
        image_size: H and W, as LeNet takes them.
        num_classes: K, for a conditional GAN: both networks are told the class. None: neither is.
        loss: see above.
        discriminator_optimizer: from parameters to an optimiser; None: as `optimizer`, which then makes both.
        clip: the most that the norm of either network's gradient may be; None: any. (Lightning does without the
            Trainer's `gradient_clip_val` where there are two optimisers.)
        ema: how much of the averaged weights is kept at a step (see `AveragedWeights`). Validation and test,
            and the weights in a checkpoint's `state_dict`, are the averaged ones. None: no averaging.
        judge: the checkpoint of a run of LeNet; None: see `find_judge`.
        judged: how many samples are judged.
        task: arguments of `Task`; the scheduler is one for either optimiser.
    """

    tag = "generation"
    pictures = SamplePictures
    generator: nn.Module
    discriminator: nn.Module

    def __init__(
        self,
        noise: int = 100,
        channels: int = 1,
        image_size: Literal[28, 32] = 28,
        num_classes: int | None = None,
        loss: Literal["non_saturating", "hinge"] = "non_saturating",
        discriminator_optimizer: OptimizerCallable | None = None,
        clip: float | None = None,
        ema: float | None = 0.999,
        judge: str | None = None,
        judged: int = 1000,
        **task,
    ):
        for name, value in (("noise", noise), ("channels", channels), ("num_classes", num_classes)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if judged < 2:
            raise InputError(f"judged: the Frechet distance is between distributions: at least 2 samples, got {judged}")
        if judged < (num_classes or 0):
            raise InputError(f"judged: at least one sample of each of the {num_classes} classes, got {judged}")
        if clip is not None and not clip > 0:
            raise InputError(f"clip must be above 0, got {clip}; to leave gradients as they are: null")
        if ema is not None and not 0 <= ema < 1:
            raise InputError(f"ema must be from 0 to below 1, got {ema}; to average nothing: null")
        super().__init__(**task)
        self.automatic_optimization = False  # Lightning's takes one optimiser
        self.noise, self.channels, self.image_size, self.num_classes = noise, channels, image_size, num_classes
        self.loss_name, self.clip, self.ema = loss, clip, ema
        self.discriminator_optimizer = discriminator_optimizer or self.optimizer
        self.judge_file, self.judged = judge, judged
        self.judge: Judge | None = None

    # -- the networks ------------------------------------------------------------------------------------------------

    @property
    def code_size(self) -> int:
        """Numbers that the generator is given: Z, or Z + K."""
        return self.noise + (self.num_classes or 0)

    @property
    def seen_channels(self) -> int:
        """Channels that the discriminator is given: C, or C + K."""
        return self.channels + (self.num_classes or 0)

    def code(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Return noise (B, Z); of a conditional GAN with the class beside it, one-hot: (B, Z + K)."""
        if self.num_classes is None:
            return noise
        return torch.cat([noise, F.one_hot(labels, self.num_classes).to(noise.dtype)], dim=1)

    def seen(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return images (B, C, H, W); of a conditional GAN with K planes beside them, of which the class's is 1."""
        if self.num_classes is None:
            return images
        planes = F.one_hot(labels, self.num_classes).to(images.dtype)[:, :, None, None]  # (B, K, 1, 1)
        return torch.cat([images, planes.expand(-1, -1, *images.shape[2:])], dim=1)  # (B, C + K, H, W)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map noise (B, Z) and, if conditional, the classes asked for (B,), to samples (B, C, H, W) in [0, 1]."""
        return (self.generator(self.code(noise, labels)) + 1) / 2

    # -- training ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check data and Trainer, and find the judge.

        Raises:
            InputError: they do not fit, or there is no judge.
        """
        trainer, data = self.trainer, self.trainer.datamodule
        if trainer.gradient_clip_val:
            raise InputError(
                f"trainer.gradient_clip_val: a GAN has two optimisers, whose gradients model.clip clips: "
                f"--model.clip {trainer.gradient_clip_val:g}"
            )
        if trainer.accumulate_grad_batches != 1:
            raise InputError(
                "trainer.accumulate_grad_batches: a GAN's two optimisers step at every batch: leave it at 1"
            )
        if (getattr(data, "mean", 0.0), getattr(data, "std", 1.0)) != (0.0, 1.0):
            raise InputError(
                f"a GAN makes pixels in [0, 1], and takes the data's as they are, but those of {type(data).__name__} are "
                "normalised: leave data.normalize out, where there is one"
            )
        if self.judge is None:
            self.judge = find_judge(data, self.judge_file)
        if (found := tuple(data.train_set.tensors[0].shape[1:])) != (wanted := (self.channels, *[self.image_size] * 2)):
            raise InputError(
                f"{type(self).__name__} makes pictures of {wanted} (channels, height, width), but those of "
                f"{type(data).__name__} are {found}: --model.channels {found[0]} --model.image_size {found[1]}"
            )
        if self.num_classes is not None:
            self.check_classes()

    def configure_callbacks(self) -> list[Callback]:
        """Return what averages the weights, and what keeps the samples of each epoch, in training."""
        if self.trainer.state.fn != "fit":
            return []
        return [SampleFrames(), *([] if self.ema is None else [AveragedWeights(self.ema)])]

    def configure_optimizers(self) -> list[dict]:
        """Make both networks' optimisers and, if there is one, their schedulers: the generator's, then the discriminator's."""
        made = []
        for name, make, network in (
            ("", self.optimizer, self.generator),
            ("_discriminator", self.discriminator_optimizer, self.discriminator),
        ):
            try:
                made.append({"optimizer": make(network.parameters())})
                if self.lr_scheduler:
                    scheduler = self.lr_scheduler(made[-1]["optimizer"])
                    config = {"scheduler": scheduler, "interval": self.lr_interval, "name": f"train/lr{name}"}
                    made[-1]["lr_scheduler"] = config
            except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                raise InputError(f"an optimiser or its scheduler cannot be made: {error}") from error
        optimizers = [config["optimizer"] for config in made]
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
            raise InputError("optimizer: LBFGS looks for the lowest point, which a GAN's game has not: take another")
        if self.lr_scheduler and isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise InputError(
                "lr_scheduler: ReduceLROnPlateau wants a loss that falls, which a GAN's do not: take another"
            )
        return made

    def on_train_start(self) -> None:
        """Check that training is to last an epoch, after which there is a checkpoint.

        Raises:
            InputError: it is not.
        """
        super().on_train_start()
        steps = 2 * self.trainer.num_training_batches
        if 0 < self.trainer.max_steps < steps:
            raise InputError(
                f"trainer.max_steps {self.trainer.max_steps} ends before the first epoch and its checkpoint: it counts the steps "
                f"of both optimisers, and an epoch has {steps}; for shorter epochs: --trainer.limit_train_batches"
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Take a step of the discriminator, and one of the generator."""
        images, labels = batch
        real = 2 * images - 1  # [0, 1] -> [-1, 1]
        generator, discriminator = self.optimizers()
        noise = torch.randn(len(images), self.noise, device=self.device, dtype=images.dtype)
        fake = self.generator(self.code(noise, labels))  # (B, C, H, W)

        on_real = self.discriminator(self.seen(real, labels)).float()  # (B,)
        on_fake = self.discriminator(self.seen(fake.detach(), labels)).float()
        discriminator_loss = loss_of_discriminator(on_real, on_fake, self.loss_name)
        discriminator.zero_grad()
        self.manual_backward(discriminator_loss)
        discriminator.step()

        with self.toggled_optimizer(generator):  # the discriminator's weights need no gradients here
            generator_loss = loss_of_generator(self.discriminator(self.seen(fake, labels)).float(), self.loss_name)
            generator.zero_grad()
            self.manual_backward(generator_loss)
            generator.step()

        if self.lr_interval == "step":
            self._step_schedulers()
        n = len(images)
        told = ((on_real > 0).sum() + (on_fake < 0).sum()) / 2
        losses = {"generator_loss": n * generator_loss, "discriminator_loss": n * discriminator_loss}
        self.log_train(batch_idx, n, **losses, discriminator_acc=told)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, where 16-mixed has taken its scale out of the gradients again."""
        if self.clip:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")

    def on_train_epoch_end(self) -> None:
        """Step the schedulers that count epochs, before the epoch's checkpoint."""
        if self.lr_interval == "epoch":
            self._step_schedulers()

    def _step_schedulers(self) -> None:
        for scheduler in self.lr_schedulers() or ():
            scheduler.step()

    # -- what the samples are worth ----------------------------------------------------------------------------------

    @property
    def asks_classes(self) -> bool:
        """Whether the samples that are shown are of a class in each row."""
        return self.num_classes is not None

    @property
    def definitions(self) -> dict[str, str]:
        """What the receipt says of the numbers, since they are one judge's."""
        told = f"of {self.judged} samples, by a LeNet with weights of sha256 {self.judge.sha256}" if self.judge else ""
        return dict.fromkeys(("frechet", "confidence", "least_class", *["right_class"] * self.asks_classes), told)

    @torch.no_grad()
    def fixed_samples(self) -> tuple[Tensor, Tensor | None]:
        """Return `judged` samples (N, C, H, W) in [0, 1], and the classes (N,) asked for in turn, if conditional.

        The noise is always the same, for every epoch, seed and device.
        """
        noise = torch.randn(self.judged, self.noise, generator=torch.Generator().manual_seed(0))
        noise = noise.to(self.device, self.dtype)
        asked = None if self.num_classes is None else torch.arange(self.judged, device=self.device) % self.num_classes
        parts = zip(noise.split(250), repeat(None) if asked is None else asked.split(250), strict=False)
        return torch.cat([self(*part) for part in parts]), asked

    def on_validation_epoch_start(self) -> None:
        """Make the samples: here, since Lightning gives back the weights that are not averaged before the epoch's end."""
        self._judge_samples()

    def on_test_epoch_start(self) -> None:
        """Make the samples."""
        self._judge_samples()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Let the judge look at real pictures."""
        self.real.append(self.judge.look(batch[0]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Let the judge look at real pictures, and see whether it knows them."""
        images, labels = batch
        self.real.append(self.judge.look(images))
        self.right += int((self.real[-1][1].argmax(dim=1) == labels.cpu()).sum())

    def on_validation_epoch_end(self) -> None:
        """Log what the samples are worth."""
        self._log_quality("val")

    def on_test_epoch_end(self) -> None:
        """Log what the samples are worth, and what that number is to be held against."""
        real = self._log_quality("test")
        images = self.trainer.datamodule.train_set.tensors[0]
        some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: self.judged]
        floor, _ = self.judge.look(as_pixels(images[some]).to(self.device))
        self.log_dict({"test/frechet_floor": frechet_distance(floor, real), "test/judge_acc": self.right / len(real)})
        classes = self.trainer.datamodule.classes
        shares = zip(classes, class_shares(self.probabilities), strict=True)
        self.log_dict({f"test_share/{name}": share for name, share in shares})

    def _judge_samples(self) -> None:
        samples, self.asked = self.fixed_samples()
        self.features, self.probabilities = self.judge.look(samples)
        if self.num_classes is None:
            rows = min(8, isqrt(len(samples)))
            self.shown = samples[: rows * rows].unflatten(0, (rows, rows))  # (N, C, H, W) -> (R, R, C, H, W)
        else:  # classes came in turn
            columns = max(1, min(10, len(samples) // self.num_classes))
            shown = samples[: columns * self.num_classes].unflatten(0, (columns, -1))
            self.shown = shown.transpose(0, 1)  # (K, S, C, H, W)
        self.real: list[tuple[Tensor, Tensor]] = []
        self.right = 0

    def _log_quality(self, stage: str) -> Tensor:
        """Log it; return the real pictures' features (M, D)."""
        real, self.real_probabilities = (torch.cat(parts) for parts in zip(*self.real, strict=True))
        quality = sample_quality(self.features, self.probabilities, real, self.asked)
        self.log_dict({f"{stage}/{name}": value for name, value in quality.items()})
        return real

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Note by which judge the samples were judged."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["judge"] = self.judge and self.judge.sha256

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Warn of another judge: its numbers do not compare with those until now."""
        super().on_load_checkpoint(checkpoint)
        was = checkpoint.get("judge")
        if self.judge and was and was != self.judge.sha256:
            warnings.warn(
                f"the samples were judged by another LeNet (sha256 {was[:8]}) than they are now ({self.judge.sha256[:8]}): "
                "the numbers do not compare to the last digit",
                stacklevel=2,
            )


def loss_of_discriminator(real: Tensor, fake: Tensor, kind: str = "non_saturating") -> Tensor:
    """Return the discriminator's loss for its scores of real pictures (B,) and samples (B,): a scalar, the batch's mean."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()  # -log sigmoid(s) = softplus(-s)


def loss_of_generator(fake: Tensor, kind: str = "non_saturating") -> Tensor:
    """Return the generator's loss for the scores of its samples (B,): a scalar, the batch's mean."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


class MLPGAN(GAN):
    """The classic one: fully connected layers in both networks.

    Departures from the paper: the generator ends in tanh for its sigmoid, and the discriminator's units are leaky ReLUs
    for its maxout.

    Args:
        hidden: widths of the generator's hidden layers; the discriminator has the same in the opposite order.
        dropout: share of the discriminator's hidden units set to zero in training.
        gan: arguments of `GAN`.
    """

    def __init__(self, hidden: tuple[int, ...] = (256, 512), dropout: float = 0.3, **gan):
        if not hidden or min(hidden) < 1:
            raise InputError(f"hidden: widths of hidden layers, each at least 1; got {list(hidden)}")
        super().__init__(**gan)
        shape = (self.channels, self.image_size, self.image_size)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise((self.code_size, *hidden)):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        out = nn.Linear(hidden[-1], self.channels * self.image_size**2)
        self.generator = nn.Sequential(
            *layers, out, nn.Tanh(), nn.Unflatten(1, shape)
        )  # (B, C * H * W) -> (B, C, H, W)

        layers = [nn.Flatten()]  # (B, C or C + K, H, W) -> (B, D)
        for n_in, n_out in pairwise((self.seen_channels * self.image_size**2, *hidden[::-1])):
            layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(0.2), nn.Dropout(dropout)]
        self.discriminator = nn.Sequential(*layers, nn.Linear(hidden[0], 1), nn.Flatten(0))  # (B, 1) -> (B,)
