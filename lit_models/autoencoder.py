"""Autoencoders: an encoder maps a picture to a code of few numbers, a decoder maps the code back to the picture.

Shapes: B batch, C channels, H height, W width, D numbers in a code.

Sources: Hinton and Salakhutdinov 2006 (their layers were trained one by one first, and the loss was a cross-entropy;
here all are trained at once, by squared error); Vincent et al. 2008 (denoising; its Gaussian noise is of Vincent et al.
2010); for comparison, principal component analysis: the linear code with the least squared error.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.autoencoders import AutoencoderPictures
from datamodules.in_memory import InMemoryDataset
from lit_models.mlp import linear_layers
from lit_models.tasks import Task
from runner.errors import InputError


class MLPEncoder(nn.Sequential):
    """Images (B, C, H, W) to codes (B, D): linear layers, with ReLU between them.

    Args:
        sizes: layer widths, from C * H * W to D.
    """

    def __init__(self, sizes: tuple[int, ...] = (784, 512, 256, 32)):
        super().__init__(nn.Flatten(), *linear_layers(sizes))  # (B, C, H, W) -> (B, C * H * W) -> (B, D)
        self.code_size = sizes[-1]


class MLPDecoder(nn.Sequential):
    """Codes (B, D) to logits of pixels (B, C, H, W): linear layers, with ReLU between them.

    Args:
        sizes: layer widths, from D to C * H * W.
        image_shape: C, H and W.
    """

    def __init__(self, sizes: tuple[int, ...] = (32, 256, 512, 784), image_shape: tuple[int, int, int] = (1, 28, 28)):
        layers = linear_layers(sizes)
        if sizes[-1] != math.prod(image_shape):
            raise InputError(
                f"sizes: the last must be the {math.prod(image_shape)} pixels of pictures of {tuple(image_shape)}, "
                f"got {sizes[-1]}"
            )
        super().__init__(*layers, nn.Unflatten(1, tuple(image_shape)))  # (B, D) -> (B, C * H * W) -> (B, C, H, W)
        self.code_size = sizes[0]


class ConvEncoder(nn.Sequential):
    """Images (B, C, H, W) to codes (B, D): each convolution halves the sides, rounded up; then a linear layer.

    Args:
        code_size: D.
        widths: maps of each convolution.
        image_shape: C, H and W.
    """

    def __init__(
        self,
        code_size: int = 32,
        widths: tuple[int, ...] = (32, 64),
        image_shape: tuple[int, int, int] = (1, 28, 28),
    ):
        check_convolutions(code_size, widths, image_shape)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise((image_shape[0], *widths)):
            layers += [nn.Conv2d(n_in, n_out, kernel_size=3, stride=2, padding=1), nn.ReLU()]
        height, width = halved(image_shape, len(widths))[-1]
        # (B, C, H, W) -> (B, widths[-1], h, w) -> (B, D)
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1] * height * width, code_size))
        self.code_size = code_size


class ConvDecoder(nn.Sequential):
    """Codes (B, D) to logits of pixels (B, C, H, W): a linear layer; then each transposed convolution doubles the sides.

    Args:
        code_size: D.
        widths: maps that go into each transposed convolution.
        image_shape: C, H and W; of odd sides the doubled ones are one less.
    """

    def __init__(
        self,
        code_size: int = 32,
        widths: tuple[int, ...] = (64, 32),
        image_shape: tuple[int, int, int] = (1, 28, 28),
    ):
        check_convolutions(code_size, widths, image_shape)
        *sides, smallest = halved(image_shape, len(widths))
        first = (widths[0], *smallest)
        layers: list[nn.Module] = [nn.Linear(code_size, math.prod(first)), nn.Unflatten(1, first)]  # (B, D, h, w)
        for (n_in, n_out), to in zip(pairwise((*widths, image_shape[0])), reversed(sides), strict=True):
            kernel = tuple(4 - side % 2 for side in to)  # from h to 2 h with 4 pixels, to 2 h - 1 with 3
            layers += [nn.ReLU(), nn.ConvTranspose2d(n_in, n_out, kernel, stride=2, padding=1)]
        super().__init__(*layers)
        self.code_size = code_size


def halved(image_shape: tuple[int, int, int], times: int) -> list[tuple[int, int]]:
    """Return height and width as they are, and after each of so many halvings, rounded up."""
    _, height, width = image_shape
    return [(math.ceil(height / 2**i), math.ceil(width / 2**i)) for i in range(times + 1)]


def check_convolutions(code_size: int, widths: tuple[int, ...], image_shape: tuple[int, int, int]) -> None:
    """Raise InputError if no convolutional encoder or decoder can be made of these."""
    for name, numbers in (("code_size", [code_size]), ("widths", widths), ("image_shape", image_shape)):
        if not numbers or min(numbers) < 1:
            raise InputError(f"{name}: expected numbers from 1, got {list(numbers)}")


class Autoencoder(Task):
    """Pictures to themselves, through a code that is too small to hold them as they are.

    Batches are (images, ...): what else is in them, such as labels, is left alone. The network sees pixels in [0, 1] and
    the error is told in them: where the data module has normalised (its `mean` and `std` tell), that is undone first.

    The loss is the mean over pixels and pictures of the squared error: `train/mse` over the samples since the last log,
    `val/mse` and `test/mse` over the whole set. Beside it, where the data is in memory, `test/mse_pca`: that of principal
    component analysis with D components, fitted to the training set.

    Args:
        encoder: from images (B, C, H, W) to codes (B, D); it tells D as its `code_size`.
        decoder: from codes (B, D) to logits (B, C, H, W), whose sigmoid are the pixels; it tells D, too.
        task: arguments of `Task`.

    Raises:
        InputError: encoder and decoder do not fit together.
    """

    tag = "autoencoder"
    pictures = AutoencoderPictures
    parts = 1  # numbers that the encoder gives for each of the code

    def __init__(self, encoder: nn.Module, decoder: nn.Module, **task):
        super().__init__(**task)
        sizes = [getattr(network, "code_size", None) for network in (encoder, decoder)]
        if None in sizes or sizes[0] != self.parts * sizes[1]:
            each = f" (the encoder {self.parts} numbers for each of the code)" if self.parts > 1 else ""
            raise InputError(
                f"encoder and decoder do not fit together: the one gives {sizes[0]} numbers, the other takes {sizes[1]}{each}"
            )
        self.encoder, self.decoder = encoder, decoder
        self.pca: PCA | None = None

    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to codes (B, D)."""
        return widen(self.encoder(images.to(self.dtype)))

    def logits(self, codes: Tensor) -> Tensor:
        """Map codes (B, D) to the logits of pixels (B, C, H, W); in float32, whatever the network computes in."""
        return widen(self.decoder(codes.to(self.dtype)))

    def decode(self, codes: Tensor) -> Tensor:
        """Map codes (B, D) to images (B, C, H, W) in [0, 1]."""
        return self.logits(codes).sigmoid()

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to what becomes of them, of the same shape."""
        return self.decode(self.encode(images))

    def corrupt(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return what the encoder is given for images (B, C, H, W): here, the images themselves."""
        return images

    def pixels(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the batch's images (B, C, H, W) in [0, 1], in float32 at least."""
        data = self.trainer.datamodule
        images, mean, std = widen(batch[0]), getattr(data, "mean", 0.0), getattr(data, "std", 1.0)
        if (mean, std) == (0.0, 1.0):
            return images
        mean, std = (images.new_tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))  # of each channel
        return (images * std + mean).clamp(0, 1)  # they were in there, but for rounding

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss."""
        images = self.pixels(batch)
        loss = F.mse_loss(self(self.corrupt(images)), images)
        self.log_train(batch_idx, len(images), mse=loss * len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Add a batch to `val/mse`."""
        images = self.pixels(batch)
        self._add("val/mse", self(self.corrupt(images, draws_of(batch_idx))), images)

    def on_test_start(self) -> None:
        """Fit PCA to the training pictures."""
        data = getattr(self.trainer.datamodule, "train_set", None)
        components = self.decoder.code_size
        self.pca = PCA(data.tensors[0], components) if isinstance(data, InMemoryDataset) else None

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict:
        """Add a batch to the test's metrics.

        Returns:
            For the pictures: `codes` (B, D), and `images`: `image` (B, C, H, W), and by their errors' names what became of it.
        """
        images = self.pixels(batch)
        inputs = self.corrupt(images, draws_of(batch_idx))
        codes = self.encode(inputs)
        made = {"mse": self.decode(codes)} | ({"mse_pca": self.pca(inputs)} if self.pca else {})
        for name, pictures in made.items():
            self._add(f"test/{name}", pictures, images)
        return {"codes": codes, "images": {"image": images} | made}

    def _add(self, name: str, pictures: Tensor, images: Tensor) -> None:
        """Log the squared error of `pictures`; the batches' means are weighted by their pictures, so it is the set's."""
        if pictures.shape != images.shape:
            ours, theirs = tuple(pictures.shape[1:]), tuple(images.shape[1:])
            raise InputError(
                f"the decoder makes pictures of {ours}, and the data has {theirs}: set the decoder's image_shape"
            )
        if images.min() < 0 or images.max() > 1:
            data = type(self.trainer.datamodule).__name__
            raise InputError(
                f"{type(self).__name__} takes pixels from 0 to 1, and those of {data} are not: normalize null"
            )
        self.log(name, F.mse_loss(pictures, images), batch_size=len(images))


