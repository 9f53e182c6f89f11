"""DenseNet: every layer sees the maps of all layers before it in its block (Huang et al. 2017).

Shapes: B batch, C channels, H height, W width, D maps, K classes.
"""

from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.convnet import ConvNet, initialise

LAYERS = {121: (6, 12, 24, 16), 161: (6, 12, 36, 24), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}  # of each block


class DenseLayer(nn.Module):
    """A 1 x 1 convolution to 4k maps, then 3 x 3 to k, each after batch norm and ReLU: (B, D, H, W) to (B, k, H, W)."""

    def __init__(self, n_in: int, growth_rate: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, 4 * growth_rate, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's own k maps."""
        x = self.conv1(F.relu(self.norm1(x), inplace=True))
        return self.conv2(F.relu(self.norm2(x), inplace=True))


class DenseBlock(nn.Module):
    """Layers, each adding k maps to what it sees: (B, D, H, W) to (B, D + layers * k, H, W)."""

    def __init__(self, layers: int, n_in: int, growth_rate: int):
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(n_in + i * growth_rate, growth_rate))

    def forward(self, x: Tensor) -> Tensor:
        """Return all maps: those that came in, and each layer's."""
        for layer in self.children():
            x = torch.cat([x, layer(x)], dim=1)  # (B, D, H, W) -> (B, D + k, H, W)
        return x


class Transition(nn.Sequential):
    """Half as many maps of half the size: (B, D, H, W) to (B, D / 2, H / 2, W / 2)."""

    def __init__(self, n_in: int):
        layers = {"norm": nn.BatchNorm2d(n_in), "relu": nn.ReLU(inplace=True)}
        layers |= {"conv": nn.Conv2d(n_in, n_in // 2, kernel_size=1, bias=False), "pool": nn.AvgPool2d(2)}
        super().__init__(OrderedDict(layers))


class DenseNetFeatures(nn.Sequential):
    """Stem, blocks and transitions: images (B, C, H, W) to maps (B, D, H / 32, W / 32).

    Args:
        layers: of each block.
        channels: C.
        growth_rate: k, the maps that a layer adds. The stem gives 2k.
        small_images: the stem for pictures of 28 to 64 pixels: 3 x 3 with stride 1, not 7 x 7 with 2 and a pooling.
    """

    def __init__(
        self,
        layers: tuple[int, ...] = LAYERS[121],
        channels: int = 3,
        growth_rate: int = 32,
        small_images: bool = False,
    ):
        n, parts = 2 * growth_rate, OrderedDict()
        if small_images:
            parts["conv0"] = nn.Conv2d(channels, n, kernel_size=3, padding=1, bias=False)
        else:
            parts["conv0"] = nn.Conv2d(channels, n, kernel_size=7, stride=2, padding=3, bias=False)
        parts |= {"norm0": nn.BatchNorm2d(n), "relu0": nn.ReLU(inplace=True)}
        if not small_images:
            parts["pool0"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)  # (B, 64, H / 4, W / 4)
        for i, depth in enumerate(layers, start=1):
            if i > 1:
                parts[f"transition{i - 1}"] = Transition(n)
                n //= 2
            parts[f"denseblock{i}"] = DenseBlock(depth, n, growth_rate)
            n += depth * growth_rate
        parts[f"norm{len(layers) + 1}"] = nn.BatchNorm2d(n)
        parts["relu"] = nn.ReLU(inplace=True)
        super().__init__(parts)
        self.out_channels = n
        initialise(self)


class DenseNet(ConvNet):
    """DenseNet; with the defaults, torchvision's `densenet121`.

    Args:
        num_classes: K.
        depth: convolutions and the linear layer counted.
        layers: of each block, in place of those of `depth`.
        channels, growth_rate, small_images: of `DenseNetFeatures`; the paper's growth rate is 48 at depth 161, else 32.
        convnet: arguments of `ConvNet`.
    """

    heads = ("classifier",)

    def __init__(
        self,
        num_classes: int = 1000,
        depth: Literal[121, 161, 169, 201] = 121,
        layers: tuple[int, ...] | None = None,
        channels: int = 3,
        growth_rate: int | None = None,
        small_images: bool = False,
        **convnet,
    ):
        super().__init__(num_classes=num_classes, **convnet)
        growth_rate = growth_rate or (48 if depth == 161 else 32)
        self.features = DenseNetFeatures(layers or LAYERS[depth], channels, growth_rate, small_images)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(self.features.out_channels, num_classes)
        self.load_weights(f"densenet{depth}")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        x = self.features(images)  # (B, C, H, W) -> (B, D, H / 32, W / 32)
        x = self.avgpool(x).flatten(start_dim=1)  # (B, D)
        return self.classifier(x)  # (B, K)
