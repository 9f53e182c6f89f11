"""A two-layer net, y = max(0, x W1) W2, in eight forms: from tensors and a pencil to a compiled graph.

The squared error, summed over the batch, and its gradient by the chain rule, from the end to the start:

    h = x W1,  r = max(0, h),  y' = r W2,  L = sum (y' - y)^2
    dL/dy' = 2 (y' - y)
    dL/dW2 = r^T dL/dy'
    dL/dr  = dL/dy' W2^T
    dL/dh  = dL/dr where h > 0, else 0
    dL/dW1 = x^T dL/dh

Shapes: B batch, D inputs, H hidden units, K outputs; x (B, D), W1 (D, H), W2 (H, K), y (B, K).

Forms 1 to 4 and 8 move their parameters by hand (`descend`); in 5 to 7 Lightning runs the lecture's loop of
`loss.backward()` and `optimizer.step()`, and the loss is the mean in place of the sum: B * K times smaller.

Source: lecture on tensors, autograd and nn.Module.
"""

import warnings

import torch
from torch import Tensor, nn

from lit_models.tasks import Regressor, RegressorByHand


class _TwoMatrices(RegressorByHand):
    """What forms 1 to 3 begin with: W1 and W2 from N(0, 1)."""

    autograd = True

    def __init__(self, inputs: int = 1000, hidden: int = 100, outputs: int = 10, lr: float = 1e-6):
        super().__init__(lr)
        self.w1 = nn.Parameter(torch.randn(inputs, hidden), requires_grad=self.autograd)  # (D, H)
        self.w2 = nn.Parameter(torch.randn(hidden, outputs), requires_grad=self.autograd)  # (H, K)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, D) to y (B, K)."""
        return (x @ self.w1).clamp(min=0) @ self.w2

    def move(self) -> None:
        """Go one step down the gradients that backward() left in `grad`."""
        with torch.no_grad():
            for w in self.parameters():
                w -= self.lr * w.grad
                w.grad = None


class Tensors(_TwoMatrices):
    """Form 1. Tensors, and gradients by hand."""

    autograd = False

    def descend(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step."""
        h = x @ self.w1  # (B, D) @ (D, H) -> (B, H)
        r = h.clamp(min=0)
        y_pred = r @ self.w2  # (B, H) @ (H, K) -> (B, K)

        grad_y_pred = 2 * (y_pred - y)  # (B, K)
        grad_w2 = r.T @ grad_y_pred  # (H, B) @ (B, K) -> (H, K)
        grad_h = (grad_y_pred @ self.w2.T) * (h > 0)  # (B, K) @ (K, H) -> (B, H)
        grad_w1 = x.T @ grad_h  # (D, B) @ (B, H) -> (D, H)

        self.w1 -= self.lr * grad_w1
        self.w2 -= self.lr * grad_w2
        return y_pred


class Autograd(_TwoMatrices):
    """Form 2. The same forward pass; autograd walks back through it."""

    def descend(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step."""
        y_pred = self(x)
        loss = (y_pred - y).square().sum()
        loss.backward()
        self.move()
        return y_pred


class Sigmoid(torch.autograd.Function):
    """An operation of one's own: s = 1 / (1 + exp(-x)), and ds/dx = s (1 - s), in one step instead of four."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Keep s: the backward pass needs nothing else."""
        s = 1 / (1 + (-x).exp())
        ctx.save_for_backward(s)
        return s

    @staticmethod
    def backward(ctx, grad_s: Tensor) -> Tensor:
        """From dL/ds to dL/dx."""
        (s,) = ctx.saved_tensors
        return grad_s * s * (1 - s)


class CustomFunction(Autograd):
    """Form 3. Autograd through a function of one's own: a sigmoid in place of the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, D) to y (B, K)."""
        return Sigmoid.apply(x @ self.w1) @ self.w2


class SequentialByHand(RegressorByHand):
    """Form 4. Layers hold the parameters; they are still moved by hand."""

    def __init__(self, inputs: int = 1000, hidden: int = 100, outputs: int = 10, lr: float = 1e-4):
        super().__init__(lr)
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, D) to y (B, K)."""
        return self.layers(x)

    def descend(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step."""
        self.layers.zero_grad()
        y_pred = self(x)
        loss = (y_pred - y).square().sum()
        loss.backward()
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter -= self.lr * parameter.grad
        return y_pred


