"""GoogLeNet: convolutions of several sizes side by side, and auxiliary heads (Szegedy et al. 2015).

Shapes: B batch, C channels, H height, W width, D maps, K classes.

Departures from the paper, as in torchvision: batch norm after each convolution, and 3 x 3 where the paper has 5 x 5.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.convnet import ConvNet, initialise
from runner.errors import InputError


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, n_in: int, n_out: int, **convolution):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, bias=False, **convolution)
        self.bn = nn.BatchNorm2d(n_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n_in, H, W) to (B, n_out, h, w)."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches side by side: (B, n_in, H, W) to (B, n1 + n3 + n5 + pooled, H, W).

    Args:
        n_in: maps that come in.
        n1, n3, n5, pooled: maps of the branches: 1 x 1; 3 x 3; the paper's 5 x 5; pooling.
        reduce3, reduce5: maps that a 1 x 1 convolution leaves for the larger ones.
    """

    def __init__(self, n_in: int, n1: int, reduce3: int, n3: int, reduce5: int, n5: int, pooled: int):
        super().__init__()
        self.branch1 = ConvBlock(n_in, n1, kernel_size=1)
        self.branch2 = nn.Sequential(
            ConvBlock(n_in, reduce3, kernel_size=1), ConvBlock(reduce3, n3, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            ConvBlock(n_in, reduce5, kernel_size=1), ConvBlock(reduce5, n5, kernel_size=3, padding=1)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1), ConvBlock(n_in, pooled, kernel_size=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Put the branches' maps one after the other."""
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class AuxiliaryHead(nn.Module):
    """Class scores from maps halfway: a gradient for the layers below, in training only. (B, D, H, W) to (B, K)."""

    def __init__(self, n_in: int, width: int, hidden: int, num_classes: int, dropout: float):
        super().__init__()
        self.conv = ConvBlock(n_in, width, kernel_size=1)
        self.fc1 = nn.Linear(width * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W) to logits (B, K)."""
        x = self.conv(F.adaptive_avg_pool2d(x, 4))  # (B, D, H, W) -> (B, 128, 4, 4)
        x = F.relu(self.fc1(x.flatten(start_dim=1)))  # (B, 2048) -> (B, 1024)
        return self.fc2(self.dropout(x))  # (B, K)


INCEPTIONS = {  # the paper's table 1: n1, reduce3, n3, reduce5, n5, pooled
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
TAPPED = {"inception4a": "aux1", "inception4d": "aux2"}  # where the auxiliary heads sit


class GoogLeNetFeatures(nn.Sequential):
    """Stem and nine inception modules: images (B, C, H, W) to maps (B, 1024, H / 32, W / 32).

    Args:
        channels: C.
        width: times the paper's maps, in every layer.
        small_images: the stem for pictures of 28 to 64 pixels: 3 x 3 with stride 1 and no pooling behind it, not 7 x 7
            with 2. The maps are then (B, 1024, H / 8, W / 8).
    """

    def __init__(self, channels: int = 3, width: float = 1.0, small_images: bool = False):
        layers, w = OrderedDict(), lambda maps: max(1, round(width * maps))
        if small_images:
            layers["conv1"] = ConvBlock(channels, w(64), kernel_size=3, padding=1)
        else:
            layers["conv1"] = ConvBlock(channels, w(64), kernel_size=7, stride=2, padding=3)
            layers["maxpool1"] = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)  # (B, 64, H / 4, W / 4)
        layers["conv2"] = ConvBlock(w(64), w(64), kernel_size=1)
        layers["conv3"] = ConvBlock(w(64), w(192), kernel_size=3, padding=1)
        layers["maxpool2"] = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)  # (B, 192, H / 8, W / 8)
        n_in, tapped = w(192), {}
        for name, maps in INCEPTIONS.items():
            if name == "inception4a":
                layers["maxpool3"] = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)  # (B, 480, H / 16, W / 16)
            if name == "inception5a":
                layers["maxpool4"] = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)  # (B, 832, H / 32, W / 32)
            n1, reduce3, n3, reduce5, n5, pooled = map(w, maps)
            layers[name] = Inception(n_in, n1, reduce3, n3, reduce5, n5, pooled)
            n_in = n1 + n3 + n5 + pooled
            if name in TAPPED:
                tapped[name] = n_in
        super().__init__(layers)
        self.out_channels, self.tapped = n_in, tapped
        initialise(self)


class GoogLeNet(ConvNet):
    """GoogLeNet; with the defaults, torchvision's `googlenet`.

    Args:
        num_classes: K.
        channels, width, small_images: of `GoogLeNetFeatures`.
        hidden: units of the auxiliary heads' hidden layer.
        auxiliary_weight: of each auxiliary head's loss in what is minimised; 0 leaves the heads out.
        dropout, auxiliary_dropout: share of units dropped before the last layer of the network and of these heads.
        transform_input: whether to turn pictures normalised with ImageNet's means and deviations to [-1, 1], which
            torchvision's weights want.
        convnet: arguments of `ConvNet`.
    """

    heads = ("fc", "aux1", "aux2")

    def __init__(
        self,
        num_classes: int = 1000,
        channels: int = 3,
        width: float = 1.0,
        small_images: bool = False,
        hidden: int = 1024,
        auxiliary_weight: float = 0.3,
        dropout: float = 0.2,
        auxiliary_dropout: float = 0.7,
        transform_input: bool = False,
        **convnet,
    ):
        super().__init__(num_classes=num_classes, **convnet)
        self.features = GoogLeNetFeatures(channels, width, small_images)
        self.auxiliary_weight = auxiliary_weight
        for name, head in TAPPED.items() if auxiliary_weight else ():
            n_in, n = self.features.tapped[name], round(128 * width)
            self.add_module(head, AuxiliaryHead(n_in, n, hidden, num_classes, auxiliary_dropout))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(self.features.out_channels, num_classes)
        initialise(self)
        self.transform_input = transform_input
        self.load_weights("googlenet")
        if self.pretrained and self.pretrained["file"].startswith("googlenet-") and not transform_input:
            raise InputError("torchvision's weights of GoogLeNet want pictures in [-1, 1]: set transform_input: true")

    def forward(self, images: Tensor, with_auxiliary: bool = False) -> Tensor | tuple[Tensor, ...]:
        """Map images (B, C, H, W) to logits (B, K); `with_auxiliary`, to a tuple with those of the auxiliary heads, too."""
        x, auxiliary = self._to_unit(images) if self.transform_input else images, []
        for name, layer in self.features.named_children():
            x = layer(x)
            if with_auxiliary and name in TAPPED:
                auxiliary.append(self.get_submodule(TAPPED[name])(x))
        x = self.avgpool(x).flatten(start_dim=1)  # (B, 1024, H / 32, W / 32) -> (B, 1024)
        logits = self.fc(self.dropout(x))  # (B, K)
        return (logits, *auxiliary) if with_auxiliary else logits

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and logits; the auxiliary heads' losses are added with their weight."""
        if not self.auxiliary_weight:
            return super().training_loss(images, labels)
        scores = self(images, with_auxiliary=True)
        loss, *auxiliary = [self.loss(logits, labels, self.label_smoothing) for logits in scores]
        return loss + self.auxiliary_weight * sum(auxiliary), scores[0]

    @staticmethod
    def _to_unit(images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return (images * std + mean - 0.5) / 0.5
