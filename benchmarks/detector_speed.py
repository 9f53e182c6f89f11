"""Milliseconds a picture of detectors, in training and in test: in turns, A B A B ..., in one process, on the same pictures.

    python benchmarks/detector_speed.py shapes_rcnn shapes_fast_rcnn
    python benchmarks/detector_speed.py shapes_rcnn shapes_fast_rcnn --rounds 9

A training round is some steps of forward pass, losses, backward pass and optimiser; a test round, from the pictures to the boxes
that are kept. Both are run with the experiment's own settings and precision, without the Trainer; proposals are there already.
The first experiment is the one that the others' ratios are to, round by round.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from runner import arguments as command_line
from runner.cli import Experiment
from runner.errors import InputError


class Contender:
    """An experiment's detector, with some batches of its data in memory.

    Args:
        name: of the experiment.
        overrides: of its settings, `--data.train_size=100`.
        batches: for a round of training, and of test.
    """

    def __init__(self, name: str, overrides: list[str], batches: int):
        experiment = Experiment(command_line.parse([str(ROOT / "experiments" / f"{name}.yaml"), *overrides]))
        torch.manual_seed(experiment.seed)
        experiment.load_data()
        self.name, self.model, data = name, experiment.model, experiment.datamodule
        self.half = "bf16" in str(experiment.config["trainer"]["precision"])
        if self.model.channels_last:
            self.model.to(memory_format=torch.channels_last)
        made = self.model.configure_optimizers()
        self.optimizer = made["optimizer"] if isinstance(made, dict) else made
        data.trainer = SimpleNamespace(training=True, lightning_module=self.model)
        self.train_batches = _some(data, data.train_dataloader(), batches)
        data.trainer.training = False  # which flips pictures
        self.test_batches = _some(data, data.test_dataloader(), batches)

    def train(self) -> float:
        """Train on the batches; return milliseconds a picture."""
        self.model.train()
        start = time.perf_counter()
        for images, targets in self.train_batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
                loss = sum(self.model.losses(images, targets).values())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return 1000 * (time.perf_counter() - start) / sum(len(images) for images, _ in self.train_batches)

    @torch.inference_mode()
    def test(self) -> float:
        """Find what is in the batches; return milliseconds a picture."""
        self.model.eval()
        start = time.perf_counter()
        for images, targets in self.test_batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
                self.model(images, targets)
        return 1000 * (time.perf_counter() - start) / sum(len(images) for images, _ in self.test_batches)


def _some(data, loader, count: int) -> list[tuple]:
    """Return the first batches, as the network gets them."""
    return [data.on_after_batch_transfer(batch, 0) for _, batch in zip(range(count), loader, strict=False)]


def spread(values: list[float]) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", help="names, without folder and .yaml")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: 7)")
    parser.add_argument("--batches", type=int, default=4, help="in a round (default: 4)")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        if min(arguments.rounds, arguments.batches) < 1:
            raise InputError("--rounds and --batches start at 1")
        contenders = [Contender(name, overrides, arguments.batches) for name in arguments.experiments]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"milliseconds a picture, on {os.cpu_count()} CPUs: median (least to most) of {arguments.rounds} rounds")
    for what in ("train", "test"):
        taken: dict[str, list[float]] = {c.name: [] for c in contenders}
        for i in range(arguments.rounds + 1):
            for contender in contenders:
                taken[contender.name].append(getattr(contender, what)())
            told = "  ".join(f"{name} {values[-1]:.1f}" for name, values in taken.items())
            print(f"  {what} round {i}: {told}{'' if i else ' (does not count)'}", flush=True)
        first = taken[contenders[0].name][1:]
        for name, values in taken.items():
            ratios = [a / b for a, b in zip(first, values[1:], strict=True)]
            print(
                f"{what:5}  {name:24}  {spread(values[1:])}  {contenders[0].name} takes {spread(ratios)} times as long"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
