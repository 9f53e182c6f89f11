"""Many runs side by side: a table on the terminal, and one HTML page that opens without a server or a network.

python compare.py runs/mnist_*
python compare.py --help
"""

import argparse
import os
import sys
from pathlib import Path

from runner.errors import InputError, one_line


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for a mistake of the user's, told in one line."""
    try:
        arguments = parse(argv)
        compare_runs(arguments)
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name in ("runner", "comparison"):
            raise
        print(f"error: the package {error.name} is missing; try: pip install -r requirements.txt", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    root = os.environ.get("RUNS_DIR") or "runs"
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="*", default=[root], help=f"folders of runs, or with runs in them (default: {root})"
    )
    parser.add_argument("--by", choices=["experiment", "run"], default="experiment", help="what a row of the table is")
    parser.add_argument(
        "--html", type=Path, default=Path(root) / "compare.html", help="the page (default: %(default)s)"
    )
    parser.add_argument(
        "--publish", action="store_true", help="save the same view in Weights & Biases (needs an account)"
    )
    return parser.parse_args(argv)


def compare_runs(arguments: argparse.Namespace) -> None:
    """Read the runs, print the table, write the page."""
    from comparison.page import write_page
    from comparison.records import find_runs, read_run
    from comparison.statistics import compare, group_runs
    from comparison.tables import as_text, experiment_tables, run_tables

    folders = find_runs(arguments.runs)
    records = []
    for i, folder in enumerate(folders, start=1):
        records.append(read_run(folder))
        if sys.stderr.isatty() and (i % 20 == 0 or i == len(folders)):
            print(f"\rreading runs: {i}/{len(folders)}", end="\n" if i == len(folders) else "", file=sys.stderr)
    groups = group_runs(records)

    try:
        size = write_page(arguments.html, records, groups)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(arguments.html)[:100]}: {one_line(error)}") from None

    for table in (run_tables if arguments.by == "run" else experiment_tables)(groups):
        print(as_text(table), end="\n\n")
    if any(len(group.runs) > 1 for group in groups) and arguments.by == "experiment":
        print("n seeds; mean ± half of its 95 % interval; * best; seconds of training", end="\n\n")
    if len(groups) == 2 and (shared := [m for m in groups[0].metrics if m in groups[1].metrics]):
        print(compare(*groups, shared[0]), end="\n\n")
    if notes := [note for group in groups for note in group.notes]:
        print("\n".join(notes), end="\n\n")
    if left_out := [record for record in records if record.problem]:
        print("left out:")
        for record in left_out:
            print(f"  {record.folder}: {record.problem}")
        print()
    print(f"page  {arguments.html} ({size / 1e6:.1f} MB)")
    if arguments.publish:
        from comparison.publish import publish

        print(f"view  {publish(records, groups)}")


if __name__ == "__main__":
    sys.exit(main())
