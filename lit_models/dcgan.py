"""DCGAN: a GAN of convolutions with strides, and batch norm in both networks.

Shapes: B batch, Z noise (with classes Z + K), C channels (with classes C + K), W width, S = a quarter of the image size.

Source: Radford et al. 2016. Departures: two convolutions with strides and not four, as pictures have 28 or 32 pixels and
not 64; with classes, both networks are told them (Mirza and Osindero 2014).
"""

import torch
from torch import nn

from lit_models.gan import GAN
from runner.errors import InputError


class DCGAN(GAN):
    """Noise to maps of S x S, and twice to ones of double the size; pictures, and twice to maps of half the size.

    Args:
        width: maps of the widest layer of pictures' half size; those of a quarter are twice as many. (Paper: 128 there.)
        channels_last: whether to keep a pixel's channels side by side in memory, which convolutions are faster with.
        gan: arguments of `GAN`.
    """

    def __init__(self, width: int = 64, channels_last: bool = False, **gan):
        if width < 1:
            raise InputError(f"width must be at least 1, got {width}")
        super().__init__(**gan)
        self.channels_last = channels_last
        side = self.image_size // 4
        self.generator = nn.Sequential(
            nn.Unflatten(1, (self.code_size, 1, 1)),  # (B, Z) -> (B, Z, 1, 1)
            nn.ConvTranspose2d(self.code_size, 2 * width, side, bias=False),  # (B, 2 W, S, S)
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),  # (B, W, 2 S, 2 S)
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, self.channels, 4, stride=2, padding=1),  # (B, C, 4 S, 4 S)
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(self.seen_channels, width, 4, stride=2, padding=1),  # (B, C, 4 S, 4 S) -> (B, W, 2 S, 2 S)
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),  # (B, 2 W, S, S)
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, side),  # (B, 1, 1, 1)
            nn.Flatten(0),  # (B,)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)

    def setup(self, stage: str) -> None:
        """Check, and set the memory format."""
        super().setup(stage)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # the first convolution turns its images to it, too
