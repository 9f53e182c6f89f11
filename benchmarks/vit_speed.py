"""Milliseconds and memory of a training step of our vision transformers and torchvision's: in turns, A B A B ..., in one process.

    python benchmarks/vit_speed.py
    python benchmarks/vit_speed.py swin_small --rounds 30 --batch 64
    python benchmarks/vit_speed.py vit_b_16 swin_t --device cuda --precision bf16 --batch 64 --compile

A step is forward pass, cross-entropy, backward pass and fused AdamW, on the same pictures and from the same weights, in a plain
loop without the Trainer. A pair is one configuration; the losses of the two are compared first.

Memory is the most that is in use in a step beyond what was before it (weights and the optimiser's state), as the device's
allocator counts it; on a CPU, the sum of what the profiler sees allocated and freed.
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler has much to say, none of it of use here

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from lit_models.swin import Swin
from lit_models.vit import ViT, our_name
from runner.errors import InputError

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


def vits(
    size: int, patch: int, layers: int, heads: int, width: int, hidden: int, classes: int
) -> tuple[ViT, nn.Module]:
    """Return our ViT and torchvision's."""
    theirs = VisionTransformer(size, patch, layers, heads, width, hidden, num_classes=classes)
    nn.init.normal_(theirs.heads.head.weight, std=0.02)  # zeros would compare nothing
    ours = ViT(classes, size, patch, layers=layers, heads=heads, width=width, hidden=hidden)
    ours.load_state_dict({our_name(name): tensor for name, tensor in theirs.state_dict().items()})
    return ours, theirs


def swins(patch: int, width: int, depths: list[int], heads: list[int], classes: int) -> tuple[Swin, nn.Module]:
    """Return our Swin and torchvision's; both without stochastic depth, which would draw other numbers in each."""
    theirs = SwinTransformer([patch] * 2, width, depths, heads, [7, 7], stochastic_depth_prob=0.0, num_classes=classes)
    ours = Swin(classes, patch=patch, width=width, depths=depths, heads=heads, stochastic_depth=0.0)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


# name -> (side of the pictures, classes, function that makes ours and theirs with the same weights); the small ones are the
# experiments' on Fashion-MNIST, but for the colours
PAIRS = {
    "vit_small": (28, 10, partial(vits, 28, 4, 6, 4, 64, 128)),
    "swin_small": (28, 10, partial(swins, 2, 48, [2, 2], [2, 4])),
    "vit_b_16": (224, 1000, partial(vits, 224, 16, 12, 12, 768, 3072)),
    "swin_t": (224, 1000, partial(swins, 4, 96, [2, 2, 6, 2], [3, 6, 12, 24])),
}


class Contender:
    """A network, its optimiser, and a batch.

    Args:
        network: from images to logits.
        batch: images (B, 3, H, W) and labels (B,), on the device.
        dtype: of autocast.
        compile: whether to compile the network.
    """

    def __init__(self, network: nn.Module, batch: tuple[Tensor, Tensor], dtype: torch.dtype, compile: bool):
        self.images, self.labels = batch
        self.dtype, self.device = dtype, self.images.device
        self.network = network.to(self.device).train()
        if compile:
            self.network.compile(dynamic=False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)

    def step(self) -> Tensor:
        """Take a step; return the loss."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = F.cross_entropy(self.network(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def milliseconds(self, steps: int) -> float:
        """Return how long a step takes, of so many."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._wait()
        return 1000 * (time.perf_counter() - start) / steps

    def megabytes(self) -> float:
        """Return the most that a step has in use beyond what was there. (Gradients are part of it.)"""
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            self._wait()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.step()
            self._wait()
            return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most / 1e6

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def spread(values: list[float], digits: int) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Measure a pair, and print."""
    size, classes, make = PAIRS[name]
    torch.manual_seed(0)
    batch = torch.randn(arguments.batch, 3, size, size), torch.randint(classes, (arguments.batch,))
    batch = tuple(tensor.to(arguments.device) for tensor in batch)
    pair = [Contender(net, batch, DTYPES[arguments.precision], arguments.compile) for net in make(classes=classes)]
    losses = [float(contender.step()) for contender in pair]
    if abs(losses[0] - losses[1]) > (1e-4 if arguments.precision == "32" else 1e-2) * losses[1]:
        raise InputError(f"{name}: the two do not compute the same, their losses are {losses[0]} and {losses[1]}")
    rounds = [[contender.milliseconds(arguments.steps) for contender in pair] for _ in range(arguments.rounds + 1)]
    ours, theirs = zip(*rounds[1:], strict=True)
    ratio = spread([a / b for a, b in rounds[1:]], 3)
    print(f"{name}  step    ours {spread(ours, 1)} ms  torchvision {spread(theirs, 1)} ms  ratio {ratio}")
    a, b = (contender.megabytes() for contender in pair)
    print(f"{name}  memory  ours {a:.1f} MB  torchvision {b:.1f} MB  ratio {a / b:.3f}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = ["vit_small", "swin_small"]
    parser.add_argument("pairs", nargs="*", default=small, help=f"of {', '.join(PAIRS)} (default: {' '.join(small)})")
    parser.add_argument("--rounds", type=int, default=15, help="that count (default: 15)")
    parser.add_argument("--steps", type=int, default=2, help="in a round (default: 2)")
    parser.add_argument("--batch", type=int, default=32, help="pictures (default: 32)")
    parser.add_argument("--precision", choices=DTYPES, default="32", help="32 or bf16, by autocast (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--compile", action="store_true", help="compile both")
    arguments = parser.parse_args(argv)
    try:
        if min(arguments.rounds, arguments.steps, arguments.batch) < 1:
            raise InputError("--rounds, --steps and --batch start at 1")
        if unknown := [name for name in arguments.pairs if name not in PAIRS]:
            raise InputError(f"no pair {unknown[0]!r}: there are {', '.join(PAIRS)}")
        if arguments.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError("--device cuda: there is no GPU here")
        where = f"{torch.get_num_threads()} of {os.cpu_count()} CPUs" if arguments.device == "cpu" else arguments.device
        print(f"batches of {arguments.batch}, {arguments.precision}, {where}, torch {torch.__version__}:", end=" ")
        print(f"median (least to most) of {arguments.rounds} rounds of {arguments.steps} steps")
        for name in arguments.pairs:
            compare(name, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
