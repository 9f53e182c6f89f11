"""Seconds from the command to the end of the first training step, beside those of importing Lightning: A B A B ...

A  python train.py experiments/mnist_mlp.yaml, until its first step is done
B  python -c "import pytorch_lightning"

    python benchmarks/startup_time.py
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytorch_lightning import Callback

ROOT = Path(__file__).parent.parent
ROUNDS = 5


class EndAfterFirstStep(Callback):
    """Ends the process, as abruptly as can be."""

    def on_train_batch_end(self, *_) -> None:
        """Do it."""
        os._exit(0)


def seconds(*command: str) -> float:
    """Run a command in the repository, and return how long it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Run and print."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as runs:
        os.environ |= {"RUNS_DIR": runs, "WANDB_MODE": "offline"}
        callback = "--trainer.callbacks=benchmarks.startup_time.EndAfterFirstStep"
        pairs = []
        for i in range(ROUNDS + 1):  # the first one fills the disk's cache
            pairs.append(
                (seconds("train.py", "experiments/mnist_mlp.yaml", callback), seconds("-c", "import pytorch_lightning"))
            )
            print("A {:.2f} s  B {:.2f} s".format(*pairs[-1]), "" if i else "(not counted)", flush=True)
    ours, importing = zip(*pairs[1:], strict=True)
    print(f"\nmedian of {ROUNDS}: first step after {statistics.median(ours):.2f} s, import {statistics.median(importing):.2f} s, "
          f"A / B {statistics.median(a / b for a, b in pairs[1:]):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
