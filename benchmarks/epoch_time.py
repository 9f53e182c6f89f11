"""Seconds for an epoch of experiments/mnist_mlp.yaml, three ways, paired: A B C A B C ... in one process.

A  this project's: `train.py`'s own Trainer with every callback, metrics.csv, wandb (offline), checkpoints
B  a plain PyTorch loop over the same in-memory batches
C  the classic way, as in the notes: torchvision's MNIST with ToTensor through a default DataLoader, Adam as it is by
   default, the loss asked for at every step
D  the classic way with our optimiser, to tell what of C's time is the data's

Each trains the same network on 55,000 pictures in batches of 100 and validates on 5,000; all but C have the
experiment's optimiser, Adam with `fused: true`. A trains for some epochs; between two of them the others train for one.

    python benchmarks/epoch_time.py
    python benchmarks/epoch_time.py --epochs 10
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
import torchvision
from pytorch_lightning import Callback
from torch.utils.data import DataLoader, Subset

import train
from callbacks.progress import Progress
from datamodules.mnist import MNIST
from lit_models.mlp import MLP
from runner.arguments import Arguments
from runner.cli import Experiment
from runner.run import Run

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "mnist_mlp.yaml"
BATCH = 100


def network(fused: bool = True) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The experiment's network, and its optimiser or the default one."""
    net = MLP((784, 512, 512, 10))
    return net, torch.optim.Adam(net.parameters(), lr=1e-3, **({"fused": True} if fused else {}))


def train_step(net, optimizer, images, labels) -> torch.Tensor:
    """What every training loop does; returns the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def plain_loop(data: MNIST) -> Callable[[], None]:
    """B: return a function that trains for an epoch and validates."""
    net, optimizer = network()
    (images, labels), (val_images, val_labels) = data.train_set.tensors, data.val_set.tensors

    def epoch() -> None:
        net.train()
        for index in torch.randperm(len(images)).split(BATCH):
            train_step(net, optimizer, images[index].float().div_(255), labels[index])
        net.eval()
        with torch.inference_mode():
            pairs = zip(val_images.split(1000), val_labels.split(1000), strict=True)
            right = sum((net(x.float().div_(255)).argmax(1) == y).sum() for x, y in pairs)
        assert right > 0

    return epoch


def classic(data: MNIST, fused: bool) -> Callable[[], None]:
    """C and D: return a function that trains for an epoch and validates."""
    net, optimizer = network(fused)
    dataset = torchvision.datasets.MNIST(data.folder.parent.parent, transform=torchvision.transforms.ToTensor())
    train_set = Subset(dataset, range(len(data.train_set)))
    val_set = Subset(dataset, range(len(data.train_set), len(data.train_set) + len(data.val_set)))
    loader, val_loader = DataLoader(train_set, BATCH, shuffle=True), DataLoader(val_set, BATCH)

    def epoch() -> None:
        net.train()
        loss_sum = 0.0
        for images, labels in loader:
            loss_sum += train_step(net, optimizer, images, labels).item()
        net.eval()
        with torch.inference_mode():
            right = sum((net(images).argmax(1) == labels).sum() for images, labels in val_loader)
        assert right > 0

    return epoch


class Paired(Callback):
    """Times the Trainer's epochs, validation, logging and checkpoints included, and the others in between."""

    def __init__(self, others: dict[str, Callable[[], None]]):
        self.others, self.seconds = others, {name: [] for name in ("A", *others)}
        self.start = None

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        """End our last epoch, give the others theirs, start our next."""
        self.stop()
        for name, epoch in self.others.items():
            start = time.perf_counter()
            epoch()
            self.seconds[name].append(time.perf_counter() - start)
        print("  ".join(f"{name} {times[-1]:.2f} s" for name, times in self.seconds.items() if times), flush=True)
        self.start = time.perf_counter()

    def on_train_end(self, trainer, pl_module) -> None:
        """End our last epoch."""
        self.stop()

    def stop(self) -> None:
        """Note the seconds since our epoch began."""
        if self.start is not None:
            self.seconds["A"].append(time.perf_counter() - self.start)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=7, help="of each, after one that does not count (default: 7)")
    arguments, overrides = parser.parse_known_args()  # the others are the experiment's, as on train.py's command line

    with tempfile.TemporaryDirectory() as runs:
        os.environ |= {"RUNS_DIR": runs, "WANDB_MODE": "offline"}
        epochs = ["--trainer.max_epochs", str(arguments.epochs + 1)]
        experiment = Experiment(Arguments(EXPERIMENT, "epoch_time", [*overrides, *epochs]))
        data = experiment.datamodule
        data.prepare_data()
        if not data.folder.exists():
            print(f"error: this needs MNIST's own files in {data.folder}", file=sys.stderr)
            return 2
        data.setup()
        train.print_what_runs(experiment)
        paired = Paired({"B": plain_loop(data), "C": classic(data, fused=False), "D": classic(data, fused=True)})
        experiment.config_init["trainer"]["callbacks"] = [paired]
        run = Run.create("epoch_time", experiment.seed)
        run.begin(experiment, None)
        train.fit(experiment, run.folder, Progress(), run.loggers)
        run.finish()

    seconds = {name: times[1:] for name, times in paired.seconds.items()}  # the first one warms up
    print(f"\n{arguments.epochs} epochs of each, on {torch.get_num_threads()} threads: median (least to most)")
    for name, what in (("A", "this project"), ("B", "plain loop"), ("C", "classic"), ("D", "classic, fused")):
        print(f"{name}  {what:14}  {spread(seconds[name])} s")
    for over, under in ("AB", "CA", "DA", "CB"):
        print(
            f"{over} / {under}            {spread([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])}"
        )
    return 0


def spread(values: list[float]) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
