"""LeNet: two convolutions with pooling, then three linear layers (LeCun et al. 1998, in the form of PyTorch's tutorial).

Shapes: B batch, C channels, K classes.

Departures from the paper, as in the tutorial: ReLU in place of a scaled tanh, max pooling in place of a weighted mean,
every map of the second convolution sees every map of the first, and a linear layer gives the logits.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.convnet import ConvNet


class LeNet(ConvNet):
    """Six and sixteen maps of 5 x 5 filters, 120 and 84 hidden units.

    Args:
        image_size: 32 as in the paper, or 28 as MNIST has it: then the first convolution pads.
        channels: C.
        num_classes: K.
        convnet: arguments of `ConvNet`.
    """

    heads = ("fc3",)

    def __init__(self, image_size: Literal[28, 32] = 28, channels: int = 1, num_classes: int = 10, **convnet):
        super().__init__(num_classes=num_classes, **convnet)
        self.conv1 = nn.Conv2d(channels, 6, kernel_size=5, padding=(32 - image_size) // 2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        self.load_weights(None)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, 28 or 32, 28 or 32) to logits (B, K)."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)  # (B, 6, 28, 28) -> (B, 6, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 10, 10) -> (B, 16, 5, 5)
        x = x.flatten(start_dim=1)  # (B, 400)
        x = F.relu(self.fc1(x))  # (B, 120)
        x = F.relu(self.fc2(x))  # (B, 84)
        return self.fc3(x)  # (B, K)
