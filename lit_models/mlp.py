"""Multi-layer perceptron: flatten, then Linear and ReLU in turn, then class scores (logits).

Shapes: B batch, C channels, H height, W width, K classes.

Source: lecture on multi-layer perceptrons.
"""

from itertools import pairwise

from torch import Tensor, nn

from lit_models.tasks import Classifier
from runner.errors import InputError


class MLP(Classifier):
    """Hidden layers of ReLU units, and a linear layer on top.

    Args:
        sizes: layer widths, the flattened input first and the number of classes last.
        dropout: share of hidden units set to zero in training.
        task: arguments of `Classifier`.

    Raises:
        InputError: fewer than two sizes, or one below 1.
    """

    def __init__(self, sizes: tuple[int, ...] = (784, 512, 512, 10), dropout: float = 0.0, **task):
        layers = linear_layers(sizes, dropout)
        super().__init__(num_classes=sizes[-1], **task)
        self.layers = nn.Sequential(nn.Flatten(), *layers)  # (B, C, H, W) -> (B, C*H*W) -> (B, K)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.layers(images)


def linear_layers(sizes: tuple[int, ...], dropout: float = 0.0) -> list[nn.Module]:
    """Return Linear, ReLU and, if asked for, Dropout in turn, from (B, sizes[0]) to (B, sizes[-1]); the last is Linear.

    Raises:
        InputError: fewer than two sizes, or one below 1.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(
            f"sizes: the inputs, hidden layers if any, and the outputs, each at least 1; got {list(sizes)}"
        )
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(n_in, n_out), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return [*layers, nn.Linear(sizes[-2], sizes[-1])]
