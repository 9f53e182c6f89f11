"""AlexNet: five convolutions, three linear layers, dropout (Krizhevsky et al. 2012; in the form of Krizhevsky 2014).

Shapes: B batch, C channels, H height, W width, K classes.

Departures from the paper, as in torchvision: one column of 64 to 256 maps in place of two, no local response
normalisation, and an adaptive pooling that lets any picture size in.
"""

from torch import Tensor, nn

from lit_models.convnet import ConvNet


class AlexNetFeatures(nn.Sequential):
    """The convolutions: images (B, C, 224, 224) to maps (B, 256, 6, 6).

    Args:
        channels: C.
        widths: maps of the five convolutions.
        small_images: the first convolution for pictures of 28 to 64 pixels: 3 x 3 with stride 1, not 11 x 11 with 4.
    """

    def __init__(
        self,
        channels: int = 3,
        widths: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256),
        small_images: bool = False,
    ):
        w1, w2, w3, w4, w5 = widths
        kernel, stride, padding = (3, 1, 1) if small_images else (11, 4, 2)
        super().__init__(
            nn.Conv2d(channels, w1, kernel, stride, padding),  # (B, 64, 55, 55)
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # (B, 64, 27, 27)
            nn.Conv2d(w1, w2, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # (B, 192, 13, 13)
            nn.Conv2d(w2, w3, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(w3, w4, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(w4, w5, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),  # (B, 256, 6, 6)
        )
        self.out_channels = w5


class AlexNet(ConvNet):
    """AlexNet; with the defaults, torchvision's.

    Args:
        num_classes: K.
        channels, widths, small_images: of `AlexNetFeatures`; with `small_images` the maps are pooled to 2 x 2, not 6 x 6.
        hidden: units of the two hidden linear layers.
        dropout: share of units dropped before each of them.
        convnet: arguments of `ConvNet`.
    """

    heads = ("classifier.6",)

    def __init__(
        self,
        num_classes: int = 1000,
        channels: int = 3,
        widths: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256),
        small_images: bool = False,
        hidden: int = 4096,
        dropout: float = 0.5,
        **convnet,
    ):
        super().__init__(num_classes=num_classes, **convnet)
        side = 2 if small_images else 6
        self.features = AlexNetFeatures(channels, widths, small_images)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(widths[-1] * side * side, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )
        self.load_weights("alexnet")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        x = self.features(images)  # (B, C, H, W) -> (B, 256, h, w)
        x = self.avgpool(x).flatten(start_dim=1)  # (B, 256, 6, 6) -> (B, 9216)
        return self.classifier(x)  # (B, K)
