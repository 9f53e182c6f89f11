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
        if len(sizes) < 2 or min(sizes) < 1:
            raise InputError(
                f"sizes: the inputs, hidden layers if any, and the classes, each at least 1; got {list(sizes)}"
            )
        super().__init__(num_classes=sizes[-1], **task)
        layers: list[nn.Module] = [nn.Flatten()]  # (B, C, H, W) -> (B, C*H*W)
        for n_in, n_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        layers += [nn.Linear(sizes[-2], sizes[-1])]  # no ReLU on the logits: (B, K)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.layers(images)
