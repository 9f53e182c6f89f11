"""A sweep's file, in the format of `wandb sweep`.

https://docs.wandb.ai/models/sweeps/sweep-config-keys, and src/sweeps/config/schema.json in wandb/sweeps.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

from runner.errors import InputError, did_you_mean, existing_file
from runner.files import read_yaml
from sweeping.distributions import DISTRIBUTIONS, is_number, is_whole

REPOSITORY = Path(__file__).parent.parent
METHODS = ("grid", "random", "bayes")
KEYS = ("program", "method", "metric", "parameters", "command", "run_cap", "early_terminate")
KEYS += ("name", "description", "project", "entity", "controller", "apiVersion", "kind")  # these only matter online
ONLY_ONLINE = ("job", "image_uri", "scheduler", "metrics")
METRIC_KEYS = ("name", "goal", "target", "impute", "impute_while_running")


@dataclass
class Sweep:
    """What a sweep's file says.

    Attributes:
        path: the file.
        method: "grid" or "random".
        metric: the number that trials are compared by.
        goal: "minimize" or "maximize".
        parameters: key -> `distribution`, and the arguments of it.
        command: words, with wandb's macros in them.
        program: what `${program}` stands for.
        run_cap: most trials there may be; None: as many as the grid has.
        ignored: what the file asks for that is not done here.
    """

    path: Path
    method: str
    metric: str
    goal: str
    parameters: dict[str, dict]
    command: list[str]
    program: str | None
    run_cap: int | None
    ignored: list[str]

    @property
    def varied(self) -> list[str]:
        """The keys that differ between trials."""
        return [key for key, spec in self.parameters.items() if spec["distribution"] != "constant"]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        InputError: it cannot be read, or is not of wandb's format, or asks for what is only done online.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a sweep: expected keys such as program:, method:, metric:, parameters:")
    try:
        return _read_content(path, content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_content(path: Path, content: dict) -> Sweep:
    online = f"is not supported here, but online it is: wandb sweep {path}"
    for key in content:
        if key in ONLY_ONLINE:
            raise InputError(f"{key} {online}")
        _check_known("unknown key", key, KEYS)
    method = content.get("method", "none given")
    _check_known("unknown method", method, METHODS)
    if method == "bayes":
        raise InputError(f"method bayes {online}; grid and random are supported")

    metric = content.get("metric")
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise InputError("metric: say what trials are compared by, such as {name: val/acc, goal: maximize}")
    for key in metric:
        _check_known("metric: unknown key", key, METRIC_KEYS)
    _check_known("metric: unknown goal", metric.setdefault("goal", "minimize"), ("minimize", "maximize"))

    run_cap = content.get("run_cap")
    if run_cap is not None and not (is_whole(run_cap) and run_cap > 0):
        raise InputError(f"run_cap: must be a whole number from 1, got {run_cap!r}")
    command = content.get("command", ["${env}", "${interpreter}", "${program}", "${args}"])
    if not isinstance(command, list) or not command:
        raise InputError(f"command: must be a list of words, got {command!r}")
    if program := content.get("program"):
        existing_file(REPOSITORY / str(program), "program", ".py")

    return Sweep(
        path=path,
        method=method,
        metric=metric["name"],
        goal=metric["goal"],
        parameters=_read_parameters(content.get("parameters")),
        command=[str(word) for word in command],
        program=program,
        run_cap=run_cap,
        ignored=["early_terminate"] * ("early_terminate" in content) + ["metric.target"] * ("target" in metric),
    )


def _check_known(what: str, name: object, names: tuple[str, ...]) -> None:
    if name not in names:
        raise InputError(f"{what} {name}{did_you_mean(str(name), names)}")


def _read_parameters(content: object, prefix: str = "") -> dict[str, dict]:
    """Return key -> distribution in the file's order; what is nested is joined by dots."""
    if not isinstance(content, dict) or not content:
        raise InputError(f"{prefix}parameters: give at least one, such as model.optimizer.lr: {{values: [0.1, 0.01]}}")
    parameters = {}
    for name, spec in content.items():
        key = f"{prefix}{name}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", str(name)):  # wandb's rule
            raise InputError(f"parameter {key!r}: a name is made of letters, digits, '_', '-' and '.'")
        if isinstance(spec, dict) and list(spec) == ["parameters"]:
            found = _read_parameters(spec["parameters"], f"{key}.")
        else:
            try:
                found = {key: _read_distribution(spec)}
            except InputError as error:
                raise InputError(f"parameter {key}: {error}") from None
        if twice := parameters.keys() & found.keys():
            raise InputError(f"parameter {min(twice)} is there twice")
        parameters |= found
    return parameters


def _read_distribution(spec: object) -> dict:
    """Check what is said of one parameter, and return it with the distribution's name."""
    if not isinstance(spec, dict):
        raise InputError("expected {value: ...}, {values: [...]} or {min: ..., max: ...}" + f", got {spec!r}")
    name = spec.get("distribution") or _implied_distribution(spec)
    _check_known("unknown distribution", name, tuple(DISTRIBUTIONS))
    _, *arguments = inspect.signature(DISTRIBUTIONS[name]).parameters.values()
    keys = tuple(argument.name for argument in arguments)
    for key in spec.keys() - {"distribution"}:
        _check_known(f"{name} has no", key, keys)
    if missing := [a.name for a in arguments if a.default is a.empty and a.name not in spec]:
        raise InputError(f"{name} needs {' and '.join(missing)}")

    for key in spec.keys() & {"values", "probabilities"}:
        if not isinstance(spec[key], list) or not spec[key]:
            raise InputError(f"{key}: must be a list, and not empty, got {spec[key]!r}")
    if weights := spec.get("probabilities"):
        if not all(is_number(weight) and weight >= 0 for weight in weights) or not sum(weights):
            raise InputError(f"probabilities: must be numbers from 0, and not all 0, got {weights!r}")
        if len(weights) != len(spec["values"]):
            raise InputError(f"{len(spec['values'])} values, but {len(weights)} probabilities")
    for key in spec.keys() & {"min", "max", "mu", "sigma", "a", "b", "q"}:
        value, whole = spec[key], name == "int_uniform"
        if not (is_whole(value) if whole else is_number(value)):
            hint = "; in YAML, 1e-3 is a word, and 1.0e-3 a number" if isinstance(value, str) else ""
            raise InputError(f"{key}: must be a {'whole ' * whole}number, got {value!r}{hint}")
        if (key in ("a", "b", "q") and value <= 0) or (key == "sigma" and value < 0):
            raise InputError(f"{key}: must be positive, got {value}")
    if "min" in spec and spec["min"] >= spec["max"]:
        raise InputError(f"min {spec['min']} is not less than max {spec['max']}")
    if name.endswith("log_uniform_values") and spec["min"] <= 0:
        raise InputError(f"min: must be positive to have a logarithm, got {spec['min']}")
    return spec | {"distribution": name}


def _implied_distribution(spec: dict) -> str:
    """Return what wandb takes for the distribution where none is named."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if "min" in spec and "max" in spec:
        return "int_uniform" if is_whole(spec["min"]) and is_whole(spec["max"]) else "uniform"
    raise InputError(f"needs value, values, or min and max; it has {', '.join(map(str, spec)) or 'nothing'}")
