"""Run a sweep: one command, many trials, each with other values; then a table of them, the best first.

python sweep.py sweeps/mnist_mlp.yaml
python sweep.py --help

The file is one for `wandb sweep`, which runs it online; here it runs without an account, one trial after the other.

What is known of a sweep is in `RUNS_DIR/sweeps/<name>-<hash>/`: `trials.jsonl`, a line for each trial that has ended,
and what each of them printed. The hash is that of the file, of the YAML files that its command names, and of the seed:
the same sweep finds its trials again, and another one does not mistake them for its own.
"""

import json
import shlex
import signal
import sys
import time
from pathlib import Path

from runner.errors import InputError, did_you_mean, existing_file, one_line
from runner.files import list_yaml, write_whole
from sweeping.file import REPOSITORY, Sweep, read_sweep
from sweeping.process import only_one, run_command
from sweeping.trials import as_word, draw_trials, fill_command, judge, read_records, state_folder

HELP = """\
Run many trials of one command, each with other values, and tell which was best.

  python sweep.py sweeps/mnist_mlp.yaml                 every trial that has not ended yet
  python sweep.py sweeps/curve_fit.yaml --trials 30     so many, in place of the file's run_cap; more later goes on
  python sweep.py sweeps/curve_fit.yaml --seed 1        method random: other draws (default: 0)

Killed or interrupted, it goes on with the same command. `wandb sweep` runs the same file online.

sweeps:
"""


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 1 if every trial failed; 2 for a mistake of the user's; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    again = f"to go on: {shlex.join(['python', 'sweep.py', *argv])}"
    try:
        if "-h" in argv or "--help" in argv:
            print(help_text())
            return 0
        path, seed, most = parse(argv)
        sweep = read_sweep(path)
        trials = draw_trials(sweep, seed or 0, most or sweep.run_cap)
        if sweep.method == "grid" and seed is not None:
            raise InputError("--seed is for method random: a grid draws nothing")
        fill_command(sweep, trials[0])  # what is wrong with it is told before anything is written
        for what in sweep.ignored:
            print(f"warning: {path}: {what} is ignored: here every trial runs, and to its end", file=sys.stderr)
        return run_sweep(sweep, trials, state_folder(sweep, seed or 0))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk
        print(f"error: {one_line(error)}; {again}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: the trials that have ended are recorded; {again}", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> tuple[Path, int | None, int | None]:
    """Return the sweep's file, and what was given as `--seed` and `--trials`.

    Raises:
        InputError: no file, more than one, or an option that cannot be used.
    """
    files, options = [], {"--seed": None, "--trials": None}
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            files.append(word)
            continue
        option, equals, value = word.partition("=")
        if option not in options:
            raise InputError(f"unknown option {option}{did_you_mean(option, [*options, '--help'])}")
        value = value if equals else next(words, "nothing")
        least = 1 if option == "--trials" else 0
        if not value.isdecimal() or int(value) < least:
            raise InputError(f"{option} needs a whole number from {least}, got {value}")
        options[option] = int(value)
    if not files:
        raise InputError("no sweep named; try: python sweep.py sweeps/mnist_mlp.yaml (or --help)")
    if len(files) > 1:
        raise InputError(f"one sweep at a time, got {' and '.join(files)}")
    return existing_file(files[0], "sweep", ".yaml"), *options.values()


def help_text() -> str:
    """Return what `--help` prints: how to call, and the sweeps there are with the first line of each."""
    return HELP + list_yaml(REPOSITORY / "sweeps")


def run_sweep(sweep: Sweep, trials: list[dict], folder: Path) -> int:
    """Run the trials that have not ended yet, one after the other; print what came of all; return the exit code."""
    with only_one(folder) as lock:
        records = read_records(folder / "trials.jsonl")
        done = {index: record for index, record in records.items() if index <= len(trials)}
        before = f"; {len(done)} of them ended before" if done else ""
        print(f"{sweep.method}: {len(trials)} trial{'s' * (len(trials) > 1)}, {sweep.metric} to {sweep.goal}{before}\n")
        for index, parameters in enumerate(trials, start=1):
            if index in done:
                continue
            values = "  ".join(f"{key}={short(parameters[key])}" for key in sweep.varied)
            print(f"trial {index:>{len(str(len(trials)))}}/{len(trials)}  {values}", end="  ", flush=True)
            log, started = folder / f"trial-{index:03}.log", time.monotonic()
            code = run_command(fill_command(sweep, parameters), log, lock)
            seconds = round(time.monotonic() - started, 3)
            record = {"index": index, "parameters": parameters, **judge(log, code, sweep.metric), "seconds": seconds}
            records[index] = done[index] = record
            lines = (json.dumps(records[i], default=str) + "\n" for i in sorted(records))
            write_whole(folder / "trials.jsonl", "".join(lines).encode())
            left = time_left(list(done.values()), len(trials) - len(done))
            print(f"{outcome(record, sweep.metric)}  {duration(seconds)}{left}", flush=True)
    print_results(sweep, list(done.values()), folder)
    return 0 if any(record["state"] == "ok" for record in done.values()) else 1


def print_results(sweep: Sweep, records: list[dict], folder: Path) -> None:
    """Print a table of the trials, the best first and failed ones last, and where the best one's run is."""
    sign = 1 if sweep.goal == "minimize" else -1
    records = sorted(records, key=lambda record: record["index"])
    ranked = [record for record in records if record["state"] == "ok"]
    ranked.sort(key=lambda record: sign * record["metrics"][sweep.metric])
    failed = [record for record in records if record["state"] != "ok"]
    rows = [("", "trial", *sweep.varied, sweep.metric)]
    for record in ranked + failed:
        mark = "best" if record in ranked[:1] else ""
        result = outcome(record, sweep.metric).removeprefix(f"{sweep.metric} ")
        rows.append((mark, str(record["index"]), *(short(record["parameters"][key]) for key in sweep.varied), result))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    if ranked:
        tested = (f"{name} {short(value)}" for name, value in sorted(ranked[0]["metrics"].items()) if "test/" in name)
        print(f"tested   {'  '.join(tested)}\nrun      {ranked[0]['run']}")
    print(f"trials   {folder / 'trials.jsonl'}")
    if failed:
        print(
            f"failed   {len(failed)} of {len(records)}: the logs are beside it; a trial without a line in it runs again"
        )


def outcome(record: dict, metric: str) -> str:
    """Return what came of a trial, in a few words."""
    return f"{metric} {short(record['metrics'][metric])}" if record["state"] == "ok" else f"failed: {record['error']}"


def short(value: object) -> str:
    """Return a value as a person wants to read it: four digits of a number."""
    return f"{value:.4g}" if isinstance(value, float) else as_word(value)


def duration(seconds: float) -> str:
    """Return seconds in a unit that tells enough."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def time_left(records: list[dict], trials: int) -> str:
    """Return how long so many trials will take if they are like those that went well, or else those there were."""
    seconds = [r["seconds"] for r in records if r["state"] == "ok"] or [r["seconds"] for r in records]
    return f"  (about {duration(trials * sum(seconds) / len(seconds))} left)" if trials else ""


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # end the trial with the sweep, as Ctrl-C does
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
