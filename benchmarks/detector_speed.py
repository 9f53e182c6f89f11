"""Milliseconds a picture of detectors, in training and in test: in turns, A B A B ..., in one process, on the same pictures.

    python benchmarks/detector_speed.py shapes_rcnn shapes_fast_rcnn
    python benchmarks/detector_speed.py shapes_rcnn shapes_fast_rcnn --rounds 9
    python benchmarks/detector_speed.py shapes_faster_rcnn shapes_retinanet shapes_fcos --torchvision
    python benchmarks/detector_speed.py shapes_fast_rcnn --share --trained runs

A training round is some steps of forward pass, losses, backward pass and optimiser; a test round, from the pictures to the boxes
that are kept. Both are run with the experiment's own settings and precision, without the Trainer; proposals are there already.
The first experiment is the one that the others' ratios are to, round by round.

--torchvision adds to each experiment torchvision's detector on the same backbone, with the same weights, settings, optimiser,
batches and precision; its ratio is to that experiment. `torchvision_detectors.py` says what is the same and what is not.

--share says how long mean average precision takes after an epoch: all pictures of validation are put into the metric and
computed, once with what the network finds, and once with as many random boxes a picture as it may find at all; in per cent of
an epoch's training steps, which are the median round's, for all training pictures. A new network finds next to nothing, or
a lot: `--trained runs` loads the newest `runs/<experiment>/*/best.ckpt`.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from runner import arguments as command_line
from runner.cli import Experiment
from runner.errors import InputError, one_line


class Contender:
    """An experiment's detector, with some batches of its data in memory.

    Args:
        name: of the experiment.
        overrides: of its settings, `--data.train_size=100`.
        batches: for a round of training, and of test.
        trained: a folder of runs, the newest of which the weights come from; None: they are new.
    """

    def __init__(self, name: str, overrides: list[str], batches: int, trained: Path | None = None):
        experiment = Experiment(command_line.parse([str(ROOT / "experiments" / f"{name}.yaml"), *overrides]))
        torch.manual_seed(experiment.seed)
        experiment.load_data()
        self.name, self.model, self.data = name, experiment.model, experiment.datamodule
        if trained:
            _load_newest(self.model, trained / name)
        data = self.data
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

    def beside(self, side: int) -> "Contender":
        """Return torchvision's detector with the same weights, settings and batches; pictures have this longest side.

        Raises:
            InputError: torchvision has none like it.
        """
        from torchvision_detectors import TorchvisionDetector

        other = copy.copy(self)
        other.name, other.model = f"{self.name} (torchvision)", TorchvisionDetector(self.model, side)
        if self.model.channels_last:
            other.model.to(memory_format=torch.channels_last)
        other.optimizer = self.model.optimizer(p for p in other.model.parameters() if p.requires_grad)
        return other

    @torch.inference_mode()
    def test(self) -> float:
        """Find what is in the batches; return milliseconds a picture."""
        self.model.eval()
        start = time.perf_counter()
        for images, targets in self.test_batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
                self.model(images, targets)
        return 1000 * (time.perf_counter() - start) / sum(len(images) for images, _ in self.test_batches)

    @torch.inference_mode()
    def find(self) -> tuple[list[list[dict]], list[list[dict]]]:
        """Return what is found in each batch of validation, and its targets."""
        self.model.eval()
        self.data.trainer.training = False
        found, wanted = [], []
        for batch in self.data.val_dataloader():
            images, targets = self.data.on_after_batch_transfer(batch, 0)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
                found.append(self.model(images, targets))
            wanted.append(targets)
        return found, wanted

    def most(self, wanted: list[list[dict]]) -> list[list[dict]]:
        """Return as many random boxes a picture as the detector may find."""
        return [
            [_random_boxes(self.model.max_detections, self.model.num_classes, t["size"]) for t in ts] for ts in wanted
        ]

    def metric(self, found: list[list[dict]], wanted: list[list[dict]]) -> float:
        """Return the seconds of validation's mean average precision, from detections to numbers."""
        metric = self.model.val_map
        metric.reset()
        start = time.perf_counter()
        for batch, targets in zip(found, wanted, strict=True):
            self.model.update_map(metric, batch, targets)
        metric.compute()
        seconds = time.perf_counter() - start
        metric.reset()
        return seconds


