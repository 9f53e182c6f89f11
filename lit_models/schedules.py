"""Learning rate schedules that `torch.optim.lr_scheduler` has only in parts."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

from runner.errors import InputError


class WarmupCosine(SequentialLR):
    """Up in a straight line, then down along half a cosine (Goyal et al. 2017; Loshchilov and Hutter 2017).

    Step t of the warm-up has (t + 1) / warmup_steps of the optimiser's learning rate; after it, the rate is
    1/2 (1 + cos(pi (t - warmup_steps) / (total_steps - warmup_steps))) of it.

    Args:
        optimizer: whose learning rate is the highest.
        warmup_steps: how many steps (or epochs, with `lr_interval: epoch`) go up.
        total_steps: how many there are of training.

    Raises:
        InputError: nothing is left to warm up or to cool down.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int):
        if not 1 < warmup_steps < total_steps:
            raise InputError(f"warmup_steps must be from 2 to below total_steps {total_steps}, got {warmup_steps}")
        up = LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps - 1)
        down = CosineAnnealingLR(optimizer, T_max=total_steps - warmup_steps)
        super().__init__(optimizer, [up, down], milestones=[warmup_steps])
        self.total_steps = total_steps


class Triangle(LambdaLR):
    """Up in a straight line, then down in another. (The rates of several groups of parameters keep their ratio.)

    Args:
        optimizer: whose learning rates are the highest.
        total_steps: how many there are of training.
        peak: where it is highest, as a share of the steps.
        start, end: shares of the highest, at the first step and after the last.

    Raises:
        InputError: nothing is left to go up or down.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, peak: float = 0.25, start: float = 0.0, end: float = 0.0
    ):
        top = peak * total_steps
        if not 0 < top < total_steps:
            raise InputError(f"peak: a share of the steps between 0 and 1, got {peak} of {total_steps}")

        def factor(step: int) -> float:
            if step < top:
                return start + (1 - start) * step / top
            return max(end, 1 - (1 - end) * (step - top) / (total_steps - top))

        super().__init__(optimizer, factor)
        self.total_steps = total_steps
