"""What a parameter is drawn from: wandb's distributions, by wandb's names."""

import math
import random

from runner.errors import InputError


def log_uniform(source: random.Random, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform; rounding does not take it out of its range."""
    return min(max(math.exp(source.uniform(math.log(low), math.log(high))), low), high)


def multiple(q: float, value: float, low: float | None = None, high: float | None = None) -> float:
    """Return the multiple of q nearest to the value. Where wandb would go beyond `low` or `high`, this does not."""
    times = round(value / q)
    if low is not None:
        tolerance = 1e-9  # 0.6 / 0.2 is less than 3
        first, last = math.ceil(low / q - tolerance), math.floor(high / q + tolerance)
        if first > last:
            raise InputError(f"no multiple of {q} lies from {low:g} to {high:g}")
        times = min(max(times, first), last)
    return times * q if is_whole(q) else float(f"{times * q:.12g}")


# What wandb's distributions draw, from a source `s` of random numbers; the other arguments are wandb's keys.
DISTRIBUTIONS = {
    "constant": lambda s, value: value,
    "categorical": lambda s, values: s.choice(values),
    "categorical_w_probabilities": lambda s, values, probabilities: s.choices(values, probabilities)[0],
    "int_uniform": lambda s, min, max: s.randint(min, max),
    "uniform": lambda s, min, max: s.uniform(min, max),
    "q_uniform": lambda s, min, max, q=1: multiple(q, s.uniform(min, max), min, max),
    "log_uniform": lambda s, min, max: math.exp(s.uniform(min, max)),  # from e^min to e^max
    "q_log_uniform": lambda s, min, max, q=1: multiple(q, math.exp(s.uniform(min, max)), math.exp(min), math.exp(max)),
    "inv_log_uniform": lambda s, min, max: math.exp(-s.uniform(min, max)),  # 1 / value is log_uniform
    "log_uniform_values": lambda s, min, max: log_uniform(s, min, max),
    "q_log_uniform_values": lambda s, min, max, q=1: multiple(q, log_uniform(s, min, max), min, max),
    "inv_log_uniform_values": lambda s, min, max: log_uniform(s, min, max),  # as 1 / value is it, too
    "normal": lambda s, mu=0.0, sigma=1.0: s.gauss(mu, sigma),
    "q_normal": lambda s, mu=0.0, sigma=1.0, q=1: multiple(q, s.gauss(mu, sigma)),
    "log_normal": lambda s, mu=0.0, sigma=1.0: s.lognormvariate(mu, sigma),
    "q_log_normal": lambda s, mu=0.0, sigma=1.0, q=1: multiple(q, s.lognormvariate(mu, sigma)),
    "beta": lambda s, a=1.0, b=1.0: s.betavariate(a, b),
    "q_beta": lambda s, a=1.0, b=1.0, q=1: multiple(q, s.betavariate(a, b)),
}


def is_whole(value: object) -> bool:
    """Whether it is an int, which True is not here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return (is_whole(value) or isinstance(value, float)) and math.isfinite(value)