def _random_boxes(count: int, classes: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return detections of a picture of this height and width."""
    corners = torch.rand(count, 2, 2) * torch.tensor([size[1], size[0]])  # (count, 2 corners, x and y)
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    return {"boxes": boxes, "scores": torch.rand(count), "labels": torch.randint(classes, (count,))}


def _load_newest(model: torch.nn.Module, runs: Path) -> None:
    """Load the weights of the newest run in an experiment's folder."""
    files = sorted(runs.glob("*/best.ckpt"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise InputError(f"--trained: there is no {runs}/*/best.ckpt: python train.py experiments/{runs.name}.yaml")
    try:
        model.load_state_dict(torch.load(files[-1], map_location="cpu", weights_only=False)["state_dict"])
    except RuntimeError as error:  # other shapes, or names
        raise InputError(f"--trained: {files[-1]} is of another model: {one_line(error)}") from error


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
    parser.add_argument("--torchvision", action="store_true", help="torchvision's detectors beside ours")
    parser.add_argument("--share", action="store_true", help="how long mean average precision takes, too")
    parser.add_argument("--trained", type=Path, metavar="RUNS", help="a folder of runs to take weights from")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        if min(arguments.rounds, arguments.batches) < 1:
            raise InputError("--rounds and --batches start at 1")
        ours = [Contender(name, overrides, arguments.batches, arguments.trained) for name in arguments.experiments]
        contenders, compared_to = [], {}
        for contender in ours:
            contenders.append(contender)
            compared_to[contender.name] = ours[0].name
            if arguments.torchvision:
                batches = contender.train_batches + contender.test_batches
                contenders.append(contender.beside(max(max(images.shape[-2:]) for images, _ in batches)))
                compared_to[contenders[-1].name] = contender.name
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"milliseconds a picture, on {os.cpu_count()} CPUs: median (least to most) of {arguments.rounds} rounds")
    for what in ("train", "test"):
        taken = in_turns(contenders, what, arguments.rounds)
        for name, values in taken.items():
            other = compared_to[name]
            ratios = [a / b for a, b in zip(taken[other], values, strict=True)]
            print(f"{what:5}  {name:24}  {spread(values)}  {other} takes {spread(ratios)} times as long")
        if what == "train" and arguments.share:
            for contender in ours:
                print_share(contender, statistics.median(taken[contender.name]), arguments.rounds)
    return 0


def in_turns(contenders: list[Contender], what: str, rounds: int) -> dict[str, list[float]]:
    """Return each contender's milliseconds a picture, round by round; the first of the rounds does not count."""
    taken: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in range(rounds + 1):
        for contender in contenders:
            taken[contender.name].append(getattr(contender, what)())
        told = "  ".join(f"{name} {values[-1]:.1f}" for name, values in taken.items())
        print(f"  {what} round {i}: {told}{'' if i else ' (does not count)'}", flush=True)
    return {name: values[1:] for name, values in taken.items()}


def print_share(contender: Contender, milliseconds: float, rounds: int) -> None:
    """Print how long mean average precision takes, and of how long an epoch of training steps."""
    epoch = milliseconds / 1000 * len(contender.data.train_set)
    found, wanted = contender.find()
    pictures = sum(map(len, wanted))
    for what, boxes in (("those found", found), ("random ones, the most there may be", contender.most(wanted))):
        seconds = statistics.median(contender.metric(boxes, wanted) for _ in range(rounds))
        each = sum(len(f["boxes"]) for batch in boxes for f in batch) / pictures
        print(
            f"share  {contender.name:24}  mAP of {pictures} pictures with {each:.1f} boxes each ({what}) takes "
            f"{seconds:.2f} s, an epoch's training steps {epoch:.2f} s: {100 * seconds / epoch:.1f} %"
        )


if __name__ == "__main__":
    sys.exit(main())
