"""Airbench: a small network and everything that lets it learn CIFAR-10 in seconds (Jordan 2024, "94 % in 3.29 seconds").

Shapes: B batch, C channels, K classes.

Departures from the paper: pictures are mirrored by chance, not in turns; there is no Lookahead; weights are kept in 32
bits; the whitening layer's bias learns to the end, not for 3 epochs; batch norm's epsilon is PyTorch's. To make up for
it, the experiment trains for some epochs more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.cifar10 import CIFAR10, normalize
from lit_models.convnet import ConvNet
from runner.errors import InputError


class Group(nn.Sequential):
    """Two convolutions, each with batch norm and GELU, and a pooling after the first: (B, n_in, H, W) to (B, n, H / 2, W / 2)."""

    def __init__(self, n_in: int, n: int):
        super().__init__(
            nn.Conv2d(n_in, n, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(2),
            _batch_norm(n),
            nn.GELU(),
            nn.Conv2d(n, n, kernel_size=3, padding=1, bias=False),
            _batch_norm(n),
            nn.GELU(),
        )
        for conv in (self[0], self[4]):
            nn.init.dirac_(conv.weight[: conv.in_channels])  # begins by passing its input on


def _batch_norm(n: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(n, momentum=0.4)
    norm.weight.requires_grad = False  # only the biases learn
    return norm


class Airbench(ConvNet):
    """A whitening layer, three groups, a linear layer.

    Args:
        num_classes: K.
        widths: maps of the groups.
        bias_lr: learning rate of batch norm's biases, as a multiple of that of the rest; their weight decay is as much less.
        logit_scale: the logits are multiplied by it.
        average_views: whether to average the logits, outside of training, over the picture, its mirror image, and both
            moved by a pixel (test-time augmentation).
        convnet: arguments of `ConvNet`.
    """

    heads = ("head",)

    def __init__(
        self,
        num_classes: int = 10,
        widths: tuple[int, int, int] = (64, 256, 256),
        bias_lr: float = 64.0,
        logit_scale: float = 1 / 9,
        average_views: bool = True,
        **convnet,
    ):
        super().__init__(num_classes=num_classes, **convnet)
        w1, w2, w3 = widths
        self.whiten = nn.Conv2d(3, 24, kernel_size=2)
        self.whiten.weight.requires_grad = False
        nn.init.zeros_(self.whiten.bias)
        self.features = nn.Sequential(nn.GELU(), Group(24, w1), Group(w1, w2), Group(w2, w3), nn.MaxPool2d(3))
        self.head = nn.Linear(w3, num_classes, bias=False)
        self.bias_lr, self.logit_scale, self.average_views = bias_lr, logit_scale, average_views
        self.load_weights(None)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, 32, 32) to logits (B, K)."""
        if self.training or not self.average_views:
            return self.scores(images)
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")  # (B, 3, 34, 34)
        views = [images, padded[:, :, :32, :32], padded[:, :, 2:, 2:]]
        views = torch.cat(views + [view.flip(3) for view in views])  # (6 B, 3, 32, 32)
        logits = self.scores(views).view(2, 3, len(images), -1).mean(dim=0)  # (3, B, K)
        return logits[0] / 2 + logits[1] / 4 + logits[2] / 4

    def scores(self, images: Tensor) -> Tensor:
        """Map images (B, 3, 32, 32) to logits (B, K), of this one view."""
        x = self.whiten(images)  # (B, 24, 31, 31)
        x = self.features(x).flatten(start_dim=1)  # (B, 256, 15, 15), 7, 3, 1 -> (B, 256)
        return self.head(x) * self.logit_scale

    def on_fit_start(self) -> None:
        """Set the whitening layer by 5,000 training pictures: the same in a run that is resumed."""
        data = self.trainer.datamodule
        if not isinstance(data, CIFAR10):
            raise InputError(
                f"Airbench is whitened by, and made for, datamodules.cifar10.CIFAR10, not {type(data).__name__}"
            )
        images = data.train_set.tensors[0][:5000]
        weight = whitening(normalize(images, torch.float32).cpu()).to(self.whiten.weight)
        with torch.no_grad():
            self.whiten.weight.copy_(weight)

    def parameter_groups(self) -> list[dict]:
        """Batch norm's biases learn faster than all else."""
        norms = [m.bias for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        others = [p for p in self.parameters() if p.requires_grad and not any(p is bias for bias in norms)]
        defaults = self.optimizer_defaults()
        faster = {"lr": defaults["lr"] * self.bias_lr, "weight_decay": defaults.get("weight_decay", 0) / self.bias_lr}
        return [{"params": others, "name": "weights"}, {"params": norms, "name": "biases", **faster}]


def whitening(images: Tensor, size: int = 2, epsilon: float = 5e-4) -> Tensor:
    """Return filters that make patches of the images uncorrelated and of variance 1, and the same filters negated.

    Args:
        images: (N, C, H, W), normalised.
        size: of the patches, in pixels.
        epsilon: added to each variance, which may be next to nothing.

    Returns:
        (2 * C * size * size, C, size, size), from the largest variance to the least.
    """
    c = images.shape[1]
    patches = (
        F.unfold(images.double(), size).transpose(1, 2).reshape(-1, c * size * size)
    )  # (N * patches, C * size * size)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending; (D,), (D, D)
    filters = (directions / (variances + epsilon).sqrt()).flip(1).T  # (D, D), a filter a row
    return torch.cat([filters, -filters]).view(-1, c, size, size)