class DenoisingAutoencoder(Autoencoder):
    """Pictures with noise to the pictures without.

    The noise is added to what the encoder is given, and to nothing else. In training it is new every time; in validation
    and test it is drawn from the batch's number, so that the error is that of the same noise always, whatever the run's
    seed. (Not so with another `eval_batch_size`: then the pictures have other noise.)

    `test/mse_pca` is of principal components of pictures without noise, which those with noise are mapped to; and
    `test/mse_noisy` is what comes of doing nothing: the error of the noisy pictures.

    Args:
        encoder, decoder: see `Autoencoder`.
        noise: `gaussian` adds to each pixel a normal number of mean 0 and standard deviation `level`, which can leave
            [0, 1]; `masking` sets a share of `level` of the pixels to 0, each by chance.
        level: of the noise.
        task: arguments of `Task`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        noise: Literal["gaussian", "masking"] = "gaussian",
        level: float = 0.5,
        **task,
    ):
        if not 0 < level < (1 if noise == "masking" else math.inf):
            raise InputError(
                f"level: {noise} noise must be above 0{' and below 1' * (noise == 'masking')}, got {level}"
            )
        super().__init__(encoder, decoder, **task)
        self.noise, self.level = noise, level

    def corrupt(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images (B, C, H, W) with noise, from the generator or from the global one of their device."""
        draw = {"generator": generator, "device": "cpu" if generator else images.device, "dtype": images.dtype}
        if self.noise == "masking":
            return images * (torch.rand(images.shape, **draw) >= self.level).to(images.device)
        return images + self.level * torch.randn(images.shape, **draw).to(images.device)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict:
        """Add the error of doing nothing."""
        told = super().test_step(batch, batch_idx)
        images = told["images"]["image"]
        told["images"]["mse_noisy"] = self.corrupt(images, draws_of(batch_idx))
        self._add("test/mse_noisy", told["images"]["mse_noisy"], images)
        return told


