"""Measure experiments over seeds, and write what came of it into their headers and the README's table.

python benchmarks/results.py                       every experiment, the seeds that its header names (else 1, 2, 3)
python benchmarks/results.py curve_fit mnist_mlp   these
python benchmarks/results.py --seeds 1 2           other seeds
python benchmarks/results.py --write               run nothing: only write headers and table

What is measured is kept in benchmarks/results.jsonl, a line for each run with what its receipt said. It is measured once
for the same code and configuration, in which comments and docstrings do not count; so this can be stopped and started
again at any time. The numbers are mean and standard deviation over the seeds.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from math import floor, log10
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fingerprint import fingerprint, module

from runner.errors import InputError, did_you_mean, one_line
from runner.files import printed_run, read_json_lines, write_whole

EXPERIMENTS, README = ROOT / "experiments", ROOT / "README.md"
RESULTS = Path(__file__).with_name("results.jsonl")
NEEDED = {"experiment", "seed", "key", "metrics", "seconds", "devices", "data"}  # of a record
STARTUP = 8.0  # seconds from the command to training, and from the end of training to the end


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 if an experiment failed; 2 for a mistake; 130 after Ctrl-C."""
    try:
        return measure_all(parse(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what has ended is kept; the same command goes on", file=sys.stderr)
        return 130


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help="names or files (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: those in the header, else 1 2 3)")
    parser.add_argument("--write", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    names = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    arguments.experiments = [Path(name).stem for name in arguments.experiments] or names
    for name in arguments.experiments:
        if name not in names:
            raise InputError(f"there is no experiment {name}{did_you_mean(name, names)}")
    return arguments


def measure_all(arguments: argparse.Namespace) -> int:
    """Run what is not measured yet; write header and table when all seeds of an experiment are."""
    records = read_json_lines(RESULTS, NEEDED)
    todo = []
    for name in arguments.experiments:
        done = {r["seed"] for r in records if (r["experiment"], r["key"]) == (name, key(name))}
        seeds = dict.fromkeys(arguments.seeds or header_seeds(name))
        todo += [(name, seed) for seed in seeds if seed not in done and not arguments.write]
    failed = []
    for i, (name, seed) in enumerate(todo, start=1):
        left = sum(expected_seconds(name, records) for name, _ in todo[i - 1 :])
        print(f"{i}/{len(todo)}  {name}, seed {seed}  (about {left / 60:.0f} min left)", end="  ", flush=True)
        record, error = measure(name, seed)
        if error:
            failed.append(name)
            print(f"failed: {error}", flush=True)
            continue
        records.append(record)
        append(record)
        told = "  ".join(f"{metric} {value:.5g}" for metric, value in record["metrics"].items() if "test/" in metric)
        print(f"{told}  {record['seconds']['fit']:.1f} s", flush=True)
        if name not in failed and name not in [other for other, _ in todo[i:]]:
            write_numbers(name, records)
    if not todo:
        for name in arguments.experiments:
            try:
                write_numbers(name, records)
            except InputError as error:
                print(f"{name}: header and README stay as they are: {error}")
    return 1 if failed else 0


def measure(name: str, seed: int) -> tuple[dict | None, str]:
    """Run an experiment; return its record, or None and the last line it said."""
    command = [sys.executable, "train.py", f"experiments/{name}.yaml", "--seed_everything", str(seed)]
    began, before = time.perf_counter(), key(name)
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    run = printed_run(done.stdout)
    module.cache_clear()
    if key(name) != before:
        return None, "settings or code were changed while it ran"
    if done.returncode or not run:
        return None, (done.stderr.strip().splitlines() or ["no run was printed"])[-1]
    try:
        receipt = json.loads((ROOT / run / "receipt.json").read_text())
        told = ("metrics", "parameters", "epochs", "checkpoint", "data", "precision", "devices", "versions", "git")
        record = {"experiment": name, "seed": seed, "key": before, **{k: receipt[k] for k in told}}
        record["data"] = {**record["data"], "source": re.sub(r"/\S*/", "", record["data"]["source"])}
        record["seconds"] = {**receipt["seconds"], "whole": round(time.perf_counter() - began, 1)}
        return record, ""
    except (OSError, ValueError, KeyError) as error:
        return None, f"its receipt cannot be used: {one_line(error)}"


def expected_seconds(name: str, records: list[dict]) -> float:
    """Return how long a run will take: as the last one, or as its header says, or as the average of all."""
    if known := [r["seconds"]["whole"] for r in records if r["experiment"] == name]:
        return known[-1]
    if found := re.search(r", ([\d.]+) s on", measured_line(name)):
        return float(found[1]) + STARTUP
    return statistics.mean([r["seconds"]["whole"] for r in records] or [60.0])


def key(name: str) -> str:
    """Return what makes a run of the experiment the same one: a hash of its settings and of all code that they use."""
    return fingerprint(EXPERIMENTS / f"{name}.yaml", ROOT)


def append(record: dict) -> None:
    """Write a record to the end of the file, on a line of its own even if the last one was cut short."""
    cut_short = RESULTS.exists() and not RESULTS.read_bytes().endswith(b"\n")
    with open(RESULTS, "a") as file:
        file.write("\n" * cut_short + json.dumps(record) + "\n")


# -- what is written -------------------------------------------------------------------------------------------------


def measured_line(name: str) -> str:
    """Return the line of the experiment's header that says what was measured; empty if there is none."""
    found = re.search(r"^# Measured: .*$", (EXPERIMENTS / f"{name}.yaml").read_text(), flags=re.M)
    return found[0] if found else ""


def header_seeds(name: str) -> list[int]:
    """Return the seeds that the header names, else 1, 2, 3."""
    line = measured_line(name)
    found = re.search(r"seeds? ([\d, ]+)\)", line)
    if "seed" in line and not found:
        raise InputError(f"experiments/{name}.yaml: expected (... seeds 1, 2, 3) in: {line}")
    return [int(seed) for seed in found[1].split(",")] if found else [1, 2, 3]


def summary(name: str, records: list[dict]) -> tuple[str, str]:
    """Return what stands in the header and in the README's table, from runs of the code and settings as they are.

    Where there is none of these, the newest ones count: code that others use too may have changed since.

    The metrics are those that the header names already, else that by which the best checkpoint is chosen.

    Raises:
        InputError: not all seeds that the header names are measured, or not on the same data.
    """
    mine = [r for r in records if r["experiment"] == name]
    if not mine:
        raise InputError(f"not measured: python benchmarks/results.py {name}")
    current = [r for r in mine if r["key"] == key(name)] or [r for r in mine if r["key"] == mine[-1]["key"]]
    by_seed = {r["seed"]: r for r in current}
    if missing := sorted(set(header_seeds(name)) - set(by_seed)):
        raise InputError(f"seeds {missing} are not measured: python benchmarks/results.py {name}")
    if len({r["data"]["fingerprint"] for r in by_seed.values()}) > 1:
        raise InputError(f"its runs had other data: remove those that count no more from {RESULTS.name}")
    runs = [by_seed[seed] for seed in sorted(by_seed)]
    config = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    monitored = "test/" + config["checkpoint"]["monitor"].partition("/")[2]
    named = [m for m in re.findall(r"test/\w+", measured_line(name)) if m in runs[0]["metrics"]] or [monitored]
    metrics = [m for m in named if all(m in r["metrics"] for r in runs)]
    if not metrics:
        raise InputError(f"{named[0]} is not in all of its receipts")
    numbers = ", ".join(f"{m} {mean_and_spread([r['metrics'][m] for r in runs], m)}" for m in metrics)
    least = min(r["seconds"]["fit"] for r in runs)  # what else the machine does can only add to it
    seconds = f"{least:.0f} s" if least >= 1 else f"{least:.1f} s"
    device = runs[0]["devices"]
    where = (
        f"{device['threads']} CPU core{'s' * (device['threads'] > 1)}"
        if device["kind"].startswith("cpu")
        else device["kind"]
    )
    seeds = ", ".join(map(str, sorted(by_seed)))
    of = f"n = 1, seed {seeds}"
    if len(runs) > 1:
        of = f"{'mean ± standard deviation of' if '±' in numbers else 'the same with'} seeds {seeds}"
    return f"# Measured: {numbers} ({of}), {seconds} on {where}.", f"{numbers.replace('test/', '')}, {seconds}"


def mean_and_spread(values: list[float], metric: str) -> str:
    """Return `98.19 ± 0.11 %` for shares, `0.0118 ± 0.0014` for others; two digits of the spread."""
    share = metric.startswith(("test/acc", "test/exact"))
    values = [100 * v for v in values] if share else values
    mean = statistics.mean(values)
    if not math.isfinite(mean):
        return f"{mean}"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    percent = " %" if share else ""
    if spread <= 1e-12 * abs(mean):
        return f"{values[0]:.4g}{percent}" if len(values) == 1 or share else f"{values[0]!r}"
    largest = max(abs(mean), spread)
    if not share and not 1e-3 <= largest < 1e4:
        power = floor(log10(largest))
        mean, spread = mean / 10**power, spread / 10**power
        digits = max(1, 1 - floor(log10(spread)))
        return f"{mean:.{digits}f}e{power:+03d} ± {spread:.{digits}f}e{power:+03d}"
    digits = 2 if share else max(0, 1 - floor(log10(spread)))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}{percent}"


def write_numbers(name: str, records: list[dict]) -> None:
    """Put an experiment's numbers into its header and its row of the README's table; what else stands there stays."""
    header, cell = summary(name, records)
    path = EXPERIMENTS / f"{name}.yaml"
    text = re.sub(r"^# Measured: .*$", lambda _: header, path.read_text(), count=1, flags=re.M)
    if text != path.read_text():
        write_whole(path, text.encode())
    readme = README.read_text()
    row = rf"(^\|.*`experiments/{name}\.yaml` \| )(?:(?:\w+ \S+(?: ± \S+)?(?: %)?, )+[\d.]+ s\b|not measured)"
    written = re.sub(row, lambda found: found[1] + cell, readme, count=1, flags=re.M)
    if written != readme:
        write_whole(README, written.encode())


if __name__ == "__main__":
    sys.exit(main())
