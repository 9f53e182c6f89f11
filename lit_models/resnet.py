"""ResNet: blocks that learn what to add to their input (He et al. 2016, "Deep residual learning").

Shapes: B batch, C channels, H height, W width, D maps, K classes.

Departures from the paper, as in torchvision: a bottleneck strides in its 3 x 3 convolution, not in its first 1 x 1.
"""

from collections import OrderedDict
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.convnet import ConvNet, initialise

Depth = Literal[18, 34, 50, 101, 152, 20, 32, 44, 56, 110]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, and the shortcut past them: (B, D_in, H, W) to (B, D, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, n_in: int, width: int, stride: int, shortcut: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + x)."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return self.relu(residual + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1 x 1 to fewer maps, 3 x 3, 1 x 1 to four times as many: (B, D_in, H, W) to (B, 4 * width, H / stride, W / stride)."""

    expansion = 4

    def __init__(self, n_in: int, width: int, stride: int, shortcut: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + x)."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return self.relu(residual + (x if self.downsample is None else self.downsample(x)))


class PaddedShortcut(nn.Module):
    """The paper's option A: every second pixel, and maps of zeros for those that the input lacks; no parameters."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.missing, self.stride = n_out - n_in, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D_in, H, W) to (B, D, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


# depth -> kind of block, blocks in each stage, maps of the first stage; below, those of the paper's section 4.2
STAGES = {
    18: (BasicBlock, (2, 2, 2, 2), 64),
    34: (BasicBlock, (3, 4, 6, 3), 64),
    50: (Bottleneck, (3, 4, 6, 3), 64),
    101: (Bottleneck, (3, 4, 23, 3), 64),
    152: (Bottleneck, (3, 8, 36, 3), 64),
    **{6 * n + 2: (BasicBlock, (n, n, n), 16) for n in (3, 5, 7, 9, 18)},
}


class ResNetFeatures(nn.Sequential):
    """Stem and stages, of which each but the first halves the maps: images (B, C, H, W) to maps (B, D, H / 32, W / 32).

    Args:
        depth: convolutions and the linear layer counted; 20, 32, 44, 56 and 110 are the paper's for 32 x 32 pixels.
        channels: C.
        width: maps of the first stage; None takes the paper's.
        small_images: the stem for pictures of 28 to 64 pixels: a 3 x 3 convolution with stride 1, not a 7 x 7 with 2 and
            a pooling. The maps are then (B, D, H / 8, W / 8), in the paper's section 4.2 (B, D, H / 4, W / 4).
        shortcut: where the shapes change, a `projection` (1 x 1 convolution, option B), or `padding` (option A).
    """

    def __init__(
        self,
        depth: Depth = 50,
        channels: int = 3,
        width: int | None = None,
        small_images: bool = False,
        shortcut: Literal["projection", "padding"] = "projection",
    ):
        block, blocks, papers_width = STAGES[depth]
        width = width or papers_width
        layers = OrderedDict()
        if small_images:
            layers["conv1"] = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
        else:
            layers["conv1"] = nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        layers["bn1"] = nn.BatchNorm2d(width)
        layers["relu"] = nn.ReLU(inplace=True)
        if not small_images:
            layers["maxpool"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)  # (B, 64, H / 4, W / 4)
        n_in = width
        for i, n in enumerate(blocks):
            stage = []
            for j in range(n):
                stride, n_out = 2 if i > 0 and j == 0 else 1, block.expansion * width * 2**i
                same = stride == 1 and n_in == n_out
                past = None if same else _project(n_in, n_out, stride)
                if shortcut == "padding" and not same:
                    past = PaddedShortcut(n_in, n_out, stride)
                stage.append(block(n_in, width * 2**i, stride, past))
                n_in = n_out
            layers[f"layer{i + 1}"] = nn.Sequential(*stage)  # (B, D, H / 2, W / 2), but for the first
        super().__init__(layers)
        self.out_channels = n_in
        initialise(self)


def _project(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(n_out))


class ResNet(ConvNet):
    """ResNet; with the defaults, torchvision's `resnet50`.

    Args:
        num_classes: K.
        depth, channels, width, small_images, shortcut: of `ResNetFeatures`.
        convnet: arguments of `ConvNet`.
    """

    heads = ("fc",)

    def __init__(
        self,
        num_classes: int = 1000,
        depth: Depth = 50,
        channels: int = 3,
        width: int | None = None,
        small_images: bool = False,
        shortcut: Literal["projection", "padding"] = "projection",
        **convnet,
    ):
        super().__init__(num_classes=num_classes, **convnet)
        self.features = ResNetFeatures(depth, channels, width, small_images, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.features.out_channels, num_classes)
        self.load_weights(f"resnet{depth}" if STAGES[depth][2] == 64 else None)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        x = self.features(images)  # (B, C, H, W) -> (B, D, H / 32, W / 32)
        x = self.avgpool(x).flatten(start_dim=1)  # (B, D)
        return self.fc(x)  # (B, K)
