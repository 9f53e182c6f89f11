"""Variational autoencoder: the encoder gives a normal distribution of codes, and codes are pulled towards N(0, I).

Shapes: B batch, C channels, H height, W width, D numbers in a code.

The bound for one image x, in nats (Kingma and Welling 2014, eq. 3), with q(z|x) = N(mean, exp(log_var)):

    -ELBO = E_q[-log p(x|z)] + KL(q(z|x) || N(0, I))

As is usual on MNIST, a grey pixel x in [0, 1] counts as the share of a Bernoulli variable's ones: -log p is then the
binary cross-entropy of x and the decoder's probability. (So numbers do not compare with those on binarised MNIST.)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.autoencoders import VAEPictures
from lit_models.autoencoder import Autoencoder, draws_of, widen
from runner.errors import InputError


class VAE(Autoencoder):
    """Pictures to distributions of codes, and codes to pictures, also such as come from no picture.

    The loss is recon + beta * KL, the batch's mean, with one code drawn for each image. Each stage logs `loss`; `recon`
    and `kl`; and `nelbo`, which is their sum whatever beta is, all in nats an image. In validation and test the codes are
    drawn by the batch's number, one for each image, so that a checkpoint has the same `nelbo` each time. The mean of the
    distribution is the code of a picture elsewhere: in `val/mse`, `test/mse` (see `Autoencoder`), and in pictures.

    Args:
        encoder: from images (B, C, H, W) to (B, 2 * D): the means, and then the logarithms of the variances.
        decoder: from codes (B, D) to logits (B, C, H, W).
        beta: weight of the KL divergence (Higgins et al. 2017): above 1, codes say less, and each number of its own.
        task: arguments of `Task`.
    """

    pictures = VAEPictures
    parts = 2

    def __init__(self, encoder: nn.Module, decoder: nn.Module, beta: float = 1.0, **task):
        if not 0 <= beta < math.inf:
            raise InputError(f"beta must be a number from 0, got {beta}")
        super().__init__(encoder, decoder, **task)
        self.beta = beta

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, C, H, W) in [0, 1] to mean and log-variance of their codes, (B, D) each."""
        mean, log_var = widen(self.encoder(images.to(self.dtype))).chunk(2, dim=1)  # (B, 2 D) -> 2 of (B, D)
        return mean, log_var

    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to the means of their codes (B, D)."""
        return self.posterior(images)[0]

    def negative_elbo(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return both terms for images (B, C, H, W) in [0, 1], in nats: reconstruction (B,) and KL divergence (B,)."""
        mean, log_var = self.posterior(images)
        codes = reparameterise(mean, log_var, generator)
        nats = F.binary_cross_entropy_with_logits(self.logits(codes), images, reduction="none")  # (B, C, H, W)
        return nats.flatten(start_dim=1).sum(dim=1), kl_to_standard_normal(mean, log_var)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Return so many new pictures (count, C, H, W), of codes from N(0, I)."""
        return self.decode(torch.randn(count, self.decoder.code_size, generator=generator).to(self.device))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss."""
        images = self.pixels(batch)
        terms = self._terms(*self.negative_elbo(images))
        self.log_train(batch_idx, len(images), **{name: term.sum() for name, term in terms.items()})
        return terms["loss"].mean()

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Add a batch to the validation's metrics."""
        super().validation_step(batch, batch_idx)
        self._log_terms("val", batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict:
        """Add a batch to the test's metrics; return what `Autoencoder` does."""
        told = super().test_step(batch, batch_idx)
        self._log_terms("test", batch, batch_idx)
        return told

    def _terms(self, recon: Tensor, kl: Tensor) -> dict[str, Tensor]:
        return {"loss": recon + self.beta * kl, "nelbo": recon + kl, "recon": recon, "kl": kl}  # (B,) each

    def _log_terms(self, stage: str, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        images = self.pixels(batch)
        terms = self._terms(*self.negative_elbo(images, draws_of(batch_idx)))
        self.log_dict({f"{stage}/{name}": term.mean() for name, term in terms.items()}, batch_size=len(images))


def reparameterise(mean: Tensor, log_var: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw from N(mean, exp(log_var)), (B, D) each, so that the gradient reaches both: mean + deviation * N(0, I).

    A generator is one of the CPU's; without one, the global one of the device is drawn from.
    """
    noise = torch.randn(mean.shape, generator=generator, device="cpu" if generator else mean.device, dtype=mean.dtype)
    return mean + (0.5 * log_var).exp() * noise.to(mean.device)


def kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_var)) || N(0, I)) in nats, (B, D) each: (B,)."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(dim=1)