class PCA:
    """Principal component analysis: what is left of pictures in the directions in which the training set varies most.

    Args:
        images: (N, ...); uint8 from 0 to 255 stands for [0, 1].
        components: directions; at most as many as an image has pixels are taken.

    Attributes:
        mean: (P,), P pixels.
        directions: (P, components), orthonormal, that with the largest variance first.
        explained: share of the variance in each direction, (components,).
    """

    def __init__(self, images: Tensor, components: int):
        gram, total = 0.0, 0.0
        for part in images.split(5000):  # as doubles, all of them could be too large for the memory
            pixels = self._flat(part)
            gram, total = gram + pixels.T @ pixels, total + pixels.sum(dim=0)  # (P, P), (P,)
        self.mean = total / len(images)
        covariance = gram / len(images) - torch.outer(self.mean, self.mean)
        variances, directions = torch.linalg.eigh(covariance)  # smallest first
        self.directions = directions.flip(1)[:, :components]
        variances = variances.flip(0).clamp(min=0)
        self.explained = variances[:components] / variances.sum().clamp(min=1e-300)

    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, ...) to codes (B, components), in float64, on the CPU."""
        return (self._flat(images) - self.mean) @ self.directions

    def decode(self, codes: Tensor) -> Tensor:
        """Map codes (B, components) to flat images (B, P)."""
        return codes @ self.directions.T + self.mean

    def __call__(self, images: Tensor) -> Tensor:
        """Return the nearest images (B, ...) that the components can make."""
        return self.decode(self.encode(images)).view(images.shape).to(images)

    @staticmethod
    def _flat(images: Tensor) -> Tensor:
        pixels = images.flatten(start_dim=1).cpu().double()  # (B, ...) -> (B, P)
        return pixels / 255 if images.dtype == torch.uint8 else pixels


def draws_of(batch_idx: int) -> torch.Generator:
    """Return where the random numbers for a batch of validation or test come from: the same ones each time."""
    return torch.Generator().manual_seed(batch_idx)


def widen(numbers: Tensor) -> Tensor:
    """Return numbers in float32, or in float64 if they are: errors are not summed in half precision."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))
