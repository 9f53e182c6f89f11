"""The page's view as a saved view in Weights & Biases."""

from comparison.panels import Panels, what_to_show
from comparison.records import Record
from comparison.statistics import Group
from runner.account import PROJECT, wandb_mode
from runner.errors import InputError, one_line


def publish(records: list[Record], groups: list[Group]) -> str:
    """Save a view of the experiments' runs in Weights & Biases, and return its address.

    Raises:
        InputError: there is no account to save it in, or nobody answers.
    """
    if not groups:
        raise InputError("--publish: there is no finished run to show")
    if (mode := wandb_mode()) != "online":
        why = "no key is configured: run `wandb login`" if mode == "offline" else f"WANDB_MODE is {mode}: unset it"
        root = groups[0].runs[0].folder.parent.parent
        raise InputError(
            f"--publish needs an account at Weights & Biases, and {why}; then send the runs that were made offline: "
            f"wandb sync {root / 'wandb'}/offline-run-*"
        )
    import wandb

    try:
        entity = wandb.Api().default_entity
        return (
            workspace(what_to_show(records), sorted({group.runs[0].experiment for group in groups}), entity).save().url
        )
    except Exception as error:  # wandb raises many kinds for a wrong key, no network, a project that is not there
        raise InputError(f"--publish: Weights & Biases: {one_line(error)[:200]}") from error


def workspace(panels: Panels, experiments: list[str], entity: str):
    """Return the view, not yet sent: the same panels as the page, of runs whose group is one of `experiments`."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    by_experiment = {"groupby": "Group", "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    results = [wr.BarPlot(title=name, metrics=[name], **by_experiment) for name in panels.results]
    curves = [
        wr.LinePlot(title=name, x="trainer/global_step", y=[f"train/{name}", f"val/{name}"], legend_position="south")
        for name in panels.curves
    ]
    pictures = [wr.MediaBrowser(title=name, media_keys=[f"pictures/{name}"]) for name in panels.pictures]
    sections = {
        "Results": results,
        "Learning curves": curves,
        "What differs between the configurations": [wr.RunComparer(diff_only="split")],
        "Pictures": pictures,
    }
    return ws.Workspace(
        entity=entity,
        project=PROJECT,
        name="compare: " + ", ".join(experiments)[:80],
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items() if panels],
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group").isin(experiments)), groupby=[ws.Metric("Group")]
        ),
    )
