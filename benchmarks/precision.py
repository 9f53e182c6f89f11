"""Does half precision change a result? A model of each kind, three seeds each in `32-true` and in `bf16-mixed`.

    python benchmarks/precision.py [KIND ...]

Prints a row a kind: mean ± standard deviation over the seeds, and whether the means differ by no more than such seeds do by
chance (Welch's t-test, 95 %). Runs are short, of 2 seconds to 2 minutes, and go to a temporary folder. `16-mixed` is for GPUs:
there, --gpu adds its column.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import ttest_ind

sys.path.insert(0, str(Path(__file__).parent.parent))

KINDS = {  # experiment, metric, what makes it short
    "classifier": ("mnist_lenet", "acc", {"trainer.max_epochs": 2, "model.lr_scheduler.total_steps": 1100}),
    "regressor": ("curve_fit", "mse", {}),
    "detector": ("shapes_fast_rcnn_pool", "map_50", {"trainer.max_epochs": 4, "model.lr_scheduler.total_steps": 500}),
    "segmenter": (
        "shapes_unet",
        "miou",
        {"data.train_size": 2000, "data.val_size": 50, "trainer.max_epochs": 2, "model.lr_scheduler.total_steps": 500},
    ),
    "series": ("series_lstm", "mse", {}),
    "language": ("text_transformer", "loss", {"trainer.max_epochs": 1, "model.lr_scheduler.total_steps": 500}),
    "translation": ("dates_attention", "exact", {"trainer.max_epochs": 3, "model.lr_scheduler.total_steps": 471}),
    "vision transformer": (
        "mnist_vit",
        "acc",
        {"trainer.max_epochs": 1, "model.lr_scheduler.warmup_steps": 50, "model.lr_scheduler.total_steps": 430},
    ),
    "autoencoder": ("mnist_autoencoder", "mse", {"trainer.max_epochs": 2}),
    "gan": ("mnist_cgan", "frechet", {"trainer.max_epochs": 1}),
    "graph": ("cora_gcn", "acc", {}),
}


def run(experiment: str, overrides: dict[str, object]) -> dict[str, float]:
    """Return a run's metrics."""
    from train import main

    argv = [f"experiments/{experiment}.yaml", *(f"--{key}={value}" for key, value in overrides.items())]
    before = set(Path(os.environ["RUNS_DIR"]).glob("*/*/receipt.json"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(argv)
    if code:
        raise SystemExit(said.getvalue())
    (receipt,) = set(Path(os.environ["RUNS_DIR"]).glob("*/*/receipt.json")) - before
    return json.loads(receipt.read_text())["metrics"]


def verdict(plain: list[float], other: list[float]) -> str:
    """Tell whether two samples differ by more than chance."""
    if mean(plain) == mean(other):
        return "the same"
    return "within the band" if ttest_ind(plain, other, equal_var=False).pvalue > 0.05 else "apart"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"(default: all: {', '.join(KINDS)})")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true", help="on a GPU, and 16-mixed, too")
    asked = parser.parse_args()
    if unknown := set(asked.kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")

    halves = ["bf16-mixed", *["16-mixed"] * asked.gpu]
    print(f"| kind | experiment, cut short | metric | 32-true | {' | '.join(f'{half} | ' for half in halves)} |")
    print("|---" * (4 + 2 * len(halves)) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "disabled", "RUNS_DIR": folder}
        for kind in asked.kinds or KINDS:
            experiment, name, short = KINDS[kind]
            values = {precision: [] for precision in ("32-true", *halves)}
            for seed in range(1, asked.seeds + 1):
                for precision, results in values.items():
                    print(f"{kind}, seed {seed}, {precision} ...", file=sys.stderr, flush=True)
                    where = {"trainer.accelerator": "gpu" if asked.gpu else "cpu"}
                    set_to = {**short, **where, "trainer.precision": precision, "seed_everything": seed}
                    results.append(run(experiment, set_to)[f"test/{name}"])
            plain, *others = values.values()
            cells = [f"{mean(half):.4g} ± {stdev(half):.2g} | {verdict(plain, half)}" for half in others]
            print(
                f"| {kind} | {experiment} | {name} | {mean(plain):.4g} ± {stdev(plain):.2g} | {' | '.join(cells)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
