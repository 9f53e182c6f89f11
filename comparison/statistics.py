"""Means over seeds, with the interval that holds the true mean in 95 of 100 such measurements, and tests of differences."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from comparison.records import Record

LEVEL = 0.95
# How metrics' names begin of which less is better; of all others, more is.
LESS_IS_BETTER = (
    "loss",
    "mse",
    "rmse",
    "mae",
    "nll",
    "perplexity",
    "bits",
    "nelbo",
    "cross_entropy",
    "error",
    "frechet",
    "recon",
    "kl",
)


@dataclass
class Group:
    """Runs of one experiment that differ in nothing but the seed, each seed once.

    Attributes:
        name: the experiment's, and what tells it from others of the same name.
        runs: by seed.
        repeats: how many runs of a seed that is already in `runs` were left out: the same bits prove nothing new.
    """

    name: str
    runs: list[Record]
    repeats: int = 0

    @property
    def metrics(self) -> list[str]:
        """Names of what was tested, that of the monitored metric first."""
        first = "test/" + self.runs[0].monitor.partition("/")[2]
        return sorted(self.runs[0].metrics, key=lambda name: (name != first, name))

    @property
    def data(self) -> str:
        """Fingerprint of what it was trained and tested on: numbers on other data do not compare."""
        return str(self.runs[0].config["data"])

    @property
    def seconds(self) -> float:
        """Of training, the mean over the seeds."""
        return sum(run.seconds for run in self.runs) / len(self.runs)

    def less_is_better(self, metric: str) -> bool:
        """Whether a smaller value is a better one: as `checkpoint.mode` says of the monitored metric; else by its name."""
        name = metric.rpartition("/")[2]
        if name == self.runs[0].monitor.partition("/")[2]:
            return self.runs[0].mode == "min"
        return name.startswith(LESS_IS_BETTER)

    @property
    def notes(self) -> list[str]:
        """What a reader of the mean should know of its runs."""
        notes = []
        if (versions := len({run.code for run in self.runs})) > 1:
            notes.append(f"{self.name}: its runs were made by {versions} versions of the code")
        if self.repeats:
            notes.append(f"{self.name}: {self.repeats} run(s) repeat a seed with the same settings; the newest counts")
        return notes

    def kind(self, metric: str) -> tuple[str, str]:
        """What another group must share for its `metric` to compare: the data, and of a loss the function that it is."""
        return self.data, str(self.runs[0].config.get("model.init_args.loss")) * metric.endswith("/loss")

    @cached_property
    def seeds(self) -> list[int]:
        """The runs' seeds, in order."""
        return [run.seed for run in self.runs]

    def values(self, metric: str) -> np.ndarray:
        """One value a run, in order of the seeds; NaN where a run has none."""
        return np.array([run.metrics.get(metric, math.nan) for run in self.runs])

    def mean(self, metric: str) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values(metric)))

    def interval(self, metric: str) -> float:
        """Half the width of the mean's 95 % confidence interval (Student's t); NaN with a single run."""
        return half_width(self.values(metric))


def half_width(values: np.ndarray) -> float:
    """Half the width of the 95 % confidence interval of the mean of `values` (Student's t); NaN for one value."""
    n = len(values)
    if n < 2:
        return math.nan
    spread = float(np.std(values, ddof=1))
    if spread <= 1e-12 * abs(float(np.mean(values))):  # equal values, whose mean is off by its last bit
        return 0.0
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * spread / math.sqrt(n)


def group_runs(records: list[Record]) -> list[Group]:
    """Put runs together that differ in nothing but the seed; those with a problem are left out."""
    by_config: dict[tuple, list[Record]] = {}
    for record in records:
        if not record.problem:
            key = (record.experiment, tuple(sorted((k, repr(v)) for k, v in record.config.items())))
            by_config.setdefault(key, []).append(record)
    names = _names(list(by_config.values()))
    groups = []
    for name, runs in zip(names, by_config.values(), strict=True):
        by_seed = {run.seed: run for run in sorted(runs, key=lambda run: run.folder.name)}  # the newest of each seed
        groups.append(Group(name, [by_seed[seed] for seed in sorted(by_seed)], len(runs) - len(by_seed)))
    return sorted(groups, key=lambda group: group.name)


