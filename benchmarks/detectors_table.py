"""Compare all detectors: a table of how good they are, how large, and how fast.

    python benchmarks/detectors_table.py --trained runs     measure images a second, keep and print them
    python benchmarks/detectors_table.py --write            measure nothing: put the table into the README

mAP, parameters and minutes come from results.jsonl, where `results.py` puts them: of each experiment the newest runs with the
same code and settings; mAP is the mean over their seeds, and minutes are the least, as in the README's other table. Images a
second at test are measured here, all detectors in turns in one process, with each experiment's settings and precision; of the
median round. They are kept in detectors.json, unless settings are overridden (`--data.test_size=100`). The search for
proposals is not in them; how long it takes is measured by itself, in one process, and said below the table.

How many boxes a network finds depends on its weights, and the time of non-maximum suppression on these: `--trained` takes
those of the newest run of each experiment; without it, they are new.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from detector_speed import Contender, in_turns
from results import NEEDED, RESULTS

from runner.errors import InputError
from runner.files import read_json_lines, write_whole

README, SPEED = ROOT / "README.md", Path(__file__).with_name("detectors.json")
BEGIN, END = "<!-- detectors -->", "<!-- /detectors -->"
DETECTORS = {  # what the rest of its experiments' names is: shapes_<>, bccd_<>
    "sliding_window": "sliding window",
    "rcnn": "R-CNN",
    "fast_rcnn": "Fast R-CNN",
    "faster_rcnn": "Faster R-CNN",
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
    "yolo": "YOLO",
    "detr": "DETR",
}
NEED_PROPOSALS = ("rcnn", "fast_rcnn")
NOT_ON_BCCD = ("sliding_window", "rcnn", "detr")
PICTURES = 20  # that proposals are searched in, to see how long it takes


def measure(overrides: list[str], rounds: int, batches: int, trained: Path | None = None) -> dict:
    """Return images a second of each detector on shapes, and milliseconds of the search for proposals.

    Args:
        overrides: of the experiments' settings.
        rounds: that count.
        batches: of each round.
        trained: see `Contender`.
    """
    contenders = [Contender(f"shapes_{name}", overrides, batches, trained) for name in DETECTORS]
    taken = in_turns(contenders, "test", rounds)
    data = next(c.data for c in contenders if c.name == "shapes_rcnn")
    return {
        "images_per_second": {name: round(1000 / statistics.median(values), 2) for name, values in taken.items()},
        "proposals_ms": round(search_ms(data), 2),
        "cpus": os.cpu_count(),
        "rounds": rounds,
        "batch_size": len(contenders[0].test_batches[0][0]),
        "trained": trained is not None,
    }


def search_ms(data) -> float:
    """Return the milliseconds that proposals of a picture take, the median of some."""
    taken = []
    for image in data.test_set.tensors[0][:PICTURES]:
        start = time.perf_counter()
        data.proposals(image.numpy())
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def table(records: list[dict], speed: dict) -> str:
    """Return the table in Markdown, and a line on how it was measured.

    Args:
        records: of results.jsonl, in the order they were measured.
        speed: what `measure` returns; or empty.
    """
    heads = ("detector", "shapes: mAP@0.5", "mAP@[.5:.95]", "parameters", "training minutes", "images/s at test",
             "BCCD: mAP@0.5", "mAP@[.5:.95]", "training minutes")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, title in DETECTORS.items():
        map_50, map_all, minutes, parameters = numbers(f"shapes_{name}", records)
        per_second = speed.get("images_per_second", {}).get(f"shapes_{name}")
        told = (
            "not measured" if per_second is None else f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.1f}"
        )
        if per_second is not None and name in NEED_PROPOSALS:
            told += " ¹"
        on_bccd = ("–",) * 3 if name in NOT_ON_BCCD else numbers(f"bccd_{name}", records)[:3]
        lines.append("| " + " | ".join((title, map_50, map_all, parameters, minutes, told, *on_bccd)) + " |")
    if speed:
        weights = "trained" if speed["trained"] else "new"
        lines += [
            "",
            f"Images/s: {speed['cpus']} CPU cores, batches of {speed['batch_size']}, {weights} networks, all in turns, "
            f"median of {speed['rounds']} rounds. Training was on as many cores as the experiment's header says.",
            f"¹ Selective Search is not included: {speed['proposals_ms']:.0f} ms a picture more.",
        ]
    return "\n".join(lines)


def numbers(name: str, records: list[dict]) -> tuple[str, str, str, str]:
    """Return mAP@0.5, mAP@[.5:.95], minutes and parameters of an experiment's newest runs, to be printed."""
    mine = [r for r in records if r["experiment"] == name]
    newest = {r["seed"]: r for r in mine if r["key"] == mine[-1]["key"]}.values()
    if not newest or not all({"test/map_50", "test/map"} <= r["metrics"].keys() for r in newest):
        return ("not measured",) * 4
    map_50, map_all = (statistics.mean(r["metrics"][m] for r in newest) for m in ("test/map_50", "test/map"))
    minutes = min(r["seconds"]["fit"] for r in newest) / 60
    parameters = next(r["parameters"] for r in newest) / 1e6
    return f"{map_50:.3f}", f"{map_all:.3f}", f"{minutes:.1f}", f"{parameters:.2f} M"


def write(text: str, file: Path) -> None:
    """Put the table between the file's marks.

    Raises:
        InputError: it has none.
    """
    before = file.read_text()
    if not re.search(f"{BEGIN}.*?{END}", before, flags=re.S):
        raise InputError(f"{file.name} has no place for the table: write {BEGIN} and, below it, {END}")
    after = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text}\n{END}", before, count=1, flags=re.S)
    if after != before:
        write_whole(file, after.encode())


def main(argv: list[str] | None = None) -> int:
    """Measure, or write; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="measure nothing, and write the README's table")
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: 5)")
    parser.add_argument("--batches", type=int, default=2, help="in a round (default: 2)")
    parser.add_argument("--trained", type=Path, metavar="RUNS", help="a folder of runs to take weights from")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        if arguments.write and overrides:
            raise InputError(f"--write measures nothing: leave out {' '.join(overrides)}")
        if min(arguments.rounds, arguments.batches) < 1:
            raise InputError("--rounds and --batches start at 1")
        if arguments.write:
            speed = json.loads(SPEED.read_text()) if SPEED.exists() else {}
        else:
            speed = measure(overrides, arguments.rounds, arguments.batches, arguments.trained)
            if not overrides:
                write_whole(SPEED, (json.dumps(speed, indent=2) + "\n").encode())
        text = table(read_json_lines(RESULTS, NEEDED), speed)
        print(text)
        if arguments.write:
            write(text, README)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
