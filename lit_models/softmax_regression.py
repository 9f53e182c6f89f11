"""Softmax regression: a linear map from pixels to class scores (logits), whose softmax are the probabilities.

Shapes: B batch, C channels, H height, W width, D = C*H*W inputs, K classes.

Source: lecture on softmax regression. It is the MLP without a hidden layer, and its loss is convex.
"""

from torch import Tensor, nn

from lit_models.tasks import Classifier


class SoftmaxRegression(Classifier):
    """p(k | x) = softmax(W x + b)_k. The softmax itself is in the loss, where it is computed stably.

    Args:
        num_inputs: D, the pixels of an image times its channels.
        num_classes: K.
        task: arguments of `Classifier`.
    """

    def __init__(self, num_inputs: int = 784, num_classes: int = 10, **task):
        super().__init__(num_classes=num_classes, **task)
        self.linear = nn.Linear(num_inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.linear(images.flatten(start_dim=1))  # (B, C, H, W) -> (B, D) -> (B, K)