def differing_keys(configs: list[dict[str, object]]) -> list[str]:
    """Return the keys whose values are not the same in all configurations."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]


def _names(groups: list[list[Record]], most: int = 3) -> list[str]:
    """Name each group by its experiment; where several have the same, add what they differ in, as far as it is short."""
    names: list[str] = []
    for runs in groups:
        experiment = runs[0].experiment
        same = [other[0].config for other in groups if other[0].experiment == experiment]
        differs = [(key, runs[0].config.get(key)) for key in differing_keys(same)]
        short = [f"{key.removesuffix('.class_path').rpartition('.')[2]}={_short(key, value)}" for key, value in differs]
        more = [f"{len(short) - most} more"] if len(short) > most else []
        name = f"{experiment} [{', '.join(short[:most] + more)}]" if short else experiment
        names.append(name if name not in names else f"{name} #{sum(n.startswith(name) for n in names) + 1}")
    return names


def _short(key: str, value: object) -> str:
    text = number(value) if isinstance(value, float) else str(value)[-40:]
    return text.rpartition(".")[2] if key.endswith("class_path") else text


def compare(a: Group, b: Group, metric: str) -> str:
    """Say in one sentence whether the difference between two groups is more than seeds explain.

    Runs of the same seeds are compared in pairs, else Welch's test is used. The sentence holds the difference with its 95 %
    interval, and the test's p: how often seeds alone would make so large a difference.
    """
    if a.kind(metric) != b.kind(metric):
        return f"{a.name} and {b.name} were tested on other data, or by another loss: their {metric} does not compare."
    x, y = a.values(metric), b.values(metric)
    if not np.isfinite([*x, *y]).all():
        return f"{a.name} or {b.name} has no finite {metric}."
    difference = float(x.mean() - y.mean())
    if difference == 0:
        return f"{a.name} and {b.name} have the same {metric}, {number(x.mean())}."
    better, worse = (a, b) if (difference < 0) == a.less_is_better(metric) else (b, a)
    says = f"{better.name} has the better {metric}, {number(better.mean(metric))} against {number(worse.mean(metric))} of {worse.name}"
    if min(len(x), len(y)) < 2:
        return f"{says}; whether seeds explain that cannot be said: each needs at least 2 (n = {len(x)} and {len(y)})."
    paired = a.seeds == b.seeds
    if half_width(x - y) == 0 if paired else half_width(x) == half_width(y) == 0:
        return f"{says}; it is the same with every seed, so there is nothing to test."
    if paired:
        p, half, test = stats.ttest_rel(x, y).pvalue, half_width(x - y), f"paired t-test over {len(x)} seeds"
    else:
        result = stats.ttest_ind(x, y, equal_var=False)
        low, high = result.confidence_interval(LEVEL)
        p, half, test = result.pvalue, (high - low) / 2, f"Welch's t-test, n = {len(x)} and {len(y)}"
    verdict = "more than seeds explain" if p < 1 - LEVEL else "no more than seeds explain"
    return f"{says}: a difference of {with_interval(abs(difference), half)}, which is {verdict} (p = {p:.2g}, {test})."


def number(value: float) -> str:
    """Return a value with four significant digits."""
    return f"{value:.4g}"


def with_interval(value: float, half: float) -> str:
    """Return `value ± half`, both to the second digit of the latter; without it if there is none."""
    if not (math.isfinite(half) and abs(value) < 1e100):
        return number(value)
    if half == 0:
        return f"{number(value)} ± 0"
    if max(abs(value), half) >= 1e5 or max(abs(value), half) < 1e-3:
        power = math.floor(math.log10(max(abs(value), half)))
        return f"({with_interval(value / 10**power, half / 10**power)})e{power:+03d}"
    digits = 1 - math.floor(math.log10(half))
    return f"{round(value, digits):.{max(0, digits)}f} ± {round(half, digits):.{max(0, digits)}f}"
