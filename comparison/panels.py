"""What a comparison shows, whether on the page or in Weights & Biases."""

from dataclasses import dataclass

from comparison.records import Record


@dataclass
class Panels:
    """The specification of both views.

    Attributes:
        results: test metrics, a column or a bar chart each.
        curves: metrics of training and validation without their stage (`loss`), a chart each.
        pictures: names of pictures, a row each.
    """

    results: list[str]
    curves: list[str]
    pictures: list[str]


def what_to_show(runs: list[Record]) -> Panels:
    """Return everything that any of the runs has, each once, in the order of its first appearance."""
    logged = (row["metric"].partition("/") for run in runs for row in run.history)
    return Panels(
        results=list(dict.fromkeys(name for run in runs for name in run.metrics)),
        curves=list(dict.fromkeys(name for stage, _, name in logged if stage in ("train", "val"))),
        pictures=list(dict.fromkeys(name for run in runs for name in run.pictures)),
    )
