"""Rows for the terminal and the page: one an experiment, or one a run."""

import math
from dataclasses import dataclass

from comparison.statistics import Group, number, with_interval


@dataclass
class Table:
    """Experiments, or runs, that were tested by the same metrics on the same data: others do not compare.

    Attributes:
        data: which it was.
        header, rows: the cells; the best of each metric is marked by *.
    """

    data: str
    header: list[str]
    rows: list[list[str]]


def experiment_tables(groups: list[Group]) -> list[Table]:
    """Return tables with a row for each experiment: mean and 95 % interval over its seeds."""
    tables = []
    for members in _comparable(groups):
        metrics = members[0].metrics
        best = {m: _best([(group, group.mean(m)) for group in members], m) for m in metrics}
        rows = []
        for i, group in enumerate(members):
            cells = [with_interval(group.mean(m), group.interval(m)) + "*" * (i in best[m]) for m in metrics]
            rows.append(
                [group.name, str(len(group.runs)), *cells, f"{group.runs[0].parameters:,}", f"{group.seconds:.1f}"]
            )
        tables.append(Table(members[0].runs[0].data, ["experiment", "n", *metrics, "parameters", "seconds"], rows))
    return tables


def run_tables(groups: list[Group]) -> list[Table]:
    """Return tables with a row for each run."""
    tables = []
    for members in _comparable(groups):
        metrics = members[0].metrics
        runs = [(group, run) for group in members for run in group.runs]
        best = {m: _best([(group, run.metrics.get(m, math.nan)) for group, run in runs], m) for m in metrics}
        rows = []
        for i, (group, run) in enumerate(runs):
            cells = [number(run.metrics.get(m, math.nan)) + "*" * (i in best[m]) for m in metrics]
            rows.append(
                [group.name, str(run.seed), *cells, f"{run.parameters:,}", f"{run.seconds:.1f}", str(run.folder)]
            )
        tables.append(
            Table(members[0].runs[0].data, ["experiment", "seed", *metrics, "parameters", "seconds", "run"], rows)
        )
    return tables


def _comparable(groups: list[Group]) -> list[list[Group]]:
    """Put groups together that were tested by the same metrics on the same data."""
    tables: dict[tuple[str, tuple[str, ...]], list[Group]] = {}
    for group in groups:
        tables.setdefault((group.data, tuple(sorted(group.metrics))), []).append(group)
    return list(tables.values())


def as_text(table: Table) -> str:
    """Return a table as text: names to the left, numbers to the right."""
    header, rows = table.header, table.rows
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    left = {0, len(header) - 1} if header[-1] == "run" else {0}

    def line(row: list[str]) -> str:
        cells = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join([f"on {table.data}", "", line(header), line(["-" * w for w in widths]), *map(line, rows)])


def _best(members: list[tuple[Group, float]], metric: str) -> set[int]:
    """Return where the best of several values is; nowhere, if there is only one, or if they do not compare."""
    values = [value for _, value in members]
    if len(values) < 2 or len({group.kind(metric) for group, _ in members}) > 1:
        return set()
    best = (min if members[0][0].less_is_better(metric) else max)(filter(math.isfinite, values), default=None)
    return {i for i, value in enumerate(values) if value == best}
