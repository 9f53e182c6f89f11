"""VGG: nothing but 3 x 3 convolutions, more maps after each pooling, and depth (Simonyan and Zisserman 2015).

Shapes: B batch, C channels, H height, W width, K classes.
"""

from typing import Literal

from torch import Tensor, nn

from lit_models.convnet import ConvNet, initialise

CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}  # before each pooling


class VGGFeatures(nn.Sequential):
    """The convolutions, in five blocks that end in a pooling: images (B, C, H, W) to maps (B, 512, H / 32, W / 32).

    Args:
        depth: of the whole network: these convolutions, and three linear layers.
        channels: C.
        widths: maps of the blocks.
        batch_norm: whether each convolution is followed by batch norm, which the paper did not have yet.
        small_images: for pictures of 28 to 64 pixels: a pooling keeps the last row of an odd number, so that 28 halve to
            14, 7, 4, 2 and 1.
    """

    def __init__(
        self,
        depth: Literal[11, 13, 16, 19] = 16,
        channels: int = 3,
        widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512),
        batch_norm: bool = False,
        small_images: bool = False,
    ):
        layers = []
        for convolutions, width in zip(CONVOLUTIONS[depth], widths, strict=True):
            for _ in range(convolutions):
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(
                nn.MaxPool2d(kernel_size=2, ceil_mode=small_images)
            )  # (B, width, H, W) -> (B, width, H / 2, W / 2)
        super().__init__(*layers)
        self.out_channels = widths[-1]
        initialise(self)


class VGG(ConvNet):
    """VGG; with the defaults, torchvision's `vgg16`.

    Args:
        num_classes: K.
        depth, channels, widths, batch_norm, small_images: of `VGGFeatures`; with `small_images` the maps are averaged to
            1 x 1, not 7 x 7, before the linear layers.
        hidden: units of the two hidden linear layers.
        dropout: share of units dropped after each of them.
        convnet: arguments of `ConvNet`.
    """

    heads = ("classifier.6",)

    def __init__(
        self,
        num_classes: int = 1000,
        depth: Literal[11, 13, 16, 19] = 16,
        channels: int = 3,
        widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512),
        batch_norm: bool = False,
        small_images: bool = False,
        hidden: int = 4096,
        dropout: float = 0.5,
        **convnet,
    ):
        super().__init__(num_classes=num_classes, **convnet)
        side = 1 if small_images else 7
        self.features = VGGFeatures(depth, channels, widths, batch_norm, small_images)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1] * side * side, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        self.load_weights(f"vgg{depth}{'_bn' * batch_norm}")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        x = self.features(images)  # (B, C, H, W) -> (B, 512, H / 32, W / 32)
        x = self.avgpool(x).flatten(start_dim=1)  # (B, 512, 7, 7) -> (B, 25088)
        return self.classifier(x)  # (B, K)
