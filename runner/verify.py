"""Hold a receipt against a new test of the same checkpoint: are the files as they were, and is the number still true?"""

import json
import math
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from callbacks.receipt import PACKAGES, sha256
from runner.errors import InputError, one_line

TOLERANCE = 1e-3  # of a metric's value, on another machine or with other versions: sums there run in another order
NEEDED = ("experiment", "metrics", "checkpoint", "config_sha256", "data", "tested", "seed", "versions", "devices")


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
    found = {
        "checkpoint": _file(checkpoint, receipt["checkpoint"]["sha256"]),
        "configuration": _file(folder / "config.yaml", receipt["config_sha256"]),
        "data": ""
        if said["fingerprint"] == now["fingerprint"]
        else f"another: {now['source']}, it was {said['source']}",
    }
    for name, problem in found.items():
        print(f"{name:14} {problem or 'as it was'}", flush=True)
    differs = _circumstances(receipt)
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
    except (OSError, ValueError) as error:
        raise InputError(f"receipt {path} cannot be read: {one_line(error)}") from None
    missing = [key for key in NEEDED if not isinstance(receipt, dict) or key not in receipt]
    if missing:
        raise InputError(f"{path} is not a run's receipt: it has no {', '.join(missing)}")
    return receipt


def _file(path: Path, digest: str) -> str:
    if not path.is_file():
        return f"missing: {path}"
    return "" if sha256(path) == digest else f"altered: {path} has another sha256 than the receipt says"


def _circumstances(receipt: dict) -> list[str]:
    """What is other than at the run, and may change the last bits."""
    now = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    was = receipt["versions"]
    differs = [f"{name} {was.get(name)} then, {now[name]} now" for name in now if was.get(name) != now[name]]
    threads = receipt["devices"].get("threads")
    if threads != torch.get_num_threads():
        differs.append(f"{threads} threads then, {torch.get_num_threads()} now")
    kind, here = receipt["devices"]["kind"], f"cpu ({platform.machine()})"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else here
    if kind != device:
        differs.append(f"{kind} then, {device} now")
    return differs


def _print_metrics(was: dict[str, float], now: dict[str, float], exact: bool) -> bool:
    """Print both side by side; return whether they are equal."""
    width = max(map(len, {**was, **now}))
    print(f"\n{'':{width}}  {'receipt':>22}  {'now':>22}")
    all_equal = True
    for name in sorted({**was, **now}):
        a, b = was.get(name, math.nan), now.get(name, math.nan)
        equal = a == b or (not exact and math.isclose(a, b, rel_tol=TOLERANCE)) or (math.isnan(a) and math.isnan(b))
        equal = equal and (name in was) == (name in now)
        note = (
            "equal" if a == b else f"differs by {b - a:.3g}" if name in was and name in now else "in one of them only"
        )
        print(f"{name:{width}}  {a!r:>22}  {b!r:>22}  {note}")
        all_equal = all_equal and equal
    return all_equal
