"""Linear regression, y = w x + b, three times: gradients by hand, by autograd, and as a module with an optimiser.

The mean squared error over N points, and its gradient:

    L = 1/N sum_i (w x_i + b - y_i)^2
    dL/dw = 2/N sum_i (w x_i + b - y_i) x_i
    dL/db = 2/N sum_i (w x_i + b - y_i)

Shapes: B batch; x and y are (B, 1), w and b are scalars. A batch holds all points, so a step is one of gradient descent.

Source: lecture on linear regression.
"""

import torch
from torch import Tensor, nn

from lit_models.tasks import Regressor, RegressorByHand


class LineByHand(RegressorByHand):
    """No autograd: the gradient is the formula above. It starts at w = b = 0.

    Args:
        lr: learning rate.
    """

    def __init__(self, lr: float = 0.01):
        super().__init__(lr)
        self.w = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, 1) to y (B, 1)."""
        return self.w * x + self.b

    def descend(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step."""
        predictions = self(x)
        error = predictions - y  # (B, 1)
        self.w -= self.lr * 2 * (error * x).mean()
        self.b -= self.lr * 2 * error.mean()
        return predictions


class LineAutograd(RegressorByHand):
    """The gradient comes from autograd; the parameters are still moved by hand. It starts at random.

    Args:
        lr: learning rate.
    """

    def __init__(self, lr: float = 0.1):
        super().__init__(lr)
        self.w = nn.Parameter(torch.randn(()))
        self.b = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, 1) to y (B, 1)."""
        return self.w * x + self.b

    def descend(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step."""
        predictions = self(x)
        loss = (predictions - y).square().mean()
        loss.backward()
        with torch.no_grad():  # the step itself is nothing to differentiate
            for parameter in (self.w, self.b):
                parameter -= self.lr * parameter.grad
                parameter.grad = None  # else backward would add to it
        return predictions


class LineModule(Regressor):
    """`nn.Linear` holds the parameters, an optimiser moves them, Lightning calls both.

    Args:
        task: arguments of `Regressor`.
    """

    def __init__(self, **task):
        super().__init__(**task)
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, 1) to y (B, 1)."""
        return self.linear(x)
