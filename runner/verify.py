"""Hold a receipt against a new test of the same checkpoint: are the files as they were, and is the number still true?"""

import json
import math
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from callbacks.receipt import PACKAGES, describe_device, sha256
from runner.cli import ALONE
from runner.errors import InputError, one_line

TOLERANCE = 1e-3  # of a metric's value, on another machine or with other versions: sums there run in another order
NEAR_ZERO = 1e-8  # what is less apart is equal there, too
NEEDED = {
    "experiment": str,
    "metrics": dict,
    "checkpoint": dict,
    "config_sha256": str,
    "data": dict,
    "tested": int,
    "seed": int,
    "parameters": int,
    "versions": dict,
    "devices": dict,
}


def verify(path: Path, experiment, test: Callable[..., dict[str, float]]) -> int:
    """Test again, and print the receipt's numbers and the new ones side by side.

    Args:
        path: the receipt, in its run's folder.
        experiment: made from the config.yaml beside it.
        test: from an experiment and a checkpoint to metrics.

    Returns:
        The exit code: 0 if nothing was altered and the metrics are equal (to the last bit on the same kind of machine
        with the same versions, else within `TOLERANCE`), 1 otherwise.

    Raises:
        InputError: the file is no receipt.
    """
    receipt = read_receipt(path)
    folder, data = path.parent, experiment.datamodule
    checkpoint = folder / receipt["checkpoint"]["path"]
    print(f"{receipt['experiment']}, seed {receipt['seed']}: {path}\n", flush=True)
    experiment.load_data()
    said, now = receipt["data"], data.describe()
    other = f"another: {now['source']}, sha256 {now['fingerprint'][:8]}; it was {said.get('source')}, {said['fingerprint'][:8]}"
    found = {
        "checkpoint": _file(checkpoint, receipt["checkpoint"]["sha256"]),
        "configuration": _file(folder / "config.yaml", receipt["config_sha256"]),
        "data": "" if said["fingerprint"] == now["fingerprint"] else other,
        "receipt": _contradictions(receipt, experiment),
    }
    for name, problem in found.items():
        print(f"{name:14} {problem or 'as it was'}", flush=True)
    differs = _circumstances(receipt, experiment)
    if differs:
        print(f"{'machine':14} another: {'; '.join(differs)}")

    try:
        metrics = test(experiment, checkpoint)
    except InputError as error:
        print(f"\nnot verified: {error}")
        return 1
    equal = _print_metrics(receipt["metrics"], metrics, exact=not differs)
    altered = [name for name, problem in found.items() if problem]
    how = f"within {TOLERANCE:g} of each" if differs else "to the last bit"
    if altered:
        print(
            f"\nnot verified: {' and '.join(altered)} altered or missing; the metrics are {'' if equal else 'not '}equal {how}"
        )
    else:
        print(f"\n{'verified: equal' if equal else 'not verified: not equal'} {how}")
    return 0 if equal and not altered else 1


def read_receipt(path: Path) -> dict:
    """Return a receipt's content.

    Raises:
        InputError: it cannot be read, or is not one of ours; says what is missing.
    """
    try:
        receipt = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"receipt {path} cannot be read: {one_line(error)}") from None
    odd = [
        key for key, kind in NEEDED.items() if not isinstance(receipt, dict) or not isinstance(receipt.get(key), kind)
    ]
    if not odd:
        texts = (
            receipt["checkpoint"].get("path"),
            receipt["checkpoint"].get("sha256"),
            receipt["data"].get("fingerprint"),
        )
        numbers = receipt["metrics"].values()
        odd += ["checkpoint.path, checkpoint.sha256 or data.fingerprint"] * (not all(isinstance(t, str) for t in texts))
        odd += ["metrics"] * (not numbers or not all(isinstance(n, int | float) for n in numbers))
    if odd:
        raise InputError(f"{path} is not a run's receipt: it has no {', '.join(odd)}")
    return receipt


def _contradictions(receipt: dict, experiment) -> str:
    """What the receipt says otherwise than the configuration and the data do; empty if nothing."""
    sizes = experiment.datamodule.sizes
    facts = {
        "experiment": (receipt["experiment"], experiment.name),
        "seed": (receipt["seed"], experiment.seed),
        "parameters": (receipt["parameters"], sum(p.numel() for p in experiment.model.parameters())),
        "tested": (receipt["tested"], sizes["test"]),
        "sizes": ({name: receipt["data"].get(name) for name in sizes}, sizes),
    }
    wrong = [f"{name} is {said}, and should be {right}" for name, (said, right) in facts.items() if said != right]
    return f"altered: {'; '.join(wrong)}" if wrong else ""


def _file(path: Path, digest: str) -> str:
    if not path.is_file():
        return f"missing: {path}"
    return "" if sha256(path) == digest else f"altered: {path} has another sha256 than the receipt says"


def _circumstances(receipt: dict, experiment) -> list[str]:
    """What is other than at the run, and may change the last bits."""
    now = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    now |= describe_device(experiment.trainer(logger=False, enable_progress_bar=False, **ALONE))
    was = {"cpu": now["cpu"], **receipt["versions"], **receipt["devices"]}  # older receipts do not tell the CPU's kind
    return [f"{name} {was.get(name)} then, {now[name]} now" for name in now if was.get(name) != now[name]]


def _print_metrics(was: dict[str, float], now: dict[str, float], exact: bool) -> bool:
    """Print both side by side; return whether they are equal."""
    width = max(map(len, {**was, **now}))
    print(f"\n{'':{width}}  {'receipt':>22}  {'now':>22}")
    all_equal = True
    for name in sorted({**was, **now}):
        a, b = was.get(name, math.nan), now.get(name, math.nan)
        both = name in was and name in now
        same = both and (a == b or (math.isnan(a) and math.isnan(b)))
        equal = same or (both and not exact and math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=NEAR_ZERO))
        note = "equal" if same else f"differs by {b - a:.3g}" if both else "in one of them only"
        print(f"{name:{width}}  {a!r:>22}  {b!r:>22}  {note}")
        all_equal = all_equal and equal
    return all_equal
