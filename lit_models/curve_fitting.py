"""A small net that fits a curve: too small it underfits, too large it overfits, and dropout holds it back.

Shapes: B batch; x and y are (B, 1).

Sources: lectures on over- and underfitting, dropout, and variants of gradient descent.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lit_models.mlp import linear_layers
from lit_models.tasks import Regressor


class CurveFitting(Regressor):
    """Linear layers with ReLU between them; with sizes (1, 1) it is a line.

    Tested, it also tells `test/mse_on_train`, its error on the points that it was fitted to: what the error on other
    points is above that is overfitting.

    Args:
        sizes: layer widths, from 1 (x) to 1 (y).
        dropout: share of hidden units set to zero in training.
        task: arguments of `Regressor`.
    """

    def __init__(self, sizes: tuple[int, ...] = (1, 32, 32, 1), dropout: float = 0.0, **task):
        super().__init__(**task)
        self.layers = nn.Sequential(*linear_layers(sizes, dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, 1) to y (B, 1)."""
        return self.layers(x)

    def on_test_epoch_end(self) -> None:
        """Log the error on the training points."""
        x, y = (t.to(self.device, self.dtype) for t in self.trainer.datamodule.train_set.tensors)
        self.log("test/mse_on_train", F.mse_loss(self(x), y))
