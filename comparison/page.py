"""One HTML page that holds everything it shows, plotly.js included: it opens without a server or a network."""

import base64
import io
import itertools
import json
import os
import time
import urllib.parse
from pathlib import Path

from comparison.panels import what_to_show
from comparison.records import Record
from comparison.statistics import Group, compare, differing_keys, with_interval
from runner.files import write_whole

TEMPLATE = Path(__file__).with_name("page.html")
COLORS = ("#3b82c4", "#e07a1f", "#3a9d5d", "#c8453b", "#8b6cc4", "#9a6a4f", "#d46fb0", "#7f8791", "#a3a32b", "#2aa7b8")
MOST_POINTS = 120_000  # of all curves together: more than the eye can tell apart, and the file stays small
MOST_PAIRED = 60  # experiments, up to which a sentence is written for each pair
PICTURE_WIDTH = 560  # pixels
PICTURE_BYTES = 8_000_000  # of all pictures together


def write_page(path: Path, records: list[Record], groups: list[Group]) -> int:
    """Write the page.

    Args:
        path: of the file.
        records: all runs, those with a problem, too.
        groups: those that are compared.

    Returns:
        Its size in bytes.

    Raises:
        OSError: it cannot be written.
    """
    from plotly.offline import get_plotlyjs

    data = json.dumps(page_data(path, records, groups), allow_nan=False, separators=(",", ":"))
    page = TEMPLATE.read_text().replace("/*PLOTLY*/", get_plotlyjs()).replace("/*DATA*/", data.replace("</", "<\\/"))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = page.encode()
    write_whole(path, content)
    return len(content)


def page_data(path: Path, records: list[Record], groups: list[Group]) -> dict:
    """Return what the page's script draws, as plain types."""
    shown = [run for group in groups for run in group.runs]
    # a run that has not finished has no place in the averages, but its curves can be looked at
    unfinished = [record for record in records if record.problem and record.history]
    group_of = {id(run): i for i, group in enumerate(groups) for run in group.runs}
    series = sum(len({row["metric"] for row in run.history}) for run in shown + unfinished)
    points = max(20, MOST_POINTS // max(1, series))
    runs = []
    for run in shown + unfinished:
        group = group_of.get(id(run), -1)
        label = f"{groups[group].name if group >= 0 else run.experiment} s{run.seed}"
        runs.append(
            {
                "label": label + (" (unfinished)" if group < 0 else ""),
                "group": group,
                "seed": run.seed,
                "color": COLORS[group % len(COLORS)] if group >= 0 else "#7f8791",
                "metrics": _finite(run.metrics),
                "parameters": run.parameters,
                "seconds": _finite({"fit": run.seconds})["fit"],
                "folder": str(run.folder),
                "curves": _curves(run, points),
            }
        )
    keys = differing_keys([group.runs[0].config for group in groups])
    panels = what_to_show(shown + unfinished)
    return {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "metrics": list(dict.fromkeys(metric for group in groups for metric in group.metrics)),
        "curves": panels.curves,
        "groups": [
            {
                "name": group.name,
                "color": COLORS[i % len(COLORS)],
                "n": len(group.runs),
                "kinds": {metric: " ".join(group.kind(metric)) for metric in group.metrics},
                "source": group.runs[0].data,
                "means": _finite({m: group.mean(m) for m in group.metrics}),
                "texts": {m: with_interval(group.mean(m), group.interval(m)) for m in group.metrics},
                "less": [metric for metric in group.metrics if group.less_is_better(metric)],
                "parameters": group.runs[0].parameters,
                "seconds": _finite({"mean": group.seconds})["mean"],
                "config": [str(group.runs[0].config.get(key, "")) for key in keys],
            }
            for i, group in enumerate(groups)
        ],
        "keys": keys,
        "runs": runs,
        "verdicts": _verdicts(groups),
        "pictures": _pictures(path, groups, panels.pictures),
        "left_out": [{"folder": str(r.folder), "problem": r.problem} for r in records if r.problem],
    }


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {name: value if abs(value) < float("inf") else None for name, value in values.items()}


def _curves(run: Record, most: int) -> dict[str, dict[str, list]]:
    """Return step, epoch and value of each metric that was logged in training, thinned to `most` points."""
    rows: dict[str, list[dict]] = {}
    for row in run.history:
        if row["metric"].startswith(("train/", "val/")):
            rows.setdefault(row["metric"], []).append(row)
    if not rows:
        return {}
    # a run that was stopped in an epoch has rows of it: count in whole ones, such as those that were validated
    whole = [row for name, points in rows.items() if name.startswith("val/") for row in points]
    whole = whole or [row for points in rows.values() for row in points]
    last = max(whole, key=lambda row: row["step"])
    steps_an_epoch = max(1, (last["step"] + 1) / max(1, last["epoch"] + 1))
    curves = {}
    for metric, points in rows.items():
        every = max(1, -(-len(points) // most))
        kept = points[::-1][::every][::-1]  # the last one always
        curves[metric] = {
            "step": [row["step"] for row in kept],
            "epoch": [round((row["step"] + 1) / steps_an_epoch, 3) for row in kept],
            "y": [float(f"{v:.5g}") if abs(v := row["value"]) < float("inf") else None for row in kept],
        }
    return curves


def _verdicts(groups: list[Group]) -> dict[str, list[str]]:
    """Return sentences for each pair of experiments, a metric each: "0,3" -> [...]."""
    if len(groups) > MOST_PAIRED:
        return {}
    verdicts = {}
    for (i, a), (j, b) in itertools.combinations(enumerate(groups), 2):
        shared = [metric for metric in a.metrics if metric in b.metrics]
        verdicts[f"{i},{j}"] = [compare(a, b, metric) for metric in shared] or ["They share no metric."]
    return verdicts


def _pictures(page: Path, groups: list[Group], names: list[str]) -> list[dict]:
    """Return the pictures of each experiment's first run, made small, until the file would grow too large."""
    from PIL import Image

    pictures, total = [], 0
    for name in names:
        for i, group in enumerate(groups):
            file = group.runs[0].pictures.get(name)
            if not file or total > PICTURE_BYTES:
                continue
            try:
                with Image.open(file) as image:
                    small = image.convert("RGB")
                    small.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
                    content = io.BytesIO()
                    small.save(content, "WEBP", quality=80)
            except Exception:  # damaged, no picture, or larger than Pillow thinks safe
                continue
            total += content.tell()
            source = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
            link = urllib.parse.quote(os.path.relpath(file.resolve(), page.resolve().parent))
            pictures.append({"name": name, "group": i, "seed": group.runs[0].seed, "src": source, "link": link})
    return pictures
