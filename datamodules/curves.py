"""Points of a polynomial with noise: y = c0 + c1 x + c2 x^2 + ... + noise * N(0, 1), x uniform in an interval.

Shapes: B batch; inputs (B, 1) and targets (B, 1), float32.

Source: lectures on over- and underfitting, dropout, and variants of gradient descent.
"""

import numpy as np
import torch
from torch import Tensor

from datamodules.in_memory import InMemoryDataModule, InMemoryDataset
from runner.errors import InputError


class NoisyPolynomial(InMemoryDataModule):
    """Points to train, to validate and to test on, all drawn by the same law, and always the same ones.

    The lecture draws its test points' error after every epoch. Here the validation points do that: there are as many as
    one likes, so the test points are looked at once.

    Args:
        coefficients: c0, c1, c2, ... of the law.
        noise: standard deviation of what is added to it.
        interval: of x.
        train, val, test: how many points.
        batch_size: points in a training batch.
        data_seed: of the points; the run's seed does not change them.
    """

    def __init__(
        self,
        coefficients: tuple[float, ...] = (0.0, 0.0, 0.3),
        noise: float = 0.1,
        interval: tuple[float, float] = (-1.0, 1.0),
        train: int = 1000,
        val: int = 200,
        test: int = 200,
        batch_size: int = 128,
        data_seed: int = 0,
    ):
        super().__init__(batch_size)
        if min(train, val, test) < 1:
            raise InputError(f"train, val, test: at least one point each, got {train}, {val} and {test}")
        if not coefficients or not interval[0] < interval[1]:
            raise InputError("coefficients must not be empty, and the interval must begin before it ends")
        if not np.isfinite([*coefficients, noise, *interval]).all() or noise < 0:
            raise InputError("coefficients, noise and interval must be numbers, and noise not below 0")
        self.coefficients, self.noise, self.interval = coefficients, noise, interval
        self.counts, self.data_seed = (train, val, test), data_seed
        terms = (f"{c:g}" + ("", " x")[i > 0] + (f"^{i}" if i > 1 else "") for i, c in enumerate(coefficients) if c)
        self.source = f"y = {' + '.join(terms) or '0'} + {noise:g} N(0, 1), data_seed {data_seed}"

    def law(self, x: Tensor) -> Tensor:
        """y without noise, of the shape of x."""
        return sum(c * x**i for i, c in enumerate(self.coefficients))

    def setup(self, stage: str | None = None) -> None:
        """Draw the points."""
        random = np.random.default_rng(self.data_seed)
        self.train_set, self.val_set, self.test_set = (self._draw(random, n) for n in self.counts)

    def _draw(self, random: np.random.Generator, n: int) -> InMemoryDataset:
        x = torch.from_numpy(random.uniform(*self.interval, (n, 1)))  # (n, 1)
        y = self.law(x) + self.noise * torch.from_numpy(random.standard_normal((n, 1)))
        return InMemoryDataset(x.float(), y.float())