class SequentialOptimizer(Regressor):
    """Form 5. An optimiser moves them: Adam, unless told otherwise."""

    def __init__(self, inputs: int = 1000, hidden: int = 100, outputs: int = 10, **task):
        super().__init__(**task)
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, D) to y (B, K)."""
        return self.layers(x)


class TwoLayerModule(Regressor):
    """Form 6. A module of one's own: `__init__` makes the layers, `forward` may use them as it likes."""

    def __init__(self, inputs: int = 1000, hidden: int = 100, outputs: int = 10, **task):
        super().__init__(**task)
        self.linear1 = nn.Linear(inputs, hidden)
        self.linear2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, D) to y (B, K)."""
        r = self.linear1(x).clamp(min=0)  # (B, D) -> (B, H)
        return self.linear2(r)  # (B, H) -> (B, K)


class ParallelBlock(nn.Module):
    """Two linear maps of the same input, multiplied."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear1 = nn.Linear(inputs, outputs)
        self.linear2 = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, inputs) to (B, outputs)."""
        return self.linear1(x) * self.linear2(x)


class Container(Regressor):
    """Form 7. Modules of one's own in a container, as building blocks (two of them, as in the lecture: a layer more)."""

    def __init__(self, inputs: int = 1000, hidden: int = 100, outputs: int = 10, **task):
        super().__init__(**task)
        self.blocks = nn.Sequential(
            ParallelBlock(inputs, hidden), ParallelBlock(hidden, hidden), nn.Linear(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, D) to y (B, K)."""
        return self.blocks(x)


class StaticGraph(RegressorByHand):
    """Form 8. The graph is built once and compiled; which weights it uses depends on the data all the same.

    W2 is `w2a` while the last step's loss is under 5, else `w2b`. (The lecture compiles with `torch.jit.script`, which is
    deprecated; a Python `if` on a tensor would break torch.compile's graph in two, so the choice is a `torch.where`.)

    What comes of it: once w2b has brought the loss under 5, w2a, hardly trained, is used for one step, with a loss of
    millions, and w2b takes over again. The curve shows it as a row of spikes.

    Args:
        compile: whether to compile the step with `torch.compile`; without a C++ compiler at hand a warning says so, and
            the step runs as it is.
    """

    def __init__(
        self, inputs: int = 1000, hidden: int = 100, outputs: int = 10, lr: float = 1e-6, compile: bool = True
    ):
        super().__init__(lr)
        self.w1 = nn.Parameter(torch.randn(inputs, hidden))  # (D, H)
        self.w2a = nn.Parameter(torch.randn(hidden, outputs))  # (H, K)
        self.w2b = nn.Parameter(torch.randn(hidden, outputs))  # (H, K)
        self.register_buffer("last_loss", torch.tensor(5.0))  # in the checkpoint, for the choice after a resume
        self.compile_graph, self.graph = compile, None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, D) to y (B, K)."""
        w2 = torch.where(self.last_loss < 5, self.w2a, self.w2b)
        return (x @ self.w1).clamp(min=0) @ w2

    def predict_and_lose(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The graph: predictions (B, K) and the loss."""
        y_pred = self(x)
        return y_pred, (y_pred - y).square().sum()

    def descend(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step."""
        if self.graph is None:
            self.graph = compiled(self.predict_and_lose, x, y) if self.compile_graph else self.predict_and_lose
        y_pred, loss = self.graph(x, y)
        loss.backward()
        with torch.no_grad():
            for w in (self.w1, self.w2a, self.w2b):  # the gradient of the one not chosen is 0
                w -= self.lr * w.grad
                w.grad = None
        self.last_loss.copy_(loss.detach())
        return y_pred


def compiled(function, *example):
    """Return `function`, compiled to one graph if that works here; `example` is what to try it on."""
    print(f"compiling {function.__name__}, which can take half a minute the first time", flush=True)
    fast = torch.compile(function, fullgraph=True)
    try:
        fast(*example)
    except Exception as error:  # torch.compile raises many kinds, for want of a compiler above all
        warnings.warn(f"not compiled, so it runs as it is: {str(error).strip().splitlines()[0]}", stacklevel=2)
        return function
    return fast
